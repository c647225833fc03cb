//! The way through to a host, with a real gRPC client at one end and a real gRPC server at the
//! other.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use ghost_core::domain::{Caller, CallerSource};
use ghost_core::presentation::route::{Onward, PoolOptions, Router, Target};
use ghost_domain::{ErrorCode, HostId, Role, TenantName};
use ghost_presentation::grpc::access;
use ghost_presentation::grpc::status::to_status;
use ghost_proto::agent::v1::image_service_client::ImageServiceClient;
use ghost_proto::agent::v1::vm_service_client::VmServiceClient;
use ghost_proto::agent::v1::*;
use hyper_util::rt::{TokioExecutor, TokioIo};
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use tonic::body::Body;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt;

use crate::agent::{FakeAgent, MemoryLinks};

/// A host behind a router behind a listener.
struct World {
    host: HostId,
    agent: Arc<FakeAgent>,
    links: Arc<MemoryLinks>,
    router: Arc<Router>,
    address: std::net::SocketAddr,
    channel: Channel,
    _served: tokio_util::task::AbortOnDropHandle<()>,
}

fn caller() -> Caller {
    Caller {
        name: "alice".into(),
        user: None,
        tenant: Some(TenantName::new("acme").unwrap()),
        role: Role::Operator,
        hosts: None,
        source: CallerSource::Certificate,
    }
}

/// A listener before `router`, as Core's is but for the guard.
async fn listen(
    router: Arc<Router>,
    host: HostId,
) -> (std::net::SocketAddr, tokio::task::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let served = tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            stream.set_nodelay(true).unwrap();
            let router = Arc::clone(&router);
            let service = hyper::service::service_fn(
                move |request: axum::http::Request<hyper::body::Incoming>| {
                    let router = Arc::clone(&router);
                    async move {
                        let caller = caller();
                        let onward = Onward {
                            target: Target::Host(host),
                            host,
                            host_name: "pc",
                            caller: &caller,
                            request_id: "r-1",
                            shape: access::method(request.uri().path()).unwrap().shape,
                            sent: &AtomicBool::new(false),
                            repeatable: request.headers().contains_key("test-repeatable"),
                        };
                        let answer = router.forward(&onward, request.map(Body::new)).await;
                        Ok::<_, Infallible>(
                            answer.unwrap_or_else(|error| to_status(&error).into_http()),
                        )
                    }
                },
            );
            tokio::spawn(
                hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                    .max_concurrent_streams(256)
                    .serve_connection(TokioIo::new(stream), service),
            );
        }
    });
    (address, served)
}

async fn world_with(options: PoolOptions) -> World {
    let host = HostId::random();
    let agent = FakeAgent::start();
    let links = Arc::new(MemoryLinks::default());
    links.0.lock().insert(host, Arc::clone(&agent));
    let router = Arc::new(Router::new(links.clone(), None, options));
    let (address, served) = listen(Arc::clone(&router), host).await;
    let channel = Endpoint::from_shared(format!("http://{address}"))
        .unwrap()
        .connect()
        .await
        .unwrap();
    World {
        host,
        agent,
        links,
        router,
        address,
        channel,
        _served: tokio_util::task::AbortOnDropHandle::new(served),
    }
}

async fn world() -> World {
    world_with(PoolOptions::default()).await
}

fn vms(world: &World) -> VmServiceClient<Channel> {
    VmServiceClient::new(world.channel.clone())
}

fn reason(status: &Status) -> String {
    status
        .get_details_error_info()
        .map(|info| info.reason)
        .unwrap_or_default()
}

#[tokio::test]
async fn a_unary_call_arrives_with_its_caller_and_without_what_is_not_the_hosts() {
    let world = world().await;
    let mut request = Request::new(GetVmRequest { vm: "web".into() });
    let metadata = request.metadata_mut();
    metadata.insert("authorization", "Bearer ghost_a_b".parse().unwrap());
    metadata.insert("ghost-role", "admin".parse().unwrap());
    metadata.insert("ghost-host", "pc".parse().unwrap());
    metadata.insert("my-own", "kept".parse().unwrap());
    let vm = vms(&world).get(request).await.unwrap().into_inner();
    assert_eq!(vm.name, "web");
    let calls = world.agent.seen.calls.lock();
    let (name, seen) = &calls[0];
    assert_eq!(name, "get");
    assert_eq!(seen.get("ghost-principal").unwrap(), "acme/alice");
    assert_eq!(seen.get("ghost-tenant").unwrap(), "acme");
    assert_eq!(seen.get_all("ghost-role").iter().count(), 1);
    assert_eq!(seen.get("ghost-role").unwrap(), "operator");
    assert_eq!(seen.get("x-request-id").unwrap(), "r-1");
    assert_eq!(seen.get("my-own").unwrap(), "kept");
    assert!(seen.get("authorization").is_none());
    assert!(seen.get("ghost-host").is_none());
}

