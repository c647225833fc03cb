//! Links come and go with the VMs' power, and guests are looked after.

use std::time::Duration;

use ghost_application::vm::{CreateVmCommand, DeleteVmCommand, PowerCommand, StopCommand};
use ghost_domain::guest::{GuestInject, GuestPolicy};
use ghost_domain::vm::ObservedPower;
use ghost_domain::{Error, ErrorCode, EventKind};

use crate::world::{Agent, World, hello};

fn power(vm: &str) -> PowerCommand {
    PowerCommand {
        vm: vm.to_owned(),
        request_id: None,
    }
}

fn attached(agent: &Agent) -> usize {
    agent.world.guests.state.lock().attached.len()
}

async fn stop(agent: &Agent) {
    let stop = StopCommand {
        vm: "web".into(),
        force: true,
        ..StopCommand::default()
    };
    let view = agent.use_cases.stop_vm.execute(&Agent::me(), stop).await;
    agent.finished(&view.unwrap()).await;
}

#[tokio::test]
async fn a_link_is_kept_while_the_vm_is_on_and_no_longer() {
    let world = World::new();
    let agent = world.start().await;
    agent.created("web", false).await;
    assert_eq!(attached(&agent), 0);
    let (me, cases) = (Agent::me(), &agent.use_cases);
    let view = cases.start_vm.execute(&me, power("web")).await.unwrap();
    agent.finished(&view).await;
    agent
        .eventually("the link", |agent| attached(agent) == 1)
        .await;
    let id = world.vm_id("web");
    agent.greets(id).await;
    assert_eq!(
        agent.condition(id, "agent").await,
        (true, "ghost-guest 0.1.0".into())
    );

    let view = cases.pause_vm.execute(&me, power("web")).await.unwrap();
    agent.finished(&view).await;
    assert_eq!(
        agent.condition(id, "agent").await,
        (false, "the VM is paused".into())
    );
    assert_eq!(attached(&agent), 1);
    let view = cases.resume_vm.execute(&me, power("web")).await.unwrap();
    agent.finished(&view).await;
    assert!(agent.condition(id, "agent").await.0);

    stop(&agent).await;
    agent
        .eventually("no link", |agent| attached(agent) == 0)
        .await;
    assert_eq!(
        agent.condition(id, "agent").await,
        (false, "not running".into())
    );
    assert!(
        world
            .guests
            .state
            .lock()
            .detached
            .iter()
            .all(|(vm, _)| *vm == id)
    );

    let view = cases.start_vm.execute(&me, power("web")).await.unwrap();
    agent.finished(&view).await;
    agent
        .eventually("the link", |agent| attached(agent) == 1)
        .await;
    assert_eq!(
        agent.condition(id, "agent").await,
        (false, "it has not greeted yet".into())
    );
    let delete = DeleteVmCommand {
        vm: "web".into(),
        force: true,
        ..DeleteVmCommand::default()
    };
    let view = cases.delete_vm.execute(&me, delete).await.unwrap();
    agent.finished(&view).await;
    agent
        .eventually("no link", |agent| attached(agent) == 0)
        .await;
}

#[tokio::test]
async fn links_follow_what_happens_behind_our_back_and_a_restart_of_the_agent() {
    let world = World::new();
    let agent = world.start().await;
    let id = agent.with_guest("web").await;
    drop(agent);
    world.guests.state.lock().attached.clear();
    let agent = world.start().await;
    agent.greets(id).await;
    world.survivors.lock().domains.get_mut(&id).unwrap().power = ObservedPower::Off;
    world.tell_power(id, ObservedPower::Off, "destroyed", false);
    agent
        .eventually("no link", |agent| attached(agent) == 0)
        .await;
    assert!(!agent.condition(id, "agent").await.0);
}

