//! Whom a certificate of Core's own CA names.

use ghost_domain::{CredentialId, HostId, TenantName};

/// Whom a client certificate names. That it is signed by our CA and in its time was checked by the
/// handshake; whether its holder may still come in is asked of the records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerIdentity {
    /// A host: `spiffe://<trust domain>/tenant/<tenant>/host/<id>`.
    Host {
        /// Its tenant.
        tenant: TenantName,
        /// The host.
        host: HostId,
        /// The generation of this certificate.
        generation: u64,
        /// SHA-256 of its public key (SubjectPublicKeyInfo, DER).
        key_hash: [u8; 32],
    },
    /// A person: `spiffe://<trust domain>/user/<id>`.
    User(CredentialId),
    /// Another replica of this Core: `spiffe://<trust domain>/replica/<name>`.
    Replica(String),
}
