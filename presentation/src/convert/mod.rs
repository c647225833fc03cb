//! Between the application's types and the protocol's messages, as free functions: neither side
//! knows the other (and Rust's orphan rule would not let them).
//!
//! HTTP has no conversions of its own: it turns these messages into the JSON views of
//! [`ghost_proto::view`], so that the two shells cannot tell different stories.

mod access;
mod guest;
mod host;
mod image;
mod operation;
mod vm;

pub use access::{api_key, certificate, created_key, identity, issued, join_token, lifetime};
pub use guest::{
    MOST_PIECE, address, audit_entry, audit_verdict, directory_make, exec_exit, exec_output,
    exec_request, file_sum, file_write, freeze, guest_access, guest_directory, guest_file,
    guest_history, guest_ping, guest_status, guest_telemetry, guest_update, link_make, lockdown,
    mode, optional_length, signal, stamp, terminal_kind, terminal_size,
};
pub use host::{AgentInfo, core_link, event, network, severity, status};
pub use image::{catalogue_entry, image};
pub use operation::operation;
pub use vm::{create_vm, desired_state, stop, update_vm, vm, vm_state};

use std::time::Duration;

use ghost_domain::{Error, ErrorCode, RequestId, Result, Timestamp};

/// A wall-clock stamp as a message.
pub fn timestamp(at: Timestamp) -> prost_types::Timestamp {
    let millis = at.unix_millis();
    prost_types::Timestamp {
        seconds: millis.div_euclid(1000),
        nanos: i32::try_from(millis.rem_euclid(1000) * 1_000_000).unwrap_or(0),
    }
}

/// A length of time as a message; saturates at what a message can hold.
pub fn duration(length: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(length.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(length.subsec_nanos()).unwrap_or(0),
    }
}

/// The longest time that a caller may name: a year.
const LONGEST: Duration = Duration::from_secs(366 * 24 * 3600);

/// A length of time that a caller gave.
///
/// # Errors
/// [`ErrorCode::InvalidArgument`] naming `field` for a negative or absurd one.
pub fn length_of(given: &prost_types::Duration, field: &str) -> Result<Duration> {
    let seconds = u64::try_from(given.seconds).ok();
    let nanos = u32::try_from(given.nanos)
        .ok()
        .filter(|nanos| *nanos < 1_000_000_000);
    seconds
        .zip(nanos)
        .map(|(seconds, nanos)| Duration::new(seconds, nanos))
        .filter(|length| *length <= LONGEST)
        .ok_or_else(|| {
            Error::new(
                ErrorCode::InvalidArgument,
                format!("{field} is not a length of time"),
            )
            .because("0 to 366 days are possible")
            .field(field, "0 to 366 days")
        })
}

/// The caller's idempotency key; empty is none.
///
/// # Errors
/// As [`RequestId::new`].
pub fn request_id(text: &str) -> Result<Option<RequestId>> {
    if text.is_empty() {
        return Ok(None);
    }
    RequestId::new(text)
        .map(Some)
        .map_err(|error| error.field("request_id", "1 to 128 printable ASCII characters"))
}

/// Protobuf has no null for text: empty is absent.
fn filled(text: String) -> Option<String> {
    Some(text).filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_before_the_epoch_keep_positive_nanos() {
        let at = timestamp(Timestamp::from_unix_millis(-250));
        assert_eq!((at.seconds, at.nanos), (-1, 750_000_000));
    }

    #[test]
    fn absurd_lengths_are_refused() {
        for (seconds, nanos) in [
            (-1, 0),
            (0, -1),
            (0, 2_000_000_000),
            (i64::MAX, 0),
            (i64::MIN, i32::MIN),
        ] {
            let given = prost_types::Duration { seconds, nanos };
            let error = length_of(&given, "timeout").unwrap_err();
            assert_eq!(error.code(), ErrorCode::InvalidArgument);
            assert_eq!(error.violations()[0].field, "timeout");
        }
        let given = prost_types::Duration {
            seconds: 30,
            nanos: 5,
        };
        assert_eq!(length_of(&given, "timeout").unwrap(), Duration::new(30, 5));
    }

    #[test]
    fn a_bad_request_id_names_its_field() {
        assert_eq!(request_id("").unwrap(), None);
        assert_eq!(
            request_id("a b").unwrap_err().violations()[0].field,
            "request_id"
        );
    }
}
