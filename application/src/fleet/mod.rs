//! This host as part of a fleet: what it tells Ghost Core, which of Core's commands it takes, and
//! what Core's principals may do.
//!
//! [`Fleet`] is the application's side of the link ([`CoreLinkHandler`]); the link itself is an
//! adapter. Core's word is hostile input here: commands are judged by the ledger and carried out by
//! the same use cases as everybody's, as a principal whose role the host's owner bounds.

mod budget;
mod commands;
mod ledger;
pub(crate) mod link;
mod report;
mod rights;

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use ghost_domain::fleet::{
    CommandOutcome, CommandStatus, CorePermissions, FleetCommand, FleetLedger, HeartbeatReport,
    LinkState, RefusedCommand,
};
use ghost_domain::ports::{Change, CoreLink, CoreLinkHandler};
use ghost_domain::{Error, ErrorCode, EventKind, Result};
use parking_lot::Mutex;

pub use budget::AllowCoreDeletes;
pub(crate) use budget::check as check_delete_budget;
pub(crate) use ledger::{Taking, ended};
pub use link::{CoreLinkView, GetCoreLink, ReconnectCore};
pub use rights::{AdmitCore, CoreReach};
pub(crate) use rights::{check_enter, check_own, owner_of};

use crate::application::{Ports, UseCases};
use crate::registry::{Decision, Registry};
use commands::Commands;

/// Most bytes of the id of a Core.
const MOST_CORE_ID: usize = 64;

/// Where the link's adapter is found once it is there: it needs [`Fleet`] to begin.
pub(crate) type LinkPlace = Arc<OnceLock<Arc<dyn CoreLink>>>;

/// See the module's documentation.
pub struct Fleet {
    registry: Arc<Registry>,
    ports: Ports,
    commands: Arc<Commands>,
    place: LinkPlace,
    /// What the link was told last, so that it is told again only what is new.
    told_report: Mutex<Option<u64>>,
    told_outcomes: Mutex<Vec<(u64, CommandStatus)>>,
}

impl Fleet {
    pub(crate) fn new(
        registry: Arc<Registry>,
        ports: Ports,
        use_cases: Arc<UseCases>,
        place: LinkPlace,
    ) -> Arc<Self> {
        Arc::new(Self {
            commands: Arc::new(Commands::new(Arc::clone(&registry), use_cases)),
            registry,
            ports,
            place,
            told_report: Mutex::new(None),
            told_outcomes: Mutex::new(Vec::new()),
        })
    }

    /// Makes the link known to those who ask about it; the first one stays.
    pub fn attach(&self, link: Arc<dyn CoreLink>) {
        if self.place.set(link).is_err() {
            tracing::warn!("a second link to Core was attached, and is not used");
        }
    }

    /// Tries commands that wait, until it is dropped.
    pub(crate) async fn supervise(self: Arc<Self>) {
        self.commands.try_waiting().await;
    }

    /// Settles outcomes whose operations ended, or are gone, without the ledger hearing of it: only
    /// after a store was rebuilt, because otherwise both are one commit.
    pub(crate) async fn reconcile(&self) {
        let now = self.registry.clock().now();
        let settled = self
            .registry
            .transact(move |model| {
                let mut next = model.fleet_ledger.clone();
                for outcome in &mut next.unreported {
                    if outcome.status.is_finished() {
                        continue;
                    }
                    let operation = outcome
                        .operation
                        .and_then(|id| model.operations.get(&id))
                        .map(|entry| &entry.operation);
                    match operation {
                        Some(operation) => ledger::settle(outcome, operation),
                        None => {
                            outcome.status = CommandStatus::Failed;
                            outcome.code = Some(ErrorCode::Internal);
                            outcome.message =
                                "the host's state was rebuilt, and what became of it is not known"
                                    .into();
                            outcome.at = now;
                        }
                    }
                }
                Ok(Decision::of((), ledger::changed(&model.fleet_ledger, next)))
            })
            .await;
        if let Err(error) = settled {
            tracing::warn!(%error, "outcomes of Core's commands cannot be settled");
        }
    }
}

#[async_trait]
impl CoreLinkHandler for Fleet {
    fn permissions(&self) -> CorePermissions {
        self.registry.read(|model| model.core_permissions)
    }

    fn ledger(&self, core_id: &str) -> (u64, u64) {
        self.registry.read(|model| {
            let ledger = &model.fleet_ledger;
            if ledger.core_id == core_id {
                (ledger.epoch, ledger.generation)
            } else {
                (0, 0)
            }
        })
    }

    async fn welcomed(&self, core_id: &str, epoch: u64) -> Result<()> {
        if core_id.is_empty()
            || core_id.len() > MOST_CORE_ID
            || !core_id.bytes().all(|byte| byte.is_ascii_graphic())
        {
            return Err(
                Error::new(ErrorCode::InvalidArgument, "that is not the id of a Core").because(
                    format!("1 to {MOST_CORE_ID} printable ASCII characters are"),
                ),
            );
        }
        let core_id = core_id.to_owned();
        let moved = self
            .registry
            .transact(move |model| {
                let ledger = &model.fleet_ledger;
                let next = if ledger.core_id != core_id {
                    // Another Core: its numbers begin anew, and it never heard of the old ones.
                    FleetLedger {
                        core_id,
                        epoch,
                        ..FleetLedger::default()
                    }
                } else if epoch < ledger.epoch {
                    return Err(Error::new(
                        ErrorCode::StaleCommand,
                        "this replica of Core has out-of-date records",
                    )
                    .because(format!(
                        "it is at epoch {epoch}, and Core was at {} before",
                        ledger.epoch
                    )));
                } else if epoch > ledger.epoch {
                    FleetLedger {
                        epoch,
                        ..ledger.clone()
                    }
                } else {
                    return Ok(Decision::nothing(false));
                };
                Ok(Decision::of(true, vec![Change::PutFleetLedger(next)]))
            })
            .await?;
        if moved {
            // Of an older epoch: what is still wanted is sent again.
            self.commands.waiting.lock().clear();
        }
        Ok(())
    }

