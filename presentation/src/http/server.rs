//! Serving a router on a listener, with bounds: connections, headers, slow senders.

use std::pin::pin;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::connection::{self, ConnectionLimits, Listener};

/// Bounds of a server.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Bounds of its connections.
    pub connections: ConnectionLimits,
    /// How long the head of a request may take, and how long a kept connection may stay idle.
    pub head: Duration,
    /// How long connections may take to end after a shutdown before they are cut.
    pub grace: Duration,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            connections: ConnectionLimits::default(),
            head: Duration::from_secs(15),
            grace: Duration::from_secs(3),
        }
    }
}

/// Most bytes of a request's head.
const MOST_HEAD: usize = 32 * 1024;

/// Serves until `shutdown` is cancelled, then lets requests end; those that do not within the
/// grace are cut.
pub async fn serve(
    listener: Listener,
    router: Router,
    options: ServerOptions,
    shutdown: CancellationToken,
) {
    let tasks = TaskTracker::new();
    let cut = CancellationToken::new();
    // HTTP/1 only: telling the versions apart waits for the first bytes without a limit, and events
    // and uploads gain nothing from HTTP/2 here.
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(options.head)
        .max_headers(64)
        .max_buf_size(MOST_HEAD);
    let serve = {
        let (tasks, cut, shutdown) = (tasks.clone(), cut.clone(), shutdown.clone());
        move |mut connection: connection::Connection| {
            let (builder, router) = (builder.clone(), router.clone());
            let (cut, shutdown) = (cut.clone(), shutdown.clone());
            tasks.track_future(async move {
                connection.cut_by(cut);
                let address = connection.address();
                let peer = connection.peer().clone();
                let service = TowerToHyperService::new(tower::util::MapRequest::new(
                    router,
                    move |mut request: hyper::Request<hyper::body::Incoming>| {
                        // The guard believes nothing else about who is there.
                        request.extensions_mut().insert(peer.clone());
                        request
                    },
                ));
                let mut serving = pin!(
                    builder
                        .serve_connection(TokioIo::new(connection), service)
                        // For WebSockets, which then are on their own: they end with `shutdown` too.
                        .with_upgrades()
                );
                let ended = tokio::select! {
                    ended = serving.as_mut() => ended,
                    () = shutdown.cancelled() => {
                        serving.as_mut().graceful_shutdown();
                        serving.await
                    }
                };
                if let Err(error) = ended {
                    tracing::debug!(?address, %error, "a connection ended with a fault");
                }
            })
        }
    };
    connection::accept(listener, options.connections, None, shutdown, serve).await;
    tasks.close();
    if tokio::time::timeout(options.grace, tasks.wait())
        .await
        .is_err()
    {
        cut.cancel();
        drop(tokio::time::timeout(Duration::from_secs(1), tasks.wait()).await);
    }
}
