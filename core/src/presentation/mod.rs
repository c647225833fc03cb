//! Core's shells: gRPC, the way through to hosts, HTTP, metrics.
//!
//! Start reading at [`grpc::Front`]: every connection of people, programs, hosts that enrol and other
//! replicas comes to it. A call for a host goes on through [`route::Router`], all others to the
//! services of Core itself.

mod convert;
pub mod grpc;
pub mod http;
pub mod metrics;
mod peer;
pub mod route;
mod status;

pub use peer::{Peer, PeerKind};
