//! The adapters behind Core's ports.

pub mod audit;
pub mod authority;
pub mod direct;
pub mod listener;
pub mod oidc;
pub mod store;
