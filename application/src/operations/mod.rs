//! The operation engine: carries out every change, step by step, and undoes what it cannot finish.
//!
//! ```text
//! submit ── one transaction: idempotency key, draining, busy, admission, records ──> pending
//!   run ── for each step of the plan:   journal Started ─> perform ─> journal Done
//!            error, cancel or deadline: journal Failed ─> undo all begun steps in reverse
//!   end ── one transaction: status and the records that follow from it
//! ```
//!
//! A plan is a pure function of the operation's record, so after a crash the same plan is made
//! again: steps that the journal calls done are passed over, the one that was begun is performed
//! again (every effect is idempotent), and an unwinding goes on where it was.

mod engine;
mod failpoint;
mod plan;
mod step;
mod steps;

pub(crate) use engine::{Engine, Submission};
pub use failpoint::{FailAction, FailMoment, FailSite, Failpoints};
pub(crate) use step::StepContext;
pub(crate) use steps::{apply_change, check_disk};