#[tokio::test]
async fn an_error_of_the_host_arrives_with_its_details() {
    let world = world().await;
    let mut client = vms(&world);
    let request = GetVmRequest {
        vm: "missing".into(),
    };
    let status = client.get(request).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    assert_eq!(reason(&status), "vm_not_found");
    let info = status.get_details_error_info().unwrap();
    assert_eq!(info.metadata["hint"], "look again");

    // In the middle of a stream too.
    let request = WatchVmRequest { vm: "fails".into() };
    let mut stream = client.watch(request).await.unwrap().into_inner();
    assert!(stream.message().await.unwrap().is_some());
    assert!(stream.message().await.unwrap().is_some());
    let status = stream.message().await.unwrap_err();
    assert_eq!(
        (status.code(), status.message()),
        (Code::DataLoss, "two and no more")
    );
}

#[tokio::test]
async fn what_a_host_says_in_cores_name_does_not_arrive() {
    let world = world().await;
    let answer = vms(&world)
        .create(CreateVmRequest::default())
        .await
        .unwrap();
    assert!(answer.metadata().get("ghost-host").is_none());
    assert_eq!(answer.into_inner().id, "made");
}

#[tokio::test]
async fn streams_go_both_ways_at_once() {
    let world = world().await;
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let input = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let mut output = vms(&world).console(input).await.unwrap().into_inner();
    // Each byte comes back before the next one goes.
    for byte in 0..50u8 {
        let data = vec![byte; 100];
        let input = ConsoleInput {
            data: data.clone(),
            ..ConsoleInput::default()
        };
        sender.send(input).await.unwrap();
        assert_eq!(output.message().await.unwrap().unwrap().data, data);
    }
    // The end of the input is the end of the output.
    drop(sender);
    assert!(output.message().await.unwrap().is_none());
    world.agent.until_running(0).await;
}

#[tokio::test]
async fn an_upload_of_64_mib_arrives_whole() {
    let world = world().await;
    let piece = |number: u64| -> Bytes {
        let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        (0..256 * 1024)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state.to_le_bytes()[0]
            })
            .collect::<Vec<u8>>()
            .into()
    };
    let mut sum = Sha256::new();
    for number in 0..256 {
        sum.update(piece(number));
    }
    let messages = futures::stream::iter(0..256).map(move |number| ImportImageRequest {
        part: Some(import_image_request::Part::Data(piece(number))),
    });
    let answer = ImageServiceClient::new(world.channel.clone())
        .import(messages)
        .await
        .unwrap();
    assert_eq!(answer.into_inner().id, hex::encode(sum.finalize()));
}

#[tokio::test]
async fn an_upload_that_the_host_refuses_at_once_says_why() {
    let world = world().await;
    let header = ImportImageRequest {
        part: Some(import_image_request::Part::Header(ImportImageHeader {
            name: "refused".into(),
            ..ImportImageHeader::default()
        })),
    };
    let chunk = ImportImageRequest {
        part: Some(import_image_request::Part::Data(vec![7; 64 * 1024].into())),
    };
    // The sender would go on for ever.
    let messages = futures::stream::iter([header]).chain(futures::stream::repeat(chunk));
    let status = ImageServiceClient::new(world.channel.clone())
        .import(messages)
        .await
        .unwrap_err();
    assert_eq!(status.message(), "not this one");
    world.agent.until_running(0).await;
}

