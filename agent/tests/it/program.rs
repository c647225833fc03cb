//! The program as its users meet it: exit codes, words, and a whole life on the simulated
//! hypervisor.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// How long anything may take on a busy machine; what is waited for ends the wait.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn agent() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ghost-agent"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("GHOST_") {
            command.env_remove(name);
        }
    }
    command.env_remove("NOTIFY_SOCKET").stdin(Stdio::null());
    command
}

pub(crate) fn output(arguments: &[&str]) -> (i32, String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = agent().args(arguments).output().unwrap();
    (
        status.code().unwrap_or(-1),
        String::from_utf8(stdout).unwrap(),
        String::from_utf8(stderr).unwrap(),
    )
}

/// An agent on a simulated hypervisor in a folder of its own. Killed at the end, however that comes.
pub(crate) struct Agent {
    folder: tempfile::TempDir,
    child: Option<Child>,
}

impl Agent {
    pub(crate) fn prepare(extra: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().display();
        let text = format!(
            "agent: {{data_dir: {path}/data}}\nlibvirt: {{uri: 'simulated:{path}/world'}}\n\
             grpc: {{listen: '127.0.0.1:0', socket: {path}/agent.sock}}\n\
             http: {{listen: '127.0.0.1:0'}}\nmetrics: {{listen: '127.0.0.1:0'}}\n{extra}"
        );
        fs::create_dir(folder.path().join("world")).unwrap();
        fs::write(folder.path().join("agent.yaml"), text).unwrap();
        Self {
            folder,
            child: None,
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self) -> Command {
        let mut command = agent();
        command
            .args(["run", "--config"])
            .arg(self.path("agent.yaml"))
            .stdout(Stdio::null());
        command
    }

    pub(crate) fn start(&mut self) {
        let command = self.command();
        self.start_with(command);
    }

    fn start_with(&mut self, mut command: Command) {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.path("log"))
            .unwrap();
        self.child = Some(command.stderr(log).spawn().unwrap());
        let before = self.log().matches("ghost-agent runs").count();
        self.wait("the agent to run", |agent| {
            agent.log().matches("ghost-agent runs").count() > before.saturating_sub(1)
                && UnixStream::connect(agent.path("agent.sock")).is_ok()
        });
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    pub(crate) fn wait(&mut self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let until = Instant::now() + PATIENCE;
        while !done(self) {
            if let Some(Ok(Some(status))) = self.child.as_mut().map(Child::try_wait) {
                panic!(
                    "the agent ended ({status}) instead of {what}\n{}",
                    self.log()
                );
            }
            assert!(
                Instant::now() < until,
                "no end of waiting for {what}\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().unwrap();
        let pid = Pid::from_child(child);
        kill_process(pid, signal).unwrap();
    }

    pub(crate) fn ended(&mut self) -> ExitStatus {
        let mut child = self.child.take().unwrap();
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status;
            }
            if Instant::now() > until {
                drop(child.kill());
                drop(child.wait());
                panic!("the agent does not end\n{}", self.log());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The address that a listener says it has.
    pub(crate) fn address(&self, what: &str) -> SocketAddr {
        let log = self.log();
        let line = log
            .lines()
            .rfind(|line| line.contains(&format!("{what} listens address=")))
            .unwrap_or_else(|| panic!("{what} is missing in\n{log}"));
        let text = line.split("address=").nth(1).unwrap();
        text.split_whitespace().next().unwrap().parse().unwrap()
    }

    pub(crate) fn get(&self, address: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            drop(child.kill());
            drop(child.wait());
        }
    }
}

#[test]
fn it_serves_until_it_is_told_to_end_and_comes_back_after_a_kill() {
    let mut agent = Agent::prepare("");
    agent.start();
    let ready = agent.get(agent.address("HTTP"), "/live");
    assert!(ready.starts_with("HTTP/1.1 200"), "{ready}");
    let metrics = agent.get(agent.address("metrics"), "/metrics");
    assert!(metrics.contains("ghost_"), "{metrics}");
    agent.signal(Signal::KILL);
    assert!(!agent.ended().success());
    assert!(
        agent.path("agent.sock").exists(),
        "a killed agent cleans nothing up"
    );

    fs::remove_file(agent.path("log")).unwrap();
    agent.start();
    agent.signal(Signal::TERM);
    assert!(agent.ended().success(), "{}", agent.log());
    assert!(!agent.path("agent.sock").exists());
    let log = agent.log();
    assert!(
        log.contains("shutting down; VMs go on signal=SIGTERM"),
        "{log}"
    );
    assert!(!log.contains("ERROR") && !log.contains("damaged"), "{log}");
}

#[test]
fn two_agents_do_not_share_a_data_folder_nor_a_port() {
    let mut first = Agent::prepare("");
    first.start();
    let second = first.command().stderr(Stdio::piped()).output().unwrap();
    let words = String::from_utf8(second.stderr).unwrap();
    assert_eq!(second.status.code(), Some(1), "{words}");
    assert!(
        words.contains("another ghost-agent runs on this data folder"),
        "{words}"
    );
    assert!(words.contains("try: stop it first"), "{words}");

    let taken = first.address("HTTP");
    let other = Agent::prepare("");
    let third = other
        .command()
        .env("GHOST_HTTP__LISTEN", taken.to_string())
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    let words = String::from_utf8(third.stderr).unwrap();
    assert_eq!(third.status.code(), Some(1), "{words}");
    assert!(
        words.contains(&format!("cannot listen on {taken}")),
        "{words}"
    );
    assert!(words.contains("http.listen"), "{words}");
    // Nothing was begun before the ports were bound.
    assert!(!other.path("data/state").exists());
}

/// systemd's side of sd_notify(3).
#[test]
fn systemd_is_told_of_readiness_health_and_the_end() {
    let mut agent = Agent::prepare("");
    let systemd = UnixDatagram::bind(agent.path("notify")).unwrap();
    systemd.set_read_timeout(Some(PATIENCE)).unwrap();
    let next = || {
        let mut bytes = [0; 256];
        let length = systemd.recv(&mut bytes).expect("a message to systemd");
        String::from_utf8(bytes[..length].to_vec()).unwrap()
    };
    let mut command = agent.command();
    command
        .env("NOTIFY_SOCKET", agent.path("notify"))
        .env("WATCHDOG_USEC", "200000");
    agent.start_with(command);
    assert!(next().starts_with("READY=1"));
    assert_eq!(next(), "WATCHDOG=1");
    assert_eq!(next(), "WATCHDOG=1");
    agent.signal(Signal::TERM);
    let mut last = next();
    while last == "WATCHDOG=1" {
        last = next();
    }
    assert!(last.starts_with("STOPPING=1"), "{last}");
    assert!(agent.ended().success());
}

#[test]
fn the_log_is_json_where_that_is_asked_for() {
    let mut agent = Agent::prepare("logging: {format: json}\n");
    agent.start();
    agent.signal(Signal::INT);
    assert!(agent.ended().success());
    let log = agent.log();
    assert!(log.lines().count() >= 5, "{log}");
    for line in BufReader::new(log.as_bytes()).lines() {
        let line = line.unwrap();
        let object: serde_json::Value =
            serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
        for key in ["time", "level", "target", "message"] {
            assert!(object[key].is_string(), "{key} in {line}");
        }
    }
}

#[test]
fn a_collector_that_is_away_changes_nothing() {
    let mut agent = Agent::prepare("telemetry: {otlp_endpoint: 'http://127.0.0.1:9'}\n");
    agent.start();
    let live = agent.get(agent.address("HTTP"), "/live");
    assert!(live.starts_with("HTTP/1.1 200"), "{live}");
    agent.signal(Signal::TERM);
    assert!(agent.ended().success(), "{}", agent.log());
}

#[test]
fn a_wrong_configuration_is_told_whole_and_ends_with_78() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("agent.yaml");
    fs::write(&file, "grpc:\n  listn: ':1'\nstore: {engine: none}\n").unwrap();
    let file = file.to_str().unwrap();
    for arguments in [
        &["config", "check", file][..],
        &["config", "show", "--config", file],
        &["run", "--config", file],
        &["doctor", "--config", file],
    ] {
        let (code, out, errors) = output(arguments);
        assert_eq!(code, 78, "{arguments:?}: {errors}");
        assert_eq!(out, "", "{arguments:?}");
        assert!(
            errors.contains(&format!("{file}:2:3: grpc.listn: there is no such key")),
            "{errors}"
        );
        assert!(errors.contains("did you mean listen?"), "{errors}");
        assert!(
            errors.contains(&format!("{file}:3:17: store.engine:")),
            "{errors}"
        );
    }
}

#[test]
fn the_example_passes_and_shows_its_defaults() {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/agent.yaml");
    let example = example.to_str().unwrap();
    let (code, out, errors) = output(&["config", "check", example]);
    assert_eq!((code, errors.as_str()), (0, ""), "{out}");
    let (code, out, _) = output(&["config", "show", "--config", example]);
    assert_eq!(code, 0);
    assert!(
        out.contains("  listen: :9090") || out.contains("  listen: \":9090\""),
        "{out}"
    );
}

#[test]
fn the_doctor_looks_at_this_host_and_says_so_in_both_ways() {
    let agent = Agent::prepare("");
    let config = agent.path("agent.yaml");
    let config = config.to_str().unwrap();
    let (code, out, errors) = output(&["doctor", "--config", config, "-o", "json"]);
    let findings: serde_json::Value =
        serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}{errors}"));
    let findings = findings.as_array().unwrap();
    let fatal = findings.iter().any(|finding| finding["level"] == "fatal");
    assert_eq!(code, i32::from(fatal), "{out}");
    for finding in findings {
        assert_eq!(
            finding["level"] != "ok",
            finding["fix"].is_string(),
            "{finding}"
        );
    }
    let of = |check: &str| findings.iter().find(|finding| finding["check"] == check);
    assert_eq!(of("data-dir").unwrap()["level"], "ok");
    assert!(of("libvirt").is_none(), "a simulation needs no libvirt");
    let (_, text, _) = output(&["doctor", "--config", config]);
    assert!(text.lines().last().unwrap().ends_with(" ok"), "{text}");
    assert!(!agent.path("data").exists(), "the doctor changes nothing");
}

#[test]
fn a_host_that_is_not_fit_is_told_before_anything_is_begun() {
    let agent = Agent::prepare("");
    let locked = agent.path("locked");
    fs::write(&locked, "a file, and no folder").unwrap();
    let started = agent
        .command()
        .env("GHOST_AGENT__DATA_DIR", locked.join("data"))
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    let words = String::from_utf8(started.stderr).unwrap();
    assert_eq!(started.status.code(), Some(1), "{words}");
    assert!(
        words.contains("error: ") && words.contains("  cause: "),
        "{words}"
    );
    assert!(!agent.path("agent.sock").exists());
}

#[test]
fn the_version_is_told() {
    let (code, out, _) = output(&["version"]);
    assert_eq!(
        (code, out.as_str()),
        (0, concat!("ghost-agent ", env!("CARGO_PKG_VERSION"), "\n"))
    );
}
