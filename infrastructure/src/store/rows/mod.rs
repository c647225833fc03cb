//! What a record looks like on disk: serde structs that mirror the domain's types, encoded as CBOR
//! (RFC 8949), with explicit conversions both ways.
//!
//! The domain knows nothing of serde, so that a renamed field there can never change a stored
//! byte: each conversion takes its type apart field by field, and a field that is added without
//! being stored does not compile. Unknown fields and unknown variants are refused, never dropped:
//! a record that a newer agent wrote must not lose a part by passing through an older one.
//!
//! A change of these shapes is a new [`SCHEMA_VERSION`]; the decoder of every past one stays, and
//! `fixtures/` holds records of each.

mod access;
mod fleet;
mod image;
mod operation;
mod vm;

use std::fmt;

use ghost_domain::ports::{Change, StoreContents};
use ghost_domain::{Error, ErrorCode, Result, Timestamp};
use serde::de::{DeserializeOwned, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::key::{Key, Table};

/// The version of the shapes below, written into every record's envelope.
pub(super) const SCHEMA_VERSION: u16 = 1;

/// The most bytes that one encoded record may have. sled moves values from 128 KiB on into blob
/// files that it never frees, so no record may come near that.
pub(super) const MAX_VALUE: usize = 64 * 1024;

/// One effect of a [`Change`] on the stored pairs: `None` removes the key.
pub(super) type Write = (Key, Option<Vec<u8>>);

/// Encodes a change.
///
/// # Errors
/// [`ErrorCode::PayloadTooLarge`] when the record exceeds [`MAX_VALUE`].
pub(super) fn encode_change(change: &Change) -> Result<Write> {
    use Change as C;
    Ok(match change {
        C::PutVm(vm) => put(Key::vm(vm.id), &vm::VmRow::from(&**vm))?,
        C::DeleteVm(id) => (Key::vm(*id), None),
        C::PutOperation(operation) => put(
            Key::operation(operation.id),
            &operation::OperationRow::from(&**operation),
        )?,
        C::DeleteOperation(id) => (Key::operation(*id), None),
        C::PutImage(image) => put(Key::image(&image.name), &image::ImageRow::from(image))?,
        C::DeleteImage(name) => (Key::image(name), None),
        C::PutCertificate(row) => {
            put(Key::certificate(row.id), &access::CertificateRow::from(row))?
        }
        C::DeleteCertificate(id) => (Key::certificate(*id), None),
        C::PutApiKey(row) => put(Key::api_key(row.id), &access::ApiKeyRow::from(row))?,
        C::DeleteApiKey(id) => (Key::api_key(*id), None),
        C::PutJoinToken(row) => put(Key::join_token(row.id), &access::JoinTokenRow::from(row))?,
        C::DeleteJoinToken(id) => (Key::join_token(*id), None),
        C::PutBootId(boot_id) => put(Key::boot_id(), boot_id)?,
        C::PutLockdown(row) => put(Key::lockdown(), &access::LockdownRow::from(row))?,
        C::DeleteLockdown => (Key::lockdown(), None),
        C::PutFleetLedger(row) => put(Key::fleet_ledger(), &fleet::LedgerRow::from(row))?,
        C::PutDeleteConsent(until) => put(Key::delete_consent(), &until.unix_millis())?,
    })
}

fn put<T: Serialize>(key: Key, row: &T) -> Result<Write> {
    let bytes = to_cbor(row)?;
    if bytes.len() > MAX_VALUE {
        return Err(Error::new(
            ErrorCode::PayloadTooLarge,
            format!("the record of {key} is too large to be stored"),
        )
        .because(format!(
            "it has {} bytes, and the store takes at most {MAX_VALUE} for one record",
            bytes.len()
        ))
        .hint("give less user-data, fewer SSH keys or fewer tags"));
    }
    Ok((key, Some(bytes)))
}

/// Decodes one record of the present schema into `contents`.
///
/// # Errors
/// What could not be understood, as a sentence fragment. The record's checksum was right, so this
/// is not damage: another version of the agent wrote it.
pub(super) fn decode_into(
    contents: &mut StoreContents,
    key: &Key,
    row: &[u8],
) -> Result<(), String> {
    let decoded =
        match key.table() {
            Some(Table::Vm) => from_cbor::<vm::VmRow, _>(row).map(|vm| contents.vms.push(vm)),
            Some(Table::Operation) => from_cbor::<operation::OperationRow, _>(row)
                .map(|row| contents.operations.push(row)),
            Some(Table::Image) => {
                from_cbor::<image::ImageRow, _>(row).map(|row| contents.images.push(row))
            }
            Some(Table::Certificate) => from_cbor::<access::CertificateRow, _>(row)
                .map(|row| contents.certificates.push(row)),
            Some(Table::ApiKey) => {
                from_cbor::<access::ApiKeyRow, _>(row).map(|row| contents.api_keys.push(row))
            }
            Some(Table::JoinToken) => {
                from_cbor::<access::JoinTokenRow, _>(row).map(|row| contents.join_tokens.push(row))
            }
            Some(Table::Setting) if *key == Key::boot_id() => {
                from_cbor::<String, String>(row).map(|boot_id| contents.boot_id = Some(boot_id))
            }
            Some(Table::Setting) if *key == Key::lockdown() => {
                from_cbor::<access::LockdownRow, _>(row).map(|row| contents.lockdown = Some(row))
            }
            Some(Table::Setting) if *key == Key::fleet_ledger() => {
                from_cbor::<fleet::LedgerRow, _>(row).map(|row| contents.fleet_ledger = Some(row))
            }
            Some(Table::Setting) if *key == Key::delete_consent() => {
                from_cbor::<i64, Timestamp>(row).map(|until| contents.delete_consent = Some(until))
            }
            // Another service's; what they hold is its business.
            Some(Table::Document) => Ok(()),
            Some(Table::System | Table::Setting) | None => {
                Err("this version knows no such record".into())
            }
        };
    decoded.map_err(|why| format!("the record of {key}: {why}"))
}

/// Encodes anything of ours as CBOR.
///
/// # Errors
/// [`ErrorCode::Internal`] when a value cannot be expressed, such as a path that is not UTF-8.
pub(super) fn to_cbor<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(512);
    ciborium::into_writer(value, &mut bytes)
        .map_err(|error| Error::internal("a record cannot be encoded").because(error))?;
    Ok(bytes)
}

