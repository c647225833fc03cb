//! Into a VM.

use std::fs::{File, Metadata};
use std::hash::Hasher as _;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use futures::{StreamExt as _, TryStreamExt as _};
use ghost_proto::agent::v1::write_guest_file_request::{End, Event as In};
use ghost_proto::agent::v1::write_guest_file_response::Event as Out;
use ghost_proto::agent::v1::{
    GuestFileKind, GuestFileSum, MakeGuestDirectoryRequest, MakeGuestLinkRequest,
    StatGuestFileRequest, WriteGuestFileRequest, WriteGuestFileResponse, WriteGuestFileStart,
};
use prost_types::Timestamp;
use tokio::io::AsyncReadExt as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use twox_hash::XxHash64;

use super::place::GuestPath;
use super::{
    AT_ONCE, Copy, PIECE, Retry, Target, contents_of, cut_short, mismatch, no_directory, odd_link,
    wants_directory,
};
use crate::connect::ask;
use crate::errors::{ErrorCode, Failure};
use crate::text::printable;

/// The mode of what comes from stdin.
const PLAIN: u32 = 0o644;

/// A deeper tree is a loop of links.
const DEEPEST: usize = 100;

/// One directory, file or symbolic link to copy.
struct Item {
    from: PathBuf,
    to: GuestPath,
    known: Metadata,
    depth: usize,
    /// The person named it, or wants links followed: a link is what it leads to.
    follow: bool,
}

/// What is at a path in the guest, links followed; `None` where nothing is.
async fn kind_of(copy: &Copy<'_>, path: &GuestPath) -> Result<Option<GuestFileKind>, Failure> {
    let request = StatGuestFileRequest {
        vm: path.vm.clone(),
        path: path.path.clone(),
        follow: true,
    };
    match copy.agent.guest().stat_file(ask(request)).await {
        Ok(file) => Ok(Some(file.into_inner().kind())),
        Err(status) => {
            let failure = copy.agent.failure(&status);
            if failure.code() == ErrorCode::GuestFileNotFound.as_str() {
                Ok(None)
            } else {
                Err(failure)
            }
        }
    }
}

/// stdin becomes a file. It is kept here first: its size and checksum have to be known, and a
/// broken transfer must be able to go on.
pub(super) async fn stdin(copy: &Copy<'_>, target: GuestPath) -> Result<(), Failure> {
    let is_directory = kind_of(copy, &target).await? == Some(GuestFileKind::Directory);
    if is_directory || wants_directory(&target.path) {
        return Err(
            Failure::usage(format!("{} is a directory", printable(&target.shown())))
                .because("what comes from stdin has no name"),
        );
    }
    let spooled = async {
        let mut file = tokio::fs::File::from_std(tempfile::tempfile()?);
        tokio::io::copy(&mut tokio::io::stdin(), &mut file).await?;
        Ok::<_, io::Error>(file.into_std().await)
    };
    let mut file = spooled
        .await
        .map_err(|error| Failure::io("stdin cannot be kept", &error))?;
    let (size, checksum) = sum(&mut file)
        .await
        .map_err(|error| unreadable("stdin", &error))?;
    copy.tally.expect(1, size);
    let start = WriteGuestFileStart {
        vm: target.vm.clone(),
        path: target.path.clone(),
        size_bytes: size,
        mode: PLAIN,
        checksum,
        resume: true,
        ..WriteGuestFileStart::default()
    };
    send(copy, file, start).await
}

