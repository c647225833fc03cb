//! The program as a whole: `ghost-core run` and `token create`, with hosts that join by the agent's
//! own code.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use ghost_domain::fleet::{
    CommandOutcome, CommandStatus, CorePermissions, FleetCommand, FleetIdentity, FleetLedger,
    HeartbeatReport, LinkState, Verdict,
};
use ghost_domain::ports::{Clock, CoreLinkHandler};
use ghost_domain::{HostName, Result};
use ghost_infrastructure::clock::SystemClock;
use ghost_infrastructure::core_link::direct::DirectOptions;
use ghost_infrastructure::core_link::{CoreLinkOptions, CoreLinkService, EnrolOptions, enrol};
use ghost_proto::agent::v1::StartVmRequest;
use ghost_proto::core::v1::fleet_service_client::FleetServiceClient;
use ghost_proto::core::v1::queue_command_request::Action;
use ghost_proto::core::v1::{
    CommandStatus as WireStatus, Host, ListCommandsRequest, ListHostsRequest, QueueCommandRequest,
};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::{Channel, Endpoint, Uri};

const PATIENCE: Duration = Duration::from_secs(90);

/// A Core of its own; gone at the end, however that comes.
struct Core {
    folder: tempfile::TempDir,
    grpc: u16,
    metrics: u16,
    child: Option<Child>,
}

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ghost-core"));
    // Nobody's environment but the test's.
    command.env_clear();
    command
}

