//! Direct ways over real TLS: who gets in at a host's own listener, and whom Core takes for a host.

use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use ghost_core::application::direct::DirectDialer;
use ghost_core::domain::ports::FleetAuthority;
use ghost_core::infrastructure::authority::CoreAuthority;
use ghost_core::infrastructure::direct::TlsDialer;
use ghost_domain::fleet::{
    CommandOutcome, CorePermissions, FleetCommand, HeartbeatReport, LinkState,
};
use ghost_domain::ports::{Clock, CoreLinkHandler};
use ghost_domain::{CredentialId, HostId, Monotonic, Result, TenantName, Timestamp};
use ghost_infrastructure::clock::SystemClock;
use ghost_infrastructure::core_link::direct::DirectOptions;
use ghost_infrastructure::core_link::{CoreLinkOptions, CoreLinkService, unenrol};
use ghost_infrastructure::identity::ServerNames;
use ghost_infrastructure::tunnel::messages::{MessageReader, MessageWriter};
use ghost_infrastructure::tunnel::{Limits, Side, TunnelStream, begin};
use ghost_proto::core::DIRECT_PROTOCOL;
use ghost_proto::core::v1 as proto;
use ghost_proto::core::v1::link_message::Kind;
use rcgen::{CertificateParams, KeyPair};
use rustls::client::ResolvesClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

const DOMAIN: &str = "ghost.test";

/// A clock that stands where it was set.
#[derive(Debug)]
struct SetClock(Timestamp);

impl Clock for SetClock {
    fn now(&self) -> Timestamp {
        self.0
    }

    fn monotonic(&self) -> Monotonic {
        Monotonic::default()
    }
}

/// The owner of a host who lets Core do this.
struct Owner(CorePermissions);

#[async_trait]
impl CoreLinkHandler for Owner {
    fn permissions(&self) -> CorePermissions {
        self.0
    }

    fn ledger(&self, _: &str) -> (u64, u64) {
        (0, 0)
    }

    async fn welcomed(&self, _: &str, _: u64) -> Result<()> {
        Ok(())
    }

    async fn report(&self) -> Result<HeartbeatReport> {
        Ok(HeartbeatReport::default())
    }

    async fn report_changed(&self) {
        std::future::pending().await
    }

    async fn command(&self, _: FleetCommand) -> Option<CommandOutcome> {
        None
    }

    fn outcomes(&self) -> Vec<CommandOutcome> {
        Vec::new()
    }

    async fn outcomes_changed(&self) {
        std::future::pending().await
    }

    async fn outcome_kept(&self, _: u64) {}

    fn link_changed(&self, _: LinkState) {}
}

fn tenant() -> TenantName {
    TenantName::new("acme").unwrap()
}

fn request(key: &KeyPair) -> String {
    CertificateParams::new(Vec::new())
        .unwrap()
        .serialize_request(key)
        .unwrap()
        .pem()
        .unwrap()
}

/// A leaf with its key, PEM.
struct Leaf {
    certificate: String,
    key: String,
}

async fn host_leaf(authority: &CoreAuthority, host: HostId) -> Leaf {
    let key = KeyPair::generate().unwrap();
    let (issued, _) = authority
        .sign_host(&request(&key), &tenant(), host, 1)
        .await
        .unwrap();
    Leaf {
        certificate: issued.certificate_pem,
        key: key.serialize_pem(),
    }
}

/// A host with its identity on disk and a listener for Core.
struct Host {
    id: HostId,
    link: Arc<CoreLinkService>,
    address: SocketAddr,
    streams: mpsc::Receiver<TunnelStream>,
    /// How each handshake ended.
    shaken: mpsc::UnboundedReceiver<bool>,
    folder: tempfile::TempDir,
    _serving: AbortOnDropHandle<()>,
}

fn join(folder: &Path, authority: &CoreAuthority, host: HostId, leaf: &Leaf) {
    let name = format!("{host}-1");
    let at = folder.join("core").join(&name);
    std::fs::create_dir_all(&at).unwrap();
    let row = serde_json::json!({
        "version": 1, "host": host.to_string(), "name": "pc", "tenant": "acme",
        "trust_domain": DOMAIN, "addresses": ["127.0.0.1:1"], "generation": 1,
    });
    for (file, content) in [
        ("key.pem", leaf.key.as_str()),
        ("certificate.pem", &leaf.certificate),
        ("authority.pem", authority.certificate_pem()),
        ("identity.json", &row.to_string()),
    ] {
        std::fs::write(at.join(file), content).unwrap();
    }
    symlink(&name, folder.join("core/current")).unwrap();
}

