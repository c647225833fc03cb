//! Real connections: what is slow, wrong or too much.

use std::net::SocketAddr;
use std::time::Duration;

use ghost_presentation::Listener;
use ghost_presentation::http::{ServerOptions, serve};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::*;

struct Served {
    shell: Shell,
    address: SocketAddr,
    server: JoinHandle<()>,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.shell.shutdown.cancel();
    }
}

async fn served() -> Served {
    serving(Shell::new().await).await
}

async fn serving(shell: Shell) -> Served {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let options = ServerOptions {
        head: Duration::from_millis(300),
        grace: Duration::from_millis(300),
        ..ServerOptions::default()
    };
    let server = tokio::spawn(serve(
        Listener::Plain(listener),
        shell.router.clone(),
        options,
        shell.shutdown.clone(),
    ));
    Served {
        shell,
        address,
        server,
    }
}

/// Sends bytes and reads to the connection's end.
async fn exchange(address: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    // The server may refuse before it has read everything.
    drop(stream.write_all(bytes).await);
    let mut answer = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut answer));
    drop(read.await.unwrap());
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn garbage_slow_and_oversized_heads_end_only_themselves() {
    let served = served().await;
    let request = "GET /live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    assert!(
        exchange(served.address, request.as_bytes())
            .await
            .starts_with("HTTP/1.1 200")
    );
    let garbage = exchange(served.address, &[0xff; 512]).await;
    assert!(garbage.starts_with("HTTP/1.1 400"), "{garbage}");
    let slow = exchange(served.address, b"GET /live HTTP/1.1\r\nHost:").await;
    assert!(!slow.starts_with("HTTP/1.1 200"), "{slow}");
    let silent = exchange(served.address, b"").await;
    assert!(!silent.starts_with("HTTP/1.1 200"), "{silent}");
    let many = format!("GET /live HTTP/1.1\r\n{}\r\n", "X-A: b\r\n".repeat(1000));
    assert!(
        exchange(served.address, many.as_bytes())
            .await
            .starts_with("HTTP/1.1 431")
    );
    let long = format!("GET /live HTTP/1.1\r\nX-A: {}\r\n\r\n", "b".repeat(1 << 20));
    assert!(
        !exchange(served.address, long.as_bytes())
            .await
            .starts_with("HTTP/1.1 200")
    );
    assert!(
        exchange(served.address, request.as_bytes())
            .await
            .starts_with("HTTP/1.1 200")
    );
}

#[tokio::test]
async fn a_shutdown_cuts_what_does_not_end() {
    let mut served = served().await;
    let mut idle = TcpStream::connect(served.address).await.unwrap();
    let key = &served.shell.key;
    let request =
        format!("GET /v1/vms/web/logs?follow=true HTTP/1.1\r\nHost: x\r\nX-API-Key: {key}\r\n\r\n");
    idle.write_all(request.as_bytes()).await.unwrap();
    let mut first = [0u8; 15];
    idle.read_exact(&mut first).await.unwrap();
    assert_eq!(&first, b"HTTP/1.1 200 OK");
    served.shell.shutdown.cancel();
    tokio::time::timeout(Duration::from_secs(10), &mut served.server)
        .await
        .unwrap()
        .unwrap();
    let mut rest = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(10), idle.read_to_end(&mut rest));
    assert!(read.await.is_ok(), "the connection was not ended");
    assert!(
        TcpStream::connect(served.address).await.is_err(),
        "nobody listens any more"
    );
}

#[tokio::test]
async fn a_download_ends_with_its_checksum_on_the_wire() {
    let served = serving(Shell::running().await).await;
    let guest = &served.shell.world.knobs.guest;
    guest.put("/f", b"hallo");
    let key = &served.shell.key;
    let request = format!(
        "GET /v1/vms/web/files?path=/f HTTP/1.1\r\nHost: x\r\nX-API-Key: {key}\r\nTE: trailers\r\nConnection: close\r\n\r\n"
    );
    let sum = hex::encode(crate::guests::sum_of(b"hallo").checksum);
    let answer = exchange(served.address, request.as_bytes()).await;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.contains("\r\ntransfer-encoding: chunked"), "{head}");
    assert_eq!(
        body,
        format!("5\r\nhallo\r\n0\r\nx-ghost-checksum: {sum}\r\n\r\n")
    );

    // Cut off in the middle there is no last chunk, so that nobody takes it for the whole.
    guest.put("/f", &vec![b'x'; 900_000]);
    guest
        .breaks_after
        .store(1, std::sync::atomic::Ordering::SeqCst);
    let answer = exchange(served.address, request.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 200"));
    assert!(!answer.ends_with("0\r\n\r\n") && !answer.contains("x-ghost-checksum: "));
}
