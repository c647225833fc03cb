//! The one place where an error becomes an HTTP answer: a problem document of RFC 9457.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use ghost_domain::{Error, ErrorCode};
use ghost_proto::view::FieldViolation;
use serde::Serialize;
use utoipa::ToSchema;

/// The media type of RFC 9457.
pub const PROBLEM_JSON: HeaderValue = HeaderValue::from_static("application/problem+json");

/// What went wrong, why, and what to do next (RFC 9457).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Problem {
    /// A URI for the kind of problem: `urn:ghost:error:` and the code.
    pub r#type: String,
    /// The kind of problem, for people.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What happened this time.
    pub detail: String,
    /// The stable code, which programs match on.
    pub code: String,
    /// Why it happened, if that is known.
    pub cause: Option<String>,
    /// What to do next.
    pub hint: Option<String>,
    /// The operation it belongs to.
    #[schema(format = Uuid)]
    pub operation_id: Option<String>,
    /// Which fields of the request broke which rule.
    pub violations: Vec<FieldViolation>,
}

/// The HTTP status of an error code.
pub const fn http_status(code: ErrorCode) -> StatusCode {
    match code {
        ErrorCode::InvalidArgument
        | ErrorCode::HostRequired
        | ErrorCode::InvalidName
        | ErrorCode::InvalidSize
        | ErrorCode::InvalidUserData
        | ErrorCode::DiskTooSmall => StatusCode::BAD_REQUEST,

        ErrorCode::PayloadTooLarge | ErrorCode::ImageTooLarge => StatusCode::PAYLOAD_TOO_LARGE,

        // The Idempotency-Key draft of the IETF names 422 for a key used twice.
        ErrorCode::RequestIdReused
        | ErrorCode::UnsafeImage
        | ErrorCode::UnsupportedImage
        | ErrorCode::ChecksumMismatch => StatusCode::UNPROCESSABLE_ENTITY,

        ErrorCode::VmNotFound
        | ErrorCode::ImageNotFound
        | ErrorCode::OperationNotFound
        | ErrorCode::NetworkNotFound
        | ErrorCode::CredentialNotFound
        | ErrorCode::GuestFileNotFound
        | ErrorCode::HostNotFound
        | ErrorCode::CommandNotFound
        | ErrorCode::TenantNotFound
        | ErrorCode::UserNotFound
        | ErrorCode::NotFound => StatusCode::NOT_FOUND,

        ErrorCode::VmAmbiguous
        | ErrorCode::HostAmbiguous
        | ErrorCode::HostNameTaken
        | ErrorCode::HostLocked
        | ErrorCode::ConfirmationRequired
        | ErrorCode::StaleCommand
        | ErrorCode::CommandTaken
        | ErrorCode::TenantExists
        | ErrorCode::TenantInUse
        | ErrorCode::NotEnrolled
        | ErrorCode::AlreadyEnrolled
        | ErrorCode::NameTaken
        | ErrorCode::ImageExists
        | ErrorCode::ImageInUse
        | ErrorCode::VmBusy
        | ErrorCode::VmRunning
        | ErrorCode::VmNotRunning
        | ErrorCode::WrongState
        | ErrorCode::DeleteProtected
        | ErrorCode::OperationFinished
        | ErrorCode::GuestUnsupported
        | ErrorCode::GuestFrozen
        | ErrorCode::Cancelled => StatusCode::CONFLICT,

        ErrorCode::GenerationMismatch => StatusCode::PRECONDITION_FAILED,

        ErrorCode::InsufficientResources
        | ErrorCode::NoHostFits
        | ErrorCode::QuotaExceeded
        | ErrorCode::DiskFull => StatusCode::INSUFFICIENT_STORAGE,

        ErrorCode::TooManyRequests => StatusCode::TOO_MANY_REQUESTS,

        ErrorCode::DownloadFailed
        | ErrorCode::HypervisorFailed
        | ErrorCode::GuestFailed
        | ErrorCode::NetworkFailed => StatusCode::BAD_GATEWAY,

        ErrorCode::HypervisorUnavailable
        | ErrorCode::GuestUnreachable
        | ErrorCode::StoreUnavailable
        | ErrorCode::Recovering
        | ErrorCode::ShuttingDown
        | ErrorCode::HostOffline
        | ErrorCode::CoreUnreachable
        | ErrorCode::AgentUnreachable => StatusCode::SERVICE_UNAVAILABLE,

        ErrorCode::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        ErrorCode::Unauthenticated | ErrorCode::TokenInvalid => StatusCode::UNAUTHORIZED,
        ErrorCode::PermissionDenied
        | ErrorCode::GuestPathDenied
        | ErrorCode::GuestAccessOff
        | ErrorCode::CorePermissionDenied
        | ErrorCode::Lockdown => StatusCode::FORBIDDEN,
        ErrorCode::IoFailed | ErrorCode::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

impl From<&Error> for Problem {
    fn from(error: &Error) -> Self {
        let code = error.code().as_str();
        let mut title = code.replace('_', " ");
        if let Some(first) = title.get_mut(..1) {
            first.make_ascii_uppercase();
        }
        Self {
            r#type: format!("urn:ghost:error:{code}"),
            title,
            status: http_status(error.code()).as_u16(),
            detail: error.message().to_owned(),
            code: code.to_owned(),
            cause: error.cause().map(str::to_owned),
            hint: error.hint_text().map(str::to_owned),
            operation_id: error.operation().map(|id| id.to_string()),
            violations: error
                .violations()
                .iter()
                .map(|one| FieldViolation {
                    field: one.field.clone(),
                    description: one.description.clone(),
                })
                .collect(),
        }
    }
}

/// An error on its way to an HTTP caller.
#[derive(Debug)]
pub struct Failure(pub Error);

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let Self(error) = self;
        let status = http_status(error.code());
        if status == StatusCode::INTERNAL_SERVER_ERROR {
            tracing::error!(
                code = error.code().as_str(),
                cause = error.cause(),
                "{}",
                error.message()
            );
        }
        let mut response = (status, Json(Problem::from(&error))).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, PROBLEM_JSON);
        if let Some(delay) = error.retry_delay() {
            // Whole seconds (RFC 9110, 10.2.3), rounded up so that nobody comes too early.
            let seconds = delay.as_secs() + u64::from(delay.subsec_nanos() > 0);
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(
                header::WWW_AUTHENTICATE,
                HeaderValue::from_static("Bearer realm=\"ghost\""),
            );
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_problem_has_all_parts() {
        let error = Error::new(ErrorCode::VmBusy, "web is busy")
            .because("it starts")
            .hint("wait")
            .field("vm", "busy")
            .retry_after(Duration::from_millis(1500));
        let response = Failure(error).into_response();
        assert_eq!(response.status(), StatusCode::CONFLICT);
        assert_eq!(response.headers()[header::RETRY_AFTER], "2");
        assert_eq!(response.headers()[header::CONTENT_TYPE], PROBLEM_JSON);
        let body = axum::body::to_bytes(response.into_body(), 4096)
            .await
            .unwrap();
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(
            body,
            serde_json::json!({
                "type": "urn:ghost:error:vm_busy", "title": "Vm busy", "status": 409,
                "detail": "web is busy", "code": "vm_busy", "cause": "it starts", "hint": "wait",
                "operation_id": null, "violations": [{"field": "vm", "description": "busy"}],
            })
        );
    }
}
