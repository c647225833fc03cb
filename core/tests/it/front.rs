//! The door: what is placed, bounded, written down, ended.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use ghost_core::application::audit::{FleetAudit, FleetAuditQuery};
use ghost_core::domain::{PeerIdentity, Quota, Record, RecordKey};
use ghost_core::presentation::grpc::{FrontOptions, Limits};
use ghost_domain::Role;
use ghost_domain::fleet::CorePermissions;
use ghost_proto::agent::v1 as agent;
use ghost_proto::core::v1::*;
use http_body::Body as _;
use tonic::Code;
use tonic_types::StatusExt;

use crate::world::{Answered, World, nobody, reason, request, root, tenant};

const CREATE: &str = "/ghost.agent.v1.VmService/Create";
const START: &str = "/ghost.agent.v1.VmService/Start";
const GET: &str = "/ghost.agent.v1.VmService/Get";

fn fleet(method: &str) -> String {
    format!("/ghost.core.v1.FleetService/{method}")
}

async fn lines(world: &World) -> Vec<(String, String, String, String)> {
    let query = FleetAuditQuery {
        limit: 1000,
        ..FleetAuditQuery::default()
    };
    let entries = world.audit.list(query).await.unwrap();
    entries
        .into_iter()
        .map(|entry| {
            let record = entry.record;
            let action = record.action.rsplit('/').next().unwrap().to_owned();
            (record.principal, action, record.subject, record.outcome)
        })
        .collect()
}

fn line(a: &str, b: &str, c: &str, d: &str) -> (String, String, String, String) {
    (a.into(), b.into(), c.into(), d.into())
}

#[tokio::test]
async fn changes_are_written_down_and_looks_are_not() {
    let world = World::start().await;
    let operator = world.new_key(Some("acme"), Role::Operator).await;
    let viewer = world.new_key(Some("acme"), Role::Viewer).await;
    let start = agent::StartVmRequest {
        vm: "web".into(),
        ..Default::default()
    };
    world
        .by_key(&operator, START, Some("pc"), &start)
        .await
        .message::<agent::Operation>();
    let answer = world.by_key(&viewer, START, Some("pc"), &start).await;
    assert_eq!(answer.reason(), "permission_denied");
    let get = agent::GetVmRequest { vm: "web".into() };
    world
        .by_key(&viewer, GET, Some("pc"), &get)
        .await
        .message::<agent::Vm>();
    let cordon = UpdateHostRequest {
        host: "pc".into(),
        cordoned: Some(true),
        cordon_reason: "new disk".into(),
        ..Default::default()
    };
    let host: Host = world
        .by_key(&operator, &fleet("UpdateHost"), None, &cordon)
        .await
        .message();
    assert!(host.cordoned);
    // A stranger's attempt is no line: anybody could fill the log.
    world
        .call(&nobody(), START, &[("ghost-host", "pc")], &start)
        .await;

    assert_eq!(
        lines(&world).await,
        [
            line("acme/acme-operator", "Start", "web", "ok"),
            line("acme/acme-viewer", "Start", "", "permission_denied"),
            line("acme/acme-operator", "UpdateHost", "pc", "ok"),
        ]
    );
    // Its administrator reads it; those of others read nothing of it.
    let read = |key: String| {
        let world = &world;
        async move {
            let path = fleet("ListAudit");
            let request = ListFleetAuditRequest::default();
            let answer = world.by_key(&key, &path, None, &request).await;
            assert_eq!(answer.reason(), "ok");
            answer.message.len()
        }
    };
    assert!(read(world.new_key(Some("acme"), Role::Admin).await).await > 0);
    assert_eq!(
        read(world.new_key(Some("other"), Role::Admin).await).await,
        0
    );
}

