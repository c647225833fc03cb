//! Logs and traces of the process.
//!
//! Logs go to standard error as text or JSON; each line carries the fields of the spans around it,
//! so that request and operation ids are on it. Traces go to an OTLP collector where one is
//! configured; which lines are logged has no influence on them.

mod export;
mod format;

use std::time::Duration;

use ghost_domain::{Error, ErrorCode, Result};
use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing::level_filters::LevelFilter;
use tracing::{Span, Subscriber};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::filter::{EnvFilter, Targets};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::JsonFields;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::{Layer, Registry};

/// As what log lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// What is logged and where traces go.
#[derive(Clone, Debug)]
pub struct TelemetryOptions {
    /// Which lines: see [`check_filter`].
    pub filter: String,
    /// As what.
    pub format: LogFormat,
    /// The collector; without it no traces are made.
    pub otlp: Option<OtlpOptions>,
}

/// The collector of traces.
#[derive(Clone, Debug)]
pub struct OtlpOptions {
    /// Its address: see [`check_endpoint`].
    pub endpoint: String,
    /// How long one delivery may take.
    pub timeout: Duration,
    /// The part of traces that begin here and are sent, 0 to 1.
    pub sampling: f64,
    /// `service.name` of the traces.
    pub service: String,
    /// `service.version`.
    pub version: String,
    /// `service.instance.id`: the agent's name.
    pub instance: String,
}

/// The running telemetry. What waits for delivery is lost unless [`Telemetry::shutdown`] is called.
#[derive(Debug)]
pub struct Telemetry {
    provider: Option<SdkTracerProvider>,
}

impl Telemetry {
    /// Delivers what waits, for at most `patience`. Blocks: call it outside async code.
    pub fn shutdown(&self, patience: Duration) {
        if let Some(provider) = &self.provider
            && let Err(error) = provider.shutdown_with_timeout(patience)
        {
            tracing::debug!(%error, "the last traces were not delivered");
        }
    }
}

/// Libraries that log every frame, poll or page at `debug` and `trace`.
const TALKATIVE: [&str; 12] = [
    "h2",
    "hyper",
    "hyper_util",
    "mio",
    "reqwest",
    "rustls",
    "sled",
    "tokio",
    "tokio_util",
    "tonic",
    "tower",
    "want",
];

/// Checks a log filter: a level (`info`), or directives of `tracing-subscriber`'s `EnvFilter`
/// (`info,ghost_infrastructure=debug`). A level alone holds for this program; libraries stay at
/// `info` unless they are named (`debug,h2=debug`).
///
/// # Errors
/// [`ErrorCode::InvalidArgument`] with what is wrong.
pub fn check_filter(filter: &str) -> Result<()> {
    parse_filter(filter).map(drop)
}

fn parse_filter(filter: &str) -> Result<EnvFilter> {
    let refused = |cause: &dyn std::fmt::Display| {
        Error::new(ErrorCode::InvalidArgument, "this is no log filter").because(cause)
    };
    let mut level = None;
    for part in filter.split(',').map(str::trim) {
        // A bare word would be taken for the name of a crate to log everything of.
        match part.parse::<LevelFilter>() {
            Ok(bare) if !part.is_empty() => level = Some(bare),
            _ if part.contains(['=', '[']) => {}
            _ => return Err(refused(&format!("{part:?} is not a level"))),
        }
    }
    let mut parsed = EnvFilter::builder()
        .parse(filter)
        .map_err(|cause| refused(&cause))?;
    let mut limit = |library: &str, most: &str| {
        if !filter.contains(&format!("{library}="))
            && let Ok(directive) = format!("{library}={most}").parse()
        {
            parsed = std::mem::take(&mut parsed).add_directive(directive);
        }
    };
    // Export failures are told by our own exporter, once.
    for library in ["opentelemetry", "opentelemetry_sdk", "opentelemetry-otlp"] {
        limit(library, "off");
    }
    // `debug` is about this program. Libraries that log each frame would bury it; who wants them
    // names them.
    if level.is_some_and(|level| level > LevelFilter::INFO) {
        for library in TALKATIVE {
            limit(library, "info");
        }
    }
    Ok(parsed)
}

