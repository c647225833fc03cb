//! Core's shells: gRPC, the way through to hosts, HTTP, metrics.

pub mod route;
