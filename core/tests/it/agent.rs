//! A host: a real gRPC server with services that do what the test asks for, at the end of links in
//! memory that can be cut.

mod guest;

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use futures::{Stream, StreamExt};
use ghost_core::application::links::{ByteStream, HostLinks};
use ghost_domain::{Error, ErrorCode, HostId, Result};
use ghost_presentation::grpc::status::to_status;
use ghost_proto::agent::v1::guest_service_server::GuestServiceServer;
use ghost_proto::agent::v1::image_service_server::{ImageService, ImageServiceServer};
use ghost_proto::agent::v1::operation_service_server::OperationServiceServer;
use ghost_proto::agent::v1::vm_service_server::{VmService, VmServiceServer};
use ghost_proto::agent::v1::*;
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, DuplexStream, ReadBuf};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataMap;
use tonic::transport::Server;
use tonic::transport::server::Connected;
use tonic::{Request, Response, Status, Streaming};

type Answer<T> = Result<Response<T>, Status>;
type Items<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What the host saw.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// Metadata of the calls, in order.
    pub(crate) calls: Mutex<Vec<(String, MetadataMap)>>,
    /// Calls that run.
    pub(crate) running: AtomicUsize,
    /// VMs that were asked for.
    pub(crate) created: Mutex<Vec<CreateVmRequest>>,
    /// And by HTTP.
    pub(crate) made_by_http: AtomicUsize,
    /// Sizes that terminals got.
    pub(crate) sizes: Mutex<Vec<String>>,
}

/// Counts a call for as long as it runs.
struct Running(Arc<Seen>);

impl Running {
    fn new(seen: &Arc<Seen>) -> Self {
        seen.running.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(seen))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::SeqCst);
    }
}

/// One end of a link in memory.
pub(crate) struct End {
    /// Bytes that were read to look at them.
    begun: Vec<u8>,
    stream: DuplexStream,
}

impl Connected for End {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for End {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        if !self.begun.is_empty() {
            let many = self.begun.len().min(buffer.remaining());
            buffer.put_slice(&self.begun[..many]);
            self.begun.drain(..many);
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for End {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, data)
    }

