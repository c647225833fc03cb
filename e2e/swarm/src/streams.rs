//! The streams that Core opens to a simulated host: `VmService.Logs` alone is there, with as many
//! bytes as one likes. `VmLogsRequest.vm` says how: `paced` is a line of 1 KiB every so many
//! microseconds (`tail_bytes`), `flood` as many as are taken. Each begins with the wall clock in
//! nanoseconds, big-endian, so that the reader sees how long it was on its way.

use std::convert::Infallible;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use ghost_infrastructure::tunnel::TunnelStream;
use ghost_proto::agent::v1::{ConsoleOutput, VmLogsRequest};
use hyper::body::Incoming;
use hyper::http;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::sync::mpsc;
use tonic::body::Body;
use tonic::server::{Grpc, ServerStreamingService};
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

const LOGS: &str = "/ghost.agent.v1.VmService/Logs";
const LINE: usize = 1024;
/// As many as the agent takes.
const MOST_CALLS: u32 = 256;

/// Serves each stream of a host's link until the host is gone.
pub(crate) async fn serve(mut incoming: mpsc::Receiver<TunnelStream>) {
    while let Some(stream) = incoming.recv().await {
        tokio::spawn(async move {
            let served = http2::Builder::new(TokioExecutor::new())
                .max_concurrent_streams(MOST_CALLS)
                .serve_connection(TokioIo::new(stream), service_fn(answer));
            // It ends when Core ends it.
            drop(served.await);
        });
    }
}

async fn answer(request: http::Request<Incoming>) -> Result<http::Response<Body>, Infallible> {
    if request.uri().path() != LOGS {
        return Ok(Status::unimplemented("a simulated host has only logs").into_http());
    }
    let codec = ProstCodec::<ConsoleOutput, VmLogsRequest>::default();
    Ok(Grpc::new(codec).server_streaming(Logs, request).await)
}

struct Logs;

impl ServerStreamingService<VmLogsRequest> for Logs {
    type Response = ConsoleOutput;
    type ResponseStream = BoxStream<'static, Result<ConsoleOutput, Status>>;
    type Future = BoxFuture<'static, Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<VmLogsRequest>) -> Self::Future {
        let request = request.into_inner();
        Box::pin(async move {
            match request.vm.as_str() {
                "flood" => Ok(Response::new(
                    futures::stream::repeat_with(|| Ok(line())).boxed(),
                )),
                "paced" => {
                    let every = Duration::from_micros(request.tail_bytes.max(1));
                    let first = tokio::time::Instant::now() + every.mul_f64(rand::random());
                    let mut ticks = tokio::time::interval_at(first, every);
                    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
                    let lines = futures::stream::unfold(ticks, async |mut ticks| {
                        ticks.tick().await;
                        Some((Ok(line()), ticks))
                    });
                    Ok(Response::new(lines.boxed()))
                }
                other => Err(Status::not_found(format!("there is no log {other:?}"))),
            }
        })
    }
}

fn line() -> ConsoleOutput {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let nanos = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
    let mut data = vec![b'.'; LINE];
    data[..8].copy_from_slice(&nanos.to_be_bytes());
    ConsoleOutput { data }
}
