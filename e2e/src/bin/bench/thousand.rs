//! A thousand VMs: records with domains behind them, which are not started.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::ptr;
use std::time::{Duration, Instant};

use ghost_e2e::agent::Agent;
use ghost_e2e::guest::TINY;
use ghost_e2e::libvirt::SYSTEM;
use ghost_e2e::{http, wait};
use ghost_proto::agent::v1 as message;
use ghost_proto::agent::v1::vm_service_client::VmServiceClient;
use tokio::runtime::Runtime;
use uuid::Uuid;
use virt::connect::Connect;
use virt::sys;

use crate::figures::{Failure, PROCESSES, channel, resident_mib, time};
use crate::report::{Budget, Figure, Report, median, ms, progress};

const COUNT: usize = 1000;

/// The figures with a thousand VMs.
pub(crate) fn measure(
    agent: &mut Agent,
    runtime: &Runtime,
    report: &mut Report,
) -> Result<(), Failure> {
    let libvirt = Connect::open(Some(SYSTEM))?;
    make(agent, &libvirt)?;

    // The list, as a whole process, beside virsh's.
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..PROCESSES {
        ours.push(time(agent.ctl().command(&["list", "-o", "json"]))?);
        let mut virsh = Command::new("virsh");
        virsh.args(["-c", SYSTEM, "list", "--all"]);
        theirs.push(time(virsh)?);
    }
    report.add(
        Figure::new(
            "`ghostctl list -o json` of 1,000 VMs, whole process",
            ms(median(&ours)),
            "ms",
        )
        .beside("virsh list --all", ms(median(&theirs)))
        .budget(Budget::Faster),
    );
    list_inside(agent, runtime, report)?;
    scrape(agent, &libvirt, report)?;
    report.add(
        Figure::new(
            "agent's resident memory, 1,000 VMs",
            resident_mib(agent.pid())?,
            "MiB",
        )
        .budget(Budget::Most(64.0)),
    );

    // A start with 1,000 records, until the first call is answered.
    let (mut answered, mut connected, mut resident) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..5 {
        agent.stop();
        let begun = Instant::now();
        agent.spawn();
        runtime.block_on(async {
            loop {
                if let Ok(channel) = channel(agent).await {
                    let mut vms = VmServiceClient::new(channel);
                    if let Ok(answer) = vms.list(message::ListVmsRequest::default()).await
                        && answer.into_inner().vms.len() >= COUNT
                    {
                        return;
                    }
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        });
        answered.push(begun.elapsed());
        agent.wait_idle(Duration::from_secs(120));
        connected.push(begun.elapsed());
        resident.push(resident_mib(agent.pid())?);
    }
    report.add(
        Figure::new(
            "start with 1,000 records until they are served",
            ms(median(&answered)),
            "ms",
        )
        .budget(Budget::Most(1000.0)),
    );
    report.add(Figure::new(
        "start with 1,000 records until libvirt was looked at",
        ms(median(&connected)),
        "ms",
    ));
    resident.sort_by(f64::total_cmp);
    report.add(
        Figure::new(
            "agent's resident memory, restarted with 1,000 VMs",
            resident
                .get(resident.len() / 2)
                .copied()
                .unwrap_or_default(),
            "MiB",
        )
        .budget(Budget::Most(64.0)),
    );
    Ok(())
}

/// Defines them beside a VM of the agent's own, of which they are copies, and lets it adopt them.
fn make(agent: &Agent, libvirt: &Connect) -> Result<(), Failure> {
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
    let vms = agent.data_dir().join("vms");
    let begun = Instant::now();
    for number in 1..COUNT {
        let id = Uuid::new_v4();
        let folder = vms.join(id.to_string());
        fs::create_dir(&folder)?;
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o711))?;
        // They never run, so they may share their files.
        for file in ["disk.qcow2", "seed.img"] {
            fs::hard_link(vms.join(&model_id).join(file), folder.join(file))?;
        }
        let bytes = id.as_bytes();
        let mac = format!(
            "52:54:00:{:02x}:{:02x}:{:02x}",
            bytes[0], bytes[1], bytes[2]
        );
        let xml = xml
            .replace(&model_id, &id.to_string())
            .replace(&model_mac, &mac)
            .replace(&model, &agent.name(&format!("vm-{number}")));
        libvirt.define_domain_xml(&xml)?;
        if number % 100 == 0 {
            progress(&format!("{number} domains defined"));
        }
    }
    wait::until_ok(
        "the agent has adopted them all",
        Duration::from_secs(300),
        || {
            let list = agent.ctl().json(&["list"]);
            match list.as_array().map(Vec::len) {
                Some(COUNT) => Ok(()),
                other => Err(format!("{other:?}")),
            }
        },
    );
    progress(&format!(
        "{COUNT} VMs after {:.0} s",
        begun.elapsed().as_secs_f64()
    ));
    Ok(())
}

