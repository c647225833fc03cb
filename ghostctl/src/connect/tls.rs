//! TLS 1.3 to an agent, trusted by its own CA and nothing else.
//!
//! Every agent has a CA of its own, which signs one server certificate and those of its clients.
//! So "signed by this CA, for use as a server" says exactly "this agent", whatever name or address
//! it is reached by (port forwards, changed addresses, several networks): names are not compared,
//! and the certificates that the CA gave to clients cannot pass, as they are not for servers.
//!
//! The CA of a Ghost Core also signs for its hosts, and Core dials those: their certificates are for
//! servers too. What tells them from Core is their SPIFFE id. A certificate with one is taken only
//! where it is Core's own, `spiffe://<trust domain>/core`; otherwise each host of a fleet could play
//! Core to its operators.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context as TaskContext, Poll, ready};

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
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::endpoint::Endpoint;
use crate::errors::{ErrorCode, Failure};
use crate::identity::{Context, Fingerprint};

/// Whom a server must belong to.
pub(crate) enum Trust {
    /// The CA of a context.
    Authority(CertificateDer<'static>),
    /// A CA that is known by its fingerprint alone, from a token; the server shows it.
    Fingerprint(Fingerprint),
}

/// What a handshake needs.
#[derive(Clone)]
pub(crate) struct Setup(Arc<ClientConfig>);

/// The identity that a client shows.
pub(crate) type ClientIdentity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// The trust and the identity of a context; a failure says how to get one.
pub(super) fn of_context(context: Option<&Context>, endpoint: &Endpoint) -> Result<Setup, Failure> {
    let context = context.ok_or_else(|| {
        Failure::usage(format!("there is no certificate for {endpoint}"))
            .because("an https endpoint needs a context")
            .hint(format!(
                "ghostctl context add NAME --endpoint {endpoint} --token TOKEN (on that host: ghostctl trust token --role operator)"
            ))
    })?;
    let identity = context.identity()?;
    Setup::new(
        Trust::Authority(identity.authority),
        Some((identity.chain, identity.key)),
    )
}

impl Setup {
    /// Prepares a handshake.
    pub(crate) fn new(trust: Trust, identity: Option<ClientIdentity>) -> Result<Self, Failure> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let algorithms = provider.signature_verification_algorithms;
        let broken = |error: TlsError| {
            Failure::new(
                ErrorCode::Unauthenticated,
                "the context's files do not fit together",
            )
            .because(error)
            .hint("ghostctl context add NAME --replace --endpoint ENDPOINT --token TOKEN")
        };
        let builder = ClientConfig::builder_with_provider(provider as Arc<CryptoProvider>)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(broken)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Verifier { trust, algorithms }));
        let mut config = match identity {
            Some((chain, key)) => builder.with_client_auth_cert(chain, key).map_err(broken)?,
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Self(Arc::new(config)))
    }

    pub(super) async fn handshake(
        &self,
        host: &str,
        stream: TcpStream,
        faults: Faults,
    ) -> io::Result<Watched> {
        let name = ServerName::try_from(host.to_owned())
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let stream = TlsConnector::from(Arc::clone(&self.0))
            .connect(name, stream)
            .await?;
        Ok(Watched {
            stream,
            faults,
            broken: None,
        })
    }
}

struct Verifier {
    trust: Trust,
    algorithms: WebPkiSupportedAlgorithms,
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Verifier")
    }
}

/// Whether a server certificate is one of an agent or of Core, and not that of a host in a fleet.
fn may_be_dialled(certificate: &[u8]) -> bool {
    let Ok((_, parsed)) = X509Certificate::from_der(certificate) else {
        return false;
    };
    let Ok(names) = parsed.subject_alternative_name() else {
        return false;
    };
    let names = names.map(|names| names.value.general_names.as_slice());
    names.unwrap_or_default().iter().all(|name| match name {
        GeneralName::URI(uri) => match uri.strip_prefix("spiffe://") {
            Some(id) => id
                .split_once('/')
                .is_some_and(|(domain, path)| !domain.is_empty() && path == "core"),
            None => true,
        },
        _ => true,
    })
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
        let authority = match &self.trust {
            Trust::Authority(authority) => authority.clone(),
            Trust::Fingerprint(expected) => intermediates
                .iter()
                .find(|certificate| expected.matches(certificate))
                .ok_or(CertificateError::UnknownIssuer)?
                .clone()
                .into_owned(),
        };
        let mut roots = RootCertStore::empty();
        roots.add(authority)?;
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(end_entity)?,
            &roots,
            intermediates,
            now,
            self.algorithms.all,
        )?;
        if !may_be_dialled(end_entity) {
            return Err(CertificateError::ApplicationVerificationFailure.into());
        }
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

impl Fingerprint {
    /// Whether it is that of a certificate (SHA-256 over its DER).
    pub(crate) fn matches(&self, certificate: &CertificateDer<'_>) -> bool {
        self.0 == <[u8; 32]>::from(Sha256::digest(certificate))
    }
}

/// The last TLS error of a connection. A server refuses a client's certificate after the client's
/// handshake has ended, so it shows as a broken read; HTTP/2 then only says "broken".
#[derive(Clone, Default)]
pub(crate) struct Faults(Arc<Mutex<Option<TlsError>>>);

impl Faults {
    fn note<T>(&self, polled: &Poll<io::Result<T>>) {
        if let Poll::Ready(Err(error)) = polled
            && let Some(fault) = alert_of(error)
        {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(fault.clone());
        }
    }

