//! A fleet: one `ghost-core` in a process of its own, ten thousand simulated hosts with real links in
//! another (`ghost-swarm`), and one real agent for calls through the link.
//!
//! `GHOST_BENCH_FLEET_MINUTES` says how long all hosts have to stay (2 without it), and
//! `GHOST_BENCH_FLEET_HOSTS` how many there are.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ghost_e2e::agent::{Agent, Builder as AgentBuilder};
use ghost_e2e::binaries::program;
use ghost_e2e::core::{Builder as CoreBuilder, Core};
use ghost_e2e::ctl::Ctl;
use ghost_e2e::http;
use ghost_e2e::swarm::{self, Process, Swarm};
use ghost_proto::agent::v1 as message;
use ghost_proto::agent::v1::vm_service_client::VmServiceClient;
use ghost_proto::core::metadata;
use ghost_proto::core::v1::ListFleetVmsRequest;
use ghost_proto::core::v1::fleet_service_client::FleetServiceClient;
use tokio::runtime::Runtime;
use tonic::Request;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use crate::figures::{Failure, host_line, resident_mib};
use crate::report::{Budget, Figure, Report, median, ms, progress};

/// All hosts.
const HOSTS: usize = 10_000;
/// Those by which Core's CPU is measured.
const SOME: usize = 1_000;
/// VMs of each.
const VMS: u32 = 2;
/// Calls of each kind, after those that warm up.
const CALLS: usize = 1_000;
const WARM: usize = 100;
/// Streams at once.
const STREAMS: usize = 100;
/// Between two lines of one.
const PACE: Duration = Duration::from_millis(20);
/// How long the streams are looked at, each way.
const LOOK: Duration = Duration::from_secs(8);
/// Until hosts that have just come do nothing but ping and tell how they fare.
const SETTLE: Duration = Duration::from_secs(35);
/// A whole number of heartbeats.
const WINDOW: Duration = Duration::from_secs(60);
/// More than the list of all VMs.
const WINDOW_BYTES: u32 = 16 << 20;
/// Longer than any wait that ends well.
const PATIENCE: Duration = Duration::from_secs(240);

pub(crate) fn measure(runtime: &Runtime, report: &mut Report) -> Result<(), Failure> {
    let hosts = variable("GHOST_BENCH_FLEET_HOSTS", HOSTS)?;
    let minutes = variable("GHOST_BENCH_FLEET_MINUTES", 2)?;
    let mut core = CoreBuilder::new()
        .set("logging.level", "warn")
        // One person asks for everything here, as fast as it goes.
        .set("limits.requests_per_second", 1_000_000)
        .set("limits.burst", 1_000_000)
        .start();
    let alone = resident_kib(&core)?;
    through_the_link(&core, runtime, report)?;
    let bare = bare_connections(hosts, report)?;
    let mut swarm = Swarm::start(&core, VMS)?;
    join(&mut swarm, &core, 1)?;
    streams(&core, runtime, report)?;

    let some = SOME.min(hosts);
    join(&mut swarm, &core, some)?;
    let busy = busy(&core, &format!("with {some} hosts"))?;
    report.add(
        Figure::new(
            &format!("Core's CPU with {some} hosts, share of one core"),
            busy,
            "%",
        )
        .budget(Budget::Most(5.0)),
    );
    join(&mut swarm, &core, hosts)?;
    stay(&core, &mut swarm, hosts, minutes, report)?;
    let each =
        |core: &Core| -> Result<f64, Failure> { Ok((resident_kib(core)? - alone) / count(hosts)) };
    report.add(
        Figure::new(
            &format!("Core's resident memory for each of {hosts} hosts"),
            each(&core)?,
            "KiB",
        )
        .beside("a bare TLS connection", bare.kib)
        .budget(Budget::Most(100.0)),
    );
    list(&core, runtime, hosts, report)?;
    come_back(&mut core, &mut swarm, hosts, bare.seconds, report)?;
    report.add(
        Figure::new(
            "the same memory after all came back at once",
            each(&core)?,
            "KiB",
        )
        .beside("a bare TLS connection", bare.kib)
        .budget(Budget::Most(100.0)),
    );
    Ok(())
}

