//! What is measured, with one agent on the system's libvirt.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ghost_e2e::agent::{Agent, Builder};
use ghost_e2e::guest::TINY;
use ghost_e2e::libvirt::SYSTEM;
use ghost_proto::agent::v1 as message;
use ghost_proto::agent::v1::operation_service_client::OperationServiceClient;
use ghost_proto::agent::v1::vm_service_client::VmServiceClient;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};
use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::sys;

use crate::report::{Budget, Figure, Report, median, ms, progress};
use crate::{fleet, hostile, inside, thousand};

/// Anything that stops the run.
pub(crate) type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Pairs of the comparisons that start a guest.
const STARTS: usize = 9;
/// Samples of a whole process.
pub(crate) const PROCESSES: usize = 21;

pub(crate) fn run() -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    let mut report = Report::default();
    // `bench fleet` and `bench inside`: one section by itself, for whoever works on it.
    let section = std::env::args().nth(1);
    if section.as_deref() == Some("fleet") {
        let measured = fleet::measure(&runtime, &mut report);
        // What was measured until something stopped the run is told all the same.
        report.print()?;
        return measured;
    }
    let mut agent = Builder::new().set("logging.level", "warn").start();
    agent.wait_idle(Duration::from_secs(60));
    let host = host_line(&agent);
    progress(&host);
    if section.as_deref() == Some("inside") {
        inside::measure(&agent, &runtime, &mut report)?;
        return report.print().map_err(Into::into);
    }

    // Before it has done anything, once it has come to rest.
    std::thread::sleep(Duration::from_secs(3));
    report.add(
        Figure::new(
            "agent's resident memory, idle",
            resident_mib(agent.pid())?,
            "MiB",
        )
        .budget(Budget::Most(32.0)),
    );
    let status = whole_process(&agent, &["status"], PROCESSES)?;
    report.add(
        Figure::new("`ghostctl status`, whole process", ms(status), "ms")
            .budget(Budget::Most(20.0)),
    );
    agent.import_tiny();
    create_and_start(&agent, &runtime, &mut report)?;
    inside::measure(&agent, &runtime, &mut report)?;
    hostile::measure(&mut report)?;
    thousand::measure(&mut agent, &runtime, &mut report)?;
    drop(agent);
    let measured = fleet::measure(&runtime, &mut report);

    use std::io::Write as _;
    writeln!(std::io::stdout(), "{host}\n")?;
    report.print()?;
    measured
}

/// The host in one line.
pub(crate) fn host_line(agent: &Agent) -> String {
    let status = agent.ctl().json(&["status"]);
    let text = |value: &serde_json::Value| value.as_str().unwrap_or("?").to_owned();
    let gib = status["resources"]["total"]["memory_bytes"]
        .as_u64()
        .unwrap_or(0)
        >> 30;
    format!(
        "{}, {} CPUs, {gib} GiB, {}, Linux {}, libvirt {}, QEMU {}, {}, load {:.1}",
        text(&status["machine"]["cpu_model"]),
        status["resources"]["total"]["cpus"],
        text(&status["machine"]["operating_system"]),
        text(&status["machine"]["kernel"]),
        text(&status["hypervisor"]["libvirt_version"]),
        text(&status["hypervisor"]["version"]),
        text(&status["hypervisor"]["accelerator"]),
        status["machine"]["load_one_minute"]
            .as_f64()
            .unwrap_or_default(),
    )
}

/// `VmRSS` of a process.
pub(crate) fn resident_mib(pid: u32) -> Result<f64, Failure> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib: u32 = status
        .lines()
        .find_map(|line| {
            line.strip_prefix("VmRSS:")?
                .trim()
                .split(' ')
                .next()?
                .parse()
                .ok()
        })
        .ok_or("no VmRSS")?;
    Ok(f64::from(kib) / 1024.0)
}

/// How long a command takes from its start to its end.
pub(crate) fn time(mut command: Command) -> Result<Duration, Failure> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let begun = Instant::now();
    let status = command.status()?;
    let took = begun.elapsed();
    match status.success() {
        true => Ok(took),
        false => Err(format!("{command:?}: {status}").into()),
    }
}

fn whole_process(agent: &Agent, arguments: &[&str], times: usize) -> Result<Duration, Failure> {
    let mut samples = Vec::new();
    for _ in 0..times {
        samples.push(time(agent.ctl().command(arguments))?);
    }
    Ok(median(&samples))
}

/// A connection to the agent's socket.
pub(crate) async fn channel(agent: &Agent) -> Result<Channel, Failure> {
    // As ghostctl connects.
    let endpoint = Endpoint::from_shared(format!("unix:{}", agent.socket().display()))?
        .max_frame_size(ghost_proto::agent::MOST_FRAME);
    Ok(endpoint.connect().await?)
}

/// Asks for a change and waits until it has succeeded.
async fn finished(channel: &Channel, operation: message::Operation) -> Result<(), Failure> {
    let mut operations = OperationServiceClient::new(channel.clone());
    let request = message::WatchOperationRequest { id: operation.id };
    let mut stream = operations.watch(request).await?.into_inner();
    let mut last = message::OperationStatus::Unspecified;
    while let Some(now) = stream.message().await? {
        last = now.status();
        if let (message::OperationStatus::Failed, Some(error)) = (last, now.error) {
            return Err(error.message.into());
        }
    }
    match last {
        message::OperationStatus::Succeeded => Ok(()),
        other => Err(format!("the operation ended as {other:?}").into()),
    }
}

