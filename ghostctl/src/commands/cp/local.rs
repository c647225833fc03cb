//! The local side of a copy out of a guest: nothing that a guest says leads out of the destination.
//!
//! Below the destination every directory is opened by its name in the one above, and no symbolic
//! link is followed, neither one that was there before nor one that appears meanwhile.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, FlockOperation, Gid, Mode, OFlags, Timespec, Timestamps, Uid};
use twox_hash::XxHash3_128;

use crate::errors::{ErrorCode, Failure};

/// What a file or directory was in the guest.
#[derive(Clone, Debug, Default)]
pub(super) struct Attributes {
    pub(super) size: u64,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) modified: Option<(i64, i32)>,
}

impl Attributes {
    /// Gives a file or directory what can be given of it. A guest's set-user-id and set-group-id
    /// bits stay out: with its owner they would make its programs ours.
    pub(super) fn apply(&self, file: &File, keep_owner: bool) -> io::Result<()> {
        if keep_owner && rustix::process::geteuid().is_root() {
            std::os::unix::fs::fchown(file, Some(self.uid), Some(self.gid))?;
        }
        file.set_permissions(std::fs::Permissions::from_mode(self.mode & 0o777))?;
        if let Some(modified) = self.modified.and_then(time) {
            file.set_modified(modified)?;
        }
        Ok(())
    }

    /// The same for a symbolic link, which has no mode.
    fn apply_to_link(&self, parent: &OwnedFd, name: &str, keep_owner: bool) -> io::Result<()> {
        if keep_owner && rustix::process::geteuid().is_root() {
            let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
            rustix::fs::chownat(
                parent,
                name,
                Some(uid),
                Some(gid),
                AtFlags::SYMLINK_NOFOLLOW,
            )?;
        }
        let known = self.modified.filter(|modified| time(*modified).is_some());
        if let Some((seconds, nanos)) = known {
            let time = Timespec {
                tv_sec: seconds,
                tv_nsec: nanos.into(),
            };
            let times = Timestamps {
                last_access: time,
                last_modification: time,
            };
            rustix::fs::utimensat(parent, name, &times, AtFlags::SYMLINK_NOFOLLOW)?;
        }
        Ok(())
    }
}

/// A time of a guest; `None` for one that no file can have.
fn time((seconds, nanos): (i64, i32)) -> Option<SystemTime> {
    let after = Duration::new(u64::try_from(seconds).ok()?, u32::try_from(nanos).ok()?);
    // ext4 ends in 2446; what lies beyond is nonsense.
    (after < Duration::from_secs(15_000_000_000))
        .then(|| SystemTime::UNIX_EPOCH.checked_add(after))
        .flatten()
}

/// The directory that everything is written below.
pub(super) struct Base {
    fd: OwnedFd,
}

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::CLOEXEC);

impl Base {
    /// The destination as the person named it, links and all.
    pub(super) fn open(path: &Path) -> Result<Self, Failure> {
        rustix::fs::open(path, DIRECTORY, Mode::empty())
            .map(|fd| Self { fd })
            .map_err(|error| {
                Failure::usage(format!("{} cannot be opened", path.display()))
                    .because(io::Error::from(error))
            })
    }

    /// A directory below, one name at a time.
    fn directory(&self, names: &[String]) -> io::Result<OwnedFd> {
        let mut fd = rustix::io::fcntl_dupfd_cloexec(&self.fd, 0)?;
        for name in names {
            fd = rustix::fs::openat(&fd, name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty())
                .map_err(|error| not_followed(error, name))?;
        }
        Ok(fd)
    }

    /// Makes a directory that only its owner can enter until it is done; says whether it is new.
    pub(super) fn make_directory(&self, names: &[String]) -> io::Result<bool> {
        let Some((name, above)) = names.split_last() else {
            return Ok(false);
        };
        let parent = self.directory(above)?;
        let made = match rustix::fs::mkdirat(&parent, name, Mode::RWXU) {
            Ok(()) => true,
            Err(rustix::io::Errno::EXIST) => false,
            Err(error) => return Err(error.into()),
        };
        rustix::fs::openat(&parent, name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty())
            .map_err(|error| not_followed(error, name))?;
        Ok(made)
    }

    /// Gives a directory its mode, owner and time, once all that belongs in it is there.
    pub(super) fn finish_directory(
        &self,
        names: &[String],
        attributes: &Attributes,
        keep_owner: bool,
    ) -> io::Result<()> {
        let directory = File::from(self.directory(names)?);
        attributes.apply(&directory, keep_owner)
    }

