//! Real rustls handshakes over memory: what is let in, and what each wrong certificate ends with.

use std::io::{Read, Write};

use ghost_infrastructure::identity::{ServerNames, ServerTls, parse_client_identity};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::ServerName;
use rustls::{
    CertificateError, ClientConfig, ClientConnection, Error as TlsError, RootCertStore,
    ServerConfig, ServerConnection,
};

use super::*;

struct Agent {
    authority: Arc<Authority>,
    tls: Arc<ServerTls>,
    clock: Arc<ShiftedClock>,
    _root: tempfile::TempDir,
}

fn agent() -> Agent {
    let root = tempfile::tempdir().unwrap();
    let clock = ShiftedClock::by(0);
    let authority = Arc::new(Authority::open(root.path(), clock.clone()).unwrap());
    let names = ServerNames {
        configured: vec!["agent.example".into()],
        hostname: "thishost".into(),
        listen: vec!["192.0.2.9".parse().unwrap()],
    };
    let tls = ServerTls::new(Arc::clone(&authority), names).unwrap();
    Agent {
        authority,
        tls,
        clock,
        _root: root,
    }
}

fn client_config(trusts: &Authority, client: Option<&Client>) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.add(trusts.certificate().clone()).unwrap();
    let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(rustls::ALL_VERSIONS)
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match client {
        Some(client) => builder
            .with_client_auth_cert(client.chain.clone(), client.key())
            .unwrap(),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    config
}

/// Shakes hands and sends one byte each way; gives the server's end, or the error of the side that
/// refused: `Err((who, why))`.
fn shake(
    server: Arc<ServerConfig>,
    client: ClientConfig,
    name: &str,
) -> Result<ServerConnection, (&'static str, TlsError)> {
    let mut server = ServerConnection::new(server).unwrap();
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let mut client = ClientConnection::new(Arc::new(client), name).unwrap();
    client.writer().write_all(b"?").unwrap();
    let mut seen = [0u8; 1];
    for _ in 0..16 {
        let mut wire = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut wire).unwrap();
        }
        let mut from = wire.as_slice();
        while !from.is_empty() {
            server.read_tls(&mut from).unwrap();
            server.process_new_packets().map_err(|e| ("server", e))?;
        }
        if server.reader().read(&mut seen).is_ok_and(|read| read == 1) {
            return Ok(server);
        }
        let mut wire = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut wire).unwrap();
        }
        let mut from = wire.as_slice();
        while !from.is_empty() {
            client.read_tls(&mut from).unwrap();
            client.process_new_packets().map_err(|e| ("client", e))?;
        }
    }
    panic!("the handshake does not end");
}

fn refused_by_server(agent: &Agent, client: &Client) -> TlsError {
    let config = client_config(&agent.authority, Some(client));
    let (who, error) = shake(agent.tls.grpc_config().unwrap(), config, "localhost").unwrap_err();
    assert_eq!(who, "server");
    error
}

#[tokio::test]
async fn an_enrolled_client_is_let_in_and_known() {
    let agent = agent();
    let id = CredentialId::random();
    let client = enrol(&agent.authority, id, "alice", Role::Operator).await;
    for name in [
        "localhost",
        "agent.example",
        "thishost",
        "127.0.0.1",
        "::1",
        "192.0.2.9",
    ] {
        let config = client_config(&agent.authority, Some(&client));
        let server = shake(agent.tls.grpc_config().unwrap(), config, name).unwrap();
        assert_eq!(
            server.protocol_version(),
            Some(rustls::ProtocolVersion::TLSv1_3)
        );
        assert_eq!(server.alpn_protocol(), Some(&b"h2"[..]));
        let shown = &server.peer_certificates().unwrap()[0];
        let identity = parse_client_identity(shown).unwrap();
        assert_eq!((identity.credential, identity.role), (id, Role::Operator));
    }
}

#[tokio::test]
async fn without_a_certificate_the_connection_stands_but_names_nobody() {
    let agent = agent();
    let config = client_config(&agent.authority, None);
    let server = shake(agent.tls.grpc_config().unwrap(), config, "localhost").unwrap();
    assert!(server.peer_certificates().is_none());
}

#[tokio::test]
async fn certificates_of_another_ca_are_refused_on_both_sides() {
    let (agent, other) = (agent(), agent());
    let stranger = enrol(&other.authority, CredentialId::random(), "eve", Role::Admin).await;
    let error = refused_by_server(&agent, &stranger);
    assert_eq!(
        error,
        TlsError::InvalidCertificate(CertificateError::UnknownIssuer)
    );

    let config = client_config(&other.authority, None);
    let (who, error) = shake(agent.tls.grpc_config().unwrap(), config, "localhost").unwrap_err();
    assert_eq!(who, "client");
    assert!(matches!(error, TlsError::InvalidCertificate(_)), "{error}");
}