/// Stops the agent's process for as long as it lives, so that the floor is measured alone.
struct Frozen(i32);

impl Frozen {
    fn new(pid: u32) -> Result<Self, Failure> {
        let pid = i32::try_from(pid)?;
        // SAFETY: kill takes two numbers and touches no memory of ours; the process is our child.
        unsafe { libc::kill(pid, libc::SIGSTOP) };
        Ok(Self(pid))
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe { libc::kill(self.0, libc::SIGCONT) };
    }
}

/// Create and start of a cached image, beside the least that it could take: the overlay by
/// qemu-img, the same domain defined and started through one libvirt connection.
fn create_and_start(agent: &Agent, runtime: &Runtime, report: &mut Report) -> Result<(), Failure> {
    let libvirt = Connect::open(Some(SYSTEM))?;
    let channel = runtime.block_on(channel(agent))?;
    let mut vms = VmServiceClient::new(channel.clone());

    // A VM of the agent is the model of the floor's.
    let model = agent.name("model");
    agent
        .ctl()
        .ok(&[&["vm", "create", &model, "--image", "tiny"], &TINY[..]].concat());
    let shown = agent.ctl().json(&["vm", "show", &model]);
    let model_id = shown["id"]
        .as_str()
        .ok_or("the model has no id")?
        .to_owned();
    let model_mac = shown["nics"][0]["mac"]
        .as_str()
        .ok_or("the model has no card")?
        .to_owned();
    let xml = libvirt
        .lookup_domain_by_uuid_string(&model_id)?
        .xml_desc(sys::VIR_DOMAIN_XML_INACTIVE)?;
    let model_folder = agent.data_dir().join("vms").join(&model_id);
    let image = agent.ctl().json(&["image", "show", "tiny"]);
    let base = agent.data_dir().join("images").join(format!(
        "{}.{}",
        image["digest"].as_str().unwrap_or_default(),
        image["format"].as_str().unwrap_or_default()
    ));

    let (mut ours, mut floors) = (Vec::new(), Vec::new());
    for round in 0..=STARTS {
        let name = agent.name(&format!("r{round}"));
        let begun = Instant::now();
        runtime.block_on(async {
            let request = message::CreateVmRequest {
                name: name.clone(),
                image: "tiny".into(),
                vcpus: 1,
                memory_bytes: 128 << 20,
                disk_bytes: 128 << 20,
                start: true,
                ..message::CreateVmRequest::default()
            };
            let operation = vms.create(request).await?.into_inner();
            finished(&channel, operation).await
        })?;
        let took = begun.elapsed();
        agent.ctl().ok(&["vm", "delete", &name, "--force"]);

        let frozen = Frozen::new(agent.pid())?;
        let floor = floor(
            &libvirt,
            agent,
            &xml,
            &model,
            &model_id,
            &model_mac,
            &model_folder,
            &base,
        )?;
        drop(frozen);
        // The first round warms caches up.
        if round > 0 {
            ours.push(took);
            floors.push(floor);
            progress(&format!(
                "create and start {:.0} ms, floor {:.0} ms",
                ms(took),
                ms(floor)
            ));
        }
    }
    agent.ctl().ok(&["vm", "delete", &model]);
    report.add(
        Figure::new(
            "create and start of a cached image",
            ms(median(&ours)),
            "ms",
        )
        .beside("bare floor", ms(median(&floors)))
        .budget(Budget::Times(1.25)),
    );
    Ok(())
}

/// A started domain, destroyed and undefined when dropped.
struct Started(Domain);

impl Drop for Started {
    fn drop(&mut self) {
        // What is gone already is not there to be removed.
        drop(self.0.destroy());
        drop(self.0.undefine());
    }
}

#[expect(
    clippy::too_many_arguments,
    reason = "the parts of the model, used once"
)]
fn floor(
    libvirt: &Connect,
    agent: &Agent,
    xml: &str,
    model: &str,
    model_id: &str,
    model_mac: &str,
    model_folder: &std::path::Path,
    base: &PathBuf,
) -> Result<Duration, Failure> {
    let id = Uuid::new_v4();
    let folder = agent.folder().join("floor").join(id.to_string());
    fs::create_dir_all(&folder)?;
    for folder in [agent.folder().join("floor"), folder.clone()] {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o711))?;
    }
    // The seed is no part of the floor, but the domain has the same shape.
    fs::copy(model_folder.join("seed.img"), folder.join("seed.img"))?;
    let bytes = id.as_bytes();
    let mac = format!(
        "52:54:00:{:02x}:{:02x}:{:02x}",
        bytes[0], bytes[1], bytes[2]
    );
    let xml = xml
        .replace(
            &model_folder.display().to_string(),
            &folder.display().to_string(),
        )
        .replace(model_id, &id.to_string())
        .replace(model_mac, &mac)
        .replace(model, &format!("{model}-floor"));
    let mut tool = Command::new("qemu-img");
    tool.args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
        .arg(base)
        .arg(folder.join("disk.qcow2"))
        .arg("128M");

    let begun = Instant::now();
    time(tool)?;
    let domain = Started(libvirt.define_domain_xml(&xml)?);
    domain.0.create()?;
    let took = begun.elapsed();
    drop(domain);
    fs::remove_dir_all(folder)?;
    Ok(took)
}
