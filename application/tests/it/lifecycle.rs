//! The life of a VM, and every refusal on its way.

use std::time::Duration;

use ghost_application::vm::{
    CreateVmCommand, DeleteVmCommand, PowerCommand, StopCommand, UpdateVmCommand,
};
use ghost_domain::vm::{ObservedPower, VmState};
use ghost_domain::{ByteSize, ErrorCode, OperationStatus, Principal, Role, VmChange};

use crate::world::{Agent, Guest, World, command};

fn power(vm: &str) -> PowerCommand {
    PowerCommand {
        vm: vm.into(),
        request_id: None,
    }
}

fn stop(vm: &str, force: bool, timeout: Option<Duration>) -> StopCommand {
    StopCommand {
        vm: vm.into(),
        force,
        timeout,
        request_id: None,
    }
}

fn delete(vm: &str, force: bool) -> DeleteVmCommand {
    DeleteVmCommand {
        vm: vm.into(),
        force,
        ..DeleteVmCommand::default()
    }
}

#[tokio::test]
async fn create_start_pause_resume_restart_stop_delete() {
    let world = World::new();
    let agent = world.start().await;
    let (me, use_cases) = (Agent::me(), &agent.use_cases);
    assert_eq!(
        agent.created("web", false).await.operation.status,
        OperationStatus::Succeeded
    );
    assert_eq!(agent.state("web").await, VmState::Stopped);
    agent
        .finished(&use_cases.start_vm.execute(&me, power("web")).await.unwrap())
        .await;
    assert_eq!(agent.state("web").await, VmState::Running);
    agent
        .finished(&use_cases.pause_vm.execute(&me, power("web")).await.unwrap())
        .await;
    assert_eq!(agent.state("web").await, VmState::Paused);
    agent
        .finished(
            &use_cases
                .resume_vm
                .execute(&me, power("web"))
                .await
                .unwrap(),
        )
        .await;
    agent
        .finished(
            &use_cases
                .restart_vm
                .execute(&me, stop("web", false, None))
                .await
                .unwrap(),
        )
        .await;
    assert_eq!(agent.state("web").await, VmState::Running);
    agent
        .finished(
            &use_cases
                .stop_vm
                .execute(&me, stop("web", false, None))
                .await
                .unwrap(),
        )
        .await;
    assert_eq!(agent.state("web").await, VmState::Stopped);
    agent
        .finished(
            &use_cases
                .delete_vm
                .execute(&me, delete("web", false))
                .await
                .unwrap(),
        )
        .await;
    assert_eq!(
        agent.vm("web").await.unwrap_err().code(),
        ErrorCode::VmNotFound
    );
    world.audit();
    assert!(world.survivors.lock().domains.is_empty());
}

#[tokio::test]
async fn what_the_state_forbids_is_refused_with_its_code() {
    let world = World::new();
    let agent = world.start().await;
    let (me, use_cases) = (Agent::me(), &agent.use_cases);
    agent.created("on", true).await;
    agent.created("off", false).await;
    let code =
        |result: ghost_domain::Result<ghost_application::OperationView>| result.unwrap_err().code();
    assert_eq!(
        code(use_cases.start_vm.execute(&me, power("on")).await),
        ErrorCode::VmRunning
    );
    assert_eq!(
        code(use_cases.delete_vm.execute(&me, delete("on", false)).await),
        ErrorCode::VmRunning
    );
    assert_eq!(
        code(
            use_cases
                .stop_vm
                .execute(&me, stop("off", false, None))
                .await
        ),
        ErrorCode::VmNotRunning
    );
    assert_eq!(
        code(use_cases.pause_vm.execute(&me, power("off")).await),
        ErrorCode::VmNotRunning
    );
    assert_eq!(
        code(use_cases.resume_vm.execute(&me, power("on")).await),
        ErrorCode::WrongState
    );
    assert_eq!(
        code(use_cases.start_vm.execute(&me, power("nobody")).await),
        ErrorCode::VmNotFound
    );
    let change = VmChange {
        vcpus: Some(2),
        ..VmChange::default()
    };
    let update = UpdateVmCommand {
        vm: "on".into(),
        change,
        ..UpdateVmCommand::default()
    };
    assert_eq!(
        code(use_cases.update_vm.execute(&me, update).await),
        ErrorCode::VmRunning
    );
    world.audit();
}