    pub(super) fn take(&self) -> Option<TlsError> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// The TLS error inside an I/O error, if that is what it is.
pub(super) fn alert_of(error: &io::Error) -> Option<&TlsError> {
    error.get_ref()?.downcast_ref()
}

/// A TLS stream that remembers its last TLS error.
pub(super) struct Watched {
    stream: TlsStream<TcpStream>,
    faults: Faults,
    /// A failed write, while the reason for it is still being read.
    broken: Option<io::Error>,
}

impl Watched {
    /// A server that refuses us sends its alert and closes. Whoever writes then learns of the
    /// closed pipe only, while the reason lies unread in the receive buffer: it is read before the
    /// write is given up. The end of the stream is near, as the peer has closed it.
    fn after_write<T>(
        &mut self,
        context: &mut TaskContext<'_>,
        polled: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        match polled {
            Poll::Ready(Err(error)) if alert_of(&error).is_none() => {
                self.broken = Some(error);
                self.read_reason(context)
            }
            polled => {
                self.faults.note(&polled);
                polled
            }
        }
    }

    fn read_reason<T>(&mut self, context: &mut TaskContext<'_>) -> Poll<io::Result<T>> {
        loop {
            let mut scratch = [0; 1024];
            let mut buffer = ReadBuf::new(&mut scratch);
            let read = ready!(Pin::new(&mut self.stream).poll_read(context, &mut buffer));
            if read.is_ok() && !buffer.filled().is_empty() {
                continue;
            }
            self.faults.note(&Poll::Ready(read));
            let error = self.broken.take();
            return Poll::Ready(Err(error.unwrap_or(io::ErrorKind::BrokenPipe.into())));
        }
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut TaskContext<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_read(context, buffer);
        self.faults.note(&polled);
        polled
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut TaskContext<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.broken.is_some() {
            return self.read_reason(context);
        }
        let polled = Pin::new(&mut self.stream).poll_write(context, buffer);
        self.after_write(context, polled)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        if self.broken.is_some() {
            return self.read_reason(context);
        }
        let polled = Pin::new(&mut self.stream).poll_flush(context);
        self.after_write(context, polled)
    }

    fn poll_shutdown(
        mut self: Pin<&mut Self>,
        context: &mut TaskContext<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// What a TLS error means to the person.
pub(super) fn failure(error: &TlsError, endpoint: &Endpoint, context: Option<&str>) -> Failure {
    let again = format!(
        "ghostctl context add {} --replace --endpoint {endpoint} --token TOKEN (on that host: ghostctl trust token --role ROLE)",
        context.unwrap_or("NAME"),
    );
    let refused = |why: &str| {
        Failure::new(
            ErrorCode::Unauthenticated,
            format!("the agent at {endpoint} refuses this certificate"),
        )
        .because(why)
        .hint(again.clone())
    };
    match error {
        TlsError::InvalidCertificate(
            CertificateError::Expired | CertificateError::ExpiredContext { .. },
        ) => Failure::new(
            ErrorCode::Unauthenticated,
            format!("the certificate of the agent at {endpoint} has expired"),
        )
        .because(error)
        .hint("check the clocks of both hosts"),
        TlsError::InvalidCertificate(_) => Failure::new(
            ErrorCode::Unauthenticated,
            format!("{endpoint} is not the agent that is trusted here"),
        )
        .because("its certificate is not signed by the agent's CA that this side knows")
        .hint(format!(
            "if the agent was set up anew: {again}; otherwise somebody stands in between"
        )),
        TlsError::AlertReceived(alert) => match alert {
            AlertDescription::CertificateExpired => refused("it has expired"),
            AlertDescription::CertificateRevoked => refused("it was revoked"),
            AlertDescription::CertificateRequired => refused("it wants one and got none"),
            AlertDescription::UnknownCA
            | AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateUnknown
            | AlertDescription::DecryptError
            | AlertDescription::AccessDenied => refused("it is not one of the agent's"),
            _ => Failure::new(
                ErrorCode::AgentUnreachable,
                format!("the agent at {endpoint} broke the TLS handshake off"),
            )
            .because(error),
        },
        _ => Failure::new(
            ErrorCode::AgentUnreachable,
            format!("{endpoint} does not speak TLS as an agent does"),
        )
        .because(error)
        .hint("is that the agent's gRPC port, and not its HTTP port?"),
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};

    use super::*;

    /// Whether a server with these URIs, of the CA that is trusted, is taken for the one dialled.
    fn is_taken(uris: &[&str]) -> bool {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = params.self_signed(&key).unwrap().der().clone();
        let issuer = Issuer::new(params, key);
        let mut params = CertificateParams::new(vec!["core.example".into()]).unwrap();
        params.subject_alt_names.extend(
            uris.iter()
                .map(|uri| SanType::URI((*uri).to_owned().try_into().unwrap())),
        );
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
        let leaf = params
            .signed_by(&KeyPair::generate().unwrap(), &issuer)
            .unwrap();
        let verifier = Verifier {
            trust: Trust::Authority(authority),
            algorithms: aws_lc_rs::default_provider().signature_verification_algorithms,
        };
        verifier
            .verify_server_cert(
                leaf.der(),
                &[],
                &ServerName::try_from("core.example").unwrap(),
                &[],
                UnixTime::now(),
            )
            .is_ok()
    }

    #[test]
    fn a_host_of_a_fleet_cannot_play_its_core() {
        assert!(is_taken(&[]), "an agent's own certificate has no such name");
        assert!(is_taken(&["spiffe://fleet.example/core"]));
        for other in [
            "spiffe://fleet.example/tenant/acme/host/8d7f0000-0000-4000-8000-000000000001",
            "spiffe://fleet.example/replica/core",
            "spiffe://fleet.example/tenant/acme/core",
            "spiffe:///core",
            "spiffe://core",
        ] {
            assert!(!is_taken(&[other]), "{other}");
            assert!(
                !is_taken(&["spiffe://fleet.example/core", other]),
                "{other}"
            );
        }
    }
}
