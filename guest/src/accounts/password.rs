//! Passwords: what `chpasswd` does, without it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ghost_proto::guest::v1::SetPasswordRequest;
use sha_crypt::{Sha512Params, sha512_simple};

use super::{Accounts, MOST};
use crate::Failure;
use crate::util::{random, read_bounded};

/// How long another program that changes accounts is waited for; glibc's `lckpwdf` takes as long.
const LOCK_WAIT: Duration = Duration::from_secs(15);
/// glibc's own number for `$6$`; more is slow under emulation without being better kept.
const ROUNDS: usize = 5000;

/// Sets a user's password.
///
/// # Errors
/// `not_found` for a user that `/etc/passwd` does not have, `invalid_argument` for what no shadow
/// file can hold, `busy` where another program holds the account files.
pub fn set_password(sysroot: &Path, request: &SetPasswordRequest) -> Result<(), Failure> {
    let accounts = Accounts::new(sysroot);
    if request.user.is_empty() {
        return Err(Failure::invalid("whose password?"));
    }
    let user = accounts.user(&request.user)?;
    let hash = if request.hashed {
        if request.password.is_empty()
            || request.password.len() > 1024
            || !request
                .password
                .bytes()
                .all(|byte| byte.is_ascii_graphic() && byte != b':')
        {
            return Err(Failure::invalid("not what crypt(3) writes"));
        }
        request.password.clone()
    } else {
        hash(&request.password)?
    };
    let etc = sysroot.join("etc");
    let _lock = Lock::take(&etc)?;
    let passwd = etc.join("passwd");
    let shadow = etc.join("shadow");
    let text = read(&passwd)?;
    let line = text
        .lines()
        .find(|line| line.split(':').next() == Some(user.name.as_str()))
        .ok_or_else(|| Failure::new("not_found", format!("no user {:?}", request.user)))?;
    // passwd(5): an `x` says that the shadow file has it.
    if line.split(':').nth(1) == Some("x") {
        let text = if shadow.exists() {
            read(&shadow)?
        } else {
            String::new()
        };
        replace(&shadow, &with_hash(&text, &user.name, &hash, today()))
    } else if shadow.exists() {
        // The shadow file first: at no moment is there an account without a password.
        let text = read(&shadow)?;
        replace(&shadow, &with_hash(&text, &user.name, &hash, today()))?;
        replace(&passwd, &with_field(&text_of(&passwd)?, &user.name, "x"))
    } else {
        replace(&passwd, &with_field(&text, &user.name, &hash))
    }
}

fn text_of(path: &Path) -> Result<String, Failure> {
    read(path)
}

fn read(path: &Path) -> Result<String, Failure> {
    let size = fs::metadata(path).map_or(0, |data| data.len());
    if size > MOST {
        // Writing back what was cut off would lose accounts.
        return Err(Failure::new(
            "io",
            format!("{} is too large", path.display()),
        ));
    }
    read_bounded(path, MOST).map_err(|error| Failure::io(path.display(), &error))
}

/// SHA-512 crypt: what every Linux since 2007 can check. yescrypt is newer and unknown to some.
fn hash(password: &str) -> Result<String, Failure> {
    if password.is_empty() || password.len() > 512 || password.contains(['\0', '\n']) {
        return Err(Failure::invalid(
            "a password has 1 to 512 bytes and no line breaks",
        ));
    }
    let parameters =
        Sha512Params::new(ROUNDS).map_err(|_| Failure::new("internal", "no such rounds"))?;
    sha512_simple(password, &parameters)
        .map_err(|_| Failure::new("internal", "the password could not be hashed"))
}

fn today() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs() / 86_400)
}

