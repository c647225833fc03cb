//! What requests about guests carry. As everywhere, unknown keys are refused.

use std::collections::BTreeMap;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ghost_application::guest::{
    FreezeGuestCommand, SetGuestPasswordCommand, UpdateGuestSshKeysCommand,
};
use ghost_domain::guest::ExecRequest;
use ghost_domain::{Error, ErrorCode, Result, Secret, Timestamp};
use ghost_proto::agent::v1 as message;
use serde::Deserialize;
use utoipa::{IntoParams, ToSchema};

use super::super::bodies::seconds;
use crate::convert;

/// How long a program may run behind one request where the caller does not say.
const USUAL_TIME: Duration = Duration::from_secs(60);
/// The longest that a request may wait for a program: beyond it a session is the right thing.
const LONGEST_TIME: Duration = Duration::from_secs(3600);
/// Most bytes of stdout, and of stderr, in one answer.
pub(in crate::http) const MOST_OUTPUT: usize = 1024 * 1024;

/// A program to run to its end.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct ExecBody {
    /// The program; a name without a slash is looked up in `PATH`.
    program: String,
    /// Its arguments.
    #[serde(default)]
    arguments: Vec<String>,
    /// Variables besides the agent's own few.
    #[serde(default)]
    environment: BTreeMap<String, String>,
    /// Left out: the user's home.
    working_directory: Option<String>,
    /// Left out: root.
    user: Option<String>,
    /// Left out: the user's own, with the supplementary ones.
    group: Option<String>,
    /// Text for stdin.
    stdin: Option<String>,
    /// Bytes for stdin.
    #[schema(content_encoding = "base64")]
    stdin_base64: Option<String>,
    /// After this its whole process group is killed; 60 where it is left out, at most 3600.
    timeout_seconds: Option<f64>,
    /// Most bytes of stdout, and of stderr, in the answer; at most and usually 1 MiB each.
    max_output_bytes: Option<u64>,
}

impl ExecBody {
    /// The request, the bytes for stdin, and the bound of the output.
    pub(super) fn request(self) -> Result<(ExecRequest, Option<Vec<u8>>, usize)> {
        let stdin = match (self.stdin, self.stdin_base64) {
            (Some(_), Some(_)) => {
                return Err(
                    Error::new(ErrorCode::InvalidArgument, "stdin is given twice")
                        .field("stdin_base64", "not together with stdin"),
                );
            }
            (Some(text), None) => Some(text.into_bytes()),
            (None, Some(text)) => Some(STANDARD.decode(text).map_err(|cause| {
                Error::new(ErrorCode::InvalidArgument, "stdin is not base64")
                    .because(cause)
                    .field("stdin_base64", "base64 of RFC 4648, section 4")
            })?),
            (None, None) => None,
        };
        let (timeout, most) = bounds(self.timeout_seconds, self.max_output_bytes)?;
        let request = ExecRequest {
            environment: self.environment,
            working_directory: self.working_directory,
            user: self.user,
            group: self.group,
            stdin: stdin.is_some(),
            timeout: Some(timeout),
            // What the answer does not hold is thrown away in the guest already.
            max_output_bytes: Some(2 * most as u64),
            ..ExecRequest::command(self.program, self.arguments)
        };
        Ok((request, stdin, most))
    }
}

/// How long a program may run and how much it may say, in one answer.
pub(in crate::http) fn bounds(time: Option<f64>, output: Option<u64>) -> Result<(Duration, usize)> {
    let time = match time {
        None => USUAL_TIME,
        Some(given) => seconds(given, "timeout_seconds")?,
    };
    if time.is_zero() || time > LONGEST_TIME {
        return Err(Error::new(
            ErrorCode::InvalidArgument,
            "no request waits that long for a program",
        )
        .hint("a WebSocket session has no limit")
        .field("timeout_seconds", "more than 0 and at most 3600"));
    }
    let most = output.map_or(Some(MOST_OUTPUT), |given| usize::try_from(given).ok());
    let most = most.filter(|most| *most <= MOST_OUTPUT).ok_or_else(|| {
        Error::new(
            ErrorCode::InvalidArgument,
            "no answer holds that much output",
        )
        .hint("a WebSocket session has no limit")
        .field("max_output_bytes", "at most 1048576")
    })?;
    Ok((time, most))
}

