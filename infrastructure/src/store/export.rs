//! Exports: the records in one file that needs no engine to be read, beside the store.
//!
//! ```text
//! magic "GhstExp1" · body length (u64, big-endian) · body (CBOR) · CRC32C of all before (u32)
//! ```

use std::fs;
use std::path::{Path, PathBuf};

use ghost_domain::Timestamp;
use serde::{Deserialize, Serialize};

use super::fault::Fault;
use super::files;
use super::key::Key;
use super::records::Records;
use super::rows::{self, Bytes};
use super::sidecar::Mark;

const MAGIC: &[u8; 8] = b"GhstExp1";
const PREFIX: &str = "export-";
const SUFFIX: &str = ".cbor";
const HEADER: usize = 16;
const TRAILER: usize = 4;

/// How many exports are kept.
pub(super) const KEPT: usize = 3;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ExportRow {
    store: Bytes,
    sequence: u64,
    created_at: i64,
    digest: u64,
    records: Vec<(Bytes, Bytes)>,
}

/// An export that was read and verified.
#[derive(Clone, Debug)]
pub(super) struct Export {
    pub(super) mark: Mark,
    pub(super) created_at: Timestamp,
    pub(super) records: Records,
}

/// An export's file, not yet read.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ExportFile {
    /// The batch it was made after.
    pub(super) sequence: u64,
    pub(super) path: PathBuf,
}

/// The exports in `directory`, newest first. A directory that is not there has none.
pub(super) fn list(directory: &Path) -> std::io::Result<Vec<ExportFile>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut exports = Vec::new();
    for entry in entries {
        let entry = entry?;
        let sequence = entry.file_name().to_str().and_then(|name| {
            name.strip_prefix(PREFIX)?
                .strip_suffix(SUFFIX)?
                .parse::<u64>()
                .ok()
        });
        if let Some(sequence) = sequence {
            exports.push(ExportFile {
                sequence,
                path: entry.path(),
            });
        }
    }
    exports.sort_unstable_by(|one, other| other.cmp(one));
    Ok(exports)
}

/// Writes an export and removes all but the newest [`KEPT`].
///
/// # Errors
/// What the file system says; the exports that were there are then all still there.
pub(super) fn write(
    directory: &Path,
    store: [u8; 16],
    sequence: u64,
    records: &Records,
    now: Timestamp,
) -> Result<(), Fault> {
    let path = directory.join(format!("{PREFIX}{sequence:020}{SUFFIX}"));
    if path.exists() {
        // Nothing was committed since: the file would be the same.
        return Ok(());
    }
    let row = ExportRow {
        store: Bytes(store.to_vec()),
        sequence,
        created_at: now.unix_millis(),
        digest: records.digest(),
        records: records
            .iter()
            .map(|(key, value)| (Bytes(key.as_bytes().to_vec()), Bytes(value.to_vec())))
            .collect(),
    };
    let body = rows::to_cbor(&row).map_err(|error| Fault::Io(error.to_string()))?;
    let mut bytes = Vec::with_capacity(HEADER + body.len() + TRAILER);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&(body.len() as u64).to_be_bytes());
    bytes.extend_from_slice(&body);
    let crc = crc32c::crc32c(&bytes);
    bytes.extend_from_slice(&crc.to_be_bytes());
    files::write_whole(&path, &bytes)?;
    for old in list(directory)?.into_iter().skip(KEPT) {
        files::remove(&old.path)?;
    }
    Ok(())
}

/// Reads and verifies an export.
///
/// # Errors
/// [`Fault::Damaged`] where a byte is wrong, [`Fault::Newer`] where another version wrote it.
pub(super) fn read(path: &Path) -> Result<Export, Fault> {
    let damaged = |what: &str| Fault::Damaged(what.to_owned());
    let bytes = fs::read(path)?;
    let Some((whole, crc)) = bytes.split_last_chunk::<TRAILER>() else {
        return Err(damaged("too short"));
    };
    if crc32c::crc32c(whole) != u32::from_be_bytes(*crc) {
        return Err(damaged("checksum mismatch"));
    }
    let Some((header, body)) = whole.split_first_chunk::<HEADER>() else {
        return Err(damaged("too short"));
    };
    let (magic, length) = header.split_at(MAGIC.len());
    if magic != MAGIC {
        return Err(Fault::Newer("another kind of export".into()));
    }
    if length != (body.len() as u64).to_be_bytes() {
        return Err(damaged("wrong length"));
    }
    let row: ExportRow = rows::read_cbor(body).map_err(Fault::Newer)?;
    let store = <[u8; 16]>::try_from(row.store.0)
        .map_err(|_| Fault::Newer("an identity of another length".into()))?;
    let mut records = Records::default();
    for (key, value) in row.records {
        records.take_in(Key::from_bytes(&key.0), &value.0, row.sequence)?;
    }
    if records.digest() != row.digest {
        return Err(damaged("its records are not those that were exported"));
    }
    records.decode()?;
    Ok(Export {
        mark: Mark {
            store,
            sequence: row.sequence,
            count: records.count(),
            digest: records.digest(),
        },
        created_at: Timestamp::from_unix_millis(row.created_at),
        records,
    })
}
