//! A session and the one task that drives it.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::task::AtomicWaker;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use super::stream::TunnelStream;
use super::transport::Transport;
use super::{Closed, Limits, Side};

/// How long the peer may take to read the last of a session that we close.
const CLOSE_TIME: Duration = Duration::from_secs(5);
/// Streams that yamux may know beyond those that are open: dropped ones that it has not yet told
/// the peer of.
const SPARE_STREAMS: usize = 64;

/// A session: the handle opens streams, `incoming` gives those that the peer opens.
#[derive(Debug)]
pub struct Session {
    /// Opens streams, closes the session. It ends when the last handle is dropped.
    pub handle: TunnelHandle,
    /// Streams that the peer opened; where nobody receives, they are reset.
    pub incoming: mpsc::Receiver<TunnelStream>,
}

/// Makes a session of a connection and drives it by a task of the current runtime.
pub fn begin<T>(io: T, side: Side, limits: Limits) -> Session
where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let shared = Arc::new(Shared::new(limits));
    let streams = limits.incoming + limits.outgoing + SPARE_STREAMS;
    let mut config = yamux::Config::default();
    // Lowered first, as each setter holds the two against each other.
    config
        .set_max_num_streams(0)
        .set_max_connection_receive_window(Some(
            streams * yamux::DEFAULT_CREDIT as usize + limits.growth,
        ))
        .set_max_num_streams(streams);
    let mode = match side {
        Side::Client => yamux::Mode::Client,
        Side::Server => yamux::Mode::Server,
    };
    let transport = Transport::new(io, Arc::clone(&shared));
    let (asks, asked) = mpsc::unbounded_channel();
    // As many as may be open: a stream always finds room.
    let (give, incoming) = mpsc::channel(limits.incoming.max(1));
    let driver = Driver {
        connection: yamux::Connection::new(transport, config, mode),
        asked,
        waiting: VecDeque::new(),
        give,
        ending: Ending(Arc::clone(&shared)),
    };
    tokio::spawn(driver.run());
    Session {
        handle: TunnelHandle { asks, shared },
        incoming,
    }
}

/// Opens streams and closes the session.
#[derive(Clone)]
pub struct TunnelHandle {
    asks: mpsc::UnboundedSender<Ask>,
    shared: Arc<Shared>,
}

impl TunnelHandle {
    /// Opens a stream. The peer learns of it at once.
    ///
    /// Waits only while 256 streams that this side opened are not acknowledged; bound it by a
    /// timeout where that matters.
    ///
    /// # Errors
    /// `NotConnected` where the session is over; `QuotaExceeded` where too many are open.
    pub async fn open(&self) -> io::Result<TunnelStream> {
        let (answer, answered) = oneshot::channel();
        if self.asks.send(Ask::Open(answer)).is_err() {
            return Err(self.shared.not_connected());
        }
        match answered.await {
            Ok(opened) => opened,
            Err(_) => Err(self.shared.not_connected()),
        }
    }

    /// Ends the session: tells the peer, for at most five seconds. Streams end with it.
    pub fn close(&self, reason: impl Into<String>) {
        // Where nobody listens any more the session is over.
        let _ = self.asks.send(Ask::Close(reason.into()));
    }

    /// Resolves when the session is over.
    pub async fn closed(&self) -> Closed {
        let mut ended = self.shared.ended.subscribe();
        match ended.wait_for(Option::is_some).await {
            Ok(closed) => closed.clone().unwrap_or(Closed::Peer),
            Err(_) => Closed::Lost("the session is gone".into()),
        }
    }

    /// Why it is over, where it is.
    pub fn ended(&self) -> Option<Closed> {
        self.shared.ended()
    }

    /// Open streams: those that the peer opened, and ours.
    pub fn streams(&self) -> (usize, usize) {
        (
            self.shared.incoming.load(Ordering::Acquire),
            self.shared.outgoing.load(Ordering::Acquire),
        )
    }

    /// For how long nothing has come from the peer.
    pub fn silence(&self) -> Duration {
        self.shared.silence()
    }
}

impl fmt::Debug for TunnelHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TunnelHandle")
            .field("streams", &self.streams())
            .field("ended", &self.ended())
            .finish_non_exhaustive()
    }
}

