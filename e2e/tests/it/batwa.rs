//! The routes of Batwa as its clients use them: curl and a WebSocket, against a real agent and
//! against a real Core with that agent's host.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use futures::{SinkExt, StreamExt};
use ghost_e2e::agent::{Agent, Builder as AgentBuilder};
use ghost_e2e::core::Builder as CoreBuilder;
use ghost_e2e::{guest, wait};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{Error, Message};

/// How long a host may take to join and its VMs to be told.
const JOIN: Duration = Duration::from_secs(60);
/// How long a terminal may take in emulation on a busy machine.
const CALL: Duration = Duration::from_secs(60);

/// A client of Batwa: where it asks, and its key.
struct Client {
    port: u16,
    key: String,
}

impl Client {
    /// The status and the body; the key goes by a file, since command lines are seen by everybody.
    fn ask(&self, folder: &Path, method: &str, path: &str, body: &Value) -> (u16, Value) {
        let header = folder.join("key-header");
        std::fs::write(&header, format!("X-API-Key: {}\n", self.key)).unwrap();
        let mut curl = Command::new("curl");
        curl.args(["-sS", "--max-time", "120", "-X", method])
            .arg("-H")
            .arg(format!("@{}", header.display()))
            .args(["-w", "\n%{http_code}"])
            .arg(format!("http://127.0.0.1:{}{path}", self.port));
        if !body.is_null() {
            curl.args(["-H", "Content-Type: application/json"])
                .args(["-d", &body.to_string()]);
        }
        let output = curl.output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let (body, status) = text
            .rsplit_once('\n')
            .unwrap_or_else(|| panic!("{}", String::from_utf8_lossy(&output.stderr)));
        let body = serde_json::from_str(body).unwrap_or(Value::Null);
        (status.parse().unwrap(), body)
    }

    async fn terminal(&self, vm: &str, key: &str) -> Result<String, u16> {
        let mut request = format!("ws://127.0.0.1:{}/ws?vm_name={vm}", self.port)
            .into_client_request()
            .unwrap();
        if !key.is_empty() {
            request
                .headers_mut()
                .insert("x-api-key", key.parse().unwrap());
        }
        let stream = tokio::net::TcpStream::connect(("127.0.0.1", self.port))
            .await
            .unwrap();
        let mut socket = match tokio_tungstenite::client_async(request, stream).await {
            Ok((socket, _)) => socket,
            Err(Error::Http(response)) => return Err(response.status().as_u16()),
            Err(error) => panic!("{error}"),
        };
        let size = r#"{"type":"resize","cols":100,"rows":40}"#;
        socket.send(Message::text(size)).await.unwrap();
        let typed = "echo six times seven is $((6 * 7)); exit 3\r";
        socket.send(Message::text(typed)).await.unwrap();
        let mut shown = String::new();
        loop {
            let frame = tokio::time::timeout(CALL, socket.next()).await;
            match frame.unwrap_or_else(|_| panic!("only this came: {shown}")) {
                Some(Ok(Message::Text(text))) => shown.push_str(text.as_str()),
                Some(Ok(Message::Close(frame))) => {
                    let frame = frame.expect("a reason");
                    assert_eq!(frame.reason.as_str(), "exit code 3");
                    return Ok(shown);
                }
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                other => panic!("{other:?} after {shown}"),
            }
        }
    }
}

