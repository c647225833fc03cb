//! The records of a store as they stand in memory and as one batch changes them on disk.
//!
//! Besides the records, an engine holds two things of ours. The *manifest* says how many records
//! there must be and what their digest is; it is written with every batch, in its transaction, so
//! that a record which got lost or fell back to an older value is noticed. The *undo entries* hold
//! what the newest batch replaced: when it turns out at the next open that this batch was never
//! acknowledged, it is taken back, so that a commit which returned an error stays without effect
//! even if the process dies right after.

use std::collections::BTreeMap;
use std::sync::Arc;

use ghost_domain::ports::StoreContents;
use serde::{Deserialize, Serialize};

use super::engine::{KeyValueEngine, Pair};
use super::envelope;
use super::fault::Fault;
use super::key::{Key, Table};
use super::rows::{self, Bytes};
use super::sidecar::Mark;
use super::steps::{Steps, Unwatched};

/// Records in their envelopes. Cheap to clone: the bytes are shared.
#[derive(Clone, Debug, Default)]
pub(super) struct Records {
    pairs: BTreeMap<Key, Arc<[u8]>>,
    digest: u64,
    bytes: u64,
}

impl Records {
    /// Sets or removes one record.
    pub(super) fn set(&mut self, key: Key, envelope: Option<Arc<[u8]>>) {
        let size = |envelope: &Arc<[u8]>| envelope.len() as u64;
        if let Some(new) = &envelope {
            self.digest = self.digest.wrapping_add(envelope::pair_digest(&key, new));
            self.bytes += size(new);
        }
        let old = match envelope {
            Some(new) => self.pairs.insert(key.clone(), new),
            None => self.pairs.remove(&key),
        };
        if let Some(old) = old {
            self.digest = self.digest.wrapping_sub(envelope::pair_digest(&key, &old));
            self.bytes -= size(&old);
        }
    }

    /// How many there are.
    pub(super) fn count(&self) -> u64 {
        self.pairs.len() as u64
    }

    /// The sum of their digests.
    pub(super) const fn digest(&self) -> u64 {
        self.digest
    }

    /// What the records occupy without any engine around them.
    pub(super) const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// All of them, in the order of their keys.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&Key, &Arc<[u8]>)> {
        self.pairs.iter()
    }

    /// The batch that wrote a record; `None` where there is none.
    pub(super) fn version(&self, key: &Key) -> Option<u64> {
        self.pairs.get(key).map(|bytes| envelope::sequence(bytes))
    }

    /// Takes in one pair read from outside, after verifying its envelope.
    pub(super) fn take_in(&mut self, key: Key, value: &[u8], newest: u64) -> Result<(), Fault> {
        let (sequence, _) = envelope::open(&key, value)?;
        if sequence > newest {
            return Err(Fault::Damaged(format!(
                "{key} was written by batch {sequence}, and the newest batch is {newest}"
            )));
        }
        self.set(key, Some(value.into()));
        Ok(())
    }

    /// Decodes everything.
    ///
    /// # Errors
    /// [`Fault::Newer`] for a record that is whole and yet not understood.
    pub(super) fn decode(&self) -> Result<StoreContents, Fault> {
        let mut contents = StoreContents::default();
        for (key, value) in &self.pairs {
            let (_, row) = envelope::open(key, value)?;
            rows::decode_into(&mut contents, key, row).map_err(Fault::Newer)?;
        }
        Ok(contents)
    }
}

