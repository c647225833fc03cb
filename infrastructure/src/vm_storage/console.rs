//! Attaching to QEMU's serial console socket.

use std::collections::HashSet;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use ghost_domain::ports::{ConsoleReader, ConsoleSession, ConsoleWriter};
use ghost_domain::{Error, ErrorCode, Result, VmId};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use crate::images::files::io_error;

/// QEMU accepts at once, or it hangs.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A guest that does not read its serial port blocks QEMU's buffer; keystrokes then fail.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// The VMs whose console somebody holds through this agent.
#[derive(Debug, Default)]
pub(super) struct Attached(Mutex<HashSet<VmId>>);

impl Attached {
    fn vms(&self) -> std::sync::MutexGuard<'_, HashSet<VmId>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Gives the console back when both halves are gone.
#[derive(Debug)]
struct Hold {
    attached: Arc<Attached>,
    vm: VmId,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.attached.vms().remove(&self.vm);
    }
}

struct Reader {
    half: OwnedReadHalf,
    _hold: Arc<Hold>,
}

struct Writer {
    half: OwnedWriteHalf,
    _hold: Arc<Hold>,
}

#[async_trait]
impl ConsoleReader for Reader {
    async fn read(&mut self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; 16 * 1024];
        match self.half.read(&mut bytes).await {
            Ok(count) => {
                bytes.truncate(count);
                Ok(bytes)
            }
            // QEMU going down resets the connection: that is the end, not a fault.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(Vec::new()),
            Err(error) => {
                Err(Error::new(ErrorCode::IoFailed, "the console broke off").because(error))
            }
        }
    }
}

#[async_trait]
impl ConsoleWriter for Writer {
    async fn write(&mut self, data: &[u8]) -> Result<()> {
        match tokio::time::timeout(WRITE_TIMEOUT, self.half.write_all(data)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(Error::new(
                ErrorCode::VmNotRunning,
                "the console is closed: the VM went down or was restarted",
            )
            .because(error)),
            Err(_) => Err(Error::new(
                ErrorCode::DeadlineExceeded,
                "the guest does not read its console",
            )),
        }
    }
}

/// Attaches.
pub(super) async fn open(
    attached: &Arc<Attached>,
    vm: VmId,
    path: PathBuf,
) -> Result<ConsoleSession> {
    if !attached.vms().insert(vm) {
        return Err(Error::new(
            ErrorCode::VmBusy,
            "somebody else is attached to the VM's console",
        )
        .because("a serial console has one line, so one person at a time")
        .hint("wait until they detach, or read along with: ghostctl vm logs NAME --follow"));
    }
    let hold = Arc::new(Hold {
        attached: Arc::clone(attached),
        vm,
    });
    let not_running = || {
        Error::new(
            ErrorCode::VmNotRunning,
            "the VM has no console now: it is not running",
        )
        .hint("start it first: ghostctl vm start NAME")
    };
    // A link in its place would lead the console to another service of the host.
    match tokio::fs::symlink_metadata(&path).await {
        Ok(metadata) if metadata.file_type().is_socket() => {}
        Ok(_) => {
            return Err(Error::new(
                ErrorCode::IoFailed,
                format!("{} is not a socket", path.display()),
            )
            .because("somebody replaced the VM's console socket"));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(not_running()),
        Err(error) => return Err(io_error("open", &path, &error)),
    }
    let stream = match tokio::time::timeout(CONNECT_TIMEOUT, UnixStream::connect(&path)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error))
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) =>
        {
            return Err(not_running());
        }
        Ok(Err(error)) => return Err(io_error("connect to", &path, &error)),
        Err(_) => {
            return Err(Error::new(
                ErrorCode::DeadlineExceeded,
                "the VM's console does not answer",
            ));
        }
    };
    let (read, write) = stream.into_split();
    Ok(ConsoleSession {
        reader: Box::new(Reader {
            half: read,
            _hold: Arc::clone(&hold),
        }),
        writer: Box::new(Writer {
            half: write,
            _hold: hold,
        }),
    })
}
