//! Guest access: of a credential, and of a VM.

use std::time::Duration;

use ghost_application::vm::{StopCommand, UpdateVmCommand};
use ghost_domain::ports::HypervisorEvent;
use ghost_domain::vm::VmState;
use ghost_domain::{ErrorCode, Principal, RequestId, Role, VmChange};

use super::rules::{code, enter, set_access};
use super::{command, principal, target};
use crate::world::{Agent, Guest, World};

fn without(role: Role) -> Principal {
    Principal {
        guest_access: false,
        ..principal(role)
    }
}

async fn switch(
    agent: &Agent,
    who: &Principal,
    access: bool,
) -> ghost_domain::Result<ghost_application::guest::GuestAccessView> {
    agent
        .use_cases
        .set_guest_access
        .execute(who, &target("web"), access)
        .await
}

async fn refusal(agent: &Agent) -> Option<ErrorCode> {
    let exec = &agent.use_cases.exec_in_guest;
    let outcome = exec.execute(&Agent::me(), &target("web"), command()).await;
    code(&outcome.map(drop))
}

fn stored(world: &World) -> bool {
    world.survivors.lock().store.vms[0].spec.guest.access
}

#[tokio::test]
async fn a_role_alone_does_not_let_into_guests() {
    let world = World::new();
    world.guests.state.lock().program = Some([1; 32]);
    let agent = world.start().await;
    let id = agent.with_guest("web").await;
    let denied = Some(ErrorCode::PermissionDenied);
    let mut lines = Vec::new();
    for role in [Role::Operator, Role::Admin] {
        let who = without(role);
        for (action, outcome) in enter(&agent, &who, "web").await {
            assert_eq!(code(&outcome), denied, "{action} as {role}");
            lines.push(format!("{action} denied: permission_denied"));
        }
        let console = agent.use_cases.open_console.execute(&who, "web").await;
        assert_eq!(code(&console.map(drop)), denied);
        // It may close what it may not enter, and not open it again: neither way.
        switch(&agent, &who, false).await.unwrap();
        assert_eq!(code(&switch(&agent, &who, true).await.map(drop)), denied);
        let open = UpdateVmCommand {
            vm: "web".into(),
            change: VmChange {
                guest_access: Some(true),
                ..VmChange::default()
            },
            ..UpdateVmCommand::default()
        };
        let update = agent.use_cases.update_vm.execute(&who, open).await;
        assert_eq!(code(&update.map(drop)), denied);
        assert!(!stored(&world));
        set_access(&agent, true).await;
        lines.extend(
            [
                "access ok",
                "access ok: 2 sessions cut",
                "access denied: permission_denied",
            ]
            .map(str::to_owned),
        );
        // What is only looked at is no entry.
        let history = &agent.use_cases.get_guest_history;
        history.execute(&who, "web", None).await.unwrap();
    }
    assert!(world.guests.calls().is_empty(), "nothing has entered");
    lines.sort();
    agent
        .eventually("the lines", |agent| {
            let mut written = agent.world.guests.lines();
            written.sort();
            written == lines
        })
        .await;
    assert!(world.guests.state.lock().cuts.iter().all(|cut| *cut == id));
    // The same people with the permission.
    for (action, outcome) in enter(&agent, &principal(Role::Operator), "web").await {
        assert!(outcome.is_ok(), "{action}: {outcome:?}");
    }
}

#[tokio::test]
async fn access_goes_off_at_once_while_libvirt_is_away_and_the_vm_is_busy() {
    let world = World::new();
    world.guests.state.lock().script.clear();
    let agent = world.start().await;
    let id = agent.with_guest("web").await;
    let generation = agent.vm("web").await.unwrap().vm.generation;
    let mut session = agent
        .use_cases
        .exec_in_guest
        .execute(&Agent::me(), &target("web"), command())
        .await
        .unwrap();
    let reading = tokio::spawn(async move { session.output.next().await.unwrap_err().code() });
    // Busy for long: the guest does not follow the request to shut down.
    world.survivors.lock().guest = Guest::Deaf;
    let stop = StopCommand {
        vm: "web".into(),
        ..StopCommand::default()
    };
    let stopping = agent.use_cases.stop_vm.execute(&Agent::me(), stop).await;
    stopping.unwrap();
    assert_eq!(agent.state("web").await, VmState::Stopping);
    let view = switch(&agent, &principal(Role::Operator), false)
        .await
        .unwrap();
    assert!(
        !view.access && view.vm == id && view.sessions_cut > 0,
        "{view:?}"
    );
    let ended = tokio::time::timeout(Duration::from_secs(10), reading).await;
    assert_eq!(ended.unwrap().unwrap(), ErrorCode::GuestUnreachable);
    assert_eq!(refusal(&agent).await, Some(ErrorCode::GuestAccessOff));
    // Nothing else of the VM was touched, and a lost store brings the access back in no way.
    let record = agent.vm("web").await.unwrap().vm;
    assert_eq!(record.generation, generation);
    let exported = world.survivors.lock().exported.clone().unwrap();
    assert!(!exported.vms[0].spec.guest.access && !stored(&world));
    assert_eq!(agent.state("web").await, VmState::Stopping);
    world.survivors.lock().reachable = false;
    drop(world.events.send(HypervisorEvent::Disconnected {
        reason: "connection reset".into(),
    }));
    agent
        .until("libvirt gone", |agent| {
            Box::pin(async { !agent.use_cases.check_health.execute().await.ready })
        })
        .await;
    for access in [false, true, false] {
        let operator = principal(Role::Operator);
        switch(&agent, &operator, access).await.unwrap();
        assert_eq!(stored(&world), access);
    }
}

