//! What can go wrong, as the person and the calling script see it: one table from stable code to
//! exit code, and one rendering. Nothing else in this program decides an exit code.

use std::time::Duration;

use ghost_proto::view::{ErrorBody, ErrorDetail, FieldViolation, OperationError};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::text::{exact_duration, human_duration, printable};

/// The exit codes of the contract. Their order is that of their numbers: `worst` relies on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Exit {
    /// It was done.
    Done,
    /// It failed.
    Failed,
    /// The command line or a value in it is wrong.
    Usage,
    /// There is no such thing.
    NotFound,
    /// It exists already, is busy, or is in the wrong state.
    Conflict,
    /// The agent cannot be reached, or does not take work now.
    Unreachable,
    /// Not allowed.
    Denied,
    /// A deadline passed.
    TimedOut,
    /// Not enough resources.
    Resources,
    /// Ctrl-C while waiting: 128 and the number of SIGINT, as shells report it.
    Interrupted,
    /// A command ran in a guest, and this is its own code.
    Command(u8),
}

impl Exit {
    /// The number that the process ends with.
    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::NotFound => 3,
            Self::Conflict => 4,
            Self::Unreachable => 5,
            Self::Denied => 6,
            Self::TimedOut => 7,
            Self::Resources => 8,
            Self::Interrupted => 130,
            Self::Command(code) => code,
        }
    }
}

impl From<Exit> for std::process::ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

macro_rules! codes {
    ($($text:literal => $variant:ident, $exit:ident;)*) => {
        /// The stable codes, as `ghost_domain::ErrorCode` has them, and the client's own. A test
        /// holds the two lists equal.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum ErrorCode { $($variant,)* }

        impl ErrorCode {
            /// The code as scripts see it.
            pub(crate) const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }

            /// Reads a code; `None` for one that only a newer agent knows.
            pub(crate) fn parse(text: &str) -> Option<Self> {
                match text { $($text => Some(Self::$variant),)* _ => None }
            }

            /// The exit code that it ends in.
            pub(crate) const fn exit(self) -> Exit {
                match self { $(Self::$variant => Exit::$exit,)* }
            }

            #[cfg(test)]
            const ALL: &'static [Self] = &[$(Self::$variant,)*];
        }
    };
}

