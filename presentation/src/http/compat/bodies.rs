//! What clients of Batwa send and read. What is not understood is refused here as everywhere.

use std::time::Duration;

use ghost_domain::{ByteSize, Error, ErrorCode, Result};
use ghost_proto::agent::v1 as message;
use ghost_proto::view::VmState;
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::super::bodies::seconds;
use super::super::guest::{MOST_OUTPUT, bounds};
use super::Begun;
use crate::convert;

/// How long a program may run where nothing is said, as in the original.
const USUAL_TIME: f64 = 30.0;

/// An agent that says it is there. None of it is kept.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = BatwaRegister)]
pub(super) struct RegisterBody {
    /// The name or id under which the host joined the fleet.
    pub(super) agent_id: String,
    /// Another name to look for, where there is no such host.
    #[serde(default)]
    pub(super) hostname: String,
    /// Ignored: no address that a request names is dialled.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    #[expect(dead_code, reason = "taken and thrown away")]
    api_url: Option<IgnoredAny>,
    /// Ignored, kept nowhere: a host is reached through its own link.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    #[expect(dead_code, reason = "taken and thrown away")]
    api_key: Option<IgnoredAny>,
    /// Ignored: labels are set by who runs the fleet.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    #[expect(dead_code, reason = "taken and thrown away")]
    tags: Option<IgnoredAny>,
}

/// An agent that says how it is. Nothing of it is believed.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = BatwaHeartbeat)]
pub(super) struct HeartbeatBody {
    /// The name or id under which the host joined the fleet.
    pub(super) agent_id: String,
    /// Ignored: by Core's own clock.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    #[expect(dead_code, reason = "taken and thrown away")]
    timestamp: Option<IgnoredAny>,
    /// Ignored: by what comes over the host's link.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    #[expect(dead_code, reason = "taken and thrown away")]
    status: Option<IgnoredAny>,
    /// Ignored: the VMs themselves are known.
    #[serde(default)]
    #[schema(value_type = Option<u32>)]
    #[expect(dead_code, reason = "taken and thrown away")]
    vm_count: Option<IgnoredAny>,
}

/// Whether a host that is in use is removed too.
#[derive(Clone, Copy, Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct UnregisterQuery {
    /// Also one that is online, or for which commands wait.
    #[serde(default)]
    pub(super) force: bool,
}

/// That a host is known.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = BatwaRegistered)]
pub(super) struct Registered {
    /// True.
    pub(super) success: bool,
    /// What that means, for people.
    pub(super) message: String,
    /// The host.
    pub(super) agent_id: String,
    /// Its name.
    pub(super) hostname: String,
    /// `online` or `offline`.
    pub(super) status: String,
}

/// A host.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct BatwaAgent {
    /// Its name, by which the other routes take it; `tenant/name` for a caller of no tenant.
    pub agent_id: String,
    /// Its name.
    pub hostname: String,
    /// Its id in the fleet; null on a host by itself.
    pub host_id: Option<String>,
    /// `online`, or `offline` for whatever else it is.
    pub status: String,
    /// As the fleet knows it: `online degraded offline locked never_seen`.
    pub state: String,
    /// What is wrong.
    pub state_reason: Option<String>,
    /// When it was last heard, RFC 3339.
    pub last_heartbeat: Option<String>,
    /// How many VMs it has.
    pub vm_count: u32,
    /// The version of its agent.
    pub version: String,
    /// Null: hosts are reached through their own links.
    pub api_url: Option<String>,
}

/// All hosts.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = BatwaAgents)]
pub(super) struct AgentList {
    pub(super) agents: Vec<BatwaAgent>,
}

/// A VM, with the words of Multipass where it has one.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct BatwaVm {
    /// Its name.
    pub name: String,
    /// `Running`, `Stopped`, `Starting`, `Stopping`, `Restarting`, `Suspended`, `Suspending`,
    /// `Creating`, `Deleting`, `Failed` or `Unknown`.
    pub state: String,
    /// Why, for people.
    pub state_reason: Option<String>,
    /// Its IPv4 addresses.
    pub ipv4: Vec<String>,
    /// Its other addresses.
    pub ipv6: Vec<String>,
    /// The image that it was made from.
    pub release: String,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory.
    pub memory_bytes: u64,
    /// The size of its disk.
    pub disk_bytes: u64,
    /// The name of its host.
    pub hostname: String,
    /// Its host, as the other routes take it.
    pub agent_id: String,
    /// Its id.
    pub id: String,
    /// How old this is, where it comes from Core's memory.
    pub age_seconds: Option<f64>,
}