#[tokio::test]
async fn a_deaf_guest_is_cut_only_when_force_was_given() {
    let world = World::new();
    let agent = world.start().await;
    let (me, use_cases) = (Agent::me(), &agent.use_cases);
    agent.created("web", true).await;
    world.survivors.lock().guest = Guest::Deaf;
    let soon = Some(Duration::from_millis(50));
    let view = agent
        .finished(
            &use_cases
                .stop_vm
                .execute(&me, stop("web", false, soon))
                .await
                .unwrap(),
        )
        .await;
    assert_eq!(view.operation.status, OperationStatus::Failed);
    assert_eq!(
        view.operation.error.as_ref().unwrap().code(),
        ErrorCode::DeadlineExceeded
    );
    assert_eq!(agent.state("web").await, VmState::Running);
    let view = agent
        .finished(
            &use_cases
                .stop_vm
                .execute(&me, stop("web", true, soon))
                .await
                .unwrap(),
        )
        .await;
    assert_eq!(view.operation.status, OperationStatus::Succeeded);
    assert_eq!(agent.state("web").await, VmState::Stopped);
}

#[tokio::test]
async fn bad_requests_leave_nothing_behind() {
    let world = World::new();
    let agent = world.start().await;
    agent.created("taken", false).await;
    let cases: Vec<(&str, CreateVmCommand, ErrorCode)> = vec![
        (
            "illegal name",
            CreateVmCommand {
                name: Some("Web_1".into()),
                ..command("x", false)
            },
            ErrorCode::InvalidName,
        ),
        ("name taken", command("taken", false), ErrorCode::NameTaken),
        (
            "unknown image",
            CreateVmCommand {
                image: "nothing".into(),
                ..command("x", false)
            },
            ErrorCode::ImageNotFound,
        ),
        (
            "no vcpus",
            CreateVmCommand {
                vcpus: Some(0),
                ..command("x", false)
            },
            ErrorCode::InvalidSize,
        ),
        (
            "absurd memory",
            CreateVmCommand {
                memory_bytes: Some(u64::MAX),
                ..command("x", false)
            },
            ErrorCode::InvalidSize,
        ),
        (
            "no disk",
            CreateVmCommand {
                disk_bytes: Some(0),
                ..command("x", false)
            },
            ErrorCode::InvalidSize,
        ),
        (
            "disk below the image",
            CreateVmCommand {
                disk_bytes: Some(64 << 20),
                ..command("x", false)
            },
            ErrorCode::DiskTooSmall,
        ),
        (
            "user-data",
            CreateVmCommand {
                user_data: Some("hello".into()),
                ..command("x", false)
            },
            ErrorCode::InvalidUserData,
        ),
        (
            "too many vcpus",
            CreateVmCommand {
                vcpus: Some(9),
                ..command("x", false)
            },
            ErrorCode::InsufficientResources,
        ),
        (
            "too much memory",
            CreateVmCommand {
                memory_bytes: Some(31 << 30),
                ..command("x", true)
            },
            ErrorCode::InsufficientResources,
        ),
        (
            "too much disk",
            CreateVmCommand {
                disk_bytes: Some(2000 << 30),
                ..command("x", false)
            },
            ErrorCode::InsufficientResources,
        ),
        (
            "ssh key",
            CreateVmCommand {
                ssh_authorized_keys: vec!["x".into()],
                ..command("x", false)
            },
            ErrorCode::InvalidArgument,
        ),
    ];
    let commits = world.survivors.lock().commits;
    for (what, command, code) in cases {
        let error = agent
            .use_cases
            .create_vm
            .execute(&Agent::me(), command)
            .await
            .unwrap_err();
        assert_eq!(error.code(), code, "{what}: {error}");
    }
    assert_eq!(
        world.survivors.lock().commits,
        commits,
        "a refusal wrote to the store"
    );
    world.audit();
}

