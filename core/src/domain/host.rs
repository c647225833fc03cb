//! A host in the fleet: what is recorded of it, and which state is shown.
//!
//! ```text
//!             hello                 data frames stop            three heartbeats missed
//! never_seen ───────> online <──────────────────────> degraded ────────────────────────> offline
//!                        ^                                                                  │
//!                        └──────────────────────────────── hello ───────────────────────────┘
//! any ──(one identity, two machines)──> locked ──(its owner unlocks it)──> offline
//! ```
//!
//! A host is online because data went both ways a moment ago, not because a connection exists.

use std::collections::BTreeMap;
use std::time::Duration;

use ghost_domain::fleet::{CorePermissions, FleetFacts};
use ghost_domain::{Error, ErrorCode, HostId, HostName, Result, TenantName, Timestamp};

use super::MachineHash;

/// Labels of a host: keys and values are checked like names of Kubernetes labels, at most 64.
pub type Labels = BTreeMap<String, String>;

/// Checks a label by the rules of Kubernetes: a key is a name of at most 63 characters, with an
/// optional prefix of at most 253 before a slash; a value is such a name or empty.
///
/// # Errors
/// [`ErrorCode::InvalidArgument`].
pub fn check_label(key: &str, value: &str) -> Result<()> {
    fn is_name(text: &str, most: usize) -> bool {
        let edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
        let bytes = text.as_bytes();
        text.len() <= most
            && edge(bytes.first())
            && edge(bytes.last())
            && bytes
                .iter()
                .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
    }
    let (prefix, name) = match key.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, key),
    };
    let legal = is_name(name, 63)
        && prefix.is_none_or(|prefix| is_name(prefix, 253))
        && (value.is_empty() || is_name(value, 63));
    if legal {
        return Ok(());
    }
    let shown: String = format!("{key}={value}").chars().take(100).collect();
    Err(
        Error::new(ErrorCode::InvalidArgument, format!("{shown:?} is not a label")).field(
            "labels",
            "key and value: letters, digits, '-', '_' and '.', at most 63, a letter or digit at both ends",
        ),
    )
}

/// So many heartbeats may be missed before a host counts as offline.
pub const MISSED_HEARTBEATS: u32 = 3;

/// Whether the host's identity may be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostLife {
    /// It may.
    Active,
    /// Two machines used it; neither gets in until its owner decides.
    Locked {
        /// Since when.
        since: Timestamp,
        /// What was seen.
        reason: String,
    },
    /// It may never again.
    Revoked {
        /// Since when.
        since: Timestamp,
    },
}

/// What is recorded of a host, durably.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostRecord {
    /// Its id, for good.
    pub id: HostId,
    /// Its name, unique in its tenant.
    pub name: HostName,
    /// Its tenant.
    pub tenant: TenantName,
    /// Labels, for placement.
    pub labels: Labels,
    /// Why nothing new is placed on it, where nothing is.
    pub cordoned: Option<String>,
    /// Whether its identity may be used.
    pub life: HostLife,
    /// The generation of its newest certificate.
    pub certificate_generation: u64,
    /// SHA-256 of the public key (SubjectPublicKeyInfo, DER) of the newest certificate.
    pub key_hash: [u8; 32],
    /// The generation before and its key's hash, good until the newest one was used: an answer of
    /// Core may have been lost.
    pub previous_key_hash: Option<[u8; 32]>,
    /// The machine that it first came from, as it calls itself: a copy of its files elsewhere comes
    /// with another one. `None`: it has not come, or its owner let it come back from anywhere.
    pub machine: Option<MachineHash>,
    /// When the newest certificate ends.
    pub certificate_expires_at: Timestamp,
    /// When it joined.
    pub enrolled_at: Timestamp,
    /// The version of its agent, when it last said hello.
    pub agent_version: String,
    /// What its owner lets Core do.
    pub permissions: CorePermissions,
    /// The facts of its last hello.
    pub facts: FleetFacts,
    /// When it was last heard, as of the last change of its state; memory knows better while it is
    /// online.
    pub last_heard_at: Option<Timestamp>,
    /// The newest generation of a command of its queue.
    pub command_generation: u64,
}

/// What a certificate of a host is to its record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CertificateUse {
    /// The newest.
    Newest,
    /// The one before, and the newest was never used: Core's answer may have been lost.
    AnswerLost,
    /// Newer than the newest: the records went back. Only our CA could have signed it.
    Forgotten,
    /// Another machine has a copy of the identity; why.
    Cloned(String),
}

impl HostRecord {
    /// What a certificate with this number and the hash of this key is. `AnswerLost` ends once the
    /// newest is used: whoever sees that takes `previous_key_hash` out of the record.
    pub fn certificate_use(&self, generation: u64, key_hash: &[u8; 32]) -> CertificateUse {
        let newest = self.certificate_generation;
        if generation > newest {
            return CertificateUse::Forgotten;
        }
        if generation == newest && *key_hash == self.key_hash {
            return CertificateUse::Newest;
        }
        let before = generation.checked_add(1) == Some(newest);
        if before && self.previous_key_hash.as_ref() == Some(key_hash) {
            return CertificateUse::AnswerLost;
        }
        CertificateUse::Cloned(if generation == newest {
            format!("two certificates with the number {generation} and different keys are in use")
        } else {
            format!("certificate {generation} was used after certificate {newest} that followed it")
        })
    }
}