#[tokio::test]
async fn entering_a_guest_is_written_down_before_it_begins_and_when_it_ends() {
    let world = World::start().await;
    let operator = world.new_key(Some("acme"), Role::Operator).await;
    let key = format!("Bearer {operator}");
    let input = agent::ConsoleInput {
        vm: "web".into(),
        data: b"hello".to_vec(),
    };
    let headers = [("authorization", key.as_str()), ("ghost-host", "pc")];
    let path = "/ghost.agent.v1.VmService/Console";
    let answer = world.call(&nobody(), path, &headers, &input).await;
    assert_eq!(answer.message::<agent::ConsoleOutput>().data, b"hello");
    assert_eq!(
        lines(&world).await,
        [
            line("acme/acme-operator", "Console", "", "begun"),
            line("acme/acme-operator", "Console", "web", "ok"),
        ]
    );
}

fn create(name: &str, request_id: &str) -> agent::CreateVmRequest {
    agent::CreateVmRequest {
        name: name.into(),
        image: "debian-12".into(),
        request_id: request_id.into(),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_vm_without_a_host_is_placed_and_its_repeat_goes_to_the_same_host() {
    let world = World::start().await;
    // The fuller one; and it has no link, so that a call to it would fail.
    let other = world.add_host("acme", "full").await;
    let mut told = crate::world::inventory();
    told.committed = told.allocatable;
    let record = Record::Inventory(Box::new(told));
    world.put(RecordKey::Inventory(other), record).await;

    let key = world.new_key(Some("acme"), Role::Operator).await;
    let answer = world
        .by_key(&key, CREATE, None, &create("web", "r-1"))
        .await;
    assert_eq!(answer.message::<agent::Operation>().id, "made");
    // What the host says of itself there is not believed.
    assert_eq!(answer.headers.get_all("ghost-host").iter().count(), 1);
    assert_eq!(answer.header("ghost-host"), "pc");
    assert!(
        answer
            .header("ghost-placement")
            .contains("no other host fits")
    );

    world
        .change_host(world.host, |host| host.cordoned = Some("later".into()))
        .await;
    let again = world
        .by_key(&key, CREATE, None, &create("web", "r-1"))
        .await;
    assert_eq!(again.header("ghost-host"), "pc");
    assert_eq!(world.agent.seen.created.lock().len(), 2);
    let refused = world.by_key(&key, CREATE, None, &create("db", "r-2")).await;
    assert_eq!(refused.reason(), "no_host_fits");
    let cause = &refused.status.get_details_error_info().unwrap().metadata["cause"];
    assert!(cause.contains("pc: it is cordoned: later"), "{cause}");
    assert!(
        cause.contains("full: 0 of 32 virtual CPUs are left"),
        "{cause}"
    );

    // Whoever sees several tenants is told which.
    world
        .change_host(world.host, |host| host.cordoned = None)
        .await;
    let headers = [("ghost-tenant", "acme")];
    let answer = world
        .call(&root(), CREATE, &headers, &create("x", ""))
        .await;
    assert_eq!(answer.header("ghost-host"), "acme/pc");
    let answer = world.call(&root(), CREATE, &[], &create("x", "")).await;
    assert_eq!(answer.reason(), "no_host_fits");
    let key = world.new_key(Some("other"), Role::Operator).await;
    let key = format!("Bearer {key}");
    let headers = [("authorization", key.as_str()), ("ghost-tenant", "acme")];
    let answer = world
        .call(&nobody(), CREATE, &headers, &create("x", ""))
        .await;
    assert_eq!(answer.reason(), "tenant_not_found");
}

#[tokio::test]
async fn labels_choose_among_hosts_and_place_tells_without_doing() {
    let world = World::start().await;
    world
        .change_host(world.host, |host| {
            host.labels.insert("zone".into(), "eu".into());
        })
        .await;
    world.add_host("acme", "plain").await;
    let key = world.new_key(Some("acme"), Role::Operator).await;
    let bearer = format!("Bearer {key}");
    let headers = [
        ("authorization", bearer.as_str()),
        ("ghost-labels", "zone=eu"),
    ];
    let answer = world
        .call(&nobody(), CREATE, &headers, &create("x", ""))
        .await;
    assert_eq!(answer.header("ghost-host"), "pc");
    let headers = [("authorization", bearer.as_str()), ("ghost-labels", "zone")];
    let answer = world
        .call(&nobody(), CREATE, &headers, &create("x", ""))
        .await;
    assert_eq!(answer.reason(), "invalid_argument");

    let ask = PlaceRequest {
        labels: [("zone".to_owned(), "eu".to_owned())].into(),
        ..Default::default()
    };
    let placed: Placement = world
        .by_key(&key, &fleet("Place"), None, &ask)
        .await
        .message();
    assert_eq!(placed.host, "pc");
    assert_eq!(placed.rejected[0].reason, "it has no label zone=eu");
    assert_eq!(world.agent.seen.created.lock().len(), 1);
}

#[tokio::test]
async fn quotas_are_kept_and_room_that_was_held_for_nothing_is_given_back() {
    let world = World::start().await;
    let quota = Quota {
        vms: Some(1),
        ..Quota::default()
    };
    world.add_tenant("acme", quota, Quota::default()).await;
    let key = world.new_key(Some("acme"), Role::Operator).await;
    // It never reaches the host.
    let agent = world.links.0.lock().remove(&world.host).unwrap();
    let answer = world
        .by_key(&key, CREATE, Some("pc"), &create("web", ""))
        .await;
    assert_eq!(answer.reason(), "host_offline");
    let info = answer.status.get_details_error_info().unwrap();
    assert!(info.metadata["cause"].contains("last heard"), "{info:?}");
    assert!(info.metadata["hint"].contains("--queue"), "{info:?}");
    assert_eq!(world.admission.used_by_tenant(&tenant("acme")).vms, 0);

    world.links.0.lock().insert(world.host, agent);
    let dry = agent::CreateVmRequest {
        dry_run: true,
        ..create("web", "")
    };
    for _ in 0..2 {
        let answer = world.by_key(&key, CREATE, Some("pc"), &dry).await;
        assert_eq!(answer.reason(), "ok");
    }
    let answer = world
        .by_key(&key, CREATE, Some("pc"), &create("web", ""))
        .await;
    assert_eq!(answer.reason(), "ok");
    for host in [Some("pc"), None] {
        let answer = world.by_key(&key, CREATE, host, &create("db", "")).await;
        assert_eq!(answer.reason(), "quota_exceeded");
    }
    assert_eq!(world.agent.seen.created.lock().len(), 3);
}

#[tokio::test]
async fn the_owner_of_a_host_bounds_what_core_does() {
    let world = World::start().await;
    let key = world.new_key(Some("acme"), Role::Operator).await;
    let start = agent::StartVmRequest::default();
    let exec = "/ghost.agent.v1.GuestService/Ping";
    for (permissions, look, change) in [
        (
            CorePermissions::Off,
            "core_permission_denied",
            "core_permission_denied",
        ),
        (CorePermissions::Read, "ok", "core_permission_denied"),
        (CorePermissions::Operate, "ok", "ok"),
    ] {
        world
            .change_host(world.host, |host| host.permissions = permissions)
            .await;
        let get = agent::GetVmRequest { vm: "web".into() };
        assert_eq!(
            world.by_key(&key, GET, Some("pc"), &get).await.reason(),
            look
        );
        assert_eq!(
            world.by_key(&key, START, Some("pc"), &start).await.reason(),
            change
        );
        let _ = exec;
        let enter = "/ghost.agent.v1.GuestService/StatFile";
        let answer = world.by_key(&key, enter, Some("pc"), &()).await;
        assert_eq!(answer.reason(), "core_permission_denied", "{permissions}");
    }
    world
        .change_host(world.host, |host| {
            host.life = ghost_core::domain::HostLife::Locked {
                since: host.enrolled_at,
                reason: "two machines".into(),
            };
        })
        .await;
    let answer = world.by_key(&key, GET, Some("pc"), &()).await;
    assert_eq!(answer.reason(), "host_locked");
}

#[tokio::test]
async fn a_host_has_to_be_named_and_only_once() {
    let world = World::start().await;
    let key = world.new_key(Some("acme"), Role::Operator).await;
    let answer = world.by_key(&key, GET, None, &()).await;
    assert_eq!(answer.reason(), "host_required");
    let answer = world.by_key(&key, GET, Some("nothing"), &()).await;
    assert_eq!(answer.reason(), "host_not_found");
    let bearer = format!("Bearer {key}");
    let headers = [
        ("authorization", bearer.as_str()),
        ("ghost-host", "pc"),
        ("ghost-host", "other-pc"),
    ];
    let answer = world.call(&nobody(), GET, &headers, &()).await;
    assert_eq!(answer.reason(), "invalid_argument");
    // By id and by a prefix of it.
    let id = world.host.to_string();
    for selector in [id.as_str(), &id[..13]] {
        let get = agent::GetVmRequest { vm: "web".into() };
        let answer = world.by_key(&key, GET, Some(selector), &get).await;
        assert_eq!(answer.message::<agent::Vm>().name, "web");
    }
}

#[tokio::test]
async fn revoking_somebody_ends_what_they_watch() {
    let world = World::start().await;
    let (mut key, secret) = world.key(Some("acme"), Role::Viewer);
    world.add_key(key.clone()).await;
    let bearer = format!("Bearer {}", secret.expose());
    let headers = [("authorization", bearer.as_str()), ("ghost-host", "pc")];
    let watch = agent::WatchVmRequest {
        vm: "forever".into(),
    };
    let request = request("/ghost.agent.v1.VmService/Watch", &headers, &watch);
    let mut body = world.front.call(&nobody(), request).await.into_body();
    let frame = std::future::poll_fn(|cx| std::pin::Pin::new(&mut body).poll_frame(cx)).await;
    assert!(frame.unwrap().unwrap().is_data());
    world.agent.until_running(1).await;
    key.revoked_at = Some(world.now());
    world.add_key(key).await;
    let frame = std::future::poll_fn(|cx| std::pin::Pin::new(&mut body).poll_frame(cx));
    let frame = tokio::time::timeout(Duration::from_secs(10), frame)
        .await
        .unwrap();
    let trailers = frame.unwrap().unwrap().into_trailers().unwrap();
    let status = tonic::Status::from_header_map(&trailers).unwrap();
    assert_eq!(reason(&status), "unauthenticated");
    // The host hears of it too, though the body is still held.
    world.agent.until_running(0).await;
    drop(body);
}

#[tokio::test]
async fn a_shutdown_ends_streams_with_a_word() {
    let world = World::start().await;
    let request = request(&fleet("WatchHosts"), &[], &WatchHostsRequest::default());
    let mut body = world.front.call(&root(), request).await.into_body();
    let frame = std::future::poll_fn(|cx| std::pin::Pin::new(&mut body).poll_frame(cx)).await;
    assert!(frame.unwrap().unwrap().is_data());
    world.stop.cancel();
    let mut last = None;
    while let Some(frame) =
        std::future::poll_fn(|cx| std::pin::Pin::new(&mut body).poll_frame(cx)).await
    {
        last = frame.unwrap().into_trailers().ok();
    }
    let status = tonic::Status::from_header_map(&last.unwrap()).unwrap();
    assert_eq!(reason(&status), "shutting_down");
}

#[tokio::test]
async fn each_identity_is_limited_by_itself() {
    let world = World::with(FrontOptions {
        limits: Limits {
            per_second: NonZeroU32::MIN,
            burst: NonZeroU32::new(3).unwrap(),
        },
        ..FrontOptions::default()
    })
    .await;
    let alice = world.new_key(Some("acme"), Role::Viewer).await;
    let bob = world.new_key(Some("acme"), Role::Operator).await;
    let list = ListHostsRequest::default();
    let path = fleet("ListHosts");
    for _ in 0..3 {
        assert_eq!(
            world.by_key(&alice, &path, None, &list).await.reason(),
            "ok"
        );
    }
    let answer = world.by_key(&alice, &path, None, &list).await;
    assert_eq!(answer.reason(), "too_many_requests");
    assert!(answer.status.get_details_retry_info().is_some());
    assert_eq!(world.by_key(&bob, &path, None, &list).await.reason(), "ok");
    // Whoever tries keys is slowed down where it comes from, and learns nothing then.
    for _ in 0..3 {
        let answer = world.by_key("ghost_a_b", &path, None, &list).await;
        assert_eq!(answer.reason(), "unauthenticated");
    }
    let answer = world.by_key("ghost_a_b", &path, None, &list).await;
    assert_eq!(answer.reason(), "too_many_requests");
    // Those who have a good one are not.
    assert_eq!(world.by_key(&bob, &path, None, &list).await.reason(), "ok");
}

#[tokio::test]
async fn tenants_do_not_see_each_other() {
    let world = World::start().await;
    let acme = world.new_key(Some("acme"), Role::Admin).await;
    let other = world.new_key(Some("other"), Role::Admin).await;
    world.add_user(Some("acme"), "alice", Role::Viewer).await;
    let list = |key: String| {
        let world = &world;
        async move {
            let hosts: ListHostsResponse = world
                .by_key(
                    &key,
                    &fleet("ListHosts"),
                    None,
                    &ListHostsRequest::default(),
                )
                .await
                .message();
            let users: ListUsersResponse = world
                .by_key(
                    &key,
                    &fleet("ListUsers"),
                    None,
                    &ListUsersRequest::default(),
                )
                .await
                .message();
            let keys: ListFleetKeysResponse = world
                .by_key(
                    &key,
                    &fleet("ListKeys"),
                    None,
                    &ListFleetKeysRequest::default(),
                )
                .await
                .message();
            let tenants: ListTenantsResponse = world
                .by_key(
                    &key,
                    &fleet("ListTenants"),
                    None,
                    &ListTenantsRequest::default(),
                )
                .await
                .message();
            let status: CoreStatus = world
                .by_key(
                    &key,
                    &fleet("GetStatus"),
                    None,
                    &GetCoreStatusRequest::default(),
                )
                .await
                .message();
            (
                hosts.hosts.len(),
                users.users.len(),
                keys.keys.len(),
                tenants.tenants.len(),
                status.hosts.values().sum::<u32>(),
            )
        }
    };
    assert_eq!(list(acme).await, (1, 1, 1, 1, 1));
    assert_eq!(list(other.clone()).await, (0, 0, 1, 1, 0));
    let get = GetHostRequest {
        host: "acme/pc".into(),
    };
    let answer = world.by_key(&other, &fleet("GetHost"), None, &get).await;
    assert_eq!(answer.reason(), "host_not_found");
}

#[tokio::test]
async fn keys_tenants_and_tokens_are_made_over_the_wire() {
    let world = World::start().await;
    let make = CreateTenantRequest {
        name: "new".into(),
        quota: Some(ghost_proto::core::v1::Quota {
            vms: 5,
            ..Default::default()
        }),
        ..Default::default()
    };
    let made: Tenant = world
        .call(&root(), &fleet("CreateTenant"), &[], &make)
        .await
        .message();
    assert_eq!(made.quota.unwrap().vms, 5);
    let key = CreateFleetKeyRequest {
        tenant: "new".into(),
        name: "ci".into(),
        role: "operator".into(),
        ..Default::default()
    };
    let created: CreatedFleetKey = world
        .call(&root(), &fleet("CreateKey"), &[], &key)
        .await
        .message();
    let who: agent::Identity = world
        .by_key(
            &created.secret,
            "/ghost.agent.v1.AccessService/WhoAmI",
            Some("pc"),
            &(),
        )
        .await
        .message();
    assert_eq!(
        (
            who.name.as_str(),
            who.server.as_str(),
            who.tenant.as_str(),
            who.source.as_str()
        ),
        ("new/ci", "core", "new", "key")
    );
    let token: FleetToken = world
        .call(
            &root(),
            &fleet("CreateToken"),
            &[],
            &CreateFleetTokenRequest {
                tenant: "new".into(),
                ..Default::default()
            },
        )
        .await
        .message();
    assert!(token.token.starts_with("ghost-host-v1."));
    let secrets = [
        created.secret.rsplit('_').next().unwrap().to_owned(),
        token.token,
    ];
    let written = format!("{:?}", lines(&world).await);
    for secret in secrets {
        assert!(!written.contains(&secret), "a secret stands in the log");
    }
}

#[tokio::test]
async fn another_replica_vouches_for_whom_it_let_in() {
    let world = World::start().await;
    let replica = world.certified(PeerIdentity::Replica("b".into()));
    let headers = [
        ("ghost-forwarded", "1"),
        ("ghost-principal", "acme/alice"),
        ("ghost-role", "operator"),
        ("ghost-tenant", "acme"),
        ("ghost-host", "pc"),
    ];
    let start = agent::StartVmRequest {
        vm: "web".into(),
        ..Default::default()
    };
    let answer = world.call(&replica, START, &headers, &start).await;
    assert_eq!(answer.reason(), "ok");
    {
        let calls = world.agent.seen.calls.lock();
        assert_eq!(calls[0].1.get("ghost-principal").unwrap(), "acme/alice");
        assert!(calls[0].1.get("ghost-forwarded").is_none());
    }
    // Nobody else may say so.
    let answer = world.call(&nobody(), START, &headers, &start).await;
    assert_eq!(answer.reason(), "unauthenticated");
    // What it is not sent for it may not do.
    let answer = world.call(&replica, &fleet("ListHosts"), &[], &()).await;
    assert_eq!(answer.reason(), "unauthenticated");
    let owns: OwnsResponse = world
        .call(
            &replica,
            "/ghost.core.v1.ReplicaService/Owns",
            &[],
            &OwnsRequest {
                host_id: world.host.to_string(),
            },
        )
        .await
        .message();
    assert!(owns.owns);
}

#[tokio::test]
async fn health_is_open_and_says_whether_records_can_be_written() {
    use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};
    let world = World::start().await;
    let check = HealthCheckRequest {
        service: String::new(),
    };
    let path = "/grpc.health.v1.Health/Check";
    let answer: HealthCheckResponse = world.call(&nobody(), path, &[], &check).await.message();
    assert_eq!(answer.status, 1);
    world.stop.cancel();
    let answer: HealthCheckResponse = world.call(&nobody(), path, &[], &check).await.message();
    assert_eq!(answer.status, 2);
    let unknown = HealthCheckRequest {
        service: "nothing".into(),
    };
    let answer: Answered = world.call(&nobody(), path, &[], &unknown).await;
    assert_eq!(answer.status.code(), Code::NotFound);
}

#[tokio::test]
async fn a_connection_carries_calls_to_core_and_to_hosts() {
    use ghost_proto::agent::v1::vm_service_client::VmServiceClient;
    use ghost_proto::core::v1::fleet_service_client::FleetServiceClient;
    let world = World::start().await;
    let (client, server) = tokio::io::duplex(64 * 1024);
    let front = Arc::clone(&world.front);
    let served = tokio::spawn(async move { front.serve(server, root()).await });
    let mut client = Some(client);
    let channel = tonic::transport::Endpoint::from_static("http://core")
        .connect_with_connector(tower::service_fn(move |_| {
            let client = client.take().map(hyper_util::rt::TokioIo::new);
            async move { client.ok_or_else(|| std::io::Error::other("it was used")) }
        }))
        .await
        .unwrap();
    let mut fleet = FleetServiceClient::new(channel.clone());
    let hosts = fleet.list_hosts(ListHostsRequest::default()).await.unwrap();
    assert_eq!(hosts.into_inner().hosts[0].name, "pc");
    let mut call = tonic::Request::new(agent::GetVmRequest { vm: "web".into() });
    call.metadata_mut()
        .insert("ghost-host", "acme/pc".parse().unwrap());
    let vm = VmServiceClient::new(channel.clone())
        .get(call)
        .await
        .unwrap();
    assert_eq!(vm.into_inner().name, "web");
    drop((fleet, channel));
    tokio::time::timeout(Duration::from_secs(10), served)
        .await
        .unwrap()
        .unwrap();
}