#[tokio::test]
async fn of_many_creates_of_one_name_exactly_one_wins() {
    let world = World::new();
    let agent = std::sync::Arc::new(world.start().await);
    let tries: Vec<_> = (0..50)
        .map(|_| {
            let agent = std::sync::Arc::clone(&agent);
            tokio::spawn(async move { agent.create("web", false).await })
        })
        .collect();
    let mut won = 0;
    for attempt in tries {
        match attempt.await.unwrap() {
            Ok(_) => won += 1,
            Err(error) => assert_eq!(error.code(), ErrorCode::NameTaken),
        }
    }
    assert_eq!(won, 1);
    agent.idle().await;
    world.audit();
}

#[tokio::test]
async fn admission_counts_what_runs_and_frees_what_stops() {
    let world = World::new();
    let agent = world.start().await;
    let (me, use_cases) = (Agent::me(), &agent.use_cases);
    let big = |name: &str, start| CreateVmCommand {
        memory_bytes: Some(16 << 30),
        ..command(name, start)
    };
    let first = use_cases
        .create_vm
        .execute(&me, big("first", true))
        .await
        .unwrap();
    agent.finished(&first).await;
    let second = use_cases
        .create_vm
        .execute(&me, big("second", false))
        .await
        .unwrap();
    agent.finished(&second).await;
    let error = use_cases
        .start_vm
        .execute(&me, power("second"))
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::InsufficientResources);
    assert!(
        error
            .cause()
            .unwrap()
            .contains("16 GiB of memory asked, 14 GiB of 30 GiB free"),
        "{error}"
    );
    agent
        .finished(
            &use_cases
                .stop_vm
                .execute(&me, stop("first", true, None))
                .await
                .unwrap(),
        )
        .await;
    agent
        .finished(
            &use_cases
                .start_vm
                .execute(&me, power("second"))
                .await
                .unwrap(),
        )
        .await;
    assert_eq!(world.power("second"), Some(ObservedPower::Running));
}

#[tokio::test]
async fn delete_protection_must_be_lifted_first() {
    let world = World::new();
    let agent = world.start().await;
    let (me, use_cases) = (Agent::me(), &agent.use_cases);
    let view = use_cases
        .create_vm
        .execute(
            &me,
            CreateVmCommand {
                delete_protection: true,
                ..command("web", false)
            },
        )
        .await
        .unwrap();
    agent.finished(&view).await;
    let error = use_cases
        .delete_vm
        .execute(&me, delete("web", true))
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::DeleteProtected);
    let change = VmChange {
        delete_protection: Some(false),
        ..VmChange::default()
    };
    let stale = UpdateVmCommand {
        vm: "web".into(),
        change: change.clone(),
        expected_generation: Some(7),
        request_id: None,
    };
    assert_eq!(
        use_cases
            .update_vm
            .execute(&me, stale)
            .await
            .unwrap_err()
            .code(),
        ErrorCode::GenerationMismatch
    );
    let update = UpdateVmCommand {
        vm: "web".into(),
        change,
        expected_generation: Some(1),
        request_id: None,
    };
    agent
        .finished(&use_cases.update_vm.execute(&me, update).await.unwrap())
        .await;
    assert_eq!(agent.vm("web").await.unwrap().vm.generation, 2);
    agent
        .finished(
            &use_cases
                .delete_vm
                .execute(&me, delete("web", false))
                .await
                .unwrap(),
        )
        .await;
    world.audit();
}

