//! The one place where an error becomes a gRPC status.
//!
//! What programs match on is `ErrorInfo.reason`, the stable code; the gRPC code is for generic
//! clients and proxies. `metadata` carries `cause`, `hint` and `operation_id` where they are known,
//! `RetryInfo` stands where the same call may succeed later, `BadRequest` names the fields.

use std::collections::HashMap;

use ghost_domain::{Error, ErrorCode};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

/// The `ErrorInfo.domain` of all our errors.
pub const ERROR_DOMAIN: &str = "ghost";

/// Most bytes of one text in a status. The details travel in a trailer, and common clients refuse
/// more than 8 or 16 KiB of headers: an error that is too long would arrive as another one.
const MOST_TEXT: usize = 1024;
/// Most fields that are named.
const MOST_VIOLATIONS: usize = 8;

/// The gRPC code of an error code.
pub const fn grpc_code(code: ErrorCode) -> Code {
    match code {
        ErrorCode::InvalidArgument
        | ErrorCode::InvalidName
        | ErrorCode::InvalidSize
        | ErrorCode::InvalidUserData
        | ErrorCode::DiskTooSmall
        | ErrorCode::RequestIdReused
        | ErrorCode::VmAmbiguous
        | ErrorCode::HostAmbiguous
        | ErrorCode::HostRequired
        | ErrorCode::UnsafeImage
        | ErrorCode::UnsupportedImage
        | ErrorCode::ImageTooLarge => Code::InvalidArgument,

        ErrorCode::VmNotFound
        | ErrorCode::ImageNotFound
        | ErrorCode::OperationNotFound
        | ErrorCode::NetworkNotFound
        | ErrorCode::CredentialNotFound
        | ErrorCode::GuestFileNotFound
        | ErrorCode::HostNotFound
        | ErrorCode::CommandNotFound
        | ErrorCode::TenantNotFound
        | ErrorCode::UserNotFound => Code::NotFound,

        // What only a client of another version can ask for.
        ErrorCode::NotFound => Code::Unimplemented,

        ErrorCode::NameTaken
        | ErrorCode::ImageExists
        | ErrorCode::HostNameTaken
        | ErrorCode::TenantExists
        | ErrorCode::AlreadyEnrolled => Code::AlreadyExists,

        ErrorCode::ImageInUse
        | ErrorCode::VmRunning
        | ErrorCode::VmNotRunning
        | ErrorCode::WrongState
        | ErrorCode::DeleteProtected
        | ErrorCode::OperationFinished
        | ErrorCode::GuestUnsupported
        | ErrorCode::GuestFrozen
        | ErrorCode::GuestFailed
        | ErrorCode::ChecksumMismatch
        | ErrorCode::HostLocked
        | ErrorCode::ConfirmationRequired
        | ErrorCode::StaleCommand
        | ErrorCode::CommandTaken
        | ErrorCode::TenantInUse
        | ErrorCode::NotEnrolled => Code::FailedPrecondition,

        // Another request got in between: look again, then decide.
        ErrorCode::VmBusy | ErrorCode::GenerationMismatch => Code::Aborted,

        ErrorCode::InsufficientResources
        | ErrorCode::DiskFull
        | ErrorCode::TooManyRequests
        | ErrorCode::PayloadTooLarge
        | ErrorCode::NoHostFits
        | ErrorCode::QuotaExceeded => Code::ResourceExhausted,

        ErrorCode::DownloadFailed
        | ErrorCode::HypervisorUnavailable
        | ErrorCode::GuestUnreachable
        | ErrorCode::StoreUnavailable
        | ErrorCode::Recovering
        | ErrorCode::ShuttingDown
        | ErrorCode::HostOffline
        | ErrorCode::CoreUnreachable
        | ErrorCode::AgentUnreachable => Code::Unavailable,

        ErrorCode::DeadlineExceeded => Code::DeadlineExceeded,
        ErrorCode::Cancelled => Code::Cancelled,
        ErrorCode::Unauthenticated | ErrorCode::TokenInvalid => Code::Unauthenticated,
        ErrorCode::PermissionDenied
        | ErrorCode::GuestPathDenied
        | ErrorCode::GuestAccessOff
        | ErrorCode::CorePermissionDenied
        | ErrorCode::Lockdown => Code::PermissionDenied,

        ErrorCode::HypervisorFailed
        | ErrorCode::NetworkFailed
        | ErrorCode::IoFailed
        | ErrorCode::Internal => Code::Internal,
    }
}

