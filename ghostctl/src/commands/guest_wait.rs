//! What is known of a VM's way up, from its record: the agent says in conditions what its guest
//! told.

use ghost_proto::agent::v1::WatchVmRequest;
use ghost_proto::view::{Condition, Vm};

use crate::connect::Agent;
use crate::errors::{ErrorCode, Failure};

/// What is known so far.
#[derive(Default)]
pub(super) struct Facts {
    pub(super) vm: Option<Vm>,
}

/// How cloud-init stands.
pub(super) enum CloudInit {
    NotYet,
    Finished,
    /// The guest has none, or it is switched off there.
    Absent,
    /// With what went wrong, in its own words.
    Failed(String),
}

impl Facts {
    fn condition(&self, kind: &str) -> Option<&Condition> {
        let vm = self.vm.as_ref()?;
        vm.conditions.iter().find(|known| known.r#type == kind)
    }

    pub(super) fn address(&self) -> Option<&String> {
        self.vm.as_ref().and_then(first_address)
    }

    /// Whether the agent in the VM answers.
    pub(super) fn agent(&self) -> bool {
        self.condition("agent").is_some_and(|known| known.status)
    }

    /// What the record says of the agent, for people.
    pub(super) fn agent_reason(&self) -> Option<&str> {
        self.condition("agent")?.reason.as_deref()
    }

    /// The reason's first word is cloud-init's status; behind a colon stands what went wrong.
    pub(super) fn cloud_init(&self) -> CloudInit {
        let Some(condition) = self.condition("cloud-init") else {
            return CloudInit::NotYet;
        };
        let reason = condition.reason.as_deref().unwrap_or_default();
        let (status, errors) = match reason.split_once(": ") {
            Some((status, errors)) => (status, Some(errors)),
            None => (reason, None),
        };
        match (status.split(' ').next(), condition.status, errors) {
            // It came to its end in spite of them; who waits for it wants to know of them.
            (Some("error"), false, errors) => {
                CloudInit::Failed(errors.unwrap_or("it says no more").to_owned())
            }
            (_, true, Some(errors)) => CloudInit::Failed(errors.to_owned()),
            (Some("absent" | "disabled"), true, None) => CloudInit::Absent,
            (_, true, None) => CloudInit::Finished,
            (_, false, _) => CloudInit::NotYet,
        }
    }

    /// Where cloud-init is, for people: `running modules-config`.
    pub(super) fn cloud_init_phase(&self) -> Option<&str> {
        self.condition("cloud-init")?.reason.as_deref()
    }
}

/// The first address that is known of a VM.
pub(super) fn first_address(vm: &Vm) -> Option<&String> {
    vm.nics.iter().flat_map(|nic| &nic.addresses).next()
}

/// cloud-init failed, with its own words.
pub(super) fn cloud_init_failure(vm: &str, errors: &str) -> Failure {
    Failure::new(ErrorCode::GuestFailed, format!("cloud-init in {vm} failed"))
        .because(errors)
        .hint(format!(
            "ghostctl exec {vm} -- cloud-init status --long, ghostctl vm logs {vm}"
        ))
}

/// Follows a VM until `decide` has an answer. It is asked again at each change.
pub(super) async fn watch<T>(
    agent: &Agent,
    name: &str,
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
    while let Some(vm) = vms.message().await.map_err(failed)? {
        facts.vm = Some(Vm::from(vm));
        if let Some(answer) = decide(facts)? {
            return Ok(answer);
        }
    }
    Err(match &facts.vm {
        Some(vm) => Failure::new(ErrorCode::VmNotFound, format!("{} is gone", vm.name))
            .because("it was deleted while it was waited for"),
        None => Failure::new(
            ErrorCode::AgentUnreachable,
            "the agent ended the wait without an answer",
        )
        .hint("ghostctl status"),
    })
}
