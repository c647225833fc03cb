//! Core at this host's own listener: connections that it makes where it can reach one of the addresses
//! that the link told it of.
//!
//! They are told from all others by their protocol (ALPN `ghost-direct/1`), and have TLS of their own:
//! this host shows the certificate of its fleet, and takes nobody but a replica of the Core that it
//! joined. Whoever that CA signed for something else, another host or a person, does not get through
//! the handshake. Behind it all is as on the link: yamux, where Core opens the streams, and the first
//! one carries pings.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use ghost_domain::fleet::CorePermissions;
use ghost_domain::{Error, HostId, Result, Timestamp};
use ghost_proto::core::DIRECT_PROTOCOL;
use ghost_proto::core::v1 as proto;
use ghost_proto::core::v1::link_message::Kind;
use parking_lot::Mutex;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::aws_lc_rs;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig,
    SignatureScheme,
};
use rustls_pki_types::{CertificateDer, UnixTime};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::server::TlsStream;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::CoreLinkService;
use super::identity::Enrolled;
use super::tls::CLOCK_SKEW;
use crate::tunnel::messages::{MessageReader, MessageWriter};
use crate::tunnel::{Limits, Side, begin};

/// How long Core may take to open the stream for pings.
const CONTROL_TIME: Duration = Duration::from_secs(10);
/// Core sends a ping once in a minute at least; without three of them it is gone.
const SILENCE: Duration = Duration::from_secs(180);
/// How often silence and the certificate are looked at.
const LOOK: Duration = Duration::from_secs(15);

/// TLS as of one certificate of this host.
pub(super) struct Made {
    host: HostId,
    generation: u64,
    config: Arc<ServerConfig>,
}

/// Connections that Core makes, and what they need.
#[derive(Default)]
pub(super) struct Inbound {
    made: Mutex<Option<Made>>,
    /// The other ends of those that are open.
    open: Mutex<Vec<String>>,
}

impl Inbound {
    /// The replicas that are connected now.
    pub(super) fn replicas(&self) -> Vec<String> {
        self.open.lock().clone()
    }

    fn config(&self, enrolled: &Enrolled) -> Result<Arc<ServerConfig>> {
        let (host, generation) = (enrolled.identity.host, enrolled.identity.generation);
        let mut made = self.made.lock();
        if let Some(made) = &*made
            && (made.host, made.generation) == (host, generation)
        {
            return Ok(Arc::clone(&made.config));
        }
        let config = server_config(enrolled)?;
        *made = Some(Made {
            host,
            generation,
            config: Arc::clone(&config),
        });
        Ok(config)
    }
}

impl CoreLinkService {
    /// TLS for a connection of the protocol `ghost-direct/1`; `None` where this host has not joined a
    /// fleet, or its owner lets Core do nothing: then there is no such protocol.
    pub fn direct_tls(&self) -> Option<Arc<ServerConfig>> {
        if self.handler.permissions() == CorePermissions::Off {
            return None;
        }
        let enrolled = self.identity.lock().clone()?;
        match self.inbound.config(&enrolled) {
            Ok(config) => Some(config),
            Err(error) => {
                tracing::error!(%error, "Core cannot be let in directly");
                None
            }
        }
    }

    /// Serves a connection whose handshake was by [`Self::direct_tls`], until it ends. Streams go
    /// where those of the link go.
    pub async fn serve_direct(&self, stream: TlsStream<TcpStream>) {
        let shown = stream.get_ref().1.peer_certificates();
        let Some((replica, ends)) = shown.and_then(<[_]>::first).and_then(|der| replica(der))
        else {
            tracing::error!("a connection without a replica's certificate came through");
            return;
        };
        let standing = self.standing.lock().token.clone();
        // The identity may have gone between the handshake and here.
        if self.direct_tls().is_none() {
            return;
        }
        tracing::info!(replica, "Core is connected directly");
        self.inbound.open.lock().push(replica.clone());
        let _open = Open(&self.inbound, &replica);
        let mut session = begin(stream, Side::Server, Limits::HOST);
        let reason = tokio::select! {
            reason = self.speak(&mut session, ends) => reason,
            () = standing.cancelled() => "this host left the fleet, or the agent stops".to_owned(),
        };
        tracing::info!(replica, reason, "a direct connection of Core ended");
        session.handle.close(reason);
        let _ = tokio::time::timeout(Duration::from_secs(1), session.handle.closed()).await;
    }

