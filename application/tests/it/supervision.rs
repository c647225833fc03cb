//! Honest state, drift, adoption, crash restart, autostart, leases.

use std::time::Duration;

use ghost_application::event::WatchEventsCommand;
use ghost_application::vm::{CreateVmCommand, DeleteVmCommand, PowerCommand};
use ghost_domain::ports::{HypervisorEvent, StoreContents};
use ghost_domain::vm::{DesiredPower, ObservedPower, VmState};
use ghost_domain::{ErrorCode, EventKind};

use crate::world::{Agent, World, command};

async fn events(agent: &Agent) -> Vec<String> {
    let command = WatchEventsCommand {
        vm: None,
        replay: true,
    };
    let (mut stream, _) = agent
        .use_cases
        .watch_events
        .execute(&Agent::me(), &command)
        .await
        .unwrap();
    let mut found = Vec::new();
    while let Some(event) = stream.replayed() {
        found.push(format!("{} {}", event.kind.name(), event.kind.describe()));
    }
    found
}

async fn state_becomes(agent: &Agent, name: &'static str, state: VmState) {
    agent
        .until(&format!("{name} to be {state}"), |agent| {
            Box::pin(async move { agent.state(name).await == state })
        })
        .await;
}

#[tokio::test]
async fn libvirt_away_is_unknown_and_never_stopped() {
    let world = World::new();
    let agent = world.start().await;
    let stood = async || {
        let status = agent.use_cases.get_status.execute(&Agent::me()).await;
        let status = status.unwrap();
        (status.link.connected, status.link_age)
    };
    world.clock.forward(Duration::from_secs(300));
    agent.created("web", true).await;
    // libvirt has just answered; up it has been for longer.
    let (connected, age) = stood().await;
    assert!(connected && age >= Duration::from_secs(300), "{age:?}");
    world.survivors.lock().reachable = false;
    drop(world.events.send(HypervisorEvent::Disconnected {
        reason: "connection reset".into(),
    }));
    state_becomes(&agent, "web", VmState::Unknown).await;
    world.clock.forward(Duration::from_secs(12));
    let (connected, age) = stood().await;
    assert!(!connected && age < Duration::from_secs(60), "{age:?}");
    let view = agent.vm("web").await.unwrap();
    assert!(
        view.shown.reason.starts_with("libvirt unreachable 1"),
        "{}",
        view.shown.reason
    );
    assert!(
        view.shown.reason.ends_with("last: running"),
        "{}",
        view.shown.reason
    );
    assert!(view.age >= Duration::from_secs(12));
    let power = PowerCommand {
        vm: "web".into(),
        request_id: None,
    };
    for error in [
        agent
            .use_cases
            .start_vm
            .execute(&Agent::me(), power)
            .await
            .unwrap_err(),
        agent
            .use_cases
            .delete_vm
            .execute(
                &Agent::me(),
                DeleteVmCommand {
                    vm: "web".into(),
                    force: true,
                    ..Default::default()
                },
            )
            .await
            .unwrap_err(),
        agent.create("new", false).await.unwrap_err(),
    ] {
        assert_eq!(error.code(), ErrorCode::HypervisorUnavailable);
        assert!(error.retry_delay().is_some());
    }
    world.survivors.lock().reachable = true;
    drop(world.events.send(HypervisorEvent::Connected));
    state_becomes(&agent, "web", VmState::Running).await;
    let (connected, age) = stood().await;
    assert!(connected && age < Duration::from_secs(60), "{age:?}");
    world.audit();
}

#[tokio::test]
async fn an_agent_that_starts_without_libvirt_takes_up_its_operations_later() {
    let world = World::new();
    world.start().await.created("web", true).await;
    world.survivors.lock().reachable = false;
    let agent = world.start().await;
    assert_eq!(agent.state("web").await, VmState::Unknown);
    assert!(!agent.use_cases.check_health.execute().await.ready);
    world.survivors.lock().reachable = true;
    drop(world.events.send(HypervisorEvent::Connected));
    state_becomes(&agent, "web", VmState::Running).await;
}

