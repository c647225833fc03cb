//! What somebody can do who has Core's key: a Core that was taken over, with its real CA, which
//! speaks the real protocol to real agents and says what it likes; and certificates of that CA, or of
//! another one, that nobody should have.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ghost_domain::ports::Clock;
use ghost_domain::{Monotonic, Timestamp};
use ghost_e2e::agent::Agent;
use ghost_e2e::core::Core;
use ghost_infrastructure::identity::{Authority, LeafTemplate, ServerNames, ServerTls};
use ghost_infrastructure::tunnel::messages::{MessageReader, MessageWriter};
use ghost_infrastructure::tunnel::{Limits, Session, Side, TunnelStream, begin};
use ghost_proto::core::LINK_PROTOCOL;
use ghost_proto::core::v1 as proto;
use ghost_proto::core::v1::link_message::Kind;
use hyper_util::rt::TokioIo;
use rcgen::{CertificateParams, KeyPair};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use tokio::io::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tonic::transport::{Channel, Endpoint};

pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// As Core's configuration has it where nothing else is said.
pub(crate) const TRUST_DOMAIN: &str = "ghost.local";

/// A clock that is off by so much.
#[derive(Debug)]
struct OffBy(i64);

impl Clock for OffBy {
    fn now(&self) -> Timestamp {
        let now = Timestamp::from(std::time::SystemTime::now());
        Timestamp::from_unix_millis(now.unix_millis() + self.0 * 1000)
    }

    fn monotonic(&self) -> Monotonic {
        Monotonic::default()
    }
}

/// Core's CA, as whoever has read its data folder has it; its clock is off by so many seconds.
pub(crate) fn stolen(core: &Core, off_by: i64) -> Arc<Authority> {
    authority(&core.folder().join("data"), off_by)
}

/// The CA of a data folder; made where there is none.
pub(crate) fn authority(data_dir: &Path, off_by: i64) -> Arc<Authority> {
    Arc::new(Authority::open(data_dir, Arc::new(OffBy(off_by))).unwrap())
}

/// What a client shows.
pub(crate) struct Papers {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Papers {
    /// New ones, in the name of `uri`.
    pub(crate) fn issue(authority: &Authority, uri: &str, generation: Option<u64>) -> Self {
        let key = KeyPair::generate().unwrap();
        let request = CertificateParams::default()
            .serialize_request(&key)
            .unwrap();
        let template = LeafTemplate {
            common_name: "somebody".into(),
            uris: vec![uri.to_owned()],
            client: true,
            server: true,
            serial_tail: generation,
        };
        let signed = authority
            .sign_template(&request.pem().unwrap(), template)
            .unwrap();
        let leaf = CertificateDer::from_pem_slice(signed.issued.certificate_pem.as_bytes());
        Self {
            chain: vec![leaf.unwrap()],
            key: PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
        }
    }

    /// The real ones of a host.
    pub(crate) fn of_host(agent: &Agent) -> Self {
        let folder = agent.data_dir().join("core/current");
        let read = |name: &str| std::fs::read(folder.join(name)).unwrap();
        Self {
            chain: CertificateDer::pem_slice_iter(&read("certificate.pem"))
                .collect::<Result<_, _>>()
                .unwrap(),
            key: PrivateKeyDer::from_pem_slice(&read("key.pem")).unwrap(),
        }
    }
}

/// The URI of a host's certificate.
pub(crate) fn host_uri(tenant: &str, host: &str) -> String {
    format!("spiffe://{TRUST_DOMAIN}/tenant/{tenant}/host/{host}")
}

/// The URI of a person's certificate.
pub(crate) fn user_uri(user: &str) -> String {
    format!("spiffe://{TRUST_DOMAIN}/user/{user}")
}

/// Takes whoever answers: it is Core that is to find out who calls here.
#[derive(Debug)]
struct Trusting;

impl ServerCertVerifier for Trusting {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        rustls::crypto::aws_lc_rs::default_provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

async fn dial(
    core: std::net::SocketAddr,
    papers: Option<Papers>,
    protocol: &[u8],
) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Trusting));
    let mut config = match papers {
        Some(papers) => builder
            .with_client_auth_cert(papers.chain, papers.key)
            .unwrap(),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![protocol.to_vec()];
    let tcp = TcpStream::connect(core).await?;
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let name = ServerName::try_from("core").unwrap();
    connector.connect(name, tcp).await
}

