//! `status`: is it well, what is left, and what has to be done.

use ghost_proto::agent::v1::GetStatusRequest;
use ghost_proto::core::v1::GetCoreStatusRequest;
use ghost_proto::view::{FleetStatus, HostStatus};

use super::describe_fleet;
use crate::connect::{Agent, Session, ask};
use crate::errors::{Exit, Failure};
use crate::table::{Paint, Sheet, Table};
use crate::text::{count, human_age, human_size, printable};

pub(super) async fn run(session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    let answer = agent
        .host()
        .get_status(ask(GetStatusRequest {}))
        .await
        .map_err(|status| agent.failure(&status));
    let status: HostStatus = match answer {
        Err(failure) if Agent::is_core(&failure) => return core(&agent, session).await,
        answer => answer?.into_inner().into(),
    };
    session.printer.several(
        std::slice::from_ref(&status),
        1,
        |status| &status.name,
        text,
    )?;
    Ok(Exit::Done)
}

/// The fleet, where Core is spoken to and no host is named.
async fn core(agent: &Agent, session: &Session) -> Result<Exit, Failure> {
    let status: FleetStatus = agent
        .fleet()
        .get_status(ask(GetCoreStatusRequest {}))
        .await
        .map_err(|status| agent.fleet_failure(&status))?
        .into_inner()
        .into();
    session.printer.several(
        std::slice::from_ref(&status),
        1,
        |status| &status.replica,
        describe_fleet::status,
    )?;
    Ok(Exit::Done)
}

fn text(status: &HostStatus, paint: Paint) -> String {
    let mut sheet = Sheet::new();
    sheet
        .line("agent", agent(status))
        .line("host", host(status))
        .line("libvirt", libvirt(status))
        .line("accelerator", accelerator(status))
        .line("store", store(status))
        .line("vms", vms(status))
        .line(
            "operations",
            match status.agent.open_operations {
                0 => "none open".to_owned(),
                open => format!("{open} open"),
            },
        );
    let mut out = sheet.render(paint);
    out.push('\n');
    out.push_str(&resources(status).render(None, paint));
    out.push_str(&format!(
        "\n{} of memory and {} of disk are unused on the host now\n",
        human_size(status.machine.memory_available_bytes),
        human_size(status.machine.disk_free_bytes)
    ));
    if !status.warnings.is_empty() {
        out.push('\n');
        for warning in &status.warnings {
            out.push_str(&format!(
                "{} {}\n",
                paint.yellow("warning:"),
                printable(warning)
            ));
        }
    }
    out
}

fn agent(status: &HostStatus) -> String {
    format!(
        "{}, ghost-agent {}, {} for {}",
        status.name,
        status.agent.version,
        status.agent.state,
        human_age(status.agent.uptime_seconds)
    )
}

fn host(status: &HostStatus) -> String {
    let machine = &status.machine;
    format!(
        "{}, {}, kernel {}, {}, load {:.2}",
        machine.hostname,
        machine.operating_system,
        machine.kernel,
        machine.cpu_model,
        machine.load_one_minute
    )
}

fn libvirt(status: &HostStatus) -> String {
    let hypervisor = &status.hypervisor;
    let mut text = format!(
        "{} for {} ({}",
        hypervisor.state,
        human_age(hypervisor.state_age_seconds),
        hypervisor.uri
    );
    if let Some(version) = &hypervisor.libvirt_version {
        text = format!("{text}, libvirt {version}");
    }
    if let Some(version) = &hypervisor.version {
        text = format!("{text}, QEMU {version}");
    }
    text.push(')');
    if let Some(reason) = &hypervisor.reason {
        text = format!("{text}: {reason}");
    }
    text
}

fn accelerator(status: &HostStatus) -> String {
    let hypervisor = &status.hypervisor;
    let name = match hypervisor.accelerator.as_deref() {
        Some("kvm") => "kvm (hardware)",
        Some("tcg") => "tcg (software emulation, slow)",
        Some(other) => other,
        None => "not known yet",
    };
    match &hypervisor.accelerator_reason {
        Some(reason) => format!("{name}: {reason}"),
        None => name.to_owned(),
    }
}

fn store(status: &HostStatus) -> String {
    let store = &status.store;
    let state = if store.writable {
        "writable"
    } else {
        "takes no writes"
    };
    match &store.problem {
        Some(problem) => format!("{}, {state}: {problem}", store.engine),
        None => format!("{}, {state}", store.engine),
    }
}

fn vms(status: &HostStatus) -> String {
    let all: u32 = status.vms.values().sum();
    if all == 0 {
        return "none".to_owned();
    }
    let states: Vec<String> = status
        .vms
        .iter()
        .filter(|(_, number)| **number > 0)
        .map(|(state, number)| format!("{number} {state}"))
        .collect();
    format!(
        "{}: {}",
        count(usize::try_from(all).unwrap_or(usize::MAX), "VM", "VMs"),
        states.join(", ")
    )
}

fn resources(status: &HostStatus) -> Table {
    let shares = &status.resources;
    let mut table = Table::new(&[
        "RESOURCE",
        "FREE",
        "HELD BY VMS",
        "FOR VMS",
        "RESERVED",
        "TOTAL",
    ]);
    let all = [
        shares.free,
        shares.committed,
        shares.allocatable,
        shares.reserved,
        shares.total,
    ];
    let [free, committed, allocatable, reserved, total] = all.map(|share| share.cpus.to_string());
    table.row(["cpus".into(), free, committed, allocatable, reserved, total]);
    let [free, committed, allocatable, reserved, total] =
        all.map(|share| human_size(share.memory_bytes));
    table.row([
        "memory".into(),
        free,
        committed,
        allocatable,
        reserved,
        total,
    ]);
    let [free, committed, allocatable, reserved, total] =
        all.map(|share| human_size(share.disk_bytes));
    table.row(["disk".into(), free, committed, allocatable, reserved, total]);
    table
}