#[tokio::test]
async fn what_others_do_behind_our_back_is_seen_and_told() {
    let world = World::new();
    let agent = world.start().await;
    agent.created("destroyed", true).await;
    agent.created("edited", false).await;
    agent.created("undefined", false).await;
    let id = |name: &str| world.vm_id(name);
    let (destroyed, edited, undefined) = (id("destroyed"), id("edited"), id("undefined"));
    {
        let mut survivors = world.survivors.lock();
        survivors.domains.get_mut(&destroyed).unwrap().power = ObservedPower::Off;
        survivors.domains.get_mut(&edited).unwrap().drift =
            vec!["vcpus: 4 in libvirt, 1 in the record".into()];
        survivors.domains.remove(&undefined);
    }
    world.tell_power(destroyed, ObservedPower::Off, "destroyed", false);
    drop(world.events.send(HypervisorEvent::Defined { id: edited }));
    drop(
        world
            .events
            .send(HypervisorEvent::Undefined { id: undefined }),
    );
    state_becomes(&agent, "destroyed", VmState::Stopped).await;
    state_becomes(&agent, "undefined", VmState::Failed).await;
    agent
        .until("three drifts", |agent| {
            Box::pin(async move {
                events(agent)
                    .await
                    .iter()
                    .filter(|event| event.starts_with("vm_drift"))
                    .count()
                    == 3
            })
        })
        .await;
    let view = agent.vm("edited").await.unwrap();
    let drift = view
        .conditions
        .iter()
        .find(|condition| condition.kind == "drift")
        .unwrap();
    assert!(
        drift.status && drift.reason.contains("vcpus: 4"),
        "{drift:?}"
    );
    // A VM whose domain is gone is defined anew when it is started.
    let power = PowerCommand {
        vm: "undefined".into(),
        request_id: None,
    };
    agent
        .finished(
            &agent
                .use_cases
                .start_vm
                .execute(&Agent::me(), power)
                .await
                .unwrap(),
        )
        .await;
    assert_eq!(agent.state("undefined").await, VmState::Running);
    world.audit();
}

#[tokio::test]
async fn a_lost_store_is_rebuilt_from_libvirt_without_touching_vms() {
    let world = World::new();
    let agent = world.start().await;
    agent.created("on", true).await;
    agent.created("off", false).await;
    let before = world.vm_id("on");
    drop(agent);
    world.survivors.lock().store = StoreContents {
        damage: Some("lost".into()),
        ..StoreContents::default()
    };
    let agent = world.start().await;
    assert_eq!(agent.state("on").await, VmState::Running);
    assert_eq!(agent.state("off").await, VmState::Stopped);
    let view = agent.vm("on").await.unwrap();
    assert_eq!(
        (view.vm.id, view.vm.desired),
        (before, DesiredPower::Running)
    );
    assert_eq!(
        agent
            .use_cases
            .list_images
            .execute(&Agent::me())
            .await
            .unwrap()
            .len(),
        1
    );
    assert!(
        events(&agent)
            .await
            .iter()
            .any(|event| event.starts_with("state_rebuilt"))
    );
    let status = agent
        .use_cases
        .get_status
        .execute(&Agent::me())
        .await
        .unwrap();
    assert!(
        status
            .warnings
            .iter()
            .any(|warning| warning.contains("damaged and rebuilt"))
    );
    assert!(
        world.survivors.lock().store.damage.is_none(),
        "the store was not told"
    );
    world.audit();
}

#[tokio::test]
async fn a_folder_without_a_vm_is_told_and_left_alone() {
    let world = World::new();
    let stray = ghost_domain::VmId::random();
    world.survivors.lock().folders.insert(stray);
    let agent = world.start().await;
    let status = agent
        .use_cases
        .get_status
        .execute(&Agent::me())
        .await
        .unwrap();
    assert!(
        status
            .warnings
            .iter()
            .any(|warning| warning.contains(&stray.to_string()))
    );
    assert!(world.survivors.lock().folders.contains(&stray));
}

#[tokio::test]
async fn nothing_is_destroyed_before_libvirt_was_asked() {
    let world = World::new();
    world.start().await.created("web", false).await;
    {
        let mut survivors = world.survivors.lock();
        survivors.store.damage = Some("an old copy was restored".into());
        survivors.reachable = false;
    }
    let agent = world.start().await;
    let delete = DeleteVmCommand {
        vm: "web".into(),
        force: true,
        ..Default::default()
    };
    let error = agent
        .use_cases
        .delete_vm
        .execute(&Agent::me(), delete)
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::Recovering);
}

