//! Several replicas of one Core over a real etcd, all on loopback; gone without a trace at the end of
//! the test, however that ends.

use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tempfile::TempDir;

use crate::agent::free_port;
use crate::core::{Builder, Core};
use crate::partition::Switch;
use crate::wait;

/// Where Debian's package `etcd-server` puts it.
const PROGRAM: &str = "/usr/bin/etcd";
/// How long a cluster may take to come up on a busy machine.
const START: Duration = Duration::from_secs(60);

/// Members of etcd.
pub struct Etcd {
    members: Vec<Member>,
    switch: Option<Arc<Switch>>,
    _folder: TempDir,
}

struct Member {
    arguments: Vec<String>,
    wrapper: Vec<String>,
    address: IpAddr,
    port: u16,
    log: PathBuf,
    child: Option<Child>,
}

impl Etcd {
    /// Starts a cluster of so many members on loopback and waits until each answers.
    ///
    /// # Panics
    /// Where this machine has no etcd, or it does not start.
    pub fn start(size: usize) -> Self {
        Self::start_on(size, None)
    }

    /// The same, on the machines `m0`, `m1` and so on of a switch where there is one.
    ///
    /// # Panics
    /// As [`Self::start`].
    #[expect(clippy::expect_used, reason = "the test cannot go on")]
    pub fn start_on(size: usize, switch: Option<Arc<Switch>>) -> Self {
        assert!(
            Path::new(PROGRAM).exists(),
            "several replicas need {PROGRAM}: apt-get install etcd-server"
        );
        let folder = tempfile::Builder::new()
            .prefix(&format!("ghost-e2e-etcd-{}-", std::process::id()))
            .tempdir()
            .expect("a folder for etcd");
        let places: Vec<(IpAddr, u16, u16)> = (0..size)
            .map(|number| {
                let address = switch
                    .as_ref()
                    .map_or(IpAddr::V4(Ipv4Addr::LOCALHOST), |switch| {
                        switch.address(&name(number))
                    });
                (address, free_port(), free_port())
            })
            .collect();
        let url = |address: IpAddr, port: u16| format!("http://{address}:{port}");
        let all: Vec<String> = places
            .iter()
            .enumerate()
            .map(|(number, (address, peer, _))| {
                format!("{}={}", name(number), url(*address, *peer))
            })
            .collect();
        let members = places
            .iter()
            .enumerate()
            .map(|(number, (address, peer, client))| {
                let data = folder.path().join(name(number));
                let (peer, clients) = (url(*address, *peer), url(*address, *client));
                let pairs = [
                    ("--name", name(number)),
                    ("--data-dir", data.display().to_string()),
                    ("--listen-peer-urls", peer.clone()),
                    ("--initial-advertise-peer-urls", peer),
                    ("--listen-client-urls", clients.clone()),
                    ("--advertise-client-urls", clients),
                    ("--initial-cluster", all.join(",")),
                    ("--heartbeat-interval", "100".to_owned()),
                    ("--election-timeout", "1000".to_owned()),
                ];
                Member {
                    arguments: pairs
                        .into_iter()
                        .flat_map(|(option, value)| [option.to_owned(), value])
                        .collect(),
                    wrapper: switch
                        .as_ref()
                        .map(|switch| switch.wrapper(&name(number)).to_vec())
                        .unwrap_or_default(),
                    address: *address,
                    port: *client,
                    log: folder.path().join(format!("{}.log", name(number))),
                    child: None,
                }
            })
            .collect();
        let mut cluster = Self {
            members,
            switch,
            _folder: folder,
        };
        cluster.start_all();
        cluster
    }

    /// Asks a member, from its own machine.
    fn ask(
        &self,
        number: usize,
        method: &str,
        path: &str,
        body: &[u8],
    ) -> std::io::Result<crate::http::Response> {
        let member = &self.members[number];
        let at = (member.address, member.port).into();
        let ask = || crate::http::request_at(at, method, path, &[], body);
        match &self.switch {
            None => ask(),
            Some(switch) => switch.enter(&name(number), ask),
        }
    }

    /// The member that leads the others, as most of those that answer say.
    ///
    /// # Panics
    /// Where none does in time.
    pub fn leader(&self) -> usize {
        wait::until_ok("etcd has a leader", START, || {
            for number in 0..self.size() {
                let told = self
                    .ask(number, "POST", "/v3/maintenance/status", b"{}")
                    .map_err(|error| error.to_string())?
                    .json();
                if told["leader"].is_string() && told["leader"] == told["header"]["member_id"] {
                    return Ok(number);
                }
            }
            Err("no member says that it leads".to_owned())
        })
    }

    /// How many members there are.
    pub const fn size(&self) -> usize {
        self.members.len()
    }

    /// Where clients reach the members.
    pub fn endpoints(&self) -> Vec<String> {
        let members = self.members.iter();
        members
            .map(|member| format!("http://{}:{}", member.address, member.port))
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
        let words = [&member.wrapper[..], &[PROGRAM.to_owned()]].concat();
        member.child = Some(
            Command::new(&words[0])
                .args(&words[1..])
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
        for number in 0..self.members.len() {
            wait::until_ok("a member of etcd is well", START, || {
                let answer = self.ask(number, "GET", "/health", b"");
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

/// What a member is called.
fn name(number: usize) -> String {
    format!("m{number}")
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
    pub fn start() -> Self {
        Self::start_on(None)
    }

    /// The same, on the machines `a`, `b`, `m0`, `m1` and `m2` of a switch where there is one.
    ///
    /// # Panics
    /// Where they do not start.
    #[expect(clippy::expect_used, reason = "the test cannot go on")]
    pub fn start_on(switch: Option<&Arc<Switch>>) -> Self {
        let etcd = Etcd::start_on(3, switch.cloned());
        let mut cores: Vec<Core> = ["a", "b"]
            .iter()
            .map(|name| {
                let builder = match switch {
                    None => Builder::new(),
                    Some(switch) => {
                        Builder::new().within(&switch.wrapper(name), switch.address(name))
                    }
                };
                builder
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
