//! The agent inside a VM.
//!
//! It speaks `ghost.guest.v1` with the host agent over a virtio-serial port and needs nothing of the
//! guest: no network, no C library, no name service, no shell. [`serve`] runs it over any stream of
//! bytes, which is how the tests of both sides use it.
//!
//! ```text
//!  channel ──► engine (one thread, epoll) ──► exec: pipes and terminals, in the same loop
//!     ▲            │        ▲                 files, accounts, freeze, update: a thread each
//!     └── outbox ◄─┘        └── mailbox ◄──── telemetry: a thread of its own
//! ```
//!
//! All that blocks (disks, hooks, foreign file systems) happens in a thread of its call; the loop
//! only ever waits in `epoll_wait`. Everything is bounded: frames, calls, windows, lists.

pub mod accounts;
pub mod channel;
pub mod clock;
pub mod config;
pub mod engine;
pub mod exec;
pub mod files;
pub mod freeze;
pub mod http;
pub mod install;
pub mod log;
pub mod options;
pub mod power;
pub mod telemetry;
pub mod update;

mod calls;
mod failure;
mod outbox;
mod util;

pub use channel::Channel;
pub use engine::{End, serve};
pub use failure::Failure;
pub use options::{Capability, Options};

/// The release of this program.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
