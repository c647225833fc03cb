//! Ports: what the application needs of the outside world, in our vocabulary.
//!
//! Duties of every implementation:
//! - no call blocks the async executor; blocking work runs on threads of the adapter's own;
//! - every call ends: by itself, or by the adapter's deadline with
//!   [`crate::ErrorCode::DeadlineExceeded`] or a more telling code;
//! - a call may be dropped at any await. What it began may then still take effect, so every
//!   effect is idempotent and can be undone by its counterpart;
//! - calls for one VM take effect in the order in which they were made, also when an earlier one
//!   was dropped.

mod access;
mod clock;
mod fleet;
mod guest;
mod host;
mod hypervisor;
mod image;
mod network;
mod store;
mod vm_storage;

pub use access::{CertificateAuthority, IssuedCertificate};
pub use clock::Clock;
pub use fleet::{CoreLink, CoreLinkHandler};
pub use guest::{
    AuditLog, AuditReceipt, ExecEvent, ExecInput, ExecOutput, ExecSession, GuestEvent, GuestEvents,
    GuestFileReader, GuestFileWriter, GuestLinks, GuestProgramFile,
};
pub use host::{HostFacts, HostProbe, HostUsage};
pub use hypervisor::{
    Accelerator, DomainDefinition, DomainSnapshot, DomainStatistics, Hypervisor, HypervisorEvent,
    HypervisorEvents, HypervisorInfo,
};
pub use image::{CachedContent, ImageCache, ImageCatalogue, ImageSource, ProgressSink};
pub use network::NetworkProvider;
pub use store::{Change, StateStore, StoreContents, StoreHealth};
pub use vm_storage::{
    ConsoleReader, ConsoleSession, ConsoleWriter, LogReader, Seed, VmStorage, VmStorageUsage,
};

#[cfg(feature = "mocks")]
pub use {
    access::MockCertificateAuthority,
    clock::MockClock,
    fleet::{MockCoreLink, MockCoreLinkHandler},
    guest::{MockAuditLog, MockGuestLinks},
    host::MockHostProbe,
    hypervisor::MockHypervisor,
    image::{MockImageCache, MockImageCatalogue},
    network::MockNetworkProvider,
    store::MockStateStore,
    vm_storage::MockVmStorage,
};
