//! The envelope around every stored value. Neither engine tells us of all damage (sled shows
//! records as missing or old without a word), so that each value proves by itself that it is ours,
//! whole, under the right key and of a shape we know.
//!
//! ```text
//! 0   magic "Ghst"
//! 4   schema version   u16   all numbers big-endian
//! 6   zero             u16
//! 8   sequence         u64   the batch that wrote it
//! 16  key hash         u32   CRC32C of the key: a value under a foreign key is damage
//! 20  payload length   u32
//! 24  payload
//! n   CRC32C of all before (Castagnoli, RFC 3720)
//! ```

use super::fault::Fault;
use super::key::Key;
use super::rows::SCHEMA_VERSION;

const MAGIC: [u8; 4] = *b"Ghst";
const HEADER: usize = 24;
const TRAILER: usize = 4;

/// Seals `payload` for `key`.
pub(super) fn seal(key: &Key, sequence: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + payload.len() + TRAILER);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&SCHEMA_VERSION.to_be_bytes());
    bytes.extend_from_slice(&[0, 0]);
    bytes.extend_from_slice(&sequence.to_be_bytes());
    bytes.extend_from_slice(&crc32c::crc32c(key.as_bytes()).to_be_bytes());
    // A payload is at most 64 KiB (`MAX_VALUE`) plus bookkeeping; its length fits with room.
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(payload);
    let crc = crc32c::crc32c(&bytes);
    bytes.extend_from_slice(&crc.to_be_bytes());
    bytes
}

/// Opens an envelope found under `key`: its sequence and its payload.
///
/// # Errors
/// The checksum is verified before anything else is believed, so that `Newer` is never the
/// outcome of damage.
pub(super) fn open<'a>(key: &Key, bytes: &'a [u8]) -> Result<(u64, &'a [u8]), Fault> {
    let damaged = |what: &str| Fault::Damaged(format!("{key}: {what}"));
    let Some((body, crc)) = bytes.split_last_chunk::<TRAILER>() else {
        return Err(damaged("too short"));
    };
    if crc32c::crc32c(body) != u32::from_be_bytes(*crc) {
        return Err(damaged("checksum mismatch"));
    }
    let Some((header, payload)) = body.split_first_chunk::<HEADER>() else {
        return Err(damaged("too short"));
    };
    if header[..4] != MAGIC {
        return Err(damaged("not a record of ours"));
    }
    let version = u16::from_be_bytes([header[4], header[5]]);
    if version != SCHEMA_VERSION || header[6..8] != [0, 0] {
        return Err(Fault::Newer(format!(
            "{key} has the schema version {version}, and this agent knows {SCHEMA_VERSION}"
        )));
    }
    let number = |at: usize| {
        u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
    };
    if number(16) != crc32c::crc32c(key.as_bytes()) {
        return Err(damaged("the value belongs to another key"));
    }
    if usize::try_from(number(20)) != Ok(payload.len()) {
        return Err(damaged("wrong length"));
    }
    let sequence = u64::from(number(8)) << 32 | u64::from(number(12));
    Ok((sequence, payload))
}

/// The batch that wrote an envelope which was verified before.
pub(super) fn sequence(bytes: &[u8]) -> u64 {
    bytes
        .get(8..16)
        .and_then(|number| number.try_into().ok())
        .map_or(0, u64::from_be_bytes)
}

/// What one pair adds to the digest of the whole store: the sum over all pairs does not depend on
/// their order, and is kept up to date by adding and subtracting. It guards against loss and
/// accident, not against a forger, who could as well rewrite the manifest.
pub(super) fn pair_digest(key: &Key, envelope: &[u8]) -> u64 {
    let whole = crc32c::crc32c_append(crc32c::crc32c(key.as_bytes()), envelope);
    let mut mixed = u64::from(whole) << 32 | u64::from(crc32c::crc32c(envelope));
    // The finalizer of MurmurHash3: checksums are linear, and sums of linear values could cancel.
    mixed ^= mixed >> 33;
    mixed = mixed.wrapping_mul(0xff51_afd7_ed55_8ccd);
    mixed ^= mixed >> 33;
    mixed = mixed.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    mixed ^ (mixed >> 33)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_newer_version_is_told_from_damage() {
        let key = Key::boot_id();
        let mut bytes = seal(&key, 7, b"payload");
        bytes[5] = 2;
        assert!(matches!(open(&key, &bytes), Err(Fault::Damaged(_))));
        let end = bytes.len() - TRAILER;
        let crc = crc32c::crc32c(&bytes[..end]);
        bytes[end..].copy_from_slice(&crc.to_be_bytes());
        assert!(matches!(open(&key, &bytes), Err(Fault::Newer(_))));
    }

    #[test]
    fn a_value_under_a_foreign_key_is_damage() {
        let bytes = seal(&Key::boot_id(), 7, b"payload");
        assert!(matches!(
            open(&Key::manifest(), &bytes),
            Err(Fault::Damaged(_))
        ));
    }

    proptest! {
        #[test]
        fn round_trips(sequence: u64, payload in proptest::collection::vec(any::<u8>(), 0..300)) {
            let key = Key::manifest();
            let bytes = seal(&key, sequence, &payload);
            prop_assert_eq!(open(&key, &bytes), Ok((sequence, payload.as_slice())));
        }

        #[test]
        fn every_change_of_bits_and_every_cut_is_seen(
            payload in proptest::collection::vec(any::<u8>(), 0..300),
            at: proptest::sample::Index, flip in 1u8.., cut: proptest::sample::Index,
        ) {
            let key = Key::manifest();
            let whole = seal(&key, 9, &payload);
            let mut flipped = whole.clone();
            *at.get_mut(&mut flipped) ^= flip;
            prop_assert!(matches!(open(&key, &flipped), Err(Fault::Damaged(_))));
            prop_assert!(matches!(open(&key, &whole[..cut.index(whole.len())]), Err(Fault::Damaged(_))));
        }

        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            prop_assert!(open(&Key::boot_id(), &bytes).is_err());
        }
    }
}
