//! TLS 1.3 to Core: who answers is told by Core's own CA and by the name `spiffe://<trust
//! domain>/core` in the certificate, not by DNS. A host's certificate is of the same CA and has
//! another name, so no host can play Core.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ghost_domain::{Error, ErrorCode, Result};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls12_signature,
    verify_tls13_signature,
};
use rustls::server::ParsedCertificate;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, Error as TlsError,
    RootCertStore, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use sha2::{Digest, Sha256};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// How far clocks may be apart; certificates are taken that much before and after their time.
pub(super) const CLOCK_SKEW: Duration = Duration::from_secs(5 * 60);
/// What a connection may take.
const DIAL_TIME: Duration = Duration::from_secs(15);
/// What its handshake may take on top. A Core to which all its hosts come back at once takes them in
/// the order in which they came: who gives up too soon has waited for nothing, and comes again.
const HANDSHAKE_TIME: Duration = Duration::from_secs(45);

/// Whom the other side must be.
#[derive(Clone, Debug)]
pub(super) enum Trust {
    /// A replica of the Core with this CA, in this trust domain.
    Authority {
        certificate: CertificateDer<'static>,
        trust_domain: String,
    },
    /// A replica of the Core whose CA has this SHA-256; it shows the CA itself.
    Fingerprint([u8; 32]),
}

/// A certificate chain with its key.
pub(super) type Shown = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// What a handshake needs.
#[derive(Clone)]
pub(super) struct Setup(Arc<ClientConfig>);

impl Setup {
    pub(super) fn new(trust: Trust, shown: Option<Shown>, protocol: &[u8]) -> Result<Self> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let algorithms = provider.signature_verification_algorithms;
        let broken = |error: TlsError| {
            Error::new(
                ErrorCode::IoFailed,
                "this host's identity files do not fit together",
            )
            .because(error)
            .hint("join the fleet anew: ghost-agent enroll --replace --token TOKEN")
        };
        let builder = ClientConfig::builder_with_provider(provider as Arc<CryptoProvider>)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(broken)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Verifier { trust, algorithms }));
        let mut config = match shown {
            Some((chain, key)) => builder.with_client_auth_cert(chain, key).map_err(broken)?,
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![protocol.to_vec()];
        // Each connection is looked at anew, as Core may have revoked us meanwhile.
        config.resumption = rustls::client::Resumption::disabled();
        Ok(Self(Arc::new(config)))
    }

    /// Connects to `host:port`.
    pub(super) async fn dial(&self, address: &str) -> Result<(TlsStream<TcpStream>, SocketAddr)> {
        let connecting = TcpStream::connect(address);
        let stream = tokio::time::timeout(DIAL_TIME, connecting)
            .await
            .map_err(|_| unreachable(address, "it does not answer within 15 s"))?
            .map_err(|error| failure(address, &error))?;
        // On the heap: what a handshake needs is much more than what a link needs afterwards.
        let shaking = Box::pin(self.shake_hands(address, stream));
        tokio::time::timeout(HANDSHAKE_TIME, shaking)
            .await
            .map_err(|_| unreachable(address, "it does not finish its handshake within 45 s"))?
            .map_err(|error| failure(address, &error))
    }

    async fn shake_hands(
        &self,
        address: &str,
        stream: TcpStream,
    ) -> io::Result<(TlsStream<TcpStream>, SocketAddr)> {
        // Frames are whole messages; waiting for more would delay each.
        stream.set_nodelay(true)?;
        let local = stream.local_addr()?;
        let connector = TlsConnector::from(Arc::clone(&self.0));
        let stream = connector.connect(server_name(address), stream).await?;
        let protocol = self.0.alpn_protocols.first().map(Vec::as_slice);
        if stream.get_ref().1.alpn_protocol() != protocol {
            return Err(io::Error::other("it does not speak Core's protocol"));
        }
        Ok((stream, local))
    }
}

/// The name for SNI; what it is is not checked.
fn server_name(address: &str) -> ServerName<'static> {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    ServerName::try_from(host.to_owned()).unwrap_or_else(|_| {
        ServerName::from(rustls_pki_types::IpAddr::from(std::net::IpAddr::from([
            127, 0, 0, 1,
        ])))
    })
}

fn unreachable(address: &str, cause: impl fmt::Display) -> Error {
    Error::new(
        ErrorCode::CoreUnreachable,
        format!("Core at {address} cannot be reached"),
    )
    .because(cause)
}

