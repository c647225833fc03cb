//! The same store for another service: documents of bytes under names, changed under conditions.
//!
//! All that holds of the agent's store holds here: what was acknowledged is durable, a refused
//! commit is never seen, damage is noticed and recovered from. Added are versions: a document's
//! version is the number of the batch that wrote it, batches only rise (also over a recovery), and
//! a commit takes effect only where the documents that it names still have the versions that it
//! names. Changes can be watched in the order in which they became durable.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use ghost_domain::ports::{StateStore, StoreHealth};
use ghost_domain::{Error, ErrorCode, Result};
use tokio::sync::mpsc;

use super::key::Key;
use super::records::Effect;
use super::rows::MAX_VALUE;
use super::steps::Unwatched;
use super::writer::Outcome;
use super::{Store, StoreOptions, blocking, envelope};

/// The most bytes of one document.
pub const MOST_DOCUMENT_BYTES: usize = MAX_VALUE;

/// The most bytes of a name.
const MOST_NAME_BYTES: usize = 256;
/// So many batches are remembered for those who begin to watch a little late.
const KEPT_BATCHES: usize = 1024;
/// A watcher that is so many batches behind is cut off and has to load everything anew.
const MOST_BEHIND: usize = 8192;

/// One document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// Its name.
    pub name: String,
    /// The batch that wrote it.
    pub version: u64,
    /// What it says.
    pub bytes: Vec<u8>,
}

/// What became of one document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DocumentChange {
    /// Its name.
    pub name: String,
    /// What it says now; `None`: it is gone.
    pub bytes: Option<Vec<u8>>,
    /// The batch.
    pub version: u64,
}

/// What must be true for a commit to take effect: a name and its version; `None`: there is none.
pub type Requirement = (String, Option<u64>);

/// What became of a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Commit {
    /// It is durable, as of this batch, which is the version of all that it wrote.
    Done(u64),
    /// A requirement does not hold; nothing was written.
    Conflict,
}

/// Changes in the order in which they became durable, batch by batch.
pub type Changes = mpsc::Receiver<Vec<DocumentChange>>;

/// An open store of documents.
pub struct Documents {
    store: Store,
    hub: Arc<Hub>,
}

impl std::fmt::Debug for Documents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Documents").finish_non_exhaustive()
    }
}

impl Documents {
    /// Opens a store, making it at the first start. Blocks: call it outside async code.
    ///
    /// # Errors
    /// As [`super::open`].
    pub fn open(options: StoreOptions) -> Result<Self> {
        let hub = Arc::new(Hub::default());
        let told = Arc::clone(&hub);
        let store = Store::observed(options, Arc::new(Unwatched), |sequence, _| {
            told.lock().forgotten = sequence;
            Some(Box::new(move |sequence, effects| {
                told.tell(sequence, effects);
            }))
        })?;
        Ok(Self { store, hub })
    }

