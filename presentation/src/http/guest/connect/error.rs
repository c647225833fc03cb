//! Errors in Connect's form.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use ghost_domain::Error;
use serde::Serialize;
use tonic::Code;
use utoipa::ToSchema;

use super::wire::engine;
use crate::grpc::guard::code_name;
use crate::grpc::status::{ERROR_DOMAIN, grpc_code};

/// An error as Connect writes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(in crate::http) struct ConnectError {
    /// Connect's name of the kind of error.
    code: String,
    /// What went wrong, why, and what to do.
    message: String,
    /// Our own code and its parts, as a `google.rpc.ErrorInfo`.
    details: Vec<ConnectDetail>,
}

/// A part of an error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(in crate::http) struct ConnectDetail {
    r#type: String,
    /// The message's bytes, base64 without padding.
    value: String,
    /// The same, for people.
    debug: Debug,
}

/// What an `ErrorInfo` says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(in crate::http) struct Debug {
    reason: String,
    domain: String,
}

/// An error on its way to a caller of these.
#[derive(Debug)]
pub(in crate::http) struct ConnectFailure(pub(in crate::http) Error);

impl From<Error> for ConnectFailure {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

impl IntoResponse for ConnectFailure {
    fn into_response(self) -> Response {
        let Self(error) = self;
        let code = grpc_code(error.code());
        if code == Code::Internal {
            tracing::error!(
                code = error.code().as_str(),
                cause = error.cause(),
                "{}",
                error.message()
            );
        }
        let mut message = error.message().to_owned();
        for more in [error.cause(), error.hint_text()].into_iter().flatten() {
            message.push_str(": ");
            message.push_str(more);
        }
        let reason = error.code().as_str();
        let body = ConnectError {
            // Connect spells this one as Americans do.
            code: code_name(code).replace("cancelled", "canceled"),
            message,
            details: vec![ConnectDetail {
                r#type: "google.rpc.ErrorInfo".to_owned(),
                value: engine(false).encode(error_info(reason)),
                debug: Debug {
                    reason: reason.to_owned(),
                    domain: ERROR_DOMAIN.to_owned(),
                },
            }],
        };
        let mut response = (http_status(code), Json(body)).into_response();
        if code == Code::Unauthenticated {
            response.headers_mut().insert(
                header::WWW_AUTHENTICATE,
                HeaderValue::from_static("Bearer realm=\"ghost\""),
            );
        }
        response
    }
}

/// A `google.rpc.ErrorInfo` as bytes: `reason` is field 1, `domain` field 2, both strings (the wire
/// format of protobuf, <https://protobuf.dev/programming-guides/encoding/>).
fn error_info(reason: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (tag, text) in [(0x0a, reason), (0x12, ERROR_DOMAIN)] {
        bytes.push(tag);
        // Shorter than 128 bytes both, which is a length of one byte.
        bytes.push(u8::try_from(text.len().min(127)).unwrap_or(127));
        bytes.extend(text.bytes().take(127));
    }
    bytes
}

/// The table of the protocol's "HTTP to error code" section.
const fn http_status(code: Code) -> StatusCode {
    match code {
        Code::Ok => StatusCode::OK,
        // 499, which has no name in any RFC, is what Connect says.
        Code::Cancelled => match StatusCode::from_u16(499) {
            Ok(status) => status,
            Err(_) => StatusCode::REQUEST_TIMEOUT,
        },
        Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange => {
            StatusCode::BAD_REQUEST
        }
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::AlreadyExists | Code::Aborted => StatusCode::CONFLICT,
        Code::PermissionDenied => StatusCode::FORBIDDEN,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        Code::Unimplemented => StatusCode::NOT_IMPLEMENTED,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::Unknown | Code::Internal | Code::DataLoss => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

#[cfg(test)]
mod tests {
    use ghost_domain::ErrorCode;

    use super::*;

    #[test]
    fn the_errors_detail_is_an_error_info() {
        use prost::Message;
        let bytes = error_info("guest_unreachable");
        let info = tonic_types::pb::ErrorInfo::decode(bytes.as_slice()).unwrap();
        assert_eq!(info.reason, "guest_unreachable");
        assert_eq!(info.domain, "ghost");
        for code in ErrorCode::ALL {
            assert!(code.as_str().len() < 128);
        }
    }
}
