//! Sessions over real WebSockets.

use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::{SinkExt, StreamExt};
use ghost_domain::Principal;
use ghost_presentation::Listener;
use ghost_presentation::http::{ServerOptions, serve};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

use super::*;

pub(super) type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

pub(super) struct Served {
    pub(super) shell: Shell,
    address: SocketAddr,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.shell.shutdown.cancel();
    }
}

pub(super) async fn served() -> Served {
    let options = Options {
        recheck: Duration::from_millis(20),
        batwa: true,
        ..Options::default()
    };
    let shell = Shell::of(World::running().await, options).await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(serve(
        Listener::Plain(listener),
        shell.router.clone(),
        ServerOptions::default(),
        shell.shutdown.clone(),
    ));
    Served { shell, address }
}

impl Served {
    pub(super) async fn connect(
        &self,
        path: &str,
        headers: &[(&str, &str)],
    ) -> Result<Socket, Error> {
        let mut request = format!("ws://{}{path}", self.address)
            .into_client_request()
            .unwrap();
        for (name, value) in headers {
            let name: axum::http::HeaderName = name.parse().unwrap();
            request.headers_mut().insert(name, value.parse().unwrap());
        }
        connect_async(request).await.map(|(socket, _)| socket)
    }

    async fn open(&self, path: &str) -> Socket {
        let key = self.shell.key.clone();
        self.connect(path, &[("x-api-key", &key)]).await.unwrap()
    }

    async fn exec(&self, body: &str) -> Socket {
        let mut socket = self.open("/v1/vms/web/exec").await;
        socket.send(Message::text(body)).await.unwrap();
        socket
    }
}

/// The next frame that says something.
pub(super) async fn next(socket: &mut Socket) -> Message {
    loop {
        let frame = tokio::time::timeout(Duration::from_secs(20), socket.next()).await;
        match frame.unwrap().unwrap().unwrap() {
            Message::Ping(_) | Message::Pong(_) => {}
            frame => return frame,
        }
    }
}

async fn told(socket: &mut Socket) -> serde_json::Value {
    let frame = next(socket).await;
    serde_json::from_str(frame.to_text().unwrap()).unwrap()
}

async fn closed(socket: &mut Socket) -> CloseCode {
    match next(socket).await {
        Message::Close(Some(frame)) => frame.code,
        other => panic!("{other:?}"),
    }
}

pub(super) fn status(error: Error) -> (u16, String) {
    let Error::Http(response) = error else {
        panic!("{error:?}");
    };
    let body = response.body().as_deref().unwrap_or_default();
    let problem: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    let code = problem["code"].as_str().unwrap_or_default().to_owned();
    (response.status().as_u16(), code)
}

#[tokio::test]
async fn a_shell_is_typed_into_resized_and_signalled() {
    let served = served().await;
    let mut socket = served
        .open("/v1/vms/web/shell?user=ghost&rows=30&columns=100&term=vt100")
        .await;
    assert_eq!(told(&mut socket).await["pid"], 4711);
    socket.send(Message::binary(&b"ls\r"[..])).await.unwrap();
    assert_eq!(next(&mut socket).await, Message::binary(&b"ls\r"[..]));
    for text in [
        r#"{"type":"resize","rows":50,"columns":200}"#,
        r#"{"type":"resize","rows":0,"columns":200}"#,
        r#"{"type":"signal","number":99}"#,
        r#"{"type":"signal","number":2}"#,
    ] {
        socket.send(Message::text(text)).await.unwrap();
    }
    let exit = told(&mut socket).await;
    assert_eq!(
        (&exit["type"], &exit["signal"]),
        (&"exited".into(), &2.into())
    );
    assert!(exit["exit_code"].is_null());
    assert_eq!(closed(&mut socket).await, CloseCode::Normal);
    let guest = &served.shell.world.knobs.guest;
    assert_eq!(
        *guest.controls.lock().unwrap(),
        ["resize 50 200", "signal 2"]
    );
    let ran = guest.ran.lock().unwrap();
    let terminal = ran[0].terminal.clone().unwrap();
    assert_eq!(
        (terminal.rows, terminal.columns, terminal.kind.as_str()),
        (30, 100, "vt100")
    );
    assert_eq!(ran[0].user.as_deref(), Some("ghost"));
}