/// A state in Multipass's words.
pub(super) fn state_word(state: VmState) -> &'static str {
    match state {
        VmState::Creating => "Creating",
        VmState::Stopped => "Stopped",
        VmState::Starting => "Starting",
        VmState::Running => "Running",
        VmState::Pausing => "Suspending",
        VmState::Paused => "Suspended",
        VmState::Stopping => "Stopping",
        VmState::Restarting => "Restarting",
        VmState::Deleting => "Deleting",
        VmState::Failed => "Failed",
        VmState::Unknown => "Unknown",
    }
}

impl BatwaVm {
    /// A VM without a place.
    pub fn new(id: String, name: String, state: message::VmState) -> Self {
        Self {
            name,
            state: state_word(state.into()).to_owned(),
            state_reason: None,
            ipv4: Vec::new(),
            ipv6: Vec::new(),
            release: String::new(),
            cpus: 0,
            memory_bytes: 0,
            disk_bytes: 0,
            hostname: String::new(),
            agent_id: String::new(),
            id,
            age_seconds: None,
        }
    }

    /// With these addresses.
    #[must_use]
    pub fn addressed(mut self, addresses: impl IntoIterator<Item = String>) -> Self {
        (self.ipv6, self.ipv4) = addresses.into_iter().partition(|one| one.contains(':'));
        self
    }
}

/// All VMs.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = BatwaVms)]
pub(super) struct VmList {
    pub(super) vms: Vec<BatwaVm>,
}

/// On which host.
#[derive(Clone, Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct AgentQuery {
    /// Only on this host.
    pub(super) agent_id: Option<String>,
}

/// A number of bytes, or a size such as `2G`, which is binary as Multipass means it.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged)]
#[schema(as = BatwaSize)]
pub(super) enum Size {
    /// Bytes.
    Number(u64),
    /// `512M`, `2G`, `1.5GiB`.
    Text(String),
}

impl Size {
    fn bytes(given: Option<Self>, field: &str) -> Result<u64> {
        match given {
            None => Ok(0),
            Some(Self::Number(bytes)) => Ok(bytes),
            Some(Self::Text(text)) => text
                .parse::<ByteSize>()
                .map(ByteSize::bytes)
                .map_err(|error| error.field(field, "such as 512M or 2G")),
        }
    }
}

/// The VM that is wanted. It is started once it is made.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = BatwaCreate)]
pub(super) struct CreateBody {
    /// Left out: a name is made up.
    #[serde(default, alias = "name")]
    vm_name: String,
    /// An image of the host's cache or catalogue.
    image: String,
    /// Default 2.
    #[serde(default)]
    cpus: u32,
    /// Default 2 GiB.
    memory: Option<Size>,
    /// Default 10 GiB, or the image's size where that is larger.
    disk: Option<Size>,
    /// On this host; left out, Core finds one.
    pub(super) agent_id: Option<String>,
}

impl CreateBody {
    pub(super) fn message(self, request_id: String) -> Result<message::CreateVmRequest> {
        Ok(message::CreateVmRequest {
            name: self.vm_name,
            image: self.image,
            vcpus: self.cpus,
            memory_bytes: Size::bytes(self.memory, "memory")?,
            disk_bytes: Size::bytes(self.disk, "disk")?,
            start: true,
            request_id,
            ..Default::default()
        })
    }
}

/// Which VM.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = BatwaStart)]
pub(super) struct StartBody {
    /// Its name.
    #[serde(alias = "name")]
    pub(super) vm_name: String,
    /// On this host, where several have one of the name.
    pub(super) agent_id: Option<String>,
}

/// Which VM, and how.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = BatwaStop)]
pub(super) struct StopBody {
    /// Its name.
    #[serde(alias = "name")]
    pub(super) vm_name: String,
    /// On this host, where several have one of the name.
    pub(super) agent_id: Option<String>,
    /// Cut the power: at once, or after the timeout where one is given.
    #[serde(default)]
    pub(super) force: bool,
    /// How many seconds the guest may take to follow the ACPI request.
    timeout: Option<f64>,
}

impl StopBody {
    pub(super) fn timeout(&self) -> Result<Option<Duration>> {
        self.timeout
            .map(|given| seconds(given, "timeout"))
            .transpose()
    }
}

/// Which VM, and how.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = BatwaDelete)]
pub(super) struct DeleteBody {
    /// Its name.
    #[serde(alias = "name")]
    pub(super) vm_name: String,
    /// On this host, where several have one of the name.
    pub(super) agent_id: Option<String>,
    /// Cut the power first where it runs.
    #[serde(default)]
    pub(super) force: bool,
}

/// What was begun, and how far it came within ten seconds.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = BatwaChanged)]
pub(super) struct Changed {
    /// True: it is done, or goes on.
    pub(super) success: bool,
    /// For people.
    pub(super) message: String,
    /// The VM.
    pub(super) vm_name: String,
    /// Its host.
    pub(super) agent_id: String,
    /// The name of its host.
    pub(super) hostname: String,
    /// `succeeded`, or `pending` and `running` for what takes longer.
    pub(super) status: String,
    /// To follow it.
    pub(super) operation_id: String,
    /// Why it went to that host, where Core chose.
    pub(super) placement: Option<String>,
}

