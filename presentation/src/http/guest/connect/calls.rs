//! The five calls.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use ghost_application::guest::ReadGuestFileCommand;
use ghost_domain::guest::{ExecRequest, FileWrite};
use ghost_domain::{Error, ErrorCode, Result};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::super::super::Shell;
use super::super::super::extract::Caller;
use super::super::RequestName;
use super::super::bodies::{MOST_OUTPUT, bounds};
use super::super::exec::{Captured, collect, shutting_down};
use super::error::{ConnectError, ConnectFailure};
use super::wire::{Called, engine, number, within};
use crate::convert;

/// Most bytes of a file in one answer.
const MOST_CONTENT: u64 = 1024 * 1024;
/// The time that a call without a deadline of its own gets, scripts aside.
const USUAL_TIME: Duration = Duration::from_secs(30);

type Answer = std::result::Result<Response, ConnectFailure>;

/// Which VM.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::http) struct PingAgentRequest {
    /// A name, a full id or a unique prefix of an id.
    #[serde(alias = "vm_id")]
    vm_id: String,
}

/// Whether the agent answers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(in crate::http) struct PingAgentResponse {
    connected: bool,
    /// The agent's release.
    version: String,
    /// How long the guest is up, as it reports.
    uptime_seconds: String,
    /// Why it is not connected.
    error: String,
}

/// Whether the agent in a VM answers (Connect)
///
/// A VM that is off, or whose agent does not answer, is an answer and no error.
#[utoipa::path(post, path = "/limiquantix.compute.v1.VMService/PingAgent", tag = "connect",
    request_body = PingAgentRequest, security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = PingAgentResponse), (status = "default", body = ConnectError)))]
pub(in crate::http) async fn ping_agent(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    called: Called<PingAgentRequest>,
) -> Answer {
    let cases = &shell.use_cases;
    let vm = called.message.vm_id;
    let call = async {
        let pinged = cases.ping_guest.execute(&caller, &vm).await?;
        // Its first item is what is known now.
        let mut watch = cases.watch_telemetry.execute(&caller, Some(&vm)).await?;
        let uptime = tokio::select! {
            biased;
            view = watch.next() => view.and_then(|view| view.report.map(|one| one.uptime_seconds)),
            () = std::future::ready(()) => None,
        };
        Ok((pinged, uptime.unwrap_or_default()))
    };
    let answer = match within(called.deadline.unwrap_or(USUAL_TIME), call).await {
        Ok((pinged, uptime)) => PingAgentResponse {
            connected: true,
            version: pinged.agent_version,
            // Whole seconds of a number that the adapter keeps finite and positive.
            uptime_seconds: format!("{:.0}", uptime.floor()),
            error: String::new(),
        },
        Err(error)
            if matches!(
                error.code(),
                ErrorCode::GuestUnreachable | ErrorCode::VmNotRunning | ErrorCode::DeadlineExceeded
            ) =>
        {
            PingAgentResponse {
                uptime_seconds: "0".to_owned(),
                error: error.to_string(),
                ..PingAgentResponse::default()
            }
        }
        Err(error) => return Err(error.into()),
    };
    Ok(Json(answer).into_response())
}

/// What to run.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::http) struct ExecuteScriptRequest {
    /// A name, a full id or a unique prefix of an id.
    #[serde(alias = "vm_id")]
    vm_id: String,
    /// Without `args` a script for the guest's `/bin/sh`, with them a program.
    command: String,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    environment: std::collections::BTreeMap<String, String>,
    #[serde(default, alias = "working_directory")]
    working_directory: String,
    #[serde(default, alias = "run_as_user")]
    run_as_user: String,
    #[serde(default, alias = "run_as_group")]
    run_as_group: String,
    /// 60 where it is left out or 0.
    #[serde(default, alias = "timeout_seconds", deserialize_with = "number")]
    #[schema(value_type = u32)]
    timeout_seconds: u32,
    /// Only `true`: what is not waited for could not be told of.
    #[serde(default, alias = "wait_for_exit")]
    wait_for_exit: Option<bool>,
    /// Of stdout, and of stderr; a mebibyte each where it is left out or 0.
    #[serde(default, alias = "max_output_bytes", deserialize_with = "number")]
    #[schema(value_type = u64)]
    max_output_bytes: u64,
}

impl ExecuteScriptRequest {
    fn request(self) -> Result<(ExecRequest, usize)> {
        if self.wait_for_exit == Some(false) {
            return Err(
                Error::new(ErrorCode::InvalidArgument, "a script is always waited for")
                    .field("waitForExit", "true"),
            );
        }
        if self.command.is_empty() {
            return Err(
                Error::new(ErrorCode::InvalidArgument, "there is nothing to run")
                    .field("command", "needed"),
            );
        }
        let time = Some(f64::from(self.timeout_seconds)).filter(|given| *given > 0.0);
        let most = Some(self.max_output_bytes).filter(|given| *given > 0);
        let (timeout, most) = bounds(time, most)?;
        let some = |text: String| Some(text).filter(|text| !text.is_empty());
        // The script is for a shell by what this call is. It is the guest's: none of the host's
        // sees it.
        let program = if self.args.is_empty() {
            ExecRequest::command("/bin/sh", ["-c".to_owned(), self.command])
        } else {
            ExecRequest::command(self.command, self.args)
        };
        let request = ExecRequest {
            environment: self.environment,
            working_directory: some(self.working_directory),
            user: some(self.run_as_user),
            group: some(self.run_as_group),
            timeout: Some(timeout),
            max_output_bytes: Some(2 * most as u64),
            ..program
        };
        Ok((request, most))
    }
}

