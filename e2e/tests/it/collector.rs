//! A small OTLP collector: takes spans and remembers them.

use std::sync::{Arc, Mutex};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// A span.
#[derive(Clone, Debug)]
pub(crate) struct Span {
    pub(crate) trace: String,
    pub(crate) id: String,
    pub(crate) parent: String,
    /// The `service.name` of whoever sent it.
    pub(crate) service: String,
    pub(crate) name: String,
    /// Keys and values of strings among its attributes.
    pub(crate) attributes: Vec<(String, String)>,
}

/// The collector; gone when dropped.
pub(crate) struct Collector {
    runtime: Option<tokio::runtime::Runtime>,
    port: u16,
    spans: Arc<Mutex<Vec<Span>>>,
}

struct Service(Arc<Mutex<Vec<Span>>>);

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[async_trait::async_trait]
impl TraceService for Service {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        use opentelemetry_proto::tonic::common::v1::KeyValue;
        use opentelemetry_proto::tonic::common::v1::any_value::Value;
        let spans = request
            .into_inner()
            .resource_spans
            .into_iter()
            .flat_map(|resource| {
                let service = resource
                    .resource
                    .and_then(|resource| {
                        let named = |attribute: &KeyValue| attribute.key == "service.name";
                        match resource.attributes.into_iter().find(named)?.value?.value? {
                            Value::StringValue(name) => Some(name),
                            _ => None,
                        }
                    })
                    .unwrap_or_default();
                resource
                    .scope_spans
                    .into_iter()
                    .flat_map(|scope| scope.spans)
                    .map(move |span| (service.clone(), span))
            })
            .map(|(service, span)| Span {
                service,
                trace: hex(&span.trace_id),
                id: hex(&span.span_id),
                parent: hex(&span.parent_span_id),
                name: span.name,
                attributes: span
                    .attributes
                    .into_iter()
                    .filter_map(|attribute| match attribute.value?.value? {
                        Value::StringValue(value) => Some((attribute.key, value)),
                        _ => None,
                    })
                    .collect(),
            });
        self.0.lock().unwrap().extend(spans);
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    pub(crate) fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let spans = Arc::new(Mutex::new(Vec::new()));
        let listener = runtime
            .block_on(tokio::net::TcpListener::bind(("127.0.0.1", 0)))
            .unwrap();
        let port = listener.local_addr().unwrap().port();
        let service = TraceServiceServer::new(Service(Arc::clone(&spans)));
        runtime.spawn(
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(TcpListenerStream::new(listener)),
        );
        Self {
            runtime: Some(runtime),
            port,
            spans,
        }
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The spans of a trace, as far as they have come.
    pub(crate) fn of(&self, trace: &str) -> Vec<Span> {
        let spans = self.spans.lock().unwrap();
        spans
            .iter()
            .filter(|span| span.trace == trace)
            .cloned()
            .collect()
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
