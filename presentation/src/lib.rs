//! The shells of Ghost's agent: gRPC, HTTP and metrics. Each decodes a request, finds out who
//! asks, checks the role, calls one use case and encodes what comes back.
//!
//! Start reading at [`grpc::serve`], [`http::router`] and [`metrics::router`].
//!
//! Invariants held by tests:
//! - every RPC and every HTTP route names the role that it needs, in one table each;
//! - an error becomes a gRPC status or an HTTP problem in one exhaustive match each;
//! - nothing here knows infrastructure: certificates are read and traces are tied by functions
//!   that the composition root gives;
//! - whom Core vouches for is believed on Core's own streams and nowhere else;
//! - no input ends the process, and none is believed in size or time.

mod access;
mod connection;
pub mod convert;
mod core_caller;
pub mod grpc;
pub mod http;
pub mod metrics;
pub mod request;
mod socket;
mod tunnel;

pub use access::{Access, Shape};
pub use connection::{CertificateReader, ConnectionLimits, CoreDoor, Listener, PeerCertificate};
/// How far a call reaches that comes through Ghost Core.
pub use ghost_application::fleet::CoreReach;
pub use socket::{LocalPeer, LocalSocket, SOCKET_GROUP};
pub use tunnel::{CoreStream, listeners as core_listeners};

/// Ties the span of a request to the trace that its headers name (W3C `traceparent`). The
/// composition root gives it, because only that knows which tracing system there is.
pub type TraceParent = std::sync::Arc<dyn Fn(&axum::http::HeaderMap, &tracing::Span) + Send + Sync>;
