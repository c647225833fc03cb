//! How things look to people: one table and one sheet a kind. Programs get the views.

use ghost_proto::view::{
    ApiKey, CatalogueEntry, Certificate, GuestStatus, Image, Network, Operation, OperationStatus,
    Vm, VmState,
};

use crate::table::{Paint, Sheet, Table};
use crate::text::{age_of, human_age, human_size, printable, time_until};

fn or_dash(text: String) -> String {
    if text.is_empty() {
        "-".to_owned()
    } else {
        text
    }
}

/// The state, and for one that raises the question, why.
fn state_with_reason(vm: &Vm) -> String {
    match (&vm.state_reason, vm.state) {
        (Some(reason), VmState::Unknown | VmState::Failed) => format!("{} ({reason})", vm.state),
        _ => vm.state.to_string(),
    }
}

pub(super) fn vm_table(vms: &[Vm]) -> Table {
    let mut table = Table::new(&[
        "NAME", "STATE", "ADDRESS", "CPUS", "MEMORY", "DISK", "IMAGE", "AGE",
    ]);
    for vm in vms {
        let mut addresses = vm.nics.iter().flat_map(|nic| &nic.addresses);
        table.row([
            vm.name.clone(),
            state_with_reason(vm),
            or_dash(addresses.next().cloned().unwrap_or_default()),
            vm.vcpus.to_string(),
            human_size(vm.memory_bytes),
            human_size(vm.disks.iter().map(|disk| disk.size_bytes).sum()),
            vm.image.clone(),
            age_of(&vm.created_at),
        ]);
    }
    table
}

