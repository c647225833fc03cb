//! The parts of a commit, so that tests can watch their order and make each of them fail.

use std::io;

/// A part of a commit that can fail by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Step {
    /// The transaction is applied.
    Apply,
    /// The engine hands its buffers to the kernel (sled only; redb does it when it commits).
    Flush,
    /// The engine's file is made durable.
    Sync,
    /// The sidecar is written.
    Mark,
    /// The sidecar is made durable.
    MarkSync,
    /// The caller is told.
    Acknowledge,
}

/// Is told of every step. Outside tests it does nothing.
pub(super) trait Steps: Send + Sync {
    /// A step is about to be taken; an error makes it fail without being taken.
    fn begin(&self, step: Step) -> io::Result<()>;

    /// A step that makes something durable has succeeded.
    fn done(&self, step: Step);
}

/// Lets everything pass.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unwatched;

impl Steps for Unwatched {
    fn begin(&self, _: Step) -> io::Result<()> {
        Ok(())
    }

    fn done(&self, _: Step) {}
}