/// shadow(5): the hash and the day of the change; what else the line says stays.
fn with_hash(text: &str, user: &str, hash: &str, day: u64) -> String {
    let mut out = String::with_capacity(text.len() + 128);
    let mut found = false;
    for line in text.lines() {
        let mut fields: Vec<&str> = line.split(':').collect();
        let day = day.to_string();
        if fields[0] == user && !found {
            found = true;
            fields.resize(fields.len().max(9), "");
            fields[1] = hash;
            fields[2] = &day;
            out.push_str(&fields.join(":"));
        } else {
            out.push_str(line);
        }
        out.push('\n');
    }
    if !found {
        out.push_str(&format!("{user}:{hash}:{day}:0:99999:7:::\n"));
    }
    out
}

fn with_field(text: &str, user: &str, value: &str) -> String {
    let mut out = String::with_capacity(text.len() + 128);
    for line in text.lines() {
        let mut fields: Vec<&str> = line.split(':').collect();
        if fields[0] == user && fields.len() > 1 {
            fields[1] = value;
            out.push_str(&fields.join(":"));
        } else {
            out.push_str(line);
        }
        out.push('\n');
    }
    out
}

/// Writes a file anew with the owner, mode and SELinux label of the old one, at once or not at all.
fn replace(path: &Path, text: &str) -> Result<(), Failure> {
    let said = |error: io::Error| Failure::io(path.display(), &error);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let salt = random::<8>().map_err(said)?;
    let temporary = path.with_file_name(format!(".{name}.ghost-{}", hex::encode(salt)));
    let guard = Remove(temporary.clone());
    let old = fs::metadata(path).ok();
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)
        .map_err(said)?;
    file.write_all(text.as_bytes()).map_err(said)?;
    if let Some(old) = &old {
        std::os::unix::fs::fchown(&file, Some(old.uid()), Some(old.gid())).map_err(said)?;
        file.set_permissions(fs::Permissions::from_mode(old.mode() & 0o7777))
            .map_err(said)?;
        copy_label(path, &file);
    }
    file.sync_all().map_err(said)?;
    fs::rename(&temporary, path).map_err(said)?;
    std::mem::forget(guard);
    File::open(path.parent().unwrap_or(Path::new("/")))
        .and_then(|directory| directory.sync_all())
        .map_err(said)
}

/// A shadow file without its label cannot be read by those who check passwords under SELinux.
fn copy_label(from: &Path, to: &File) {
    let mut label = vec![0; 1024];
    if let Ok(size) = rustix::fs::getxattr(from, "security.selinux", &mut label[..]) {
        let _ = rustix::fs::fsetxattr(
            to.as_fd(),
            "security.selinux",
            &label[..size],
            rustix::fs::XattrFlags::empty(),
        );
    }
}

struct Remove(PathBuf);

