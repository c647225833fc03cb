//! Reading a client's certificate.

use ghost_domain::{CredentialId, Error, ErrorCode, Result, Role, Timestamp};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// The start of the URI by which a client certificate names its holder.
pub(super) const CLIENT_URI: &str = "ghost://client/";

/// What a client certificate says of its holder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientIdentity {
    /// The credential, by which the records know whether it was revoked.
    pub credential: CredentialId,
    /// The role at the time of issue.
    pub role: Role,
    /// The name that the holder gave; text of a stranger, escape before showing.
    pub name: String,
    /// The certificate's serial number, lower-case hexadecimal digits.
    pub serial: String,
    /// When the certificate ends.
    pub expires_at: Timestamp,
}

/// Reads the identity out of a client certificate of ours (DER). It must have exactly one subject
/// alternative name, the URI `ghost://client/<role>/<credential id>`.
///
/// This reads and does not verify: the certificate's signature, its time and its purpose were
/// checked by the TLS handshake.
///
/// # Errors
/// [`ErrorCode::Unauthenticated`] for everything that we would not have issued.
pub fn parse_client_identity(der: &[u8]) -> Result<ClientIdentity> {
    let refused = |why: &str| {
        Error::new(
            ErrorCode::Unauthenticated,
            "the client certificate is not one of this agent",
        )
        .because(why)
        .hint("get a certificate: ghostctl context add NAME --endpoint … --token …")
    };
    let (rest, certificate) =
        X509Certificate::from_der(der).map_err(|_| refused("it is not an X.509 certificate"))?;
    if !rest.is_empty() {
        return Err(refused("something follows it"));
    }
    let names = certificate
        .subject_alternative_name()
        .map_err(|_| refused("its alternative names cannot be read"))?
        .ok_or_else(|| refused("it has no alternative name"))?;
    let [GeneralName::URI(uri)] = names.value.general_names.as_slice() else {
        return Err(refused("it names something else than one client"));
    };
    let (role, credential) = uri
        .strip_prefix(CLIENT_URI)
        .and_then(|rest| rest.split_once('/'))
        .ok_or_else(|| refused("its name is not that of a client"))?;
    let role: Role = role
        .parse()
        .map_err(|_| refused("its role is not one of ours"))?;
    let id: CredentialId = credential
        .parse()
        .map_err(|_| refused("its credential id is not a UUID"))?;
    // Other spellings of the same UUID are not what we write.
    if id.to_string() != credential {
        return Err(refused("its credential id is not in our spelling"));
    }
    let name = certificate
        .subject()
        .iter_common_name()
        .next()
        .and_then(|name| name.as_str().ok())
        .ok_or_else(|| refused("it has no common name"))?;
    Ok(ClientIdentity {
        credential: id,
        role,
        name: name.to_owned(),
        serial: hex::encode(certificate.raw_serial()),
        expires_at: Timestamp::from_unix_millis(
            certificate
                .validity()
                .not_after
                .timestamp()
                .saturating_mul(1000),
        ),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn garbage_is_refused_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            prop_assert_eq!(parse_client_identity(&bytes).unwrap_err().code(), ErrorCode::Unauthenticated);
        }
    }
}
