//! The one thread that appends. Entries that wait together share one write and one sync.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use ghost_domain::Result;
use ghost_domain::guest::{AuditEntry, AuditRecord};
use ghost_domain::ports::Clock;
use tokio::sync::oneshot;

use super::files::{Folder, Head, Mark, Note, length, tail};
use super::{AuditOptions, line};
use crate::images::files::io_error;

/// Entries that share a sync.
const MOST_TOGETHER: usize = 256;

pub(super) enum Command {
    Append(Box<Append>),
    /// Where the log ends now.
    Extent(oneshot::Sender<Result<Extent>>),
}

/// An entry to be.
pub(super) struct Append {
    pub(super) record: AuditRecord,
    /// Told once it is in the file.
    pub(super) written: Option<oneshot::Sender<()>>,
    /// Told once it is on the disk, or of what kept it from the file or the disk.
    pub(super) synced: oneshot::Sender<Result<AuditEntry>>,
}

/// How much of the log there is to read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extent {
    /// The newest entry.
    pub(super) head: Mark,
    /// The file that is appended to, and its length.
    pub(super) active: u64,
    pub(super) length: u64,
}

/// The log, opened for appending.
#[derive(Debug)]
struct Open {
    file: File,
    active: u64,
    length: u64,
    mark: Mark,
    head: Head,
}

pub(super) struct Writer {
    folder: Folder,
    options: AuditOptions,
    clock: Arc<dyn Clock>,
    open: Option<Open>,
}

impl Writer {
    pub(super) fn open(options: AuditOptions) -> io::Result<Self> {
        let folder = Folder(options.folder.clone());
        folder.make()?;
        let mut writer = Self {
            folder,
            clock: Arc::clone(&options.clock),
            options,
            open: None,
        };
        writer.reopen()?;
        Ok(writer)
    }

    /// Serves until nobody can ask any more.
    pub(super) fn run(mut self, commands: &Receiver<Command>) {
        while let Ok(command) = commands.recv() {
            let mut together = Vec::new();
            let mut next = Some(command);
            while let Some(command) = next.take() {
                match command {
                    Command::Append(append) => together.push(*append),
                    Command::Extent(reply) => {
                        self.append(std::mem::take(&mut together));
                        let extent = self.extent().map_err(|error| self.failed(&error));
                        // Whoever asked may have gone.
                        drop(reply.send(extent));
                    }
                }
                if together.len() < MOST_TOGETHER {
                    next = commands.try_recv().ok();
                }
            }
            self.append(together);
        }
    }

    fn failed(&self, error: &io::Error) -> ghost_domain::Error {
        io_error("write the audit log in", &self.folder.0, error)
    }

    fn extent(&mut self) -> io::Result<Extent> {
        let open = self.opened()?;
        Ok(Extent {
            head: open.mark,
            active: open.active,
            length: open.length,
        })
    }

    fn opened(&mut self) -> io::Result<&mut Open> {
        if self.open.is_none() {
            self.reopen()?;
        }
        self.open
            .as_mut()
            .ok_or_else(|| io::Error::other("the audit log is not open"))
    }

    fn append(&mut self, together: Vec<Append>) {
        if together.is_empty() {
            return;
        }
        let (mut records, mut replies, mut waiting) = (Vec::new(), Vec::new(), Vec::new());
        for append in together {
            records.push(append.record);
            replies.push(append.synced);
            waiting.extend(append.written);
        }
        let written = || {
            for waiting in waiting {
                // Whoever asked may have gone.
                let _gone = waiting.send(()).is_err();
            }
        };
        match self.write(&records, written) {
            Ok(entries) => {
                for (entry, reply) in entries.into_iter().zip(replies) {
                    drop(reply.send(Ok(entry)));
                }
            }
            Err(error) => {
                tracing::error!(%error, "the audit log cannot be written");
                for reply in replies {
                    drop(reply.send(Err(self.failed(&error))));
                }
            }
        }
    }

