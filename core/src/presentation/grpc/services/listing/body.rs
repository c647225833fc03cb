//! A list on its way out, piece by piece: nothing is held up, and a reader who is slow costs no more
//! than pointers to what there is anyway.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use bytes::{BufMut, Bytes, BytesMut};
use ghost_domain::{Result, Timestamp};
use http_body::Frame;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};
use tonic::Status;

use super::form;
use crate::application::vms::ListedHost;
use crate::domain::Form;

/// `ListFleetVmsResponse.vms`.
const VMS: u32 = 1;
/// What is copied together at once: some frames of HTTP/2, and what an allocator hands out without
/// asking the kernel for fresh pages.
const PIECE: usize = 64 * 1024;
/// About what is said of a host.
const ONE_HOST: usize = 128;

/// A list, and what is said of each host in it at the moment of the call.
pub(in super::super) struct Listed {
    form: Form,
    hosts: Vec<ListedHost>,
    /// What is said of the hosts, one behind the other.
    heads: Vec<u8>,
    ends: Vec<usize>,
    /// Of the whole message.
    length: u32,
}

impl Listed {
    fn new(
        form: Form,
        hosts: Vec<ListedHost>,
        now: Timestamp,
        write: impl Fn(&ListedHost, Timestamp, &mut Vec<u8>),
    ) -> Self {
        let mut heads = Vec::with_capacity(hosts.len() * ONE_HOST);
        let mut ends = Vec::with_capacity(hosts.len());
        for host in &hosts {
            write(host, now, &mut heads);
            ends.push(heads.len());
        }
        Self {
            form,
            hosts,
            heads,
            ends,
            length: 0,
        }
    }

    pub(super) fn message(hosts: Vec<ListedHost>, now: Timestamp) -> Result<Self> {
        let mut listed = Self::new(Form::Message, hosts, now, form::host_message);
        let mut length = 0;
        for (host, head) in listed.all() {
            for vm in messages(host) {
                let one = head.len() + vm.len();
                length += key_len(VMS) + encoded_len_varint(one as u64) + one;
            }
        }
        listed.length = form::fits(length)?;
        Ok(listed)
    }

    pub(super) fn json(hosts: Vec<ListedHost>, now: Timestamp) -> Result<Self> {
        let listed = Self::new(Form::Json, hosts, now, form::host_json);
        // Here, where it may take its time, and not when a piece is asked for.
        for host in &listed.hosts {
            let _ = jsons(host);
        }
        Ok(listed)
    }

    fn head(&self, index: usize) -> &[u8] {
        let begin = match index.checked_sub(1) {
            Some(before) => self.ends.get(before).copied().unwrap_or_default(),
            None => 0,
        };
        let end = self.ends.get(index).copied().unwrap_or_default();
        self.heads.get(begin..end).unwrap_or_default()
    }

    fn all(&self) -> impl Iterator<Item = (&ListedHost, &[u8])> {
        let hosts = self.hosts.iter().enumerate();
        hosts.map(|(index, host)| (host, self.head(index)))
    }

    /// All of it at once, with the frame of a message.
    pub(in super::super) fn whole(self) -> Bytes {
        let mut pieces = Pieces::new(Arc::new(self));
        let mut whole = BytesMut::new();
        pieces.begin(&mut whole);
        while pieces.write(&mut whole) {}
        whole.freeze()
    }

    /// Writes down one host's VMs; `first`: there was none before.
    fn host(&self, index: usize, first: &mut bool, into: &mut BytesMut) {
        let Some(host) = self.hosts.get(index) else {
            return;
        };
        let head = self.head(index);
        match self.form {
            Form::Message => {
                for vm in messages(host) {
                    encode_key(VMS, WireType::LengthDelimited, into);
                    encode_varint((head.len() + vm.len()) as u64, into);
                    into.put_slice(head);
                    into.put_slice(vm);
                }
            }
            Form::Json => {
                let mut parts = jsons(host);
                while let (Some(before), Some(behind)) = (parts.next(), parts.next()) {
                    into.put_u8(if *first { b'[' } else { b',' });
                    *first = false;
                    into.put_slice(before);
                    into.put_slice(head);
                    into.put_slice(behind);
                }
            }
        }
    }
}

fn messages(host: &ListedHost) -> impl Iterator<Item = &[u8]> {
    host.written(Form::Message, form::MESSAGE_PARTS, form::messages)
}

fn jsons(host: &ListedHost) -> impl Iterator<Item = &[u8]> {
    host.written(Form::Json, form::JSON_PARTS, form::jsons)
}

/// How far a list has got.
pub(super) struct Pieces {
    listed: Arc<Listed>,
    next: usize,
    first: bool,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Begin,
    Hosts,
    Trailers,
    Done,
}

impl Pieces {
    pub(super) fn new(listed: Arc<Listed>) -> Self {
        Self {
            listed,
            next: 0,
            first: true,
            state: State::Begin,
        }
    }

    fn begin(&self, into: &mut BytesMut) {
        if self.listed.form == Form::Message {
            // Not compressed.
            into.put_u8(0);
            into.put_u32(self.listed.length);
        }
    }

    /// Writes the next host; says whether there is more to come.
    fn write(&mut self, into: &mut BytesMut) -> bool {
        if self.next < self.listed.hosts.len() {
            self.listed.host(self.next, &mut self.first, into);
            self.next += 1;
            return true;
        }
        if self.listed.form == Form::Json {
            into.put_slice(if self.first { b"[]" } else { b"]" });
        }
        false
    }

    fn piece(&mut self) -> Bytes {
        let mut piece = BytesMut::with_capacity(PIECE + PIECE / 8);
        if self.state == State::Begin {
            self.state = State::Hosts;
            self.begin(&mut piece);
        }
        while piece.len() < PIECE {
            if !self.write(&mut piece) {
                self.state = State::Trailers;
                break;
            }
        }
        piece.freeze()
    }
}

impl http_body::Body for Pieces {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if matches!(self.state, State::Begin | State::Hosts) {
            let piece = self.piece();
            if !piece.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(piece))));
            }
        }
        Poll::Ready(match self.state {
            State::Done => None,
            _ => {
                self.state = State::Done;
                let mut trailers = HeaderMap::new();
                let status = HeaderName::from_static("grpc-status");
                trailers.insert(status, HeaderValue::from_static("0"));
                Some(Ok(Frame::trailers(trailers)))
            }
        })
    }

    fn is_end_stream(&self) -> bool {
        self.state == State::Done
    }
}