/// The size of a terminal.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct TerminalBody {
    rows: u32,
    columns: u32,
    /// The value of `TERM`; `xterm-256color` where it is left out.
    #[serde(default)]
    kind: String,
}

impl From<TerminalBody> for message::GuestTerminal {
    fn from(given: TerminalBody) -> Self {
        Self {
            rows: given.rows,
            columns: given.columns,
            kind: given.kind,
        }
    }
}

/// The first text frame of an exec session.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct ExecSessionBody {
    /// The program.
    program: String,
    /// Its arguments.
    #[serde(default)]
    arguments: Vec<String>,
    /// Variables besides the agent's own few.
    #[serde(default)]
    environment: BTreeMap<String, String>,
    /// Left out: the user's home.
    #[serde(default)]
    working_directory: String,
    /// Left out: root.
    #[serde(default)]
    user: String,
    /// Left out: the user's own.
    #[serde(default)]
    group: String,
    /// Whether stdin follows, in binary frames.
    #[serde(default)]
    stdin: bool,
    /// In a terminal.
    terminal: Option<TerminalBody>,
    /// Left out: no limit.
    timeout_seconds: Option<f64>,
    /// Left out: no limit.
    max_output_bytes: Option<u64>,
}

impl ExecSessionBody {
    pub(super) fn request(self) -> Result<ExecRequest> {
        let timeout = self
            .timeout_seconds
            .map(|given| seconds(given, "timeout_seconds"))
            .transpose()?;
        convert::exec_request(message::ExecStart {
            program: self.program,
            arguments: self.arguments,
            environment: self.environment.into_iter().collect(),
            working_directory: self.working_directory,
            user: self.user,
            group: self.group,
            stdin: self.stdin,
            terminal: self.terminal.map(Into::into),
            timeout: timeout.map(convert::duration),
            max_output_bytes: self.max_output_bytes.unwrap_or_default(),
            ..Default::default()
        })
    }
}

/// What a client says in text frames while a session runs.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub(in crate::http) enum Control {
    /// The terminal has another size.
    Resize { rows: u32, columns: u32 },
    /// A Linux signal's number, to the process group.
    Signal { number: u32 },
    /// Nothing more comes on stdin.
    StdinEnd,
}

/// Nothing: parameters of an address come into logs, so that none is taken where a key could be
/// meant.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct NoQuery {}

/// The shell that is wanted.
#[derive(Clone, Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(in crate::http) struct ShellQuery {
    /// Whose; root where it is left out.
    #[serde(default)]
    user: String,
    /// Left out: the user's home.
    #[serde(default)]
    working_directory: String,
    /// 24 where it is left out.
    rows: Option<u32>,
    /// 80 where it is left out.
    columns: Option<u32>,
    /// The value of `TERM`; `xterm-256color` where it is left out.
    #[serde(default)]
    term: String,
}

impl ShellQuery {
    pub(super) fn request(self) -> Result<ExecRequest> {
        convert::exec_request(message::ExecStart {
            working_directory: self.working_directory,
            user: self.user,
            stdin: true,
            terminal: Some(message::GuestTerminal {
                rows: self.rows.unwrap_or(24),
                columns: self.columns.unwrap_or(80),
                kind: self.term,
            }),
            login_shell: true,
            ..Default::default()
        })
    }
}

/// Which file, or which part of a directory.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(in crate::http) struct FileQuery {
    /// An absolute path in the guest.
    pub(super) path: String,
    /// 1: the entries of a directory, as JSON.
    #[serde(default)]
    pub(super) list: u8,
    /// 1: what is there, as JSON.
    #[serde(default)]
    pub(super) stat: u8,
    /// With `list`: only names after this one.
    #[serde(default)]
    pub(super) after: String,
    /// With `list`: at most so many; 1000 where it is left out, the most.
    #[serde(default)]
    pub(super) limit: u32,
}

