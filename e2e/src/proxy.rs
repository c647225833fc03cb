//! A private door to libvirtd: what goes through it can be cut and can be made to hang, while
//! everybody else's libvirtd goes on.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Where libvirtd listens on Debian.
pub const LIBVIRTD: &str = "/var/run/libvirt/libvirt-sock";

/// What the door does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Mode {
    /// Lets everything through.
    Open = 0,
    /// Takes connections and bytes, and answers nothing: a hung libvirtd.
    Hung = 1,
    /// Connections are cut and new ones refused: a stopped libvirtd.
    Shut = 2,
    /// It is being dropped.
    Gone = 3,
}

/// The door; gone when dropped.
pub struct Proxy {
    path: PathBuf,
    mode: Arc<AtomicU8>,
    acceptor: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Opens it at `path`, leading to `target`.
    ///
    /// # Errors
    /// Where the socket cannot be made.
    pub fn open(path: &Path, target: &Path) -> io::Result<Self> {
        let mode = Arc::new(AtomicU8::new(Mode::Open as u8));
        let first = bind(path)?;
        let (at, to, shared) = (path.to_owned(), target.to_owned(), Arc::clone(&mode));
        let acceptor = std::thread::spawn(move || accept(first, &at, &to, &shared));
        Ok(Self {
            path: path.to_owned(),
            mode,
            acceptor: Some(acceptor),
        })
    }

    /// The libvirt URI through it.
    pub fn uri(&self) -> String {
        format!("qemu+unix:///system?socket={}", self.path.display())
    }

    /// libvirtd is stopped.
    pub fn shut(&self) {
        self.mode.store(Mode::Shut as u8, Ordering::SeqCst);
    }

    /// libvirtd hangs.
    pub fn hang(&self) {
        self.mode.store(Mode::Hung as u8, Ordering::SeqCst);
    }

    /// All is well again.
    pub fn heal(&self) {
        self.mode.store(Mode::Open as u8, Ordering::SeqCst);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.mode.store(Mode::Gone as u8, Ordering::SeqCst);
        if let Some(acceptor) = self.acceptor.take() {
            drop(acceptor.join());
        }
        drop(std::fs::remove_file(&self.path));
    }
}

fn bind(path: &Path) -> io::Result<UnixListener> {
    drop(std::fs::remove_file(path));
    let listener = UnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn accept(first: UnixListener, path: &Path, target: &Path, mode: &Arc<AtomicU8>) {
    let mut listener = Some(first);
    loop {
        let now = mode.load(Ordering::SeqCst);
        if now == Mode::Gone as u8 {
            return;
        }
        if now == Mode::Shut as u8 {
            // Whoever knocks is refused.
            listener = None;
            drop(std::fs::remove_file(path));
        } else if listener.is_none() {
            listener = bind(path).ok();
        }
        match listener.as_ref().map(UnixListener::accept) {
            Some(Ok((client, _))) => {
                if let Ok(server) = UnixStream::connect(target) {
                    pump_both(client, server, mode);
                }
            }
            _ => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

fn pump_both(client: UnixStream, server: UnixStream, mode: &Arc<AtomicU8>) {
    let ends = (client.try_clone(), server.try_clone());
    let (Ok(client_too), Ok(server_too)) = ends else {
        return;
    };
    for (from, to) in [(client, server_too), (server, client_too)] {
        let mode = Arc::clone(mode);
        std::thread::spawn(move || {
            drop(pump(&from, &to, &mode));
            drop(from.shutdown(Shutdown::Both));
            drop(to.shutdown(Shutdown::Both));
        });
    }
}

fn pump(mut from: &UnixStream, mut to: &UnixStream, mode: &AtomicU8) -> io::Result<()> {
    from.set_read_timeout(Some(Duration::from_millis(20)))?;
    let mut buffer = [0; 65536];
    loop {
        let now = mode.load(Ordering::SeqCst);
        if now == Mode::Shut as u8 || now == Mode::Gone as u8 {
            return Ok(());
        }
        if now == Mode::Hung as u8 {
            std::thread::sleep(Duration::from_millis(10));
            continue;
        }
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(read) => to.write_all(&buffer[..read])?,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                ) => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_passes_hangs_shuts_and_heals() {
        let folder = tempfile::tempdir().unwrap();
        let (inner, outer) = (folder.path().join("in"), folder.path().join("out"));
        // An echo.
        let listener = UnixListener::bind(&inner).unwrap();
        std::thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                std::thread::spawn(move || {
                    let mut copy = stream.try_clone().unwrap();
                    drop(io::copy(&mut copy, &mut stream));
                });
            }
        });
        let proxy = Proxy::open(&outer, &inner).unwrap();
        let ask = |stream: &mut UnixStream| -> io::Result<[u8; 2]> {
            stream.set_read_timeout(Some(Duration::from_millis(300)))?;
            stream.write_all(b"hi")?;
            let mut answer = [0; 2];
            stream.read_exact(&mut answer)?;
            Ok(answer)
        };
        let mut stream = UnixStream::connect(&outer).unwrap();
        assert_eq!(&ask(&mut stream).unwrap(), b"hi");
        proxy.hang();
        // What is under way may still pass.
        crate::wait::until("it hangs", Duration::from_secs(10), || {
            ask(&mut stream).err()
        });
        proxy.shut();
        crate::wait::until("it is shut", Duration::from_secs(10), || {
            UnixStream::connect(&outer).err()
        });
        proxy.heal();
        crate::wait::until("it is open again", Duration::from_secs(10), || {
            ask(&mut UnixStream::connect(&outer).ok()?).ok()
        });
    }
}
