//! The program in a fleet: it joins one while it runs, serves both APIs over the link that it
//! dialled, takes a command once over a restart, and leaves. Core is a small one of this test, with
//! real TLS and the real tunnel.

use std::fs;
use std::io::Write;
use std::process::{Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ghost_infrastructure::tunnel::messages::{MessageReader, MessageWriter};
use ghost_infrastructure::tunnel::{Limits, Session, Side, TunnelStream, begin};
use ghost_proto::agent::v1::host_service_client::HostServiceClient;
use ghost_proto::agent::v1::vm_service_client::VmServiceClient;
use ghost_proto::agent::v1::{
    AllowCoreDeletesRequest, GetStatusRequest, ListVmsRequest, StartVmRequest,
};
use ghost_proto::core::v1 as proto;
use ghost_proto::core::v1::enrolment_service_server::{EnrolmentService, EnrolmentServiceServer};
use ghost_proto::core::v1::link_message::Kind;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, SanType,
};
use rustix::process::Signal;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tonic::transport::Endpoint;
use tonic::{Request, Response, Status};

use crate::program::{Agent, agent, output};

const HOST: &str = "8d7f0000-0000-4000-8000-000000000001";
const PATIENCE: Duration = Duration::from_secs(60);

struct Authority {
    certificate: CertificateDer<'static>,
    pem: String,
    issuer: Issuer<'static, KeyPair>,
    address: Mutex<String>,
    tokens: Mutex<Vec<String>>,
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap();
        Self {
            certificate: certificate.der().clone(),
            pem: certificate.pem(),
            issuer: Issuer::new(params, key),
            address: Mutex::default(),
            tokens: Mutex::default(),
        }
    }

    fn params(uri: &str, purpose: ExtendedKeyUsagePurpose) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(uri.to_owned().try_into().unwrap())];
        params.extended_key_usages = vec![purpose];
        // Issued now: a fixed stamp of long ago would make every agent renew at once.
        let now = std::time::SystemTime::now();
        params.not_before = (now - Duration::from_secs(3600)).into();
        params.not_after = (now + Duration::from_secs(86_400)).into();
        params
    }
}

struct Enrolment(Arc<Authority>);

#[tonic::async_trait]
impl EnrolmentService for Enrolment {
    async fn enroll(
        &self,
        request: Request<proto::EnrollHostRequest>,
    ) -> Result<Response<proto::HostCertificate>, Status> {
        let request = request.into_inner();
        self.0.tokens.lock().unwrap().push(request.token);
        let asked = CertificateSigningRequestParams::from_pem(&request.request_pem).unwrap();
        let uri = format!("spiffe://fleet.test/tenant/acme/host/{HOST}");
        let leaf = Authority::params(&uri, ExtendedKeyUsagePurpose::ClientAuth)
            .signed_by(&asked.public_key, &self.0.issuer)
            .unwrap();
        Ok(Response::new(proto::HostCertificate {
            certificate_pem: leaf.pem(),
            authority_pem: self.0.pem.clone(),
            expires_at: None,
            generation: 1,
            host_id: HOST.into(),
            host_name: request.name,
            tenant: "acme".into(),
            trust_domain: "fleet.test".into(),
            addresses: vec![self.0.address.lock().unwrap().clone()],
        }))
    }

    async fn renew(
        &self,
        _: Request<proto::RenewHostRequest>,
    ) -> Result<Response<proto::HostCertificate>, Status> {
        Err(Status::unavailable("not in this test"))
    }

    async fn recover(
        &self,
        _: Request<proto::RecoverHostRequest>,
    ) -> Result<Response<proto::HostCertificate>, Status> {
        Err(Status::unavailable("not in this test"))
    }
}

struct Core {
    authority: Arc<Authority>,
    links: mpsc::Receiver<Session>,
}

