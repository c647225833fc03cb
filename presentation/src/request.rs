//! What every request may carry in its headers: its id, by which a caller's complaint is found in the
//! log, and the key that the caller shows.

use axum::http::{HeaderMap, HeaderValue, header};
use ghost_domain::RequestId;

/// The header with the caller's (or our) id of a request.
pub const REQUEST_ID: &str = "x-request-id";

/// The id of a request on its way to a use case that writes it down.
#[derive(Clone, Debug)]
pub(crate) struct CalledAs(pub(crate) String);

/// The caller's id of the request where it is a sane one, or a new one.
pub fn request_id(headers: &HeaderMap) -> String {
    headers
        .get(REQUEST_ID)
        .and_then(|value| value.to_str().ok())
        .and_then(|text| RequestId::new(text).ok())
        .map_or_else(
            || uuid::Uuid::new_v4().to_string(),
            |id| id.as_str().to_owned(),
        )
}

/// The key or token of `Authorization: Bearer KEY` or `X-API-Key: KEY`.
pub fn shown_key(headers: &HeaderMap) -> Option<String> {
    let text = |value: &HeaderValue| value.to_str().ok().map(str::trim).map(str::to_owned);
    let bearer = headers
        .get(header::AUTHORIZATION)
        .and_then(text)
        .and_then(|value| {
            let (scheme, key) = value.split_once(' ')?;
            scheme
                .eq_ignore_ascii_case("bearer")
                .then(|| key.trim().to_owned())
        });
    bearer.or_else(|| headers.get("x-api-key").and_then(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_callers_request_id_is_kept_only_where_it_is_sane() {
        let mut headers = HeaderMap::new();
        let made = |headers: &HeaderMap| uuid::Uuid::parse_str(&request_id(headers)).is_ok();
        assert!(made(&headers));
        headers.insert(REQUEST_ID, HeaderValue::from_static("abc-1"));
        assert_eq!(request_id(&headers), "abc-1");
        let long = "x".repeat(129);
        for bad in ["", "a b", "\u{e9}", &long] {
            headers.insert(REQUEST_ID, HeaderValue::from_str(bad).unwrap());
            assert!(made(&headers), "{bad:?}");
        }
    }
}