/// The name of a host without its tenant.
pub(super) fn host_name(agent_id: &str) -> String {
    agent_id
        .rsplit_once('/')
        .map_or(agent_id, |(_, name)| name)
        .to_owned()
}

impl Changed {
    pub(super) fn of(begun: Begun, done: &str) -> Self {
        use message::OperationStatus::{Pending, Succeeded};
        let status = match begun.operation.status() {
            Succeeded => "succeeded",
            Pending => "pending",
            _ => "running",
        };
        let name = begun.operation.subject;
        Self {
            success: true,
            message: match status {
                "succeeded" => format!("{name} was {done}"),
                _ => format!("{name} is being {done}; follow the operation"),
            },
            vm_name: name,
            hostname: host_name(&begun.agent_id),
            agent_id: begun.agent_id,
            status: status.to_owned(),
            operation_id: begun.operation.id,
            placement: begun.placement,
        }
    }
}

/// A program with its arguments, or a line for the guest's `/bin/sh`.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged)]
#[schema(as = BatwaCommand)]
pub(super) enum Command {
    /// A program with its arguments.
    List(Vec<String>),
    /// A line for the guest's `/bin/sh`.
    Line(String),
}

/// What to run in which VM.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = BatwaExecute)]
pub(super) struct ExecuteBody {
    /// The VM. Left out, `command` is Multipass's `["exec", VM, "--", PROGRAM, ...]`.
    #[serde(default, alias = "name")]
    vm_name: Option<String>,
    /// What to run, in the VM.
    #[serde(alias = "args")]
    command: Command,
    /// Seconds, after which it is killed; 30 where it is left out, at most 3600.
    timeout: Option<f64>,
    /// On this host, where several have a VM of the name.
    pub(super) agent_id: Option<String>,
}

impl ExecuteBody {
    /// Which VM, the program, and the bound of its output.
    pub(super) fn request(self) -> Result<(String, message::ExecStart, usize)> {
        let (vm, mut command) = match (self.vm_name, self.command) {
            (Some(vm), Command::List(command)) => (vm, command),
            (Some(vm), Command::Line(line)) if !line.is_empty() => {
                (vm, vec!["/bin/sh".to_owned(), "-c".to_owned(), line])
            }
            (Some(vm), Command::Line(_)) => (vm, Vec::new()),
            (None, Command::List(arguments)) => of_multipass(arguments)?,
            (None, Command::Line(_)) => return Err(no_vm()),
        };
        if command.is_empty() || command[0].is_empty() {
            return Err(
                Error::new(ErrorCode::InvalidArgument, "there is nothing to run")
                    .field("command", "needed"),
            );
        }
        let program = command.remove(0);
        let (timeout, most) = bounds(Some(self.timeout.unwrap_or(USUAL_TIME)), None)
            .map_err(|error| error.field("timeout", "more than 0 and at most 3600"))?;
        let start = message::ExecStart {
            program,
            arguments: command,
            timeout: Some(convert::duration(timeout)),
            // What the answer does not hold is thrown away in the guest already.
            max_output_bytes: 2 * MOST_OUTPUT as u64,
            ..Default::default()
        };
        Ok((vm, start, most))
    }
}

fn no_vm() -> Error {
    Error::new(ErrorCode::InvalidArgument, "no VM was named")
        .because("programs are run in VMs only, never on their host")
        .field("vm_name", "the name of a VM")
}

/// `exec NAME [--] PROGRAM …`, the one command line of Multipass that runs something in a VM. The
/// original passed on any.
fn of_multipass(arguments: Vec<String>) -> Result<(String, Vec<String>)> {
    let mut rest = arguments.into_iter();
    let refused = |what: String| {
        Error::new(ErrorCode::InvalidArgument, what)
            .because("command lines of Multipass are not passed on")
            .hint("there are /api/vm/list, info, create, start, stop and delete")
            .field("command", "[\"exec\", VM, \"--\", PROGRAM, ...]")
    };
    match rest.next().as_deref() {
        Some("exec") => {}
        Some(other) => return Err(refused(format!("{other:?} is not run here"))),
        None => return Err(no_vm()),
    }
    let vm = rest.next().ok_or_else(no_vm)?;
    if vm.starts_with('-') {
        return Err(refused("options of exec are not taken".to_owned()));
    }
    let mut command: Vec<String> = rest.collect();
    if command.first().is_some_and(|first| first == "--") {
        command.remove(0);
    } else if command.first().is_some_and(|first| first.starts_with('-')) {
        return Err(refused("options of exec are not taken".to_owned()));
    }
    Ok((vm, command))
}