    /// Answers pings and hands streams over, until the connection should end; why.
    async fn speak(&self, session: &mut crate::tunnel::Session, ends: Timestamp) -> String {
        let opened = tokio::time::timeout(CONTROL_TIME, session.incoming.recv()).await;
        let Ok(Some(control)) = opened else {
            return "Core opened no stream for pings".to_owned();
        };
        let (read, write) = tokio::io::split(control);
        let (mut reader, mut writer) = (MessageReader::new(read), MessageWriter::new(write));
        let mut look = tokio::time::interval_at(Instant::now() + LOOK, LOOK);
        loop {
            tokio::select! {
                message = reader.next() => match message {
                    Ok(Some(Kind::Ping(ping))) => {
                        let pong = Kind::Pong(proto::Pong { number: ping.number });
                        if let Err(error) = writer.queue(pong) {
                            return error.to_string();
                        }
                    }
                    Ok(Some(_)) => return "Core sent what is none of a direct connection".to_owned(),
                    Ok(None) => return "Core ended it".to_owned(),
                    Err(error) => return error.to_string(),
                },
                flushed = writer.flush(), if writer.is_waiting() => {
                    if let Err(error) = flushed {
                        return error.to_string();
                    }
                }
                Some(stream) = session.incoming.recv() => {
                    if self.streams.try_send(stream).is_err() {
                        tracing::debug!("nobody takes a stream of Core's; it was reset");
                    }
                }
                _ = look.tick() => {
                    if session.handle.silence() >= SILENCE {
                        return "nothing came from Core".to_owned();
                    }
                    if self.clock.now() >= ends.after(CLOCK_SKEW) {
                        return "the certificate of Core's replica ended".to_owned();
                    }
                }
            }
        }
    }
}

/// A connection among those that are open.
struct Open<'a>(&'a Inbound, &'a str);

impl Drop for Open<'_> {
    fn drop(&mut self) {
        let mut open = self.0.open.lock();
        if let Some(at) = open.iter().position(|one| one == self.1) {
            open.swap_remove(at);
        }
    }
}

fn server_config(enrolled: &Enrolled) -> Result<Arc<ServerConfig>> {
    let broken =
        |cause: &dyn fmt::Display| Error::internal("TLS for Core cannot be set up").because(cause);
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    roots
        .add(enrolled.authority.clone())
        .map_err(|error| broken(&error))?;
    let inner = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .build()
        .map_err(|error| broken(&error))?;
    let verifier = ReplicaVerifier {
        inner,
        trust_domain: enrolled.identity.trust_domain.clone(),
    };
    let (chain, key) = enrolled.shown()?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| broken(&error))?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_single_cert(chain, key)
        .map_err(|error| broken(&error))?;
    config.alpn_protocols = vec![DIRECT_PROTOCOL.to_vec()];
    // A resumed session would carry a certificate past its end.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// Accepts replicas of one Core: a leaf of its CA, in its time, good for clients, whose only
/// alternative name is `spiffe://<trust domain>/replica/<name>`.
struct ReplicaVerifier {
    inner: Arc<dyn ClientCertVerifier>,
    trust_domain: String,
}

impl fmt::Debug for ReplicaVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ReplicaVerifier")
            .field(&self.trust_domain)
            .finish()
    }
}

/// The only alternative name of a certificate, where that is a URI; and when the certificate ends.
fn only_uri<'a>(certificate: &'a X509Certificate<'_>) -> Option<&'a str> {
    let names = certificate.subject_alternative_name().ok().flatten()?;
    match names.value.general_names.as_slice() {
        [GeneralName::URI(uri)] => Some(*uri),
        _ => None,
    }
}

/// The replica in a SPIFFE id: one path segment (SPIFFE-ID specification, section 2.2).
fn segment(uri: &str) -> Option<(&str, &str)> {
    let (trust_domain, path) = uri.strip_prefix("spiffe://")?.split_once('/')?;
    let name = path.strip_prefix("replica/")?;
    let legal = (1..=63).contains(&name.len())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    legal.then_some((trust_domain, name))
}

/// The replica that a certificate names, and when that ends.
fn replica(der: &[u8]) -> Option<(String, Timestamp)> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let (_, name) = segment(only_uri(&certificate)?)?;
    let ends = certificate.validity().not_after.timestamp();
    let ends = Timestamp::from_unix_millis(ends.saturating_mul(1000));
    Some((name.to_owned(), ends))
}

impl ClientCertVerifier for ReplicaVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self
            .inner
            .verify_client_cert(end_entity, intermediates, now)?;
        let (rest, certificate) = X509Certificate::from_der(end_entity)
            .map_err(|_| rustls::Error::from(CertificateError::BadEncoding))?;
        let named = only_uri(&certificate).and_then(segment);
        if rest.is_empty() && named.is_some_and(|(domain, _)| domain == self.trust_domain) {
            Ok(verified)
        } else {
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner
            .verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner
            .verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_replica_is_one() {
        assert_eq!(
            segment("spiffe://ghost.local/replica/core-1"),
            Some(("ghost.local", "core-1"))
        );
        for other in [
            "spiffe://ghost.local/core",
            "spiffe://ghost.local/replica/",
            "spiffe://ghost.local/replica/a/b",
            "spiffe://ghost.local/replica/a%2fb",
            "spiffe://ghost.local/user/replica/a",
            "spiffe://ghost.local/tenant/replica/host/a",
            "https://ghost.local/replica/a",
            "spiffe://ghost.local",
            "",
        ] {
            assert_eq!(segment(other), None, "{other}");
        }
    }
}