codes! {
    "invalid_argument" => InvalidArgument, Usage;
    "invalid_name" => InvalidName, Usage;
    "invalid_size" => InvalidSize, Usage;
    "invalid_user_data" => InvalidUserData, Usage;
    "disk_too_small" => DiskTooSmall, Usage;
    "payload_too_large" => PayloadTooLarge, Usage;
    "vm_ambiguous" => VmAmbiguous, Usage;
    "host_ambiguous" => HostAmbiguous, Usage;
    "host_required" => HostRequired, Usage;

    "vm_not_found" => VmNotFound, NotFound;
    "image_not_found" => ImageNotFound, NotFound;
    "operation_not_found" => OperationNotFound, NotFound;
    "network_not_found" => NetworkNotFound, NotFound;
    "credential_not_found" => CredentialNotFound, NotFound;
    "guest_file_not_found" => GuestFileNotFound, NotFound;
    "host_not_found" => HostNotFound, NotFound;
    "command_not_found" => CommandNotFound, NotFound;
    "tenant_not_found" => TenantNotFound, NotFound;
    "user_not_found" => UserNotFound, NotFound;
    "not_found" => NotFound, NotFound;

    "name_taken" => NameTaken, Conflict;
    "image_exists" => ImageExists, Conflict;
    "image_in_use" => ImageInUse, Conflict;
    "vm_busy" => VmBusy, Conflict;
    "vm_running" => VmRunning, Conflict;
    "vm_not_running" => VmNotRunning, Conflict;
    "wrong_state" => WrongState, Conflict;
    "delete_protected" => DeleteProtected, Conflict;
    "generation_mismatch" => GenerationMismatch, Conflict;
    "operation_finished" => OperationFinished, Conflict;
    "request_id_reused" => RequestIdReused, Conflict;
    "host_name_taken" => HostNameTaken, Conflict;
    "host_locked" => HostLocked, Conflict;
    "confirmation_required" => ConfirmationRequired, Conflict;
    "stale_command" => StaleCommand, Conflict;
    "command_taken" => CommandTaken, Conflict;
    "tenant_exists" => TenantExists, Conflict;
    "tenant_in_use" => TenantInUse, Conflict;
    "not_enrolled" => NotEnrolled, Conflict;
    "already_enrolled" => AlreadyEnrolled, Conflict;
    "guest_frozen" => GuestFrozen, Conflict;

    "agent_unreachable" => AgentUnreachable, Unreachable;
    "recovering" => Recovering, Unreachable;
    "guest_unreachable" => GuestUnreachable, Unreachable;
    "shutting_down" => ShuttingDown, Unreachable;
    "host_offline" => HostOffline, Unreachable;
    "core_unreachable" => CoreUnreachable, Unreachable;

    "unauthenticated" => Unauthenticated, Denied;
    "permission_denied" => PermissionDenied, Denied;
    "token_invalid" => TokenInvalid, Denied;
    "guest_path_denied" => GuestPathDenied, Denied;
    "guest_access_off" => GuestAccessOff, Denied;
    "core_permission_denied" => CorePermissionDenied, Denied;
    "lockdown" => Lockdown, Denied;

    "deadline_exceeded" => DeadlineExceeded, TimedOut;

    "insufficient_resources" => InsufficientResources, Resources;
    "disk_full" => DiskFull, Resources;
    "no_host_fits" => NoHostFits, Resources;
    "quota_exceeded" => QuotaExceeded, Resources;
    "too_many_requests" => TooManyRequests, Resources;

    "checksum_mismatch" => ChecksumMismatch, Failed;
    "download_failed" => DownloadFailed, Failed;
    "unsafe_image" => UnsafeImage, Failed;
    "unsupported_image" => UnsupportedImage, Failed;
    "image_too_large" => ImageTooLarge, Failed;
    "hypervisor_unavailable" => HypervisorUnavailable, Failed;
    "hypervisor_failed" => HypervisorFailed, Failed;
    "guest_unsupported" => GuestUnsupported, Failed;
    "guest_failed" => GuestFailed, Failed;
    "network_failed" => NetworkFailed, Failed;
    "store_unavailable" => StoreUnavailable, Failed;
    "cancelled" => Cancelled, Failed;
    "io_failed" => IoFailed, Failed;
    "internal" => Internal, Failed;

    // The client's own: the person left a wait, nothing failed.
    "interrupted" => Interrupted, Interrupted;
}

/// How this run got to what it asked, as far as the command line said so: a command that is to be run
/// next has to say the same, or it asks somebody else.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Way {
    /// The `--endpoint` of the command line.
    pub(crate) endpoint: Option<String>,
    /// The `--context` of the command line.
    pub(crate) context: Option<String>,
    /// The host of a fleet.
    pub(crate) host: Option<String>,
}

/// Commands that are about one host.
const OF_A_HOST: [&str; 12] = [
    "vm",
    "launch",
    "list",
    "exec",
    "shell",
    "cp",
    "guest",
    "image",
    "operation",
    "network",
    "events",
    "status",
];
/// Commands that are about the fleet, or about whoever is asked. All others are to be run somewhere
/// else than here, such as on the host itself.
const OF_ANY: [&str; 5] = ["host", "command", "tenant", "user", "version"];

impl Way {
    /// How a command about the same host begins.
    pub(crate) fn ghostctl(&self) -> String {
        self.begin(true)
    }

    fn begin(&self, host: bool) -> String {
        let mut line = "ghostctl".to_owned();
        for (flag, value) in [
            ("endpoint", self.endpoint.as_ref()),
            ("context", self.context.as_ref()),
            ("host", self.host.as_ref().filter(|_| host)),
        ] {
            if let Some(value) = value {
                line.push_str(&format!(" --{flag} {}", quoted(value)));
            }
        }
        line
    }

