//! Logs in both formats, and traces as a real collector over gRPC sees them.

use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::trace::v1::Span as ProtoSpan;
use serde_json::Value;
use tokio::sync::mpsc;
use tracing::Instrument;

use super::*;

/// A log that a test reads.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'writer> MakeWriter<'writer> for Log {
    type Writer = Self;

    fn make_writer(&'writer self) -> Self {
        self.clone()
    }
}

fn options(filter: &str, format: LogFormat) -> TelemetryOptions {
    TelemetryOptions {
        filter: filter.into(),
        format,
        otlp: None,
    }
}

fn logged(format: LogFormat, filter: &str, act: impl FnOnce()) -> String {
    let log = Log::default();
    let (subscriber, _telemetry) = build(&options(filter, format), log.clone()).unwrap();
    tracing::subscriber::with_default(subscriber, act);
    log.text()
}

fn one_event() {
    let rpc = tracing::info_span!(
        "rpc",
        otel.kind = "server",
        request_id = "r-1",
        principal = tracing::field::Empty
    );
    let _rpc = rpc.enter();
    rpc.record("principal", "root");
    let operation = tracing::info_span!("operation", operation_id = "o-1", count = 3);
    let _operation = operation.enter();
    tracing::info!(vm = "web", "it \"runs\"\u{1b}[2J");
    tracing::debug!("not shown");
}

#[test]
fn a_text_line_has_the_ids_of_all_spans_and_no_control_characters() {
    let text = logged(LogFormat::Text, "info", one_event);
    assert_eq!(text.lines().count(), 1, "{text}");
    for part in [
        " INFO ghost_infrastructure::telemetry::tests: it \"runs\"\\u{1b}[2J vm=web",
        " request_id=r-1",
        " principal=root",
        " operation_id=o-1",
        " count=3",
    ] {
        assert!(text.contains(part), "{part:?} is missing in {text}");
    }
    assert!(
        !text.contains("otel.kind") && !text.contains('\u{1b}'),
        "{text}"
    );
}

#[test]
fn a_json_line_is_one_object_with_the_ids_at_its_top() {
    let text = logged(LogFormat::Json, "info", one_event);
    assert_eq!(text.lines().count(), 1, "{text}");
    let line: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(line["level"], "INFO");
    assert_eq!(line["request_id"], "r-1");
    assert_eq!(line["operation_id"], "o-1");
    assert_eq!(line["vm"], "web");
    assert_eq!(line["count"], 3);
    let time = line["time"].as_str().unwrap();
    assert!(
        time.len() == "2026-01-02T03:04:05.678Z".len() && time.ends_with('Z'),
        "{line}"
    );
}

#[test]
fn an_inner_field_counts_and_nothing_can_overwrite_the_frame() {
    let text = logged(LogFormat::Json, "info", || {
        let _outer = tracing::info_span!("outer", vm = "a", step = 1).entered();
        let _inner = tracing::info_span!("inner", vm = "b", level = "fake").entered();
        tracing::info!(step = 2, "x");
    });
    let line: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&line["vm"], &line["step"]), (&"b".into(), &2.into()));
    assert_eq!(line["level"], "INFO");
}

#[test]
fn filters_are_levels_or_directives() {
    for good in [
        "info",
        "TRACE",
        "off",
        "warn,ghost_agent=debug",
        "ghost_agent=trace",
    ] {
        check_filter(good).unwrap();
    }
    for bad in ["", "loud", "info,", "ghost_agent=loud", "info,verbose"] {
        assert!(check_filter(bad).is_err(), "{bad}");
    }
}

#[test]
fn debug_is_about_this_program_unless_a_library_is_named() {
    let act = || {
        tracing::debug!("ours");
        tracing::debug!(target: "h2::codec", "frame");
        tracing::info!(target: "h2::codec", "told");
    };
    let text = logged(LogFormat::Text, "debug", act);
    assert!(text.contains("ours") && text.contains("told"), "{text}");
    assert!(!text.contains("frame"), "{text}");
    assert!(logged(LogFormat::Text, "debug,h2=debug", act).contains("frame"));
    let text = logged(LogFormat::Text, "error", act);
    assert_eq!(text, "", "a level below info is not raised for libraries");
}

#[test]
fn endpoints_have_a_host_and_a_port() {
    for good in [
        "http://127.0.0.1:4317",
        "http://collector:4317/",
        "http://[::1]:4317",
    ] {
        check_endpoint(good).unwrap();
    }
    for bad in [
        "",
        "127.0.0.1:4317",
        "https://collector:4317",
        "http://collector",
        "http://:4317",
        "http://user@collector:4317",
        "http://collector:0",
        "http://collector:4317/v1/traces",
        "http://a b:1",
    ] {
        assert!(check_endpoint(bad).is_err(), "{bad}");
    }
}

/// A collector in this process; ends with the test's runtime.
struct Collector {
    endpoint: String,
    spans: mpsc::UnboundedReceiver<(String, ProtoSpan)>,
}

struct Collect(mpsc::UnboundedSender<(String, ProtoSpan)>);

#[async_trait::async_trait]
impl TraceService for Collect {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        for resource in request.into_inner().resource_spans {
            let service = resource
                .resource
                .into_iter()
                .flat_map(|resource| resource.attributes)
                .find(|attribute| attribute.key == "service.name")
                .map(|attribute| format!("{:?}", attribute.value))
                .unwrap_or_default();
            for span in resource
                .scope_spans
                .into_iter()
                .flat_map(|scope| scope.spans)
            {
                self.0.send((service.clone(), span)).unwrap();
            }
        }
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let (sender, spans) = mpsc::unbounded_channel();
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(TraceServiceServer::new(Collect(sender)))
                .serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(listener)),
        );
        Self { endpoint, spans }
    }
}

