//! Secrets that Core makes, and their hashes. Of a secret only the hash is kept.

use ghost_domain::{Error, Result, Secret};
use rand::TryRngCore;
use sha2::{Digest, Sha256};

/// 256 random bits from the system, as 64 hexadecimal digits.
///
/// # Errors
/// `Internal` where the system gives none.
pub fn random() -> Result<Secret> {
    let mut bytes = [0u8; 32];
    rand::rngs::OsRng
        .try_fill_bytes(&mut bytes)
        .map_err(|cause| Error::internal("the system gives no random numbers").because(cause))?;
    Ok(Secret::new(hex::encode(bytes)))
}

/// SHA-256; a slow hash would add nothing to 256 random bits.
pub fn hash(secret: &str) -> [u8; 32] {
    Sha256::digest(secret.as_bytes()).into()
}

/// Compares without a shortcut: how much of a hash is right is nobody's business.
pub fn equal(a: &[u8; 32], b: &[u8; 32]) -> bool {
    a.iter().zip(b).fold(0u8, |all, (a, b)| all | (a ^ b)) == 0
}
