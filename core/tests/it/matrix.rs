//! Every RPC, every route and every WebSocket against everybody: whom the door lets in, and what those
//! who are kept out learn. The rows are the tables of methods and routes, which tests hold to the
//! descriptors (`methods.rs`) and to the OpenAPI documents (`routes.rs` of the agent, and here), so that
//! nothing is served without a row. The routes of Batwa are in `batwa.rs`.

use std::collections::BTreeSet;

use axum::http::Request;
use ghost_core::domain::{Record, RecordKey};
use ghost_core::presentation::Peer;
use ghost_core::presentation::grpc::methods::{CORE_METHODS, CoreAccess, CoreMethod, core_method};
use ghost_core::presentation::http;
use ghost_domain::Role;
use ghost_presentation::grpc::access::METHODS;
use ghost_presentation::http::routes::ROUTES;
use ghost_presentation::{Access, CoreReach};
use serde_json::{Value, json};
use tonic::Status;
use tonic::body::Body;

use crate::http::{build, send, value};
use crate::world::{World, nobody, reason, request, root};

/// Somebody who calls.
struct Who {
    name: &'static str,
    peer: Peer,
    key: Option<String>,
    /// Of the tenant that has the host: its role. `None`: nobody at all.
    role: Option<Role>,
    /// Whether the host exists for them.
    sees_host: bool,
    /// Whether they administer the fleet.
    fleet: bool,
}

async fn everybody(world: &World) -> Vec<Who> {
    let other_host = world.add_host("acme", "other-pc").await;
    let mut all = Vec::new();
    let mut add = |name, key: Option<String>, role, sees_host| {
        all.push(Who {
            name,
            peer: nobody(),
            key,
            role,
            sees_host,
            fleet: false,
        });
    };
    add("no identity", None, None, false);
    for (name, role) in [
        ("viewer", Role::Viewer),
        ("operator", Role::Operator),
        ("admin", Role::Admin),
    ] {
        let key = world.new_key(Some("acme"), role).await;
        add(name, Some(key), Some(role), true);
    }
    let key = world.new_key(Some("other"), Role::Admin).await;
    add(
        "admin of another tenant",
        Some(key),
        Some(Role::Admin),
        false,
    );

    let (mut scoped, secret) = world.key(Some("acme"), Role::Admin);
    scoped.hosts = Some(BTreeSet::from([other_host]));
    world.add_key(scoped).await;
    add(
        "key for another host",
        Some(secret.expose().into()),
        Some(Role::Admin),
        false,
    );

    let (mut expired, secret) = world.key(Some("acme"), Role::Admin);
    expired.expires_at = world.now();
    world.add_key(expired).await;
    add("expired key", Some(secret.expose().into()), None, false);

    let (mut revoked, secret) = world.key(Some("acme"), Role::Admin);
    revoked.revoked_at = Some(world.now());
    world.add_key(revoked).await;
    add("revoked key", Some(secret.expose().into()), None, false);

    let (_, unknown) = world.key(Some("acme"), Role::Admin);
    add(
        "key that was never made",
        Some(unknown.expose().into()),
        None,
        false,
    );

    let user = world.add_user(Some("acme"), "alice", Role::Operator).await;
    let identity = ghost_core::domain::PeerIdentity::User(user.id);
    all.push(Who {
        name: "operator by certificate",
        peer: world.certified(identity.clone()),
        key: None,
        role: Some(Role::Operator),
        sees_host: true,
        fleet: false,
    });
    let mut ended = world.certified(identity);
    if let ghost_core::presentation::PeerKind::Certified { expires_at, .. } = &mut ended.kind {
        *expires_at = world.now();
    }
    all.push(Who {
        name: "certificate that ended",
        peer: ended,
        key: None,
        role: None,
        sees_host: false,
        fleet: false,
    });
    let mut gone = world.add_user(Some("acme"), "bob", Role::Admin).await;
    gone.revoked_at = Some(world.now());
    let peer = world.certified(ghost_core::domain::PeerIdentity::User(gone.id));
    world
        .put(RecordKey::User(gone.id), Record::User(gone))
        .await;
    all.push(Who {
        name: "revoked user",
        peer,
        key: None,
        role: None,
        sees_host: false,
        fleet: false,
    });
    all.push(Who {
        name: "a host",
        peer: world.certified(ghost_core::domain::PeerIdentity::Host {
            tenant: crate::world::tenant("acme"),
            host: world.host,
            generation: 1,
            key_hash: [0; 32],
        }),
        key: None,
        role: None,
        sees_host: false,
        fleet: false,
    });
    all.push(Who {
        name: "administrator of the fleet by key",
        peer: nobody(),
        key: Some(world.new_key(None, Role::Admin).await),
        role: Some(Role::Admin),
        sees_host: true,
        fleet: true,
    });
    all.push(Who {
        name: "root on Core's machine",
        peer: root(),
        key: None,
        role: Some(Role::Admin),
        sees_host: true,
        fleet: true,
    });
    all
}

