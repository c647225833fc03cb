//! What links cost. The figures are for people: `cargo test -p ghost-infrastructure --release --test
//! it -- --ignored --nocapture guest_link::measure`. That a flood does not fill the host's memory
//! is for the suite; it is looked at in a process of its own, this program again.

use std::os::unix::net::UnixListener;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use ghost_domain::VmId;
use ghost_domain::guest::ExecRequest;
use ghost_domain::ports::{GuestEvent, GuestLinks};
use ghost_infrastructure::guest_link::VirtioGuestLinks;
use ghost_proto::guest::frame::{self, Decoder, Found};
use ghost_proto::guest::v1::agent_message::Payload;
use ghost_proto::guest::v1::{AgentMessage, Telemetry, telemetry};

use super::hostile::Behaviour;
use super::hostility::Enemy;
use super::{collect, links_with, next, served, wait_connected};

const FOLDER: &str = "GHOST_TEST_GUESTS_FOLDER";

/// A field of `/proc/self/status`, in KiB.
fn status(field: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(field))
        .unwrap();
    line.trim_start_matches(':')
        .trim()
        .trim_end_matches(" kB")
        .trim()
        .parse()
        .unwrap()
}

/// User and system time of this process.
fn cpu() -> Duration {
    let usage = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = usage
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10)
}

fn child(name: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "--ignored", "--nocapture"])
        .arg(format!("guest_link::measure::{name}"))
        .stdin(Stdio::null());
    command
}

struct KillOnDrop(Child);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn true_takes(links: &VirtioGuestLinks, vm: VmId) -> Duration {
    let start = Instant::now();
    let request = ExecRequest::command("true", Vec::<String>::new());
    let mut session = links.execute(vm, request).await.unwrap();
    collect(&mut *session.output).await.unwrap();
    start.elapsed()
}

async fn p99(links: &VirtioGuestLinks, vm: VmId, until: Instant) -> (Duration, Duration, usize) {
    let mut times = Vec::new();
    while Instant::now() < until {
        times.push(true_takes(links, vm).await);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    times.sort();
    (
        times[times.len() / 2],
        times[times.len() * 99 / 100],
        times.len(),
    )
}

/// Every way of flooding, for half a second each, with next to no holding off: worse than it gets.
#[test]
#[ignore = "a child of floods_do_not_fill_the_host, and a measurement"]
fn flooded() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let links = links_with(|limits| {
            limits.hold_off = (Duration::from_millis(5), Duration::from_millis(5));
        });
        let (good, _channel) = served(&links).await;
        let quiet = p99(&links, good, Instant::now() + Duration::from_millis(500)).await;
        println!(
            "quiet: median {:?}, p99 {:?} of {}",
            quiet.0, quiet.1, quiet.2
        );
        let before = status("VmRSS");
        for behaviour in Behaviour::ALL {
            let enemy = Enemy::new(behaviour);
            links.attach(enemy.vm, enemy.path());
            let calling = tokio::spawn({
                let (links, vm) = (links.clone(), enemy.vm);
                async move {
                    let mut held = Vec::new();
                    loop {
                        let mut request = ExecRequest::command("x", Vec::<String>::new());
                        request.stdin = true;
                        // Not read: what it sends stays here.
                        if let Ok(session) = links.execute(vm, request).await {
                            held.push(session);
                        }
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                }
            });
            let end = Instant::now() + Duration::from_millis(500);
            let loud = p99(&links, good, end).await;
            println!(
                "{}: median {:?}, p99 {:?} of {}, {} KiB",
                behaviour.as_str(),
                loud.0,
                loud.1,
                loud.2,
                status("VmRSS").saturating_sub(before)
            );
            calling.abort();
            links.detach(enemy.vm, "the next one");
        }
        println!("grown: {} KiB", status("VmHWM").saturating_sub(before));
    });
}

#[test]
fn floods_do_not_fill_the_host() {
    let output = child("flooded").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}");
    let grown: u64 = text
        .lines()
        .find_map(|line| {
            line.split("grown: ")
                .nth(1)?
                .strip_suffix(" KiB")?
                .parse()
                .ok()
        })
        .unwrap_or_else(|| panic!("{text}"));
    // The attackers' own threads and buffers live in that process too.
    assert!(grown <= 16 << 10, "{text}");
}

