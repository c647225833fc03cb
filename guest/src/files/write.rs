//! Writing: to a temporary name beside the target, which takes its place once all of it has come
//! and is on the disk.
//!
//! The temporary name follows from path, size and checksum, so that another try finds what an
//! earlier one has left. Leftovers of more than a day are removed whenever something is written
//! beside them. A symbolic link at the target's place is replaced, not followed.

use std::hash::Hasher as _;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, SystemTime};

use ghost_proto::guest::v1::agent_message::Payload;
use ghost_proto::guest::v1::{
    FileAttributes, FileWriteRequest, FileWriteResponse, MakeDirectoryRequest, MakeLinkRequest,
    file_write_response,
};
use rustix::fs::{
    AtFlags, Dir, FileType, FlockOperation, Gid, Mode, OFlags, Timespec, Timestamps, Uid,
};
use rustix::io::Errno;
use twox_hash::{XxHash3_128, XxHash64};

use super::{MOST_PATH, Place};
use crate::Failure;
use crate::calls::{Port, done};
use crate::util::random;

const PREFIX: &str = ".ghost-";
const SUFFIX: &str = ".part";
/// Leftovers older than this are nobody's any more.
const STALE: Duration = Duration::from_secs(24 * 3600);
/// Written back while more comes, so that the sync at the end has little left to do.
const WRITE_BACK: u64 = 8 * 1024 * 1024;

/// Takes a file.
pub(crate) fn write(
    roots: &[PathBuf],
    request: FileWriteRequest,
    port: &mut Port,
) -> Result<Payload, Failure> {
    let attributes = request.attributes.clone().unwrap_or_default();
    let checksum: Option<[u8; 8]> = match request.checksum.len() {
        0 => None,
        8 => request.checksum.as_slice().try_into().ok(),
        _ => return Err(Failure::invalid("a checksum has 8 bytes")),
    };
    if request.resume && checksum.is_none() {
        return Err(Failure::invalid("going on needs the checksum of the whole"));
    }
    let target = Target::open(
        roots,
        &request.path,
        request.make_parents,
        request.no_replace,
    )?;
    let mut part = Part::open(&target, &request, &attributes, checksum)?;
    port.send(Payload::FileWriteResponse(FileWriteResponse {
        event: Some(file_write_response::Event::Accepted(
            file_write_response::Accepted { offset: part.size },
        )),
    }));
    let outcome = part
        .fill(port, checksum.map(|_| attributes.size_bytes))
        .and_then(|()| part.check(&attributes, checksum))
        .and_then(|sum| {
            part.finish(&target, &request, &attributes)
                .map(|replaced| (sum, replaced))
        });
    match outcome {
        Ok((sum, replaced)) => {
            port.close_later(replaced);
            Ok(Payload::FileWriteResponse(FileWriteResponse {
                event: Some(file_write_response::Event::Written(
                    file_write_response::Written {
                        size_bytes: part.size,
                        checksum: sum.to_vec(),
                    },
                )),
            }))
        }
        Err(failure) => {
            // What a break has left is gone on with; what is wrong or cannot be found again is not.
            if checksum.is_none() || failure.code == "checksum_mismatch" {
                part.remove(&target);
            }
            Err(failure)
        }
    }
}

struct Target {
    directory: OwnedFd,
    name: std::ffi::OsString,
    path: String,
}

impl Target {
    fn open(
        roots: &[PathBuf],
        path: &str,
        parents: bool,
        no_replace: bool,
    ) -> Result<Self, Failure> {
        let place = Place::find(roots, path)?;
        let (above, name) = place.parent()?;
        // The name itself goes to calls that take names in a directory; the temporary one is as long
        // as it needs to be.
        if name.len() > 255 {
            return Err(Failure::invalid("a name has at most 255 bytes"));
        }
        if parents {
            make_parents(&place, &above, 0o755)?;
        }
        let directory = place
            .open_at(&above, OFlags::RDONLY | OFlags::DIRECTORY)
            .map_err(|error| Failure::errno(path, error))?;
        let target = Self {
            directory,
            name: name.to_owned(),
            path: path.to_owned(),
        };
        target.may_be_replaced(no_replace)?;
        Ok(target)
    }

    fn may_be_replaced(&self, no_replace: bool) -> Result<(), Failure> {
        match rustix::fs::statat(&self.directory, &*self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(self.said(error)),
            Ok(_) if no_replace => Err(Failure::new(
                "exists",
                format!("{}: it is there already", self.path),
            )),
            Ok(stat) => match FileType::from_raw_mode(stat.st_mode) {
                FileType::RegularFile | FileType::Symlink => Ok(()),
                _ => Err(Failure::new(
                    "not_a_file",
                    format!("{}: a directory or device is there", self.path),
                )),
            },
        }
    }

