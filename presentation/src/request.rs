//! The id of a request, by which a caller's complaint is found in the log.

use axum::http::HeaderMap;
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

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

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
