//! What is known of a guest's inside: telemetry, history, addresses, cloud-init.

use std::net::IpAddr;
use std::time::Duration;

use ghost_domain::guest::{GuestInterface, GuestTelemetry, SampleSource};
use ghost_domain::ports::DomainStatistics;
use ghost_domain::{ErrorCode, Result, Role, VmId};

use super::{principal, quick, report, target};
use crate::world::{Agent, World};

async fn samples(agent: &Agent) -> Vec<ghost_application::GuestSample> {
    let history = agent
        .use_cases
        .get_guest_history
        .execute(&principal(Role::Viewer), "web", None)
        .await;
    history.unwrap().samples
}

fn count(world: &World, id: VmId, cpu_seconds: u64) {
    world.survivors.lock().statistics = vec![DomainStatistics {
        id: Some(id),
        cpu_time_nanoseconds: cpu_seconds * 1_000_000_000,
        memory_bytes: 256 << 20,
        memory_resident_bytes: 100 << 20,
        block_read_bytes: cpu_seconds * 1000,
        ..DomainStatistics::default()
    }];
}

#[tokio::test]
async fn the_hosts_figures_stand_in_while_the_guest_is_silent() {
    let world = quick();
    let agent = world.start().await;
    let id = agent.with_guest("web").await;
    count(&world, id, 10);
    agent
        .until("the first look", |agent| {
            // A second look only tells something once time has passed between the two.
            agent.world.clock.forward(Duration::from_secs(10));
            Box::pin(async { !samples(agent).await.is_empty() })
        })
        .await;
    assert!(
        samples(&agent)
            .await
            .iter()
            .all(|one| one.source == SampleSource::Host)
    );
    world.guests.report(id, report());
    agent
        .until("the guest's word", |agent| {
            Box::pin(async { samples(agent).await.last().unwrap().source == SampleSource::Guest })
        })
        .await;
    let told = *samples(&agent).await.last().unwrap();
    assert_eq!(told.cpu_percent, Some(12.5));
    assert_eq!(told.memory_used_bytes, Some(1 << 29));
    assert_eq!(told.memory_total_bytes, Some(1 << 30));
    let metrics = agent.use_cases.collect_metrics.execute().await.unwrap();
    let guest = metrics.vms[0].guest.as_ref().unwrap();
    assert!(guest.connected && guest.report.is_some());

    // Three reports do not come: the host's figures are back, and say so.
    world.clock.forward(Duration::from_secs(20));
    agent
        .until("the host's word", |agent| {
            agent.world.clock.forward(Duration::from_secs(10));
            Box::pin(async { samples(agent).await.last().unwrap().source == SampleSource::Host })
        })
        .await;
    let last = *samples(&agent).await.last().unwrap();
    assert_eq!(last.memory_used_bytes, Some(100 << 20));
    let metrics = agent.use_cases.collect_metrics.execute().await.unwrap();
    assert!(metrics.vms[0].guest.as_ref().unwrap().report.is_none());
    let status = agent
        .use_cases
        .get_guest_status
        .execute(&Agent::me(), "web")
        .await
        .unwrap();
    let layer = status.layers.last().unwrap();
    assert_eq!((layer.name, layer.ok), ("telemetry", false));
    assert!(layer.detail.contains("silent"), "{}", layer.detail);
    assert!(status.ready, "telemetry is not needed for calls");
}

#[tokio::test]
async fn counters_that_stand_still_are_no_load_and_rates_are_per_second() {
    let world = quick();
    let agent = world.start().await;
    let id = agent.with_guest("web").await;
    let mut watch = agent
        .use_cases
        .watch_telemetry
        .execute(&principal(Role::Viewer), None)
        .await
        .unwrap();
    count(&world, id, 10);
    let mut seconds = 10;
    // Ten seconds of the clock for each five of the CPU: half of the one vCPU.
    let found = loop {
        let next = tokio::time::timeout(Duration::from_millis(50), watch.next()).await;
        if let Ok(Some(view)) = next
            && let Some(sample) = view.sample
            && sample.cpu_percent.is_some_and(|percent| percent > 0.0)
        {
            break sample;
        }
        seconds += 5;
        count(&world, id, seconds);
        world.clock.forward(Duration::from_secs(10));
    };
    let cpu = found.cpu_percent.unwrap();
    assert!((20.0..=100.0).contains(&cpu), "{cpu}");
    assert!(found.disk_read_bytes_per_second.unwrap() > 100.0);
    assert_eq!(found.source, SampleSource::Host);
}

