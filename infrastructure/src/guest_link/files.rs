//! Files: looking, listing, reading, writing, and the program of an update.

use std::fs::File;
use std::hash::Hasher as _;
use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use ghost_domain::guest::{DirectoryMake, FileSum, FileWrite, GuestDirectory, GuestFile, LinkMake};
use ghost_domain::ports::{GuestFileReader, GuestFileWriter, GuestProgramFile};
use ghost_domain::{Error, ErrorCode, Result, Timestamp};
use ghost_proto::guest::v1::agent_message::Payload;
use ghost_proto::guest::v1::{
    FileAttributes, FileKind, FileListRequest, FileReadRequest, FileStatRequest, FileWriteRequest,
    MakeDirectoryRequest, MakeLinkRequest, Stream, UpdateRequest, file_read_response,
    file_write_response,
};
use twox_hash::XxHash64;

use super::call::{Call, CallHandle, Item, Kind, failure, nonsense};
use super::clean;
use super::session::Session;

/// The guest syncs a large file to a slow disk before it says that it is written; that it is alive
/// is watched otherwise.
const FINISH_PATIENCE: Duration = Duration::from_secs(600);
/// What is read of the program at a time.
const PIECE: usize = 64 * 1024;

fn mismatch(what: &str) -> Error {
    Error::new(ErrorCode::ChecksumMismatch, what)
        .because("the bytes were damaged on the way or in the guest")
        .hint("try again")
}

pub(super) async fn stat(
    session: &Arc<Session>,
    path: &str,
    follow: bool,
    patience: Duration,
) -> Result<GuestFile> {
    let call = session.begin(Kind::Simple, Some("files"))?;
    call.send(Payload::FileStat(FileStatRequest {
        path: path.to_owned(),
        follow,
    }))
    .await?;
    match call.answer(patience).await? {
        Payload::FileStatResponse(response) => match response.attributes {
            Some(attributes) => Ok(clean::file(&attributes)),
            None => Err(nonsense()),
        },
        _ => Err(nonsense()),
    }
}

/// Most entries of one page.
const MOST_ENTRIES: u32 = 1000;

pub(super) async fn list(
    session: &Arc<Session>,
    path: &str,
    after: &str,
    limit: u32,
    patience: Duration,
) -> Result<GuestDirectory> {
    let call = session.begin(Kind::Simple, Some("files"))?;
    let limit = match limit {
        0 => MOST_ENTRIES,
        limit => limit.min(MOST_ENTRIES),
    };
    call.send(Payload::FileList(FileListRequest {
        path: path.to_owned(),
        after: after.to_owned(),
        limit,
    }))
    .await?;
    let Payload::FileListResponse(response) = call.answer(patience).await? else {
        return Err(nonsense());
    };
    if response.entries.len() > limit as usize {
        return Err(nonsense().because("more entries than were asked for"));
    }
    let mut directory = GuestDirectory {
        entries: Vec::with_capacity(response.entries.len()),
        more: response.more && !response.entries.is_empty(),
    };
    for entry in response.entries {
        // Names become paths of the host where a directory is copied, and the last one is where the
        // next page begins: one that leads elsewhere, or back, is no name.
        let name = entry.name;
        let before = directory
            .entries
            .last()
            .map_or(after, |(name, _)| name.as_str());
        let legal = !name.is_empty()
            && name.len() <= 255
            && name != "."
            && name != ".."
            && !name.contains(['/', '\0']);
        if !legal || name.as_str() <= before {
            return Err(
                nonsense().because("it lists a name that no file can have, or out of order")
            );
        }
        let file = clean::file(&entry.attributes.unwrap_or_default());
        directory.entries.push((name, file));
    }
    Ok(directory)
}

pub(super) async fn make_directory(
    session: &Arc<Session>,
    directory: DirectoryMake,
    patience: Duration,
) -> Result<()> {
    let call = session.begin(Kind::Simple, Some("files"))?;
    let (uid, gid) = directory.owner.unwrap_or((0, 0));
    call.send(Payload::MakeDirectory(MakeDirectoryRequest {
        path: directory.path,
        mode: directory.mode & 0o7777,
        uid,
        gid,
        keep_owner: directory.owner.is_some(),
        make_parents: directory.make_parents,
    }))
    .await?;
    match call.answer(patience).await? {
        Payload::Done(_) => Ok(()),
        _ => Err(nonsense()),
    }
}

