//! Records in files of this process alone, by the same machinery as the host agent's store: what is
//! acknowledged is durable, damage is noticed and recovered from.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream::BoxStream;
use ghost_domain::{Error, Result};
use ghost_infrastructure::store::documents::{Commit, DocumentChange, Documents};
use ghost_infrastructure::store::{Engine, StoreOptions};
use tokio::sync::Notify;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::rows;
use crate::domain::ports::{
    Committed, Condition, FleetStore, FleetStoreHealth, RecordChange, Write,
};
use crate::domain::{HostLife, Record, RecordKey, Stored};

/// What withdraws something must be in an export soon, or a recovery from one would bring it back.
const BETWEEN_EXPORTS: Duration = Duration::from_secs(15);

/// An embedded store.
#[derive(Debug)]
pub struct EmbeddedStore {
    documents: Arc<Documents>,
    engine: Engine,
    damage: Option<String>,
    withdrawn: Arc<Notify>,
    _exporting: DropGuard,
}

impl EmbeddedStore {
    /// Opens the store in `directory`, making it at the first start. What a process before this one
    /// leased is gone.
    ///
    /// # Errors
    /// `StoreUnavailable` where another process has it open, the system fails, or a newer version
    /// wrote it. Damage is recovered from, and told by [`FleetStore::health`] and the log.
    pub async fn open(directory: PathBuf, engine: Engine) -> Result<Arc<Self>> {
        let mut options = StoreOptions::new(directory);
        options.engine = engine;
        Self::open_with(options).await
    }

    /// Like [`Self::open`], with all there is to choose.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub async fn open_with(options: StoreOptions) -> Result<Arc<Self>> {
        let engine = options.engine;
        let documents = tokio::task::spawn_blocking(move || Documents::open(options))
            .await
            .map_err(|error| Error::internal("a task of the store failed").because(error))??;
        let documents = Arc::new(documents);
        let damage = documents.damage();
        if let Some(damage) = &damage {
            tracing::error!(%damage, "the fleet's records were damaged");
        }
        let (_, all) = documents.load().await?;
        let leased = all
            .into_iter()
            .filter(|one| rows::key(&one.name).is_ok_and(|key| key.is_leased()))
            .map(|one| (one.name, None))
            .collect();
        documents.commit(Vec::new(), leased).await?;
        let withdrawn = Arc::new(Notify::new());
        let stop = CancellationToken::new();
        tokio::spawn(export(
            Arc::clone(&documents),
            Arc::clone(&withdrawn),
            stop.clone(),
        ));
        Ok(Arc::new(Self {
            documents,
            engine,
            damage,
            withdrawn,
            _exporting: stop.drop_guard(),
        }))
    }
}

/// Writes an export soon after something was withdrawn, and not after each.
async fn export(documents: Arc<Documents>, withdrawn: Arc<Notify>, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = withdrawn.notified() => {}
        }
        if let Err(error) = documents.export().await {
            tracing::warn!(%error, "no export of the fleet's records could be written");
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(BETWEEN_EXPORTS) => {}
        }
    }
}

/// Whether a write takes something away that an older copy of the records would give back.
fn withdraws(write: &Write) -> bool {
    match write {
        Write::Delete(key) => matches!(
            key,
            RecordKey::Host(_) | RecordKey::User(_) | RecordKey::Key(_) | RecordKey::Token(_)
        ),
        Write::Put(_, Record::Host(host)) => host.life != HostLife::Active,
        Write::Put(_, Record::User(user)) => user.revoked_at.is_some(),
        Write::Put(_, Record::Key(key)) => key.revoked_at.is_some(),
        Write::Put(_, Record::Token(token)) => token.used_at.is_some(),
        Write::Put(..) => false,
    }
}

fn change(change: DocumentChange) -> Result<RecordChange> {
    let key = rows::key(&change.name)?;
    let record = change
        .bytes
        .map(|bytes| rows::decode(&key, &bytes))
        .transpose()?;
    Ok(RecordChange {
        key,
        record,
        version: change.version,
    })
}

#[async_trait]
impl FleetStore for EmbeddedStore {
    async fn load(&self) -> Result<(u64, Vec<Stored>)> {
        let (revision, documents) = self.documents.load().await?;
        let records = documents
            .into_iter()
            .map(|document| {
                let key = rows::key(&document.name)?;
                let record = rows::decode(&key, &document.bytes)?;
                Ok(Stored {
                    key,
                    record,
                    version: document.version,
                })
            })
            .collect::<Result<_>>()?;
        Ok((revision, records))
    }

    async fn watch(&self, revision: u64) -> Result<BoxStream<'static, Vec<RecordChange>>> {
        let changes = self.documents.watch(revision);
        let stream = futures::stream::unfold(changes, |mut changes| async move {
            let batch = changes.recv().await?;
            match batch.into_iter().map(change).collect::<Result<Vec<_>>>() {
                Ok(batch) => Some((batch, changes)),
                Err(error) => {
                    tracing::error!(%error, "a change of the fleet's records cannot be read");
                    None
                }
            }
        });
        Ok(stream.boxed())
    }

    async fn commit(&self, conditions: Vec<Condition>, writes: Vec<Write>) -> Result<Committed> {
        let withdrawing = writes.iter().any(withdraws);
        let requirements = conditions
            .into_iter()
            .map(|condition| match condition {
                Condition::Absent(key) => (rows::name(&key), None),
                Condition::Unchanged(key, version) => (rows::name(&key), Some(version)),
            })
            .collect();
        let writes = writes
            .into_iter()
            .map(|write| {
                Ok(match write {
                    Write::Put(key, record) => (rows::name(&key), Some(rows::encode(&record)?)),
                    Write::Delete(key) => (rows::name(&key), None),
                })
            })
            .collect::<Result<_>>()?;
        let committed = self.documents.commit(requirements, writes).await?;
        if withdrawing && committed != Commit::Conflict {
            self.withdrawn.notify_one();
        }
        Ok(match committed {
            Commit::Done(revision) => Committed::Done(revision),
            Commit::Conflict => Committed::Conflict,
        })
    }

    async fn lease_lost(&self) {
        std::future::pending().await
    }

    async fn health(&self) -> FleetStoreHealth {
        let health = self.documents.health().await;
        FleetStoreHealth {
            engine: self.engine.as_str().to_owned(),
            writable: health.writable,
            problem: health.problem.or_else(|| {
                let damage = self.damage.as_ref()?;
                Some(format!("records were damaged and recovered: {damage}"))
            }),
        }
    }

    async fn close(&self) -> Result<()> {
        if self.damage.is_some() {
            // It was told for as long as this process ran.
            self.documents.damage_resolved().await?;
        }
        self.documents.close().await
    }
}