    /// What was found lost or damaged when the store was opened, for people.
    pub fn damage(&self) -> Option<String> {
        self.store
            .damage
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Says that [`Self::damage`] was dealt with.
    ///
    /// # Errors
    /// `StoreUnavailable`.
    pub async fn damage_resolved(&self) -> Result<()> {
        self.store.damage_resolved().await
    }

    /// All documents, and the newest batch.
    ///
    /// # Errors
    /// `StoreUnavailable`.
    pub async fn load(&self) -> Result<(u64, Vec<Document>)> {
        let snapshot = self.store.snapshot().await?;
        let root = self.store.layout.root.clone();
        blocking(move || {
            let mut documents = Vec::new();
            for (key, bytes) in snapshot.records.iter() {
                let Some(name) = key.document_name() else {
                    continue;
                };
                let (version, payload) =
                    envelope::open(key, bytes).map_err(|fault| fault.into_open_error(&root))?;
                documents.push(Document {
                    name: name.to_owned(),
                    version,
                    bytes: payload.to_vec(),
                });
            }
            Ok((snapshot.mark.sequence, documents))
        })
        .await
    }

    /// The changes after a batch. The receiver ends at once where so old a batch is not remembered,
    /// and later where it is not read for long: then load everything anew.
    pub fn watch(&self, after: u64) -> Changes {
        self.hub.watch(after)
    }

    /// Writes (`None` removes) all or nothing, where the requirements hold.
    ///
    /// # Errors
    /// `StoreUnavailable`, `TooManyRequests`; `PayloadTooLarge` for a document above
    /// [`MOST_DOCUMENT_BYTES`].
    pub async fn commit(
        &self,
        requirements: Vec<Requirement>,
        writes: Vec<(String, Option<Vec<u8>>)>,
    ) -> Result<Commit> {
        let conditions = requirements
            .into_iter()
            .map(|(name, version)| Ok((key(&name)?, version)))
            .collect::<Result<Vec<_>>>()?;
        let writes = writes
            .into_iter()
            .map(|(name, bytes)| {
                let length = bytes.as_ref().map_or(0, Vec::len);
                if length > MOST_DOCUMENT_BYTES {
                    return Err(Error::new(
                        ErrorCode::PayloadTooLarge,
                        format!("{name} is too large to be stored"),
                    )
                    .because(format!(
                        "it has {length} bytes, and the store takes at most {MOST_DOCUMENT_BYTES} for one record"
                    )));
                }
                Ok((key(&name)?, bytes))
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(match self.store.submit(conditions, writes).await? {
            Outcome::Done(sequence) => Commit::Done(sequence),
            Outcome::Conflict => Commit::Conflict,
        })
    }

    /// How it fares.
    pub async fn health(&self) -> StoreHealth {
        self.store.health().await
    }

    /// Writes an export beside the store, keeping the newest three.
    ///
    /// # Errors
    /// `StoreUnavailable`.
    pub async fn export(&self) -> Result<()> {
        self.store.export().await
    }

    /// Flushes, exports and closes; later commits fail, and all who watch learn that it ended.
    ///
    /// # Errors
    /// `StoreUnavailable`.
    pub async fn close(&self) -> Result<()> {
        let closed = self.store.close().await;
        self.hub.lock().watchers.clear();
        closed
    }
}

fn key(name: &str) -> Result<Key> {
    if name.is_empty() || name.len() > MOST_NAME_BYTES {
        return Err(Error::internal(format!(
            "a document's name has {} bytes",
            name.len()
        )));
    }
    Ok(Key::document(name))
}

/// Who watches, and what they may have missed.
#[derive(Debug, Default)]
struct Hub(Mutex<HubParts>);

#[derive(Debug, Default)]
struct HubParts {
    batches: VecDeque<(u64, Vec<DocumentChange>)>,
    /// Changes up to this batch are not remembered.
    forgotten: u64,
    watchers: Vec<mpsc::Sender<Vec<DocumentChange>>>,
}

impl Hub {
    fn lock(&self) -> std::sync::MutexGuard<'_, HubParts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, sequence: u64, effects: &[Effect]) {
        let changes: Vec<_> = effects
            .iter()
            .filter_map(|(key, bytes)| {
                let bytes = match bytes {
                    // Sealed a moment ago, so that it opens.
                    Some(bytes) => Some(envelope::open(key, bytes).ok()?.1.to_vec()),
                    None => None,
                };
                Some(DocumentChange {
                    name: key.document_name()?.to_owned(),
                    bytes,
                    version: sequence,
                })
            })
            .collect();
        let mut parts = self.lock();
        parts
            .watchers
            .retain(|watcher| watcher.try_send(changes.clone()).is_ok());
        parts.batches.push_back((sequence, changes));
        if parts.batches.len() > KEPT_BATCHES
            && let Some((oldest, _)) = parts.batches.pop_front()
        {
            parts.forgotten = oldest;
        }
    }

    fn watch(&self, after: u64) -> Changes {
        let (sender, receiver) = mpsc::channel(MOST_BEHIND);
        let mut parts = self.lock();
        if after < parts.forgotten {
            return receiver;
        }
        for (_, changes) in parts.batches.iter().filter(|(at, _)| *at > after) {
            // There is room for all that is remembered.
            let _ = sender.try_send(changes.clone());
        }
        parts.watchers.push(sender);
        receiver
    }
}

#[cfg(test)]
mod tests {
    use super::super::Engine;
    use super::*;

    fn options(directory: &std::path::Path, engine: Engine) -> StoreOptions {
        let mut options = StoreOptions::new(directory.join("store"));
        options.engine = engine;
        options.ballast_bytes = 0;
        options
    }

    fn put(name: &str, text: &str) -> (String, Option<Vec<u8>>) {
        (name.to_owned(), Some(text.as_bytes().to_vec()))
    }

    #[tokio::test]
    async fn versions_survive_a_restart_and_guard_each_write() {
        for engine in Engine::ALL {
            let root = tempfile::tempdir().unwrap();
            let documents = Documents::open(options(root.path(), engine)).unwrap();
            let commit = |requirements: &[(&str, Option<u64>)], writes: Vec<_>| {
                let requirements = requirements
                    .iter()
                    .map(|(name, version)| ((*name).to_owned(), *version))
                    .collect();
                documents.commit(requirements, writes)
            };
            let Commit::Done(first) = commit(&[("a", None)], vec![put("a", "1")]).await.unwrap()
            else {
                panic!("a conflict on an empty store");
            };
            let again = commit(&[("a", None)], vec![put("a", "2")]).await.unwrap();
            assert_eq!(again, Commit::Conflict);
            let Commit::Done(second) = commit(&[("a", Some(first))], vec![put("b", "3")])
                .await
                .unwrap()
            else {
                panic!("a conflict where all holds");
            };
            assert!(second > first);
            assert_eq!(documents.damage(), None);
            documents.close().await.unwrap();
            drop(documents);

            let documents = Documents::open(options(root.path(), engine)).unwrap();
            let (revision, all) = documents.load().await.unwrap();
            assert!(revision >= second);
            let versions: Vec<_> = all.iter().map(|one| (&*one.name, one.version)).collect();
            assert_eq!(versions, [("a", first), ("b", second)]);
            let gone = vec![("a".to_owned(), None)];
            let requirement = vec![("a".to_owned(), Some(first))];
            let removed = documents.commit(requirement.clone(), gone.clone()).await;
            assert!(matches!(removed.unwrap(), Commit::Done(at) if at > revision));
            let twice = documents.commit(requirement, gone).await.unwrap();
            assert_eq!(twice, Commit::Conflict);
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn of_racing_writers_each_version_has_one_winner_and_watchers_see_all_in_order() {
        for engine in Engine::ALL {
            let root = tempfile::tempdir().unwrap();
            let documents = Arc::new(Documents::open(options(root.path(), engine)).unwrap());
            let (revision, _) = documents.load().await.unwrap();
            let mut watch = documents.watch(revision);
            let writers = (0..6).map(|writer| {
                let documents = Arc::clone(&documents);
                tokio::spawn(async move {
                    let mut won = Vec::new();
                    for _ in 0..10 {
                        let (_, all) = documents.load().await.unwrap();
                        let version = all
                            .iter()
                            .find(|one| one.name == "hot")
                            .map(|one| one.version);
                        let own = format!("cold-{writer}");
                        let writes = vec![put("hot", "x"), put(&own, "y")];
                        let requirement = vec![("hot".to_owned(), version)];
                        if let Commit::Done(at) =
                            documents.commit(requirement, writes).await.unwrap()
                        {
                            won.push((version, at));
                        }
                    }
                    won
                })
            });
            let mut won = Vec::new();
            for writer in futures::future::join_all(writers).await {
                won.extend(writer.unwrap());
            }
            won.sort_unstable();
            assert!(!won.is_empty());
            // Each winner saw the one before it.
            for pair in won.windows(2) {
                assert_eq!(pair[1].0, Some(pair[0].1));
            }
            let mut seen = Vec::new();
            while seen.len() < won.len() {
                let changes = watch.recv().await.unwrap();
                seen.extend(
                    changes
                        .iter()
                        .filter(|one| one.name == "hot")
                        .map(|one| one.version),
                );
            }
            let versions: Vec<_> = won.iter().map(|(_, at)| *at).collect();
            assert_eq!(seen, versions);
            // One who begins to watch late gets what came since.
            let mut late = documents.watch(versions[0]);
            let first = late.try_recv().ok().map(|changes| changes[0].version);
            assert_eq!(first, versions.get(1).copied());
        }
    }

    #[tokio::test]
    async fn what_does_not_fit_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let documents = Documents::open(options(root.path(), Engine::Sled)).unwrap();
        let large = vec![("a".to_owned(), Some(vec![0; MOST_DOCUMENT_BYTES + 1]))];
        let error = documents.commit(Vec::new(), large).await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::PayloadTooLarge);
        assert_eq!(documents.load().await.unwrap().1, []);
        // A batch of long ago is not remembered.
        assert!(documents.watch(0).try_recv().is_err());
    }
}
