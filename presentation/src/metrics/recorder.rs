//! What is counted as it happens: calls, operations, events. All else is read at the scrape.

use std::sync::Arc;
use std::time::Duration;

use ghost_application::UseCases;
use ghost_application::event::WatchEventsCommand;
use ghost_domain::{EventKind, Principal};
use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, Opts, Registry};
use tokio_util::sync::CancellationToken;

use crate::access::Shape;

/// Latencies of calls: from a list out of memory to a call that waits for libvirt.
const CALL_BUCKETS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
];
/// Durations of operations: from a pause to the download of an image.
const OPERATION_BUCKETS: &[f64] = &[
    0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0,
];

/// Counts what happens.
#[derive(Clone)]
pub struct Recorder {
    rpc_seconds: HistogramVec,
    rpc_streams: IntCounterVec,
    http_seconds: HistogramVec,
    operations: IntCounterVec,
    operation_seconds: HistogramVec,
    events: IntCounterVec,
}

impl std::fmt::Debug for Recorder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Recorder")
    }
}

impl Recorder {
    /// A recorder with all counters at zero.
    ///
    /// # Panics
    /// Never: names and labels are constants, which a test constructs.
    pub fn new() -> Arc<Self> {
        let histogram = |name: &str, help: &str, buckets: &[f64], labels: &[&str]| {
            let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
            valid(HistogramVec::new(options, labels))
        };
        let counter = |name: &str, help: &str, labels: &[&str]| {
            valid(IntCounterVec::new(Opts::new(name, help), labels))
        };
        Arc::new(Self {
            rpc_seconds: histogram(
                "ghost_rpc_duration_seconds",
                "Time from a unary gRPC call to its answer.",
                CALL_BUCKETS,
                &["method", "code"],
            ),
            rpc_streams: counter(
                "ghost_rpc_streams_total",
                "Streaming gRPC calls that have ended.",
                &["method", "code"],
            ),
            http_seconds: histogram(
                "ghost_http_request_duration_seconds",
                "Time from an HTTP request to the head of its answer.",
                CALL_BUCKETS,
                &["method", "route", "status"],
            ),
            operations: counter(
                "ghost_operations_total",
                "Operations that have ended, by kind and outcome.",
                &["kind", "outcome"],
            ),
            operation_seconds: histogram(
                "ghost_operation_duration_seconds",
                "Time from an operation's request to its end.",
                OPERATION_BUCKETS,
                &["kind", "outcome"],
            ),
            events: counter(
                "ghost_events_total",
                "Events by kind and severity.",
                &["kind", "severity"],
            ),
        })
    }

    /// Makes these counters part of a registry.
    ///
    /// # Errors
    /// Where they are part of it already.
    pub fn register(&self, registry: &Registry) -> prometheus::Result<()> {
        registry.register(Box::new(self.rpc_seconds.clone()))?;
        registry.register(Box::new(self.rpc_streams.clone()))?;
        registry.register(Box::new(self.http_seconds.clone()))?;
        registry.register(Box::new(self.operations.clone()))?;
        registry.register(Box::new(self.operation_seconds.clone()))?;
        registry.register(Box::new(self.events.clone()))
    }

    /// A gRPC call has ended. Streams last as long as somebody watches, which is no latency.
    pub fn rpc(&self, method: &str, code: &str, shape: Shape, took: Duration) {
        match shape {
            Shape::Unary | Shape::Long(_) => self
                .rpc_seconds
                .with_label_values(&[method, code])
                .observe(took.as_secs_f64()),
            Shape::Stream => self.rpc_streams.with_label_values(&[method, code]).inc(),
        }
    }

    /// An HTTP request was answered.
    pub fn http(&self, method: &str, route: &str, status: u16, took: Duration) {
        self.http_seconds
            .with_label_values(&[method, route, &status.to_string()])
            .observe(took.as_secs_f64());
    }

    /// Follows the agent's events and counts them, and the operations that end, until `stop`.
    pub async fn follow(self: Arc<Self>, use_cases: Arc<UseCases>, stop: CancellationToken) {
        let agent = Principal::agent();
        let command = WatchEventsCommand {
            vm: None,
            replay: true,
        };
        let mut events = match use_cases.watch_events.execute(&agent, &command).await {
            Ok((events, _)) => events,
            Err(error) => {
                tracing::error!(%error, "events cannot be counted");
                return;
            }
        };
        loop {
            let event = tokio::select! {
                () = stop.cancelled() => return,
                event = events.next() => event,
            };
            let Some(event) = event else { return };
            let severity = match event.kind.severity() {
                ghost_domain::Severity::Info => "info",
                ghost_domain::Severity::Warning => "warning",
                ghost_domain::Severity::Error => "error",
            };
            self.events
                .with_label_values(&[event.kind.name(), severity])
                .inc();
            let EventKind::Operation {
                operation, status, ..
            } = event.kind
            else {
                continue;
            };
            if !status.is_finished() {
                continue;
            }
            let id = operation.to_string();
            if let Ok(view) = use_cases.get_operation.execute(&agent, &id).await {
                let record = &view.operation;
                let labels = [record.kind.name(), status.as_str()];
                self.operations.with_label_values(&labels).inc();
                if let Some(end) = record.finished_at {
                    self.operation_seconds
                        .with_label_values(&labels)
                        .observe(end.since(record.created_at).as_secs_f64());
                }
            }
        }
    }
}

#[expect(
    clippy::expect_used,
    reason = "all names are constants of this file; a test makes them all"
)]
fn valid<T>(made: prometheus::Result<T>) -> T {
    made.expect("the metric's name and labels are legal")
}
