//! Reading requests strictly: whatever is not understood is refused, as a problem document.

use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use futures::StreamExt;
use ghost_domain::{Error, ErrorCode, Principal, RequestId, Result};
use serde::de::DeserializeOwned;

use super::problem::Failure;

/// Most bytes of a JSON body: user-data and network config with room to spare.
pub(super) const MOST_BODY: usize = 1024 * 1024;

/// The caller, whom the guard has put there.
pub(super) struct Caller(pub(super) Principal);

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Failure> {
        parts
            .extensions
            .get::<Principal>()
            .cloned()
            .map(Self)
            .ok_or_else(|| {
                Failure(Error::new(
                    ErrorCode::Unauthenticated,
                    "the request has no identity",
                ))
            })
    }
}

/// The one parameter of a path.
pub struct Name(pub String);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failure> {
        Path::<String>::from_request_parts(parts, state)
            .await
            .map(|Path(name)| Self(name))
            .map_err(|cause| {
                Failure(
                    Error::new(ErrorCode::InvalidArgument, "the path cannot be read")
                        .because(cause),
                )
            })
    }
}

/// The query, with unknown parameters refused by its type.
pub struct Query<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failure> {
        axum::extract::Query::<T>::from_request_parts(parts, state)
            .await
            .map(|axum::extract::Query(query)| Self(query))
            .map_err(|cause| {
                Failure(
                    Error::new(ErrorCode::InvalidArgument, "the query cannot be read")
                        .because(cause.body_text())
                        .hint("see /v1/openapi.json for the parameters"),
                )
            })
    }
}

/// A JSON body, with unknown keys refused by its type. An empty body is the default, where there
/// is one: use [`OptionalBody`].
pub struct Body<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, _: &S) -> Result<Self, Failure> {
        let bytes = json_bytes(request, MOST_BODY).await?;
        Ok(Self(parse(&bytes)?))
    }
}

/// A JSON body that may be left out.
pub struct OptionalBody<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned + Default> FromRequest<S> for OptionalBody<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, _: &S) -> Result<Self, Failure> {
        if http_body::Body::size_hint(request.body()).exact() == Some(0) {
            return Ok(Self(T::default()));
        }
        let bytes = json_bytes(request, MOST_BODY).await?;
        if bytes.is_empty() {
            return Ok(Self(T::default()));
        }
        Ok(Self(parse(&bytes)?))
    }
}

/// The bytes of a JSON body of at most `most` bytes.
pub(super) async fn json_bytes(request: Request, most: usize) -> Result<Vec<u8>> {
    let json = request
        .headers()
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split(';').next())
        .is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json"));
    if !json {
        return Err(Error::new(
            ErrorCode::InvalidArgument,
            "the body is not said to be JSON",
        )
        .hint("send the header Content-Type: application/json"));
    }
    let mut body = request.into_body().into_data_stream();
    let mut bytes = Vec::new();
    while let Some(piece) = body.next().await {
        let piece = piece.map_err(|cause| {
            Error::new(ErrorCode::InvalidArgument, "the body ended early").because(cause)
        })?;
        if bytes.len() + piece.len() > most {
            return Err(
                Error::new(ErrorCode::PayloadTooLarge, "the body is too large")
                    .because(format!("{most} bytes are the most")),
            );
        }
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes)
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|cause| {
        Error::new(
            ErrorCode::InvalidArgument,
            "the body is not what this route takes",
        )
        .because(cause)
        .hint("see /v1/openapi.json for the fields")
    })
}

/// `Idempotency-Key`, the caller's key of a change.
pub struct IdempotencyKey(pub Option<RequestId>);

impl<S: Sync> FromRequestParts<S> for IdempotencyKey {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Failure> {
        let Some(text) = one(&parts.headers, "idempotency-key")? else {
            return Ok(Self(None));
        };
        // The IETF draft writes the key as a quoted string; most clients do not.
        let text = text
            .strip_prefix('"')
            .and_then(|text| text.strip_suffix('"'))
            .unwrap_or(text);
        let id = RequestId::new(text).map_err(|error| {
            error.field("Idempotency-Key", "1 to 128 printable ASCII characters")
        })?;
        Ok(Self(Some(id)))
    }
}

/// `If-Match` with the generation that the caller saw (RFC 9110, 13.1.1).
pub(super) struct IfMatch(pub(super) Option<u64>);

impl<S: Sync> FromRequestParts<S> for IfMatch {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Failure> {
        let Some(text) = one(&parts.headers, header::IF_MATCH.as_str())? else {
            return Ok(Self(None));
        };
        if text == "*" {
            return Ok(Self(None));
        }
        text.strip_prefix('"')
            .and_then(|text| text.strip_suffix('"'))
            .and_then(|text| text.parse().ok())
            .filter(|generation| *generation > 0)
            .map(|generation| Self(Some(generation)))
            .ok_or_else(|| {
                Failure(
                    Error::new(
                        ErrorCode::InvalidArgument,
                        "If-Match is not an ETag of a VM",
                    )
                    .because("one generation in quotes is expected, such as \"3\"")
                    .field("If-Match", "the ETag of an earlier answer"),
                )
            })
    }
}

/// A header that may stand once at most.
pub(super) fn one<'a>(headers: &'a HeaderMap, name: &str) -> Result<Option<&'a str>> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (None, _) => Ok(None),
        (Some(value), None) => value.to_str().map(|text| Some(text.trim())).map_err(|_| {
            Error::new(
                ErrorCode::InvalidArgument,
                format!("the header {name} is not ASCII text"),
            )
        }),
        (Some(_), Some(_)) => Err(Error::new(
            ErrorCode::InvalidArgument,
            format!("the header {name} stands twice"),
        )),
    }
}
