//! The ids that find one run of ghostctl in the agent's log and traces.

use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::{Request, Status};
use uuid::Uuid;

/// W3C trace context (<https://www.w3.org/TR/trace-context/>) and a request id, one of each a run.
#[derive(Clone)]
pub(crate) struct Trace {
    parent: String,
    request: String,
    metadata: Option<(MetadataValue<Ascii>, MetadataValue<Ascii>)>,
}

impl Trace {
    pub(crate) fn new() -> Self {
        // A version 4 UUID has 122 random bits and is never zero, as the standard demands.
        let (trace, span) = (Uuid::new_v4(), Uuid::new_v4());
        let span = span.simple().to_string();
        let parent = format!("00-{}-{}-01", trace.simple(), &span[..16]);
        let request = Uuid::new_v4().to_string();
        let metadata = parent.parse().ok().zip(request.parse().ok());
        Self {
            parent,
            request,
            metadata,
        }
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
