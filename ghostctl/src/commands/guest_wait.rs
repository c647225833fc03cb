//! What is known of a VM's way up, as it comes: its record, and what its guest says of cloud-init.

use std::time::Duration;

use ghost_proto::agent::v1::{WatchTelemetryRequest, WatchVmRequest};
use ghost_proto::view::{Condition, GuestCloudInit, Vm};
use tokio::time::{Instant, sleep_until};
use tonic::Streaming;

use crate::connect::Agent;
use crate::errors::{ErrorCode, Failure};

/// The record may say that cloud-init is over a moment before the guest's own words are here.
const GRACE: Duration = Duration::from_secs(2);

/// What is known so far.
#[derive(Default)]
pub(super) struct Facts {
    pub(super) vm: Option<Vm>,
    pub(super) cloud_init: Option<GuestCloudInit>,
    /// The record says for a while that cloud-init is over, whatever the guest says.
    settled: bool,
}

/// How cloud-init stands.
pub(super) enum CloudInit {
    NotYet,
    Finished,
    /// The guest has none, or it is switched off there.
    Absent,
    /// With what went wrong.
    Failed(Vec<String>),
}

impl Facts {
    fn condition(&self, kind: &str) -> Option<&Condition> {
        let vm = self.vm.as_ref()?;
        vm.conditions.iter().find(|known| known.r#type == kind)
    }

    fn holds(&self, kind: &str) -> bool {
        self.condition(kind).is_some_and(|known| known.status)
    }

    pub(super) fn address(&self) -> Option<&String> {
        self.vm.as_ref().and_then(first_address)
    }

    /// Whether the agent in the VM answers.
    pub(super) fn agent(&self) -> bool {
        self.holds("agent")
    }

    /// What the record says of the agent, for people.
    pub(super) fn agent_reason(&self) -> Option<&str> {
        self.condition("agent")?.reason.as_deref()
    }

    pub(super) fn cloud_init(&self) -> CloudInit {
        let told = self.cloud_init.as_ref();
        match told.map_or("", |told| told.status.as_str()) {
            "error" => CloudInit::Failed(told.map(|told| told.errors.clone()).unwrap_or_default()),
            "done" => match told.map(|told| told.errors.clone()) {
                Some(errors) if !errors.is_empty() => CloudInit::Failed(errors),
                _ => CloudInit::Finished,
            },
            "absent" | "disabled" => CloudInit::Absent,
            _ if self.settled => CloudInit::Finished,
            _ => CloudInit::NotYet,
        }
    }

    /// Where cloud-init is, for people: `running modules-config`.
    pub(super) fn cloud_init_phase(&self) -> Option<String> {
        let told = self.cloud_init.as_ref()?;
        Some(match &told.stage {
            Some(stage) => format!("{} {stage}", told.status),
            None => told.status.clone(),
        })
    }
}

/// The first address that is known of a VM.
pub(super) fn first_address(vm: &Vm) -> Option<&String> {
    vm.nics.iter().flat_map(|nic| &nic.addresses).next()
}

/// Why cloud-init counts as failed, with its own words.
pub(super) fn cloud_init_failure(vm: &str, errors: &[String]) -> Failure {
    let failure = Failure::new(ErrorCode::GuestFailed, format!("cloud-init in {vm} failed")).hint(
        format!("ghostctl exec {vm} -- cloud-init status --long, ghostctl vm logs {vm}"),
    );
    if errors.is_empty() {
        failure.because("it says no more")
    } else {
        failure.because(errors.join("; "))
    }
}

/// Follows a VM until `decide` has an answer. It is asked again at each change.
pub(super) async fn watch<T>(
    agent: &Agent,
    name: &str,
    with_guest: bool,
    facts: &mut Facts,
    mut decide: impl FnMut(&Facts) -> Result<Option<T>, Failure>,
) -> Result<T, Failure> {
    let failed = |status| agent.failure(&status);
    let mut vms = agent
        .vms()
        .watch(WatchVmRequest {
            vm: name.to_owned(),
        })
        .await
        .map_err(failed)?
        .into_inner();
    let mut guest = None;
    let mut settles = None;
    loop {
        // Asked for once the VM is known to run; an agent that cannot tell, or a VM that went down,
        // ends the stream, and the record alone decides then.
        if with_guest && guest.is_none() && facts.agent() {
            guest = agent
                .guest()
                .watch_telemetry(WatchTelemetryRequest {
                    vm: name.to_owned(),
                })
                .await
                .map(tonic::Response::into_inner)
                .ok();
        }
        tokio::select! {
            vm = vms.message() => match vm.map_err(failed)? {
                Some(vm) => facts.vm = Some(Vm::from(vm)),
                None => return Err(gone(facts.vm.as_ref())),
            },
            told = told(&mut guest) => match told {
                Some(told) => facts.cloud_init = Some(told),
                None => guest = None,
            },
            () = sleep_until(settles.unwrap_or_else(Instant::now)), if settles.is_some() && !facts.settled => {
                facts.settled = true;
            }
        }
        if facts.holds("cloud-init") {
            settles.get_or_insert_with(|| Instant::now() + GRACE);
        } else {
            settles = None;
        }
        if let Some(answer) = decide(facts)? {
            return Ok(answer);
        }
    }
}

/// The guest's next word on cloud-init; never, where there is no stream. `None`: it has ended.
async fn told(
    stream: &mut Option<Streaming<ghost_proto::agent::v1::GuestTelemetry>>,
) -> Option<GuestCloudInit> {
    let Some(open) = stream else {
        return std::future::pending().await;
    };
    loop {
        let telemetry = open.message().await.ok().flatten()?;
        if let Some(cloud_init) = telemetry.cloud_init {
            return Some(cloud_init.into());
        }
    }
}

fn gone(last: Option<&Vm>) -> Failure {
    match last {
        Some(vm) => Failure::new(ErrorCode::VmNotFound, format!("{} is gone", vm.name))
            .because("it was deleted while it was waited for"),
        None => Failure::new(
            ErrorCode::AgentUnreachable,
            "the agent ended the wait without an answer",
        )
        .hint("ghostctl status"),
    }
}
