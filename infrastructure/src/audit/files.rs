//! The log's files: `audit-<first sequence>.jsonl`, the note of the newest entry in `head`, and
//! where the chain begins, once old files were removed, in `base`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::line::{self, GENESIS, MOST_LINE};
use crate::images::files::{create_new, no_follow, open_plain, sync_folder, write_whole};

/// An entry, by its number and its hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    pub(super) sequence: u64,
    pub(super) hash: [u8; 32],
}

impl Mark {
    /// Before the first entry.
    pub(super) const START: Self = Self {
        sequence: 0,
        hash: GENESIS,
    };
    const BYTES: usize = 44;

    fn encode(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.sequence.to_be_bytes());
        bytes[8..40].copy_from_slice(&self.hash);
        let sum = crc32c::crc32c(&bytes[..40]);
        bytes[40..].copy_from_slice(&sum.to_be_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; Self::BYTES] = bytes.try_into().ok()?;
        let sum = crc32c::crc32c(&bytes[..40]).to_be_bytes();
        if bytes[40..] != sum {
            return None;
        }
        Some(Self {
            sequence: u64::from_be_bytes(bytes[..8].try_into().ok()?),
            hash: bytes[8..40].try_into().ok()?,
        })
    }
}

/// What a small file that holds a mark says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Note {
    Missing,
    Damaged,
    Is(Mark),
}

#[derive(Clone, Debug)]
pub(super) struct Folder(pub(super) PathBuf);

impl Folder {
    pub(super) fn make(&self) -> io::Result<()> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.0)
    }

    pub(super) fn segment(&self, first: u64) -> PathBuf {
        self.0.join(format!("audit-{first:020}.jsonl"))
    }

    /// The numbers of the files' first entries, in order.
    pub(super) fn segments(&self) -> io::Result<Vec<u64>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.0)? {
            let name = entry?.file_name();
            let first: Option<u64> = name.to_str().and_then(|name| {
                name.strip_prefix("audit-")?
                    .strip_suffix(".jsonl")?
                    .parse()
                    .ok()
            });
            found.extend(first);
        }
        found.sort_unstable();
        Ok(found)
    }

    fn note(&self, name: &str) -> io::Result<Note> {
        let mut bytes = Vec::new();
        match open_plain(&self.0.join(name)) {
            Ok(file) => file.take(4096).read_to_end(&mut bytes)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Note::Missing),
            Err(error) => return Err(error),
        };
        Ok(Mark::decode(&bytes).map_or(Note::Damaged, Note::Is))
    }

    pub(super) fn head(&self) -> io::Result<Note> {
        self.note("head")
    }

    pub(super) fn base(&self) -> io::Result<Note> {
        self.note("base")
    }

    pub(super) fn write_base(&self, mark: Mark) -> io::Result<()> {
        write_whole(&self.0.join("base"), &mark.encode(), 0o600)
    }

    /// The file of the newest entry's mark, of which only the content is changed later.
    pub(super) fn open_head(&self, mark: Mark) -> io::Result<Head> {
        let path = self.0.join("head");
        write_whole(&path, &mark.encode(), 0o600)?;
        let file = OpenOptions::new()
            .write(true)
            .custom_flags(no_follow())
            .open(&path)?;
        Ok(Head(file))
    }

    /// Opens a file of the log to append to it, making it where it is missing.
    pub(super) fn open_segment(&self, first: u64) -> io::Result<File> {
        let path = self.segment(first);
        match create_new(&path) {
            Ok(file) => {
                sync_folder(&self.0)?;
                Ok(file)
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(no_follow())
                .open(&path),
            Err(error) => Err(error),
        }
    }

    /// Gives every line of a file to `take`, at most `length` bytes of it, until it says stop.
    pub(super) fn read_lines(
        &self,
        first: u64,
        length: u64,
        mut take: impl FnMut(&[u8], bool) -> bool,
    ) -> io::Result<()> {
        let mut reader =
            BufReader::with_capacity(64 * 1024, open_plain(&self.segment(first))?).take(length);
        let mut bytes = Vec::new();
        loop {
            bytes.clear();
            let count = (&mut reader)
                .take(MOST_LINE as u64)
                .read_until(b'\n', &mut bytes)?;
            if count == 0 {
                return Ok(());
            }
            let whole = bytes.last() == Some(&b'\n');
            if whole {
                bytes.pop();
            }
            if !take(&bytes, whole) {
                return Ok(());
            }
        }
    }
}

#[derive(Debug)]
pub(super) struct Head(File);

impl Head {
    /// Not synced: a mark that is behind after a power cut says less, and nothing wrong.
    pub(super) fn note(&self, mark: Mark) -> io::Result<()> {
        self.0.write_all_at(&mark.encode(), 0)
    }
}

/// How a file of the log ends.
#[derive(Debug)]
pub(super) struct Tail {
    /// The last whole line, where it is one.
    pub(super) last: Option<Mark>,
    /// Where the last whole line ends.
    pub(super) whole: u64,
    /// Where the file ends.
    pub(super) length: u64,
}

pub(super) fn tail(file: &mut File) -> io::Result<Tail> {
    let length = file.seek(SeekFrom::End(0))?;
    let from = length.saturating_sub(2 * MOST_LINE as u64);
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    file.take(2 * MOST_LINE as u64).read_to_end(&mut bytes)?;
    let whole = bytes
        .iter()
        .rposition(|byte| *byte == b'\n')
        .map_or(0, |at| at + 1);
    let begin = bytes[..whole.saturating_sub(1)]
        .iter()
        .rposition(|byte| *byte == b'\n')
        .map_or(0, |at| at + 1);
    let last = (whole > 0)
        .then(|| line::read(&bytes[begin..whole - 1]))
        .flatten()
        .map(|read| Mark {
            sequence: read.entry.sequence,
            hash: read.entry.hash,
        });
    Ok(Tail {
        last,
        whole: from + whole as u64,
        length,
    })
}

/// Whether something of the kind is there.
pub(super) fn length(path: &Path) -> io::Result<u64> {
    fs::metadata(path).map(|metadata| metadata.len())
}
