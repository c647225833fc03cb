//! The way through to hosts: a call of `ghost.agent.v1` is carried to its host as it is, at the
//! level of HTTP/2, whatever its messages are.
//!
//! ```text
//! caller ──HTTP/2──> guard ─> Router ──HTTP/2 over HostLinks::open──> the host's gRPC server
//!            request frames ──────────────────────────────────────>
//!            <────────────────────────── answer frames, trailers
//! ```
//!
//! - Bodies are passed on frame by frame. A frame is taken from one side when the other has room
//!   for it, so that a slow reader slows its sender down and nobody else, and costs Core no memory.
//! - Whoever hangs up ends the call at the other side too, and a deadline goes along.
//! - Of a caller's metadata the host gets all but what belongs to the connection and what says who
//!   calls; that is Core's to say ([`headers`]).
//! - A call that does no harm twice, and whose way dies before there is an answer, takes another way
//!   where there is one: the link, where a direct way died.
//! - A host that vanishes in the middle ends the call with a status of ours, in the trailers.

pub(in crate::presentation) mod headers;
mod pool;
mod relay;
pub(in crate::presentation) mod replica;
pub(in crate::presentation) mod whole;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use async_trait::async_trait;
use axum::http::{Request, Response, Uri, Version};
use ghost_domain::{Error, ErrorCode, HostId, Result};
use ghost_presentation::Shape;
use ghost_proto::core::v1::{FleetAuditEntry, ListOwnAuditRequest};
use tokio::time::Instant;
use tonic::body::Body;

use crate::application::desk::OtherReplicas;
use crate::application::links::{ByteStream, HostLinks};
use crate::domain::{Caller, Replica};
use pool::Pool;
pub use pool::PoolOptions;
use relay::Relay;

/// Ways to the other replicas of this Core.
#[async_trait]
pub trait ReplicaLinks: Send + Sync {
    /// A new connection to the gRPC listener of another replica, proven by this one's certificate.
    ///
    /// # Errors
    /// `CoreUnreachable`.
    async fn open(&self, replica: &Replica) -> Result<Box<dyn ByteStream>>;
}

/// Where a call goes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// To a host whose link is here.
    Host(HostId),
    /// To the replica of this name and address, for a host whose link it has.
    Replica {
        /// Its name.
        name: String,
        /// Where it is, `host:port`.
        address: String,
    },
}

/// A call on its way out.
#[derive(Clone, Debug)]
pub struct Onward<'a> {
    /// Where it goes.
    pub target: Target,
    /// The host that it is for.
    pub host: HostId,
    /// The host's name, for errors.
    pub host_name: &'a str,
    /// Who calls.
    pub caller: &'a Caller,
    /// The id of the request, for logs on both sides.
    pub request_id: &'a str,
    /// How it ends.
    pub shape: Shape,
    /// Set once the host may have got it.
    pub sent: &'a AtomicBool,
    /// Whether it does no harm twice: it only looks, or the host knows it by its request id. Where
    /// the way that it took dies before there is an answer, it takes another one.
    pub repeatable: bool,
}

/// So long a unary call may be without an answer where its caller sets no deadline: longer than the
/// host itself takes to give one up.
const LONGEST_UNARY: Duration = Duration::from_secs(60);
/// How long another replica may take to tell of its audit log.
const LONGEST_AUDIT: Duration = Duration::from_secs(10);
/// So much later than its caller's deadline Core ends a call by itself: the host does it better.
const GRACE: Duration = Duration::from_millis(500);

/// How long another replica may take to say whether it may have hosts.
const LONGEST_LEASE: Duration = Duration::from_secs(4);

/// The way to another replica.
fn to(replica: &Replica) -> Target {
    Target::Replica {
        name: replica.name.clone(),
        address: replica.address.clone(),
    }
}

fn silent(replica: &Replica) -> Error {
    Error::new(
        ErrorCode::CoreUnreachable,
        format!("the replica {} does not answer", replica.name),
    )
}

#[async_trait]
impl OtherReplicas for Router {
    async fn may_have_hosts(&self, replica: &Replica) -> Result<bool> {
        let target = to(replica);
        let asked = async {
            let lease = self.pool.lease(&target, "of nobody").await?;
            replica::may_have_hosts(lease).await
        };
        tokio::time::timeout(LONGEST_LEASE, asked)
            .await
            .map_err(|_| silent(replica))?
    }
}

