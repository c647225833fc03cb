//! The local socket: where the host's own people speak to the agent, without certificates.
//!
//! Its file has mode 0660 and belongs to root and the group `ghost`, so that the kernel refuses
//! everybody else before a byte is read. Who did connect is read from the socket itself
//! (`SO_PEERCRED` and `SO_PEERGROUPS`, unix(7)), never from what the peer says:
//!
//! - root, and the user that the agent runs as, are admins: they could read its state anyway;
//! - members of the group are operators: they run VMs, but whom else to let in is not theirs.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use ghost_domain::{Error, ErrorCode, Result, Role};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::net::{UnixListener, UnixStream};

/// The group whose members may use the socket.
pub const SOCKET_GROUP: &str = "ghost";

/// A bound local socket; dropping it removes its file.
#[derive(Debug)]
pub struct LocalSocket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of our file, so that nobody else's is removed.
    file: (u64, u64),
    group: Option<u32>,
}

impl LocalSocket {
    /// Binds `path`. A file that an agent left behind when it died is replaced; one that somebody
    /// listens on is not, nor is anything that is no socket. Call it within a Tokio runtime.
    ///
    /// # Errors
    /// [`ErrorCode::IoFailed`] when the path is taken or cannot be bound.
    pub fn bind(path: &Path, group: &str) -> Result<Self> {
        let failed = |cause: &dyn std::fmt::Display| {
            Error::new(
                ErrorCode::IoFailed,
                format!("cannot listen on {}", path.display()),
            )
            .because(cause)
        };
        let folder = path
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(folder)
            .map_err(|cause| failed(&cause))?;
        // Two agents that start at once: the second waits here, then finds the first listening.
        let lock = File::open(folder).map_err(|cause| failed(&cause))?;
        lock.lock().map_err(|cause| failed(&cause))?;

        match fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => {
                return Err(failed(&"something else than a socket is there"));
            }
            Ok(_) => {
                if somebody_listens(path).map_err(|cause| failed(&cause))? {
                    return Err(failed(&"another process listens there").hint(
                        "is an agent running already? see ghostctl status, or choose another grpc.socket",
                    ));
                }
                tracing::info!(path = %path.display(), "removing the socket that a dead agent left behind");
                fs::remove_file(path).map_err(|cause| failed(&cause))?;
            }
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => {}
            Err(cause) => return Err(failed(&cause)),
        }

        // Bound under another name and moved when its mode is right: at no moment can anybody
        // connect who may not.
        let fresh = folder.join(".new");
        match fs::remove_file(&fresh) {
            Ok(()) => {}
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => {}
            Err(cause) => return Err(failed(&cause)),
        }
        let listener = UnixListener::bind(&fresh).map_err(|cause| failed(&cause))?;
        let gid = group_id(group);
        let owned =
            gid.is_some_and(|gid| std::os::unix::fs::chown(&fresh, None, Some(gid)).is_ok());
        if !owned {
            tracing::warn!(
                group,
                "the group does not exist or may not be used: only the agent's own user can use the socket (groupadd --system {group})"
            );
        }
        let mode = if owned { 0o660 } else { 0o600 };
        let moved = fs::set_permissions(&fresh, Permissions::from_mode(mode))
            .and_then(|()| fs::metadata(&fresh))
            .and_then(|metadata| {
                fs::rename(&fresh, path)?;
                Ok((metadata.dev(), metadata.ino()))
            });
        match moved {
            Ok(file) => Ok(Self {
                listener,
                path: path.to_owned(),
                file,
                group: gid,
            }),
            Err(cause) => {
                drop(fs::remove_file(&fresh));
                Err(failed(&cause))
            }
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The next connection and who is behind it.
    ///
    /// # Errors
    /// What the system says, most likely that descriptors are used up.
    pub async fn accept(&self) -> io::Result<(UnixStream, LocalPeer)> {
        let (stream, _) = self.listener.accept().await?;
        let peer = LocalPeer::of(&stream, self.group)?;
        Ok((stream, peer))
    }
}

impl Drop for LocalSocket {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.file);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the socket");
        }
    }
}

