//! The shells against the real use cases, over fake ports: gRPC through a real Unix socket and real
//! mTLS, HTTP through the router and through real connections.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "tests fail by panicking; clippy's exception covers #[test] functions but not their helpers"
)]

mod core;
mod errors;
mod grpc;
mod guests;
mod http;
mod metrics;
mod world;
