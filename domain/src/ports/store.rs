//! Durable state.

use async_trait::async_trait;

use crate::fleet::FleetLedger;
use crate::guest::Lockdown;
use crate::vm::Vm;
use crate::{
    ApiKey, Certificate, CredentialId, Image, ImageName, JoinToken, Operation, OperationId, Result,
    Timestamp, VmId,
};

/// One change to the stored state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Insert or replace a VM.
    PutVm(Box<Vm>),
    /// Remove a VM.
    DeleteVm(VmId),
    /// Insert or replace an operation.
    PutOperation(Box<Operation>),
    /// Remove an operation.
    DeleteOperation(OperationId),
    /// Insert or replace an image.
    PutImage(Image),
    /// Remove an image.
    DeleteImage(ImageName),
    /// Insert or replace a certificate.
    PutCertificate(Certificate),
    /// Remove a certificate.
    DeleteCertificate(CredentialId),
    /// Insert or replace a key.
    PutApiKey(ApiKey),
    /// Remove a key.
    DeleteApiKey(CredentialId),
    /// Insert or replace a join token.
    PutJoinToken(JoinToken),
    /// Remove a join token.
    DeleteJoinToken(CredentialId),
    /// The boot of the host in which VMs were last autostarted.
    PutBootId(String),
    /// All ways into guests are closed.
    PutLockdown(Lockdown),
    /// They are open again.
    DeleteLockdown,
    /// What was taken of Core's commands.
    PutFleetLedger(FleetLedger),
    /// Until when the owner lets Core delete more VMs than usual.
    PutDeleteConsent(Timestamp),
}

/// All that is stored.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct StoreContents {
    /// VMs.
    pub vms: Vec<Vm>,
    /// Operations.
    pub operations: Vec<Operation>,
    /// Images.
    pub images: Vec<Image>,
    /// Certificates.
    pub certificates: Vec<Certificate>,
    /// Keys.
    pub api_keys: Vec<ApiKey>,
    /// Join tokens.
    pub join_tokens: Vec<JoinToken>,
    /// See [`Change::PutBootId`].
    pub boot_id: Option<String>,
    /// See [`Change::PutLockdown`].
    pub lockdown: Option<Lockdown>,
    /// See [`Change::PutFleetLedger`].
    pub fleet_ledger: Option<FleetLedger>,
    /// See [`Change::PutDeleteConsent`].
    pub delete_consent: Option<Timestamp>,
    /// What was found lost or damaged when the store was opened, for people. Where it is `Some`,
    /// records may be missing, and nothing may be destroyed until libvirt was asked.
    pub damage: Option<String>,
}

/// How the store fares.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct StoreHealth {
    /// The engine, `sled` or `redb`.
    pub engine: String,
    /// Whether it takes writes.
    pub writable: bool,
    /// Why not.
    pub problem: Option<String>,
    /// Bytes on disk.
    pub disk_bytes: u64,
    /// Commits since the process started.
    pub commits: u64,
    /// Seconds that commits took in all.
    pub commit_seconds: f64,
}

/// Durable, checksummed state. An index, not the truth: it can be rebuilt from libvirt.
#[cfg_attr(feature = "mocks", mockall::automock)]
#[async_trait]
pub trait StateStore: Send + Sync {
    /// Reads everything; called once at start.
    async fn load(&self) -> Result<StoreContents>;

    /// Applies the changes as one transaction. When it returns `Ok` they survive a power cut;
    /// when it returns an error none of them is visible, now or later.
    ///
    /// # Errors
    /// `StoreUnavailable` when nothing can be written (full, damaged, I/O error); it heals without
    /// a restart once there is space again.
    async fn commit(&self, changes: Vec<Change>) -> Result<()>;

    /// How it fares.
    async fn health(&self) -> StoreHealth;

    /// Says that what [`StoreContents::damage`] reported has been dealt with: libvirt and the disks
    /// were asked and the records agree with them. Until then every `load`, also after a restart,
    /// reports the damage again.
    async fn damage_resolved(&self) -> Result<()> {
        Ok(())
    }

    /// Writes a checksummed export beside the store, keeping the newest three.
    async fn export(&self) -> Result<()>;

    /// Flushes, exports and closes; later commits fail.
    async fn close(&self) -> Result<()>;
}
