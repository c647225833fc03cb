//! The serial console of a VM behind a WebSocket: what is left where its agent is not wanted, and
//! what shows a boot.

use std::sync::Arc;

use async_trait::async_trait;
use axum::extract::State;
use ghost_domain::guest::ExecExit;
use ghost_domain::ports::{
    ConsoleReader, ConsoleSession, ConsoleWriter, ExecEvent, ExecInput, ExecOutput, ExecSession,
};
use ghost_domain::{Error, ErrorCode, Result};
use tokio::sync::{Mutex, mpsc};
use tokio_util::task::AbortOnDropHandle;

use super::super::extract::{Caller, Name, Query};
use super::super::problem::Problem;
use super::super::{Answer, Shell};
use super::bodies::NoQuery;
use super::exec::{Wanted, called_off, carry_on};
use super::session::{self, Framing, Told};

/// A VM's serial console
///
/// A WebSocket. Binary frames are what is typed and what is shown. Text frames of the client are a
/// `Control`, as of a shell, and change nothing: a serial console has no size. Those of the server
/// are a `Told`; `ended` is the last where the VM went down or somebody else took the console over.
/// A browser names the subprotocols `ghost.v1` and `bearer.KEY`.
#[utoipa::path(get, path = "/v1/vms/{vm}/console", tag = "guests",
    params(("vm" = String, Path, description = "A name, a full id or a unique prefix of an id")),
    security(("bearer" = []), ("key" = [])),
    responses((status = 101, body = Told), (status = "default", body = Problem)))]
pub(in crate::http) async fn console(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    Name(vm): Name,
    Query(NoQuery {}): Query<NoQuery>,
    Wanted { upgrade, key }: Wanted,
) -> Answer {
    // Attached before the switch of protocols, so that a refusal is an answer with its own status.
    let (_, attached) = shell.use_cases.open_console.execute(&caller, &vm).await?;
    let called_off = called_off(shell, key);
    Ok(carry_on(upgrade, move |socket| {
        session::carry(socket, as_session(attached), Framing::Console, called_off)
    }))
}

/// A console as what a WebSocket carries.
fn as_session(console: ConsoleSession) -> ExecSession {
    let ConsoleSession { reader, writer } = console;
    // One piece waits at most: whoever does not read holds up the console and nothing else.
    let (sender, pieces) = mpsc::channel(1);
    // A task of its own: a read that is given up halfway could lose output.
    let reading = AbortOnDropHandle::new(tokio::spawn(read(reader, sender)));
    ExecSession {
        output: Box::new(Shown {
            pieces,
            _reading: reading,
        }),
        input: Box::new(Typed(Mutex::new(writer))),
    }
}

async fn read(mut reader: Box<dyn ConsoleReader>, sender: mpsc::Sender<Result<Vec<u8>>>) {
    loop {
        let piece = reader.read().await;
        let last = !matches!(&piece, Ok(data) if !data.is_empty());
        if sender.send(piece).await.is_err() || last {
            return;
        }
    }
}

struct Shown {
    pieces: mpsc::Receiver<Result<Vec<u8>>>,
    _reading: AbortOnDropHandle<()>,
}

#[async_trait]
impl ExecOutput for Shown {
    async fn next(&mut self) -> Result<ExecEvent> {
        match self.pieces.recv().await {
            // Nothing of this is told: a console has no exit code.
            Some(Ok(data)) if data.is_empty() => Ok(ExecEvent::Exited(ExecExit {
                code: 0,
                signal: None,
                timed_out: false,
                cancelled: false,
                truncated_bytes: 0,
            })),
            Some(Ok(data)) => Ok(ExecEvent::Stdout(data)),
            Some(Err(error)) => Err(error),
            None => Err(Error::new(
                ErrorCode::Internal,
                "the console's reader is gone",
            )),
        }
    }
}

struct Typed(Mutex<Box<dyn ConsoleWriter>>);

#[async_trait]
impl ExecInput for Typed {
    async fn write(&self, data: Vec<u8>) -> Result<()> {
        self.0.lock().await.write(&data).await
    }

    // A serial line has neither an end of input nor a size nor signals.
    async fn end(&self) -> Result<()> {
        Ok(())
    }

    async fn resize(&self, _rows: u16, _columns: u16) -> Result<()> {
        Ok(())
    }

    async fn signal(&self, _number: u8) -> Result<()> {
        Ok(())
    }
}
