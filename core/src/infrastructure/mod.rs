//! The adapters behind Core's ports.

pub mod authority;
pub mod store;