enum Ask {
    Open(oneshot::Sender<io::Result<TunnelStream>>),
    Close(String),
}

/// What the driver, the handles and the streams of a session have in common.
pub(super) struct Shared {
    limits: Limits,
    incoming: AtomicUsize,
    outgoing: AtomicUsize,
    /// Streams that were dropped, and that yamux perhaps still counts.
    dropped: AtomicUsize,
    /// Whether the peer takes nothing at the moment.
    blocked: AtomicBool,
    begun: Instant,
    /// When something came last, in milliseconds since `begun`.
    heard: AtomicU64,
    ended: watch::Sender<Option<Closed>>,
    /// Whom to wake at the end.
    readers: Mutex<HashMap<u32, Arc<AtomicWaker>>>,
}

impl Shared {
    fn new(limits: Limits) -> Self {
        Self {
            limits,
            incoming: AtomicUsize::new(0),
            outgoing: AtomicUsize::new(0),
            dropped: AtomicUsize::new(0),
            blocked: AtomicBool::new(false),
            begun: Instant::now(),
            heard: AtomicU64::new(0),
            ended: watch::Sender::new(None),
            readers: Mutex::new(HashMap::new()),
        }
    }

    pub(super) fn ended(&self) -> Option<Closed> {
        self.ended.borrow().clone()
    }

    pub(super) fn set_blocked(&self, blocked: bool) {
        self.blocked.store(blocked, Ordering::Release);
    }

    pub(super) fn note_heard(&self) {
        let now = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.heard.store(now, Ordering::Release);
    }

    fn silence(&self) -> Duration {
        let heard = Duration::from_millis(self.heard.load(Ordering::Acquire));
        self.begun.elapsed().saturating_sub(heard)
    }

    fn counter(&self, incoming: bool) -> &AtomicUsize {
        if incoming {
            &self.incoming
        } else {
            &self.outgoing
        }
    }

    pub(super) fn count_in(&self, id: u32, incoming: bool, waker: Arc<AtomicWaker>) {
        self.counter(incoming).fetch_add(1, Ordering::AcqRel);
        self.readers.lock().insert(id, waker);
    }

    pub(super) fn count_out(&self, id: u32, incoming: bool) {
        self.readers.lock().remove(&id);
        self.dropped.fetch_add(1, Ordering::AcqRel);
        self.counter(incoming).fetch_sub(1, Ordering::AcqRel);
    }

    /// Whether yamux itself has room for one more. It gives the whole session up where it is asked
    /// for one too many.
    fn has_room(&self) -> bool {
        let known = self.incoming.load(Ordering::Acquire)
            + self.outgoing.load(Ordering::Acquire)
            + self.dropped.load(Ordering::Acquire);
        known < self.limits.incoming + self.limits.outgoing + SPARE_STREAMS
    }

    fn not_connected(&self) -> io::Error {
        let cause = self
            .ended()
            .map_or_else(|| "the session is over".to_owned(), |one| one.to_string());
        io::Error::new(io::ErrorKind::NotConnected, cause)
    }
}

/// Tells everybody of the end, also where the driver was aborted or panicked.
struct Ending(Arc<Shared>);

impl Ending {
    fn tell(&self, closed: Closed) {
        let first = self.0.ended.send_if_modified(|ended| {
            let first = ended.is_none();
            if first {
                *ended = Some(closed);
            }
            first
        });
        if first {
            let readers: Vec<_> = self.0.readers.lock().values().cloned().collect();
            for reader in readers {
                reader.wake();
            }
        }
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.tell(Closed::Lost("its task ended".into()));
    }
}