/// Where to write.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(in crate::http) struct WriteQuery {
    /// An absolute path in the guest.
    pub(super) path: String,
    /// Permission bits in octal; 644 where they are left out.
    #[serde(default)]
    mode: String,
    /// The owner's number; root where it is left out.
    uid: Option<u32>,
    /// The group's number.
    gid: Option<u32>,
    /// 1: make the directories above.
    #[serde(default)]
    make_parents: u8,
    /// 1: refuse to replace what is there.
    #[serde(default)]
    no_replace: u8,
    /// 1: go on with what an earlier try left. The body is the whole file all the same; the part
    /// that the guest has is not sent again. Needs `X-Ghost-Checksum`.
    #[serde(default)]
    resume: u8,
}

impl WriteQuery {
    pub(super) fn start(
        self,
        size_bytes: u64,
        checksum: Vec<u8>,
    ) -> Result<message::WriteGuestFileStart> {
        let mode = match self.mode.as_str() {
            "" => 0o644,
            text => u32::from_str_radix(text, 8).map_err(|_| {
                Error::new(ErrorCode::InvalidArgument, "these are no permission bits")
                    .field("mode", "octal, such as 644")
            })?,
        };
        Ok(message::WriteGuestFileStart {
            path: self.path,
            size_bytes,
            mode,
            uid: self.uid.unwrap_or_default(),
            gid: self.gid.unwrap_or_default(),
            keep_owner: self.uid.is_some() || self.gid.is_some(),
            checksum,
            resume: self.resume != 0,
            make_parents: self.make_parents != 0,
            no_replace: self.no_replace != 0,
            ..Default::default()
        })
    }
}

/// How far back.
#[derive(Clone, Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(in crate::http) struct HistoryQuery {
    /// An hour where it is left out; at most 86400.
    span_seconds: Option<f64>,
}

impl HistoryQuery {
    pub(super) fn span(&self) -> Result<Option<Duration>> {
        self.span_seconds
            .map(|given| seconds(given, "span_seconds"))
            .transpose()
    }
}

/// An address of a VM.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct AddressBody {
    /// It must be leased to the VM or lie in the subnet of one of its networks; null forgets what
    /// was registered.
    #[serde(alias = "guest_ip")]
    #[schema(required)]
    pub(super) address: Option<String>,
}

/// Whether a VM's guest may be entered.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct AccessBody {
    /// false cuts what goes on in the guest.
    pub(super) access: bool,
}

/// How the guest goes down.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct ShutdownBody {
    /// Restart instead.
    #[serde(default)]
    pub(super) reboot: bool,
    /// After this; at once where it is left out.
    delay_seconds: Option<f64>,
}

impl ShutdownBody {
    pub(super) fn delay(&self) -> Result<Duration> {
        let given = self.delay_seconds.unwrap_or_default();
        seconds(given, "delay_seconds")
    }
}

/// Whose password, and which.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct PasswordBody {
    /// Whose.
    user: String,
    /// Which.
    #[schema(format = Password)]
    password: String,
    /// It is what crypt(3) writes.
    #[serde(default)]
    hashed: bool,
}

impl PasswordBody {
    pub(super) fn command(self) -> SetGuestPasswordCommand {
        SetGuestPasswordCommand {
            user: self.user,
            password: Secret::new(self.password),
            hashed: self.hashed,
        }
    }
}

/// Which SSH keys of which user.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct SshKeysBody {
    /// Whose.
    user: String,
    /// Lines to add.
    #[serde(default)]
    add: Vec<String>,
    /// Lines to remove, compared without their comments.
    #[serde(default)]
    remove: Vec<String>,
}

impl SshKeysBody {
    pub(super) fn command(self) -> UpdateGuestSshKeysCommand {
        UpdateGuestSshKeysCommand {
            user: self.user,
            add: self.add,
            remove: self.remove,
        }
    }
}

/// How to freeze.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct FreezeBody {
    /// After this the guest thaws by itself; 10 where it is left out, at most 60.
    timeout_seconds: Option<f64>,
    /// Empty: all file systems.
    #[serde(default)]
    mount_points: Vec<String>,
}

impl FreezeBody {
    pub(super) fn command(self) -> Result<FreezeGuestCommand> {
        Ok(FreezeGuestCommand {
            timeout: self
                .timeout_seconds
                .map(|given| seconds(given, "timeout_seconds"))
                .transpose()?,
            mount_points: self.mount_points,
        })
    }
}

