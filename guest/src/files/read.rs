//! Looking: contents, attributes, directories.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::hash::Hasher as _;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use bytes::Bytes;
use ghost_proto::guest::v1::agent_message::Payload;
use ghost_proto::guest::v1::{
    FileListRequest, FileListResponse, FileReadRequest, FileReadResponse, FileStatRequest,
    FileStatResponse, file_list_response, file_read_response,
};
use rustix::fs::{Dir, FileType, OFlags};
use rustix::io::Errno;
use twox_hash::XxHash64;

use super::{Place, attributes, attributes_at, name_of};
use crate::Failure;
use crate::calls::{Port, cancelled};

/// Entries of one answer: with names of 255 bytes and attributes it stays well below a frame.
const MOST_ENTRIES: usize = 1000;

/// Sends a file.
pub(crate) fn read(
    roots: &[PathBuf],
    request: &FileReadRequest,
    port: &mut Port,
) -> Result<Payload, Failure> {
    let said = |error: Errno| Failure::errno(&request.path, error);
    let place = Place::find(roots, &request.path)?;
    // Without NONBLOCK a named pipe would wait for its other end.
    let file = place
        .open(OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY)
        .map_err(said)?;
    let stat = rustix::fs::fstat(&file).map_err(said)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(Failure::new(
            "not_a_file",
            format!("{}: not a regular file", request.path),
        ));
    }
    port.send(Payload::FileReadResponse(FileReadResponse {
        event: Some(file_read_response::Event::Opened(attributes(
            &stat,
            String::new(),
        ))),
    }));
    // The kernel reads ahead twice as far.
    let _ = rustix::fs::fadvise(&file, request.offset, None, rustix::fs::Advice::Sequential);
    let mut hash = XxHash64::with_seed(0);
    let mut sent = 0u64;
    let mut offset = request.offset;
    loop {
        let left = if request.length == 0 {
            usize::MAX
        } else {
            usize::try_from(request.length - sent).unwrap_or(usize::MAX)
        };
        if left == 0 {
            break;
        }
        let room = port.room()?;
        let read = if let Some(mut envelope) = port.envelope(room) {
            let most = left.min(envelope.room());
            let read = read_some(&file, envelope.contents(), most, offset).map_err(said)?;
            hash.write(envelope.written());
            if read > 0 {
                port.send_envelope(envelope)?;
            }
            read
        } else {
            let mut buffer = Vec::new();
            let read = read_some(&file, &mut buffer, left.min(room), offset).map_err(said)?;
            hash.write(&buffer);
            if read > 0 {
                port.send_data(Bytes::from(buffer), false);
            }
            read
        };
        if read == 0 {
            break;
        }
        sent += read as u64;
        offset += read as u64;
    }
    port.send_data(Bytes::new(), true);
    Ok(Payload::FileReadResponse(FileReadResponse {
        event: Some(file_read_response::Event::Finished(
            file_read_response::Finished {
                size_bytes: sent,
                checksum: hash.finish().to_be_bytes().to_vec(),
            },
        )),
    }))
}

/// Appends what one read gives, at most so many bytes.
fn read_some(
    file: &OwnedFd,
    buffer: &mut Vec<u8>,
    most: usize,
    offset: u64,
) -> Result<usize, Errno> {
    buffer.reserve(most);
    loop {
        match rustix::io::pread(file, &mut buffer.spare_capacity_mut()[..most], offset) {
            Ok((read, _)) => {
                let read = read.len();
                // SAFETY: the kernel has filled so many bytes behind the buffer's end, within its
                // capacity.
                unsafe { buffer.set_len(buffer.len() + read) };
                return Ok(read);
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}

/// Tells of one file.
pub(crate) fn stat(roots: &[PathBuf], request: &FileStatRequest) -> Result<Payload, Failure> {
    let said = |error: Errno| Failure::errno(&request.path, error);
    let place = Place::find(roots, &request.path)?;
    let attributes = if request.follow || place.rest == std::path::Path::new(".") {
        let file = place.open(OFlags::PATH).map_err(said)?;
        attributes(&rustix::fs::fstat(&file).map_err(said)?, String::new())
    } else {
        let (above, name) = place.parent()?;
        let directory = place
            .open_at(&above, OFlags::PATH | OFlags::DIRECTORY)
            .map_err(said)?;
        attributes_at(&directory, name).map_err(said)?
    };
    Ok(Payload::FileStatResponse(FileStatResponse {
        attributes: Some(attributes),
    }))
}

/// A page of a directory. However large the directory is, no more than a page of it is held.
pub(crate) fn list(
    roots: &[PathBuf],
    request: &FileListRequest,
    port: &Port,
) -> Result<Payload, Failure> {
    let said = |error: Errno| Failure::errno(&request.path, error);
    let limit = match usize::try_from(request.limit).unwrap_or(MOST_ENTRIES) {
        0 => MOST_ENTRIES,
        some => some.min(MOST_ENTRIES),
    };
    let place = Place::find(roots, &request.path)?;
    let directory = place
        .open(OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NONBLOCK)
        .map_err(said)?;
    // What is shown sorts, so that `after` means the same on both sides, also where a name is no
    // UTF-8; the name itself is kept for looking at it.
    let mut page: BTreeSet<(String, Vec<u8>)> = BTreeSet::new();
    let mut more = false;
    for (at, entry) in Dir::read_from(&directory).map_err(said)?.enumerate() {
        if at % 1024 == 0 && port.is_cancelled() {
            return Err(cancelled());
        }
        let entry = entry.map_err(said)?;
        let name = entry.file_name().to_bytes();
        if name == b"." || name == b".." {
            continue;
        }
        let shown = name_of(OsStr::from_bytes(name));
        if shown.as_str() <= request.after.as_str() {
            continue;
        }
        page.insert((shown, name.to_vec()));
        if page.len() > limit {
            page.pop_last();
            more = true;
        }
    }
    let mut entries = Vec::with_capacity(page.len());
    let mut weight = 0;
    for (shown, name) in page {
        // Gone since it was listed.
        let Ok(attributes) = attributes_at(&directory, OsStr::from_bytes(&name)) else {
            continue;
        };
        weight += 64 + shown.len() + attributes.symlink_target.len();
        if weight > 512 * 1024 {
            // A thousand links with targets of 4 KiB each.
            more = true;
            break;
        }
        entries.push(file_list_response::Entry {
            name: shown,
            attributes: Some(attributes),
        });
    }
    Ok(Payload::FileListResponse(FileListResponse {
        entries,
        more,
    }))
}
