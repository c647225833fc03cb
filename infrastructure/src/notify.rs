//! Telling systemd how we fare, by the protocol of sd_notify(3): datagrams to `$NOTIFY_SOCKET`.
//! Where systemd did not start us nothing is told.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// The way to systemd, if it started us.
#[derive(Debug)]
pub struct Notifier {
    socket: Option<(UnixDatagram, SocketAddr)>,
}

impl Notifier {
    /// Reads `$NOTIFY_SOCKET`: a path, or `@name` for the abstract name space.
    pub fn from_environment() -> Self {
        let address =
            std::env::var("NOTIFY_SOCKET")
                .ok()
                .and_then(|name| match name.strip_prefix('@') {
                    Some(name) => SocketAddr::from_abstract_name(name).ok(),
                    None => SocketAddr::from_pathname(name).ok(),
                });
        Self {
            socket: address
                .zip(UnixDatagram::unbound().ok())
                .map(|(address, socket)| (socket, address)),
        }
    }

    fn tell(&self, state: &str) {
        if let Some((socket, address)) = &self.socket
            && let Err(error) = socket.send_to_addr(state.as_bytes(), address)
        {
            tracing::debug!(%error, "systemd cannot be told");
        }
    }

    /// The program serves.
    pub fn ready(&self) {
        self.tell("READY=1\nSTATUS=running");
    }

    /// The program is on its way down.
    pub fn stopping(&self) {
        self.tell("STOPPING=1\nSTATUS=draining");
    }

    /// The program is alive and well.
    pub fn watchdog(&self) {
        self.tell("WATCHDOG=1");
    }
}

/// How often systemd wants to hear: half of `$WATCHDOG_USEC`, as sd_watchdog_enabled(3) advises;
/// `None` where it does not watch this process.
pub fn watchdog_interval() -> Option<Duration> {
    let number = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
    if number("WATCHDOG_PID").is_some_and(|pid| pid != u64::from(std::process::id())) {
        return None;
    }
    let micros = number("WATCHDOG_USEC").filter(|micros| *micros > 0)?;
    Some(Duration::from_micros(micros / 2))
}