    fn poll_flush(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// A host.
pub(crate) struct FakeAgent {
    pub(crate) seen: Arc<Seen>,
    dial: mpsc::Sender<DuplexStream>,
    cut: Mutex<CancellationToken>,
    /// Links that were opened.
    pub(crate) opened: AtomicUsize,
    _served: tokio_util::task::AbortOnDropHandle<()>,
}

impl FakeAgent {
    pub(crate) fn start() -> Arc<Self> {
        let seen = Arc::new(Seen::default());
        let (dial, mut accepted) = mpsc::channel::<DuplexStream>(16);
        let service = Fake(Arc::clone(&seen));
        let (grpc, calls) = mpsc::channel::<End>(16);
        let api = api(Arc::clone(&seen));
        // As an agent does: the first bytes tell which of its servers is meant.
        let told_apart = tokio::spawn(async move {
            while let Some(mut stream) = accepted.recv().await {
                let (grpc, api) = (grpc.clone(), api.clone());
                tokio::spawn(async move {
                    let mut begun = vec![0; 3];
                    if stream.read_exact(&mut begun).await.is_err() {
                        return;
                    }
                    let http2 = begun == b"PRI";
                    let end = End { begun, stream };
                    if http2 {
                        grpc.send(end).await.unwrap();
                        return;
                    }
                    let service = hyper_util::service::TowerToHyperService::new(api);
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(hyper_util::rt::TokioIo::new(end), service)
                        .with_upgrades()
                        .await;
                });
            }
        });
        let told_apart = tokio_util::task::AbortOnDropHandle::new(told_apart);
        let served = tokio::spawn(async move {
            let _told_apart = told_apart;
            let incoming = ReceiverStream::new(calls).map(Ok::<_, Status>);
            Server::builder()
                .max_concurrent_streams(128)
                .initial_stream_window_size(256 * 1024)
                .initial_connection_window_size(16 * 1024 * 1024)
                .add_service(VmServiceServer::new(service.clone()))
                .add_service(ImageServiceServer::new(service.clone()))
                .add_service(OperationServiceServer::new(service.clone()))
                .add_service(GuestServiceServer::new(service))
                .serve_with_incoming(incoming)
                .await
                .unwrap();
        });
        Arc::new(Self {
            seen,
            dial,
            cut: Mutex::default(),
            opened: AtomicUsize::new(0),
            _served: tokio_util::task::AbortOnDropHandle::new(served),
        })
    }

    /// Cuts all links that there are; new ones can be opened.
    pub(crate) fn cut(&self) {
        std::mem::take(&mut *self.cut.lock()).cancel();
    }

    pub(crate) async fn open(&self) -> DuplexStream {
        let (core, mut near) = tokio::io::duplex(64 * 1024);
        let (mut far, agent) = tokio::io::duplex(64 * 1024);
        let cut = self.cut.lock().clone();
        tokio::spawn(async move {
            tokio::select! {
                () = cut.cancelled() => {}
                _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
            }
        });
        self.opened.fetch_add(1, Ordering::SeqCst);
        self.dial.send(agent).await.unwrap();
        core
    }

    /// Waits until so many calls run here.
    pub(crate) async fn until_running(&self, wanted: usize) {
        let reached = async {
            while self.seen.running.load(Ordering::SeqCst) != wanted {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), reached)
            .await
            .unwrap_or_else(|_| {
                panic!(
                    "{} calls run and not {wanted}",
                    self.seen.running.load(Ordering::SeqCst)
                )
            });
    }
}

/// Links to hosts in memory.
#[derive(Default)]
pub(crate) struct MemoryLinks(
    pub(crate) Mutex<HashMap<HostId, Arc<FakeAgent>>>,
    /// The way that calls take.
    AtomicU64,
);

impl MemoryLinks {
    /// Calls take another way from now on.
    pub(crate) fn another_way(&self) {
        self.1.fetch_add(1, Ordering::SeqCst);
    }
}

#[async_trait]
impl HostLinks for MemoryLinks {
    async fn open(&self, host: HostId) -> Result<Box<dyn ByteStream>> {
        let agent = self.0.lock().get(&host).cloned();
        match agent {
            Some(agent) => Ok(Box::new(agent.open().await)),
            None => Err(Error::new(ErrorCode::HostOffline, "the host has no link")),
        }
    }

    fn has(&self, host: HostId) -> bool {
        self.0.lock().contains_key(&host)
    }

    async fn way(&self, _: HostId) -> u64 {
        self.1.load(Ordering::SeqCst)
    }

    fn round_trip(&self, _: HostId) -> Option<Duration> {
        None
    }

    fn cut(&self, host: HostId, _: &'static str, _: &str) {
        if let Some(agent) = self.0.lock().remove(&host) {
            agent.cut();
        }
    }
}

/// What the host's HTTP API answers: what it was told, and who told it.
fn api(seen: Arc<Seen>) -> axum::Router {
    use axum::extract::ws::WebSocketUpgrade;
    use axum::http::{HeaderMap, Method, StatusCode, Uri};
    use axum::response::IntoResponse;
    use axum::routing::{any, get};

    let echo = {
        let seen = Arc::clone(&seen);
        move |method: Method, uri: Uri, headers: HeaderMap, body: String| async move {
            let names: Vec<&str> = headers.keys().map(|name| name.as_str()).collect();
            let told = serde_json::json!({
                "method": method.as_str(), "uri": uri.to_string(), "headers": names,
                "principal": headers["ghost-principal"].to_str().unwrap(), "body": body,
            });
            if method == Method::POST && uri.path() == "/v1/vms" {
                seen.made_by_http.fetch_add(1, Ordering::SeqCst);
                let location = [("location", "/v1/operations/abc"), ("ghost-host", "a lie")];
                return (StatusCode::ACCEPTED, location, axum::Json(told)).into_response();
            }
            axum::Json(told).into_response()
        }
    };
    let events = {
        let seen = Arc::clone(&seen);
        move || async move {
            let running = Running::new(&seen);
            let first = futures::stream::iter([Ok::<_, std::io::Error>("data: one\n\n")]);
            let stream = first.chain(futures::stream::pending()).map(move |item| {
                let _ = &running;
                item
            });
            axum::body::Body::from_stream(stream)
        }
    };
    let shell = move |headers: HeaderMap, upgrade: WebSocketUpgrade| async move {
        let principal = headers["ghost-principal"].to_str().unwrap().to_owned();
        upgrade
            .protocols(["ghost.v1"])
            .on_upgrade(move |mut socket| async move {
                let _running = Running::new(&seen);
                let _ = socket.send(principal.into()).await;
                while let Some(Ok(message)) = socket.recv().await {
                    if socket.send(message).await.is_err() {
                        break;
                    }
                }
            })
    };
    axum::Router::new()
        .route("/v1/events", get(events))
        .route("/v1/vms/{vm}/shell", get(shell))
        .fallback(any(echo))
}

#[derive(Clone)]
struct Fake(Arc<Seen>);

impl Fake {
    fn note<T>(&self, name: &str, request: Request<T>) -> T {
        let (metadata, _, message) = request.into_parts();
        self.0.calls.lock().push((name.to_owned(), metadata));
        message
    }
}

fn operation(id: &str) -> Operation {
    Operation {
        id: id.to_owned(),
        ..Operation::default()
    }
}

/// `count:<messages>:<bytes of each>`
fn counted(vm: &str) -> Option<(u64, usize)> {
    let (count, size) = vm.strip_prefix("count:")?.split_once(':')?;
    Some((count.parse().ok()?, size.parse().ok()?))
}

#[tonic::async_trait]
impl VmService for Fake {
    type WatchStream = Items<Vm>;
    type ConsoleStream = Items<ConsoleOutput>;
    type LogsStream = Items<ConsoleOutput>;

    async fn create(&self, request: Request<CreateVmRequest>) -> Answer<Operation> {
        let request = self.note("create", request);
        self.0.created.lock().push(request);
        let mut response = Response::new(operation("made"));
        // What only Core may say.
        let lie = "somewhere-else".parse().unwrap();
        response.metadata_mut().insert("ghost-host", lie);
        Ok(response)
    }

    async fn get(&self, request: Request<GetVmRequest>) -> Answer<Vm> {
        let vm = self.note("get", request).vm;
        match vm.as_str() {
            "missing" => Err(to_status(
                &Error::new(ErrorCode::VmNotFound, "there is no VM missing").hint("look again"),
            )),
            "slow at first" if self.0.calls.lock().len() > 1 => Ok(Response::new(Vm {
                id: vm.clone(),
                name: vm,
                ..Vm::default()
            })),
            "slow" | "slow at first" => {
                let _running = Running::new(&self.0);
                std::future::pending().await
            }
            _ => Ok(Response::new(Vm {
                id: vm.clone(),
                name: vm,
                ..Vm::default()
            })),
        }
    }

    async fn list(&self, request: Request<ListVmsRequest>) -> Answer<ListVmsResponse> {
        self.note("list", request);
        Ok(Response::new(ListVmsResponse::default()))
    }

    async fn update(&self, request: Request<UpdateVmRequest>) -> Answer<Operation> {
        self.note("update", request);
        Ok(Response::new(operation("updated")))
    }

    async fn delete(&self, request: Request<DeleteVmRequest>) -> Answer<Operation> {
        self.note("delete", request);
        Ok(Response::new(operation("deleted")))
    }

    async fn watch(&self, request: Request<WatchVmRequest>) -> Answer<Items<Vm>> {
        let vm = self.note("watch", request).vm;
        let running = Running::new(&self.0);
        let message = |generation, size: usize| Vm {
            generation,
            state_reason: "x".repeat(size),
            ..Vm::default()
        };
        let stream: Items<Vm> = match counted(&vm) {
            Some((count, size)) => {
                futures::stream::iter((0..count).map(move |number| Ok(message(number, size))))
                    .boxed()
            }
            None if vm == "fails" => futures::stream::iter([
                Ok(message(0, 10)),
                Ok(message(1, 10)),
                Err(Status::data_loss("two and no more")),
            ])
            .boxed(),
            None => futures::stream::iter([Ok(message(0, 10))])
                .chain(futures::stream::pending())
                .boxed(),
        };
        Ok(Response::new(Box::pin(stream.map(move |item| {
            let _ = &running;
            item
        }))))
    }

    async fn start(&self, request: Request<StartVmRequest>) -> Answer<Operation> {
        let vm = self.note("start", request).vm;
        Ok(Response::new(operation(&format!("started {vm}"))))
    }

    async fn stop(&self, request: Request<StopVmRequest>) -> Answer<Operation> {
        self.note("stop", request);
        Ok(Response::new(operation("stopped")))
    }

    async fn restart(&self, request: Request<RestartVmRequest>) -> Answer<Operation> {
        self.note("restart", request);
        Ok(Response::new(operation("restarted")))
    }

    async fn pause(&self, request: Request<PauseVmRequest>) -> Answer<Operation> {
        self.note("pause", request);
        Ok(Response::new(operation("paused")))
    }

    async fn resume(&self, request: Request<ResumeVmRequest>) -> Answer<Operation> {
        self.note("resume", request);
        Ok(Response::new(operation("resumed")))
    }

    async fn console(
        &self,
        request: Request<Streaming<ConsoleInput>>,
    ) -> Answer<Items<ConsoleOutput>> {
        let running = Running::new(&self.0);
        let input = self.note("console", request);
        let output = input.map(move |item| {
            let _ = &running;
            item.map(|input| ConsoleOutput { data: input.data })
        });
        Ok(Response::new(Box::pin(output)))
    }

    async fn logs(&self, request: Request<VmLogsRequest>) -> Answer<Items<ConsoleOutput>> {
        self.note("logs", request);
        Ok(Response::new(Box::pin(futures::stream::empty())))
    }
}

#[tonic::async_trait]
impl ImageService for Fake {
    async fn import(&self, request: Request<Streaming<ImportImageRequest>>) -> Answer<Operation> {
        let mut input = self.note("import", request);
        let running = Running::new(&self.0);
        let mut sum = Sha256::new();
        let mut first = true;
        while let Some(message) = input.message().await? {
            if std::mem::take(&mut first)
                && matches!(&message.part, Some(import_image_request::Part::Header(header)) if header.name == "refused")
            {
                return Err(Status::failed_precondition("not this one"));
            }
            if let Some(import_image_request::Part::Data(chunk)) = message.part {
                sum.update(&chunk);
            }
        }
        drop(running);
        Ok(Response::new(operation(&hex::encode(sum.finalize()))))
    }

    async fn get(&self, request: Request<GetImageRequest>) -> Answer<Image> {
        self.note("get image", request);
        Ok(Response::new(Image::default()))
    }

    async fn list(&self, request: Request<ListImagesRequest>) -> Answer<ListImagesResponse> {
        self.note("list images", request);
        Ok(Response::new(ListImagesResponse::default()))
    }

    async fn list_catalogue(
        &self,
        request: Request<ListCatalogueRequest>,
    ) -> Answer<ListCatalogueResponse> {
        self.note("list catalogue", request);
        Ok(Response::new(ListCatalogueResponse::default()))
    }

    async fn pull(&self, request: Request<PullImageRequest>) -> Answer<Operation> {
        self.note("pull", request);
        Ok(Response::new(operation("pulled")))
    }

    async fn delete(&self, request: Request<DeleteImageRequest>) -> Answer<Operation> {
        self.note("delete image", request);
        Ok(Response::new(operation("deleted")))
    }
}