/// Why the door keeps somebody out; `None`: it does not. A refusal is all of the answer, so that it
/// stands in its head.
async fn refusal(world: &World, who: &Who, path: &str, host: Option<&str>) -> Option<String> {
    let mut request: Request<Body> = request(path, &[], &());
    if let Some(key) = &who.key {
        request
            .headers_mut()
            .insert("authorization", format!("Bearer {key}").parse().unwrap());
    }
    if let Some(host) = host {
        request
            .headers_mut()
            .insert("ghost-host", host.parse().unwrap());
    }
    let response = world.front.call(&who.peer, request).await;
    let status = Status::from_header_map(response.headers())?;
    let reason = reason(&status);
    REFUSALS.contains(&reason.as_str()).then_some(reason)
}

/// What the door says to those whom it keeps out.
const REFUSALS: [&str; 4] = [
    "unauthenticated",
    "permission_denied",
    "core_permission_denied",
    "host_not_found",
];

/// What a call to a host is refused with.
fn refused_of_a_host(who: &Who, access: Access, reach: CoreReach) -> Option<&'static str> {
    match (who.role, access) {
        (None, _) => Some("unauthenticated"),
        _ if !who.sees_host => Some("host_not_found"),
        // Whatever the role: a higher one would not help.
        _ if reach == CoreReach::Never => Some("core_permission_denied"),
        (Some(role), Access::Role(needed)) if role < needed => Some("permission_denied"),
        (Some(Role::Viewer), Access::Guests) => Some("permission_denied"),
        _ => None,
    }
}

/// What a call to Core is refused with.
fn refused_of_core(who: &Who, method: &CoreMethod) -> Option<&'static str> {
    match (method.access, who.role) {
        (CoreAccess::Anyone, _) => None,
        (CoreAccess::Host, _) if who.name == "a host" => None,
        (CoreAccess::Host | CoreAccess::Replica, _) | (_, None) => Some("unauthenticated"),
        (CoreAccess::Role(needed), Some(role)) if role < needed => Some("permission_denied"),
        // Only a certificate is renewed.
        (_, Some(_)) if method.path.ends_with("AccessService/Renew") => {
            (who.name != "operator by certificate").then_some("permission_denied")
        }
        (CoreAccess::FleetAdmin, Some(_)) if !who.fleet => Some("permission_denied"),
        // A key that is bound to hosts changes nothing that is about more than hosts.
        (_, Some(_)) if who.name == "key for another host" && method.audited => {
            let about_hosts = ["UpdateHost", "RemoveHost", "QueueCommand", "CancelCommand"];
            let verb = method.path.rsplit('/').next().unwrap();
            (!about_hosts.contains(&verb)).then_some("permission_denied")
        }
        (_, Some(_)) => None,
    }
}

