//! Ghost Cloud Core: the registry of hosts, their enrolment, and the way to each of them through the
//! link that it keeps open itself.
//!
//! ```text
//! ghostctl ──gRPC, HTTP──> presentation ─> application ─> FleetStore (sled, or etcd)
//!                               │               │
//!                               │               └─> Fleet: all records of all hosts, in memory
//!                               └─ calls for a host ──> HostLinks ──yamux over TLS──> ghost-agent
//! ```
//!
//! The layers are modules here: [`domain`] depends on nothing of transport or storage,
//! [`application`] on the domain, [`infrastructure`] and [`presentation`] on both; `main` composes.
//! Start reading at [`domain`] for what is known, at `application::Fleet` for how it is kept.

pub mod application;
pub mod domain;
pub mod infrastructure;
pub mod presentation;
