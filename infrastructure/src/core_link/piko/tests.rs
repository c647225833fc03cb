//! Against a small server that speaks Piko's protocol. It shares what we believe of it; what is known
//! of real servers was seen with an unmodified 0.7.0 (endpoints with `/` answered 404, foreign
//! endpoints 401, links closed at the token's `exp`, sessions killed after 75 s without an
//! acknowledgement). `PIKO_URL` names a real one for the last test.

use std::sync::atomic::{AtomicU16, Ordering};

use futures::{SinkExt, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::server::{
    ErrorResponse, Request as ServerRequest, Response as ServerResponse,
};

use super::*;

/// A token as an issuer writes it; nobody here checks its signature.
fn token(endpoint: &str, lives: Duration) -> String {
    let exp = SystemTime::now().duration_since(UNIX_EPOCH).unwrap() + lives;
    let claims = serde_json::json!({
        "exp": exp.as_secs(),
        "piko": { "endpoints": [endpoint] },
    });
    let part = |text: &str| URL_SAFE_NO_PAD.encode(text);
    format!(
        "{}.{}.signature",
        part(r#"{"alg":"HS256"}"#),
        part(&claims.to_string())
    )
}

/// A connection that a host made.
struct Upstream {
    socket: WebSocketStream<TcpStream>,
    path: String,
    authorization: Option<String>,
}

struct FakePiko {
    url: String,
    upstreams: mpsc::Receiver<Upstream>,
    /// The status that is answered to the next hosts; 0: they are let in.
    status: Arc<AtomicU16>,
    asked: mpsc::Receiver<u16>,
}

impl FakePiko {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (give, upstreams) = mpsc::channel(8);
        let (told, asked) = mpsc::channel(64);
        let status = Arc::new(AtomicU16::new(0));
        let answer = Arc::clone(&status);
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let (mut path, mut authorization) = (String::new(), None);
                let answer = answer.load(Ordering::SeqCst);
                let _ = told.try_send(answer);
                #[expect(clippy::result_large_err, reason = "the library's own type")]
                let callback = |request: &ServerRequest, response: ServerResponse| {
                    path = request.uri().path().to_owned();
                    let header = request.headers().get("authorization");
                    authorization = header.map(|value| value.to_str().unwrap().to_owned());
                    if answer == 0 {
                        return Ok(response);
                    }
                    let mut refused = ErrorResponse::new(Some(r#"{"error":"no"}"#.to_owned()));
                    *refused.status_mut() = StatusCode::from_u16(answer).unwrap();
                    Err(refused)
                };
                let accepted = tokio_tungstenite::accept_hdr_async(tcp, callback).await;
                if let Ok(socket) = accepted {
                    let _ = give
                        .send(Upstream {
                            socket,
                            path,
                            authorization,
                        })
                        .await;
                }
            }
        });
        Self {
            url,
            upstreams,
            status,
            asked,
        }
    }

    async fn next(&mut self) -> Upstream {
        self.upstreams.recv().await.unwrap()
    }

    /// The next host, as Piko's server sees it: a session on which it opens streams.
    async fn session(&mut self) -> Session {
        let (io, _) = ByteSocket::new(self.next().await.socket);
        begin(io, Side::Server, Limits::CORE)
    }
}

fn options(piko: &FakePiko) -> PikoOptions {
    PikoOptions {
        server_url: piko.url.clone(),
        endpoint: "tenant-acme/server-001".into(),
        token: PikoToken::None,
        tenant: None,
        authority: None,
        reconnect: BackoffOptions {
            initial: Duration::from_millis(10),
            most: Duration::from_millis(50),
            multiplier: 2.0,
        },
    }
}

struct Running {
    service: Arc<PikoService>,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Running {
    fn start(options: PikoOptions, pace: Pace) -> Self {
        let mut service = PikoService::new(options).unwrap();
        service.pace = pace;
        let service = Arc::new(service);
        let stop = CancellationToken::new();
        let task = tokio::spawn({
            let (service, stop) = (Arc::clone(&service), stop.clone());
            async move { service.run(stop).await }
        });
        Self {
            service,
            stop,
            task,
        }
    }

    async fn until(&self, is_so: impl Fn(&PikoState) -> bool) {
        let waiting = async {
            while !is_so(&self.service.state()) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), waiting)
            .await
            .unwrap_or_else(|_| panic!("{:?}", self.service.state()));
    }

    async fn end(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }
}