#[tokio::test]
async fn coming_and_going_is_told_and_cannot_crowd_out_other_events() {
    let world = World::new();
    let agent = world.start().await;
    let id = agent.with_guest("web").await;
    let (mut events, _) = agent
        .use_cases
        .watch_events
        .execute(&Agent::me(), &Default::default())
        .await
        .unwrap();
    world.guests.leave(id, "the \x1bsocket closed");
    let event = events.next().await.unwrap();
    assert_eq!(
        event.kind,
        EventKind::GuestDisconnected {
            reason: "the \\u{1b}socket closed".into()
        }
    );
    assert_eq!((event.vm, event.subject.as_str()), (Some(id), "web"));
    assert_eq!(
        agent.condition(id, "agent").await,
        (false, "the \\u{1b}socket closed".into())
    );
    world.guests.misbehave(id, "17 frames of garbage");
    let event = events.next().await.unwrap();
    assert_eq!(event.kind.name(), "guest_misbehaved");
    let (status, reason) = agent.condition(id, "agent").await;
    assert!(
        !status && reason.contains("17 frames of garbage"),
        "{reason}"
    );
    for round in 0..20 {
        world.guests.greet(id, hello(&format!("0.1.{round}")));
        world.guests.leave(id, "gone");
    }
    world.guests.greet(id, hello("last"));
    agent
        .until("the last greeting", |agent| {
            Box::pin(async move { agent.condition(id, "agent").await.1 == "ghost-guest last" })
        })
        .await;
    let (mut replay, _) = agent
        .use_cases
        .watch_events
        .execute(
            &Agent::me(),
            &ghost_application::event::WatchEventsCommand {
                vm: None,
                replay: true,
            },
        )
        .await
        .unwrap();
    let mut told = 0;
    while let Some(event) = replay.replayed() {
        told += usize::from(event.kind.name().starts_with("guest_"));
    }
    assert_eq!(told, 12);
}

#[tokio::test]
async fn a_clock_is_set_after_a_pause() {
    let world = World::new();
    let agent = world.start().await;
    let id = agent.with_guest("web").await;
    let (me, cases) = (Agent::me(), &agent.use_cases);
    let view = cases.pause_vm.execute(&me, power("web")).await.unwrap();
    agent.finished(&view).await;
    let (paused, _) = agent.condition(id, "agent").await;
    assert!(!paused);
    let view = cases.resume_vm.execute(&me, power("web")).await.unwrap();
    agent.finished(&view).await;
    agent.lines(&["clock begun", "clock ok"]).await;
    assert_eq!(world.guests.calls(), ["set_clock"]);
    assert_eq!(world.guests.state.lock().audit[0].principal, "ghost-agent");
}

async fn outdated(world: &World, policy: GuestPolicy) -> Agent {
    world.guests.state.lock().program = Some([2; 32]);
    let agent = world.start().await;
    let command = CreateVmCommand {
        guest: Some(policy),
        ..crate::world::command("web", true)
    };
    let view = agent
        .use_cases
        .create_vm
        .execute(&Agent::me(), command)
        .await;
    agent.finished(&view.unwrap()).await;
    agent.greets(world.vm_id("web")).await;
    agent
}

#[tokio::test]
async fn an_outdated_guest_is_updated_by_itself() {
    let world = World::new();
    let agent = outdated(&world, GuestPolicy::default()).await;
    agent.lines(&["update begun", "update ok"]).await;
    let mut new = hello("0.2.0");
    new.program_sha256 = vec![2; 32];
    world.guests.greet(world.vm_id("web"), new);
    world.clock.forward(Duration::from_secs(3600));
    let status = agent
        .use_cases
        .get_guest_status
        .execute(&Agent::me(), "web")
        .await
        .unwrap();
    assert!(!status.outdated && status.ready, "{status:?}");
    assert_eq!(world.guests.calls(), ["update"]);
}