#[tokio::test]
async fn a_console_is_typed_into_and_ends_with_its_vm() {
    let served = served().await;
    let mut socket = served.open("/v1/vms/web/console").await;
    // A client that takes it for a terminal says sizes.
    let size = r#"{"type":"resize","rows":50,"columns":200}"#;
    socket.send(Message::text(size)).await.unwrap();
    socket.send(Message::binary(&b"ls\r"[..])).await.unwrap();
    assert_eq!(next(&mut socket).await, Message::binary(&b"ls\r"[..]));
    socket.send(Message::binary(&b"q"[..])).await.unwrap();
    assert_eq!(told(&mut socket).await["type"], "ended");
    assert_eq!(closed(&mut socket).await, CloseCode::Normal);
    assert_eq!(
        *served.shell.world.knobs.typed.lock().unwrap(),
        b"ls\rq".to_vec()
    );

    // Who may not enter guests does not type on their consoles either, nor does a page of others.
    let viewer = served.shell.world.key(Role::Viewer).await;
    let refused = served
        .connect("/v1/vms/web/console", &[("x-api-key", &viewer)])
        .await;
    assert_eq!(
        status(refused.unwrap_err()),
        (403, "permission_denied".into())
    );
    let key = served.shell.key.clone();
    let evil = [
        ("x-api-key", key.as_str()),
        ("origin", "https://evil.example"),
    ];
    let refused = served.connect("/v1/vms/web/console", &evil).await;
    assert_eq!(
        status(refused.unwrap_err()),
        (403, "permission_denied".into())
    );
    let absent = served
        .connect("/v1/vms/absent/console", &[("x-api-key", &key)])
        .await;
    assert_eq!(status(absent.unwrap_err()), (404, "vm_not_found".into()));

    // A lockdown cuts it.
    let mut socket = served.open("/v1/vms/web/console").await;
    let lockdown = ghost_application::guest::SetLockdownCommand {
        active: true,
        ..Default::default()
    };
    let set = &served.shell.world.use_cases().set_lockdown;
    set.execute(&Principal::agent(), lockdown).await.unwrap();
    assert_eq!(told(&mut socket).await["error"]["code"], "lockdown");
    assert_eq!(closed(&mut socket).await, CloseCode::Policy);
}

