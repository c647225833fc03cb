//! The link to one VM: connecting to the socket at which QEMU listens, again and again, and what of
//! it outlives a connection.
//!
//! # Letting go of a port in a flood
//! Where the host hangs up while QEMU waits with the rest of what a guest has written (the socket is
//! full), QEMU takes that buffer off the port's queue and never gives it back to the guest (seen with
//! QEMU 10.0: `virtqueue_detach_element` in `hw/char/virtio-serial-bus.c`). A queue has 128 of them;
//! when all are lost, that port is dumb until the guest restarts. So whoever is held off is not hung
//! up on: its channel is left unread, which costs nothing and stops it by its own full queue, and it
//! is let go once it is quiet. At the orderly end of the host's agent every channel is let go as
//! [`let_go`] says; docs/GUEST.md has the figures.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ghost_domain::guest::GuestLinkStatus;
use ghost_domain::ports::GuestEvent;
use ghost_domain::{Error, Result, VmId};
use parking_lot::Mutex;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Shared;
use super::connection::{Connection, Ended};
use super::pace::Bucket;
use super::session::{Session, unreachable};
use super::wire::Wire;

/// QEMU accepts at once, or it hangs.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);
/// How much in how long is so little that QEMU had no need to wait: far less than a socket holds, and
/// longer than it is kept from running on a busy host.
const QUIET: (usize, Duration) = (64 * 1024, Duration::from_millis(500));
/// What is thrown away at the end of a hold-off, before a guest is said to flood on: more than the
/// queue of its port and the socket hold.
const MOST_LEFT: usize = 8 << 20;
/// Thrown away at a time, and the pause after it: others have their turn.
const PIECE: (usize, Duration) = (128 * 1024, Duration::from_millis(2));
/// Silence after which nothing is under way any more when a channel is let go, and how long that is
/// waited for.
const LEFTOVERS: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(300));
/// A guest that behaved for so long has paid for what it did.
const FORGIVEN_AFTER: Duration = Duration::from_secs(600);

#[derive(Debug)]
pub(super) struct Link {
    pub(super) vm: VmId,
    pub(super) shared: Arc<Shared>,
    pub(super) stop: CancellationToken,
    /// What is known besides the session.
    pub(super) status: Mutex<GuestLinkStatus>,
    /// The agent that greeted, while it is there.
    pub(super) session: watch::Sender<Option<Arc<Session>>>,
    pub(super) memory: Mutex<Memory>,
}

/// What is remembered of a guest from one connection to the next.
#[derive(Debug)]
pub(super) struct Memory {
    pub(super) boot_id: Option<String>,
    /// New lives of the agent or the guest that are believed.
    pub(super) restarts: Bucket,
    /// Connections one after the other that were given up because nothing came.
    pub(super) mutes: u32,
    /// The connection before was held off, and nothing came since: its port may have lost its voice.
    pub(super) flooded: bool,
}

impl Link {
    pub(super) fn new(vm: VmId, shared: Arc<Shared>) -> Self {
        Self {
            vm,
            shared,
            stop: CancellationToken::new(),
            status: Mutex::default(),
            session: watch::Sender::new(None),
            memory: Mutex::new(Memory {
                boot_id: None,
                restarts: Bucket::new(8.0, 0.2),
                mutes: 0,
                flooded: false,
            }),
        }
    }

    /// The session that runs.
    ///
    /// # Errors
    /// `GuestUnreachable` with what is missing.
    pub(super) fn session(&self) -> Result<Arc<Session>> {
        match &*self.session.borrow() {
            Some(session) => Ok(Arc::clone(session)),
            None => Err(self.unreachable()),
        }
    }

