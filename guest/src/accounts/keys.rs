//! `~/.ssh/authorized_keys`.
//!
//! Root writes into a directory that is the user's, who may put links wherever a file is expected:
//! every step goes from an open directory, follows no link, and what is replaced is replaced by
//! name.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use ghost_proto::guest::v1::SshKeysRequest;
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Uid};
use rustix::io::Errno;

use super::{Accounts, User};
use crate::Failure;
use crate::util::random;

const MOST_BYTES: u64 = 1024 * 1024;
const MOST_LINE: usize = 16 * 1024;
const FILE: &str = "authorized_keys";

/// Adds and removes keys.
///
/// # Errors
/// `invalid_argument` for what is no key, `not_found` for a user without a home,
/// `permission_denied` where `.ssh` is a link or somebody else's.
pub fn change_keys(sysroot: &Path, request: &SshKeysRequest) -> Result<(), Failure> {
    for line in request.add.iter().chain(&request.remove) {
        if line.len() > MOST_LINE || line.chars().any(char::is_control) || identity(line).is_none()
        {
            return Err(Failure::invalid(format!(
                "not a line of authorized_keys: {:?}",
                line.chars().take(60).collect::<String>()
            )));
        }
    }
    if request.user.is_empty() {
        return Err(Failure::invalid("whose keys?"));
    }
    let user = Accounts::new(sysroot).user(&request.user)?;
    let directory = open_directory(sysroot, &user, request.add.is_empty())?;
    let Some(directory) = directory else {
        return Ok(());
    };
    let old = read(&directory, &user)?;
    let new = changed(&old, &request.add, &request.remove);
    if new != old {
        write(&directory, &user, &new)?;
    }
    Ok(())
}

fn open_directory(
    sysroot: &Path,
    user: &User,
    only_if_there: bool,
) -> Result<Option<OwnedFd>, Failure> {
    let home_path = user.home.trim_start_matches('/');
    let root = rustix::fs::open(
        sysroot,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|error| Failure::errno("/", error))?;
    // Links on the way to a home are root's own (`/home` may be one).
    let home = rustix::fs::openat2(
        &root,
        if home_path.is_empty() { "." } else { home_path },
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    )
    .map_err(|error| Failure::errno(format!("the home of {}, {}", user.name, user.home), error))?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let said = |error: Errno| match error {
        Errno::LOOP | Errno::NOTDIR => Failure::new(
            "permission_denied",
            format!("{}/.ssh is no directory", user.home),
        ),
        other => Failure::errno(format!("{}/.ssh", user.home), other),
    };
    match rustix::fs::openat(&home, ".ssh", flags, Mode::empty()) {
        Ok(directory) => {
            let stat = rustix::fs::fstat(&directory).map_err(said)?;
            if stat.st_uid != user.uid && stat.st_uid != 0 {
                return Err(Failure::new(
                    "permission_denied",
                    format!("{}/.ssh is user {}'s", user.home, stat.st_uid),
                ));
            }
            Ok(Some(directory))
        }
        Err(Errno::NOENT) if only_if_there => Ok(None),
        Err(Errno::NOENT) => {
            rustix::fs::mkdirat(&home, ".ssh", Mode::from_raw_mode(0o700)).map_err(said)?;
            let directory =
                rustix::fs::openat(&home, ".ssh", flags, Mode::empty()).map_err(said)?;
            let stat = rustix::fs::fstat(&directory).map_err(said)?;
            if stat.st_uid != rustix::process::geteuid().as_raw() {
                return Err(Failure::new(
                    "permission_denied",
                    "the new .ssh was exchanged",
                ));
            }
            give(&directory, user).map_err(said)?;
            Ok(Some(directory))
        }
        Err(error) => Err(said(error)),
    }
}

fn give(file: impl AsFd, user: &User) -> Result<(), Errno> {
    rustix::fs::fchown(
        file,
        Some(Uid::from_raw(user.uid)),
        Some(Gid::from_raw(user.gid)),
    )
}

