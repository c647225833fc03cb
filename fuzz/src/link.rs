//! What an agent makes of whatever Core, or one who took Core's place, sends it: the control stream's
//! frames, the messages in them, a WebSocket of Piko's, and the token by which a host joins.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use ghost_infrastructure::core_link::reading;
use ghost_infrastructure::tunnel::messages::{MessageReader, MessageWriter};
use ghost_proto::core::v1::link_message::Kind;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

/// Bytes that come in pieces of one size, and a place where everything that is written is lost.
struct Pieces<'a> {
    data: &'a [u8],
    piece: usize,
}

impl AsyncRead for Pieces<'_> {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let count = this.piece.min(this.data.len()).min(buffer.remaining());
        let (now, rest) = this.data.split_at(count);
        buffer.put_slice(now);
        this.data = rest;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Pieces<'_> {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Nothing here waits: what reads is always ready.
fn run<T>(work: impl Future<Output = T>) -> Option<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .ok()?;
    Some(runtime.block_on(async {
        tokio::time::timeout(Duration::from_secs(60), work)
            .await
            .expect("it hangs")
    }))
}

/// All messages of a stream, and how it ended.
async fn messages(data: &[u8], piece: usize) -> (Vec<Kind>, Option<io::ErrorKind>) {
    let mut reader = MessageReader::new(Pieces { data, piece });
    let mut found = Vec::new();
    loop {
        match reader.next().await {
            Ok(Some(kind)) => found.push(kind),
            Ok(None) => return (found, None),
            Err(error) => return (found, Some(error.kind())),
        }
    }
}

/// The control stream of a link: the same is found however the bytes are cut, what was read can be
/// said again, and every message is one that both sides know what to do with.
pub fn core_link(data: &[u8], take: impl Fn(Kind)) {
    let Some((first, rest)) = data.split_first() else {
        return;
    };
    run(async {
        let whole = messages(rest, rest.len().max(1)).await;
        let pieces = messages(rest, usize::from(*first).max(1)).await;
        // NaN is not equal to itself; as text it is.
        assert_eq!(format!("{whole:?}"), format!("{pieces:?}"));
        for kind in whole.0 {
            let mut again = MessageWriter::new(Vec::new());
            if again.queue(kind.clone()).is_ok() {
                again.flush().await.expect("into memory");
                let again = std::mem::take(again.get_mut());
                let (found, end) = messages(&again, 7).await;
                assert_eq!((found.len(), end), (1, None));
                assert_eq!(format!("{:?}", found[0]), format!("{kind:?}"));
            }
            reading::message(kind.clone());
            take(kind);
        }
    });
}

/// Frames of a WebSocket, as Piko's server sends them: never more comes out than went in, and the
/// stream comes to an end.
pub fn piko_socket(data: &[u8]) {
    let Some((first, rest)) = data.split_first() else {
        return;
    };
    run(async {
        let pieces = Pieces {
            data: rest,
            piece: usize::from(*first).max(1),
        };
        let mut socket = reading::web_socket(pieces).await;
        let (mut buffer, mut read) = ([0; 997], 0);
        // An error or the end, and nothing after that.
        while let Ok(count @ 1..) = socket.read(&mut buffer).await {
            read += count;
            assert!(read <= rest.len(), "more came out than went in");
        }
    });
}

/// A token as somebody pasted it: what is no token is refused without being shown.
pub fn host_token(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    match reading::host_token(&text) {
        Ok(addresses) => {
            assert!(!addresses.is_empty() && addresses.len() <= 16);
            for address in addresses {
                let (host, port) = address.rsplit_once(':').expect("host:port");
                assert!(!host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0));
                assert!(!address.chars().any(|c| c.is_control() || c.is_whitespace()));
            }
        }
        Err(error) => {
            let said = format!("{error} {error:?}");
            for part in text.split('.').filter(|part| part.len() > 40) {
                assert!(!said.contains(part), "a part of the token is shown");
            }
        }
    }
}