pub(super) async fn make_link(
    session: &Arc<Session>,
    link: LinkMake,
    patience: Duration,
) -> Result<()> {
    // An older guest may know files and no links; a message that it does not know would have no answer.
    let call = session.begin(Kind::Simple, Some("links"))?;
    let (uid, gid) = link.owner.unwrap_or((0, 0));
    call.send(Payload::MakeLink(MakeLinkRequest {
        path: link.path,
        target: link.target,
        uid,
        gid,
        keep_owner: link.owner.is_some(),
        modified_at: link.modified_at.map(stamp),
    }))
    .await?;
    match call.answer(patience).await? {
        Payload::Done(_) => Ok(()),
        _ => Err(nonsense()),
    }
}

pub(super) async fn read(
    session: &Arc<Session>,
    path: &str,
    offset: u64,
    length: Option<u64>,
    patience: Duration,
) -> Result<(GuestFile, Box<dyn GuestFileReader>)> {
    let call = session.begin(Kind::Read, Some("files"))?;
    call.send(Payload::FileRead(FileReadRequest {
        path: path.to_owned(),
        offset,
        // None is all, which the protocol says by 0.
        length: length.unwrap_or(0),
    }))
    .await?;
    match call.answer(patience).await? {
        Payload::FileReadResponse(response) => match response.event {
            Some(file_read_response::Event::Opened(attributes)) => Ok((
                clean::file(&attributes),
                Box::new(Reader {
                    call,
                    hash: XxHash64::with_seed(0),
                    size: 0,
                    most: length,
                    sum: None,
                }),
            )),
            _ => Err(nonsense()),
        },
        _ => Err(nonsense()),
    }
}

struct Reader {
    call: CallHandle,
    hash: XxHash64,
    size: u64,
    most: Option<u64>,
    sum: Option<FileSum>,
}

#[async_trait]
impl GuestFileReader for Reader {
    async fn read(&mut self) -> Result<Vec<u8>> {
        if self.sum.is_some() {
            return Ok(Vec::new());
        }
        match self.call.receive().await? {
            Item::Data(_, data) => {
                self.size += data.len() as u64;
                if self.most.is_some_and(|most| self.size > most) {
                    return Err(nonsense().because("it sent more than was asked for"));
                }
                self.hash.write(&data);
                Ok(data)
            }
            Item::Answer(payload) => match *payload {
                Payload::FileReadResponse(response) => match response.event {
                    Some(file_read_response::Event::Finished(finished)) => {
                        let checksum = self.hash.finish().to_be_bytes();
                        if finished.size_bytes != self.size || finished.checksum != checksum {
                            return Err(mismatch("what came from the guest is not what it read"));
                        }
                        self.sum = Some(FileSum {
                            size: self.size,
                            checksum,
                        });
                        Ok(Vec::new())
                    }
                    _ => Err(nonsense()),
                },
                Payload::Error(error) => Err(failure(&error)),
                _ => Err(nonsense()),
            },
        }
    }

    fn sum(&self) -> Option<FileSum> {
        self.sum
    }
}

pub(super) fn stamp(at: Timestamp) -> prost_types::Timestamp {
    let millis = at.unix_millis();
    prost_types::Timestamp {
        seconds: millis.div_euclid(1000),
        // Below a thousand million.
        nanos: i32::try_from(millis.rem_euclid(1000) * 1_000_000).unwrap_or(0),
    }
}