    /// Writes entries, tells so, and syncs them.
    fn write(
        &mut self,
        records: &[AuditRecord],
        written: impl FnOnce(),
    ) -> io::Result<Vec<AuditEntry>> {
        self.rotate()?;
        let at = self.clock.now();
        let open = self.opened()?;
        let mut mark = open.mark;
        let mut bytes = Vec::new();
        let mut entries = Vec::with_capacity(records.len());
        for record in records {
            let (line, entry) = line::write(mark.sequence + 1, at, record, &mark.hash)?;
            bytes.extend_from_slice(&line);
            mark = Mark {
                sequence: entry.sequence,
                hash: entry.hash,
            };
            entries.push(entry);
        }
        let before = open.length;
        let outcome = open.file.write_all_at(&bytes, before).and_then(|()| {
            written();
            open.file.sync_data()
        });
        if let Err(error) = outcome {
            // What came of it is not known: nobody is told that it was logged, so it goes; and the
            // file is looked at anew before the next entry.
            let file = self.open.take();
            if let Some(open) = file
                && let Err(error) = open.file.set_len(before)
            {
                tracing::error!(%error, "entries that were refused stay in the audit log");
            }
            return Err(error);
        }
        open.length += bytes.len() as u64;
        open.mark = mark;
        if let Err(error) = open.head.note(mark) {
            tracing::warn!(%error, "the newest entry of the audit log could not be noted");
        }
        Ok(entries)
    }

    /// Begins a new file where the old one is full, and removes the oldest beyond the bound.
    fn rotate(&mut self) -> io::Result<()> {
        let (most, files) = (self.options.max_file_bytes, self.options.max_files.max(2));
        let open = self.opened()?;
        if open.length < most {
            return Ok(());
        }
        let next = open.mark.sequence + 1;
        let file = self.folder.open_segment(next)?;
        let length = file.metadata()?.len();
        let open = self.opened()?;
        open.file = file;
        open.active = next;
        open.length = length;
        let segments = self.folder.segments()?;
        let surplus = segments.len().saturating_sub(files);
        if surplus == 0 {
            return Ok(());
        }
        // Where the chain begins is durable before anything goes.
        let mut last = None;
        self.folder
            .read_lines(segments[surplus - 1], u64::MAX, |bytes, _| {
                last = line::read(bytes);
                true
            })?;
        if let Some(last) = last {
            self.folder.write_base(Mark {
                sequence: last.entry.sequence,
                hash: last.entry.hash,
            })?;
        }
        for first in &segments[..surplus] {
            std::fs::remove_file(self.folder.segment(*first))?;
        }
        Ok(())
    }

    /// Finds the end of the log, repairs a line that a power cut or a crash left unfinished, and
    /// says in the log itself what was found.
    fn reopen(&mut self) -> io::Result<()> {
        let segments = self.folder.segments()?;
        let active = segments.last().copied().unwrap_or(1);
        let mut file = self.folder.open_segment(active)?;
        let mut end = tail(&mut file)?;
        let noted = self.folder.head()?;
        let mut told = Vec::new();
        let mut mark = match end.last {
            Some(last) => last,
            // An empty file after a rotation.
            None if end.whole == 0 => match self.end_of(segments.iter().rev().nth(1).copied())? {
                Some(mark) => mark,
                None => Mark::START,
            },
            None => Mark::START,
        };
        let acknowledged = match noted {
            Note::Is(noted) => noted,
            Note::Missing | Note::Damaged => {
                if mark != Mark::START {
                    told.push("the note of the newest entry was missing or damaged".to_owned());
                }
                mark
            }
        };
        if end.length > end.whole {
            let torn = end.length - end.whole;
            if mark.sequence >= acknowledged.sequence {
                // Never acknowledged: nobody acted on it.
                file.set_len(end.whole)?;
                file.sync_data()?;
                end.length = end.whole;
                told.push(format!(
                    "{torn} bytes of an entry that was not completed were removed"
                ));
            } else {
                // It was complete once. It stays, as a line of its own, for the check to find.
                file.write_all_at(b"\n", end.length)?;
                end.length += 1;
            }
        }
        if mark.sequence < acknowledged.sequence {
            told.push(format!(
                "entries {} to {} were missing or damaged",
                mark.sequence + 1,
                acknowledged.sequence
            ));
            mark = acknowledged;
        }
        let head = self.folder.open_head(mark)?;
        self.open = Some(Open {
            file,
            active,
            length: end.length,
            mark,
            head,
        });
        if !told.is_empty() {
            let detail = told.join("; ");
            tracing::warn!(detail, "the audit log was not as it was left");
            let repaired = AuditRecord {
                principal: "ghost-agent".into(),
                action: "audit_opened".into(),
                detail,
                outcome: "repaired".into(),
                ..AuditRecord::default()
            };
            self.write(&[repaired], || {})?;
        }
        Ok(())
    }

    /// The last entry of a file, or of what was removed.
    fn end_of(&self, segment: Option<u64>) -> io::Result<Option<Mark>> {
        if let Some(first) = segment
            && length(&self.folder.segment(first))? > 0
        {
            return Ok(tail(&mut File::open(self.folder.segment(first))?)?.last);
        }
        Ok(match self.folder.base()? {
            Note::Is(mark) => Some(mark),
            Note::Missing | Note::Damaged => None,
        })
    }
}