pub(super) async fn run(
    copy: &Copy<'_>,
    sources: Vec<PathBuf>,
    target: GuestPath,
) -> Result<(), Failure> {
    let there = kind_of(copy, &target).await?;
    let is_directory = there == Some(GuestFileKind::Directory);
    let shown = printable(&target.shown());
    if !is_directory && (sources.len() > 1 || (there.is_some() && wants_directory(&target.path))) {
        return Err(no_directory(&shown));
    }
    let mut items = Vec::new();
    for source in sources {
        let known = std::fs::metadata(&source)
            .map_err(|error| unreadable(&source.display().to_string(), &error))?;
        let contents = known.is_dir() && contents_of(&source);
        let name = source.file_name().map(|name| name.to_str());
        let to = if is_directory {
            Target::Inside(target.clone())
        } else {
            Target::As(target.clone())
        };
        let to = match to {
            Target::Inside(target) if !contents => match name.flatten() {
                Some(name) => target.join(name),
                None => return Err(odd_name(&source)),
            },
            Target::Inside(target) | Target::As(target) => target,
        };
        if known.is_dir() && there.is_some() && !is_directory {
            return Err(no_directory(&shown));
        }
        if !known.is_dir() && !is_directory && wants_directory(&target.path) {
            return Err(no_directory(&shown));
        }
        let item = Item {
            from: source,
            to: GuestPath {
                path: trimmed(&to.path),
                ..to
            },
            known,
            depth: 0,
            follow: true,
        };
        look(copy, item, &mut items)?;
    }
    let bytes = |item: &&Item| item.known.is_file();
    let files = items.iter().filter(bytes);
    copy.tally.expect(
        files.clone().count() as u64,
        files.map(|item| item.known.len()).sum(),
    );
    let (directories, others): (Vec<Item>, Vec<Item>) =
        items.into_iter().partition(|item| item.known.is_dir());
    let (links, files): (Vec<Item>, Vec<Item>) =
        others.into_iter().partition(|item| item.known.is_symlink());
    // A level at a time: what is in a directory needs it.
    for level in directories.chunk_by(|a, b| a.depth == b.depth) {
        futures::stream::iter(level.iter().map(Ok))
            .try_for_each_concurrent(AT_ONCE, |item| make_directory(copy, item))
            .await?;
    }
    futures::stream::iter(files)
        .map(Ok)
        .try_for_each_concurrent(AT_ONCE, |item| async move {
            copy.settle(send_file(copy, item).await)
        })
        .await?;
    // Last, so that nothing is written through one of them.
    futures::stream::iter(&links)
        .map(Ok)
        .try_for_each_concurrent(AT_ONCE, |item| async move {
            copy.settle(make_link(copy, item).await)
        })
        .await
}

/// `/a/b/.` and `/a/b/` are `/a/b`.
fn trimmed(path: &str) -> String {
    let path = path
        .strip_suffix("/.")
        .unwrap_or(path)
        .trim_end_matches('/');
    if path.is_empty() { "/" } else { path }.to_owned()
}

fn odd_name(path: &Path) -> Failure {
    Failure::usage(format!("{} cannot be named in a guest", path.display()))
        .because("the name is not valid UTF-8")
}

fn unreadable(shown: &str, error: &io::Error) -> Failure {
    let failure = Failure::io(format!("{shown} cannot be read"), error);
    if error.kind() == io::ErrorKind::NotFound {
        Failure::new(ErrorCode::NotFound, format!("there is no {shown}"))
    } else {
        failure
    }
}

/// Adds an item and all below it; directories come in the order of their depth.
fn look(copy: &Copy<'_>, top: Item, items: &mut Vec<Item>) -> Result<(), Failure> {
    let mut level = vec![top];
    while !level.is_empty() {
        let mut below = Vec::new();
        for item in level {
            if item.known.is_dir() {
                enter(copy, &item, &mut below)?;
            } else if !item.known.is_file() && !item.known.is_symlink() {
                copy.skip(&item.from.display().to_string(), "a device, pipe or socket");
                continue;
            }
            items.push(item);
        }
        copy.tally.looks(items.len());
        level = below;
    }
    Ok(())
}

/// What is in a directory.
fn enter(copy: &Copy<'_>, directory: &Item, below: &mut Vec<Item>) -> Result<(), Failure> {
    let shown = directory.from.display().to_string();
    if directory.depth >= DEEPEST {
        copy.skip(&shown, "too deep, as in a loop of links");
        return Ok(());
    }
    let entries = match std::fs::read_dir(&directory.from) {
        Ok(entries) => entries,
        Err(error) => return copy.settle(Err(unreadable(&shown, &error))),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| unreadable(&shown, &error))?.path();
        let known = if copy.dereference {
            std::fs::metadata(&path)
        } else {
            std::fs::symlink_metadata(&path)
        };
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
            copy.skip(&path.display().to_string(), "its name is not valid UTF-8");
            continue;
        };
        match known {
            Ok(known) => found.push(Item {
                to: directory.to.join(name),
                from: path,
                known,
                depth: directory.depth + 1,
                follow: copy.dereference,
            }),
            Err(error) => copy.settle(Err(unreadable(&path.display().to_string(), &error)))?,
        }
    }
    found.sort_by(|a, b| a.from.cmp(&b.from));
    below.extend(found);
    Ok(())
}

