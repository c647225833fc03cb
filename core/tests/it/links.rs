//! Links over real TLS: hosts that speak the wire by hand, against the whole of Core's side.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ghost_core::application::desk::{Desk, DeskOptions};
use ghost_core::application::fleet::Fleet;
use ghost_core::application::links::HostLinks;
use ghost_core::domain::ports::FleetAuthority;
use ghost_core::domain::{HostLife, HostRecord, PeerIdentity, Replica};
use ghost_core::infrastructure::authority::CoreAuthority;
use ghost_core::infrastructure::listener::{GrpcConnection, Listener, ListenerLimits, digest};
use ghost_core::infrastructure::store::MemoryStore;
use ghost_domain::fleet::{CorePermissions, FleetFacts};
use ghost_domain::{HostId, HostName, TenantName, Timestamp};
use ghost_infrastructure::clock::SystemClock;
use ghost_infrastructure::identity::ServerNames;
use ghost_infrastructure::tunnel::messages::{MessageReader, MessageWriter};
use ghost_infrastructure::tunnel::{Limits, Session, Side, TunnelStream, begin};
use ghost_proto::core::LINK_PROTOCOL;
use ghost_proto::core::v1 as proto;
use ghost_proto::core::v1::link_message::Kind;
use rcgen::{CertificateParams, KeyPair};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// Core's side of links, over real TLS.
pub(crate) struct Core {
    pub(crate) fleet: Arc<Fleet>,
    pub(crate) desk: Arc<Desk>,
    pub(crate) authority: Arc<CoreAuthority>,
    pub(crate) address: SocketAddr,
    grpc: mpsc::UnboundedReceiver<Option<PeerIdentity>>,
    _folder: tempfile::TempDir,
    _serving: AbortOnDropHandle<()>,
}

pub(crate) async fn core(limits: ListenerLimits) -> Core {
    let folder = tempfile::tempdir().unwrap();
    let clock = Arc::new(SystemClock::new());
    let authority =
        CoreAuthority::open(folder.path(), "ghost.test", Arc::clone(&clock) as _).unwrap();
    let fleet = Fleet::start(MemoryStore::new(), clock).await.unwrap();
    let options = DeskOptions {
        replica: Replica {
            name: "core".into(),
            address: "core:7443".into(),
            since: Timestamp::default(),
        },
        version: "1".into(),
        protocol: (1, 1),
        heartbeat_interval: Duration::from_secs(30),
        ping_interval: Duration::from_secs(5),
        digest,
    };
    let desk = Desk::start(Arc::clone(&fleet), options).await.unwrap();
    let config = authority
        .server_tls(ServerNames::default())
        .unwrap()
        .config_for(&Listener::PROTOCOLS)
        .unwrap();
    let (came, grpc) = mpsc::unbounded_channel();
    let listener = Listener::new(
        config,
        Arc::clone(&authority) as _,
        Arc::clone(&desk),
        Arc::new(move |connection: GrpcConnection| {
            let who = connection.shown.map(|shown| shown.identity.unwrap());
            came.send(who).unwrap();
            Box::pin(async {})
        }),
        limits,
    );
    let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = tcp.local_addr().unwrap();
    let serving = tokio::spawn(async move { listener.run(tcp, CancellationToken::new()).await });
    Core {
        fleet,
        desk,
        authority,
        address,
        grpc,
        _folder: folder,
        _serving: AbortOnDropHandle::new(serving),
    }
}

/// A host's certificate with its key, PEM.
#[derive(Clone)]
pub(crate) struct Identity {
    pub(crate) certificate: String,
    pub(crate) key: String,
    pub(crate) authority: String,
}