fn report() -> Telemetry {
    let filesystem = |name: &str| telemetry::Filesystem {
        mount_point: name.into(),
        kind: "ext4".into(),
        total_bytes: 10 << 30,
        available_bytes: 5 << 30,
    };
    Telemetry {
        cpu: Some(telemetry::CpuTimes::default()),
        cpus: 2,
        memory_total_bytes: 1 << 30,
        filesystems: ["/", "/boot", "/var", "/home"].map(filesystem).to_vec(),
        interfaces: vec![
            telemetry::Interface {
                name: "eth0".into(),
                mac: "52:54:00:00:00:01".into(),
                addresses: vec!["192.168.122.10".into(), "fe80::1".into()],
                ..Default::default()
            };
            2
        ],
        users: vec!["debian".into()],
        ..Default::default()
    }
}

/// A hundred guests on sockets, each reporting as often as it is asked to.
#[test]
#[ignore = "a child of a_hundred_guests"]
fn a_hundred_reporters() {
    let folder = std::path::PathBuf::from(std::env::var_os(FOLDER).unwrap());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let guests = (0..100).map(|number| {
        let listener = UnixListener::bind(folder.join(format!("{number}.sock"))).unwrap();
        listener.set_nonblocking(true).unwrap();
        async move {
            let listener = tokio::net::UnixListener::from_std(listener).unwrap();
            let (stream, _) = listener.accept().await.unwrap();
            reporter(stream).await;
        }
    });
    runtime.block_on(async { futures::future::join_all(guests).await });
}

async fn reporter(mut stream: tokio::net::UnixStream) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut decoder = Decoder::new();
    let mut piece = [0; 4096];
    let mut greeting = None;
    while greeting.is_none() {
        let count = stream.read(&mut piece).await.unwrap();
        decoder.push(&piece[..count]);
        while let Some(Found::Message(message)) = decoder.next() {
            if let Some(Payload::Hello(hello)) = message.payload {
                greeting = Some((message.session, hello));
            }
        }
    }
    let (session, hello) = greeting.unwrap();
    let interval: Duration = hello.telemetry_interval.unwrap().try_into().unwrap();
    let message = |payload| AgentMessage {
        session: session.clone(),
        payload: Some(payload),
        ..Default::default()
    };
    let mut bytes = BytesMut::new();
    let ready = ghost_proto::guest::v1::AgentReady {
        protocol_version: 1,
        instance: vec![1; 16],
        ..Default::default()
    };
    frame::encode(&message(Payload::AgentReady(ready)), &mut bytes).unwrap();
    stream.write_all(&bytes).await.unwrap();
    let mut every = tokio::time::interval(interval);
    loop {
        every.tick().await;
        bytes.clear();
        frame::encode(&message(Payload::Telemetry(report())), &mut bytes).unwrap();
        if stream.write_all(&bytes).await.is_err() {
            return;
        }
    }
}

#[test]
#[ignore = "a measurement"]
fn a_hundred_guests() {
    let folder = tempfile::tempdir().unwrap();
    let guests = child("a_hundred_reporters")
        .env(FOLDER, folder.path())
        .spawn()
        .unwrap();
    let _guests = KillOnDrop(guests);
    let last = folder.path().join("99.sock");
    while !last.exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let links = links_with(|_| ());
        let mut events = links.subscribe();
        let before = status("VmRSS");
        for number in 0..100 {
            let vm = VmId::random();
            links.attach(vm, &folder.path().join(format!("{number}.sock")));
            wait_connected(&mut *events, vm).await;
        }
        let reading = Arc::new(AtomicBool::new(true));
        let (start, used) = (Instant::now(), cpu());
        let mut reports = 0;
        while start.elapsed() < Duration::from_secs(30) && reading.load(Ordering::Relaxed) {
            if let GuestEvent::Telemetry { .. } = next(&mut *events).await {
                reports += 1;
            }
        }
        let share = (cpu() - used).as_secs_f64() / start.elapsed().as_secs_f64() * 100.0;
        println!(
            "{reports} reports of 100 VMs in {:.0?}: {share:.2} % of a core, {} KiB a VM",
            start.elapsed(),
            status("VmRSS").saturating_sub(before) / 100
        );
    });
}
