//! Several replicas of one Core over a real etcd, all on loopback; gone without a trace at the end of
//! the test, however that ends.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::json;
use tempfile::TempDir;

use crate::agent::free_port;
use crate::core::{Builder, Core};
use crate::wait;

/// Where Debian's package `etcd-server` puts it.
const PROGRAM: &str = "/usr/bin/etcd";
/// How long a cluster may take to come up on a busy machine.
const START: Duration = Duration::from_secs(60);

/// Members of etcd.
pub struct Etcd {
    members: Vec<Member>,
    _folder: TempDir,
}

struct Member {
    arguments: Vec<String>,
    port: u16,
    log: PathBuf,
    child: Option<Child>,
}

impl Etcd {
    /// Starts a cluster of so many members and waits until each answers.
    ///
    /// # Panics
    /// Where this machine has no etcd, or it does not start.
    #[expect(clippy::expect_used, reason = "the test cannot go on")]
    pub fn start(size: usize) -> Self {
        assert!(
            Path::new(PROGRAM).exists(),
            "several replicas need {PROGRAM}: apt-get install etcd-server"
        );
        let folder = tempfile::Builder::new()
            .prefix(&format!("ghost-e2e-etcd-{}-", std::process::id()))
            .tempdir()
            .expect("a folder for etcd");
        let ports: Vec<(u16, u16)> = (0..size).map(|_| (free_port(), free_port())).collect();
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        let all: Vec<String> = ports
            .iter()
            .enumerate()
            .map(|(number, (peer, _))| format!("m{number}={}", url(*peer)))
            .collect();
        let members = ports
            .iter()
            .enumerate()
            .map(|(number, (peer, client))| {
                let data = folder.path().join(format!("m{number}"));
                let pairs = [
                    ("--name", format!("m{number}")),
                    ("--data-dir", data.display().to_string()),
                    ("--listen-peer-urls", url(*peer)),
                    ("--initial-advertise-peer-urls", url(*peer)),
                    ("--listen-client-urls", url(*client)),
                    ("--advertise-client-urls", url(*client)),
                    ("--initial-cluster", all.join(",")),
                    ("--heartbeat-interval", "100".to_owned()),
                    ("--election-timeout", "1000".to_owned()),
                ];
                Member {
                    arguments: pairs
                        .into_iter()
                        .flat_map(|(option, value)| [option.to_owned(), value])
                        .collect(),
                    port: *client,
                    log: folder.path().join(format!("m{number}.log")),
                    child: None,
                }
            })
            .collect();
        let mut cluster = Self {
            members,
            _folder: folder,
        };
        cluster.start_all();
        cluster
    }

    /// How many members there are.
    pub const fn size(&self) -> usize {
        self.members.len()
    }

    /// Where clients reach the members.
    pub fn endpoints(&self) -> Vec<String> {
        let ports = self.members.iter().map(|member| member.port);
        ports
            .map(|port| format!("http://127.0.0.1:{port}"))
            .collect()
    }

    /// Starts a member (again, on the same data) and waits for nothing.
    ///
    /// # Panics
    /// Where it cannot be started.
    #[expect(clippy::expect_used, reason = "the test cannot go on")]
    pub fn spawn(&mut self, number: usize) {
        let member = &mut self.members[number];
        assert!(member.child.is_none(), "the member runs already");
        let log = File::options()
            .create(true)
            .append(true)
            .open(&member.log)
            .expect("the log");
        member.child = Some(
            Command::new(PROGRAM)
                .args(&member.arguments)
                .stdin(Stdio::null())
                .stdout(log.try_clone().expect("the log"))
                .stderr(log)
                .spawn()
                .expect("etcd"),
        );
    }

    /// Starts all that do not run, and waits until each answers.
    ///
    /// # Panics
    /// Where they do not.
    pub fn start_all(&mut self) {
        for number in 0..self.members.len() {
            if self.members[number].child.is_none() {
                self.spawn(number);
            }
        }
        for member in &self.members {
            wait::until_ok("a member of etcd is well", START, || {
                let answer = crate::http::get(member.port, "/health");
                match answer {
                    Ok(answer) if answer.body.contains("\"true\"") => Ok(()),
                    Ok(answer) => Err(answer.body),
                    Err(error) => Err(error.to_string()),
                }
            });
        }
    }

