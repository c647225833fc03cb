//! A small Core for tests: real TLS, real certificates, the real tunnel, and a memory of what hosts
//! said.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ghost_domain::fleet::{
    CommandOutcome, CommandStatus, CorePermissions, FleetCommand, HeartbeatReport, LinkState,
};
use ghost_domain::ports::{Clock, CoreLinkHandler};
use ghost_domain::{Monotonic, Result, Timestamp};
use ghost_proto::core::v1 as proto;
use ghost_proto::core::v1::enrolment_service_server::{EnrolmentService, EnrolmentServiceServer};
use ghost_proto::core::v1::link_message::Kind;
use parking_lot::Mutex;
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    PublicKeyData, SanType, SubjectPublicKeyInfo,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{
    CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, PrivatePkcs8KeyDer,
};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use tokio::io::{ReadHalf, WriteHalf};
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc};
use tonic::{Request, Response, Status};
use x509_parser::prelude::{FromDer, X509Certificate, X509CertificationRequest};

use crate::tunnel::messages::{MessageReader, MessageWriter};
use crate::tunnel::{Limits, Session, Side, TunnelStream, begin};

pub(super) const DOMAIN: &str = "fleet.test";
pub(super) const HOST: &str = "8d7f0000-0000-4000-8000-000000000001";
pub(super) const CORE_ID: &str = "core-1";

/// Core's certificate authority.
pub(super) struct TestAuthority {
    pub(super) certificate: CertificateDer<'static>,
    pub(super) pem: String,
    issuer: Issuer<'static, KeyPair>,
}

pub(super) fn hours(hours: i64) -> OffsetDateTime {
    OffsetDateTime::now_utc() + time::Duration::hours(hours)
}

impl TestAuthority {
    pub(super) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap();
        Self {
            certificate: certificate.der().clone(),
            pem: certificate.pem(),
            issuer: Issuer::new(params, key),
        }
    }

    pub(super) fn fingerprint(&self) -> String {
        hex::encode(Sha256::digest(&self.certificate))
    }

    pub(super) fn leaf(
        &self,
        key: &impl PublicKeyData,
        uri: &str,
        purpose: ExtendedKeyUsagePurpose,
        (from, until): (OffsetDateTime, OffsetDateTime),
    ) -> rcgen::Certificate {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(uri.to_owned().try_into().unwrap())];
        params.extended_key_usages = vec![purpose];
        params.not_before = from;
        params.not_after = until;
        params.signed_by(key, &self.issuer).unwrap()
    }
}

/// What a fake Core does.
pub(super) struct FakeCore {
    pub(super) authority: Arc<TestAuthority>,
    pub(super) address: SocketAddr,
    enrolment: Arc<Enrolment>,
    links: mpsc::Receiver<Session>,
}

/// The URI and the purpose of the certificate that a Core shows.
pub(super) struct Face {
    pub(super) uri: String,
    pub(super) purpose: ExtendedKeyUsagePurpose,
    pub(super) valid: (OffsetDateTime, OffsetDateTime),
}

impl Default for Face {
    fn default() -> Self {
        Self {
            uri: super::core_uri(DOMAIN),
            purpose: ExtendedKeyUsagePurpose::ServerAuth,
            valid: (hours(-1), hours(24)),
        }
    }
}

impl FakeCore {
    pub(super) async fn start() -> Self {
        Self::start_with(Arc::new(TestAuthority::new()), Face::default()).await
    }

