//! The body of an answer on its way out: the call's end is counted, written down, and brought about
//! where its caller's identity or this server ends first.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use axum::http::HeaderMap;
use bytes::Bytes;
use futures::future::BoxFuture;
use ghost_domain::{Error, ErrorCode};
use ghost_presentation::Shape;
use ghost_presentation::grpc::code_name;
use ghost_presentation::grpc::status::to_status;
use ghost_presentation::metrics::Recorder;
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::time::Interval;
use tokio_util::sync::WaitForCancellationFutureOwned;
use tonic::body::Body;
use tonic::{Code, Status};
use tonic_types::StatusExt;
use tracing::Span;

use super::front::Audit;
use crate::application::callers::{Admitted, Callers};

/// The stable code of a status, or gRPC's name of its code.
pub(super) fn outcome(headers: &HeaderMap) -> Option<(Code, String)> {
    let status = Status::from_header_map(headers)?;
    let code = status.code();
    let reason = status
        .get_details_error_info()
        .map(|info| info.reason)
        .filter(|reason| ErrorCode::parse(reason).is_some());
    Some((code, reason.unwrap_or_else(|| code_name(code).to_owned())))
}

/// Tells the end of a call, once.
pub(super) struct End {
    pub(super) recorder: Arc<Recorder>,
    pub(super) span: Span,
    pub(super) method: &'static str,
    pub(super) shape: Shape,
    pub(super) begun: Instant,
    pub(super) told: bool,
    pub(super) audit: Option<Audit>,
}

impl End {
    /// Counts the end. Gives back what is to be waited for before the caller is told, where there
    /// is something: the line in the audit log.
    fn tell(&mut self, code: Code, outcome: &str) -> Option<BoxFuture<'static, ()>> {
        if std::mem::replace(&mut self.told, true) {
            return None;
        }
        let took = self.begun.elapsed();
        let name = code_name(code);
        self.span.record("rpc.code", name);
        self.recorder.rpc(self.method, name, self.shape, took);
        let _entered = self.span.enter();
        let took_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        // Who is turned away is worth a line by itself; all else can be asked for.
        if matches!(code, Code::Unauthenticated | Code::PermissionDenied) {
            tracing::info!(code = name, took_ms, "refused");
        } else {
            tracing::debug!(code = name, took_ms, "answered");
        }
        let audit = self.audit.take()?;
        let outcome = outcome.to_owned();
        Some(Box::pin(async move { audit.end(&outcome).await }))
    }
}

/// Looks again and again whether whoever has a stream would still get it.
pub(super) struct Leash {
    pub(super) ticks: Interval,
    pub(super) callers: Arc<Callers>,
    pub(super) admitted: Option<Admitted>,
    pub(super) shutdown: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl Leash {
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Error> {
        if self.shutdown.as_mut().poll(context).is_ready() {
            return Poll::Ready(
                Error::new(ErrorCode::ShuttingDown, "this Core is shutting down")
                    .hint("call again: another replica, or the next start, answers")
                    .retry_after(std::time::Duration::from_secs(1)),
            );
        }
        while self.ticks.poll_tick(context).is_ready() {
            if let Some(admitted) = &self.admitted
                && let Err(error) = self.callers.recheck(admitted)
            {
                return Poll::Ready(error);
            }
        }
        Poll::Pending
    }
}

/// See the module.
pub(super) struct Watched {
    /// Nothing once the call was ended from here.
    body: Option<Body>,
    end: End,
    /// The status, where it came with the head.
    head: Option<(Code, String)>,
    leash: Option<Leash>,
    /// What the caller is told once the audit log has it.
    held: Option<(BoxFuture<'static, ()>, Option<Frame<Bytes>>)>,
}

impl Watched {
    pub(super) fn new(
        body: Body,
        end: End,
        head: Option<(Code, String)>,
        leash: Option<Leash>,
    ) -> Self {
        Self {
            body: Some(body),
            end,
            head,
            leash,
            held: None,
        }
    }

    fn hold(
        &mut self,
        line: Option<BoxFuture<'static, ()>>,
        frame: Option<Frame<Bytes>>,
    ) -> Option<Option<Frame<Bytes>>> {
        match line {
            None => Some(frame),
            Some(line) => {
                self.held = Some((line, frame));
                None
            }
        }
    }
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        loop {
            if let Some((line, frame)) = &mut this.held {
                std::task::ready!(line.as_mut().poll(context));
                let frame = frame.take();
                this.held = None;
                return Poll::Ready(frame.map(Ok));
            }
            let Some(body) = &mut this.body else {
                return Poll::Ready(None);
            };
            if let Some(leash) = &mut this.leash
                && let Poll::Ready(error) = leash.poll(context)
            {
                // Dropped, so that the other side hears of it too.
                this.body = None;
                this.leash = None;
                let status = to_status(&error);
                let mut trailers = HeaderMap::new();
                if let Err(status) = status.add_header(&mut trailers) {
                    tracing::error!(%status, "a status cannot be written as trailers");
                }
                let line = this.end.tell(status.code(), error.code().as_str());
                if let Some(frame) = this.hold(line, Some(Frame::trailers(trailers))) {
                    return Poll::Ready(frame.map(Ok));
                }
                continue;
            }
            let polled = std::task::ready!(Pin::new(body).poll_frame(context));
            match polled {
                Some(Ok(frame)) => {
                    let Some(trailers) = frame.trailers_ref() else {
                        return Poll::Ready(Some(Ok(frame)));
                    };
                    let (code, outcome) =
                        outcome(trailers).unwrap_or((Code::Unknown, "unknown".to_owned()));
                    let line = this.end.tell(code, &outcome);
                    if let Some(frame) = this.hold(line, Some(frame)) {
                        return Poll::Ready(frame.map(Ok));
                    }
                }
                Some(Err(status)) => {
                    let line = this.end.tell(status.code(), code_name(status.code()));
                    drop(line.map(tokio::spawn));
                    return Poll::Ready(Some(Err(status)));
                }
                None => {
                    this.body = None;
                    let (code, outcome) = this
                        .head
                        .take()
                        .unwrap_or((Code::Unknown, "unknown".to_owned()));
                    let line = this.end.tell(code, &outcome);
                    if let Some(frame) = this.hold(line, None) {
                        return Poll::Ready(frame.map(Ok));
                    }
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        // With a line still to be written the body is asked once more.
        self.held.is_none()
            && self.end.audit.is_none()
            && self
                .body
                .as_ref()
                .is_none_or(http_body::Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        // An answer without a body is never polled; any other that ends here was hung up on.
        let (code, outcome) = self
            .head
            .take()
            .unwrap_or((Code::Cancelled, "cancelled".to_owned()));
        let line = self.end.tell(code, &outcome);
        if let Some(line) = line.or_else(|| self.held.take().map(|(line, _)| line)) {
            // A runtime that is shutting down takes no more tasks.
            if let Ok(runtime) = tokio::runtime::Handle::try_current() {
                runtime.spawn(line);
            }
        }
    }
}
