//! Core deletes no more than a fifth of the VMs within ten minutes, unless the owner agrees.

use std::time::Duration;

use ghost_application::vm::DeleteVmCommand;
use ghost_domain::fleet::{CommandStatus, CorePermissions};
use ghost_domain::{ErrorCode, Principal, Role};

use super::{Joined, create, delete, through_core};
use crate::world::{Agent, World};

async fn with_vms(world: &World, vms: usize) -> Joined {
    let joined = Joined::start(world).await;
    for number in 0..vms {
        joined.agent.created(&format!("vm-{number}"), false).await;
    }
    joined
}

async fn delete_by(
    joined: &Joined,
    principal: &Principal,
    vm: usize,
) -> Result<(), ghost_domain::Error> {
    let command = DeleteVmCommand {
        vm: format!("vm-{vm}"),
        ..DeleteVmCommand::default()
    };
    let use_case = &joined.agent.use_cases.delete_vm;
    let view = use_case.execute(principal, command).await?;
    joined.agent.finished(&view).await;
    Ok(())
}

#[tokio::test]
async fn a_fifth_is_deleted_and_no_more_by_commands_and_calls_together_across_a_restart() {
    let world = World::new();
    let joined = with_vms(&world, 10).await;
    assert_eq!(
        joined.done(1, delete("vm-0")).await.status,
        CommandStatus::Succeeded
    );
    delete_by(&joined, &through_core(), 1).await.unwrap();
    let refused = joined.done(2, delete("vm-2")).await;
    assert_eq!(refused.status, CommandStatus::Refused);
    assert_eq!(refused.code, Some(ErrorCode::ConfirmationRequired));
    assert!(
        refused
            .message
            .contains("ghostctl core allow-deletes --for 10m"),
        "{}",
        refused.message
    );
    // The owner's own deletes are neither bounded nor counted.
    delete_by(&joined, &Agent::me(), 3).await.unwrap();
    drop(joined);

    let joined = Joined::start(&world).await;
    let error = delete_by(&joined, &through_core(), 2).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::ConfirmationRequired);
    assert_eq!(
        error.hint_text(),
        Some("on the host: ghostctl core allow-deletes --for 10m")
    );
    // Nothing of it was begun.
    assert!(joined.agent.vm("vm-2").await.is_ok());
    world.audit();

    world.clock.forward(Duration::from_secs(601));
    delete_by(&joined, &through_core(), 2).await.unwrap();
    // Seven were left when the window began: one may go.
    let error = delete_by(&joined, &through_core(), 4).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::ConfirmationRequired);
}

#[tokio::test]
async fn the_owner_s_consent_lifts_the_bound_for_its_time_and_survives_a_restart() {
    let world = World::new();
    let joined = with_vms(&world, 5).await;
    delete_by(&joined, &through_core(), 0).await.unwrap();
    assert!(delete_by(&joined, &through_core(), 1).await.is_err());
    let allow = &joined.agent.use_cases.allow_core_deletes;
    let minutes = Duration::from_secs(600);
    // Core cannot agree with itself, nor can an operator.
    let mut core = through_core();
    core.role = Role::Admin;
    let error = allow.execute(&core, minutes).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::CorePermissionDenied);
    let operator = Principal {
        role: Role::Operator,
        ..Agent::me()
    };
    let error = allow.execute(&operator, minutes).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::PermissionDenied);
    let too_long = Duration::from_secs(25 * 3600);
    assert!(allow.execute(&Agent::me(), too_long).await.is_err());
    assert!(delete_by(&joined, &through_core(), 1).await.is_err());

    allow.execute(&Agent::me(), minutes).await.unwrap();
    delete_by(&joined, &through_core(), 1).await.unwrap();
    drop(joined);
    let joined = Joined::start(&world).await;
    delete_by(&joined, &through_core(), 2).await.unwrap();
    let allow = &joined.agent.use_cases.allow_core_deletes;
    allow.execute(&Agent::me(), Duration::ZERO).await.unwrap();
    assert!(delete_by(&joined, &through_core(), 3).await.is_err());
    allow
        .execute(&Agent::me(), Duration::from_secs(60))
        .await
        .unwrap();
    world.clock.forward(Duration::from_secs(61));
    assert!(delete_by(&joined, &through_core(), 3).await.is_err());
}

#[tokio::test]
async fn many_at_once_are_no_way_around_it() {
    let world = World::new();
    let joined = with_vms(&world, 10).await;
    let core = through_core();
    let all = (0..10).map(|vm| delete_by(&joined, &core, vm));
    let outcomes = futures::future::join_all(all).await;
    let deleted = outcomes.iter().filter(|one| one.is_ok()).count();
    assert_eq!(deleted, 2, "{outcomes:?}");
}

#[tokio::test]
async fn what_core_made_just_now_it_may_delete_and_old_vms_stay_bounded() {
    let world = World::new();
    let joined = with_vms(&world, 5).await;
    let mut generation = 0;
    let mut next = || {
        generation += 1;
        generation
    };
    for number in 0..6 {
        let name = format!("theirs-{number}");
        let made = joined.done(next(), create(&name, false)).await;
        assert_eq!(made.status, CommandStatus::Succeeded, "{made:?}");
    }
    for number in 0..5 {
        let gone = joined
            .done(next(), delete(&format!("theirs-{number}")))
            .await;
        assert_eq!(gone.status, CommandStatus::Succeeded, "{gone:?}");
    }
    // Five old VMs: one may go. VMs that Core made do not raise the bound.
    let first = joined.done(next(), delete("vm-0")).await;
    assert_eq!(first.status, CommandStatus::Succeeded, "{first:?}");
    let second = joined.done(next(), delete("vm-1")).await;
    assert_eq!(second.code, Some(ErrorCode::ConfirmationRequired));
    // After ten minutes what Core made is as old as all else.
    world.clock.forward(Duration::from_secs(601));
    let after = world.now().after(Duration::from_secs(60));
    let mut command = joined.command(next(), delete("theirs-5"));
    command.deadline = after;
    assert!(joined.fleet_took(command).await);
    let bounded = joined.done(next(), delete("vm-1")).await;
    assert_eq!(bounded.code, Some(ErrorCode::ConfirmationRequired));
}

impl Joined {
    async fn fleet_took(&self, command: ghost_domain::fleet::FleetCommand) -> bool {
        use ghost_domain::ports::CoreLinkHandler;
        let generation = command.generation;
        self.fleet.command(command).await;
        self.settled(generation).await.status == CommandStatus::Succeeded
    }
}

#[tokio::test]
async fn a_lone_vm_can_be_deleted_through_core() {
    let joined = Joined::with(CorePermissions::Operate).await;
    joined.agent.created("vm-0", false).await;
    delete_by(&joined, &through_core(), 0).await.unwrap();
    assert!(joined.agent.vm("vm-0").await.is_err());
}