#[tokio::test]
async fn a_watch_begins_with_what_is_there_and_ends_with_its_vm() {
    let world = World::new();
    let agent = world.start().await;
    let id = agent.with_guest("web").await;
    let mut report = report();
    report.processes = 42;
    let mut watch = agent
        .use_cases
        .watch_telemetry
        .execute(&principal(Role::Viewer), Some("web"))
        .await
        .unwrap();
    let first = watch.next().await.unwrap();
    assert!(first.sample.is_none() && first.report.is_none());
    assert_eq!(first.vm_name.as_str(), "web");
    world.guests.report(id, report);
    let second = watch.next().await.unwrap();
    assert_eq!(second.report.unwrap().processes, 42);
    assert_eq!(second.hello.unwrap().kernel, "6.1");
    assert_eq!(second.sample.unwrap().source, SampleSource::Guest);
    let delete = ghost_application::vm::DeleteVmCommand {
        vm: "web".into(),
        force: true,
        ..Default::default()
    };
    let view = agent
        .use_cases
        .delete_vm
        .execute(&Agent::me(), delete)
        .await;
    agent.finished(&view.unwrap()).await;
    let ended = tokio::time::timeout(Duration::from_secs(10), watch.next()).await;
    assert!(ended.unwrap().is_none());
}

#[tokio::test]
async fn cloud_init_is_a_condition_that_watchers_of_the_vm_see() {
    let world = World::new();
    let agent = world.start().await;
    let id = agent.with_guest("web").await;
    let mut watch = agent
        .use_cases
        .watch_vm
        .execute(&Agent::me(), "web")
        .await
        .unwrap();
    let mut seen = async |wanted: (bool, &str)| {
        let found = tokio::time::timeout(Duration::from_secs(10), async {
            loop {
                let view = watch.next().await.unwrap();
                let condition = view
                    .conditions
                    .iter()
                    .find(|one| one.kind == "cloud-init")
                    .unwrap();
                if (condition.status, condition.reason.as_str()) == wanted {
                    return;
                }
            }
        });
        assert!(found.await.is_ok(), "{wanted:?} was not seen");
    };
    seen((false, "the guest has not reported it yet")).await;
    let mut told = report();
    told.cloud_init.status = "running".into();
    told.cloud_init.stage = "modules-config".into();
    world.guests.report(id, told.clone());
    seen((false, "running modules-config")).await;
    told.cloud_init.status = "error".into();
    told.cloud_init.errors = vec!["runcmd: \x07exit 1".into(), "second".into()];
    world.guests.report(id, told.clone());
    seen((false, "error: runcmd: \\u{7}exit 1; second")).await;
    told.cloud_init.status = "done".into();
    told.cloud_init.errors.clear();
    world.guests.report(id, told);
    seen((true, "done")).await;
    // A new boot begins anew.
    world.guests.greet(id, crate::world::hello("0.1.0"));
    seen((false, "the guest has not reported it yet")).await;
}

fn interface(mac: &str, addresses: &[&str]) -> GuestInterface {
    GuestInterface {
        name: "eth0".into(),
        mac: mac.to_owned(),
        addresses: addresses.iter().map(|one| one.parse().unwrap()).collect(),
        ..GuestInterface::default()
    }
}

async fn shown(agent: &Agent, vm: &str) -> Vec<String> {
    let view = agent.vm(vm).await.unwrap();
    view.addresses
        .iter()
        .map(|one| format!("{} {}", one.source.as_str(), one.address))
        .collect()
}

async fn until_shown(agent: &Agent, expected: &[&str]) {
    agent
        .until(&format!("{expected:?}"), |agent| {
            Box::pin(async move { shown(agent, "web").await == expected })
        })
        .await;
}

async fn register(agent: &Agent, address: &str) -> Result<()> {
    let address: Option<IpAddr> = (address != "none").then(|| address.parse().unwrap());
    agent
        .use_cases
        .register_guest_address
        .execute(&principal(Role::Operator), &target("web"), address)
        .await
}

#[tokio::test]
async fn a_guests_report_goes_before_a_lease_and_a_lease_before_a_registered_address() {
    let world = World::new();
    let agent = world.start().await;
    let id = agent.with_guest("web").await;
    agent.created("other", true).await;
    let mac = |view: &ghost_application::VmView| view.vm.spec.interfaces[0].mac;
    let web = mac(&agent.vm("web").await.unwrap());
    let other = mac(&agent.vm("other").await.unwrap());
    register(&agent, "10.1.0.9").await.unwrap();
    assert_eq!(shown(&agent, "web").await, ["registered 10.1.0.9"]);
    {
        let mut survivors = world.survivors.lock();
        survivors.leases.insert(web, "10.1.0.2".parse().unwrap());
        survivors.leases.insert(other, "10.1.0.3".parse().unwrap());
    }
    until_shown(&agent, &["lease 10.1.0.2"]).await;
    let mut told = report();
    told.interfaces = vec![
        interface("52:54:00:ff:ff:ff", &["10.1.0.77"]),
        // Not its own: loopback, link-local, multicast, another VM's lease.
        interface(
            &web.to_string().to_uppercase(),
            &[
                "127.0.0.1",
                "fe80::1",
                "169.254.1.1",
                "224.0.0.1",
                "10.1.0.3",
                "10.1.0.4",
                "fd00::4",
            ],
        ),
        interface("nonsense", &["10.1.0.78"]),
    ];
    world.guests.report(id, told);
    until_shown(&agent, &["guest 10.1.0.4", "guest fd00::4"]).await;
    let (has, reason) = agent.condition(id, "address").await;
    assert!(has && reason == "reported 10.1.0.4", "{reason}");
    // Nothing reported any longer: the lease counts again.
    world.guests.report(id, report());
    until_shown(&agent, &["lease 10.1.0.2"]).await;
}

