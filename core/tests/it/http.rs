//! Core over HTTP, and hosts behind it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, Response, StatusCode};
use futures::{SinkExt, StreamExt};
use ghost_core::application::audit::{FleetAudit, FleetAuditQuery};
use ghost_core::presentation::http;
use ghost_domain::Role;
use http_body::Body as _;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tower::ServiceExt;

use crate::world::World;

pub(crate) async fn send(world: &World, request: Request<Body>) -> Response<Body> {
    http::router(Arc::clone(&world.front))
        .oneshot(request)
        .await
        .unwrap()
}

pub(crate) fn build(method: &str, path: &str, key: &str, body: Option<Value>) -> Request<Body> {
    let mut request = Request::builder().method(method).uri(path);
    if !key.is_empty() {
        request = request.header("x-api-key", key);
    }
    match body {
        None => request.body(Body::empty()).unwrap(),
        Some(body) => request
            .header("content-type", "application/json")
            .body(Body::from(body.to_string()))
            .unwrap(),
    }
}

pub(crate) async fn call(
    world: &World,
    method: &str,
    path: &str,
    key: &str,
    body: Option<Value>,
) -> (StatusCode, Value) {
    let response = send(world, build(method, path, key, body)).await;
    let status = response.status();
    (status, value(response).await)
}

pub(crate) async fn value(response: Response<Body>) -> Value {
    let bytes = axum::body::to_bytes(response.into_body(), 1 << 24)
        .await
        .unwrap();
    serde_json::from_slice(&bytes).unwrap_or(Value::Null)
}

#[tokio::test]
async fn the_fleet_is_shown_and_changed_as_by_grpc() {
    let world = World::start().await;
    let root = world.new_key(None, Role::Admin).await;
    let (status, hosts) = call(&world, "GET", "/v1/hosts?state=online", &root, None).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(hosts[0]["name"], "pc");
    assert_eq!(hosts[0]["capacity"]["free"]["cpus"], 32);
    let (_, none) = call(&world, "GET", "/v1/hosts?labels=a%3Db", &root, None).await;
    assert_eq!(none, json!([]));
    let body = json!({"cordoned": true, "cordon_reason": "disk", "set_labels": {"zone": "eu"}});
    let (status, host) = call(&world, "PATCH", "/v1/hosts/acme%2Fpc", &root, Some(body)).await;
    assert_eq!(
        (status, &host["cordon_reason"]),
        (StatusCode::OK, &json!("disk")),
        "{host}"
    );
    let (status, made) = call(
        &world,
        "POST",
        "/v1/tenants",
        &root,
        Some(json!({"name": "new"})),
    )
    .await;
    assert_eq!(
        (status, &made["name"]),
        (StatusCode::CREATED, &json!("new"))
    );
    let body = json!({"tenant": "new", "name": "ci", "role": "viewer"});
    let (status, key) = call(&world, "POST", "/v1/keys", &root, Some(body)).await;
    assert_eq!(status, StatusCode::CREATED);
    let secret = key["secret"].as_str().unwrap().to_owned();
    let (_, who) = call(&world, "GET", "/v1/whoami", &secret, None).await;
    assert_eq!(
        (&who["name"], &who["server"]),
        (&json!("new/ci"), &json!("core"))
    );
    let id = key["key"]["id"].as_str().unwrap();
    let (status, _) = call(&world, "DELETE", &format!("/v1/keys/{id}"), &root, None).await;
    assert_eq!(status, StatusCode::OK);
    let (status, problem) = call(&world, "GET", "/v1/whoami", &secret, None).await;
    assert_eq!(
        (status, &problem["code"]),
        (StatusCode::UNAUTHORIZED, &json!("unauthenticated"))
    );
    let (status, token) = call(&world, "POST", "/v1/tokens", &root, None).await;
    assert_eq!(status, StatusCode::CREATED);
    assert!(
        token["token"]
            .as_str()
            .unwrap()
            .starts_with("ghost-host-v1.")
    );
    let (status, _) = call(&world, "DELETE", "/v1/tenants/new", &root, None).await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    let (_, audit) = call(&world, "GET", "/v1/audit", &root, None).await;
    assert_eq!(audit.as_array().unwrap().len(), 6, "{audit}");
}

