//! The token that an agent gives out: `ghost-join-v1.<id>.<secret>.<fingerprint of its CA>`.

use std::fmt;

use rustls_pki_types::CertificateDer;
use sha2::{Digest, Sha256};

use crate::errors::{ErrorCode, Failure};

/// SHA-256 over the DER of a CA certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fingerprint(pub(crate) [u8; 32]);

/// A token, as text for the agent and with the one part that is for us.
pub(crate) struct Token {
    /// The whole of it.
    pub(crate) text: String,
    /// Whom we speak to.
    pub(crate) authority: Fingerprint,
}

impl Fingerprint {
    /// That of a certificate.
    pub(crate) fn of(certificate: &CertificateDer<'_>) -> Self {
        Self(Sha256::digest(certificate).into())
    }

    fn parse(text: &str) -> Option<Self> {
        // `from_str_radix` would take a sign.
        if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            let pair = std::str::from_utf8(pair).ok()?;
            *byte = u8::from_str_radix(pair, 16).ok()?;
        }
        Some(Self(bytes))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl Token {
    /// Reads what a person pasted.
    pub(crate) fn parse(text: &str) -> Result<Self, Failure> {
        let text = text.trim();
        let parts: Vec<&str> = text.split('.').collect();
        let authority = match parts.as_slice() {
            ["ghost-join-v1", id, secret, fingerprint] if !id.is_empty() && !secret.is_empty() => {
                Fingerprint::parse(fingerprint)
            }
            _ => None,
        };
        // The token is a secret: it is not repeated in the message.
        authority
            .map(|authority| Self {
                text: text.to_owned(),
                authority,
            })
            .ok_or_else(|| {
                Failure::new(ErrorCode::TokenInvalid, "that is not a token")
                    .because("a token has four parts with dots between them, ghost-join-v1 first")
                    .hint("on the agent's host: ghostctl trust token --role operator")
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_read_whole_or_not_at_all() {
        let fingerprint = "0f".repeat(32);
        let text = format!(" ghost-join-v1.id.secret.{fingerprint}\n");
        let token = Token::parse(&text).unwrap();
        assert_eq!(token.text, text.trim());
        assert_eq!(token.authority.to_string(), fingerprint);
        for bad in [
            String::new(),
            "ghost-join-v1.id.secret".to_owned(),
            format!("ghost-join-v2.id.secret.{fingerprint}"),
            format!("ghost-join-v1..secret.{fingerprint}"),
            format!("ghost-join-v1.id.secret.{}", "0g".repeat(32)),
            format!("ghost-join-v1.id.secret.{}", "+f".repeat(32)),
            format!("ghost-join-v1.id.secret.{}é", "0".repeat(62)),
            format!("ghost-join-v1.id.secret.{fingerprint}.x"),
        ] {
            let failure = Token::parse(&bad).err().unwrap();
            assert_eq!(failure.exit(), crate::errors::Exit::Denied, "{bad}");
            assert!(!format!("{failure:?}").contains("secret"), "{bad}");
        }
    }
}
