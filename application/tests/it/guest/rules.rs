//! Who may enter, and in which order it is refused.

use std::time::Duration;

use ghost_application::guest::{
    FreezeGuestCommand, ListAuditCommand, ListGuestFilesCommand, ReadGuestFileCommand,
    SetGuestPasswordCommand, SetLockdownCommand, UpdateGuestSshKeysCommand,
};
use ghost_application::vm::UpdateVmCommand;
use ghost_domain::guest::{DirectoryMake, FileWrite, LinkMake};
use ghost_domain::{Error, ErrorCode, Principal, Result, Role, Secret, VmChange};

use super::{command, principal, target};
use crate::world::{Agent, World};

fn write(path: &str) -> FileWrite {
    FileWrite {
        path: path.to_owned(),
        size: 6,
        mode: 0o640,
        owner: None,
        modified_at: None,
        checksum: None,
        resume: false,
        make_parents: false,
        no_replace: false,
    }
}

/// Every call that enters a guest, with the action that the audit log names it by.
pub(super) async fn enter(
    agent: &Agent,
    who: &Principal,
    vm: &str,
) -> Vec<(&'static str, Result<()>)> {
    let cases = &agent.use_cases;
    let at = target(vm);
    let exec = cases.exec_in_guest.execute(who, &at, command());
    let read = ReadGuestFileCommand {
        path: "/etc/hosts".into(),
        ..ReadGuestFileCommand::default()
    };
    let list = ListGuestFilesCommand {
        path: "/etc".into(),
        ..ListGuestFilesCommand::default()
    };
    let directory = DirectoryMake {
        path: "/srv".into(),
        mode: 0o755,
        owner: None,
        make_parents: false,
    };
    let link = LinkMake {
        path: "/srv/new".into(),
        target: "../old".into(),
        owner: None,
        modified_at: None,
    };
    let password = SetGuestPasswordCommand {
        user: "root".into(),
        password: Secret::new("hunter2"),
        hashed: false,
    };
    let keys = UpdateGuestSshKeysCommand {
        user: "root".into(),
        add: vec!["ssh-ed25519 AAAA me".into()],
        remove: Vec::new(),
    };
    let freeze = FreezeGuestCommand::default();
    vec![
        ("exec", exec.await.map(drop)),
        (
            "file_read",
            cases
                .read_guest_file
                .execute(who, &at, read)
                .await
                .map(drop),
        ),
        (
            "file_write",
            cases
                .write_guest_file
                .execute(who, &at, write("/tmp/x"))
                .await
                .map(drop),
        ),
        (
            "file_stat",
            cases
                .stat_guest_file
                .execute(who, &at, "/etc", true)
                .await
                .map(drop),
        ),
        (
            "file_list",
            cases
                .list_guest_files
                .execute(who, &at, list)
                .await
                .map(drop),
        ),
        (
            "directory_make",
            cases
                .make_guest_directory
                .execute(who, &at, directory)
                .await,
        ),
        (
            "link_make",
            cases.make_guest_link.execute(who, &at, link).await,
        ),
        (
            "power",
            cases
                .shutdown_guest
                .execute(who, &at, true, Duration::ZERO)
                .await,
        ),
        (
            "password",
            cases.set_guest_password.execute(who, &at, password).await,
        ),
        (
            "ssh_keys",
            cases.update_guest_ssh_keys.execute(who, &at, keys).await,
        ),
        ("clock", cases.sync_guest_clock.execute(who, &at).await),
        (
            "freeze",
            cases.freeze_guest.execute(who, &at, freeze).await.map(drop),
        ),
        ("thaw", cases.thaw_guest.execute(who, &at).await.map(drop)),
        (
            "update",
            cases.update_guest.execute(who, &at).await.map(drop),
        ),
    ]
}

pub(super) fn code(outcome: &Result<()>) -> Option<ErrorCode> {
    outcome.as_ref().err().map(Error::code)
}