#[tokio::test]
async fn a_command_is_queued_shown_and_taken_back() {
    let world = World::start().await;
    let key = world.new_key(Some("acme"), Role::Operator).await;
    let body = json!({"host": "pc", "action": {"start_vm": {"vm": "web"}}});
    let mut request = build("POST", "/v1/commands", &key, Some(body.clone()));
    request
        .headers_mut()
        .insert("idempotency-key", "r-1".parse().unwrap());
    let response = send(&world, request).await;
    assert_eq!(response.status(), StatusCode::ACCEPTED);
    let location = response.headers()["location"].to_str().unwrap().to_owned();
    let queued = value(response).await;
    assert_eq!(
        (&queued["kind"], &queued["status"]),
        (&json!("start_vm"), &json!("queued"))
    );
    assert_eq!(queued["issued_by"], "acme/acme-operator");
    let mut again = build("POST", "/v1/commands", &key, Some(body));
    again
        .headers_mut()
        .insert("idempotency-key", "r-1".parse().unwrap());
    assert_eq!(value(send(&world, again).await).await["id"], queued["id"]);

    let other = world.new_key(Some("other"), Role::Operator).await;
    let (status, _) = call(&world, "GET", &location, &other, None).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    let (_, listed) = call(&world, "GET", "/v1/commands", &other, None).await;
    assert_eq!(listed, json!([]));
    let (_, listed) = call(&world, "GET", "/v1/commands?host=pc", &key, None).await;
    assert_eq!(listed.as_array().unwrap().len(), 1);
    let (status, cancelled) = call(&world, "DELETE", &location, &key, None).await;
    assert_eq!(
        (status, &cancelled["status"]),
        (StatusCode::OK, &json!("cancelled"))
    );

    for (body, field) in [
        (
            json!({"host": "pc", "action": {"stop_vm": {"vm": "web", "forse": true}}}),
            "forse",
        ),
        (
            json!({"host": "pc", "action": {"reboot": {"vm": "web"}}}),
            "reboot",
        ),
        (json!({"host": "pc"}), "action"),
    ] {
        let (status, problem) = call(&world, "POST", "/v1/commands", &key, Some(body)).await;
        assert_eq!(status, StatusCode::BAD_REQUEST);
        assert!(
            problem["cause"].as_str().unwrap().contains(field),
            "{problem}"
        );
    }
}

#[tokio::test]
async fn everything_but_health_needs_a_key() {
    let world = World::start().await;
    let document = serde_json::to_value(http::openapi()).unwrap();
    let mut tried = 0;
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, route) in methods.as_object().unwrap() {
            let path = path.replace(['{', '}'], "");
            let body = (method != "get").then(|| {
                json!({"name": "x", "role": "viewer", "host": "pc",
                "action": {"start_vm": {"vm": "web"}}})
            });
            let open = route.get("security").is_none();
            let (status, _) = call(&world, &method.to_uppercase(), &path, "", body).await;
            // A body that a route does not take is refused before the door asks who it is.
            let refused = [StatusCode::UNAUTHORIZED, StatusCode::BAD_REQUEST];
            assert!(
                if open {
                    status == StatusCode::OK
                } else {
                    refused.contains(&status)
                },
                "{method} {path}: {status}"
            );
            tried += 1;
        }
    }
    assert!(tried > 25);
    let (status, _) = call(&world, "GET", "/v1/hosts/pc/vms", "", None).await;
    assert_eq!(status, StatusCode::UNAUTHORIZED);
    let (status, _) = call(&world, "POST", "/v1/vms", "", Some(json!({"image": "x"}))).await;
    assert_eq!(status, StatusCode::UNAUTHORIZED);
    assert!(world.agent.seen.calls.lock().is_empty());
}