/// What it did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(in crate::http) struct ExecuteScriptResponse {
    /// It ended by itself with 0.
    success: bool,
    /// As a shell tells it: 128 and the signal's number where one ended it.
    exit_code: i32,
    /// Bytes that are no text are replaced by U+FFFD.
    stdout: String,
    stderr: String,
    timed_out: bool,
    /// There was more output.
    truncated: bool,
    duration_ms: String,
    error: String,
}

/// Run a script in a VM (Connect)
#[utoipa::path(post, path = "/limiquantix.compute.v1.VMService/ExecuteScript", tag = "connect",
    request_body = ExecuteScriptRequest, security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = ExecuteScriptResponse), (status = "default", body = ConnectError)))]
pub(in crate::http) async fn execute_script(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    name: RequestName,
    called: Called<ExecuteScriptRequest>,
) -> Answer {
    let target = name.target(called.message.vm_id.clone());
    let (request, most) = called.message.request()?;
    // The guest ends it at its timeout; this is for a guest that does not.
    let own = request.timeout.unwrap_or(USUAL_TIME) + USUAL_TIME;
    let begun = Instant::now();
    let call = async {
        let exec = &shell.use_cases.exec_in_guest;
        let session = exec.execute(&caller, &target, request).await?;
        collect(shutting_down(&shell), session, None, most).await
    };
    let done = within(called.deadline.map_or(own, |given| given.min(own)), call).await?;
    let exit = done.exit;
    let text = |captured: &Captured| String::from_utf8_lossy(&captured.data).into_owned();
    let exit_code = exit
        .signal
        .map_or_else(|| i32::from(exit.code), |signal| 128 + i32::from(signal));
    Ok(Json(ExecuteScriptResponse {
        success: exit_code == 0 && !exit.timed_out && !exit.cancelled,
        exit_code,
        stdout: text(&done.stdout),
        stderr: text(&done.stderr),
        timed_out: exit.timed_out,
        truncated: exit.truncated_bytes > 0 || done.stdout.truncated || done.stderr.truncated,
        duration_ms: begun.elapsed().as_millis().to_string(),
        error: if exit.timed_out {
            "its time ran out".to_owned()
        } else {
            String::new()
        },
    })
    .into_response())
}

/// Which part of which file.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::http) struct ReadFileRequest {
    /// A name, a full id or a unique prefix of an id.
    #[serde(alias = "vm_id")]
    vm_id: String,
    /// Absolute.
    path: String,
    #[serde(default, deserialize_with = "number")]
    #[schema(value_type = u64)]
    offset: u64,
    /// At most, and where it is left out or 0, a mebibyte.
    #[serde(default, deserialize_with = "number")]
    #[schema(value_type = u64)]
    length: u64,
}

/// What is in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(in crate::http) struct ReadFileResponse {
    path: String,
    #[schema(content_encoding = "base64")]
    content: String,
    /// Of the whole file.
    size: String,
    read_bytes: String,
    /// Nothing is behind it.
    eof: bool,
}

/// Read a file of a VM (Connect)
#[utoipa::path(post, path = "/limiquantix.compute.v1.VMService/ReadGuestFile", tag = "connect",
    request_body = ReadFileRequest, security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = ReadFileResponse), (status = "default", body = ConnectError)))]
pub(in crate::http) async fn read_guest_file(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    name: RequestName,
    called: Called<ReadFileRequest>,
) -> Answer {
    let given = called.message;
    let most = match given.length {
        0 => MOST_CONTENT,
        length => length.min(MOST_CONTENT),
    };
    let command = ReadGuestFileCommand {
        path: given.path.clone(),
        offset: given.offset,
        length: Some(most),
    };
    let target = name.target(given.vm_id);
    let call = async {
        let read = &shell.use_cases.read_guest_file;
        let (file, mut reader) = read.execute(&caller, &target, command).await?;
        let mut content = Vec::new();
        loop {
            let data = reader.read().await?;
            if data.is_empty() {
                return Ok((file, content));
            }
            if content.len() + data.len() > MOST_OUTPUT {
                return Err(Error::new(
                    ErrorCode::GuestFailed,
                    "the guest sent more than it was asked for",
                ));
            }
            content.extend(data);
        }
    };
    let (file, content) = within(called.deadline.unwrap_or(USUAL_TIME), call).await?;
    let length = content.len() as u64;
    Ok(Json(ReadFileResponse {
        path: given.path,
        content: BASE64.encode(&content),
        size: file.size.to_string(),
        read_bytes: length.to_string(),
        // A file may be longer than it says (those of /proc say 0): less than asked for is the end.
        eof: length < most || given.offset.saturating_add(length) == file.size,
    })
    .into_response())
}