    /// Makes a symbolic link, in the place of a file or link that is there. What it says is not
    /// looked at; it appears under its name by a rename, so that a directory is never replaced.
    pub(super) fn make_link(
        &self,
        names: &[String],
        says: &str,
        attributes: &Attributes,
        keep_owner: bool,
    ) -> io::Result<()> {
        let (name, above) = names
            .split_last()
            .ok_or_else(|| io::Error::other("the destination has no name"))?;
        let parent = self.directory(above)?;
        // Others who may write here cannot know it, and where they do, it is there already and fails.
        let part = format!(".ghost-{}.part", uuid::Uuid::new_v4().simple());
        rustix::fs::symlinkat(says, &parent, &part)?;
        let placed = attributes
            .apply_to_link(&parent, &part, keep_owner)
            .and_then(|()| Ok(rustix::fs::renameat(&parent, &part, &parent, name)?));
        if placed.is_err() {
            let _ = rustix::fs::unlinkat(&parent, &part, AtFlags::empty());
        }
        placed
    }

    /// Opens what an earlier try for the same file has left, or begins anew. `identity` tells
    /// apart what must not be mixed: another VM, path, size or time is another file.
    pub(super) fn partial(&self, names: &[String], identity: &str) -> Result<Partial, Failure> {
        let (name, above) = names
            .split_last()
            .ok_or_else(|| Failure::usage("the destination has no name"))?;
        let failed = |error: io::Error| {
            Failure::io(format!("{} cannot be written", names.join("/")), &error)
        };
        let parent = self.directory(above).map_err(failed)?;
        let part = format!(
            ".ghost-{:032x}.part",
            XxHash3_128::oneshot(format!("{identity}\0{name}").as_bytes())
        );
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&parent, &part, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|error| failed(not_followed(error, &part)))?;
        let file = File::from(fd);
        match rustix::fs::flock(file.as_fd(), FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(Failure::new(
                    ErrorCode::WrongState,
                    format!("{} is being copied by another ghostctl", names.join("/")),
                ));
            }
            Err(error) => return Err(failed(error.into())),
        }
        let known = file.metadata().map_err(failed)?;
        let ours = known.uid() == rustix::process::geteuid().as_raw();
        if !known.is_file() || known.nlink() != 1 || !ours {
            return Err(failed(io::Error::other(format!(
                "{part} is there already and is not ours"
            ))));
        }
        Ok(Partial {
            parent,
            part,
            name: name.clone(),
            length: known.len(),
            file,
            verified: 0,
            done: false,
        })
    }
}

/// Says in words what the two numbers for "this is a link" mean.
fn not_followed(error: rustix::io::Errno, name: &str) -> io::Error {
    match error {
        rustix::io::Errno::LOOP => {
            io::Error::other(format!("{name} is a symbolic link, and is not followed"))
        }
        rustix::io::Errno::NOTDIR => io::Error::other(format!(
            "{name} is a symbolic link or no directory, and is not followed"
        )),
        error => error.into(),
    }
}

/// A file that is being written beside its target.
pub(super) struct Partial {
    parent: OwnedFd,
    part: String,
    name: String,
    pub(super) file: File,
    /// What was there when it was opened.
    pub(super) length: u64,
    /// So much of it is known to be right.
    pub(super) verified: u64,
    done: bool,
}

impl Partial {
    /// Puts it in the place of the target.
    pub(super) fn complete(mut self, attributes: &Attributes, keep_owner: bool) -> io::Result<()> {
        attributes.apply(&self.file, keep_owner)?;
        rustix::fs::renameat(&self.parent, &self.part, &self.parent, &self.name)?;
        self.done = true;
        Ok(())
    }
}

