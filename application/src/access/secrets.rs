//! Secrets that we make, and their hashes.

use std::collections::BTreeMap;

use ghost_domain::{CredentialId, Error, ErrorCode, Result, Secret};
use rand::TryRngCore;
use sha2::{Digest, Sha256};

/// 256 random bits from the system, as 64 hexadecimal digits.
pub(super) fn random() -> Result<Secret> {
    let mut bytes = [0u8; 32];
    rand::rngs::OsRng
        .try_fill_bytes(&mut bytes)
        .map_err(|failure| {
            Error::internal("the system gives no random numbers").because(failure)
        })?;
    Ok(Secret::new(
        bytes
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>(),
    ))
}

/// SHA-256; a slow hash would add nothing to 256 random bits.
pub(super) fn hash(secret: &str) -> [u8; 32] {
    Sha256::digest(secret.as_bytes()).into()
}

/// Compares without a shortcut. What is compared are hashes, of which an attacker cannot steer the
/// bytes, but there is no reason to tell even that much.
pub(super) fn equal(a: &[u8; 32], b: &[u8; 32]) -> bool {
    a.iter()
        .zip(b)
        .fold(0u8, |difference, (a, b)| difference | (a ^ b))
        == 0
}

/// A name for a holder, shown to people: bounded, printable.
pub(super) fn holder_name(name: &str) -> Result<String> {
    let legal =
        !name.is_empty() && name.chars().count() <= 64 && !name.chars().any(char::is_control);
    if !legal {
        return Err(Error::new(
            ErrorCode::InvalidArgument,
            "a name of 1 to 64 printable characters is needed",
        )
        .field("name", "1 to 64 printable characters"));
    }
    Ok(name.to_owned())
}

/// Finds a credential by full id or unique prefix.
pub(super) fn find<'a, T>(
    records: &'a BTreeMap<CredentialId, T>,
    selector: &str,
    what: &str,
    list: &str,
) -> Result<&'a T> {
    let selector = selector.to_ascii_lowercase();
    let mut matches = records
        .iter()
        .filter(|(id, _)| !selector.is_empty() && id.to_string().starts_with(&selector));
    match (matches.next(), matches.next()) {
        (Some((_, only)), None) => Ok(only),
        (Some(_), Some(_)) => Err(Error::new(
            ErrorCode::InvalidArgument,
            format!("{selector:?} matches more than one {what}"),
        )
        .hint(format!("give more of the id: {list}"))),
        (None, _) => Err(Error::new(
            ErrorCode::CredentialNotFound,
            format!("there is no {what} {selector:?}"),
        )
        .hint(format!("see which there are: {list}"))),
    }
}