async fn make_directory(copy: &Copy<'_>, item: &Item) -> Result<(), Failure> {
    let request = MakeGuestDirectoryRequest {
        vm: item.to.vm.clone(),
        path: item.to.path.clone(),
        mode: item.known.mode() & 0o7777,
        uid: item.known.uid(),
        gid: item.known.gid(),
        keep_owner: copy.keep_owner,
        // As `mkdir -p`: one that is there already is as good, and stays as it is.
        make_parents: true,
    };
    copy.agent
        .guest()
        .make_directory(ask(request))
        .await
        .map_err(|status| copy.agent.failure(&status))?;
    copy.tally.directory();
    Ok(())
}

/// Makes a symbolic link in the guest that says what it says here.
async fn make_link(copy: &Copy<'_>, item: &Item) -> Result<(), Failure> {
    let shown = item.from.display().to_string();
    let says = std::fs::read_link(&item.from).map_err(|error| unreadable(&shown, &error))?;
    // Where it is no UTF-8 it is taken for what a guest's would be.
    let says = says.to_string_lossy().into_owned();
    if let Some(why) = odd_link(&says) {
        copy.skip(&shown, why);
        return Ok(());
    }
    let request = MakeGuestLinkRequest {
        vm: item.to.vm.clone(),
        path: item.to.path.clone(),
        target: says,
        uid: item.known.uid(),
        gid: item.known.gid(),
        keep_owner: copy.keep_owner,
        modified_at: modified(&item.known),
    };
    let mut retry = Retry::new();
    loop {
        let Err(status) = copy.agent.guest().make_link(ask(request.clone())).await else {
            copy.tally.link();
            return Ok(());
        };
        let failure = copy.agent.failure(&status);
        // Made again it is the same.
        retry.reached(0);
        // An agent of an earlier release, on the host or in the guest, or one whose owner forbids it.
        if status.code() == tonic::Code::Unimplemented
            || failure.code() == ErrorCode::GuestUnsupported.as_str()
        {
            copy.skip(
                &shown,
                "a symbolic link, which this VM's agent does not make",
            );
            return Ok(());
        }
        retry.again(failure, copy).await?;
    }
}

fn modified(known: &Metadata) -> Option<Timestamp> {
    Some(Timestamp {
        seconds: known.mtime(),
        nanos: i32::try_from(known.mtime_nsec()).unwrap_or(0),
    })
}

async fn send_file(copy: &Copy<'_>, item: Item) -> Result<(), Failure> {
    let shown = item.from.display().to_string();
    let failed = |error: &io::Error| unreadable(&shown, error);
    let mut file = open(&item).map_err(|error| failed(&error))?;
    let (size, checksum) = sum(&mut file).await.map_err(|error| failed(&error))?;
    let known = file.metadata().map_err(|error| failed(&error))?;
    let start = WriteGuestFileStart {
        vm: item.to.vm,
        path: item.to.path,
        size_bytes: size,
        mode: known.mode() & 0o7777,
        uid: known.uid(),
        gid: known.gid(),
        keep_owner: copy.keep_owner,
        checksum,
        resume: true,
        make_parents: false,
        no_replace: false,
        modified_at: modified(&known),
    };
    send(copy, file, start).await
}

/// Opens what was looked at: no link that appeared since, and no pipe that would block.
fn open(item: &Item) -> io::Result<File> {
    let mut flags = rustix::fs::OFlags::NONBLOCK;
    if !item.follow {
        flags |= rustix::fs::OFlags::NOFOLLOW;
    }
    let flags = i32::try_from(flags.bits()).map_err(|_| io::Error::other("flags"))?;
    let file = File::options()
        .read(true)
        .custom_flags(flags)
        .open(&item.from)?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::other("it is no longer a file"))
    }
}

/// Size and checksum of all that can be read, and back to the beginning.
async fn sum(file: &mut File) -> io::Result<(u64, Vec<u8>)> {
    let mut file = file.try_clone()?;
    let summed = tokio::task::spawn_blocking(move || {
        let mut hash = XxHash64::with_seed(0);
        let mut buffer = vec![0; PIECE];
        let mut size = 0;
        file.seek(SeekFrom::Start(0))?;
        loop {
            let read = file.read(&mut buffer)?;
            if read == 0 {
                break;
            }
            hash.write(&buffer[..read]);
            size += read as u64;
        }
        Ok((size, hash.finish().to_be_bytes().to_vec()))
    });
    summed.await.map_err(io::Error::other)?
}

