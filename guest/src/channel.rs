//! The way to the host: a virtio-serial port, or in tests a Unix socket.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use ghost_proto::guest::PORT_NAME;
use rustix::fs::{Mode, OFlags};

use crate::util::read_bounded;

/// An open channel.
#[derive(Debug)]
pub struct Channel {
    fd: OwnedFd,
    port: bool,
}

impl Channel {
    /// Opens a virtio-serial port, or any other character device that behaves like one.
    ///
    /// # Errors
    /// Those of `open(2)`; `EBUSY` where another process has the port open, which the kernel allows
    /// to one only.
    pub fn open_port(path: &Path) -> io::Result<Self> {
        let fd = rustix::fs::open(
            path,
            OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY,
            Mode::empty(),
        )?;
        Ok(Self { fd, port: true })
    }

    /// Connects to a Unix socket that plays the host.
    ///
    /// # Errors
    /// Those of `connect(2)`.
    pub fn connect(path: &Path) -> io::Result<Self> {
        Self::try_from(UnixStream::connect(path)?)
    }

    /// A port says "end of file" while no host is attached and goes on when one comes; a stream's
    /// end is the end.
    pub(crate) fn is_port(&self) -> bool {
        self.port
    }
}

impl TryFrom<UnixStream> for Channel {
    type Error = io::Error;

    fn try_from(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            fd: stream.into(),
            port: false,
        })
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Where the port is: where udev puts it, or, in a guest without udev, by its name in sysfs.
/// `None` while there is none, as in a VM without the channel or before the driver is loaded.
pub fn find_port(sysroot: &Path) -> Option<PathBuf> {
    let named = sysroot.join("dev/virtio-ports").join(PORT_NAME);
    if named.exists() {
        return Some(named);
    }
    let ports = std::fs::read_dir(sysroot.join("sys/class/virtio-ports")).ok()?;
    for port in ports.flatten().take(1024) {
        let name = read_bounded(port.path().join("name"), 256).unwrap_or_default();
        if name.trim() == PORT_NAME {
            let device = sysroot.join("dev").join(port.file_name());
            if device.exists() {
                return Some(device);
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_is_found_without_udev() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(find_port(root.path()), None);
        for (port, name) in [
            ("vport1p1", "org.qemu.guest_agent.0\n"),
            ("vport1p2", "org.ghost.agent.0\n"),
        ] {
            let class = root.path().join("sys/class/virtio-ports").join(port);
            std::fs::create_dir_all(&class).unwrap();
            std::fs::write(class.join("name"), name).unwrap();
        }
        assert_eq!(find_port(root.path()), None, "no device yet");
        let device = root.path().join("dev/vport1p2");
        std::fs::create_dir_all(root.path().join("dev")).unwrap();
        std::fs::write(&device, "").unwrap();
        assert_eq!(find_port(root.path()), Some(device));
        let named = root.path().join("dev/virtio-ports/org.ghost.agent.0");
        std::fs::create_dir_all(named.parent().unwrap()).unwrap();
        std::fs::write(&named, "").unwrap();
        assert_eq!(find_port(root.path()), Some(named));
    }
}
