//! The routes of Batwa over all hosts of a tenant.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use axum::http::StatusCode;
use futures::{SinkExt, StreamExt};
use ghost_core::application::audit::{FleetAudit, FleetAuditQuery};
use ghost_core::domain::{Record, RecordKey};
use ghost_core::presentation::grpc::{FrontOptions, Limits};
use ghost_core::presentation::http;
use ghost_domain::fleet::{CorePermissions, VmSummary};
use ghost_domain::vm::{DesiredPower, VmState};
use ghost_domain::{ByteSize, Demand, HostId, Role, VmId};
use ghost_presentation::Access;
use ghost_presentation::http::routes::BATWA_ROUTES;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{Error, Message};

use crate::http::{build, call, send, value};
use crate::world::{World, inventory};

async fn world() -> World {
    World::with(FrontOptions {
        recheck: Duration::from_millis(50),
        limits: Limits {
            per_second: std::num::NonZeroU32::MAX,
            burst: std::num::NonZeroU32::MAX,
        },
        batwa: true,
        ..FrontOptions::default()
    })
    .await
}

/// Core knows of these VMs on a host.
async fn knows(world: &World, host: HostId, names: &[&str]) {
    let mut told = inventory();
    for name in names {
        let vm = VmSummary {
            id: VmId::random(),
            name: (*name).into(),
            state: VmState::Running,
            state_reason: String::new(),
            desired: DesiredPower::Running,
            demand: Demand {
                cpus: 2,
                memory: ByteSize::from_gib(1),
                disk: ByteSize::from_gib(10),
            },
            image: "debian-12".into(),
            addresses: vec!["192.0.2.7".into(), "fe80::1".into()],
            generation: 1,
            created_at: world.now(),
            tags: Default::default(),
            owner: None,
        };
        told.vms.insert(vm.id, vm);
    }
    let record = Record::Inventory(Box::new(told));
    world.put(RecordKey::Inventory(host), record).await;
}

async fn ask(world: &World, method: &str, path: &str, key: &str, body: Value) -> (u16, Value) {
    let body = Some(body).filter(|body| !body.is_null());
    let (status, answer) = call(world, method, path, key, body).await;
    (status.as_u16(), answer)
}

fn code(answer: &(u16, Value)) -> (u16, &str) {
    (answer.0, answer.1["code"].as_str().unwrap_or_default())
}

#[tokio::test]
async fn nothing_of_it_is_there_unless_it_is_configured() {
    let world = World::start().await;
    let key = world.new_key(Some("acme"), Role::Admin).await;
    for route in BATWA_ROUTES {
        let (status, _) = call(&world, route.method, route.path, &key, None).await;
        assert_eq!(status, StatusCode::NOT_FOUND, "{}", route.path);
    }
    let path = "/v1/openapi.json";
    let (_, document) = call(&world, "GET", path, &key, None).await;
    assert!(document["paths"]["/api/vm/list"].is_null());
    let world = self::world().await;
    let key = world.new_key(Some("acme"), Role::Viewer).await;
    let (_, document) = call(&world, "GET", path, &key, None).await;
    assert!(document["paths"]["/api/vm/list"].is_object());
}

