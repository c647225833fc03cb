//! What a record looks like in a store: a name, and bytes.
//!
//! Serde structs mirror the domain's types, with explicit conversions both ways that take each type
//! apart field by field: a field that is added there without being stored does not compile. Unknown
//! fields and variants are refused, never dropped, because a record that a newer Core wrote must not
//! lose a part by passing through an older one.
//!
//! The first byte says how the rest is to be read; a change of shapes is a new number, and the
//! decoder of every past one stays.
//!
//! ```text
//! 1  CBOR (RFC 8949)
//! 2  CBOR, raw deflate (RFC 1951): long ones repeat their field names a lot
//! ```

mod command;
mod host;
mod identity;
mod inventory;

use std::io::{Read, Write};

use flate2::Compression;
use flate2::read::DeflateDecoder;
use flate2::write::DeflateEncoder;
use ghost_domain::{
    ByteSize, CredentialId, Error, ErrorCode, HostId, Result, Role, TenantName, Timestamp,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::domain::{Record, RecordKey};

const PLAIN: u8 = 1;
const DEFLATED: u8 = 2;
/// Shorter ones are not worth the work.
const DEFLATE_FROM: usize = 1024;
/// No record of ours is longer: a heartbeat is at most 1 MiB.
const MOST_DECODED: u64 = 8 << 20;

/// The name of a record in a store.
pub(super) fn name(key: &RecordKey) -> String {
    use RecordKey as K;
    match key {
        K::Host(id) => format!("host/{id}"),
        K::HostName(tenant, name) => format!("name/{tenant}/{name}"),
        K::Inventory(id) => format!("inventory/{id}"),
        K::Owner(id) => format!("owner/{id}"),
        K::Command(host, id) => format!("command/{host}/{id}"),
        K::Tenant(name) => format!("tenant/{name}"),
        K::Room(name) => format!("room/{name}"),
        K::Sent(id) => format!("sent/{id}"),
        K::User(id) => format!("user/{id}"),
        K::Key(id) => format!("key/{id}"),
        K::Token(id) => format!("token/{id}"),
        K::Replica(name) => format!("replica/{name}"),
        K::KnownReplica(name) => format!("known/{name}"),
        K::Epoch => "epoch".into(),
        K::CoreId => "core".into(),
        K::Authority => "authority".into(),
    }
}

/// The key of a name.
///
/// # Errors
/// For a name that this version does not write.
pub(super) fn key(name: &str) -> Result<RecordKey> {
    use RecordKey as K;
    let parts: Vec<&str> = name.split('/').collect();
    Ok(match parts.as_slice() {
        ["host", id] => K::Host(id.parse()?),
        ["name", tenant, name] => K::HostName(tenant.parse()?, (*name).to_owned()),
        ["inventory", id] => K::Inventory(id.parse()?),
        ["owner", id] => K::Owner(id.parse()?),
        ["command", host, id] => K::Command(host.parse()?, id.parse()?),
        ["tenant", name] => K::Tenant(name.parse()?),
        ["room", name] => K::Room(name.parse()?),
        ["sent", id] => K::Sent(sent_id(id)?),
        ["user", id] => K::User(id.parse()?),
        ["key", id] => K::Key(id.parse()?),
        ["token", id] => K::Token(id.parse()?),
        ["replica", name] => K::Replica((*name).to_owned()),
        ["known", name] => K::KnownReplica((*name).to_owned()),
        ["epoch"] => K::Epoch,
        ["core"] => K::CoreId,
        ["authority"] => K::Authority,
        _ => return Err(unknown("a record", name)),
    })
}

fn sent_id(text: &str) -> Result<Uuid> {
    text.parse().map_err(|_| unknown("an id", text))
}

/// Encodes a record.
///
/// # Errors
/// `Internal` where it cannot be expressed.
pub(super) fn encode(record: &Record) -> Result<Vec<u8>> {
    match record {
        Record::Host(host) => pack(&host::HostRow::from(&**host)),
        Record::HostName(id) => pack(&id.uuid()),
        Record::Inventory(inventory) => pack(&inventory::InventoryRow::from(&**inventory)),
        Record::Owner(owner) => pack(&host::OwnerRow::from(owner)),
        Record::Command(command) => pack(&command::CommandRow::from(&**command)),
        Record::Tenant(tenant) => pack(&identity::TenantRow::from(tenant)),
        Record::Room(held) => {
            let rows: Vec<_> = held.iter().map(identity::HeldRow::from).collect();
            pack(&rows)
        }
        Record::Sent(sent) => pack(&identity::SentRow::from(sent)),
        Record::User(user) => pack(&identity::UserRow::from(user)),
        Record::Key(key) => pack(&identity::KeyRow::from(key)),
        Record::Token(token) => pack(&identity::TokenRow::from(token)),
        Record::Replica(replica) | Record::KnownReplica(replica) => {
            pack(&host::ReplicaRow::from(replica))
        }
        Record::Epoch(epoch) => pack(epoch),
        Record::CoreId(text) | Record::Authority(text) => pack(text),
    }
}

/// Decodes the record of a key.
///
/// # Errors
/// `StoreUnavailable` for bytes that this version does not understand.
pub(super) fn decode(key: &RecordKey, bytes: &[u8]) -> Result<Record> {
    use RecordKey as K;
    let decoded = || -> Result<Record> {
        Ok(match key {
            K::Host(_) => Record::Host(Box::new(unpack::<host::HostRow>(bytes)?.try_into()?)),
            K::HostName(..) => Record::HostName(HostId::from_uuid(unpack(bytes)?)),
            K::Inventory(_) => {
                let row: inventory::InventoryRow = unpack(bytes)?;
                Record::Inventory(Box::new(row.try_into()?))
            }
            K::Owner(_) => Record::Owner(unpack::<host::OwnerRow>(bytes)?.into()),
            K::Command(..) => {
                let row: command::CommandRow = unpack(bytes)?;
                Record::Command(Box::new(row.try_into()?))
            }
            K::Tenant(_) => Record::Tenant(unpack::<identity::TenantRow>(bytes)?.try_into()?),
            K::Room(_) => {
                let rows: Vec<identity::HeldRow> = unpack(bytes)?;
                Record::Room(rows.into_iter().map(Into::into).collect())
            }
            K::Sent(_) => Record::Sent(unpack::<identity::SentRow>(bytes)?.into()),
            K::User(_) => Record::User(unpack::<identity::UserRow>(bytes)?.try_into()?),
            K::Key(_) => Record::Key(unpack::<identity::KeyRow>(bytes)?.try_into()?),
            K::Token(_) => Record::Token(unpack::<identity::TokenRow>(bytes)?.try_into()?),
            K::Replica(_) => Record::Replica(unpack::<host::ReplicaRow>(bytes)?.into()),
            K::KnownReplica(_) => Record::KnownReplica(unpack::<host::ReplicaRow>(bytes)?.into()),
            K::Epoch => Record::Epoch(unpack(bytes)?),
            K::CoreId => Record::CoreId(unpack(bytes)?),
            K::Authority => Record::Authority(unpack(bytes)?),
        })
    };
    decoded().map_err(|error| {
        Error::new(
            ErrorCode::StoreUnavailable,
            format!("the record {} cannot be understood", name(key)),
        )
        .because(error)
        .hint("a newer ghost-core wrote it: run that version")
    })
}

fn pack<T: Serialize>(row: &T) -> Result<Vec<u8>> {
    let failed = |cause: String| Error::internal("a record cannot be encoded").because(cause);
    let mut bytes = vec![PLAIN];
    ciborium::into_writer(row, &mut bytes).map_err(|error| failed(error.to_string()))?;
    if bytes.len() < DEFLATE_FROM {
        return Ok(bytes);
    }
    let mut encoder = DeflateEncoder::new(vec![DEFLATED], Compression::fast());
    encoder
        .write_all(bytes.get(1..).unwrap_or_default())
        .and_then(|()| encoder.finish())
        .map_err(|error| failed(error.to_string()))
}

fn unpack<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    let odd = |cause: String| Error::new(ErrorCode::InvalidArgument, cause);
    match bytes.split_first() {
        Some((&PLAIN, cbor)) => whole(cbor),
        Some((&DEFLATED, packed)) => {
            let mut cbor = Vec::new();
            DeflateDecoder::new(packed)
                .take(MOST_DECODED)
                .read_to_end(&mut cbor)
                .map_err(|error| odd(error.to_string()))?;
            whole(&cbor)
        }
        Some((format, _)) => Err(odd(format!(
            "its format is {format}, of which nothing is known"
        ))),
        None => Err(odd("it is empty".into())),
    }
}