/// What Core answers to a hello under these papers: the code of its goodbye, or `welcome`; an error
/// where it ends the connection without a word of the protocol, with what TLS says.
pub(crate) async fn hello(core: &Core, papers: Papers, generation: u64) -> Result<String, String> {
    let told = |error: std::io::Error| error.to_string();
    let at = core.address();
    let talk = async {
        let tls = dial(at, Some(papers), LINK_PROTOCOL).await.map_err(told)?;
        let session = begin(tls, Side::Client, Limits::HOST);
        let handle = session.handle.clone();
        let said = async {
            let (read, write) = tokio::io::split(handle.open().await?);
            let (mut reader, mut writer) = (MessageReader::new(read), MessageWriter::new(write));
            let hello = proto::AgentHello {
                protocol_version: 1,
                instance_id: "somebody".into(),
                certificate_generation: generation,
                permissions: "operate".into(),
                carrier: "link".into(),
                ..proto::AgentHello::default()
            };
            writer.send(Kind::Hello(hello)).await?;
            reader.next().await
        };
        match said.await {
            Ok(Some(Kind::Goodbye(goodbye))) => Ok(goodbye.code),
            Ok(Some(Kind::Welcome(_))) => Ok("welcome".to_owned()),
            Ok(other) => Err(format!("{other:?}; {}", handle.closed().await)),
            Err(error) => Err(format!("{error}; {}", handle.closed().await)),
        }
    };
    tokio::time::timeout(PATIENCE, talk)
        .await
        .unwrap_or_else(|_| panic!("Core says nothing"))
}

/// What TLS says to these papers before a word of any protocol.
pub(crate) async fn alert(core: &Core, papers: Papers, protocol: &[u8]) -> String {
    use tokio::io::AsyncReadExt as _;
    let mut tls = match dial(core.address(), Some(papers), protocol).await {
        Ok(tls) => tls,
        Err(error) => return error.to_string(),
    };
    // In TLS 1.3 the client is done before the server has looked at its certificate.
    match tokio::time::timeout(PATIENCE, tls.read(&mut [0; 64])).await {
        Ok(Ok(read)) => format!("it let us in and said {read} bytes"),
        Ok(Err(error)) => error.to_string(),
        Err(_) => "nothing".to_owned(),
    }
}

/// A channel to Core's gRPC under these papers.
///
/// # Errors
/// What TLS says.
pub(crate) async fn channel(core: &Core, papers: Option<Papers>) -> Result<Channel, String> {
    let tls = dial(core.address(), papers, b"h2")
        .await
        .map_err(|error| error.to_string())?;
    let mut slot = Some(TokioIo::new(tls));
    Endpoint::from_static("http://core")
        .connect_with_connector(tower::service_fn(move |_| {
            let stream = slot.take();
            async move { stream.ok_or_else(|| std::io::Error::other("the connection is over")) }
        }))
        .await
        .map_err(|error| format!("{error:?}"))
}

/// A Core that was taken over: it has the real one's key, address and name.
pub(crate) struct TakenCore {
    links: mpsc::Receiver<Session>,
    core_id: String,
    epoch: u64,
}

