//! What routes take and answer.

use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::StreamExt;
use serde_json::json;

use super::*;
use crate::world::{BROKEN, HUNG};

#[tokio::test]
async fn a_vm_is_shown_as_the_contract_says() {
    let shell = Shell::new().await;
    let answer = shell.ask("GET", "/v1/vms/web", &[], "").await;
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(answer.headers["etag"], "\"1\"");
    assert_eq!(answer.headers["cache-control"], "no-store");
    let vm = answer.json();
    assert_eq!(vm["id"], shell.world.vm.to_string());
    assert_eq!(vm["state"], "stopped");
    assert_eq!(vm["memory_bytes"], 256 << 20);
    let list = shell
        .ask("GET", "/v1/vms?tags=env%3Dtest", &[], "")
        .await
        .json();
    assert_eq!(list[0]["name"], "web");
    let list = shell
        .ask("GET", "/v1/vms?tags=env%3Dother", &[], "")
        .await
        .json();
    assert_eq!(list, json!([]));
}

#[tokio::test]
async fn a_change_answers_202_and_its_key_returns_the_same_operation() {
    let shell = Shell::new().await;
    let key = [("idempotency-key", "k-1")];
    let first = shell.ask("POST", "/v1/vms/web/start", &key, "").await;
    assert_eq!(first.status, StatusCode::ACCEPTED);
    let operation = first.json();
    let id = operation["id"].as_str().unwrap().to_owned();
    assert_eq!(operation["kind"], "start_vm");
    assert_eq!(operation["request_id"], "k-1");
    assert_eq!(first.headers["location"], format!("/v1/operations/{id}"));
    let again = shell.ask("POST", "/v1/vms/web/start", &key, "").await;
    assert_eq!(again.json()["id"], id);
    let shown = shell
        .ask("GET", &format!("/v1/operations/{id}"), &[], "")
        .await;
    assert_eq!(shown.json()["id"], id);
    // The key for something else.
    let other = shell.ask("POST", "/v1/vms/web/pause", &key, "").await;
    assert_eq!(
        (other.status.as_u16(), other.code().as_str()),
        (422, "request_id_reused")
    );
    let bad = shell
        .ask(
            "POST",
            "/v1/vms/web/start",
            &[("idempotency-key", "a b")],
            "",
        )
        .await;
    assert_eq!(
        (bad.status.as_u16(), bad.code().as_str()),
        (400, "invalid_argument")
    );
}

#[tokio::test]
async fn if_match_holds_a_change_to_what_was_seen() {
    let shell = Shell::new().await;
    let body = r#"{"delete_protection": true}"#;
    let stale = shell
        .ask("PATCH", "/v1/vms/web", &[("if-match", "\"9\"")], body)
        .await;
    assert_eq!(
        (stale.status.as_u16(), stale.code().as_str()),
        (412, "generation_mismatch")
    );
    for bad in ["9", "W/\"1\"", "\"1\", \"2\"", "\"x\"", "\"0\""] {
        let answer = shell
            .ask("PATCH", "/v1/vms/web", &[("if-match", bad)], body)
            .await;
        assert_eq!(answer.code(), "invalid_argument", "{bad}");
    }
    let good = shell
        .ask("PATCH", "/v1/vms/web", &[("if-match", "\"1\"")], body)
        .await;
    assert_eq!(good.status, StatusCode::ACCEPTED, "{:?}", good.json());
    let deleted = shell
        .ask(
            "DELETE",
            "/v1/vms/web?force=true",
            &[("if-match", "\"9\"")],
            "",
        )
        .await;
    // Either the stale generation or the update that is still under way keeps it.
    assert!(["generation_mismatch", "vm_busy"].contains(&deleted.code().as_str()));
}

#[tokio::test]
async fn a_dry_run_changes_nothing() {
    let shell = Shell::new().await;
    let body = r#"{"name": "dry", "image": "tiny", "memory_bytes": 268435456, "disk_bytes": 1073741824, "dry_run": true}"#;
    let answer = shell.ask("POST", "/v1/vms", &[], body).await;
    assert_eq!(answer.status, StatusCode::OK, "{:?}", answer.json());
    assert!(!answer.headers.contains_key("location"));
    assert_eq!(
        shell.ask("GET", "/v1/vms/dry", &[], "").await.code(),
        "vm_not_found"
    );
}

