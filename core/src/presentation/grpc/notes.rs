//! What a call turns out to be about, for the audit log.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use ghost_domain::{HostId, TenantName};
use http_body::{Body, Frame, SizeHint};
use parking_lot::Mutex;

/// Most bytes of a subject or a detail.
const MOST_TEXT: usize = 256;

#[derive(Debug, Default)]
struct Inner {
    host: Option<(HostId, TenantName)>,
    subject: String,
    detail: String,
}

/// What a call is about; whoever knows writes it here.
#[derive(Clone, Debug, Default)]
pub struct Note(Arc<Mutex<Inner>>);

fn bounded(text: &str) -> String {
    text.chars()
        .filter(|character| !character.is_control())
        .take(MOST_TEXT)
        .collect()
}

impl Note {
    /// The host that it concerns, and its tenant.
    pub fn host(&self, host: HostId, tenant: &TenantName) {
        self.0.lock().host = Some((host, tenant.clone()));
    }

    /// The VM, user, key or tenant that it concerns.
    pub fn subject(&self, subject: &str) {
        self.0.lock().subject = bounded(subject);
    }

    /// More of what was asked, without secrets.
    pub fn detail(&self, detail: &str) {
        self.0.lock().detail = bounded(detail);
    }

    pub(super) fn read(&self) -> (Option<(HostId, TenantName)>, String, String) {
        let inner = self.0.lock();
        (
            inner.host.clone(),
            inner.subject.clone(),
            inner.detail.clone(),
        )
    }
}

/// The first field of a gRPC message, where it is text. In all of an agent's requests that is the
/// name of what they are about; nothing depends on it but a line in a log.
pub(super) fn first_text(message: &[u8]) -> Option<&str> {
    // The frame's head: a byte that says whether it is compressed, and four with its length.
    let (head, body) = message.split_at_checked(5)?;
    if head.first() != Some(&0) {
        return None;
    }
    // Field 1, length-delimited (Protocol Buffers, "Encoding"), shorter than 128 bytes.
    let (&[tag, length], rest) = body.split_first_chunk::<2>()?;
    if tag != 0x0a || length >= 0x80 {
        return None;
    }
    std::str::from_utf8(rest.get(..usize::from(length))?).ok()
}

/// A request's body on its way to a host, from which the subject is read as it passes.
pub(super) struct Peek<B> {
    body: B,
    note: Option<Note>,
}

impl<B> Peek<B> {
    pub(super) fn new(body: B, note: Note) -> Self {
        Self {
            body,
            note: Some(note),
        }
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for Peek<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        if let Poll::Ready(Some(Ok(frame))) = &polled
            && let Some(note) = self.note.take()
            && let Some(text) = frame.data_ref().and_then(|data| first_text(data))
        {
            note.subject(text);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use ghost_proto::agent::v1::{CreateVmRequest, DeleteVmRequest, ListVmsRequest};
    use prost::Message;

    use super::*;

    fn framed(message: &impl Message) -> Vec<u8> {
        let body = message.encode_to_vec();
        let mut framed = vec![0];
        framed.extend(u32::try_from(body.len()).unwrap().to_be_bytes());
        framed.extend(body);
        framed
    }

    #[test]
    fn the_subject_of_a_request_is_its_first_field() {
        let delete = DeleteVmRequest {
            vm: "web".into(),
            force: true,
            ..DeleteVmRequest::default()
        };
        assert_eq!(first_text(&framed(&delete)), Some("web"));
        let create = CreateVmRequest {
            name: "db-1".into(),
            image: "debian-12".into(),
            ..CreateVmRequest::default()
        };
        assert_eq!(first_text(&framed(&create)), Some("db-1"));
        assert_eq!(first_text(&framed(&ListVmsRequest::default())), None);
        for garbage in [
            &b""[..],
            b"\0",
            b"\0\0\0\0\x05\x0a\x7fabc",
            b"\x01\0\0\0\0\x0a\x01a",
        ] {
            assert_eq!(first_text(garbage), None);
        }
    }

    #[test]
    fn notes_are_bounded_and_without_escapes() {
        let note = Note::default();
        note.subject(&format!("\u{1b}[31m{}", "x".repeat(1000)));
        let (_, subject, _) = note.read();
        assert!(subject.starts_with("[31m"));
        assert_eq!(subject.len(), MOST_TEXT);
    }
}