pub(super) fn vm(vm: &Vm, guest: Option<&GuestStatus>, paint: Paint) -> String {
    let mut sheet = Sheet::new();
    let reason = vm
        .state_reason
        .as_ref()
        .map(|reason| format!(" ({reason})"))
        .unwrap_or_default();
    sheet
        .line("name", &vm.name)
        .line("id", &vm.id)
        .line("state", format!("{}{reason}", vm.state))
        .line(
            "known",
            match vm.state_age_seconds {
                Some(_) => format!(
                    "{} ago by {}",
                    human_age(vm.state_age_seconds),
                    vm.state_source.replace('_', " ")
                ),
                None => "not yet".to_owned(),
            },
        )
        .some("wanted", vm.desired_state.map(|state| state.as_str()))
        .some("operation", vm.operation_id.as_ref())
        .line("cpus", vm.vcpus.to_string())
        .line("memory", human_size(vm.memory_bytes))
        .line("image", &vm.image);
    for disk in &vm.disks {
        sheet.line(
            &format!("disk {}", printable(&disk.name)),
            format!(
                "{}, {} allocated",
                human_size(disk.size_bytes),
                human_size(disk.allocated_bytes)
            ),
        );
    }
    for nic in &vm.nics {
        let addresses = if nic.addresses.is_empty() {
            "no address known".to_owned()
        } else {
            let seen = nic
                .addresses_age_seconds
                .map(|_| format!(" (seen {} ago)", human_age(nic.addresses_age_seconds)));
            format!("{}{}", nic.addresses.join(", "), seen.unwrap_or_default())
        };
        sheet.line(
            &format!("nic {}", printable(&nic.network)),
            format!("{}, {addresses}", nic.mac),
        );
    }
    if let Some(policy) = &vm.guest {
        sheet.line(
            "guest access",
            format!(
                "{}, agent injected: {}",
                if policy.access { "on" } else { "off" },
                policy.inject
            ),
        );
    }
    if let Some(guest) = guest {
        sheet
            .some(
                "guest agent",
                guest.agent_version.as_ref().map(|version| {
                    let heard = guest
                        .last_seen_age_seconds
                        .map(|_| format!(", heard {} ago", human_age(guest.last_seen_age_seconds)))
                        .unwrap_or_default();
                    let outdated = if guest.outdated { ", outdated" } else { "" };
                    format!("{version}{heard}{outdated}")
                }),
            )
            .some("guest system", guest.operating_system.as_ref())
            .some("guest kernel", guest.kernel.as_ref());
    }
    for condition in &vm.conditions {
        let holds = if condition.status { "yes" } else { "no" };
        let reason = condition
            .reason
            .as_ref()
            .map(|reason| format!(": {reason}"))
            .unwrap_or_default();
        let since = condition
            .since
            .as_deref()
            .map_or_else(String::new, |since| format!(" (for {})", age_of(since)));
        sheet.line(
            &format!("condition {}", printable(&condition.r#type)),
            format!("{holds}{reason}{since}"),
        );
    }
    if !vm.tags.is_empty() {
        let tags: Vec<String> = vm
            .tags
            .iter()
            .map(|(key, value)| format!("{key}={value}"))
            .collect();
        sheet.line("tags", tags.join(", "));
    }
    sheet
        .some(
            "autostart",
            vm.autostart.as_ref().map(|autostart| {
                format!(
                    "order {}, then {} of delay",
                    autostart.order,
                    human_age(Some(autostart.delay_seconds))
                )
            }),
        )
        .some(
            "restart",
            vm.restart_policy.as_ref().map(|policy| {
                if policy.max_restarts == 0 {
                    "stays off after a crash".to_owned()
                } else {
                    format!(
                        "after a crash, at most {} times in {}",
                        policy.max_restarts,
                        human_age(Some(policy.window_seconds))
                    )
                }
            }),
        )
        .some(
            "protected",
            vm.delete_protection.then_some("against deletion"),
        )
        .line("generation", vm.generation.to_string())
        .line("created", created(&vm.created_at));
    sheet.render(paint)
}

fn created(at: &str) -> String {
    format!("{at} ({} ago)", age_of(at))
}

pub(super) fn operation_table(operations: &[Operation]) -> Table {
    let mut table = Table::new(&["ID", "KIND", "SUBJECT", "STATUS", "PHASE", "AGE"]);
    for operation in operations {
        let phase = match &operation.error {
            Some(error) => error.message.clone(),
            None => phase(operation),
        };
        table.row([
            operation.id.clone(),
            operation.kind.clone(),
            operation.subject.clone(),
            operation.status.to_string(),
            or_dash(phase),
            age_of(&operation.created_at),
        ]);
    }
    table
}

fn phase(operation: &Operation) -> String {
    if operation.status.is_finished() {
        return String::new();
    }
    let mut text = operation.phase.clone().unwrap_or_default();
    if let Some(fraction) = operation.progress.as_ref().and_then(|bytes| bytes.fraction) {
        text = format!("{text} {:.0}%", fraction * 100.0);
    }
    if let Some(waiting_for) = &operation.waiting_for {
        text = format!("{text}, waiting for {waiting_for}");
    }
    text
}

pub(super) fn operation(operation: &Operation, paint: Paint) -> String {
    let mut sheet = Sheet::new();
    sheet
        .line("id", &operation.id)
        .line("kind", &operation.kind)
        .line("subject", &operation.subject)
        .some("vm", operation.vm.as_ref())
        .line("status", operation.status.as_str())
        .some(
            "phase",
            Some(phase(operation)).filter(|phase| !phase.is_empty()),
        );
    if let Some(error) = &operation.error {
        sheet
            .line("error", format!("{} ({})", error.message, error.code))
            .some("cause", error.cause.as_ref())
            .some("try", error.hint.as_ref());
    }
    if operation.status == OperationStatus::NeedsAttention {
        sheet.line(
            "left behind",
            "an undo failed; the agent's log names what is left",
        );
    }
    sheet
        .some("requested by", operation.requested_by.as_ref())
        .some("request id", operation.request_id.as_ref())
        .line("created", created(&operation.created_at))
        .some("finished", operation.finished_at.as_deref().map(created));
    if !operation.status.is_finished() {
        sheet.some("deadline", operation.deadline.as_ref());
    }
    sheet.render(paint)
}

pub(super) fn image_table(images: &[Image]) -> Table {
    let mut table = Table::new(&[
        "NAME",
        "FORMAT",
        "SIZE",
        "ON DISK",
        "USED BY",
        "LAST USED",
        "DIGEST",
    ]);
    for image in images {
        table.row([
            image.name.clone(),
            image.format.clone(),
            human_size(image.virtual_size_bytes),
            human_size(image.file_size_bytes),
            image.used_by.len().to_string(),
            image
                .last_used_at
                .as_deref()
                .map_or_else(|| "-".to_owned(), age_of),
            image.digest.chars().take(12).collect(),
        ]);
    }
    table
}

pub(super) fn image(image: &Image, paint: Paint) -> String {
    let mut sheet = Sheet::new();
    sheet
        .line("name", &image.name)
        .line("format", &image.format)
        .line("size", human_size(image.virtual_size_bytes))
        .line("on disk", human_size(image.file_size_bytes))
        .line("digest", format!("sha256:{}", image.digest))
        .some("source", image.source.as_ref())
        .some("checksum", image.checksum.as_ref())
        .line(
            "used by",
            if image.used_by.is_empty() {
                "no VM".to_owned()
            } else {
                image.used_by.join(", ")
            },
        )
        .some("last used", image.last_used_at.as_deref().map(created))
        .line("created", created(&image.created_at));
    sheet.render(paint)
}

pub(super) fn catalogue_table(entries: &[CatalogueEntry]) -> Table {
    let mut table = Table::new(&["NAME", "ALIASES", "CACHED", "DESCRIPTION"]);
    for entry in entries {
        table.row([
            entry.name.clone(),
            or_dash(entry.aliases.join(", ")),
            if entry.cached { "yes" } else { "no" }.to_owned(),
            entry.description.clone(),
        ]);
    }
    table
}

pub(super) fn network_table(networks: &[Network]) -> Table {
    let mut table = Table::new(&["NAME", "STATE", "MODE", "BRIDGE", "SUBNET", "LEASES"]);
    for network in networks {
        table.row([
            network.name.clone(),
            active(network).to_owned(),
            network.mode.clone(),
            or_dash(network.bridge.clone().unwrap_or_default()),
            or_dash(network.subnet.clone().unwrap_or_default()),
            network.leases.len().to_string(),
        ]);
    }
    table
}

fn active(network: &Network) -> &'static str {
    if network.active { "active" } else { "inactive" }
}

pub(super) fn network(network: &Network, paint: Paint) -> String {
    let mut sheet = Sheet::new();
    sheet
        .line("name", &network.name)
        .line("state", active(network))
        .line("mode", &network.mode)
        .line("libvirt", &network.libvirt_name)
        .some("bridge", network.bridge.as_ref())
        .some("subnet", network.subnet.as_ref())
        .some(
            "dhcp",
            network
                .dhcp_first
                .as_ref()
                .zip(network.dhcp_last.as_ref())
                .map(|(first, last)| format!("{first} to {last}")),
        );
    for lease in &network.leases {
        let vm = lease.vm.as_deref().unwrap_or("no VM of ours");
        let hostname = lease
            .hostname
            .as_ref()
            .map(|hostname| format!(", calls itself {hostname}"))
            .unwrap_or_default();
        sheet.line(
            "lease",
            format!(
                "{} {} ({vm}{hostname}), ends {}",
                lease.address,
                lease.mac,
                time_until(lease.expires_at.as_deref())
            ),
        );
    }
    sheet.render(paint)
}

/// `active`, `expired` or `revoked`.
fn standing(expires_at: Option<&str>, revoked_at: Option<&str>) -> String {
    if revoked_at.is_some() {
        "revoked".to_owned()
    } else if expires_at.is_some() && time_until(expires_at) == "expired" {
        "expired".to_owned()
    } else {
        "active".to_owned()
    }
}

/// What a role is followed by where its credential enters no guests.
pub(super) const fn without_guests(guest_access: bool) -> &'static str {
    if guest_access {
        ""
    } else {
        " without guest access"
    }
}

/// A role in a table.
fn role(role: &str, guest_access: bool) -> String {
    let mark = if guest_access { "" } else { " (no guests)" };
    format!("{role}{mark}")
}

pub(super) fn certificate_table(certificates: &[Certificate]) -> Table {
    let mut table = Table::new(&["ID", "NAME", "ROLE", "STATE", "EXPIRES", "AGE"]);
    for certificate in certificates {
        let expires_at = certificate.expires_at.as_deref();
        table.row([
            certificate.id.clone(),
            certificate.name.clone(),
            role(&certificate.role, certificate.guest_access),
            standing(expires_at, certificate.revoked_at.as_deref()),
            time_until(expires_at),
            age_of(&certificate.created_at),
        ]);
    }
    table
}

pub(super) fn key_table(keys: &[ApiKey]) -> Table {
    let mut table = Table::new(&["ID", "NAME", "ROLE", "STATE", "EXPIRES", "AGE"]);
    for key in keys {
        let expires_at = key.expires_at.as_deref();
        table.row([
            key.id.clone(),
            key.name.clone(),
            role(&key.role, key.guest_access),
            standing(expires_at, key.revoked_at.as_deref()),
            time_until(expires_at),
            age_of(&key.created_at),
        ]);
    }
    table
}
