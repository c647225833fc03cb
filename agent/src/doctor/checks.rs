//! From facts to findings. Pure: no function here looks at the host.

use ghost_domain::ByteSize;
use ghost_infrastructure::libvirt::AcceleratorChoice;

use super::Finding;
use super::facts::{Facts, Libvirt, Local, NetworkFacts, Node, Port};
use super::firewall::{Dropping, Firewall};

/// The oldest libvirt that is known to work: that of Debian 12.
const OLDEST_LIBVIRT: (u32, u32) = (9, 0);
/// Below this much free space no VM can live long.
const LITTLE_SPACE: ByteSize = ByteSize::from_gib(2);

/// Every finding, in the order in which to mend them.
pub(super) fn all(facts: &Facts) -> Vec<Finding> {
    let mut findings = vec![cpu(&facts.local), kvm(&facts.local)];
    if !facts.local.simulated {
        findings.extend([
            libvirt(&facts.libvirt),
            qemu(&facts.local),
            virtlogd(&facts.libvirt),
        ]);
    }
    findings.push(qemu_img(&facts.local));
    if !facts.local.simulated {
        findings.extend([
            network(&facts.network),
            dnsmasq(&facts.network),
            ip_forward(&facts.network),
        ]);
        findings.extend(firewall(&facts.network));
    }
    findings.extend([data_dir(&facts.local), storage(&facts.local)]);
    findings.extend([space(&facts.local), reserved(&facts.local)]);
    findings.extend(facts.ports.iter().map(|one| port(one, facts.agent_runs)));
    findings.extend([
        group(facts),
        clock(facts.clock_synchronised),
        guest_program(&facts.local),
    ]);
    findings
}

/// Those that decide whether the agent may start.
pub(super) fn before_start(local: &Local) -> Vec<Finding> {
    vec![
        cpu(local),
        kvm(local),
        qemu_img(local),
        data_dir(local),
        storage(local),
        space(local),
        reserved(local),
        guest_program(local),
    ]
}

fn cpu(local: &Local) -> Finding {
    let message = "hardware virtualisation is offered (vmx or svm)";
    match (local.cpu_flag, local.accelerator) {
        (true, _) => Finding::ok("cpu", message),
        (false, AcceleratorChoice::Tcg) => {
            Finding::ok("cpu", "no hardware virtualisation, and none is asked for")
        }
        (false, _) => Finding::warning(
            "cpu",
            "the CPU offers no hardware virtualisation: guests are emulated, several times slower",
            "switch it on in the firmware (VT-x, AMD-V, SVM), or nested virtualisation on the host above",
        ),
    }
}

fn kvm(local: &Local) -> Finding {
    let (works, reason) = &local.kvm;
    let fix = if !local.cpu_flag {
        "switch virtualisation on in the firmware, or set libvirt.accelerator: auto"
    } else if local.kvm_device {
        "look at dmesg for kvm; or set libvirt.accelerator: auto"
    } else {
        "modprobe kvm_intel || modprobe kvm_amd"
    };
    match (*works, local.accelerator) {
        (true, _) => Finding::ok("kvm", reason.clone()),
        (false, AcceleratorChoice::Tcg) => {
            Finding::ok("kvm", "not used: libvirt.accelerator is tcg")
        }
        (false, AcceleratorChoice::Auto) if !local.cpu_flag => {
            Finding::ok("kvm", "not used, as the CPU offers none")
        }
        (false, AcceleratorChoice::Auto) => {
            Finding::warning("kvm", format!("KVM cannot be used: {reason}"), fix)
        }
        (false, AcceleratorChoice::Kvm) => Finding::fatal(
            "kvm",
            format!("libvirt.accelerator is kvm, and KVM cannot be used: {reason}"),
            fix,
        ),
    }
}

fn libvirt(libvirt: &Libvirt) -> Finding {
    match &libvirt.info {
        Err(error) => Finding::fatal(
            "libvirt",
            format!("libvirt cannot be used at {}: {error}", libvirt.uri),
            "systemctl enable --now libvirtd virtlogd",
        ),
        Ok(info) if older(&info.libvirt_version, OLDEST_LIBVIRT) => Finding::warning(
            "libvirt",
            format!(
                "libvirt {} is older than {}.{}, the oldest that Ghost is tested with",
                info.libvirt_version, OLDEST_LIBVIRT.0, OLDEST_LIBVIRT.1
            ),
            "apt-get install --only-upgrade libvirt-daemon-system",
        ),
        Ok(info) => Finding::ok(
            "libvirt",
            format!(
                "libvirt {} answers at {}, with QEMU {}",
                info.libvirt_version, libvirt.uri, info.hypervisor_version
            ),
        ),
    }
}

