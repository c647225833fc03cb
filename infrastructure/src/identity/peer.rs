//! The side that dials with a certificate of the same CA, and knows whom it wants to meet.

use std::fmt;
use std::sync::Arc;

use ghost_domain::{Error, Result};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::server::ParsedCertificate;
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::authority::{Authority, LeafTemplate};
use super::server::ServerTls;

/// A client's leaf, signed by our own CA and renewed as [`ServerTls`] is.
#[derive(Debug)]
pub struct ClientTls {
    authority: Arc<Authority>,
    leaf: Arc<ServerTls>,
}

impl ClientTls {
    /// Signs the first leaf. `template` says all of its names.
    ///
    /// # Errors
    /// `Internal` when it cannot be signed.
    pub fn new(authority: Arc<Authority>, template: LeafTemplate) -> Result<Arc<Self>> {
        let leaf = ServerTls::nameless(Arc::clone(&authority), template)?;
        Ok(Arc::new(Self { authority, leaf }))
    }

    /// A configuration to meet the one whose certificate of our CA has the alternative name `uri`.
    /// Addresses are not looked at: whoever was dialled, only that one is accepted.
    ///
    /// # Errors
    /// `Internal` when rustls refuses the parts.
    pub fn config_for(
        self: &Arc<Self>,
        uri: &str,
        protocols: &[&[u8]],
    ) -> Result<Arc<ClientConfig>> {
        let unusable =
            |cause: rustls::Error| Error::internal("TLS cannot be set up").because(cause);
        let provider = Arc::new(aws_lc_rs::default_provider());
        let mut roots = RootCertStore::empty();
        roots
            .add(self.authority.certificate().clone())
            .map_err(unusable)?;
        let verifier = PeerVerifier {
            roots,
            provider: Arc::clone(&provider),
            uri: uri.to_owned(),
        };
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(unusable)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(Arc::clone(self) as _);
        config.alpn_protocols = protocols.iter().map(|one| one.to_vec()).collect();
        config.resumption = rustls::client::Resumption::disabled();
        Ok(Arc::new(config))
    }
}

impl ResolvesClientCert for ClientTls {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.leaf.certified_key())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Accepts one server: the leaf must be of our CA, in its time, good for servers, and have the
/// expected URI among its alternative names.
struct PeerVerifier {
    roots: RootCertStore,
    provider: Arc<CryptoProvider>,
    uri: String,
}

impl fmt::Debug for PeerVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PeerVerifier").field(&self.uri).finish()
    }
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(end_entity)?,
            &self.roots,
            intermediates,
            now,
            self.provider.signature_verification_algorithms.all,
        )?;
        if has_uri(end_entity, &self.uri) {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(CertificateError::NotValidForName.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

fn has_uri(der: &[u8], wanted: &str) -> bool {
    X509Certificate::from_der(der).is_ok_and(|(_, certificate)| {
        certificate
            .subject_alternative_name()
            .ok()
            .flatten()
            .is_some_and(|names| {
                names
                    .value
                    .general_names
                    .iter()
                    .any(|name| matches!(name, GeneralName::URI(uri) if *uri == wanted))
            })
    })
}
