//! Places where a test may break an operation: before and after every effect.

use ghost_domain::Error;

/// When, relative to a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FailMoment {
    /// The journal says Started; the effect is not there.
    BeforePerform,
    /// The effect is there; the journal does not say Done.
    AfterPerform,
    /// The journal says UndoStarted; the effect is still there.
    BeforeUndo,
    /// The effect is gone; the journal does not say Undone.
    AfterUndo,
    /// All steps are done; the operation's end is not recorded.
    BeforeFinish,
}

impl FailMoment {
    /// Every moment.
    pub const ALL: [Self; 5] = [
        Self::BeforePerform,
        Self::AfterPerform,
        Self::BeforeUndo,
        Self::AfterUndo,
        Self::BeforeFinish,
    ];

    /// The moment in snake case.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::BeforePerform => "before_perform",
            Self::AfterPerform => "after_perform",
            Self::BeforeUndo => "before_undo",
            Self::AfterUndo => "after_undo",
            Self::BeforeFinish => "before_finish",
        }
    }
}

/// Where an operation is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FailSite {
    /// The operation's kind.
    pub operation: &'static str,
    /// The step; `finish` for [`FailMoment::BeforeFinish`].
    pub step: &'static str,
    /// When.
    pub moment: FailMoment,
}

/// What happens there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FailAction {
    /// Nothing.
    Continue,
    /// The step fails with this error.
    Fail(Error),
    /// The operation never goes on: in a test that drops everything, the same as `kill -9`.
    Hang,
    /// The process ends at once, without any clean-up, as by `kill -9`.
    Abort,
}

/// Decides what happens at a site; called at each of them.
pub type Failpoints = std::sync::Arc<dyn Fn(&FailSite) -> FailAction + Send + Sync>;