fn older(version: &str, than: (u32, u32)) -> bool {
    let mut parts = version.split('.').map(|part| part.parse::<u32>().ok());
    match (parts.next().flatten(), parts.next().flatten()) {
        (Some(major), Some(minor)) => (major, minor) < than,
        _ => false,
    }
}

fn qemu(local: &Local) -> Finding {
    match &local.qemu {
        Some(path) => Finding::ok("qemu", path.display().to_string()),
        None => Finding::fatal(
            "qemu",
            "QEMU is not installed",
            "apt-get install qemu-system-x86",
        ),
    }
}

fn qemu_img(local: &Local) -> Finding {
    match &local.qemu_img {
        Some(path) => Finding::ok("qemu-img", path.display().to_string()),
        None => Finding::fatal(
            "qemu-img",
            "qemu-img is not installed at /usr/bin/qemu-img: no disk can be made",
            "apt-get install qemu-utils",
        ),
    }
}

fn virtlogd(libvirt: &Libvirt) -> Finding {
    if libvirt.virtlogd {
        Finding::ok("virtlogd", "takes connections")
    } else {
        Finding::fatal(
            "virtlogd",
            "virtlogd does not answer: VMs with a console log cannot start",
            "systemctl enable --now virtlogd.socket",
        )
    }
}

fn network(facts: &NetworkFacts) -> Finding {
    let Some(networks) = &facts.networks else {
        return Finding::warning(
            "network",
            "networks cannot be seen while libvirt cannot be used",
            "mend libvirt first",
        );
    };
    let wanted = &facts.wanted;
    match networks.iter().find(|one| one.libvirt_name == *wanted) {
        None => Finding::ok(
            "network",
            format!("{wanted} is not there yet; it is made for the first VM"),
        ),
        Some(found) if found.active => Finding::ok(
            "network",
            format!(
                "{wanted} is up ({}{}{})",
                found.mode,
                found
                    .bridge
                    .as_ref()
                    .map_or_else(String::new, |bridge| format!(", bridge {bridge}")),
                found
                    .subnet
                    .as_ref()
                    .map_or_else(String::new, |subnet| format!(", {subnet}")),
            ),
        ),
        Some(_) => Finding::ok(
            "network",
            format!("{wanted} is there and down; it is started for the next VM"),
        ),
    }
}

/// The agent runs without it: then VMs come up without theirs.
fn guest_program(local: &Local) -> Finding {
    const NAME: &str = "guest-program";
    match &local.guest_program {
        Ok(Some(path)) => Finding::ok(NAME, path.display().to_string()),
        Ok(None) => Finding::warning(
            NAME,
            "there is no agent for guests: new VMs come up without, and none is updated",
            "install ghost-guest beside ghost-agent, or set guest.program",
        ),
        Err(why) => Finding::warning(
            NAME,
            format!("the agent for guests cannot be used: {why}"),
            "build it with `make guest` (static), or set guest.program",
        ),
    }
}

fn dnsmasq(facts: &NetworkFacts) -> Finding {
    match &facts.dnsmasq {
        Some(path) => Finding::ok("dnsmasq", path.display().to_string()),
        None => Finding::warning(
            "dnsmasq",
            "dnsmasq is not installed: libvirt cannot give guests addresses",
            "apt-get install dnsmasq-base",
        ),
    }
}

fn ip_forward(facts: &NetworkFacts) -> Finding {
    let active = facts
        .networks
        .iter()
        .flatten()
        .any(|one| one.libvirt_name == facts.wanted && one.active);
    match (facts.ip_forward, active) {
        (true, _) => Finding::ok("ip-forward", "the kernel forwards packets"),
        (false, false) => Finding::ok(
            "ip-forward",
            "off; libvirt switches it on with the first NAT network",
        ),
        (false, true) => Finding::warning(
            "ip-forward",
            "the kernel does not forward packets: guests reach nothing beyond this host",
            "sysctl -w net.ipv4.ip_forward=1",
        ),
    }
}