#[tokio::test]
async fn whoever_hangs_up_ends_the_call_on_the_host() {
    let world = world().await;
    let mut client = vms(&world);
    // A stream that was begun.
    let request = WatchVmRequest {
        vm: "forever".into(),
    };
    let mut stream = client.watch(request).await.unwrap().into_inner();
    stream.message().await.unwrap().unwrap();
    world.agent.until_running(1).await;
    drop(stream);
    world.agent.until_running(0).await;

    // A unary call that has no answer yet.
    let mut waiting = client.clone();
    let call = tokio::spawn(async move { waiting.get(GetVmRequest { vm: "slow".into() }).await });
    world.agent.until_running(1).await;
    call.abort();
    world.agent.until_running(0).await;

    // One whose input is still open, by a caller whose connection is gone.
    let (near, mut far) = tokio::io::duplex(64 * 1024);
    let mut stream = tokio::net::TcpStream::connect(world.address).await.unwrap();
    let pump = tokio::spawn(async move {
        let _ = tokio::io::copy_bidirectional(&mut far, &mut stream).await;
    });
    let mut near = Some(near);
    let channel = Endpoint::from_static("http://core")
        .connect_with_connector(tower::service_fn(move |_| {
            let near = near.take().map(TokioIo::new);
            async move { near.ok_or_else(|| std::io::Error::other("it was cut")) }
        }))
        .await
        .unwrap();
    let input = futures::stream::pending::<ConsoleInput>();
    let output = VmServiceClient::new(channel).console(input).await;
    let output = output.unwrap().into_inner();
    world.agent.until_running(1).await;
    pump.abort();
    world.agent.until_running(0).await;
    drop(output);
}

#[tokio::test]
async fn a_deadline_goes_along() {
    let world = world().await;
    let mut request = Request::new(GetVmRequest { vm: "slow".into() });
    request.set_timeout(Duration::from_millis(300));
    let status = vms(&world).get(request).await.unwrap_err();
    assert!(
        matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled),
        "{status:?}"
    );
    world.agent.until_running(0).await;
    let calls = world.agent.seen.calls.lock();
    let told = calls[0].1.get("grpc-timeout").unwrap().to_str().unwrap();
    assert_eq!(told, "300000u");
}

#[tokio::test]
async fn a_host_that_vanishes_ends_its_calls_with_a_status_of_ours() {
    let world = world().await;
    let mut client = vms(&world);
    let request = WatchVmRequest {
        vm: "forever".into(),
    };
    let mut stream = client.watch(request).await.unwrap().into_inner();
    stream.message().await.unwrap().unwrap();
    let mut waiting = client.clone();
    let call = tokio::spawn(async move { waiting.get(GetVmRequest { vm: "slow".into() }).await });
    world.agent.until_running(2).await;
    world.agent.cut();
    let status = stream.message().await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert_eq!(reason(&status), ErrorCode::HostOffline.as_str());
    assert!(status.message().contains("pc"), "{status:?}");
    let status = call.await.unwrap().unwrap_err();
    assert_eq!(
        reason(&status),
        ErrorCode::HostOffline.as_str(),
        "{status:?}"
    );

    // The next call takes a new link.
    let vm = client.get(GetVmRequest { vm: "web".into() }).await.unwrap();
    assert_eq!(vm.into_inner().name, "web");
    assert_eq!(world.agent.opened.load(Ordering::SeqCst), 2);

    // Once there is none, that is what callers hear.
    world.links.0.lock().remove(&world.host);
    world.agent.cut();
    world.agent.until_running(0).await;
    let gone = async {
        loop {
            match client.get(GetVmRequest { vm: "web".into() }).await {
                Err(status) if status.message() == "the host has no link" => return status,
                _ => tokio::time::sleep(Duration::from_millis(2)).await,
            }
        }
    };
    let status = tokio::time::timeout(Duration::from_secs(10), gone)
        .await
        .unwrap();
    assert_eq!(reason(&status), ErrorCode::HostOffline.as_str());
}

#[tokio::test]
async fn a_call_that_does_no_harm_twice_takes_another_way_where_its_way_dies() {
    let world = world().await;
    let get = |repeatable: bool| {
        let mut client = vms(&world);
        let mut request = Request::new(GetVmRequest {
            vm: "slow at first".into(),
        });
        if repeatable {
            let yes = "yes".parse().unwrap();
            request.metadata_mut().insert("test-repeatable", yes);
        }
        tokio::spawn(async move { client.get(request).await })
    };
    let calls = || world.agent.seen.calls.lock().len();
    // Where it is the same way there is nothing to go over.
    let call = get(true);
    world.agent.until_running(1).await;
    world.agent.cut();
    let status = call.await.unwrap().unwrap_err();
    assert_eq!(reason(&status), ErrorCode::HostOffline.as_str());
    assert_eq!(calls(), 1);
    // Another one is there.
    world.agent.seen.calls.lock().clear();
    let call = get(true);
    world.agent.until_running(1).await;
    world.links.another_way();
    world.agent.cut();
    let vm = call.await.unwrap().unwrap().into_inner();
    assert_eq!((vm.name.as_str(), calls()), ("slow at first", 2));
    // What may do harm is lost, and says so.
    world.agent.seen.calls.lock().clear();
    let call = get(false);
    world.agent.until_running(1).await;
    world.links.another_way();
    world.agent.cut();
    let status = call.await.unwrap().unwrap_err();
    assert_eq!(reason(&status), ErrorCode::HostOffline.as_str());
    assert_eq!(calls(), 1);
}

