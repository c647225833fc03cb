//! The token by which a host joins a fleet.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ghost_domain::{Error, ErrorCode, Result, Secret};

const PREFIX: &str = "ghost-host-v1";
/// Longer than any token that Core makes.
const MOST_BYTES: usize = 4096;
const MOST_ADDRESSES: usize = 16;

/// `ghost-host-v1.<base64url(addresses)>.<id>.<secret>.<fingerprint of Core's CA>`.
#[derive(Clone, Debug)]
pub(super) struct HostToken {
    /// The whole of it, as Core wants it.
    pub(super) text: Secret,
    /// Where Core is.
    pub(super) addresses: Vec<String>,
    /// SHA-256 of its CA.
    pub(super) fingerprint: [u8; 32],
}

impl HostToken {
    /// Reads a token as it was pasted.
    ///
    /// # Errors
    /// `TokenInvalid`, which says what is wrong and shows nothing of the token.
    pub(super) fn parse(text: &str) -> Result<Self> {
        let refused = |why: &str| {
            Error::new(ErrorCode::TokenInvalid, "that is not a token for a host")
                .because(why)
                .hint("make one on Core: ghost-core token create --tenant TENANT")
        };
        let text = text.trim();
        if text.len() > MOST_BYTES {
            return Err(refused("it is too long"));
        }
        let parts: Vec<&str> = text.split('.').collect();
        let [PREFIX, addresses, id, secret, fingerprint] = parts.as_slice() else {
            return Err(refused(
                "it has five parts with dots between them, ghost-host-v1 first",
            ));
        };
        if id.is_empty() || secret.is_empty() {
            return Err(refused("a part of it is empty"));
        }
        let addresses = URL_SAFE_NO_PAD
            .decode(addresses.trim_end_matches('='))
            .ok()
            .and_then(|bytes| String::from_utf8(bytes).ok())
            .ok_or_else(|| refused("its second part does not hold addresses"))?;
        let addresses: Vec<String> = addresses.split(',').map(str::to_owned).collect();
        if addresses.len() > MOST_ADDRESSES || !addresses.iter().all(|one| is_address(one)) {
            return Err(refused("its second part does not hold addresses host:port"));
        }
        let mut digest = [0; 32];
        hex::decode_to_slice(fingerprint, &mut digest)
            .map_err(|_| refused("its last part is not a SHA-256 fingerprint"))?;
        Ok(Self {
            text: Secret::new(text),
            addresses,
            fingerprint: digest,
        })
    }
}

/// Whether a text can be `host:port`. What it names is not asked here.
pub(super) fn is_address(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else {
        return false;
    };
    let host_ok = match host
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
    {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => {
            !host.is_empty()
                && host.len() <= 253
                && host
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
        }
    };
    host_ok && port.parse::<u16>().is_ok_and(|port| port != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(addresses: &str) -> String {
        format!(
            "ghost-host-v1.{}.id.secret.{}",
            URL_SAFE_NO_PAD.encode(addresses),
            "ab".repeat(32)
        )
    }

    #[test]
    fn a_token_names_core_and_keeps_its_secret() {
        let parsed =
            HostToken::parse(&format!(" {}\n", token("core:7443,[::1]:1,10.0.0.1:7443"))).unwrap();
        assert_eq!(parsed.addresses, ["core:7443", "[::1]:1", "10.0.0.1:7443"]);
        assert_eq!(parsed.fingerprint, [0xab; 32]);
        assert!(!format!("{parsed:?}").contains("secret."));
    }

    #[test]
    fn what_is_no_token_is_refused_without_showing_it() {
        for bad in [
            String::new(),
            "ghost-join-v1.a.b.c".to_owned(),
            token(""),
            token("core"),
            token("core:0"),
            token("core:99999"),
            token("a b:1"),
            token("[zz]:1"),
            token("core:1,").clone(),
            token("core:1").replace("secret", ""),
            token("core:1").replace("abab", "xx"),
            "x".repeat(5000),
        ] {
            let error = HostToken::parse(&bad).unwrap_err();
            assert_eq!(error.code(), ErrorCode::TokenInvalid, "{bad}");
            assert!(!error.to_string().contains("secret"), "{error}");
        }
    }
}