/// Carries calls to hosts.
#[derive(Debug)]
pub struct Router {
    pool: Arc<Pool>,
}

impl Router {
    /// Over the links that there are. Call it within a Tokio runtime.
    pub fn new(
        hosts: Arc<dyn HostLinks>,
        replicas: Option<Arc<dyn ReplicaLinks>>,
        options: PoolOptions,
    ) -> Self {
        Self {
            pool: Pool::start(hosts, replicas, options),
        }
    }

    /// HTTP/2 connections to hosts that are open now.
    pub fn connections(&self) -> usize {
        self.pool.connections()
    }

    /// A new stream of bytes to a host, as its link has them, also where another replica has that.
    ///
    /// # Errors
    /// `HostOffline` where there is no way to the host, `CoreUnreachable` where the replica does
    /// not answer.
    pub async fn stream(
        &self,
        target: &Target,
        host: HostId,
        host_name: &str,
    ) -> Result<Box<dyn ByteStream>> {
        match target {
            Target::Host(host) => self.pool.hosts().open(*host).await,
            Target::Replica { .. } => {
                let lease = self.pool.lease(target, host_name).await?;
                replica::carry(lease, host).await
            }
        }
    }

    /// The lines of another replica's own audit log.
    ///
    /// # Errors
    /// `CoreUnreachable` where it does not answer; what it says.
    pub async fn audit_of(
        &self,
        replica: &Replica,
        request: ListOwnAuditRequest,
    ) -> Result<Vec<FleetAuditEntry>> {
        let target = to(replica);
        let asked = async {
            let lease = self.pool.lease(&target, "of nobody").await?;
            replica::audit(lease, request).await
        };
        tokio::time::timeout(LONGEST_AUDIT, asked)
            .await
            .map_err(|_| silent(replica))?
    }

    /// Carries a call to its host and gives back the head of the answer; its body goes on by itself.
    ///
    /// # Errors
    /// `HostOffline` where there is no way to the host, `AgentUnreachable` where it breaks the call
    /// off, `DeadlineExceeded`.
    pub async fn forward(
        &self,
        onward: &Onward<'_>,
        request: Request<Body>,
    ) -> Result<Response<Body>> {
        let (mut parts, body) = request.into_parts();
        let given = relay::deadline(&parts.headers)?;
        let begun = Instant::now();
        let ends = given.map(|given| begun + given + GRACE);
        headers::towards_host(&mut parts.headers, onward)?;
        let path = parts
            .uri
            .path_and_query()
            .cloned()
            .ok_or_else(|| Error::new(ErrorCode::InvalidArgument, "the call has no path"))?;
        // The authority is nobody's address: it only has to be there.
        parts.uri = Uri::builder()
            .scheme("http")
            .authority("ghost-agent")
            .path_and_query(path)
            .build()
            .map_err(|cause| Error::internal("the call has no usable path").because(cause))?;
        parts.version = Version::HTTP_2;
        parts.extensions = Default::default();
        let answered = async {
            if !onward.repeatable {
                return self
                    .pool
                    .send(onward, Request::from_parts(parts, body), None)
                    .await;
            }
            let (bytes, _) = whole::collect(body).await?;
            let request = || Request::from_parts(parts.clone(), whole::whole(bytes.clone()));
            self.pool.send(onward, request(), Some(&request)).await
        };
        let longest = onward
            .shape
            .deadline(LONGEST_UNARY)
            .map(|most| begun + most + GRACE);
        let heads_by = match (ends, longest) {
            (Some(ends), Some(longest)) => Some(ends.min(longest)),
            (ends, longest) => ends.or(longest),
        };
        let (response, lease) = match heads_by {
            None => answered.await?,
            Some(by) => tokio::time::timeout_at(by, answered)
                .await
                .map_err(|_| relay::too_late(onward.host_name))??,
        };
        let (mut parts, body) = response.into_parts();
        headers::from_host(&mut parts.headers);
        headers::check_answer(&parts, onward.host_name)?;
        parts.version = Version::HTTP_2;
        let ended = parts.headers.contains_key(tonic::Status::GRPC_STATUS);
        let body = Relay::new(body, lease, ends, ended, onward.host_name.to_owned());
        Ok(Response::from_parts(parts, Body::new(body)))
    }
}