    /// A hint whose commands go the same way; `fleet`: no host plays a part in them.
    fn lead(&self, hint: &str, fleet: bool) -> String {
        let to_host = !fleet && !hint.contains("--host");
        let mut parts = hint.split("ghostctl ");
        let mut led = parts.next().unwrap_or_default().to_owned();
        for part in parts {
            let end = part.find(|c: char| !c.is_ascii_lowercase() && c != '-');
            let command = &part[..end.unwrap_or(part.len())];
            let ghostctl = if OF_A_HOST.contains(&command) {
                self.begin(to_host)
            } else if OF_ANY.contains(&command) {
                self.begin(false)
            } else {
                "ghostctl".to_owned()
            };
            led.push_str(&format!("{ghostctl} {part}"));
        }
        led
    }
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:@[]%+=,".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// What went wrong, why, and what to do next.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Failure(Box<Parts>);

#[derive(Clone, Debug, PartialEq)]
struct Parts {
    exit: Exit,
    detail: ErrorDetail,
    /// The agent could not be asked, or did not answer: what it did is not known.
    transport: bool,
    /// How the next command gets to the same place.
    way: Way,
    /// Core itself answered, about the fleet.
    fleet: bool,
}

impl Failure {
    /// A failure with its code and what happened, as a fragment without a full stop.
    pub(crate) fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self(Box::new(Parts {
            exit: code.exit(),
            detail: ErrorDetail {
                code: code.as_str().to_owned(),
                message: message.into(),
                cause: None,
                hint: None,
                operation_id: None,
                violations: Vec::new(),
            },
            transport: false,
            way: Way::default(),
            fleet: false,
        }))
    }