impl Core {
    async fn start() -> Self {
        let authority = Arc::new(Authority::new());
        let key = KeyPair::generate().unwrap();
        let uri = ghost_infrastructure::core_link::core_uri("fleet.test");
        let leaf = Authority::params(&uri, ExtendedKeyUsagePurpose::ServerAuth)
            .signed_by(&key, &authority.issuer)
            .unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut roots = rustls::RootCertStore::empty();
        roots.add(authority.certificate.clone()).unwrap();
        let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(
            Arc::new(roots),
            Arc::clone(&provider),
        )
        .allow_unauthenticated()
        .build()
        .unwrap();
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(
                vec![leaf.der().clone(), authority.certificate.clone()],
                PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
            )
            .unwrap();
        config.alpn_protocols = vec![ghost_proto::core::LINK_PROTOCOL.to_vec(), b"h2".to_vec()];
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        *authority.address.lock().unwrap() = listener.local_addr().unwrap().to_string();
        let (give, links) = mpsc::channel(8);
        let serving = Arc::clone(&authority);
        tokio::spawn(async move {
            let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
            while let Ok((tcp, _)) = listener.accept().await {
                let (acceptor, give) = (acceptor.clone(), give.clone());
                let service = EnrolmentServiceServer::new(Enrolment(Arc::clone(&serving)));
                tokio::spawn(async move {
                    let Ok(tls) = acceptor.accept(tcp).await else {
                        return;
                    };
                    if tls.get_ref().1.alpn_protocol() == Some(b"h2") {
                        let once = futures::stream::once(async { Ok::<_, std::io::Error>(tls) });
                        let server = tonic::transport::Server::builder().add_service(service);
                        drop(server.serve_with_incoming(once).await);
                    } else {
                        drop(give.send(begin(tls, Side::Server, Limits::CORE)).await);
                    }
                });
            }
        });
        Self { authority, links }
    }

    fn token(&self) -> String {
        format!(
            "ghost-host-v1.{}.id.secret.{}",
            URL_SAFE_NO_PAD.encode(self.authority.address.lock().unwrap().as_bytes()),
            hex::encode(Sha256::digest(&self.authority.certificate))
        )
    }

    /// The next link, welcomed, and kept alive by a task.
    async fn link(&mut self) -> Link {
        let session = tokio::time::timeout(PATIENCE, self.links.recv()).await;
        let mut session = session.expect("no link came").unwrap();
        let control = session.incoming.recv().await.unwrap();
        let (read, write) = tokio::io::split(control);
        let (mut reader, mut writer) = (MessageReader::new(read), MessageWriter::new(write));
        let Some(Kind::Hello(hello)) = reader.next().await.unwrap() else {
            panic!("the first message is no hello");
        };
        let welcome = proto::CoreWelcome {
            protocol_version: 1,
            core_version: "0.1.0".into(),
            core_id: "core-1".into(),
            replica: "replica-a".into(),
            epoch: 3,
            heartbeat_interval: Some(Duration::from_secs(1).try_into().unwrap()),
            ping_interval: Some(Duration::from_secs(5).try_into().unwrap()),
            want_full: true,
        };
        writer.send(Kind::Welcome(welcome)).await.unwrap();
        let (say, said) = mpsc::channel(8);
        let (hear, heard) = mpsc::channel(64);
        tokio::spawn(keep(reader, writer, said, hear));
        Link {
            session,
            hello,
            say,
            heard,
        }
    }
}

/// Answers what is routine, and hands on the rest.
async fn keep(
    mut reader: MessageReader<ReadHalf<TunnelStream>>,
    mut writer: MessageWriter<WriteHalf<TunnelStream>>,
    mut said: mpsc::Receiver<Kind>,
    hear: mpsc::Sender<Kind>,
) {
    loop {
        let kind = tokio::select! {
            kind = said.recv() => match kind {
                Some(kind) => {
                    drop(writer.send(kind).await);
                    continue;
                }
                None => return,
            },
            kind = reader.next() => match kind {
                Ok(Some(kind)) => kind,
                _ => return,
            },
        };
        let answer = match &kind {
            Kind::Ping(ping) => Some(Kind::Pong(proto::Pong {
                number: ping.number,
            })),
            Kind::Heartbeat(beat) => Some(Kind::HeartbeatReply(proto::HeartbeatReply {
                sequence: beat.sequence,
                ..proto::HeartbeatReply::default()
            })),
            _ => None,
        };
        if let Some(answer) = answer {
            drop(writer.send(answer).await);
        }
        if !matches!(kind, Kind::Ping(_) | Kind::Pong(_)) {
            drop(hear.try_send(kind));
        }
    }
}