    async fn report(&self) -> Result<HeartbeatReport> {
        report::collect(&self.registry, &self.ports).await
    }

    async fn report_changed(&self) {
        let mut changed = self.registry.watch();
        loop {
            changed.borrow_and_update();
            let now = self.registry.clock().monotonic();
            let mark = self.registry.read(|model| report::mark(model, now));
            let before = self.told_report.lock().replace(mark);
            if before.is_some_and(|before| before != mark) {
                return;
            }
            if changed.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    async fn command(&self, command: FleetCommand) -> Option<CommandOutcome> {
        // A task of its own: a link that ends must not leave a command half taken.
        let commands = Arc::clone(&self.commands);
        tokio::spawn(async move { commands.take(command).await })
            .await
            .unwrap_or_else(|failure| {
                tracing::error!(%failure, "taking a command of Core ended abnormally");
                None
            })
    }

    async fn refuse(&self, refused: RefusedCommand) -> Option<CommandOutcome> {
        let commands = Arc::clone(&self.commands);
        tokio::spawn(async move { commands.refuse(refused).await })
            .await
            .unwrap_or_else(|failure| {
                tracing::error!(%failure, "refusing a command of Core ended abnormally");
                None
            })
    }

    fn outcomes(&self) -> Vec<CommandOutcome> {
        self.registry
            .read(|model| model.fleet_ledger.unreported.iter().cloned().collect())
    }

    async fn outcomes_changed(&self) {
        let mut changed = self.registry.watch();
        loop {
            changed.borrow_and_update();
            let present: Vec<_> = self.registry.read(|model| {
                let all = model.fleet_ledger.unreported.iter();
                all.map(|one| (one.generation, one.status)).collect()
            });
            let news = {
                let mut told = self.told_outcomes.lock();
                let news = present.iter().any(|one| !told.contains(one));
                *told = present;
                news
            };
            if news {
                return;
            }
            if changed.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    async fn outcome_kept(&self, generation: u64) {
        let kept = self
            .registry
            .transact(move |model| {
                let mut next = model.fleet_ledger.clone();
                next.unreported
                    .retain(|one| one.generation != generation || !one.status.is_finished());
                Ok(Decision::of((), ledger::changed(&model.fleet_ledger, next)))
            })
            .await;
        if let Err(error) = kept {
            // It is told again on the next link, and kept again.
            tracing::debug!(generation, %error, "an outcome that Core keeps cannot be forgotten yet");
        }
    }

    fn link_changed(&self, state: LinkState) {
        let now = (
            self.registry.clock().now(),
            self.registry.clock().monotonic(),
        );
        let (was_up, is_up) = self.registry.report(|model| {
            let was_up = matches!(model.core.state, LinkState::Up { .. });
            let is_up = matches!(state, LinkState::Up { .. });
            model.core.changed(state.clone(), now);
            (was_up, is_up)
        });
        match state {
            LinkState::Up {
                carrier, replica, ..
            } if !was_up => {
                let kind = EventKind::CoreConnected { carrier, replica };
                self.registry.tell(kind, None, "core");
            }
            LinkState::Refused { reason } => {
                self.registry
                    .tell(EventKind::CoreLost { reason }, None, "core");
            }
            state if was_up && !is_up => {
                let reason = link::reason_of(&state);
                self.registry
                    .tell(EventKind::CoreLost { reason }, None, "core");
            }
            _ => {}
        }
    }

    fn heartbeat_ended(&self, answered: bool) {
        self.registry.quietly(|model| {
            let count = if answered {
                &mut model.core.heartbeats_answered
            } else {
                &mut model.core.heartbeats_lost
            };
            *count += 1;
        });
    }
}

/// How the link fares and what came over it since the agent started. Lives in memory only.
#[derive(Clone, Debug, Default)]
pub(crate) struct CoreSeen {
    pub(crate) state: LinkState,
    /// Since when the state is of this kind; `None` where it never was another.
    pub(crate) since: Option<(ghost_domain::Timestamp, ghost_domain::Monotonic)>,
    /// Why the last link ended or could not be made.
    pub(crate) last_failure: String,
    pub(crate) heartbeats_answered: u64,
    pub(crate) heartbeats_lost: u64,
    /// Outcomes of commands by status.
    pub(crate) commands: BTreeMap<&'static str, u64>,
}

impl CoreSeen {
    fn changed(
        &mut self,
        state: LinkState,
        now: (ghost_domain::Timestamp, ghost_domain::Monotonic),
    ) {
        if std::mem::discriminant(&self.state) != std::mem::discriminant(&state) {
            self.since = Some(now);
        }
        match &state {
            LinkState::Waiting { reason, .. } | LinkState::Refused { reason } => {
                self.last_failure = crate::guest::escape(reason, 256);
            }
            LinkState::Silent { .. } => self.last_failure = "nothing was heard".into(),
            LinkState::Off | LinkState::Connecting | LinkState::Up { .. } => {}
        }
        self.state = state;
    }

    /// Counts what is new in a ledger.
    pub(crate) fn count(&mut self, before: &FleetLedger, after: &FleetLedger) {
        for one in &after.unreported {
            let known = before
                .unreported
                .iter()
                .any(|other| other.id == one.id && other.status == one.status);
            if !known {
                *self.commands.entry(one.status.as_str()).or_default() += 1;
            }
        }
    }
}
