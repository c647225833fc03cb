//! HTTP.
pub mod problem;
