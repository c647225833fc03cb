//! From elsewhere: mutual TLS, roles, revocation, HTTP and its keys, metrics, events, traces.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ghost_domain::ports::{CertificateAuthority as _, Clock};
use ghost_domain::{CredentialId, Monotonic, Role, Timestamp};
use ghost_e2e::agent::{Agent, Builder};
use ghost_e2e::binaries::program;
use ghost_e2e::ctl::Ctl;
use ghost_e2e::http;
use ghost_e2e::wait;
use ghost_infrastructure::identity::Authority;

use crate::collector::Collector;
use crate::support::{launch, text, tiny};

/// A person on another machine, with contexts of their own.
struct Remote {
    home: PathBuf,
}

impl Remote {
    fn new(agent: &Agent, name: &str) -> Self {
        let home = agent.folder().join(name);
        fs::create_dir_all(&home).unwrap();
        Self { home }
    }

    fn ctl(&self) -> Ctl {
        Ctl::new(program("ghostctl"), None).with_env("XDG_CONFIG_HOME", &self.home)
    }

    fn context(&self, name: &str) -> PathBuf {
        self.home.join("ghost/contexts").join(name)
    }

    /// Becomes somebody at the agent.
    #[track_caller]
    fn enrol(&self, agent: &Agent, context: &str, role: &str) -> Ctl {
        let token = agent.ctl().ok(&["trust", "token", "--role", role]);
        self.ctl().ok(&[
            "--endpoint",
            &endpoint(agent),
            "context",
            "add",
            context,
            "--token",
            token.trim(),
            "--use",
        ]);
        self.ctl()
    }
}

fn endpoint(agent: &Agent) -> String {
    format!("https://127.0.0.1:{}", agent.grpc_port())
}

#[test]
fn a_remote_operator_works_until_revoked() {
    let agent = Builder::simulated().start();
    agent.import_tiny();
    let remote = Remote::new(&agent, "laptop");
    let token = agent.ctl().ok(&["trust", "token", "--role", "operator"]);
    let ctl = remote.ctl();
    let add = |name: &str, token: &str| {
        ctl.run(&[
            "--endpoint",
            &endpoint(&agent),
            "context",
            "add",
            name,
            "--token",
            token,
            "-o",
            "json",
        ])
    };
    let added = add("lab", token.trim());
    assert_eq!(added.code, 0, "{}", added.stderr);
    // A token is good once, and nothing else is one.
    for (name, token) in [("again", token.trim()), ("forged", "ghost-join-v1.x.y.z")] {
        let refused = add(name, token);
        assert!(
            [2, 6].contains(&refused.code),
            "{name}: {} {}",
            refused.code,
            refused.stderr
        );
        assert!(!remote.context(name).exists());
    }
    for file in ["key.pem", "certificate.pem"] {
        use std::os::unix::fs::PermissionsExt as _;
        let mode = fs::metadata(remote.context("lab").join(file))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600, "{file}");
    }

    let lab = |arguments: &[&str]| {
        remote
            .ctl()
            .run(&[&["--context", "lab"], arguments].concat())
    };
    let vm = agent.name("far");
    let output = lab(&tiny(&["launch", "tiny", &vm], &[]));
    assert_eq!(output.code, 0, "{}", output.stderr);
    let output = lab(&["list", "-o", "name"]);
    assert_eq!(output.stdout.trim(), vm);
    // The import streams over the network as well.
    let image = ghost_e2e::binaries::tiny_image().to_str().unwrap();
    assert_eq!(lab(&["image", "import", image, "--name", "far"]).code, 0);
    // An operator hands out no credentials.
    let output = lab(&["trust", "token", "--role", "viewer", "-o", "json"]);
    assert_eq!(output.code, 6, "{}", output.stderr);
    assert!(
        output.stderr.contains("permission_denied"),
        "{}",
        output.stderr
    );
    // Who did it stands in the operation.
    let operations = agent.ctl().json(&["operation", "list", "--all"]);
    assert!(
        operations.as_array().unwrap().iter().any(|operation| {
            operation["kind"] == "create_vm" && !operation["requested_by"].is_null()
        }),
        "{operations}"
    );

    // A viewer looks and changes nothing.
    let viewer = Remote::new(&agent, "wallboard").enrol(&agent, "lab", "viewer");
    assert_eq!(viewer.ok(&["list", "-o", "name"]).trim(), vm);
    for arguments in [
        vec!["vm", "stop", &vm],
        vec!["vm", "delete", &vm, "--force"],
        vec!["image", "delete", "tiny"],
        vec!["key", "list"],
        vec!["vm", "logs", &vm],
    ] {
        viewer.fails(&arguments, 6, "permission_denied");
    }

    // Revoked: from the next call on, for good.
    let certificates = agent.ctl().json(&["trust", "list"]);
    let operator = certificates
        .as_array()
        .unwrap()
        .iter()
        .find(|certificate| certificate["role"] == "operator")
        .unwrap();
    agent.ctl().ok(&["trust", "revoke", &text(&operator["id"])]);
    for _ in 0..2 {
        let output = lab(&["list"]);
        assert_eq!(output.code, 6, "{}", output.stderr);
    }
    assert_eq!(viewer.run(&["list"]).code, 0, "the other one goes on");
    agent.ctl().ok(&["vm", "delete", &vm, "--force"]);
    agent.audit();
}

