//! The routes of Batwa on an agent: what its clients send, and what they read.

use std::sync::atomic::Ordering;

use futures::{SinkExt, StreamExt};
use serde_json::json;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;

use super::session::{Served, next, served, status};
use super::*;

fn named(name: &str) -> Options {
    Options {
        agent: ghost_presentation::convert::AgentInfo {
            name: name.into(),
            version: "1.2.3".into(),
        },
        batwa: true,
        ..Options::default()
    }
}

async fn here() -> Shell {
    Shell::of(World::running().await, named("pc")).await
}

#[tokio::test]
async fn nothing_of_it_is_there_unless_it_is_configured() {
    let shell = Shell::running().await;
    for (method, path) in [
        ("GET", "/api/vm/list"),
        ("GET", "/ws?vm_name=web"),
        ("POST", "/api/execute"),
    ] {
        let answer = shell.ask(method, path, &[], "").await;
        assert_eq!(
            (answer.status, answer.code()),
            (StatusCode::NOT_FOUND, "not_found".to_owned()),
            "{path}"
        );
    }
    let document = async |shell: &Shell| {
        let answer = shell.ask("GET", "/v1/openapi.json", &[], "").await;
        answer.json()["paths"]["/api/vm/list"].clone()
    };
    assert!(document(&shell).await.is_null());
    assert!(document(&here().await).await.is_object());
}

#[tokio::test]
async fn vms_are_shown_with_their_host() {
    let shell = here().await;
    let get = async |path: &str| shell.ask("GET", path, &[], "").await;
    let listed = get("/api/vm/list").await.json();
    let vm = &listed["vms"][0];
    assert_eq!(listed["vms"].as_array().unwrap().len(), 1);
    for (key, value) in [
        ("name", json!("web")),
        ("state", json!("Running")),
        ("release", json!("tiny")),
        ("cpus", json!(1)),
        ("memory_bytes", json!(256 << 20)),
        ("hostname", json!("pc")),
        ("agent_id", json!("pc")),
        ("id", json!(shell.world.vm.to_string())),
    ] {
        assert_eq!(vm[key], value, "{key}");
    }
    assert_eq!(get("/api/vm/info/web").await.json(), *vm);
    assert_eq!(get("/api/vm/info/web?agent_id=pc").await.json(), *vm);
    for (path, code) in [
        ("/api/vm/info/none", "vm_not_found"),
        ("/api/vm/info/web?agent_id=other", "host_not_found"),
        ("/api/vm/list?agent_id=other", "host_not_found"),
    ] {
        let answer = get(path).await;
        assert_eq!(answer.status, StatusCode::NOT_FOUND, "{path}");
        // Where a client of Batwa looks for what went wrong.
        assert!(answer.json()["detail"].is_string());
        assert_eq!(answer.code(), code, "{path}");
    }
    let agents = get("/api/agent/list").await.json();
    assert_eq!(agents["agents"][0]["agent_id"], "pc");
    assert_eq!(agents["agents"][0]["status"], "online");
    assert_eq!(agents["agents"][0]["vm_count"], 1);
    assert!(agents["agents"][0]["api_url"].is_null());
}

