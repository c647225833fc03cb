//! The agent's own certificate authority.

use async_trait::async_trait;

use crate::{CredentialId, Result, Role, Timestamp};

/// A certificate fresh from the CA.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IssuedCertificate {
    /// The leaf certificate, PEM.
    pub certificate_pem: String,
    /// The CA's certificate, PEM.
    pub authority_pem: String,
    /// When the leaf ends.
    pub expires_at: Timestamp,
}

/// Signs client certificates. Its private key never leaves it.
#[cfg_attr(feature = "mocks", mockall::automock)]
#[async_trait]
pub trait CertificateAuthority: Send + Sync {
    /// Signs a PKCS #10 request (RFC 2986, PEM) for a client. Only the request's public key is
    /// taken over; identity and role come from the arguments, as the URI subject alternative name
    /// `ghost://client/<role>/<credential id>` and the common name `name`. The leaf lives a day.
    ///
    /// # Errors
    /// `InvalidArgument` for a request that is malformed or whose signature is wrong.
    async fn sign_client(
        &self,
        request_pem: &str,
        credential: CredentialId,
        name: &str,
        role: Role,
    ) -> Result<IssuedCertificate>;

    /// SHA-256 over the CA certificate's DER form, by which a client pins it: 64 hexadecimal digits.
    fn fingerprint(&self) -> String;
}
