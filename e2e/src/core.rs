//! A real `ghost-core` with a data folder, ports and a socket of its own; gone without a trace at the
//! end of the test, however that ends.

use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::agent::{self, free_port, merge, own_environment, set};
use crate::binaries::program;
use crate::ctl::{self, Ctl};
use crate::wait;

/// How long Core may take to come up on a busy machine.
const START: Duration = Duration::from_secs(60);

/// What the names of their folders begin with.
const PREFIX: &str = "ghost-e2e-core-";

/// How a Core is set up.
pub struct Builder {
    config: Value,
    environment: Vec<(String, String)>,
    address: IpAddr,
    wrapper: Vec<String>,
}

/// A running (or killed, or stopped) Core.
pub struct Core {
    folder: TempDir,
    config: Value,
    environment: Vec<(String, String)>,
    wrapper: Vec<String>,
    address: IpAddr,
    ports: [u16; 3],
    child: Option<Child>,
}

impl Default for Builder {
    fn default() -> Self {
        Self::new()
    }
}

impl Builder {
    /// On loopback, with the embedded store.
    pub fn new() -> Self {
        Self {
            config: json!({}),
            environment: Vec::new(),
            address: IpAddr::V4(Ipv4Addr::LOCALHOST),
            wrapper: Vec::new(),
        }
    }

    /// In a network namespace ([`crate::netlab::NetLab::wrapper`]), where it listens on `address`.
    #[must_use]
    pub fn within(mut self, wrapper: &[String], address: IpAddr) -> Self {
        self.wrapper = wrapper.to_vec();
        self.address = address;
        self
    }

    /// Sets a key such as `link.heartbeat_interval`.
    #[must_use]
    pub fn set(mut self, key: &str, value: impl Into<Value>) -> Self {
        set(&mut self.config, key, value.into());
        self
    }

    /// Sets a variable of Core's environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Makes the folder and the configuration; Core is not started.
    ///
    /// # Panics
    /// Where that cannot be done.
    #[expect(clippy::expect_used, reason = "the test cannot go on")]
    pub fn prepare(self) -> Core {
        let folder = tempfile::Builder::new()
            .prefix(&format!("{PREFIX}{}-", std::process::id()))
            .permissions(fs::Permissions::from_mode(0o700))
            .tempdir()
            .expect("a folder for Core");
        let ports = [free_port(), free_port(), free_port()];
        let [grpc, http, metrics] = ports;
        let at = SocketAddr::new(self.address, grpc);
        let mut config = json!({
            "core": { "name": "core", "data_dir": folder.path().join("data"), "addresses": [at.to_string()] },
            "grpc": { "listen": at.to_string(), "socket": folder.path().join("core.sock") },
            "http": { "listen": format!("127.0.0.1:{http}") },
            "metrics": { "listen": format!("127.0.0.1:{metrics}") },
        });
        merge(&mut config, &self.config);
        Core {
            folder,
            config,
            environment: self.environment,
            wrapper: self.wrapper,
            address: self.address,
            ports,
            child: None,
        }
    }

    /// Starts it and waits until it answers.
    ///
    /// # Panics
    /// Where it does not.
    pub fn start(self) -> Core {
        let mut core = self.prepare();
        core.start();
        core
    }
}

impl Core {
    /// Starts it (again, on the same data) and waits until it answers.
    ///
    /// # Panics
    /// Where it does not.
    #[expect(clippy::panic, reason = "the test cannot go on")]
    pub fn start(&mut self) {
        self.spawn();
        let ctl = self.ctl();
        let ready = wait::poll(START, || {
            if let Some(Ok(Some(status))) = self.child.as_mut().map(Child::try_wait) {
                return Some(Err(status));
            }
            (ctl.run(&["status"]).code == 0).then_some(Ok(()))
        });
        match ready {
            Some(Ok(())) => {}
            Some(Err(status)) => panic!("Core ended by itself ({status})\n{}", self.log_tail()),
            None => panic!("Core does not answer\n{}", self.log_tail()),
        }
    }