    /// A wrong command line that only shows when the parts of it are seen together.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::InvalidArgument, message)
    }

    /// Adds why it happened.
    #[must_use]
    pub(crate) fn because(mut self, cause: impl std::fmt::Display) -> Self {
        self.0.detail.cause = Some(cause.to_string());
        self
    }

    /// Adds the next thing to do, best a command.
    #[must_use]
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.detail.hint = Some(hint.into());
        self
    }

    /// Names the operation it belongs to.
    #[must_use]
    pub(crate) fn of_operation(mut self, id: &str) -> Self {
        self.0.detail.operation_id = Some(id.to_owned()).filter(|id| !id.is_empty());
        self
    }

    /// Marks it as a failure to reach the agent rather than an answer of the agent.
    #[must_use]
    pub(crate) fn transport(mut self) -> Self {
        self.0.transport = true;
        self
    }

    /// A person left a wait; the operation goes on.
    pub(crate) fn interrupted(operation_id: &str) -> Self {
        Self::new(
            ErrorCode::Interrupted,
            format!("interrupted; the operation {operation_id} goes on"),
        )
        .hint(format!("ghostctl operation wait {operation_id}"))
        .of_operation(operation_id)
    }

    /// Of a call that Core answered itself: no host plays a part in what to do next.
    #[must_use]
    pub(crate) fn of_fleet(mut self) -> Self {
        self.0.fleet = true;
        self
    }

    /// Of a call that went this way: what to do next is to be done there.
    #[must_use]
    pub(crate) fn at(mut self, way: Way) -> Self {
        if let Some(hint) = &mut self.0.detail.hint {
            *hint = way.lead(hint, self.0.fleet);
        }
        self.0.way = way;
        self
    }

    /// The exit code.
    pub(crate) fn exit(&self) -> Exit {
        self.0.exit
    }

    /// The stable code.
    pub(crate) fn code(&self) -> &str {
        &self.0.detail.code
    }

    /// Whether the agent did not answer.
    pub(crate) fn is_transport(&self) -> bool {
        self.0.transport
    }

    /// What to do next, if that is known.
    pub(crate) fn has_hint(&self) -> bool {
        self.0.detail.hint.is_some()
    }

    /// The document of `-o json`.
    pub(crate) fn body(&self) -> ErrorBody {
        ErrorBody {
            error: self.0.detail.clone(),
        }
    }

    /// The lines for people, without colours; `label` starts the first one.
    pub(crate) fn lines(&self) -> Vec<(&'static str, String)> {
        let detail = &self.0.detail;
        if detail.code == ErrorCode::Interrupted.as_str()
            && let Some(id) = &detail.operation_id
        {
            let id = printable(id);
            let ghostctl = printable(&self.0.way.ghostctl());
            return vec![
                ("interrupted:", format!("the operation {id} goes on")),
                ("  come back:", format!("{ghostctl} operation wait {id}")),
                ("  cancel it:", format!("{ghostctl} operation cancel {id}")),
            ];
        }
        let mut lines = vec![("error:", printable(&detail.message))];
        if let Some(cause) = &detail.cause {
            lines.push(("  cause:", printable(cause)));
        }
        for violation in &detail.violations {
            lines.push((
                "  field:",
                printable(&format!("{}: {}", violation.field, violation.description)),
            ));
        }
        if let Some(hint) = &detail.hint {
            lines.push(("  try:", printable(hint)));
        }
        lines
    }

    /// An answer of the agent, or of the transport in its stead.
    pub(crate) fn from_status(status: &Status) -> Self {
        let details = status.get_error_details();
        let mut failure = match details.error_info() {
            Some(info) => Self::from_error_info(status, info),
            None => Self::from_bare_status(status),
        };
        if let Some(request) = details.bad_request() {
            failure.0.detail.violations = request
                .field_violations
                .iter()
                .map(|violation| FieldViolation {
                    field: violation.field.clone(),
                    description: violation.description.clone(),
                })
                .collect();
        }
        if let Some(delay) = details.retry_info().and_then(|info| info.retry_delay)
            && !failure.has_hint()
        {
            failure = failure.hint(format!("the same again in {}", human_duration(delay)));
        }
        failure
    }

    fn from_error_info(status: &Status, info: &tonic_types::ErrorInfo) -> Self {
        let mut failure = match ErrorCode::parse(&info.reason) {
            Some(code) => Self::new(code, status.message()),
            // A newer agent: keep its code, and let the class of the status decide the exit code.
            None => {
                let mut failure = Self::new(fallback(status.code()), status.message());
                failure.0.detail.code.clone_from(&info.reason);
                failure
            }
        };
        let part = |key: &str| {
            info.metadata
                .get(key)
                .filter(|text| !text.is_empty())
                .cloned()
        };
        failure.0.detail.cause = part("cause");
        failure.0.detail.hint = part("hint");
        failure.0.detail.operation_id = part("operation_id");
        failure
    }

    /// A status without details comes from the transport or from something between us and the
    /// agent, never from the agent itself.
    fn from_bare_status(status: &Status) -> Self {
        let message = status.message();
        match status.code() {
            Code::DeadlineExceeded => no_answer(),
            Code::Cancelled if message == "Timeout expired" => no_answer(),
            Code::Unavailable | Code::Unknown | Code::Aborted => {
                Self::new(ErrorCode::AgentUnreachable, "the agent was lost")
                    .because(root_cause(status))
                    .hint("ghostctl status")
                    .transport()
            }
            Code::Unimplemented => Self::new(
                ErrorCode::Internal,
                "the agent does not know this request; it is older than this ghostctl",
            )
            .hint("ghostctl version"),
            Code::Internal | Code::Cancelled => {
                Self::new(ErrorCode::AgentUnreachable, "the connection broke")
                    .because(root_cause(status))
                    .hint("ghostctl status")
                    .transport()
            }
            code => Self::new(
                fallback(code),
                if message.is_empty() {
                    code.description().to_owned()
                } else {
                    message.to_owned()
                },
            ),
        }
    }

    /// Why an operation ended as it did.
    pub(crate) fn from_operation(operation: &ghost_proto::view::Operation) -> Option<Self> {
        use ghost_proto::view::OperationStatus as S;
        let subject = &operation.subject;
        let kind = operation.kind.replace('_', " ");
        let code = match operation.status {
            S::Succeeded | S::Pending | S::Running => return None,
            S::Cancelled => ErrorCode::Cancelled,
            S::Failed | S::RolledBack | S::NeedsAttention => ErrorCode::Internal,
        };
        let mut failure = match &operation.error {
            Some(error) => Self::from_operation_error(error, code),
            None => Self::new(
                code,
                match operation.status {
                    S::Cancelled => format!("{kind} {subject} was cancelled"),
                    S::RolledBack => {
                        format!("{kind} {subject} was undone when the agent restarted")
                    }
                    _ => format!("{kind} {subject} failed"),
                },
            ),
        };
        if !failure.has_hint() {
            failure = failure.hint(format!("ghostctl operation show {}", operation.id));
        }
        Some(failure.of_operation(&operation.id))
    }

    fn from_operation_error(error: &OperationError, otherwise: ErrorCode) -> Self {
        let code = ErrorCode::parse(&error.code);
        let mut failure = Self::new(code.unwrap_or(otherwise), error.message.clone());
        if code.is_none() {
            failure.0.detail.code.clone_from(&error.code);
        }
        failure.0.detail.cause.clone_from(&error.cause);
        failure.0.detail.hint.clone_from(&error.hint);
        failure
    }

    /// A local file or the terminal did not do what was asked.
    pub(crate) fn io(what: impl Into<String>, error: &std::io::Error) -> Self {
        Self::new(ErrorCode::IoFailed, what).because(error)
    }
}