    fn unreachable(&self) -> Error {
        let status = self.status.lock();
        if let Some(until) = status.held_off_until {
            let wait = until.since(self.shared.clock.monotonic());
            return unreachable("it broke the rules of the protocol and is held off")
                .retry_after(wait);
        }
        if !status.channel {
            return unreachable(match &status.channel_error {
                Some(error) => error,
                None => "its channel was not connected yet",
            });
        }
        if status.silent_since.is_some() {
            return unreachable("the guest is silent: it is paused, hangs, or its agent is stuck");
        }
        unreachable("no agent has said hello: it is not installed, or the guest still boots").hint(
            "wait for it: ghostctl vm wait NAME --for agent; and see: ghostctl guest status NAME",
        )
    }

    /// Ends the session, where there is one, and tells.
    pub(super) fn end_session(&self, reason: &str) {
        let Some(session) = self.session.send_replace(None) else {
            return;
        };
        let calls = session.lose(&unreachable(reason));
        tracing::info!(vm_id = %self.vm, reason, calls, "the guest's agent is gone");
        self.shared.events.tell(&GuestEvent::Disconnected {
            vm: self.vm,
            reason: reason.to_owned(),
        });
    }

    /// Keeps the link until it is stopped.
    pub(super) async fn run(self: Arc<Self>, socket: PathBuf) {
        let limits = &self.shared.limits;
        let mut pause = limits.reconnect.0;
        let mut hold_off = limits.hold_off.0;
        let mut held_off_at: Option<Instant> = None;
        loop {
            let connected = tokio::select! {
                () = self.stop.cancelled() => break,
                connected = connect(&socket) => connected,
            };
            let wait = match connected {
                Err(cause) => {
                    {
                        let mut status = self.status.lock();
                        status.channel = false;
                        status.channel_error = Some(cause);
                    }
                    let wait = pause;
                    pause = (pause * 2).min(limits.reconnect.1);
                    wait
                }
                Ok(stream) => {
                    {
                        let mut status = self.status.lock();
                        status.channel = true;
                        status.channel_error = None;
                        status.violations = 0;
                    }
                    let mut connection = Connection::new(Arc::clone(&self), stream);
                    let ended = tokio::select! {
                        () = self.stop.cancelled() => None,
                        ended = connection.run() => Some(ended),
                    };
                    if connection.has_greeted() {
                        pause = limits.reconnect.0;
                    }
                    let wire = connection.keep();
                    let Some(ended) = ended else {
                        let_go(&wire, limits.parting).await;
                        break;
                    };
                    match ended {
                        Ended::Lost(cause) => {
                            wire.close();
                            self.disconnected(&cause);
                            let wait = pause;
                            pause = (pause * 2).min(limits.reconnect.1);
                            wait
                        }
                        // To whoever looks the channel is still there: nothing else was known of it.
                        Ended::Mute => {
                            wire.close();
                            limits.reconnect.0
                        }
                        // Whoever is held off stays connected.
                        Ended::Misbehaved(mut detail) => {
                            self.disconnected("it broke the rules of the protocol");
                            self.memory.lock().flooded = true;
                            loop {
                                if held_off_at.is_some_and(|at| at.elapsed() > FORGIVEN_AFTER) {
                                    hold_off = limits.hold_off.0;
                                }
                                let wait = hold_off;
                                hold_off = (hold_off * 2).min(limits.hold_off.1);
                                held_off_at = Some(Instant::now() + wait);
                                self.hold_off(wait, &detail);
                                let quiet = async {
                                    tokio::time::sleep(wait).await;
                                    is_quiet(&wire.stream).await
                                };
                                tokio::select! {
                                    () = self.stop.cancelled() => break,
                                    quiet = quiet => if quiet { break },
                                }
                                "a flood that goes on while it is held off".clone_into(&mut detail);
                            }
                            let_go(&wire, limits.parting).await;
                            Duration::ZERO
                        }
                    }
                }
            };
            tokio::select! {
                () = self.stop.cancelled() => break,
                () = tokio::time::sleep(wait) => {}
            }
            self.status.lock().held_off_until = None;
        }
    }

    fn disconnected(&self, cause: &str) {
        {
            let mut status = self.status.lock();
            status.channel = false;
            status.channel_error = Some(cause.to_owned());
            status.silent_since = None;
        }
        self.end_session(cause);
    }