/// Decodes `bytes` wholly: what stands behind the value is an error too.
pub(super) fn read_cbor<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    let mut rest = bytes;
    let value = ciborium::from_reader(&mut rest).map_err(|error| error.to_string())?;
    if rest.is_empty() {
        Ok(value)
    } else {
        Err(format!("{} bytes follow it", rest.len()))
    }
}

fn from_cbor<Row, Out>(bytes: &[u8]) -> Result<Out, String>
where
    Row: DeserializeOwned,
    Out: TryFromRow<Row>,
{
    Out::try_from_row(read_cbor::<Row>(bytes)?).map_err(|error| error.to_string())
}

/// From a row to the domain. `TryFrom` would need an error type that suits the infallible
/// conversions too.
trait TryFromRow<Row>: Sized {
    fn try_from_row(row: Row) -> Result<Self>;
}

impl TryFromRow<Self> for String {
    fn try_from_row(row: Self) -> Result<Self> {
        Ok(row)
    }
}

impl TryFromRow<i64> for Timestamp {
    fn try_from_row(row: i64) -> Result<Self> {
        Ok(Self::from_unix_millis(row))
    }
}

/// Bytes as a CBOR byte string; serde would write a `Vec<u8>` as an array of numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Bytes(pub(super) Vec<u8>);

impl Bytes {
    /// The bytes as an array of fixed length.
    ///
    /// # Errors
    /// When there are more or fewer.
    fn array<const N: usize>(self) -> Result<[u8; N]> {
        let length = self.0.len();
        <[u8; N]>::try_from(self.0).map_err(|_| {
            Error::new(
                ErrorCode::InvalidArgument,
                format!("{length} bytes stand where {N} are expected"),
            )
        })
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct BytesVisitor;

        impl Visitor<'_> for BytesVisitor {
            type Value = Bytes;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a byte string")
            }

            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Bytes, E> {
                Ok(Bytes(bytes.to_vec()))
            }

            fn visit_byte_buf<E>(self, bytes: Vec<u8>) -> Result<Bytes, E> {
                Ok(Bytes(bytes))
            }
        }

        deserializer.deserialize_byte_buf(BytesVisitor)
    }
}

#[cfg(test)]
mod tests;
