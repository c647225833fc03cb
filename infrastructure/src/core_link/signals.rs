//! What makes it worth to connect anew at once: this host woke, its network changed, or somebody
//! asked for it.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};
use rustix::time::{ClockId, clock_gettime};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Why to look at the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Signal {
    /// Somebody asked to connect anew.
    Reconnect,
    /// The host slept, or this process was stopped.
    Wake,
    /// Links, addresses or routes changed.
    Network,
}

/// How often the clocks are looked at.
const LOOK: Duration = Duration::from_secs(2);
/// A sleep that shows in the clocks only from here on.
const SLEPT: Duration = Duration::from_secs(5);
/// A timer that is later than this was not run: the process was stopped, or the machine.
const OVERSHOT: Duration = Duration::from_secs(10);
/// Changes of the network come in bursts; the burst is one change.
const BURST: Duration = Duration::from_millis(300);

/// Sends `Wake` where this host slept.
pub(super) async fn watch_sleep(signals: mpsc::Sender<Signal>, stop: CancellationToken) {
    let mut last = Clocks::now();
    loop {
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            () = stop.cancelled() => return,
        }
        let now = Clocks::now();
        if let Some(slept) = now.slept_since(last) {
            tracing::info!(seconds = slept.as_secs(), "this host was asleep");
            // A full queue holds signals enough.
            let _ = signals.try_send(Signal::Wake);
        }
        last = now;
    }
}

/// The clock that stands still while the machine sleeps, and the one that does not
/// (clock_gettime(2)).
#[derive(Clone, Copy, Debug)]
struct Clocks {
    monotonic: Duration,
    boot: Duration,
}

impl Clocks {
    fn now() -> Self {
        let read = |clock| {
            let time = clock_gettime(clock);
            Duration::new(
                u64::try_from(time.tv_sec).unwrap_or(0),
                u32::try_from(time.tv_nsec).unwrap_or(0),
            )
        };
        Self {
            monotonic: read(ClockId::Monotonic),
            boot: read(ClockId::Boottime),
        }
    }

    /// For how long the machine slept or the process was stopped since `earlier`, which was one
    /// look ago; `None`: not for long.
    fn slept_since(self, earlier: Self) -> Option<Duration> {
        let awake = self.monotonic.saturating_sub(earlier.monotonic);
        let passed = self.boot.saturating_sub(earlier.boot);
        let asleep = passed.saturating_sub(awake) >= SLEPT;
        let stopped = awake >= LOOK + OVERSHOT;
        (asleep || stopped).then(|| passed.saturating_sub(LOOK))
    }
}

/// Sends `Network` where links, addresses or routes change (rtnetlink(7)). A host without netlink
/// does without: the silence of a dead link is noticed anyway, only later.
pub(super) async fn watch_network(signals: mpsc::Sender<Signal>, stop: CancellationToken) {
    let socket = match open() {
        Ok(socket) => socket,
        Err(error) => {
            tracing::warn!(%error, "changes of the network are not noticed");
            return;
        }
    };
    loop {
        tokio::select! {
            changed = next_change(&socket) => if let Err(error) = changed {
                tracing::warn!(%error, "changes of the network are not noticed any more");
                return;
            },
            () = stop.cancelled() => return,
        }
        tokio::select! {
            () = tokio::time::sleep(BURST) => {}
            () = stop.cancelled() => return,
        }
        // A full queue holds signals enough.
        let _ = signals.try_send(Signal::Network);
    }
}

/// Multicast groups of rtnetlink(7), as `nl_groups` wants them.
const GROUPS: u32 = 0x1 /* RTMGRP_LINK */
    | 0x10 /* RTMGRP_IPV4_IFADDR */
    | 0x40 /* RTMGRP_IPV4_ROUTE */
    | 0x100 /* RTMGRP_IPV6_IFADDR */
    | 0x400 /* RTMGRP_IPV6_ROUTE */;

fn open() -> io::Result<AsyncFd<OwnedFd>> {
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    bind(&socket, &SocketAddrNetlink::new(0, GROUPS))?;
    // SAFETY: an `OwnedFd` always names the same open descriptor and closes it only when it is
    // dropped, which `AsyncFd` does after it took the descriptor out of the poller.
    Ok(unsafe { AsyncFd::register(socket) }?)
}

/// Waits for a change, and takes all that there are.
async fn next_change(socket: &AsyncFd<OwnedFd>) -> io::Result<()> {
    loop {
        let mut guard = socket.readable().await?;
        let mut any = false;
        loop {
            let mut buffer = [0; 8192];
            match recv(socket.get_ref(), &mut buffer[..], RecvFlags::empty()) {
                Ok(_) => any = true,
                // Some were lost, as there were too many: a change all the same.
                Err(rustix::io::Errno::NOBUFS) => any = true,
                Err(rustix::io::Errno::AGAIN) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        guard.clear_ready();
        if any {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clocks(monotonic: u64, boot: u64) -> Clocks {
        Clocks {
            monotonic: Duration::from_secs(monotonic),
            boot: Duration::from_secs(boot),
        }
    }

    #[test]
    fn sleep_and_stops_are_told_from_a_busy_host() {
        let before = clocks(100, 500);
        assert_eq!(clocks(102, 502).slept_since(before), None);
        // Late, as on a host that swaps.
        assert_eq!(clocks(108, 508).slept_since(before), None);
        // Suspended for ten minutes.
        assert!(clocks(102, 1102).slept_since(before).is_some());
        // SIGSTOP for ten minutes.
        assert!(clocks(702, 1102).slept_since(before).is_some());
        // A clock that cannot go back does no harm where it does.
        assert_eq!(clocks(0, 0).slept_since(before), None);
    }

    /// In a network namespace of its own thread, so that this host's network stays as it is.
    #[test]
    fn a_change_of_the_network_is_told() {
        std::thread::spawn(|| {
            // SAFETY: only the network namespace of this thread changes; no memory or descriptor is
            // shared differently by it.
            let own =
                unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) };
            if let Err(error) = own {
                println!("skipped: no network namespace can be made here: {error}");
                return;
            }
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let (signals, mut signalled) = mpsc::channel(8);
                let stop = CancellationToken::new();
                let watching = tokio::spawn(watch_network(signals, stop.clone()));
                tokio::task::yield_now().await;
                assert!(!watching.is_finished());
                assert!(signalled.try_recv().is_err());
                let up = std::process::Command::new("ip")
                    .args(["link", "set", "lo", "up"])
                    .status();
                if !up.is_ok_and(|status| status.success()) {
                    println!("skipped: there is no ip(8)");
                    return;
                }
                assert_eq!(signalled.recv().await, Some(Signal::Network));
                stop.cancel();
                watching.await.unwrap();
            });
        })
        .join()
        .unwrap();
    }
}
