//! Core's gRPC: one door for every connection.
//!
//! ```text
//! connection ─> Front::serve ─> guard ─┬─> services of Core (fleet, enrolment, access, health)
//!   (who it is: Peer)                  └─> routed ─> route::Router ─> the host
//! ```
//!
//! The guard finds out who calls, limits how much, looks up who may, writes down what was changed,
//! and gives every answer its numbers, its trace and its request id. What it looks up stands in two
//! tables: [`methods::CORE_METHODS`] and, for calls to hosts,
//! [`ghost_presentation::grpc::access::METHODS`].

pub(in crate::presentation) mod front;
mod limit;
pub mod methods;
mod notes;
pub(in crate::presentation) mod routed;
mod services;
mod watched;

pub use front::{Front, FrontOptions, Parts};
pub use limit::Limits;
pub use notes::Note;
pub(in crate::presentation) use services::listing::AsJson;
