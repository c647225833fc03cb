//! Traces by OTLP over gRPC (<https://opentelemetry.io/docs/specs/otlp/>).
//!
//! A collector that is away, slow or broken costs the agent nothing but its traces: spans go into
//! a bounded queue that drops what does not fit, one thread sends them in batches with a time
//! limit for each, and the log says once that they do not arrive and once that they do again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ghost_domain::{Error, Result};
use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracer, SdkTracerProvider, SpanData,
};

use super::OtlpOptions;

/// Spans that wait for delivery, at most; what comes on top is dropped.
const MOST_WAITING: usize = 4096;
/// Spans of one delivery, at most.
const MOST_AT_ONCE: usize = 512;

/// Makes the provider. Must be called within a Tokio runtime, which carries the connection.
pub(super) fn provider(options: &OtlpOptions) -> Result<(SdkTracerProvider, SdkTracer)> {
    let unusable =
        |cause: &dyn std::fmt::Display| Error::internal("traces cannot be set up").because(cause);
    let exporter = Quiet::new(options).map_err(|cause| unusable(&cause))?;
    let batches = BatchConfigBuilder::default()
        .with_max_queue_size(MOST_WAITING)
        .with_max_export_batch_size(MOST_AT_ONCE)
        .with_scheduled_delay(Duration::from_secs(1))
        .build();
    let resource = Resource::builder()
        .with_service_name(options.service.clone())
        .with_attributes([
            KeyValue::new("service.version", options.version.clone()),
            KeyValue::new("service.instance.id", options.instance.clone()),
        ])
        .build();
    let provider = SdkTracerProvider::builder()
        .with_span_processor(
            BatchSpanProcessor::builder(exporter)
                .with_batch_config(batches)
                .build(),
        )
        // A caller that traces decides for its calls; the ratio is for traces that begin here.
        .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(
            options.sampling,
        ))))
        .with_resource(resource)
        .build();
    let tracer = provider.tracer("ghost-agent");
    Ok((provider, tracer))
}

/// Delivers, and tells of failures once and not for every batch.
#[derive(Debug)]
pub(super) struct Quiet {
    inner: SpanExporter,
    endpoint: String,
    timeout: Duration,
    failing: AtomicBool,
}

impl Quiet {
    pub(super) fn new(options: &OtlpOptions) -> Result<Self, ExporterBuildError> {
        let inner = SpanExporter::builder()
            .with_tonic()
            .with_endpoint(&options.endpoint)
            .with_timeout(options.timeout)
            .build()?;
        Ok(Self {
            inner,
            endpoint: options.endpoint.clone(),
            timeout: options.timeout,
            failing: AtomicBool::new(false),
        })
    }
}

impl opentelemetry_sdk::trace::SpanExporter for Quiet {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let result = self.inner.export(batch).await;
        match &result {
            Err(error) if !self.failing.swap(true, Ordering::Relaxed) => {
                tracing::warn!(
                    endpoint = self.endpoint,
                    %error,
                    "traces do not reach the collector; they are dropped until it is there"
                );
            }
            Ok(()) if self.failing.swap(false, Ordering::Relaxed) => {
                tracing::info!(endpoint = self.endpoint, "traces reach the collector again");
            }
            Ok(()) | Err(_) => {}
        }
        // Told already; the processor would log it again.
        Ok(())
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout.min(self.timeout))
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}