impl TakenCore {
    /// Takes the place of `core`, which is killed.
    pub(crate) async fn instead_of(core: &mut Core, agent: &Agent) -> Self {
        core.kill();
        let names = ServerNames {
            configured: Vec::new(),
            hostname: "core".into(),
            listen: vec![core.address().ip()],
        };
        let template = LeafTemplate {
            common_name: "ghost-core".into(),
            uris: vec![format!("spiffe://{TRUST_DOMAIN}/core")],
            server: true,
            ..LeafTemplate::default()
        };
        let tls = ServerTls::of_template(stolen(core, 0), names, template).unwrap();
        let config = tls.config_for(&[LINK_PROTOCOL, b"h2"]).unwrap();
        let listener = TcpListener::bind(core.address()).await.unwrap();
        let (give, links) = mpsc::channel(8);
        tokio::spawn(async move {
            let acceptor = tokio_rustls::TlsAcceptor::from(config);
            while let Ok((tcp, _)) = listener.accept().await {
                let (acceptor, give) = (acceptor.clone(), give.clone());
                tokio::spawn(async move {
                    if let Ok(tls) = acceptor.accept(tcp).await
                        && tls.get_ref().1.alpn_protocol() == Some(LINK_PROTOCOL)
                    {
                        drop(give.send(begin(tls, Side::Server, Limits::CORE)).await);
                    }
                });
            }
        });
        let core_id = std::fs::read_to_string(agent.data_dir().join("core/core-id")).unwrap();
        Self {
            links,
            core_id,
            epoch: 0,
        }
    }

    /// The next link, welcomed by the right name; the host is told to hurry.
    pub(crate) async fn link(&mut self, agent: &Agent) -> TakenLink {
        let ctl = agent.ctl();
        let hurried = async {
            loop {
                let ctl = ctl.clone();
                let hurry = tokio::task::spawn_blocking(move || ctl.run(&["core", "reconnect"]));
                drop(hurry.await);
                // A link that comes meanwhile ends this.
                tokio::time::sleep(Duration::from_secs(2)).await;
            }
        };
        while self.links.try_recv().is_ok() {}
        let mut session = tokio::select! {
            session = self.links.recv() => session.unwrap(),
            () = hurried => unreachable!(),
            () = tokio::time::sleep(PATIENCE) => panic!("no link came"),
        };
        let control = tokio::time::timeout(PATIENCE, session.incoming.recv()).await;
        let (read, write) = tokio::io::split(control.unwrap().expect("a control stream"));
        let (mut reader, mut writer) = (MessageReader::new(read), MessageWriter::new(write));
        let Ok(Some(Kind::Hello(hello))) = reader.next().await else {
            panic!("the first message is no hello");
        };
        self.epoch = self.epoch.max(hello.epoch).max(1);
        let welcome = proto::CoreWelcome {
            protocol_version: 1,
            core_version: "0.1.0".into(),
            core_id: self.core_id.trim().to_owned(),
            replica: "taken".into(),
            epoch: self.epoch,
            heartbeat_interval: Some(Duration::from_secs(5).try_into().unwrap()),
            ping_interval: Some(Duration::from_secs(5).try_into().unwrap()),
            want_full: true,
        };
        writer.send(Kind::Welcome(welcome)).await.unwrap();
        let (say, said) = mpsc::channel(64);
        let (hear, heard) = mpsc::channel(4096);
        tokio::spawn(keep(reader, writer, said, hear));
        TakenLink {
            session,
            epoch: self.epoch,
            generation: hello.command_generation,
            say,
            heard,
        }
    }

    /// Whether a link comes within a time.
    pub(crate) async fn is_dialled(&mut self, within: Duration) -> bool {
        while self.links.try_recv().is_ok() {}
        tokio::time::timeout(within, self.links.recv())
            .await
            .is_ok()
    }
}

/// What is said on a control stream.
pub(crate) enum Say {
    /// A message.
    Kind(Box<Kind>),
    /// Bytes, whatever they are.
    Raw(Vec<u8>),
}