#[tokio::test]
async fn every_route_against_everybody() {
    let world = world().await;
    knows(&world, world.host, &["web"]).await;
    let (mut expired, expired_key) = world.key(Some("acme"), Role::Admin);
    expired.expires_at = world.now();
    world.add_key(expired).await;
    let (mut revoked, revoked_key) = world.key(Some("acme"), Role::Admin);
    revoked.revoked_at = Some(world.now());
    world.add_key(revoked).await;
    let (_, never_made) = world.key(Some("acme"), Role::Admin);
    let (mut scoped, scoped_key) = world.key(Some("acme"), Role::Admin);
    scoped.hosts = Some(BTreeSet::from([world.add_host("acme", "second").await]));
    world.add_key(scoped).await;
    let viewer = world.new_key(Some("acme"), Role::Viewer).await;
    let operator = world.new_key(Some("acme"), Role::Operator).await;
    let admin = world.new_key(Some("acme"), Role::Admin).await;
    let stranger = world.new_key(Some("other"), Role::Admin).await;
    let everybody = [
        ("no identity", "", None, false),
        ("expired key", expired_key.expose(), None, false),
        ("revoked key", revoked_key.expose(), None, false),
        ("key that was never made", never_made.expose(), None, false),
        ("garbage", "nonsense", None, false),
        ("viewer", viewer.as_str(), Some(Role::Viewer), true),
        ("operator", operator.as_str(), Some(Role::Operator), true),
        ("admin", admin.as_str(), Some(Role::Admin), true),
        ("other tenant", stranger.as_str(), Some(Role::Admin), false),
        (
            "key for another host",
            scoped_key.expose(),
            Some(Role::Admin),
            false,
        ),
    ];
    let mut reached = 0;
    for route in BATWA_ROUTES {
        for (who, key, role, sees) in &everybody {
            let path = route.path.replace("{vm_name}", "web");
            let path = path.replace("{agent_id}", "pc");
            let body = match route.path {
                "/api/agent/register" => json!({"agent_id": "pc", "hostname": "pc"}),
                "/api/agent/heartbeat" => json!({"agent_id": "pc", "vm_count": 9000}),
                "/api/vm/create" => json!({"image": "tiny", "agent_id": "pc"}),
                "/api/execute" => json!({"vm_name": "web", "command": ["true"]}),
                _ if route.method == "POST" => json!({"vm_name": "web"}),
                _ => Value::Null,
            };
            let path = match route.path {
                "/ws" => "/ws?vm_name=web".to_owned(),
                _ => path,
            };
            let answer = ask(&world, route.method, &path, key, body).await;
            let what = format!("{} by {who}: {answer:?}", route.path);
            let least = match route.access {
                Access::Anyone => panic!("{what}"),
                Access::Role(role) => role,
                Access::Guests => Role::Operator,
            };
            match role {
                None => assert_eq!(code(&answer), (403, "unauthenticated"), "{what}"),
                Some(role) if *role < least => {
                    assert_eq!(code(&answer), (403, "permission_denied"), "{what}");
                }
                // What is not theirs is not there, and is never refused by name.
                Some(_) if !sees => match route.path {
                    "/api/agent/list" | "/api/vm/list" => {
                        assert_eq!(answer.0, 200, "{what}");
                        assert!(!answer.1.to_string().contains("web"), "{what}");
                        assert!(!answer.1.to_string().contains("\"pc\""), "{what}");
                    }
                    "/api/agent/register" | "/api/agent/heartbeat" => {
                        assert_eq!(code(&answer), (409, "not_enrolled"), "{what}");
                    }
                    "/ws" => assert!(answer.0 == 400 || answer.0 == 404, "{what}"),
                    _ => assert_eq!(answer.0, 404, "{what}"),
                },
                // The host is online, and nobody said force.
                Some(_) if route.path.starts_with("/api/agent/unregister/") => {
                    assert_eq!(code(&answer), (409, "wrong_state"), "{what}");
                }
                // Without an upgrade it is no WebSocket, but that is asked last.
                Some(_) if route.path == "/ws" => assert_eq!(answer.0, 400, "{what}"),
                Some(_) => {
                    assert_eq!(answer.0, 200, "{what}");
                    reached += 1;
                }
            }
        }
    }
    assert_eq!(reached, 28);
}