#[tokio::test]
async fn every_call_to_a_host_against_everybody() {
    let world = World::start().await;
    let everybody = everybody(&world).await;
    let mut reached = 0;
    for method in METHODS {
        if !method.path.starts_with("/ghost.agent.v1.") || method.path.contains("AccessService") {
            continue;
        }
        for who in &everybody {
            let host = if who.fleet { "acme/pc" } else { "pc" };
            let expected = refused_of_a_host(who, method.access, method.core);
            let refused = refusal(&world, who, method.path, Some(host)).await;
            assert_eq!(
                refused.as_deref(),
                expected,
                "{} by {}",
                method.path,
                who.name
            );
            reached += usize::from(refused.is_none());
        }
    }
    assert!(reached > 100, "{reached}");
    assert!(!world.agent.seen.calls.lock().is_empty());
}

#[tokio::test]
async fn every_call_to_core_against_everybody() {
    let world = World::start().await;
    let everybody = everybody(&world).await;
    for method in CORE_METHODS {
        // Core needs no host, and a host changes nothing about who may.
        for who in &everybody {
            let expected = refused_of_core(who, method);
            let refused = refusal(&world, who, method.path, None).await;
            // Of hosts that are not named there is none, for whoever may ask.
            let refused = refused.filter(|reason| {
                reason != "host_not_found"
                    && !(method.path.ends_with("/Enroll") || method.path.ends_with("/Recover"))
            });
            assert_eq!(
                refused.as_deref(),
                expected,
                "{} by {}",
                method.path,
                who.name
            );
        }
    }
}

#[tokio::test]
async fn nobody_manages_the_credentials_of_a_host_through_core() {
    let world = World::start().await;
    let key = world.new_key(Some("acme"), Role::Admin).await;
    let who = Who {
        name: "admin",
        peer: nobody(),
        key: Some(key),
        role: Some(Role::Admin),
        sees_host: true,
        fleet: false,
    };
    for method in METHODS {
        let Some(verb) = method.path.strip_prefix("/ghost.agent.v1.AccessService/") else {
            continue;
        };
        let refused = refusal(&world, &who, method.path, Some("pc")).await;
        // A program renews its own certificate, and asks who it is, at Core, wherever it works.
        let ours = matches!(verb, "Enroll" | "Renew" | "WhoAmI");
        if !ours {
            assert_eq!(refused.as_deref(), Some("core_permission_denied"), "{verb}");
        }
    }
    assert!(world.agent.seen.calls.lock().is_empty());
}

#[tokio::test]
async fn calls_that_nobody_serves_tell_strangers_nothing() {
    let world = World::start().await;
    let paths = [
        "/ghost.core.v1.FleetService/Nothing",
        "/",
        "/ghost.agent.v1.VmService",
    ];
    for path in paths {
        let answer = world.call(&nobody(), path, &[], &()).await;
        assert_eq!(answer.reason(), "unauthenticated", "{path}");
        let answer = world.call(&root(), path, &[], &()).await;
        assert_eq!(answer.reason(), "not_found", "{path}");
    }
}

