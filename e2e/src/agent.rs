//! A real `ghost-agent` with a data folder, ports and sockets of its own, beside whatever else
//! runs on this host; gone without a trace at the end of the test, however that ends.

use std::fs::{self, File};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::auditor::{self, Hypervisor, Subject};
use crate::binaries::{guest_program, program, tiny_image};
use crate::ctl::{self, Ctl};
use crate::{libvirt, wait};

/// How long an agent may take to come up on a busy machine.
const START: Duration = Duration::from_secs(60);
/// Where the folders lie: QEMU's own user must be able to pass through, which /tmp of a private
/// mount would not let it.
const PARENT: &str = "/var/tmp";
const PREFIX: &str = "ghost-e2e-";

/// How an agent is set up.
pub struct Builder {
    config: Value,
    environment: Vec<(String, String)>,
    simulated: bool,
    data_dir: Option<PathBuf>,
    wrapper: Vec<String>,
}

/// A running (or killed, or stopped) agent.
pub struct Agent {
    folder: TempDir,
    data_dir: PathBuf,
    config: Value,
    environment: Vec<(String, String)>,
    wrapper: Vec<String>,
    child: Option<Child>,
    hypervisor: Hypervisor,
    prefix: String,
    ports: [u16; 3],
}

impl Default for Builder {
    fn default() -> Self {
        Self::new()
    }
}

impl Builder {
    /// On the system's libvirt.
    pub fn new() -> Self {
        Self {
            config: json!({}),
            environment: Vec::new(),
            simulated: false,
            data_dir: None,
            wrapper: Vec::new(),
        }
    }

    /// On a simulated hypervisor in a folder of its own.
    pub fn simulated() -> Self {
        Self {
            simulated: true,
            ..Self::new()
        }
    }

    /// Sets a key such as `store.engine`.
    #[must_use]
    pub fn set(mut self, key: &str, value: impl Into<Value>) -> Self {
        set(&mut self.config, key, value.into());
        self
    }

    /// Sets a variable of the agent's environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// In a network namespace ([`crate::netlab::NetLab::wrapper`]); libvirt stays outside.
    #[must_use]
    pub fn within(mut self, wrapper: &[String]) -> Self {
        self.wrapper = wrapper.to_vec();
        self
    }

    /// With the data folder elsewhere, such as on a small file system.
    #[must_use]
    pub fn data_dir(mut self, path: &Path) -> Self {
        self.data_dir = Some(path.to_owned());
        self
    }

    /// Makes the folder and the configuration; the agent is not started.
    ///
    /// # Panics
    /// Where that cannot be done.
    #[expect(clippy::expect_used, reason = "the test cannot go on")]
    pub fn prepare(self) -> Agent {
        sweep();
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("e{:x}-{number}", std::process::id());
        let folder = tempfile::Builder::new()
            .prefix(&format!("{PREFIX}{}-", std::process::id()))
            .permissions(fs::Permissions::from_mode(0o711))
            .tempdir_in(PARENT)
            .expect("a folder for the agent");
        let data_dir = self.data_dir.unwrap_or_else(|| folder.path().join("data"));
        fs::create_dir_all(&data_dir).expect("the data folder");
        fs::set_permissions(&data_dir, fs::Permissions::from_mode(0o711)).expect("its mode");
        let hypervisor = if self.simulated {
            let world = folder.path().join("world");
            fs::create_dir_all(&world).expect("the simulation's folder");
            Hypervisor::Simulated(world)
        } else {
            Hypervisor::Libvirt(libvirt::SYSTEM.to_owned())
        };
        let ports = [free_port(), free_port(), free_port()];
        let uri = match &hypervisor {
            Hypervisor::Libvirt(uri) => uri.clone(),
            Hypervisor::Simulated(world) => format!("simulated:{}", world.display()),
        };
        let mut config = json!({
            "agent": { "name": prefix, "data_dir": data_dir },
            "libvirt": { "uri": uri },
            "grpc": { "listen": format!("127.0.0.1:{}", ports[0]), "socket": folder.path().join("agent.sock") },
            "http": { "listen": format!("127.0.0.1:{}", ports[1]) },
            "metrics": { "listen": format!("127.0.0.1:{}", ports[2]) },
            "network": { "name": prefix },
            "guest": { "program": guest_program() },
        });
        merge(&mut config, &self.config);
        Agent {
            data_dir,
            config,
            environment: self.environment,
            wrapper: self.wrapper,
            child: None,
            hypervisor,
            prefix,
            ports,
            folder,
        }
    }

