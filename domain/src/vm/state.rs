//! The state machine, as pure functions: what is shown ([`show`]) and what is allowed ([`decide`]).
//!
//! ```text
//!                 create            start
//!    (nothing) ──────────> creating ──────┐        ┌──────── resume ───────┐
//!                             │           v        v                       │
//!                             └──────> stopped ─> starting ─> running ─> pausing ─> paused
//!                                        ^  │                  │   ^
//!                                        │  │ delete           │   └ restarting <─ restart
//!                                        │  v                  │
//!                                        │ deleting            │ stop (ACPI, then power)
//!                                        └────── stopping <────┘
//!
//!    failed: a part is missing, or QEMU crashed and the policy leaves it off
//!    unknown: libvirt does not answer, so nobody knows; the last known state is kept beside it
//! ```

use std::fmt;
use std::time::Duration;

use crate::{Error, ErrorCode, OperationKind, Timestamp};

use super::{Lifecycle, Vm};

/// The states that people and programs see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum VmState {
    /// Being made.
    Creating,
    /// Off.
    Stopped,
    /// On its way up.
    Starting,
    /// Running.
    Running,
    /// Being halted.
    Pausing,
    /// Halted, memory kept.
    Paused,
    /// On its way down.
    Stopping,
    /// On its way down and up again.
    Restarting,
    /// Being removed.
    Deleting,
    /// Broken or crashed.
    Failed,
    /// Nobody knows.
    Unknown,
}

impl VmState {
    /// Every state.
    pub const ALL: [Self; 11] = [
        Self::Creating,
        Self::Stopped,
        Self::Starting,
        Self::Running,
        Self::Pausing,
        Self::Paused,
        Self::Stopping,
        Self::Restarting,
        Self::Deleting,
        Self::Failed,
        Self::Unknown,
    ];

    /// The state in snake case.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Stopped => "stopped",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
            Self::Stopping => "stopping",
            Self::Restarting => "restarting",
            Self::Deleting => "deleting",
            Self::Failed => "failed",
            Self::Unknown => "unknown",
        }
    }
}

impl fmt::Display for VmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// The power state as the hypervisor reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ObservedPower {
    /// The vCPUs run.
    Running,
    /// The vCPUs are halted.
    Paused,
    /// The guest is going down by itself.
    ShuttingDown,
    /// Off.
    Off,
    /// Off after a crash of the guest or of QEMU.
    Crashed,
    /// libvirt has no such domain.
    Absent,
}

impl ObservedPower {
    /// Whether a QEMU process exists.
    pub const fn is_active(self) -> bool {
        matches!(self, Self::Running | Self::Paused | Self::ShuttingDown)
    }

    /// The power in snake case.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::ShuttingDown => "shutting_down",
            Self::Off => "off",
            Self::Crashed => "crashed",
            Self::Absent => "absent",
        }
    }
}

/// How we know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ObservationSource {
    /// A libvirt event.
    LibvirtEvent,
    /// A full look at libvirt after connecting, or a look at one domain.
    LibvirtSync,
    /// Nothing yet in this run of the agent.
    None,
}

impl ObservationSource {
    /// The source in snake case.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::LibvirtEvent => "libvirt_event",
            Self::LibvirtSync => "libvirt_sync",
            Self::None => "none",
        }
    }
}

/// What was last seen of a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observation {
    /// Its power.
    pub power: ObservedPower,
    /// libvirt's reason, such as `booted`, `destroyed`, `io_error`.
    pub reason: String,
    /// How we know.
    pub source: ObservationSource,
    /// When it became so.
    pub since: Timestamp,
}

/// What is shown of a VM's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShownState {
    /// The state.
    pub state: VmState,
    /// Why, for people; for `unknown` it says what was last known.
    pub reason: String,
}

