//! What is written about visits to guests.

use std::time::Duration;

use ghost_application::guest::{ReadGuestFileCommand, SetGuestPasswordCommand};
use ghost_domain::guest::{ExecExit, FileWrite, GuestProgram};
use ghost_domain::ports::{ExecEvent, ExecSession};
use ghost_domain::{Error, ErrorCode, Role, Secret};

use super::{command, principal, target};
use crate::world::{Agent, World, exit};

async fn drive(session: &mut ExecSession) -> Result<ExecExit, Error> {
    loop {
        if let ExecEvent::Exited(exit) = session.output.next().await? {
            return Ok(exit);
        }
    }
}

async fn run(agent: &Agent) -> ExecSession {
    agent
        .use_cases
        .exec_in_guest
        .execute(&principal(Role::Operator), &target("web"), command())
        .await
        .unwrap()
}

#[tokio::test]
async fn a_program_has_a_line_before_it_runs_and_one_after_it() {
    let world = World::new();
    let agent = world.start().await;
    let id = agent.with_guest("web").await;
    let mut session = run(&agent).await;
    {
        let state = world.guests.state.lock();
        assert_eq!(state.audit.len(), 1);
        let line = &state.audit[0];
        assert_eq!(line.principal, "the operator");
        assert_eq!(line.vm_id, id.to_string());
        assert_eq!(line.vm_name, "web");
        assert_eq!(line.detail, "/bin/true now");
        assert_eq!(line.request_id, "request-1");
        assert_eq!(line.duration, None);
    }
    session.input.write(b"four".to_vec()).await.unwrap();
    world.clock.forward(Duration::from_secs(5));
    drive(&mut session).await.unwrap();
    drop(session);
    agent.lines(&["exec begun", "exec ok"]).await;
    let line = world.guests.state.lock().audit[1].clone();
    assert_eq!((line.bytes_in, line.bytes_out), (4, 8));
    assert!(line.duration.unwrap() >= Duration::from_secs(5));
    assert_eq!(line.detail, "/bin/true now");
}

#[tokio::test]
async fn the_last_line_tells_how_the_program_ended() {
    for (ended, outcome) in [
        (exit(0), "exec ok"),
        (exit(3), "exec exit 3"),
        (
            ExecExit {
                signal: Some(9),
                ..exit(0)
            },
            "exec signal 9",
        ),
        (
            ExecExit {
                timed_out: true,
                signal: Some(9),
                ..exit(0)
            },
            "exec timed out",
        ),
        (
            ExecExit {
                cancelled: true,
                ..exit(0)
            },
            "exec cancelled",
        ),
    ] {
        let world = World::new();
        world.guests.state.lock().script = vec![ExecEvent::Exited(ended)];
        let agent = world.start().await;
        agent.with_guest("web").await;
        drive(&mut run(&agent).await).await.unwrap();
        agent.lines(&["exec begun", outcome]).await;
    }
}

#[tokio::test]
async fn sessions_that_break_or_are_left_have_their_last_line_too() {
    let world = World::new();
    {
        let mut state = world.guests.state.lock();
        state.script = vec![ExecEvent::Stdout(b"abc".to_vec())];
        state.breaks = true;
    }
    let agent = world.start().await;
    agent.with_guest("web").await;
    let mut session = run(&agent).await;
    drive(&mut session).await.unwrap_err();
    drop(session);
    agent
        .lines(&["exec begun", "exec failed: guest_unreachable"])
        .await;
    assert_eq!(world.guests.state.lock().audit[1].bytes_out, 3);
    world.guests.state.lock().audit.clear();

    // Left in the middle, and before anything was read.
    let mut session = run(&agent).await;
    session.output.next().await.unwrap();
    drop(session);
    agent.lines(&["exec begun", "exec cancelled"]).await;
    world.guests.state.lock().audit.clear();
    drop(run(&agent).await);
    agent.lines(&["exec begun", "exec cancelled"]).await;
    world.guests.state.lock().audit.clear();

    // Refused by the guest.
    world.guests.state.lock().fails = Some(Error::new(ErrorCode::GuestFailed, "no such program"));
    let refused = agent
        .use_cases
        .exec_in_guest
        .execute(&Agent::me(), &target("web"), command())
        .await;
    assert_eq!(
        refused.map(drop).unwrap_err().code(),
        ErrorCode::GuestFailed
    );
    agent
        .lines(&["exec begun", "exec failed: guest_failed"])
        .await;
}

