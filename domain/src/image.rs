//! Images: what a VM's disk starts from. Content-addressed in the cache; names point at content.

use std::fmt;
use std::str::FromStr;

use crate::{ByteSize, Error, ErrorCode, ImageName, Timestamp};

/// SHA-256 of an image file as it lies in the cache.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ImageDigest([u8; 32]);

impl ImageDigest {
    /// Wraps a computed SHA-256.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes.
    pub const fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for ImageDigest {
    /// 64 lower-case hexadecimal digits.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ImageDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{self}")
    }
}

impl FromStr for ImageDigest {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bytes = decode_hex(text.strip_prefix("sha256:").unwrap_or(text))
            .and_then(|bytes| <[u8; 32]>::try_from(bytes).ok());
        bytes.map(Self).ok_or_else(|| {
            Error::new(
                ErrorCode::InvalidArgument,
                format!("{text:?} is not a SHA-256 digest (64 hexadecimal digits)"),
            )
        })
    }
}

fn decode_hex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.is_ascii() {
        return None;
    }
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(text.get(at..at + 2)?, 16).ok())
        .collect()
}

/// Hash algorithms that catalogues of official images publish.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChecksumAlgorithm {
    /// SHA-256 (FIPS 180-4), 32 bytes.
    Sha256,
    /// SHA-512 (FIPS 180-4), 64 bytes.
    Sha512,
}

impl ChecksumAlgorithm {
    /// `sha256` or `sha512`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }

    /// Length of a digest in bytes.
    pub const fn digest_length(self) -> usize {
        match self {
            Self::Sha256 => 32,
            Self::Sha512 => 64,
        }
    }
}

/// The expected hash of the bytes of a download, before any decompression.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Checksum {
    algorithm: ChecksumAlgorithm,
    digest: Vec<u8>,
}

impl Checksum {
    /// From an algorithm and a digest of its length.
    ///
    /// # Errors
    /// [`ErrorCode::InvalidArgument`] when the digest has another length.
    pub fn new(algorithm: ChecksumAlgorithm, digest: Vec<u8>) -> Result<Self, Error> {
        if digest.len() != algorithm.digest_length() {
            return Err(Error::new(
                ErrorCode::InvalidArgument,
                format!(
                    "a {} digest has {} bytes",
                    algorithm.as_str(),
                    algorithm.digest_length()
                ),
            ));
        }
        Ok(Self { algorithm, digest })
    }

    /// The algorithm.
    pub const fn algorithm(&self) -> ChecksumAlgorithm {
        self.algorithm
    }

    /// The digest's bytes.
    pub fn digest(&self) -> &[u8] {
        &self.digest
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.algorithm.as_str())?;
        self.digest
            .iter()
            .try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for Checksum {
    type Err = Error;

    /// Reads `sha256:…`, `sha512:…` or bare hexadecimal digits of either length.
    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = || {
            Error::new(
                ErrorCode::InvalidArgument,
                format!("{text:?} is not a checksum"),
            )
            .because("sha256: and 64, or sha512: and 128 hexadecimal digits are expected")
        };
        let (algorithm, hex) = match text.split_once(':') {
            Some(("sha256", hex)) => (ChecksumAlgorithm::Sha256, hex),
            Some(("sha512", hex)) => (ChecksumAlgorithm::Sha512, hex),
            None if text.len() == 64 => (ChecksumAlgorithm::Sha256, text),
            None if text.len() == 128 => (ChecksumAlgorithm::Sha512, text),
            _ => return Err(bad()),
        };
        Self::new(algorithm, decode_hex(hex).ok_or_else(bad)?).map_err(|_| bad())
    }
}

/// Formats a cached image may have. Never guessed by a tool: our own header parser decides once,
/// and from then on the format comes from the record (threats T1 and T2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ImageFormat {
    /// Bytes of the disk as they are.
    Raw,
    /// QEMU copy-on-write, version 2 or 3, without backing or external data file.
    Qcow2,
}

impl ImageFormat {
    /// The name that QEMU's tools use.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// Where an image came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageOrigin {
    /// Downloaded from `url`, verified against `checksum`.
    Pulled {
        /// The address it was downloaded from.
        url: String,
        /// The checksum that the catalogue or the caller named.
        checksum: Checksum,
    },
    /// Brought by a person.
    Imported {
        /// The name of the file that was imported, without its folder.
        file_name: String,
    },
}

/// A named image in the host's cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Its name; unique on the host.
    pub name: ImageName,
    /// Its content: the file in the cache is found by this digest.
    pub digest: ImageDigest,
    /// Its format.
    pub format: ImageFormat,
    /// The size of the disk that a guest sees.
    pub virtual_size: ByteSize,
    /// The size of the file in the cache.
    pub file_size: ByteSize,
    /// Where it came from.
    pub origin: ImageOrigin,
    /// When it came into the cache.
    pub created_at: Timestamp,
    /// When a VM was last made from it, or else when it came; eviction takes the oldest.
    pub last_used_at: Timestamp,
}

/// Where the expected checksum of a catalogue entry is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChecksumSource {
    /// Written in the catalogue.
    Inline(Checksum),
    /// A published list of checksums (`SHA512SUMS`, Fedora's `CHECKSUM`, or one bare digest).
    Url {
        /// Where the list is.
        url: String,
        /// The algorithm of its digests.
        algorithm: ChecksumAlgorithm,
    },
}

/// An official image that can be pulled by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CatalogueEntry {
    /// The name to pull it by.
    pub name: ImageName,
    /// Other names for the same image, such as `debian` for the latest Debian.
    pub aliases: Vec<ImageName>,
    /// What it is, for people.
    pub description: String,
    /// The https address of the image file.
    pub url: String,
    /// Where its checksum is.
    pub checksum: ChecksumSource,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_read_with_their_length_checked() {
        let hex = "ab".repeat(32);
        let checksum: Checksum = format!("sha256:{hex}").parse().unwrap();
        assert_eq!(checksum.to_string(), format!("sha256:{hex}"));
        assert_eq!(
            "cd".repeat(64).parse::<Checksum>().unwrap().algorithm(),
            ChecksumAlgorithm::Sha512
        );
        for bad in [
            "",
            "sha256:",
            "md5:00",
            "sha512:abcd",
            &"zz".repeat(32),
            &"é".repeat(32),
        ] {
            assert!(bad.parse::<Checksum>().is_err(), "{bad}");
        }
        assert!(hex.parse::<ImageDigest>().is_ok());
    }
}
