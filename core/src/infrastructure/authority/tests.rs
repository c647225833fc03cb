use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use ghost_domain::Monotonic;
use parking_lot::Mutex;
use rcgen::{CertificateParams, KeyPair, SigningKey};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;

struct TurnedClock(Mutex<Timestamp>);

impl Clock for TurnedClock {
    fn now(&self) -> Timestamp {
        *self.0.lock()
    }

    fn monotonic(&self) -> Monotonic {
        Monotonic::default()
    }
}

fn clock() -> Arc<TurnedClock> {
    Arc::new(TurnedClock(Mutex::new(std::time::SystemTime::now().into())))
}

fn open(root: &Path) -> Arc<CoreAuthority> {
    CoreAuthority::open(root, "ghost.example", clock()).unwrap()
}

fn request(key: &KeyPair) -> String {
    // What the request asks for is not what it gets.
    CertificateParams::new(vec!["evil.example".into()])
        .unwrap()
        .serialize_request(key)
        .unwrap()
        .pem()
        .unwrap()
}

fn der(issued: &IssuedCertificate) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(issued.certificate_pem.as_bytes()).unwrap()
}

#[tokio::test]
async fn a_hosts_leaf_names_the_host_and_nothing_else() {
    let root = tempfile::tempdir().unwrap();
    let authority = open(root.path());
    let key = KeyPair::generate().unwrap();
    let (tenant, host) = (TenantName::new("acme").unwrap(), HostId::random());
    for generation in [1, 7, u64::MAX] {
        let (issued, key_hash) = authority
            .sign_host(&request(&key), &tenant, host, generation)
            .await
            .unwrap();
        let expected = PeerIdentity::Host {
            tenant: tenant.clone(),
            host,
            generation,
            key_hash,
        };
        assert_eq!(authority.peer(&der(&issued)).unwrap(), expected);
        assert_eq!(issued.authority_pem, authority.certificate_pem());
    }
    let key_file = root.path().join("identity/ca.key");
    let mode = std::fs::metadata(key_file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    // Another start finds the same CA.
    assert_eq!(open(root.path()).fingerprint(), authority.fingerprint());
}

#[tokio::test]
async fn what_another_ca_or_trust_domain_signed_is_nobody() {
    let root = tempfile::tempdir().unwrap();
    let authority = open(&root.path().join("one"));
    let key = KeyPair::generate().unwrap();
    let user = CredentialId::random();
    let issued = authority
        .sign_user(&request(&key), user, "alice\n")
        .await
        .unwrap();
    assert_eq!(
        authority.peer(&der(&issued)).unwrap(),
        PeerIdentity::User(user)
    );
    let elsewhere =
        CoreAuthority::open(&root.path().join("one"), "ghost.example.org", clock()).unwrap();
    let refused = |one: Result<PeerIdentity>| one.unwrap_err().code();
    assert_eq!(
        refused(elsewhere.peer(&der(&issued))),
        ErrorCode::Unauthenticated
    );
    for garbage in [&b""[..], b"\x30\x00", &[0xff; 300]] {
        assert_eq!(refused(authority.peer(garbage)), ErrorCode::Unauthenticated);
    }
    for bad in ["", "Ghost.example", "a/b", "a b"] {
        let code = CoreAuthority::open(root.path(), bad, clock())
            .unwrap_err()
            .code();
        assert_eq!(code, ErrorCode::InvalidArgument, "{bad:?}");
    }
}

#[tokio::test]
async fn an_ended_certificate_proves_its_key_and_no_other() {
    let root = tempfile::tempdir().unwrap();
    let authority = open(&root.path().join("one"));
    let other = open(&root.path().join("other"));
    let (old, new) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let (tenant, host) = (TenantName::new("acme").unwrap(), HostId::random());
    let sign = async |by: &CoreAuthority| {
        let signed = by.sign_host(&request(&old), &tenant, host, 3).await;
        signed.unwrap().0
    };
    let issued = sign(&authority).await;
    let request_pem = request(&new);
    let request_der = CertificateSigningRequestDer::from_pem_slice(request_pem.as_bytes()).unwrap();
    let proof = |key: &KeyPair, prefix: &[u8]| {
        let message = [prefix, &*request_der].concat();
        key.sign(&message).unwrap()
    };
    let (peer, end) = authority
        .former_peer(
            &issued.certificate_pem,
            &request_pem,
            &proof(&old, RECOVERY),
        )
        .unwrap();
    assert!(matches!(peer, PeerIdentity::Host { generation: 3, .. }));
    assert_eq!(
        end.unix_millis() / 1000,
        issued.expires_at.unix_millis() / 1000
    );
    let foreign = sign(&other).await;
    for (certificate, request, proof) in [
        (&issued.certificate_pem, &request_pem, proof(&new, RECOVERY)),
        (&issued.certificate_pem, &request_pem, proof(&old, b"")),
        (
            &issued.certificate_pem,
            &super::tests::request(&new),
            proof(&old, RECOVERY),
        ),
        (
            &foreign.certificate_pem,
            &request_pem,
            proof(&old, RECOVERY),
        ),
        (&issued.certificate_pem, &request_pem, Vec::new()),
        (&request_pem, &request_pem, proof(&old, RECOVERY)),
        (&"x".repeat(20_000), &request_pem, proof(&old, RECOVERY)),
    ] {
        let code = authority
            .former_peer(certificate, request, &proof)
            .unwrap_err()
            .code();
        assert_eq!(code, ErrorCode::Unauthenticated);
    }
}

/// What both sides see of a handshake in memory: the client's certificate as the server took it.
async fn meet(
    server: Arc<rustls::ServerConfig>,
    client: Arc<rustls::ClientConfig>,
) -> Option<(Option<CertificateDer<'static>>, Option<Vec<u8>>)> {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let name = "whatever.example".try_into().unwrap();
    let (accepted, connected) = tokio::join!(
        TlsAcceptor::from(server).accept(far),
        TlsConnector::from(client).connect(name, near)
    );
    let (accepted, _connected) = (accepted.ok()?, connected.ok()?);
    let (_, session) = accepted.get_ref();
    let certificate = session
        .peer_certificates()
        .and_then(|all| all.first())
        .map(|one| one.clone().into_owned());
    Some((certificate, session.alpn_protocol().map(<[u8]>::to_vec)))
}

#[tokio::test]
async fn replicas_meet_by_their_uris_and_take_nobody_else_for_core() {
    let root = tempfile::tempdir().unwrap();
    let authority = open(&root.path().join("one"));
    let other = open(&root.path().join("other"));
    let both: &[&[u8]] = &[b"ghost-tunnel/1", b"h2"];
    let server = |by: &CoreAuthority| {
        let tls = by.server_tls(ServerNames::default()).unwrap();
        tls.config_for(both).unwrap()
    };
    let replica = authority.replica_tls("core-1").unwrap();
    let core = authority.core_uri();
    let config = |uri: &str| replica.config_for(uri, &[b"h2"]).unwrap();
    let (certificate, alpn) = meet(server(&authority), config(&core)).await.unwrap();
    let peer = authority.peer(&certificate.unwrap()).unwrap();
    assert_eq!(peer, PeerIdentity::Replica("core-1".into()));
    assert_eq!(alpn.as_deref(), Some(&b"h2"[..]));

    assert!(meet(server(&other), config(&core)).await.is_none());
    let host = spiffe_host(
        "ghost.example",
        &TenantName::new("a").unwrap(),
        HostId::random(),
    );
    assert!(meet(server(&authority), config(&host)).await.is_none());
    // A replica's own leaf is for dialling, not for listening.
    let stranger = other.replica_tls("core-1").unwrap();
    let strange = stranger.config_for(&core, &[b"h2"]).unwrap();
    assert!(meet(server(&authority), strange).await.is_none());
    for bad in ["", "a/b", "..", "a b", &"x".repeat(64)] {
        assert!(authority.replica_tls(bad).is_err(), "{bad:?}");
    }
}

#[tokio::test]
async fn a_certificate_ends_and_one_signed_in_the_future_is_not_yet_good() {
    let root = tempfile::tempdir().unwrap();
    let turned = clock();
    let authority =
        CoreAuthority::open(root.path(), "ghost.example", Arc::clone(&turned) as _).unwrap();
    let server = authority
        .server_tls(ServerNames::default())
        .unwrap()
        .config_for(&[b"h2"])
        .unwrap();
    // Two days ago: its leaf is over by now.
    let now = turned.now();
    *turned.0.lock() = Timestamp::from_unix_millis(now.unix_millis() - 2 * 24 * 3600 * 1000);
    let late = authority.replica_tls("late").unwrap();
    let core = authority.core_uri();
    let late = late.config_for(&core, &[b"h2"]).unwrap();
    // The leaf is made with the client, and renewed only by a clock that goes on.
    let met = meet(Arc::clone(&server), late).await;
    assert!(met.is_none());
    *turned.0.lock() = now.after(Duration::from_secs(1));
    let good = authority.replica_tls("good").unwrap();
    let good = good.config_for(&core, &[b"h2"]).unwrap();
    assert!(meet(server, good).await.is_some());
}