#[tokio::test]
async fn an_operator_enters_and_a_viewer_looks_on() {
    let world = World::new();
    world.guests.state.lock().program = Some([1; 32]);
    let agent = world.start().await;
    agent.with_guest("web").await;
    for (action, outcome) in enter(&agent, &principal(Role::Viewer), "web").await {
        assert_eq!(
            code(&outcome),
            Some(ErrorCode::PermissionDenied),
            "{action}"
        );
    }
    assert!(world.guests.calls().is_empty(), "nothing has entered");
    let outcomes = enter(&agent, &principal(Role::Operator), "web").await;
    let mut wanted: Vec<String> = outcomes
        .iter()
        .map(|(action, _)| format!("{action} denied: permission_denied"))
        .collect();
    for (action, outcome) in &outcomes {
        assert!(outcome.is_ok(), "{action}: {outcome:?}");
        wanted.push(format!("{action} begun"));
        let session = ["exec", "file_read", "file_write"].contains(action);
        wanted.push(format!(
            "{action} {}",
            if session { "cancelled" } else { "ok" }
        ));
    }
    // Ends are written beside the calls, so their order is not told.
    agent
        .eventually("all lines", |agent| {
            let mut lines = agent.world.guests.lines();
            lines.sort();
            let mut wanted = wanted.clone();
            wanted.sort();
            lines == wanted
        })
        .await;

    let viewer = principal(Role::Viewer);
    let cases = &agent.use_cases;
    assert!(
        cases
            .get_guest_status
            .execute(&viewer, "web")
            .await
            .unwrap()
            .ready
    );
    assert!(cases.ping_guest.execute(&viewer, "web").await.is_ok());
    assert!(
        cases
            .get_guest_history
            .execute(&viewer, "web", None)
            .await
            .is_ok()
    );
    assert!(cases.watch_telemetry.execute(&viewer, None).await.is_ok());
    assert!(cases.get_lockdown.execute(&viewer).await.is_ok());
    for who in [Role::Viewer, Role::Operator] {
        let who = principal(who);
        let all = ListAuditCommand::default();
        let listed = cases.list_audit.execute(&who, &all);
        assert_eq!(
            listed.await.unwrap_err().code(),
            ErrorCode::PermissionDenied
        );
        let verified = cases.verify_audit.execute(&who).await;
        assert_eq!(verified.unwrap_err().code(), ErrorCode::PermissionDenied);
        let set = cases
            .set_lockdown
            .execute(&who, SetLockdownCommand::default());
        assert_eq!(set.await.unwrap_err().code(), ErrorCode::PermissionDenied);
    }
    let admin = principal(Role::Admin);
    let entries = cases
        .list_audit
        .execute(
            &admin,
            &ListAuditCommand {
                limit: 2,
                ..ListAuditCommand::default()
            },
        )
        .await
        .unwrap();
    assert_eq!(entries.len(), 2);
    assert!(
        cases
            .verify_audit
            .execute(&admin)
            .await
            .unwrap()
            .broken
            .is_none()
    );
}

pub(super) async fn set_access(agent: &Agent, on: bool) {
    let change = UpdateVmCommand {
        vm: "web".into(),
        change: VmChange {
            guest_access: Some(on),
            ..VmChange::default()
        },
        ..UpdateVmCommand::default()
    };
    let view = agent
        .use_cases
        .update_vm
        .execute(&Agent::me(), change)
        .await;
    agent.finished(&view.unwrap()).await;
}

async fn lock(agent: &Agent, active: bool) -> Result<ghost_application::guest::LockdownView> {
    let lockdown = SetLockdownCommand {
        active,
        reason: "an intruder".into(),
        request_id: String::new(),
    };
    agent
        .use_cases
        .set_lockdown
        .execute(&principal(Role::Admin), lockdown)
        .await
}

#[tokio::test]
async fn what_is_refused_names_the_outermost_reason() {
    let world = World::new();
    let agent = world.start().await;
    let me = Agent::me();
    agent.created("web", false).await;
    let refused = async || {
        let who = principal(Role::Operator);
        let outcome = agent
            .use_cases
            .exec_in_guest
            .execute(&who, &target("web"), command())
            .await;
        outcome.map(drop).unwrap_err()
    };
    assert_eq!(refused().await.code(), ErrorCode::VmNotRunning);
    lock(&agent, true).await.unwrap();
    assert_eq!(refused().await.code(), ErrorCode::Lockdown);
    set_access(&agent, false).await;
    let off = refused().await;
    assert_eq!(off.code(), ErrorCode::GuestAccessOff);
    assert!(
        off.hint_text()
            .unwrap()
            .contains("ghostctl guest access web on")
    );
    set_access(&agent, true).await;
    lock(&agent, false).await.unwrap();
    let start = agent.use_cases.start_vm.execute(
        &me,
        ghost_application::vm::PowerCommand {
            vm: "web".into(),
            request_id: None,
        },
    );
    agent.finished(&start.await.unwrap()).await;
    let unreachable = refused().await;
    assert_eq!(unreachable.code(), ErrorCode::GuestUnreachable);
    assert_eq!(
        unreachable.hint_text(),
        Some("see each layer: ghostctl guest status web")
    );
    let id = world.vm_id("web");
    agent.greets(id).await;
    let pause = agent.use_cases.pause_vm.execute(
        &me,
        ghost_application::vm::PowerCommand {
            vm: "web".into(),
            request_id: None,
        },
    );
    agent.finished(&pause.await.unwrap()).await;
    let paused = refused().await;
    assert_eq!(paused.code(), ErrorCode::VmNotRunning);
    assert_eq!(paused.hint_text(), Some("ghostctl vm resume web"));
    let nobody = agent
        .use_cases
        .exec_in_guest
        .execute(&principal(Role::Operator), &target("nobody"), command())
        .await;
    assert_eq!(nobody.map(drop).unwrap_err().code(), ErrorCode::VmNotFound);
}