#[tokio::test]
async fn an_update_that_fails_is_tried_three_times_in_all() {
    let world = World::new();
    let failure = || Error::new(ErrorCode::GuestFailed, "no space in the guest");
    world.guests.state.lock().updates = [failure(), failure(), failure(), failure()].into();
    let agent = outdated(&world, GuestPolicy::default()).await;
    let id = world.vm_id("web");
    for tries in 1..=3 {
        agent
            .eventually("a try", |agent| agent.world.guests.calls().len() == tries)
            .await;
        agent
            .eventually("its end", |agent| {
                agent.world.guests.lines().len() == 2 * tries
            })
            .await;
        world.clock.forward(Duration::from_secs(61));
        world.guests.greet(id, hello("0.1.0"));
    }
    agent
        .until("the end of it", |agent| {
            Box::pin(async move {
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
                std::iter::from_fn(|| events.replayed())
                    .any(|event| event.kind.name() == "guest_updated")
            })
        })
        .await;
    for _ in 0..3 {
        world.clock.forward(Duration::from_secs(61));
        world.guests.greet(id, hello("0.1.0"));
        agent.created_and_gone().await;
    }
    assert_eq!(world.guests.calls().len(), 3);
}

#[tokio::test]
async fn a_guest_that_is_not_ours_to_change_is_left_alone() {
    for (inject, access, update) in [
        (GuestInject::Never, true, true),
        (GuestInject::Auto, false, true),
        (GuestInject::Auto, true, false),
    ] {
        let world = World::new();
        world.guests.state.lock().options.update = update;
        let agent = outdated(&world, GuestPolicy { inject, access }).await;
        agent.created_and_gone().await;
        assert!(
            world.guests.calls().is_empty(),
            "{inject} {access} {update}"
        );
        let status = agent
            .use_cases
            .get_guest_status
            .execute(&Agent::me(), "web")
            .await
            .unwrap();
        assert!(status.outdated);
    }
}

#[tokio::test]
async fn a_port_without_a_voice_is_told_with_what_gives_it_back() {
    let world = World::new();
    let agent = world.start().await;
    agent.created("web", true).await;
    let layer = async || {
        let status = &agent.use_cases.get_guest_status;
        let status = status.execute(&Agent::me(), "web").await.unwrap();
        let agent = status.layers.into_iter().find(|one| one.name == "agent");
        agent.unwrap()
    };
    // Once may be a guest that boots.
    for (mute, hint) in [
        (0, "vm logs"),
        (1, "vm logs"),
        (2, "ghostctl vm restart web"),
    ] {
        world.guests.state.lock().mute = mute;
        let layer = layer().await;
        assert!(!layer.ok && layer.hint.contains(hint), "{layer:?}");
    }
}

#[tokio::test]
async fn a_vm_takes_the_hosts_way_of_bringing_the_agent_in() {
    let world = World::new();
    world.guests.state.lock().options.inject = GuestInject::Never;
    let agent = world.start().await;
    agent.created("web", false).await;
    let guest = agent.vm("web").await.unwrap().vm.spec.guest;
    assert_eq!(guest.inject, GuestInject::Never);
    assert!(guest.access);
}

impl Agent {
    /// Something else happens from beginning to end, so that what was to follow has followed.
    async fn created_and_gone(&self) {
        self.created("other", false).await;
        let delete = DeleteVmCommand {
            vm: "other".into(),
            force: true,
            ..DeleteVmCommand::default()
        };
        let view = self.use_cases.delete_vm.execute(&Agent::me(), delete).await;
        self.finished(&view.unwrap()).await;
    }
}

#[tokio::test]
async fn a_call_waits_while_the_agent_is_replaced() {
    let world = World::new();
    world.guests.state.lock().hold_update = true;
    let agent = std::sync::Arc::new(outdated(&world, GuestPolicy::default()).await);
    agent
        .eventually("the update", |agent| {
            agent.world.guests.calls() == ["update"]
        })
        .await;
    let caller = std::sync::Arc::clone(&agent);
    let called = tokio::spawn(async move {
        let exec = &caller.use_cases.exec_in_guest;
        let me = Agent::me();
        let target = super::target("web");
        let session = exec.execute(&me, &target, super::command());
        session.await.map(drop)
    });
    agent.created_and_gone().await;
    assert_eq!(world.guests.calls(), ["update"], "the call waits");
    world.guests.state.lock().hold_update = false;
    called.await.unwrap().unwrap();
    assert_eq!(world.guests.calls(), ["update", "execute"]);
}
