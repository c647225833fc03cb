//! Keys, certificate requests, and how long a certificate lives.

use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::errors::{ErrorCode, Failure};

/// From when to when a certificate is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Validity {
    /// The first moment.
    pub(crate) begin: OffsetDateTime,
    /// The last moment.
    pub(crate) end: OffsetDateTime,
}

impl Validity {
    /// Whether it is over.
    pub(crate) fn has_ended(self) -> bool {
        OffsetDateTime::now_utc() > self.end
    }

    /// Whether more than half of it is gone.
    pub(crate) fn is_half_gone(self) -> bool {
        OffsetDateTime::now_utc() > self.begin + (self.end - self.begin) / 2
    }
}

/// How long a certificate lives.
pub(crate) fn validity(certificate: &CertificateDer<'_>) -> Result<Validity, String> {
    let (_, certificate) =
        X509Certificate::from_der(certificate).map_err(|error| error.to_string())?;
    let validity = certificate.validity();
    Ok(Validity {
        begin: validity.not_before.to_datetime(),
        end: validity.not_after.to_datetime(),
    })
}

/// A new key; it never leaves this machine.
pub(crate) fn new_key() -> Result<KeyPair, Failure> {
    KeyPair::generate().map_err(|error| broken(&error))
}

/// A key of a context.
pub(crate) fn read_key(pem: &[u8]) -> Result<KeyPair, Failure> {
    let pem = std::str::from_utf8(pem).map_err(|error| broken(&error))?;
    KeyPair::from_pem(pem).map_err(|error| broken(&error))
}

/// A certificate request (PKCS #10, PEM). The agent decides what the certificate says; the name is
/// for people.
pub(crate) fn request(key: &KeyPair, name: &str) -> Result<String, Failure> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params
        .serialize_request(key)
        .and_then(|request| request.pem())
        .map_err(|error| broken(&error))
}

fn broken(error: &dyn std::fmt::Display) -> Failure {
    Failure::new(ErrorCode::Internal, "no certificate request could be made").because(error)
}
