//! What Ghost's agent does: use cases, the operation engine that carries out every change, and the
//! supervision that keeps the records true to what libvirt says.
//!
//! Start reading at [`Application::start`]. A request goes: use case -> [`registry`] (checks and
//! records, one transaction) -> [`operations`] (steps with undo, journalled) -> ports.
//!
//! Invariants held by tests:
//! - a use case is one struct with one `execute`, and checks the caller's role first;
//! - whatever is acknowledged is in the store; whatever is refused left nothing there;
//! - an operation that ends undone leaves no trace of its steps, wherever it was cut off;
//! - nothing is destroyed because something was *not* seen.

pub mod access;
mod application;
pub mod event;
pub mod fleet;
pub mod guest;
pub mod host;
pub mod image;
pub mod network;
pub mod operation;
mod operations;
mod registry;
mod supervise;
pub mod vm;

pub use application::{Application, Options, Ports, UseCases};
pub use operations::{FailAction, FailMoment, FailSite, Failpoints};
pub use registry::{
    AddressSource, AddressView, ConditionView, GuestSample, HypervisorLink, ImageView,
    OperationView, StateSource, VmView,
};
