//! A CA for tests: the presentation layer does not know the agent's own, only its effect.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use ghost_domain::{CredentialId, Error, ErrorCode, Timestamp};
use ghost_presentation::{CertificateReader, PeerCertificate};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::PrivateKeyDer;
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tonic::transport::Identity;

pub(crate) struct TestCa {
    issuer: Issuer<'static, KeyPair>,
    pub(crate) pem: String,
    der: rustls::pki_types::CertificateDer<'static>,
    known: Arc<Mutex<HashMap<Vec<u8>, PeerCertificate>>>,
}

impl TestCa {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let certificate = params.self_signed(&key).unwrap();
        Self {
            pem: certificate.pem(),
            der: certificate.der().clone(),
            issuer: Issuer::new(params, key),
            known: Arc::default(),
        }
    }

    pub(crate) fn client(&self, credential: CredentialId) -> Identity {
        self.client_until(
            credential,
            Timestamp::from(SystemTime::now()).after(Duration::from_secs(3600)),
        )
    }

    /// `ends`: what the reader says of it; the certificate itself is good for long.
    pub(crate) fn client_until(&self, credential: CredentialId, ends: Timestamp) -> Identity {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let leaf = params.signed_by(&key, &self.issuer).unwrap();
        let peer = PeerCertificate {
            credential,
            expires_at: ends,
        };
        self.known.lock().unwrap().insert(leaf.der().to_vec(), peer);
        Identity::from_pem(leaf.pem(), key.serialize_pem())
    }

    pub(crate) fn reader(&self) -> CertificateReader {
        let known = Arc::clone(&self.known);
        Arc::new(move |der| {
            known
                .lock()
                .unwrap()
                .get(der)
                .cloned()
                .ok_or_else(|| Error::new(ErrorCode::Unauthenticated, "not one of ours"))
        })
    }

    pub(crate) fn server(&self) -> Arc<ServerConfig> {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let leaf = params.signed_by(&key, &self.issuer).unwrap();
        let provider = Arc::new(aws_lc_rs::default_provider());
        let mut roots = RootCertStore::empty();
        roots.add(self.der.clone()).unwrap();
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
                .allow_unauthenticated()
                .build()
                .unwrap();
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(
                vec![leaf.der().clone()],
                PrivateKeyDer::Pkcs8(key.serialize_der().into()),
            )
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        Arc::new(config)
    }
}
