//! A full file system.
