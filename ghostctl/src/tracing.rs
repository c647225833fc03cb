//! The span of one run of ghostctl, the root of what the agent does for it, told to a collector.
//!
//! Only where `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT` or `OTEL_EXPORTER_OTLP_ENDPOINT` names one, by
//! OTLP over gRPC in plain text (<https://opentelemetry.io/docs/specs/otel/protocol/exporter/>); a
//! collector elsewhere is reached through one on this host, as for the agent. One message with one
//! span needs no SDK. What a collector does, or that it is away, changes neither the outcome of
//! the command nor what is printed; it costs a second at most.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_client::TraceServiceClient;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue};
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span as Message, Status};
use tonic::transport::Endpoint;

use crate::connect::Session;
use crate::errors::Exit;

/// What connecting and delivering may take together.
const PATIENCE: Duration = Duration::from_secs(1);

/// The span of this run, and where it goes.
pub(crate) struct Span {
    collector: String,
    began: SystemTime,
    command: String,
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|text| !text.is_empty())
}

/// The collector that the environment names for traces by gRPC.
fn collector() -> Option<String> {
    let collector = variable("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
        .or_else(|| variable("OTEL_EXPORTER_OTLP_ENDPOINT"))?;
    let off = variable("OTEL_SDK_DISABLED").is_some_and(|text| text.eq_ignore_ascii_case("true"))
        || variable("OTEL_TRACES_EXPORTER").is_some_and(|text| text == "none");
    let protocol = variable("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
        .or_else(|| variable("OTEL_EXPORTER_OTLP_PROTOCOL"));
    // Named for the HTTP of other programs: gRPC would not be understood there.
    let other = protocol.is_some_and(|protocol| protocol != "grpc");
    (!off && !other).then_some(collector)
}

impl Span {
    /// Begins where there is a collector.
    pub(crate) fn begin() -> Option<Self> {
        Some(Self {
            collector: collector()?,
            began: SystemTime::now(),
            command: String::new(),
        })
    }

    /// Names the command. No more of the line: what stands there may be secret.
    pub(crate) fn of(self, command: String) -> Self {
        Self { command, ..self }
    }

    /// Ends, and tells the collector, where an agent was asked at all. `code` is the failure's.
    pub(crate) async fn deliver(self, session: &Session, exit: Exit, code: Option<String>) {
        if !session.trace().is_used() {
            return;
        }
        let collector = self.collector.clone();
        let request = self.into_request(session, exit, code);
        let delivered = async {
            let endpoint = Endpoint::from_shared(collector).map_err(|error| error.to_string())?;
            let channel = endpoint
                .connect()
                .await
                .map_err(|error| error.to_string())?;
            TraceServiceClient::new(channel)
                .export(request)
                .await
                .map_err(|status| status.to_string())
        };
        let trouble = match tokio::time::timeout(PATIENCE, delivered).await {
            Ok(Ok(_)) => return,
            Ok(Err(trouble)) => trouble,
            Err(_) => "the collector does not answer".to_owned(),
        };
        session.debug(&format!("the trace was not delivered: {trouble}"));
    }

    fn into_request(
        self,
        session: &Session,
        exit: Exit,
        code: Option<String>,
    ) -> ExportTraceServiceRequest {
        let trace = session.trace();
        let mut attributes = vec![
            attribute("request_id", Value::StringValue(trace.request_id().into())),
            attribute("process.exit.code", Value::IntValue(exit.code().into())),
        ];
        let status = (exit.code() != 0).then(|| Status {
            code: StatusCode::Error as i32,
            message: String::new(),
        });
        if let Some(code) = code {
            attributes.push(attribute("error.type", Value::StringValue(code)));
        }
        let span = Message {
            trace_id: trace.trace_id(),
            span_id: trace.span_id(),
            // Sampled, as `traceparent` says to the agent.
            flags: 1,
            name: format!("ghostctl {}", self.command),
            kind: SpanKind::Client as i32,
            start_time_unix_nano: nanoseconds(self.began),
            end_time_unix_nano: nanoseconds(SystemTime::now()),
            attributes,
            status,
            ..Message::default()
        };
        let service = variable("OTEL_SERVICE_NAME").unwrap_or_else(|| "ghostctl".into());
        let version = env!("CARGO_PKG_VERSION").to_owned();
        ExportTraceServiceRequest {
            resource_spans: vec![ResourceSpans {
                resource: Some(Resource {
                    attributes: vec![
                        attribute("service.name", Value::StringValue(service)),
                        attribute("service.version", Value::StringValue(version)),
                    ],
                    ..Resource::default()
                }),
                scope_spans: vec![ScopeSpans {
                    scope: Some(InstrumentationScope {
                        name: "ghostctl".into(),
                        ..InstrumentationScope::default()
                    }),
                    spans: vec![span],
                    ..ScopeSpans::default()
                }],
                ..ResourceSpans::default()
            }],
        }
    }
}

fn attribute(key: &str, value: Value) -> KeyValue {
    KeyValue {
        key: key.into(),
        value: Some(AnyValue { value: Some(value) }),
        ..KeyValue::default()
    }
}

/// Nanoseconds since 1970, good until 2554.
fn nanoseconds(at: SystemTime) -> u64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
