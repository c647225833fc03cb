//! Checks of what the caller gives for cloud-init, before anything is made. The text itself is
//! opaque to us and goes into the seed byte for byte; a text that cloud-init would ignore with a
//! warning deep in the guest's log is refused here, with line and column.

use std::fmt;

use ghost_domain::{Error, ErrorCode, Result};
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// First lines by which cloud-init tells what user-data is
/// (`INCLUSION_TYPES_MAP` in cloud-init's handlers).
const EXPECTED: &str = "the first line must be '#cloud-config' (then YAML), '#!' and an interpreter, '#include', '#include-once', '#cloud-boothook', '#part-handler', '#cloud-config-archive', '#cloud-config-jsonp', '## template: jinja', or the header of a MIME multipart message";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Mapping,
    Sequence,
    Scalar,
    Empty,
}

/// Parses any YAML and keeps only what stands at its top.
struct Shape(Kind);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Top;
        impl<'de> Visitor<'de> for Top {
            type Value = Shape;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("YAML")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Shape, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Shape(Kind::Mapping))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Shape, A::Error> {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Shape(Kind::Sequence))
            }
            fn visit_unit<E>(self) -> Result<Shape, E> {
                Ok(Shape(Kind::Empty))
            }
            fn visit_none<E>(self) -> Result<Shape, E> {
                Ok(Shape(Kind::Empty))
            }
            fn visit_some<D: Deserializer<'de>>(self, d: D) -> Result<Shape, D::Error> {
                d.deserialize_any(self)
            }
            fn visit_str<E>(self, _: &str) -> Result<Shape, E> {
                Ok(Shape(Kind::Scalar))
            }
            fn visit_bool<E>(self, _: bool) -> Result<Shape, E> {
                Ok(Shape(Kind::Scalar))
            }
            fn visit_i64<E>(self, _: i64) -> Result<Shape, E> {
                Ok(Shape(Kind::Scalar))
            }
            fn visit_u64<E>(self, _: u64) -> Result<Shape, E> {
                Ok(Shape(Kind::Scalar))
            }
            fn visit_f64<E>(self, _: f64) -> Result<Shape, E> {
                Ok(Shape(Kind::Scalar))
            }
        }
        deserializer.deserialize_any(Top)
    }
}

#[derive(Deserialize)]
struct NetworkConfig {
    #[serde(default)]
    version: Option<u64>,
    #[serde(default)]
    network: Option<Nested>,
}

#[derive(Deserialize)]
struct Nested {
    #[serde(default)]
    version: Option<u64>,
}

/// The YAML reader's limits: input is at most 32 KiB, so this only stops alias bombs.
fn options() -> serde_saphyr::Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_events: 100_000,
            max_nodes: 50_000,
            max_aliases: 1_000,
            max_depth: 64,
        },
        with_snippet: false,
    }
}

fn parse<T: for<'de> Deserialize<'de>>(field: &str, text: &str) -> Result<T> {
    serde_saphyr::from_str_with_options(text, options()).map_err(|error| {
        let cause = match error.location() {
            Some(at) => format!("line {}, column {}: {error}", at.line(), at.column()),
            None => error.to_string(),
        };
        invalid(field, "is not valid YAML", cause)
    })
}

fn invalid(field: &str, what: &str, cause: impl fmt::Display) -> Error {
    let cause = cause.to_string();
    Error::new(ErrorCode::InvalidUserData, format!("{field} {what}"))
        .because(&cause)
        .field(field, cause)
}

/// Whether `line` is exactly `marker`, blanks at its end aside.
fn is_line(line: &str, marker: &str) -> bool {
    line.trim_end() == marker
}

