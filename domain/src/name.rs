//! Names that people choose. Each is checked once, here, so that no other layer needs to doubt it:
//! none can carry markup, a path or a control character into XML, YAML, a file name or a terminal.

use std::fmt;
use std::str::FromStr;

use crate::{Error, ErrorCode};

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $what:literal, $max:literal, $extra:expr, $rule:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(String);

        impl $name {
            /// Checks and wraps a name.
            ///
            /// # Errors
            /// [`ErrorCode::InvalidName`] with the rule that was broken.
            pub fn new(text: impl Into<String>) -> Result<Self, Error> {
                let text = text.into();
                let extra: &[u8] = $extra;
                let bytes = text.as_bytes();
                let first_ok = bytes
                    .first()
                    .is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
                let rest_ok = bytes
                    .iter()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || extra.contains(b));
                if !first_ok || !rest_ok || bytes.len() > $max {
                    return Err(Error::new(
                        ErrorCode::InvalidName,
                        format!(concat!("{:?} is not a legal ", $what, " name"), text),
                    )
                    .because($rule)
                    .field("name", $rule));
                }
                Ok(Self(text))
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = Error;

            fn from_str(text: &str) -> Result<Self, Error> {
                Self::new(text)
            }
        }
    };
}

name_type!(
    /// A VM's name, unique on its host and usable as a host name (RFC 1123 label):
    /// `^[a-z0-9][a-z0-9-]{0,62}$`.
    VmName, "VM", 63, b"-",
    "1 to 63 of a-z, 0-9 and '-', starting with a letter or digit"
);
name_type!(
    /// An image's name in the cache or the catalogue: `^[a-z0-9][a-z0-9._-]{0,62}$`.
    ImageName, "image", 63, b"-._",
    "1 to 63 of a-z, 0-9, '-', '.' and '_', starting with a letter or digit"
);
name_type!(
    /// A network's name: `^[a-z0-9][a-z0-9-]{0,31}$`.
    NetworkName, "network", 32, b"-",
    "1 to 32 of a-z, 0-9 and '-', starting with a letter or digit"
);
name_type!(
    /// A host's name in its tenant's fleet: `^[a-z0-9][a-z0-9-]{0,62}$`.
    HostName, "host", 63, b"-",
    "1 to 63 of a-z, 0-9 and '-', starting with a letter or digit"
);
/// A tenant's name: `^[a-z0-9][a-z0-9-]{0,31}$` without `--`, which parts tenant and host in an
/// endpoint of Piko.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TenantName(String);

impl TenantName {
    /// The tenant of hosts and people for whom nobody named one.
    pub const DEFAULT: &'static str = "default";

    /// Checks and wraps a name.
    ///
    /// # Errors
    /// [`ErrorCode::InvalidName`] with the rule that was broken.
    pub fn new(text: impl Into<String>) -> Result<Self, Error> {
        let text = text.into();
        let rule = "1 to 32 of a-z, 0-9 and single '-', starting with a letter or digit";
        let first_ok = text
            .bytes()
            .next()
            .is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        let rest_ok = text
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        if !first_ok || !rest_ok || text.len() > 32 || text.contains("--") {
            return Err(Error::new(
                ErrorCode::InvalidName,
                format!("{text:?} is not a legal tenant name"),
            )
            .because(rule)
            .field("tenant", rule));
        }
        Ok(Self(text))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TenantName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for TenantName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::new(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn rejects_what_could_escape() {
        for bad in [
            "",
            "-a",
            "A",
            "a b",
            "a/b",
            "a\0",
            "é",
            "</name>",
            "..",
            &"a".repeat(64),
        ] {
            let error = VmName::new(bad).unwrap_err();
            assert_eq!(error.code(), ErrorCode::InvalidName, "{bad:?}");
        }
        assert!(ImageName::new("../etc").is_err());
        assert!(ImageName::new("debian-12.5_a").is_ok());
    }

    proptest! {
        #[test]
        fn accepts_exactly_the_rule(text in "\\PC{0,70}") {
            let legal = !text.is_empty() && text.len() <= 63 && !text.starts_with('-')
                && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
            prop_assert_eq!(VmName::new(text).is_ok(), legal);
        }
    }
}
