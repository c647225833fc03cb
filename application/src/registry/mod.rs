//! The registry: every record in memory, written through to the store.
//!
//! Reads are answered from memory. A change is a *transaction*: a closure looks at the model and
//! answers with the changes to make, or refuses; the changes are committed to the store, and only
//! then applied to the model and told to watchers. One transaction at a time, so that a check and
//! the act that relies on it cannot be separated (two creates of one name: exactly one wins).

mod events;
mod guest;
mod history;
mod model;
mod views;

use std::sync::Arc;
use std::time::Duration;

use ghost_domain::ports::{Change, Clock, StateStore};
use ghost_domain::{Error, ErrorCode, Event, EventKind, Result, VmId};
use parking_lot::RwLock;
use tokio::sync::{Mutex, Notify, RwLockReadGuard, RwLockWriteGuard, watch};
use tracing::Instrument;

pub(crate) use events::EventLog;
pub use events::EventStream;
pub(crate) use guest::{HostRates, is_usable, reported_addresses};
pub use history::GuestSample;
pub(crate) use history::LONGEST_SPAN;
pub use model::HypervisorLink;
pub(crate) use model::{Model, VmEntry};
pub use views::{
    AddressSource, AddressView, ConditionView, ImageView, OperationView, StateSource, VmView,
};

/// How long a caller waits for the export that follows a withdrawal; it goes on without the caller.
const EXPORT_PATIENCE: Duration = Duration::from_secs(5);

/// An event to publish when a transaction has been applied.
#[derive(Clone, Debug)]
pub(crate) struct Notice {
    pub(crate) kind: EventKind,
    pub(crate) vm: Option<VmId>,
    pub(crate) subject: String,
}

/// What a transaction's closure decided.
pub(crate) struct Decision<T> {
    pub(crate) value: T,
    pub(crate) changes: Vec<Change>,
    pub(crate) notices: Vec<Notice>,
}

impl<T> Decision<T> {
    pub(crate) fn of(value: T, changes: Vec<Change>) -> Self {
        Self {
            value,
            changes,
            notices: Vec::new(),
        }
    }

    pub(crate) fn nothing(value: T) -> Self {
        Self::of(value, Vec::new())
    }

    pub(crate) fn notice(
        mut self,
        kind: EventKind,
        vm: Option<VmId>,
        subject: impl Into<String>,
    ) -> Self {
        self.notices.push(Notice {
            kind,
            vm,
            subject: subject.into(),
        });
        self
    }
}

/// See the module's documentation.
pub(crate) struct Registry {
    model: RwLock<Model>,
    store: Arc<dyn StateStore>,
    clock: Arc<dyn Clock>,
    transaction: Mutex<()>,
    events: EventLog,
    revision: watch::Sender<u64>,
    export_owed: Notify,
    naming: tokio::sync::RwLock<()>,
    telemetry: watch::Sender<u64>,
}

impl Registry {
    pub(crate) fn new(
        model: Model,
        store: Arc<dyn StateStore>,
        clock: Arc<dyn Clock>,
    ) -> Arc<Self> {
        Arc::new(Self {
            model: RwLock::new(model),
            store,
            clock,
            transaction: Mutex::new(()),
            events: EventLog::new(),
            revision: watch::Sender::new(0),
            telemetry: watch::Sender::new(0),
            export_owed: Notify::new(),
            naming: tokio::sync::RwLock::new(()),
        })
    }

    pub(crate) fn clock(&self) -> &dyn Clock {
        &*self.clock
    }

    /// Looks at the model. The closure must be short: writers wait for it.
    pub(crate) fn read<T>(&self, look: impl FnOnce(&Model) -> T) -> T {
        look(&self.model.read())
    }

    /// Changes what lives in memory only (observations, progress) and wakes the watchers. States
    /// that came out different are told as events.
    pub(crate) fn observe<T>(&self, change: impl FnOnce(&mut Model) -> T) -> T {
        let now = self.clock.monotonic();
        let (value, shown) = {
            let mut model = self.model.write();
            let value = change(&mut model);
            (value, model.take_state_changes(now))
        };
        self.publish(shown);
        self.touch();
        value
    }

    /// As [`Self::observe`] for the progress of operations, which changes no state.
    pub(crate) fn report<T>(&self, change: impl FnOnce(&mut Model) -> T) -> T {
        let value = change(&mut self.model.write());
        self.touch();
        value
    }

    /// Changes what no watcher waits for (measurements), without waking anybody.
    pub(crate) fn quietly<T>(&self, change: impl FnOnce(&mut Model) -> T) -> T {
        change(&mut self.model.write())
    }

