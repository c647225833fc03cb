//! What calls answer, and how they end.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use futures::StreamExt;
use ghost_domain::{Principal, Timestamp};
use ghost_proto::agent::v1 as message;
use ghost_proto::agent::v1::access_service_client::AccessServiceClient;
use ghost_proto::agent::v1::event_service_client::EventServiceClient;
use ghost_proto::agent::v1::host_service_client::HostServiceClient;
use ghost_proto::agent::v1::image_service_client::ImageServiceClient;
use ghost_proto::agent::v1::import_image_request::Part;
use ghost_proto::agent::v1::operation_service_client::OperationServiceClient;
use ghost_proto::agent::v1::vm_service_client::VmServiceClient;
use tonic::{Code, Request};

use super::*;
use crate::world::{BROKEN, HUNG, PANICS, WELL};

#[tokio::test]
async fn the_local_socket_needs_no_certificate() {
    let served = Served::new().await;
    let channel = served.local().await;
    let me = AccessServiceClient::new(channel.clone())
        .who_am_i(message::WhoAmIRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!((me.role.as_str(), me.source.as_str()), ("admin", "socket"));
    let vms = VmServiceClient::new(channel.clone())
        .list(message::ListVmsRequest::default())
        .await
        .unwrap()
        .into_inner()
        .vms;
    assert_eq!(vms[0].name, "web");
    assert_eq!(vms[0].state(), message::VmState::Stopped);
    let status = HostServiceClient::new(channel)
        .get_status(message::GetStatusRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(status.name, "test-agent");
    assert_eq!(status.hypervisor_state, "connected");
}

#[tokio::test]
async fn a_certificate_is_known_by_its_record() {
    let served = Served::new().await;
    let identity = served.ca.client(served.world.operator);
    let me = AccessServiceClient::new(served.remote(Some(identity)).await)
        .who_am_i(message::WhoAmIRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(me.name, "operator@test");
    assert_eq!(
        (me.role.as_str(), me.source.as_str()),
        ("operator", "certificate")
    );
    assert_eq!(me.id, served.world.operator.to_string());
}

#[tokio::test]
async fn an_error_has_its_code_and_its_hint() {
    let served = Served::new().await;
    let status = VmServiceClient::new(served.local().await)
        .get(message::GetVmRequest { vm: "nope".into() })
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    let info = status.get_details_error_info().unwrap();
    assert_eq!(
        (info.reason.as_str(), info.domain.as_str()),
        ("vm_not_found", "ghost")
    );
    assert!(!info.metadata["hint"].is_empty());

    let status = VmServiceClient::new(served.local().await)
        .create(message::CreateVmRequest {
            name: "Bad Name".into(),
            image: "tiny".into(),
            ..Default::default()
        })
        .await
        .unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::InvalidArgument, "invalid_name")
    );
    let fields = status.get_details_bad_request().unwrap().field_violations;
    assert_eq!(fields[0].field, "name");
}

#[tokio::test]
async fn one_request_id_is_one_operation_and_it_can_be_watched() {
    let served = Served::new().await;
    let channel = served.local().await;
    let mut vms = VmServiceClient::new(channel.clone());
    let start = message::StartVmRequest {
        vm: "web".into(),
        request_id: "key-1".into(),
    };
    let first = vms.start(start.clone()).await.unwrap().into_inner();
    let again = vms.start(start).await.unwrap().into_inner();
    assert_eq!(first.id, again.id);
    let watch = OperationServiceClient::new(channel)
        .watch(message::WatchOperationRequest { id: first.id })
        .await
        .unwrap()
        .into_inner();
    let seen: Vec<_> = watch.map(|one| one.unwrap().status()).collect().await;
    assert_eq!(seen.last(), Some(&message::OperationStatus::Succeeded));
}

#[tokio::test]
async fn an_upload_arrives_whole_and_a_broken_one_is_thrown_away() {
    let served = Served::new().await;
    let mut images = ImageServiceClient::new(served.local().await);
    let header = |name: &str| message::ImportImageRequest {
        part: Some(Part::Header(message::ImportImageHeader {
            name: name.into(),
            file_name: "x.raw".into(),
            request_id: String::new(),
        })),
    };
    let data = |size: usize| message::ImportImageRequest {
        part: Some(Part::Data(vec![1; size].into())),
    };
    let pieces = vec![header("own"), data(1024 * 1024), data(17)];
    let operation = images
        .import(tokio_stream::iter(pieces))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(operation.kind, "import_image");
    assert_eq!(
        served.world.knobs.uploaded.load(Ordering::SeqCst),
        1024 * 1024 + 17
    );

    for (bad, code) in [
        (vec![data(1)], "invalid_argument"),
        (vec![header("other"), header("other")], "invalid_argument"),
        (
            vec![header("other"), data(1024 * 1024 + 1)],
            "payload_too_large",
        ),
        (vec![header("tiny"), data(1)], "image_exists"),
        (vec![header("../up"), data(1)], "invalid_name"),
    ] {
        let status = images.import(tokio_stream::iter(bad)).await.unwrap_err();
        assert_eq!(reason(&status), code);
    }
    let knobs = Arc::clone(&served.world.knobs);
    until("two uploads were begun and thrown away", || {
        knobs.discarded.load(Ordering::SeqCst) >= 2
    })
    .await;
}

#[tokio::test]
async fn a_console_carries_both_ways_and_ends_with_the_guest() {
    let served = Served::new().await;
    let mut vms = VmServiceClient::new(served.local().await);
    let input = |vm: &str, data: &[u8]| message::ConsoleInput {
        vm: vm.into(),
        data: data.to_vec(),
    };
    let (sender, receiver) = tokio::sync::mpsc::channel(4);
    sender.send(input("web", b"hello")).await.unwrap();
    let mut output = vms
        .console(tokio_stream::wrappers::ReceiverStream::new(receiver))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(output.message().await.unwrap().unwrap().data, b"hello");
    sender.send(input("", b"ls")).await.unwrap();
    assert_eq!(output.message().await.unwrap().unwrap().data, b"ls");
    sender.send(input("", b"q")).await.unwrap();
    assert!(output.message().await.unwrap().is_none());
    assert_eq!(*served.world.knobs.typed.lock().unwrap(), b"hellolsq");

    let nothing = tokio_stream::empty::<message::ConsoleInput>();
    let status = vms.console(nothing).await.unwrap_err();
    assert_eq!(reason(&status), "invalid_argument");
}

#[tokio::test]
async fn a_log_ends_unless_it_is_followed() {
    let served = Served::new().await;
    let mut vms = VmServiceClient::new(served.local().await);
    let mut request = message::VmLogsRequest {
        vm: "web".into(),
        ..Default::default()
    };
    let mut log = vms.logs(request.clone()).await.unwrap().into_inner();
    assert_eq!(log.message().await.unwrap().unwrap().data, b"booted\n");
    assert!(log.message().await.unwrap().is_none());
    request.follow = true;
    let mut log = vms.logs(request).await.unwrap().into_inner();
    assert_eq!(log.message().await.unwrap().unwrap().data, b"booted\n");
    let more = tokio::time::timeout(Duration::from_millis(100), log.message()).await;
    assert!(more.is_err(), "a followed log goes on");
}

#[tokio::test]
async fn revoking_somebody_ends_what_they_watch() {
    let served = Served::new().await;
    let identity = served.ca.client(served.world.viewer);
    let mut events = EventServiceClient::new(served.remote(Some(identity)).await);
    let follow = message::WatchEventsRequest {
        follow: true,
        ..Default::default()
    };
    let mut stream = events.watch(follow).await.unwrap().into_inner();
    served
        .world
        .use_cases()
        .revoke_certificate
        .execute(&Principal::agent(), &served.world.viewer.to_string())
        .await
        .unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(20), async {
        loop {
            if let Err(status) = stream.message().await {
                return status;
            }
        }
    });
    let status = ended.await.unwrap();
    assert_eq!(reason(&status), "unauthenticated");
}

