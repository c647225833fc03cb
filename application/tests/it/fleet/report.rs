//! What the host tells.

use std::time::Duration;

use ghost_domain::fleet::{CorePermissions, LinkState};
use ghost_domain::ports::CoreLinkHandler;
use ghost_domain::vm::{DesiredPower, VmState};
use ghost_domain::{ByteSize, EventKind};

use super::{CORE, Joined, create};
use crate::world::{Agent, World};

#[tokio::test]
async fn the_report_is_the_registry() {
    let joined = Joined::with(CorePermissions::default()).await;
    joined.agent.created("mine", true).await;
    joined.done(1, create("theirs", false)).await;
    for name in ["a", "b", "c", "d"] {
        joined.agent.created(name, false).await;
    }
    let report = joined.fleet.report().await.unwrap();
    assert_eq!(report.vms.len(), 6);
    assert!(report.vms.is_sorted_by_key(|vm| vm.id));
    let of = |name: &str| report.vms.iter().find(|vm| vm.name == name).unwrap();
    assert_eq!(of("mine").state, VmState::Running);
    assert_eq!(of("mine").desired, DesiredPower::Running);
    assert_eq!(of("mine").owner, None);
    assert_eq!(of("mine").demand.memory, ByteSize::from_mib(256));
    assert_eq!(of("theirs").state, VmState::Stopped);
    assert_eq!(of("theirs").owner.as_deref(), Some("acme/alice"));
    assert_eq!(of("theirs").image, "tiny");
    assert_eq!(report.total.cpus, 8);
    assert_eq!(report.committed.cpus, 1);
    assert_eq!(report.agent_state, "running");
    assert!(report.hypervisor_connected && report.store_writable && !report.lockdown);
    assert_eq!(report.facts.libvirt_version, "1");
    assert_eq!(report.facts.accelerator, "tcg");
    // Who owns it is in the record, and so there after a restart.
    let again = joined.world.start().await;
    let report = again.application.fleet().report().await.unwrap();
    let theirs = report.vms.iter().find(|vm| vm.name == "theirs").unwrap();
    assert_eq!(theirs.owner.as_deref(), Some("acme/alice"));
}

#[tokio::test]
async fn changes_that_matter_are_told_at_once_and_others_are_not() {
    let joined = Joined::with(CorePermissions::default()).await;
    joined.agent.created("web", false).await;
    let fleet = &joined.fleet;
    // What has been until now is in the first report.
    let nothing = tokio::time::timeout(Duration::from_millis(100), fleet.report_changed());
    assert!(nothing.await.is_err());
    let told = async {
        tokio::time::timeout(Duration::from_secs(10), fleet.report_changed())
            .await
            .expect("a VM that came was not told");
    };
    let (_, ()) = tokio::join!(joined.agent.created("db", false), told);
    // All that the creation did is told; then there is silence.
    while tokio::time::timeout(Duration::from_millis(200), fleet.report_changed())
        .await
        .is_ok()
    {}
    let told = tokio::time::timeout(Duration::from_secs(10), fleet.report_changed());
    joined.world.tell_power(
        joined.world.vm_id("web"),
        ghost_domain::vm::ObservedPower::Paused,
        "user",
        false,
    );
    told.await.expect("a changed state was not told");
}

#[tokio::test]
async fn an_out_of_date_core_is_sent_away_and_another_one_begins_anew() {
    let world = World::new();
    let agent = world.start().await;
    let fleet = agent.application.fleet();
    assert_eq!(fleet.ledger(CORE), (0, 0));
    fleet.welcomed(CORE, 7).await.unwrap();
    assert_eq!(fleet.ledger(CORE), (7, 0));
    let stale = fleet.welcomed(CORE, 6).await.unwrap_err();
    assert_eq!(stale.code(), ghost_domain::ErrorCode::StaleCommand);
    // Durable.
    let again = world.start().await;
    let fleet = again.application.fleet();
    assert_eq!(fleet.ledger(CORE), (7, 0));
    assert!(fleet.welcomed(CORE, 6).await.is_err());
    fleet.welcomed("core-2", 1).await.unwrap();
    assert_eq!(fleet.ledger(CORE), (0, 0));
    assert_eq!(fleet.ledger("core-2"), (1, 0));
    for bad in ["", "a b", &"x".repeat(65), "a\n"] {
        assert!(fleet.welcomed(bad, 1).await.is_err(), "{bad:?}");
    }
}

#[tokio::test]
async fn the_link_s_states_are_events_and_shown() {
    let joined = Joined::with(CorePermissions::Operate).await;
    let command = ghost_application::event::WatchEventsCommand::default();
    let (mut events, _) = joined
        .agent
        .use_cases
        .watch_events
        .execute(&Agent::me(), &command)
        .await
        .unwrap();
    let up = |round_trip| LinkState::Up {
        carrier: "link".into(),
        replica: "r1".into(),
        round_trip: Duration::from_millis(round_trip),
    };
    joined.fleet.link_changed(LinkState::Connecting);
    joined.fleet.link_changed(up(1));
    joined.fleet.link_changed(up(2));
    joined.fleet.link_changed(LinkState::Silent {
        since: Duration::from_secs(15),
    });
    joined.fleet.link_changed(LinkState::Waiting {
        reason: "no\nroute".into(),
        retry_in: Duration::from_secs(2),
    });
    joined.fleet.heartbeat_ended(true);
    joined.fleet.heartbeat_ended(false);
    let connected = events.next().await.unwrap();
    assert!(matches!(connected.kind, EventKind::CoreConnected { .. }));
    let lost = events.next().await.unwrap();
    let EventKind::CoreLost { reason } = lost.kind else {
        panic!("{:?}", lost.kind);
    };
    assert!(reason.contains("15 s"), "{reason}");
    let view = joined
        .agent
        .use_cases
        .get_core_link
        .execute(&Agent::me())
        .await
        .unwrap();
    assert_eq!(view.permissions, CorePermissions::Operate);
    assert!(matches!(view.state, LinkState::Waiting { .. }));
    assert_eq!(view.last_failure, "no\\nroute");
    assert_eq!((view.heartbeats_answered, view.heartbeats_lost), (1, 1));
    assert!(view.since.is_some() && view.identity.is_none());
}