#[tokio::test]
async fn the_domain_says_it_too_and_once_libvirt_is_back() {
    let world = World::new();
    let agent = world.start().await;
    let id = agent.with_guest("web").await;
    let said = || world.survivors.lock().domains[&id].record.spec.guest.access;
    let wait_for = async |access: bool| {
        agent
            .until("the domain to say it", |_| {
                Box::pin(async { said() == access })
            })
            .await;
    };
    let operator = principal(Role::Operator);
    for access in [false, true] {
        switch(&agent, &operator, access).await.unwrap();
        wait_for(access).await;
    }
    // Away: the call does not wait, and the domain follows later.
    world.survivors.lock().reachable = false;
    drop(world.events.send(HypervisorEvent::Disconnected {
        reason: "connection reset".into(),
    }));
    switch(&agent, &operator, false).await.unwrap();
    assert!(said());
    world.survivors.lock().reachable = true;
    drop(world.events.send(HypervisorEvent::Connected));
    wait_for(false).await;
    // Whatever somebody else writes there is not what counts, and does not stay.
    let domain = |access| {
        let mut survivors = world.survivors.lock();
        let domain = survivors.domains.get_mut(&id).unwrap();
        domain.record.spec.guest.access = access;
    };
    domain(true);
    drop(world.events.send(HypervisorEvent::Defined { id }));
    wait_for(false).await;
    assert_eq!(refusal(&agent).await, Some(ErrorCode::GuestAccessOff));
}

#[tokio::test]
async fn access_is_off_also_where_that_cannot_be_recorded() {
    let world = World::new();
    let agent = world.start().await;
    agent.with_guest("web").await;
    world.survivors.lock().store_full = true;
    let error = switch(&agent, &principal(Role::Operator), false)
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::StoreUnavailable);
    assert!(error.message().contains("is off"), "{error}");
    assert_eq!(refusal(&agent).await, Some(ErrorCode::GuestAccessOff));
    // Opening is recorded first.
    let opening = switch(&agent, &principal(Role::Operator), true).await;
    assert_eq!(code(&opening.map(drop)), Some(ErrorCode::StoreUnavailable));
    assert_eq!(refusal(&agent).await, Some(ErrorCode::GuestAccessOff));
    world.survivors.lock().store_full = false;
    switch(&agent, &principal(Role::Operator), false)
        .await
        .unwrap();
    drop(agent);
    let agent = world.start().await;
    assert!(!agent.vm("web").await.unwrap().vm.spec.guest.access);
}

#[tokio::test]
async fn an_update_switches_access_off_whatever_becomes_of_the_rest() {
    let world = World::new();
    let agent = world.start().await;
    agent.with_guest("web").await;
    let update = async |change: VmChange, key: Option<&str>| {
        let command = UpdateVmCommand {
            vm: "web".into(),
            change,
            request_id: key.map(|key| RequestId::new(key).unwrap()),
            ..UpdateVmCommand::default()
        };
        agent
            .use_cases
            .update_vm
            .execute(&Agent::me(), command)
            .await
    };
    let access = |access| VmChange {
        guest_access: Some(access),
        ..VmChange::default()
    };
    // The VM runs: its CPUs cannot change. The door is shut all the same.
    let both = VmChange {
        vcpus: Some(4),
        ..access(false)
    };
    let refused = update(both, None).await;
    assert_eq!(code(&refused.map(drop)), Some(ErrorCode::VmRunning));
    assert!(!stored(&world));
    // Opening goes with the rest or not at all.
    let both = VmChange {
        vcpus: Some(4),
        ..access(true)
    };
    let refused = update(both, None).await;
    assert_eq!(code(&refused.map(drop)), Some(ErrorCode::VmRunning));
    assert!(!stored(&world));
    agent
        .finished(&update(access(true), None).await.unwrap())
        .await;
    assert!(stored(&world));
    // A request that comes twice decides once.
    agent
        .finished(&update(access(false), Some("once")).await.unwrap())
        .await;
    switch(&agent, &Agent::me(), true).await.unwrap();
    agent
        .finished(&update(access(false), Some("once")).await.unwrap())
        .await;
    assert!(stored(&world));
    // Without libvirt, where there is nothing else to change.
    world.survivors.lock().reachable = false;
    drop(world.events.send(HypervisorEvent::Disconnected {
        reason: "connection reset".into(),
    }));
    agent
        .until("libvirt gone", |agent| {
            Box::pin(async { !agent.use_cases.check_health.execute().await.ready })
        })
        .await;
    agent
        .finished(&update(access(false), None).await.unwrap())
        .await;
    assert!(!stored(&world));
    let tagged = VmChange {
        tags: vec![("a".into(), Some("b".into()))],
        ..VmChange::default()
    };
    let refused = update(tagged, None).await;
    assert_eq!(
        code(&refused.map(drop)),
        Some(ErrorCode::HypervisorUnavailable)
    );
}
