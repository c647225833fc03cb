//! The metrics shell: `/metrics` for Prometheus, on a listener of its own.
//!
//! What happens is counted by the [`Recorder`]; what is, is read at each scrape by one use case,
//! which makes one bulk call to libvirt. A scrape never fails for libvirt being away, nor for the
//! host being unreadable: `ghost_collect_success` tells.
//!
//! Labels are bounded: a VM's id and name, kinds, states, codes and our own route and method names.
//! Nothing that a guest or a stranger says becomes one: what guests report of themselves
//! (`ghost_guest_*`) has labels of fixed sets.

mod collect;
mod guest;
mod recorder;

pub use recorder::Recorder;

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use ghost_application::UseCases;
use prometheus::{Registry, TextEncoder};
use tokio::sync::Semaphore;

use crate::convert::AgentInfo;

/// How long reading the host and libvirt may take; Prometheus itself gives up after 10 s.
const PATIENCE: Duration = Duration::from_secs(5);
/// Most scrapes at once: more than that is nobody's monitoring.
const MOST_SCRAPES: usize = 4;

struct Shell {
    use_cases: Arc<UseCases>,
    recorder: Arc<Recorder>,
    agent: AgentInfo,
    started: Instant,
    room: Semaphore,
}

/// The router with `/metrics`.
pub fn router(use_cases: Arc<UseCases>, recorder: Arc<Recorder>, agent: AgentInfo) -> Router {
    Router::new()
        .route("/metrics", get(scrape))
        .with_state(Arc::new(Shell {
            use_cases,
            recorder,
            agent,
            started: Instant::now(),
            room: Semaphore::new(MOST_SCRAPES),
        }))
}

async fn scrape(State(shell): State<Arc<Shell>>) -> Response {
    let Ok(_room) = shell.room.try_acquire() else {
        return (StatusCode::TOO_MANY_REQUESTS, "too many scrapes at once\n").into_response();
    };
    let begun = Instant::now();
    let collected = tokio::time::timeout(PATIENCE, shell.use_cases.collect_metrics.execute()).await;
    let view = match collected {
        Ok(Ok(view)) => Some(view),
        Ok(Err(error)) => {
            tracing::warn!(%error, "metrics of the host cannot be read");
            None
        }
        Err(_) => {
            tracing::warn!("reading the metrics of the host took too long");
            None
        }
    };
    let registry = Registry::new();
    let filled = shell.recorder.register(&registry).and_then(|()| {
        let (took, uptime) = (begun.elapsed(), shell.started.elapsed());
        collect::fill(&registry, view.as_ref(), &shell.agent, took, uptime)
    });
    let text = filled.and_then(|()| TextEncoder::new().encode_to_string(&registry.gather()));
    match text {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => {
            tracing::error!(%error, "the metrics cannot be written");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}