/// The bridge of the wanted network, or a placeholder where it is not made yet.
fn bridge(facts: &NetworkFacts) -> &str {
    facts
        .networks
        .iter()
        .flatten()
        .find(|one| one.libvirt_name == facts.wanted)
        .and_then(|one| one.bridge.as_deref())
        .unwrap_or("ghost0")
}

fn firewall(facts: &NetworkFacts) -> Vec<Finding> {
    let Firewall {
        dropping,
        docker,
        ufw,
        firewalld,
        unseen,
    } = &facts.firewall;
    if let Some(reason) = unseen {
        return vec![Finding::warning(
            "firewall",
            format!("the firewall cannot be looked at: {reason}"),
            "run ghost-agent doctor as root, with nftables or iptables installed",
        )];
    }
    let bridge = bridge(facts);
    let cuts = |one: &&Dropping| {
        // A rule for the bridge was added by hand, or libvirt's own rules stand in this chain.
        !one.libvirt_inside
            && !one
                .names
                .iter()
                .any(|name| name == bridge || name == "ghost*")
    };
    let cutting: Vec<&Dropping> = dropping.iter().filter(cuts).collect();
    if cutting.is_empty() {
        let who = if *firewalld {
            "; firewalld runs, and libvirt puts its bridges into the zone libvirt"
        } else {
            ""
        };
        return vec![Finding::ok(
            "firewall",
            format!("nothing drops what guests send{who}"),
        )];
    }
    cutting
        .into_iter()
        .map(|one| {
            let (what, fix) = match (one.hook.as_str(), docker, ufw) {
                ("forward", _, true) => (
                    "ufw drops what guests send to the world",
                    format!("ufw route allow in on {bridge}\nufw route allow out on {bridge}"),
                ),
                ("forward", true, _) => (
                    "Docker set the policy to drop: guests reach nothing beyond this host",
                    format!(
                        "iptables -I DOCKER-USER -i {bridge} -j ACCEPT\niptables -I DOCKER-USER -o {bridge} -j ACCEPT"
                    ),
                ),
                ("forward", ..) => (
                    "the policy is drop: guests reach nothing beyond this host",
                    format!(
                        "iptables -I FORWARD -i {bridge} -j ACCEPT\niptables -I FORWARD -o {bridge} -j ACCEPT"
                    ),
                ),
                (_, _, true) => (
                    "ufw drops the requests by which guests get an address (DHCP) and names (DNS)",
                    format!(
                        "ufw allow in on {bridge} to any port 67 proto udp\nufw allow in on {bridge} to any port 53"
                    ),
                ),
                _ => (
                    "the policy is drop: guests get no address (DHCP) and no names (DNS)",
                    format!(
                        "iptables -I INPUT -i {bridge} -p udp -m multiport --dports 53,67 -j ACCEPT\niptables -I INPUT -i {bridge} -p tcp --dport 53 -j ACCEPT"
                    ),
                ),
            };
            Finding::warning("firewall", format!("{} ({})", what, one.chain), fix)
        })
        .collect()
}

fn data_dir(local: &Local) -> Finding {
    let path = local.data_dir.display();
    if local.writable {
        Finding::ok("data-dir", format!("{path} can be written"))
    } else {
        Finding::fatal(
            "data-dir",
            format!("this user cannot write to {path}"),
            "run ghost-agent as root, or set agent.data_dir to a folder of this user",
        )
    }
}

fn storage(local: &Local) -> Finding {
    if local.simulated {
        return Finding::ok("storage", "nothing but this agent reads it");
    }
    let Some(user) = &local.qemu_user else {
        return Finding::warning(
            "storage",
            "the user that QEMU runs as is not known (neither libvirt-qemu nor qemu exists)",
            "set user in /etc/libvirt/qemu.conf",
        );
    };
    let blocked: Vec<&Node> = local
        .path
        .iter()
        .filter(|folder| !folder.allows(user, 1))
        .collect();
    if !blocked.is_empty() {
        return Finding::fatal(
            "storage",
            format!(
                "QEMU's user {} cannot pass through {}: no VM could open its disk",
                user.name,
                names(&blocked)
            ),
            commands("chmod o+x", &blocked),
        );
    }
    let unreadable: Vec<&Node> = local
        .images
        .iter()
        .filter(|image| !image.allows(user, 4))
        .collect();
    if !unreadable.is_empty() {
        return Finding::warning(
            "storage",
            format!(
                "QEMU's user {} cannot read {}",
                user.name,
                names(&unreadable)
            ),
            commands("chmod o+r", &unreadable),
        );
    }
    Finding::ok(
        "storage",
        format!(
            "QEMU's user {} reaches {}",
            user.name,
            local.data_dir.display()
        ),
    )
}