    /// Starts the process and waits for nothing.
    ///
    /// # Panics
    /// Where it cannot be started, or runs already.
    #[expect(clippy::expect_used, reason = "the test cannot go on")]
    pub fn spawn(&mut self) {
        assert!(self.child.is_none(), "Core runs already");
        // JSON is YAML.
        fs::write(self.config_file(), self.config.to_string()).expect("the configuration");
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_file())
            .expect("the log");
        let mut words = self.wrapper.clone();
        words.push(program("ghost-core").display().to_string());
        self.child = Some(
            Command::new(&words[0])
                .args(&words[1..])
                .args(["run", "--config"])
                .arg(self.config_file())
                .env_clear()
                .envs(own_environment())
                .envs(self.environment.iter().cloned())
                .stdin(Stdio::null())
                .stdout(log.try_clone().expect("the log"))
                .stderr(log)
                .spawn()
                .expect("ghost-core"),
        );
    }

    /// Ends it at once, as a crash does.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            drop(child.kill());
            drop(child.wait());
        }
    }

    /// Stops it as systemd does.
    ///
    /// # Panics
    /// Where it does not end within 30 seconds, or not well.
    #[expect(clippy::panic, reason = "the test has failed")]
    pub fn stop(&mut self) {
        let Some(mut child) = self.child.take() else {
            return;
        };
        if let Ok(pid) = i32::try_from(child.id()) {
            // SAFETY: kill takes two numbers and touches no memory of ours; the process is a child
            // that has not been waited for, so the id is still its own.
            unsafe { libc::kill(pid, libc::SIGTERM) };
        }
        match ctl::wait(&mut child, Duration::from_secs(35)) {
            Some(status) if ExitStatus::success(&status) => {}
            other => panic!("Core ended with {other:?}\n{}", self.log_tail()),
        }
    }

    /// Its process.
    ///
    /// # Panics
    /// Where it does not run.
    #[expect(clippy::expect_used, reason = "the test cannot go on")]
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("Core runs").id()
    }

    /// Whether it was started and not ended by the test.
    pub const fn runs(&self) -> bool {
        self.child.is_some()
    }

    /// Sets a key for the next start.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) {
        set(&mut self.config, key, value.into());
    }

    /// `ghostctl` over its socket, as whoever may do everything.
    pub fn ctl(&self) -> Ctl {
        Ctl::new(
            program("ghostctl"),
            Some(format!("unix:{}", self.socket().display())),
        )
        .with_env("XDG_CONFIG_HOME", self.folder.path().join("config"))
    }

    /// `ghostctl` as another person, who begins without any context, in the namespace of `wrapper`.
    pub fn person(&self, name: &str) -> Ctl {
        Ctl::new(program("ghostctl"), None).with_env(
            "XDG_CONFIG_HOME",
            self.folder.path().join("people").join(name),
        )
    }

    /// A token for a host of a tenant.
    pub fn host_token(&self, tenant: &str) -> String {
        self.token(&["--tenant", tenant])
    }

    /// A token by `ghost-core token create`.
    ///
    /// # Panics
    /// Where there is none.
    #[expect(clippy::expect_used, reason = "the test cannot go on")]
    pub fn token(&self, arguments: &[&str]) -> String {
        let output = Command::new(program("ghost-core"))
            .args(["token", "create", "--socket"])
            .arg(self.socket())
            .args(arguments)
            .output()
            .expect("ghost-core token create");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "{text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        text.lines().next().unwrap_or_default().trim().to_owned()
    }

    /// A host as Core tells it; null where it is not there.
    pub fn host(&self, name: &str) -> Value {
        let output = self.ctl().run(&["host", "show", name, "-o", "json"]);
        serde_json::from_str(&output.stdout).unwrap_or_default()
    }

    /// Waits until a host is in a state.
    #[track_caller]
    pub fn wait_host(&self, name: &str, state: &str, within: Duration) -> Value {
        wait::until_ok(&format!("{name} is {state}"), within, || {
            let host = self.host(name);
            if host["state"] == state {
                Ok(host)
            } else {
                Err(format!("{}: {}", host["state"], host["state_reason"]))
            }
        })
    }

    /// Where hosts and people reach it.
    pub const fn address(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.ports[0])
    }

    /// The port of HTTP, on loopback of its namespace.
    pub const fn http_port(&self) -> u16 {
        self.ports[1]
    }

    /// The port of the metrics, on loopback of its namespace.
    pub const fn metrics_port(&self) -> u16 {
        self.ports[2]
    }

    /// A folder that goes away with it.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("core.sock")
    }

    /// The file that it is configured by.
    pub fn config_file(&self) -> PathBuf {
        self.folder.path().join("core.yaml")
    }

    /// What it writes.
    pub fn log_file(&self) -> PathBuf {
        self.folder.path().join("core.log")
    }

    /// All that it wrote.
    pub fn log(&self) -> String {
        fs::read(self.log_file())
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(80)..].join("\n")
    }
}

impl Drop for Core {
    #[expect(clippy::print_stderr, reason = "of a failed test the log is wanted")]
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("---- the end of Core's log ----\n{}\n----", self.log_tail());
        }
        self.kill();
    }
}

/// Ends and removes what the processes that `chosen` names left behind.
pub fn sweep_of(chosen: impl Fn(u32) -> bool) {
    for entry in fs::read_dir(std::env::temp_dir())
        .into_iter()
        .flatten()
        .flatten()
    {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split('-').next()?.parse::<u32>().ok());
        if pid.is_some_and(&chosen) {
            agent::kill_program_of("ghost-core", &entry.path().join("core.yaml"));
            drop(fs::remove_dir_all(entry.path()));
        }
    }
}
