//! How a fleet looks to people.

use std::collections::BTreeMap;

use ghost_proto::view::{
    FleetCommand, FleetHost, FleetLink, FleetQuota, FleetStatus, FleetUsage, FleetUser, FleetVm,
    Tenant,
};

use crate::table::{Paint, Sheet, Table};
use crate::text::{age_of, count, human_age, human_size, printable, time_until};

fn or_dash(text: Option<&str>) -> String {
    text.filter(|text| !text.is_empty())
        .map_or_else(|| "-".to_owned(), str::to_owned)
}

fn labels(labels: &BTreeMap<String, String>) -> String {
    let shown: Vec<String> = labels
        .iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    or_dash(Some(&shown.join(",")))
}

/// `2 running, 1 stopped`.
fn by_state(states: &BTreeMap<String, u32>) -> String {
    let shown: Vec<String> = states
        .iter()
        .filter(|(_, number)| **number > 0)
        .map(|(state, number)| format!("{number} {state}"))
        .collect();
    if shown.is_empty() {
        "none".to_owned()
    } else {
        shown.join(", ")
    }
}

fn state(host: &FleetHost) -> String {
    let cordoned = if host.cordoned { ", cordoned" } else { "" };
    match &host.state_reason {
        Some(reason) => format!("{}{cordoned} ({reason})", host.state),
        None => format!("{}{cordoned}", host.state),
    }
}

pub(super) fn host_table(hosts: &[FleetHost]) -> Table {
    let mut table = Table::new(&[
        "NAME",
        "TENANT",
        "STATE",
        "HEARD",
        "VMS",
        "FREE CPUS",
        "FREE MEMORY",
        "FREE DISK",
        "LABELS",
        "VERSION",
    ]);
    for host in hosts {
        let free = host.capacity.as_ref().map(|capacity| &capacity.free);
        table.row([
            host.name.clone(),
            host.tenant.clone(),
            state(host),
            match host.last_heard_age_seconds {
                Some(_) => format!("{} ago", human_age(host.last_heard_age_seconds)),
                None => "never".to_owned(),
            },
            host.vms.values().sum::<u32>().to_string(),
            free.map_or_else(|| "-".to_owned(), |free| free.cpus.to_string()),
            free.map_or_else(|| "-".to_owned(), |free| human_size(free.memory_bytes)),
            free.map_or_else(|| "-".to_owned(), |free| human_size(free.disk_bytes)),
            labels(&host.labels),
            or_dash(host.agent_version.as_deref()),
        ]);
    }
    table
}

/// How calls reach a host, and why no better way is used.
fn calls_go_by(link: &FleetLink) -> Option<String> {
    let way = link.way.as_deref()?;
    Some(match (&link.direct_address, &link.direct_problem) {
        (Some(address), _) => format!("{way}, {address}"),
        (None, Some(problem)) => format!("{way} (not directly: {problem})"),
        (None, None) => way.to_owned(),
    })
}

