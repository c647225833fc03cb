//! Programs and shells in guests.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{FromRequestParts, State};
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ghost_application::guest::GuestTarget;
use ghost_domain::guest::ExecExit;
use ghost_domain::ports::{ExecEvent, ExecSession};
use ghost_domain::{Error, ErrorCode, Principal, Result};
use serde::Serialize;
use tracing::Instrument;
use utoipa::ToSchema;

use super::super::extract::{Body, Caller, Name, Query};
use super::super::guard::PresentedKey;
use super::super::problem::{Failure, Problem};
use super::super::{Answer, Shell};
use super::RequestName;
use super::bodies::{ExecBody, ExecSessionBody, NoQuery, ShellQuery};
use super::session::{self, Exit, Framing, MOST_FRAME, PROTOCOL, Told};

/// How long a client may take to say what is to run.
const NAME_WITHIN: Duration = Duration::from_secs(10);
/// Most bytes of stdin in one piece.
const PIECE: usize = 64 * 1024;

/// What a program did.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(in crate::http) struct ExecAnswer {
    #[serde(flatten)]
    exit: Exit,
    /// Its output as text; null where it is none.
    stdout: Option<String>,
    /// Its output, where it is not text.
    #[schema(content_encoding = "base64")]
    stdout_base64: Option<String>,
    /// There was more of it.
    stdout_truncated: bool,
    /// What it wrote to stderr, as text; null where it is none.
    stderr: Option<String>,
    /// What it wrote to stderr, where it is not text.
    #[schema(content_encoding = "base64")]
    stderr_base64: Option<String>,
    /// There was more of it.
    stderr_truncated: bool,
    /// How long it took.
    duration_seconds: f64,
}

/// Run a program and wait for its end
///
/// A client that goes away cancels it. For what lasts longer or says more than an answer holds
/// there is the session behind `GET` on the same path.
#[utoipa::path(post, path = "/v1/vms/{vm}/exec", tag = "guests", request_body = ExecBody,
    params(("vm" = String, Path, description = "A name, a full id or a unique prefix of an id")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = ExecAnswer), (status = "default", body = Problem)))]
pub(in crate::http) async fn exec(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    Name(vm): Name,
    name: RequestName,
    Body(body): Body<ExecBody>,
) -> Answer {
    let (request, stdin, most) = body.request()?;
    let target = name.target(vm);
    let begun = Instant::now();
    let exec = &shell.use_cases.exec_in_guest;
    let session = exec.execute(&caller, &target, request).await?;
    let done = collect(shutting_down(&shell), session, stdin, most).await?;
    let (stdout, stdout_base64) = shown(&done.stdout);
    let (stderr, stderr_base64) = shown(&done.stderr);
    let answer = ExecAnswer {
        exit: Exit::from(&done.exit),
        stdout,
        stdout_base64,
        stdout_truncated: done.stdout.truncated,
        stderr,
        stderr_base64,
        stderr_truncated: done.stderr.truncated,
        duration_seconds: begun.elapsed().as_secs_f64(),
    };
    Ok(Json(answer).into_response())
}

/// A session with a program
///
/// A WebSocket. The client's first text frame is an `ExecSessionBody`; after it binary frames are
/// stdin and text frames a `Control`. The server's binary frames are output, with the number of
/// the stream (1 stdout, 2 stderr) as their first byte; its text frames are a `Told`. A browser
/// names the subprotocols `ghost.v1` and `bearer.KEY`.
#[utoipa::path(get, path = "/v1/vms/{vm}/exec", tag = "guests",
    params(("vm" = String, Path, description = "A name, a full id or a unique prefix of an id")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 101, body = Told), (status = "default", body = Problem)))]
pub(in crate::http) async fn exec_session(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    Name(vm): Name,
    name: RequestName,
    Query(NoQuery {}): Query<NoQuery>,
    Wanted { upgrade, key }: Wanted,
) -> Answer {
    let target = name.target(vm);
    Ok(carry_on(upgrade, move |mut socket| async move {
        let called_off = called_off(Arc::clone(&shell), key);
        let begun = tokio::select! {
            begun = begin(&shell, &caller, &target, &mut socket) => begun,
            error = shutting_down(&shell) => Err(error),
        };
        match begun {
            Ok(session) => session::carry(socket, session, Framing::Numbered, called_off).await,
            Err(error) => session::refuse(socket, error).await,
        }
    }))
}