async fn host(authority: &CoreAuthority, permissions: CorePermissions) -> Host {
    let folder = tempfile::tempdir().unwrap();
    let id = HostId::random();
    join(
        folder.path(),
        authority,
        id,
        &host_leaf(authority, id).await,
    );
    let options = CoreLinkOptions {
        data_dir: folder.path().to_owned(),
        agent_version: "1".into(),
        direct: DirectOptions::default(),
    };
    let handler = Arc::new(Owner(permissions));
    let link =
        Arc::new(CoreLinkService::open(options, handler, Arc::new(SystemClock::new())).unwrap());
    let streams = link.incoming().unwrap();
    let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = tcp.local_addr().unwrap();
    let (tell, shaken) = mpsc::unbounded_channel();
    let serving = Arc::clone(&link);
    let serving = tokio::spawn(async move {
        loop {
            let (stream, _) = tcp.accept().await.unwrap();
            let (link, tell) = (Arc::clone(&serving), tell.clone());
            tokio::spawn(async move {
                let Some(config) = link.direct_tls() else {
                    return;
                };
                let shaken = TlsAcceptor::from(config).accept(stream).await;
                tell.send(shaken.is_ok()).unwrap();
                if let Ok(stream) = shaken {
                    link.serve_direct(stream).await;
                }
            });
        }
    });
    Host {
        id,
        link,
        address,
        streams,
        shaken,
        folder,
        _serving: AbortOnDropHandle::new(serving),
    }
}

fn core(folder: &Path) -> Arc<CoreAuthority> {
    CoreAuthority::open(folder, DOMAIN, Arc::new(SystemClock::new())).unwrap()
}

/// Takes every server: whether the host takes us is asked here.
#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
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

/// Shows one certificate, wanted or not.
#[derive(Debug)]
struct Shows(Arc<CertifiedKey>);

