//! Who is at the other end of a connection, as the listener found out.

use std::net::IpAddr;

use ghost_domain::{Error, Timestamp};

use crate::domain::PeerIdentity;

/// What is known of a peer before its first call.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Its address, where it has one.
    pub address: Option<IpAddr>,
    /// What it has shown.
    pub kind: PeerKind,
}

/// How a peer has shown itself.
#[derive(Clone, Debug)]
pub enum PeerKind {
    /// A process of this machine, by the local socket.
    Local {
        /// Its user id.
        uid: u32,
        /// Its user's name.
        name: String,
        /// Whether it is root or a member of the group `ghost`.
        admitted: bool,
    },
    /// A client certificate that TLS has verified.
    Certified {
        /// Whom it names; an error for one that this CA would not have issued.
        identity: Result<PeerIdentity, Error>,
        /// When it ends: a connection may outlast it, its calls may not.
        expires_at: Timestamp,
    },
    /// Nothing.
    Nobody,
}

impl Peer {
    /// A name for limits of those who have no identity.
    pub(crate) fn origin(&self) -> String {
        match &self.address {
            // Whoever has one IPv6 address has 2^64 of them.
            Some(IpAddr::V6(address)) => {
                let [a, b, c, d, ..] = address.segments();
                format!("address {a:x}:{b:x}:{c:x}:{d:x}::/64")
            }
            Some(address) => format!("address {address}"),
            None => "local".to_owned(),
        }
    }
}