#[tokio::test]
async fn connections_come_to_the_local_listener() {
    let mut piko = FakePiko::start().await;
    let running = Running::start(
        PikoOptions {
            token: PikoToken::Fixed(Secret::new("a.b.c")),
            ..options(&piko)
        },
        Pace::default(),
    );
    let local = TcpListener::bind("127.0.0.1:0").await.unwrap();
    tokio::spawn(forward(
        running.service.incoming().unwrap(),
        local.local_addr().unwrap(),
        running.stop.clone(),
    ));
    let upstream = piko.next().await;
    assert_eq!(upstream.path, "/piko/v1/upstream/tenant-acme--server-001");
    assert_eq!(upstream.authorization.as_deref(), Some("Bearer a.b.c"));
    let (io, _) = ByteSocket::new(upstream.socket);
    let session = begin(io, Side::Server, Limits::CORE);
    let mut caller = session.handle.open().await.unwrap();
    assert_eq!(caller.id() % 2, 0, "Piko opens, with even numbers");
    caller.write_all(b"hello").await.unwrap();
    let (mut served, _) = local.accept().await.unwrap();
    let mut hello = [0; 5];
    served.read_exact(&mut hello).await.unwrap();
    let large = vec![7; 1_000_000];
    let (sent, received) = tokio::join!(
        async {
            served.write_all(&large).await.unwrap();
            served.shutdown().await
        },
        async {
            let mut received = vec![0; large.len()];
            caller.read_exact(&mut received).await.unwrap();
            received
        }
    );
    sent.unwrap();
    assert!(received == large);
    running.end().await;
    assert!(session.handle.closed().await.is_orderly());
}

#[tokio::test]
async fn a_server_that_refuses_is_not_asked_again_and_one_that_is_busy_is() {
    for status in [401, 403, 404, 410] {
        let mut piko = FakePiko::start().await;
        piko.status.store(status, Ordering::SeqCst);
        let running = Running::start(options(&piko), Pace::default());
        running
            .until(|state| matches!(state, PikoState::Refused { reason } if reason.contains(&status.to_string())))
            .await;
        assert_eq!(piko.asked.recv().await, Some(status));
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(piko.asked.try_recv().is_err());
        running.end().await;
    }
    for status in [408, 429, 500, 502, 503, 504] {
        let mut piko = FakePiko::start().await;
        piko.status.store(status, Ordering::SeqCst);
        let running = Running::start(options(&piko), Pace::default());
        for _ in 0..3 {
            assert_eq!(piko.asked.recv().await, Some(status));
        }
        piko.status.store(0, Ordering::SeqCst);
        let _session = piko.session().await;
        running.until(|state| *state == PikoState::Up).await;
        running.end().await;
    }
}