#[tokio::test]
async fn a_hundred_streams_share_one_connection_and_a_slow_reader_stalls_none() {
    let world = world().await;
    let mut client = vms(&world);
    // It has more to say than all windows between hold, and nobody reads it.
    let slow = WatchVmRequest {
        vm: "count:1000:65536".into(),
    };
    let mut slow = client.watch(slow).await.unwrap().into_inner();
    let others = (0..99).map(|_| {
        let mut client = client.clone();
        async move {
            let request = WatchVmRequest {
                vm: "count:50:4096".into(),
            };
            let mut stream = client.watch(request).await.unwrap().into_inner();
            let mut read = 0;
            while stream.message().await.unwrap().is_some() {
                read += 1;
            }
            read
        }
    });
    let all = tokio::time::timeout(Duration::from_secs(120), futures::future::join_all(others));
    assert_eq!(all.await.unwrap(), vec![50; 99]);
    assert_eq!(world.router.connections(), 1);
    // And it is not lost itself.
    let mut read = 0;
    while slow.message().await.unwrap().is_some() {
        read += 1;
    }
    assert_eq!(read, 1000);
}

#[tokio::test]
async fn more_calls_than_a_host_takes_on_one_connection_get_another_and_then_an_answer() {
    let world = world_with(PoolOptions {
        most_calls: 2,
        most_connections: 2,
        ..PoolOptions::default()
    })
    .await;
    let mut client = vms(&world);
    let forever = || WatchVmRequest {
        vm: "forever".into(),
    };
    let mut held = Vec::new();
    for _ in 0..4 {
        held.push(client.watch(forever()).await.unwrap());
    }
    assert_eq!(world.router.connections(), 2);
    let status = client.watch(forever()).await.unwrap_err();
    assert_eq!(reason(&status), ErrorCode::TooManyRequests.as_str());
    held.pop();
    world.agent.until_running(3).await;
    let again = async {
        while client.watch(forever()).await.is_err() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), again)
        .await
        .unwrap();
}

#[tokio::test]
async fn a_connection_without_calls_is_dropped() {
    let world = world_with(PoolOptions {
        idle: Duration::from_millis(50),
        ..PoolOptions::default()
    })
    .await;
    let mut client = vms(&world);
    let forever = WatchVmRequest {
        vm: "forever".into(),
    };
    let mut stream = client.watch(forever).await.unwrap().into_inner();
    stream.message().await.unwrap().unwrap();
    // Far longer than idle, but there is a call.
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(world.router.connections(), 1);
    drop(stream);
    let dropped = async {
        while world.router.connections() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), dropped)
        .await
        .unwrap();
    client.get(GetVmRequest { vm: "web".into() }).await.unwrap();
    assert_eq!(world.agent.opened.load(Ordering::SeqCst), 2);
}

fn median(mut taken: Vec<Duration>) -> Duration {
    taken.sort_unstable();
    taken[taken.len() / 2]
}

/// What Core adds to a call: `cargo test -p ghost-core --test it -- --ignored --nocapture measure`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "it measures, and asserts nothing"]
async fn measure_what_the_way_through_adds() {
    let world = world().await;
    let direct = Endpoint::from_static("http://host")
        .connect_with_connector(tower::service_fn({
            let agent = Arc::clone(&world.agent);
            move |_| {
                let agent = Arc::clone(&agent);
                async move { Ok::<_, Infallible>(TokioIo::new(agent.open().await)) }
            }
        }))
        .await
        .unwrap();
    for (name, channel) in [("direct", direct), ("through Core", world.channel.clone())] {
        let mut client = VmServiceClient::new(channel);
        let mut taken = Vec::new();
        for round in 0..2200 {
            let begun = Instant::now();
            client.get(GetVmRequest { vm: "web".into() }).await.unwrap();
            if round >= 200 {
                taken.push(begun.elapsed());
            }
        }
        println!("{name}: median {:?}", median(taken));
    }
}