/// Computes the state to show from everything that is known.
///
/// `hypervisor_lost` is for how long libvirt has been out of reach, if it is. `running` is the
/// operation that holds the VM now. An observation of `None` means that nothing was seen yet.
pub fn show(
    vm: &Vm,
    observation: Option<&Observation>,
    hypervisor_lost: Option<Duration>,
    running: Option<&OperationKind>,
) -> ShownState {
    let shown = |state: VmState, reason: &str| ShownState {
        state,
        reason: reason.to_owned(),
    };
    // An operation in flight is our own knowledge and needs no libvirt.
    match running {
        Some(OperationKind::CreateVm { .. }) => return shown(VmState::Creating, ""),
        Some(OperationKind::DeleteVm { .. }) => return shown(VmState::Deleting, ""),
        _ => {}
    }
    if let Some(lost) = hypervisor_lost {
        let last = observation.map_or("never seen", |seen| match seen.power {
            ObservedPower::Off => "stopped",
            other => other.as_str(),
        });
        return ShownState {
            state: VmState::Unknown,
            reason: format!("libvirt unreachable {} s; last: {last}", lost.as_secs()),
        };
    }
    match &vm.lifecycle {
        Lifecycle::Creating => return shown(VmState::Creating, ""),
        Lifecycle::Deleting => return shown(VmState::Deleting, ""),
        Lifecycle::Failed { reason } => {
            // A running VM is shown as running even where its record has a fault: the fault is a condition.
            if !observation.is_some_and(|seen| seen.power.is_active()) {
                return shown(VmState::Failed, reason);
            }
        }
        Lifecycle::Ready => {}
    }
    match running {
        Some(OperationKind::StartVm) => return shown(VmState::Starting, ""),
        Some(OperationKind::StopVm { .. }) => return shown(VmState::Stopping, ""),
        Some(OperationKind::RestartVm { .. }) => return shown(VmState::Restarting, ""),
        Some(OperationKind::PauseVm) => return shown(VmState::Pausing, ""),
        _ => {}
    }
    let Some(seen) = observation else {
        return shown(VmState::Unknown, "not yet seen in libvirt");
    };
    match seen.power {
        ObservedPower::Running => shown(VmState::Running, &seen.reason),
        ObservedPower::Paused => shown(VmState::Paused, &seen.reason),
        ObservedPower::ShuttingDown => shown(VmState::Stopping, &seen.reason),
        ObservedPower::Off => shown(VmState::Stopped, &seen.reason),
        ObservedPower::Crashed => shown(VmState::Failed, &seen.reason),
        ObservedPower::Absent => shown(VmState::Failed, "the libvirt domain is gone"),
    }
}

/// What can be asked of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Request {
    /// Power on.
    Start,
    /// Power off, with or without force.
    Stop,
    /// Off and on.
    Restart,
    /// Halt.
    Pause,
    /// Run on.
    Resume,
    /// Remove; refused while it runs.
    Delete,
    /// Remove, cutting the power first.
    ForceDelete,
    /// Change what needs the VM off (vCPUs, memory).
    Reconfigure,
}

impl Request {
    /// Every request.
    pub const ALL: [Self; 8] = [
        Self::Start,
        Self::Stop,
        Self::Restart,
        Self::Pause,
        Self::Resume,
        Self::Delete,
        Self::ForceDelete,
        Self::Reconfigure,
    ];

    const fn verb(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Restart => "restart",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Delete | Self::ForceDelete => "delete",
            Self::Reconfigure => "change",
        }
    }
}

/// Why a request is refused in a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Denial {
    /// It runs already, or runs and must not.
    Running,
    /// It does not run.
    NotRunning,
    /// It is paused and must be resumed (or stopped) first.
    Paused,
    /// It is not paused.
    NotPaused,
    /// Something is under way.
    InTransition,
    /// It is broken.
    Failed,
    /// Nobody knows its state.
    Unknown,
}

