//! Operations: idempotency, cancel, deadlines, draining, a store that takes no writes; images.

use std::sync::atomic::Ordering;
use std::time::Duration;

use ghost_application::image::{DeleteImageCommand, ImportImageCommand, PullImageCommand};
use ghost_application::vm::{CreateVmCommand, DeleteVmCommand, PowerCommand, StopCommand};
use ghost_domain::vm::{ObservedPower, VmState};
use ghost_domain::{ErrorCode, OperationStatus, RequestId};

use crate::world::{Agent, Guest, World, command};

fn key(text: &str) -> Option<RequestId> {
    Some(RequestId::new(text).unwrap())
}

#[tokio::test]
async fn one_key_is_one_operation() {
    let world = World::new();
    let agent = world.start().await;
    let request = CreateVmCommand {
        request_id: key("k1"),
        ..command("web", false)
    };
    let first = agent
        .use_cases
        .create_vm
        .execute(&Agent::me(), request.clone())
        .await
        .unwrap();
    let again = agent
        .use_cases
        .create_vm
        .execute(&Agent::me(), request.clone())
        .await
        .unwrap();
    assert_eq!(first.operation.id, again.operation.id);
    agent.finished(&first).await;
    let other = CreateVmCommand {
        name: Some("other".into()),
        ..request.clone()
    };
    let error = agent
        .use_cases
        .create_vm
        .execute(&Agent::me(), other)
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::RequestIdReused);

    // A delete that was carried out is found again although the VM is gone.
    let delete = DeleteVmCommand {
        vm: "web".into(),
        request_id: key("k2"),
        ..DeleteVmCommand::default()
    };
    let first = agent
        .use_cases
        .delete_vm
        .execute(&Agent::me(), delete.clone())
        .await
        .unwrap();
    agent.finished(&first).await;
    let again = agent
        .use_cases
        .delete_vm
        .execute(&Agent::me(), delete)
        .await
        .unwrap();
    assert_eq!(first.operation.id, again.operation.id);

    // The key survives a restart of the agent.
    drop(agent);
    let agent = world.start().await;
    let again = agent
        .use_cases
        .create_vm
        .execute(&Agent::me(), request)
        .await
        .unwrap();
    assert_eq!(again.operation.status, OperationStatus::Succeeded);
    assert!(
        world.survivors.lock().domains.is_empty(),
        "the retry was carried out"
    );
}

#[tokio::test]
async fn the_second_operation_is_refused_naming_the_first() {
    let world = World::new();
    let agent = world.start().await;
    agent.created("web", true).await;
    world.survivors.lock().guest = Guest::Deaf;
    let stop = StopCommand {
        vm: "web".into(),
        ..StopCommand::default()
    };
    let first = agent
        .use_cases
        .stop_vm
        .execute(&Agent::me(), stop)
        .await
        .unwrap();
    assert_eq!(agent.state("web").await, VmState::Stopping);
    let error = agent
        .use_cases
        .pause_vm
        .execute(
            &Agent::me(),
            PowerCommand {
                vm: "web".into(),
                request_id: None,
            },
        )
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::VmBusy);
    assert_eq!(error.operation(), Some(first.operation.id));
    let id = first.operation.id.to_string();
    agent
        .use_cases
        .cancel_operation
        .execute(&Agent::me(), &id)
        .await
        .unwrap();
    let view = agent.finished(&first).await;
    assert_eq!(view.operation.status, OperationStatus::Cancelled);
    assert_eq!(agent.state("web").await, VmState::Running);
    let error = agent
        .use_cases
        .cancel_operation
        .execute(&Agent::me(), &id)
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::OperationFinished);
}

#[tokio::test]
async fn create_pulls_what_the_catalogue_has_and_cancel_undoes_it() {
    let world = World::new();
    let agent = world.start().await;
    let debian = |name: &str| CreateVmCommand {
        image: "debian".into(),
        disk_bytes: Some(2 << 30),
        ..command(name, false)
    };
    world.hold_pull.store(true, Ordering::SeqCst);
    let view = agent
        .use_cases
        .create_vm
        .execute(&Agent::me(), debian("one"))
        .await
        .unwrap();
    agent
        .until("the download", |agent| {
            Box::pin(async { agent.world.survivors.lock().pulls == 1 })
        })
        .await;
    assert_eq!(agent.state("one").await, VmState::Creating);
    agent
        .use_cases
        .cancel_operation
        .execute(&Agent::me(), &view.operation.id.to_string())
        .await
        .unwrap();
    assert_eq!(
        agent.finished(&view).await.operation.status,
        OperationStatus::Cancelled
    );
    assert_eq!(
        agent.vm("one").await.unwrap_err().code(),
        ErrorCode::VmNotFound
    );
    world.hold_pull.store(false, Ordering::SeqCst);
    let view = agent
        .use_cases
        .create_vm
        .execute(&Agent::me(), debian("two"))
        .await
        .unwrap();
    assert_eq!(
        agent.finished(&view).await.operation.status,
        OperationStatus::Succeeded
    );
    assert!(
        agent
            .vm("two")
            .await
            .unwrap()
            .vm
            .spec
            .image
            .content
            .is_some()
    );
    let broken = CreateVmCommand {
        image: "broken".into(),
        ..command("three", false)
    };
    let view = agent
        .use_cases
        .create_vm
        .execute(&Agent::me(), broken)
        .await
        .unwrap();
    assert_eq!(
        agent
            .finished(&view)
            .await
            .operation
            .error
            .as_ref()
            .unwrap()
            .code(),
        ErrorCode::DownloadFailed
    );
    world.audit();
}

