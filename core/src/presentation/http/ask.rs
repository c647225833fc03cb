//! From JSON to a call and back: the guard and the services are those of gRPC.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::http::{HeaderMap, HeaderName, HeaderValue, Request, header};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use ghost_domain::{Error, ErrorCode, Result};
use ghost_presentation::http::problem::Failure;
use ghost_presentation::request::REQUEST_ID;
use ghost_proto::core::metadata;
use ghost_proto::core::v1::ListFleetVmsRequest;
use http_body::{Body as _, Frame};
use prost::Message;
use tonic::body::Body;
use tonic::{Code, Status};

use super::super::grpc::{AsJson, Front};
use super::Shell;
use crate::presentation::peer::{Peer, PeerKind};
use crate::presentation::status::error_of;

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

/// A message as gRPC frames it.
pub(super) fn framed<Q: Message>(question: &Q) -> Result<Bytes> {
    let body = question.encode_to_vec();
    let mut framed = BytesMut::with_capacity(body.len() + 5);
    framed.put_u8(0);
    framed.put_u32(
        u32::try_from(body.len())
            .map_err(|_| Error::new(ErrorCode::PayloadTooLarge, "the request is too large"))?,
    );
    framed.put_slice(&body);
    Ok(framed.freeze())
}

/// The answer of a call, message by message. Dropping it hangs up.
pub(super) struct Answers {
    /// What stood before the messages.
    pub(super) headers: HeaderMap,
    body: Body,
    read: BytesMut,
    told: bool,
    ended: bool,
}

impl Answers {
    /// The next message; `None` after the last one. May be given up and called again.
    pub(super) async fn next<A: Message + Default>(&mut self) -> Result<Option<A>> {
        loop {
            if let Some(message) = self.whole()? {
                return Ok(Some(message));
            }
            if self.ended {
                return match (self.read.is_empty(), self.told) {
                    (false, _) => Err(Error::internal("an answer is cut off")),
                    (true, false) => Err(Error::internal("a call ended without a status")),
                    (true, true) => Ok(None),
                };
            }
            let body = &mut self.body;
            let frame =
                std::future::poll_fn(|context| std::pin::Pin::new(&mut *body).poll_frame(context));
            match frame.await {
                None => self.ended = true,
                Some(Err(status)) => return Err(error_of(&status)),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.read.put(data),
                    Err(frame) => {
                        let trailers = frame.into_trailers().unwrap_or_default();
                        self.settle(&trailers)?;
                    }
                },
            }
        }
    }

    fn whole<A: Message + Default>(&mut self) -> Result<Option<A>> {
        let Some(length) = self
            .read
            .get(1..5)
            .map(|mut length| length.get_u32() as usize)
        else {
            return Ok(None);
        };
        if self.read.len() < 5 + length {
            return Ok(None);
        }
        self.read.advance(5);
        A::decode(self.read.split_to(length))
            .map(Some)
            .map_err(|cause| Error::internal("an answer cannot be read").because(cause))
    }

    /// Takes the call's status, where it stands here.
    fn settle(&mut self, headers: &HeaderMap) -> Result<()> {
        match Status::from_header_map(headers) {
            Some(status) if status.code() != Code::Ok => Err(error_of(&status)),
            Some(_) => {
                self.told = true;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

/// Makes a call, to a host where one is named, for whoever `headers` show; `body` are its framed
/// messages. A refusal is an error of this function.
pub(super) async fn call(
    front: &Arc<Front>,
    headers: &HeaderMap,
    host: Option<&str>,
    method: &str,
    body: axum::body::Body,
) -> Result<Answers> {
    let request = request(headers, host, method, body)?;
    let response = front.call(&by_headers(), request).await;
    let (parts, body) = response.into_parts();
    let mut answers = Answers {
        headers: HeaderMap::new(),
        body,
        read: BytesMut::new(),
        told: false,
        ended: false,
    };
    answers.settle(&parts.headers)?;
    answers.headers = parts.headers;
    Ok(answers)
}

fn request(
    headers: &HeaderMap,
    host: Option<&str>,
    method: &str,
    body: axum::body::Body,
) -> Result<Request<Body>> {
    let mut request = Request::new(Body::new(body));
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
    if let Some(host) = host {
        let name = HeaderValue::from_str(host)
            .map_err(|_| Error::new(ErrorCode::HostNotFound, "no host has a name like that"))?;
        own.insert(metadata::HOST, name);
    }
    Ok(request)
}

/// Lists VMs as JSON that comes piece by piece, as it is written down.
pub(super) async fn listed_vms(
    shell: &Arc<Shell>,
    headers: &HeaderMap,
    question: &ListFleetVmsRequest,
) -> Result<axum::body::Body, Failure> {
    let method = "/ghost.core.v1.FleetService/ListVms";
    let mut request = request(headers, None, method, framed(question)?.into())?;
    request.extensions_mut().insert(AsJson);
    let response = shell.front.call(&by_headers(), request).await;
    // A refusal comes with the head.
    match Status::from_header_map(response.headers()) {
        Some(status) if status.code() != Code::Ok => Err(error_of(&status).into()),
        _ => Ok(axum::body::Body::new(Untrailed(response.into_body()))),
    }
}

/// A body without what gRPC says behind it.
struct Untrailed(Body);

impl http_body::Body for Untrailed {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<std::result::Result<Frame<Bytes>, Status>>> {
        loop {
            match ready!(Pin::new(&mut self.0).poll_frame(context)) {
                Some(Ok(frame)) if frame.is_trailers() => {
                    let status = frame.trailers_ref().and_then(Status::from_header_map);
                    if let Some(status) = status.filter(|status| status.code() != Code::Ok) {
                        return Poll::Ready(Some(Err(status)));
                    }
                }
                other => return Poll::Ready(other),
            }
        }
    }
}

/// Makes a call with one answer.
pub(super) async fn ask<Q: Message, A: Message + Default>(
    shell: &Arc<Shell>,
    headers: &HeaderMap,
    method: &str,
    question: &Q,
) -> Result<A, Failure> {
    let answer = ask_at(&shell.front, headers, None, method, question).await;
    Ok(answer?.0)
}

/// Makes a call with one answer, to a host where one is named. With what stood before the answer.
pub(super) async fn ask_at<Q: Message, A: Message + Default>(
    front: &Arc<Front>,
    headers: &HeaderMap,
    host: Option<&str>,
    method: &str,
    question: &Q,
) -> Result<(A, HeaderMap)> {
    let body = framed(question)?.into();
    let mut answers = call(front, headers, host, method, body).await?;
    let answer = answers
        .next()
        .await?
        .ok_or_else(|| Error::internal("a call had no answer"))?;
    // To its status: an answer that fails behind its message has failed.
    while answers.next::<A>().await?.is_some() {}
    Ok((answer, answers.headers))
}

/// Makes a call with any number of answers.
pub(super) async fn ask_all<Q: Message, A: Message + Default>(
    shell: &Arc<Shell>,
    headers: &HeaderMap,
    method: &str,
    question: &Q,
) -> Result<Vec<A>, Failure> {
    let body = framed(question)?.into();
    let mut answers = call(&shell.front, headers, None, method, body).await?;
    let mut all = Vec::new();
    while let Some(one) = answers.next().await? {
        all.push(one);
    }
    Ok(all)
}