#[tokio::test]
async fn what_is_not_understood_is_refused() {
    let shell = Shell::new().await;
    let large = format!(
        r#"{{"image":"tiny","user_data":"{}"}}"#,
        "x".repeat(1 << 20)
    );
    for (method, path, body, status, code) in [
        ("GET", "/v1/nothing", "", 404, "not_found"),
        ("GET", "/", "", 404, "not_found"),
        ("PUT", "/v1/vms", "", 404, "not_found"),
        ("GET", "/v1/vms?nme=web", "", 400, "invalid_argument"),
        ("GET", "/v1/vms?tags=x", "", 400, "invalid_argument"),
        ("GET", "/v1/vms/%ff", "", 400, "invalid_argument"),
        ("GET", "/v1/vms/nope", "", 404, "vm_not_found"),
        ("GET", "/v1/operations/nope", "", 404, "operation_not_found"),
        ("POST", "/v1/vms", "{", 400, "invalid_argument"),
        ("POST", "/v1/vms", "[]", 400, "invalid_argument"),
        (
            "POST",
            "/v1/vms",
            r#"{"image":"tiny","cpus":1}"#,
            400,
            "invalid_argument",
        ),
        (
            "POST",
            "/v1/vms",
            r#"{"image":"tiny","vcpus":-1}"#,
            400,
            "invalid_argument",
        ),
        (
            "POST",
            "/v1/vms",
            r#"{"image":"tiny","name":"A B"}"#,
            400,
            "invalid_name",
        ),
        (
            "POST",
            "/v1/vms",
            r#"{"image":"tiny","vcpus":9999}"#,
            400,
            "invalid_size",
        ),
        (
            "POST",
            "/v1/vms",
            r#"{"image":"nope"}"#,
            404,
            "image_not_found",
        ),
        (
            "POST",
            "/v1/vms",
            r#"{"image":"tiny","name":"web"}"#,
            409,
            "name_taken",
        ),
        ("POST", "/v1/vms", &large, 413, "payload_too_large"),
        (
            "POST",
            "/v1/vms/web/stop",
            r#"{"timeout_seconds":-1}"#,
            400,
            "invalid_argument",
        ),
        ("POST", "/v1/vms/web/stop", "", 409, "vm_not_running"),
        ("PATCH", "/v1/vms/web", "{}", 400, "invalid_argument"),
        (
            "POST",
            "/v1/images",
            r#"{"name":"x","url":"https://a.example/x"}"#,
            400,
            "invalid_argument",
        ),
        ("DELETE", "/v1/images/tiny", "", 409, "image_in_use"),
        ("PUT", "/v1/images/tiny", "", 409, "image_exists"),
        ("PUT", "/v1/images/Bad%20Name", "", 400, "invalid_name"),
        ("GET", "/v1/networks/nope", "", 404, "network_not_found"),
    ] {
        let answer = shell.ask(method, path, &[], body).await;
        let got = (answer.status.as_u16(), answer.code());
        assert_eq!(
            got,
            (status, code.to_owned()),
            "{method} {path} {:.80}",
            body
        );
        assert!(answer.headers.contains_key("x-request-id"));
    }
    let no_type = Request::post("/v1/vms")
        .header("x-api-key", &shell.key)
        .body(Body::from(r#"{"image":"tiny"}"#));
    assert_eq!(
        shell.send(no_type.unwrap()).await.code(),
        "invalid_argument"
    );
}

#[tokio::test]
async fn images_networks_host_and_the_document_are_shown() {
    let shell = Shell::new().await;
    let images = shell.ask("GET", "/v1/images", &[], "").await.json();
    assert_eq!(
        (&images[0]["name"], &images[0]["used_by"]),
        (&json!("tiny"), &json!(["web"]))
    );
    assert_eq!(
        shell.ask("GET", "/v1/images/tiny", &[], "").await.json(),
        images[0]
    );
    let catalogue = shell.ask("GET", "/v1/catalogue", &[], "").await.json();
    assert_eq!(catalogue[0]["name"], "debian-12");
    let networks = shell.ask("GET", "/v1/networks", &[], "").await.json();
    assert_eq!(networks[0]["name"], "default");
    let host = shell.ask("GET", "/v1/host", &[], "").await.json();
    assert_eq!(host["hypervisor"]["state"], "connected");
    assert_eq!(host["resources"]["total"]["cpus"], 4);
    let document = shell.ask("GET", "/v1/openapi.json", &[], "").await;
    assert_eq!(document.headers["content-type"], "application/json");
    assert!(document.json()["components"]["schemas"]["Vm"]["properties"]["state"].is_object());
    let log = shell.ask("GET", "/v1/vms/web/logs", &[], "").await;
    assert_eq!(log.body, b"booted\n");
    assert_eq!(log.headers["x-content-type-options"], "nosniff");
}

#[tokio::test]
async fn an_upload_is_streamed_and_a_broken_one_is_thrown_away() {
    let shell = Shell::new().await;
    let knobs = &shell.world.knobs;
    let upload = |name: &str, body: Body| {
        Request::put(format!("/v1/images/{name}?file_name=x.raw"))
            .header("x-api-key", &shell.key)
            .body(body)
            .unwrap()
    };
    // Ten times what a JSON body may have.
    let pieces =
        futures::stream::iter((0..10).map(|_| Ok::<_, std::io::Error>(vec![0u8; 1 << 20])));
    let answer = shell.send(upload("own", Body::from_stream(pieces))).await;
    assert_eq!(answer.status, StatusCode::ACCEPTED);
    assert_eq!(knobs.uploaded.load(Ordering::SeqCst), 10 << 20);

    let broken = futures::stream::iter([
        Ok(vec![0u8; 10]),
        Err(std::io::Error::other("the line went dead")),
    ]);
    let answer = shell.send(upload("other", Body::from_stream(broken))).await;
    assert_eq!(answer.code(), "invalid_argument");
    let thrown = tokio::time::timeout(Duration::from_secs(20), async {
        while knobs.discarded.load(Ordering::SeqCst) == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    thrown.await.unwrap();
}

#[tokio::test]
async fn health_tells_readiness_without_a_key() {
    let shell = Shell::new().await;
    let get = async |path: &str| {
        shell
            .send(Request::get(path).body(Body::empty()).unwrap())
            .await
    };
    for path in ["/health", "/ready", "/live"] {
        assert_eq!(get(path).await.status, StatusCode::OK, "{path}");
    }
    shell.world.knobs.hypervisor.store(BROKEN, Ordering::SeqCst);
    let noticed = tokio::time::timeout(Duration::from_secs(60), async {
        while get("/ready").await.status == StatusCode::OK {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    noticed.await.unwrap();
    let answer = get("/health").await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(
        answer.json()["problems"][0]
            .as_str()
            .unwrap()
            .contains("libvirt")
    );
    assert_eq!(get("/live").await.status, StatusCode::OK);
}

#[tokio::test]
async fn events_stream_and_go_on_where_the_client_was() {
    let shell = Shell::new().await;
    let started = shell.ask("POST", "/v1/vms/web/start", &[], "").await;
    assert_eq!(started.status, StatusCode::ACCEPTED);
    let id = started.json()["id"].as_str().unwrap().to_owned();
    // Follow until the operation has ended, and keep each event's id.
    let request = Request::get("/v1/events?replay=true").header("x-api-key", &shell.key);
    let response = shell
        .router
        .clone()
        .oneshot(request.body(Body::empty()).unwrap())
        .await
        .unwrap();
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let mut stream = response.into_body().into_data_stream();
    let mut text = String::new();
    let read = tokio::time::timeout(Duration::from_secs(20), async {
        let ended = format!("operation {id} succeeded");
        while !text.contains(&ended) {
            let piece = stream.next().await.unwrap().unwrap();
            text.push_str(std::str::from_utf8(&piece).unwrap());
        }
    });
    read.await.unwrap();
    drop(stream);
    assert!(text.contains("event: operation\n"), "{text}");
    let ids: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("id: "))
        .collect();
    assert!(ids.len() >= 2, "{text}");

    // After a break: only what came after the first.
    let first = [("last-event-id", ids[0])];
    let rest = shell
        .ask("GET", "/v1/events?follow=false", &first, "")
        .await;
    let rest = String::from_utf8(rest.body).unwrap();
    assert!(!rest.contains(&format!("id: {}\n", ids[0])), "{rest}");
    assert!(rest.contains(&format!("id: {}\n", ids[1])), "{rest}");
    // A position of another run means nothing here.
    let strange = [("last-event-id", "0000-999999")];
    let all = shell
        .ask("GET", "/v1/events?follow=false", &strange, "")
        .await;
    assert!(
        String::from_utf8(all.body)
            .unwrap()
            .contains(&format!("id: {}\n", ids[0]))
    );
}

#[tokio::test]
async fn a_shutdown_ends_event_streams() {
    let shell = Shell::new().await;
    let shutdown = shell.shutdown.clone();
    let asked = shell.ask("GET", "/v1/events", &[], "");
    let end = async {
        tokio::task::yield_now().await;
        shutdown.cancel();
    };
    let (answer, ()) = tokio::join!(tokio::time::timeout(Duration::from_secs(10), asked), end);
    assert_eq!(answer.unwrap().status, StatusCode::OK);
}

#[tokio::test]
async fn a_hang_ends_by_itself_and_too_many_are_told_to_come_back() {
    let options = Options {
        timeout: Duration::from_millis(100),
        ..Options::default()
    };
    let shell = Shell::with(options).await;
    shell.world.knobs.host.store(HUNG, Ordering::SeqCst);
    let answer = shell.ask("GET", "/v1/host", &[], "").await;
    assert_eq!(
        (answer.status.as_u16(), answer.code().as_str()),
        (504, "deadline_exceeded")
    );

    let options = Options {
        most_requests: 0,
        ..Options::default()
    };
    let shell = Shell::with(options).await;
    let answer = shell.ask("GET", "/v1/vms", &[], "").await;
    assert_eq!(
        (answer.status.as_u16(), answer.code().as_str()),
        (429, "too_many_requests")
    );
    assert_eq!(answer.headers["retry-after"], "1");
}
