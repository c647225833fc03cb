//! `limiquantix.compute.v1.VMService` for guests: five calls of the Connect protocol's unary form
//! with JSON (<https://connectrpc.com/docs/protocol/#unary-request>), under the paths and with the
//! field names that its clients use, so that those go on working with a key added.
//!
//! Names of fields are protobuf's JSON names, and the original ones are taken as well; 64-bit
//! numbers come as text (<https://protobuf.dev/programming-guides/json/>). What is not understood
//! is refused here too: a script that runs as somebody else than was asked for is worse than none.

mod calls;
mod error;
mod wire;

pub(in crate::http) use calls::*;
pub(in crate::http) use error::ConnectFailure;

/// Where these calls are.
pub(in crate::http) const PREFIX: &str = "/limiquantix.compute.v1.VMService/";
