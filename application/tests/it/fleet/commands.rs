//! Commands of Core's queue: each once, in order, in time, by the same rules as everybody's.

use std::collections::BTreeMap;
use std::time::Duration;

use ghost_application::vm::StopCommand;
use ghost_domain::fleet::{
    CommandAction, CommandStatus, CorePermissions, CreateVmCommand, FleetLedger, RefusedCommand,
};
use ghost_domain::ports::{CoreLinkHandler, HypervisorEvent};
use ghost_domain::vm::ObservedPower;
use ghost_domain::{CommandId, Error, ErrorCode, Role};

use super::{CORE, Joined, alice, create, delete};
use crate::world::{Agent, Guest, World};

fn start(vm: &str) -> CommandAction {
    CommandAction::StartVm { vm: vm.into() }
}

#[tokio::test]
async fn every_action_is_carried_out() {
    let joined = Joined::with(CorePermissions::default()).await;
    let vm = || "web".to_owned();
    let stop = |force| CommandAction::StopVm {
        vm: vm(),
        force,
        timeout: None,
    };
    let actions = [
        create("web", true),
        CommandAction::PauseVm { vm: vm() },
        CommandAction::ResumeVm { vm: vm() },
        CommandAction::RestartVm {
            vm: vm(),
            force: true,
            timeout: None,
        },
        stop(true),
        CommandAction::UpdateVm {
            vm: vm(),
            vcpus: Some(2),
            memory: None,
            delete_protection: None,
            set_tags: BTreeMap::from([("team".into(), "blue".into())]),
            remove_tags: vec!["none".into()],
        },
        start("web"),
        delete("web"),
    ];
    for (index, action) in actions.into_iter().enumerate() {
        let generation = index as u64 + 1;
        let kind = action.kind();
        let outcome = joined.done(generation, action).await;
        assert_eq!(
            outcome.status,
            CommandStatus::Succeeded,
            "{kind}: {outcome:?}"
        );
        assert!(outcome.operation.is_some(), "{kind}");
        if kind == "update_vm" {
            let seen = joined.agent.vm("web").await.unwrap();
            assert_eq!(seen.vm.spec.vcpus, 2);
            assert_eq!(seen.vm.spec.tags["team"], "blue");
        }
    }
    assert_eq!(joined.world.power("web"), None);
    joined.world.audit();
    assert_eq!(joined.fleet.ledger(CORE), (1, 8));
    // What Core keeps is forgotten here, and nothing else.
    joined.fleet.outcome_kept(3).await;
    let left: Vec<_> = joined
        .fleet
        .outcomes()
        .iter()
        .map(|one| one.generation)
        .collect();
    assert_eq!(left, [1, 2, 4, 5, 6, 7, 8]);
}

#[tokio::test]
async fn a_command_takes_effect_once_however_often_it_comes() {
    let joined = Joined::with(CorePermissions::default()).await;
    let command = joined.command(1, create("web", false));
    let first = joined.fleet.command(command.clone()).await.unwrap();
    assert_eq!(first.status, CommandStatus::Accepted);
    let again = joined.fleet.command(command.clone()).await.unwrap();
    assert_eq!(again.operation, first.operation);
    joined.settled(1).await;
    let ended = joined.fleet.command(command.clone()).await.unwrap();
    assert_eq!(ended.status, CommandStatus::Succeeded);
    // Even when Core keeps the outcome and forgot that it does.
    joined.fleet.outcome_kept(1).await;
    assert!(joined.fleet.outcomes().is_empty());
    let known = joined.fleet.command(command).await.unwrap();
    assert_eq!(known.status, CommandStatus::Succeeded);
    assert_eq!(known.operation, first.operation);
    // A number of the past with another command: Core's records went back.
    let reused = joined.command(1, create("other", false));
    let refused = joined.fleet.command(reused).await.unwrap();
    assert_eq!(refused.code, Some(ErrorCode::StaleCommand));
    assert_eq!(joined.world.survivors.lock().store.vms.len(), 1);
}

