//! Out of a VM. Everything that the guest says is checked: names, sizes, checksums, and how much
//! there is of it.
//!
//! A file is read in parts, each with a checksum of its own, so that all of what is kept over a
//! break is known to be right.

use std::hash::Hasher as _;
use std::io::{self, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use futures::{StreamExt as _, TryStreamExt as _};
use ghost_proto::agent::v1::read_guest_file_response::Event;
use ghost_proto::agent::v1::{
    GuestFile, GuestFileKind, ListGuestFilesRequest, ReadGuestFileRequest, StatGuestFileRequest,
};
use tokio::io::AsyncWriteExt as _;
use twox_hash::XxHash64;

use super::local::{Attributes, Base, Partial};
use super::place::{GuestPath, Name, check_name};
use super::{
    AT_ONCE, Copy, Retry, contents_of, cut_short, mismatch, no_directory, odd_link, wants_directory,
};
use crate::connect::ask;
use crate::errors::{ErrorCode, Failure};
use crate::text::{human_size, printable};

/// One part of a file. What breaks off costs at most so much again.
const PART: u64 = 64 << 20;

/// A guest that claims more than this is not to be believed.
const MOST_ENTRIES: usize = 1_000_000;
const DEEPEST: usize = 100;

/// What there is to copy.
#[derive(Debug, PartialEq, Eq)]
enum What {
    Directory,
    File,
    /// A symbolic link, and what it says.
    Link(String),
}

/// One of them.
struct Item {
    from: GuestPath,
    /// Its names below the base.
    to: Vec<String>,
    attributes: Attributes,
    depth: usize,
    what: What,
}

fn attributes(file: &GuestFile) -> Attributes {
    Attributes {
        size: file.size_bytes,
        mode: file.mode,
        uid: file.uid,
        gid: file.gid,
        modified: file.modified_at.as_ref().map(|at| (at.seconds, at.nanos)),
    }
}

async fn stat(copy: &Copy<'_>, path: &GuestPath) -> Result<GuestFile, Failure> {
    let request = StatGuestFileRequest {
        vm: path.vm.clone(),
        path: path.path.clone(),
        follow: true,
    };
    copy.agent
        .guest()
        .stat_file(ask(request))
        .await
        .map(tonic::Response::into_inner)
        .map_err(|status| copy.agent.failure(&status))
}

fn is_no_file(path: &GuestPath) -> Failure {
    Failure::usage(format!("{} is no file", printable(&path.shown())))
        .because("only a file goes to stdout")
}

/// A file becomes stdout. A pipe cannot be taken back: where it breaks, it has failed.
pub(super) async fn stdout(copy: &Copy<'_>, source: GuestPath) -> Result<(), Failure> {
    let file = stat(copy, &source).await?;
    if file.kind() != GuestFileKind::File {
        return Err(is_no_file(&source));
    }
    copy.tally.expect(1, file.size_bytes);
    let mut out = tokio::io::stdout();
    let mut parts = Parts::open(copy, &source, 0, 0).await?;
    let mut done = 0;
    while let Some(bytes) = parts.next(copy).await? {
        let written = async {
            out.write_all(&bytes).await?;
            out.flush().await
        };
        match written.await {
            Ok(()) => {}
            // The reader has seen enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            Err(error) => return Err(Failure::io("stdout cannot be written", &error)),
        }
        copy.tally.moved(done, done + bytes.len() as u64);
        done += bytes.len() as u64;
    }
    copy.tally.file(done);
    Ok(())
}

pub(super) async fn run(
    copy: &Copy<'_>,
    sources: Vec<GuestPath>,
    target: PathBuf,
) -> Result<(), Failure> {
    let shown = target.display().to_string();
    let is_directory = target.is_dir();
    if !is_directory && (sources.len() > 1 || (target.exists() && wants_directory(&shown))) {
        return Err(no_directory(&shown));
    }
    for source in sources {
        let file = stat(copy, &source).await?;
        let directory = file.kind() == GuestFileKind::Directory;
        if !directory && file.kind() != GuestFileKind::File {
            copy.skip(&source.shown(), "a device, pipe or socket");
            continue;
        }
        if !is_directory && (directory && target.exists() || !directory && wants_directory(&shown))
        {
            return Err(no_directory(&shown));
        }
        let contents = directory && source.name().is_none();
        let (base, name) = if is_directory {
            let name = source.name().filter(|_| !contents).map(str::to_owned);
            (target.clone(), name)
        } else {
            split(&target)?
        };
        let base = Base::open(&base)?;
        let top = Item {
            from: source,
            to: name.into_iter().collect(),
            attributes: attributes(&file),
            depth: 0,
            what: if directory {
                What::Directory
            } else {
                What::File
            },
        };
        tree(copy, &base, top).await?;
    }
    Ok(())
}

/// The directory that a new thing is made in, and its name.
fn split(target: &Path) -> Result<(PathBuf, Option<String>), Failure> {
    let name = target.file_name().and_then(|name| name.to_str());
    let Some(name) = name.filter(|_| !contents_of(target)) else {
        return Err(no_directory(&target.display().to_string()));
    };
    let parent = match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    Ok((parent, Some(name.to_owned())))
}

/// Copies one source with all that is below it.
async fn tree(copy: &Copy<'_>, base: &Base, top: Item) -> Result<(), Failure> {
    let items = look(copy, top).await?;
    let files = items.iter().filter(|item| item.what == What::File);
    copy.tally.expect(
        files.clone().count() as u64,
        files
            .map(|item| item.attributes.size)
            .fold(0, u64::saturating_add),
    );
    let (mut directories, mut files, mut links) = (Vec::new(), Vec::new(), Vec::new());
    for item in items {
        match item.what {
            What::Directory => directories.push(item),
            What::File => files.push(item),
            What::Link(_) => links.push(item),
        }
    }
    let mut made = Vec::new();
    for directory in &directories {
        let new = base.make_directory(&directory.to).map_err(|error| {
            Failure::io(
                format!("{} cannot be made", printable(&directory.to.join("/"))),
                &error,
            )
        })?;
        if new {
            made.push(directory);
        }
        copy.tally.directory();
    }
    futures::stream::iter(files)
        .map(Ok)
        .try_for_each_concurrent(AT_ONCE, |item| async move {
            copy.settle(fetch(copy, base, item).await)
        })
        .await?;
    // Last, so that nothing is written where one of them may be.
    for link in &links {
        copy.settle(make_link(copy, base, link))?;
    }
    // From the inside out, once nothing more is written in them: a mode may shut us out, and each
    // file changes the time of its directory.
    for directory in made.into_iter().rev() {
        let finished = base.finish_directory(&directory.to, &directory.attributes, copy.keep_owner);
        copy.settle(finished.map_err(|error| {
            let shown = printable(&directory.to.join("/"));
            Failure::io(format!("{shown} cannot be given its mode"), &error)
        }))?;
    }
    Ok(())
}

/// All that is there, directories before what is in them.
async fn look(copy: &Copy<'_>, top: Item) -> Result<Vec<Item>, Failure> {
    let mut items = vec![top];
    let mut at = 0;
    while at < items.len() {
        if items[at].what == What::Directory {
            let below = list(copy, &items[at], items.len()).await?;
            items.extend(below);
        }
        at += 1;
        copy.tally.looks(items.len());
    }
    Ok(items)
}

fn too_much(path: &GuestPath) -> Failure {
    Failure::new(
        ErrorCode::GuestFailed,
        format!("{} has too much in it", printable(&path.shown())),
    )
    .because(format!(
        "more than {MOST_ENTRIES} names are not taken from a guest"
    ))
    .hint("copy parts of it, or an archive: ghostctl exec NAME -- tar c DIR > x.tar")
}

/// What is in a directory, page by page.
async fn list(copy: &Copy<'_>, directory: &Item, known: usize) -> Result<Vec<Item>, Failure> {
    let mut items = Vec::new();
    if directory.depth >= DEEPEST {
        copy.skip(&directory.from.shown(), "too deep");
        return Ok(items);
    }
    let mut after = String::new();
    loop {
        let request = ListGuestFilesRequest {
            vm: directory.from.vm.clone(),
            path: directory.from.path.clone(),
            after: after.clone(),
            limit: 0,
        };
        let page = copy
            .agent
            .guest()
            .list_files(ask(request))
            .await
            .map_err(|status| copy.agent.failure(&status))?
            .into_inner();
        let Some(last) = page.files.last().map(|file| file.name.clone()) else {
            break;
        };
        for file in page.files {
            if let Some(item) = entry(copy, directory, file).await? {
                items.push(item);
            }
        }
        // A guest whose pages do not come further would be listed for ever.
        if known + items.len() > MOST_ENTRIES || (page.more && last <= after) {
            return Err(too_much(&directory.from));
        }
        if !page.more {
            break;
        }
        after = last;
    }
    Ok(items)
}

/// One entry of a directory; `None` where it is left out.
async fn entry(
    copy: &Copy<'_>,
    directory: &Item,
    file: GuestFile,
) -> Result<Option<Item>, Failure> {
    let name = check_name(&file.name)?;
    let from = directory.from.join(&file.name);
    if let Name::Odd(why) = name {
        copy.skip(&from.shown(), why);
        return Ok(None);
    }
    let link = file.kind() == GuestFileKind::Symlink;
    let seen = if link && copy.dereference {
        match stat(copy, &from).await {
            Ok(seen) => seen,
            Err(failure) => {
                copy.settle(Err(failure))?;
                return Ok(None);
            }
        }
    } else {
        file.clone()
    };
    let what = match seen.kind() {
        GuestFileKind::Directory => What::Directory,
        GuestFileKind::File => What::File,
        GuestFileKind::Symlink => match odd_link(&seen.symlink_target) {
            None => What::Link(seen.symlink_target.clone()),
            Some(why) => {
                copy.skip(&from.shown(), why);
                return Ok(None);
            }
        },
        GuestFileKind::Unspecified | GuestFileKind::Other => {
            copy.skip(&from.shown(), "a device, pipe or socket");
            return Ok(None);
        }
    };
    let mut to = directory.to.clone();
    to.push(file.name);
    Ok(Some(Item {
        from,
        to,
        attributes: attributes(&seen),
        depth: directory.depth + 1,
        what,
    }))
}

/// Makes a symbolic link that says what it says in the guest.
fn make_link(copy: &Copy<'_>, base: &Base, item: &Item) -> Result<(), Failure> {
    let What::Link(says) = &item.what else {
        return Ok(());
    };
    base.make_link(&item.to, says, &item.attributes, copy.keep_owner)
        .map_err(|error| {
            let shown = printable(&item.to.join("/"));
            Failure::io(format!("the link {shown} cannot be made"), &error)
        })?;
    copy.tally.link();
    Ok(())
}

/// Fetches one file, over as many breaks as it takes.
async fn fetch(copy: &Copy<'_>, base: &Base, item: Item) -> Result<(), Failure> {
    // Another content is another file: what was left of it is of no use.
    let identity = format!(
        "{}\0{}\0{:?}",
        item.from.shown(),
        item.attributes.size,
        item.attributes.modified
    );
    let mut partial = base.partial(&item.to, &identity)?;
    // A part is begun when all before it was right; of the last one that is not known.
    partial.verified = partial.length.saturating_sub(1) / PART * PART;
    let mut at = partial.verified;
    copy.tally.moved(0, at);
    let mut retry = Retry::new();
    // It may grow while it is read, as a log does, but not for ever.
    let most = item.attributes.size.saturating_add(PART);
    loop {
        match fetch_part(copy, &item.from, &mut partial, &mut retry, &mut at).await {
            Ok(false) => {}
            Ok(true) => break,
            Err(failure) => {
                retry.again(failure, copy).await?;
                copy.tally.moved(at, partial.verified);
                at = partial.verified;
            }
        }
        if partial.verified > most {
            return Err(Failure::new(
                ErrorCode::GuestFailed,
                format!("{} does not end", printable(&item.from.shown())),
            )
            .because(format!(
                "it said to have {}",
                human_size(item.attributes.size)
            )));
        }
    }
    let size = partial.verified;
    partial
        .complete(&item.attributes, copy.keep_owner)
        .map_err(|error| {
            let shown = printable(&item.to.join("/"));
            Failure::io(format!("{shown} cannot be put in its place"), &error)
        })?;
    copy.tally.file(size);
    Ok(())
}

/// Fetches the next part; says whether it was the last.
async fn fetch_part(
    copy: &Copy<'_>,
    from: &GuestPath,
    partial: &mut Partial,
    retry: &mut Retry,
    at: &mut u64,
) -> Result<bool, Failure> {
    let begin = partial.verified;
    let unwritable = |error: io::Error| {
        Failure::io(
            format!(
                "what comes of {} cannot be written",
                printable(&from.shown())
            ),
            &error,
        )
    };
    partial
        .file
        .set_len(begin)
        .and_then(|()| partial.file.seek(SeekFrom::Start(begin)))
        .map_err(unwritable)?;
    let mut parts = Parts::open(copy, from, begin, PART).await?;
    retry.reached(begin);
    while let Some(bytes) = parts.next(copy).await? {
        partial.file.write_all(&bytes).map_err(unwritable)?;
        let now = *at + bytes.len() as u64;
        copy.tally.moved(*at, now);
        *at = now;
        retry.reached(now);
    }
    partial.verified = *at;
    Ok(*at - begin < PART)
}

/// The bytes of a file, or of a part of it, checked at their end.
struct Parts {
    stream: tonic::Streaming<ghost_proto::agent::v1::ReadGuestFileResponse>,
    hash: XxHash64,
    size: u64,
    most: u64,
    shown: String,
}

impl Parts {
    /// Reads `length` bytes, all with 0, from `offset` on.
    async fn open(
        copy: &Copy<'_>,
        from: &GuestPath,
        offset: u64,
        length: u64,
    ) -> Result<Self, Failure> {
        let request = ReadGuestFileRequest {
            vm: from.vm.clone(),
            path: from.path.clone(),
            offset,
            length,
        };
        let mut stream = copy
            .agent
            .guest()
            .read_file(request)
            .await
            .map_err(|status| copy.agent.failure(&status))?
            .into_inner();
        let shown = printable(&from.shown());
        match stream.message().await {
            Ok(Some(answer)) if matches!(answer.event, Some(Event::Opened(_))) => {}
            Ok(Some(_)) => return Err(mismatch(&shown)),
            Ok(None) => return Err(cut_short(&shown)),
            Err(status) => return Err(copy.agent.failure(&status)),
        }
        Ok(Self {
            stream,
            hash: XxHash64::with_seed(0),
            size: 0,
            most: if length == 0 { u64::MAX } else { length },
            shown,
        })
    }

    /// The next bytes; `None` once all have come and are right.
    async fn next(&mut self, copy: &Copy<'_>) -> Result<Option<Vec<u8>>, Failure> {
        loop {
            let answer = self.stream.message().await;
            match answer.map_err(|status| copy.agent.failure(&status))? {
                None => return Err(cut_short(&self.shown)),
                Some(answer) => match answer.event {
                    Some(Event::Data(bytes)) => {
                        self.size = self.size.saturating_add(bytes.len() as u64);
                        if self.size > self.most {
                            return Err(mismatch(&self.shown));
                        }
                        self.hash.write(&bytes);
                        return Ok(Some(bytes.to_vec()));
                    }
                    Some(Event::Finished(sum)) => {
                        let right = sum.size_bytes == self.size
                            && sum.checksum == self.hash.finish().to_be_bytes();
                        return if right {
                            Ok(None)
                        } else {
                            Err(mismatch(&self.shown))
                        };
                    }
                    // What a newer agent adds is not for us.
                    Some(Event::Opened(_)) | None => {}
                },
            }
        }
    }
}