/// A clock that stands still.
struct Stopped(Timestamp);

impl Clock for Stopped {
    fn now(&self) -> Timestamp {
        self.0
    }

    fn monotonic(&self) -> Monotonic {
        Monotonic::default()
    }
}

/// A certificate that the agent's own CA signed for an administrator days ago.
fn expired(agent: &Agent) -> (String, String) {
    let past = Timestamp::from(SystemTime::now() - Duration::from_secs(3 * 24 * 3600));
    let folder = agent.folder().join("authority");
    fs::create_dir_all(folder.join("identity")).unwrap();
    for file in ["ca.pem", "ca.key"] {
        fs::copy(
            agent.data_dir().join("identity").join(file),
            folder.join("identity").join(file),
        )
        .unwrap();
    }
    let authority = Authority::open(&folder, Arc::new(Stopped(past))).unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let request = rcgen::CertificateParams::default()
        .serialize_request(&key)
        .unwrap()
        .pem()
        .unwrap();
    let issued = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap()
        .block_on(authority.sign_client(&request, CredentialId::random(), "ghost", Role::Admin))
        .unwrap();
    (issued.certificate_pem, key.serialize_pem())
}

#[test]
fn wrong_absent_and_expired_certificates_are_refused() {
    let agent = Builder::simulated().start();
    let other = Builder::simulated().start();
    let remote = Remote::new(&agent, "home");
    let ctl = remote.enrol(&agent, "good", "admin");
    ctl.ok(&["list"]);
    let copy = |name: &str| {
        let folder = remote.context(name);
        fs::create_dir_all(&folder).unwrap();
        for file in [
            "context.yaml",
            "key.pem",
            "certificate.pem",
            "authority.pem",
        ] {
            fs::copy(remote.context("good").join(file), folder.join(file)).unwrap();
        }
        folder
    };
    let refused = |name: &str| {
        let output = remote.ctl().run(&["--context", name, "list", "-o", "json"]);
        assert_eq!(output.code, 6, "{name}: {}", output.stderr);
        let document: serde_json::Value =
            serde_json::from_str(&output.stderr[output.stderr.find('{').unwrap()..]).unwrap();
        assert_eq!(
            document["error"]["code"], "unauthenticated",
            "{name}: {document}"
        );
        assert!(!text(&document["error"]["message"]).is_empty());
        assert!(output.stdout.is_empty());
    };

    // The agent is not the one that we know: its CA is another.
    let folder = copy("wrong-authority");
    fs::copy(
        other.data_dir().join("identity/ca.pem"),
        folder.join("authority.pem"),
    )
    .unwrap();
    refused("wrong-authority");
    // We are not one that the agent knows: our certificate is by another CA.
    let theirs = Remote::new(&other, "home");
    theirs.enrol(&other, "good", "admin").ok(&["list"]);
    let folder = copy("stranger");
    for file in ["key.pem", "certificate.pem"] {
        fs::copy(theirs.context("good").join(file), folder.join(file)).unwrap();
    }
    refused("stranger");
    // A certificate of ours that is over.
    let (certificate, key) = expired(&agent);
    let folder = copy("expired");
    fs::write(folder.join("certificate.pem"), certificate).unwrap();
    fs::write(folder.join("key.pem"), key).unwrap();
    refused("expired");
    // None at all: not by the command line, and not by hand.
    let nobody = Remote::new(&agent, "nobody").ctl();
    let output = nobody.run(&["--endpoint", &endpoint(&agent), "list", "-o", "json"]);
    assert_eq!(output.code, 2, "it says how to get one: {}", output.stderr);
    assert!(output.stderr.contains("context add"), "{}", output.stderr);
    let spoken = anonymous_call(
        &agent,
        remote.context("good").join("authority.pem").as_path(),
    );
    assert_eq!(spoken, "16", "UNAUTHENTICATED");

    // TLS 1.2 is not spoken.
    let old = Command::new("openssl")
        .args([
            "s_client",
            "-tls1_2",
            "-connect",
            &format!("127.0.0.1:{}", agent.grpc_port()),
        ])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(
        !old.status.success(),
        "{}",
        String::from_utf8_lossy(&old.stdout)
    );
    ctl.ok(&["list"]);
    agent.audit();
}