#[tokio::test]
async fn images_are_protected_by_use_and_evicted_by_age() {
    let world = World::new();
    let agent = world.start().await;
    let (me, use_cases) = (Agent::me(), &agent.use_cases);
    agent.created("web", false).await;
    let delete = |name: &str| DeleteImageCommand {
        name: name.into(),
        request_id: None,
    };
    let error = use_cases
        .delete_image
        .execute(&me, delete("tiny"))
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::ImageInUse);
    assert!(error.cause().unwrap().contains("web"));
    let pull = |name: &str| PullImageCommand {
        name: name.into(),
        url: None,
        checksum: None,
        request_id: None,
    };
    agent
        .finished(
            &use_cases
                .pull_image
                .execute(&me, pull("debian"))
                .await
                .unwrap(),
        )
        .await;
    world.clock.forward(Duration::from_secs(5));
    // 20 + 60 + 60 MiB are more than the 100 of the cap: the older unused one goes, the used one stays.
    agent
        .finished(
            &use_cases
                .pull_image
                .execute(&me, pull("ubuntu"))
                .await
                .unwrap(),
        )
        .await;
    let names: Vec<String> = use_cases
        .list_images
        .execute(&me)
        .await
        .unwrap()
        .into_iter()
        .map(|view| view.image.name.to_string())
        .collect();
    assert_eq!(names, ["tiny", "ubuntu"]);
    assert_eq!(world.survivors.lock().content.len(), 2);
    agent
        .finished(
            &use_cases
                .delete_image
                .execute(&me, delete("ubuntu"))
                .await
                .unwrap(),
        )
        .await;
    assert_eq!(world.survivors.lock().content.len(), 1);
}

#[tokio::test]
async fn imports_are_checked_and_leave_no_staging() {
    let world = World::new();
    let agent = world.start().await;
    let (me, use_cases) = (Agent::me(), &agent.use_cases);
    let import = |name: &str| ImportImageCommand {
        name: name.into(),
        file_name: "f.raw".into(),
        request_id: None,
    };
    let mut upload = use_cases
        .import_image
        .execute(&me, import("mine"))
        .await
        .unwrap();
    upload.append(b"some bytes").await.unwrap();
    let view = agent.finished(&upload.finish().await.unwrap()).await;
    assert_eq!(view.operation.status, OperationStatus::Succeeded);
    assert_eq!(
        use_cases
            .import_image
            .execute(&me, import("mine"))
            .await
            .err()
            .unwrap()
            .code(),
        ErrorCode::ImageExists
    );
    let mut upload = use_cases
        .import_image
        .execute(&me, import("bad"))
        .await
        .unwrap();
    upload.append(b"bad bytes").await.unwrap();
    let view = agent.finished(&upload.finish().await.unwrap()).await;
    assert_eq!(
        view.operation.error.as_ref().unwrap().code(),
        ErrorCode::UnsafeImage
    );
    let upload = use_cases
        .import_image
        .execute(&me, import("abandoned"))
        .await
        .unwrap();
    drop(upload);
    agent
        .until("the abandoned upload to go", |agent| {
            Box::pin(async { agent.world.survivors.lock().staged.is_empty() })
        })
        .await;
    world.audit();
}

#[tokio::test]
async fn draining_refuses_new_work_and_leaves_long_steps_to_the_next_start() {
    let world = World::new();
    let agent = world.start().await;
    agent.created("web", true).await;
    world.survivors.lock().guest = Guest::Deaf;
    let stop = StopCommand {
        vm: "web".into(),
        ..StopCommand::default()
    };
    let stopping = agent
        .use_cases
        .stop_vm
        .execute(&Agent::me(), stop)
        .await
        .unwrap();
    agent
        .until("the stop to begin", |agent| {
            let id = stopping.operation.id.to_string();
            Box::pin(async move {
                let view = agent
                    .use_cases
                    .get_operation
                    .execute(&Agent::me(), &id)
                    .await
                    .unwrap();
                !view.operation.journal.is_empty()
            })
        })
        .await;
    agent
        .application
        .drain(Duration::from_secs(5))
        .await
        .unwrap();
    let error = agent.create("new", false).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::ShuttingDown);
    assert!(error.retry_delay().is_some());
    assert_eq!(
        world.power("web"),
        Some(ObservedPower::Running),
        "draining touched a VM"
    );
    drop(agent);
    world.survivors.lock().guest = Guest::Obedient;
    let agent = world.start().await;
    agent.idle().await;
    assert_eq!(agent.state("web").await, VmState::Stopped);
    world.audit();
}

#[tokio::test]
async fn a_store_that_takes_no_writes_acknowledges_nothing_and_heals() {
    let world = World::new();
    let agent = world.start().await;
    world.survivors.lock().store_full = true;
    let error = agent.create("web", false).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::StoreUnavailable);
    assert_eq!(
        agent.vm("web").await.unwrap_err().code(),
        ErrorCode::VmNotFound
    );
    world.survivors.lock().store_full = false;
    assert_eq!(
        agent.created("web", false).await.operation.status,
        OperationStatus::Succeeded
    );
    world.audit();
}