impl Core {
    pub(crate) async fn enrol(&self, key: &KeyPair) -> (HostId, Identity) {
        let tenant = TenantName::new("acme").unwrap();
        let id = HostId::random();
        let request = CertificateParams::new(Vec::new())
            .unwrap()
            .serialize_request(key)
            .unwrap()
            .pem()
            .unwrap();
        let (issued, key_hash) = self
            .authority
            .sign_host(&request, &tenant, id, 1)
            .await
            .unwrap();
        let record = HostRecord {
            id,
            name: HostName::new("pc").unwrap(),
            tenant,
            labels: Default::default(),
            cordoned: None,
            life: HostLife::Active,
            certificate_generation: 1,
            key_hash,
            previous_key_hash: None,
            machine: None,
            certificate_expires_at: issued.expires_at,
            enrolled_at: Timestamp::default(),
            agent_version: String::new(),
            permissions: CorePermissions::default(),
            facts: FleetFacts::default(),
            last_heard_at: None,
            command_generation: 0,
        };
        self.fleet
            .transact(|state| {
                let mut draft = state.draft();
                draft.put_host(record.clone());
                Ok(draft.done(()))
            })
            .await
            .unwrap();
        let identity = Identity {
            certificate: issued.certificate_pem,
            key: key.serialize_pem(),
            authority: issued.authority_pem,
        };
        (id, identity)
    }
}

async fn dial(
    address: SocketAddr,
    authority: &str,
    identity: Option<&Identity>,
    protocols: &[&[u8]],
) -> std::io::Result<TlsStream<TcpStream>> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_slice(authority.as_bytes()).unwrap())
        .unwrap();
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some(identity) => builder
            .with_client_auth_cert(
                vec![CertificateDer::from_pem_slice(identity.certificate.as_bytes()).unwrap()],
                PrivateKeyDer::from_pem_slice(identity.key.as_bytes()).unwrap(),
            )
            .unwrap(),
    };
    config.alpn_protocols = protocols.iter().map(|one| one.to_vec()).collect();
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    TlsConnector::from(Arc::new(config))
        .connect("localhost".try_into().unwrap(), stream)
        .await
}

/// A host's end of a link.
pub(crate) struct Link {
    pub(crate) session: Session,
    pub(crate) reader: MessageReader<ReadHalf<TunnelStream>>,
    pub(crate) writer: MessageWriter<WriteHalf<TunnelStream>>,
}

