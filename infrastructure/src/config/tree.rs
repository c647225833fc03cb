//! A YAML document as it stands, with the place of every key and value, so that each problem can
//! be told with its line. What the keys mean is decided by the schema, not here.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::{Location, Spanned};

/// A place in the file; both count from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The line.
    pub line: u64,
    /// The column.
    pub column: u64,
}

impl From<Location> for Place {
    fn from(location: Location) -> Self {
        Self {
            line: location.line(),
            column: location.column(),
        }
    }
}

/// A value of the document.
#[derive(Clone, Debug, PartialEq)]
pub enum Node {
    /// Nothing stands there, or `null`.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A plain number, as text.
    Number(String),
    /// Text.
    Text(String),
    /// A list.
    List(Vec<Node>),
    /// Keys with their values, in the order of the file.
    Map(Vec<Entry>),
}

/// A key with its value.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// Where the key stands.
    pub at: Place,
    /// The value.
    pub value: Node,
    /// Where the value stands.
    pub value_at: Place,
}

impl Node {
    /// What it is, for people.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Null => "nothing",
            Self::Bool(_) => "true or false",
            Self::Number(_) => "a number",
            Self::Text(_) => "text",
            Self::List(_) => "a list",
            Self::Map(_) => "a section with keys",
        }
    }

    /// The text of a scalar.
    pub fn scalar(&self) -> Option<String> {
        match self {
            Self::Bool(value) => Some(value.to_string()),
            Self::Number(text) | Self::Text(text) => Some(text.clone()),
            Self::Null | Self::List(_) | Self::Map(_) => None,
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = Node;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value")
            }

            fn visit_unit<E>(self) -> Result<Node, E> {
                Ok(Node::Null)
            }

            fn visit_none<E>(self) -> Result<Node, E> {
                Ok(Node::Null)
            }

            fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
                deserializer.deserialize_any(self)
            }

            fn visit_bool<E>(self, value: bool) -> Result<Node, E> {
                Ok(Node::Bool(value))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Node, E> {
                Ok(Node::Number(value.to_string()))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
                Ok(Node::Number(value.to_string()))
            }

            fn visit_i128<E>(self, value: i128) -> Result<Node, E> {
                Ok(Node::Number(value.to_string()))
            }

            fn visit_u128<E>(self, value: u128) -> Result<Node, E> {
                Ok(Node::Number(value.to_string()))
            }

            fn visit_f64<E>(self, value: f64) -> Result<Node, E> {
                Ok(Node::Number(value.to_string()))
            }

            fn visit_str<E>(self, value: &str) -> Result<Node, E> {
                Ok(Node::Text(value.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Node, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = list.next_element()? {
                    items.push(item);
                }
                Ok(Node::List(items))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
                let mut entries = Vec::new();
                while let Some((key, value)) = map.next_entry::<Spanned<Node>, Spanned<Node>>()? {
                    entries.push(Entry {
                        key: key
                            .value
                            .scalar()
                            .unwrap_or_else(|| key.value.kind().to_owned()),
                        at: key.referenced.into(),
                        value: value.value,
                        value_at: value.referenced.into(),
                    });
                }
                Ok(Node::Map(entries))
            }
        }

        deserializer.deserialize_any(Any)
    }
}

/// Why a document cannot be read at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Unreadable {
    pub(super) at: Option<Place>,
    pub(super) message: String,
}

/// Reads a document.
pub(super) fn parse(text: &str) -> Result<Node, Unreadable> {
    // A file of comments alone is no document to the parser, and a configuration of defaults to us.
    let nothing = text
        .lines()
        .all(|line| line.trim().is_empty() || line.trim_start().starts_with('#'));
    if nothing {
        return Ok(Node::Null);
    }
    // Far more than any configuration needs; anchors cannot be used to blow a small file up.
    let options = serde_saphyr::options! {
        with_snippet: false,
        // `off` is a word of ours, not YAML 1.1's false.
        strict_booleans: true,
        budget: serde_saphyr::budget! {
            max_documents: 1,
            max_nodes: 10_000,
            max_depth: 32,
            max_aliases: 100,
        },
    };
    serde_saphyr::from_str_with_options(text, options).map_err(|error| Unreadable {
        at: error.location().map(Place::from),
        message: without_place(&error.to_string()),
    })
}

/// The parser's words without the place, which we tell our own way.
fn without_place(message: &str) -> String {
    let first = message.lines().next().unwrap_or(message);
    let end = [" at line ", " (line ", ", line "]
        .into_iter()
        .filter_map(|marker| first.find(marker))
        .min()
        .unwrap_or(first.len());
    first.get(..end).unwrap_or(first).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_key_and_value_has_its_place() {
        let Node::Map(entries) = parse("a:\n  b: 1\n  c: [x, \"2\"]\nd:\n").unwrap() else {
            panic!("a map was expected");
        };
        assert_eq!(entries[0].key, "a");
        assert_eq!(entries[0].at, Place { line: 1, column: 1 });
        let Node::Map(inner) = &entries[0].value else {
            panic!("a map was expected");
        };
        assert_eq!(inner[0].at, Place { line: 2, column: 3 });
        assert_eq!(inner[0].value_at, Place { line: 2, column: 6 });
        assert_eq!(inner[0].value, Node::Number("1".into()));
        assert_eq!(
            inner[1].value,
            Node::List(vec![Node::Text("x".into()), Node::Text("2".into())])
        );
        assert_eq!(entries[1].value, Node::Null);
    }

    #[test]
    fn nothing_but_comments_is_nothing() {
        assert_eq!(parse("").unwrap(), Node::Null);
        assert_eq!(parse("# all defaults\n\n  # really\n").unwrap(), Node::Null);
    }

    #[test]
    fn what_is_no_yaml_is_told_with_its_line() {
        let error = parse("a: 1\nb: [1, 2\nc: 3\n").unwrap_err();
        assert!(error.at.is_some_and(|at| at.line >= 2), "{error:?}");
        assert!(
            !error.message.is_empty() && !error.message.contains("line"),
            "{error:?}"
        );
        let error = parse("a: 1\nb: 2\na: 3\n").unwrap_err();
        assert_eq!(error.at.map(|at| at.line), Some(3), "{error:?}");
        assert!(error.message.contains("duplicate"), "{error:?}");
    }

    #[test]
    fn anchors_cannot_blow_a_file_up() {
        let mut text = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for level in 1..12 {
            let below = level - 1;
            let many = vec![format!("*a{below}"); 10].join(", ");
            text.push_str(&format!("a{level}: &a{level} [{many}]\n"));
        }
        assert!(parse(&text).is_err());
    }

    proptest! {
        #[test]
        fn nothing_panics(text in "[ -~\n]{0,200}") {
            let _ = parse(&text);
        }
    }
}