fn variable(name: &str, default: usize) -> Result<usize, Failure> {
    match std::env::var(name) {
        Ok(value) => value
            .parse()
            .map_err(|error| format!("{name}={value}: {error}").into()),
        Err(_) => Ok(default),
    }
}

fn count(number: usize) -> f64 {
    u32::try_from(number).map_or(f64::INFINITY, f64::from)
}

fn resident_kib(core: &Core) -> Result<f64, Failure> {
    Ok(resident_mib(core.pid())? * 1024.0)
}

/// Hosts join and come online, until there are so many.
fn join(swarm: &mut Swarm, core: &Core, hosts: usize) -> Result<(), Failure> {
    let begun = Instant::now();
    swarm.enrol(hosts)?;
    let joined = begun.elapsed();
    swarm.link(hosts)?;
    let came = all_online(core, hosts, begun)?;
    progress(&format!(
        "{hosts} hosts: joined after {:.1} s, online after {:.1} s",
        joined.as_secs_f64(),
        came.as_secs_f64()
    ));
    Ok(())
}

/// Waits until Core shows so many hosts as online; how long that was after `begun`.
fn all_online(core: &Core, hosts: usize, begun: Instant) -> Result<Duration, Failure> {
    let mut told = Instant::now();
    loop {
        // While Core starts there is nobody who answers.
        let online = swarm::online(core).unwrap_or_default();
        if online >= hosts {
            return Ok(begun.elapsed());
        }
        if begun.elapsed() >= PATIENCE {
            return Err(format!(
                "{online} of {hosts} hosts are online after {} s\n{}",
                PATIENCE.as_secs(),
                core.log()
                    .lines()
                    .rev()
                    .take(10)
                    .collect::<Vec<_>>()
                    .join("\n")
            )
            .into());
        }
        if told.elapsed() >= Duration::from_secs(10) {
            progress(&format!("{online} of {hosts} hosts are online"));
            told = Instant::now();
        }
        std::thread::sleep(Duration::from_millis(250));
    }
}

/// A connection with a certificate of its own: by `ghostctl`, which makes and keeps it.
fn person(
    folder: &Path,
    endpoint: &str,
    token: &str,
    runtime: &Runtime,
) -> Result<Channel, Failure> {
    let ctl = Ctl::new(program("ghostctl"), None).with_env("XDG_CONFIG_HOME", folder);
    ctl.ok(&[
        "--endpoint",
        endpoint,
        "context",
        "add",
        "bench",
        "--token",
        token,
    ]);
    let context = folder.join("ghost/contexts/bench");
    let read = |name: &str| fs::read(context.join(name));
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(read("authority.pem")?))
        .identity(Identity::from_pem(
            read("certificate.pem")?,
            read("key.pem")?,
        ));
    let endpoint = Endpoint::from_shared(endpoint.to_owned())?
        .tls_config(tls)?
        .tcp_nodelay(true)
        // As much as the largest answer, so that who sends it waits for no reader.
        .initial_stream_window_size(Some(WINDOW_BYTES))
        .initial_connection_window_size(Some(4 * WINDOW_BYTES));
    Ok(runtime.block_on(endpoint.connect())?)
}

fn operator(core: &Core, name: &str, runtime: &Runtime) -> Result<Channel, Failure> {
    let token = core.token(&["--tenant", "default", "--role", "operator"]);
    let folder = core.folder().join("people").join(name);
    let endpoint = format!("https://{}", core.address());
    person(&folder, &endpoint, &token, runtime)
}

fn of_host<T>(message: T, host: &str) -> Result<Request<T>, Failure> {
    let mut request = Request::new(message);
    request.metadata_mut().insert(metadata::HOST, host.parse()?);
    Ok(request)
}