impl Denial {
    /// The error that the caller sees.
    pub fn into_error(self, name: &str, state: &ShownState, request: Request) -> Error {
        let verb = request.verb();
        let message = format!("cannot {verb} {name}: it is {}", state.state);
        match self {
            Self::Running => {
                let hint = match request {
                    Request::Delete => format!(
                        "stop it first, or cut its power: ghostctl vm delete {name} --force"
                    ),
                    Request::Start => format!("nothing to do; see ghostctl vm show {name}"),
                    _ => format!("stop it first: ghostctl vm stop {name}"),
                };
                Error::new(ErrorCode::VmRunning, message).hint(hint)
            }
            Self::NotRunning => Error::new(ErrorCode::VmNotRunning, message)
                .hint(format!("start it: ghostctl vm start {name}")),
            Self::Paused => Error::new(ErrorCode::WrongState, message)
                .hint(format!("let it run on: ghostctl vm resume {name}")),
            Self::NotPaused => Error::new(ErrorCode::WrongState, message).hint(format!(
                "only a paused VM is resumed; see ghostctl vm show {name}"
            )),
            Self::InTransition => Error::new(ErrorCode::VmBusy, message)
                .hint(format!(
                    "wait for it: ghostctl operation list, or ghostctl vm show {name}"
                ))
                .retry_after(Duration::from_secs(2)),
            Self::Failed => Error::new(ErrorCode::WrongState, message)
                .because(&state.reason)
                .hint(format!(
                    "see ghostctl vm show {name}; start it again, or delete it"
                )),
            Self::Unknown => Error::new(ErrorCode::HypervisorUnavailable, message)
                .because(&state.reason)
                .hint("look at libvirt on the host: ghost-agent doctor")
                .retry_after(Duration::from_secs(5)),
        }
    }
}