    /// Starts it and waits until it answers.
    ///
    /// # Panics
    /// Where it does not.
    pub fn start(self) -> Agent {
        let mut agent = self.prepare();
        agent.start();
        agent
    }
}

impl Agent {
    /// Starts it (again, on the same data) and waits until it answers and has found libvirt.
    ///
    /// # Panics
    /// Where it does not.
    pub fn start(&mut self) {
        self.spawn();
        self.wait_ready();
        let ctl = self.ctl();
        wait::until_ok("the agent has found libvirt", START, || {
            let status = ctl.run(&["status", "-o", "json"]).stdout;
            let status: Value = serde_json::from_str(&status).unwrap_or_default();
            match status["hypervisor"]["state"].as_str() {
                Some("connected") => Ok(()),
                _ => Err(status["hypervisor"].to_string()),
            }
        });
    }

    /// Starts the process and waits for nothing.
    ///
    /// # Panics
    /// Where it cannot be started, or runs already.
    #[expect(clippy::expect_used, reason = "the test cannot go on")]
    pub fn spawn(&mut self) {
        assert!(self.child.is_none(), "the agent runs already");
        let config = self.config_file();
        // JSON is YAML.
        fs::write(&config, self.config.to_string()).expect("the configuration");
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_file())
            .expect("the log");
        let mut words = self.wrapper.clone();
        words.push(program("ghost-agent").display().to_string());
        self.child = Some(
            Command::new(&words[0])
                .args(&words[1..])
                .args(["run", "--config"])
                .arg(&config)
                .env_clear()
                .envs(own_environment())
                .envs(self.environment.iter().cloned())
                .stdin(Stdio::null())
                .stdout(log.try_clone().expect("the log"))
                .stderr(log)
                .spawn()
                .expect("ghost-agent"),
        );
    }

    /// Waits until it answers.
    ///
    /// # Panics
    /// Where it ends instead, or the time is up.
    #[expect(clippy::panic, reason = "the test cannot go on")]
    pub fn wait_ready(&mut self) {
        let ctl = self.ctl();
        let ready = wait::poll(START, || {
            if let Some(Ok(Some(status))) = self.child.as_mut().map(Child::try_wait) {
                return Some(Err(status));
            }
            (ctl.run(&["version"]).code == 0 && ctl.run(&["status"]).code == 0).then_some(Ok(()))
        });
        match ready {
            Some(Ok(())) => {}
            Some(Err(status)) => {
                panic!("the agent ended by itself ({status})\n{}", self.log_tail())
            }
            None => panic!("the agent does not answer\n{}", self.log_tail()),
        }
    }

    /// Waits until libvirt is connected and every operation has ended.
    ///
    /// # Panics
    /// When the time is up.
    pub fn wait_idle(&self, within: Duration) {
        let ctl = self.ctl();
        wait::until_ok("no open operation", within, || {
            let status = ctl.run(&["status", "-o", "json"]);
            let status: Value = serde_json::from_str(&status.stdout)
                .map_err(|error| format!("{error}: {}", status.stderr))?;
            if status["hypervisor"]["state"] != "connected" {
                return Err(status["hypervisor"].to_string());
            }
            let open = ctl.run(&["operation", "list", "-o", "json"]);
            match open.stdout.trim() {
                "[]" => Ok(()),
                _ => Err(format!("{}{}", open.stdout, open.stderr)),
            }
        });
    }

    /// Sets a key for the next start.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) {
        set(&mut self.config, key, value.into());
    }

    /// Sets a variable for the next start, or takes it away.
    pub fn set_env(&mut self, name: &str, value: Option<&str>) {
        self.environment.retain(|(known, _)| known != name);
        self.environment
            .extend(value.map(|value| (name.to_owned(), value.to_owned())));
    }

    /// Its process.
    ///
    /// # Panics
    /// Where it does not run.
    #[expect(clippy::expect_used, reason = "the test cannot go on")]
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("the agent runs").id()
    }

    /// Ends it at once, as a crash does.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            drop(child.kill());
            drop(child.wait());
        }
    }

    /// Sends SIGTERM and returns at once.
    pub fn terminate(&self) {
        if let Some(pid) = self
            .child
            .as_ref()
            .and_then(|child| i32::try_from(child.id()).ok())
        {
            // SAFETY: kill takes two numbers and touches no memory of ours; the process is a child
            // that has not been waited for, so the id is still its own.
            unsafe { libc::kill(pid, libc::SIGTERM) };
        }
    }

    /// Waits for its end; `None` where it does not end (it is killed then).
    pub fn wait_end(&mut self, within: Duration) -> Option<ExitStatus> {
        let mut child = self.child.take()?;
        ctl::wait(&mut child, within)
    }

    /// Stops it as systemd does.
    ///
    /// # Panics
    /// Where it does not end within its 30 seconds, or not well.
    #[expect(clippy::panic, reason = "the test has failed")]
    pub fn stop(&mut self) {
        self.terminate();
        match self.wait_end(Duration::from_secs(35)) {
            Some(status) if status.success() => {}
            other => panic!("the agent ended with {other:?}\n{}", self.log_tail()),
        }
    }

    /// Joins a fleet by `ghost-agent enroll`, in the agent's network; the agent may run.
    ///
    /// # Panics
    /// Where it cannot be called.
    pub fn enroll(&self, token: &str, name: &str) -> ctl::Output {
        self.enroll_with(token, name, &[])
    }

    /// Leaves the fleet that it is in, and joins one as [`Self::enroll`] does.
    ///
    /// # Panics
    /// Where it cannot be called.
    pub fn enroll_again(&self, token: &str, name: &str) -> ctl::Output {
        self.enroll_with(token, name, &["--replace"])
    }

    fn enroll_with(&self, token: &str, name: &str, more: &[&str]) -> ctl::Output {
        #[expect(clippy::expect_used, reason = "the test cannot go on")]
        fs::write(self.config_file(), self.config.to_string()).expect("the configuration");
        let mut words = self.wrapper.clone();
        words.push(program("ghost-agent").display().to_string());
        let mut command = Command::new(&words[0]);
        command
            .args(&words[1..])
            .args(["enroll", "--config"])
            .arg(self.config_file())
            .args(["--token", token, "--name", name])
            .args(more)
            .env_clear()
            .envs(own_environment())
            .envs(self.environment.iter().cloned());
        ctl::run(command, &[])
    }

    /// `ghostctl` over the agent's socket.
    pub fn ctl(&self) -> Ctl {
        Ctl::new(
            program("ghostctl"),
            Some(format!("unix:{}", self.socket().display())),
        )
        // Nobody's contexts play a part.
        .with_env("XDG_CONFIG_HOME", self.folder.path().join("config"))
    }

    /// A name that no other test on this host uses.
    pub fn name(&self, name: &str) -> String {
        format!("{}-{name}", self.prefix)
    }

    /// The prefix of those names.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Where it keeps everything.
    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    /// A folder that goes away with the agent.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("agent.sock")
    }

    /// The file that it is configured by.
    pub fn config_file(&self) -> PathBuf {
        self.folder.path().join("agent.yaml")
    }

    /// What it writes.
    pub fn log_file(&self) -> PathBuf {
        self.folder.path().join("agent.log")
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

    /// The port of gRPC.
    pub const fn grpc_port(&self) -> u16 {
        self.ports[0]
    }

    /// The port of HTTP.
    pub const fn http_port(&self) -> u16 {
        self.ports[1]
    }

    /// The port of the metrics.
    pub const fn metrics_port(&self) -> u16 {
        self.ports[2]
    }

    /// Where its domains are.
    pub const fn hypervisor(&self) -> &Hypervisor {
        &self.hypervisor
    }

    /// What the auditor looks at.
    pub fn subject(&self) -> Subject {
        Subject {
            data_dir: self.data_dir.clone(),
            hypervisor: self.hypervisor.clone(),
            ctl: self.ctl(),
            partial_downloads: false,
        }
    }

    /// Audits, once all has settled.
    ///
    /// # Panics
    /// With every finding.
    #[track_caller]
    pub fn audit(&self) {
        self.audit_as(&self.subject());
    }

    /// Audits with other rules.
    ///
    /// # Panics
    /// With every finding.
    #[track_caller]
    #[expect(clippy::panic, reason = "the test has failed")]
    pub fn audit_as(&self, subject: &Subject) {
        match auditor::audit_settled(subject, Duration::from_secs(20)) {
            Ok(findings) if findings.is_empty() => {}
            Ok(findings) => {
                let list: Vec<String> = findings.iter().map(ToString::to_string).collect();
                panic!("the auditor found:\n  {}", list.join("\n  "))
            }
            Err(error) => panic!("the auditor cannot look: {error}"),
        }
    }

    /// Imports the tiny image as `tiny`, where it is not there yet.
    ///
    /// # Panics
    /// Where that fails.
    pub fn import_tiny(&self) {
        let path = tiny_image().display().to_string();
        self.ctl().ok(&["image", "import", &path, "--name", "tiny"]);
    }
}