#[tokio::test]
async fn a_hosts_own_api_is_reached_with_what_core_vouches_for() {
    let world = World::start().await;
    let key = world.new_key(Some("acme"), Role::Operator).await;
    let mut request = build("GET", "/v1/hosts/pc/vms?tags=a%3Db", &key, None);
    let headers = request.headers_mut();
    headers.insert("ghost-role", "admin".parse().unwrap());
    headers.insert("ghost-principal", "root".parse().unwrap());
    headers.insert("cookie", "a=b".parse().unwrap());
    let response = send(&world, request).await;
    assert_eq!(response.status(), StatusCode::OK);
    let told = value(response).await;
    assert_eq!(told["uri"], "/v1/vms?tags=a%3Db");
    assert_eq!(told["principal"], "acme/acme-operator");
    let names = told["headers"].as_array().unwrap();
    for secret in ["x-api-key", "authorization", "cookie"] {
        assert!(!names.contains(&json!(secret)), "{names:?}");
    }
    for (path, by, code) in [
        ("/v1/hosts/pc/nothing", &key, "not_found"),
        ("/v1/hosts/none/vms", &key, "host_not_found"),
        // Nobody's role would help.
        ("/v1/hosts/pc/audit", &key, "core_permission_denied"),
        (
            "/v1/hosts/pc/vms",
            &world.new_key(Some("other"), Role::Admin).await,
            "host_not_found",
        ),
    ] {
        let (_, problem) = call(&world, "GET", path, by, None).await;
        assert_eq!(problem["code"], code, "{path}");
    }
    let admin = world.new_key(Some("acme"), Role::Admin).await;
    let (status, problem) = call(&world, "GET", "/v1/hosts/pc/audit", &admin, None).await;
    assert_eq!(
        (status, &problem["code"]),
        (StatusCode::FORBIDDEN, &json!("core_permission_denied"))
    );
    let viewer = world.new_key(Some("acme"), Role::Viewer).await;
    let path = "/v1/hosts/pc/vms/web/start";
    let (status, _) = call(&world, "POST", path, &viewer, None).await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    let (status, _) = call(&world, "POST", path, &key, None).await;
    assert_eq!(status, StatusCode::OK);
    let query = FleetAuditQuery {
        limit: 100,
        ..FleetAuditQuery::default()
    };
    let lines: Vec<_> = world.audit.list(query).await.unwrap();
    let start: Vec<_> = lines
        .iter()
        .filter(|line| line.record.action == "POST /v1/vms/{vm}/start")
        .map(|line| (line.record.subject.as_str(), line.record.outcome.as_str()))
        .collect();
    assert_eq!(start, [("web", "permission_denied"), ("web", "ok")]);

    world.links.0.lock().remove(&world.host);
    let (status, problem) = call(&world, "POST", path, &key, None).await;
    assert_eq!(
        (status, &problem["code"]),
        (StatusCode::SERVICE_UNAVAILABLE, &json!("host_offline"))
    );
}

