//! Users and groups, read from the guest's own files.
//!
//! A static program cannot load the guest's name service modules, so what LDAP or systemd-homed
//! know is unknown here; numbers work for them all the same.

mod keys;
mod password;

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, CWD, StatxFlags};

use crate::Failure;
use crate::util::read_bounded;

pub use keys::change_keys;
pub use password::set_password;

/// Most bytes that are read of an account file: some hundred thousand users.
const MOST: u64 = 16 * 1024 * 1024;

/// A line of `passwd(5)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// Its name.
    pub name: String,
    /// Its number.
    pub uid: u32,
    /// Its primary group.
    pub gid: u32,
    /// Its home directory.
    pub home: String,
    /// Its login shell.
    pub shell: String,
}

impl User {
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let (_password, uid, gid, _gecos) = (
            fields.next()?,
            fields.next()?,
            fields.next()?,
            fields.next()?,
        );
        let home = fields.next()?;
        let shell = fields.next().unwrap_or_default();
        Some(Self {
            name: name.into(),
            uid: uid.parse().ok()?,
            gid: gid.parse().ok()?,
            home: if home.is_empty() { "/" } else { home }.into(),
            // passwd(5): an empty one means /bin/sh.
            shell: if shell.is_empty() { "/bin/sh" } else { shell }.into(),
        })
    }

    fn root() -> Self {
        Self {
            name: "root".into(),
            uid: 0,
            gid: 0,
            home: "/root".into(),
            shell: "/bin/sh".into(),
        }
    }
}

/// Whose rights a program gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The user with home and shell.
    pub user: User,
    /// The group that it runs as.
    pub gid: u32,
    /// All others; set always, since what is not set is inherited from root.
    pub groups: Vec<u32>,
}

/// A file as it was when it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: (u32, u32),
    inode: u64,
    size: u64,
    modified: (i64, u32),
    changed: (i64, u32),
}

/// Who was asked for, by name or number, as what group, and who that is.
type Found = HashMap<(String, String), Identity>;

/// What was found in `passwd` and `group`, as long as neither changes.
#[derive(Clone, Debug)]
struct Known {
    stamps: [Stamp; 2],
    found: Found,
}

/// The account files of a guest.
#[derive(Clone, Debug)]
pub struct Accounts {
    etc: PathBuf,
    /// To read and parse both files for every program takes under emulation a tenth of its start.
    known: RefCell<Option<Known>>,
}

/// The clock of file systems moves in steps of up to 10 ms, so a file that changed a moment ago may
/// change again and look the same.
const SETTLED: Duration = Duration::from_secs(2);
/// Identities that are kept.
const MOST_KNOWN: usize = 64;

impl Accounts {
    /// Those under `<sysroot>/etc`.
    pub fn new(sysroot: &Path) -> Self {
        Self {
            etc: sysroot.join("etc"),
            known: RefCell::new(None),
        }
    }

    /// Finds a user by name, or by number where no user has it as a name.
    ///
    /// # Errors
    /// `not_found`; a number that no line has is a user without a name, home `/`.
    pub fn user(&self, wanted: &str) -> Result<User, Failure> {
        let text = read_bounded(self.etc.join("passwd"), MOST);
        if wanted.is_empty() {
            // An agent that cannot read the file still helps root to repair it.
            return Ok(text
                .ok()
                .and_then(|text| {
                    text.lines()
                        .filter_map(User::parse)
                        .find(|user| user.uid == 0)
                })
                .unwrap_or_else(User::root));
        }
        let text = text.map_err(|error| Failure::io("/etc/passwd", &error))?;
        let number = wanted.parse::<u32>().ok();
        let mut of_number = None;
        for user in text.lines().filter_map(User::parse) {
            if user.name == wanted {
                return Ok(user);
            }
            if Some(user.uid) == number && of_number.is_none() {
                of_number = Some(user);
            }
        }
        match (of_number, number) {
            (Some(user), _) => Ok(user),
            // 2^32-1 is what setresuid(2) takes for "leave it", which would be root.
            (None, Some(uid)) if uid != u32::MAX => Ok(User {
                name: uid.to_string(),
                uid,
                gid: uid,
                home: "/".into(),
                shell: "/bin/sh".into(),
            }),
            _ => Err(Failure::new("not_found", format!("no user {wanted:?}"))),
        }
    }