/// What a program did.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = BatwaExecuted)]
pub(super) struct Executed {
    /// It ended by itself with 0.
    pub(super) success: bool,
    /// Its exit code; a signal's number below 0 where one ended it, as Python tells it.
    pub(super) returncode: i32,
    /// Its output; bytes that are no text are replaced by U+FFFD.
    pub(super) stdout: String,
    /// What it wrote to stderr.
    pub(super) stderr: String,
    /// Its time ran out.
    pub(super) timed_out: bool,
    /// There was more output than the answer holds, a mebibyte of each.
    pub(super) truncated: bool,
}

/// Which terminal.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct TerminalQuery {
    /// The VM.
    pub(super) vm_name: String,
    /// On this host, where several have one of the name.
    pub(super) agent_id: Option<String>,
    /// 24 where it is left out.
    rows: Option<u32>,
    /// 80 where it is left out.
    cols: Option<u32>,
}

impl TerminalQuery {
    pub(super) fn start(&self) -> message::ExecStart {
        message::ExecStart {
            stdin: true,
            terminal: Some(message::GuestTerminal {
                rows: self.rows.unwrap_or(24),
                columns: self.cols.unwrap_or(80),
                kind: String::new(),
            }),
            login_shell: true,
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn execute(text: &str) -> Result<(String, message::ExecStart, usize)> {
        serde_json::from_str::<ExecuteBody>(text).unwrap().request()
    }

    #[test]
    fn programs_are_run_in_vms_and_nowhere_else() {
        let (vm, start, _) = execute(r#"{"vm_name":"web","command":"uname -a"}"#).unwrap();
        assert_eq!((vm.as_str(), start.program.as_str()), ("web", "/bin/sh"));
        assert_eq!(start.arguments, ["-c", "uname -a"]);
        assert_eq!(start.timeout.unwrap().seconds, 30);
        for text in [
            r#"{"vm_name":"web","command":["uname","-a"]}"#,
            r#"{"command":["exec","web","--","uname","-a"]}"#,
            r#"{"args":["exec","web","uname","-a"]}"#,
        ] {
            let (vm, start, _) = execute(text).unwrap();
            assert_eq!((vm.as_str(), start.program.as_str()), ("web", "uname"));
            assert_eq!(start.arguments, ["-a"], "{text}");
        }
        for bad in [
            r#"{"command":"uname"}"#,
            r#"{"command":["shell","web"]}"#,
            r#"{"command":["delete","--purge","web"]}"#,
            r#"{"command":["exec"]}"#,
            r#"{"command":["exec","web"]}"#,
            r#"{"command":["exec","-n","web","id"]}"#,
            r#"{"command":["exec","web","-d","/","id"]}"#,
            r#"{"command":[]}"#,
            r#"{"vm_name":"web","command":""}"#,
            r#"{"vm_name":"web","command":[]}"#,
            r#"{"vm_name":"web","command":"id","timeout":0}"#,
            r#"{"vm_name":"web","command":"id","timeout":86400}"#,
        ] {
            let error = execute(bad).unwrap_err();
            assert_eq!(error.code(), ErrorCode::InvalidArgument, "{bad}");
        }
    }

    #[test]
    fn sizes_are_those_of_multipass() {
        let create = |text: &str| {
            serde_json::from_str::<CreateBody>(text)
                .unwrap()
                .message(String::new())
        };
        let made = create(r#"{"name":"web","image":"tiny","memory":"2G","disk":1073741824}"#);
        let made = made.unwrap();
        assert_eq!(
            (made.memory_bytes, made.disk_bytes, made.start),
            (2 << 30, 1 << 30, true)
        );
        let error = create(r#"{"image":"tiny","memory":"much"}"#).unwrap_err();
        assert_eq!(error.violations()[0].field, "memory");
    }

    #[test]
    fn the_secrets_of_a_registration_are_kept_nowhere() {
        let text = r#"{"agent_id":"pc","hostname":"pc","api_url":"http://10.0.0.1:8001",
            "api_key":"hush","tags":["a"]}"#;
        let body: RegisterBody = serde_json::from_str(text).unwrap();
        let shown = format!("{body:?}");
        assert!(
            !shown.contains("hush") && !shown.contains("10.0.0.1"),
            "{shown}"
        );
    }

    #[test]
    fn addresses_are_told_apart() {
        let vm = BatwaVm::new("1".into(), "web".into(), message::VmState::Paused)
            .addressed(["fe80::1".to_owned(), "192.0.2.7".to_owned()]);
        assert_eq!(vm.state, "Suspended");
        assert_eq!(vm.ipv4, ["192.0.2.7"]);
        assert_eq!(vm.ipv6, ["fe80::1"]);
    }
}
