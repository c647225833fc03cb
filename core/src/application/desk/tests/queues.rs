use std::sync::Arc;
use std::time::Duration;

use ghost_domain::ErrorCode;
use ghost_domain::fleet::{CommandStatus, CorePermissions};
use parking_lot::Mutex;

use super::super::commands::{KEPT_FOR, LONGEST_LIFETIME, MOST_OPEN};
use super::support::*;
use super::*;

fn status(core: &Core, id: ghost_domain::CommandId) -> Option<CommandStatus> {
    core.fleet
        .read(|state| state.command(id).map(|command| command.status))
}

async fn until(core: &Core, id: ghost_domain::CommandId, wanted: CommandStatus) {
    while status(core, id) != Some(wanted) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn commands_for_a_host_that_is_away_are_done_in_order_once_it_comes() {
    let core = core(MemoryStore::new(), "core-1").await.unwrap();
    let host = core.add_host().await;
    let mut ids = Vec::new();
    for number in 0..20 {
        let request = request(host, &format!("key-{number}"), "web");
        let command = core.desk.commands().queue(request.clone()).await.unwrap();
        let again = core.desk.commands().queue(request).await.unwrap();
        assert_eq!(command.id, again.id, "a repeat is the same command");
        assert_eq!(command.generation, number + 1);
        ids.push(command.id);
    }
    let disk = Arc::new(Mutex::new(Disk::default()));
    let link = core.link(peer(host));
    let host_runs = tokio::spawn(obey(link, Arc::clone(&disk), core.fleet.clock().now()));
    for id in &ids {
        until(&core, *id, CommandStatus::Succeeded).await;
    }
    assert_eq!(disk.lock().done, ids);
    // What Core keeps the host forgets.
    while !disk.lock().ledger.unreported.is_empty() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // And one that is queued while the host is there goes out at once.
    let late = core
        .desk
        .commands()
        .queue(request(host, "late", "web"))
        .await
        .unwrap();
    until(&core, late.id, CommandStatus::Succeeded).await;
    host_runs.abort();
}

#[tokio::test(start_paused = true)]
async fn a_key_means_one_thing() {
    let core = core(MemoryStore::new(), "core-1").await.unwrap();
    let (host, other) = (core.add_host().await, core.add_host().await);
    let commands = core.desk.commands();
    let first = commands.queue(request(host, "key", "web")).await.unwrap();
    let error = commands
        .queue(request(host, "key", "db"))
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::RequestIdReused);
    let elsewhere = commands.queue(request(other, "key", "db")).await.unwrap();
    assert_ne!(first.id, elsewhere.id);
    // At the same moment, by two replicas' doors or two threads.
    let racing =
        futures::future::join_all((0..8).map(|_| commands.queue(request(host, "race", "web"))));
    let mut ids: Vec<_> = racing
        .await
        .into_iter()
        .map(|one| one.unwrap().id)
        .collect();
    ids.dedup();
    assert_eq!(ids.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_queued_is_told() {
    let core = core(MemoryStore::new(), "core-1").await.unwrap();
    let host = core.add_host().await;
    let commands = core.desk.commands();
    let code = async |request: CommandRequest| commands.queue(request).await.unwrap_err().code();
    let good = request(host, "a", "web");
    let long = LONGEST_LIFETIME + Duration::from_secs(1);
    assert_eq!(
        code(CommandRequest {
            lifetime: Some(long),
            ..good.clone()
        })
        .await,
        ErrorCode::InvalidArgument
    );
    assert_eq!(
        code(request(ghost_domain::HostId::random(), "a", "web")).await,
        ErrorCode::HostNotFound
    );
    assert_eq!(
        code(request(host, "a", &"x".repeat(600_000))).await,
        ErrorCode::PayloadTooLarge
    );
    core.change_host(host, |record| record.permissions = CorePermissions::Read)
        .await;
    assert_eq!(code(good.clone()).await, ErrorCode::CorePermissionDenied);
    core.change_host(host, |record| {
        record.permissions = CorePermissions::Operate;
        record.life = HostLife::Locked {
            since: ghost_domain::Timestamp::default(),
            reason: "two machines".into(),
        };
    })
    .await;
    assert_eq!(code(good.clone()).await, ErrorCode::HostLocked);
    core.change_host(host, |record| record.life = HostLife::Active)
        .await;
    for number in 0..MOST_OPEN {
        commands
            .queue(request(host, &number.to_string(), "web"))
            .await
            .unwrap();
    }
    assert_eq!(code(good).await, ErrorCode::TooManyRequests);
}

#[tokio::test(start_paused = true)]
async fn what_waited_too_long_expires_and_what_went_out_waits_for_its_host() {
    let core = core(MemoryStore::new(), "core-1").await.unwrap();
    let host = core.add_host().await;
    let commands = core.desk.commands();
    let sent = commands.queue(request(host, "sent", "web")).await.unwrap();
    let mut link = core.linked(host).await;
    let Some(ToHost::Command { command, .. }) = link.next().await else {
        panic!()
    };
    assert_eq!((command.id, command.previous), (sent.id, 0));
    let error = commands.cancel(sent.id).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::CommandTaken);
    drop(link);
    while core.desk.has(host) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let waiting = commands
        .queue(request(host, "waiting", "web"))
        .await
        .unwrap();
    let cancelled = commands
        .queue(request(host, "cancelled", "web"))
        .await
        .unwrap();
    assert_eq!(
        commands.cancel(cancelled.id).await.unwrap().status,
        CommandStatus::Cancelled
    );
    core.clock.turn(Duration::from_secs(3601));
    until(&core, waiting.id, CommandStatus::Expired).await;
    let outcome = core
        .fleet
        .read(|state| state.command(waiting.id).unwrap().outcome.clone());
    let outcome = outcome.unwrap();
    assert_eq!(outcome.code, Some(ErrorCode::DeadlineExceeded));
    assert!(outcome.message.contains("while the host was away"));
    assert_eq!(
        status(&core, sent.id),
        Some(CommandStatus::Queued),
        "the host may have begun it"
    );

    // The host comes back, and never had it.
    let disk = Arc::new(Mutex::new(Disk::default()));
    let link = core.link(peer(host));
    let host_runs = tokio::spawn(obey(link, Arc::clone(&disk), core.fleet.clock().now()));
    until(&core, sent.id, CommandStatus::Expired).await;
    assert!(disk.lock().done.is_empty());
    assert_eq!(status(&core, cancelled.id), Some(CommandStatus::Cancelled));

    core.clock.turn(KEPT_FOR + Duration::from_secs(60));
    while core.fleet.read(|state| state.commands().count()) > 0 {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    host_runs.abort();
}

#[tokio::test(start_paused = true)]
async fn a_hosts_word_is_taken_once_and_of_its_own_commands_alone() {
    let core = core(MemoryStore::new(), "core-1").await.unwrap();
    let (host, other) = (core.add_host().await, core.add_host().await);
    let mine = core
        .desk
        .commands()
        .queue(request(host, "a", "web"))
        .await
        .unwrap();
    let theirs = core
        .desk
        .commands()
        .queue(request(other, "a", "web"))
        .await
        .unwrap();
    let mut link = core.linked(host).await;
    let say = |command: &crate::domain::QueuedCommand, status| {
        FromHost::Outcome(Box::new(ghost_domain::fleet::CommandOutcome {
            id: command.id,
            generation: command.generation,
            status,
            operation: None,
            code: None,
            message: String::new(),
            at: ghost_domain::Timestamp::default(),
        }))
    };
    for (command, status) in [
        (&theirs, CommandStatus::Failed),
        (&mine, CommandStatus::Succeeded),
        (&mine, CommandStatus::Accepted),
        (&mine, CommandStatus::Failed),
    ] {
        link.say(say(command, status));
        // What merely began is not acknowledged: the end of it would be taken for kept.
        if status.is_finished() {
            let kept = loop {
                match link.next().await {
                    Some(ToHost::CommandKept(generation)) => break generation,
                    Some(_) => {}
                    None => panic!("the link ended"),
                }
            };
            assert_eq!(kept, command.generation);
        }
    }
    assert_eq!(status(&core, mine.id), Some(CommandStatus::Succeeded));
    assert_eq!(status(&core, theirs.id), Some(CommandStatus::Queued));
}

/// Records that were put back from a copy number their commands below what the host has taken.
#[tokio::test(start_paused = true)]
async fn numbers_go_on_above_what_the_host_has_taken() {
    let core = core(MemoryStore::new(), "core-1").await.unwrap();
    let host = core.add_host().await;
    let mut link = core.link(peer(host));
    link.say(hello("a", 41));
    assert!(matches!(link.next().await, Some(ToHost::Welcome(_))));
    let command = core
        .desk
        .commands()
        .queue(request(host, "a", "web"))
        .await
        .unwrap();
    assert_eq!(command.generation, 42);
}