    /// Finds a group by name or number.
    ///
    /// # Errors
    /// `not_found`.
    pub fn group(&self, wanted: &str) -> Result<u32, Failure> {
        let text = read_bounded(self.etc.join("group"), MOST)
            .map_err(|error| Failure::io("/etc/group", &error))?;
        text.lines()
            .filter_map(group_line)
            .find(|(name, ..)| *name == wanted)
            .map(|(_, gid, _)| gid)
            .or_else(|| wanted.parse().ok().filter(|gid| *gid != u32::MAX))
            .ok_or_else(|| Failure::new("not_found", format!("no group {wanted:?}")))
    }

    /// The groups besides `gid` that list the user as a member.
    fn supplementary(&self, user: &str, gid: u32) -> Vec<u32> {
        let text = read_bounded(self.etc.join("group"), MOST).unwrap_or_default();
        let mut groups = vec![gid];
        for (_, other, members) in text.lines().filter_map(group_line) {
            if members.split(',').any(|member| member == user) && !groups.contains(&other) {
                groups.push(other);
            }
        }
        groups
    }

    /// Whose rights a program gets that is to run as this user and group, either possibly empty.
    ///
    /// # Errors
    /// `not_found`.
    pub fn identity(&self, user: &str, group: &str) -> Result<Identity, Failure> {
        // Before they are read: what changes in between is seen the next time.
        let stamps = self.stamps();
        let asked = (user.to_owned(), group.to_owned());
        let mut known = self.known.borrow_mut();
        known.take_if(|known| Some(known.stamps) != stamps);
        if let Some(identity) = known.as_ref().and_then(|known| known.found.get(&asked)) {
            return Ok(identity.clone());
        }
        let identity = self.look_up(user, group)?;
        if let Some(stamps) = stamps {
            let known = known.get_or_insert_with(|| Known {
                stamps,
                found: Found::new(),
            });
            if known.found.len() >= MOST_KNOWN {
                known.found.clear();
            }
            known.found.insert(asked, identity.clone());
        }
        Ok(identity)
    }

    /// Both files as they are, where they have been so for a while.
    fn stamps(&self) -> Option<[Stamp; 2]> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
        let settled = i64::try_from(now.checked_sub(SETTLED)?.as_secs()).ok()?;
        let stamp = |name| {
            let status = rustix::fs::statx(
                CWD,
                self.etc.join(name),
                AtFlags::empty(),
                StatxFlags::BASIC_STATS,
            )
            .ok()?;
            (status.stx_ctime.tv_sec < settled).then_some(Stamp {
                device: (status.stx_dev_major, status.stx_dev_minor),
                inode: status.stx_ino,
                size: status.stx_size,
                modified: (status.stx_mtime.tv_sec, status.stx_mtime.tv_nsec),
                changed: (status.stx_ctime.tv_sec, status.stx_ctime.tv_nsec),
            })
        };
        Some([stamp("passwd")?, stamp("group")?])
    }

    fn look_up(&self, user: &str, group: &str) -> Result<Identity, Failure> {
        let user = self.user(user)?;
        let gid = if group.is_empty() {
            user.gid
        } else {
            self.group(group)?
        };
        let mut groups = self.supplementary(&user.name, user.gid);
        if !group.is_empty() {
            groups.retain(|one| *one != user.gid);
            groups.insert(0, gid);
            groups.dedup();
        }
        // NGROUPS_MAX
        groups.truncate(65_536);
        Ok(Identity { user, gid, groups })
    }
}

