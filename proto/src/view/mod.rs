//! The JSON of Ghost, the same in HTTP and on the command line, made from the protobuf messages.
//!
//! Rules that hold for every view, so that a reader never has to guess:
//!
//! - keys are snake_case and always there; what is absent or unknown is `null`, an empty list is
//!   `[]` and an empty map `{}`;
//! - ids are UUID strings; sizes are whole numbers of bytes (`*_bytes`); durations are numbers of
//!   seconds, with a fraction where it matters (`*_seconds`); times are RFC 3339 in UTC with
//!   milliseconds;
//! - states and statuses are lower-case names; keys are only ever added.
//!
//! Each view has a `From` of its message and nothing else: no view knows a transport.

mod access;
mod error;
mod fleet;
mod guest;
mod host;
mod image;
mod operation;
mod vm;

pub use access::{ApiKey, Certificate, CreatedKey, Identity, JoinToken};
pub use error::{ErrorBody, ErrorDetail, FieldViolation};
pub use fleet::{
    CommandStatus, CreatedFleetKey, DirectAddress, FleetAuditEntry, FleetCapacity, FleetCommand,
    FleetFacts, FleetHealth, FleetHost, FleetKey, FleetLink, FleetQuota, FleetReplica, FleetStatus,
    FleetStore, FleetToken, FleetUsage, FleetUser, FleetVm, Placement, RejectedHost, Tenant,
};
pub use guest::{
    AuditEntry, AuditVerdict, GuestAccess, GuestCloudInit, GuestFile, GuestFilesystem, GuestFreeze,
    GuestHistory, GuestInterface, GuestLayer, GuestPing, GuestSample, GuestStatus, GuestTelemetry,
    GuestUpdate, Lockdown,
};
pub use host::{
    AgentStatus, CoreCarrier, CoreLink, Event, HostStatus, Hypervisor, Lease, Machine, Network,
    ResourceShares, Resources, Store,
};
pub use image::{CatalogueEntry, Image};
pub use operation::{Operation, OperationError, OperationStatus, Progress};
pub use vm::{
    Autostart, Condition, DesiredState, Disk, GuestPolicy, Nic, RestartPolicy, Vm, VmState,
};

use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;

const RFC_3339_MILLIS: &[BorrowedFormatItem<'_>] =
    format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");

/// A protobuf time as RFC 3339 in UTC with milliseconds; `None` for one outside the years that
/// RFC 3339 can write.
pub fn rfc3339(at: &prost_types::Timestamp) -> Option<String> {
    let nanos = i128::from(at.seconds) * 1_000_000_000 + i128::from(at.nanos);
    let at = OffsetDateTime::from_unix_timestamp_nanos(nanos).ok()?;
    if !(0..=9999).contains(&at.year()) {
        return None;
    }
    at.format(RFC_3339_MILLIS).ok()
}

/// A protobuf duration in seconds, rounded to milliseconds.
#[expect(
    clippy::cast_precision_loss,
    reason = "a double holds every number of seconds below 285 million years exactly"
)]
pub fn seconds(duration: &prost_types::Duration) -> f64 {
    duration.seconds as f64 + f64::from(duration.nanos / 1_000_000) / 1000.0
}

/// A time that is always set by an agent; an empty string where an agent failed to.
fn time_of(at: Option<&prost_types::Timestamp>) -> String {
    at.and_then(rfc3339).unwrap_or_default()
}

fn optional_time(at: Option<&prost_types::Timestamp>) -> Option<String> {
    at.and_then(rfc3339)
}

fn optional_seconds(duration: Option<&prost_types::Duration>) -> Option<f64> {
    duration.map(seconds)
}

/// Protobuf has no null for text: an empty string is one.
fn filled(text: String) -> Option<String> {
    Some(text).filter(|text| !text.is_empty())
}

fn each<A, B: From<A>>(items: Vec<A>) -> Vec<B> {
    items.into_iter().map(B::from).collect()
}

#[cfg(test)]
mod tests;