#[tokio::test]
async fn a_crashed_guest_is_restarted_within_its_limit() {
    let world = World::new();
    let agent = world.start().await;
    let view = agent
        .use_cases
        .create_vm
        .execute(
            &Agent::me(),
            CreateVmCommand {
                restart_policy: Some((1, 3600)),
                ..command("web", true)
            },
        )
        .await
        .unwrap();
    agent.finished(&view).await;
    let id = world.vm_id("web");
    let crash = || {
        world.survivors.lock().domains.get_mut(&id).unwrap().power = ObservedPower::Crashed;
        world.tell_power(id, ObservedPower::Crashed, "panicked", true);
    };
    crash();
    agent
        .until("the restart", |agent| {
            Box::pin(async { agent.world.power("web") == Some(ObservedPower::Running) })
        })
        .await;
    agent.idle().await;
    crash();
    state_becomes(&agent, "web", VmState::Failed).await;
    agent
        .until("the refusal", |agent| {
            Box::pin(async move {
                events(agent)
                    .await
                    .iter()
                    .any(|event| event.contains("left off") && event.contains("more than 1 times"))
            })
        })
        .await;
    assert_eq!(world.power("web"), Some(ObservedPower::Crashed));
}

#[tokio::test]
async fn after_a_boot_of_the_host_autostart_comes_in_order_and_once() {
    let world = World::new();
    let agent = world.start().await;
    for (name, autostart) in [
        ("second", Some((2, 0))),
        ("first", Some((1, 0))),
        ("manual", None),
    ] {
        let view = agent
            .use_cases
            .create_vm
            .execute(
                &Agent::me(),
                CreateVmCommand {
                    autostart,
                    ..command(name, true)
                },
            )
            .await
            .unwrap();
        agent.finished(&view).await;
    }
    drop(agent);
    {
        let mut survivors = world.survivors.lock();
        survivors.boot_id = "boot-2".into();
        survivors
            .domains
            .values_mut()
            .for_each(|domain| domain.power = ObservedPower::Off);
    }
    let agent = world.start().await;
    state_becomes(&agent, "first", VmState::Running).await;
    state_becomes(&agent, "second", VmState::Running).await;
    agent.idle().await;
    assert_eq!(agent.state("manual").await, VmState::Stopped);
    // By the events, which are numbered: two operations may be of one millisecond.
    let replay = ghost_application::event::WatchEventsCommand {
        vm: None,
        replay: true,
    };
    let (mut events, _) = agent
        .use_cases
        .watch_events
        .execute(&Agent::me(), &replay)
        .await
        .unwrap();
    let started: Vec<String> = std::iter::from_fn(|| events.replayed())
        .filter(|event| {
            let pending = ghost_domain::OperationStatus::Pending;
            matches!(&event.kind, EventKind::Operation { status, .. } if *status == pending)
        })
        .map(|event| event.subject)
        .collect();
    assert_eq!(started, ["first", "second"]);
    // The owner stops one; a restart of the agent in the same boot leaves it off.
    let stop = ghost_application::vm::StopCommand {
        vm: "first".into(),
        force: true,
        ..Default::default()
    };
    agent
        .finished(
            &agent
                .use_cases
                .stop_vm
                .execute(&Agent::me(), stop)
                .await
                .unwrap(),
        )
        .await;
    drop(agent);
    let agent = world.start().await;
    agent.idle().await;
    assert_eq!(agent.state("first").await, VmState::Stopped);
}

#[tokio::test]
async fn addresses_are_learnt_from_leases_and_shown_with_their_age() {
    let world = World::new();
    let agent = world.start().await;
    agent.created("web", true).await;
    let mac = agent.vm("web").await.unwrap().vm.spec.interfaces[0].mac;
    world
        .survivors
        .lock()
        .leases
        .insert(mac, "10.1.2.3".parse().unwrap());
    agent
        .until("the address", |agent| {
            Box::pin(async { !agent.vm("web").await.unwrap().addresses.is_empty() })
        })
        .await;
    let view = agent.vm("web").await.unwrap();
    assert_eq!(view.addresses[0].address.to_string(), "10.1.2.3");
    assert!(view.addresses_age.is_some());
}

#[tokio::test]
async fn events_are_numbered_without_gaps() {
    let world = World::new();
    let agent = world.start().await;
    let command = WatchEventsCommand {
        vm: None,
        replay: true,
    };
    let (mut stream, _) = agent
        .use_cases
        .watch_events
        .execute(&Agent::me(), &command)
        .await
        .unwrap();
    agent.created("web", true).await;
    let mut expected = 1;
    loop {
        let event = stream.next().await.unwrap();
        assert_eq!(event.sequence, expected);
        expected += 1;
        if matches!(
            event.kind,
            EventKind::VmState {
                to: VmState::Running,
                ..
            }
        ) {
            break;
        }
    }
}