    /// Ends a member at once, as a crash does.
    pub fn kill(&mut self, number: usize) {
        if let Some(mut child) = self.members[number].child.take() {
            drop(child.kill());
            drop(child.wait());
        }
    }

    /// Ends all members at once.
    pub fn kill_all(&mut self) {
        for number in 0..self.members.len() {
            self.kill(number);
        }
    }
}

impl Drop for Etcd {
    #[expect(clippy::print_stderr, reason = "of a failed test the log is wanted")]
    fn drop(&mut self) {
        self.kill_all();
        if std::thread::panicking() {
            for member in &self.members {
                let log = fs::read(&member.log).unwrap_or_default();
                let log = String::from_utf8_lossy(&log);
                let lines: Vec<&str> = log.lines().collect();
                let tail = lines[lines.len().saturating_sub(5)..].join("\n");
                eprintln!("---- the end of an etcd's log ----\n{tail}\n----");
            }
        }
    }
}

/// Two replicas of one Core, `a` and `b`.
pub struct Replicas {
    /// The replicas. They end before their etcd does.
    pub cores: Vec<Core>,
    /// Where their records are.
    pub etcd: Etcd,
}

impl Replicas {
    /// Two replicas over as many members of etcd as it takes to do without one.
    ///
    /// # Panics
    /// Where they do not start.
    #[expect(clippy::expect_used, reason = "the test cannot go on")]
    pub fn start() -> Self {
        let etcd = Etcd::start(3);
        let mut cores: Vec<Core> = ["a", "b"]
            .iter()
            .map(|name| {
                Builder::new()
                    .set("store.engine", "etcd")
                    .set("store.etcd.endpoints", json!(etcd.endpoints()))
                    // Faults are noticed sooner than by people's patience, in proportion.
                    .set("store.etcd.lease", "4s")
                    .set("link.heartbeat_interval", "5s")
                    .set("link.ping_interval", "1s")
                    .set("replica.name", *name)
                    .prepare()
            })
            .collect();
        let addresses: Vec<String> = cores
            .iter()
            .map(|core| core.address().to_string())
            .collect();
        for (core, address) in cores.iter_mut().zip(&addresses) {
            core.set("core.addresses", json!(addresses));
            core.set("replica.address", address.as_str());
        }
        let (first, others) = cores.split_at_mut(1);
        first[0].start();
        for other in others {
            // The CA is one: it is copied by whoever sets a replica up.
            let from = first[0].folder().join("data/identity");
            let to = other.folder().join("data");
            let copied = Command::new("cp")
                .arg("-a")
                .arg(from)
                .arg({
                    fs::create_dir_all(&to).expect("the data folder");
                    use std::os::unix::fs::PermissionsExt as _;
                    fs::set_permissions(&to, fs::Permissions::from_mode(0o700)).expect("its mode");
                    &to
                })
                .status()
                .expect("cp");
            assert!(copied.success());
            other.start();
        }
        Self { cores, etcd }
    }

    /// The number of the replica that has a host's link, once one has.
    ///
    /// # Panics
    /// Where none has it in time.
    pub fn owner_of(&self, host: &str) -> usize {
        wait::until_ok("a replica has the host's link", START, || {
            let running = self
                .cores
                .iter()
                .find(|core| core.runs())
                .ok_or("no replica runs")?;
            let told = running.host(host);
            match told["link"]["replica"].as_str() {
                Some("a") => Ok(0),
                Some("b") => Ok(1),
                _ => Err(told.to_string()),
            }
        })
    }

    /// Waits until a replica tells of all that run.
    pub fn wait_joined(&self, seen_by: usize, count: usize) {
        wait::until_ok("the replicas know each other", START, || {
            let status = self.cores[seen_by].ctl().run(&["status", "-o", "json"]);
            let told: serde_json::Value = serde_json::from_str(&status.stdout).unwrap_or_default();
            match told["replicas"].as_array() {
                Some(all) if all.len() == count => Ok(()),
                _ => Err(format!("{}{}", status.stdout, status.stderr)),
            }
        });
    }
}
