//! Guests: who may enter them, what is written about it, what is known of them.

mod access;
mod audit;
mod inside;
mod links;
mod rules;

use std::time::Duration;

use ghost_application::guest::{GuestOptions, GuestTarget};
use ghost_domain::guest::{ExecRequest, GuestTelemetry};
use ghost_domain::{Principal, PrincipalSource, Role, VmId};

use crate::world::{Agent, World, hello};

/// A world whose host looks at its counters all the time.
pub(crate) fn quick() -> World {
    let world = World::new();
    world.guests.state.lock().options = GuestOptions {
        counters_interval: Duration::from_millis(10),
        ..GuestOptions::default()
    };
    world
}

pub(crate) fn principal(role: Role) -> Principal {
    Principal {
        name: format!("the {role}"),
        role,
        source: PrincipalSource::Socket { uid: 1000 },
        guest_access: true,
    }
}

pub(crate) fn target(vm: &str) -> GuestTarget {
    GuestTarget {
        vm: vm.to_owned(),
        request_id: "request-1".into(),
    }
}

pub(crate) fn command() -> ExecRequest {
    ExecRequest::command("/bin/true", ["now"])
}

pub(crate) fn report() -> GuestTelemetry {
    GuestTelemetry {
        cpu_percent: 12.5,
        memory_total_bytes: 1 << 30,
        memory_available_bytes: 1 << 29,
        ..GuestTelemetry::default()
    }
}

impl Agent {
    /// A running VM whose agent has greeted.
    pub(crate) async fn with_guest(&self, name: &str) -> VmId {
        self.created(name, true).await;
        let id = self.world.vm_id(name);
        self.greets(id).await;
        id
    }

    /// The agent in a guest greets, and that has been taken up.
    pub(crate) async fn greets(&self, id: VmId) {
        self.eventually("the link", |agent| {
            agent.world.guests.state.lock().attached.contains_key(&id)
        })
        .await;
        self.world.guests.greet(id, hello("0.1.0"));
        self.until("the greeting", |agent| {
            Box::pin(async move { agent.condition(id, "agent").await.0 })
        })
        .await;
    }

    /// Status and reason of a condition.
    pub(crate) async fn condition(&self, id: VmId, kind: &str) -> (bool, String) {
        let view = self.vm(&id.to_string()).await.unwrap();
        let found = view.conditions.iter().find(|one| one.kind == kind);
        let found = found.unwrap();
        (found.status, found.reason.clone())
    }

    /// Waits for what can be seen without asking anybody.
    pub(crate) async fn eventually(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let waited = tokio::time::timeout(Duration::from_secs(10), async {
            while !condition(self) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        });
        assert!(waited.await.is_ok(), "waited in vain for: {what}");
    }

    /// Waits for these lines of the audit log, and that no other comes before them.
    pub(crate) async fn lines(&self, expected: &[&str]) {
        self.eventually(&format!("the lines {expected:?}"), |agent| {
            agent.world.guests.lines().len() >= expected.len()
        })
        .await;
        assert_eq!(self.world.guests.lines(), expected);
    }
}