#[tokio::test]
async fn hosts_and_vms_are_shown_with_where_they_are() {
    let world = world().await;
    let second = world.add_host("acme", "second").await;
    knows(&world, world.host, &["web", "db"]).await;
    knows(&world, second, &["web"]).await;
    let key = world.new_key(Some("acme"), Role::Viewer).await;
    let get = async |path: &str| ask(&world, "GET", path, &key, Value::Null).await;
    let (_, agents) = get("/api/agent/list").await;
    let agents = agents["agents"].as_array().unwrap();
    assert_eq!(agents.len(), 2);
    assert_eq!(agents[0]["agent_id"], "pc");
    assert_eq!(agents[0]["hostname"], "pc");
    assert_eq!(agents[0]["status"], "online");
    assert_eq!(agents[0]["host_id"], world.host.to_string());
    assert_eq!(agents[0]["vm_count"], 2);
    assert!(agents[0]["last_heartbeat"].is_string());
    let (_, listed) = get("/api/vm/list").await;
    let places: Vec<_> = listed["vms"]
        .as_array()
        .unwrap()
        .iter()
        .map(|vm| {
            (
                vm["hostname"].as_str().unwrap(),
                vm["name"].as_str().unwrap(),
            )
        })
        .collect();
    assert_eq!(places.len(), 3);
    assert!(places.contains(&("pc", "db")) && places.contains(&("second", "web")));
    let (_, db) = get("/api/vm/info/db").await;
    assert_eq!(db["state"], "Running");
    assert_eq!(db["ipv4"], json!(["192.0.2.7"]));
    assert_eq!(db["memory_bytes"], 1 << 30);
    let ambiguous = get("/api/vm/info/web").await;
    assert_eq!(code(&ambiguous), (409, "vm_ambiguous"));
    assert!(ambiguous.1["hint"].as_str().unwrap().contains("agent_id"));
    assert!(ambiguous.1["cause"].as_str().unwrap().contains("second"));
    let (status, web) = get("/api/vm/info/web?agent_id=second").await;
    assert_eq!((status, &web["agent_id"]), (200, &json!("second")));
    assert_eq!(code(&get("/api/vm/info/none").await), (404, "vm_not_found"));
    let nowhere = get("/api/vm/list?agent_id=none").await;
    assert_eq!(code(&nowhere), (404, "host_not_found"));
    // Whoever is bound to no tenant is told which one.
    let root = world.new_key(None, Role::Admin).await;
    let (_, agents) = ask(&world, "GET", "/api/agent/list", &root, Value::Null).await;
    assert_eq!(agents["agents"][0]["agent_id"], "acme/pc");
}