    pub(super) async fn start_with(authority: Arc<TestAuthority>, face: Face) -> Self {
        let key = KeyPair::generate().unwrap();
        let leaf = authority.leaf(&key, &face.uri, face.purpose, face.valid);
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
                // The CA too: who has only its fingerprint needs to see it.
                vec![leaf.der().clone(), authority.certificate.clone()],
                PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
            )
            .unwrap();
        config.alpn_protocols = vec![ghost_proto::core::LINK_PROTOCOL.to_vec(), b"h2".to_vec()];
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let enrolment = Arc::new(Enrolment {
            authority: Arc::clone(&authority),
            address,
            used: Mutex::new(HashSet::new()),
            issued: Mutex::new(HashMap::new()),
            generation: AtomicU64::new(0),
            renewed: Notify::new(),
        });
        let (give, links) = mpsc::channel(8);
        let service = Arc::clone(&enrolment);
        tokio::spawn(async move {
            let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
            while let Ok((tcp, _)) = listener.accept().await {
                let (acceptor, give) = (acceptor.clone(), give.clone());
                let service = EnrolmentServiceServer::from_arc(Arc::clone(&service));
                tokio::spawn(async move {
                    let Ok(tls) = acceptor.accept(tcp).await else {
                        return;
                    };
                    if tls.get_ref().1.alpn_protocol() == Some(b"h2") {
                        let once =
                            futures::stream::once(async { Ok::<_, std::io::Error>(Served(tls)) });
                        let _ = tonic::transport::Server::builder()
                            .add_service(service)
                            .serve_with_incoming(once)
                            .await;
                    } else {
                        let _ = give.send(begin(tls, Side::Server, Limits::CORE)).await;
                    }
                });
            }
        });
        Self {
            authority,
            address,
            enrolment,
            links,
        }
    }

    pub(super) fn token(&self, id: &str) -> String {
        format!(
            "ghost-host-v1.{}.{id}.secret.{}",
            URL_SAFE_NO_PAD.encode(self.address.to_string()),
            self.authority.fingerprint()
        )
    }

    pub(super) fn generation(&self) -> u64 {
        self.enrolment.generation.load(Ordering::SeqCst)
    }

    pub(super) async fn renewed(&self) {
        self.enrolment.renewed.notified().await;
    }

    /// The next link, with its hello.
    pub(super) async fn link(&mut self) -> FakeLink {
        let mut session = self.links.recv().await.unwrap();
        let (read, write) = tokio::io::split(session.incoming.recv().await.unwrap());
        let mut link = FakeLink {
            session,
            reader: MessageReader::new(read),
            writer: MessageWriter::new(write),
            hello: proto::AgentHello::default(),
            core: BTreeVms::new(),
        };
        match link.reader.next().await.unwrap() {
            Some(Kind::Hello(hello)) => link.hello = hello,
            other => panic!("{other:?}"),
        }
        link
    }

    /// The next link, welcomed.
    pub(super) async fn welcomed(&mut self, pings: Duration) -> FakeLink {
        let mut link = self.link().await;
        link.welcome(CORE_ID, pings).await;
        link
    }

    /// The next session, whatever it does.
    pub(super) async fn session(&mut self) -> Session {
        self.links.recv().await.unwrap()
    }
}

type BTreeVms = std::collections::BTreeMap<String, proto::VmSummary>;

/// Core's end of a link.
pub(super) struct FakeLink {
    pub(super) session: Session,
    pub(super) reader: MessageReader<ReadHalf<TunnelStream>>,
    pub(super) writer: MessageWriter<WriteHalf<TunnelStream>>,
    pub(super) hello: proto::AgentHello,
    /// What Core knows of the host's VMs.
    pub(super) core: BTreeVms,
}

impl FakeLink {
    pub(super) async fn welcome(&mut self, core_id: &str, pings: Duration) {
        let welcome = proto::CoreWelcome {
            protocol_version: 1,
            core_version: "0.1.0".into(),
            core_id: core_id.into(),
            replica: "replica-a".into(),
            epoch: 3,
            heartbeat_interval: Some(Duration::from_secs(1).try_into().unwrap()),
            ping_interval: Some(pings.try_into().unwrap()),
            want_full: false,
        };
        self.say(Kind::Welcome(welcome)).await;
    }

    pub(super) async fn say(&mut self, kind: Kind) {
        self.writer.send(kind).await.unwrap();
    }

    /// The next message that is none of the routine; pings are answered, heartbeats applied and
    /// answered.
    pub(super) async fn next(&mut self) -> Kind {
        loop {
            match self.reader.next().await.unwrap().unwrap() {
                Kind::Ping(ping) => {
                    self.say(Kind::Pong(proto::Pong {
                        number: ping.number,
                    }))
                    .await;
                }
                Kind::Heartbeat(beat) => {
                    self.beat(&beat).await;
                }
                kind => return kind,
            }
        }
    }