/// Calls VmService.List over TLS without a certificate, by curl; returns the gRPC status.
fn anonymous_call(agent: &Agent, authority: &Path) -> String {
    let body = agent.folder().join("empty-message");
    fs::write(&body, [0; 5]).unwrap();
    let mut command = Command::new("curl");
    command
        .args([
            "-sS",
            "--http2",
            "--max-time",
            "20",
            "-D",
            "-",
            "-o",
            "/dev/null",
        ])
        .args(["--cacert", authority.to_str().unwrap()])
        .args(["-H", "content-type: application/grpc", "-H", "te: trailers"])
        .args(["--data-binary", &format!("@{}", body.display())])
        .arg(format!(
            "https://127.0.0.1:{}/ghost.agent.v1.VmService/List",
            agent.grpc_port()
        ));
    // The refusal needs no body, and comes before curl has sent its own now and then; curl 7.88 then
    // fails (92) instead of reading the answer, as RFC 9113, 8.1 has it.
    let mut output = command.output().unwrap();
    for _ in 0..20 {
        if output.status.code() != Some(92) {
            break;
        }
        output = command.output().unwrap();
    }
    let head = String::from_utf8_lossy(&output.stdout).to_lowercase();
    head.lines()
        .find_map(|line| {
            line.strip_prefix("grpc-status:")
                .map(|status| status.trim().to_owned())
        })
        .unwrap_or_default()
}