/// The routes of Core's own HTTP, and the call that each of them makes.
const HTTP_ROUTES: &[(&str, &str, &str)] = &[
    ("GET", "/health", "/grpc.health.v1.Health/Check"),
    ("GET", "/live", "/grpc.health.v1.Health/Check"),
    ("GET", "/ready", "/grpc.health.v1.Health/Check"),
    (
        "GET",
        "/v1/openapi.json",
        "/ghost.agent.v1.AccessService/WhoAmI",
    ),
    ("GET", "/v1/whoami", "/ghost.agent.v1.AccessService/WhoAmI"),
    ("GET", "/v1/status", "/ghost.core.v1.FleetService/GetStatus"),
    ("GET", "/v1/hosts", "/ghost.core.v1.FleetService/ListHosts"),
    (
        "GET",
        "/v1/hosts/{host}",
        "/ghost.core.v1.FleetService/GetHost",
    ),
    (
        "PATCH",
        "/v1/hosts/{host}",
        "/ghost.core.v1.FleetService/UpdateHost",
    ),
    (
        "DELETE",
        "/v1/hosts/{host}",
        "/ghost.core.v1.FleetService/RemoveHost",
    ),
    ("GET", "/v1/vms", "/ghost.core.v1.FleetService/ListVms"),
    ("POST", "/v1/vms", "/ghost.agent.v1.VmService/Create"),
    ("GET", "/v1/events", "/ghost.agent.v1.EventService/Watch"),
    ("POST", "/v1/placement", "/ghost.core.v1.FleetService/Place"),
    (
        "GET",
        "/v1/commands",
        "/ghost.core.v1.FleetService/ListCommands",
    ),
    (
        "POST",
        "/v1/commands",
        "/ghost.core.v1.FleetService/QueueCommand",
    ),
    (
        "GET",
        "/v1/commands/{id}",
        "/ghost.core.v1.FleetService/GetCommand",
    ),
    (
        "DELETE",
        "/v1/commands/{id}",
        "/ghost.core.v1.FleetService/CancelCommand",
    ),
    (
        "POST",
        "/v1/tokens",
        "/ghost.core.v1.FleetService/CreateToken",
    ),
    (
        "GET",
        "/v1/tenants",
        "/ghost.core.v1.FleetService/ListTenants",
    ),
    (
        "POST",
        "/v1/tenants",
        "/ghost.core.v1.FleetService/CreateTenant",
    ),
    (
        "PATCH",
        "/v1/tenants/{tenant}",
        "/ghost.core.v1.FleetService/UpdateTenant",
    ),
    (
        "DELETE",
        "/v1/tenants/{tenant}",
        "/ghost.core.v1.FleetService/DeleteTenant",
    ),
    ("GET", "/v1/users", "/ghost.core.v1.FleetService/ListUsers"),
    (
        "PATCH",
        "/v1/users/{user}",
        "/ghost.core.v1.FleetService/UpdateUser",
    ),
    (
        "DELETE",
        "/v1/users/{user}",
        "/ghost.core.v1.FleetService/RevokeUser",
    ),
    ("GET", "/v1/keys", "/ghost.core.v1.FleetService/ListKeys"),
    ("POST", "/v1/keys", "/ghost.core.v1.FleetService/CreateKey"),
    (
        "DELETE",
        "/v1/keys/{id}",
        "/ghost.core.v1.FleetService/RevokeKey",
    ),
    ("GET", "/v1/audit", "/ghost.core.v1.FleetService/ListAudit"),
];

/// Those who can call by HTTP at all: it knows keys alone.
fn by_http(everybody: Vec<Who>) -> Vec<Who> {
    let mut all = everybody;
    all.retain(|who| who.key.is_some() || who.name == "no identity");
    assert!(all.len() >= 9);
    all
}