fn no_answer() -> Failure {
    Failure::new(
        ErrorCode::DeadlineExceeded,
        "the agent did not answer in time",
    )
    .because("it is reachable but hangs or is overloaded")
    .hint("ghostctl status, and look at the agent's log")
    .transport()
}

/// The class of a gRPC status, for codes that this version does not know.
const fn fallback(code: Code) -> ErrorCode {
    match code {
        Code::InvalidArgument | Code::OutOfRange => ErrorCode::InvalidArgument,
        Code::NotFound => ErrorCode::NotFound,
        Code::AlreadyExists => ErrorCode::NameTaken,
        Code::FailedPrecondition | Code::Aborted => ErrorCode::WrongState,
        Code::Unavailable => ErrorCode::AgentUnreachable,
        Code::PermissionDenied => ErrorCode::PermissionDenied,
        Code::Unauthenticated => ErrorCode::Unauthenticated,
        Code::DeadlineExceeded => ErrorCode::DeadlineExceeded,
        Code::ResourceExhausted => ErrorCode::InsufficientResources,
        Code::Cancelled => ErrorCode::Cancelled,
        Code::Ok | Code::Unknown | Code::Unimplemented | Code::Internal | Code::DataLoss => {
            ErrorCode::Internal
        }
    }
}

/// The innermost error of a chain says most; the outer ones say "transport error".
pub(crate) fn root_cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    match last.downcast_ref::<Status>() {
        Some(status) => status.message().to_owned(),
        None => last.to_string(),
    }
}

/// The worst of several outcomes: the highest exit code, so that a script that looks at one number
/// learns of the rarest trouble.
pub(crate) fn worst(exits: impl IntoIterator<Item = Exit>) -> Exit {
    exits.into_iter().max().unwrap_or(Exit::Done)
}