/// Which replica has a host's link. Lives as long as the replica's lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ownership {
    /// The host.
    pub host: HostId,
    /// The replica's name.
    pub replica: String,
    /// Random for each link, so that the end of an old one does not take away a newer one.
    pub link: u64,
    /// When the link came to be.
    pub since: Timestamp,
}

/// The state that is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HostState {
    /// Data went both ways lately, and all is well.
    Online,
    /// It is linked, and something is wrong: with the link, libvirt or its store.
    Degraded,
    /// Nothing was heard for three heartbeats, or the link is gone.
    Offline,
    /// Its identity was used twice.
    Locked,
    /// It enrolled and never came.
    NeverSeen,
}

impl HostState {
    /// The stable name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Online => "online",
            Self::Degraded => "degraded",
            Self::Offline => "offline",
            Self::Locked => "locked",
            Self::NeverSeen => "never_seen",
        }
    }
}

impl std::fmt::Display for HostState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// What is known of a host's link at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkTruth {
    /// Whether some replica has its link.
    pub linked: bool,
    /// Since a data frame of the host last came; as far as this replica knows.
    pub silent_for: Duration,
    /// How often it should send a ping.
    pub ping_interval: Duration,
    /// How often it should send a heartbeat.
    pub heartbeat_interval: Duration,
}

/// The state to show, and why it is not `online`.
///
/// A link that exists is worth nothing by itself: silent for two and a half pings (12.5 s of 5 s) it
/// is `degraded: link`, silent for three heartbeats it is offline, whatever the socket says.
pub fn shown_state(
    host: &HostRecord,
    truth: &LinkTruth,
    health: Option<&super::HostHealth>,
) -> (HostState, String) {
    match &host.life {
        HostLife::Locked { reason, .. } => return (HostState::Locked, reason.clone()),
        HostLife::Revoked { .. } => return (HostState::Locked, "revoked".into()),
        HostLife::Active => {}
    }
    if host.last_heard_at.is_none() && !truth.linked {
        return (
            HostState::NeverSeen,
            "it enrolled and has not come yet".into(),
        );
    }
    if !truth.linked {
        return (HostState::Offline, "it has no link".into());
    }
    let seconds = truth.silent_for.as_secs();
    if truth.silent_for >= truth.heartbeat_interval * MISSED_HEARTBEATS {
        return (
            HostState::Offline,
            format!("nothing was heard for {seconds} s"),
        );
    }
    if truth.silent_for * 2 > truth.ping_interval * 5 {
        return (
            HostState::Degraded,
            format!("link: no answer for {seconds} s"),
        );
    }
    match health {
        Some(health) if !health.hypervisor_connected => {
            (HostState::Degraded, "libvirt: not connected".into())
        }
        Some(health) if !health.store_writable => {
            (HostState::Degraded, "store: it takes no writes".into())
        }
        Some(health) if health.agent_state != "running" => (
            HostState::Degraded,
            format!("agent: {}", health.agent_state),
        ),
        _ => (HostState::Online, String::new()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> HostRecord {
        HostRecord {
            id: HostId::random(),
            name: HostName::new("pc").unwrap(),
            tenant: TenantName::new("acme").unwrap(),
            labels: Labels::new(),
            cordoned: None,
            life: HostLife::Active,
            certificate_generation: 1,
            key_hash: [0; 32],
            previous_key_hash: None,
            machine: None,
            certificate_expires_at: Timestamp::default(),
            enrolled_at: Timestamp::default(),
            agent_version: String::new(),
            permissions: CorePermissions::default(),
            facts: FleetFacts::default(),
            last_heard_at: Some(Timestamp::default()),
            command_generation: 0,
        }
    }

    #[test]
    fn a_silent_link_is_degraded_within_15_seconds_and_then_offline() {
        let truth = |silent, linked| LinkTruth {
            linked,
            silent_for: Duration::from_secs(silent),
            ping_interval: Duration::from_secs(5),
            heartbeat_interval: Duration::from_secs(30),
        };
        let state = |silent, linked| shown_state(&host(), &truth(silent, linked), None).0;
        assert_eq!(state(0, true), HostState::Online);
        assert_eq!(state(12, true), HostState::Online);
        assert_eq!(state(13, true), HostState::Degraded);
        assert_eq!(state(89, true), HostState::Degraded);
        assert_eq!(state(90, true), HostState::Offline);
        assert_eq!(state(0, false), HostState::Offline);
    }

    #[test]
    fn what_the_owner_locked_stays_locked_however_alive_it_is() {
        let mut host = host();
        host.life = HostLife::Locked {
            since: Timestamp::default(),
            reason: "two machines".into(),
        };
        let truth = LinkTruth {
            linked: true,
            silent_for: Duration::ZERO,
            ping_interval: Duration::from_secs(5),
            heartbeat_interval: Duration::from_secs(30),
        };
        assert_eq!(shown_state(&host, &truth, None).0, HostState::Locked);
    }

    #[test]
    fn labels_are_like_those_of_kubernetes() {
        let long = "x".repeat(64);
        for (key, value) in [("zone", "eu-1"), ("ghost.example/gpu", ""), ("a", "B_2.c")] {
            check_label(key, value).unwrap();
        }
        for (key, value) in [
            ("", "a"),
            ("-a", "b"),
            ("a/b/c", "d"),
            ("a b", "c"),
            ("a", "-"),
            ("a", "b\n"),
            ("ä", "b"),
            (long.as_str(), "a"),
            ("a", long.as_str()),
        ] {
            assert!(check_label(key, value).is_err(), "{key:?} {value:?}");
        }
    }
}