#[test]
fn http_serves_what_grpc_serves() {
    let agent = Builder::simulated().start();
    agent.import_tiny();
    let ctl = agent.ctl();
    let port = agent.http_port();
    let key = |role: &str| {
        let secret = ctl.ok(&["key", "create", role, "--role", role]);
        format!("Bearer {}", secret.trim())
    };
    let (viewer, operator) = (key("viewer"), key("operator"));
    let call = |key: &str, method: &str, path: &str, more: &[(&str, &str)], body: &str| {
        let headers = [
            &[("authorization", key), ("content-type", "application/json")],
            more,
        ]
        .concat();
        http::request(port, method, path, &headers, body.as_bytes()).unwrap()
    };

    for path in ["/health", "/live", "/ready"] {
        assert_eq!(http::get(port, path).unwrap().status, 200, "{path}");
    }
    let document = call(&viewer, "GET", "/v1/openapi.json", &[], "");
    assert_eq!(document.status, 200);
    let document = document.json();
    assert!(text(&document["openapi"]).starts_with("3."), "{document}");
    for path in [
        "/v1/vms",
        "/v1/vms/{vm}",
        "/v1/images",
        "/v1/operations/{id}",
        "/v1/events",
        "/v1/host",
    ] {
        assert!(document["paths"].get(path).is_some(), "{path}");
    }

    // A change: 202, its operation, and where to follow it; the same key, the same operation.
    let vm = agent.name("web");
    let body = format!(
        r#"{{"name":"{vm}","image":"tiny","vcpus":1,"memory_bytes":134217728,"disk_bytes":134217728,"start":true}}"#
    );
    let first = call(
        &operator,
        "POST",
        "/v1/vms",
        &[("idempotency-key", "k1")],
        &body,
    );
    assert_eq!(first.status, 202, "{}", first.body);
    let location = first.header("location").to_owned();
    let again = call(
        &operator,
        "POST",
        "/v1/vms",
        &[("idempotency-key", "k1")],
        &body,
    );
    assert_eq!(again.json()["id"], first.json()["id"]);
    wait::until("the operation has ended", Duration::from_secs(30), || {
        (call(&viewer, "GET", &location, &[], "").json()["status"] == "succeeded").then_some(())
    });
    let shown = call(&viewer, "GET", &format!("/v1/vms/{vm}"), &[], "");
    assert_eq!(shown.json()["state"], "running");
    // The same JSON as the command line's, ages aside.
    let by_ctl = ctl.json(&["vm", "show", &vm]);
    let keys = |value: &serde_json::Value| -> BTreeSet<String> {
        value.as_object().unwrap().keys().cloned().collect()
    };
    assert_eq!(keys(&shown.json()), keys(&by_ctl));
    assert_eq!(shown.json()["id"], by_ctl["id"]);

    // The generation guards against lost updates.
    let tag = shown.header("etag").to_owned();
    assert!(!tag.is_empty());
    let patch = |tag: &str| {
        call(
            &operator,
            "PATCH",
            &format!("/v1/vms/{vm}"),
            &[("if-match", tag)],
            r#"{"tags":{"a":"b"}}"#,
        )
    };
    let answer = patch("\"999\"");
    assert!(
        [409, 412].contains(&answer.status),
        "{} {}",
        answer.status,
        answer.body
    );
    assert_eq!(answer.json()["code"], "generation_mismatch");

    // Roles, and no key at all.
    let denied = call(&viewer, "DELETE", &format!("/v1/vms/{vm}"), &[], "");
    assert_eq!(
        (denied.status, denied.json()["code"].as_str()),
        (403, Some("permission_denied"))
    );
    assert_eq!(
        call("Bearer ghost_x_y", "GET", "/v1/vms", &[], "").status,
        401
    );
    let headers = [("x-api-key", viewer.trim_start_matches("Bearer "))];
    assert_eq!(
        http::request(port, "GET", "/v1/host", &headers, b"")
            .unwrap()
            .status,
        200
    );

    // Events, as they come.
    let mut stream = http::connect(port).unwrap();
    write!(stream, "GET /v1/events HTTP/1.1\r\nhost: x\r\nauthorization: {viewer}\r\naccept: text/event-stream\r\n\r\n").unwrap();
    ctl.ok(&["vm", "stop", &vm, "--force"]);
    let mut lines = BufReader::new(stream).lines();
    let head = lines.next().unwrap().unwrap();
    assert!(head.contains("200"), "{head}");
    let seen = lines
        .map_while(Result::ok)
        .filter_map(|line| {
            line.strip_prefix("data:")
                .map(|data| data.trim().to_owned())
        })
        .filter_map(|data| serde_json::from_str::<serde_json::Value>(&data).ok())
        .find(|event| {
            event["kind"] == "vm_state"
                && event["subject"] == vm.as_str()
                && event["message"].to_string().contains("stopped")
        });
    assert!(seen.is_some(), "no event of the stop");

    let gone = call(&operator, "DELETE", &format!("/v1/vms/{vm}"), &[], "");
    assert_eq!(gone.status, 202, "{}", gone.body);
    agent.wait_idle(Duration::from_secs(30));
    assert_eq!(
        call(&viewer, "GET", &format!("/v1/vms/{vm}"), &[], "").status,
        404
    );
    // A revoked key is no key.
    let keys = ctl.json(&["key", "list"]);
    for known in keys.as_array().unwrap() {
        ctl.ok(&["key", "revoke", &text(&known["id"])]);
    }
    assert_eq!(call(&viewer, "GET", "/v1/vms", &[], "").status, 401);
    agent.audit();
}

