//! Files of the image cache: none stays that nothing names, and none goes that something needs.

use std::sync::atomic::Ordering;
use std::time::Duration;

use ghost_application::OperationView;
use ghost_application::image::{ImportImageCommand, PullImageCommand};
use ghost_domain::ports::CachedContent;
use ghost_domain::{ImageDigest, OperationStatus, VmId};

use crate::world::{Agent, World, command};

/// A file of the cache that no record knows.
fn unknown(world: &World) -> ImageDigest {
    let digest = ImageDigest::from_bytes([99; 32]);
    let mut survivors = world.survivors.lock();
    let some = survivors.content.values().next().unwrap().clone();
    survivors
        .content
        .insert(digest, CachedContent { digest, ..some });
    digest
}

fn has(world: &World, digest: ImageDigest) -> bool {
    world.survivors.lock().content.contains_key(&digest)
}

async fn pull(agent: &Agent) -> OperationView {
    let command = PullImageCommand {
        name: "debian".into(),
        url: None,
        checksum: None,
        request_id: None,
    };
    agent
        .use_cases
        .pull_image
        .execute(&Agent::me(), command)
        .await
        .unwrap()
}

async fn import(agent: &Agent) -> OperationView {
    let command = ImportImageCommand {
        name: "mine".into(),
        file_name: "mine.raw".into(),
        request_id: None,
    };
    let mut upload = agent
        .use_cases
        .import_image
        .execute(&Agent::me(), command)
        .await
        .unwrap();
    upload.append(b"a disk").await.unwrap();
    upload.finish().await.unwrap()
}

/// Creates a VM whose image has to be pulled first.
async fn create(agent: &Agent) -> OperationView {
    let mut command = command("web", false);
    command.image = "debian".into();
    command.disk_bytes = Some(2 << 30);
    agent
        .use_cases
        .create_vm
        .execute(&Agent::me(), command)
        .await
        .unwrap()
}

async fn published(agent: &Agent) {
    agent
        .until("a second file in the cache", |agent| {
            Box::pin(async { agent.world.survivors.lock().content.len() == 2 })
        })
        .await;
}

#[tokio::test]
async fn what_is_cancelled_between_publishing_and_naming_leaves_no_file() {
    for kind in 0..3 {
        let world = World::new();
        let agent = world.start().await;
        world.hold_published.store(true, Ordering::SeqCst);
        let view = match kind {
            0 => pull(&agent).await,
            1 => import(&agent).await,
            _ => create(&agent).await,
        };
        published(&agent).await;
        agent
            .use_cases
            .cancel_operation
            .execute(&Agent::me(), &view.operation.id.to_string())
            .await
            .unwrap();
        let ended = agent.finished(&view).await;
        assert_eq!(ended.operation.status, OperationStatus::Cancelled, "{kind}");
        assert_eq!(world.survivors.lock().content.len(), 1, "{kind}");
        world.audit();
    }
}

#[tokio::test]
async fn a_pull_that_is_cancelled_leaves_the_file_of_one_that_goes_on() {
    let world = World::new();
    let agent = world.start().await;
    world.hold_published.store(true, Ordering::SeqCst);
    let (pulled, created) = (pull(&agent).await, create(&agent).await);
    agent
        .until("both to be at it", |agent| {
            Box::pin(async { agent.world.survivors.lock().pulls == 2 })
        })
        .await;
    agent
        .use_cases
        .cancel_operation
        .execute(&Agent::me(), &pulled.operation.id.to_string())
        .await
        .unwrap();
    let ended = agent.finished(&pulled).await;
    assert_eq!(ended.operation.status, OperationStatus::Cancelled);
    world.hold_published.store(false, Ordering::SeqCst);
    let ended = agent.finished(&created).await;
    assert_eq!(ended.operation.status, OperationStatus::Succeeded);
    assert_eq!(world.survivors.lock().content.len(), 2);
    world.audit();
}

#[tokio::test]
async fn a_pull_that_was_interrupted_after_publishing_finds_its_file_at_the_next_start() {
    let world = World::new();
    let agent = world.start().await;
    world.hold_published.store(true, Ordering::SeqCst);
    let view = pull(&agent).await;
    published(&agent).await;
    agent
        .application
        .drain(Duration::from_millis(10))
        .await
        .unwrap();
    drop(agent);
    let agent = world.start().await;
    agent
        .until("the pull to go on", |agent| {
            Box::pin(async { agent.world.survivors.lock().pulls == 2 })
        })
        .await;
    assert_eq!(world.survivors.lock().content.len(), 2);
    world.hold_published.store(false, Ordering::SeqCst);
    let ended = agent.finished(&view).await;
    assert_eq!(ended.operation.status, OperationStatus::Succeeded);
    world.audit();
}

#[tokio::test]
async fn a_file_that_nothing_names_goes_at_the_next_start() {
    let world = World::new();
    let agent = world.start().await;
    agent.created("web", false).await;
    drop(agent);
    let digest = unknown(&world);
    let named = {
        let mut survivors = world.survivors.lock();
        let image = survivors.store.images.pop().unwrap();
        // The name of the other one went too, but a VM stands on it.
        image.digest
    };
    let agent = world.start().await;
    agent
        .until("the sweep", |agent| {
            Box::pin(async move { !has(&agent.world, digest) })
        })
        .await;
    assert!(has(&world, named), "a VM stands on it");
    world.audit();
}

#[tokio::test]
async fn a_folder_without_a_record_keeps_every_file() {
    let world = World::new();
    let digest = unknown(&world);
    let stray = VmId::random();
    world.survivors.lock().folders.insert(stray);
    let agent = world.start().await;
    // An undo sweeps before its operation ends.
    world.hold_pull.store(true, Ordering::SeqCst);
    let view = pull(&agent).await;
    agent
        .until("the pull", |agent| {
            Box::pin(async { agent.world.survivors.lock().pulls == 1 })
        })
        .await;
    agent
        .use_cases
        .cancel_operation
        .execute(&Agent::me(), &view.operation.id.to_string())
        .await
        .unwrap();
    agent.finished(&view).await;
    assert!(has(&world, digest), "the folder's disk may stand on it");
    world.survivors.lock().folders.remove(&stray);
    drop(agent);
    let agent = world.start().await;
    agent
        .until("the sweep", |agent| {
            Box::pin(async move { !has(&agent.world, digest) })
        })
        .await;
}
