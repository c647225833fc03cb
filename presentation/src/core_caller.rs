//! Who calls through Ghost Core: the metadata that Core puts on each call it forwards.
//!
//! It is believed on streams of this host's own link to Core, and on no other connection: there it
//! is taken off before anything looks at the request.

use axum::http::{HeaderMap, HeaderName};
use ghost_domain::fleet::FleetPrincipal;
use ghost_domain::{Error, ErrorCode, Result, Role, TenantName};
use ghost_proto::core::metadata;

/// Everything that only Core may say.
const SAID_BY_CORE: [&str; 3] = [metadata::PRINCIPAL, metadata::ROLE, metadata::TENANT];

/// Takes off what only Core may say.
pub(crate) fn strip(headers: &mut HeaderMap) {
    for name in SAID_BY_CORE {
        headers.remove(HeaderName::from_static(name));
    }
}

/// Reads whom Core vouches for.
///
/// # Errors
/// `Unauthenticated` where it names nobody, or says it twice, or what it says is not a role or a
/// tenant.
pub(crate) fn read(headers: &HeaderMap) -> Result<FleetPrincipal> {
    let refused = |cause: &'static str| {
        Error::new(
            ErrorCode::Unauthenticated,
            "Ghost Core does not say who calls",
        )
        .because(cause)
        .hint("update Ghost Core")
    };
    let said = |name: &'static str| -> Result<Option<String>> {
        let mut values = headers.get_all(HeaderName::from_static(name)).iter();
        match (values.next(), values.next()) {
            (None, _) => Ok(None),
            (Some(only), None) => only
                .to_str()
                .map(|text| Some(text.to_owned()))
                .map_err(|_| refused("it is not ASCII")),
            (Some(_), Some(_)) => Err(refused("it says it twice")),
        }
    };
    let name = said(metadata::PRINCIPAL)?
        .filter(|name| !name.is_empty())
        .ok_or_else(|| refused("ghost-principal is missing"))?;
    let role: Role = said(metadata::ROLE)?
        .ok_or_else(|| refused("ghost-role is missing"))?
        .parse()
        .map_err(|_| refused("ghost-role is no role"))?;
    let tenant = said(metadata::TENANT)?
        .filter(|tenant| !tenant.is_empty())
        .map(|tenant| TenantName::new(tenant).map_err(|_| refused("ghost-tenant is no tenant")))
        .transpose()?;
    Ok(FleetPrincipal { name, tenant, role })
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn headers(all: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in all {
            headers.append(*name, HeaderValue::from_static(value));
        }
        headers
    }

    #[test]
    fn whom_core_names_is_read_or_refused_and_never_guessed() {
        let good = headers(&[
            ("ghost-principal", "acme/alice"),
            ("ghost-role", "operator"),
            ("ghost-tenant", "acme"),
        ]);
        let caller = read(&good).unwrap();
        assert_eq!(
            (caller.name.as_str(), caller.role),
            ("acme/alice", Role::Operator)
        );
        assert_eq!(caller.tenant.unwrap().as_str(), "acme");
        let core_admin = headers(&[("ghost-principal", "root"), ("ghost-role", "admin")]);
        assert_eq!(read(&core_admin).unwrap().tenant, None);
        for bad in [
            headers(&[]),
            headers(&[("ghost-principal", "a")]),
            headers(&[("ghost-role", "admin")]),
            headers(&[("ghost-principal", ""), ("ghost-role", "admin")]),
            headers(&[("ghost-principal", "a"), ("ghost-role", "root")]),
            headers(&[
                ("ghost-principal", "a"),
                ("ghost-principal", "b"),
                ("ghost-role", "admin"),
            ]),
            headers(&[
                ("ghost-principal", "a"),
                ("ghost-role", "viewer"),
                ("ghost-role", "admin"),
            ]),
            headers(&[
                ("ghost-principal", "a"),
                ("ghost-role", "viewer"),
                ("ghost-tenant", "--"),
            ]),
        ] {
            assert_eq!(
                read(&bad).unwrap_err().code(),
                ErrorCode::Unauthenticated,
                "{bad:?}"
            );
        }
        let mut stripped = good;
        strip(&mut stripped);
        assert!(stripped.is_empty());
    }
}
