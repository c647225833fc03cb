//! Files in guests.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Json;
use axum::body::{Body as Bytes, Bytes as Data};
use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures::{Stream, StreamExt, stream};
use ghost_application::guest::{ListGuestFilesCommand, ReadGuestFileCommand};
use ghost_domain::guest::{GuestFile, GuestFileKind};
use ghost_domain::ports::GuestFileReader;
use ghost_domain::{Error, ErrorCode, Result};
use ghost_proto::view;
use http_body::Frame;
use serde::Serialize;
use utoipa::ToSchema;

use super::super::extract::{Caller, Name, Query, one};
use super::super::problem::Problem;
use super::super::{Answer, Shell};
use super::RequestName;
use super::bodies::{FileQuery, WriteQuery};
use crate::convert;

/// How long an upload may stand still before it is given up; what came is kept for a resumed try.
const PATIENCE: Duration = Duration::from_secs(60);
/// Most bytes of an upload that are passed on in one piece.
const PIECE: usize = 256 * 1024;
/// XXH64 of the content, as hexadecimal digits; with a download a trailer.
const CHECKSUM: HeaderName = HeaderName::from_static("x-ghost-checksum");

/// What a directory holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(in crate::http) struct GuestDirectory {
    /// By name.
    files: Vec<view::GuestFile>,
    /// There are more behind the last one.
    more: bool,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(in crate::http) struct GuestFileSum {
    /// The size.
    size_bytes: u64,
    /// XXH64 of the content, as hexadecimal digits.
    checksum: String,
    /// So much the guest had already, from an earlier try.
    resumed_bytes: u64,
}

/// A file of a guest
///
/// As it is there. Its length is not announced, because a file may grow while it is read: an
/// answer that ends well is whole and was checked on its way out of the guest; one that is cut off
/// is not. `X-Ghost-Size`, `-Mode` (octal), `-Uid` and `-Gid` tell of the file; the trailer
/// `X-Ghost-Checksum` of what was sent, to who says `TE: trailers`. `Range: bytes=FIRST-` or
/// `FIRST-LAST` gives a part, with `If-Range` only while the `ETag` is the same. With `list` or
/// `stat` the answer is JSON.
#[utoipa::path(get, path = "/v1/vms/{vm}/files", tag = "guests",
    params(FileQuery, ("vm" = String, Path, description = "A name, a full id or a unique prefix of an id"),
        ("Range" = Option<String>, Header, description = "One range of bytes"),
        ("If-Range" = Option<String>, Header, description = "The ETag of the part that is there already")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, content_type = "application/octet-stream", body = String),
        (status = 206, content_type = "application/octet-stream", body = String),
        (status = "default", body = Problem)))]
pub(in crate::http) async fn read_file(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    Name(vm): Name,
    name: RequestName,
    Query(query): Query<FileQuery>,
    headers: HeaderMap,
) -> Answer {
    let target = name.target(vm);
    if query.list != 0 {
        let command = ListGuestFilesCommand {
            path: query.path,
            after: query.after,
            limit: query.limit,
        };
        let list = &shell.use_cases.list_guest_files;
        let page = list.execute(&caller, &target, command).await?;
        let page = convert::guest_directory(page);
        let page = GuestDirectory {
            files: page.files.into_iter().map(Into::into).collect(),
            more: page.more,
        };
        return Ok(Json(page).into_response());
    }
    if query.stat != 0 {
        let stat = &shell.use_cases.stat_guest_file;
        let file = stat.execute(&caller, &target, &query.path, true).await?;
        let file = view::GuestFile::from(convert::guest_file(String::new(), &file));
        return Ok(Json(file).into_response());
    }
    let read = &shell.use_cases.read_guest_file;
    let open = async |part: Option<Part>| {
        let command = ReadGuestFileCommand {
            path: query.path.clone(),
            offset: part.map_or(0, |part| part.first),
            length: part.and_then(Part::length),
        };
        read.execute(&caller, &target, command).await
    };
    let mut part = Part::of(&headers)?;
    let (mut file, mut reader) = open(part).await?;
    let same = one(&headers, header::IF_RANGE.as_str())?.is_none_or(|tag| tag == etag(&file));
    if part.is_some() && !same {
        part = None;
        (file, reader) = open(None).await?;
    }
    if file.kind == GuestFileKind::Directory {
        return Err(
            Error::new(ErrorCode::InvalidArgument, "this is a directory")
                .hint("list it with list=1")
                .field("path", "a file's")
                .into(),
        );
    }
    let mut response = Response::new(Bytes::new(Framed(Box::pin(download(&shell, reader)))));
    if let Some(part) = part {
        let Some(last) = part.last_of(file.size) else {
            return Ok(unsatisfiable(file.size));
        };
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
        let range = format!("bytes {}-{last}/{}", part.first, file.size);
        response
            .headers_mut()
            .insert(header::CONTENT_RANGE, number_text(&range));
    }
    let headers = response.headers_mut();
    let told = [
        (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
        // Never shown by a browser as a page of ours.
        (header::CONTENT_DISPOSITION, "attachment".to_owned()),
        (header::ACCEPT_RANGES, "bytes".to_owned()),
        (header::ETAG, etag(&file)),
        (header::TRAILER, CHECKSUM.as_str().to_owned()),
        (
            HeaderName::from_static("x-ghost-size"),
            file.size.to_string(),
        ),
        (
            HeaderName::from_static("x-ghost-mode"),
            format!("{:04o}", file.mode),
        ),
        (HeaderName::from_static("x-ghost-uid"), file.uid.to_string()),
        (HeaderName::from_static("x-ghost-gid"), file.gid.to_string()),
    ];
    for (name, value) in told {
        headers.insert(name, number_text(&value));
    }
    Ok(response)
}

/// Text of ours as a header's value: digits and fixed words, never a guest's.
fn number_text(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).unwrap_or(HeaderValue::from_static(""))
}

