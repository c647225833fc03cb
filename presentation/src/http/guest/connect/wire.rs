//! How these calls are written: headers, deadlines, numbers, bytes.

use std::time::Duration;

use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, header};
use base64::alphabet::{STANDARD, URL_SAFE};
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use ghost_domain::{Error, ErrorCode, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};

use super::super::super::extract::{json_bytes, one};
use super::error::ConnectFailure;

/// Most bytes of a request: a mebibyte as base64, and the rest.
const MOST_BODY: usize = 1536 * 1024;

/// A call's message and its deadline.
pub(in crate::http) struct Called<T> {
    pub(super) message: T,
    pub(super) deadline: Option<Duration>,
}

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Called<T> {
    type Rejection = ConnectFailure;

    async fn from_request(request: Request, _: &S) -> Result<Self, ConnectFailure> {
        let headers = request.headers();
        if one(headers, "connect-protocol-version")?.is_some_and(|version| version != "1") {
            return Err(Error::new(
                ErrorCode::InvalidArgument,
                "this version of the Connect protocol is not spoken",
            )
            .field("Connect-Protocol-Version", "1")
            .into());
        }
        if one(headers, header::CONTENT_ENCODING.as_str())?.is_some_and(|how| how != "identity") {
            return Err(
                Error::new(ErrorCode::InvalidArgument, "the body is compressed")
                    .field("Content-Encoding", "identity")
                    .into(),
            );
        }
        let deadline = deadline(headers)?;
        let bytes = json_bytes(request, MOST_BODY).await?;
        let message = serde_json::from_slice(&bytes).map_err(|cause| {
            Error::new(
                ErrorCode::InvalidArgument,
                "the message is not what this call takes",
            )
            .because(cause)
            .hint("see /v1/openapi.json for the fields")
        })?;
        Ok(Self { message, deadline })
    }
}

/// `Connect-Timeout-Ms`: at most ten digits.
fn deadline(headers: &HeaderMap) -> Result<Option<Duration>> {
    let Some(text) = one(headers, "connect-timeout-ms")? else {
        return Ok(None);
    };
    let digits = (1..=10).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    digits
        .then(|| text.parse().ok())
        .flatten()
        .map(|millis| Some(Duration::from_millis(millis)))
        .ok_or_else(|| {
            Error::new(ErrorCode::InvalidArgument, "the deadline cannot be read")
                .field("Connect-Timeout-Ms", "at most ten digits")
        })
}

/// Gives up at the deadline; what the call holds is dropped, which cancels it in the guest.
pub(super) async fn within<T>(
    deadline: Duration,
    call: impl Future<Output = Result<T>>,
) -> Result<T> {
    tokio::time::timeout(deadline, call).await.map_err(|_| {
        Error::new(ErrorCode::DeadlineExceeded, "the call took too long").because(format!(
            "it was given up after {} s",
            deadline.as_secs_f64()
        ))
    })?
}

/// Base64 of either alphabet; with padding where `padded`, and read either way.
const fn engine_of(url: bool, padded: bool) -> GeneralPurpose {
    let config = GeneralPurposeConfig::new()
        .with_encode_padding(padded)
        .with_decode_padding_mode(DecodePaddingMode::Indifferent);
    GeneralPurpose::new(if url { &URL_SAFE } else { &STANDARD }, config)
}

pub(super) const fn engine(url: bool) -> GeneralPurpose {
    engine_of(url, false)
}

/// A number, or one as text: protobuf's JSON takes either; `null` is 0.
pub(super) fn number<'de, D: Deserializer<'de>, T>(from: D) -> std::result::Result<T, D::Error>
where
    T: Deserialize<'de> + std::str::FromStr + Default,
    T::Err: std::fmt::Display,
{
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either<T> {
        Number(T),
        Text(String),
    }
    match Option::<Either<T>>::deserialize(from)? {
        None => Ok(T::default()),
        Some(Either::Number(number)) => Ok(number),
        Some(Either::Text(text)) => text.parse().map_err(serde::de::Error::custom),
    }
}
