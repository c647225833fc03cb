//! The adapters behind Core's ports.

pub mod store;
