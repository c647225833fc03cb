//! The log of what was done in guests: lines of JSON in `<data_dir>/audit/`, each chained to the one
//! before by SHA-256, appended by one thread and synced before the caller is told.
//!
//! What the chain shows: a line that was changed, removed, inserted or moved, and, by the note of
//! the newest entry beside it, lines that were cut off at the end. What it cannot show: the work of
//! somebody who may write as root and makes all of it anew. Whoever wants that too keeps the hash of
//! the newest entry (`ghostctl audit verify` prints it) somewhere else.
//!
//! Files are bounded: beyond [`AuditOptions::max_files`] the oldest goes, and where the chain begins
//! then is noted first.

mod files;
mod line;
mod writer;

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError};

use async_trait::async_trait;
use ghost_domain::guest::{AuditEntry, AuditRecord, AuditVerdict};
use ghost_domain::ports::{AuditLog, AuditReceipt, Clock};
use ghost_domain::{Error, ErrorCode, Result, Timestamp, VmId};
use tokio::sync::oneshot;

use crate::images::files::{Cancellation, blocking_long, io_error};
use files::{Folder, Mark, Note};
use writer::{Append, Command, Extent, Writer};

/// Entries that wait for the writer; more means that the disk hangs.
const MOST_WAITING: usize = 1024;
/// Entries that one listing gives.
const MOST_LISTED: usize = 10_000;

/// Where the log lies and how large it gets.
#[derive(Clone)]
pub struct AuditOptions {
    /// Its folder, made with mode 0700 where it is missing.
    pub folder: PathBuf,
    /// A file that has reached this is followed by a new one.
    pub max_file_bytes: u64,
    /// Files that are kept, at least two.
    pub max_files: usize,
    /// Stamps the entries.
    pub clock: Arc<dyn Clock>,
}

impl AuditOptions {
    /// `<data_dir>/audit`, sixteen files of 8 MiB: some 400,000 entries.
    pub fn new(data_dir: impl Into<PathBuf>, clock: Arc<dyn Clock>) -> Self {
        Self {
            folder: data_dir.into().join("audit"),
            max_file_bytes: 8 << 20,
            max_files: 16,
            clock,
        }
    }
}

impl std::fmt::Debug for AuditOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AuditOptions")
            .field("folder", &self.folder)
            .field("max_file_bytes", &self.max_file_bytes)
            .field("max_files", &self.max_files)
            .finish_non_exhaustive()
    }
}

/// [`AuditLog`] in files.
#[derive(Debug)]
pub struct FileAuditLog {
    folder: Folder,
    commands: SyncSender<Command>,
}

impl FileAuditLog {
    /// Opens it and starts the thread that appends. What a crash left unfinished is repaired, and
    /// the log says so.
    ///
    /// # Errors
    /// `IoFailed` or `DiskFull`.
    pub fn open(options: AuditOptions) -> Result<Self> {
        let folder = Folder(options.folder.clone());
        let failed = |error: &io::Error| io_error("open the audit log in", &folder.0, error);
        let writer = Writer::open(options).map_err(|error| failed(&error))?;
        let (commands, received) = std::sync::mpsc::sync_channel(MOST_WAITING);
        std::thread::Builder::new()
            .name("audit".to_owned())
            .spawn(move || writer.run(&received))
            .map_err(|error| failed(&error))?;
        Ok(Self { folder, commands })
    }

    /// The newest entries that are wanted, oldest first; at most `limit`, and 10,000.
    ///
    /// # Errors
    /// `IoFailed`.
    pub async fn find(
        &self,
        limit: usize,
        wanted: impl Fn(&AuditEntry) -> bool + Send + 'static,
    ) -> Result<Vec<AuditEntry>> {
        let extent = self.ask(Command::Extent).await?;
        let folder = self.folder.clone();
        blocking_long(move |cancellation| {
            list(
                &folder,
                &extent,
                limit.min(MOST_LISTED),
                wanted,
                cancellation,
            )
        })
        .await
    }

    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T>>) -> Command,
    ) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        self.send(command(reply))?;
        answer.await.map_err(|_| gone())?
    }

    fn send(&self, command: Command) -> Result<()> {
        self.commands
            .try_send(command)
            .map_err(|error| match error {
                TrySendError::Full(_) => Error::new(
                    ErrorCode::TooManyRequests,
                    "the audit log's disk does not keep up",
                )
                .hint("look at the disks of the host: dmesg, and ghost-agent doctor"),
                TrySendError::Disconnected(_) => gone(),
            })
    }
}

fn gone() -> Error {
    Error::internal("the audit log's writer is gone")
}

#[async_trait]
impl AuditLog for FileAuditLog {
    async fn append(&self, record: AuditRecord) -> Result<AuditEntry> {
        self.ask(|synced| {
            Command::Append(Box::new(Append {
                record,
                written: None,
                synced,
            }))
        })
        .await
    }

