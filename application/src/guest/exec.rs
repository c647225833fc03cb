//! Run a program in a guest.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use ghost_domain::guest::{ExecExit, ExecRequest, GuestProgram};
use ghost_domain::ports::{ExecEvent, ExecInput, ExecOutput, ExecSession};
use ghost_domain::{Error, ErrorCode, Principal, Result};

use super::door::{Door, Visit, failed};
use super::{GuestTarget, detail};

/// Runs a program in a guest.
pub struct ExecInGuest {
    pub(crate) door: Arc<Door>,
}

impl ExecInGuest {
    /// Starts the program. The audit log gets its second line when the session ends, however that
    /// is: by the program's exit, a break of the link, or because the caller dropped it.
    ///
    /// # Errors
    /// `InvalidArgument`; those of every call into a guest: `PermissionDenied`, `VmNotFound`,
    /// `GuestAccessOff`, `Lockdown`, `VmNotRunning`, `GuestUnreachable`, `GuestUnsupported`,
    /// `GuestFailed`, `TooManyRequests`, and `IoFailed` or `DiskFull` of the audit log.
    pub async fn execute(
        &self,
        principal: &Principal,
        target: &GuestTarget,
        request: ExecRequest,
    ) -> Result<ExecSession> {
        let action = match request.program {
            GuestProgram::LoginShell => "shell",
            GuestProgram::Command { .. } => "exec",
        };
        request.validate()?;
        let program = match &request.program {
            GuestProgram::LoginShell => "the login shell".to_owned(),
            GuestProgram::Command { program, .. } => format!("{program:?}"),
        };
        let mut visit = self
            .door
            .enter_early(principal, target, action, detail::exec(&request))
            .await?;
        let started = self.door.ports.guests.execute(visit.vm, request).await;
        // The disk was given the line while the guest started the program, which costs as long.
        // Where that failed, the program is ended by dropping its session.
        if let Err(error) = visit.logged().await {
            return Err(visit.fail(error));
        }
        let session = match started {
            Ok(session) => session,
            Err(error) => return Err(visit.fail(error)),
        };
        if let Err(error) = visit.recheck() {
            return Err(visit.fail(error));
        }
        let sent = Arc::new(AtomicU64::new(0));
        Ok(ExecSession {
            output: Box::new(WatchedOutput {
                inner: session.output,
                visit: Some(visit),
                program,
                sent: Arc::clone(&sent),
                received: 0,
            }),
            input: Box::new(WatchedInput {
                inner: session.input,
                sent,
            }),
        })
    }
}

/// Counts, and writes the end.
struct WatchedOutput {
    inner: Box<dyn ExecOutput>,
    visit: Option<Visit>,
    program: String,
    sent: Arc<AtomicU64>,
    received: u64,
}

impl WatchedOutput {
    fn end(&mut self, outcome: String) {
        if let Some(visit) = self.visit.take() {
            visit.end(outcome, self.sent.load(Ordering::Relaxed), self.received);
        }
    }
}

#[async_trait]
impl ExecOutput for WatchedOutput {
    async fn next(&mut self) -> Result<ExecEvent> {
        let event = self.inner.next().await;
        match &event {
            Ok(ExecEvent::Stdout(data) | ExecEvent::Stderr(data)) => {
                self.received += data.len() as u64;
            }
            Ok(ExecEvent::Exited(exit)) => self.end(exited(exit)),
            Ok(ExecEvent::Started(_)) => {}
            Err(error) => self.end(failed(error)),
        }
        event.map_err(|error| of_program(error, &self.program))
    }
}

/// A program that is not there is the commonest slip of all: it is named as what was asked for.
fn of_program(error: Error, program: &str) -> Error {
    if error.code() != ErrorCode::GuestFileNotFound {
        return error;
    }
    let named = Error::new(error.code(), format!("the guest has no program {program}"));
    match error.cause() {
        Some(cause) => named.because(cause),
        None => named,
    }
}

impl Drop for WatchedOutput {
    fn drop(&mut self) {
        self.end("cancelled".into());
    }
}

fn exited(exit: &ExecExit) -> String {
    match exit {
        ExecExit {
            timed_out: true, ..
        } => "timed out".into(),
        ExecExit {
            cancelled: true, ..
        } => "cancelled".into(),
        ExecExit {
            signal: Some(signal),
            ..
        } => format!("signal {signal}"),
        ExecExit { code: 0, .. } => "ok".into(),
        ExecExit { code, .. } => format!("exit {code}"),
    }
}

struct WatchedInput {
    inner: Box<dyn ExecInput>,
    sent: Arc<AtomicU64>,
}

#[async_trait]
impl ExecInput for WatchedInput {
    async fn write(&self, data: Vec<u8>) -> Result<()> {
        let length = data.len() as u64;
        self.inner.write(data).await?;
        self.sent.fetch_add(length, Ordering::Relaxed);
        Ok(())
    }

    async fn end(&self) -> Result<()> {
        self.inner.end().await
    }

    async fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        self.inner.resize(rows, columns).await
    }

    async fn signal(&self, number: u8) -> Result<()> {
        self.inner.signal(number).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_is_not_there_is_named_and_other_errors_stay() {
        let missing = Error::new(ErrorCode::GuestFileNotFound, "the guest has no such file")
            .because("cannot start it");
        let told = of_program(missing, "\"nginx\"");
        assert_eq!(told.message(), "the guest has no program \"nginx\"");
        assert_eq!(told.cause(), Some("cannot start it"));
        let other = Error::new(ErrorCode::GuestFailed, "no memory");
        assert_eq!(of_program(other.clone(), "x"), other);
    }
}