impl Core {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (grpc, metrics) = (free_port(), free_port());
        let config = serde_json::json!({
            "core": {
                "name": "core-1",
                "data_dir": folder.path().join("data"),
                "addresses": [format!("127.0.0.1:{grpc}")],
            },
            "grpc": { "listen": format!("127.0.0.1:{grpc}"), "socket": folder.path().join("core.sock") },
            "http": { "listen": "127.0.0.1:0" },
            "metrics": { "listen": format!("127.0.0.1:{metrics}") },
            "link": { "ping_interval": "1s", "heartbeat_interval": "1s" },
        });
        std::fs::write(folder.path().join("core.yaml"), config.to_string()).unwrap();
        let mut core = Self {
            folder,
            grpc,
            metrics,
            child: None,
        };
        core.start();
        core
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("core.sock")
    }

    fn config(&self) -> PathBuf {
        self.folder.path().join("core.yaml")
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    fn start(&mut self) {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.folder.path().join("log"))
            .unwrap();
        let child = program()
            .args(["run", "--config"])
            .arg(self.config())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.child = Some(child);
        let begun = Instant::now();
        while TcpStream::connect(("127.0.0.1", self.metrics)).is_err() || !self.answers() {
            let child = self.child.as_mut().unwrap();
            assert!(
                child.try_wait().unwrap().is_none(),
                "it ended:\n{}",
                self.log()
            );
            assert!(
                begun.elapsed() < PATIENCE,
                "it does not answer:\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn answers(&self) -> bool {
        self.scrape().contains("ghost_core_build_info")
    }

    fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    fn terminate(&mut self) -> ExitStatus {
        let mut child = self.child.take().unwrap();
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let begun = Instant::now();
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status;
            }
            if begun.elapsed() > PATIENCE {
                drop(child.kill());
                drop(child.wait());
                panic!("it does not end:\n{}", self.log());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn token(&self, arguments: &[&str]) -> Output {
        program()
            .args(["token", "create", "--socket"])
            .arg(self.socket())
            .args(arguments)
            .output()
            .unwrap()
    }

    fn host_token(&self) -> String {
        let output = self.token(&[]);
        assert!(output.status.success(), "{output:?}\n{}", self.log());
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    fn scrape(&self) -> String {
        let address = SocketAddr::from(([127, 0, 0, 1], self.metrics));
        let mut text = String::new();
        if let Ok(mut stream) = TcpStream::connect(address) {
            let request = b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
            if stream.write_all(request).is_ok() {
                drop(stream.read_to_string(&mut text));
            }
        }
        text
    }

    async fn fleet(&self) -> FleetServiceClient<Channel> {
        let path = self.socket();
        let endpoint = Endpoint::from_static("http://core");
        let channel = endpoint
            .connect_with_connector(tower::service_fn(move |_: Uri| {
                let path = path.clone();
                async move {
                    tokio::net::UnixStream::connect(path)
                        .await
                        .map(TokioIo::new)
                }
            }))
            .await
            .unwrap();
        FleetServiceClient::new(channel)
    }

    async fn hosts(&self) -> Vec<Host> {
        let mut fleet = self.fleet().await;
        let listed = fleet.list_hosts(ListHostsRequest::default()).await.unwrap();
        listed.into_inner().hosts
    }

    async fn until(&self, state: &str) -> Host {
        let begun = Instant::now();
        loop {
            let hosts = self.hosts().await;
            if let Some(host) = hosts.iter().find(|host| host.state == state) {
                return host.clone();
            }
            assert!(
                begun.elapsed() < PATIENCE,
                "no host is {state}: {hosts:?}\n{}",
                self.log()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            drop(child.kill());
            drop(child.wait());
        }
    }
}

/// The application of a host, as far as the link needs one.
#[derive(Default)]
struct Application {
    ledger: Mutex<FleetLedger>,
    done: Mutex<Vec<String>>,
    news: Notify,
}

#[async_trait]
impl CoreLinkHandler for Application {
    fn permissions(&self) -> CorePermissions {
        CorePermissions::OperateAndEnter
    }

    fn ledger(&self, _core_id: &str) -> (u64, u64) {
        let ledger = self.ledger.lock();
        (ledger.epoch, ledger.generation)
    }

    async fn welcomed(&self, core_id: &str, epoch: u64) -> Result<()> {
        let mut ledger = self.ledger.lock();
        assert!(epoch >= ledger.epoch, "an epoch went back");
        core_id.clone_into(&mut ledger.core_id);
        ledger.epoch = epoch;
        Ok(())
    }

    async fn report(&self) -> Result<HeartbeatReport> {
        Ok(HeartbeatReport {
            agent_state: "running".into(),
            hypervisor_connected: true,
            store_writable: true,
            ..HeartbeatReport::default()
        })
    }

    async fn report_changed(&self) {
        std::future::pending().await
    }

    async fn command(&self, command: FleetCommand) -> Option<CommandOutcome> {
        let mut ledger = self.ledger.lock();
        let now = SystemClock::new().now();
        match ledger.judge(&command, now) {
            Verdict::Take => {
                ledger.generation = command.generation;
                self.done.lock().push(command.id.to_string());
                let outcome = CommandOutcome {
                    id: command.id,
                    generation: command.generation,
                    status: CommandStatus::Succeeded,
                    operation: None,
                    code: None,
                    message: String::new(),
                    at: now,
                };
                ledger.unreported.push_back(outcome.clone());
                self.news.notify_one();
                Some(outcome)
            }
            Verdict::Known(known) => known,
            Verdict::Stale(_) | Verdict::Expired => None,
        }
    }

    fn outcomes(&self) -> Vec<CommandOutcome> {
        self.ledger.lock().unreported.iter().cloned().collect()
    }

    async fn outcomes_changed(&self) {
        self.news.notified().await;
    }

    async fn outcome_kept(&self, generation: u64) {
        let mut ledger = self.ledger.lock();
        ledger.unreported.retain(|one| one.generation != generation);
    }

    fn link_changed(&self, _state: LinkState) {}
}

/// A host that has joined and keeps its link.
struct Joined {
    identity: FleetIdentity,
    application: Arc<Application>,
    _folder: tempfile::TempDir,
    _running: AbortOnDropHandle<()>,
}

async fn join(token: &str, name: &str) -> Joined {
    let folder = tempfile::tempdir().unwrap();
    let identity = enrol(
        token,
        EnrolOptions {
            data_dir: folder.path().to_owned(),
            name: HostName::new(name).unwrap(),
            agent_version: "0.1.0".into(),
            replace: false,
        },
    )
    .await
    .unwrap();
    let application = Arc::new(Application::default());
    let running = run(folder.path(), &application);
    Joined {
        identity,
        application,
        _folder: folder,
        _running: running,
    }
}

fn run(folder: &Path, application: &Arc<Application>) -> AbortOnDropHandle<()> {
    let options = CoreLinkOptions {
        data_dir: folder.to_owned(),
        agent_version: "0.1.0".into(),
        direct: DirectOptions::default(),
    };
    let clock = Arc::new(SystemClock::new());
    let link = CoreLinkService::open(options, Arc::clone(application) as _, clock).unwrap();
    AbortOnDropHandle::new(tokio::spawn(async move {
        link.run(CancellationToken::new()).await;
    }))
}

/// All plain files below a folder.
fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            found.extend(files_below(&entry.path()));
        } else if kind.is_file() {
            found.push(entry.path());
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_joins_with_one_token_and_comes_back_after_core_was_killed() {
    let mut core = Core::new();
    let token = core.host_token();
    assert!(token.starts_with("ghost-host-v1."), "{token}");
    let joined = join(&token, "pc").await;
    let host = core.until("online").await;
    assert_eq!(
        (host.name.as_str(), host.tenant.as_str()),
        ("pc", "default")
    );
    assert_eq!(host.id, joined.identity.host.to_string());
    // Its secret alone is enough to find it by, in the log and in all that Core keeps.
    let secret = token.split('.').nth(3).unwrap();
    assert_eq!(secret.len(), 64, "{token}");
    assert!(!core.log().contains(secret), "the secret is in the log");
    let bytes = hex::decode(secret).unwrap();
    let kept = files_below(core.folder.path());
    assert!(kept.len() > 3, "{kept:?}");
    for file in kept {
        let content = std::fs::read(&file).unwrap_or_default();
        let has = |needle: &[u8]| {
            let mut begins = content.iter().enumerate();
            begins.any(|(at, byte)| *byte == needle[0] && content[at..].starts_with(needle))
        };
        assert!(
            !has(secret.as_bytes()) && !has(&bytes),
            "the secret is in {}",
            file.display()
        );
    }
    let text = core.scrape();
    for line in [
        "ghost_core_hosts{state=\"online\"} 1",
        "ghost_core_links 1",
        "ghost_core_store_writable{engine=\"sled\"} 1",
    ] {
        assert!(text.contains(line), "{line} is missing in:\n{text}");
    }
    // Used once, it is used up.
    let folder = tempfile::tempdir().unwrap();
    let again = EnrolOptions {
        data_dir: folder.path().to_owned(),
        name: HostName::new("pc").unwrap(),
        agent_version: "0.1.0".into(),
        replace: false,
    };
    let error = enrol(&token, again).await.unwrap_err();
    assert_eq!(error.code(), ghost_domain::ErrorCode::TokenInvalid);

    core.kill();
    core.start();
    core.until("online").await;
    // A command goes through the queue of the new life, to the host that the old one enrolled.
    let mut fleet = core.fleet().await;
    let queued = fleet
        .queue_command(QueueCommandRequest {
            host: "pc".into(),
            request_id: "once".into(),
            action: Some(Action::StartVm(StartVmRequest {
                vm: "web".into(),
                request_id: String::new(),
            })),
            ..QueueCommandRequest::default()
        })
        .await
        .unwrap()
        .into_inner();
    let begun = Instant::now();
    loop {
        let all = fleet
            .list_commands(ListCommandsRequest {
                host: "pc".into(),
                all: true,
            })
            .await
            .unwrap()
            .into_inner()
            .commands;
        if all.iter().any(|one| one.status() == WireStatus::Succeeded) {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "{all:?}\n{}", core.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(*joined.application.done.lock(), [queued.id]);

    drop(fleet);
    let status = core.terminate();
    assert!(status.success(), "{status}\n{}", core.log());
    assert!(
        core.log().contains("ghost-core has ended"),
        "{}",
        core.log()
    );
    assert!(!core.socket().exists());
}

#[test]
fn one_data_folder_is_one_core() {
    let mut core = Core::new();
    let second = program()
        .args(["run", "--config"])
        .arg(core.config())
        .env("GHOST_CORE_GRPC__LISTEN", "127.0.0.1:0")
        .env("GHOST_CORE_GRPC__SOCKET", "off")
        .env("GHOST_CORE_METRICS__LISTEN", "127.0.0.1:0")
        .output()
        .unwrap();
    assert_eq!(second.status.code(), Some(1));
    let told = String::from_utf8_lossy(&second.stderr);
    assert!(
        told.contains("another ghost-core runs on this data folder"),
        "{told}"
    );
    // And the wrong configuration is told before anything is touched.
    let wrong = program()
        .args(["run", "--config"])
        .arg(core.config())
        .env("GHOST_CORE_LINK__PING_INTERVAL", "5")
        .output()
        .unwrap();
    assert_eq!(wrong.status.code(), Some(78));
    let told = String::from_utf8_lossy(&wrong.stderr);
    assert!(told.contains("GHOST_CORE_LINK__PING_INTERVAL"), "{told}");

    let person = core.token(&["--role", "viewer", "--tenant", "default", "-o", "json"]);
    let person: serde_json::Value = serde_json::from_slice(&person.stdout).unwrap();
    assert!(
        person["token"]
            .as_str()
            .unwrap()
            .starts_with("ghost-join-v1."),
        "{person}"
    );
    let refused = core.token(&["--ttl", "2h"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).starts_with("error: "));
    assert!(core.terminate().success());
    let _ = core.grpc;
}