    fn said(&self, error: Errno) -> Failure {
        Failure::errno(&self.path, error)
    }
}

struct Part {
    file: OwnedFd,
    name: String,
    size: u64,
    hash: XxHash64,
}

impl Part {
    fn open(
        target: &Target,
        request: &FileWriteRequest,
        attributes: &FileAttributes,
        checksum: Option<[u8; 8]>,
    ) -> Result<Self, Failure> {
        sweep(&target.directory);
        let name = match checksum {
            Some(sum) => part_name(&request.path, attributes.size_bytes, sum),
            None => chance_name(target)?,
        };
        let file = rustix::fs::openat(
            &target.directory,
            name.as_str(),
            OFlags::RDWR
                | OFlags::CREATE
                | OFlags::NOFOLLOW
                | OFlags::NONBLOCK
                | OFlags::CLOEXEC
                // A name by chance has nothing to go on with.
                | if checksum.is_none() { OFlags::EXCL } else { OFlags::empty() },
            Mode::from_raw_mode(0o600),
        )
        .map_err(|error| target.said(error))?;
        // Two at once would write into each other. The lock goes with the descriptor.
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
            Failure::new(
                "busy",
                format!("{}: it is being written already", target.path),
            )
        })?;
        let stat = rustix::fs::fstat(&file).map_err(|error| target.said(error))?;
        let own = rustix::process::geteuid().as_raw();
        // In a directory of somebody else's, the name may have been put there for us.
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile
            || stat.st_nlink != 1
            || stat.st_uid != own
        {
            return Err(Failure::new(
                "permission_denied",
                format!("{}: its temporary name {name} is taken", target.path),
            ));
        }
        let mut part = Self {
            file,
            name,
            size: 0,
            hash: XxHash64::with_seed(0),
        };
        let there = u64::try_from(stat.st_size).unwrap_or(0);
        if request.resume && there <= attributes.size_bytes {
            part.take_up().map_err(|error| target.said(error))?;
        } else if there > 0 {
            rustix::fs::ftruncate(&part.file, 0).map_err(|error| target.said(error))?;
        }
        Ok(part)
    }

    /// Reads what an earlier try has left, for the checksum.
    fn take_up(&mut self) -> Result<(), Errno> {
        let mut buffer = vec![0; 128 * 1024];
        loop {
            match rustix::io::pread(&self.file, &mut buffer[..], self.size) {
                Ok(0) => return Ok(()),
                Ok(read) => {
                    self.hash.write(&buffer[..read]);
                    self.size += read as u64;
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn fill(&mut self, port: &mut Port, most: Option<u64>) -> Result<(), Failure> {
        let mut written_back = self.size;
        while let Some(data) = port.receive()? {
            if most.is_some_and(|most| self.size + data.len() as u64 > most) {
                return Err(Failure::invalid("more data than was announced"));
            }
            let mut rest = &data[..];
            while !rest.is_empty() {
                match rustix::io::pwrite(&self.file, rest, self.size) {
                    Ok(written) => {
                        let (now, later) = rest.split_at(written.min(rest.len()));
                        self.hash.write(now);
                        self.size += now.len() as u64;
                        rest = later;
                    }
                    Err(Errno::INTR) => {}
                    Err(error) => return Err(Failure::errno("write", error)),
                }
            }
            if self.size - written_back >= WRITE_BACK {
                start_write_back(&self.file, written_back, self.size - written_back);
                written_back = self.size;
            }
            port.consumed(data.len() as u64);
        }
        Ok(())
    }

    fn check(
        &mut self,
        attributes: &FileAttributes,
        checksum: Option<[u8; 8]>,
    ) -> Result<[u8; 8], Failure> {
        let sum = self.hash.finish().to_be_bytes();
        if let Some(wanted) = checksum
            && (wanted != sum || self.size != attributes.size_bytes)
        {
            return Err(Failure::new(
                "checksum_mismatch",
                format!(
                    "{} bytes with checksum {} have come, not {} with {}",
                    self.size,
                    hex::encode(sum),
                    attributes.size_bytes,
                    hex::encode(wanted)
                ),
            ));
        }
        Ok(sum)
    }

    /// Gives it its name. What had the name before comes back, still held: with its last descriptor the
    /// kernel frees its blocks, which need not happen before the answer.
    fn finish(
        &self,
        target: &Target,
        request: &FileWriteRequest,
        attributes: &FileAttributes,
    ) -> Result<Option<OwnedFd>, Failure> {
        let said = |error: Errno| target.said(error);
        if request.keep_owner {
            rustix::fs::fchown(
                &self.file,
                Some(owner(attributes.uid)?),
                Some(group(attributes.gid)?),
            )
            .map_err(said)?;
        }
        // After the owner: that takes the set-uid bits off.
        let mode = if attributes.mode == 0 {
            0o644
        } else {
            attributes.mode & 0o7777
        };
        rustix::fs::fchmod(&self.file, Mode::from_raw_mode(mode)).map_err(said)?;
        if let Some(at) = &attributes.modified_at {
            rustix::fs::futimens(&self.file, &times(at)).map_err(said)?;
        }
        rustix::fs::fsync(&self.file).map_err(said)?;
        target.may_be_replaced(request.no_replace)?;
        let flags = if request.no_replace {
            rustix::fs::RenameFlags::NOREPLACE
        } else {
            rustix::fs::RenameFlags::empty()
        };
        let replaced = rustix::fs::openat(
            &target.directory,
            &*target.name,
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .ok();
        rustix::fs::renameat_with(
            &target.directory,
            self.name.as_str(),
            &target.directory,
            &*target.name,
            flags,
        )
        .map_err(said)?;
        // Without it the name may be lost in a power cut, after "written" was said.
        rustix::fs::fsync(&target.directory).map_err(said)?;
        Ok(replaced)
    }

    fn remove(&self, target: &Target) {
        let _ = rustix::fs::unlinkat(&target.directory, self.name.as_str(), AtFlags::empty());
    }
}

fn times(at: &prost_types::Timestamp) -> Timestamps {
    let time = Timespec {
        tv_sec: at.seconds,
        tv_nsec: i64::from(at.nanos.clamp(0, 999_999_999)),
    };
    Timestamps {
        last_access: time,
        last_modification: time,
    }
}

fn owner(uid: u32) -> Result<Uid, Failure> {
    // 2^32-1 means "leave it" to the kernel.
    if uid == u32::MAX {
        return Err(Failure::invalid("no such owner"));
    }
    Ok(Uid::from_raw(uid))
}

fn group(gid: u32) -> Result<Gid, Failure> {
    if gid == u32::MAX {
        return Err(Failure::invalid("no such group"));
    }
    Ok(Gid::from_raw(gid))
}

fn part_name(path: &str, size: u64, checksum: [u8; 8]) -> String {
    let mut hash = XxHash3_128::new();
    hash.write(path.as_bytes());
    hash.write(&size.to_be_bytes());
    hash.write(&checksum);
    format!("{PREFIX}{:032x}{SUFFIX}", hash.finish_128())
}

/// A temporary name that nobody can foresee.
fn chance_name(target: &Target) -> Result<String, Failure> {
    let salt = random::<16>().map_err(|error| Failure::io(&target.path, &error))?;
    Ok(format!("{PREFIX}{}{SUFFIX}", hex::encode(salt)))
}

fn start_write_back(file: impl AsFd, offset: u64, length: u64) {
    use std::os::fd::AsRawFd;
    let (Ok(offset), Ok(length)) = (i64::try_from(offset), i64::try_from(length)) else {
        return;
    };
    // SAFETY: a descriptor that is open and plain numbers; it is a hint, and its failure changes
    // nothing.
    unsafe {
        libc::sync_file_range(
            file.as_fd().as_raw_fd(),
            offset,
            length,
            libc::SYNC_FILE_RANGE_WRITE,
        );
    }
}

/// Removes what earlier tries have left for good.
fn sweep(directory: &OwnedFd) {
    let Ok(entries) = Dir::read_from(directory) else {
        return;
    };
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    // A directory with a hundred thousand files is not looked through for every one of them.
    for entry in entries.flatten().take(10_000) {
        let name = entry.file_name();
        let Ok(text) = name.to_str() else { continue };
        let ours = text
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.strip_suffix(SUFFIX))
            .is_some_and(|middle| {
                middle.len() == 32 && middle.bytes().all(|byte| byte.is_ascii_hexdigit())
            });
        if !ours {
            continue;
        }
        let Ok(stat) = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) else {
            continue;
        };
        let age = now.saturating_sub(u64::try_from(stat.st_mtime).unwrap_or(0));
        let kind = FileType::from_raw_mode(stat.st_mode);
        let may_go = matches!(kind, FileType::RegularFile | FileType::Symlink);
        if age > STALE.as_secs() && may_go {
            let _ = rustix::fs::unlinkat(directory, name, AtFlags::empty());
        }
    }
}

/// Makes the directories of a path that are missing, one at a time and each within the root.
fn make_parents(place: &Place<'_>, path: &Path, mode: u32) -> Result<(), Failure> {
    let said = |error: Errno| Failure::errno(path.display(), error);
    let mut so_far = PathBuf::from(".");
    let mut above = place
        .open_at(&so_far, OFlags::PATH | OFlags::DIRECTORY)
        .map_err(said)?;
    for part in path.components() {
        let Component::Normal(name) = part else {
            continue;
        };
        match rustix::fs::mkdirat(&above, name, Mode::from_raw_mode(mode)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(said(error)),
        }
        so_far.push(name);
        above = place
            .open_at(&so_far, OFlags::PATH | OFlags::DIRECTORY)
            .map_err(said)?;
    }
    Ok(())
}

/// Makes a directory.
pub(crate) fn make_directory(
    roots: &[PathBuf],
    request: &MakeDirectoryRequest,
) -> Result<Payload, Failure> {
    let said = |error: Errno| Failure::errno(&request.path, error);
    let place = Place::find(roots, &request.path)?;
    let (above, name) = place.parent()?;
    if request.make_parents {
        make_parents(&place, &above, 0o755)?;
    }
    let directory = place
        .open_at(&above, OFlags::RDONLY | OFlags::DIRECTORY)
        .map_err(said)?;
    let mode = if request.mode == 0 {
        0o755
    } else {
        request.mode & 0o7777
    };
    match rustix::fs::mkdirat(&directory, name, Mode::from_raw_mode(0o700)) {
        Ok(()) => {}
        // As `mkdir -p`: there already is as good, and it is left as it is.
        Err(Errno::EXIST) if request.make_parents => {
            let there = place.open(OFlags::PATH).map_err(said)?;
            let stat = rustix::fs::fstat(&there).map_err(said)?;
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                return Ok(done());
            }
            return Err(said(Errno::NOTDIR));
        }
        Err(error) => return Err(said(error)),
    }
    let made = rustix::fs::openat(
        &directory,
        name,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(said)?;
    if request.keep_owner {
        rustix::fs::fchown(&made, Some(owner(request.uid)?), Some(group(request.gid)?))
            .map_err(said)?;
    }
    rustix::fs::fchmod(&made, Mode::from_raw_mode(mode)).map_err(said)?;
    Ok(done())
}

/// Makes a symbolic link, in the place of a file or link.
///
/// What it leads to is kept as it was given, and nothing here follows it: it is made under another
/// name and renamed, and it may say what it likes, since every path that is asked for is held by
/// its root (see the module above).
pub(crate) fn make_link(roots: &[PathBuf], request: &MakeLinkRequest) -> Result<Payload, Failure> {
    let says = &request.target;
    if says.is_empty() || says.len() >= MOST_PATH || says.contains('\0') {
        return Err(Failure::invalid(
            "a link says 1 to 4095 bytes without NUL bytes",
        ));
    }
    let target = Target::open(roots, &request.path, false, false)?;
    sweep(&target.directory);
    let name = chance_name(&target)?;
    let said = |error: Errno| target.said(error);
    rustix::fs::symlinkat(says.as_str(), &target.directory, name.as_str()).map_err(said)?;
    let placed = (|| {
        if request.keep_owner {
            rustix::fs::chownat(
                &target.directory,
                name.as_str(),
                Some(owner(request.uid)?),
                Some(group(request.gid)?),
                AtFlags::SYMLINK_NOFOLLOW,
            )
            .map_err(said)?;
        }
        if let Some(at) = &request.modified_at {
            rustix::fs::utimensat(
                &target.directory,
                name.as_str(),
                &times(at),
                AtFlags::SYMLINK_NOFOLLOW,
            )
            .map_err(said)?;
        }
        target.may_be_replaced(false)?;
        rustix::fs::renameat(
            &target.directory,
            name.as_str(),
            &target.directory,
            &*target.name,
        )
        .map_err(said)
    })();
    if let Err(failure) = placed {
        let _ = rustix::fs::unlinkat(&target.directory, name.as_str(), AtFlags::empty());
        return Err(failure);
    }
    rustix::fs::fsync(&target.directory).map_err(said)?;
    Ok(done())
}