/// Tells one state of a file from another, as far as its size and time do.
fn etag(file: &GuestFile) -> String {
    let at = file.modified_at.map_or(0, |at| at.unix_millis());
    format!("\"{:x}-{at:x}\"", file.size)
}

/// RFC 9110, 15.5.17.
fn unsatisfiable(size: u64) -> Response {
    let error = Error::new(
        ErrorCode::InvalidArgument,
        "the file does not have that part",
    )
    .because(format!("it has {size} bytes"))
    .field("Range", "within the file");
    let problem = Problem {
        status: StatusCode::RANGE_NOT_SATISFIABLE.as_u16(),
        ..Problem::from(&error)
    };
    let headers = [
        (
            header::CONTENT_RANGE,
            number_text(&format!("bytes */{size}")),
        ),
        (header::CONTENT_TYPE, super::super::problem::PROBLEM_JSON),
    ];
    let body = serde_json::to_vec(&problem).unwrap_or_default();
    (StatusCode::RANGE_NOT_SATISFIABLE, headers, body).into_response()
}

/// A part of a file that is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    first: u64,
    last: Option<u64>,
}

impl Part {
    /// What `Range` asks for; `None` where it asks for what is not served (several parts, the last
    /// bytes, another unit) and the whole is the right answer (RFC 9110, 14.2).
    fn of(headers: &HeaderMap) -> Result<Option<Self>> {
        Ok(one(headers, header::RANGE.as_str())?.and_then(Self::parse))
    }

    fn parse(text: &str) -> Option<Self> {
        let (first, last) = text.strip_prefix("bytes=")?.split_once('-')?;
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            digits.then(|| text.parse::<u64>().ok()).flatten()
        };
        let first = number(first)?;
        let last = match last {
            "" => None,
            text => Some(number(text).filter(|last| *last >= first)?),
        };
        Some(Self { first, last })
    }

    fn length(self) -> Option<u64> {
        self.last.map(|last| (last - self.first).saturating_add(1))
    }

    /// Its last byte in a file of that size; `None` where it has none there.
    fn last_of(self, size: u64) -> Option<u64> {
        let end = size.checked_sub(1).filter(|end| *end >= self.first)?;
        Some(self.last.map_or(end, |last| last.min(end)))
    }
}

/// The content, then its checksum. Read as the connection takes it.
fn download(
    shell: &Arc<Shell>,
    reader: Box<dyn GuestFileReader>,
) -> impl Stream<Item = Result<Frame<Data>>> + Send + use<> {
    let ended = shell.shutdown.clone().cancelled_owned();
    stream::try_unfold(Some(reader), |reader| async move {
        let Some(mut reader) = reader else {
            return Ok(None);
        };
        let data = reader.read().await?;
        if !data.is_empty() {
            return Ok(Some((Frame::data(Data::from(data)), Some(reader))));
        }
        let sum = reader
            .sum()
            .ok_or_else(|| Error::internal("a file was read to its end and has no checksum"))?;
        let mut trailers = HeaderMap::new();
        trailers.insert(CHECKSUM, number_text(&hex::encode(sum.checksum)));
        Ok(Some((Frame::trailers(trailers), None)))
    })
    // An end would say that the file is whole.
    .take_until(ended)
    .chain(stream::once(cut_off(shell)).filter_map(std::future::ready))
}

/// An error where the agent ends in the middle; nothing where the file came to its end.
fn cut_off(shell: &Arc<Shell>) -> impl Future<Output = Option<Result<Frame<Data>>>> + Send + use<> {
    let shutdown = shell.shutdown.clone();
    async move {
        shutdown.is_cancelled().then(|| {
            Err(Error::new(
                ErrorCode::ShuttingDown,
                "the agent is shutting down",
            ))
        })
    }
}