fn read(directory: &OwnedFd, user: &User) -> Result<String, Failure> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let said = |error: Errno| Failure::errno(format!("{}/.ssh/{FILE}", user.home), error);
    let file = match rustix::fs::openat(directory, FILE, flags, Mode::empty()) {
        Ok(file) => file,
        Err(Errno::NOENT) => return Ok(String::new()),
        Err(Errno::LOOP) => {
            return Err(Failure::new(
                "permission_denied",
                format!("{}/.ssh/{FILE} is a symbolic link", user.home),
            ));
        }
        Err(error) => return Err(said(error)),
    };
    let stat = rustix::fs::fstat(&file).map_err(said)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile
        || (stat.st_uid != user.uid && stat.st_uid != 0)
    {
        return Err(Failure::new(
            "permission_denied",
            format!("{}/.ssh/{FILE} is not the user's own file", user.home),
        ));
    }
    if u64::try_from(stat.st_size).unwrap_or(u64::MAX) > MOST_BYTES {
        return Err(Failure::new(
            "io",
            format!("{}/.ssh/{FILE} is too large", user.home),
        ));
    }
    let mut bytes = Vec::new();
    File::from(file)
        .take(MOST_BYTES)
        .read_to_end(&mut bytes)
        .map_err(|error| Failure::io(FILE, &error))?;
    String::from_utf8(bytes)
        .map_err(|_| Failure::new("io", format!("{}/.ssh/{FILE} is no text", user.home)))
}

fn write(directory: &OwnedFd, user: &User, text: &str) -> Result<(), Failure> {
    let said = |error: Errno| Failure::errno(format!("{}/.ssh/{FILE}", user.home), error);
    let salt = random::<8>().map_err(|error| Failure::io(FILE, &error))?;
    let name = format!(".{FILE}.{}", hex::encode(salt));
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(directory, name.as_str(), flags, Mode::from_raw_mode(0o600))
        .map_err(said)?;
    let outcome = (|| {
        let mut file = File::from(file);
        file.write_all(text.as_bytes())
            .map_err(|error| Failure::io(FILE, &error))?;
        rustix::fs::fchmod(&file, Mode::from_raw_mode(0o600)).map_err(said)?;
        give(&file, user).map_err(said)?;
        rustix::fs::fsync(&file).map_err(said)?;
        rustix::fs::renameat(directory, name.as_str(), directory, FILE).map_err(said)?;
        rustix::fs::fsync(directory).map_err(said)
    })();
    if outcome.is_err() {
        let _ = rustix::fs::unlinkat(directory, name.as_str(), AtFlags::empty());
    }
    outcome
}

fn changed(old: &str, add: &[String], remove: &[String]) -> String {
    let gone: Vec<(String, String)> = remove.iter().filter_map(|line| identity(line)).collect();
    let mut known = Vec::new();
    let mut out = String::with_capacity(old.len());
    for line in old.lines() {
        match identity(line) {
            Some(key) if gone.contains(&key) => continue,
            Some(key) => known.push(key),
            // Comments, and what only sshd understands.
            None => {}
        }
        out.push_str(line);
        out.push('\n');
    }
    for line in add {
        if let Some(key) = identity(line)
            && !known.contains(&key)
        {
            known.push(key);
            out.push_str(line.trim());
            out.push('\n');
        }
    }
    out
}