/// Core's end of a link.
struct Link {
    session: Session,
    hello: proto::AgentHello,
    say: mpsc::Sender<Kind>,
    heard: mpsc::Receiver<Kind>,
}

impl Link {
    async fn hear<T>(&mut self, what: &str, pick: impl Fn(Kind) -> Option<T>) -> T {
        let waited = tokio::time::timeout(PATIENCE, async {
            loop {
                if let Some(found) = pick(self.heard.recv().await.expect("the link ended")) {
                    return found;
                }
            }
        });
        waited.await.unwrap_or_else(|_| panic!("no {what}"))
    }

    async fn result(&mut self) -> proto::CommandResult {
        self.hear("result", |kind| match kind {
            Kind::CommandResult(result) => Some(result),
            _ => None,
        })
        .await
    }

    /// HTTP over a stream of its own.
    async fn get(&self, path: &str, role: &str) -> String {
        let mut stream = self.session.handle.open().await.unwrap();
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: pc\r\nConnection: close\r\nghost-principal: acme/alice\r\n\
             ghost-role: {role}\r\nghost-tenant: acme\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        stream.flush().await.unwrap();
        let mut answer = String::new();
        let read = tokio::time::timeout(PATIENCE, stream.read_to_string(&mut answer));
        read.await.expect("no answer").unwrap();
        answer
    }

    async fn channel(&self) -> tonic::transport::Channel {
        let handle = self.session.handle.clone();
        Endpoint::from_static("http://pc")
            .connect_with_connector(tower::service_fn(move |_| {
                let handle = handle.clone();
                async move { handle.open().await.map(hyper_util::rt::TokioIo::new) }
            }))
            .await
            .unwrap()
    }
}

fn as_alice<T>(message: T, role: &'static str) -> Request<T> {
    let mut request = Request::new(message);
    let metadata = request.metadata_mut();
    metadata.insert("ghost-principal", "acme/alice".parse().unwrap());
    metadata.insert("ghost-role", role.parse().unwrap());
    request
}