struct Driver<T> {
    connection: yamux::Connection<Transport<T>>,
    asked: mpsc::UnboundedReceiver<Ask>,
    waiting: VecDeque<oneshot::Sender<io::Result<TunnelStream>>>,
    give: mpsc::Sender<TunnelStream>,
    ending: Ending,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Driver<T> {
    async fn run(mut self) {
        let closed = poll_fn(|context| self.step(context)).await;
        if let Closed::Ours(_) = closed {
            let closing = poll_fn(|context| self.connection.poll_close(context));
            // A peer that reads nothing is left; the connection drops with the driver.
            let _ = tokio::time::timeout(CLOSE_TIME, closing).await;
        }
        self.ending.tell(closed);
    }

    fn step(&mut self, context: &mut Context<'_>) -> Poll<Closed> {
        loop {
            loop {
                match self.asked.poll_recv(context) {
                    Poll::Ready(Some(Ask::Open(answer))) => self.waiting.push_back(answer),
                    Poll::Ready(Some(Ask::Close(reason))) => {
                        return Poll::Ready(Closed::Ours(reason));
                    }
                    Poll::Ready(None) => {
                        return Poll::Ready(Closed::Ours("nobody uses it any more".into()));
                    }
                    Poll::Pending => break,
                }
            }
            let dropped = self.shared().dropped.load(Ordering::Acquire);
            match self.connection.poll_next_inbound(context) {
                Poll::Ready(Some(Ok(stream))) => {
                    self.take(stream, context);
                    continue;
                }
                Poll::Ready(Some(Err(error))) => return Poll::Ready(closed_by(error)),
                Poll::Ready(None) => return Poll::Ready(Closed::Peer),
                Poll::Pending => {}
            }
            // With nothing left to write, yamux has looked at all that its streams said, also that
            // they are gone.
            if !self.shared().blocked.load(Ordering::Acquire) {
                self.shared().dropped.fetch_sub(dropped, Ordering::AcqRel);
            }
            match self.open_waiting(context) {
                Ok(false) => return Poll::Pending,
                // Their first frames want to be sent.
                Ok(true) => {}
                Err(error) => return Poll::Ready(closed_by(error)),
            }
        }
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.ending.0
    }

    /// Gives a stream out that the peer opened; one too many is dropped, which resets it.
    fn take(&self, stream: yamux::Stream, context: &mut Context<'_>) {
        let shared = self.shared();
        let full = shared.incoming.load(Ordering::Acquire) >= shared.limits.incoming;
        let mut stream = TunnelStream::new(stream, true, Arc::clone(shared));
        if full {
            tracing::debug!("the other side opens too many streams; one was reset");
            return;
        }
        stream.announce(context);
        if let Err(refused) = self.give.try_send(stream) {
            tracing::debug!(%refused, "nobody takes a stream that was opened; it was reset");
        }
    }

    /// Opens what is asked for; says whether a stream was opened.
    fn open_waiting(&mut self, context: &mut Context<'_>) -> Result<bool, yamux::ConnectionError> {
        let mut any = false;
        while let Some(answer) = self.waiting.pop_front() {
            if answer.is_closed() {
                continue;
            }
            let shared = self.shared();
            let full = shared.outgoing.load(Ordering::Acquire) >= shared.limits.outgoing;
            if full || !shared.has_room() {
                // One who went away does not mind.
                let _ = answer.send(Err(io::Error::new(
                    io::ErrorKind::QuotaExceeded,
                    "too many streams are open on this link",
                )));
                continue;
            }
            match self.connection.poll_new_outbound(context) {
                Poll::Ready(Ok(stream)) => {
                    let mut stream = TunnelStream::new(stream, false, Arc::clone(self.shared()));
                    stream.announce(context);
                    any = true;
                    // Where the asker went away meanwhile, the stream is reset.
                    drop(answer.send(Ok(stream)));
                }
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => {
                    self.waiting.push_front(answer);
                    break;
                }
            }
        }
        Ok(any)
    }
}

fn closed_by(error: yamux::ConnectionError) -> Closed {
    use yamux::{ConnectionError, FrameDecodeError};
    match error {
        ConnectionError::Closed => Closed::Peer,
        ConnectionError::Io(error) | ConnectionError::Decode(FrameDecodeError::Io(error)) => {
            Closed::Lost(match error.kind() {
                // What rustls says of it is for those who program with it.
                io::ErrorKind::UnexpectedEof => "the other side went away without a word".into(),
                _ => error.to_string(),
            })
        }
        ConnectionError::NoMoreStreamIds => {
            Closed::Ours("all stream numbers are used up".to_owned())
        }
        error => Closed::Protocol(error.to_string()),
    }
}