#[tokio::test]
async fn a_registration_acknowledges_and_enrols_nobody() {
    let world = world().await;
    let key = world.new_key(Some("acme"), Role::Viewer).await;
    let register = async |id: &str, hostname: &str| {
        let body = json!({"agent_id": id, "hostname": hostname, "api_key": "hush",
            "api_url": "http://192.0.2.1:8001"});
        ask(&world, "POST", "/api/agent/register", &key, body).await
    };
    for (id, hostname) in [
        ("pc", "x"),
        ("laptop-7", "pc"),
        (&world.host.to_string(), ""),
    ] {
        let (status, known) = register(id, hostname).await;
        assert_eq!((status, &known["agent_id"]), (200, &json!("pc")), "{known}");
        assert_eq!(known["success"], true);
    }
    // No prefix of an id stands for a host here.
    for (id, hostname) in [
        ("laptop", "laptop"),
        (&world.host.to_string()[..8], ""),
        ("", ""),
    ] {
        let refused = register(id, hostname).await;
        assert_eq!(code(&refused), (409, "not_enrolled"));
        let hint = refused.1["hint"].as_str().unwrap();
        assert!(hint.contains("ghost-agent enroll"), "{hint}");
        assert!(!refused.1.to_string().contains("hush"));
    }
    let (_, agents) = ask(&world, "GET", "/api/agent/list", &key, Value::Null).await;
    assert_eq!(agents["agents"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn a_heartbeat_by_a_key_makes_no_host_online() {
    let world = world().await;
    knows(&world, world.host, &["web"]).await;
    let key = world.new_key(Some("acme"), Role::Viewer).await;
    let beat = async |id: &str| {
        let body = json!({"agent_id": id, "timestamp": "2031-01-01T00:00:00Z",
            "status": "online", "vm_count": 77});
        ask(&world, "POST", "/api/agent/heartbeat", &key, body).await
    };
    let info = async |id: &str| {
        let path = format!("/api/agent/info/{id}");
        ask(&world, "GET", &path, &key, Value::Null).await
    };
    let (status, known) = beat("pc").await;
    assert_eq!((status, &known["status"]), (200, &json!("online")));
    let (status, pc) = info("pc").await;
    assert_eq!(
        (status, &pc["status"], &pc["vm_count"]),
        (200, &json!("online"), &json!(1))
    );
    assert_eq!(pc["host_id"], world.host.to_string());
    // A host that never came stays as it is, whatever somebody says in its name.
    world.links.0.lock().remove(&world.host);
    let unlinked = world.fleet.transact(|state| {
        let mut draft = state.draft();
        draft.delete(RecordKey::Owner(world.host));
        Ok(draft.done(()))
    });
    unlinked.await.unwrap();
    let before = info("pc").await.1;
    assert_eq!(before["status"], "offline", "{before}");
    let (status, told) = beat("pc").await;
    assert_eq!((status, &told["status"]), (200, &json!("offline")));
    let after = info("pc").await.1;
    assert_eq!(after, before);
    assert_eq!(code(&beat("nobody").await), (409, "not_enrolled"));
    assert_eq!(code(&info("nobody").await), (404, "host_not_found"));
    let odd = json!({"agent_id": "pc", "mood": "fine"});
    let (status, _) = ask(&world, "POST", "/api/agent/heartbeat", &key, odd).await;
    assert_eq!(status, 400);
}

#[tokio::test]
async fn a_host_is_unregistered_by_an_administrator_and_only_with_force_while_it_is_online() {
    let world = world().await;
    let admin = world.new_key(Some("acme"), Role::Admin).await;
    let operator = world.new_key(Some("acme"), Role::Operator).await;
    let path = "/api/agent/unregister/pc";
    let delete = async |key: &str, path: &str| ask(&world, "DELETE", path, key, Value::Null).await;
    assert_eq!(
        code(&delete(&operator, path).await),
        (403, "permission_denied")
    );
    let refused = delete(&admin, path).await;
    assert_eq!(code(&refused), (409, "wrong_state"));
    let (status, gone) = delete(&admin, &format!("{path}?force=true")).await;
    assert_eq!((status, &gone["agent_id"]), (200, &json!("pc")), "{gone}");
    assert!(world.fleet.read(|state| state.host(world.host).is_none()));
    assert_eq!(code(&delete(&admin, path).await), (404, "host_not_found"));
    let query = FleetAuditQuery {
        limit: 100,
        ..FleetAuditQuery::default()
    };
    let outcomes: Vec<_> = world
        .audit
        .list(query)
        .await
        .unwrap()
        .into_iter()
        .filter(|line| {
            let action = line.record.action.as_str();
            action.contains("RemoveHost") || action.contains("unregister")
        })
        .map(|line| line.record.outcome)
        .collect();
    assert_eq!(outcomes, ["permission_denied", "wrong_state", "ok"]);
}

#[tokio::test]
async fn changes_go_to_the_vms_host_by_the_same_rules() {
    let world = world().await;
    let second = world.add_host("acme", "second").await;
    knows(&world, world.host, &["web", "twin"]).await;
    knows(&world, second, &["twin"]).await;
    let key = world.new_key(Some("acme"), Role::Operator).await;
    let post = async |path: &str, body: Value| ask(&world, "POST", path, &key, body).await;
    let (status, started) = post("/api/vm/start", json!({"vm_name": "web"})).await;
    assert_eq!(status, 200, "{started}");
    assert_eq!(
        (
            &started["success"],
            &started["status"],
            &started["hostname"]
        ),
        (&json!(true), &json!("succeeded"), &json!("pc"))
    );
    // By its id: a name may be another VM's by then.
    let id = started["operation_id"].as_str().unwrap();
    let id = id.strip_prefix("started ").unwrap();
    assert!(id.parse::<VmId>().is_ok(), "{id}");
    let body = json!({"vm_name": "web", "force": true});
    for verb in ["stop", "delete"] {
        let (status, _) = post(&format!("/api/vm/{verb}"), body.clone()).await;
        assert_eq!(status, 200, "{verb}");
    }
    let ambiguous = post("/api/vm/delete", json!({"vm_name": "twin"})).await;
    assert_eq!(code(&ambiguous), (409, "vm_ambiguous"));
    let away = post(
        "/api/vm/stop",
        json!({"vm_name": "twin", "agent_id": "second"}),
    )
    .await;
    assert_eq!(code(&away), (503, "host_offline"));
    // A VM that is newer than what Core knows is found on the host that is named.
    let body = json!({"vm_name": "doomed", "agent_id": "pc"});
    let failed = post("/api/vm/start", body).await;
    assert_eq!(code(&failed), (502, "hypervisor_failed"));
    assert_eq!(failed.1["detail"], "QEMU said no");
    let query = FleetAuditQuery {
        limit: 100,
        ..FleetAuditQuery::default()
    };
    let lines = world.audit.list(query).await.unwrap();
    let done: Vec<_> = lines
        .iter()
        .map(|line| (line.record.action.as_str(), line.record.outcome.as_str()))
        .collect();
    for verb in ["Start", "Stop", "Delete"] {
        let action = format!("ghost.agent.v1.VmService/{verb}");
        assert!(done.contains(&(action.as_str(), "ok")), "{verb}: {done:?}");
    }
    // What is refused at the door has its line too.
    let viewer = world.new_key(Some("acme"), Role::Viewer).await;
    let body = json!({"vm_name": "web"});
    let refused = ask(&world, "POST", "/api/vm/stop", &viewer, body.clone()).await;
    assert_eq!(code(&refused), (403, "permission_denied"));
    let query = FleetAuditQuery {
        limit: 1,
        ..FleetAuditQuery::default()
    };
    let last = world.audit.list(query).await.unwrap().pop().unwrap().record;
    assert_eq!(
        (last.action.as_str(), last.outcome.as_str()),
        ("POST /api/vm/stop", "permission_denied")
    );
    // What the host's owner does not allow is not allowed here.
    world
        .change_host(world.host, |host| host.permissions = CorePermissions::Read)
        .await;
    let refused = post("/api/vm/start", body).await;
    assert_eq!(code(&refused), (403, "core_permission_denied"));
}

#[tokio::test]
async fn a_vm_is_placed_by_core_or_where_it_is_wanted_within_the_quota() {
    let world = world().await;
    let quota = ghost_core::domain::Quota {
        vms: Some(1),
        ..Default::default()
    };
    world.add_tenant("acme", quota, Default::default()).await;
    let key = world.new_key(Some("acme"), Role::Operator).await;
    let body = json!({"name": "web", "image": "debian-12", "cpus": 1, "memory": "1G"});
    let (status, made) = ask(&world, "POST", "/api/vm/create", &key, body.clone()).await;
    assert_eq!(status, 200, "{made}");
    assert_eq!(
        (&made["agent_id"], &made["vm_name"]),
        (&json!("pc"), &json!("web"))
    );
    assert!(made["placement"].is_string(), "{made}");
    {
        let created = world.agent.seen.created.lock();
        assert_eq!(created.len(), 1);
        assert!(created[0].start && created[0].memory_bytes == 1 << 30);
    }
    let full = ask(&world, "POST", "/api/vm/create", &key, body.clone()).await;
    assert_eq!(code(&full), (507, "quota_exceeded"));
    let mut there = body;
    there["agent_id"] = json!("pc");
    let full = ask(&world, "POST", "/api/vm/create", &key, there.clone()).await;
    assert_eq!(code(&full), (507, "quota_exceeded"));
    there["agent_id"] = json!("none");
    let nowhere = ask(&world, "POST", "/api/vm/create", &key, there).await;
    assert_eq!(code(&nowhere), (404, "host_not_found"));
    assert_eq!(world.agent.seen.created.lock().len(), 1);
}

#[tokio::test]
async fn programs_run_in_guests_of_any_host() {
    let world = world().await;
    knows(&world, world.host, &["web"]).await;
    let key = world.new_key(Some("acme"), Role::Operator).await;
    let run = async |body: Value| ask(&world, "POST", "/api/execute", &key, body).await;
    let (status, done) = run(json!({"vm_name": "web", "command": ["uname", "-a"]})).await;
    assert_eq!(status, 200, "{done}");
    assert_eq!(
        done,
        json!({"success": false, "returncode": 3, "stdout": "uname -a", "stderr": "",
            "timed_out": false, "truncated": false})
    );
    let closed = run(json!({"vm_name": "web", "command": ["/closed"]})).await;
    assert_eq!(code(&closed), (403, "guest_access_off"));
    let local = run(json!({"command": ["list"]})).await;
    assert_eq!(code(&local), (400, "invalid_argument"));
    world
        .change_host(world.host, |host| {
            host.permissions = CorePermissions::Operate;
        })
        .await;
    let refused = run(json!({"vm_name": "web", "command": ["true"]})).await;
    assert_eq!(code(&refused), (403, "core_permission_denied"));
    world.agent.until_running(0).await;
}

#[tokio::test]
async fn a_terminal_goes_through_core_and_needs_the_key() {
    let world = world().await;
    knows(&world, world.host, &["web"]).await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = http::router(Arc::clone(&world.front));
    let served = tokio::spawn(async move { axum::serve(listener, router).await });
    let served = tokio_util::task::AbortOnDropHandle::new(served);
    let (mut key, secret) = world.key(Some("acme"), Role::Operator);
    world.add_key(key.clone()).await;
    let (mut expired, expired_key) = world.key(Some("acme"), Role::Admin);
    expired.expires_at = world.now();
    world.add_key(expired).await;
    let (mut revoked, revoked_key) = world.key(Some("acme"), Role::Admin);
    revoked.revoked_at = Some(world.now());
    world.add_key(revoked).await;
    let stranger = world.new_key(Some("other"), Role::Admin).await;
    let viewer = world.new_key(Some("acme"), Role::Viewer).await;

    let connect = async |path: &str, headers: &[(&'static str, &str)]| {
        let mut request = format!("ws://{address}{path}")
            .into_client_request()
            .unwrap();
        for (name, value) in headers {
            request.headers_mut().insert(*name, value.parse().unwrap());
        }
        let stream = tokio::net::TcpStream::connect(address).await.unwrap();
        tokio_tungstenite::client_async(request, stream).await
    };
    let in_address = format!("/ws?vm_name=web&api_key={}", secret.expose());
    for (who, path, key, expected) in [
        ("nobody", "/ws?vm_name=web", "", 403),
        ("key in the address", in_address.as_str(), "", 403),
        ("wrong", "/ws?vm_name=web", "nonsense", 403),
        ("expired", "/ws?vm_name=web", expired_key.expose(), 403),
        ("revoked", "/ws?vm_name=web", revoked_key.expose(), 403),
        ("viewer", "/ws?vm_name=web", &viewer, 403),
        ("other tenant", "/ws?vm_name=web", &stranger, 404),
        (
            "other tenant, by host",
            "/ws?vm_name=web&agent_id=pc",
            &stranger,
            404,
        ),
    ] {
        let headers: Vec<_> = Some(("x-api-key", key))
            .filter(|(_, key)| !key.is_empty())
            .into_iter()
            .collect();
        let Err(Error::Http(response)) = connect(path, &headers).await else {
            panic!("{who} was let in");
        };
        assert_eq!(response.status(), expected, "{who}");
    }
    let page = [
        ("x-api-key", secret.expose()),
        ("origin", "https://evil.example"),
    ];
    let Err(Error::Http(response)) = connect("/ws?vm_name=web", &page).await else {
        panic!("a page of another origin was let in");
    };
    assert_eq!(response.status(), 403);

    let offered = format!("ghost.v1, bearer.{}", secret.expose());
    let (mut socket, _) = connect(
        "/ws?vm_name=web&cols=100&rows=30",
        &[("sec-websocket-protocol", &offered)],
    )
    .await
    .unwrap();
    for text in ["ls\r", "grüezi"] {
        socket.send(Message::text(text)).await.unwrap();
        assert_eq!(socket.next().await.unwrap().unwrap(), Message::text(text));
    }
    let size = r#"{"type":"resize","cols":120,"rows":40}"#;
    socket.send(Message::text(size)).await.unwrap();
    socket.send(Message::text("end")).await.unwrap();
    assert_eq!(socket.next().await.unwrap().unwrap(), Message::text("end"));
    assert_eq!(*world.agent.seen.sizes.lock(), ["120x40"]);
    world.agent.until_running(1).await;
    // Whoever is revoked loses it, and is told.
    key.revoked_at = Some(world.now());
    world.add_key(key).await;
    let told = tokio::time::timeout(Duration::from_secs(10), socket.next())
        .await
        .unwrap();
    assert!(matches!(told, Some(Ok(Message::Text(_)))), "{told:?}");
    let closed = socket.next().await;
    let Some(Ok(Message::Close(Some(frame)))) = closed else {
        panic!("{closed:?}");
    };
    assert_eq!(frame.reason.as_str(), "unauthenticated");
    world.agent.until_running(0).await;
    drop(served);
}

#[tokio::test]
async fn other_methods_and_odd_bodies_are_refused_with_their_reason() {
    let world = world().await;
    let key = world.new_key(Some("acme"), Role::Operator).await;
    let (status, _) = call(&world, "DELETE", "/api/vm/list", &key, None).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    let mut request = build(
        "POST",
        "/api/vm/start",
        &key,
        Some(json!({"vm_name": "web"})),
    );
    request.headers_mut().remove("content-type");
    let refused = send(&world, request).await;
    assert_eq!(refused.status(), StatusCode::BAD_REQUEST);
    // Where a client of Batwa looks for what went wrong.
    assert!(value(refused).await["detail"].is_string());
}