/// What must be true of the records of one batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Manifest {
    /// The state after the batch.
    pub(super) mark: Mark,
    /// The newest acknowledged batch when this one was begun.
    pub(super) base: u64,
    /// How many undo entries belong to it.
    pub(super) undo: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ManifestRow {
    store: Bytes,
    sequence: u64,
    base: u64,
    count: u64,
    digest: u64,
    undo: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct UndoRow {
    key: Bytes,
    old: Option<Bytes>,
}

impl Manifest {
    fn pair(&self) -> Result<Pair, Fault> {
        let key = Key::manifest();
        let row = rows::to_cbor(&ManifestRow {
            store: Bytes(self.mark.store.to_vec()),
            sequence: self.mark.sequence,
            base: self.base,
            count: self.mark.count,
            digest: self.mark.digest,
            undo: self.undo,
        })
        .map_err(|error| Fault::Io(error.to_string()))?;
        let value = envelope::seal(&key, self.mark.sequence, &row);
        Ok((key.as_bytes().to_vec(), Some(value)))
    }

    fn read(value: &[u8]) -> Result<Self, Fault> {
        let (sequence, row) = envelope::open(&Key::manifest(), value)?;
        let row: ManifestRow = rows::read_cbor(row)
            .map_err(|error| Fault::Newer(format!("the manifest cannot be read: {error}")))?;
        let store = <[u8; 16]>::try_from(row.store.0)
            .map_err(|_| Fault::Newer("the manifest has an identity of another length".into()))?;
        if sequence != row.sequence {
            return Err(Fault::Damaged("the manifest is of another batch".into()));
        }
        Ok(Self {
            mark: Mark {
                store,
                sequence,
                count: row.count,
                digest: row.digest,
            },
            base: row.base,
            undo: row.undo,
        })
    }
}

/// A record as it is to be: `None` where it is not.
pub(super) type Effect = (Key, Option<Arc<[u8]>>);

/// All that an engine holds, verified.
#[derive(Clone, Debug)]
pub(super) struct Contents {
    pub(super) manifest: Manifest,
    pub(super) records: Records,
    undo: BTreeMap<u32, Effect>,
}

impl Contents {
    /// Reads everything from `engine`, believing nothing.
    ///
    /// # Errors
    /// [`Fault::Damaged`] unless every envelope, the number of records and their digest are right.
    pub(super) fn read(engine: &dyn KeyValueEngine) -> Result<Self, Fault> {
        let mut manifest = None;
        let mut undo = BTreeMap::new();
        let mut found = Vec::new();
        let mut fault = None;
        engine.scan(&mut |key, value| {
            if fault.is_some() {
                return;
            }
            let key = Key::from_bytes(key);
            let taken = if key == Key::manifest() {
                Manifest::read(value).map(|read| manifest = Some(read))
            } else if let Some(index) = key.undo_index() {
                read_undo(&key, value).map(|entry| {
                    undo.insert(index, entry);
                })
            } else {
                match key.table() {
                    Some(Table::System) => Err(Fault::Newer(format!("{key} is unknown"))),
                    _ => {
                        found.push((key, value.to_vec()));
                        Ok(())
                    }
                }
            };
            fault = taken.err();
        })?;
        if let Some(fault) = fault {
            return Err(fault);
        }
        let manifest: Manifest =
            manifest.ok_or_else(|| Fault::Damaged("the manifest is missing".into()))?;
        let newest = manifest.mark.sequence;
        let mut records = Records::default();
        for (key, value) in found {
            records.take_in(key, &value, newest)?;
        }
        if records.count() != manifest.mark.count {
            return Err(Fault::Damaged(format!(
                "{} records are there, and the manifest names {}",
                records.count(),
                manifest.mark.count
            )));
        }
        if records.digest() != manifest.mark.digest {
            return Err(Fault::Damaged(
                "a record is not of the state that the manifest describes".into(),
            ));
        }
        let entries = undo
            .into_iter()
            .map(|(index, (sequence, key, old))| {
                if sequence == newest {
                    Ok((index, (key, old)))
                } else {
                    Err(Fault::Damaged("an undo entry is of another batch".into()))
                }
            })
            .collect::<Result<BTreeMap<_, _>, Fault>>()?;
        if !entries.keys().copied().eq(0..manifest.undo) {
            return Err(Fault::Damaged(format!(
                "{} undo entries are there, and the manifest names {}",
                entries.len(),
                manifest.undo
            )));
        }
        Ok(Self {
            manifest,
            records,
            undo: entries,
        })
    }

    /// The records as they were before the newest batch.
    pub(super) fn before_newest(&self) -> Records {
        let mut records = self.records.clone();
        for (key, old) in self.undo.values() {
            records.set(key.clone(), old.clone());
        }
        records
    }
}

type UndoEntry = (u64, Key, Option<Arc<[u8]>>);

fn read_undo(key: &Key, value: &[u8]) -> Result<UndoEntry, Fault> {
    let (sequence, row) = envelope::open(key, value)?;
    let row: UndoRow = rows::read_cbor(row)
        .map_err(|error| Fault::Newer(format!("an undo entry cannot be read: {error}")))?;
    let target = Key::from_bytes(&row.key.0);
    if let Some(old) = &row.old {
        envelope::open(&target, &old.0)?;
    }
    Ok((sequence, target, row.old.map(|old| old.0.into())))
}

/// A batch that is ready to be committed.
#[derive(Debug)]
pub(super) struct Batch {
    /// For the engine.
    pub(super) pairs: Vec<Pair>,
    /// For the records in memory, once it is acknowledged.
    pub(super) effects: Vec<Effect>,
    /// The manifest that is part of it.
    pub(super) manifest: Manifest,
}

impl Batch {
    /// Prepares `writes` (of encoded rows) on top of `records`. `before` is the manifest of the
    /// newest acknowledged batch. `None` where nothing would change.
    ///
    /// # Errors
    /// [`Fault::Io`] only if our own bookkeeping cannot be encoded.
    pub(super) fn prepare(
        records: &Records,
        before: &Manifest,
        writes: &BTreeMap<Key, Option<Vec<u8>>>,
    ) -> Result<Option<Self>, Fault> {
        let sequence = before.mark.sequence + 1;
        let mut mark = Mark {
            sequence,
            ..before.mark
        };
        let mut pairs = Vec::with_capacity(writes.len() * 2 + 1);
        let mut effects = Vec::with_capacity(writes.len());
        for (key, row) in writes {
            let old = records.pairs.get(key);
            if row.is_none() && old.is_none() {
                continue;
            }
            let new = row.as_ref().map(|row| envelope::seal(key, sequence, row));
            if let Some(old) = old {
                mark.count -= 1;
                mark.digest = mark.digest.wrapping_sub(envelope::pair_digest(key, old));
            }
            if let Some(new) = &new {
                mark.count += 1;
                mark.digest = mark.digest.wrapping_add(envelope::pair_digest(key, new));
            }
            let index = u32::try_from(effects.len())
                .map_err(|_| Fault::Io("too many changes in one batch".into()))?;
            pairs.push(undo_pair(index, sequence, key, old)?);
            pairs.push((key.as_bytes().to_vec(), new.clone()));
            effects.push((key.clone(), new.map(Into::into)));
        }
        if effects.is_empty() {
            return Ok(None);
        }
        let undo = u32::try_from(effects.len()).unwrap_or(u32::MAX);
        pairs.extend((undo..before.undo).map(|index| (Key::undo(index).as_bytes().to_vec(), None)));
        let manifest = Manifest {
            mark,
            base: before.mark.sequence,
            undo,
        };
        pairs.push(manifest.pair()?);
        Ok(Some(Self {
            pairs,
            effects,
            manifest,
        }))
    }

    /// The batch that turns what an engine holds into `wanted`, and so takes back what was not
    /// acknowledged.
    ///
    /// # Errors
    /// As [`Self::prepare`].
    pub(super) fn correct(
        found: &Contents,
        wanted: &Records,
        acknowledged: &Mark,
    ) -> Result<Self, Fault> {
        let mut pairs = Vec::new();
        for key in found.records.pairs.keys() {
            if !wanted.pairs.contains_key(key) {
                pairs.push((key.as_bytes().to_vec(), None));
            }
        }
        for (key, envelope) in &wanted.pairs {
            if found.records.pairs.get(key) != Some(envelope) {
                pairs.push((key.as_bytes().to_vec(), Some(envelope.to_vec())));
            }
        }
        pairs.extend(
            (0..found.manifest.undo).map(|index| (Key::undo(index).as_bytes().to_vec(), None)),
        );
        let manifest = Manifest {
            mark: Mark {
                store: acknowledged.store,
                sequence: found.manifest.mark.sequence.max(acknowledged.sequence) + 1,
                count: wanted.count(),
                digest: wanted.digest(),
            },
            base: acknowledged.sequence,
            undo: 0,
        };
        pairs.push(manifest.pair()?);
        Ok(Self {
            pairs,
            effects: Vec::new(),
            manifest,
        })
    }
}

fn undo_pair(
    index: u32,
    sequence: u64,
    target: &Key,
    old: Option<&Arc<[u8]>>,
) -> Result<Pair, Fault> {
    let key = Key::undo(index);
    let row = rows::to_cbor(&UndoRow {
        key: Bytes(target.as_bytes().to_vec()),
        old: old.map(|old| Bytes(old.to_vec())),
    })
    .map_err(|error| Fault::Io(error.to_string()))?;
    let value = envelope::seal(&key, sequence, &row);
    Ok((key.as_bytes().to_vec(), Some(value)))
}

/// Fills an empty engine. Not one transaction: the engine is not in its place yet, and a crash
/// leaves the old one there.
///
/// # Errors
/// What the engine says.
pub(super) fn fill(
    engine: &mut dyn KeyValueEngine,
    records: &Records,
    manifest: &Manifest,
) -> Result<(), Fault> {
    const CHUNK: usize = 256;
    let steps: &dyn Steps = &Unwatched;
    let mut pairs: Vec<Pair> = Vec::with_capacity(CHUNK);
    for (key, envelope) in records.iter() {
        pairs.push((key.as_bytes().to_vec(), Some(envelope.to_vec())));
        if pairs.len() == CHUNK {
            engine.commit(&pairs, steps)?;
            pairs.clear();
        }
    }
    pairs.push(manifest.pair()?);
    engine.commit(&pairs, steps)
}
