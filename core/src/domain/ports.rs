//! What Core needs of the outside world.
//!
//! As with the host agent's ports: no call blocks the executor, every call ends, and a call that is
//! dropped may still take effect.

use async_trait::async_trait;
use futures::stream::BoxStream;
use ghost_domain::ports::IssuedCertificate;
use ghost_domain::{CredentialId, HostId, Result, TenantName, Timestamp};

use super::{PeerIdentity, Record, RecordKey, Stored};

/// What must be true for a commit to take effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// There is no such record.
    Absent(RecordKey),
    /// The record is still of this version.
    Unchanged(RecordKey, u64),
}

/// One effect of a commit.
#[derive(Clone, Debug, PartialEq)]
pub enum Write {
    /// Insert or replace. [`RecordKey::Owner`] and [`RecordKey::Replica`] are bound to this process's
    /// lease: they vanish when it ends or is not heard for the lease's time.
    Put(RecordKey, Record),
    /// Remove.
    Delete(RecordKey),
}

/// What became of a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Committed {
    /// All writes are durable, as of this revision of the whole store; it is the version of each
    /// record that was written.
    Done(u64),
    /// A condition does not hold; nothing was written. Look again, then decide anew.
    Conflict,
}

/// One change, ours or another replica's.
#[derive(Clone, Debug, PartialEq)]
pub struct RecordChange {
    /// Which record.
    pub key: RecordKey,
    /// What it is now; `None`: gone.
    pub record: Option<Record>,
    /// Its version.
    pub version: u64,
}

/// How the store fares.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct FleetStoreHealth {
    /// `sled`, `redb` or `etcd`.
    pub engine: String,
    /// Whether it takes writes.
    pub writable: bool,
    /// Why not.
    pub problem: Option<String>,
}

/// Core's records: embedded for one replica, etcd for several. What `commit` acknowledged survives a
/// power cut, and is seen by every replica in the same order.
#[async_trait]
pub trait FleetStore: Send + Sync {
    /// All records, and the revision that they are of.
    ///
    /// # Errors
    /// `StoreUnavailable`.
    async fn load(&self) -> Result<(u64, Vec<Stored>)>;

    /// The changes after `revision`, in the order in which they were committed, those of one commit
    /// together. The stream ends where the store cannot go on (its history was compacted, the
    /// connection was lost for good): then all is loaded anew.
    ///
    /// # Errors
    /// `StoreUnavailable`.
    async fn watch(&self, revision: u64) -> Result<BoxStream<'static, Vec<RecordChange>>>;

    /// Writes all or nothing.
    ///
    /// # Errors
    /// `StoreUnavailable` where it cannot be said to have taken effect.
    async fn commit(&self, conditions: Vec<Condition>, writes: Vec<Write>) -> Result<Committed>;

    /// Whether other replicas may use the same records at the same time.
    fn is_shared(&self) -> bool {
        false
    }

    /// Resolves once for each time that this process's lease was lost: what was leased is gone, and
    /// others may have taken it, unless none of them has a lease either. The store takes
    /// another lease by itself; until then it takes no leased records. Never for an embedded store.
    async fn lease_lost(&self);

    /// How it fares.
    async fn health(&self) -> FleetStoreHealth;

    /// Gives the lease up and closes.
    ///
    /// # Errors
    /// `StoreUnavailable`.
    async fn close(&self) -> Result<()>;
}

/// Signs for hosts, people and replicas. Its key never leaves it.
#[async_trait]
pub trait FleetAuthority: Send + Sync {
    /// A host's leaf for a day, with the URI
    /// `spiffe://<trust domain>/tenant/<tenant>/host/<id>` as its only alternative name and the
    /// generation in its serial number's last eight octets.
    ///
    /// # Errors
    /// `InvalidArgument` for a request that is malformed or whose signature is wrong.
    async fn sign_host(
        &self,
        request_pem: &str,
        tenant: &TenantName,
        host: HostId,
        generation: u64,
    ) -> Result<(IssuedCertificate, [u8; 32])>;

    /// A person's leaf for a day: `spiffe://<trust domain>/user/<id>`.
    ///
    /// # Errors
    /// As [`Self::sign_host`].
    async fn sign_user(
        &self,
        request_pem: &str,
        user: CredentialId,
        name: &str,
    ) -> Result<IssuedCertificate>;

    /// Whom a certificate names that came with a TLS handshake (DER).
    ///
    /// # Errors
    /// `Unauthenticated` for whatever this CA would not have issued.
    fn peer(&self, certificate_der: &[u8]) -> Result<PeerIdentity>;

    /// Whom a certificate named that ended, and when: for a host that was away for longer than its
    /// certificate. Here the CA's signature is checked, and the request's proof: a signature over
    /// `ghost-recover-v1` and the request's DER form by the key of the certificate.
    ///
    /// # Errors
    /// `Unauthenticated`.
    fn former_peer(
        &self,
        certificate_pem: &str,
        request_pem: &str,
        proof: &[u8],
    ) -> Result<(PeerIdentity, Timestamp)>;

    /// SHA-256 over the CA certificate's DER form: 64 hexadecimal digits.
    fn fingerprint(&self) -> String;

    /// The trust domain of all SPIFFE ids.
    fn trust_domain(&self) -> &str;
}
