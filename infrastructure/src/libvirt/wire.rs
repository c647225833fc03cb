//! One question in libvirt's own protocol, to learn whether a daemon answers at all.
//!
//! Opening a connection with libvirt's library waits for ever when the daemon takes the connection
//! but is stopped or wedged. So before each opening we ask over a socket of our own, which we can
//! give up on: the list of authentication methods, the one thing that a client may ask before it
//! has said who it is. Source: <https://libvirt.org/kbase/internals/rpc.html> and
//! `src/remote/remote_protocol.x` (program `0x20008086` version 1, procedure 66 AUTH_LIST), which
//! are libvirt's stable wire format.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

/// length, program, version, procedure, type (call), serial, status; all big-endian.
const AUTH_LIST: [u32; 7] = [28, 0x2000_8086, 1, 66, 0, 1, 0];

/// The Unix socket behind a URI, where that can be told without asking libvirt.
pub(crate) fn socket_of(uri: &str) -> Option<PathBuf> {
    let (scheme, rest) = uri.split_once("://")?;
    if scheme != "qemu" && scheme != "qemu+unix" {
        return None;
    }
    let (authority_path, query) = rest.split_once('?').unwrap_or((rest, ""));
    if let Some(socket) = query
        .split('&')
        .find_map(|pair| pair.strip_prefix("socket="))
    {
        // A percent sign would need decoding that only libvirt's rules define; let libvirt try.
        return (!socket.contains('%')).then(|| PathBuf::from(socket));
    }
    // The order of libvirt's client: the modular daemon's socket where there is one.
    (authority_path == "/system" && query.is_empty()).then(|| {
        ["/run/libvirt/virtqemud-sock", "/run/libvirt/libvirt-sock"]
            .into_iter()
            .map(PathBuf::from)
            .find(|path| path.exists())
            .unwrap_or_else(|| PathBuf::from("/run/libvirt/libvirt-sock"))
    })
}

/// Asks once.
///
/// # Errors
/// Why nobody answers.
pub(crate) fn answers(socket: &std::path::Path, within: Duration) -> Result<(), String> {
    let shown = socket.display();
    let mut stream = UnixStream::connect(socket)
        .map_err(|error| format!("cannot connect to {shown}: {error}"))?;
    let failed = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => {
            format!("libvirt at {shown} does not answer")
        }
        _ => format!("libvirt at {shown} closed the connection: {error}"),
    };
    stream.set_read_timeout(Some(within)).map_err(failed)?;
    stream.set_write_timeout(Some(within)).map_err(failed)?;
    let call: Vec<u8> = AUTH_LIST
        .iter()
        .flat_map(|word| word.to_be_bytes())
        .collect();
    stream.write_all(&call).map_err(failed)?;
    let mut length = [0u8; 4];
    stream.read_exact(&mut length).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_told_from_uris() {
        assert_eq!(
            socket_of("qemu+unix:///system?socket=/tmp/x"),
            Some(PathBuf::from("/tmp/x"))
        );
        assert!(socket_of("qemu:///system").is_some());
        assert_eq!(socket_of("test:///default"), None);
        assert_eq!(socket_of("qemu+ssh://host/system"), None);
        assert_eq!(socket_of("nonsense"), None);
    }

    #[test]
    fn a_silent_or_absent_daemon_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        assert!(answers(&path, Duration::from_secs(5)).is_err());
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let error = answers(&path, Duration::from_millis(50)).unwrap_err();
        assert!(error.contains("does not answer"), "{error}");
    }
}