/// Checks user-data.
///
/// # Errors
/// `InvalidUserData`.
pub(super) fn validate_user_data(text: &str) -> Result<()> {
    const FIELD: &str = "user_data";
    if text.contains('\0') {
        return Err(invalid(FIELD, "holds a NUL character", "text is expected"));
    }
    let first = text.lines().next().unwrap_or("");
    if is_line(first, "#cloud-config") {
        return match parse::<Shape>(FIELD, text)?.0 {
            Kind::Mapping | Kind::Empty => Ok(()),
            Kind::Sequence | Kind::Scalar => Err(invalid(
                FIELD,
                "is not a cloud-config",
                "line 2: keys and values ('key: value') are expected below '#cloud-config'",
            )),
        };
    }
    if is_line(first, "#cloud-config-archive") {
        return match parse::<Shape>(FIELD, text)?.0 {
            Kind::Sequence => Ok(()),
            _ => Err(invalid(
                FIELD,
                "is not a cloud-config archive",
                "line 2: a list is expected below '#cloud-config-archive'",
            )),
        };
    }
    if let Some(interpreter) = first.strip_prefix("#!") {
        return if interpreter.trim_start().starts_with('/') {
            Ok(())
        } else {
            Err(invalid(
                FIELD,
                "is not a script",
                "line 1: '#!' must be followed by the path of an interpreter, such as /bin/sh",
            ))
        };
    }
    let markers = [
        "#include",
        "#include-once",
        "#cloud-boothook",
        "#part-handler",
        "#cloud-config-jsonp",
    ];
    if markers.iter().any(|marker| is_line(first, marker)) {
        return Ok(());
    }
    if first.trim_end().eq_ignore_ascii_case("## template: jinja") {
        // What stands below is a template, not yet YAML; cloud-init renders it in the guest.
        return Ok(());
    }
    if is_multipart(text) {
        return Ok(());
    }
    Err(invalid(FIELD, "is not something that cloud-init reads", {
        let shown: String = first.chars().take(60).collect();
        format!("line 1 is {shown:?}; {EXPECTED}")
    }))
}

/// Whether the text starts with mail headers of which one says multipart with a boundary.
fn is_multipart(text: &str) -> bool {
    // Headers may be folded: a continuation line starts with a blank (RFC 5322 section 2.2.3).
    let mut headers: Vec<String> = Vec::new();
    for line in text
        .lines()
        .take_while(|line| !line.trim().is_empty())
        .take(50)
    {
        if line.starts_with([' ', '\t']) {
            match headers.last_mut() {
                Some(last) => last.push_str(line),
                None => return false,
            }
        } else {
            headers.push(line.to_owned());
        }
    }
    let first_is_header = headers.first().is_some_and(|line| {
        let lower = line.to_ascii_lowercase();
        ["content-type:", "mime-version:", "from "]
            .iter()
            .any(|start| lower.starts_with(start))
    });
    first_is_header
        && headers.iter().any(|line| {
            let lower = line.to_ascii_lowercase();
            lower.strip_prefix("content-type:").is_some_and(|value| {
                value.trim_start().starts_with("multipart/") && value.contains("boundary=")
            })
        })
}

/// Checks a network config: a mapping with `version` 1 or 2, at the top or below `network`.
///
/// # Errors
/// `InvalidUserData`.
pub(super) fn validate_network_config(text: &str) -> Result<()> {
    const FIELD: &str = "network_config";
    if parse::<Shape>(FIELD, text)?.0 != Kind::Mapping {
        return Err(invalid(
            FIELD,
            "is not a network config",
            "line 1: a mapping with 'version: 1' or 'version: 2' is expected",
        ));
    }
    let config: NetworkConfig = parse(FIELD, text)?;
    let version = match &config.network {
        Some(nested) => nested.version,
        None => config.version,
    };
    match version {
        Some(1 | 2) => Ok(()),
        Some(other) => Err(invalid(
            FIELD,
            "has an unknown version",
            format!("version {other}; 1 and 2 are known to cloud-init"),
        )),
        None => Err(invalid(
            FIELD,
            "has no version",
            "'version: 1' or 'version: 2' is expected, at the top or below 'network:'",
        )),
    }
}