#[tokio::test]
async fn a_connection_does_not_outlast_its_certificate() {
    let served = Served::new().await;
    let past = Timestamp::from_unix_millis(Timestamp::from(SystemTime::now()).unix_millis() - 1000);
    let identity = served.ca.client_until(served.world.admin, past);
    let status = AccessServiceClient::new(served.remote(Some(identity)).await)
        .who_am_i(message::WhoAmIRequest {})
        .await
        .unwrap_err();
    assert_eq!(reason(&status), "unauthenticated");
    assert!(status.message().contains("ended"), "{}", status.message());
}

#[tokio::test]
async fn the_request_id_comes_back_and_the_trace_is_handed_on() {
    let traces = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&traces);
    let served = Served::with(|options| {
        options.trace = Some(Arc::new(move |headers, _| {
            let parent = headers
                .get("traceparent")
                .map(|value| value.to_str().unwrap().to_owned());
            seen.lock().unwrap().push(parent);
        }));
    })
    .await;
    let mut access = AccessServiceClient::new(served.local().await);
    let mut request = Request::new(message::WhoAmIRequest {});
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    request
        .metadata_mut()
        .insert("x-request-id", "mine-1".parse().unwrap());
    request
        .metadata_mut()
        .insert("traceparent", parent.parse().unwrap());
    let response = access.who_am_i(request).await.unwrap();
    assert_eq!(response.metadata().get("x-request-id").unwrap(), "mine-1");
    assert_eq!(*traces.lock().unwrap(), [Some(parent.to_owned())]);
    let response = access.who_am_i(message::WhoAmIRequest {}).await.unwrap();
    let made = response.metadata().get("x-request-id").unwrap();
    assert_eq!(made.to_str().unwrap().len(), 36);
}

