//! What strangers and broken clients send.

use bytes::Bytes;
use ghost_proto::agent::v1::WhoAmIRequest;
use ghost_proto::agent::v1::access_service_client::AccessServiceClient;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::Code;

use super::roles::call;
use super::*;

/// The server still answers.
async fn alive(served: &Served) {
    let mut client = AccessServiceClient::new(served.local().await);
    client.who_am_i(WhoAmIRequest {}).await.unwrap();
    let identity = served.ca.client(served.world.viewer);
    let mut client = AccessServiceClient::new(served.remote(Some(identity)).await);
    client.who_am_i(WhoAmIRequest {}).await.unwrap();
}

async fn ends(mut stream: impl tokio::io::AsyncRead + Unpin) {
    let mut rest = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut rest));
    // Ended or reset: both are an end.
    assert!(read.await.is_ok(), "the connection was not ended");
}

#[tokio::test]
async fn garbage_on_the_ports_ends_only_itself() {
    let served = Served::new().await;
    let garbage: [&[u8]; 5] = [
        b"GET / HTTP/1.1\r\n\r\n",
        &[0; 64],
        &[0xff; 4096],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n",
    ];
    for bytes in garbage {
        let mut tcp = TcpStream::connect(served.address).await.unwrap();
        tcp.write_all(bytes).await.unwrap();
        ends(tcp).await;
        let mut local = UnixStream::connect(&served.socket).await.unwrap();
        local.write_all(bytes).await.unwrap();
        ends(local).await;
    }
    alive(&served).await;
}

#[tokio::test]
async fn whoever_says_nothing_is_shown_the_door() {
    let served = Served::new().await;
    ends(TcpStream::connect(served.address).await.unwrap()).await;
    ends(UnixStream::connect(&served.socket).await.unwrap()).await;
    alive(&served).await;
}

#[tokio::test]
async fn connections_are_capped_for_each_listener() {
    let served = Served::with(|options| options.connections.most = 1).await;
    let identity = served.ca.client(served.world.viewer);
    let mut first = AccessServiceClient::new(served.remote(Some(identity)).await);
    first.who_am_i(WhoAmIRequest {}).await.unwrap();
    ends(TcpStream::connect(served.address).await.unwrap()).await;
    // The local socket has its own budget, and who is in stays in.
    let mut local = AccessServiceClient::new(served.local().await);
    local.who_am_i(WhoAmIRequest {}).await.unwrap();
    first.who_am_i(WhoAmIRequest {}).await.unwrap();
}

#[tokio::test]
async fn messages_that_do_not_decode_or_are_too_large_are_refused() {
    let served = Served::new().await;
    let channel = served.local().await;
    let path = "/ghost.agent.v1.VmService/Get";
    let status = call(&channel, path, Bytes::from_static(b"\xff\xff\xff"))
        .await
        .unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::InvalidArgument, "invalid_argument")
    );
    let large = Bytes::from(vec![0u8; 4 * 1024 * 1024 + 1]);
    let status = call(&channel, path, large).await.unwrap_err();
    assert_eq!(reason(&status), "payload_too_large");
    alive(&served).await;
}

#[tokio::test]
async fn random_messages_to_every_method_never_end_the_server() {
    let served = Served::new().await;
    let channel = served.local().await;
    // A small generator with a fixed seed: the same bytes in every run.
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    for method in ghost_presentation::grpc::access::METHODS {
        for length in [1, 3, 9] {
            let bytes: Vec<u8> = (0..length).flat_map(|_| next()).collect();
            let outcome = call(&channel, method.path, Bytes::from(bytes)).await;
            if let Err(status) = outcome {
                assert_ne!(reason(&status), "internal", "{}: {status:?}", method.path);
            }
        }
    }
    alive(&served).await;
}