impl Drop for Partial {
    /// What is known to be right is kept for the next try; nothing else is.
    fn drop(&mut self) {
        if self.done {
            return;
        }
        // Nothing can be done where this fails; the next try checks what it finds.
        if self.verified == 0 {
            let _ = rustix::fs::unlinkat(&self.parent, &self.part, AtFlags::empty());
        } else {
            // One byte more: a length at the border of a part tells of a part that may not have
            // been checked.
            drop(self.file.set_len(self.verified + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(path: &str) -> Vec<String> {
        path.split('/').map(str::to_owned).collect()
    }

    #[test]
    fn links_below_the_destination_are_not_followed() {
        let home = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(elsewhere.path(), home.path().join("dir")).unwrap();
        let target = elsewhere.path().join("target");
        std::fs::write(&target, "mine").unwrap();
        std::os::unix::fs::symlink(&target, home.path().join("file")).unwrap();
        let base = Base::open(home.path()).unwrap();
        assert!(base.make_directory(&names("dir")).is_err());
        assert!(base.make_directory(&names("dir/sub")).is_err());
        assert!(base.partial(&names("dir/x"), "id").is_err());
        // A link in the target's place is replaced, not written through.
        let partial = base.partial(&names("file"), "id").unwrap();
        partial.complete(&Attributes::default(), false).unwrap();
        assert_eq!(std::fs::read_to_string(&target).unwrap(), "mine");
        assert!(!home.path().join("file").is_symlink());
        assert_eq!(std::fs::read_dir(elsewhere.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_link_takes_the_place_of_a_file_or_link_and_of_nothing_else() {
        let home = tempfile::tempdir().unwrap();
        let base = Base::open(home.path()).unwrap();
        let attributes = Attributes {
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            modified: Some((1_500_000_000, 5)),
            ..Attributes::default()
        };
        let make = |name: &str, says: &str| base.make_link(&names(name), says, &attributes, true);
        std::fs::create_dir(home.path().join("dir")).unwrap();
        std::fs::write(home.path().join("dir/kept"), "mine").unwrap();
        std::fs::write(home.path().join("file"), "old").unwrap();
        make("file", "../../etc/passwd").unwrap();
        make("new", "dir").unwrap();
        make("new", "/nowhere").unwrap();
        let says = |name: &str| std::fs::read_link(home.path().join(name)).unwrap();
        assert_eq!(says("file"), Path::new("../../etc/passwd"));
        assert_eq!(says("new"), Path::new("/nowhere"));
        assert_eq!(
            home.path().join("new").symlink_metadata().unwrap().mtime(),
            1_500_000_000
        );
        // A directory stays, and a link in the way is not followed.
        make("dir", "elsewhere").unwrap_err();
        make("new", "dir").unwrap();
        make("new/below", "x").unwrap_err();
        assert!(home.path().join("dir/kept").is_file());
        assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 3);
        assert_eq!(
            std::fs::read_dir(home.path().join("dir")).unwrap().count(),
            1
        );
    }

    #[test]
    fn a_prepared_partial_is_not_written_through() {
        let home = tempfile::tempdir().unwrap();
        let victim = home.path().join("victim");
        std::fs::write(&victim, "mine").unwrap();
        let part = format!(".ghost-{:032x}.part", XxHash3_128::oneshot(b"id\0x"));
        std::os::unix::fs::symlink(&victim, home.path().join(&part)).unwrap();
        let base = Base::open(home.path()).unwrap();
        assert!(base.partial(&names("x"), "id").is_err());
        std::fs::remove_file(home.path().join(&part)).unwrap();
        std::fs::hard_link(&victim, home.path().join(&part)).unwrap();
        assert!(base.partial(&names("x"), "id").is_err());
        assert_eq!(std::fs::read_to_string(&victim).unwrap(), "mine");
    }

    #[test]
    fn what_is_not_verified_does_not_stay() {
        let home = tempfile::tempdir().unwrap();
        let base = Base::open(home.path()).unwrap();
        let files = || std::fs::read_dir(home.path()).unwrap().count();
        let partial = base.partial(&names("x"), "id").unwrap();
        partial.file.set_len(100).unwrap();
        // Nobody else may write it meanwhile.
        assert!(base.partial(&names("x"), "id").is_err());
        drop(partial);
        assert_eq!(files(), 0);
        let mut partial = base.partial(&names("x"), "id").unwrap();
        partial.file.set_len(100).unwrap();
        partial.verified = 60;
        drop(partial);
        assert_eq!(base.partial(&names("x"), "id").unwrap().length, 61);
        // Another file of the same name begins anew.
        assert_eq!(base.partial(&names("x"), "other").unwrap().length, 0);
    }

    #[test]
    fn set_user_id_bits_of_a_guest_stay_out() {
        let home = tempfile::tempdir().unwrap();
        let base = Base::open(home.path()).unwrap();
        let attributes = Attributes {
            mode: 0o6755,
            modified: Some((i64::MAX, -1)),
            ..Attributes::default()
        };
        let partial = base.partial(&names("x"), "id").unwrap();
        partial.complete(&attributes, false).unwrap();
        let mode = home.path().join("x").metadata().unwrap().mode();
        assert_eq!(mode & 0o7777, 0o755);
    }
}