/// Why a request is refused; `None`: it is not. With `upgrade` it is one for a WebSocket, as a page
/// makes it, the key among the subprotocols.
async fn refusal_by_http(
    world: &World,
    who: &Who,
    (method, path): (&str, &str),
    body: Option<Value>,
    upgrade: bool,
) -> Option<String> {
    let key = who.key.as_deref().unwrap_or_default();
    let mut request = build(method, path, if upgrade { "" } else { key }, body);
    if upgrade {
        let offered = match key {
            "" => "ghost.v1".to_owned(),
            key => format!("ghost.v1, bearer.{key}"),
        };
        for (name, value) in [
            ("connection", "upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
            ("sec-websocket-protocol", offered.as_str()),
        ] {
            request.headers_mut().insert(name, value.parse().unwrap());
        }
    }
    let response = send(world, request).await;
    let status = response.status();
    if status.is_success() || status.is_informational() {
        // Streams have no end to read to.
        return None;
    }
    let problem = value(response).await;
    // What the door says has a code; without one it is the host's agent that answered.
    let code = problem["code"].as_str()?;
    let wanted = match code {
        "unauthenticated" => 401,
        "permission_denied" | "core_permission_denied" => 403,
        "host_not_found" => 404,
        _ => status.as_u16(),
    };
    assert_eq!(status.as_u16(), wanted, "{method} {path} by {}", who.name);
    REFUSALS.contains(&code).then(|| code.to_owned())
}

#[tokio::test]
async fn every_route_of_core_against_everybody() {
    let world = World::start().await;
    let document = serde_json::to_value(http::openapi()).unwrap();
    let served: BTreeSet<_> = document["paths"]
        .as_object()
        .unwrap()
        .iter()
        .flat_map(|(path, methods)| {
            let methods = methods.as_object().unwrap();
            methods
                .keys()
                .map(|method| (method.to_uppercase(), path.clone()))
        })
        .collect();
    let rows = HTTP_ROUTES.iter();
    let rows: BTreeSet<_> = rows
        .map(|(method, path, _)| ((*method).to_owned(), (*path).to_owned()))
        .collect();
    assert_eq!(rows, served, "each route has a row");
    let everybody = by_http(everybody(&world).await);
    let id = uuid::Uuid::new_v4().to_string();
    let mut reached = 0;
    for (method, path, rpc) in HTTP_ROUTES {
        let body = match (*method, *path) {
            ("POST", "/v1/commands") => {
                Some(json!({"host": "none", "action": {"start_vm": {"vm": "web"}}}))
            }
            ("POST", "/v1/vms") => Some(json!({"name": "web", "image": "tiny"})),
            ("POST", "/v1/tenants") => Some(json!({"name": "fresh"})),
            ("POST", "/v1/keys") => Some(json!({"name": "fresh", "role": "viewer"})),
            ("PATCH", _) => Some(json!({})),
            _ => None,
        };
        // What is named is not there: what is asked for is the door.
        let path = path
            .replace("{host}", "none")
            .replace("{tenant}", "none")
            .replace("{id}", &id)
            .replace("{user}", &id);
        for who in &everybody {
            let expected = match core_method(rpc) {
                Some(method) => refused_of_core(who, method),
                // Core finds a host for it.
                None => match who.role {
                    None => Some("unauthenticated"),
                    Some(role) => (role < Role::Operator).then_some("permission_denied"),
                },
            };
            let refused = refusal_by_http(&world, who, (method, &path), body.clone(), false).await;
            // Of hosts that are not there there is none, for whoever may ask.
            let refused = refused.filter(|reason| reason != "host_not_found");
            assert_eq!(
                refused.as_deref(),
                expected,
                "{method} {path} by {}",
                who.name
            );
            reached += usize::from(refused.is_none());
        }
    }
    assert!(reached > 100, "{reached}");
}

#[tokio::test]
async fn every_route_and_websocket_of_a_host_against_everybody() {
    let world = World::start().await;
    let everybody = by_http(everybody(&world).await);
    let (mut reached, mut sockets) = (0, 0);
    for route in ROUTES.iter().filter(|route| route.path.starts_with("/v1/")) {
        let path = route
            .path
            .replace("{vm}", "web")
            .replace("{name}", "tiny")
            .replace("{id}", "0");
        let is_socket = route.method == "GET" && route.access == Access::Guests;
        for who in &everybody {
            let host = if who.fleet { "acme%2Fpc" } else { "pc" };
            let path = path.replace("/v1/", &format!("/v1/hosts/{host}/"));
            let expected = refused_of_a_host(who, route.access, route.core);
            for upgrade in [false, true] {
                if upgrade && !is_socket {
                    continue;
                }
                let asked = (route.method, path.as_str());
                let refused = refusal_by_http(&world, who, asked, None, upgrade).await;
                let what = format!(
                    "{} {path} by {}, WebSocket: {upgrade}",
                    route.method, who.name
                );
                assert_eq!(refused.as_deref(), expected, "{what}");
                reached += usize::from(refused.is_none());
                sockets += usize::from(upgrade && refused.is_none());
            }
        }
    }
    assert!(
        reached > 80 && sockets >= 4,
        "{reached}, {sockets} WebSockets"
    );
}
