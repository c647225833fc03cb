//! Contexts and TLS, against a real TLS server.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Output;

use tempfile::TempDir;

use crate::fake::{Authority, FakeAgent};
use crate::run::{bare, finish, transcript};

/// A person elsewhere, and an agent behind TLS.
struct Remote {
    home: TempDir,
    agent: FakeAgent,
}

impl Remote {
    fn new() -> Self {
        Self {
            home: tempfile::tempdir().unwrap(),
            agent: FakeAgent::start_tls(Authority::new("ghost CA of pc-1")),
        }
    }

    fn run(&self, args: &[&str]) -> Output {
        let mut command = bare(self.home.path(), args);
        command
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped());
        finish(command.spawn().unwrap())
    }

    /// As a transcript, without what differs between runs.
    fn says(&self, args: &[&str]) -> String {
        let output = self.run(args);
        self.tell(args, &output)
    }

    fn tell(&self, args: &[&str], output: &Output) -> String {
        let port = self.agent.endpoint().rsplit(':').next().unwrap().to_owned();
        let secrets = [
            (self.agent.state.authority.fingerprint(), "[FINGERPRINT]"),
            (self.home.path().display().to_string(), "[HOME]"),
            (port, "[PORT]"),
        ];
        transcript(&args.join(" "), output, &secrets)
    }

    fn add(&self, name: &str) -> Output {
        let (endpoint, token) = (self.agent.endpoint(), self.agent.state.authority.token());
        self.run(&[
            "context",
            "add",
            name,
            "--endpoint",
            &endpoint,
            "--token",
            &token,
        ])
    }

    fn folder(&self, name: &str) -> PathBuf {
        self.home.path().join(".config/ghost/contexts").join(name)
    }
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn a_token_becomes_a_context_that_works() {
    let remote = Remote::new();
    let output = remote.add("lab");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let folder = remote.folder("lab");
    assert_eq!(mode(&folder), 0o700);
    for file in [
        "context.yaml",
        "key.pem",
        "certificate.pem",
        "authority.pem",
    ] {
        assert_eq!(mode(&folder.join(file)), 0o600, "{file}");
    }
    // The key was made here: the agent saw a request, signed by it, and never the key.
    let key = std::fs::read_to_string(folder.join("key.pem")).unwrap();
    let body = key.lines().nth(1).unwrap();
    for request in remote.agent.requests() {
        assert!(!request.contains(body));
    }
    let endpoint = remote.agent.endpoint();
    let mut text = remote.tell(&["context", "add", "lab"], &output);
    for args in [
        &["--context", "lab", "list", "-o", "name"][..],
        &["--endpoint", &endpoint, "list", "-o", "name"],
        &["context", "list"],
        &["context", "use", "lab"],
        &["list", "-o", "name"],
        &["context", "show", "lab"],
        &["context", "list", "-o", "name"],
        &["context", "remove", "lab"],
        &["context", "list"],
        &["context", "show", "lab"],
    ] {
        text.push_str(&remote.says(args));
    }
    insta::assert_snapshot!(text.replace(&remote.agent.endpoint(), "https://localhost:[PORT]"));
}

#[test]
fn a_context_is_chosen_by_flag_before_environment_before_current() {
    let remote = Remote::new();
    assert!(remote.add("lab").status.success());
    let chosen = |args: &[&str], env: &[(&str, &str)]| {
        let mut command = bare(remote.home.path(), args);
        command
            .envs(env.iter().copied())
            .arg("--debug")
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped());
        let output = finish(command.spawn().unwrap());
        let stderr = String::from_utf8(output.stderr).unwrap();
        stderr.lines().next().unwrap().to_owned()
    };
    let lab = format!("debug: endpoint {}", remote.agent.endpoint());
    let local = "debug: endpoint unix:/run/ghost/agent.sock";
    assert_eq!(chosen(&["list"], &[]), local);
    assert_eq!(chosen(&["list"], &[("GHOST_CONTEXT", "lab")]), lab);
    assert!(remote.run(&["context", "use", "lab"]).status.success());
    assert_eq!(chosen(&["list"], &[]), lab);
    assert_eq!(chosen(&["list", "--context", "local"], &[]), local);
    assert_eq!(
        chosen(&["list"], &[("GHOST_ENDPOINT", "unix:/none")]),
        "debug: endpoint unix:/none"
    );
    assert_eq!(
        chosen(
            &["list", "--context", "lab"],
            &[("GHOST_ENDPOINT", "unix:/none")]
        ),
        lab
    );
}

#[test]
fn a_token_of_another_agent_is_refused_before_it_is_sent() {
    let remote = Remote::new();
    let token = Authority::new("ghost CA of pc-1").token();
    let endpoint = remote.agent.endpoint();
    let text = remote.says(&[
        "context",
        "add",
        "lab",
        "--endpoint",
        &endpoint,
        "--token",
        &token,
    ]);
    insta::assert_snapshot!(text.replace(&token, "[TOKEN]"));
    assert!(
        remote.agent.requests().is_empty(),
        "the secret was not sent"
    );
    assert!(!remote.folder("lab").exists());
}

#[test]
fn a_used_token_leaves_no_context() {
    let remote = Remote::new();
    let token = remote
        .agent
        .state
        .authority
        .token()
        .replace(".secret.", ".used.");
    let endpoint = remote.agent.endpoint();
    let output = remote.run(&[
        "context",
        "add",
        "lab",
        "--endpoint",
        &endpoint,
        "--token",
        &token,
    ]);
    assert_eq!(output.status.code(), Some(6));
    assert!(!remote.folder("lab").exists());
    let output = remote.run(&[
        "context",
        "add",
        "lab",
        "--endpoint",
        &endpoint,
        "--token",
        "nonsense",
    ]);
    assert_eq!(output.status.code(), Some(6));
}

