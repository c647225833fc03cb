//! What happens inside VMs: programs, terminals, files, accounts, history, lockdown and audit.
//!
//! What a guest says is text in JSON here and nowhere else: in headers stand only numbers that we
//! wrote ourselves.

mod audit;
mod bodies;
pub(super) mod connect;
mod console;
mod exec;
mod files;
mod requests;
mod session;

// With them come the hidden types by which `routes!` finds their descriptions.
pub(super) use audit::*;
pub(super) use console::*;
pub(super) use exec::*;
pub(super) use files::*;
pub(super) use requests::*;

pub(super) use bodies::{MOST_OUTPUT, bounds};
pub(super) use session::{Framing, carry, check_origin};

use std::convert::Infallible;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use ghost_application::guest::GuestTarget;

use crate::request::CalledAs;

/// The id of the request, for the audit log.
pub(super) struct RequestName(pub(super) String);

impl RequestName {
    /// Which guest, in this request.
    fn target(self, vm: String) -> GuestTarget {
        GuestTarget {
            vm,
            request_id: self.0,
        }
    }
}

impl<S: Sync> FromRequestParts<S> for RequestName {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        let id = parts.extensions.get::<CalledAs>();
        Ok(Self(id.map(|id| id.0.clone()).unwrap_or_default()))
    }
}