#[tokio::test]
async fn viewers_change_nothing() {
    let world = World::new();
    let agent = world.start().await;
    agent.created("web", true).await;
    let viewer = Principal {
        role: Role::Viewer,
        ..Principal::agent()
    };
    let use_cases = &agent.use_cases;
    let denied = [
        use_cases
            .create_vm
            .execute(&viewer, command("x", false))
            .await
            .err(),
        use_cases
            .start_vm
            .execute(&viewer, power("web"))
            .await
            .err(),
        use_cases
            .stop_vm
            .execute(&viewer, stop("web", true, None))
            .await
            .err(),
        use_cases
            .restart_vm
            .execute(&viewer, stop("web", true, None))
            .await
            .err(),
        use_cases
            .pause_vm
            .execute(&viewer, power("web"))
            .await
            .err(),
        use_cases
            .resume_vm
            .execute(&viewer, power("web"))
            .await
            .err(),
        use_cases
            .delete_vm
            .execute(&viewer, delete("web", true))
            .await
            .err(),
        use_cases.open_console.execute(&viewer, "web").await.err(),
        use_cases.open_log.execute(&viewer, "web", None).await.err(),
        use_cases
            .create_token
            .execute(&viewer, Role::Viewer, true)
            .await
            .err(),
        use_cases.list_keys.execute(&viewer).await.err(),
    ];
    for (index, error) in denied.into_iter().enumerate() {
        assert_eq!(
            error.expect("denied").code(),
            ErrorCode::PermissionDenied,
            "call {index}"
        );
    }
    assert!(use_cases.get_vm.execute(&viewer, "web").await.is_ok());
    assert_eq!(world.power("web"), Some(ObservedPower::Running));
}

#[tokio::test]
async fn names_are_made_up_and_prefixes_find() {
    let world = World::new();
    let agent = world.start().await;
    let view = agent
        .use_cases
        .create_vm
        .execute(
            &Agent::me(),
            CreateVmCommand {
                name: None,
                ..command("x", false)
            },
        )
        .await
        .unwrap();
    let name = view.operation.subject.clone();
    agent.finished(&view).await;
    let vm = agent.vm(&name).await.unwrap();
    let id = vm.vm.id.to_string();
    assert_eq!(agent.vm(&id).await.unwrap().vm.id, vm.vm.id);
    assert_eq!(agent.vm(&id[..8]).await.unwrap().vm.id, vm.vm.id);
    assert_eq!(
        agent.vm("").await.unwrap_err().code(),
        ErrorCode::VmNotFound
    );
}

#[tokio::test]
async fn a_dry_run_checks_and_changes_nothing() {
    let world = World::new();
    let agent = world.start().await;
    let dry = CreateVmCommand {
        dry_run: true,
        ..command("web", true)
    };
    agent
        .use_cases
        .create_vm
        .execute(&Agent::me(), dry)
        .await
        .unwrap();
    let too_big = CreateVmCommand {
        dry_run: true,
        memory_bytes: Some(64 << 30),
        ..command("web", true)
    };
    let error = agent
        .use_cases
        .create_vm
        .execute(&Agent::me(), too_big)
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::InsufficientResources);
    assert_eq!(world.survivors.lock().commits, 0);
    world.audit();
}

#[tokio::test]
async fn a_full_disk_fails_the_create_and_lets_delete_work() {
    let world = World::new();
    let agent = world.start().await;
    agent.created("old", false).await;
    world.survivors.lock().disk_full = true;
    let view = agent.created("new", false).await;
    assert_eq!(
        view.operation.error.as_ref().unwrap().code(),
        ErrorCode::DiskFull
    );
    let view = agent
        .use_cases
        .delete_vm
        .execute(&Agent::me(), delete("old", false))
        .await
        .unwrap();
    assert_eq!(
        agent.finished(&view).await.operation.status,
        OperationStatus::Succeeded
    );
    world.audit();
}

#[tokio::test]
async fn capacity_is_computed_from_records() {
    let world = World::new();
    let agent = world.start().await;
    agent.created("web", true).await;
    let status = agent
        .use_cases
        .get_status
        .execute(&Agent::me())
        .await
        .unwrap();
    assert_eq!(status.capacity.committed.memory, ByteSize::from_mib(256));
    assert_eq!(status.capacity.allocatable.cpus, 28);
    assert_eq!(status.vms.get("running"), Some(&1));
}