#[tokio::test]
async fn an_address_is_registered_only_where_it_can_be_the_vms() {
    let world = World::new();
    let agent = world.start().await;
    agent.created("web", false).await;
    assert_eq!(
        register(&agent, "10.1.0.9").await.unwrap_err().code(),
        ErrorCode::VmNotRunning
    );
    let start = ghost_application::vm::PowerCommand {
        vm: "web".into(),
        request_id: None,
    };
    let view = agent.use_cases.start_vm.execute(&Agent::me(), start).await;
    agent.finished(&view.unwrap()).await;
    agent.created("other", true).await;
    let other = agent.vm("other").await.unwrap().vm.spec.interfaces[0].mac;
    world
        .survivors
        .lock()
        .leases
        .insert(other, "10.1.0.3".parse().unwrap());
    for bad in [
        "127.0.0.1",
        "169.254.3.4",
        "0.0.0.0",
        "224.0.0.1",
        "::1",
        "fe80::1",
        "10.2.0.9",
        "8.8.8.8",
        "10.1.0.0",
        "10.1.0.1",
        "10.1.255.255",
        "10.1.0.3",
        "::ffff:10.1.0.1",
    ] {
        let error = register(&agent, bad).await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidArgument, "{bad}");
    }
    register(&agent, "::ffff:10.1.0.9").await.unwrap();
    assert_eq!(shown(&agent, "web").await, ["registered 10.1.0.9"]);
    // Another VM cannot take what this one has.
    let taken = agent
        .use_cases
        .register_guest_address
        .execute(&Agent::me(), &target("other"), "10.1.0.9".parse().ok())
        .await;
    assert!(taken.unwrap_err().to_string().contains("10.1.0.9"));
    let viewer = agent
        .use_cases
        .register_guest_address
        .execute(
            &principal(Role::Viewer),
            &target("web"),
            "10.1.0.8".parse().ok(),
        )
        .await;
    assert_eq!(viewer.unwrap_err().code(), ErrorCode::PermissionDenied);
    // It is of the running VM, and kept for the next run.
    let stop = ghost_application::vm::StopCommand {
        vm: "web".into(),
        force: true,
        ..Default::default()
    };
    let view = agent.use_cases.stop_vm.execute(&Agent::me(), stop).await;
    agent.finished(&view.unwrap()).await;
    assert!(shown(&agent, "web").await.is_empty());
    let taken = agent
        .use_cases
        .register_guest_address
        .execute(&Agent::me(), &target("other"), "10.1.0.9".parse().ok())
        .await;
    assert!(taken.unwrap_err().to_string().contains("10.1.0.9"));
    let start = ghost_application::vm::PowerCommand {
        vm: "web".into(),
        request_id: None,
    };
    let view = agent.use_cases.start_vm.execute(&Agent::me(), start).await;
    agent.finished(&view.unwrap()).await;
    until_shown(&agent, &["registered 10.1.0.9"]).await;
}

#[tokio::test]
async fn a_registered_address_outlives_the_agent_until_it_is_forgotten() {
    let world = World::new();
    let agent = world.start().await;
    agent.created("web", true).await;
    register(&agent, "10.1.0.9").await.unwrap();
    register(&agent, "10.1.0.8").await.unwrap();
    drop(agent);
    let agent = world.start().await;
    // One for a card, the newest.
    until_shown(&agent, &["registered 10.1.0.8"]).await;
    register(&agent, "none").await.unwrap();
    assert!(shown(&agent, "web").await.is_empty());
    drop(agent);
    let agent = world.start().await;
    assert!(
        agent
            .vm("web")
            .await
            .unwrap()
            .vm
            .registered_addresses
            .is_empty()
    );
    assert!(shown(&agent, "web").await.is_empty());
}

#[tokio::test]
async fn guests_that_are_not_there_are_not_believed() {
    let world = World::new();
    let agent = world.start().await;
    agent.created("web", false).await;
    let id = world.vm_id("web");
    world.guests.report(id, report());
    world
        .guests
        .report(VmId::random(), GuestTelemetry::default());
    world.guests.leave(VmId::random(), "x");
    world.guests.greet(VmId::random(), crate::world::hello("0"));
    agent.created("other", false).await;
    assert!(samples(&agent).await.is_empty());
    assert_eq!(agent.condition(id, "agent").await.1, "not running");
}