fn group_line(line: &str) -> Option<(&str, u32, &str)> {
    let mut fields = line.split(':');
    let name = fields.next().filter(|name| !name.is_empty())?;
    let _password = fields.next()?;
    let gid = fields.next()?.parse().ok()?;
    Some((name, gid, fields.next().unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accounts() -> (tempfile::TempDir, Accounts) {
        let root = tempfile::tempdir().unwrap();
        let etc = root.path().join("etc");
        std::fs::create_dir(&etc).unwrap();
        std::fs::write(
            etc.join("passwd"),
            "broken\nroot:x:0:0:root:/root:/bin/bash\nada:x:1000:1000:Ada,,,:/home/ada:\n1000:x:7:7::/x:/bin/false\nbad:x:-1:0::/:/bin/sh\n",
        )
        .unwrap();
        std::fs::write(
            etc.join("group"),
            "root:x:0:\nwheel:x:10:root,ada\nada:x:1000:\ndisk:x:6:root\naudio:x:11:adam,ada\n",
        )
        .unwrap();
        let accounts = Accounts::new(root.path());
        (root, accounts)
    }

    #[test]
    fn users_are_found_by_name_before_number() {
        let (_root, accounts) = accounts();
        assert_eq!(accounts.user("").unwrap().shell, "/bin/bash");
        assert_eq!(accounts.user("ada").unwrap().shell, "/bin/sh");
        assert_eq!(accounts.user("1000").unwrap().uid, 7);
        assert_eq!(accounts.user("7").unwrap().name, "1000");
        assert_eq!(accounts.user("4711").unwrap().gid, 4711);
        assert_eq!(accounts.user("nobody").unwrap_err().code, "not_found");
        assert_eq!(accounts.user("4294967295").unwrap_err().code, "not_found");
    }

    #[test]
    fn what_was_found_is_kept_until_a_file_changes() {
        let (root, accounts) = accounts();
        let passwd = root.path().join("etc/passwd");
        let shell = |accounts: &Accounts| accounts.identity("ada", "").unwrap().user.shell;
        assert_eq!(shell(&accounts), "/bin/sh");
        assert!(accounts.known.borrow().is_none(), "they have just changed");
        // As seen from three seconds later.
        let deadline = std::time::Instant::now() + Duration::from_secs(30);
        while accounts.known.borrow().is_none() {
            assert!(std::time::Instant::now() < deadline, "never kept");
            std::thread::sleep(Duration::from_millis(50));
            assert_eq!(shell(&accounts), "/bin/sh");
        }
        // In place, with the same length.
        let text = std::fs::read_to_string(&passwd).unwrap();
        std::fs::write(&passwd, text.replace("Ada,,,", "Ada...")).unwrap();
        let text = std::fs::read_to_string(&passwd).unwrap();
        std::fs::write(&passwd, text.replace("/home/ada:", "/home/ada:/bin/zsh")).unwrap();
        assert_eq!(shell(&accounts), "/bin/zsh");
        assert!(accounts.known.borrow().is_none());
        std::fs::remove_file(&passwd).unwrap();
        assert_eq!(accounts.identity("ada", "").unwrap_err().code, "not_found");
    }

    #[test]
    fn supplementary_groups_are_the_users_own_and_never_roots() {
        let (_root, accounts) = accounts();
        let ada = accounts.identity("ada", "").unwrap();
        assert_eq!((ada.gid, ada.groups), (1000, vec![1000, 10, 11]));
        let as_disk = accounts.identity("ada", "disk").unwrap();
        assert_eq!((as_disk.gid, as_disk.groups), (6, vec![6, 10, 11]));
        let unknown = accounts.identity("4711", "").unwrap();
        assert_eq!(unknown.groups, [4711]);
        assert_eq!(accounts.identity("ada", "x").unwrap_err().code, "not_found");
    }
}