/// Frames as a body.
struct Framed<S>(Pin<Box<S>>);

impl<S: Stream<Item = Result<Frame<Data>>>> http_body::Body for Framed<S> {
    type Data = Data;
    type Error = Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Data>>>> {
        self.0.as_mut().poll_next(context)
    }
}

/// Write a file in a guest
///
/// The body is the file, its `Content-Length` is needed. It appears under its name once it is
/// whole, synced and checked; until then what was there stays. With `X-Ghost-Checksum` (XXH64,
/// 16 hexadecimal digits) the guest checks what it got against that.
#[utoipa::path(put, path = "/v1/vms/{vm}/files", tag = "guests",
    params(WriteQuery, ("vm" = String, Path, description = "A name, a full id or a unique prefix of an id"),
        ("X-Ghost-Checksum" = Option<String>, Header, description = "XXH64 of the body, hexadecimal")),
    request_body(content_type = "application/octet-stream", content = String),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = GuestFileSum), (status = "default", body = Problem)))]
pub(in crate::http) async fn write_file(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    Name(vm): Name,
    name: RequestName,
    Query(query): Query<WriteQuery>,
    headers: HeaderMap,
    body: Bytes,
) -> Answer {
    let size = http_body::Body::size_hint(&body).exact().ok_or_else(|| {
        Error::new(
            ErrorCode::InvalidArgument,
            "the size of the file is not said",
        )
        .field("Content-Length", "needed")
    })?;
    let checksum = match one(&headers, CHECKSUM.as_str())? {
        None => Vec::new(),
        Some(text) => hex::decode(text).map_err(|_| {
            Error::new(ErrorCode::InvalidArgument, "this is no XXH64 checksum")
                .field("X-Ghost-Checksum", "16 hexadecimal digits")
        })?,
    };
    let file = convert::file_write(query.start(size, checksum)?)?;
    let write = &shell.use_cases.write_guest_file;
    // Whatever ends this request early drops the writer: the target stays as it is.
    let mut writer = write.execute(&caller, &name.target(vm), file).await?;
    let resumed = writer.offset();
    let mut skip = resumed;
    let mut pieces = body.into_data_stream();
    loop {
        let piece = tokio::select! {
            () = shell.shutdown.cancelled() => {
                return Err(Error::new(ErrorCode::ShuttingDown, "the agent is shutting down")
                    .hint("send it again in a moment, with resume=1")
                    .retry_after(Duration::from_secs(5))
                    .into());
            }
            piece = tokio::time::timeout(PATIENCE, pieces.next()) => piece,
        };
        let piece = piece.map_err(|_| {
            Error::new(
                ErrorCode::DeadlineExceeded,
                "the upload stood still for too long",
            )
            .hint("send it again with resume=1")
        })?;
        let Some(piece) = piece else { break };
        let mut data = piece.map_err(|cause| {
            Error::new(ErrorCode::InvalidArgument, "the upload ended early").because(cause)
        })?;
        let there = usize::try_from(skip).unwrap_or(usize::MAX).min(data.len());
        drop(data.split_to(there));
        skip -= there as u64;
        for piece in data.chunks(PIECE) {
            writer.write(piece.to_vec()).await?;
        }
    }
    let sum = writer.finish().await?;
    let told = GuestFileSum {
        size_bytes: sum.size,
        checksum: hex::encode(sum.checksum),
        resumed_bytes: resumed,
    };
    Ok(([(CHECKSUM, told.checksum.clone())], Json(told)).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_what_the_rfc_says_or_the_whole() {
        let part = |first, last| Some(Part { first, last });
        assert_eq!(Part::parse("bytes=0-"), part(0, None));
        assert_eq!(Part::parse("bytes=5-9"), part(5, Some(9)));
        for whole in [
            "bytes=-5",
            "bytes=5-4",
            "bytes=a-",
            "bytes=+1-",
            "lines=1-2",
            "bytes=1-2,4-5",
            "",
        ] {
            assert_eq!(Part::parse(whole), None, "{whole}");
        }
        let open = Part::parse("bytes=3-").unwrap();
        assert_eq!((open.length(), open.last_of(10)), (None, Some(9)));
        assert_eq!((open.last_of(3), open.last_of(0)), (None, None));
        let closed = Part::parse("bytes=3-99").unwrap();
        assert_eq!((closed.length(), closed.last_of(10)), (Some(97), Some(9)));
        let most = format!("bytes=0-{}", u64::MAX);
        assert_eq!(Part::parse(&most).unwrap().length(), Some(u64::MAX));
    }
}