/// What a client does with a VM, whoever serves it.
fn use_it(client: &Client, agent: &Agent, vm: &str, hostname: &str) {
    let folder = agent.folder();
    let ask = |method: &str, path: &str, body: Value| client.ask(folder, method, path, &body);
    let (status, agents) = ask("GET", "/api/agent/list", Value::Null);
    assert_eq!(
        (status, &agents["agents"][0]["hostname"]),
        (200, &json!(hostname))
    );
    let (_, known) = ask(
        "POST",
        "/api/agent/register",
        json!({"agent_id": hostname, "hostname": hostname, "api_url": "http://127.0.0.1:1", "api_key": "x"}),
    );
    assert_eq!(known["success"], true, "{known}");
    let (status, _) = ask(
        "POST",
        "/api/agent/register",
        json!({"agent_id": "somebody-else", "hostname": "somebody-else"}),
    );
    assert_eq!(status, 409);
    let info = format!("/api/agent/info/{hostname}");
    let (status, info) = ask("GET", &info, Value::Null);
    assert_eq!(
        (status, &info["hostname"], &info["status"]),
        (200, &json!(hostname), &json!("online"))
    );
    let (status, beat) = ask(
        "POST",
        "/api/agent/heartbeat",
        json!({"agent_id": hostname, "timestamp": "2031-01-01T00:00:00Z", "status": "offline", "vm_count": 9}),
    );
    assert_eq!((status, &beat["status"]), (200, &json!("online")), "{beat}");
    // An operator takes no host out of the fleet.
    let unregister = format!("/api/agent/unregister/{hostname}?force=true");
    let (status, refused) = ask("DELETE", &unregister, Value::Null);
    assert_eq!(
        (status, &refused["code"]),
        (403, &json!("permission_denied"))
    );

    let (status, made) = ask(
        "POST",
        "/api/vm/create",
        json!({"name": vm, "image": "tiny", "cpus": 1, "memory": "256M", "disk": "512M"}),
    );
    assert!(status == 200 || status == 202, "{status} {made}");
    let shown = wait::until("the VM runs", JOIN, || {
        let (_, shown) = ask("GET", &format!("/api/vm/info/{vm}"), Value::Null);
        (shown["state"] == "Running").then_some(shown)
    });
    assert_eq!(shown["hostname"], hostname);
    agent
        .ctl()
        .ok(&["vm", "wait", vm, "--for", "agent", "--timeout", "180s"]);

    let (status, ran) = ask(
        "POST",
        "/api/execute",
        json!({"vm_name": vm, "command": "echo out; echo err >&2; exit 7", "timeout": 60}),
    );
    assert_eq!(status, 200, "{ran}");
    assert_eq!(
        (&ran["returncode"], &ran["stdout"], &ran["stderr"]),
        (&json!(7), &json!("out\n"), &json!("err\n"))
    );
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let shown = runtime.block_on(client.terminal(vm, &client.key)).unwrap();
    assert!(shown.contains("six times seven is 42"), "{shown}");
    for key in ["", "nonsense"] {
        assert_eq!(runtime.block_on(client.terminal(vm, key)), Err(403));
    }
    let (status, refused) = ask("POST", "/api/vm/delete", json!({"vm_name": vm}));
    assert_eq!((status, &refused["code"]), (409, &json!("vm_running")));
    let (status, stopped) = ask(
        "POST",
        "/api/vm/stop",
        json!({"vm_name": vm, "force": true}),
    );
    assert!(status == 200 || status == 202, "{status} {stopped}");
    wait::until("the VM is deleted", JOIN, || {
        let (status, _) = ask("POST", "/api/vm/delete", json!({"vm_name": vm}));
        (status == 200 || status == 202 || status == 404).then_some(())
    });
    wait::until("the VM is gone", JOIN, || {
        let (_, listed) = ask("GET", "/api/vm/list", Value::Null);
        (listed["vms"] == json!([])).then_some(())
    });
}

#[test]
fn curl_does_all_that_a_client_of_batwa_does() {
    let _room = guest::room(1);
    let agent = AgentBuilder::new()
        .set("agent.name", "pc-at-home")
        .set("compat.batwa", true)
        .start();
    agent.import_tiny();
    let key = agent
        .ctl()
        .ok(&["key", "create", "batwa", "--role", "operator"]);
    let local = Client {
        port: agent.http_port(),
        key: key.trim().to_owned(),
    };
    use_it(&local, &agent, &agent.name("own"), "pc-at-home");

    // The same through Core, to which the host dialled.
    let core = CoreBuilder::new()
        .set("compat.batwa", true)
        .set("link.heartbeat_interval", "5s")
        .set("link.ping_interval", "1s")
        .start();
    let token = core.host_token("acme");
    let done = agent.enroll(&token, "pc-at-home");
    assert_eq!(done.code, 0, "{}{}", done.stdout, done.stderr);
    core.wait_host("pc-at-home", "online", JOIN);
    let token = core.token(&["--tenant", "acme", "--role", "admin"]);
    let admin = core.person("alice");
    let endpoint = format!("https://{}", core.address());
    admin.ok(&[
        "context",
        "add",
        "fleet",
        "--endpoint",
        &endpoint,
        "--token",
        &token,
        "--use",
    ]);
    let key = admin.ok(&["key", "create", "batwa", "--role", "operator"]);
    let through = Client {
        port: core.http_port(),
        key: key.trim().to_owned(),
    };
    use_it(&through, &agent, &agent.name("fleet"), "pc-at-home");

    // An administrator does, and then it is nobody's any more.
    let key = admin.ok(&["key", "create", "batwa-admin", "--role", "admin"]);
    let administrator = Client {
        port: core.http_port(),
        key: key.trim().to_owned(),
    };
    let unregister = "/api/agent/unregister/pc-at-home";
    let ask = |path: &str| administrator.ask(agent.folder(), "DELETE", path, &Value::Null);
    let (status, refused) = ask(unregister);
    assert_eq!((status, &refused["code"]), (409, &json!("wrong_state")));
    let (status, gone) = ask(&format!("{unregister}?force=true"));
    assert_eq!((status, &gone["success"]), (200, &json!(true)), "{gone}");
    let (_, agents) = administrator.ask(agent.folder(), "GET", "/api/agent/list", &Value::Null);
    assert_eq!(agents["agents"], json!([]));
    agent.audit();
}
