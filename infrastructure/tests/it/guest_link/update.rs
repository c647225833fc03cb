//! The host's side of an update: what becomes of it is told, and the link lives on with whoever
//! answers.

use std::time::Duration;

use ghost_domain::ports::GuestLinks;
use ghost_domain::{ErrorCode, Result, VmId};
use ghost_infrastructure::guest_link::{GuestLinkOptions, LinkLimits, VirtioGuestLinks};
use ghost_proto::guest::v1::agent_message::Payload;
use ghost_proto::guest::v1::{Done, Error as GuestError, UpdateRequest};
use sha2::{Digest, Sha256};
use tokio::task::JoinHandle;

use super::fake::{Channel, Guest};
use super::*;
use crate::vm_storage::inject;

/// Less than a window, so that nobody has to grant anything.
const SIZE: usize = 100_000;

struct Host {
    links: Arc<VirtioGuestLinks>,
    /// SHA-256 of the program that it gives.
    sum: [u8; 32],
    size: u64,
    _folder: tempfile::TempDir,
}

fn host(change: impl FnOnce(&mut LinkLimits)) -> Host {
    host_with(SIZE, change)
}

fn host_with(size: usize, change: impl FnOnce(&mut LinkLimits)) -> Host {
    let folder = tempfile::tempdir().unwrap();
    let (path, bytes) = inject::program(folder.path(), size);
    let mut options = GuestLinkOptions {
        program: GuestProgram::at(path),
        ..options()
    };
    change(&mut options.limits);
    Host {
        links: Arc::new(VirtioGuestLinks::new(options)),
        sum: Sha256::digest(&bytes).into(),
        size: size as u64,
        _folder: folder,
    }
}

/// Has a guest updated; the update's request has come to it.
async fn begun(host: &Host) -> (VmId, Channel, Guest, Vec<u8>, JoinHandle<Result<()>>) {
    let (vm, channel, mut guest) = connected(&host.links).await;
    let links = Arc::clone(&host.links);
    let updating = tokio::spawn(async move { links.update(vm).await });
    let (id, request) = loop {
        let message = guest.receive().await;
        if let Some(Payload::Update(request)) = message.payload {
            break (message.message_id, request);
        }
    };
    let UpdateRequest {
        size_bytes, sha256, ..
    } = request;
    assert_eq!((size_bytes, &sha256[..]), (host.size, &host.sum[..]));
    (vm, channel, guest, id, updating)
}

/// What has come of the program, to its end.
async fn received(guest: &mut Guest, id: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    loop {
        let message = guest.receive().await;
        if let Some(Payload::StreamData(data)) = message.payload
            && message.message_id == id
        {
            bytes.extend_from_slice(&data.data);
            if data.end {
                return bytes;
            }
        }
    }
}

/// Another process of the agent opens the same port, with the program `sum`: it announces itself and
/// is greeted anew.
async fn comes_back(guest: &mut Guest, sum: &[u8], version: &str) {
    guest.instance = b"another".to_vec();
    guest.program_sha256 = sum.to_vec();
    guest.version = version.to_owned();
    guest.session = Vec::new();
    let ready = guest.ready();
    guest.send(Vec::new(), Payload::AgentReady(ready)).await;
    guest.greet().await;
}

fn version(host: &Host, vm: VmId) -> String {
    let hello = host.links.status(vm).hello.unwrap_or_default();
    hello.agent_version
}

#[tokio::test]
async fn the_new_program_arrives_whole_and_is_waited_for() {
    let host = host(|_| {});
    let (vm, _channel, mut guest, id, updating) = begun(&host).await;
    let bytes = received(&mut guest, &id).await;
    assert_eq!(Sha256::digest(&bytes)[..], host.sum);
    guest.send(id, Payload::Done(Done {})).await;
    assert!(!updating.is_finished(), "nobody has said hello yet");
    comes_back(&mut guest, &host.sum, "9.9.9").await;
    within(updating).await.unwrap().unwrap();
    assert_eq!(version(&host, vm), "9.9.9");
    // A guest that has it is left alone.
    within(host.links.update(vm)).await.unwrap();
}