/// What a failed connection or read means.
pub(super) fn failure(address: &str, error: &io::Error) -> Error {
    let Some(tls) = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<TlsError>())
    else {
        return unreachable(address, error);
    };
    let denied =
        |message: String, why: &str| Error::new(ErrorCode::Unauthenticated, message).because(why);
    match tls {
        TlsError::InvalidCertificate(
            CertificateError::Expired
            | CertificateError::ExpiredContext { .. }
            | CertificateError::NotValidYet
            | CertificateError::NotValidYetContext { .. },
        ) => denied(
            format!("the certificate of Core at {address} is not valid now"),
            "check the clocks of this host and of Core",
        ),
        TlsError::InvalidCertificate(_) => denied(
            format!("{address} is not the Core that this host joined"),
            "its certificate is of another authority, or is not that of a Core",
        ),
        TlsError::AlertReceived(AlertDescription::CertificateExpired) => denied(
            "Core says that this host's certificate has ended".to_owned(),
            EXPIRED,
        ),
        TlsError::AlertReceived(
            AlertDescription::CertificateRevoked
            | AlertDescription::UnknownCA
            | AlertDescription::BadCertificate
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::AccessDenied
            | AlertDescription::CertificateRequired,
        ) => denied(
            format!("Core at {address} does not take this host's certificate"),
            "it was revoked, or this is another Core",
        ),
        _ => unreachable(address, tls),
    }
}

/// The cause in an error that says that our own certificate ended, by Core's clock.
pub(super) const EXPIRED: &str = "it was not renewed in time, or a clock is wrong";

struct Verifier {
    trust: Trust,
    algorithms: WebPkiSupportedAlgorithms,
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Verifier")
    }
}

impl Verifier {
    fn verify(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), TlsError> {
        let authority = match &self.trust {
            Trust::Authority { certificate, .. } => certificate.clone(),
            Trust::Fingerprint(expected) => intermediates
                .iter()
                .find(|one| <[u8; 32]>::from(Sha256::digest(one)) == *expected)
                .ok_or(CertificateError::UnknownIssuer)?
                .clone()
                .into_owned(),
        };
        let mut roots = RootCertStore::empty();
        roots.add(authority)?;
        let certificate = ParsedCertificate::try_from(end_entity)?;
        let at = |now| {
            verify_server_cert_signed_by_trust_anchor(
                &certificate,
                &roots,
                intermediates,
                now,
                self.algorithms.all,
            )
        };
        let skew = CLOCK_SKEW.as_secs();
        match at(now) {
            Err(TlsError::InvalidCertificate(
                CertificateError::Expired | CertificateError::ExpiredContext { .. },
            )) => at(unix_time(now.as_secs().saturating_sub(skew)))?,
            Err(TlsError::InvalidCertificate(
                CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. },
            )) => at(unix_time(now.as_secs().saturating_add(skew)))?,
            verdict => verdict?,
        }
        let named = match &self.trust {
            Trust::Authority { trust_domain, .. } => {
                let expected = core_uri(trust_domain);
                has_uri(end_entity, |uri| uri == expected)
            }
            // The trust domain is told with the certificate that this is to get.
            Trust::Fingerprint(_) => has_uri(end_entity, |uri| {
                uri.strip_prefix("spiffe://")
                    .and_then(|rest| rest.strip_suffix("/core"))
                    .is_some_and(|domain| !domain.is_empty() && !domain.contains('/'))
            }),
        };
        if named {
            Ok(())
        } else {
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }
}

fn unix_time(seconds: u64) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(seconds))
}

/// The SPIFFE id of Core's replicas: the URI that their server certificates carry.
pub fn core_uri(trust_domain: &str) -> String {
    format!("spiffe://{trust_domain}/core")
}

/// Whether a certificate has a URI among its alternative names that satisfies `matches`.
pub(super) fn has_uri(certificate: &[u8], matches: impl Fn(&str) -> bool) -> bool {
    let Ok((_, parsed)) = X509Certificate::from_der(certificate) else {
        return false;
    };
    let Ok(Some(names)) = parsed.subject_alternative_name() else {
        return false;
    };
    names
        .value
        .general_names
        .iter()
        .any(|name| matches!(name, GeneralName::URI(uri) if matches(uri)))
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        self.verify(end_entity, intermediates, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
