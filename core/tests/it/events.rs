//! What happens in the fleet, as it is told over HTTP and gRPC.

use std::collections::BTreeSet;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, StatusCode};
use ghost_core::domain::{HostLife, Record, RecordKey};
use ghost_domain::fleet::VmSummary;
use ghost_domain::vm::{DesiredPower, VmState};
use ghost_domain::{Demand, HostId, Role, VmId};
use ghost_proto::agent::v1::{Event, WatchEventsRequest};
use http_body::Body as _;
use serde_json::{Value, json};

use crate::http::{build, call, send};
use crate::world::{World, inventory};

const WATCH: &str = "/ghost.agent.v1.EventService/Watch";

/// The events of an answer that has ended, each with its id.
fn events_of(text: &str) -> Vec<(String, Value)> {
    text.split("\n\n")
        .filter_map(|block| {
            let line = |name: &str| {
                block
                    .lines()
                    .find_map(|line| line.strip_prefix(name))
                    .map(str::trim)
            };
            let data = serde_json::from_str(line("data:")?).unwrap();
            Some((line("id:").unwrap().to_owned(), data))
        })
        .collect()
}

async fn told(world: &World, key: &str, query: &str, last: Option<&str>) -> Vec<(String, Value)> {
    let path = format!("/v1/events?replay=true&follow=false{query}");
    let mut request = build("GET", &path, key, None);
    if let Some(last) = last {
        let headers = request.headers_mut();
        headers.insert("last-event-id", last.parse().unwrap());
    }
    let response = send(world, request).await;
    assert_eq!(response.status(), StatusCode::OK);
    let body = axum::body::to_bytes(response.into_body(), 1 << 24)
        .await
        .unwrap();
    events_of(std::str::from_utf8(&body).unwrap())
}

fn kinds(events: &[(String, Value)]) -> Vec<String> {
    let word = |event: &Value, key: &str| event[key].as_str().unwrap().to_owned();
    events
        .iter()
        .map(|(_, event)| format!("{} {}", word(event, "kind"), word(event, "subject")))
        .collect()
}

