//! The CA through its files and through real TLS handshakes, in memory and without openssl.

mod authority;
mod handshake;

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime};

use ghost_domain::ports::{CertificateAuthority, Clock};
use ghost_domain::{CredentialId, Monotonic, Role, Timestamp};
use ghost_infrastructure::identity::Authority;
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// The real clock, shifted.
#[derive(Default)]
struct ShiftedClock(AtomicI64);

impl ShiftedClock {
    fn by(shift: i64) -> Arc<Self> {
        Arc::new(Self(AtomicI64::new(shift)))
    }

    fn set(&self, shift: i64) {
        self.0.store(shift, Ordering::SeqCst);
    }
}

impl Clock for ShiftedClock {
    fn now(&self) -> Timestamp {
        let real = Timestamp::from(SystemTime::now()).unix_millis();
        Timestamp::from_unix_millis(real + self.0.load(Ordering::SeqCst) * 1000)
    }

    fn monotonic(&self) -> Monotonic {
        Monotonic::from_duration(Duration::ZERO)
    }
}

const HOUR: i64 = 3600;

/// A client: its key and the chain that the CA gave it.
struct Client {
    key: KeyPair,
    chain: Vec<CertificateDer<'static>>,
}

impl Client {
    fn key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(self.key.serialize_der().into())
    }
}

fn request(key: &KeyPair) -> String {
    CertificateParams::default()
        .serialize_request(key)
        .unwrap()
        .pem()
        .unwrap()
}

async fn enrol(authority: &Authority, id: CredentialId, name: &str, role: Role) -> Client {
    let key = KeyPair::generate().unwrap();
    let issued = authority
        .sign_client(&request(&key), id, name, role)
        .await
        .unwrap();
    Client {
        key,
        chain: vec![CertificateDer::from_pem_slice(issued.certificate_pem.as_bytes()).unwrap()],
    }
}