/// The list as the agent itself measures it, and as a client with an open connection sees it.
fn list_inside(agent: &Agent, runtime: &Runtime, report: &mut Report) -> Result<(), Failure> {
    let mut vms = VmServiceClient::new(runtime.block_on(channel(agent))?);
    let before = histogram(agent)?;
    let mut seen = Vec::new();
    for _ in 0..101 {
        let begun = Instant::now();
        let answer = runtime.block_on(vms.list(message::ListVmsRequest::default()))?;
        seen.push(begun.elapsed());
        if answer.into_inner().vms.len() < COUNT {
            return Err("the list is short".into());
        }
    }
    let after = histogram(agent)?;
    let inside = (after.0 - before.0) / (after.1 - before.1).max(1.0) * 1e3;
    report.add(
        Figure::new(
            "list of 1,000 VMs, inside the agent (mean of its histogram)",
            inside,
            "ms",
        )
        .budget(Budget::Most(5.0)),
    );
    report.add(Figure::new(
        "list of 1,000 VMs, as a connected client sees it",
        ms(median(&seen)),
        "ms",
    ));
    Ok(())
}

/// Sum and count of the agent's own histogram of `VmService.List`.
fn histogram(agent: &Agent) -> Result<(f64, f64), Failure> {
    let text = http::get(agent.metrics_port(), "/metrics")?.body;
    let value = |end: &str| {
        text.lines()
            .find(|line| {
                line.starts_with(&format!("ghost_rpc_duration_seconds_{end}"))
                    && line.contains("VmService/List\"")
            })
            .and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .unwrap_or_default()
    };
    Ok((value("sum"), value("count")))
}

/// A scrape beside the bulk call that it makes.
fn scrape(agent: &Agent, libvirt: &Connect, report: &mut Report) -> Result<(), Failure> {
    let groups = sys::VIR_DOMAIN_STATS_STATE
        | sys::VIR_DOMAIN_STATS_CPU_TOTAL
        | sys::VIR_DOMAIN_STATS_BALLOON
        | sys::VIR_DOMAIN_STATS_INTERFACE
        | sys::VIR_DOMAIN_STATS_BLOCK;
    let (mut ours, mut bulk) = (Vec::new(), Vec::new());
    for _ in 0..PROCESSES {
        let begun = Instant::now();
        let answer = http::get(agent.metrics_port(), "/metrics")?;
        ours.push(begun.elapsed());
        if answer.status != 200 {
            return Err(format!("the scrape was answered with {}", answer.status).into());
        }
        let begun = Instant::now();
        bulk_statistics(libvirt, groups)?;
        bulk.push(begun.elapsed());
    }
    report.add(
        Figure::new("one metrics scrape with 1,000 VMs", ms(median(&ours)), "ms")
            .beside("its bulk call", ms(median(&bulk)))
            .budget(Budget::Beyond(100.0)),
    );
    Ok(())
}

fn bulk_statistics(libvirt: &Connect, groups: u32) -> Result<(), Failure> {
    let mut records: *mut sys::virDomainStatsRecordPtr = ptr::null_mut();
    let flags = sys::VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE
        | sys::VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT;
    // SAFETY: the connection is open as long as `libvirt` is borrowed; `records` is set by libvirt
    // to a list that is ours to free, and freed once by the call that libvirt names for it.
    unsafe {
        if sys::virConnectGetAllDomainStats(libvirt.as_ptr(), groups, &mut records, flags) < 0 {
            return Err("libvirt gives no statistics".into());
        }
        sys::virDomainStatsRecordListFree(records);
    }
    Ok(())
}
