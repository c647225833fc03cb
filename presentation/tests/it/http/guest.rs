//! Guests over HTTP: programs, files, requests, lockdown, audit, and the Connect calls.

use std::sync::atomic::Ordering;

use super::*;
use crate::guests::{HOSTILE, sum_of};

async fn admin(shell: &Shell, method: &str, path: &str, body: &str) -> Answer {
    let key = shell.world.key(Role::Admin).await;
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("content-type", "application/json")
        .header("x-api-key", key);
    shell
        .send(request.body(Body::from(body.to_owned())).unwrap())
        .await
}

#[tokio::test]
async fn a_program_is_run_to_its_end() {
    let shell = Shell::running().await;
    let exec = async |body: &str| shell.ask("POST", "/v1/vms/web/exec", &[], body).await;
    let done = exec(r#"{"program":"both","arguments":["-a"],"environment":{"A":"b"},"user":"x"}"#)
        .await
        .json();
    assert_eq!(done["exit_code"], 3);
    assert_eq!(done["stdout"], "Linux web 6.1\n");
    assert_eq!(done["stderr"], "oops\n");
    assert_eq!(done["stdout_truncated"], false);
    assert!(done["signal"].is_null() && done["stdout_base64"].is_null());
    let guest = &shell.world.knobs.guest;
    {
        let ran = guest.ran.lock().unwrap();
        assert_eq!(ran[0].user.as_deref(), Some("x"));
        assert_eq!(ran[0].environment["A"], "b");
        assert!(!ran[0].stdin && ran[0].timeout.is_some());
    }
    let done = exec(r#"{"program":"cat","stdin":"grüezi"}"#).await.json();
    assert_eq!(
        (&done["exit_code"], &done["stdout"]),
        (&0.into(), &"grüezi".into())
    );
    let done = exec(r#"{"program":"binary"}"#).await.json();
    assert!(done["stdout"].is_null());
    assert_eq!(done["stdout_base64"], "/wD+");
    // A mebibyte of each is kept, what is cut is cut between characters.
    let done = exec(r#"{"program":"large"}"#).await.json();
    assert_eq!(done["stdout"].as_str().unwrap().len(), 1 << 20);
    assert_eq!(done["stdout_truncated"], true);
    assert_eq!(done["stderr_truncated"], false);
    assert_eq!(done["timed_out"], true);
    let answer = exec(r#"{"program":"/nonexistent"}"#).await;
    assert_eq!(
        (answer.status.as_u16(), answer.code()),
        (502, "guest_failed".into())
    );
}

#[tokio::test]
async fn what_cannot_be_run_is_refused_before_any_guest_hears_of_it() {
    let shell = Shell::running().await;
    let large = format!(r#"{{"program":"x","stdin":"{}"}}"#, "y".repeat(1 << 20));
    for (body, code) in [
        ("", "invalid_argument"),
        ("{", "invalid_argument"),
        ("[]", "invalid_argument"),
        (r#"{"program":""}"#, "invalid_argument"),
        (r#"{"program":"x","arguments":"y"}"#, "invalid_argument"),
        (
            r#"{"program":"x","arguments":["\u0000"]}"#,
            "invalid_argument",
        ),
        (
            r#"{"program":"x","timeout_seconds":-1}"#,
            "invalid_argument",
        ),
        (
            r#"{"program":"x","timeout_seconds":1e9}"#,
            "invalid_argument",
        ),
        (r#"{"program":"x","shell":true}"#, "invalid_argument"),
        (large.as_str(), "payload_too_large"),
    ] {
        let answer = shell.ask("POST", "/v1/vms/web/exec", &[], body).await;
        assert_eq!(answer.code(), code, "{body:.60}");
    }
    assert!(shell.world.knobs.guest.ran.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_caller_that_goes_away_cancels_its_program() {
    let shell = Shell::running().await;
    let request = Request::post("/v1/vms/web/exec")
        .header("x-api-key", &shell.key)
        .header("content-type", "application/json")
        .body(Body::from(r#"{"program":"sleep"}"#))
        .unwrap();
    let asking = tokio::spawn(shell.router.clone().oneshot(request));
    let guest = &shell.world.knobs.guest;
    until(|| guest.sessions.load(Ordering::SeqCst) == 1).await;
    asking.abort();
    until(|| guest.cancelled.load(Ordering::SeqCst) == 1).await;
}

#[tokio::test]
async fn lockdown_and_switched_off_access_have_codes_of_their_own() {
    let shell = Shell::running().await;
    let run_in = async |shell: &Shell| {
        let body = r#"{"program":"true"}"#;
        let answer = shell.ask("POST", "/v1/vms/web/exec", &[], body).await;
        match answer.status {
            StatusCode::OK => (200, String::new()),
            status => (status.as_u16(), answer.code()),
        }
    };
    let run = async || run_in(&shell).await;
    assert_eq!(run().await.0, 200);
    let body = r#"{"active":true,"reason":"an incident"}"#;
    let refused = shell.ask("PUT", "/v1/lockdown", &[], body).await;
    assert_eq!(refused.code(), "permission_denied");
    let on = admin(&shell, "PUT", "/v1/lockdown", body).await.json();
    assert_eq!(
        (&on["active"], &on["reason"]),
        (&true.into(), &"an incident".into())
    );
    assert_eq!(run().await, (403, "lockdown".into()));
    let told = shell.ask("GET", "/v1/lockdown", &[], "").await.json();
    assert_eq!(told["active"], true);
    let off = admin(&shell, "PUT", "/v1/lockdown", r#"{"active":false}"#).await;
    assert_eq!(off.json()["active"], false);
    assert_eq!(run().await.0, 200);
    let closed = Shell::of(World::closed().await, Options::default()).await;
    assert_eq!(run_in(&closed).await, (403, "guest_access_off".into()));
}

#[tokio::test]
async fn a_file_is_written_and_read_with_its_checksum() {
    let shell = Shell::running().await;
    let guest = &shell.world.knobs.guest;
    let data: Vec<u8> = (0..700_000u32)
        .map(|at| u8::try_from(at % 253).unwrap())
        .collect();
    let sum = hex::encode(sum_of(&data).checksum);
    let put = async |path: &str, checksum: Option<&str>, data: &[u8]| {
        let mut request = Request::put(path).header("x-api-key", &shell.key);
        if let Some(checksum) = checksum {
            request = request.header("x-ghost-checksum", checksum);
        }
        shell
            .send(request.body(Body::from(data.to_vec())).unwrap())
            .await
    };
    let path = "/v1/vms/web/files?path=/srv/f&mode=0640&uid=7&gid=8";
    let written = put(path, Some(&sum), &data).await;
    assert_eq!(written.headers["x-ghost-checksum"], sum.as_str());
    let body = written.json();
    assert_eq!(body["size_bytes"], 700_000);
    assert_eq!(body["checksum"], sum.as_str());
    assert_eq!(guest.content("/srv/f").as_deref(), Some(&data[..]));

    let whole = shell
        .ask(
            "GET",
            "/v1/vms/web/files?path=/srv/f",
            &[("te", "trailers")],
            "",
        )
        .await;
    assert!(whole.body == data);
    assert_eq!(whole.headers["x-ghost-mode"], "0640");
    assert_eq!(whole.headers["x-ghost-size"], "700000");
    assert_eq!(
        (&whole.headers["x-ghost-uid"], &whole.headers["x-ghost-gid"]),
        (&"7".parse().unwrap(), &"8".parse().unwrap())
    );
    assert_eq!(whole.headers["content-type"], "application/octet-stream");
    assert_eq!(whole.headers["content-disposition"], "attachment");
    let tag = whole.headers["etag"].to_str().unwrap().to_owned();

    let get = async |headers: &[(&str, &str)]| {
        shell
            .ask("GET", "/v1/vms/web/files?path=/srv/f", headers, "")
            .await
    };
    let part = get(&[("range", "bytes=10-19"), ("if-range", &tag)]).await;
    assert_eq!(part.status, StatusCode::PARTIAL_CONTENT);
    assert_eq!(part.headers["content-range"], "bytes 10-19/700000");
    assert_eq!(part.body, &data[10..20]);
    let rest = get(&[("range", "bytes=699990-")]).await;
    assert_eq!(rest.headers["content-range"], "bytes 699990-699999/700000");
    assert_eq!(rest.body, &data[699_990..]);
    let changed = get(&[("range", "bytes=10-19"), ("if-range", "\"other\"")]).await;
    assert_eq!(changed.status, StatusCode::OK);
    assert_eq!(changed.body.len(), data.len());
    let behind = get(&[("range", "bytes=700000-")]).await;
    assert_eq!(behind.status, StatusCode::RANGE_NOT_SATISFIABLE);
    assert_eq!(behind.headers["content-range"], "bytes */700000");
    assert_eq!(behind.code(), "invalid_argument");

    // Damaged on the way, outside the roots, no checksum at all.
    let other = sum.replace(|at: char| at.is_ascii_digit(), "0");
    let damaged = put(path, Some(&other), &data).await;
    assert_eq!(damaged.code(), "checksum_mismatch");
    assert_eq!(put(path, Some("zz"), b"x").await.code(), "invalid_argument");
    let outside = put("/v1/vms/web/files?path=/proc/self/root/f", None, b"x").await;
    assert_eq!(
        (outside.status.as_u16(), outside.code()),
        (403, "guest_path_denied".into())
    );
    let resume = put("/v1/vms/web/files?path=/srv/f&resume=1", None, b"x").await;
    assert_eq!(resume.code(), "invalid_argument");
    for bad in ["", "?path=relative", "?path=/f&mode=99", "?path=/f&moed=1"] {
        let answer = put(&format!("/v1/vms/web/files{bad}"), None, b"x").await;
        assert_eq!(answer.code(), "invalid_argument", "{bad}");
    }
    // Without a length nobody knows when it is whole.
    let stream = futures::stream::iter([Ok::<_, std::io::Error>(data.clone())]);
    let request = Request::put(path)
        .header("x-api-key", &shell.key)
        .body(Body::from_stream(stream))
        .unwrap();
    assert_eq!(shell.send(request).await.code(), "invalid_argument");

    // What an earlier try left is not sent again.
    *guest.left.lock().unwrap() = data[..400_000].to_vec();
    let resumed = put("/v1/vms/web/files?path=/g&resume=1", Some(&sum), &data).await;
    assert_eq!(resumed.json()["resumed_bytes"], 400_000);
    assert_eq!(guest.content("/g").as_deref(), Some(&data[..]));
}

#[tokio::test]
async fn a_file_that_breaks_off_does_not_look_whole() {
    let shell = Shell::running().await;
    let guest = &shell.world.knobs.guest;
    guest.put("/f", &vec![7; 900_000]);
    guest.breaks_after.store(1, Ordering::SeqCst);
    let request = Request::get("/v1/vms/web/files?path=/f")
        .header("x-api-key", &shell.key)
        .body(Body::empty())
        .unwrap();
    let response = shell.router.clone().oneshot(request).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    let read = axum::body::to_bytes(response.into_body(), 1 << 24).await;
    assert!(read.is_err(), "an end would say that it is whole");
}

#[tokio::test]
async fn directories_are_told_as_json_however_their_names_read() {
    let shell = Shell::running().await;
    let list = shell
        .ask("GET", "/v1/vms/web/files?path=/&list=1&limit=2", &[], "")
        .await;
    let page = list.json();
    assert_eq!(page["more"], true);
    assert_eq!(page["files"][1]["name"], HOSTILE);
    assert_eq!(page["files"][1]["symlink_target"], HOSTILE);
    assert!(!list.headers.contains_key("set-cookie"));
    shell.world.knobs.guest.put("/f", b"abc");
    let stat = shell
        .ask("GET", "/v1/vms/web/files?path=/f&stat=1", &[], "")
        .await
        .json();
    assert_eq!(
        (&stat["size_bytes"], &stat["kind"]),
        (&3.into(), &"file".into())
    );
    let none = shell
        .ask("GET", "/v1/vms/web/files?path=/none", &[], "")
        .await;
    assert_eq!(
        (none.status.as_u16(), none.code()),
        (404, "guest_file_not_found".into())
    );
}

#[tokio::test]
async fn short_requests_are_answered_and_written_down_without_secrets() {
    let shell = Shell::running().await;
    for (path, body, status) in [
        ("guest/shutdown", "", 204),
        (
            "guest/shutdown",
            r#"{"reboot":true,"delay_seconds":2}"#,
            204,
        ),
        ("guest/shutdown", r#"{"delay_seconds":-1}"#, 400),
        (
            "guest/password",
            r#"{"user":"root","password":"geheim-1"}"#,
            204,
        ),
        ("guest/password", r#"{"user":"root"}"#, 400),
        (
            "guest/ssh-keys",
            r#"{"user":"g","add":["ssh-ed25519 AAAA"]}"#,
            204,
        ),
        ("guest/ssh-keys", r#"{"user":"g"}"#, 400),
        ("guest/clock", "", 204),
        (
            "guest/freeze",
            r#"{"timeout_seconds":3,"mount_points":["/"]}"#,
            200,
        ),
        ("guest/freeze", r#"{"timeout_seconds":300}"#, 400),
        // This host has no program to give.
        ("guest/update", "", 409),
        ("guest/thaw", "", 200),
        ("guest/ping", "", 200),
        ("guest-ip", r#"{"guest_ip":"nonsense"}"#, 400),
        ("guest-ip", r#"{"address":"192.0.2.1"}"#, 400),
    ] {
        let path = format!("/v1/vms/web/{path}");
        let answer = shell
            .ask("POST", &path, &[("x-request-id", "r-1")], body)
            .await;
        assert_eq!(
            answer.status.as_u16(),
            status,
            "{path} {body}: {}",
            String::from_utf8_lossy(&answer.body)
        );
    }
    assert_eq!(shell.world.knobs.guest.requests.lock().unwrap().len(), 5);
    let status = shell.ask("GET", "/v1/vms/web/guest", &[], "").await.json();
    assert_eq!(
        (&status["ready"], &status["agent_version"]),
        (&true.into(), &"1.2.3".into())
    );
    let history = shell
        .ask("GET", "/v1/vms/web/history?span_seconds=3600", &[], "")
        .await
        .json();
    assert!(history["samples"].is_array());
    let long = shell
        .ask("GET", "/v1/vms/web/history?span_seconds=90000", &[], "")
        .await;
    assert_eq!(long.code(), "invalid_argument");

    let refused = shell.ask("GET", "/v1/audit", &[], "").await;
    assert_eq!(refused.code(), "permission_denied");
    let log = admin(&shell, "GET", "/v1/audit?vm=web&limit=100", "").await;
    let text = String::from_utf8_lossy(&log.body).into_owned();
    assert!(!text.contains("geheim"), "{text}");
    let entries = log.json();
    assert_eq!(entries[0]["action"], "power");
    assert_eq!(entries[0]["request_id"], "r-1");
    let verdict = admin(&shell, "GET", "/v1/audit/verify", "").await.json();
    assert_eq!(
        (&verdict["intact"], &verdict["broken_at"]),
        (&false.into(), &2.into())
    );
    let most = admin(&shell, "GET", "/v1/audit?limit=10001", "").await;
    assert_eq!(most.code(), "invalid_argument");
}

const SERVICE: &str = "/limiquantix.compute.v1.VMService";

/// The two examples of the original's documents, with a key added.
#[tokio::test]
async fn the_two_curl_examples_work_with_a_key() {
    let shell = Shell::running().await;
    let id = shell.world.vm;
    let ping = shell
        .ask(
            "POST",
            &format!("{SERVICE}/PingAgent"),
            &[],
            &format!(r#"{{"vmId": "{id}"}}"#),
        )
        .await;
    assert_eq!(ping.status, StatusCode::OK);
    assert_eq!(ping.headers["content-type"], "application/json");
    let body = ping.json();
    assert_eq!(
        (&body["connected"], &body["version"]),
        (&true.into(), &"1.2.3".into())
    );
    let script = format!(
        "{{\n    \"vmId\": \"{id}\",\n    \"command\": \"uname -a\",\n    \"timeoutSeconds\": 30\n  }}"
    );
    let run = shell
        .ask("POST", &format!("{SERVICE}/ExecuteScript"), &[], &script)
        .await;
    assert_eq!(run.status, StatusCode::OK);
    let body = run.json();
    assert_eq!(body["stdout"], "Linux web 6.1\n");
    assert_eq!(body["stderr"], "oops\n");
    assert_eq!(
        (&body["exitCode"], &body["success"]),
        (&3.into(), &false.into())
    );
    let ran = shell.world.knobs.guest.ran.lock().unwrap();
    let wanted = ghost_domain::guest::ExecRequest::command("/bin/sh", ["-c", "uname -a"]);
    assert_eq!(ran[0].program, wanted.program);
    assert_eq!(ran[0].timeout, Some(std::time::Duration::from_secs(30)));
}

#[tokio::test]
async fn connect_calls_carry_files_and_power_and_fail_in_connects_form() {
    let shell = Shell::running().await;
    let call = async |method: &str, body: &str, headers: &[(&str, &str)]| {
        let path = format!("{SERVICE}/{method}");
        shell.ask("POST", &path, headers, body).await
    };
    let written = call(
        "WriteGuestFile",
        r#"{"vmId":"web","path":"/f","content":"aGFsbG8","mode":384}"#,
        &[],
    )
    .await
    .json();
    assert_eq!(
        (&written["success"], &written["bytesWritten"]),
        (&true.into(), &"5".into())
    );
    let guest = &shell.world.knobs.guest;
    assert_eq!(guest.content("/f").unwrap(), b"hallo");
    let read = call(
        "ReadGuestFile",
        r#"{"vm_id":"web","path":"/f","offset":"1"}"#,
        &[],
    )
    .await
    .json();
    assert_eq!(
        (&read["content"], &read["eof"]),
        (&"YWxsbw==".into(), &true.into())
    );
    let down = call("GuestShutdown", r#"{"vmId":"web","reboot":true}"#, &[]).await;
    assert_eq!(down.json()["success"], true);

    for (method, body, headers, status, code) in [
        (
            "ReadGuestFile",
            r#"{"vmId":"web","path":"/none"}"#,
            &[][..],
            404,
            "not_found",
        ),
        (
            "ReadGuestFile",
            r#"{"vmId":"nobody","path":"/f"}"#,
            &[],
            404,
            "not_found",
        ),
        (
            "ExecuteScript",
            r#"{"vmId":"web"}"#,
            &[],
            400,
            "invalid_argument",
        ),
        (
            "ExecuteScript",
            r#"{"vmId":"web","command":""}"#,
            &[],
            400,
            "invalid_argument",
        ),
        (
            "ExecuteScript",
            r#"{"vmId":"web","command":"x","runas":"y"}"#,
            &[],
            400,
            "invalid_argument",
        ),
        ("ExecuteScript", "garbage", &[], 400, "invalid_argument"),
        (
            "WriteGuestFile",
            r#"{"vmId":"web","path":"/f","content":"%"}"#,
            &[],
            400,
            "invalid_argument",
        ),
        (
            "WriteGuestFile",
            r#"{"vmId":"web","path":"/proc/f"}"#,
            &[],
            403,
            "permission_denied",
        ),
        (
            "PingAgent",
            r#"{"vmId":"web"}"#,
            &[("connect-protocol-version", "2")],
            400,
            "invalid_argument",
        ),
        (
            "PingAgent",
            r#"{"vmId":"web"}"#,
            &[("connect-timeout-ms", "x")],
            400,
            "invalid_argument",
        ),
        (
            "ExecuteScript",
            r#"{"vmId":"web","command":"sleep","args":["9"]}"#,
            &[("connect-timeout-ms", "20")],
            504,
            "deadline_exceeded",
        ),
    ] {
        let answer = call(method, body, headers).await;
        let error = answer.json();
        assert_eq!(answer.headers["content-type"], "application/json");
        assert_eq!(
            (answer.status.as_u16(), &error["code"]),
            (status, &code.into()),
            "{method} {body}: {error}"
        );
        assert!(error["message"].is_string());
        assert_eq!(error["details"][0]["type"], "google.rpc.ErrorInfo");
    }
    until(|| guest.cancelled.load(Ordering::SeqCst) == 1).await;

    // A stranger is refused in the same form, and an agent that is away is an answer.
    let request =
        Request::post(format!("{SERVICE}/PingAgent")).header("content-type", "application/json");
    let answer = shell
        .send(request.body(Body::from(r#"{"vmId":"web"}"#)).unwrap())
        .await;
    assert_eq!(
        (answer.status.as_u16(), &answer.json()["code"]),
        (401, &"unauthenticated".into())
    );
    guest.away.store(true, Ordering::SeqCst);
    let away = call("PingAgent", r#"{"vmId":"web"}"#, &[]).await;
    assert_eq!(away.status, StatusCode::OK);
    assert_eq!(away.json()["connected"], false);
    assert!(away.json()["error"].as_str().unwrap().contains("agent"));
    let away = call("ExecuteScript", r#"{"vmId":"web","command":"x"}"#, &[]).await;
    assert_eq!(
        (away.status.as_u16(), &away.json()["code"]),
        (503, &"unavailable".into())
    );
}
