//! What Prometheus gets.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Request, StatusCode};
use ghost_domain::Principal;
use ghost_domain::ports::GuestEvent;
use ghost_presentation::convert::AgentInfo;
use ghost_presentation::metrics::{Recorder, router};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use crate::guests::{HOSTILE, hello};
use crate::world::{BROKEN, HUNG, World};

fn shell(world: &World) -> Router {
    let agent = AgentInfo {
        name: "test".into(),
        version: "1.2.3".into(),
    };
    router(world.use_cases(), Recorder::new(), agent)
}

async fn scrape(router: &Router) -> String {
    let request = Request::get("/metrics").body(Body::empty()).unwrap();
    let response = router.clone().oneshot(request).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert!(
        response.headers()["content-type"]
            .to_str()
            .unwrap()
            .starts_with("text/plain")
    );
    let body = axum::body::to_bytes(response.into_body(), 1 << 24)
        .await
        .unwrap();
    String::from_utf8(body.to_vec()).unwrap()
}

fn value(text: &str, series: &str) -> Option<f64> {
    text.lines()
        .find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
}

/// The rules of `promtool check metrics` that can be broken here, and our own.
fn lint(text: &str) {
    let mut kinds: BTreeMap<&str, &str> = BTreeMap::new();
    let mut helped: BTreeSet<&str> = BTreeSet::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(kinds.insert(name, kind).is_none(), "{name} stands twice");
            continue;
        }
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').unwrap();
            assert!(help.ends_with('.'), "{name}: {help}");
            helped.insert(name);
            continue;
        }
        let name = line.split(['{', ' ']).next().unwrap();
        let family = ["_bucket", "_sum", "_count"]
            .iter()
            .find_map(|end| {
                name.strip_suffix(end)
                    .filter(|base| kinds.contains_key(base))
            })
            .unwrap_or(name);
        assert!(kinds.contains_key(family), "{line}");
        for label in line
            .split(['{', ','])
            .skip(1)
            .filter_map(|part| part.split_once('='))
        {
            let known = [
                "vm",
                "name",
                "state",
                "version",
                "kind",
                "outcome",
                "severity",
                "method",
                "code",
                "route",
                "status",
                "le",
                "mode",
                "mount_point",
            ];
            assert!(known.contains(&label.0), "{line}: {}", label.0);
        }
    }
    for (name, kind) in kinds {
        assert!(helped.contains(name), "{name} has no help");
        assert!(name.starts_with("ghost_"), "{name}");
        assert!(
            name.bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
        );
        assert_eq!(
            name.ends_with("_total"),
            kind == "counter",
            "{name} is a {kind}"
        );
        for unit in [
            "_milliseconds",
            "_ms",
            "_kib",
            "_mib",
            "_kilobytes",
            "_percent",
            "_nanoseconds",
        ] {
            assert!(!name.contains(unit), "{name}: base units only");
        }
        assert!(!name.ends_with("_bucket") && !name.ends_with("_sum") && !name.ends_with("_count"));
    }
}

#[tokio::test]
async fn a_scrape_tells_host_vms_and_agent_by_one_bulk_call() {
    let world = World::new().await;
    let router = shell(&world);
    let text = scrape(&router).await;
    assert_eq!(world.knobs.statistics_calls.load(Ordering::SeqCst), 1);
    lint(&text);
    let vm = format!("{{name=\"web\",vm=\"{}\"}}", world.vm);
    for (series, expected) in [
        ("ghost_build_info{version=\"1.2.3\"}".to_owned(), 1.0),
        ("ghost_host_cpus".to_owned(), 4.0),
        ("ghost_host_cpu_busy_seconds_total".to_owned(), 12.5),
        ("ghost_hypervisor_up".to_owned(), 1.0),
        ("ghost_store_writable".to_owned(), 1.0),
        ("ghost_collect_success".to_owned(), 1.0),
        ("ghost_vms{state=\"stopped\"}".to_owned(), 1.0),
        ("ghost_vms{state=\"running\"}".to_owned(), 0.0),
        (format!("ghost_vm_cpu_seconds_total{vm}"), 1.5),
        (format!("ghost_vm_memory_resident_bytes{vm}"), 2.0),
        (format!("ghost_vm_block_read_bytes_total{vm}"), 3.0),
        (format!("ghost_vm_network_transmit_bytes_total{vm}"), 6.0),
        (
            format!(
                "ghost_vm_state{{name=\"web\",state=\"stopped\",vm=\"{}\"}}",
                world.vm
            ),
            1.0,
        ),
        ("ghost_image_cache_bytes".to_owned(), f64::from(16 << 20)),
    ] {
        assert_eq!(value(&text, &series), Some(expected), "{series}\n{text}");
    }
}

