//! What of a call's metadata goes on, and what Core puts there.

use axum::http::response::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use ghost_domain::{Error, ErrorCode, Result};
use ghost_proto::core::metadata;

use super::{Onward, Target};
use crate::domain::Caller;

/// The caller's (or our) id of a request.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const API_KEY: HeaderName = HeaderName::from_static("x-api-key");
/// All metadata that Core and agents say to each other begins so.
const OURS: &str = "ghost-";

/// What belongs to the caller's connection, or proves who it is to Core and to nobody else.
pub(in crate::presentation) fn stays_here(name: &HeaderName) -> bool {
    const LOCAL: [HeaderName; 12] = [
        header::AUTHORIZATION,
        header::PROXY_AUTHORIZATION,
        header::COOKIE,
        header::HOST,
        header::CONNECTION,
        header::TE,
        header::TRAILER,
        header::TRANSFER_ENCODING,
        header::UPGRADE,
        header::FORWARDED,
        header::ACCEPT_ENCODING,
        API_KEY,
    ];
    let text = name.as_str();
    LOCAL.contains(name)
        || text.starts_with(OURS)
        || text.starts_with("x-forwarded-")
        || matches!(text, "keep-alive" | "proxy-connection")
}

pub(in crate::presentation) fn strip(headers: &mut HeaderMap, gone: impl Fn(&HeaderName) -> bool) {
    let names: Vec<HeaderName> = headers.keys().filter(|name| gone(name)).cloned().collect();
    for name in names {
        headers.remove(name);
    }
}

/// A name as metadata: printable ASCII as it is, all else and `%` percent-encoded (as gRPC does for
/// `grpc-message`), so that two names are never the same on the wire.
pub(in crate::presentation) fn encoded(text: &str) -> Result<HeaderValue> {
    use std::fmt::Write;
    let mut written = String::with_capacity(text.len());
    for byte in text.bytes() {
        if (byte.is_ascii_graphic() || byte == b' ') && byte != b'%' {
            written.push(char::from(byte));
        } else {
            let _ = write!(written, "%{byte:02X}");
        }
    }
    HeaderValue::from_str(&written)
        .map_err(|cause| Error::internal("a name cannot be written as metadata").because(cause))
}

/// Says who calls.
pub(in crate::presentation) fn vouch(
    headers: &mut HeaderMap,
    caller: &Caller,
    request_id: &str,
) -> Result<()> {
    headers.insert(metadata::PRINCIPAL, encoded(&caller.full_name())?);
    headers.insert(
        metadata::ROLE,
        HeaderValue::from_static(caller.role.as_str()),
    );
    if let Some(tenant) = &caller.tenant {
        headers.insert(metadata::TENANT, encoded(tenant.as_str())?);
    }
    headers.insert(REQUEST_ID, encoded(request_id)?);
    Ok(())
}

/// Makes a caller's metadata that of the call to the host.
pub(super) fn towards_host(headers: &mut HeaderMap, onward: &Onward<'_>) -> Result<()> {
    strip(headers, stays_here);
    // Without it a gRPC server may take the client for a proxy that loses trailers.
    headers.insert(header::TE, HeaderValue::from_static("trailers"));
    vouch(headers, onward.caller, onward.request_id)?;
    if let Target::Replica { .. } = onward.target {
        headers.insert(metadata::HOST, encoded(&onward.host.to_string())?);
        headers.insert(metadata::FORWARDED, HeaderValue::from_static("1"));
    }
    Ok(())
}

/// Takes out of a host's answer what only Core may say.
pub(in crate::presentation) fn from_host(headers: &mut HeaderMap) {
    strip(headers, |name| {
        let text = name.as_str();
        text.starts_with(OURS)
            || *name == header::CONNECTION
            || *name == header::TRANSFER_ENCODING
            || *name == header::SET_COOKIE
    });
}