/// The same call of a real agent directly and through Core, with mutual TLS on loopback both ways.
fn through_the_link(core: &Core, runtime: &Runtime, report: &mut Report) -> Result<(), Failure> {
    let agent: Agent = AgentBuilder::simulated()
        .set("logging.level", "warn")
        .start();
    progress(&host_line(&agent));
    let joined = agent.enroll(&core.host_token("default"), "real");
    if joined.code != 0 {
        return Err(joined.stderr.into());
    }
    core.wait_host("real", "online", Duration::from_secs(60));
    let token = agent.ctl().ok(&["trust", "token", "--role", "operator"]);
    let direct = person(
        &agent.folder().join("person"),
        &format!("https://127.0.0.1:{}", agent.grpc_port()),
        token.trim(),
        runtime,
    )?;
    let mut direct = VmServiceClient::new(direct);
    let mut through = VmServiceClient::new(operator(core, "caller", runtime)?);
    let (mut alone, mut carried) = (Vec::new(), Vec::new());
    runtime.block_on(async {
        for round in 0..WARM + CALLS {
            let begun = Instant::now();
            direct.list(message::ListVmsRequest::default()).await?;
            let first = begun.elapsed();
            let request = of_host(message::ListVmsRequest::default(), "real")?;
            let begun = Instant::now();
            through.list(request).await?;
            let second = begun.elapsed();
            if round >= WARM {
                alone.push(first);
                carried.push(second);
            }
        }
        Ok::<_, Failure>(())
    })?;
    report.add(
        Figure::new(
            "`VmService.List` through Core and the link",
            ms(median(&carried)),
            "ms",
        )
        .beside("dialled directly", ms(median(&alone)))
        .budget(Budget::Beyond(1.0)),
    );
    Ok(())
}

/// What bare TLS connections cost.
struct Bare {
    /// Memory of one.
    kib: f64,
    /// Handshakes of all.
    seconds: f64,
}

fn bare_connections(connections: usize, report: &mut Report) -> Result<Bare, Failure> {
    let folder = swarm::folder()?;
    let path = folder.path().display().to_string();
    let mut server = Process::start(&["bare-server", "--folder", &path])?;
    let address = server.told("at")?;
    let mut client = Process::start(&["bare-client", "--folder", &path, "--address", &address])?;
    let mut open = |connections: usize| client.ask(&format!("open {connections}"), "opened");
    // What the first ones alone need.
    let warm = connections.min(100);
    open(warm)?;
    let before: f64 = server.ask("resident", "resident")?.parse()?;
    let begun = Instant::now();
    open(warm + connections)?;
    let seconds = begun.elapsed().as_secs_f64();
    let after: f64 = server.ask("resident", "resident")?.parse()?;
    let kib = (after - before) / count(connections);
    report.add(Figure::new(
        &format!("{connections} bare TLS handshakes"),
        seconds,
        "s",
    ));
    Ok(Bare { kib, seconds })
}

/// What readers of streams saw.
struct Seen {
    /// How old a line was when it was read.
    age: Duration,
    /// The fewest lines that one of them read in a second.
    slowest: f64,
}

/// Paced streams of one simulated host through one connection, without and with one more that
/// floods and that nobody reads.
fn streams(core: &Core, runtime: &Runtime, report: &mut Report) -> Result<(), Failure> {
    let logs = VmServiceClient::new(operator(core, "reader", runtime)?);
    let alone = runtime.block_on(read_all(&logs, false))?;
    let stalled = runtime.block_on(read_all(&logs, true))?;
    let others = STREAMS - 1;
    report.add(
        Figure::new(
            &format!("age of a line in {others} streams, beside a stalled one"),
            ms(stalled.age),
            "ms",
        )
        .beside("none stalls", ms(alone.age))
        .budget(Budget::Beyond(1.0)),
    );
    report.add(
        Figure::new(
            "lines a second of the slowest of them",
            stalled.slowest,
            "1/s",
        )
        .beside("none stalls", alone.slowest),
    );
    Ok(())
}

