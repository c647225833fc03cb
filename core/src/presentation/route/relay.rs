//! The body of an answer on its way from a host to the caller.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::http::HeaderMap;
use bytes::Bytes;
use ghost_domain::{Error, ErrorCode, Result};
use ghost_presentation::grpc::status::to_status;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep};

use super::headers;
use super::pool::Lease;

/// The header with a call's deadline (gRPC over HTTP/2, "Timeout").
const TIMEOUT: &str = "grpc-timeout";

/// How long a call may take, by its caller.
///
/// # Errors
/// `InvalidArgument` for one that is not written as gRPC writes it.
pub(super) fn deadline(headers: &HeaderMap) -> Result<Option<Duration>> {
    let Some(value) = headers.get(TIMEOUT) else {
        return Ok(None);
    };
    let parsed = value.to_str().ok().and_then(parse);
    parsed.map(Some).ok_or_else(|| {
        Error::new(
            ErrorCode::InvalidArgument,
            "the call's deadline cannot be read",
        )
        .field(TIMEOUT, "at most eight digits and one of H, M, S, m, u, n")
    })
}

fn parse(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(number * 3600)),
        "M" => Some(Duration::from_secs(number * 60)),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

/// The error of a call whose deadline passed on the way.
pub(super) fn too_late(host: &str) -> Error {
    Error::new(
        ErrorCode::DeadlineExceeded,
        format!("the host {host} did not answer in time"),
    )
    .hint("what the call began may still take effect: look, then try again")
}

/// The error of a call that its host did not bring to an end.
pub(super) fn broken_off(host: &str, link_lost: bool, cause: impl std::fmt::Display) -> Error {
    let (code, message) = if link_lost {
        (
            ErrorCode::HostOffline,
            format!("the link to the host {host} was lost during the call"),
        )
    } else {
        (
            ErrorCode::AgentUnreachable,
            format!("the host {host} broke the call off"),
        )
    };
    Error::new(code, message)
        .because(cause)
        .hint("what the call began may still take effect: look, then try again")
        .retry_after(Duration::from_secs(2))
}

/// All of an error's causes on one line.
pub(super) fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(one) = source {
        text.push_str(": ");
        text.push_str(&one.to_string());
        source = one.source();
    }
    text
}

/// See the module. However the host ends, the caller gets a status.
pub(super) struct Relay {
    body: Incoming,
    lease: Lease,
    ends: Option<Pin<Box<Sleep>>>,
    /// Whether the caller has a status already.
    ended: bool,
    host: String,
}

impl Relay {
    pub(super) fn new(
        body: Incoming,
        lease: Lease,
        ends: Option<Instant>,
        ended: bool,
        host: String,
    ) -> Self {
        Self {
            body,
            lease,
            ends: ends.map(|at| Box::pin(tokio::time::sleep_until(at))),
            ended,
            host,
        }
    }

    /// The end of the call by an error of ours.
    fn fail(&mut self, error: &Error) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        self.ended = true;
        let mut trailers = HeaderMap::new();
        if let Err(status) = to_status(error).add_header(&mut trailers) {
            tracing::error!(%status, "a status cannot be written as trailers");
        }
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }
}

impl Body for Relay {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let late = self
            .ends
            .as_mut()
            .is_some_and(|ends| ends.as_mut().poll(context).is_ready());
        if late {
            let error = too_late(&self.host);
            return self.fail(&error);
        }
        match Pin::new(&mut self.body).poll_frame(context) {
            Poll::Ready(Some(Ok(frame))) => match frame.into_trailers() {
                Ok(mut trailers) => {
                    headers::from_host(&mut trailers);
                    self.ended = true;
                    Poll::Ready(Some(Ok(Frame::trailers(trailers))))
                }
                Err(frame) => Poll::Ready(Some(Ok(frame))),
            },
            Poll::Ready(Some(Err(error))) => {
                let lost = self.lease.is_lost(&error);
                let error = broken_off(&self.host, lost, causes(&error));
                self.fail(&error)
            }
            Poll::Ready(None) => {
                let error = broken_off(&self.host, false, "its answer ended without a status");
                self.fail(&error)
            }
            Poll::Pending => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        // The status may be still to come from us where the body is empty: only a call whose status
        // came with its head is over before its body was asked.
        self.ended
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_are_read_as_grpc_writes_them() {
        assert_eq!(parse("30S"), Some(Duration::from_secs(30)));
        assert_eq!(parse("250m"), Some(Duration::from_millis(250)));
        assert_eq!(parse("99999999u"), Some(Duration::from_micros(99_999_999)));
        assert_eq!(parse("2H"), Some(Duration::from_secs(7200)));
        for bad in ["", "S", "1", "-1S", "+1S", "123456789S", "1s", "1.5S", "1é"] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }
}