    fn hold_off(&self, wait: Duration, detail: &str) {
        let until = self.shared.clock.monotonic().after(wait);
        self.status.lock().held_off_until = Some(until);
        tracing::warn!(vm_id = %self.vm, detail, seconds = wait.as_secs(), "the guest breaks the rules of the protocol and is held off");
        self.shared.events.tell(&GuestEvent::Misbehaved {
            vm: self.vm,
            detail: detail.to_owned(),
        });
    }

    /// Stops it; takes effect before it returns.
    pub(super) fn stop(&self, reason: &str) {
        self.stop.cancel();
        self.end_session(reason);
    }
}

/// Throws away what has come, and says whether so little comes now that the channel can be let go.
async fn is_quiet(stream: &UnixStream) -> bool {
    let mut buffer = vec![0; PIECE.0];
    let mut left = MOST_LEFT;
    loop {
        // What comes within this window.
        let mut came = 0;
        let window = Instant::now() + QUIET.1;
        while tokio::time::timeout_at(window, stream.readable())
            .await
            .is_ok()
        {
            match stream.try_read(&mut buffer) {
                Ok(count @ 1..) => {
                    came += count;
                    left = left.saturating_sub(count);
                }
                Err(error)
                    if matches!(
                        error.kind(),
                        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted
                    ) => {}
                // Nobody is there any more.
                Ok(0) | Err(_) => return true,
            }
            if left == 0 {
                return false;
            }
            tokio::time::sleep(PIECE.1).await;
        }
        if came < QUIET.0 {
            return true;
        }
    }
}

/// Lets go of a channel so that QEMU keeps nothing back of what the guest sends, where that can be had:
/// an agent whose session has ended stops sending, and once all that is under way was read, nothing is
/// there that a hang-up could cost. QEMU is then told that we write no more, which it takes for the end
/// of the connection, and what it still hands over is read until it has hung up itself: a plain hang-up
/// would fail its next write. A guest that floods on whatever we do loses one buffer to this.
async fn let_go(wire: &Wire, most: Duration) {
    let mut buffer = vec![0; PIECE.0];
    let parting = async {
        let quiet = drain(&wire.stream, &mut buffer, Some(LEFTOVERS.0));
        drop(tokio::time::timeout(LEFTOVERS.1, quiet).await);
        if rustix::net::shutdown(&wire.stream, rustix::net::Shutdown::Write).is_ok() {
            drain(&wire.stream, &mut buffer, None).await;
        }
    };
    // QEMU does not look for our end while the guest takes nothing.
    drop(tokio::time::timeout(LEFTOVERS.1 + most, parting).await);
    wire.close();
}

/// Reads and throws away, until the other side has gone or nothing has come for a while.
async fn drain(stream: &UnixStream, buffer: &mut [u8], quiet: Option<Duration>) {
    loop {
        match stream.try_read(buffer) {
            Ok(0) => return,
            Ok(_) => tokio::task::yield_now().await,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                let readable = match quiet {
                    Some(quiet) => tokio::time::timeout(quiet, stream.readable()).await,
                    None => Ok(stream.readable().await),
                };
                if !matches!(readable, Ok(Ok(()))) {
                    return;
                }
            }
            Err(_) => return,
        }
    }
}

/// Connects, to a socket and to nothing that a link leads to.
async fn connect(path: &Path) -> Result<UnixStream, String> {
    use std::os::unix::fs::FileTypeExt;
    match tokio::fs::symlink_metadata(path).await {
        Ok(metadata) if metadata.file_type().is_socket() => {}
        Ok(_) => return Err("what lies in the place of its socket is none".to_owned()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(
                "its socket is not there: the VM has no channel for an agent, or does not run"
                    .to_owned(),
            );
        }
        Err(error) => return Err(format!("its socket cannot be looked at: {error}")),
    }
    match tokio::time::timeout(CONNECT_PATIENCE, UnixStream::connect(path)).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => Err(format!("its socket takes no connection: {error}")),
        Err(_) => Err("its socket does not answer".to_owned()),
    }
}
