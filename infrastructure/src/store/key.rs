//! Keys: one byte for the table, then the identity, big-endian, so that equal kinds stand together.

use std::fmt;

use ghost_domain::{CredentialId, ImageName, OperationId, VmId};

/// The kinds of pairs. The numbers are part of the format: never reuse one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Table {
    /// The store's own bookkeeping: manifest and undo entries.
    System = 0,
    /// VMs.
    Vm = 1,
    /// Operations.
    Operation = 2,
    /// Images.
    Image = 3,
    /// Certificates.
    Certificate = 4,
    /// HTTP keys.
    ApiKey = 5,
    /// Join tokens.
    JoinToken = 6,
    /// Single values.
    Setting = 7,
    /// Whatever a service other than the agent keeps.
    Document = 8,
}

impl Table {
    const ALL: [Self; 9] = [
        Self::System,
        Self::Vm,
        Self::Operation,
        Self::Image,
        Self::Certificate,
        Self::ApiKey,
        Self::JoinToken,
        Self::Setting,
        Self::Document,
    ];

    const fn noun(self) -> &'static str {
        match self {
            Self::System => "system entry",
            Self::Vm => "VM",
            Self::Operation => "operation",
            Self::Image => "image",
            Self::Certificate => "certificate",
            Self::ApiKey => "key",
            Self::JoinToken => "join token",
            Self::Setting => "setting",
            Self::Document => "document",
        }
    }
}

const BOOT_ID: &[u8] = b"boot_id";
const LOCKDOWN: &[u8] = b"lockdown";
const FLEET_LEDGER: &[u8] = b"fleet_ledger";
const DELETE_CONSENT: &[u8] = b"delete_consent";
const MANIFEST: u8 = 0;
const UNDO: u8 = 1;

/// The key of one pair in the engine.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Key(Vec<u8>);

impl Key {
    fn new(table: Table, identity: &[u8]) -> Self {
        let mut bytes = Vec::with_capacity(1 + identity.len());
        bytes.push(table as u8);
        bytes.extend_from_slice(identity);
        Self(bytes)
    }

    pub(super) fn vm(id: VmId) -> Self {
        Self::new(Table::Vm, id.uuid().as_bytes())
    }

    pub(super) fn operation(id: OperationId) -> Self {
        Self::new(Table::Operation, id.uuid().as_bytes())
    }

    pub(super) fn image(name: &ImageName) -> Self {
        Self::new(Table::Image, name.as_str().as_bytes())
    }

    pub(super) fn certificate(id: CredentialId) -> Self {
        Self::new(Table::Certificate, id.uuid().as_bytes())
    }

    pub(super) fn api_key(id: CredentialId) -> Self {
        Self::new(Table::ApiKey, id.uuid().as_bytes())
    }

    pub(super) fn join_token(id: CredentialId) -> Self {
        Self::new(Table::JoinToken, id.uuid().as_bytes())
    }

    pub(super) fn boot_id() -> Self {
        Self::new(Table::Setting, BOOT_ID)
    }

    pub(super) fn lockdown() -> Self {
        Self::new(Table::Setting, LOCKDOWN)
    }

    pub(super) fn fleet_ledger() -> Self {
        Self::new(Table::Setting, FLEET_LEDGER)
    }

    pub(super) fn delete_consent() -> Self {
        Self::new(Table::Setting, DELETE_CONSENT)
    }

    pub(super) fn document(name: &str) -> Self {
        Self::new(Table::Document, name.as_bytes())
    }

    /// The name of a document, where this is the key of one.
    pub(super) fn document_name(&self) -> Option<&str> {
        match self.0.split_first() {
            Some((table, name)) if *table == Table::Document as u8 => {
                std::str::from_utf8(name).ok()
            }
            _ => None,
        }
    }

    /// Where the manifest lies.
    pub(super) fn manifest() -> Self {
        Self::new(Table::System, &[MANIFEST])
    }

    /// Where the `index`-th undo entry of the newest batch lies.
    pub(super) fn undo(index: u32) -> Self {
        let mut identity = [UNDO, 0, 0, 0, 0];
        identity[1..].copy_from_slice(&index.to_be_bytes());
        Self::new(Table::System, &identity)
    }

    /// The index of an undo entry, where this is the key of one.
    pub(super) fn undo_index(&self) -> Option<u32> {
        match self.0.as_slice() {
            [table, UNDO, index @ ..] if *table == Table::System as u8 => {
                index.try_into().ok().map(u32::from_be_bytes)
            }
            _ => None,
        }
    }

    /// A key as it was read.
    pub(super) fn from_bytes(bytes: &[u8]) -> Self {
        Self(bytes.to_vec())
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The table, where its number is known.
    pub(super) fn table(&self) -> Option<Table> {
        let first = self.0.first()?;
        Table::ALL.into_iter().find(|table| *table as u8 == *first)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(table) = self.table() else {
            return write!(f, "unknown {}", hex::encode(&self.0));
        };
        let identity = self.0.get(1..).unwrap_or_default();
        f.write_str(table.noun())?;
        match (
            table,
            uuid::Uuid::from_slice(identity),
            std::str::from_utf8(identity),
        ) {
            (Table::Image | Table::Setting | Table::Document, _, Ok(text)) => {
                write!(f, " {}", text.escape_debug())
            }
            (Table::System, ..) => write!(f, " {}", hex::encode(identity)),
            (_, Ok(id), _) => write!(f, " {id}"),
            _ => write!(f, " {}", hex::encode(identity)),
        }
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}