/// Close all ways into guests, or open them again.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct LockdownBody {
    /// Close.
    pub(super) active: bool,
    /// Why.
    #[serde(default)]
    pub(super) reason: String,
}

/// Most lines of the audit log in one answer.
const MOST_ENTRIES: u32 = 10_000;

/// Which lines of the audit log.
#[derive(Clone, Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(in crate::http) struct AuditQuery {
    /// Only those about this VM: a name, an id, or the full id of one that is gone.
    pub(super) vm: Option<String>,
    /// Only those of the last so many seconds.
    since_seconds: Option<f64>,
    /// The newest so many; 1000 where it is left out, at most 10000.
    limit: Option<u32>,
}

impl AuditQuery {
    pub(super) fn since(&self, now: Timestamp) -> Result<Option<Timestamp>> {
        let Some(given) = self.since_seconds else {
            return Ok(None);
        };
        let span = seconds(given, "since_seconds")?;
        let millis = i64::try_from(span.as_millis()).unwrap_or(i64::MAX);
        let at = now.unix_millis().saturating_sub(millis);
        Ok(Some(Timestamp::from_unix_millis(at)))
    }

    pub(super) fn limit(&self) -> Result<u32> {
        let limit = self.limit.unwrap_or(1000);
        if (1..=MOST_ENTRIES).contains(&limit) {
            return Ok(limit);
        }
        Err(Error::new(
            ErrorCode::InvalidArgument,
            "no answer holds that many lines",
        )
        .hint("gRPC's ListAudit streams them")
        .field("limit", "1 to 10000"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_bounded_whatever_is_asked_for() {
        let body = |text: &str| serde_json::from_str::<ExecBody>(text).unwrap().request();
        let (request, stdin, most) = body(r#"{"program":"x"}"#).unwrap();
        assert_eq!(request.timeout, Some(USUAL_TIME));
        assert!(!request.stdin && stdin.is_none());
        assert_eq!(most, MOST_OUTPUT);
        let (request, stdin, _) = body(r#"{"program":"x","stdin_base64":"/wA="}"#).unwrap();
        assert!(request.stdin);
        assert_eq!(stdin.unwrap(), [0xff, 0]);
        for bad in [
            r#"{"program":"x","stdin":"a","stdin_base64":"YQ=="}"#,
            r#"{"program":"x","stdin_base64":"%"}"#,
            r#"{"program":"x","timeout_seconds":0}"#,
            r#"{"program":"x","timeout_seconds":3601}"#,
            r#"{"program":"x","max_output_bytes":1048577}"#,
        ] {
            let error = body(bad).unwrap_err();
            assert_eq!(error.code(), ErrorCode::InvalidArgument, "{bad}");
        }
        assert!(serde_json::from_str::<ExecBody>(r#"{"program":"x","comand":"y"}"#).is_err());
    }

    #[test]
    fn controls_are_read_strictly() {
        let read = serde_json::from_str::<Control>;
        assert!(matches!(
            read(r#"{"type":"resize","rows":1,"columns":2}"#),
            Ok(Control::Resize {
                rows: 1,
                columns: 2
            })
        ));
        assert!(matches!(
            read(r#"{"type":"stdin_end"}"#),
            Ok(Control::StdinEnd)
        ));
        for bad in [
            "",
            "[]",
            r#"{"type":"reboot"}"#,
            r#"{"type":"signal","number":-1}"#,
            r#"{"type":"signal","number":9,"pid":1}"#,
        ] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_owner_is_kept_where_one_is_named() {
        let query = |text: &str| {
            serde_json::from_str::<WriteQuery>(text)
                .unwrap()
                .start(3, Vec::new())
        };
        let start = query(r#"{"path":"/a"}"#).unwrap();
        assert_eq!((start.mode, start.keep_owner), (0o644, false));
        let start = query(r#"{"path":"/a","mode":"0755","uid":7}"#).unwrap();
        assert_eq!((start.mode, start.uid, start.gid), (0o755, 7, 0));
        assert!(start.keep_owner);
        assert!(query(r#"{"path":"/a","mode":"9"}"#).is_err());
    }
}
