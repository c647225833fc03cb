//! The agent's own certificate authority and the TLS that stands on it.
//!
//! At first start [`Authority::open`] makes a CA in `<data_dir>/identity/`; from then on it signs
//! client certificates (the [`ghost_domain::ports::CertificateAuthority`] port) and the agent's own
//! server leaf, which lives a day and renews itself in memory ([`ServerTls`]).
//!
//! What holds here:
//! - the CA's key never leaves its file (0600, in a folder of 0700) and this process;
//! - a half-written file is never seen: files are written beside, synced and renamed;
//! - only TLS 1.3; a client certificate that is shown must be ours, in its time and made for
//!   clients, or the handshake fails. None may be shown, because `Enroll` is for those who have
//!   none yet: what such a caller may do is decided behind, call by call;
//! - no session is resumed, so that a certificate is looked at anew on each connection;
//! - a certificate says who somebody is. Whether that identity was revoked is asked of the records
//!   on each call, not of the certificate.

mod addresses;
mod authority;
mod client;
pub(crate) mod files;
mod peer;
mod server;

pub use authority::{Authority, CA_LIFETIME, CLOCK_SKEW, LEAF_LIFETIME, LeafTemplate, SignedLeaf};
pub use client::{ClientIdentity, parse_client_identity};
pub use peer::ClientTls;
pub use server::{ServerNames, ServerTls};
