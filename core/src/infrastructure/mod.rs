//! The adapters behind Core's ports.