pub(super) fn host(host: &FleetHost, paint: Paint) -> String {
    let mut sheet = Sheet::new();
    sheet
        .line("name", &host.name)
        .line("id", &host.id)
        .line("tenant", &host.tenant)
        .line("state", state(host))
        .line(
            "heard",
            match host.last_heard_age_seconds {
                Some(_) => format!("{} ago", human_age(host.last_heard_age_seconds)),
                None => "never".to_owned(),
            },
        )
        .line("labels", labels(&host.labels))
        .some(
            "cordoned",
            host.cordoned
                .then(|| or_dash(host.cordon_reason.as_deref())),
        )
        .line("core may", host.permissions.replace('_', " "))
        .some("agent", host.agent_version.as_ref());
    if let Some(facts) = &host.facts {
        sheet
            .some("hostname", facts.hostname.as_ref())
            .some("system", facts.operating_system.as_ref())
            .some("kernel", facts.kernel.as_ref())
            .some("cpu", facts.cpu_model.as_ref())
            .some("accelerator", facts.accelerator.as_ref());
    }
    let link = &host.link;
    sheet.line(
        "link",
        match (&link.carrier, link.round_trip_seconds) {
            (Some(carrier), Some(trip)) => format!(
                "{carrier}, round trip {:.1} ms, {}",
                trip * 1000.0,
                count(
                    usize::try_from(link.connects).unwrap_or(usize::MAX),
                    "connection since its agent started",
                    "connections since its agent started"
                )
            ),
            (Some(carrier), None) => carrier.clone(),
            (None, _) => "none".to_owned(),
        },
    );
    sheet.some("last loss", link.last_loss.as_ref());
    sheet.some("calls go by", calls_go_by(link));
    if let Some(capacity) = &host.capacity {
        sheet
            .line(
                "cpus",
                format!(
                    "{} of {} free",
                    capacity.free.cpus, capacity.allocatable.cpus
                ),
            )
            .line(
                "memory",
                format!(
                    "{} of {} free",
                    human_size(capacity.free.memory_bytes),
                    human_size(capacity.allocatable.memory_bytes)
                ),
            )
            .line(
                "disk",
                format!(
                    "{} of {} free",
                    human_size(capacity.free.disk_bytes),
                    human_size(capacity.allocatable.disk_bytes)
                ),
            )
            .line("load", format!("{:.2}", capacity.load_one_minute));
    }
    sheet
        .line("vms", by_state(&host.vms))
        .line(
            "queue",
            match host.queued_commands {
                0 => "empty".to_owned(),
                waiting => format!("{waiting} waiting"),
            },
        )
        .line("enrolled", format!("{} ago", age_of(&host.enrolled_at)))
        .line(
            "certificate",
            format!(
                "number {}, ends {}",
                host.certificate_generation,
                time_until(host.certificate_expires_at.as_deref())
            ),
        );
    let mut out = sheet.render(paint);
    for warning in host.health.iter().flat_map(|health| &health.warnings) {
        out.push_str(&format!(
            "{} {}\n",
            paint.yellow("warning:"),
            printable(warning)
        ));
    }
    out
}

pub(super) fn vm_table(vms: &[FleetVm]) -> Table {
    let mut table = Table::new(&[
        "NAME", "HOST", "STATE", "ADDRESS", "CPUS", "MEMORY", "DISK", "IMAGE", "AGE", "OWNER",
    ]);
    for vm in vms {
        let stale = match vm.host_state.as_str() {
            "online" => String::new(),
            host => format!(" ({} ago; host {host})", human_age(vm.age_seconds)),
        };
        table.row([
            vm.name.clone(),
            vm.host.clone(),
            format!("{}{stale}", vm.state),
            or_dash(vm.addresses.first().map(String::as_str)),
            vm.vcpus.to_string(),
            human_size(vm.memory_bytes),
            human_size(vm.disk_bytes),
            or_dash(vm.image.as_deref()),
            age_of(&vm.created_at),
            or_dash(vm.owner.as_deref()),
        ]);
    }
    table
}

pub(super) fn command_table(commands: &[FleetCommand]) -> Table {
    let mut table = Table::new(&["ID", "HOST", "COMMAND", "VM", "STATUS", "ENDS", "BY", "AGE"]);
    for command in commands {
        table.row([
            command.id.get(..8).unwrap_or(&command.id).to_owned(),
            command.host.clone(),
            command.kind.clone(),
            or_dash(Some(&command.subject)),
            command.status.to_string(),
            if command.finished_at.is_some() {
                "-".to_owned()
            } else {
                time_until(command.deadline.as_deref())
            },
            command.issued_by.clone(),
            age_of(&command.issued_at),
        ]);
    }
    table
}

pub(super) fn command(command: &FleetCommand, paint: Paint) -> String {
    let mut sheet = Sheet::new();
    sheet
        .line("id", &command.id)
        .line("host", &command.host)
        .line("command", &command.kind)
        .line("vm", &command.subject)
        .line("status", command.status.to_string())
        .line("number", command.generation.to_string())
        .line("by", &command.issued_by)
        .line("issued", format!("{} ago", age_of(&command.issued_at)))
        .line("ends", time_until(command.deadline.as_deref()))
        .some("operation", command.operation_id.as_ref())
        .some("code", command.code.as_ref())
        .some("message", command.message.as_ref());
    sheet.render(paint)
}