    /// Runs a transaction. Once the closure has decided, the transaction completes even where the
    /// caller is dropped: a commit that reached the store is always applied to the model too.
    pub(crate) async fn transact<T, F>(self: &Arc<Self>, decide: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Model) -> Result<Decision<T>> + Send + 'static,
    {
        let registry = Arc::clone(self);
        let transaction = async move {
            let _one_at_a_time = registry.transaction.lock().await;
            let decision = decide(&registry.model.read())?;
            if !decision.changes.is_empty() {
                registry.store.commit(decision.changes.clone()).await?;
                let now = registry.clock.monotonic();
                let shown = {
                    let mut model = registry.model.write();
                    for change in decision.changes {
                        model.apply(change);
                    }
                    model.take_state_changes(now)
                };
                registry.publish(shown);
            }
            registry.publish(decision.notices);
            registry.touch();
            Ok(decision.value)
        };
        // In the caller's span: what it tells carries the ids of the request and the operation.
        tokio::spawn(transaction.in_current_span())
            .await
            .unwrap_or_else(|failure| {
                Err(Error::internal("a transaction ended abnormally").because(failure))
            })
    }

    /// Exports the state because a credential was just withdrawn (revoked, or used up), or the ways
    /// into guests were closed.
    ///
    /// A lost store is rebuilt from its newest export: an export that is older than the withdrawal
    /// would bring the credential back to life. The withdrawal itself is committed and holds
    /// whatever becomes of the export, so that a failure is no failure of the caller's; the export
    /// is then owed, and supervision tries until it is there.
    pub(crate) async fn export_withdrawal(self: &Arc<Self>) {
        let registry = Arc::clone(self);
        // A task of its own: a caller that goes away must not stop it.
        let export = tokio::spawn(
            async move {
                if let Err(error) = registry.store.export().await {
                    tracing::warn!(
                        %error,
                        "cannot export the state after a credential was withdrawn; trying again"
                    );
                    registry.export_owed.notify_one();
                }
            }
            .in_current_span(),
        );
        if tokio::time::timeout(EXPORT_PATIENCE, export).await.is_err() {
            tracing::warn!("the export after a credential was withdrawn takes long");
        }
    }

    /// To be held from before a file can come into the image cache until a record names it.
    pub(crate) async fn naming(&self) -> RwLockReadGuard<'_, ()> {
        self.naming.read().await
    }

    /// Nobody is between publishing an image's file and naming it, as long as this is held; `None`
    /// where somebody is.
    pub(crate) fn nobody_names(&self) -> Option<RwLockWriteGuard<'_, ()>> {
        self.naming.try_write().ok()
    }

    /// Waits until an export is owed, see [`Self::export_withdrawal`].
    pub(crate) async fn export_owed(&self) {
        self.export_owed.notified().await;
    }

    /// Wakes whenever anything changed. Wait on a predicate, never on the change itself.
    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    /// Waits until `look` finds something.
    pub(crate) async fn wait_for<T>(&self, mut look: impl FnMut(&Model) -> Option<T>) -> Result<T> {
        let mut changed = self.watch();
        loop {
            changed.borrow_and_update();
            if let Some(found) = self.read(&mut look) {
                return Ok(found);
            }
            if changed.changed().await.is_err() {
                return Err(Error::new(
                    ErrorCode::ShuttingDown,
                    "the agent is shutting down",
                ));
            }
        }
    }

    pub(crate) fn publish(&self, notices: Vec<Notice>) {
        for notice in notices {
            self.events.publish(self.clock.now(), notice);
        }
    }

    pub(crate) fn tell(&self, kind: EventKind, vm: Option<VmId>, subject: impl Into<String>) {
        self.publish(vec![Notice {
            kind,
            vm,
            subject: subject.into(),
        }]);
    }

    pub(crate) fn subscribe(&self, replay: bool) -> EventStream {
        self.events.subscribe(replay)
    }

    pub(crate) fn recent_events(&self) -> Vec<Event> {
        self.events.recent()
    }

    /// Wakes whenever there are new samples of VMs: often, so those who watch records do not.
    pub(crate) fn watch_telemetry(&self) -> watch::Receiver<u64> {
        self.telemetry.subscribe()
    }

    /// As [`Self::quietly`], and wakes those who watch telemetry.
    pub(crate) fn measure<T>(&self, change: impl FnOnce(&mut Model) -> T) -> T {
        let value = change(&mut self.model.write());
        self.telemetry
            .send_modify(|revision| *revision = revision.wrapping_add(1));
        value
    }

    fn touch(&self) {
        self.revision
            .send_modify(|revision| *revision = revision.wrapping_add(1));
    }
}