fn traced(endpoint: &str) -> TelemetryOptions {
    TelemetryOptions {
        // Nothing is logged: traces must not depend on that.
        filter: "off".into(),
        format: LogFormat::Text,
        otlp: Some(OtlpOptions {
            endpoint: endpoint.into(),
            timeout: Duration::from_secs(5),
            sampling: 1.0,
            service: "ghost-test".into(),
            version: "1".into(),
            instance: "here".into(),
        }),
    }
}

async fn shut_down(telemetry: Telemetry, patience: Duration) {
    tokio::task::spawn_blocking(move || telemetry.shutdown(patience))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_sees_the_spans_of_a_call_under_the_callers_trace() {
    let mut collector = Collector::start().await;
    let (subscriber, telemetry) = build(&traced(&collector.endpoint), io::sink).unwrap();
    let guard = tracing::subscriber::set_default(subscriber);
    let span = tracing::info_span!("rpc", otel.kind = "server", request_id = "r-1");
    set_parent(
        &span,
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    );
    async {
        tracing::debug_span!("libvirt", call = "start").in_scope(|| {});
    }
    .instrument(span)
    .await;
    // A trace that begins here, and one whose header is rubbish.
    let own = tracing::info_span!("own");
    set_parent(&own, "00-rubbish");
    own.in_scope(|| {});
    drop(own);
    drop(guard);
    shut_down(telemetry, Duration::from_secs(10)).await;

    let mut seen = std::collections::BTreeMap::new();
    while let Ok((service, span)) = collector.spans.try_recv() {
        assert!(service.contains("ghost-test"), "{service}");
        seen.insert(span.name.clone(), span);
    }
    let names: Vec<_> = seen.keys().map(String::as_str).collect();
    assert_eq!(names, ["libvirt", "own", "rpc"]);
    let trace = hex::decode("0af7651916cd43dd8448eb211c80319c").unwrap();
    assert_eq!(seen["rpc"].trace_id, trace);
    assert_eq!(hex::encode(&seen["rpc"].parent_span_id), "b7ad6b7169203331");
    assert_eq!(seen["libvirt"].trace_id, trace);
    assert_eq!(seen["libvirt"].parent_span_id, seen["rpc"].span_id);
    assert_ne!(seen["own"].trace_id, trace);
    assert!(
        seen["rpc"]
            .attributes
            .iter()
            .any(|attribute| attribute.key == "request_id")
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_that_does_not_sample_is_not_traced() {
    let mut collector = Collector::start().await;
    let (subscriber, telemetry) = build(&traced(&collector.endpoint), io::sink).unwrap();
    tracing::subscriber::with_default(subscriber, || {
        let span = tracing::info_span!("rpc");
        set_parent(
            &span,
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00",
        );
        span.in_scope(|| {});
        tracing::info_span!("marker").in_scope(|| {});
    });
    shut_down(telemetry, Duration::from_secs(10)).await;
    let (_, only) = collector.spans.recv().await.unwrap();
    assert_eq!(only.name, "marker");
    assert!(collector.spans.try_recv().is_err());
}

/// More spans than the queue holds, to a collector that takes connections and never answers: every
/// span is made, and the end comes although nothing was delivered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_that_never_answers_stops_nobody() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let mut options = traced(&endpoint);
    options.otlp.as_mut().unwrap().timeout = Duration::from_millis(200);
    let (subscriber, telemetry) = build(&options, io::sink).unwrap();
    tracing::subscriber::with_default(subscriber, || {
        for _ in 0..10_000 {
            tracing::info_span!("rpc").in_scope(|| {});
        }
    });
    shut_down(telemetry, Duration::from_millis(500)).await;
    drop(listener);
}

/// On one thread, so that the exporter logs to the test's own subscriber.
#[tokio::test]
async fn a_collector_that_is_away_is_told_of_once_and_when_it_is_back() {
    use opentelemetry_sdk::trace::SpanExporter;

    // A port that was free a moment ago.
    let address = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    };
    let otlp = traced(&format!("http://{address}")).otlp.unwrap();
    let log = Log::default();
    let (subscriber, _telemetry) = build(&options("info", LogFormat::Text), log.clone()).unwrap();
    let _guard = tracing::subscriber::set_default(subscriber);
    let exporter = export::Quiet::new(&otlp).unwrap();
    let count = |words: &str| log.text().matches(words).count();
    for _ in 0..3 {
        assert!(exporter.export(Vec::new()).await.is_ok());
    }
    assert_eq!(count("do not reach"), 1, "{}", log.text());

    let listener = tokio::net::TcpListener::bind(address).await.unwrap();
    let (sender, _spans) = mpsc::unbounded_channel();
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(TraceServiceServer::new(Collect(sender)))
            .serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(listener)),
    );
    while count("reach the collector again") == 0 {
        exporter.export(Vec::new()).await.unwrap();
    }
    exporter.export(Vec::new()).await.unwrap();
    assert_eq!(count("reach the collector again"), 1, "{}", log.text());
    assert_eq!(count("do not reach"), 1, "{}", log.text());
}