#[tokio::test]
async fn a_program_that_arrived_damaged_is_refused_and_the_old_one_answers_on() {
    let host = host(|_| {});
    let (vm, _channel, mut guest, id, updating) = begun(&host).await;
    received(&mut guest, &id).await;
    let mismatch = GuestError {
        code: "checksum_mismatch".into(),
        message: "what has come is not the announced program".into(),
    };
    guest.send(id, Payload::Error(mismatch)).await;
    let error = within(updating).await.unwrap().unwrap_err();
    assert_eq!(error.code(), ErrorCode::ChecksumMismatch, "{error}");
    tokio::spawn(guest.serve());
    within(host.links.ping(vm)).await.unwrap();
    assert_eq!(version(&host, vm), "0.1.0");
}

#[tokio::test]
async fn a_link_that_is_lost_in_mid_transfer_ends_the_update_at_once() {
    // Longer than a test waits: nobody must wait for a hello that cannot come.
    // More than a window: the host stands in the middle of it.
    let host = host_with(1_000_000, |limits| {
        limits.update = Duration::from_secs(3600)
    });
    let (vm, channel, guest, _, updating) = begun(&host).await;
    drop(guest);
    let error = within(updating).await.unwrap().unwrap_err();
    assert_eq!(error.code(), ErrorCode::GuestUnreachable, "{error}");
    let mut events = host.links.subscribe();
    let again = channel.greeted().await;
    wait_connected(&mut *events, vm).await;
    tokio::spawn(again.serve());
    within(host.links.ping(vm)).await.unwrap();
    assert_eq!(version(&host, vm), "0.1.0");
}

#[tokio::test]
async fn last_words_that_are_lost_do_not_fail_an_update_that_took() {
    let host = host(|_| {});
    let (vm, channel, mut guest, id, updating) = begun(&host).await;
    received(&mut guest, &id).await;
    // The new program has opened the port before the old one's `Done` was through.
    drop(guest);
    let mut guest = channel.accept().await;
    guest.instance = b"another".to_vec();
    guest.program_sha256 = host.sum.to_vec();
    guest.greet().await;
    within(updating).await.unwrap().unwrap();
    assert!(host.links.status(vm).hello.is_some());
}

#[tokio::test]
async fn an_old_program_that_came_back_is_told() {
    let host = host(|_| {});
    let (vm, _channel, mut guest, id, updating) = begun(&host).await;
    received(&mut guest, &id).await;
    guest.send(id, Payload::Done(Done {})).await;
    comes_back(&mut guest, &[7; 32], "0.1.0").await;
    let error = within(updating).await.unwrap().unwrap_err();
    assert_eq!(error.code(), ErrorCode::GuestFailed, "{error}");
    tokio::spawn(guest.serve());
    within(host.links.ping(vm)).await.unwrap();
    assert_eq!(version(&host, vm), "0.1.0");
}

#[tokio::test]
async fn a_new_program_that_never_says_hello_is_not_waited_for_for_ever() {
    let host = host(|limits| limits.update = Duration::from_millis(50));
    let (vm, channel, mut guest, id, updating) = begun(&host).await;
    received(&mut guest, &id).await;
    guest.send(id, Payload::Done(Done {})).await;
    let error = within(updating).await.unwrap().unwrap_err();
    assert_eq!(error.code(), ErrorCode::DeadlineExceeded, "{error}");
    // The guest goes back by itself, and is as good as before.
    let mut events = host.links.subscribe();
    drop(guest);
    let again = channel.greeted().await;
    wait_connected(&mut *events, vm).await;
    tokio::spawn(again.serve());
    within(host.links.ping(vm)).await.unwrap();
}