#[tokio::test]
async fn a_vm_is_placed_by_http_too_within_the_quota() {
    let world = World::start().await;
    let quota = ghost_core::domain::Quota {
        vms: Some(1),
        ..Default::default()
    };
    world.add_tenant("acme", quota, Default::default()).await;
    let key = world.new_key(Some("acme"), Role::Operator).await;
    let vm = json!({"name": "web", "image": "debian-12"});
    let mut request = build("POST", "/v1/vms", &key, Some(vm.clone()));
    request
        .headers_mut()
        .insert("idempotency-key", "r-1".parse().unwrap());
    let response = send(&world, request).await;
    assert_eq!(response.status(), StatusCode::ACCEPTED);
    assert_eq!(response.headers()["ghost-host"], "pc");
    assert_eq!(response.headers().get_all("ghost-host").iter().count(), 1);
    let location = format!("/v1/hosts/{}/operations/abc", world.host);
    assert_eq!(response.headers()["location"], location.as_str());
    let told = value(response).await;
    assert_eq!(told["body"].as_str().unwrap(), vm.to_string());
    for path in ["/v1/vms", "/v1/hosts/pc/vms"] {
        let (status, problem) = call(&world, "POST", path, &key, Some(vm.clone())).await;
        assert_eq!(problem["code"], "quota_exceeded", "{path} {status}");
    }
    assert_eq!(world.agent.seen.made_by_http.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn events_flow_until_their_reader_leaves_or_is_revoked() {
    let world = World::start().await;
    let (mut key, secret) = world.key(Some("acme"), Role::Viewer);
    world.add_key(key.clone()).await;
    let open = || async {
        let request = build("GET", "/v1/hosts/pc/events", secret.expose(), None);
        let mut body = send(&world, request).await.into_body();
        let frame = std::future::poll_fn(|cx| std::pin::Pin::new(&mut body).poll_frame(cx)).await;
        assert_eq!(
            frame.unwrap().unwrap().into_data().unwrap(),
            "data: one\n\n"
        );
        body
    };
    let body = open().await;
    world.agent.until_running(1).await;
    drop(body);
    world.agent.until_running(0).await;
    let mut body = open().await;
    key.revoked_at = Some(world.now());
    world.add_key(key).await;
    let frame = std::future::poll_fn(|cx| std::pin::Pin::new(&mut body).poll_frame(cx));
    let ended = tokio::time::timeout(Duration::from_secs(10), frame)
        .await
        .unwrap();
    assert!(ended.unwrap().is_err());
    drop(body);
    world.agent.until_running(0).await;
}

#[tokio::test]
async fn a_terminal_goes_through_a_websocket_with_the_key_of_a_page() {
    let world = World::start().await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = http::router(Arc::clone(&world.front));
    let served = tokio::spawn(async move { axum::serve(listener, router).await });
    let served = tokio_util::task::AbortOnDropHandle::new(served);
    let (mut key, secret) = world.key(Some("acme"), Role::Operator);
    world.add_key(key.clone()).await;

    let url = format!("ws://{address}/v1/hosts/pc/vms/web/shell");
    let stream = || async { tokio::net::TcpStream::connect(address).await.unwrap() };
    let request = url.as_str().into_client_request().unwrap();
    let refused = tokio_tungstenite::client_async(request, stream().await).await;
    let tokio_tungstenite::tungstenite::Error::Http(response) = refused.unwrap_err() else {
        panic!("it was no answer");
    };
    assert_eq!(response.status(), 401);

    let mut request = url.as_str().into_client_request().unwrap();
    let offered = format!("ghost.v1, bearer.{}", secret.expose());
    request
        .headers_mut()
        .insert("sec-websocket-protocol", offered.parse().unwrap());
    let (mut socket, response) = tokio_tungstenite::client_async(request, stream().await)
        .await
        .unwrap();
    assert_eq!(response.headers()["sec-websocket-protocol"], "ghost.v1");
    let hello = socket.next().await.unwrap().unwrap();
    assert_eq!(hello.into_text().unwrap().as_str(), "acme/acme-operator");
    for number in 0..20u8 {
        let sent = Message::binary(vec![number; 1000]);
        socket.send(sent.clone()).await.unwrap();
        assert_eq!(socket.next().await.unwrap().unwrap(), sent);
    }
    world.agent.until_running(1).await;
    // Whoever is revoked loses it.
    key.revoked_at = Some(world.now());
    world.add_key(key).await;
    let ended = tokio::time::timeout(Duration::from_secs(10), socket.next())
        .await
        .unwrap();
    assert!(!matches!(ended, Some(Ok(_))), "{ended:?}");
    world.agent.until_running(0).await;
    drop(served);
}
