//! Everything that Core keeps, as the store sees it: records under keys, each with a version.

use ghost_domain::{CommandId, CredentialId, HostId, TenantName, Timestamp};
use uuid::Uuid;

use super::{
    FleetKey, HeldRoom, HostRecord, Inventory, JoinToken, Ownership, QueuedCommand, SentCreate,
    Tenant, User,
};

/// Where a record lies.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RecordKey {
    /// A host.
    Host(HostId),
    /// A host's name in its tenant, so that two cannot have it: the value is [`Record::HostName`].
    HostName(TenantName, String),
    /// What a host last said of itself.
    Inventory(HostId),
    /// Which replica has its link. Leased.
    Owner(HostId),
    /// A command.
    Command(HostId, CommandId),
    /// A tenant.
    Tenant(TenantName),
    /// Room that is held for VMs of a tenant that are being made.
    Room(TenantName),
    /// Where a create went for which a host was found, by a hash of its caller and request id.
    Sent(Uuid),
    /// A user.
    User(CredentialId),
    /// A key.
    Key(CredentialId),
    /// A join token.
    Token(CredentialId),
    /// A replica that runs. Leased.
    Replica(String),
    /// A replica that ran lately, also while it does not.
    KnownReplica(String),
    /// The epoch of the records.
    Epoch,
    /// Which Core this is, made once.
    CoreId,
    /// Whose signatures this Core's identities bear.
    Authority,
}

/// A record.
#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    /// See [`RecordKey::Host`].
    Host(Box<HostRecord>),
    /// See [`RecordKey::HostName`].
    HostName(HostId),
    /// See [`RecordKey::Inventory`].
    Inventory(Box<Inventory>),
    /// See [`RecordKey::Owner`].
    Owner(Ownership),
    /// See [`RecordKey::Command`].
    Command(Box<QueuedCommand>),
    /// See [`RecordKey::Tenant`].
    Tenant(Tenant),
    /// See [`RecordKey::Room`].
    Room(Vec<HeldRoom>),
    /// See [`RecordKey::Sent`].
    Sent(SentCreate),
    /// See [`RecordKey::User`].
    User(User),
    /// See [`RecordKey::Key`].
    Key(FleetKey),
    /// See [`RecordKey::Token`].
    Token(JoinToken),
    /// See [`RecordKey::Replica`].
    Replica(Replica),
    /// See [`RecordKey::KnownReplica`]: `since` is when it last said that it runs.
    KnownReplica(Replica),
    /// See [`RecordKey::Epoch`].
    Epoch(u64),
    /// See [`RecordKey::CoreId`].
    CoreId(String),
    /// See [`RecordKey::Authority`]: the fingerprint of the CA's certificate.
    Authority(String),
}

impl RecordKey {
    /// Whether the record lives no longer than the replica that wrote it.
    pub const fn is_leased(&self) -> bool {
        matches!(self, Self::Owner(_) | Self::Replica(_))
    }
}

/// A replica of Core that runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replica {
    /// Its name.
    pub name: String,
    /// Where other replicas and hosts reach it, `host:port`.
    pub address: String,
    /// Since when it runs.
    pub since: Timestamp,
}

/// A record with the version by which a change of it is noticed.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    /// Where.
    pub key: RecordKey,
    /// What.
    pub record: Record,
    /// Rises with each change of this record; comparable only with other versions of the same key.
    pub version: u64,
}