/// Whether `request` may be carried out in `state`.
///
/// # Errors
/// The one reason why not.
pub const fn decide(state: VmState, request: Request) -> Result<(), Denial> {
    use Denial as D;
    use Request as R;
    use VmState as S;
    match (state, request) {
        (S::Stopped | S::Failed, R::Start) => Ok(()),
        (S::Running, R::Start) => Err(D::Running),
        (S::Paused, R::Start) => Err(D::Paused),

        // A VM that goes down by itself may hang there: a forced stop must get through. The
        // operation lock, not this table, keeps a second operation away.
        (S::Running | S::Paused | S::Stopping, R::Stop) => Ok(()),
        (S::Stopped, R::Stop | R::Restart | R::Pause | R::Resume) => Err(D::NotRunning),
        (S::Failed, R::Stop | R::Restart | R::Pause | R::Resume) => Err(D::Failed),

        (S::Running, R::Restart | R::Pause) => Ok(()),
        (S::Paused, R::Restart | R::Pause) => Err(D::Paused),
        (S::Paused, R::Resume) => Ok(()),
        (S::Running, R::Resume) => Err(D::NotPaused),

        (S::Stopped | S::Failed, R::Delete | R::ForceDelete | R::Reconfigure) => Ok(()),
        (S::Running | S::Paused | S::Stopping, R::ForceDelete) => Ok(()),
        (S::Running | S::Paused, R::Delete | R::Reconfigure) => Err(D::Running),

        (
            S::Stopping,
            R::Start | R::Restart | R::Pause | R::Resume | R::Delete | R::Reconfigure,
        ) => Err(D::InTransition),
        (S::Creating | S::Starting | S::Pausing | S::Restarting | S::Deleting, _) => {
            Err(D::InTransition)
        }
        (S::Unknown, _) => Err(D::Unknown),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::{CloudInit, DesiredPower, ImageReference, RestartPolicy, VmSpec};
    use crate::{ByteSize, ImageName, VmId, VmName};
    use proptest::prelude::*;

    fn vm(lifecycle: Lifecycle) -> Vm {
        Vm {
            id: VmId::random(),
            name: VmName::new("web").unwrap(),
            generation: 1,
            spec: VmSpec {
                vcpus: 1,
                memory: ByteSize::from_gib(1),
                image: ImageReference {
                    name: ImageName::new("tiny").unwrap(),
                    content: None,
                },
                disk: ByteSize::from_gib(1),
                interfaces: Vec::new(),
                autostart: None,
                restart_policy: RestartPolicy::Never,
                delete_protection: false,
                guest: Default::default(),
                tags: Default::default(),
            },
            cloud_init: CloudInit::default(),
            desired: DesiredPower::Running,
            lifecycle,
            created_at: Timestamp::default(),
            registered_addresses: Vec::new(),
            crash_restarts: Vec::new(),
            owner: None,
        }
    }

    fn seen(power: ObservedPower) -> Observation {
        Observation {
            power,
            reason: "x".into(),
            source: ObservationSource::LibvirtEvent,
            since: Timestamp::default(),
        }
    }

    const POWERS: [ObservedPower; 6] = [
        ObservedPower::Running,
        ObservedPower::Paused,
        ObservedPower::ShuttingDown,
        ObservedPower::Off,
        ObservedPower::Crashed,
        ObservedPower::Absent,
    ];

    #[test]
    fn unreachable_is_unknown_and_says_what_was_last() {
        for power in POWERS {
            let shown = show(
                &vm(Lifecycle::Ready),
                Some(&seen(power)),
                Some(Duration::from_secs(12)),
                None,
            );
            assert_eq!(shown.state, VmState::Unknown);
            assert!(
                shown.reason.starts_with("libvirt unreachable 12 s; last: "),
                "{}",
                shown.reason
            );
        }
        let running = seen(ObservedPower::Running);
        let shown = show(
            &vm(Lifecycle::Ready),
            Some(&running),
            Some(Duration::from_secs(12)),
            None,
        );
        assert_eq!(shown.reason, "libvirt unreachable 12 s; last: running");
    }

    #[test]
    fn a_running_vm_may_be_stopped_and_not_started() {
        assert_eq!(
            decide(VmState::Running, Request::Start),
            Err(Denial::Running)
        );
        assert_eq!(
            decide(VmState::Running, Request::Delete),
            Err(Denial::Running)
        );
        assert_eq!(decide(VmState::Running, Request::ForceDelete), Ok(()));
        assert_eq!(decide(VmState::Stopped, Request::Start), Ok(()));
    }

    #[test]
    fn every_denial_has_a_hint() {
        for state in VmState::ALL {
            for request in Request::ALL {
                if let Err(denial) = decide(state, request) {
                    let shown = ShownState {
                        state,
                        reason: "r".into(),
                    };
                    let error = denial.into_error("web", &shown, request);
                    assert!(error.hint_text().is_some(), "{state} {request:?}");
                    assert!(error.message().contains(state.as_str()));
                }
            }
        }
    }

    proptest! {
        /// Whatever is denied stays denied for a reason, and nothing destructive is allowed blindly.
        #[test]
        fn nothing_is_allowed_while_unknown(power in 0usize..6, request in 0usize..8, lost in 0u64..1_000_000) {
            let shown = show(&vm(Lifecycle::Ready), Some(&seen(POWERS[power])), Some(Duration::from_secs(lost)), None);
            prop_assert!(decide(shown.state, Request::ALL[request]).is_err());
        }

        /// A VM with a QEMU process is never shown as stopped, and never deleted without force.
        #[test]
        fn an_active_vm_is_never_shown_as_stopped(power in 0usize..6, failed: bool) {
            let lifecycle = if failed { Lifecycle::Failed { reason: "r".into() } } else { Lifecycle::Ready };
            let shown = show(&vm(lifecycle), Some(&seen(POWERS[power])), None, None);
            if POWERS[power].is_active() {
                prop_assert_ne!(shown.state, VmState::Stopped);
                prop_assert_ne!(shown.state, VmState::Failed);
                prop_assert!(decide(shown.state, Request::Delete).is_err());
            }
        }
    }
}