/// Type and key of a line of sshd(8), `AUTHORIZED_KEYS FILE FORMAT`, without options and comment.
fn identity(line: &str) -> Option<(String, String)> {
    let line = line.trim();
    if line.is_empty() || line.starts_with('#') {
        return None;
    }
    // Options may hold blanks within quotes.
    let mut words = Vec::new();
    let mut word = String::new();
    let mut quoted = false;
    let mut escaped = false;
    for character in line.chars() {
        match character {
            '"' if !escaped => quoted = !quoted,
            ' ' | '\t' if !quoted => {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
                continue;
            }
            _ => {}
        }
        escaped = character == '\\' && !escaped;
        word.push(character);
    }
    if !word.is_empty() {
        words.push(word);
    }
    let at = words.iter().take(2).position(|word| {
        ["ssh-", "ecdsa-sha2-", "sk-ssh-", "sk-ecdsa-"]
            .iter()
            .any(|prefix| word.starts_with(prefix))
    })?;
    let key = words.get(at + 1)?;
    // Every key begins with the length of its type's name, of less than 256 bytes.
    let base64 = key
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'='));
    (base64 && key.starts_with("AAAA")).then(|| (words[at].clone(), key.clone()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    const ONE: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOne one@host";
    const TWO: &str = r#"from="10.0.0.0/8",command="echo \" a b" ssh-rsa AAAAB3NzaC1yc2ETwo= two"#;

    fn guest() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("etc")).unwrap();
        fs::create_dir_all(root.path().join("srv/home/ada")).unwrap();
        symlink("/srv/home", root.path().join("home")).unwrap();
        fs::write(
            root.path().join("etc/passwd"),
            "ada:x:1000:1001::/home/ada:/bin/sh\n",
        )
        .unwrap();
        fs::write(root.path().join("etc/group"), "").unwrap();
        root
    }

    fn ask(add: &[&str], remove: &[&str]) -> SshKeysRequest {
        let own = |list: &[&str]| list.iter().map(|one| (*one).to_owned()).collect();
        SshKeysRequest {
            user: "ada".into(),
            add: own(add),
            remove: own(remove),
        }
    }

    #[test]
    fn keys_come_and_go_with_the_right_owner_and_mode() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root gives files away");
            return;
        }
        let root = guest();
        let ssh = root.path().join("srv/home/ada/.ssh");
        change_keys(root.path(), &ask(&[], &[ONE])).unwrap();
        assert!(!ssh.exists());
        change_keys(root.path(), &ask(&[ONE, TWO], &[])).unwrap();
        change_keys(
            root.path(),
            &ask(&["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOne again"], &[]),
        )
        .unwrap();
        let file = ssh.join(FILE);
        assert_eq!(
            fs::read_to_string(&file).unwrap(),
            format!("{ONE}\n{TWO}\n")
        );
        let data = fs::metadata(&file).unwrap();
        assert_eq!(
            (data.uid(), data.gid(), data.mode() & 0o777),
            (1000, 1001, 0o600)
        );
        let data = fs::metadata(&ssh).unwrap();
        assert_eq!(
            (data.uid(), data.gid(), data.mode() & 0o777),
            (1000, 1001, 0o700)
        );
        change_keys(root.path(), &ask(&[], &["ssh-rsa AAAAB3NzaC1yc2ETwo="])).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), format!("{ONE}\n"));
        assert_eq!(fs::read_dir(&ssh).unwrap().count(), 1);
    }

    #[test]
    fn links_lead_nowhere() {
        let root = guest();
        let secret = root.path().join("secret");
        fs::create_dir(&secret).unwrap();
        fs::write(secret.join(FILE), "of somebody else\n").unwrap();
        let ssh = root.path().join("srv/home/ada/.ssh");
        symlink(&secret, &ssh).unwrap();
        let failure = change_keys(root.path(), &ask(&[ONE], &[])).unwrap_err();
        assert_eq!(failure.code, "permission_denied");
        fs::remove_file(&ssh).unwrap();
        fs::create_dir(&ssh).unwrap();
        symlink(secret.join(FILE), ssh.join(FILE)).unwrap();
        let failure = change_keys(root.path(), &ask(&[ONE], &[])).unwrap_err();
        assert_eq!(failure.code, "permission_denied");
        assert_eq!(
            fs::read_to_string(secret.join(FILE)).unwrap(),
            "of somebody else\n"
        );
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o700)).unwrap();
    }

    #[test]
    fn what_is_no_key_is_refused() {
        let root = guest();
        for bad in [
            "",
            "# comment",
            "hello",
            "ssh-rsa",
            "ssh-rsa not-a-key",
            "ssh-rsa AAAA\nssh-rsa AAAA",
        ] {
            let failure = change_keys(root.path(), &ask(&[bad], &[])).unwrap_err();
            assert_eq!(failure.code, "invalid_argument", "{bad:?}");
        }
    }
}