/// Sends a file until it is there whole, over as many breaks as it takes.
async fn send(copy: &Copy<'_>, file: File, mut start: WriteGuestFileStart) -> Result<(), Failure> {
    let mut retry = Retry::new();
    let mut at = 0;
    loop {
        let tried = try_send(copy, &file, &start, &mut retry, &mut at).await;
        match tried {
            Ok(()) => {
                copy.tally.file(start.size_bytes);
                return Ok(());
            }
            // What an earlier try has left was not what it seemed: once from the beginning.
            Err((failure, offset))
                if offset > 0
                    && start.resume
                    && failure.code() == ErrorCode::ChecksumMismatch.as_str() =>
            {
                start.resume = false;
            }
            Err((failure, _)) => retry.again(failure, copy).await?,
        }
    }
}

/// One try; a failure says from where on it was sent.
async fn try_send(
    copy: &Copy<'_>,
    file: &File,
    start: &WriteGuestFileStart,
    retry: &mut Retry,
    at: &mut u64,
) -> Result<(), (Failure, u64)> {
    let shown = printable(&format!("{}:{}", start.vm, start.path));
    let refused = |status: &tonic::Status| (copy.agent.failure(status), 0);
    let (pieces, receiver) = mpsc::channel(4);
    let message = |event| WriteGuestFileRequest { event: Some(event) };
    // There is room: the channel is empty.
    drop(pieces.try_send(message(In::Start(start.clone()))));
    let mut answers = copy
        .agent
        .guest()
        .write_file(ReceiverStream::new(receiver))
        .await
        .map_err(|status| refused(&status))?
        .into_inner();
    let offset = match answers.message().await.map_err(|status| refused(&status))? {
        Some(WriteGuestFileResponse {
            event: Some(Out::Accepted(offset)),
        }) if offset <= start.size_bytes => offset,
        Some(_) => return Err((mismatch(&shown), 0)),
        None => return Err((cut_short(&shown), 0)),
    };
    retry.reached(offset);
    copy.tally.moved(*at, offset);
    *at = offset;
    let sending = async {
        let mut source = file.try_clone()?;
        source.seek(SeekFrom::Start(offset))?;
        let mut source = tokio::fs::File::from_std(source);
        source.set_max_buf_size(PIECE);
        let mut left = start.size_bytes - offset;
        while left > 0 {
            let most = PIECE.min(usize::try_from(left).unwrap_or(PIECE));
            let mut piece = vec![0; most];
            let read = source.read(&mut piece).await?;
            if read == 0 {
                return Err(io::Error::other("it became shorter while it was copied"));
            }
            piece.truncate(read);
            if pieces.send(message(In::Data(piece.into()))).await.is_err() {
                // The agent no longer listens, and says why in its answer.
                return std::future::pending().await;
            }
            left -= read as u64;
            copy.tally.moved(*at, *at + read as u64);
            *at += read as u64;
        }
        // Without an end, what was sent is a try that broke off, and never a whole file.
        let _ = pieces.send(message(In::End(End {}))).await;
        std::future::pending::<io::Result<()>>().await
    };
    let written = tokio::select! {
        biased;
        written = outcome(&mut answers) => written,
        failed = sending => {
            let error = failed.err().unwrap_or_else(|| io::Error::other("it ended"));
            return Err((Failure::io(format!("{shown} cannot be copied"), &error), offset));
        }
    };
    match written {
        Ok(Some(sum)) if sum.size_bytes == start.size_bytes && sum.checksum == start.checksum => {
            Ok(())
        }
        Ok(Some(_)) => Err((mismatch(&shown), offset)),
        Ok(None) => Err((cut_short(&shown), offset)),
        Err(status) => Err((copy.agent.failure(&status), offset)),
    }
}

/// The last word on a file.
async fn outcome(
    answers: &mut Streaming<WriteGuestFileResponse>,
) -> Result<Option<GuestFileSum>, tonic::Status> {
    while let Some(answer) = answers.message().await? {
        if let Some(Out::Written(sum)) = answer.event {
            return Ok(Some(sum));
        }
    }
    Ok(None)
}
