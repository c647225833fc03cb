//! The services: decode, call a use case, encode. Nothing is decided here.

mod access;
mod guest;
mod health;
mod host;
mod image;
mod operation;
mod stream;
mod vm;

pub(super) use access::Access;
pub(super) use guest::Guests;
pub(super) use health::Health;
pub(super) use host::{Events, Host, Networks};
pub(super) use image::Images;
pub(super) use operation::Operations;
pub(crate) use stream::Leash;
pub(super) use vm::Vms;

use ghost_domain::{Error, ErrorCode, Principal};
use tonic::{Extensions, Status};

use super::status::to_status;

/// The caller, whom the guard has put there.
fn principal(extensions: &Extensions) -> Result<Principal, Status> {
    extensions.get::<Principal>().cloned().ok_or_else(|| {
        to_status(&Error::new(
            ErrorCode::Unauthenticated,
            "the call has no identity",
        ))
    })
}

/// Errors of use cases as statuses.
trait OrStatus<T> {
    fn or_status(self) -> Result<T, Status>;
}

impl<T> OrStatus<T> for ghost_domain::Result<T> {
    fn or_status(self) -> Result<T, Status> {
        self.map_err(|error| to_status(&error))
    }
}