/// Answers what is routine, and hands on the rest.
async fn keep(
    mut reader: MessageReader<ReadHalf<TunnelStream>>,
    mut writer: MessageWriter<WriteHalf<TunnelStream>>,
    mut said: mpsc::Receiver<Say>,
    hear: mpsc::Sender<Kind>,
) {
    use tokio::io::AsyncWriteExt as _;
    loop {
        let kind = tokio::select! {
            say = said.recv() => {
                let done = match say {
                    Some(Say::Kind(kind)) => writer.send(*kind).await,
                    Some(Say::Raw(bytes)) => {
                        let io = writer.get_mut();
                        match io.write_all(&bytes).await {
                            Ok(()) => io.flush().await,
                            failed => failed,
                        }
                    }
                    None => return,
                };
                if done.is_err() {
                    return;
                }
                continue;
            }
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
        if matches!(kind, Kind::CommandResult(_) | Kind::Goodbye(_)) {
            drop(hear.try_send(kind));
        }
    }
}

/// The end of a link that a taken-over Core has.
pub(crate) struct TakenLink {
    pub(crate) session: Session,
    pub(crate) epoch: u64,
    /// The newest command that the host knows.
    pub(crate) generation: u64,
    say: mpsc::Sender<Say>,
    heard: mpsc::Receiver<Kind>,
}

impl TakenLink {
    pub(crate) async fn say(&self, kind: Kind) {
        drop(self.say.send(Say::Kind(Box::new(kind))).await);
    }

    pub(crate) async fn raw(&self, bytes: Vec<u8>) {
        drop(self.say.send(Say::Raw(bytes)).await);
    }

    /// The next result.
    pub(crate) async fn result(&mut self) -> proto::CommandResult {
        let waited = tokio::time::timeout(PATIENCE, async {
            loop {
                match self.heard.recv().await.expect("the link ended") {
                    Kind::CommandResult(result) => return result,
                    _ => continue,
                }
            }
        });
        waited.await.expect("a result")
    }

    /// The result that says what became of a command in the end.
    pub(crate) async fn end_of(&mut self, generation: u64) -> proto::CommandResult {
        loop {
            let result = self.result().await;
            let ended = result.status() != proto::CommandStatus::Accepted;
            if result.generation == generation && ended {
                return result;
            }
        }
    }

    /// The command that comes next in the order.
    pub(crate) fn command(&mut self, action: Option<proto::command::Action>) -> proto::Command {
        self.generation += 1;
        proto::Command {
            id: uuid::Uuid::new_v4().to_string(),
            epoch: self.epoch,
            generation: self.generation,
            previous: self.generation - 1,
            issued_at: None,
            deadline: Some((std::time::SystemTime::now() + Duration::from_secs(3600)).into()),
            issuer: Some(proto::CommandIssuer {
                name: "acme/mallory".into(),
                tenant: "acme".into(),
                role: "admin".into(),
            }),
            action,
        }
    }

    /// Sends the command that comes next, and waits for its end.
    pub(crate) async fn order(&mut self, action: proto::command::Action) -> proto::CommandResult {
        let command = self.command(Some(action));
        let generation = command.generation;
        self.say(Kind::Command(command)).await;
        self.end_of(generation).await
    }

    /// The host's gRPC, over streams of this link.
    pub(crate) async fn channel(&self) -> Channel {
        let handle = self.session.handle.clone();
        Endpoint::from_static("http://pc")
            .connect_with_connector(tower::service_fn(move |_| {
                let handle = handle.clone();
                async move { handle.open().await.map(TokioIo::new) }
            }))
            .await
            .unwrap()
    }

    /// Waits until the host has ended it.
    pub(crate) async fn ended(self) {
        let closed = tokio::time::timeout(PATIENCE, self.session.handle.closed()).await;
        closed.expect("the link goes on");
    }
}

/// A request in the name of somebody whom Core vouches for.
pub(crate) fn vouched<T>(message: T, name: &str, role: &str) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    let metadata = request.metadata_mut();
    metadata.insert("ghost-principal", name.parse().unwrap());
    metadata.insert("ghost-role", role.parse().unwrap());
    metadata.insert("ghost-tenant", "acme".parse().unwrap());
    request
}

/// The stable code of a refusal.
pub(crate) fn code(status: &tonic::Status) -> String {
    use tonic_types::StatusExt as _;
    let details = status.get_error_details();
    details
        .error_info()
        .map_or_else(|| format!("{status:?}"), |info| info.reason.clone())
}