async fn read_all(logs: &VmServiceClient<Channel>, stall: bool) -> Result<Seen, Failure> {
    let paced = || message::VmLogsRequest {
        vm: "paced".into(),
        follow: true,
        tail_bytes: u64::try_from(PACE.as_micros()).unwrap_or(u64::MAX),
    };
    let flood = message::VmLogsRequest {
        vm: if stall { "flood" } else { "paced" }.into(),
        ..paced()
    };
    let mut last = logs
        .clone()
        .logs(of_host(flood, "host-0")?)
        .await?
        .into_inner();
    // The stalled one is read once and never again; its windows fill up meanwhile.
    last.message().await?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut readers = tokio::task::JoinSet::new();
    let ends = tokio::time::Instant::now() + LOOK;
    if !stall {
        readers.spawn(async move {
            let read = async { while let Ok(Some(_)) = last.message().await {} };
            drop(tokio::time::timeout_at(ends, read).await);
            Ok(None)
        });
    }
    for _ in 1..STREAMS {
        let (mut logs, request) = (logs.clone(), of_host(paced(), "host-0")?);
        readers.spawn(async move {
            let mut lines = logs.logs(request).await?.into_inner();
            let mut ages = Vec::new();
            let read = async {
                while let Some(line) = lines.message().await? {
                    ages.push(age(&line.data)?);
                }
                Err::<(), Failure>("a stream ended by itself".into())
            };
            match tokio::time::timeout_at(ends, read).await {
                Err(_) => Ok(Some(ages)),
                Ok(ended) => ended.map(|()| None),
            }
        });
    }
    let (mut ages, mut fewest) = (Vec::new(), usize::MAX);
    while let Some(read) = readers.join_next().await {
        let read: Result<Option<Vec<Duration>>, Failure> = read?;
        if let Some(read) = read? {
            fewest = fewest.min(read.len());
            ages.extend(read);
        }
    }
    Ok(Seen {
        age: median(&ages),
        slowest: count(fewest) / LOOK.as_secs_f64(),
    })
}

/// How long ago a line was written, by the wall clock that it begins with.
fn age(line: &[u8]) -> Result<Duration, Failure> {
    let stamp = line.first_chunk::<8>().ok_or("a line without its time")?;
    let written = Duration::from_nanos(u64::from_be_bytes(*stamp));
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    Ok(now.saturating_sub(written))
}

/// The CPU time that Core has used, in seconds (proc_pid_stat(5): fields 14 and 15).
fn cpu_seconds(core: &Core) -> Result<f64, Failure> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", core.pid()))?;
    let after_name = stat.rsplit_once(')').ok_or("no stat")?.1;
    let ticks: f64 = after_name
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(|field| field.parse::<f64>())
        .sum::<Result<_, _>>()?;
    // SAFETY: sysconf takes a number and touches no memory of ours.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    Ok(ticks / f64::from(i32::try_from(per_second)?))
}

/// The share of one core that Core uses once all has settled, in percent.
fn busy(core: &Core, what: &str) -> Result<f64, Failure> {
    std::thread::sleep(SETTLE);
    progress(&format!("Core's CPU {what}, for {} s", WINDOW.as_secs()));
    let (before, begun) = (cpu_seconds(core)?, Instant::now());
    std::thread::sleep(WINDOW);
    Ok((cpu_seconds(core)? - before) / begun.elapsed().as_secs_f64() * 100.0)
}