/// `ghost-agent` with words of its own beside the configuration, and something on standard input.
fn told(host: &Agent, words: &[&str], input: &str) -> (bool, String) {
    let mut child = agent()
        .args(words)
        .arg("--config")
        .arg(host.path("agent.yaml"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(input.as_bytes()).unwrap();
    drop(stdin);
    let Output {
        status,
        stdout,
        stderr,
    } = child.wait_with_output().unwrap();
    let text = [stdout, stderr].concat();
    (status.success(), String::from_utf8(text).unwrap())
}

/// A program that waits must not hold up Core, which runs here too.
async fn apart<T: Send + 'static>(
    host: Agent,
    act: impl FnOnce(&mut Agent) -> T + Send + 'static,
) -> (Agent, T) {
    tokio::task::spawn_blocking(move || {
        let mut host = host;
        let value = act(&mut host);
        (host, value)
    })
    .await
    .unwrap()
}

#[test]
fn a_token_that_is_none_and_a_host_in_no_fleet_are_told_as_such() {
    let host = Agent::prepare("");
    let (done, text) = told(&host, &["enroll", "--token", "nonsense"], "");
    assert!(!done && text.starts_with("error: "), "{text}");
    assert!(text.contains("  try: "), "{text}");
    let (done, text) = told(&host, &["unenroll"], "");
    assert!(!done && text.contains("has not joined a fleet"), "{text}");
    let (code, _, errors) = output(&["enroll"]);
    assert_eq!(code, 2, "{errors}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_agent_joins_serves_over_its_link_takes_commands_once_and_leaves() {
    let mut core = Core::start().await;
    let host = Agent::prepare("core: {permissions: operate}\n");
    let (host, ()) = apart(host, Agent::start).await;

    // Joining, by a token that no list of processes shows.
    let token = core.token();
    let words = ["enroll", "--token", "-", "--name", "pc"];
    let (host, (done, text)) = apart(host, move |host| told(host, &words, &token)).await;
    assert!(done && text.contains("this host is pc of acme"), "{text}");
    assert_eq!(
        core.authority.tokens.lock().unwrap().as_slice(),
        [core.token()]
    );
    let again = ["enroll", "--token", "x"];
    let (host, (done, text)) = apart(host, move |host| told(host, &again, "")).await;
    assert!(!done, "{text}");

    // The agent that ran already comes by itself.
    let mut link = core.link().await;
    assert_eq!(link.hello.permissions, "operate");
    let beat = link.hear("heartbeat", |kind| match kind {
        Kind::Heartbeat(beat) => Some(beat),
        _ => None,
    });
    let beat = beat.await;
    assert!(beat.full && beat.health.unwrap().agent_state == "running");

    // Both APIs are there, for whom Core names and as far as the owner lets it.
    let status = link.get("/v1/host", "viewer").await;
    assert!(status.starts_with("HTTP/1.1 200"), "{status}");
    assert!(status.contains("\"host_name\":\"pc\""), "{status}");
    assert!(status.contains("\"state\":\"up\""), "{status}");
    let audit = link.get("/v1/audit", "admin").await;
    assert!(audit.starts_with("HTTP/1.1 403"), "{audit}");
    assert!(audit.contains("core_permission_denied"), "{audit}");
    let channel = link.channel().await;
    let mut vms = VmServiceClient::new(channel.clone());
    let listed = vms
        .list(as_alice(ListVmsRequest::default(), "viewer"))
        .await;
    assert!(listed.unwrap().into_inner().vms.is_empty());
    let mut hosts = HostServiceClient::new(channel);
    let status = hosts
        .get_status(as_alice(GetStatusRequest {}, "viewer"))
        .await;
    assert_eq!(status.unwrap().into_inner().core.unwrap().tenant, "acme");
    let consent = as_alice(AllowCoreDeletesRequest::default(), "admin");
    assert!(hosts.allow_core_deletes(consent).await.is_err());

    // A command, and the same again on the next link after a restart.
    let command = |id: &str, generation| {
        Kind::Command(proto::Command {
            id: id.into(),
            epoch: 3,
            generation,
            deadline: Some((std::time::SystemTime::now() + Duration::from_secs(3600)).into()),
            issuer: Some(proto::CommandIssuer {
                name: "acme/alice".into(),
                tenant: "acme".into(),
                role: "operator".into(),
            }),
            previous: generation - 1,
            action: Some(proto::command::Action::StartVm(StartVmRequest {
                vm: "nothing".into(),
                ..StartVmRequest::default()
            })),
            ..proto::Command::default()
        })
    };
    let id = "11111111-1111-4111-8111-111111111111";
    link.say.send(command(id, 1)).await.unwrap();
    let first = link.result().await;
    assert_eq!(
        (first.id.as_str(), first.code.as_str()),
        (id, "vm_not_found")
    );
    let (host, ()) = apart(host, |host| {
        host.signal(Signal::KILL);
        host.ended();
        fs::remove_file(host.path("log")).unwrap();
        host.start();
    })
    .await;
    let mut link = core.link().await;
    assert_eq!((link.hello.epoch, link.hello.command_generation), (3, 1));
    // Core never said that it keeps the result: it is told again, and is the same.
    let told_again = link.result().await;
    assert_eq!(
        (told_again.at, told_again.message),
        (first.at, first.message)
    );
    let kept = Kind::CommandKept(proto::CommandKept { generation: 1 });
    link.say.send(kept).await.unwrap();
    let second = "22222222-2222-4222-8222-222222222222";
    link.say.send(command(second, 2)).await.unwrap();
    assert_eq!(link.result().await.id, second);

    // Leaving: the link ends, and everything local goes on.
    let (mut host, (done, text)) = apart(host, |host| told(host, &["unenroll"], "")).await;
    assert!(done && text.contains("no longer pc of acme"), "{text}");
    let closed = tokio::time::timeout(PATIENCE, link.session.handle.closed());
    closed.await.expect("the link of a host that left goes on");
    let (metrics, live) = tokio::task::spawn_blocking(move || {
        let metrics = host.address("metrics");
        host.wait("the link to be gone from the metrics", |host| {
            !host.get(metrics, "/metrics").contains("ghost_core_link_up")
        });
        let live = host.get(host.address("HTTP"), "/live");
        (host.get(metrics, "/metrics"), live)
    })
    .await
    .unwrap();
    assert!(live.starts_with("HTTP/1.1 200"), "{live}");
    let refused = "ghost_core_commands_total{status=\"refused\"} 1";
    assert!(metrics.contains(refused), "{metrics}");
}
