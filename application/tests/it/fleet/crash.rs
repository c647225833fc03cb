//! The agent is cut off at every commit that a sequence of commands makes, before it or after it:
//! nothing is lost and nothing is done twice.

use std::time::Duration;

use ghost_domain::fleet::{CommandStatus, FleetCommand};
use ghost_domain::ports::CoreLinkHandler;
use ghost_domain::vm::ObservedPower;
use ghost_domain::{CommandId, Role};

use super::{CORE, Joined, alice, create, delete};
use crate::world::{Dies, World};

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
}

/// A queue as Core has it: `web` made, a refused command, `old` deleted, `web` started.
fn queue(world: &World) -> Vec<FleetCommand> {
    let deadline = world.now().after(Duration::from_secs(3600));
    [
        create("web", false),
        create("web", false),
        delete("old"),
        ghost_domain::fleet::CommandAction::StartVm { vm: "web".into() },
    ]
    .into_iter()
    .zip(1..)
    .map(|(action, generation)| FleetCommand {
        id: CommandId::random(),
        epoch: 1,
        generation,
        previous: generation - 1,
        deadline,
        issuer: alice(Role::Operator),
        action,
    })
    .collect()
}

/// Sends as Core does: each until it has an outcome, in order, again and again.
async fn send_all(joined: &Joined, queue: &[FleetCommand]) {
    for command in queue {
        while joined.fleet.command(command.clone()).await.is_none() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
    for command in queue {
        joined.settled(command.generation).await;
    }
}

/// Sends until the agent dies or all is done; true where it died.
fn life(world: &World, queue: &[FleetCommand], dies: Option<(u64, Dies)>) -> bool {
    let runtime = runtime();
    {
        let mut survivors = world.survivors.lock();
        survivors.dead = false;
        survivors.dies_at = dies.map(|(after, when)| (survivors.commits + after, when));
    }
    let died = runtime.block_on(async {
        let dead = async {
            while !world.survivors.lock().dead {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            // What the agent could still do without its store, it does.
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        let all = async {
            let joined = Joined::start(world).await;
            send_all(&joined, queue).await;
            joined.agent.idle().await;
        };
        tokio::select! {
            () = dead => true,
            () = all => false,
        }
    });
    runtime.shutdown_timeout(Duration::from_millis(200));
    world.survivors.lock().dies_at = None;
    died
}

fn prepared() -> World {
    let world = World::new();
    let runtime = runtime();
    runtime.block_on(async {
        let agent = world.start().await;
        agent.created("old", false).await;
        agent.created("bystander", true).await;
    });
    runtime.shutdown_timeout(Duration::from_millis(200));
    world
}

fn check(world: &World, queue: &[FleetCommand], case: &str) {
    world.audit();
    assert_eq!(world.power("web"), Some(ObservedPower::Running), "{case}");
    assert_eq!(world.power("old"), None, "{case}");
    assert_eq!(world.power("bystander"), Some(ObservedPower::Running));
    let survivors = world.survivors.lock();
    let ledger = survivors.store.fleet_ledger.clone().unwrap();
    assert_eq!(
        (ledger.core_id.as_str(), ledger.generation),
        (CORE, 4),
        "{case}"
    );
    let statuses: Vec<_> = ledger.unreported.iter().map(|one| one.status).collect();
    assert_eq!(
        statuses,
        [
            CommandStatus::Succeeded,
            CommandStatus::Refused,
            CommandStatus::Succeeded,
            CommandStatus::Succeeded
        ],
        "{case}: {:?}",
        ledger.unreported
    );
    for (command, outcome) in queue.iter().zip(&ledger.unreported) {
        let operations: Vec<_> = survivors
            .store
            .operations
            .iter()
            .filter(|one| {
                let key = one.request_id.as_ref();
                key.is_some_and(|key| key.as_str() == command.id.to_string())
            })
            .collect();
        let expected = usize::from(outcome.status == CommandStatus::Succeeded);
        assert_eq!(operations.len(), expected, "{case}: {command:?}");
        assert_eq!(
            operations.first().map(|one| one.id),
            outcome.operation,
            "{case}"
        );
    }
}

#[test]
fn a_crash_at_every_commit_loses_and_doubles_no_command() {
    let world = prepared();
    let commands = queue(&world);
    let before = world.survivors.lock().commits;
    assert!(!life(&world, &commands, None));
    check(&world, &commands, "undisturbed");
    let commits = world.survivors.lock().commits - before;
    assert!(commits > 15, "only {commits} commits");
    for when in [Dies::Before, Dies::After] {
        for at in 1..=commits {
            let world = prepared();
            let commands = queue(&world);
            let died = life(&world, &commands, Some((at, when)));
            let case = format!("{when:?} commit {at} of {commits}");
            assert!(!life(&world, &commands, None), "{case}");
            check(&world, &commands, &case);
            // How many commits the engine makes differs by a few; the first ones are always there.
            assert!(died || at > commits / 2, "{case} was not reached");
        }
    }
}