/// Checks the address of a collector: `http://HOST:PORT`. There is no TLS towards it: a collector
/// elsewhere is reached through one on this host.
///
/// # Errors
/// [`ErrorCode::InvalidArgument`] with what is wrong.
pub fn check_endpoint(endpoint: &str) -> Result<()> {
    let refused = |why: &str| Err(Error::new(ErrorCode::InvalidArgument, why));
    let Some(rest) = endpoint.strip_prefix("http://") else {
        return refused(
            "it must begin with http:// (let a collector on this host speak TLS to others)",
        );
    };
    let authority = rest.strip_suffix('/').unwrap_or(rest);
    let Some((host, port)) = authority.rsplit_once(':') else {
        return refused("the port is missing; OTLP over gRPC has 4317");
    };
    let legal = |c: char| c.is_ascii_alphanumeric() || "-._:[]".contains(c);
    if host.is_empty() || !host.chars().all(legal) {
        return refused("the host is not a name or an address");
    }
    if !port.parse::<u16>().is_ok_and(|port| port != 0) {
        return refused("the port is not a number from 1 to 65535");
    }
    Ok(())
}

/// Starts logs and traces for the whole process. Call it once, within the Tokio runtime.
///
/// # Errors
/// [`ErrorCode::InvalidArgument`] for a filter or endpoint that its check would refuse;
/// `Internal` when telemetry was started before.
pub fn install(options: &TelemetryOptions) -> Result<Telemetry> {
    let (subscriber, telemetry) = build(options, std::io::stderr)?;
    tracing::subscriber::set_global_default(subscriber)
        .map_err(|cause| Error::internal("telemetry was started twice").because(cause))?;
    Ok(telemetry)
}

/// Makes the subscriber of [`install`] with another place to write to, for tests.
///
/// # Errors
/// As [`install`].
pub fn build<W>(
    options: &TelemetryOptions,
    writer: W,
) -> Result<(impl Subscriber + Send + Sync + use<W>, Telemetry)>
where
    W: for<'writer> MakeWriter<'writer> + Send + Sync + 'static,
{
    let logs = tracing_subscriber::fmt::layer()
        .fmt_fields(JsonFields::new())
        .event_format(format::Lines(options.format))
        .with_writer(writer)
        .with_filter(parse_filter(&options.filter)?);
    let (traces, provider) = match &options.otlp {
        None => (None, None),
        Some(otlp) => {
            check_endpoint(&otlp.endpoint)?;
            let (provider, tracer) = export::provider(otlp)?;
            // Only our own spans: those of the exporter's own connection would beget new ones.
            let ours = Targets::new()
                .with_target("ghost_agent", LevelFilter::DEBUG)
                .with_target("ghost_application", LevelFilter::DEBUG)
                .with_target("ghost_infrastructure", LevelFilter::DEBUG)
                .with_target("ghost_presentation", LevelFilter::DEBUG);
            let layer = tracing_opentelemetry::layer()
                .with_tracer(tracer)
                .with_location(false)
                .with_threads(false)
                .with_filter(ours);
            (Some(layer), Some(provider))
        }
    };
    let subscriber = Registry::default().with(logs).with(traces);
    Ok((subscriber, Telemetry { provider }))
}

/// Makes `span` a child of the remote span that a `traceparent` header names (W3C Trace Context,
/// <https://www.w3.org/TR/trace-context/>). A header that is malformed is ignored, as the standard
/// says. To be called before the span is entered.
pub fn set_parent(span: &Span, traceparent: &str) {
    struct Header<'a>(&'a str);

    impl Extractor for Header<'_> {
        fn get(&self, key: &str) -> Option<&str> {
            (key == "traceparent").then_some(self.0)
        }

        fn keys(&self) -> Vec<&str> {
            vec!["traceparent"]
        }
    }

    // 55 characters in version 00; later ones may be longer, but not without bound.
    if traceparent.len() > 512 {
        return;
    }
    let context = TraceContextPropagator::new().extract(&Header(traceparent));
    // Fails where no traces are made: then there is nothing to tie.
    drop(span.set_parent(context));
}

#[cfg(test)]
mod tests;