/// What to write where.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::http) struct WriteFileRequest {
    /// A name, a full id or a unique prefix of an id.
    #[serde(alias = "vm_id")]
    vm_id: String,
    /// Absolute.
    path: String,
    /// At most a mebibyte.
    #[serde(default)]
    #[schema(content_encoding = "base64")]
    content: String,
    /// Permission bits as a number; 420 (0644) where they are left out or 0.
    #[serde(default, deserialize_with = "number")]
    #[schema(value_type = u32)]
    mode: u32,
    /// Make the directories above.
    #[serde(default, alias = "create_parents")]
    create_parents: bool,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(in crate::http) struct WriteFileResponse {
    success: bool,
    path: String,
    vm_id: String,
    bytes_written: String,
    error: String,
}

/// Write a file in a VM (Connect)
#[utoipa::path(post, path = "/limiquantix.compute.v1.VMService/WriteGuestFile", tag = "connect",
    request_body = WriteFileRequest, security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = WriteFileResponse), (status = "default", body = ConnectError)))]
pub(in crate::http) async fn write_guest_file(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    name: RequestName,
    called: Called<WriteFileRequest>,
) -> Answer {
    let given = called.message;
    let url = given.content.contains(['-', '_']);
    let content = engine(url).decode(&given.content).map_err(|cause| {
        Error::new(ErrorCode::InvalidArgument, "the content is not base64")
            .because(cause)
            .field("content", "base64")
    })?;
    let file = FileWrite {
        path: given.path.clone(),
        size: content.len() as u64,
        mode: match given.mode {
            0 => 0o644,
            mode => convert::mode(mode)?,
        },
        owner: None,
        modified_at: None,
        checksum: None,
        resume: false,
        make_parents: given.create_parents,
        no_replace: false,
    };
    let target = name.target(given.vm_id.clone());
    let call = async {
        let write = &shell.use_cases.write_guest_file;
        let mut writer = write.execute(&caller, &target, file).await?;
        for piece in content.chunks(convert::MOST_PIECE) {
            writer.write(piece.to_vec()).await?;
        }
        writer.finish().await
    };
    let sum = within(called.deadline.unwrap_or(USUAL_TIME), call).await?;
    Ok(Json(WriteFileResponse {
        success: true,
        path: given.path,
        vm_id: given.vm_id,
        bytes_written: sum.size.to_string(),
        error: String::new(),
    })
    .into_response())
}

/// How it goes down.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::http) struct GuestShutdownRequest {
    /// A name, a full id or a unique prefix of an id.
    #[serde(alias = "vm_id")]
    vm_id: String,
    /// Restart instead.
    #[serde(default)]
    reboot: bool,
    /// After so many seconds.
    #[serde(default, alias = "delay_seconds", deserialize_with = "number")]
    #[schema(value_type = u32)]
    delay_seconds: u32,
}

/// Whether it does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(in crate::http) struct GuestShutdownResponse {
    accepted: bool,
    success: bool,
    error: String,
}

/// Shut a VM down from within (Connect)
#[utoipa::path(post, path = "/limiquantix.compute.v1.VMService/GuestShutdown", tag = "connect",
    request_body = GuestShutdownRequest, security(("bearer" = []), ("key" = [])),
    responses((status = 200, body = GuestShutdownResponse), (status = "default", body = ConnectError)))]
pub(in crate::http) async fn guest_shutdown(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    name: RequestName,
    called: Called<GuestShutdownRequest>,
) -> Answer {
    let given = called.message;
    let delay = Duration::from_secs(given.delay_seconds.into());
    let target = name.target(given.vm_id);
    let shutdown = &shell.use_cases.shutdown_guest;
    let call = shutdown.execute(&caller, &target, given.reboot, delay);
    within(called.deadline.unwrap_or(USUAL_TIME), call).await?;
    Ok(Json(GuestShutdownResponse {
        accepted: true,
        success: true,
        error: String::new(),
    })
    .into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_protobufs_json_has_them() {
        let read = |text: &str| {
            serde_json::from_str::<ExecuteScriptRequest>(&format!(
                r#"{{"vmId":"web","command":"x",{text}}}"#
            ))
        };
        for text in [
            r#""timeoutSeconds":30"#,
            r#""timeoutSeconds":"30""#,
            r#""timeout_seconds":30"#,
        ] {
            assert_eq!(read(text).unwrap().timeout_seconds, 30, "{text}");
        }
        assert_eq!(read(r#""timeoutSeconds":null"#).unwrap().timeout_seconds, 0);
        for bad in [
            r#""timeoutSeconds":-1"#,
            r#""timeoutSeconds":"x""#,
            r#""timeout":3"#,
        ] {
            assert!(read(bad).is_err(), "{bad}");
        }
        let lost = read(r#""waitForExit":false"#).unwrap().request();
        assert_eq!(lost.unwrap_err().code(), ErrorCode::InvalidArgument);
    }
}