#[tokio::test]
async fn order_epoch_and_deadline_are_kept() {
    let joined = Joined::with(CorePermissions::default()).await;
    let early = joined.command(2, create("second", false));
    assert_eq!(joined.fleet.command(early.clone()).await, None);
    joined.done(1, create("first", false)).await;
    assert!(joined.agent.vm("second").await.is_err());
    assert!(joined.fleet.command(early).await.is_some());
    joined.settled(2).await;

    joined.fleet.welcomed(CORE, 5).await.unwrap();
    let old = joined.command(3, create("third", false));
    let refused = joined.fleet.command(old).await.unwrap();
    assert_eq!(refused.status, CommandStatus::Refused);
    assert_eq!(refused.code, Some(ErrorCode::StaleCommand));
    // It was not taken: the newer Core may use the number.
    assert_eq!(joined.fleet.ledger(CORE), (5, 2));

    let mut late = joined.command(3, create("third", false));
    late.epoch = 5;
    joined.world.clock.forward(Duration::from_secs(3601));
    let expired = joined.fleet.command(late.clone()).await.unwrap();
    assert_eq!(expired.status, CommandStatus::Expired);
    assert!(expired.message.contains("deadline"), "{}", expired.message);
    // It stays expired, also where the clock goes back.
    assert_eq!(joined.fleet.command(late).await.unwrap(), expired);
    assert!(joined.agent.vm("third").await.is_err());
    assert_eq!(joined.fleet.ledger(CORE), (5, 3));
}

#[tokio::test]
async fn a_refusal_is_remembered_with_its_code() {
    let world = World::new();
    let joined = Joined::start(&world).await;
    let command = joined.command(1, start("nothing"));
    let refused = joined.fleet.command(command.clone()).await.unwrap();
    assert_eq!(refused.status, CommandStatus::Refused);
    assert_eq!(refused.code, Some(ErrorCode::VmNotFound));
    assert!(refused.message.contains("nothing"));
    let bad = CommandAction::CreateVm(Box::new(CreateVmCommand {
        name: "../etc".into(),
        image: "http://evil/image".into(),
        ..CreateVmCommand::default()
    }));
    let refused_too = joined.done(2, bad).await;
    assert_eq!(refused_too.code, Some(ErrorCode::InvalidName));
    drop(joined);
    let again = Joined::start(&world).await;
    assert_eq!(again.fleet.command(command).await.unwrap(), refused);
    assert_eq!(again.outcome(2), Some(refused_too));
}

#[tokio::test]
async fn what_cannot_begin_now_waits_in_order() {
    let joined = Joined::with(CorePermissions::default()).await;
    joined.agent.created("web", true).await;
    joined.world.survivors.lock().guest = Guest::Deaf;
    // Somebody else's stop holds the VM: the guest does not listen.
    let stop = StopCommand {
        vm: "web".into(),
        force: true,
        timeout: Some(Duration::from_millis(300)),
        request_id: None,
    };
    let me = Agent::me();
    joined
        .agent
        .use_cases
        .stop_vm
        .execute(&me, stop)
        .await
        .unwrap();
    let commands = [
        joined.command(1, start("web")),
        joined.command(2, delete("web")),
    ];
    for command in &commands {
        assert_eq!(joined.fleet.command(command.clone()).await, None);
    }
    // Sent again meanwhile, as Core may.
    assert_eq!(joined.fleet.command(commands[0].clone()).await, None);
    assert_eq!(joined.settled(1).await.status, CommandStatus::Succeeded);
    assert_eq!(joined.settled(2).await.status, CommandStatus::Succeeded);
    assert_eq!(joined.world.power("web"), None);
    joined.world.audit();
}

#[tokio::test]
async fn what_waits_for_too_long_expires() {
    let joined = Joined::with(CorePermissions::default()).await;
    joined.agent.created("web", false).await;
    joined.world.survivors.lock().reachable = false;
    drop(joined.world.events.send(HypervisorEvent::Disconnected {
        reason: "test".into(),
    }));
    joined
        .agent
        .until("libvirt lost", |agent| {
            Box::pin(async { !agent.use_cases.check_health.execute().await.ready })
        })
        .await;
    let command = joined.command(1, start("web"));
    assert_eq!(joined.fleet.command(command).await, None);
    joined.world.clock.forward(Duration::from_secs(3601));
    let expired = joined.settled(1).await;
    assert_eq!(expired.status, CommandStatus::Expired);
    assert_eq!(joined.world.power("web"), Some(ObservedPower::Off));
}