/// Whether a connection would be taken. Never blocks: a full backlog has a listener too.
fn somebody_listens(path: &Path) -> io::Result<bool> {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
        None,
    )?;
    match rustix::net::connect(&socket, &SocketAddrUnix::new(path)?) {
        Ok(()) | Err(Errno::AGAIN | Errno::INPROGRESS) => Ok(true),
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Who is at the other end of the local socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalPeer {
    /// Its user id.
    pub uid: u32,
    /// Its user's name.
    pub name: String,
    /// `None`: nobody we let in.
    pub role: Option<Role>,
}

impl LocalPeer {
    fn of(stream: &UnixStream, group: Option<u32>) -> io::Result<Self> {
        let credentials = stream.peer_cred()?;
        let (uid, gid) = (credentials.uid(), credentials.gid());
        let name = user_name(uid);
        let groups = peer_groups(stream).unwrap_or_default();
        let member = group.is_some_and(|group| {
            gid == group || groups.contains(&group) || listed(group, name.as_deref())
        });
        let own = rustix::process::geteuid().as_raw();
        Ok(Self {
            uid,
            role: role(uid, own, member),
            name: name.unwrap_or_else(|| format!("uid {uid}")),
        })
    }
}

const fn role(uid: u32, own: u32, member: bool) -> Option<Role> {
    if uid == 0 || uid == own {
        Some(Role::Admin)
    } else if member {
        Some(Role::Operator)
    } else {
        None
    }
}

/// The peer's supplementary groups at the time when it connected (Linux 4.13 and later).
fn peer_groups(stream: &UnixStream) -> io::Result<Vec<u32>> {
    const WIDTH: usize = size_of::<libc::gid_t>();
    let mut groups: Vec<libc::gid_t> = vec![0; 64];
    loop {
        let mut length =
            libc::socklen_t::try_from(groups.len() * WIDTH).unwrap_or(libc::socklen_t::MAX);
        // SAFETY: the descriptor is open for as long as `stream` is borrowed; the kernel writes at
        // most `length` bytes to the buffer, which has that many, and the new length to `length`.
        let result = unsafe {
            libc::getsockopt(
                stream.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        let needed = length as usize / WIDTH;
        if result == 0 {
            groups.truncate(needed);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        // ERANGE tells the length that is needed; 65,536 groups are the kernel's own limit.
        if error.raw_os_error() == Some(libc::ERANGE) && needed > groups.len() && needed <= 65_536 {
            groups.resize(needed, 0);
            continue;
        }
        return Err(error);
    }
}

/// A line of `/etc/group` or `/etc/passwd`, by the field at `at`.
fn line_of(file: &str, at: usize, value: &str) -> Option<Vec<String>> {
    let text = fs::read_to_string(file).ok()?;
    text.lines()
        .map(|line| line.split(':').map(str::to_owned).collect::<Vec<_>>())
        .find(|fields| fields.get(at).is_some_and(|field| field == value))
}

fn group_id(name: &str) -> Option<u32> {
    line_of("/etc/group", 0, name)?.get(2)?.parse().ok()
}

fn user_name(uid: u32) -> Option<String> {
    line_of("/etc/passwd", 2, &uid.to_string())?
        .first()
        .cloned()
}

/// Whether `/etc/group` lists the user. The socket's own groups are those of the peer's login: a
/// user who was added since is let in by this without logging in anew.
fn listed(group: u32, name: Option<&str>) -> bool {
    let Some(name) = name else { return false };
    line_of("/etc/group", 2, &group.to_string())
        .and_then(|fields| fields.get(3).cloned())
        .is_some_and(|members| members.split(',').any(|member| member == name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_and_our_own_user_are_admins_and_members_operators() {
        assert_eq!(role(0, 500, false), Some(Role::Admin));
        assert_eq!(role(500, 500, false), Some(Role::Admin));
        assert_eq!(role(1000, 500, true), Some(Role::Operator));
        assert_eq!(role(1000, 500, false), None);
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/agent.sock");
        let first = LocalSocket::bind(&path, "no-such-group").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let error = LocalSocket::bind(&path, "no-such-group").unwrap_err();
        assert!(error.cause().unwrap().contains("listens"), "{error}");
        assert!(path.exists());

        // As a killed agent leaves it: the file without a listener.
        let kept = folder.path().join("kept");
        fs::hard_link(&path, &kept).unwrap();
        drop(first);
        assert!(!path.exists(), "a clean end removes the file");
        fs::rename(&kept, &path).unwrap();
        let second = LocalSocket::bind(&path, "no-such-group").unwrap();

        // Somebody put another file there: it is not ours to remove.
        fs::remove_file(&path).unwrap();
        fs::write(&path, "theirs").unwrap();
        drop(second);
        assert!(path.exists());
        let error = LocalSocket::bind(&path, "no-such-group").unwrap_err();
        assert!(error.cause().unwrap().contains("socket"), "{error}");
    }

    #[tokio::test]
    async fn the_kernel_tells_the_peers_groups() {
        // Both ends are this process, whose groups are known by another way.
        let (one, _other) = UnixStream::pair().unwrap();
        let mut told = peer_groups(&one).unwrap();
        let mut own: Vec<u32> = rustix::process::getgroups()
            .unwrap()
            .into_iter()
            .map(rustix::process::Gid::as_raw)
            .collect();
        told.sort_unstable();
        own.sort_unstable();
        assert_eq!(told, own);
    }

    #[tokio::test]
    async fn the_group_owns_the_file_and_the_peer_is_known() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent.sock");
        let own = rustix::process::geteuid().as_raw();
        // The test's own primary group: any user may give a file to it.
        let gid = rustix::process::getegid().as_raw();
        let fields = line_of("/etc/group", 2, &gid.to_string()).unwrap();
        let socket = LocalSocket::bind(&path, &fields[0]).unwrap();
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!(metadata.mode() & 0o777, 0o660);
        assert_eq!(metadata.gid(), gid);
        let (_client, accepted) = tokio::join!(UnixStream::connect(&path), socket.accept());
        let (_, peer) = accepted.unwrap();
        assert_eq!(peer.uid, own);
        assert_eq!(peer.role, Some(Role::Admin));
    }

    /// Connects as another user and says who was seen; `None` where the kernel refused.
    async fn as_user(socket: &LocalSocket, identity: &[&str]) -> Option<LocalPeer> {
        let connect = "use Socket; socket(my $s, AF_UNIX, SOCK_STREAM, 0) or exit 3; \
             connect($s, sockaddr_un($ARGV[0])) or exit 4; sysread($s, my $b, 1);";
        let mut child = tokio::process::Command::new("setpriv")
            .args(identity)
            .args(["perl", "-e", connect])
            .arg(socket.path())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        tokio::select! {
            accepted = socket.accept() => Some(accepted.unwrap().1),
            ended = child.wait() => {
                assert_eq!(ended.unwrap().code(), Some(4), "the client could not try");
                None
            }
        }
    }

    #[tokio::test]
    async fn other_users_are_let_in_by_their_groups_only() {
        if rustix::process::geteuid().as_raw() != 0 {
            println!("skipped: only root can try the socket as other users");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
        // A group that Debian always has and nobody is in.
        let socket = LocalSocket::bind(&folder.path().join("agent.sock"), "games").unwrap();
        let games = format!("--groups={}", group_id("games").unwrap());
        let nobody = ["--reuid=65534", "--regid=65534"];

        let seen = as_user(&socket, &[nobody[0], nobody[1], &games])
            .await
            .unwrap();
        assert_eq!((seen.uid, seen.role), (65534, Some(Role::Operator)));
        assert_eq!(
            as_user(&socket, &[nobody[0], nobody[1], "--clear-groups"]).await,
            None
        );

        // Were the file's mode loosened, the role would still be missing.
        fs::set_permissions(socket.path(), Permissions::from_mode(0o666)).unwrap();
        let seen = as_user(&socket, &[nobody[0], nobody[1], "--clear-groups"])
            .await
            .unwrap();
        assert_eq!((seen.uid, seen.role), (65534, None));
        let seen = as_user(&socket, &["--reuid=0", "--clear-groups"])
            .await
            .unwrap();
        assert_eq!((seen.name.as_str(), seen.role), ("root", Some(Role::Admin)));
    }
}
