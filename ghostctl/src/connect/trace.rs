//! The ids that find one run of ghostctl in the agent's log and traces.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::{Request, Status};
use uuid::Uuid;

/// W3C trace context (<https://www.w3.org/TR/trace-context/>) and a request id, one of each a run.
#[derive(Clone)]
pub(crate) struct Trace {
    trace: Uuid,
    span: [u8; 8],
    parent: String,
    request: String,
    metadata: Option<(MetadataValue<Ascii>, MetadataValue<Ascii>)>,
    used: Arc<AtomicBool>,
}

impl Trace {
    pub(crate) fn new() -> Self {
        // A version 4 UUID has 122 random bits and is never zero, as the standard demands.
        let trace = Uuid::new_v4();
        let number = Uuid::new_v4().as_u64_pair().0;
        let parent = format!("00-{}-{number:016x}-01", trace.simple());
        let request = Uuid::new_v4().to_string();
        let metadata = parent.parse().ok().zip(request.parse().ok());
        Self {
            trace,
            span: number.to_be_bytes(),
            parent,
            request,
            metadata,
            used: Arc::default(),
        }
    }

    /// The trace's id.
    pub(crate) fn trace_id(&self) -> Vec<u8> {
        self.trace.as_bytes().to_vec()
    }

    /// The id of this run's own span, the parent of what the agent does for it.
    pub(crate) fn span_id(&self) -> Vec<u8> {
        self.span.to_vec()
    }

    /// The id of this run's requests in the agent's log.
    pub(crate) fn request_id(&self) -> &str {
        &self.request
    }

    /// An agent is about to be asked.
    pub(super) fn set_used(&self) {
        self.used.store(true, Ordering::Relaxed);
    }

    /// Whether an agent was asked at all.
    pub(crate) fn is_used(&self) -> bool {
        self.used.load(Ordering::Relaxed)
    }

    /// What `--debug` shows.
    pub(crate) fn lines(&self) -> [String; 2] {
        [
            format!("traceparent {}", self.parent),
            format!("x-request-id {}", self.request),
        ]
    }
}

impl Interceptor for Trace {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some((parent, id)) = &self.metadata {
            let metadata = request.metadata_mut();
            metadata.insert("traceparent", parent.clone());
            metadata.insert("x-request-id", id.clone());
        }
        Ok(request)
    }
}
