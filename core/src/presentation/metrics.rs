//! `/metrics` for Prometheus: what is, read from memory at each scrape, and what was counted.
//!
//! Labels are bounded: states, statuses and our own names. Nothing that a host or a stranger says
//! becomes one.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use ghost_domain::fleet::CommandStatus;
use ghost_presentation::metrics::Recorder;
use prometheus::{Gauge, GaugeVec, IntCounter, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};

use crate::application::desk::Desk;
use crate::application::fleet::Fleet;
use crate::domain::HostState;

/// How long the store may take to say how it fares.
const PATIENCE: Duration = Duration::from_secs(3);

/// What is told.
#[derive(Clone)]
pub struct MetricsParts {
    /// The records.
    pub fleet: Arc<Fleet>,
    /// The links.
    pub desk: Arc<Desk>,
    /// Calls.
    pub recorder: Arc<Recorder>,
    /// Core's version.
    pub version: String,
    /// This replica.
    pub replica: String,
    /// Connections that are in their handshake, that found no room, and whose handshake failed.
    pub listener: Arc<dyn Fn() -> (usize, u64, u64) + Send + Sync>,
    /// Since when this process runs.
    pub started: Instant,
}

/// The router with `/metrics`.
pub fn router(parts: MetricsParts) -> Router {
    Router::new()
        .route("/metrics", get(scrape))
        .with_state(Arc::new(parts))
}

async fn scrape(State(parts): State<Arc<MetricsParts>>) -> Response {
    let health = tokio::time::timeout(PATIENCE, parts.fleet.store().health()).await;
    let (engine, writable) = health.map_or_else(
        |_| ("unknown".to_owned(), false),
        |health| (health.engine, health.writable),
    );
    let registry = Registry::new();
    let filled = parts
        .recorder
        .register(&registry)
        .and_then(|()| fill(&registry, &parts, &engine, writable));
    match filled.and_then(|()| TextEncoder::new().encode_to_string(&registry.gather())) {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => {
            tracing::error!(%error, "the metrics cannot be written");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "counts of a fleet are far below 2^52"
)]
fn fill(
    registry: &Registry,
    parts: &MetricsParts,
    engine: &str,
    writable: bool,
) -> prometheus::Result<()> {
    let gauge = |name: &str, help: &str, value: f64| -> prometheus::Result<()> {
        let gauge = Gauge::new(name, help)?;
        gauge.set(value);
        registry.register(Box::new(gauge))
    };
    let counter = |name: &str, help: &str, value: u64| -> prometheus::Result<()> {
        let counter = IntCounter::new(name, help)?;
        counter.inc_by(value);
        registry.register(Box::new(counter))
    };
    let by = |name: &str, help: &str, label: &str, values: &[(&str, usize)]| {
        let gauges = IntGaugeVec::new(Opts::new(name, help), &[label])?;
        for (value, count) in values {
            let count = i64::try_from(*count).unwrap_or(i64::MAX);
            gauges.with_label_values(&[value]).set(count);
        }
        registry.register(Box::new(gauges))
    };

    let mut hosts: BTreeMap<&str, usize> = [
        HostState::Online,
        HostState::Degraded,
        HostState::Offline,
        HostState::Locked,
        HostState::NeverSeen,
    ]
    .into_iter()
    .map(|state| (state.as_str(), 0))
    .collect();
    let mut vms = 0;
    for view in parts.fleet.host_views(|_| true) {
        *hosts.entry(view.state.as_str()).or_default() += 1;
        vms += view.inventory.map_or(0, |inventory| inventory.vms.len());
    }
    let hosts: Vec<_> = hosts.into_iter().collect();
    by(
        "ghost_core_hosts",
        "Hosts by the state that is shown.",
        "state",
        &hosts,
    )?;
    gauge(
        "ghost_core_vms",
        "VMs of all hosts, as last told.",
        vms as f64,
    )?;

    let mut commands: BTreeMap<&str, usize> = [
        CommandStatus::Queued,
        CommandStatus::Accepted,
        CommandStatus::Succeeded,
        CommandStatus::Failed,
        CommandStatus::Refused,
        CommandStatus::Expired,
        CommandStatus::Cancelled,
    ]
    .into_iter()
    .map(|status| (status.as_str(), 0))
    .collect();
    let (epoch, replicas) = parts.fleet.read(|state| {
        for command in state.commands() {
            *commands.entry(command.status.as_str()).or_default() += 1;
        }
        (state.epoch(), state.replicas().len())
    });
    let commands: Vec<_> = commands.into_iter().collect();
    by(
        "ghost_core_commands",
        "Commands in the queues by status; those that ended are kept for a week.",
        "status",
        &commands,
    )?;
    gauge(
        "ghost_core_epoch",
        "The epoch of the records.",
        epoch as f64,
    )?;
    gauge("ghost_core_replicas", "Replicas that run.", replicas as f64)?;
    gauge(
        "ghost_core_links",
        "Links of hosts to this replica.",
        parts.desk.link_count() as f64,
    )?;
    let counters = parts.desk.counters();
    counter(
        "ghost_core_links_total",
        "Links that came to be.",
        counters.links(),
    )?;
    counter(
        "ghost_core_links_refused_total",
        "Links that were refused.",
        counters.refused(),
    )?;
    counter(
        "ghost_core_heartbeats_total",
        "Heartbeats of hosts.",
        counters.heartbeats(),
    )?;
    let (unready, turned_away, failed) = (parts.listener)();
    gauge(
        "ghost_core_handshakes",
        "Connections that are not ready yet.",
        unready as f64,
    )?;
    counter(
        "ghost_core_connections_refused_total",
        "Connections that found no room.",
        turned_away,
    )?;
    counter(
        "ghost_core_handshakes_failed_total",
        "Handshakes that failed.",
        failed,
    )?;
    let behind = parts.fleet.behind_for().unwrap_or_default();
    gauge(
        "ghost_core_store_behind_seconds",
        "How long memory has been behind the store.",
        behind.as_secs_f64(),
    )?;
    let store = GaugeVec::new(
        Opts::new(
            "ghost_core_store_writable",
            "Whether the store takes writes.",
        ),
        &["engine"],
    )?;
    store
        .with_label_values(&[engine])
        .set(f64::from(u8::from(writable)));
    registry.register(Box::new(store))?;
    gauge(
        "ghost_core_uptime_seconds",
        "How long this process runs.",
        parts.started.elapsed().as_secs_f64(),
    )?;
    let build = IntGauge::with_opts(
        Opts::new("ghost_core_build_info", "This version, as labels.")
            .const_label("version", parts.version.clone())
            .const_label("replica", parts.replica.clone()),
    )?;
    build.set(1);
    registry.register(Box::new(build))
}