fn whole<T: DeserializeOwned>(cbor: &[u8]) -> Result<T> {
    let mut rest = cbor;
    let row = ciborium::from_reader(&mut rest)
        .map_err(|error| Error::new(ErrorCode::InvalidArgument, error.to_string()))?;
    if rest.is_empty() {
        return Ok(row);
    }
    Err(Error::new(
        ErrorCode::InvalidArgument,
        format!("{} bytes follow it", rest.len()),
    ))
}

fn unknown(what: &str, text: &str) -> Error {
    Error::new(
        ErrorCode::InvalidArgument,
        format!("{what} {text:?} is not of this version"),
    )
}

fn time(millis: i64) -> Timestamp {
    Timestamp::from_unix_millis(millis)
}

fn times(millis: Option<i64>) -> Option<Timestamp> {
    millis.map(Timestamp::from_unix_millis)
}

fn millis(at: Option<Timestamp>) -> Option<i64> {
    at.map(Timestamp::unix_millis)
}

fn role(text: &str) -> Result<Role> {
    text.parse()
}

fn tenant(text: Option<String>) -> Result<Option<TenantName>> {
    text.map(TenantName::new).transpose()
}

fn credential(id: Uuid) -> CredentialId {
    CredentialId::from_uuid(id)
}

/// CPUs, memory, disk.
#[derive(Clone, Copy, Serialize, Deserialize)]
struct DemandRow(u32, u64, u64);

impl From<ghost_domain::Demand> for DemandRow {
    fn from(demand: ghost_domain::Demand) -> Self {
        let ghost_domain::Demand { cpus, memory, disk } = demand;
        Self(cpus, memory.bytes(), disk.bytes())
    }
}

impl From<DemandRow> for ghost_domain::Demand {
    fn from(DemandRow(cpus, memory, disk): DemandRow) -> Self {
        Self {
            cpus,
            memory: ByteSize::from_bytes(memory),
            disk: ByteSize::from_bytes(disk),
        }
    }
}

/// Bytes as a CBOR byte string; serde would write an array of numbers.
#[derive(Clone, Copy)]
struct Hash([u8; 32]);

impl Serialize for Hash {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Hash {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HashVisitor;

        impl serde::de::Visitor<'_> for HashVisitor {
            type Value = Hash;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("32 bytes")
            }

            fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<Hash, E> {
                bytes
                    .try_into()
                    .map(Hash)
                    .map_err(|_| E::invalid_length(bytes.len(), &self))
            }
        }

        deserializer.deserialize_bytes(HashVisitor)
    }
}

#[cfg(test)]
mod tests;
