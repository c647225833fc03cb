//! How a log line looks: `TIME LEVEL target: message key=value …` as text, or one JSON object.
//!
//! The fields of the spans around an event (request id, principal, operation id, step, VM) are
//! part of its line: whoever greps for an id finds every line of it. Where an inner span has a
//! field of the same name, the inner one counts.

use std::fmt;

use serde_json::{Map, Value};
use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::{JsonFields, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormattedFields};
use tracing_subscriber::registry::LookupSpan;

use super::LogFormat;

/// RFC 3339 in UTC with milliseconds, always as wide.
const TIME: &[BorrowedFormatItem<'_>] =
    format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");

/// Writes events in one of the formats. Needs [`JsonFields`] as the formatter of span fields.
pub(super) struct Lines(pub(super) LogFormat);

impl<S> FormatEvent<S, JsonFields> for Lines
where
    S: Subscriber + for<'lookup> LookupSpan<'lookup>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, JsonFields>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut around = Map::new();
        if let Some(scope) = context.event_scope() {
            for span in scope.from_root() {
                let extensions = span.extensions();
                let text = extensions
                    .get::<FormattedFields<JsonFields>>()
                    .map_or("", |fields| fields.as_str());
                if let Ok(Value::Object(fields)) = serde_json::from_str(text) {
                    // `otel.*` fields speak to the tracing system, not to people.
                    around.extend(
                        fields
                            .into_iter()
                            .filter(|(key, _)| !key.starts_with("otel.")),
                    );
                }
            }
        }
        let mut own = Fields::default();
        event.record(&mut own);
        for key in own.fields.keys() {
            around.remove(key);
        }
        let metadata = event.metadata();
        let time = OffsetDateTime::now_utc()
            .format(TIME)
            .map_err(|_| fmt::Error)?;
        match self.0 {
            LogFormat::Text => {
                write!(
                    writer,
                    "{time} {:>5} {}: {}",
                    metadata.level().as_str(),
                    metadata.target(),
                    Printable(&own.message),
                )?;
                for (key, value) in own.fields.iter().chain(&around) {
                    match value {
                        Value::String(text) => write!(writer, " {key}={}", Text(text))?,
                        other => write!(writer, " {key}={other}")?,
                    }
                }
                writeln!(writer)
            }
            LogFormat::Json => {
                let mut line = Map::new();
                line.insert("time".into(), time.into());
                line.insert("level".into(), metadata.level().as_str().into());
                line.insert("target".into(), metadata.target().into());
                line.insert("message".into(), own.message.into());
                for (key, value) in own.fields.into_iter().chain(around) {
                    line.entry(key).or_insert(value);
                }
                writeln!(writer, "{}", Value::Object(line))
            }
        }
    }
}

/// The fields of one event.
#[derive(Default)]
struct Fields {
    message: String,
    fields: Map<String, Value>,
}

impl Fields {
    fn put(&mut self, field: &Field, value: Value) {
        if field.name() == "message" {
            self.message = match value {
                Value::String(text) => text,
                other => other.to_string(),
            };
        } else {
            self.fields.insert(field.name().to_owned(), value);
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format!("{value:?}").into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value.into());
    }
}

/// Text without control characters: what a stranger sent must not move a terminal's cursor nor
/// pretend to be a line of its own.
struct Printable<'a>(&'a str);

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.0.chars() {
            if character.is_control() {
                write!(f, "{}", character.escape_default())?;
            } else {
                write!(f, "{character}")?;
            }
        }
        Ok(())
    }
}

/// The value of a field: as it is where it is one word, else in quotes.
struct Text<'a>(&'a str);

impl fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = !self.0.is_empty()
            && !self
                .0
                .chars()
                .any(|c| c.is_whitespace() || c.is_control() || c == '"' || c == '=');
        if word {
            f.write_str(self.0)
        } else {
            write!(f, "{:?}", self.0)
        }
    }
}