#[tokio::test]
async fn a_connection_without_frames_is_dead_and_pings_keep_it() {
    let mut piko = FakePiko::start().await;
    let pace = Pace {
        dead: Duration::from_millis(400),
        look: Duration::from_millis(20),
        ..Pace::default()
    };
    let running = Running::start(options(&piko), pace);
    let mut upstream = piko.next().await;
    running.until(|state| *state == PikoState::Up).await;
    // For longer than it takes to be dead.
    for _ in 0..10 {
        upstream
            .socket
            .send(Message::Ping(bytes::Bytes::from_static(b"7")))
            .await
            .unwrap();
        let pong = loop {
            match upstream.socket.next().await.unwrap().unwrap() {
                Message::Pong(payload) => break payload,
                Message::Binary(_) => {}
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(&pong[..], b"7");
        tokio::time::sleep(Duration::from_millis(60)).await;
        assert_eq!(running.service.state(), PikoState::Up);
    }
    let _silent = upstream;
    let _next = piko.next().await;
    running.end().await;
}

#[tokio::test]
async fn text_and_garbage_end_the_connection_and_nothing_else() {
    let mut piko = FakePiko::start().await;
    let running = Running::start(options(&piko), Pace::default());
    for evil in [
        Message::text("hello"),
        Message::binary(vec![0xff; 100]),
        Message::Close(None),
    ] {
        let mut upstream = piko.next().await;
        upstream.socket.send(evil).await.unwrap();
        while let Some(Ok(_)) = upstream.socket.next().await {}
    }
    let _good = piko.session().await;
    running.until(|state| *state == PikoState::Up).await;
    running.end().await;
}

#[tokio::test]
async fn a_token_is_replaced_before_it_ends_and_streams_go_on() {
    let mut piko = FakePiko::start().await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("token");
    let first = token("tenant-acme--server-001", Duration::from_secs(30));
    std::fs::write(&path, format!("{first}\n")).unwrap();
    let pace = Pace {
        look: Duration::from_millis(20),
        ..Pace::default()
    };
    let running = Running::start(
        PikoOptions {
            token: PikoToken::File(path.clone()),
            ..options(&piko)
        },
        pace,
    );
    let mut streams = running.service.incoming().unwrap();
    let upstream = piko.next().await;
    assert_eq!(upstream.authorization, Some(format!("Bearer {first}")));
    let (io, _) = ByteSocket::new(upstream.socket);
    let old = begin(io, Side::Server, Limits::CORE);
    let mut caller = old.handle.open().await.unwrap();
    caller.write_all(b"1").await.unwrap();
    let mut served = streams.recv().await.unwrap();
    // It ends within the margin, and there is no newer one yet: the connection stays.
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(old.handle.ended(), None);

    let second = token("tenant-acme--server-001", Duration::from_secs(3600));
    std::fs::write(&path, &second).unwrap();
    let upstream = piko.next().await;
    assert_eq!(upstream.authorization, Some(format!("Bearer {second}")));
    served.write_all(b"still here").await.unwrap();
    let mut answer = [0; 10];
    caller.read_exact(&mut answer).await.unwrap();
    assert_eq!(running.service.state(), PikoState::Up);
    drop((served, caller));
    assert!(old.handle.closed().await.is_orderly());
    running.end().await;
}

#[test]
fn options_are_checked_and_endpoints_mapped() {
    assert_eq!(endpoint("acme/pc"), Some("acme--pc".into()));
    for bad in ["", "/", "a//b", "../a", "a/..", "a b", "ä", "a%2Fb"] {
        assert_eq!(endpoint(bad), None, "{bad}");
    }
    let target = |server_url: &str| {
        Target::new(PikoOptions {
            server_url: server_url.into(),
            endpoint: "pc".into(),
            token: PikoToken::None,
            tenant: None,
            authority: None,
            reconnect: BackoffOptions::default(),
        })
    };
    let one = target("https://piko.example/base/").unwrap();
    assert_eq!(
        one.address.as_str(),
        "wss://piko.example/base/piko/v1/upstream/pc"
    );
    assert_eq!((one.port, one.secure), (443, true));
    let one = target("http://[::1]:8001").unwrap();
    assert_eq!((one.port, one.secure), (8001, false));
    for bad in ["", "piko.example", "ftp://x", "http://"] {
        assert!(target(bad).is_err(), "{bad}");
    }
    assert!(ends_at(&token("x", Duration::ZERO)).is_some());
    for odd in ["", "a.b.c", "a..c", "a.e30.c"] {
        assert_eq!(ends_at(odd), None, "{odd}");
    }
}

/// A server that is really Piko. `PIKO_URL` is its upstream port (`http://127.0.0.1:8001`),
/// `PIKO_PROXY_URL` its proxy port (`http://127.0.0.1:8000`), `PIKO_TOKEN` a token where it asks for
/// one.
#[tokio::test]
async fn a_real_piko_server_carries_a_request() {
    let (Ok(server_url), Ok(proxy)) = (std::env::var("PIKO_URL"), std::env::var("PIKO_PROXY_URL"))
    else {
        println!("skipped: PIKO_URL and PIKO_PROXY_URL do not name a Piko server");
        return;
    };
    let endpoint = format!("ghost-test-{}", uuid::Uuid::new_v4().simple());
    let running = Running::start(
        PikoOptions {
            server_url,
            endpoint: endpoint.clone(),
            token: std::env::var("PIKO_TOKEN").map_or(PikoToken::None, |token| {
                PikoToken::Fixed(Secret::new(token))
            }),
            tenant: None,
            authority: None,
            reconnect: BackoffOptions::default(),
        },
        Pace::default(),
    );
    let mut streams = running.service.incoming().unwrap();
    running.until(|state| *state == PikoState::Up).await;
    tokio::spawn(async move {
        while let Some(mut stream) = streams.recv().await {
            let mut request = [0; 4096];
            let _ = stream.read(&mut request).await;
            let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nghost";
            let _ = stream.write_all(answer).await;
            let _ = stream.shutdown().await;
        }
    });
    let proxy = Url::parse(&proxy).unwrap();
    let address = (
        proxy.host_str().unwrap(),
        proxy.port_or_known_default().unwrap(),
    );
    let mut caller = TcpStream::connect(address).await.unwrap();
    let request = format!(
        "GET / HTTP/1.1\r\nHost: x\r\nx-piko-endpoint: {endpoint}\r\nConnection: close\r\n\r\n"
    );
    caller.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    caller.read_to_string(&mut answer).await.unwrap();
    assert!(answer.ends_with("ghost"), "{answer}");
    running.end().await;
}