/// The status of an error.
pub fn to_status(error: &Error) -> Status {
    let code = grpc_code(error.code());
    if matches!(code, Code::Internal) {
        tracing::error!(
            code = error.code().as_str(),
            cause = error.cause(),
            "{}",
            error.message()
        );
    }
    let mut metadata = HashMap::new();
    if let Some(cause) = error.cause() {
        metadata.insert("cause".to_owned(), shorten(cause));
    }
    if let Some(hint) = error.hint_text() {
        metadata.insert("hint".to_owned(), shorten(hint));
    }
    if let Some(operation) = error.operation() {
        metadata.insert("operation_id".to_owned(), operation.to_string());
    }
    let mut details = ErrorDetails::with_error_info(error.code().as_str(), ERROR_DOMAIN, metadata);
    if let Some(delay) = error.retry_delay() {
        details.set_retry_info(Some(delay));
    }
    if !error.violations().is_empty() {
        let fields: Vec<_> = error
            .violations()
            .iter()
            .take(MOST_VIOLATIONS)
            .map(|one| FieldViolation::new(shorten(&one.field), shorten(&one.description)))
            .collect();
        details.set_bad_request(fields);
    }
    Status::with_error_details(code, shorten(error.message()), details)
}

/// The text, cut at a character's end where it is too long.
fn shorten(text: &str) -> String {
    if text.len() <= MOST_TEXT {
        return text.to_owned();
    }
    let mut end = MOST_TEXT;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}…", &text[..end])
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use ghost_domain::OperationId;

    #[test]
    fn all_parts_of_an_error_arrive() {
        let operation = OperationId::random();
        let error = Error::new(ErrorCode::VmBusy, "web is busy")
            .because("another operation holds it")
            .hint("wait for it")
            .retry_after(Duration::from_secs(2))
            .field("vm", "busy")
            .of_operation(operation);
        let status = to_status(&error);
        assert_eq!(status.code(), Code::Aborted);
        assert_eq!(status.message(), "web is busy");
        let details = status.check_error_details().unwrap();
        let info = details.error_info().unwrap();
        assert_eq!(
            (info.reason.as_str(), info.domain.as_str()),
            ("vm_busy", "ghost")
        );
        assert_eq!(info.metadata["cause"], "another operation holds it");
        assert_eq!(info.metadata["hint"], "wait for it");
        assert_eq!(info.metadata["operation_id"], operation.to_string());
        assert_eq!(
            details.retry_info().unwrap().retry_delay,
            Some(Duration::from_secs(2))
        );
        assert_eq!(
            details.bad_request().unwrap().field_violations[0].field,
            "vm"
        );
    }

    #[test]
    fn a_long_error_still_fits_into_a_trailer() {
        let mut error = Error::new(ErrorCode::InvalidUserData, "é".repeat(50_000))
            .because("ü".repeat(50_000))
            .hint("x".repeat(50_000));
        for _ in 0..100 {
            error = error.field("user_data", "y".repeat(50_000));
        }
        let status = to_status(&error);
        // Base64 makes four bytes of three.
        assert!(
            status.details().len() * 4 / 3 < 16 * 1024,
            "{}",
            status.details().len()
        );
        let details = status.check_error_details().unwrap();
        assert_eq!(
            details.bad_request().unwrap().field_violations.len(),
            MOST_VIOLATIONS
        );
        assert!(details.error_info().unwrap().metadata["hint"].ends_with('…'));
    }
}