impl Drop for Agent {
    #[expect(clippy::print_stderr, reason = "of a failed test the log is wanted")]
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "---- the end of the agent's log ({}) ----\n{}\n----",
                self.prefix,
                self.log_tail()
            );
        }
        self.kill();
        if let Hypervisor::Libvirt(uri) = &self.hypervisor {
            let mut problems = libvirt::remove_domains_below(uri, &self.data_dir);
            if self.data_dir.starts_with(self.folder.path()) {
                // One that was being defined while the agent died.
                problems.extend(libvirt::remove_domains_below(uri, self.folder.path()));
            }
            // Its own network: absent where no VM was made.
            if libvirt::virsh(uri, &["net-info", &self.prefix]).is_ok() {
                drop(libvirt::virsh(uri, &["net-destroy", &self.prefix]));
                problems.extend(libvirt::virsh(uri, &["net-undefine", &self.prefix]).err());
            }
            for problem in problems {
                eprintln!("cannot clean up after {}: {problem}", self.prefix);
            }
        }
    }
}

/// Removes what runs that were killed left behind; once in a process.
fn sweep() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| sweep_of(|pid| !Path::new(&format!("/proc/{pid}")).exists()));
}

/// Removes what the processes that `chosen` names left behind: agents, domains, networks, folders.
pub fn sweep_of(chosen: impl Fn(u32) -> bool) {
    for entry in fs::read_dir(PARENT).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(pid) = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split('-').next()?.parse::<u32>().ok())
            .filter(|pid| chosen(*pid))
        else {
            continue;
        };
        kill_program_of("ghost-agent", &entry.path().join("agent.yaml"));
        drop(libvirt::remove_domains_below(
            libvirt::SYSTEM,
            &entry.path(),
        ));
        let networks = libvirt::virsh(libvirt::SYSTEM, &["net-list", "--all", "--name"]);
        for network in networks.unwrap_or_default().split_whitespace() {
            if network.starts_with(&format!("e{pid:x}-")) {
                drop(libvirt::virsh(libvirt::SYSTEM, &["net-destroy", network]));
                drop(libvirt::virsh(libvirt::SYSTEM, &["net-undefine", network]));
            }
        }
        // A small file system of a test may still be there; lazily, as something may look at it.
        drop(
            Command::new("umount")
                .args(["-l", "-q"])
                .arg(entry.path().join("disk"))
                .stderr(Stdio::null())
                .status(),
        );
        drop(fs::remove_dir_all(entry.path()));
    }
}