#[tokio::test]
async fn what_cannot_be_logged_does_not_happen() {
    let world = World::new();
    let agent = world.start().await;
    agent.with_guest("web").await;
    world.guests.state.lock().audit_full = true;
    let refused = agent
        .use_cases
        .exec_in_guest
        .execute(&Agent::me(), &target("web"), command())
        .await;
    let error = refused.map(drop).unwrap_err();
    assert_eq!(error.code(), ErrorCode::DiskFull);
    assert!(error.message().contains("audit log"), "{error}");
    assert!(world.guests.calls().is_empty());
}

#[tokio::test]
async fn what_came_of_a_call_is_not_told_before_its_line_is_on_the_disk() {
    let world = World::new();
    let agent = world.start().await;
    agent.with_guest("web").await;
    world.guests.state.lock().audit_unsynced = true;
    let refused = agent
        .use_cases
        .exec_in_guest
        .execute(&Agent::me(), &target("web"), command())
        .await;
    let error = refused.map(drop).unwrap_err();
    assert_eq!(error.code(), ErrorCode::IoFailed);
    assert!(error.message().contains("audit log"), "{error}");
    // The program was under way, and was ended; that is a line too, once the disk is back.
    agent.lines(&["exec begun", "exec failed: io_failed"]).await;
    // A file was opened, and no byte of it went either way.
    world.guests.state.lock().audit.clear();
    let read = ReadGuestFileCommand {
        path: "/etc/hosts".into(),
        ..ReadGuestFileCommand::default()
    };
    let read_guest_file = &agent.use_cases.read_guest_file;
    let refused = read_guest_file
        .execute(&Agent::me(), &target("web"), read)
        .await;
    assert_eq!(refused.map(drop).unwrap_err().code(), ErrorCode::IoFailed);
    agent
        .lines(&["file_read begun", "file_read failed: io_failed"])
        .await;
    world.guests.state.lock().audit.clear();
    let write = FileWrite {
        path: "/root/new".into(),
        size: 3,
        mode: 0o600,
        owner: None,
        modified_at: None,
        checksum: None,
        resume: false,
        make_parents: false,
        no_replace: false,
    };
    let write_guest_file = &agent.use_cases.write_guest_file;
    let refused = write_guest_file
        .execute(&Agent::me(), &target("web"), write)
        .await;
    assert_eq!(refused.map(drop).unwrap_err().code(), ErrorCode::IoFailed);
    agent
        .lines(&["file_write begun", "file_write failed: io_failed"])
        .await;
    // Whatever else is called waits for the disk first.
    world.guests.state.lock().audit.clear();
    let calls = world.guests.calls().len();
    let refused = agent
        .use_cases
        .stat_guest_file
        .execute(&Agent::me(), &target("web"), "/etc/hosts", false)
        .await;
    assert_eq!(refused.unwrap_err().code(), ErrorCode::IoFailed);
    assert_eq!(world.guests.calls().len(), calls);
    agent.lines(&["file_stat begun"]).await;
}

#[tokio::test]
async fn a_shell_is_called_one_and_secrets_are_never_written() {
    let world = World::new();
    let agent = world.start().await;
    agent.with_guest("web").await;
    let mut shell = command();
    shell.program = GuestProgram::LoginShell;
    shell.environment.insert("TOKEN".into(), "hunter2".into());
    shell.stdin = true;
    let session = agent
        .use_cases
        .exec_in_guest
        .execute(&Agent::me(), &target("web"), shell)
        .await
        .unwrap();
    session.input.write(b"hunter2\n".to_vec()).await.unwrap();
    drop(session);
    let password = SetGuestPasswordCommand {
        user: "root".into(),
        password: Secret::new("hunter2"),
        hashed: false,
    };
    agent
        .use_cases
        .set_guest_password
        .execute(&Agent::me(), &target("web"), password)
        .await
        .unwrap();
    agent
        .eventually("four lines", |agent| agent.world.guests.lines().len() == 4)
        .await;
    let state = world.guests.state.lock();
    assert_eq!(state.audit[0].action, "shell");
    assert_eq!(state.audit[0].detail, "[env=TOKEN stdin] (login shell)");
    let all = format!("{:?}", state.audit);
    assert!(!all.contains("hunter2"), "{all}");
}