/// A shell in a terminal
///
/// A WebSocket. Binary frames are what is typed and what is shown; text frames are a `Control` of
/// the client and a `Told` of the server. A browser names the subprotocols `ghost.v1` and
/// `bearer.KEY`.
#[utoipa::path(get, path = "/v1/vms/{vm}/shell", tag = "guests",
    params(ShellQuery, ("vm" = String, Path, description = "A name, a full id or a unique prefix of an id")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 101, body = Told), (status = "default", body = Problem)))]
pub(in crate::http) async fn shell(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    Name(vm): Name,
    name: RequestName,
    Query(query): Query<ShellQuery>,
    Wanted { upgrade, key }: Wanted,
) -> Answer {
    let target = name.target(vm);
    let request = query.request()?;
    // Begun before the switch of protocols, so that a refusal is an answer with its own status.
    let exec = &shell.use_cases.exec_in_guest;
    let session = exec.execute(&caller, &target, request).await?;
    let called_off = called_off(shell, key);
    Ok(carry_on(upgrade, move |socket| {
        session::carry(socket, session, Framing::Raw, called_off)
    }))
}

/// A session that is asked for, from a page of ours or from no page.
pub(in crate::http) struct Wanted {
    pub(super) upgrade: WebSocketUpgrade,
    pub(super) key: PresentedKey,
}

impl<S: Send + Sync> FromRequestParts<S> for Wanted {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failure> {
        session::check_origin(&parts.headers)?;
        let key = PresentedKey::from_request_parts(parts, state).await?;
        match WebSocketUpgrade::from_request_parts(parts, state).await {
            Ok(upgrade) => Ok(Self { upgrade, key }),
            Err(cause) => Err(Failure(
                Error::new(
                    ErrorCode::InvalidArgument,
                    "this address is for a WebSocket",
                )
                .because(cause.body_text())
                .hint("connect with a WebSocket client"),
            )),
        }
    }
}

/// Switches protocols, and goes on within the request's span.
pub(in crate::http) fn carry_on<F, Fut>(upgrade: WebSocketUpgrade, session: F) -> Response
where
    F: FnOnce(WebSocket) -> Fut + Send + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    let span = tracing::Span::current();
    upgrade
        .protocols([PROTOCOL])
        .max_message_size(MOST_FRAME)
        .max_frame_size(MOST_FRAME)
        // A frame goes out as it is made; only one waits at a time.
        .write_buffer_size(0)
        .max_write_buffer_size(2 * MOST_FRAME)
        .on_failed_upgrade(|error| tracing::debug!(%error, "a WebSocket did not come about"))
        .on_upgrade(|socket| session(socket).instrument(span))
}

/// Reads what is to run, and starts it.
async fn begin(
    shell: &Shell,
    caller: &Principal,
    target: &GuestTarget,
    socket: &mut WebSocket,
) -> Result<ExecSession> {
    let said = async {
        loop {
            match socket.recv().await {
                Some(Ok(Message::Text(text))) => return Some(text),
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                Some(Ok(Message::Binary(_) | Message::Close(_)) | Err(_)) | None => return None,
            }
        }
    };
    let first = tokio::time::timeout(NAME_WITHIN, said)
        .await
        .map_err(|_| Error::new(ErrorCode::DeadlineExceeded, "the first frame did not come"))?
        .ok_or_else(|| {
            Error::new(
                ErrorCode::InvalidArgument,
                "the first frame says what is to run",
            )
            .hint("a text frame such as {\"program\":\"uname\",\"arguments\":[\"-a\"]}")
        })?;
    let body: ExecSessionBody = serde_json::from_str(first.as_str()).map_err(|cause| {
        Error::new(ErrorCode::InvalidArgument, "the first frame cannot be read")
            .because(cause)
            .hint("see ExecSessionBody in /v1/openapi.json")
    })?;
    let exec = &shell.use_cases.exec_in_guest;
    exec.execute(caller, target, body.request()?).await
}

