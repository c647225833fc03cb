//! Files of the guest, under the configured roots and nowhere else.
//!
//! Every path is resolved by the kernel with `openat2(2)` from a descriptor of its root, so that
//! nothing that is renamed or linked meanwhile leads out of it:
//!
//! - a root other than `/` is held with `RESOLVE_BENEATH`: relative symbolic links within it are
//!   followed, absolute ones and those that leave it are refused;
//! - the root `/` has no outside; it is held with `RESOLVE_IN_ROOT`, so that absolute links work;
//! - `RESOLVE_NO_MAGICLINKS` always: `/proc/self/root`, `/proc/self/cwd` and `/proc/self/fd/3` are
//!   doors, not links, and refused.

mod read;
mod write;

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use ghost_proto::guest::v1::{FileAttributes, FileKind};
use prost_types::Timestamp;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

use crate::Failure;

pub(crate) use read::{list, read, stat};
pub(crate) use write::{make_directory, make_link, write};

/// As the protocol bounds it; also the kernel's.
const MOST_PATH: usize = 4096;

/// Whether this kernel has `openat2(2)`, Linux 5.6.
pub(crate) fn is_supported() -> bool {
    !matches!(
        rustix::fs::openat2(
            rustix::fs::CWD,
            c"/",
            OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::NO_MAGICLINKS,
        ),
        Err(Errno::NOSYS)
    )
}

/// A path split into the root that holds it and the rest.
#[derive(Debug)]
struct Place<'a> {
    root: &'a Path,
    rest: PathBuf,
}

impl<'a> Place<'a> {
    fn find(roots: &'a [PathBuf], path: &str) -> Result<Self, Failure> {
        if !path.starts_with('/') || path.len() > MOST_PATH || path.contains('\0') {
            return Err(Failure::invalid(
                "a path is absolute, of at most 4096 bytes and without NUL bytes",
            ));
        }
        let path = Path::new(path);
        if path
            .components()
            .any(|part| matches!(part, Component::ParentDir))
        {
            return Err(Failure::new("outside_roots", "a path has no `..` in it"));
        }
        // The deepest root that holds it.
        roots
            .iter()
            .filter_map(|root| {
                let rest = path.strip_prefix(root).ok()?;
                Some((root.components().count(), root, rest))
            })
            .max_by_key(|(depth, ..)| *depth)
            .map(|(_, root, rest)| Self {
                root,
                rest: if rest.as_os_str().is_empty() {
                    PathBuf::from(".")
                } else {
                    rest.to_path_buf()
                },
            })
            .ok_or_else(|| {
                Failure::new(
                    "outside_roots",
                    format!("{} is under none of this guest's roots", path.display()),
                )
            })
    }

    fn open(&self, flags: OFlags) -> Result<OwnedFd, Errno> {
        self.open_at(&self.rest, flags)
    }

    fn open_at(&self, rest: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
        let root = rustix::fs::open(
            self.root,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let hold = if self.root == Path::new("/") {
            ResolveFlags::IN_ROOT
        } else {
            ResolveFlags::BENEATH
        };
        // EAGAIN: something was renamed while it looked, and it cannot be sure.
        for _ in 0..16 {
            match rustix::fs::openat2(
                &root,
                rest,
                flags | OFlags::CLOEXEC,
                Mode::empty(),
                hold | ResolveFlags::NO_MAGICLINKS,
            ) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                other => return other,
            }
        }
        Err(Errno::AGAIN)
    }

    /// The directory above, and the name in it.
    fn parent(&self) -> Result<(PathBuf, &OsStr), Failure> {
        let name = self
            .rest
            .file_name()
            .ok_or_else(|| Failure::invalid("a root itself cannot be replaced"))?;
        let above = self.rest.parent().unwrap_or(Path::new(""));
        let above = if above.as_os_str().is_empty() {
            Path::new(".")
        } else {
            above
        };
        Ok((above.to_path_buf(), name))
    }
}

fn attributes(stat: &Stat, target: String) -> FileAttributes {
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => FileKind::File,
        FileType::Directory => FileKind::Directory,
        FileType::Symlink => FileKind::Symlink,
        _ => FileKind::Other,
    };
    FileAttributes {
        kind: kind.into(),
        size_bytes: u64::try_from(stat.st_size).unwrap_or(0),
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        modified_at: Some(Timestamp {
            seconds: stat.st_mtime,
            nanos: i32::try_from(stat.st_mtime_nsec).unwrap_or(0),
        }),
        symlink_target: target,
    }
}

fn attributes_at(directory: impl AsFd, name: &OsStr) -> Result<FileAttributes, Errno> {
    let stat = rustix::fs::statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let target = if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink {
        rustix::fs::readlinkat(&directory, name, Vec::new())
            .map(|target| String::from_utf8_lossy(target.as_bytes()).into_owned())
            .unwrap_or_default()
    } else {
        String::new()
    };
    Ok(attributes(&stat, target))
}

fn name_of(name: &OsStr) -> String {
    String::from_utf8_lossy(name.as_bytes()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_belong_to_the_deepest_root() {
        let roots = [PathBuf::from("/srv"), PathBuf::from("/srv/data/in")];
        let place = Place::find(&roots, "/srv/data/in/x/y").unwrap();
        assert_eq!(
            (place.root, place.rest),
            (Path::new("/srv/data/in"), "x/y".into())
        );
        let place = Place::find(&roots, "/srv//data/./a").unwrap();
        assert_eq!(
            (place.root, place.rest),
            (Path::new("/srv"), "data/a".into())
        );
        assert_eq!(Place::find(&roots, "/srv").unwrap().rest, Path::new("."));
        for (path, code) in [
            ("/etc/passwd", "outside_roots"),
            ("/srvx", "outside_roots"),
            ("/srv/../etc", "outside_roots"),
            ("srv", "invalid_argument"),
            ("", "invalid_argument"),
            ("/srv/a\0b", "invalid_argument"),
        ] {
            assert_eq!(Place::find(&roots, path).unwrap_err().code, code, "{path}");
        }
    }
}
