//! The floor of what a link costs in memory: TLS 1.3 connections with certificates on both sides,
//! a task each that waits for a byte, and nothing above.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt};
use rcgen::{CertificateParams, KeyPair};
use rustls::crypto::aws_lc_rs;
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::{Failure, each_line, say};

/// The one name.
const NAME: &str = "bare.test";
/// Connections that are made at once.
const OPENING: usize = 64;

fn roots(certificate: &CertificateDer<'static>) -> Result<Arc<RootCertStore>, Failure> {
    let mut roots = RootCertStore::empty();
    roots.add(certificate.clone())?;
    Ok(Arc::new(roots))
}

pub(crate) async fn serve(folder: &Path) -> Result<(), Failure> {
    let key = KeyPair::generate()?;
    let certificate = CertificateParams::new(vec![NAME.to_owned()])?.self_signed(&key)?;
    std::fs::write(folder.join("key.pem"), key.serialize_pem())?;
    std::fs::write(folder.join("certificate.pem"), certificate.pem())?;
    let provider = Arc::new(aws_lc_rs::default_provider());
    let roots = roots(certificate.der())?;
    let verifier =
        WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider)).build()?;
    let key = PrivateKeyDer::from_pem_slice(key.serialize_pem().as_bytes())?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![certificate.der().clone()], key)?;
    config.send_tls13_tickets = 0;
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    say(&format!("at {}", listener.local_addr()?))?;
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                // On the heap, as in Core: what a handshake needs goes with it.
                if let Ok(mut stream) = Box::pin(acceptor.accept(stream)).await {
                    drop(stream.read_u8().await);
                }
            });
        }
    });
    each_line(async |words| match words {
        ["resident"] => Ok(format!("resident {}", resident()?)),
        other => Err(format!("no such command: {other:?}").into()),
    })
    .await
}

pub(crate) async fn dial(folder: &Path, address: SocketAddr) -> Result<(), Failure> {
    let certificate = CertificateDer::from_pem_file(folder.join("certificate.pem"))?;
    let key = PrivateKeyDer::from_pem_file(folder.join("key.pem"))?;
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots(&certificate)?)
        .with_client_auth_cert(vec![certificate], key)?;
    let connector = TlsConnector::from(Arc::new(config));
    let mut open = Vec::new();
    each_line(async |words| match words {
        ["open", count] => {
            let more = count.parse::<usize>()?.saturating_sub(open.len());
            let name = ServerName::try_from(NAME)?;
            let opened: Vec<_> = futures::stream::iter(0..more)
                .map(|_| async {
                    let stream = TcpStream::connect(address).await?;
                    Ok::<_, Failure>(connector.connect(name.clone(), stream).await?)
                })
                .buffer_unordered(OPENING)
                .try_collect()
                .await?;
            open.extend(opened);
            Ok(format!("opened {}", open.len()))
        }
        other => Err(format!("no such command: {other:?}").into()),
    })
    .await
}

/// Resident memory of this process in KiB (proc_pid_status(5)).
fn resident() -> Result<u64, Failure> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .ok_or("no VmRSS")?;
    Ok(line
        .split_whitespace()
        .next()
        .ok_or("no VmRSS")?
        .parse::<u64>()?)
}