#[test]
fn another_agent_in_its_place_is_noticed() {
    let remote = Remote::new();
    assert!(remote.add("lab").status.success());
    let other = Remote::new();
    let settings = remote.folder("lab").join("context.yaml");
    let text = std::fs::read_to_string(&settings).unwrap();
    let moved = text.replace(&remote.agent.endpoint(), &other.agent.endpoint());
    assert_ne!(moved, text);
    std::fs::write(&settings, moved).unwrap();
    let output = remote.run(&["--context", "lab", "status"]);
    insta::assert_snapshot!(other.tell(&["--context", "lab", "status"], &output));
    assert!(other.agent.requests().is_empty());
}

#[test]
fn a_certificate_that_the_agent_does_not_know_is_refused() {
    let remote = Remote::new();
    assert!(remote.add("lab").status.success());
    let other = Remote::new();
    assert!(other.add("lab").status.success());
    for file in ["key.pem", "certificate.pem"] {
        std::fs::copy(
            other.folder("lab").join(file),
            remote.folder("lab").join(file),
        )
        .unwrap();
    }
    insta::assert_snapshot!(remote.says(&["--context", "lab", "status"]));
}

#[test]
fn an_expired_certificate_says_so() {
    let remote = Remote::new();
    *remote.agent.state.lifetime.lock().unwrap() = (-86_400, -60);
    assert!(remote.add("lab").status.success());
    insta::assert_snapshot!(remote.says(&["--context", "lab", "status"]));
}

#[test]
fn a_certificate_past_its_half_renews_itself() {
    let remote = Remote::new();
    *remote.agent.state.lifetime.lock().unwrap() = (-20 * 3600, 4 * 3600);
    assert!(remote.add("lab").status.success());
    let path = remote.folder("lab").join("certificate.pem");
    let before = std::fs::read_to_string(&path).unwrap();
    *remote.agent.state.lifetime.lock().unwrap() = (-60, 86_400);
    assert!(remote.run(&["--context", "lab", "list"]).status.success());
    let after = std::fs::read_to_string(&path).unwrap();
    assert_ne!(after, before);
    assert_eq!(mode(&path), 0o600);
    let renewals = || {
        let requests = remote.agent.requests();
        requests
            .iter()
            .filter(|request| request.starts_with("RenewRequest"))
            .count()
    };
    assert_eq!(renewals(), 1);
    // The new one is young, and it works.
    assert!(remote.run(&["--context", "lab", "list"]).status.success());
    assert_eq!(renewals(), 1);
    let left: Vec<_> = std::fs::read_dir(remote.folder("lab")).unwrap().collect();
    assert_eq!(left.len(), 4, "no file was left behind");
}

#[test]
fn a_useless_renewal_is_a_warning_and_changes_nothing() {
    let remote = Remote::new();
    *remote.agent.state.lifetime.lock().unwrap() = (-20 * 3600, 4 * 3600);
    assert!(remote.add("lab").status.success());
    let path = remote.folder("lab").join("certificate.pem");
    let before = std::fs::read_to_string(&path).unwrap();
    *remote.agent.state.lifetime.lock().unwrap() = (-3600, -60);
    let output = remote.run(&["--context", "lab", "list", "-o", "name"]);
    assert!(output.status.success());
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(
        stderr.starts_with("warning: the certificate of the context lab"),
        "{stderr}"
    );
    assert_eq!(std::fs::read_to_string(&path).unwrap(), before);
}

#[test]
fn contexts_do_not_overwrite_each_other() {
    let remote = Remote::new();
    assert!(remote.add("lab").status.success());
    let again = remote.add("lab");
    assert_eq!(again.status.code(), Some(4));
    let (endpoint, token) = (
        remote.agent.endpoint(),
        remote.agent.state.authority.token(),
    );
    let replaced = remote.run(&[
        "context",
        "add",
        "lab",
        "--replace",
        "--use",
        "--endpoint",
        &endpoint,
        "--token",
        &token,
    ]);
    assert!(replaced.status.success());
    assert_eq!(remote.run(&["list", "-q"]).status.code(), Some(0));
    for (name, code) in [("local", 4), ("../x", 2), ("", 2)] {
        let output = remote.run(&["context", "add", name, "--endpoint", "unix:/x"]);
        assert_eq!(output.status.code(), Some(code), "{name}");
    }
    assert_eq!(
        remote.run(&["context", "use", "none"]).status.code(),
        Some(3)
    );
    assert_eq!(
        remote.run(&["context", "remove", "none"]).status.code(),
        Some(3)
    );
    let plain = remote.run(&["context", "add", "here", "--endpoint", "unix:/x"]);
    assert!(plain.status.success());
}

#[test]
fn tls_to_something_else_is_five() {
    let remote = Remote::new();
    assert!(remote.add("lab").status.success());
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let stranger = std::thread::spawn(move || {
        use std::io::Write;
        let (mut stream, _) = listener.accept().unwrap();
        stream
            .write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            .unwrap();
    });
    let endpoint = format!("https://localhost:{port}");
    let output = remote.run(&["--context", "lab", "--endpoint", &endpoint, "status"]);
    stranger.join().unwrap();
    assert_eq!(
        output.status.code(),
        Some(5),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