pub(crate) async fn link(address: SocketAddr, identity: &Identity) -> std::io::Result<Link> {
    let stream = dial(
        address,
        &identity.authority,
        Some(identity),
        &[LINK_PROTOCOL],
    )
    .await?;
    let session = begin(stream, Side::Client, Limits::HOST);
    let control = session.handle.open().await?;
    let (read, write) = tokio::io::split(control);
    let (mut reader, mut writer) = (MessageReader::new(read), MessageWriter::new(write));
    writer
        .send(Kind::Hello(proto::AgentHello {
            protocol_version: 1,
            agent_version: "1.2.3".into(),
            instance_id: "a".into(),
            permissions: "operate".into(),
            carrier: "link".into(),
            ..proto::AgentHello::default()
        }))
        .await?;
    match reader.next().await? {
        Some(Kind::Welcome(_)) => Ok(Link {
            session,
            reader,
            writer,
        }),
        other => Err(std::io::Error::other(format!("{other:?}"))),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_behind_nat_is_reached_by_the_link_that_it_opened() {
    let core = core(ListenerLimits::default()).await;
    let (host, identity) = core.enrol(&KeyPair::generate().unwrap()).await;
    let mut host_side = link(core.address, &identity).await.unwrap();
    assert!(core.desk.has(host));
    let echo = tokio::spawn(async move {
        let mut stream = host_side.session.incoming.recv().await.unwrap();
        let mut question = [0; 4];
        stream.read_exact(&mut question).await.unwrap();
        stream.write_all(&question).await.unwrap();
        stream.shutdown().await.unwrap();
        host_side
    });
    let mut stream = core.desk.open(host).await.unwrap();
    stream.write_all(b"ping").await.unwrap();
    stream.flush().await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, b"ping");
    let mut host_side = echo.await.unwrap();

    // And the first ping of Core is answered, so that its round trip is known.
    let number = loop {
        if let Some(Kind::Ping(ping)) = host_side.reader.next().await.unwrap() {
            break ping.number;
        }
    };
    let pong = Kind::Pong(proto::Pong { number });
    host_side.writer.send(pong).await.unwrap();
    while core.desk.round_trip(host).is_none() {
        tokio::task::yield_now().await;
    }
    core.desk.cut(host, "replaced", "a test");
    loop {
        match host_side.reader.next().await.unwrap() {
            Some(Kind::Goodbye(goodbye)) => break assert_eq!(goodbye.code, "replaced"),
            Some(_) => {}
            None => panic!("no goodbye"),
        }
    }
    host_side.session.handle.closed().await;
    while core.desk.has(host) {
        tokio::task::yield_now().await;
    }
    let error = core.desk.open(host).await.err().unwrap();
    assert_eq!(error.code(), ghost_domain::ErrorCode::HostOffline);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_protocol_says_what_a_connection_is_for() {
    let mut core = core(ListenerLimits::default()).await;
    let (_, identity) = core.enrol(&KeyPair::generate().unwrap()).await;
    let ca = identity.authority.clone();
    let nobody = dial(core.address, &ca, None, &[b"h2"]).await.unwrap();
    assert!(core.grpc.recv().await.unwrap().is_none());
    let host = dial(core.address, &ca, Some(&identity), &[b"h2"])
        .await
        .unwrap();
    let who = core.grpc.recv().await.unwrap();
    assert!(matches!(
        who,
        Some(PeerIdentity::Host { generation: 1, .. })
    ));
    drop((nobody, host));
    // No certificate, no link; no protocol, nothing.
    for (identity, protocol) in [(None, LINK_PROTOCOL), (Some(&identity), b"http/1.1")] {
        let refused = match dial(core.address, &ca, identity, &[protocol]).await {
            Err(_) => true,
            Ok(mut stream) => !matches!(stream.read(&mut [0; 1]).await, Ok(1)),
        };
        assert!(refused, "{protocol:?}");
    }
    // A certificate of another Core's CA does not even get through the handshake.
    let other = self::core(ListenerLimits::default()).await;
    let (_, foreign) = other.enrol(&KeyPair::generate().unwrap()).await;
    let foreign = Identity {
        authority: ca,
        ..foreign
    };
    assert!(link(core.address, &foreign).await.is_err());
    assert_eq!(core.desk.link_count(), 0);
}

/// Whoever connects and says nothing, or stops in the middle of a handshake, is in nobody's way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn those_who_say_nothing_hold_no_place() {
    let core = core(ListenerLimits {
        handshakes: 1,
        ..ListenerLimits::default()
    })
    .await;
    let (host, identity) = core.enrol(&KeyPair::generate().unwrap()).await;
    let mut idle = Vec::new();
    for _ in 0..100 {
        idle.push(TcpStream::connect(core.address).await.unwrap());
    }
    let mut half = TcpStream::connect(core.address).await.unwrap();
    half.write_all(&[22, 3, 1, 0, 200, 1]).await.unwrap();
    let _link = link(core.address, &identity).await.unwrap();
    assert!(core.desk.has(host));
    drop((idle, half));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_on_a_link_ends_it_and_nothing_else() {
    let core = core(ListenerLimits::default()).await;
    let (good, identity) = core.enrol(&KeyPair::generate().unwrap()).await;
    let _good = link(core.address, &identity).await.unwrap();
    let (bad, identity) = core.enrol(&KeyPair::generate().unwrap()).await;
    let mut evil = link(core.address, &identity).await.unwrap();
    evil.writer.get_mut().write_all(&[0xff; 64]).await.unwrap();
    evil.writer.get_mut().flush().await.unwrap();
    loop {
        match evil.reader.next().await {
            Ok(Some(Kind::Goodbye(goodbye))) => {
                assert_eq!(goodbye.code, "protocol_error");
                break;
            }
            Ok(Some(_)) => {}
            other => panic!("{other:?}"),
        }
    }
    // Streams that a host opens besides are nothing.
    let mut evil = link(core.address, &identity).await.unwrap();
    let mut extra = evil.session.handle.open().await.unwrap();
    assert!(extra.read_u8().await.is_err());
    let kept = Kind::CommandKept(proto::CommandKept { generation: 1 });
    evil.writer.send(kept).await.unwrap();
    evil.session.handle.closed().await;
    while core.desk.has(bad) {
        tokio::task::yield_now().await;
    }
    assert!(core.desk.has(good));
}