#[tokio::test]
async fn a_host_whose_guests_are_closed_lets_nobody_in_and_shows_telemetry() {
    let world = World::new();
    world.guests.state.lock().options.access = false;
    let agent = world.start().await;
    let id = agent.with_guest("web").await;
    for (action, outcome) in enter(&agent, &Agent::me(), "web").await {
        let wanted = if action == "update" {
            // There is no program to give at all.
            ErrorCode::GuestUnsupported
        } else {
            ErrorCode::GuestAccessOff
        };
        assert_eq!(code(&outcome), Some(wanted), "{action}");
    }
    assert!(world.guests.calls().is_empty());
    world.guests.report(id, super::report());
    let mut watch = agent
        .use_cases
        .watch_telemetry
        .execute(&principal(Role::Viewer), Some("web"))
        .await
        .unwrap();
    loop {
        let view = watch.next().await.unwrap();
        if let Some(sample) = view.sample {
            assert_eq!(sample.cpu_percent, Some(12.5));
            break;
        }
    }
}

#[tokio::test]
async fn access_that_is_switched_off_cuts_open_sessions() {
    let world = World::new();
    world.guests.state.lock().script.clear();
    let agent = world.start().await;
    let id = agent.with_guest("web").await;
    let mut session = agent
        .use_cases
        .exec_in_guest
        .execute(&Agent::me(), &target("web"), command())
        .await
        .unwrap();
    let reading = tokio::spawn(async move { session.output.next().await.unwrap_err().code() });
    set_access(&agent, false).await;
    let ended = tokio::time::timeout(Duration::from_secs(10), reading).await;
    assert_eq!(ended.unwrap().unwrap(), ErrorCode::GuestUnreachable);
    let cuts = world.guests.state.lock().cuts.clone();
    assert!(!cuts.is_empty() && cuts.iter().all(|cut| *cut == id));
    agent
        .lines(&[
            "exec begun",
            "exec failed: guest_unreachable",
            "access ok: 2 sessions cut",
        ])
        .await;
}

#[tokio::test]
async fn a_lockdown_is_in_force_at_once_also_where_it_cannot_be_recorded() {
    let world = World::new();
    let agent = world.start().await;
    agent.with_guest("web").await;
    world.survivors.lock().store_full = true;
    let error = lock(&agent, true).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::StoreUnavailable);
    assert!(error.message().contains("in force"), "{error}");
    assert!(world.guests.state.lock().locked);
    let seen = agent.use_cases.get_lockdown.execute(&Agent::me()).await;
    assert_eq!(seen.unwrap().lockdown.unwrap().reason, "an intruder");
    let refused = agent
        .use_cases
        .exec_in_guest
        .execute(&Agent::me(), &target("web"), command())
        .await;
    assert_eq!(refused.map(drop).unwrap_err().code(), ErrorCode::Lockdown);
    // Once there is room, setting it again records it; its first reason and time stay.
    world.survivors.lock().store_full = false;
    let view = lock(&agent, true).await.unwrap();
    assert_eq!(view.sessions_cut, 3);
    assert_eq!(world.survivors.lock().store.lockdown, view.lockdown);
}

