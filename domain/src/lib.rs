//! The heart of Ghost: what a virtual machine, an image, an operation and a host *are*,
//! and the rules that hold for them, without any transport, storage or runtime.
//!
//! Start reading at [`vm::Vm`] (desired state), [`vm::Observation`] (observed state) and
//! [`vm::decide`] (the state machine). The traits that the outside world implements for us
//! stand in [`ports`].
//!
//! Invariants held by tests:
//! - nothing here knows of serde, tokio, tonic or libvirt;
//! - every fallible rule answers with an [`Error`] that carries a stable [`ErrorCode`];
//! - capacity is computed from records on each call, never counted up and down.

mod access;
mod error;
mod event;
pub mod fleet;
pub mod guest;
mod identifier;
mod image;
mod mac;
mod name;
mod network;
mod operation;
pub mod ports;
mod resources;
mod size;
mod time;
pub mod vm;

pub use access::{ApiKey, Certificate, JoinToken, Principal, PrincipalSource, Role, Secret};
pub use error::{Error, ErrorCode, FieldViolation, Result};
pub use event::{Event, EventKind, Severity};
pub use identifier::{CommandId, CredentialId, HostId, OperationId, RequestId, VmId};
pub use image::{
    CatalogueEntry, Checksum, ChecksumAlgorithm, ChecksumSource, Image, ImageDigest, ImageFormat,
    ImageOrigin,
};
pub use mac::MacAddress;
pub use name::{HostName, ImageName, NetworkName, TenantName, VmName};
pub use network::{Lease, Network};
pub use operation::{
    JournalEntry, JournalEvent, Operation, OperationKind, OperationStatus, Progress, VmChange,
};
pub use resources::{Capacity, Demand, HostResources, Overcommit, Reserved};
pub use size::ByteSize;
pub use time::{Monotonic, Timestamp};
