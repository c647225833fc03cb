//! What a service of ours needs of its process: signals, a data folder of its own, listeners, and
//! enough files to be open at once.

use std::fs::File;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use ghost_domain::{Error, ErrorCode, Result};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::config::Listen;

/// The machine's own name.
pub fn hostname() -> String {
    rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned()
}

/// The signals that end a service.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// Catches them from now on. Call it within a Tokio runtime.
    ///
    /// # Errors
    /// `Internal`.
    pub fn new() -> Result<Self> {
        let failed = |cause| Error::internal("signals cannot be caught").because(cause);
        Ok(Self {
            terminate: signal(SignalKind::terminate()).map_err(failed)?,
            interrupt: signal(SignalKind::interrupt()).map_err(failed)?,
        })
    }

    /// The name of the next one.
    pub async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// Lets this process have so many files open at once (RLIMIT_NOFILE, getrlimit(2)), as far as the
/// system lets it: up to the hard limit, and beyond it where this is a privileged process. Gives back
/// how many there may be. What is more than enough already stays.
///
/// The soft limit is 1,024 nearly everywhere, for the sake of programs that call select(2); who
/// needs more has to ask (systemd.exec(5), `LimitNOFILE=`).
pub fn raise_open_files(wanted: u64) -> u64 {
    let now = getrlimit(Resource::Nofile);
    let (Some(soft), hard) = (now.current, now.maximum) else {
        return u64::MAX;
    };
    if soft >= wanted {
        return soft;
    }
    let within = hard.map_or(wanted, |hard| hard.min(wanted));
    let tries = [
        Rlimit {
            current: Some(wanted),
            maximum: hard.map(|hard| hard.max(wanted)),
        },
        Rlimit {
            current: Some(within),
            maximum: hard,
        },
    ];
    for limit in tries {
        if setrlimit(Resource::Nofile, limit).is_ok() {
            return limit.current.unwrap_or(u64::MAX);
        }
    }
    soft
}

/// Makes a service's data folder with this mode where it is missing. Nobody else may write to it.
///
/// # Errors
/// `IoFailed`; `hint` says what to do where it cannot be made.
pub fn data_folder(path: &Path, mode: u32, hint: &str) -> Result<()> {
    let failed = |cause: &dyn std::fmt::Display| {
        Error::new(
            ErrorCode::IoFailed,
            format!("the data folder {} cannot be used", path.display()),
        )
        .because(cause)
        .hint(hint)
    };
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .map_err(|cause| failed(&cause))?;
    let metadata = std::fs::metadata(path).map_err(|cause| failed(&cause))?;
    if metadata.mode() & 0o022 != 0 {
        return Err(
            failed(&"others may write to it").hint(format!("chmod go-w {}", path.display()))
        );
    }
    Ok(())
}

/// Takes a data folder for this process alone by its lock file, as long as what is given back is open.
/// Two on one folder would undo each other's work.
///
/// # Errors
/// `IoFailed` where another one has it.
pub fn lock_folder(path: &Path, program: &str, key: &str) -> Result<File> {
    let failed = |cause: &dyn std::fmt::Display| {
        Error::new(
            ErrorCode::IoFailed,
            format!("cannot lock {}", path.display()),
        )
        .because(cause)
    };
    // Nobody else may open it: whoever can, can hold the lock and keep us from starting.
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(path)
        .map_err(|cause| failed(&cause))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(failed(&format!(
            "another {program} runs on this data folder"
        ))
        .hint(format!("stop it first, or set another {key}"))),
        Err(std::fs::TryLockError::Error(cause)) => Err(failed(&cause)),
    }
}

/// Binds a listener; `None` for one that is off.
///
/// # Errors
/// `IoFailed`; `key` names where another address is configured.
pub async fn bind(listen: Listen, what: &str, key: &str) -> Result<Option<TcpListener>> {
    let (address, fallback) = match listen {
        Listen::Off => return Ok(None),
        Listen::At(address) => (address, None),
        // IPv6 takes IPv4 too; a machine without IPv6 has IPv4 alone.
        Listen::All(port) => (
            SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)),
            Some(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))),
        ),
    };
    let bound = match (TcpListener::bind(address).await, fallback) {
        (Err(cause), Some(fallback)) if cause.kind() != std::io::ErrorKind::AddrInUse => {
            TcpListener::bind(fallback).await
        }
        (bound, _) => bound,
    };
    let listener = bound.map_err(|cause| {
        Error::new(
            ErrorCode::IoFailed,
            format!("cannot listen on {address} for {what}"),
        )
        .because(cause)
        .hint(format!(
            "see who has it: ss -ltnp; or set another address in {key}"
        ))
    })?;
    let address = listener.local_addr().unwrap_or(address);
    tracing::info!(%address, "{what} listens");
    Ok(Some(listener))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_one_process_own() {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("a/b");
        data_folder(&data, 0o700, "make it").unwrap();
        let lock = data.join("lock");
        let held = lock_folder(&lock, "ghost-core", "core.data_dir").unwrap();
        let error = lock_folder(&lock, "ghost-core", "core.data_dir").unwrap_err();
        assert!(
            error.cause().unwrap().contains("another ghost-core"),
            "{error}"
        );
        drop(held);
        lock_folder(&lock, "ghost-core", "core.data_dir").unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        std::fs::set_permissions(&data, mode).unwrap();
        let error = data_folder(&data, 0o700, "make it").unwrap_err();
        assert!(error.hint_text().unwrap().contains("chmod go-w"), "{error}");
    }

    #[test]
    fn the_limit_of_open_files_is_only_ever_raised() {
        let now = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        assert_eq!(raise_open_files(1), now, "enough is left as it is");
        let raised = raise_open_files(now.saturating_add(1));
        assert!(raised >= now);
        assert_eq!(
            getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX),
            raised
        );
    }

    #[tokio::test]
    async fn a_taken_port_is_told_with_its_key() {
        let first = bind(
            Listen::At("127.0.0.1:0".parse().unwrap()),
            "gRPC",
            "grpc.listen",
        )
        .await
        .unwrap()
        .unwrap();
        let taken = Listen::At(first.local_addr().unwrap());
        let error = bind(taken, "gRPC", "grpc.listen").await.unwrap_err();
        assert!(
            error.hint_text().unwrap().contains("grpc.listen"),
            "{error}"
        );
        assert!(
            bind(Listen::Off, "gRPC", "grpc.listen")
                .await
                .unwrap()
                .is_none()
        );
    }
}
