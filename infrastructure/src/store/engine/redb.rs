//! redb 4.4.
//!
//! `Durability::Immediate` (the default) is an fsync of its file before `commit` returns, so there
//! is nothing for us to add. After an I/O error it refuses all further work until it is reopened.

use std::path::Path;

use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition};

use super::{KeyValueEngine, Pair, step};
use crate::store::fault::Fault;
use crate::store::files;
use crate::store::steps::{Step, Steps};

/// redb's file, within the engine's directory.
pub(super) const FILE: &str = "state.redb";

const CACHE_BYTES: usize = 8 * 1024 * 1024;
const TABLE: TableDefinition<'static, &[u8], &[u8]> = TableDefinition::new("state");

pub(super) struct Redb {
    database: Database,
}

impl Redb {
    pub(super) fn open(directory: &Path, create: bool) -> Result<Self, Fault> {
        let path = directory.join(FILE);
        let mut options = files::private();
        options.read(true).write(true);
        if create {
            files::make_directory(directory)?;
            options.create_new(true);
        }
        let file = options.open(&path)?;
        if !create && file.metadata()?.len() == 0 {
            // redb would make an empty store without a word.
            return Err(Fault::Damaged(format!("{FILE} is empty")));
        }
        let database = Database::builder()
            .set_cache_size(CACHE_BYTES)
            .create_file(file)
            .map_err(|error| match error {
                DatabaseError::DatabaseAlreadyOpen => Fault::Busy(error.to_string()),
                other => convert(other.into()),
            })?;
        files::secure_and_sync_tree(directory)?;
        Ok(Self { database })
    }
}

impl KeyValueEngine for Redb {
    fn scan(&self, visit: &mut dyn FnMut(&[u8], &[u8])) -> Result<(), Fault> {
        let transaction = self
            .database
            .begin_read()
            .map_err(|error| convert(error.into()))?;
        let table = transaction
            .open_table(TABLE)
            .map_err(|error| convert(error.into()))?;
        for pair in table.iter().map_err(|error| convert(error.into()))? {
            let (key, value) = pair.map_err(|error| convert(error.into()))?;
            visit(key.value(), value.value());
        }
        Ok(())
    }

    fn commit(&mut self, batch: &[Pair], steps: &dyn Steps) -> Result<(), Fault> {
        step(steps, Step::Apply)?;
        let transaction = self
            .database
            .begin_write()
            .map_err(|error| convert(error.into()))?;
        {
            let mut table = transaction
                .open_table(TABLE)
                .map_err(|error| convert(error.into()))?;
            for (key, value) in batch {
                match value {
                    Some(value) => table.insert(key.as_slice(), value.as_slice()).map(drop),
                    None => table.remove(key.as_slice()).map(drop),
                }
                .map_err(|error| convert(error.into()))?;
            }
        }
        step(steps, Step::Sync)?;
        transaction
            .commit()
            .map_err(|error| convert(error.into()))?;
        steps.done(Step::Sync);
        Ok(())
    }

    fn abandon(self: Box<Self>) {
        // After an error redb refuses every further write by itself, its closing included.
        drop(self);
    }

    fn check(&mut self) -> Result<(), Fault> {
        match self.database.check_integrity() {
            Ok(true) => Ok(()),
            // The manifest tells whether the repair lost anything.
            Ok(false) => {
                tracing::warn!("redb repaired its file");
                Ok(())
            }
            Err(error) => Err(convert(error.into())),
        }
    }
}

fn convert(error: redb::Error) -> Fault {
    match error {
        redb::Error::Io(error) => error.into(),
        // Says only that an earlier call failed; the system is to blame until a reopening shows more.
        redb::Error::PreviousIo | redb::Error::DatabaseClosed => Fault::Io(error.to_string()),
        redb::Error::DatabaseAlreadyOpen => Fault::Busy(error.to_string()),
        other => Fault::Damaged(other.to_string()),
    }
}