/// `3 of 10`, or `3` where there is no limit.
fn part(used: impl ToString, most: Option<String>) -> String {
    match most {
        Some(most) => format!("{} of {most}", used.to_string()),
        None => used.to_string(),
    }
}

fn usage(used: &FleetUsage, quota: Option<&FleetQuota>) -> [String; 4] {
    let quota = |pick: &dyn Fn(&FleetQuota) -> Option<String>| quota.and_then(pick);
    [
        part(
            used.vms,
            quota(&|quota| quota.vms.map(|most| most.to_string())),
        ),
        part(
            used.cpus,
            quota(&|quota| quota.cpus.map(|most| most.to_string())),
        ),
        part(
            human_size(used.memory_bytes),
            quota(&|quota| quota.memory_bytes.map(human_size)),
        ),
        part(
            human_size(used.disk_bytes),
            quota(&|quota| quota.disk_bytes.map(human_size)),
        ),
    ]
}

pub(super) fn tenant_table(tenants: &[Tenant]) -> Table {
    let mut table = Table::new(&["NAME", "HOSTS", "VMS", "CPUS", "MEMORY", "DISK", "AGE"]);
    for tenant in tenants {
        let [vms, cpus, memory, disk] = usage(&tenant.used, Some(&tenant.quota));
        table.row([
            tenant.name.clone(),
            tenant.hosts.to_string(),
            vms,
            cpus,
            memory,
            disk,
            age_of(&tenant.created_at),
        ]);
    }
    table
}

pub(super) fn user_table(users: &[FleetUser]) -> Table {
    let mut table = Table::new(&[
        "NAME",
        "TENANT",
        "ROLE",
        "SOURCE",
        "VMS",
        "CPUS",
        "MEMORY",
        "DISK",
        "CERTIFICATE",
        "ID",
    ]);
    for user in users {
        let [vms, cpus, memory, disk] = usage(&user.used, user.quota.as_ref());
        table.row([
            user.name.clone(),
            or_dash(user.tenant.as_deref()),
            user.role.clone(),
            user.source.clone(),
            vms,
            cpus,
            memory,
            disk,
            match &user.revoked_at {
                Some(_) => "revoked".to_owned(),
                None => time_until(user.certificate_expires_at.as_deref()),
            },
            user.id.get(..8).unwrap_or(&user.id).to_owned(),
        ]);
    }
    table
}

pub(super) fn status(status: &FleetStatus, paint: Paint) -> String {
    let mut sheet = Sheet::new();
    sheet
        .line(
            "core",
            format!(
                "{} of {}, up for {}",
                status.version,
                status.trust_domain,
                human_age(status.uptime_seconds)
            ),
        )
        .line("replica", &status.replica)
        .line(
            "store",
            match (&status.store.problem, status.store.writable) {
                (_, true) => status.store.engine.clone(),
                (Some(problem), false) => {
                    format!("{}, takes no writes: {problem}", status.store.engine)
                }
                (None, false) => format!("{}, takes no writes", status.store.engine),
            },
        )
        .line("hosts", by_state(&status.hosts))
        .line("vms", status.vms.to_string())
        .line(
            "queue",
            match status.queued_commands {
                0 => "empty".to_owned(),
                waiting => format!("{waiting} waiting"),
            },
        );
    for replica in &status.replicas {
        sheet.line(
            &format!("replica {}", printable(&replica.name)),
            format!("{}, {} links", replica.address, replica.links),
        );
    }
    let mut out = sheet.render(paint);
    for warning in &status.warnings {
        out.push_str(&format!(
            "{} {}\n",
            paint.yellow("warning:"),
            printable(warning)
        ));
    }
    out
}