#[tokio::test]
async fn a_scrape_outlives_libvirt_and_the_host() {
    let world = World::new().await;
    let router = shell(&world);
    let vm = format!(
        "ghost_vm_cpu_seconds_total{{name=\"web\",vm=\"{}\"}}",
        world.vm
    );

    world.knobs.hypervisor.store(HUNG, Ordering::SeqCst);
    let text = scrape(&router).await;
    lint(&text);
    assert_eq!(
        value(&text, &vm),
        None,
        "no counter rather than a wrong one"
    );
    assert_eq!(value(&text, "ghost_collect_success"), Some(1.0));

    world.knobs.host.store(BROKEN, Ordering::SeqCst);
    let text = scrape(&router).await;
    lint(&text);
    assert_eq!(value(&text, "ghost_collect_success"), Some(0.0));
    assert_eq!(value(&text, "ghost_host_cpus"), None);
    assert_eq!(
        value(&text, "ghost_build_info{version=\"1.2.3\"}"),
        Some(1.0)
    );
}

#[tokio::test]
async fn calls_operations_and_events_are_counted() {
    let world = World::new().await;
    let recorder = Recorder::new();
    let stop = CancellationToken::new();
    let following =
        tokio::spawn(std::sync::Arc::clone(&recorder).follow(world.use_cases(), stop.clone()));
    let http = ghost_presentation::http::router(
        world.use_cases(),
        std::sync::Arc::clone(&recorder),
        ghost_presentation::http::Options::default(),
        stop.clone(),
    );
    let refused = Request::get("/v1/vms/../../etc")
        .body(Body::empty())
        .unwrap();
    http.oneshot(refused).await.unwrap();
    let command = ghost_application::vm::PowerCommand {
        vm: "web".into(),
        request_id: None,
    };
    let start = &world.use_cases().start_vm;
    start.execute(&Principal::agent(), command).await.unwrap();

    let metrics = router(world.use_cases(), recorder, AgentInfo::default());
    let done = "ghost_operations_total{kind=\"start_vm\",outcome=\"succeeded\"}";
    let text = tokio::time::timeout(Duration::from_secs(20), async {
        loop {
            let text = scrape(&metrics).await;
            if value(&text, done) == Some(1.0) {
                return text;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    let text = text.await.unwrap();
    lint(&text);
    let seconds = "ghost_operation_duration_seconds_count{kind=\"start_vm\",outcome=\"succeeded\"}";
    assert_eq!(value(&text, seconds), Some(1.0));
    let strange = "ghost_http_request_duration_seconds_count{method=\"GET\",route=\"unknown\",status=\"404\"}";
    assert_eq!(value(&text, strange), Some(1.0), "{text}");
    assert!(
        value(
            &text,
            "ghost_events_total{kind=\"operation\",severity=\"info\"}"
        )
        .is_some()
    );
    stop.cancel();
    following.await.unwrap();
}

fn report() -> ghost_domain::guest::GuestTelemetry {
    use ghost_domain::guest::{GuestCloudInit, GuestCpuTimes, GuestFilesystem, GuestInterface};
    let mount = |mount_point: &str| GuestFilesystem {
        mount_point: mount_point.into(),
        kind: "ext4".into(),
        total_bytes: 100,
        available_bytes: 40,
    };
    let card = |name: &str| GuestInterface {
        name: name.into(),
        receive_bytes: 7,
        transmit_bytes: u64::MAX,
        ..GuestInterface::default()
    };
    ghost_domain::guest::GuestTelemetry {
        cpu: GuestCpuTimes {
            user: 12.5,
            idle: 100.0,
            ..GuestCpuTimes::default()
        },
        cpus: 2,
        memory_total_bytes: 1000,
        memory_available_bytes: 600,
        load: [0.5, 0.25, 0.125],
        filesystems: vec![
            mount("/"),
            mount(HOSTILE),
            mount("/srv/\"} 1\nghost_forged 1\n#"),
        ],
        interfaces: vec![card("lo"), card("eth0"), card(HOSTILE)],
        processes: 77,
        users: vec![HOSTILE.into()],
        cloud_init: GuestCloudInit {
            status: "done".into(),
            ..GuestCloudInit::default()
        },
        uptime_seconds: 90.0,
        agent_resident_bytes: 4096,
        ..Default::default()
    }
}

/// Tells a report and scrapes until it is there.
async fn told(
    world: &World,
    router: &Router,
    report: ghost_domain::guest::GuestTelemetry,
    series: &str,
    wanted: f64,
) -> String {
    let waited = tokio::time::timeout(Duration::from_secs(20), async {
        loop {
            world.knobs.guest.tell(GuestEvent::Telemetry {
                vm: world.vm,
                report: Box::new(report.clone()),
            });
            let text = scrape(router).await;
            if value(&text, series) == Some(wanted) {
                return text;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    waited.await.unwrap()
}

#[tokio::test]
async fn guests_are_told_as_they_report_and_can_make_no_series() {
    let world = World::running().await;
    let router = shell(&world);
    let vm = format!("name=\"web\",vm=\"{}\"", world.vm);
    let silent = scrape(&router).await;
    lint(&silent);
    assert!(!silent.contains("ghost_guest_memory_total_bytes{"));

    world.knobs.guest.tell(GuestEvent::Connected {
        vm: world.vm,
        hello: hello(),
        rebooted: false,
    });
    let processes = format!("ghost_guest_processes{{{vm}}}");
    let text = told(&world, &router, report(), &processes, 77.0).await;
    lint(&text);
    for (series, expected) in [
        (format!("ghost_guest_connected{{{vm}}}"), 1.0),
        (
            format!("ghost_guest_cpu_seconds_total{{mode=\"user\",{vm}}}"),
            12.5,
        ),
        (format!("ghost_guest_memory_available_bytes{{{vm}}}"), 600.0),
        (format!("ghost_guest_load1{{{vm}}}"), 0.5),
        (format!("ghost_guest_users{{{vm}}}"), 1.0),
        (format!("ghost_guest_cloud_init_finished{{{vm}}}"), 1.0),
        (format!("ghost_guest_agent_resident_bytes{{{vm}}}"), 4096.0),
        (
            format!("ghost_guest_network_receive_bytes_total{{{vm}}}"),
            14.0,
        ),
        (
            format!("ghost_guest_filesystem_size_bytes{{mount_point=\"/\",{vm}}}"),
            100.0,
        ),
        (
            format!("ghost_guest_filesystem_available_bytes{{mount_point=\"other\",{vm}}}"),
            80.0,
        ),
    ] {
        assert_eq!(value(&text, &series), Some(expected), "{series}\n{text}");
    }
    assert!(!text.contains("forged") && !text.contains("Set-Cookie"));
    for help in text
        .lines()
        .filter(|line| line.starts_with("# HELP ghost_guest_"))
    {
        let ours = ["_connected", "_calls", "_violations", "_report_age"];
        assert!(
            help.contains("reported by the guest") || ours.iter().any(|one| help.contains(one)),
            "{help}"
        );
    }

    // The same guest with other words and impossible numbers: the same series.
    let series = |text: &str| {
        let lines = text.lines().filter(|line| line.starts_with("ghost_guest_"));
        lines
            .filter_map(|line| line.rsplit_once(' '))
            .map(|(series, _)| series.to_owned())
            .collect::<BTreeSet<_>>()
    };
    let mut liar = report();
    liar.processes = 78;
    liar.cpu.user = f64::NAN;
    liar.cpu.idle = -5.0;
    liar.load = [f64::INFINITY, f64::NEG_INFINITY, 1e308];
    liar.memory_total_bytes = u64::MAX;
    for (at, one) in liar.filesystems.iter_mut().enumerate().skip(1) {
        one.mount_point = format!("/made-up/{at}");
    }
    let lied = told(&world, &router, liar, &processes, 78.0).await;
    lint(&lied);
    assert_eq!(series(&lied), series(&text));
    assert!(series(&lied).len() < 64);
}