    async fn begin(&self, record: AuditRecord) -> Result<AuditReceipt> {
        let (synced, durable) = oneshot::channel();
        let (written, wrote) = oneshot::channel();
        self.send(Command::Append(Box::new(Append {
            record,
            written: Some(written),
            synced,
        })))?;
        let receipt: AuditReceipt = Box::pin(async move { durable.await.map_err(|_| gone())? });
        match wrote.await {
            Ok(()) => Ok(receipt),
            // It never came to the file: the receipt says why.
            Err(_) => match receipt.await {
                Ok(_) => Err(gone()),
                Err(error) => Err(error),
            },
        }
    }

    async fn list(
        &self,
        vm: Option<VmId>,
        since: Option<Timestamp>,
        limit: usize,
    ) -> Result<Vec<AuditEntry>> {
        let vm = vm.map(|vm| vm.to_string());
        self.find(limit, move |entry| {
            vm.as_ref().is_none_or(|vm| entry.record.vm_id == *vm)
                && since.is_none_or(|since| entry.at >= since)
        })
        .await
    }

    async fn verify(&self) -> Result<AuditVerdict> {
        // Old files may go while they are read: once more then, from where the chain begins now.
        for _ in 0..3 {
            let extent = self.ask(Command::Extent).await?;
            let folder = self.folder.clone();
            let found = blocking_long(move |cancellation| {
                cancellation.check()?;
                match verify(&folder, &extent) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                    Err(error) => Err(io_error("read the audit log in", &folder.0, &error)),
                    Ok(verdict) => Ok(Some(verdict)),
                }
            })
            .await?;
            if let Some(verdict) = found {
                return Ok(verdict);
            }
        }
        Err(Error::new(
            ErrorCode::IoFailed,
            "the audit log changes faster than it can be read",
        ))
    }
}

/// The newest entries that are wanted, oldest first.
fn list(
    folder: &Folder,
    extent: &Extent,
    limit: usize,
    wanted: impl Fn(&AuditEntry) -> bool,
    cancellation: &Cancellation,
) -> Result<Vec<AuditEntry>> {
    let failed = |error: &io::Error| io_error("read the audit log in", &folder.0, error);
    let mut found: VecDeque<AuditEntry> = VecDeque::new();
    for first in folder
        .segments()
        .map_err(|error| failed(&error))?
        .into_iter()
        .rev()
    {
        cancellation.check()?;
        if found.len() >= limit || first > extent.active {
            if first > extent.active {
                continue;
            }
            break;
        }
        let room = limit - found.len();
        let mut here: VecDeque<AuditEntry> = VecDeque::new();
        let read = folder.read_lines(first, until(extent, first), |bytes, _| {
            if let Some(read) = line::read(bytes)
                && wanted(&read.entry)
            {
                if here.len() == room {
                    here.pop_front();
                }
                here.push_back(read.entry);
            }
            true
        });
        match read {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => break,
            Err(error) => return Err(failed(&error)),
        }
        while let Some(entry) = here.pop_back() {
            found.push_front(entry);
        }
    }
    Ok(found.into())
}

/// How much of a file there is to read.
fn until(extent: &Extent, first: u64) -> u64 {
    if first == extent.active {
        extent.length
    } else {
        u64::MAX
    }
}

fn verify(folder: &Folder, extent: &Extent) -> io::Result<AuditVerdict> {
    let segments = folder.segments()?;
    let base = match folder.base()? {
        Note::Is(mark) => mark,
        Note::Missing => Mark::START,
        Note::Damaged => {
            return Ok(AuditVerdict {
                entries: 0,
                broken: Some((
                    segments.first().copied().unwrap_or(1),
                    "the note of where the log begins is damaged".to_owned(),
                )),
                head: extent.head.hash,
            });
        }
    };
    let mut at = base;
    let mut entries = 0;
    let mut broken: Option<(u64, String)> = None;
    for (index, first) in segments.iter().enumerate() {
        // Removed at a rotation that did not come to its end.
        let next = segments.get(index + 1);
        if next.is_some_and(|next| *next <= base.sequence + 1) || *first > extent.active {
            continue;
        }
        folder.read_lines(*first, until(extent, *first), |bytes, whole| {
            entries += 1;
            if broken.is_some() {
                // Counted, but behind a break nothing can be said.
                return true;
            }
            let expected = at.sequence + 1;
            broken = match line::read(bytes).filter(|_| whole) {
                None => Some((expected, "it is no entry".to_owned())),
                Some(read) if read.entry.sequence != expected => Some((
                    expected,
                    format!("entry {} stands in its place", read.entry.sequence),
                )),
                Some(read) if !read.follows(&at.hash) => Some((
                    expected,
                    "its content or the entry before was changed".to_owned(),
                )),
                Some(read) => {
                    at = Mark {
                        sequence: read.entry.sequence,
                        hash: read.entry.hash,
                    };
                    None
                }
            };
            true
        })?;
    }
    if broken.is_none() && at != extent.head {
        broken = Some((
            at.sequence + 1,
            format!("entries up to {} are missing", extent.head.sequence),
        ));
    }
    Ok(AuditVerdict {
        entries,
        broken,
        head: at.hash,
    })
}