#[tokio::test]
async fn a_registration_acknowledges_and_enrols_nobody() {
    let shell = here().await;
    let register = async |agent: &str| {
        let body = json!({"agent_id": agent, "hostname": "x", "api_key": "hush",
            "api_url": "http://192.0.2.1:8001"});
        let path = "/api/agent/register";
        shell.ask("POST", path, &[], &body.to_string()).await
    };
    let known = register("pc").await;
    assert_eq!(known.status, StatusCode::OK);
    assert_eq!(known.json()["success"], true);
    let refused = register("laptop").await;
    assert_eq!(refused.code(), "not_enrolled");
    let hint = refused.json()["hint"].as_str().unwrap().to_owned();
    assert!(hint.contains("ghost-agent enroll"), "{hint}");
    let agents = shell.ask("GET", "/api/agent/list", &[], "").await.json();
    assert_eq!(agents["agents"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn an_agent_tells_of_itself_and_leaves_its_fleet_by_nobodys_key() {
    let shell = here().await;
    let get = async |path: &str| shell.ask("GET", path, &[], "").await;
    let listed = get("/api/agent/list").await.json();
    let name = listed["agents"][0]["agent_id"].as_str().unwrap().to_owned();
    let info = get(&format!("/api/agent/info/{name}")).await;
    assert_eq!(
        (info.status, &info.json()),
        (StatusCode::OK, &listed["agents"][0])
    );
    let elsewhere = get("/api/agent/info/elsewhere").await;
    assert_eq!(elsewhere.status, StatusCode::NOT_FOUND);
    let body = format!(r#"{{"agent_id": "{name}", "status": "offline", "vm_count": 0}}"#);
    let beat = shell.ask("POST", "/api/agent/heartbeat", &[], &body).await;
    assert_eq!(
        (beat.status, &beat.json()["status"]),
        (StatusCode::OK, &"online".into())
    );
    let path = format!("/api/agent/unregister/{name}?force=true");
    let refused = shell.ask("DELETE", &path, &[], "").await;
    assert_eq!(refused.status, StatusCode::FORBIDDEN, "an operator");
    let admin = shell.world.key(Role::Admin).await;
    let request = Request::delete(&path).header("x-api-key", admin);
    let refused = shell.send(request.body(Body::empty()).unwrap()).await;
    assert_eq!(refused.status, StatusCode::CONFLICT);
    let problem = refused.json();
    assert_eq!(problem["code"], "wrong_state");
    assert!(
        problem["hint"]
            .as_str()
            .unwrap()
            .contains("ghost-agent unenroll")
    );
}

#[tokio::test]
async fn vms_are_made_started_stopped_and_deleted() {
    let shell = here().await;
    let post = async |path: &str, body: serde_json::Value| {
        shell.ask("POST", path, &[], &body.to_string()).await
    };
    let made = post(
        "/api/vm/create",
        json!({"name": "db", "image": "tiny", "cpus": 1, "memory": "256M", "disk": "1G"}),
    )
    .await;
    // An operation that fails while it is waited for is told as what it failed of.
    assert_eq!(
        (made.status, made.code()),
        (StatusCode::NOT_FOUND, "image_not_found".into())
    );
    let made = made.json();
    let id = made["operation_id"].as_str().unwrap();
    let operation = shell
        .ask("GET", &format!("/v1/operations/{id}"), &[], "")
        .await;
    let operation = operation.json();
    assert_eq!(
        (
            &operation["kind"],
            &operation["subject"],
            &operation["status"]
        ),
        (&json!("create_vm"), &json!("db"), &json!("failed"))
    );

    // What is done within ten seconds is told as done.
    let stopped = post("/api/vm/stop", json!({"vm_name": "web", "force": true})).await;
    assert_eq!(
        (stopped.status, &stopped.json()["status"]),
        (StatusCode::OK, &json!("succeeded"))
    );
    let started = post("/api/vm/start", json!({"vm_name": "web", "agent_id": "pc"})).await;
    assert_eq!(started.status, StatusCode::OK, "{:?}", started.json());
    let refused = post("/api/vm/delete", json!({"vm_name": "web"})).await;
    assert_eq!(
        (refused.status, refused.code()),
        (StatusCode::CONFLICT, "vm_running".into())
    );
    let deleted = post("/api/vm/delete", json!({"vm_name": "web", "force": true})).await;
    assert_eq!(deleted.status, StatusCode::OK, "{:?}", deleted.json());
    for (path, body, code) in [
        ("/api/vm/start", json!({"vm_name": "none"}), "vm_not_found"),
        ("/api/vm/start", json!({"vm_name": ""}), "invalid_argument"),
        ("/api/vm/start", json!({"vm": "web"}), "invalid_argument"),
        (
            "/api/vm/start",
            json!({"vm_name": "db", "agent_id": "other"}),
            "host_not_found",
        ),
        (
            "/api/vm/create",
            json!({"name": "a", "image": "tiny", "memory": "much"}),
            "invalid_size",
        ),
    ] {
        assert_eq!(post(path, body.clone()).await.code(), code, "{path} {body}");
    }
}

#[tokio::test]
async fn programs_are_run_in_guests_and_written_down() {
    let shell = here().await;
    let run = async |body: serde_json::Value| {
        shell
            .ask("POST", "/api/execute", &[], &body.to_string())
            .await
    };
    let done = run(json!({"vm_name": "web", "command": "uname -a"}))
        .await
        .json();
    assert_eq!(
        done,
        json!({"success": false, "returncode": 3, "stdout": "Linux web 6.1\n",
            "stderr": "oops\n", "timed_out": false, "truncated": false})
    );
    let done = run(json!({"command": ["exec", "web", "--", "true"], "timeout": 5})).await;
    assert_eq!(done.json()["success"], true);
    let refused = run(json!({"command": ["shell", "web"]})).await;
    assert_eq!(refused.code(), "invalid_argument");
    let actions = shell.world.audit_actions();
    assert!(
        actions.iter().any(|line| line.starts_with("exec")),
        "{actions:?}"
    );
    assert_eq!(shell.world.knobs.guest.ran.lock().unwrap().len(), 2);
    // Where guest access is off, this is no way round.
    let closed = Shell::of(World::closed().await, named("pc")).await;
    let body = json!({"vm_name": "web", "command": "id"}).to_string();
    let refused = closed.ask("POST", "/api/execute", &[], &body).await;
    assert_eq!(
        (refused.status, refused.code()),
        (StatusCode::FORBIDDEN, "guest_access_off".into())
    );
    assert!(closed.world.knobs.guest.ran.lock().unwrap().is_empty());
}

async fn close(served: &Served, headers: &[(&str, &str)]) -> (u16, String) {
    let refused = served.connect("/ws?vm_name=web", headers).await;
    status(refused.map(|_| ()).unwrap_err())
}

#[tokio::test]
async fn a_terminal_is_text_both_ways_and_needs_the_key() {
    let served = served().await;
    let viewer = served.shell.world.key(Role::Viewer).await;
    let confined = served.shell.world.key_with(Role::Operator, false).await;
    assert_eq!(close(&served, &[]).await, (403, "unauthenticated".into()));
    for key in ["nonsense", crate::world::unknown_key().expose()] {
        let refused = close(&served, &[("x-api-key", key)]).await;
        assert_eq!(refused, (403, "unauthenticated".into()));
    }
    for key in [&viewer, &confined] {
        let refused = close(&served, &[("x-api-key", key)]).await;
        assert_eq!(refused, (403, "permission_denied".into()));
    }
    let key = served.shell.key.clone();
    let in_address = format!("/ws?vm_name=web&api_key={key}");
    assert_eq!(
        status(
            served
                .connect(&in_address, &[])
                .await
                .map(|_| ())
                .unwrap_err()
        )
        .0,
        403
    );
    let evil = [
        ("x-api-key", key.as_str()),
        ("origin", "https://evil.example"),
    ];
    assert_eq!(
        close(&served, &evil).await,
        (403, "permission_denied".into())
    );
    let refused = served
        .connect("/ws?vm_name=none", &[("x-api-key", &key)])
        .await;
    assert_eq!(
        status(refused.map(|_| ()).unwrap_err()),
        (404, "vm_not_found".into())
    );
    assert!(
        served
            .shell
            .world
            .knobs
            .guest
            .ran
            .lock()
            .unwrap()
            .is_empty()
    );

    let page = format!("ghost.v1, bearer.{key}");
    let mut socket = served
        .connect(
            "/ws?vm_name=web&cols=100&rows=30",
            &[("sec-websocket-protocol", &page)],
        )
        .await
        .unwrap();
    socket.send(Message::text("echo grüezi\r")).await.unwrap();
    assert_eq!(next(&mut socket).await, Message::text("echo grüezi\r"));
    // A character that comes in two pieces is shown once it is whole.
    let bytes = "€".as_bytes();
    socket
        .send(Message::binary(bytes[..1].to_vec()))
        .await
        .unwrap();
    socket
        .send(Message::binary(bytes[1..].to_vec()))
        .await
        .unwrap();
    assert_eq!(next(&mut socket).await, Message::text("€"));
    let size = r#"{"type":"resize","cols":120,"rows":40}"#;
    socket.send(Message::text(size)).await.unwrap();
    socket.send(Message::text("{}")).await.unwrap();
    assert_eq!(next(&mut socket).await, Message::text("{}"));
    {
        let guest = &served.shell.world.knobs.guest;
        assert_eq!(*guest.controls.lock().unwrap(), ["resize 40 120"]);
        let ran = guest.ran.lock().unwrap();
        let terminal = ran[0].terminal.clone().unwrap();
        assert_eq!((terminal.rows, terminal.columns), (30, 100));
    }
    // Whoever is revoked loses it, and is told.
    let id = key.split('_').nth(1).unwrap();
    let revoke = &served.shell.world.use_cases().revoke_key;
    revoke
        .execute(&ghost_domain::Principal::agent(), id)
        .await
        .unwrap();
    let told = next(&mut socket).await;
    assert!(told.is_text(), "{told:?}");
    let Message::Close(Some(CloseFrame { reason, .. })) = next(&mut socket).await else {
        panic!("it did not close");
    };
    assert_eq!(reason.as_str(), "unauthenticated");
    until(|| {
        served
            .shell
            .world
            .knobs
            .guest
            .sessions
            .load(Ordering::SeqCst)
            == 0
    })
    .await;
    drop(socket.next().await);
}