/// Waits until an event is told; says all that were.
async fn until(world: &World, key: &str, wanted: &str) -> Vec<(String, Value)> {
    let found = async {
        loop {
            let events = told(world, key, "", None).await;
            if kinds(&events).iter().any(|kind| kind == wanted) {
                return events;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    match tokio::time::timeout(Duration::from_secs(20), found).await {
        Ok(events) => events,
        Err(_) => panic!("{wanted}: {:?}", kinds(&told(world, key, "", None).await)),
    }
}

fn vm(name: &str, state: VmState) -> VmSummary {
    VmSummary {
        id: VmId::random(),
        name: name.into(),
        state,
        state_reason: String::new(),
        desired: DesiredPower::Running,
        demand: Demand::default(),
        image: "tiny".into(),
        addresses: Vec::new(),
        generation: 1,
        created_at: Default::default(),
        tags: Default::default(),
        owner: None,
    }
}

async fn tells(world: &World, host: HostId, vms: &[VmSummary]) {
    let mut told = inventory();
    told.at = world.now();
    told.vms = vms.iter().map(|vm| (vm.id, vm.clone())).collect();
    let record = Record::Inventory(Box::new(told));
    world.put(RecordKey::Inventory(host), record).await;
}

#[tokio::test]
async fn hosts_commands_and_vms_are_told_to_their_tenant() {
    let world = World::start().await;
    let acme = world.new_key(Some("acme"), Role::Admin).await;
    until(&world, &acme, "host_online pc").await;
    // Hosts.
    let second = world.add_host("acme", "second").await;
    until(&world, &acme, "host_joined second").await;
    world
        .change_host(second, |host| host.cordoned = Some("disk".into()))
        .await;
    let events = until(&world, &acme, "host_cordoned second").await;
    let (_, cordoned) = events.last().unwrap();
    assert_eq!(cordoned["severity"], "warning");
    assert_eq!(cordoned["host"], "second");
    assert_eq!(cordoned["host_id"], second.to_string());
    assert_eq!(cordoned["tenant"], "acme");
    assert!(cordoned["message"].as_str().unwrap().contains("disk"));
    world.change_host(second, |host| host.cordoned = None).await;
    until(&world, &acme, "host_uncordoned second").await;
    world
        .change_host(second, |host| {
            host.life = HostLife::Locked {
                since: Default::default(),
                reason: "used twice".into(),
            };
        })
        .await;
    until(&world, &acme, "host_locked second").await;
    let path = "/v1/hosts/second?force=true";
    let (status, _) = call(&world, "DELETE", path, &acme, None).await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    until(&world, &acme, "host_removed second").await;
    // VMs, as their host tells them.
    let mut web = vm("web", VmState::Starting);
    tells(&world, world.host, &[web.clone()]).await;
    until(&world, &acme, "vm_added web").await;
    web.state = VmState::Running;
    tells(&world, world.host, &[web.clone()]).await;
    let events = until(&world, &acme, "vm_state web").await;
    let (_, state) = events.last().unwrap();
    assert_eq!(state["message"], "starting -> running");
    assert_eq!(state["vm"], web.id.to_string());
    assert_eq!(state["host"], "pc");
    tells(&world, world.host, &[]).await;
    until(&world, &acme, "vm_removed web").await;
    // Commands.
    let body = json!({"host": "pc", "action": {"start_vm": {"vm": "web"}}});
    let (status, queued) = call(&world, "POST", "/v1/commands", &acme, Some(body)).await;
    assert_eq!(status, StatusCode::ACCEPTED);
    until(&world, &acme, "command_queued web").await;
    let path = format!("/v1/commands/{}", queued["id"].as_str().unwrap());
    call(&world, "DELETE", &path, &acme, None).await;
    let events = until(&world, &acme, "command_cancelled web").await;
    // Numbered without a gap, whatever happens elsewhere.
    let theirs = world.add_host("other", "theirs").await;
    let other = world.new_key(Some("other"), Role::Viewer).await;
    let seen = until(&world, &other, "host_online theirs").await;
    let numbers = |events: &[(String, Value)]| -> Vec<u64> {
        events
            .iter()
            .map(|(_, event)| event["sequence"].as_u64().unwrap())
            .collect()
    };
    for events in [&seen, &events] {
        let expected: Vec<u64> = (1..=events.len() as u64).collect();
        assert_eq!(numbers(events), expected);
    }
    assert!(seen.iter().all(|(_, event)| event["tenant"] == "other"));
    assert!(events.iter().all(|(_, event)| event["tenant"] == "acme"));
    // Whoever is bound to no tenant sees all; a key for one host that host alone.
    let root = world.new_key(None, Role::Viewer).await;
    let all = told(&world, &root, "", None).await;
    assert_eq!(all.len(), seen.len() + events.len());
    let (mut scoped, secret) = world.key(Some("other"), Role::Admin);
    scoped.hosts = Some(BTreeSet::from([HostId::random()]));
    world.add_key(scoped.clone()).await;
    assert!(told(&world, secret.expose(), "", None).await.is_empty());
    scoped.hosts = Some(BTreeSet::from([theirs]));
    world.add_key(scoped).await;
    assert_eq!(told(&world, secret.expose(), "", None).await, seen);
    // One VM.
    let of_web = told(&world, &acme, "&vm=web", None).await;
    assert_eq!(
        kinds(&of_web),
        [
            "vm_added web",
            "vm_state web",
            "vm_removed web",
            "command_queued web",
            "command_cancelled web"
        ]
    );
}

#[tokio::test]
async fn a_reader_goes_on_where_it_was() {
    let world = World::start().await;
    let key = world.new_key(Some("acme"), Role::Viewer).await;
    let events = until(&world, &key, "host_online pc").await;
    let (last, _) = events.last().unwrap();
    assert!(told(&world, &key, "", Some(last)).await.is_empty());
    world.add_host("acme", "second").await;
    until(&world, &key, "host_online second").await;
    let more = told(&world, &key, "", Some(last)).await;
    assert!(kinds(&more).contains(&"host_joined second".to_owned()));
    assert!(more.iter().all(|(_, event)| event["host"] == "second"));
    assert!(more.iter().all(|(_, event)| event["missed"] == 0));
    // The place in another run means nothing.
    let all = told(&world, &key, "", Some("elsewhere-2")).await;
    assert_eq!(all.len(), events.len() + more.len());
}

#[tokio::test]
async fn events_come_as_they_happen_until_their_reader_is_revoked() {
    let world = World::start().await;
    let (mut key, secret) = world.key(Some("acme"), Role::Viewer);
    world.add_key(key.clone()).await;
    until(&world, secret.expose(), "host_online pc").await;
    let request: Request<Body> = build("GET", "/v1/events", secret.expose(), None);
    let mut body = send(&world, request).await.into_body();
    world
        .change_host(world.host, |host| host.cordoned = Some("now".into()))
        .await;
    let mut next = async || {
        let frame = std::future::poll_fn(|cx| std::pin::Pin::new(&mut body).poll_frame(cx));
        let waited = tokio::time::timeout(Duration::from_secs(20), frame).await;
        waited.expect("nothing came")
    };
    let data = next().await.unwrap().unwrap().into_data().unwrap();
    let text = String::from_utf8(data.to_vec()).unwrap();
    assert!(text.contains("event: host_cordoned"), "{text}");
    key.revoked_at = Some(world.now());
    world.add_key(key).await;
    assert!(next().await.is_none());
}

#[tokio::test]
async fn with_a_host_named_events_are_that_hosts_own() {
    let world = World::start().await;
    let key = world.new_key(Some("acme"), Role::Viewer).await;
    until(&world, &key, "host_online pc").await;
    let replay = WatchEventsRequest {
        replay: true,
        ..WatchEventsRequest::default()
    };
    let ours = world.by_key(&key, WATCH, None, &replay).await;
    assert_eq!(ours.reason(), "ok");
    let length = u32::from_be_bytes(ours.message[1..5].try_into().unwrap()) as usize;
    let first: Event = prost::Message::decode(&ours.message[5..5 + length]).unwrap();
    assert_eq!((first.sequence, first.host.as_str()), (1, "pc"));
    // The host of these tests has no such service, and Core does not answer in its place.
    let theirs = world.by_key(&key, WATCH, Some("pc"), &replay).await;
    assert_eq!(theirs.status.code(), tonic::Code::Unimplemented);
}