#[tokio::test]
async fn ended_and_future_certificates_are_refused_with_five_minutes_of_grace() {
    let agent = agent();
    let at = async |shift: i64| {
        agent.clock.set(shift);
        let client = enrol(
            &agent.authority,
            CredentialId::random(),
            "bob",
            Role::Viewer,
        )
        .await;
        agent.clock.set(0);
        client
    };
    let error = refused_by_server(&agent, &at(-25 * HOUR).await);
    assert!(
        matches!(
            error,
            TlsError::InvalidCertificate(CertificateError::ExpiredContext { .. })
        ),
        "{error}"
    );
    let error = refused_by_server(&agent, &at(HOUR).await);
    assert!(
        matches!(
            error,
            TlsError::InvalidCertificate(CertificateError::NotValidYetContext { .. })
        ),
        "{error}"
    );
    // An agent whose clock is four minutes ahead.
    let config = client_config(&agent.authority, Some(&at(240).await));
    assert!(shake(agent.tls.grpc_config().unwrap(), config, "localhost").is_ok());
}

#[tokio::test]
async fn a_certificate_made_for_servers_is_no_clients() {
    let agent = agent();
    let leaf = agent.tls.certified_key();
    let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(agent.authority.certificate().clone()).unwrap();
    let mut config = builder
        .with_root_certificates(roots)
        .with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(
            leaf.as_ref().clone(),
        )));
    config.alpn_protocols = vec![b"h2".to_vec()];
    let (who, error) = shake(agent.tls.grpc_config().unwrap(), config, "localhost").unwrap_err();
    assert_eq!(who, "server");
    assert!(
        matches!(
            error,
            TlsError::InvalidCertificate(
                CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. }
            )
        ),
        "{error}"
    );
}

#[tokio::test]
async fn a_client_that_does_not_hold_its_key_is_refused() {
    let agent = agent();
    let alice = enrol(
        &agent.authority,
        CredentialId::random(),
        "alice",
        Role::Admin,
    )
    .await;
    // Alice's certificate, somebody else's key: rustls's own client would not even try.
    let key = KeyPair::generate().unwrap();
    let signer =
        aws_lc_rs::sign::any_supported_type(&PrivateKeyDer::Pkcs8(key.serialize_der().into()))
            .unwrap();
    let stolen = rustls::sign::CertifiedKey::new(alice.chain, signer);
    let mut roots = RootCertStore::empty();
    roots.add(agent.authority.certificate().clone()).unwrap();
    let mut config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(stolen)));
    config.alpn_protocols = vec![b"h2".to_vec()];
    let (who, error) = shake(agent.tls.grpc_config().unwrap(), config, "localhost").unwrap_err();
    assert_eq!(who, "server");
    assert_eq!(
        error,
        TlsError::InvalidCertificate(CertificateError::BadSignature)
    );
}

#[tokio::test]
async fn older_tls_and_other_protocols_are_refused() {
    let agent = agent();
    let mut roots = RootCertStore::empty();
    roots.add(agent.authority.certificate().clone()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let (who, _) = shake(agent.tls.grpc_config().unwrap(), config, "localhost").unwrap_err();
    assert_eq!(who, "server");

    let mut config = client_config(&agent.authority, None);
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let (who, error) = shake(agent.tls.grpc_config().unwrap(), config, "localhost").unwrap_err();
    assert_eq!((who, error), ("server", TlsError::NoApplicationProtocol));
}

#[tokio::test]
async fn the_server_renews_its_leaf_at_half_its_life() {
    let agent = agent();
    let serial = || {
        let leaf = agent.tls.certified_key();
        let (_, parsed) = x509_parser::parse_x509_certificate(&leaf.cert[0]).unwrap();
        parsed.raw_serial().to_vec()
    };
    let first = serial();
    agent.clock.set(10 * HOUR);
    assert_eq!(serial(), first, "not due yet");
    agent.clock.set(14 * HOUR);
    let second = serial();
    assert_ne!(second, first, "due between 45 and 55 percent of a day");
    assert_eq!(serial(), second);

    // Set back to before the leaf began: a certificate of the future is of no use.
    agent.clock.set(0);
    let third = serial();
    assert_ne!(third, second);
    let config = client_config(&agent.authority, None);
    assert!(shake(agent.tls.grpc_config().unwrap(), config, "localhost").is_ok());
}

#[tokio::test]
async fn a_client_can_pin_the_ca_out_of_the_handshake() {
    use sha2::Digest;
    let agent = agent();
    let chain = &agent.tls.certified_key().cert;
    assert_eq!(chain.len(), 2, "leaf and CA are sent");
    let digest = hex::encode(sha2::Sha256::digest(&chain[1]));
    assert_eq!(digest, agent.authority.fingerprint());
}
