//! Values that people write: sizes, durations, tags.

use std::time::Duration;

/// Reads `2GiB`, `512 MiB`, `10G` (binary, as in QEMU's tools), `1GB` (decimal) or plain bytes:
/// the same rule as the agent's.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let bad = || format!("{text:?} is not a size; write for example 512MiB, 2GiB or 1.5GiB");
    let trimmed = text.trim();
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
    let mut bytes = whole
        .parse::<u64>()
        .ok()
        .and_then(|whole| whole.checked_mul(unit))
        .ok_or_else(bad)?;
    if !fraction.is_empty() {
        let numerator: u128 = fraction.parse().map_err(|_| bad())?;
        let digits = u32::try_from(fraction.len()).map_err(|_| bad())?;
        let part = numerator * u128::from(unit) / 10u128.pow(digits);
        bytes = u64::try_from(part)
            .ok()
            .and_then(|part| bytes.checked_add(part))
            .ok_or_else(bad)?;
    }
    Ok(bytes)
}

/// A size that may not be zero: on the wire zero means the default, and nobody who writes 0 means
/// that.
pub(crate) fn positive_size(text: &str) -> Result<u64, String> {
    match size(text)? {
        0 => Err("it must be larger than zero".to_owned()),
        bytes => Ok(bytes),
    }
}

/// Reads `30s`, `5m`, `1h30m`, `500ms`, `2d`, or plain seconds.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let bad = || format!("{text:?} is not a duration; write for example 30s, 5m, 1h30m or 2d");
    let mut rest = text.trim();
    if rest.is_empty() {
        return Err(bad());
    }
    if rest.bytes().all(|b| b.is_ascii_digit()) {
        return rest.parse().map(Duration::from_secs).map_err(|_| bad());
    }
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let number: u64 = rest[..digits].parse().map_err(|_| bad())?;
        rest = &rest[digits..];
        let letters = rest.bytes().take_while(u8::is_ascii_alphabetic).count();
        let factor = match &rest[..letters] {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(bad()),
        };
        rest = &rest[letters..];
        let part = number.checked_mul(factor).ok_or_else(bad)?;
        total = total
            .checked_add(Duration::from_millis(part))
            .ok_or_else(bad)?;
    }
    // Protobuf's Duration ends at about 10,000 years.
    if total > Duration::from_secs(315_576_000_000) {
        return Err(bad());
    }
    Ok(total)
}

/// A span of history: the agent keeps a day.
pub(crate) fn history(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        Duration::ZERO => Err("it must be longer than zero".to_owned()),
        span if span > Duration::from_secs(86_400) => {
            Err("the history of the last 24h is kept".to_owned())
        }
        span => Ok(span),
    }
}

/// Reads `USER` or `USER:GROUP`, names or numbers.
pub(crate) fn user_and_group(text: &str) -> Result<(String, String), String> {
    let (user, group) = text.split_once(':').unwrap_or((text, ""));
    if user.is_empty() || group.contains(':') || text.ends_with(':') {
        return Err(format!("{text:?} is no user; write USER or USER:GROUP"));
    }
    Ok((user.to_owned(), group.to_owned()))
}

/// Reads `KEY=VALUE`, or `KEY` for what it is here.
pub(crate) fn variable(text: &str) -> Result<(String, Option<String>), String> {
    let (key, value) = match text.split_once('=') {
        Some((key, value)) => (key, Some(value.to_owned())),
        None => (text, None),
    };
    if key.is_empty() {
        return Err(format!("{text:?} is no variable; write KEY=VALUE or KEY"));
    }
    Ok((key.to_owned(), value))
}

/// Reads `key=value`.
pub(crate) fn tag(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("{text:?} is not a tag; write KEY=VALUE")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_the_agent_reads_them() {
        for text in [
            "0",
            "512",
            "2GiB",
            "2 gib",
            "10G",
            "1.5GiB",
            "1GB",
            "",
            "-1",
            "1XB",
            "GiB",
            "1.",
            "99999999999TiB",
            "1e3",
            "0x10",
            "1.9999999999GiB",
            "..",
            "18446744073709551615",
        ] {
            let agent = text.parse::<ghost_domain::ByteSize>();
            assert_eq!(
                size(text).ok(),
                agent.ok().map(|size| size.bytes()),
                "{text}"
            );
        }
        assert!(positive_size("0").is_err());
    }

    #[test]
    fn durations_are_what_people_write() {
        for (text, millis) in [
            ("30s", 30_000),
            ("45", 45_000),
            ("1h30m", 5_400_000),
            ("500ms", 500),
            ("2d", 172_800_000),
            ("0s", 0),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for bad in [
            "",
            "s",
            "3 weeks",
            "-1s",
            "1.5s",
            "99999999999999999999d",
            "9999999999d",
            "5é",
        ] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn users_and_variables_are_what_people_write() {
        let user = |user: &str, group: &str| Ok((user.to_owned(), group.to_owned()));
        assert_eq!(user_and_group("web"), user("web", ""));
        assert_eq!(user_and_group("1000:100"), user("1000", "100"));
        for bad in ["", ":", ":web", "web:", "a:b:c"] {
            assert!(user_and_group(bad).is_err(), "{bad}");
        }
        let value = |text: &str| Some(text.to_owned());
        assert_eq!(variable("A=b=c"), Ok(("A".to_owned(), value("b=c"))));
        assert_eq!(variable("A="), Ok(("A".to_owned(), value(""))));
        assert_eq!(variable("A"), Ok(("A".to_owned(), None)));
        assert!(variable("=b").is_err());
        assert!(history("25h").is_err() && history("0s").is_err());
        assert_eq!(history("1d"), Ok(Duration::from_secs(86_400)));
    }

    #[test]
    fn tags_need_a_key() {
        assert_eq!(tag("a=b=c"), Ok(("a".to_owned(), "b=c".to_owned())));
        assert_eq!(tag("a="), Ok(("a".to_owned(), String::new())));
        assert!(tag("a").is_err());
        assert!(tag("=b").is_err());
    }
}
