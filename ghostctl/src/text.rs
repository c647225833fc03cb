//! How sizes, ages and foreign text look to people.

use std::fmt::Write as _;
use std::time::Duration;

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Whether a character may change what a terminal does or the order in which text is shown:
/// C0 and C1 controls, and Unicode's bidirectional and invisible format characters.
fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

/// Text that somebody else chose (a guest, an image, an agent), made safe to show on one line.
pub(crate) fn printable(text: &str) -> String {
    if !text.chars().any(is_unsafe) {
        return text.to_owned();
    }
    let mut out = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if !is_unsafe(c) {
            out.push(c);
        } else if c == '\n' {
            out.push_str("\\n");
        } else if c == '\t' {
            out.push(' ');
        } else if (c as u32) < 0x100 {
            let _ = write!(out, "\\x{:02x}", c as u32);
        } else {
            let _ = write!(out, "\\u{{{:x}}}", c as u32);
        }
    }
    out
}

const UNITS: [(&str, u64); 4] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
];

/// A size in binary units with at most one decimal: `512 MiB`, `1.5 GiB`, `0 B`.
pub(crate) fn human_size(bytes: u64) -> String {
    let Some((name, unit)) = UNITS.iter().find(|(_, unit)| bytes >= *unit) else {
        return format!("{bytes} B");
    };
    let tenths = u128::from(bytes) * 10 / u128::from(*unit);
    if tenths.is_multiple_of(10) {
        format!("{} {name}", tenths / 10)
    } else {
        format!("{}.{} {name}", tenths / 10, tenths % 10)
    }
}

/// A duration by its largest unit: `300ms`, `12s`, `3m`, `2h`, `5d`.
pub(crate) fn human_duration(duration: Duration) -> String {
    match (duration.as_secs(), duration.subsec_millis()) {
        (0, millis @ 1..) => format!("{millis}ms"),
        (seconds, _) => human_seconds(seconds),
    }
}

/// A duration that a person chose, to the second: `90s`, `1h1m`.
pub(crate) fn exact_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let mut text = String::new();
    for (unit, name) in [(86_400, "d"), (3600, "h"), (60, "m"), (1, "s")] {
        let number = match unit {
            86_400 => seconds / unit,
            3600 => seconds / unit % 24,
            _ => seconds / unit % 60,
        };
        if number > 0 {
            let _ = write!(text, "{number}{name}");
        }
    }
    if text.is_empty() {
        text = human_duration(duration);
    }
    text
}

fn human_seconds(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86_400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// A number of seconds of a view by its largest unit; `-` for none.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "`as` saturates, and a negative age shows as zero"
)]
pub(crate) fn human_age(seconds: Option<f64>) -> String {
    seconds.map_or_else(|| "-".to_owned(), |seconds| human_seconds(seconds as u64))
}

fn parse(at: &str) -> Option<OffsetDateTime> {
    OffsetDateTime::parse(at, &Rfc3339).ok()
}

/// How long ago a time of a view was; `-` for none. A clock ahead of ours shows as `0s`.
pub(crate) fn age_of(at: &str) -> String {
    parse(at).map_or_else(
        || "-".to_owned(),
        |at| {
            let seconds = (OffsetDateTime::now_utc() - at).whole_seconds();
            human_seconds(u64::try_from(seconds).unwrap_or(0))
        },
    )
}

/// How long it is until a time of a view; `never` for none, `expired` for one that has passed.
pub(crate) fn time_until(at: Option<&str>) -> String {
    let Some(at) = at.and_then(parse) else {
        return "never".to_owned();
    };
    match u64::try_from((at - OffsetDateTime::now_utc()).whole_seconds()) {
        Ok(seconds) => format!("in {}", human_seconds(seconds)),
        Err(_) => "expired".to_owned(),
    }
}

/// `1 VM`, `2 VMs`.
pub(crate) fn count(number: usize, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_ages_are_short() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1536 << 20, "1.5 GiB"),
            (2 << 30, "2 GiB"),
            (u64::MAX, "16777215.9 TiB"),
        ] {
            assert_eq!(human_size(bytes), text);
        }
        for (seconds, text) in [
            (0, "0s"),
            (59, "59s"),
            (60, "1m"),
            (7200, "2h"),
            (86_400 * 5, "5d"),
        ] {
            assert_eq!(human_seconds(seconds), text);
        }
        assert_eq!(human_duration(Duration::from_millis(300)), "300ms");
        for (seconds, text) in [(0, "0s"), (60, "1m"), (90, "1m30s"), (90_061, "1d1h1m1s")] {
            assert_eq!(exact_duration(Duration::from_secs(seconds)), text);
        }
        assert_eq!(human_age(None), "-");
        assert_eq!(human_age(Some(-1.0)), "0s");
        assert_eq!(age_of("not a time"), "-");
        assert_eq!(time_until(Some("1970-01-01T00:00:00.000Z")), "expired");
    }

    #[test]
    fn what_could_drive_a_terminal_is_escaped() {
        assert_eq!(printable("web-1"), "web-1");
        assert_eq!(
            printable("a\x1b]0;x\x07\u{9b}2J\nb\u{202e}c"),
            "a\\x1b]0;x\\x07\\x9b2J\\nb\\u{202e}c"
        );
        assert_eq!(printable("Grüße 東京"), "Grüße 東京");
    }
}