#[tokio::test]
async fn a_detail_is_one_bounded_line() {
    let world = World::new();
    let agent = world.start().await;
    agent.with_guest("web").await;
    let mut request = command();
    request.program = GuestProgram::Command {
        program: "/bin/sh".into(),
        arguments: vec!["-c".into(), format!("\x1b[2J\r\n{}", "x".repeat(100_000))],
    };
    drop(
        agent
            .use_cases
            .exec_in_guest
            .execute(&Agent::me(), &target("web"), request)
            .await
            .unwrap(),
    );
    let detail = world.guests.state.lock().audit[0].detail.clone();
    assert!(detail.len() < 4200, "{}", detail.len());
    assert!(!detail.chars().any(char::is_control));
    assert!(
        detail.starts_with("/bin/sh -c \"\\u{1b}[2J\\r\\nxxx"),
        "{detail:.60}"
    );
}

#[tokio::test]
async fn files_are_counted() {
    let world = World::new();
    let agent = world.start().await;
    agent.with_guest("web").await;
    let me = Agent::me();
    let read = ReadGuestFileCommand {
        path: "/etc/my hosts".into(),
        ..ReadGuestFileCommand::default()
    };
    let (_, mut reader) = agent
        .use_cases
        .read_guest_file
        .execute(&me, &target("web"), read)
        .await
        .unwrap();
    while !reader.read().await.unwrap().is_empty() {}
    drop(reader);
    agent.lines(&["file_read begun", "file_read ok"]).await;
    {
        let mut state = world.guests.state.lock();
        assert_eq!(state.audit[1].bytes_out, 6);
        assert_eq!(state.audit[1].detail, "\"/etc/my hosts\"");
        state.audit.clear();
    }
    let file = FileWrite {
        path: "/tmp/x".into(),
        size: 3,
        mode: 0o640,
        owner: Some((1, 2)),
        modified_at: None,
        checksum: None,
        resume: false,
        make_parents: false,
        no_replace: false,
    };
    let mut writer = agent
        .use_cases
        .write_guest_file
        .execute(&me, &target("web"), file.clone())
        .await
        .unwrap();
    writer.write(b"abc".to_vec()).await.unwrap();
    writer.finish().await.unwrap();
    agent.lines(&["file_write begun", "file_write ok"]).await;
    {
        let mut state = world.guests.state.lock();
        assert_eq!(state.audit[1].bytes_in, 3);
        assert_eq!(state.audit[1].detail, "/tmp/x size=3 mode=0640 owner=1:2");
        state.audit.clear();
    }
    let writer = agent
        .use_cases
        .write_guest_file
        .execute(&me, &target("web"), file)
        .await
        .unwrap();
    drop(writer);
    agent
        .lines(&["file_write begun", "file_write cancelled"])
        .await;
}

#[tokio::test]
async fn an_agent_that_ends_writes_the_ends_of_its_sessions() {
    let world = World::new();
    world.guests.state.lock().script.clear();
    let agent = world.start().await;
    agent.with_guest("web").await;
    let mut session = run(&agent).await;
    let reading = tokio::spawn(async move { session.output.next().await.unwrap_err().code() });
    agent.application.drain(Duration::ZERO).await.unwrap();
    assert_eq!(
        world.guests.lines(),
        ["exec begun", "exec failed: guest_unreachable"]
    );
    assert_eq!(reading.await.unwrap(), ErrorCode::GuestUnreachable);
    let late = agent
        .use_cases
        .exec_in_guest
        .execute(&Agent::me(), &target("web"), command())
        .await;
    assert_eq!(late.map(drop).unwrap_err().code(), ErrorCode::ShuttingDown);
}

#[tokio::test]
async fn who_may_do_nothing_cannot_push_out_what_others_did() {
    let world = World::new();
    let agent = world.start().await;
    agent.with_guest("web").await;
    let refused = async |who: Role| {
        let outcome = agent
            .use_cases
            .exec_in_guest
            .execute(&principal(who), &target("nobody"), command())
            .await;
        outcome.map(drop).unwrap_err()
    };
    for _ in 0..100 {
        refused(Role::Viewer).await;
    }
    refused(Role::Operator).await;
    agent
        .eventually("the lines", |agent| agent.world.guests.lines().len() == 61)
        .await;
    world.clock.forward(Duration::from_secs(61));
    refused(Role::Viewer).await;
    agent
        .eventually("one more", |agent| agent.world.guests.lines().len() == 62)
        .await;
    let last = world.guests.state.lock().audit.last().unwrap().clone();
    assert_eq!(last.outcome, "denied: permission_denied (and 40 before it)");
    assert_eq!(last.vm_name, "nobody");
}