/// Ends the processes of a program of ours with this configuration: they outlive a test that is
/// killed.
pub(crate) fn kill_program_of(program: &str, config: &Path) {
    let config = config.display().to_string();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<i32>().ok())
        else {
            continue;
        };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
        let ours = words
            .first()
            .is_some_and(|word| word.ends_with(program.as_bytes()));
        if ours && words.contains(&config.as_bytes()) {
            // SAFETY: kill takes two numbers and touches no memory of ours. The process was just
            // seen to be a program of ours with a configuration file of ours.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
    }
}

/// A port that is free now, below those that the kernel gives to clients: it stays free while an
/// agent is restarted.
///
/// # Panics
/// Where none is.
#[expect(clippy::panic, reason = "the test cannot go on")]
pub fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    for _ in 0..4000 {
        let step = NEXT.fetch_add(1, Ordering::Relaxed);
        let offset = (std::process::id().wrapping_mul(61).wrapping_add(step)) % 12_000;
        let Ok(port) = u16::try_from(20_000 + offset) else {
            continue;
        };
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!("no free port");
}

/// Our environment without what configures an agent or these tests.
pub(crate) fn own_environment() -> impl Iterator<Item = (std::ffi::OsString, std::ffi::OsString)> {
    std::env::vars_os().filter(|(name, _)| !name.to_string_lossy().starts_with("GHOST_"))
}

pub(crate) fn set(config: &mut Value, key: &str, value: Value) {
    let nested = key
        .rsplit('.')
        .fold(value, |inner, part| json!({ part: inner }));
    merge(config, &nested);
}

pub(crate) fn merge(into: &mut Value, from: &Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_set_without_losing_their_neighbours() {
        let mut config = json!({ "agent": { "name": "a" } });
        set(&mut config, "agent.data_dir", json!("/d"));
        set(&mut config, "resources.reserved.memory", json!("1GiB"));
        assert_eq!(
            config,
            json!({
                "agent": { "name": "a", "data_dir": "/d" },
                "resources": { "reserved": { "memory": "1GiB" } },
            })
        );
    }
}
