//! HTTP through the router, and through real connections where the connection matters.

mod batwa;
mod guest;
mod requests;
mod roles;
mod server;
mod session;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Request, StatusCode};
use ghost_domain::Role;
use ghost_presentation::http::{Options, router};
use ghost_presentation::metrics::Recorder;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use crate::world::World;

struct Shell {
    world: World,
    router: Router,
    shutdown: CancellationToken,
    /// A key of an operator.
    key: String,
}

/// An answer, read to its end.
struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Vec<u8>,
}

impl Answer {
    fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {:?}", String::from_utf8_lossy(&self.body)))
    }

    /// The code of a problem document.
    fn code(&self) -> String {
        let problem = self.json();
        assert_eq!(self.headers["content-type"], "application/problem+json");
        assert_eq!(problem["status"], self.status.as_u16());
        problem["code"].as_str().unwrap().to_owned()
    }
}

impl Shell {
    async fn new() -> Self {
        Self::with(Options::default()).await
    }

    async fn with(options: Options) -> Self {
        Self::of(World::new().await, options).await
    }

    /// With a running VM.
    async fn running() -> Self {
        Self::of(World::running().await, Options::default()).await
    }

    async fn of(world: World, options: Options) -> Self {
        let shutdown = CancellationToken::new();
        let router = router(
            world.use_cases(),
            Recorder::new(),
            options,
            shutdown.clone(),
        );
        let key = world.key(Role::Operator).await;
        Self {
            world,
            router,
            shutdown,
            key,
        }
    }

    /// Sends a request as it is.
    async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        Answer {
            status: parts.status,
            headers: parts.headers,
            body: axum::body::to_bytes(body, 16 << 20).await.unwrap().to_vec(),
        }
    }

    /// Sends a request with the operator's key; a body is JSON.
    async fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header("authorization", format!("Bearer {}", self.key));
        if !body.is_empty() {
            request = request.header("content-type", "application/json");
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.send(request.body(Body::from(body.to_owned())).unwrap())
            .await
    }
}

/// Waits for a condition.
async fn until(condition: impl Fn() -> bool) {
    let waited = tokio::time::timeout(std::time::Duration::from_secs(20), async {
        while !condition() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    });
    waited.await.unwrap();
}