/// The deadline of a wait that the person set has passed.
pub(crate) fn timed_out(what: impl Into<String>, after: Duration) -> Failure {
    Failure::new(ErrorCode::DeadlineExceeded, what)
        .because(format!("{} went by", exact_duration(after)))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use tonic_types::{ErrorDetails, StatusExt};

    use super::*;

    #[test]
    fn the_table_has_every_code_of_the_domain_and_only_our_own_besides() {
        let domain: BTreeSet<_> = ghost_domain::ErrorCode::ALL
            .iter()
            .map(|code| code.as_str())
            .collect();
        let ours: BTreeSet<_> = ErrorCode::ALL.iter().map(|code| code.as_str()).collect();
        let missing: Vec<_> = domain.difference(&ours).collect();
        let surplus: Vec<_> = ours.difference(&domain).collect();
        assert!(
            missing.is_empty(),
            "give these codes an exit code: {missing:?}"
        );
        assert_eq!(surplus, [&"interrupted"]);
        for code in ErrorCode::ALL {
            assert_eq!(ErrorCode::parse(code.as_str()), Some(*code));
            assert_ne!(code.exit(), Exit::Done);
        }
    }

    #[test]
    fn what_to_do_next_is_asked_of_the_same_host() {
        let way = Way {
            context: Some("my fleet".to_owned()),
            host: Some("pc".to_owned()),
            ..Way::default()
        };
        let hint = |text: &str| {
            let failure = Failure::new(ErrorCode::Internal, "it failed").hint(text);
            let led = failure.clone().at(way.clone()).body().error.hint.unwrap();
            let told = failure
                .of_fleet()
                .at(way.clone())
                .body()
                .error
                .hint
                .unwrap();
            (led, told)
        };
        // Every command of a hint, not the first alone.
        assert_eq!(
            hint("ghostctl guest status web, ghostctl vm logs web"),
            (
                "ghostctl --context 'my fleet' --host pc guest status web, \
                 ghostctl --context 'my fleet' --host pc vm logs web"
                    .to_owned(),
                "ghostctl --context 'my fleet' guest status web, \
                 ghostctl --context 'my fleet' vm logs web"
                    .to_owned(),
            )
        );
        assert_eq!(
            hint("see ghostctl host list").0,
            "see ghostctl --context 'my fleet' host list"
        );
        // What is for the host's owner, or makes another context.
        for elsewhere in [
            "on the host: ghostctl core allow-deletes --for 10m",
            "on the agent's host: ghostctl trust token --role operator",
            "ghostctl context add NAME --replace",
            "an admin opens them again: ghostctl lockdown --lift",
        ] {
            assert_eq!(hint(elsewhere).0, elsewhere);
        }
        let lines = Failure::interrupted("0d1b").at(way.clone()).lines();
        assert_eq!(
            lines[2].1,
            "ghostctl --context 'my fleet' --host pc operation cancel 0d1b"
        );
        assert_eq!(Way::default().ghostctl(), "ghostctl");
    }

    #[test]
    fn a_rich_status_keeps_all_its_parts() {
        let mut details = ErrorDetails::new();
        details.set_error_info(
            "insufficient_resources",
            "ghost",
            [
                ("cause".to_owned(), "1 GiB is free".to_owned()),
                ("hint".to_owned(), "ghostctl status".to_owned()),
                ("operation_id".to_owned(), "0d1b".to_owned()),
            ],
        );
        details.add_bad_request_violation("memory_bytes", "at most 1 GiB");
        let status =
            Status::with_error_details(Code::ResourceExhausted, "no memory is left", details);
        let failure = Failure::from_status(&status);
        assert_eq!(failure.exit(), Exit::Resources);
        assert!(!failure.is_transport());
        assert_eq!(
            failure.lines(),
            [
                ("error:", "no memory is left".to_owned()),
                ("  cause:", "1 GiB is free".to_owned()),
                ("  field:", "memory_bytes: at most 1 GiB".to_owned()),
                ("  try:", "ghostctl status".to_owned()),
            ]
        );
        assert_eq!(failure.body().error.operation_id.as_deref(), Some("0d1b"));
    }

    #[test]
    fn a_code_of_a_newer_agent_is_kept_and_classed() {
        let details = ErrorDetails::with_error_info("quota_of_2031", "ghost", []);
        let status = Status::with_error_details(Code::NotFound, "no quota", details);
        let failure = Failure::from_status(&status);
        assert_eq!(failure.code(), "quota_of_2031");
        assert_eq!(failure.exit(), Exit::NotFound);
    }

    #[test]
    fn a_retry_delay_becomes_the_hint() {
        let mut details = ErrorDetails::with_error_info("shutting_down", "ghost", []);
        details.set_retry_info(Some(Duration::from_secs(30)));
        let status = Status::with_error_details(Code::Unavailable, "the agent stops", details);
        let failure = Failure::from_status(&status);
        assert_eq!(failure.exit(), Exit::Unreachable);
        assert_eq!(
            failure.body().error.hint.as_deref(),
            Some("the same again in 30s")
        );
    }

    #[test]
    fn a_bare_status_is_the_transport() {
        for (status, exit) in [
            (Status::unavailable("tcp"), Exit::Unreachable),
            (Status::unknown("transport error"), Exit::Unreachable),
            (Status::cancelled("Timeout expired"), Exit::TimedOut),
            (Status::unimplemented(""), Exit::Failed),
            (Status::permission_denied("no"), Exit::Denied),
        ] {
            assert_eq!(Failure::from_status(&status).exit(), exit, "{status}");
        }
    }

    #[test]
    fn control_characters_of_a_guest_do_not_reach_the_terminal() {
        let failure = Failure::new(ErrorCode::Internal, "bad \x1b[2J name");
        assert_eq!(failure.lines()[0].1, "bad \\x1b[2J name");
    }
}
