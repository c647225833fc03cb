//! Running programs.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use ghost_domain::guest::{ExecExit, ExecRequest, GuestProgram};
use ghost_domain::ports::{ExecEvent, ExecInput, ExecOutput, ExecSession};
use ghost_domain::{Error, ErrorCode, Result};
use ghost_proto::guest::v1::agent_message::Payload;
use ghost_proto::guest::v1::execute_response::Event;
use ghost_proto::guest::v1::{
    ExecuteRequest, Resize, Signal, Stream, Terminal, execute_response::Exited,
};
use tokio::sync::Mutex;

use super::call::{Call, CallHandle, Item, Kind, failure, nonsense};
use super::session::Session;

pub(super) async fn execute(
    session: &Arc<Session>,
    request: ExecRequest,
    patience: Duration,
) -> Result<ExecSession> {
    request.validate()?;
    let call = session.begin(Kind::Execute, Some("exec"))?;
    if request.terminal.is_some() && !session.hello.capabilities.iter().any(|own| own == "pty") {
        return Err(Error::new(
            ErrorCode::GuestUnsupported,
            "the agent in the guest offers no terminals",
        )
        .hint("run it without a terminal"));
    }
    let stdin = request.stdin;
    call.send(Payload::Execute(message(request))).await?;
    match call.answer(patience).await? {
        Payload::ExecuteResponse(response) => match response.event {
            Some(Event::Started(started)) => {
                let input = Input {
                    call: Arc::clone(&call),
                    ended: Mutex::new(!stdin),
                };
                Ok(ExecSession {
                    output: Box::new(Output {
                        call,
                        started: Some(started.pid),
                        exited: None,
                    }),
                    input: Box::new(input),
                })
            }
            _ => Err(nonsense()),
        },
        _ => Err(nonsense()),
    }
}

fn message(request: ExecRequest) -> ExecuteRequest {
    let (program, arguments, login_shell) = match request.program {
        GuestProgram::Command { program, arguments } => (program, arguments, false),
        GuestProgram::LoginShell => (String::new(), Vec::new(), true),
    };
    ExecuteRequest {
        program,
        arguments,
        environment: request.environment.into_iter().collect(),
        working_directory: request.working_directory.unwrap_or_default(),
        user: request.user.unwrap_or_default(),
        group: request.group.unwrap_or_default(),
        stdin: request.stdin,
        terminal: request.terminal.map(|terminal| Terminal {
            rows: terminal.rows.into(),
            columns: terminal.columns.into(),
            kind: terminal.kind,
        }),
        timeout: request
            .timeout
            .and_then(|timeout| prost_types::Duration::try_from(timeout).ok()),
        max_output_bytes: request.max_output_bytes.unwrap_or(0),
        login_shell,
    }
}

struct Output {
    call: CallHandle,
    started: Option<u32>,
    exited: Option<ExecExit>,
}

#[async_trait]
impl ExecOutput for Output {
    async fn next(&mut self) -> Result<ExecEvent> {
        if let Some(pid) = self.started.take() {
            return Ok(ExecEvent::Started(pid));
        }
        if let Some(exit) = self.exited {
            return Ok(ExecEvent::Exited(exit));
        }
        match self.call.receive().await? {
            Item::Data(Stream::Stderr, data) => Ok(ExecEvent::Stderr(data)),
            Item::Data(_, data) => Ok(ExecEvent::Stdout(data)),
            Item::Answer(payload) => match *payload {
                Payload::ExecuteResponse(response) => match response.event {
                    Some(Event::Exited(exited)) => {
                        let exit = exit(&exited);
                        self.exited = Some(exit);
                        Ok(ExecEvent::Exited(exit))
                    }
                    _ => Err(nonsense()),
                },
                Payload::Error(error) => Err(failure(&error)),
                _ => Err(nonsense()),
            },
        }
    }
}

fn exit(exited: &Exited) -> ExecExit {
    ExecExit {
        code: u8::try_from(exited.code).unwrap_or(u8::MAX),
        signal: u8::try_from(exited.signal)
            .ok()
            .filter(|signal| (1..=64).contains(signal)),
        timed_out: exited.timed_out,
        cancelled: exited.cancelled,
        truncated_bytes: exited.truncated_bytes.min(i64::MAX as u64),
    }
}

/// Holds the call without keeping it alive: output is what does.
struct Input {
    call: Arc<Call>,
    /// Whether stdin is closed; also the queue of those who write.
    ended: Mutex<bool>,
}

#[async_trait]
impl ExecInput for Input {
    async fn write(&self, data: Vec<u8>) -> Result<()> {
        let ended = self.ended.lock().await;
        if *ended {
            return Err(Error::new(
                ErrorCode::WrongState,
                "the program's stdin is closed",
            ));
        }
        self.call.send_data(Stream::Stdin, data).await
    }

    async fn end(&self) -> Result<()> {
        let mut ended = self.ended.lock().await;
        if *ended {
            return Ok(());
        }
        self.call.send_end(Stream::Stdin).await?;
        *ended = true;
        Ok(())
    }

    async fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        self.call
            .send(Payload::Resize(Resize {
                rows: rows.into(),
                columns: columns.into(),
            }))
            .await
    }

    async fn signal(&self, number: u8) -> Result<()> {
        self.call
            .send(Payload::Signal(Signal {
                number: number.into(),
            }))
            .await
    }
}