pub(super) async fn write(
    session: &Arc<Session>,
    file: FileWrite,
    patience: Duration,
) -> Result<Box<dyn GuestFileWriter>> {
    let call = session.begin(Kind::Write, Some("files"))?;
    let (uid, gid) = file.owner.unwrap_or((0, 0));
    let (size, expected) = (file.size, file.checksum);
    call.send(Payload::FileWrite(FileWriteRequest {
        path: file.path,
        attributes: Some(FileAttributes {
            kind: FileKind::File as i32,
            size_bytes: file.size,
            mode: file.mode & 0o7777,
            uid,
            gid,
            modified_at: file.modified_at.map(stamp),
            symlink_target: String::new(),
        }),
        keep_owner: file.owner.is_some(),
        checksum: file.checksum.map(Vec::from).unwrap_or_default(),
        resume: file.resume,
        make_parents: file.make_parents,
        no_replace: file.no_replace,
    }))
    .await?;
    match call.answer(patience).await? {
        Payload::FileWriteResponse(response) => match response.event {
            Some(file_write_response::Event::Accepted(accepted)) => {
                if accepted.offset > size || (accepted.offset > 0 && !file.resume) {
                    return Err(nonsense().because("it has more of the file than there is"));
                }
                Ok(Box::new(Writer {
                    call,
                    offset: accepted.offset,
                    sent: accepted.offset,
                    hash: XxHash64::with_seed(0),
                    expected,
                }))
            }
            _ => Err(nonsense()),
        },
        _ => Err(nonsense()),
    }
}

struct Writer {
    call: CallHandle,
    offset: u64,
    sent: u64,
    /// Of what was sent.
    hash: XxHash64,
    /// Of the whole.
    expected: Option<[u8; 8]>,
}

/// Why sending failed: what the guest said before, if it said something.
async fn reason(call: &Call, error: Error) -> Error {
    if error.code() != ErrorCode::GuestFailed {
        return error;
    }
    match call.receive().await {
        Ok(Item::Answer(payload)) => match *payload {
            Payload::Error(error) => failure(&error),
            _ => nonsense(),
        },
        Ok(Item::Data(..)) => nonsense(),
        Err(error) => error,
    }
}

#[async_trait]
impl GuestFileWriter for Writer {
    fn offset(&self) -> u64 {
        self.offset
    }

    async fn write(&mut self, data: Vec<u8>) -> Result<()> {
        self.hash.write(&data);
        self.sent += data.len() as u64;
        match self.call.send_data(Stream::File, data).await {
            Ok(()) => Ok(()),
            Err(error) => Err(reason(&self.call, error).await),
        }
    }

    async fn finish(self: Box<Self>) -> Result<FileSum> {
        self.call.send_end(Stream::File).await?;
        let Payload::FileWriteResponse(response) = self.call.answer(FINISH_PATIENCE).await? else {
            return Err(nonsense());
        };
        let Some(file_write_response::Event::Written(written)) = response.event else {
            return Err(nonsense());
        };
        // After a resume only the sender's sum of the whole says anything of all of it.
        let checksum = match self.expected {
            Some(expected) => expected,
            None => self.hash.finish().to_be_bytes(),
        };
        if written.size_bytes != self.sent || written.checksum != checksum {
            return Err(mismatch("the guest holds other bytes than were sent"));
        }
        Ok(FileSum {
            size: self.sent,
            checksum,
        })
    }
}

/// Sends the program of an update, whole: a link that is lost before is an error.
pub(super) async fn update(
    session: &Arc<Session>,
    program: &GuestProgramFile,
    file: File,
    version: &str,
) -> Result<()> {
    let call = session.begin(Kind::Write, Some("update"))?;
    call.send(Payload::Update(UpdateRequest {
        size_bytes: program.size,
        sha256: program.sha256.to_vec(),
        version: version.to_owned(),
    }))
    .await?;
    let mut file = Some(file);
    loop {
        let Some(mut open) = file.take() else {
            break;
        };
        let (piece, open) = crate::images::files::blocking(move |_| {
            let mut piece = vec![0; PIECE];
            match open.read(&mut piece) {
                Ok(count) => {
                    piece.truncate(count);
                    Ok((piece, open))
                }
                Err(error) => Err(Error::new(
                    ErrorCode::IoFailed,
                    "the guest agent's program cannot be read",
                )
                .because(error)),
            }
        })
        .await?;
        if !piece.is_empty() {
            file = Some(open);
            if let Err(error) = call.send_data(Stream::File, piece).await {
                return Err(reason(&call, error).await);
            }
        }
    }
    call.send_end(Stream::File).await?;
    match call.answer(FINISH_PATIENCE).await {
        Ok(Payload::Done(_)) => Ok(()),
        Ok(_) => Err(nonsense()),
        // It had all of it: the new one may start before the old one's last words have come.
        Err(error) if error.code() == ErrorCode::GuestUnreachable => Ok(()),
        Err(error) => Err(error),
    }
}