    /// The next heartbeat.
    pub(super) async fn heartbeat(&mut self) -> proto::Heartbeat {
        loop {
            match self.reader.next().await.unwrap().unwrap() {
                Kind::Ping(ping) => {
                    self.say(Kind::Pong(proto::Pong {
                        number: ping.number,
                    }))
                    .await;
                }
                Kind::Heartbeat(beat) => {
                    self.beat(&beat).await;
                    return beat;
                }
                Kind::Pong(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    async fn beat(&mut self, beat: &proto::Heartbeat) {
        if beat.full {
            self.core.clear();
        }
        for id in &beat.removed_vms {
            self.core.remove(id);
        }
        for vm in &beat.vms {
            self.core.insert(vm.id.clone(), vm.clone());
        }
        let want_full = crate::tunnel::vms_digest(self.core.values()) != beat.vms_digest;
        let reply = proto::HeartbeatReply {
            sequence: beat.sequence,
            want_full,
            received_at: None,
        };
        self.say(Kind::HeartbeatReply(reply)).await;
    }

    pub(super) async fn goodbye(mut self, code: &str) {
        let goodbye = proto::Goodbye {
            code: code.into(),
            message: "because".into(),
            ..proto::Goodbye::default()
        };
        self.say(Kind::Goodbye(goodbye)).await;
        self.session.handle.close("goodbye");
        self.session.handle.closed().await;
    }
}

struct Enrolment {
    authority: Arc<TestAuthority>,
    address: SocketAddr,
    used: Mutex<HashSet<String>>,
    /// The newest certificate's key by generation.
    issued: Mutex<HashMap<u64, Vec<u8>>>,
    generation: AtomicU64,
    renewed: Notify,
}

impl Enrolment {
    fn issue(&self, request_pem: &str) -> proto::HostCertificate {
        let der = CertificateSigningRequestDer::from_pem_slice(request_pem.as_bytes()).unwrap();
        let (_, request) = X509CertificationRequest::from_der(&der).unwrap();
        let key =
            SubjectPublicKeyInfo::from_der(request.certification_request_info.subject_pki.raw)
                .unwrap();
        let generation = self.generation.fetch_add(1, Ordering::SeqCst) + 1;
        self.issued
            .lock()
            .insert(generation, key.der_bytes().to_vec());
        let leaf = self.authority.leaf(
            &key,
            &format!("spiffe://{DOMAIN}/tenant/acme/host/{HOST}"),
            ExtendedKeyUsagePurpose::ClientAuth,
            (hours(-1), hours(24)),
        );
        proto::HostCertificate {
            certificate_pem: leaf.pem(),
            authority_pem: self.authority.pem.clone(),
            expires_at: None,
            generation,
            host_id: HOST.into(),
            host_name: "pc".into(),
            tenant: "acme".into(),
            trust_domain: DOMAIN.into(),
            addresses: vec![self.address.to_string()],
        }
    }
}

#[tonic::async_trait]
impl EnrolmentService for Enrolment {
    async fn enroll(
        &self,
        request: Request<proto::EnrollHostRequest>,
    ) -> Result<Response<proto::HostCertificate>, Status> {
        let request = request.into_inner();
        if !self.used.lock().insert(request.token) {
            return Err(Status::unauthenticated("the token was used"));
        }
        Ok(Response::new(self.issue(&request.request_pem)))
    }

    async fn renew(
        &self,
        request: Request<proto::RenewHostRequest>,
    ) -> Result<Response<proto::HostCertificate>, Status> {
        let request = request.into_inner();
        if request.generation != self.generation.load(Ordering::SeqCst) {
            return Err(Status::permission_denied("cloned"));
        }
        let issued = self.issue(&request.request_pem);
        self.renewed.notify_one();
        Ok(Response::new(issued))
    }

    async fn recover(
        &self,
        request: Request<proto::RecoverHostRequest>,
    ) -> Result<Response<proto::HostCertificate>, Status> {
        let request = request.into_inner();
        let old = CertificateDer::from_pem_slice(request.certificate_pem.as_bytes()).unwrap();
        let (_, old) = X509Certificate::from_der(&old).unwrap();
        let new =
            CertificateSigningRequestDer::from_pem_slice(request.request_pem.as_bytes()).unwrap();
        let message = [b"ghost-recover-v1".as_slice(), &new].concat();
        let point = &old.public_key().subject_public_key.data;
        // Spelled out as Core has to do it: ECDSA P-256 over SHA-256, the signature in DER.
        let verified = rustls::crypto::aws_lc_rs::default_provider()
            .signature_verification_algorithms
            .mapping
            .iter()
            .find(|(scheme, _)| *scheme == rustls::SignatureScheme::ECDSA_NISTP256_SHA256)
            .unwrap()
            .1
            .iter()
            .any(|algorithm| {
                algorithm
                    .verify_signature(point, &message, &request.proof)
                    .is_ok()
            });
        if !verified {
            return Err(Status::permission_denied("the proof is wrong"));
        }
        Ok(Response::new(self.issue(&request.request_pem)))
    }
}

/// A TLS stream as tonic's server wants it.
struct Served<T>(T);

impl<T> tonic::transport::server::Connected for Served<T> {
    type ConnectInfo = ();
    fn connect_info(&self) {}
}

impl<T: tokio::io::AsyncRead + Unpin> tokio::io::AsyncRead for Served<T> {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
        buffer: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl<T: tokio::io::AsyncWrite + Unpin> tokio::io::AsyncWrite for Served<T> {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
        bytes: &[u8],
    ) -> std::task::Poll<std::io::Result<usize>> {
        std::pin::Pin::new(&mut self.0).poll_write(context, bytes)
    }
    fn poll_flush(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.0).poll_flush(context)
    }
    fn poll_shutdown(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.0).poll_shutdown(context)
    }
}

/// An application that takes every command.
#[derive(Default)]
pub(super) struct TestHandler {
    pub(super) report: Mutex<HeartbeatReport>,
    pub(super) changed: Notify,
    pub(super) outcomes: Mutex<Vec<CommandOutcome>>,
    pub(super) outcomes_new: Notify,
    pub(super) kept: Mutex<Vec<u64>>,
    pub(super) commands: Mutex<Vec<FleetCommand>>,
    pub(super) states: Mutex<Vec<LinkState>>,
    pub(super) state_new: Notify,
    pub(super) off: AtomicBool,
    pub(super) answered: AtomicU64,
    pub(super) lost: AtomicU64,
}

#[async_trait]
impl CoreLinkHandler for TestHandler {
    fn permissions(&self) -> CorePermissions {
        if self.off.load(Ordering::SeqCst) {
            CorePermissions::Off
        } else {
            CorePermissions::Operate
        }
    }

    fn ledger(&self, core_id: &str) -> (u64, u64) {
        if core_id == CORE_ID { (3, 7) } else { (0, 0) }
    }

    async fn welcomed(&self, _core_id: &str, _epoch: u64) -> Result<()> {
        Ok(())
    }

    async fn report(&self) -> Result<HeartbeatReport> {
        Ok(self.report.lock().clone())
    }

    async fn report_changed(&self) {
        self.changed.notified().await;
    }

    async fn command(&self, command: FleetCommand) -> Option<CommandOutcome> {
        let outcome = CommandOutcome {
            id: command.id,
            generation: command.generation,
            status: CommandStatus::Accepted,
            operation: None,
            code: None,
            message: String::new(),
            at: command.deadline,
        };
        self.commands.lock().push(command);
        self.outcomes.lock().push(outcome.clone());
        Some(outcome)
    }

    fn outcomes(&self) -> Vec<CommandOutcome> {
        self.outcomes.lock().clone()
    }

    async fn outcomes_changed(&self) {
        self.outcomes_new.notified().await;
    }

    async fn outcome_kept(&self, generation: u64) {
        self.kept.lock().push(generation);
        self.state_new.notify_one();
    }

    fn heartbeat_ended(&self, answered: bool) {
        let counter = if answered { &self.answered } else { &self.lost };
        counter.fetch_add(1, Ordering::SeqCst);
        self.state_new.notify_one();
    }

    fn link_changed(&self, state: LinkState) {
        self.states.lock().push(state);
        self.state_new.notify_one();
    }
}

impl TestHandler {
    /// Waits until something of this handler is so.
    pub(super) async fn until(&self, is_so: impl Fn(&Self) -> bool) {
        let waiting = async {
            while !is_so(self) {
                self.state_new.notified().await;
            }
        };
        if tokio::time::timeout(Duration::from_secs(30), waiting)
            .await
            .is_err()
        {
            panic!("it did not become so; states: {:?}", self.states.lock());
        }
    }
}

/// A wall clock that tests set.
pub(super) struct TestClock(pub(super) Mutex<Timestamp>);

impl TestClock {
    pub(super) fn now() -> Arc<Self> {
        Arc::new(Self(Mutex::new(std::time::SystemTime::now().into())))
    }
}

impl Clock for TestClock {
    fn now(&self) -> Timestamp {
        *self.0.lock()
    }
    fn monotonic(&self) -> Monotonic {
        Monotonic::default()
    }
}