#[tokio::test]
async fn a_full_store_takes_no_command_and_a_healed_one_does() {
    let joined = Joined::with(CorePermissions::default()).await;
    joined.world.survivors.lock().store_full = true;
    let command = joined.command(1, create("web", false));
    assert_eq!(joined.fleet.command(command.clone()).await, None);
    let missing = joined.command(1, start("nothing"));
    assert_eq!(joined.fleet.command(missing).await, None);
    assert_eq!(joined.fleet.ledger(CORE), (1, 0));
    joined.world.survivors.lock().store_full = false;
    joined.fleet.command(command).await;
    assert!(joined.settled(1).await.status.is_finished());
}

#[tokio::test]
async fn the_owner_s_permissions_and_the_issuer_s_role_bound_a_command() {
    for (permissions, role, code) in [
        (
            CorePermissions::Off,
            Role::Admin,
            Some(ErrorCode::CorePermissionDenied),
        ),
        (
            CorePermissions::Read,
            Role::Admin,
            Some(ErrorCode::CorePermissionDenied),
        ),
        (
            CorePermissions::Read,
            Role::Viewer,
            Some(ErrorCode::PermissionDenied),
        ),
        (
            CorePermissions::Operate,
            Role::Viewer,
            Some(ErrorCode::PermissionDenied),
        ),
        (CorePermissions::Operate, Role::Operator, None),
        (CorePermissions::OperateAndEnter, Role::Admin, None),
    ] {
        let joined = Joined::with(permissions).await;
        let mut command = joined.command(1, create("web", false));
        command.issuer = alice(role);
        let outcome = joined.fleet.command(command).await.unwrap();
        assert_eq!(outcome.code, code, "{permissions} {role}");
        let made = joined.world.survivors.lock().store.vms.len();
        assert_eq!(made, usize::from(code.is_none()), "{permissions} {role}");
        if code.is_none() {
            joined.settled(1).await;
        }
    }
}

#[tokio::test]
async fn outcomes_that_nobody_keeps_stay_bounded() {
    let joined = Joined::with(CorePermissions::default()).await;
    let commands = FleetLedger::MOST_UNREPORTED as u64 + 20;
    for generation in 1..=commands {
        joined.done(generation, start("nothing")).await;
    }
    let outcomes = joined.fleet.outcomes();
    assert_eq!(outcomes.len(), FleetLedger::MOST_UNREPORTED);
    assert_eq!(outcomes[0].generation, 21);
}

#[tokio::test]
async fn new_outcomes_wake_the_link_and_known_ones_do_not() {
    let joined = Joined::with(CorePermissions::default()).await;
    let fleet = &joined.fleet;
    let patience = Duration::from_millis(100);
    assert!(
        tokio::time::timeout(patience, fleet.outcomes_changed())
            .await
            .is_err()
    );
    joined.done(1, create("web", false)).await;
    tokio::time::timeout(Duration::from_secs(5), fleet.outcomes_changed())
        .await
        .expect("an outcome was not told");
    // The end may have come with the first, or comes now; then there is silence.
    while tokio::time::timeout(patience, fleet.outcomes_changed())
        .await
        .is_ok()
    {}
    fleet.outcome_kept(1).await;
    assert!(
        tokio::time::timeout(patience, fleet.outcomes_changed())
            .await
            .is_err()
    );
}

#[tokio::test]
async fn a_command_that_cannot_be_read_takes_its_place_and_holds_nothing_up() {
    let joined = Joined::with(CorePermissions::Operate).await;
    let unreadable = RefusedCommand {
        id: CommandId::random(),
        epoch: 1,
        generation: 2,
        previous: 1,
        error: Error::new(
            ErrorCode::InvalidArgument,
            "this agent does not know the command",
        ),
        at: joined.world.now(),
    };
    assert_eq!(
        joined.fleet.refuse(unreadable.clone()).await,
        None,
        "the one before it has not come"
    );
    joined.done(1, create("web", false)).await;
    let refused = joined.fleet.refuse(unreadable.clone()).await.unwrap();
    assert_eq!(refused.status, CommandStatus::Refused);
    assert_eq!(joined.fleet.refuse(unreadable).await, Some(refused));
    assert_eq!(
        joined.done(3, start("web")).await.status,
        CommandStatus::Succeeded
    );
    assert_eq!(joined.fleet.ledger(CORE), (1, 3));
}