/// What `promtool check metrics` looks for, for hosts without it.
fn lint(exposition: &str) -> Vec<String> {
    let mut problems = Vec::new();
    let mut kinds: BTreeMap<&str, &str> = BTreeMap::new();
    let mut helped: BTreeSet<&str> = BTreeSet::new();
    let mut series: BTreeSet<&str> = BTreeSet::new();
    for line in exposition.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').unwrap_or((rest, ""));
            if help.trim().is_empty() || !helped.insert(name) {
                problems.push(format!("{name}: its help is missing or stands twice"));
            }
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap_or((rest, ""));
            if kinds.insert(name, kind).is_some() {
                problems.push(format!("{name}: its type stands twice"));
            }
            if (kind == "counter") != name.ends_with("_total") {
                problems.push(format!(
                    "{name}: a {kind}; counters, and only they, end in _total"
                ));
            }
            for unit in [
                "_milliseconds",
                "_ms",
                "_minutes",
                "_kib",
                "_mib",
                "_megabytes",
                "_percent",
            ] {
                if name.contains(unit) {
                    problems.push(format!("{name}: not in a base unit"));
                }
            }
        } else if !line.is_empty() && !line.starts_with('#') {
            let (id, value) = line.rsplit_once(' ').unwrap_or((line, ""));
            if value.parse::<f64>().is_err() {
                problems.push(format!("{line}: no value"));
            }
            if !series.insert(id) {
                problems.push(format!("{id}: stands twice"));
            }
            let name = id.split('{').next().unwrap_or(id);
            let family = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|end| {
                    name.strip_suffix(end)
                        .filter(|base| kinds.contains_key(base))
                })
                .unwrap_or(name);
            if !kinds.contains_key(family) || !helped.contains(family) {
                problems.push(format!("{name}: without type or help"));
            }
        }
    }
    problems
}

#[test]
fn the_lint_finds_what_is_wrong() {
    let good =
        "# HELP ghost_x_total X.\n# TYPE ghost_x_total counter\nghost_x_total{a=\"b c\"} 1\n";
    assert_eq!(lint(good), Vec::<String>::new());
    for (from, to) in [
        ("_total", ""),
        ("# HELP", "# NOTE"),
        ("} 1", "} one"),
        ("x_total", "x_ms_total"),
    ] {
        assert!(!lint(&good.replace(from, to)).is_empty(), "{from} -> {to}");
    }
    assert!(!lint(&format!("{good}ghost_x_total{{a=\"b c\"}} 2\n")).is_empty());
}

#[test]
fn metrics_tell_of_the_vm_and_are_clean() {
    let agent = Builder::simulated().start();
    agent.import_tiny();
    let vm = agent.name("web");
    launch(&agent, &vm);
    let scrape = http::get(agent.metrics_port(), "/metrics").unwrap();
    assert_eq!(scrape.status, 200);
    assert!(
        scrape.header("content-type").starts_with("text/plain"),
        "{:?}",
        scrape.headers
    );
    assert_eq!(lint(&scrape.body), Vec::<String>::new(), "{}", scrape.body);
    let ours: Vec<&str> = scrape
        .body
        .lines()
        .filter(|line| line.contains(&format!("\"{vm}\"")))
        .collect();
    for part in ["cpu_seconds_total", "memory", "block", "network"] {
        assert!(
            ours.iter().any(|line| line.contains(part)),
            "{part} of the VM: {ours:#?}"
        );
    }
    for name in ["ghost_build_info", "ghost_operations"] {
        assert!(scrape.body.contains(name), "{name}");
    }
    for line in scrape
        .body
        .lines()
        .filter(|line| !line.starts_with('#') && !line.is_empty())
    {
        assert!(
            ["ghost_", "process_"]
                .iter()
                .any(|prefix| line.starts_with(prefix)),
            "{line}"
        );
    }
    match Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .spawn()
    {
        Ok(mut promtool) => {
            promtool
                .stdin
                .take()
                .unwrap()
                .write_all(scrape.body.as_bytes())
                .unwrap();
            assert!(promtool.wait().unwrap().success());
        }
        Err(_) => println!("promtool is not installed: held to its rules by the test's own lint"),
    }
    agent.ctl().ok(&["vm", "delete", &vm, "--force"]);
    agent.audit();
}