impl Drop for Remove {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Keeps `passwd`, `useradd` and the like out: glibc's lock on `.pwd.lock`, and the lock file of the
/// shadow tools.
struct Lock {
    _pwd: File,
    shadow: PathBuf,
}

impl Lock {
    fn take(etc: &Path) -> Result<Self, Failure> {
        let path = etc.join(".pwd.lock");
        let said = |error: io::Error| Failure::io(path.display(), &error);
        let busy = || Failure::new("busy", "another program is changing accounts");
        let pwd = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(said)?;
        let until = Instant::now() + LOCK_WAIT;
        while let Err(error) =
            rustix::fs::fcntl_lock(&pwd, rustix::fs::FlockOperation::NonBlockingLockExclusive)
        {
            if !matches!(error, rustix::io::Errno::AGAIN | rustix::io::Errno::ACCESS) {
                return Err(said(error.into()));
            }
            if Instant::now() >= until {
                return Err(busy());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let shadow = etc.join("shadow.lock");
        loop {
            match OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&shadow)
            {
                Ok(mut file) => {
                    // The shadow tools take the lock of a process that is gone away.
                    let _ = write!(file, "{}\0", std::process::id());
                    return Ok(Self { _pwd: pwd, shadow });
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    let holder = read_bounded(&shadow, 64).unwrap_or_default();
                    let gone = holder
                        .trim_matches(['\0', '\n', ' '])
                        .parse::<u32>()
                        .is_ok_and(|pid| !Path::new(&format!("/proc/{pid}")).exists());
                    if gone {
                        let _ = fs::remove_file(&shadow);
                    } else if Instant::now() >= until {
                        return Err(busy());
                    } else {
                        std::thread::sleep(Duration::from_millis(50));
                    }
                }
                Err(error) => return Err(Failure::io(shadow.display(), &error)),
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.shadow);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest(passwd: &str, shadow: Option<&str>) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let etc = root.path().join("etc");
        fs::create_dir(&etc).unwrap();
        fs::write(etc.join("passwd"), passwd).unwrap();
        if let Some(shadow) = shadow {
            fs::write(etc.join("shadow"), shadow).unwrap();
            fs::set_permissions(etc.join("shadow"), fs::Permissions::from_mode(0o640)).unwrap();
        }
        root
    }

    fn ask(user: &str, password: &str, hashed: bool) -> SetPasswordRequest {
        SetPasswordRequest {
            user: user.into(),
            password: password.into(),
            hashed,
        }
    }

    #[test]
    fn the_shadow_line_alone_is_changed() {
        let root = guest(
            "root:x:0:0::/root:/bin/sh\nada:x:1000:1000::/home/ada:/bin/sh\n",
            Some("root:*:19000:0:99999:7:::\nada:!:19000:0:90:7:::\n"),
        );
        set_password(root.path(), &ask("ada", "correct horse", false)).unwrap();
        let text = fs::read_to_string(root.path().join("etc/shadow")).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "root:*:19000:0:99999:7:::");
        let fields: Vec<&str> = lines[1].split(':').collect();
        assert!(fields[1].starts_with("$6$"), "{text}");
        assert!(sha_crypt::sha512_check("correct horse", fields[1]).is_ok());
        assert_eq!(fields[2], today().to_string());
        assert_eq!(fields[4], "90");
        let mode = fs::metadata(root.path().join("etc/shadow")).unwrap().mode();
        assert_eq!(mode & 0o7777, 0o640);
        let left: Vec<_> = fs::read_dir(root.path().join("etc"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(left.len(), 3, "{left:?}");
    }

    #[test]
    fn a_guest_without_shadow_keeps_it_in_passwd() {
        let root = guest("root::0:0:root:/root:/bin/sh\n", None);
        set_password(root.path(), &ask("root", "$6$salt$hash", true)).unwrap();
        assert_eq!(
            fs::read_to_string(root.path().join("etc/passwd")).unwrap(),
            "root:$6$salt$hash:0:0:root:/root:/bin/sh\n"
        );
    }

    #[test]
    fn what_no_file_can_hold_is_refused() {
        let root = guest("root:x:0:0:root:/root:/bin/sh\n", Some("root:*:1::::::\n"));
        for request in [
            ask("root", "", false),
            ask("root", "a\nb", false),
            ask("root", "a:b", true),
            ask("root", "$6$ ", true),
            ask("", "x", false),
        ] {
            let failure = set_password(root.path(), &request).unwrap_err();
            assert_eq!(failure.code, "invalid_argument", "{request:?}");
        }
        for missing in ["nobody", "4711"] {
            let failure = set_password(root.path(), &ask(missing, "x", false)).unwrap_err();
            assert_eq!(failure.code, "not_found");
        }
        assert_eq!(
            fs::read_to_string(root.path().join("etc/shadow")).unwrap(),
            "root:*:1::::::\n"
        );
    }

    #[test]
    fn a_lock_of_a_dead_process_is_taken_over() {
        let root = guest("root:x:0:0:root:/root:/bin/sh\n", Some("root:*:1::::::\n"));
        fs::write(root.path().join("etc/shadow.lock"), "4194999\0").unwrap();
        set_password(root.path(), &ask("root", "x", false)).unwrap();
        assert!(!root.path().join("etc/shadow.lock").exists());
    }
}