#[tokio::test]
async fn a_panic_ends_one_call_and_a_hang_ends_by_itself() {
    let served = Served::with(|options| options.timeout = Duration::from_millis(200)).await;
    let mut host = HostServiceClient::new(served.local().await);
    let knobs = &served.world.knobs;
    knobs.host.store(PANICS, Ordering::SeqCst);
    let status = host
        .get_status(message::GetStatusRequest {})
        .await
        .unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::Internal, "internal")
    );
    knobs.host.store(HUNG, Ordering::SeqCst);
    let status = host
        .get_status(message::GetStatusRequest {})
        .await
        .unwrap_err();
    assert_eq!(reason(&status), "deadline_exceeded");
    knobs.host.store(WELL, Ordering::SeqCst);
    host.get_status(message::GetStatusRequest {}).await.unwrap();
}

#[tokio::test]
async fn too_many_calls_at_once_are_told_to_come_back() {
    let served = Served::with(|options| options.most_calls = 0).await;
    let status = AccessServiceClient::new(served.local().await)
        .who_am_i(message::WhoAmIRequest {})
        .await
        .unwrap_err();
    assert_eq!(reason(&status), "too_many_requests");
    assert!(
        status
            .get_details_retry_info()
            .unwrap()
            .retry_delay
            .is_some()
    );
}

#[tokio::test]
async fn health_and_reflection_are_served() {
    use tonic_health::pb::health_client::HealthClient;
    use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

    let served = Served::new().await;
    for service in ["", "ghost.agent.v1.VmService"] {
        let answer = HealthClient::new(served.remote(None).await)
            .check(HealthCheckRequest {
                service: service.into(),
            })
            .await
            .unwrap();
        assert_eq!(
            answer.into_inner().status(),
            ServingStatus::Serving,
            "{service:?}"
        );
    }

    let request = tonic_reflection::pb::v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers = ServerReflectionClient::new(served.local().await)
        .server_reflection_info(tokio_stream::once(request))
        .await
        .unwrap()
        .into_inner();
    let answer = answers.message().await.unwrap().unwrap().message_response;
    let Some(MessageResponse::ListServicesResponse(list)) = answer else {
        panic!("{answer:?}");
    };
    assert!(
        list.service
            .iter()
            .any(|one| one.name == "ghost.agent.v1.VmService")
    );
}

#[tokio::test]
async fn health_follows_libvirt_and_ends_with_the_server() {
    use tonic_health::pb::HealthCheckRequest;
    use tonic_health::pb::health_check_response::ServingStatus;
    use tonic_health::pb::health_client::HealthClient;

    let served = Served::new().await;
    let mut client = HealthClient::new(served.remote(None).await);
    let of = |service: &str| HealthCheckRequest {
        service: service.into(),
    };
    let mut watches = Vec::new();
    for service in ["", "ghost.agent.v1.VmService"] {
        let mut watch = client.watch(of(service)).await.unwrap().into_inner();
        let first = watch.message().await.unwrap().unwrap();
        assert_eq!(first.status(), ServingStatus::Serving, "{service:?}");
        watches.push(watch);
    }
    // Nobody knows it: that is an error at once, and a status for who waits for it.
    let status = client.check(of("no.Such")).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::NotFound);
    let mut unknown = client.watch(of("no.Such")).await.unwrap().into_inner();
    let first = unknown.message().await.unwrap().unwrap();
    assert_eq!(first.status(), ServingStatus::ServiceUnknown);

    let knob = &served.world.knobs.hypervisor;
    for (state, expected) in [
        (BROKEN, ServingStatus::NotServing),
        (WELL, ServingStatus::Serving),
    ] {
        knob.store(state, Ordering::SeqCst);
        for watch in &mut watches {
            let told = tokio::time::timeout(Duration::from_secs(60), watch.message());
            let told = told.await.unwrap().unwrap().unwrap();
            assert_eq!(told.status(), expected);
            let asked = client.check(of("ghost.agent.v1.VmService")).await.unwrap();
            assert_eq!(asked.into_inner().status(), expected);
        }
    }

    served.shutdown.cancel();
    for watch in &mut watches {
        let told = tokio::time::timeout(Duration::from_secs(10), watch.message());
        let told = told.await.unwrap().unwrap().unwrap();
        assert_eq!(told.status(), ServingStatus::NotServing);
    }
}

#[tokio::test]
async fn a_shutdown_ends_streams_with_a_hint_and_takes_the_socket_away() {
    let mut served = Served::new().await;
    let mut events = EventServiceClient::new(served.local().await);
    let follow = message::WatchEventsRequest {
        follow: true,
        ..Default::default()
    };
    let mut stream = events.watch(follow).await.unwrap().into_inner();
    served.shutdown.cancel();
    let status = loop {
        match stream.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the stream ended without a word"),
            Err(status) => break status,
        }
    };
    assert_eq!(reason(&status), "shutting_down");
    assert!(
        status
            .get_details_retry_info()
            .unwrap()
            .retry_delay
            .is_some()
    );
    let server = served.server.take().unwrap();
    tokio::time::timeout(Duration::from_secs(10), server)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    let socket = served.socket.clone();
    until("the socket is gone", || !socket.exists()).await;
}