#[test]
fn one_trace_leads_from_ghostctl_to_the_libvirt_call() {
    let collector = Collector::start();
    let agent = Builder::new()
        .set("telemetry.otlp_endpoint", collector.endpoint())
        .start();
    agent.import_tiny();
    let vm = agent.name("traced");
    let ctl = agent
        .ctl()
        .with_env("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint());
    let output = ctl.run(&tiny(
        &["vm", "create", &vm, "--image", "tiny", "--debug"],
        &[],
    ));
    assert_eq!(output.code, 0, "{}", output.stderr);
    let parent = output
        .stderr
        .lines()
        .find_map(|line| line.split("traceparent ").nth(1))
        .unwrap_or_else(|| panic!("no traceparent: {}", output.stderr));
    let parts: Vec<&str> = parent.trim().split('-').collect();
    let (trace, caller) = (parts[1], parts[2]);
    // It begins in ghostctl, whose span has come when ghostctl is done.
    let roots: Vec<_> = collector
        .of(trace)
        .into_iter()
        .filter(|span| span.service == "ghostctl")
        .collect();
    let [root] = roots.as_slice() else {
        panic!("one span is ghostctl's: {roots:#?}");
    };
    assert_eq!(
        (root.name.as_str(), root.id.as_str(), root.parent.as_str()),
        ("ghostctl vm create", caller, "")
    );
    wait::until_ok(
        "the agent's part of the request",
        Duration::from_secs(30),
        || {
            let spans = collector.of(trace);
            let below: Vec<_> = spans.iter().filter(|span| span.parent == root.id).collect();
            let of_agent = |span: &&crate::collector::Span| {
                span.name == "rpc" && span.service == "ghost-agent"
            };
            if !below.is_empty() && below.iter().all(of_agent) {
                Ok(())
            } else {
                Err(format!("{spans:#?}"))
            }
        },
    );
    wait::until_ok("spans of libvirt calls", Duration::from_secs(30), || {
        let spans = collector.of(trace);
        let told: Vec<String> = spans
            .iter()
            .map(|span| {
                format!(
                    "{} {:?} {} <- {}",
                    span.name, span.attributes, span.id, span.parent
                )
            })
            .collect();
        // From a span of a libvirt call up to the caller's own.
        let by_id: BTreeMap<&str, &crate::collector::Span> =
            spans.iter().map(|span| (span.id.as_str(), span)).collect();
        let leads_home = |span: &crate::collector::Span| {
            let mut at = span.parent.as_str();
            for _ in 0..32 {
                if at == caller {
                    return true;
                }
                match by_id.get(at) {
                    Some(above) => at = &above.parent,
                    None => return false,
                }
            }
            false
        };
        let defines = spans.iter().find(|span| {
            span.name.contains("libvirt")
                && span
                    .attributes
                    .iter()
                    .any(|(_, value)| value.contains("define"))
        });
        match defines {
            Some(span) if leads_home(span) => Ok(()),
            _ => Err(told.join("\n")),
        }
    });
    // The log can be searched by the request's id as well.
    let request = output
        .stderr
        .lines()
        .find_map(|line| line.split("x-request-id ").nth(1))
        .unwrap()
        .trim();
    assert!(
        agent.log().contains(request),
        "the request id is not in the log"
    );
    agent.ctl().ok(&["vm", "delete", &vm]);
    agent.audit();
}

#[test]
fn completion_offers_the_names_of_live_vms() {
    let agent = Builder::simulated().start();
    agent.import_tiny();
    let vm = agent.name("complete-me");
    agent
        .ctl()
        .ok(&tiny(&["vm", "create", &vm, "--image", "tiny"], &[]));
    let script = agent.ctl().ok(&["completion", "bash"]);
    assert!(script.contains("ghostctl"), "{script}");
    // The protocol of clap's bash completion: the words, and which of them is being completed.
    let output = Command::new(program("ghostctl"))
        .args(["--", "ghostctl", "vm", "stop", ""])
        .env("COMPLETE", "bash")
        .env("_CLAP_COMPLETE_INDEX", "3")
        .env("_CLAP_IFS", "\n")
        .env(
            "GHOST_ENDPOINT",
            format!("unix:{}", agent.socket().display()),
        )
        .output()
        .unwrap();
    let offered = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(offered.lines().any(|line| line == vm), "{offered}");
    agent.ctl().ok(&["vm", "delete", &vm]);
    agent.audit();
}