/// All hosts stay online for so many minutes.
fn stay(
    core: &Core,
    swarm: &mut Swarm,
    hosts: usize,
    minutes: usize,
    report: &mut Report,
) -> Result<(), Failure> {
    // As with the thousand: until they do nothing but ping and tell how they fare.
    std::thread::sleep(SETTLE);
    let window = Duration::from_secs(60 * u64::try_from(minutes)?);
    let links = swarm::metric(core, "ghost_core_links_total")?;
    let (before, begun) = (cpu_seconds(core)?, Instant::now());
    let mut fewest = hosts;
    while begun.elapsed() < window {
        std::thread::sleep(Duration::from_secs(5).min(window - begun.elapsed().min(window)));
        fewest = fewest.min(swarm::online(core)?);
    }
    let busy = (cpu_seconds(core)? - before) / begun.elapsed().as_secs_f64() * 100.0;
    let anew = swarm::metric(core, "ghost_core_links_total")? - links;
    progress(&format!("the hosts themselves: {:?}", swarm.status()?));
    report.add(
        Figure::new(
            &format!("of {hosts} hosts, most not online within {minutes} min"),
            count(hosts.saturating_sub(fewest)),
            "",
        )
        .budget(Budget::Most(0.0)),
    );
    report.add(
        Figure::new("links that had to be made anew in that time", anew, "")
            .budget(Budget::Most(0.0)),
    );
    report.add(Figure::new(
        &format!("Core's CPU with {hosts} hosts, share of one core"),
        busy,
        "%",
    ));
    Ok(())
}

/// The list of all VMs, as Core itself measures it and as a connected client sees it.
fn list(core: &Core, runtime: &Runtime, hosts: usize, report: &mut Report) -> Result<(), Failure> {
    let channel = operator(core, "lister", runtime)?;
    let mut fleet = FleetServiceClient::new(channel).max_decoding_message_size(64 << 20);
    let wanted = hosts * usize::try_from(VMS)?;
    let before = histogram(core)?;
    let mut seen = Vec::new();
    for _ in 0..21 {
        let begun = Instant::now();
        let answer = runtime.block_on(fleet.list_vms(ListFleetVmsRequest::default()))?;
        seen.push(begun.elapsed());
        let listed = answer.into_inner().vms.len();
        if listed < wanted {
            return Err(format!("{listed} VMs are listed, and {wanted} are there").into());
        }
    }
    let after = histogram(core)?;
    let inside = (after.0 - before.0) / (after.1 - before.1).max(1.0) * 1e3;
    report.add(
        Figure::new(
            &format!("list of {wanted} VMs, inside Core (mean of its histogram)"),
            inside,
            "ms",
        )
        .budget(Budget::Most(50.0)),
    );
    report.add(Figure::new(
        &format!("list of {wanted} VMs, as a connected client sees it"),
        ms(median(&seen)),
        "ms",
    ));
    Ok(())
}

/// Sum and count of Core's own histogram of `FleetService.ListVms`.
fn histogram(core: &Core) -> Result<(f64, f64), Failure> {
    let text = http::get(core.metrics_port(), "/metrics")?.body;
    let value = |end: &str| {
        text.lines()
            .find(|line| {
                line.starts_with(&format!("ghost_rpc_duration_seconds_{end}"))
                    && line.contains("FleetService/ListVms\"")
            })
            .and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .unwrap_or_default()
    };
    Ok((value("sum"), value("count")))
}

/// Core is killed and started again, and all hosts come back at once.
fn come_back(
    core: &mut Core,
    swarm: &mut Swarm,
    hosts: usize,
    handshakes: f64,
    report: &mut Report,
) -> Result<(), Failure> {
    progress("Core is killed and started again");
    core.kill();
    let begun = Instant::now();
    core.spawn();
    while swarm::online(core).is_err() && begun.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(50));
    }
    progress(&format!(
        "Core serves again after {:.1} s",
        begun.elapsed().as_secs_f64()
    ));
    let took = all_online(core, hosts, begun)?;
    progress(&format!("CPU time of that: {:.1} s", cpu_seconds(core)?));
    report.add(
        Figure::new(
            &format!("all {hosts} hosts online again after Core was killed"),
            took.as_secs_f64(),
            "s",
        )
        .beside("bare handshakes", handshakes)
        .budget(Budget::Most(120.0)),
    );
    std::thread::sleep(Duration::from_secs(10));
    let status = swarm.status()?;
    progress(&format!("the hosts themselves: {status:?}"));
    report.add(
        Figure::new(
            "hosts that Core refused, or that are not back",
            count(status.ever_refused + hosts.saturating_sub(status.up)),
            "",
        )
        .budget(Budget::Most(0.0)),
    );
    Ok(())
}