/// Resolves when the agent ends.
pub(in crate::http) async fn shutting_down(shell: &Shell) -> Error {
    shell.shutdown.cancelled().await;
    Error::new(ErrorCode::ShuttingDown, "the agent is shutting down")
        .hint("connect again in a moment")
        .retry_after(Duration::from_secs(5))
}

/// Ends once the session must: the agent ends, or the key is no longer good.
pub(in crate::http) async fn called_off(shell: Arc<Shell>, key: PresentedKey) -> Error {
    loop {
        tokio::select! {
            error = shutting_down(&shell) => return error,
            () = tokio::time::sleep(shell.options.recheck) => {}
        }
        if let Err(error) = key.check(&shell).await {
            return error;
        }
    }
}

/// What a program said, as far as it is kept.
#[derive(Debug, Default)]
pub(in crate::http) struct Captured {
    pub(in crate::http) data: Vec<u8>,
    pub(in crate::http) truncated: bool,
}

impl Captured {
    fn push(&mut self, data: &[u8], most: usize) {
        if self.truncated {
            return;
        }
        let room = most - self.data.len();
        self.data.extend_from_slice(&data[..data.len().min(room)]);
        if data.len() > room {
            self.truncated = true;
            // Cut between characters, so that text stays text.
            if let Err(error) = std::str::from_utf8(&self.data)
                && error.error_len().is_none()
            {
                self.data.truncate(error.valid_up_to());
            }
        }
    }
}

/// A program that has ended.
pub(in crate::http) struct Done {
    pub(in crate::http) exit: ExecExit,
    pub(in crate::http) stdout: Captured,
    pub(in crate::http) stderr: Captured,
}

/// Waits for a program's end and keeps at most `most` bytes of each of its outputs. `called_off`
/// ends it before, with its reason.
pub(in crate::http) async fn collect(
    called_off: impl Future<Output = Error>,
    session: ExecSession,
    stdin: Option<Vec<u8>>,
    most: usize,
) -> Result<Done> {
    let ExecSession { mut output, input } = session;
    let mut fed = stdin.is_none();
    let stdin = stdin.unwrap_or_default();
    let mut feeding = std::pin::pin!(async {
        for piece in stdin.chunks(PIECE) {
            input.write(piece.to_vec()).await?;
        }
        input.end().await
    });
    let mut called_off = std::pin::pin!(called_off);
    let (mut stdout, mut stderr) = (Captured::default(), Captured::default());
    loop {
        let event = tokio::select! {
            event = output.next() => event?,
            passed = &mut feeding, if !fed => {
                fed = true;
                // A program may end, or close its stdin, without having read it all.
                if let Err(error) = passed {
                    tracing::debug!(%error, "input of a program was not taken");
                }
                continue;
            }
            error = &mut called_off => return Err(error),
        };
        match event {
            ExecEvent::Started(_) => {}
            ExecEvent::Stdout(data) => stdout.push(&data, most),
            ExecEvent::Stderr(data) => stderr.push(&data, most),
            ExecEvent::Exited(exit) => {
                return Ok(Done {
                    exit,
                    stdout,
                    stderr,
                });
            }
        }
    }
}

/// Output as text, or else as base64.
fn shown(captured: &Captured) -> (Option<String>, Option<String>) {
    match std::str::from_utf8(&captured.data) {
        Ok(text) => (Some(text.to_owned()), None),
        Err(_) => (None, Some(STANDARD.encode(&captured.data))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_cut_between_characters() {
        let mut captured = Captured::default();
        captured.push("aé".as_bytes(), 2);
        captured.push(b"more", 2);
        assert!(captured.truncated);
        // Where the cut left room, nothing of what follows may slip in.
        assert_eq!(captured.data, b"a");
        let mut whole = Captured::default();
        whole.push(b"ab", 2);
        assert!(!whole.truncated);
        let mut bytes = Captured::default();
        bytes.push(&[0xff, 0xff, 0xff], 2);
        assert_eq!(shown(&bytes), (None, Some("//8=".into())));
    }
}
