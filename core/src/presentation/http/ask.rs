//! From JSON to a call and back: the guard and the services are those of gRPC.

use std::sync::Arc;

use axum::http::{HeaderMap, HeaderName, HeaderValue, Request, header};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use ghost_domain::{Error, ErrorCode, OperationId, Result};
use ghost_presentation::http::problem::Failure;
use ghost_presentation::request::REQUEST_ID;
use http_body::Body as _;
use prost::Message;
use tonic::body::Body;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use super::Shell;
use crate::presentation::peer::{Peer, PeerKind};

/// The headers that say who asks, and what for.
const CARRIED: [HeaderName; 4] = [
    header::AUTHORIZATION,
    HeaderName::from_static("x-api-key"),
    HeaderName::from_static(REQUEST_ID),
    HeaderName::from_static("traceparent"),
];

/// Somebody who has only what the headers carry.
pub(super) fn by_headers() -> Peer {
    Peer {
        address: None,
        kind: PeerKind::Nobody,
    }
}

/// All messages of a call's answer.
async fn messages<Q: Message>(
    shell: &Arc<Shell>,
    headers: &HeaderMap,
    method: &str,
    question: &Q,
) -> Result<Bytes> {
    let body = question.encode_to_vec();
    let mut framed = BytesMut::with_capacity(body.len() + 5);
    framed.put_u8(0);
    framed.put_u32(
        u32::try_from(body.len())
            .map_err(|_| Error::new(ErrorCode::PayloadTooLarge, "the request is too large"))?,
    );
    framed.put_slice(&body);
    let mut request = Request::new(Body::new(axum::body::Body::from(framed.freeze())));
    *request.method_mut() = axum::http::Method::POST;
    *request.uri_mut() = method
        .parse()
        .map_err(|cause| Error::internal("a call has no path").because(cause))?;
    let own = request.headers_mut();
    own.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/grpc"),
    );
    own.insert(header::TE, HeaderValue::from_static("trailers"));
    for name in CARRIED {
        if let Some(value) = headers.get(&name) {
            own.insert(name, value.clone());
        }
    }
    let response = shell.front.call(&by_headers(), request).await;
    let (parts, mut body) = response.into_parts();
    let mut bytes = BytesMut::new();
    let mut trailers = None;
    loop {
        let frame =
            std::future::poll_fn(|context| std::pin::Pin::new(&mut body).poll_frame(context));
        match frame.await {
            None => break,
            Some(Err(status)) => return Err(error_of(&status)),
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => bytes.put(data),
                Err(frame) => trailers = frame.into_trailers().ok(),
            },
        }
    }
    let status = trailers
        .as_ref()
        .and_then(Status::from_header_map)
        .or_else(|| Status::from_header_map(&parts.headers));
    match status {
        Some(status) if status.code() == Code::Ok => Ok(bytes.freeze()),
        Some(status) => Err(error_of(&status)),
        None => Err(Error::internal("a call ended without a status")),
    }
}

fn next<A: Message + Default>(bytes: &mut Bytes) -> Result<Option<A>> {
    if bytes.remaining() < 5 {
        return Ok(None);
    }
    bytes.advance(1);
    let length = bytes.get_u32() as usize;
    if bytes.remaining() < length {
        return Err(Error::internal("an answer is cut off"));
    }
    A::decode(bytes.split_to(length))
        .map(Some)
        .map_err(|cause| Error::internal("an answer cannot be read").because(cause))
}

/// Makes a call with one answer.
pub(super) async fn ask<Q: Message, A: Message + Default>(
    shell: &Arc<Shell>,
    headers: &HeaderMap,
    method: &str,
    question: &Q,
) -> Result<A, Failure> {
    let mut bytes = messages(shell, headers, method, question).await?;
    next(&mut bytes)?.ok_or_else(|| Failure(Error::internal("a call had no answer")))
}

/// Makes a call with any number of answers.
pub(super) async fn ask_all<Q: Message, A: Message + Default>(
    shell: &Arc<Shell>,
    headers: &HeaderMap,
    method: &str,
    question: &Q,
) -> Result<Vec<A>, Failure> {
    let mut bytes = messages(shell, headers, method, question).await?;
    let mut all = Vec::new();
    while let Some(one) = next(&mut bytes)? {
        all.push(one);
    }
    Ok(all)
}

/// An error of ours, as it was before it became a status.
fn error_of(status: &Status) -> Error {
    let details = status.get_error_details();
    let info = details.error_info();
    let code = info
        .and_then(|info| ErrorCode::parse(&info.reason))
        .unwrap_or(ErrorCode::Internal);
    let mut error = Error::new(code, status.message());
    let told = |name: &str| info.and_then(|info| info.metadata.get(name)).cloned();
    if let Some(cause) = told("cause") {
        error = error.because(cause);
    }
    if let Some(hint) = told("hint") {
        error = error.hint(hint);
    }
    if let Some(operation) = told("operation_id").and_then(|id| id.parse::<OperationId>().ok()) {
        error = error.of_operation(operation);
    }
    if let Some(delay) = details.retry_info().and_then(|retry| retry.retry_delay) {
        error = error.retry_after(delay);
    }
    for one in details
        .bad_request()
        .iter()
        .flat_map(|bad| &bad.field_violations)
    {
        error = error.field(one.field.clone(), one.description.clone());
    }
    error
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use ghost_presentation::grpc::status::to_status;

    use super::*;

    #[test]
    fn an_error_survives_the_way_through_a_status() {
        let error = Error::new(ErrorCode::QuotaExceeded, "too much")
            .because("4 of 3 VMs")
            .hint("delete one")
            .retry_after(Duration::from_secs(3))
            .field("vms", "at most 3")
            .of_operation(OperationId::random());
        assert_eq!(error_of(&to_status(&error)), error);
        assert_eq!(error_of(&Status::internal("x")).code(), ErrorCode::Internal);
    }
}