/// Refuses an answer that is none of gRPC: passed on, it would look like one of Core's.
pub(super) fn check_answer(parts: &Parts, host: &str) -> Result<()> {
    let grpc = parts
        .headers
        .get(header::CONTENT_TYPE)
        .and_then(|kind| kind.to_str().ok())
        .is_some_and(|kind| kind.starts_with("application/grpc"));
    if parts.status == StatusCode::OK && grpc {
        return Ok(());
    }
    Err(Error::new(
        ErrorCode::AgentUnreachable,
        format!("the host {host} does not answer as an agent does"),
    )
    .because(format!("its answer is HTTP {}", parts.status.as_u16()))
    .hint("look at the agent's version and log on that host"))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use ghost_domain::{HostId, Role, TenantName};
    use ghost_presentation::Shape;

    use super::*;
    use crate::domain::CallerSource;

    fn caller(name: &str) -> Caller {
        Caller {
            name: name.into(),
            user: None,
            tenant: Some(TenantName::new("acme").unwrap()),
            role: Role::Operator,
            hosts: None,
            source: CallerSource::Certificate,
        }
    }

    static SENT: AtomicBool = AtomicBool::new(false);

    fn onward(caller: &Caller, target: Target) -> Onward<'_> {
        Onward {
            target,
            host: HostId::random(),
            host_name: "pc",
            caller,
            request_id: "r-1",
            shape: Shape::Unary,
            sent: &SENT,
            repeatable: false,
        }
    }

    #[test]
    fn nobody_says_who_they_are_by_metadata() {
        let mut headers = HeaderMap::new();
        for name in [
            "authorization",
            "x-api-key",
            "cookie",
            "ghost-principal",
            "ghost-role",
            "ghost-tenant",
            "ghost-host",
            "ghost-forwarded",
            "ghost-anything-new",
            "x-forwarded-for",
            "forwarded",
            "connection",
        ] {
            headers.append(name, HeaderValue::from_static("admin"));
        }
        for name in [
            "content-type",
            "grpc-timeout",
            "traceparent",
            "my-own",
            "user-agent",
        ] {
            headers.append(name, HeaderValue::from_static("kept"));
        }
        // One more of the same name does not slip through.
        headers.append("ghost-role", HeaderValue::from_static("admin"));
        let who = caller("alice");
        towards_host(&mut headers, &onward(&who, Target::Host(HostId::random()))).unwrap();
        let mut left: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(
            left,
            [
                "content-type",
                "ghost-principal",
                "ghost-role",
                "ghost-tenant",
                "grpc-timeout",
                "my-own",
                "te",
                "traceparent",
                "user-agent",
                "x-request-id",
            ]
        );
        assert_eq!(headers["ghost-principal"], "acme/alice");
        assert_eq!(headers["ghost-role"], "operator");
        assert_eq!(headers.get_all("ghost-role").iter().count(), 1);
        assert_eq!(headers["ghost-tenant"], "acme");
        assert_eq!(headers["x-request-id"], "r-1");
    }

    #[test]
    fn a_replica_learns_which_host_and_that_it_is_the_last() {
        let who = caller("bob");
        let target = Target::Replica {
            name: "b".into(),
            address: "b:7443".into(),
        };
        let onward = onward(&who, target);
        let mut headers = HeaderMap::new();
        towards_host(&mut headers, &onward).unwrap();
        assert_eq!(headers["ghost-host"], onward.host.to_string());
        assert_eq!(headers["ghost-forwarded"], "1");
    }

    #[test]
    fn any_name_becomes_one_value() {
        assert_eq!(encoded("a b@c").unwrap(), "a b@c");
        assert_eq!(encoded("jörg\r\n%").unwrap(), "j%C3%B6rg%0D%0A%25");
    }

    #[test]
    fn a_host_cannot_speak_for_core() {
        let mut headers = HeaderMap::new();
        headers.insert("ghost-placement", HeaderValue::from_static("here"));
        headers.insert("grpc-status", HeaderValue::from_static("0"));
        from_host(&mut headers);
        assert_eq!(headers.len(), 1);
    }
}
