//! Sizes in bytes, as people write them and as records hold them.

use std::fmt;
use std::str::FromStr;

use crate::{Error, ErrorCode};

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ByteSize(u64);

const UNITS: [(&str, u64); 4] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
];

impl ByteSize {
    /// No bytes at all.
    pub const ZERO: Self = Self(0);

    /// From a number of bytes.
    pub const fn from_bytes(bytes: u64) -> Self {
        Self(bytes)
    }

    /// From mebibytes (2^20 bytes); saturates.
    pub const fn from_mib(mib: u64) -> Self {
        Self(mib.saturating_mul(1 << 20))
    }

    /// From gibibytes (2^30 bytes); saturates.
    pub const fn from_gib(gib: u64) -> Self {
        Self(gib.saturating_mul(1 << 30))
    }

    /// The number of bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// The sum, at most `u64::MAX` bytes.
    pub const fn saturating_add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }

    /// The difference, at least zero.
    pub const fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

impl std::iter::Sum for ByteSize {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        iter.fold(Self::ZERO, Self::saturating_add)
    }
}

impl fmt::Display for ByteSize {
    /// Binary units with at most one decimal: `512 MiB`, `1.5 GiB`, `0 B`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = UNITS.iter().find(|(_, unit)| self.0 >= *unit).map_or_else(
            || format!("{} B", self.0),
            |(name, unit)| {
                let tenths = u128::from(self.0) * 10 / u128::from(*unit);
                if tenths.is_multiple_of(10) {
                    format!("{} {name}", tenths / 10)
                } else {
                    format!("{}.{} {name}", tenths / 10, tenths % 10)
                }
            },
        );
        f.pad(&text)
    }
}

impl FromStr for ByteSize {
    type Err = Error;

    /// Reads `2GiB`, `512 MiB`, `10G` (binary, as in QEMU's tools), `1GB` (decimal) or plain bytes.
    fn from_str(text: &str) -> Result<Self, Error> {
        let trimmed = text.trim();
        let bad = || {
            Error::new(
                ErrorCode::InvalidSize,
                format!("{text:?} is not a size"),
            )
            .because("a whole or decimal number with B, KiB, MiB, GiB, TiB, KB, MB, GB or TB is expected")
            .hint("write for example 512MiB, 2GiB or 1.5GiB")
        };
        let split = trimmed
            .find(|c: char| !(c.is_ascii_digit() || c == '.'))
            .unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(split);
        let unit = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1u64,
            "k" | "ki" | "kib" => 1 << 10,
            "m" | "mi" | "mib" => 1 << 20,
            "g" | "gi" | "gib" => 1 << 30,
            "t" | "ti" | "tib" => 1 << 40,
            "kb" => 1_000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            "tb" => 1_000_000_000_000,
            _ => return Err(bad()),
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() || fraction.len() > 9 || number.ends_with('.') {
            return Err(bad());
        }
        let whole: u64 = whole.parse().map_err(|_| bad())?;
        let mut bytes = whole.checked_mul(unit).ok_or_else(bad)?;
        if !fraction.is_empty() {
            let numerator: u128 = fraction.parse().map_err(|_| bad())?;
            let denominator = 10u128.pow(u32::try_from(fraction.len()).map_err(|_| bad())?);
            let part = numerator * u128::from(unit) / denominator;
            bytes = bytes
                .checked_add(u64::try_from(part).map_err(|_| bad())?)
                .ok_or_else(bad)?;
        }
        Ok(Self(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_what_people_write() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("2GiB", 2 << 30),
            ("2 gib", 2 << 30),
            ("10G", 10 << 30),
            ("1.5GiB", 3 << 29),
            ("1GB", 1_000_000_000),
        ] {
            assert_eq!(text.parse::<ByteSize>().unwrap().bytes(), bytes, "{text}");
        }
        for bad in [
            "",
            "-1",
            "1XB",
            "GiB",
            "1.",
            "99999999999TiB",
            "1e3",
            "0x10",
        ] {
            let error = bad.parse::<ByteSize>().unwrap_err();
            assert_eq!(error.code(), ErrorCode::InvalidSize, "{bad}");
        }
    }

    #[test]
    fn shows_binary_units() {
        assert_eq!(ByteSize::from_bytes(0).to_string(), "0 B");
        assert_eq!(ByteSize::from_mib(1536).to_string(), "1.5 GiB");
        assert_eq!(ByteSize::from_gib(2).to_string(), "2 GiB");
    }

    proptest! {
        #[test]
        fn never_panics(text in "\\PC{0,24}") {
            let _ = text.parse::<ByteSize>();
        }

        #[test]
        fn plain_bytes_round_trip(bytes: u64) {
            prop_assert_eq!(bytes.to_string().parse::<ByteSize>().unwrap().bytes(), bytes);
        }
    }
}