#[tokio::test]
async fn a_lockdown_closes_consoles_too() {
    let world = World::new();
    let agent = world.start().await;
    agent.with_guest("web").await;
    let (me, console) = (Agent::me(), &agent.use_cases.open_console);
    let (_, mut session) = console.execute(&me, "web").await.unwrap();
    let reading = tokio::spawn(async move {
        let read = session.reader.read().await.unwrap_err().code();
        let written = session.writer.write(b"x").await.unwrap_err().code();
        (read, written)
    });
    assert_eq!(lock(&agent, true).await.unwrap().sessions_cut, 4);
    let ended = tokio::time::timeout(Duration::from_secs(10), reading).await;
    let locked = ErrorCode::Lockdown;
    assert_eq!(ended.unwrap().unwrap(), (locked, locked));
    let refused = console.execute(&me, "web").await.map(drop);
    assert_eq!(code(&refused), Some(locked));
    lock(&agent, false).await.unwrap();
    assert!(console.execute(&me, "web").await.is_ok());
}

#[tokio::test]
async fn a_lockdown_outlives_the_agent_and_is_there_before_any_link() {
    let world = World::new();
    let agent = world.start().await;
    agent.with_guest("web").await;
    lock(&agent, true).await.unwrap();
    agent.application.drain(Duration::ZERO).await.unwrap();
    {
        let mut state = world.guests.state.lock();
        state.locked = false;
        state.attached.clear();
        state.order.clear();
    }
    let agent = world.start().await;
    agent
        .eventually("the link", |agent| {
            !agent.world.guests.state.lock().attached.is_empty()
        })
        .await;
    assert_eq!(world.guests.state.lock().order[..2], ["lock", "attach"]);
    let seen = agent.use_cases.get_lockdown.execute(&Agent::me()).await;
    assert!(seen.unwrap().lockdown.is_some());
    let lifted = lock(&agent, false).await.unwrap();
    assert_eq!(lifted.lockdown, None);
    assert!(!world.guests.state.lock().locked);
    assert_eq!(world.survivors.lock().store.lockdown, None);
}

#[tokio::test]
async fn a_lockdown_that_cannot_be_lifted_durably_stays() {
    let world = World::new();
    let agent = world.start().await;
    lock(&agent, true).await.unwrap();
    world.survivors.lock().store_full = true;
    let error = lock(&agent, false).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::StoreUnavailable);
    assert!(world.guests.state.lock().locked);
    let seen = agent.use_cases.get_lockdown.execute(&Agent::me()).await;
    assert!(seen.unwrap().lockdown.is_some());
    agent
        .lines(&[
            "lockdown ok: 3 sessions cut",
            "lockdown_lift begun",
            "lockdown_lift failed: store_unavailable",
        ])
        .await;
}

#[tokio::test]
async fn nonsense_is_refused_before_anything_is_asked() {
    let world = World::new();
    let agent = world.start().await;
    agent.with_guest("web").await;
    let (cases, me, at) = (&agent.use_cases, Agent::me(), target("web"));
    let long = Duration::from_secs(86_401);
    let mut refused = vec![
        cases
            .stat_guest_file
            .execute(&me, &at, "etc", true)
            .await
            .map(drop),
        cases
            .write_guest_file
            .execute(&me, &at, write("x"))
            .await
            .map(drop),
        cases.shutdown_guest.execute(&me, &at, false, long).await,
    ];
    for (user, password) in [
        ("-x", "p"),
        ("a:b", "p"),
        ("", "p"),
        ("root", ""),
        ("root", "a\nroot:b"),
    ] {
        let command = SetGuestPasswordCommand {
            user: user.into(),
            password: Secret::new(password),
            hashed: false,
        };
        refused.push(cases.set_guest_password.execute(&me, &at, command).await);
    }
    for add in [vec![], vec!["two\nlines".to_owned()], vec![" ".to_owned()]] {
        let command = UpdateGuestSshKeysCommand {
            user: "root".into(),
            add,
            remove: Vec::new(),
        };
        refused.push(cases.update_guest_ssh_keys.execute(&me, &at, command).await);
    }
    for seconds in [0, 61] {
        let command = FreezeGuestCommand {
            timeout: Some(Duration::from_secs(seconds)),
            mount_points: Vec::new(),
        };
        refused.push(
            cases
                .freeze_guest
                .execute(&me, &at, command)
                .await
                .map(drop),
        );
    }
    for (which, outcome) in refused.iter().enumerate() {
        assert_eq!(code(outcome), Some(ErrorCode::InvalidArgument), "{which}");
    }
    for span in [Duration::ZERO, Duration::from_secs(86_401)] {
        let history = cases
            .get_guest_history
            .execute(&me, "web", Some(span))
            .await;
        assert_eq!(history.unwrap_err().code(), ErrorCode::InvalidArgument);
    }
    assert!(world.guests.calls().is_empty());
    assert!(world.guests.lines().is_empty());
}