#[tokio::test]
async fn an_exec_session_tells_the_streams_apart_and_ends_with_the_exit() {
    let served = served().await;
    let mut socket = served.exec(r#"{"program":"both"}"#).await;
    assert_eq!(told(&mut socket).await["type"], "started");
    assert_eq!(
        next(&mut socket).await,
        Message::binary(&b"\x01Linux web 6.1\n"[..])
    );
    assert_eq!(next(&mut socket).await, Message::binary(&b"\x02oops\n"[..]));
    assert_eq!(told(&mut socket).await["exit_code"], 3);
    assert_eq!(closed(&mut socket).await, CloseCode::Normal);

    let mut socket = served.exec(r#"{"program":"cat","stdin":true}"#).await;
    told(&mut socket).await;
    socket.send(Message::binary(&b"x"[..])).await.unwrap();
    assert_eq!(next(&mut socket).await, Message::binary(&b"\x01x"[..]));
    socket
        .send(Message::text(r#"{"type":"stdin_end"}"#))
        .await
        .unwrap();
    assert_eq!(told(&mut socket).await["exit_code"], 0);

    let mut socket = served.exec(r#"{"program":"large"}"#).await;
    told(&mut socket).await;
    let mut bytes = [0; 3];
    loop {
        match next(&mut socket).await {
            Message::Binary(data) => {
                assert!(data.len() <= 256 * 1024 + 1);
                bytes[usize::from(data[0])] += data.len() - 1;
            }
            Message::Text(_) => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(bytes, [0, 2 << 20, 1 << 20]);
}

#[tokio::test]
async fn whoever_hangs_up_or_does_not_read_harms_nobody_else() {
    let served = served().await;
    let guest = &served.shell.world.knobs.guest;
    let stalled = served.exec(r#"{"program":"flood"}"#).await;
    until(|| guest.flooded.load(Ordering::SeqCst) > 0).await;
    for _ in 0..20 {
        let mut socket = served.exec(r#"{"program":"true"}"#).await;
        told(&mut socket).await;
        assert_eq!(told(&mut socket).await["exit_code"], 0);
    }
    let taken = guest.flooded.load(Ordering::SeqCst) * 64 * 1024;
    assert!(
        taken < 32 << 20,
        "{taken} bytes are held for a client who does not read"
    );
    drop(stalled);
    until(|| guest.cancelled.load(Ordering::SeqCst) == 1).await;
    let mut polite = served.exec(r#"{"program":"sleep"}"#).await;
    told(&mut polite).await;
    polite.close(None).await.unwrap();
    until(|| guest.cancelled.load(Ordering::SeqCst) == 2).await;
}

#[tokio::test]
async fn a_lockdown_a_revoked_key_and_the_agents_end_cut_sessions_and_say_why() {
    let served = served().await;
    let world = &served.shell.world;
    let lock = async |active| {
        let command = ghost_application::guest::SetLockdownCommand {
            active,
            ..Default::default()
        };
        let set = &world.use_cases().set_lockdown;
        set.execute(&Principal::agent(), command).await.unwrap();
    };
    let mut socket = served.open("/v1/vms/web/shell").await;
    told(&mut socket).await;
    lock(true).await;
    let error = told(&mut socket).await;
    assert_eq!(
        (&error["type"], &error["error"]["code"]),
        (&"error".into(), &"lockdown".into())
    );
    assert_eq!(closed(&mut socket).await, CloseCode::Policy);
    let refused = served
        .connect("/v1/vms/web/shell", &[("x-api-key", &served.shell.key)])
        .await;
    assert_eq!(status(refused.unwrap_err()), (403, "lockdown".into()));
    let mut socket = served.exec(r#"{"program":"true"}"#).await;
    assert_eq!(told(&mut socket).await["error"]["code"], "lockdown");
    lock(false).await;

    let key = world.key(Role::Operator).await;
    let mut socket = served
        .connect("/v1/vms/web/shell", &[("x-api-key", &key)])
        .await
        .unwrap();
    told(&mut socket).await;
    let revoke = &world.use_cases().revoke_key;
    let id = key.split('_').nth(1).unwrap();
    revoke.execute(&Principal::agent(), id).await.unwrap();
    assert_eq!(told(&mut socket).await["error"]["code"], "unauthenticated");
    assert_eq!(closed(&mut socket).await, CloseCode::Policy);

    let mut socket = served.open("/v1/vms/web/shell").await;
    told(&mut socket).await;
    served.shell.shutdown.cancel();
    assert_eq!(told(&mut socket).await["error"]["code"], "shutting_down");
    assert_eq!(closed(&mut socket).await, CloseCode::Restart);
    let guest = &world.knobs.guest;
    until(|| guest.sessions.load(Ordering::SeqCst) == 0).await;
}

#[tokio::test]
async fn frames_that_cannot_be_read_end_only_their_session() {
    let served = served().await;
    for first in [
        "",
        "{",
        r#"{"program":"x","arg":1}"#,
        r#"{"program":""}"#,
        r#"{"program":"x","terminal":{"rows":0,"columns":1}}"#,
    ] {
        let mut socket = served.exec(first).await;
        let error = told(&mut socket).await;
        assert_eq!(
            error["error"]["code"], "invalid_argument",
            "{first}: {error}"
        );
    }
    let mut socket = served.open("/v1/vms/web/exec").await;
    socket.send(Message::binary(&b"x"[..])).await.unwrap();
    assert_eq!(told(&mut socket).await["error"]["code"], "invalid_argument");
    let mut socket = served.exec(r#"{"program":"cat","stdin":true}"#).await;
    told(&mut socket).await;
    socket.send(Message::text("not a control")).await.unwrap();
    assert_eq!(told(&mut socket).await["error"]["code"], "invalid_argument");
    // Larger than any frame that is taken.
    let mut socket = served.exec(r#"{"program":"deaf","stdin":true}"#).await;
    told(&mut socket).await;
    let guest = &served.shell.world.knobs.guest;
    let before = guest.cancelled.load(Ordering::SeqCst);
    drop(socket.send(Message::binary(vec![0; 2 << 20])).await);
    until(|| guest.cancelled.load(Ordering::SeqCst) > before).await;
    let mut socket = served.exec(r#"{"program":"true"}"#).await;
    assert_eq!(told(&mut socket).await["type"], "started");
}

#[tokio::test]
async fn pages_of_others_and_keys_in_addresses_are_refused() {
    let served = served().await;
    let key = served.shell.key.clone();
    let host = format!("http://{}", served.address);
    let protocols = format!("ghost.v1, bearer.{key}");
    let shell = "/v1/vms/web/shell";
    let browser = [
        ("sec-websocket-protocol", protocols.as_str()),
        ("origin", &host),
    ];
    let mut socket = served.connect(shell, &browser).await.unwrap();
    assert_eq!(told(&mut socket).await["type"], "started");
    let page = [
        ("sec-websocket-protocol", protocols.as_str()),
        ("origin", "https://evil.example"),
    ];
    let refused = served.connect(shell, &page).await.unwrap_err();
    assert_eq!(status(refused), (403, "permission_denied".into()));
    let viewer = served.shell.world.key(Role::Viewer).await;
    for (path, headers, wanted) in [
        (shell.to_owned(), vec![], (401, "unauthenticated")),
        (
            format!("{shell}?key={key}"),
            vec![],
            (401, "unauthenticated"),
        ),
        (
            format!("{shell}?key={key}"),
            vec![("x-api-key", key.as_str())],
            (400, "invalid_argument"),
        ),
        (
            format!("/v1/vms/web/exec?token={key}"),
            vec![("x-api-key", key.as_str())],
            (400, "invalid_argument"),
        ),
        (
            shell.to_owned(),
            vec![("x-api-key", viewer.as_str())],
            (403, "permission_denied"),
        ),
        (
            "/v1/vms/nobody/shell".to_owned(),
            vec![("x-api-key", key.as_str())],
            (404, "vm_not_found"),
        ),
        (
            format!("{shell}?rows=70000"),
            vec![("x-api-key", key.as_str())],
            (400, "invalid_argument"),
        ),
    ] {
        let refused = served.connect(&path, &headers).await.unwrap_err();
        let (number, code) = wanted;
        assert_eq!(status(refused), (number, code.to_owned()), "{headers:?}");
    }
    let plain = served.shell.ask("GET", shell, &[], "").await;
    assert_eq!(plain.code(), "invalid_argument");
}
