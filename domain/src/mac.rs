//! MAC addresses. A VM's address belongs to its record, so that it survives every restart.

use std::fmt;
use std::str::FromStr;

use crate::{Error, ErrorCode};

/// A 48-bit Ethernet address, written in lower case with colons.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddress([u8; 6]);

impl MacAddress {
    /// A random address under `52:54:00`, the prefix QEMU and libvirt use for guests.
    pub fn random() -> Self {
        let random = uuid::Uuid::new_v4();
        let bytes = random.as_bytes();
        Self([0x52, 0x54, 0x00, bytes[0], bytes[1], bytes[2]])
    }

    /// The six octets.
    pub const fn octets(self) -> [u8; 6] {
        self.0
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddress {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = || {
            Error::new(
                ErrorCode::InvalidArgument,
                format!(
                    "{text:?} is not a MAC address (expected six pairs such as 52:54:00:12:34:56)"
                ),
            )
        };
        let mut octets = [0u8; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part = parts.next().ok_or_else(bad)?;
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(bad());
            }
            *octet = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        // A set lowest bit marks a multicast address, which no network card may own (IEEE 802).
        if parts.next().is_some() || octets[0] & 1 == 1 {
            return Err(bad());
        }
        Ok(Self(octets))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips_and_refuses_multicast() {
        let mac = MacAddress::random();
        assert_eq!(mac.to_string().parse::<MacAddress>().unwrap(), mac);
        for bad in [
            "",
            "52:54:00:00:00",
            "53:54:00:00:00:00",
            "52-54-00-00-00-00",
            "52:54:00:00:00:0g",
        ] {
            assert!(bad.parse::<MacAddress>().is_err(), "{bad}");
        }
    }
}