impl ResolvesClientCert for Shows {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl Leaf {
    fn shows(&self) -> Arc<dyn ResolvesClientCert> {
        let key = PrivateKeyDer::from_pem_slice(self.key.as_bytes()).unwrap();
        let signer = rustls::crypto::aws_lc_rs::sign::any_supported_type(&key).unwrap();
        let certificate = CertificateDer::from_pem_slice(self.certificate.as_bytes()).unwrap();
        Arc::new(Shows(Arc::new(CertifiedKey::new(
            vec![certificate],
            signer,
        ))))
    }
}

/// Whether somebody who shows this gets as far as an answer to a ping.
async fn gets_in(address: SocketAddr, shown: Option<Arc<dyn ResolvesClientCert>>) -> bool {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody));
    let mut config = match shown {
        Some(shown) => builder.with_client_cert_resolver(shown),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![DIRECT_PROTOCOL.to_vec()];
    let stream = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("ghost-agent").unwrap();
    let Ok(stream) = TlsConnector::from(Arc::new(config))
        .connect(name, stream)
        .await
    else {
        return false;
    };
    let session = begin(stream, Side::Client, Limits::CORE);
    let Ok(control) = session.handle.open().await else {
        return false;
    };
    let (read, write) = tokio::io::split(control);
    let (mut reader, mut writer) = (MessageReader::new(read), MessageWriter::new(write));
    let ping = Kind::Ping(proto::Ping { number: 7 });
    if writer.send(ping).await.is_err() {
        return false;
    }
    matches!(reader.next().await, Ok(Some(Kind::Pong(pong))) if pong.number == 7)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_lets_a_replica_of_its_core_in_and_nobody_else() {
    let folder = tempfile::tempdir().unwrap();
    let authority = core(folder.path());
    let mut host = host(&authority, CorePermissions::Read).await;
    let at = host.address;

    let replica = |authority: &CoreAuthority| -> Arc<dyn ResolvesClientCert> {
        authority.replica_tls("core-1").unwrap()
    };
    assert!(gets_in(at, Some(replica(&authority))).await, "its Core");
    assert!(host.shaken.recv().await.unwrap());

    let another_host = host_leaf(&authority, HostId::random()).await.shows();
    let itself = host_leaf(&authority, host.id).await.shows();
    let key = KeyPair::generate().unwrap();
    let person = authority
        .sign_user(&request(&key), CredentialId::random(), "alice")
        .await
        .unwrap();
    let person = Leaf {
        certificate: person.certificate_pem,
        key: key.serialize_pem(),
    };
    let server = authority.server_tls(ServerNames::default()).unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let other_core = core(elsewhere.path());
    let domain =
        CoreAuthority::open(folder.path(), "other.test", Arc::new(SystemClock::new())).unwrap();
    assert_eq!(domain.fingerprint(), authority.fingerprint());
    let now = SystemClock::new().now();
    let days_ago = Timestamp::from_unix_millis(now.unix_millis() - 3 * 24 * 3_600_000);
    let past = CoreAuthority::open(folder.path(), DOMAIN, Arc::new(SetClock(days_ago))).unwrap();
    let to_come = Timestamp::from_unix_millis(now.unix_millis() + 3 * 24 * 3_600_000);
    let future = CoreAuthority::open(folder.path(), DOMAIN, Arc::new(SetClock(to_come))).unwrap();
    for (who, shown) in [
        ("another host", Some(another_host)),
        ("the host itself", Some(itself)),
        ("a person", Some(person.shows())),
        (
            "Core's listener",
            Some(Arc::new(Shows(server.certified_key())) as _),
        ),
        ("a replica of another Core", Some(replica(&other_core))),
        ("a replica of another trust domain", Some(replica(&domain))),
        ("a replica of days ago", Some(replica(&past))),
        ("a replica of days to come", Some(replica(&future))),
        ("nobody", None),
    ] {
        assert!(!gets_in(at, shown).await, "{who}");
        assert!(!host.shaken.recv().await.unwrap(), "{who}");
    }
    // And all of that has not spoilt the door.
    assert!(gets_in(at, Some(replica(&authority))).await);
    assert!(host.streams.try_recv().is_err(), "nobody opened a stream");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn core_reaches_a_host_directly_by_streams_and_meets_nobody_else() {
    let folder = tempfile::tempdir().unwrap();
    let authority = core(folder.path());
    let dialer = TlsDialer::new(&authority, "core-1").unwrap();
    let mut host = host(&authority, CorePermissions::Operate).await;
    let way = dialer.dial(&tenant(), host.id, host.address).await.unwrap();
    assert!(host.shaken.recv().await.unwrap());
    // Many who ask at once share their answers.
    let trials = (0..8).map(|_| way.try_out());
    for tried in futures::future::join_all(trials).await {
        tried.unwrap();
    }
    assert_eq!(way.streams(), 0);
    let echo = async {
        let mut stream = host.streams.recv().await.unwrap();
        let mut question = [0; 4];
        stream.read_exact(&mut question).await.unwrap();
        stream.write_all(&question).await.unwrap();
        stream.shutdown().await.unwrap();
        stream
    };
    let ask = async {
        let mut stream = way.open().await.unwrap();
        assert_eq!(way.streams(), 1);
        stream.write_all(b"ping").await.unwrap();
        stream.flush().await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        answer
    };
    let (_stream, answer) = tokio::join!(echo, ask);
    assert_eq!(answer, b"ping");

    // Another host, another tenant, at that address: it is not what was looked for, and learns not
    // even who we are.
    for (tenant, id) in [
        (tenant(), HostId::random()),
        (TenantName::new("widgets").unwrap(), host.id),
    ] {
        assert!(dialer.dial(&tenant, id, host.address).await.is_err());
        assert!(!host.shaken.recv().await.unwrap());
    }
    let elsewhere = tempfile::tempdir().unwrap();
    let other = TlsDialer::new(&core(elsewhere.path()), "core-1").unwrap();
    assert!(other.dial(&tenant(), host.id, host.address).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_left_or_lets_core_do_nothing_has_no_such_door() {
    let folder = tempfile::tempdir().unwrap();
    let authority = core(folder.path());
    let off = host(&authority, CorePermissions::Off).await;
    assert!(off.link.direct_tls().is_none());

    let host = host(&authority, CorePermissions::Read).await;
    let dialer = TlsDialer::new(&authority, "core-1").unwrap();
    let way = dialer.dial(&tenant(), host.id, host.address).await.unwrap();
    way.try_out().await.unwrap();
    let stop = CancellationToken::new();
    let (link, stopped) = (Arc::clone(&host.link), stop.clone());
    let running = tokio::spawn(async move { link.run(stopped).await });
    unenrol(host.folder.path()).unwrap();
    // What ghost-agent does when it sees that.
    ghost_domain::ports::CoreLink::reconnect(&*host.link);
    let closed = async {
        while !way.is_over() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), closed)
        .await
        .expect("the connection ends with the identity");
    assert!(host.link.direct_tls().is_none());
    stop.cancel();
    running.await.unwrap();
}