fn names(nodes: &[&Node]) -> String {
    let list: Vec<_> = nodes
        .iter()
        .map(|node| node.path.display().to_string())
        .collect();
    list.join(", ")
}

fn commands(command: &str, nodes: &[&Node]) -> String {
    let list: Vec<_> = nodes
        .iter()
        .map(|node| format!("{command} '{}'", node.path.display()))
        .collect();
    list.join("\n")
}

fn space(local: &Local) -> Finding {
    match &local.resources {
        Err(error) => Finding::fatal(
            "space",
            format!("the host cannot be read: {error}"),
            "is /proc mounted, and does the data folder's file system answer?",
        ),
        Ok(host) if host.disk_free < LITTLE_SPACE => Finding::warning(
            "space",
            format!(
                "{} of {} free at {}: hardly room for a VM",
                host.disk_free,
                host.disk,
                local.data_dir.display()
            ),
            "make room, or set agent.data_dir to a larger file system",
        ),
        Ok(host) => Finding::ok("space", format!("{} of {} free", host.disk_free, host.disk)),
    }
}

fn reserved(local: &Local) -> Finding {
    let Ok(host) = &local.resources else {
        return Finding::ok("reserved", "not judged, as the host cannot be read");
    };
    let mut lacks = Vec::new();
    if local.reserved.cpus >= host.cpus {
        lacks.push(format!("{} of {} CPUs", local.reserved.cpus, host.cpus));
    }
    if local.reserved.memory >= host.memory {
        lacks.push(format!(
            "{} of {} of memory",
            local.reserved.memory, host.memory
        ));
    }
    if local.reserved.disk >= host.disk_free {
        lacks.push(format!(
            "{} of {} of free disk space",
            local.reserved.disk, host.disk_free
        ));
    }
    if lacks.is_empty() {
        Finding::ok(
            "reserved",
            format!(
                "{} CPUs, {} of memory and {} of disk stay yours",
                local.reserved.cpus, local.reserved.memory, local.reserved.disk
            ),
        )
    } else {
        Finding::warning(
            "reserved",
            format!("nothing is left for VMs: {} are reserved", lacks.join(", ")),
            "lower resources.reserved in the configuration",
        )
    }
}

fn port(port: &Port, agent_runs: bool) -> Finding {
    let Port {
        key,
        address,
        problem,
    } = port;
    match problem {
        None => Finding::ok("ports", format!("{key}: {address} is free")),
        Some(_) if agent_runs => Finding::ok(
            "ports",
            format!("{key}: {address} is held by the running agent"),
        ),
        Some(problem) => Finding::fatal(
            "ports",
            format!("{key}: {address} cannot be bound: {problem}"),
            format!("ss -ltnp   # who has it; or set another {key}"),
        ),
    }
}

fn group(facts: &Facts) -> Finding {
    if facts.group_exists {
        Finding::ok(
            "group",
            "the group ghost is there; its members may use the local socket",
        )
    } else {
        Finding::warning(
            "group",
            "there is no group ghost: only root can use the local socket",
            "groupadd --system ghost",
        )
    }
}

fn clock(synchronised: Option<bool>) -> Finding {
    match synchronised {
        Some(true) => Finding::ok("clock", "synchronised"),
        Some(false) => Finding::warning(
            "clock",
            "the clock is not synchronised: certificates live a day and fail on a wrong one",
            "apt-get install systemd-timesyncd && timedatectl set-ntp true",
        ),
        None => Finding::warning(
            "clock",
            "the kernel does not say whether the clock is synchronised",
            "timedatectl",
        ),
    }
}

#[cfg(test)]
mod tests;
