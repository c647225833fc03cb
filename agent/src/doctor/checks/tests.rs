//! Every finding that can be bad, on a host that has just that fault.

use std::collections::BTreeSet;
use std::path::PathBuf;

use ghost_domain::ports::{Accelerator, HypervisorInfo};
use ghost_domain::{Error, ErrorCode, HostResources, Network, NetworkName, Reserved};

use super::super::facts::User;
use super::super::{Level, firewall};
use super::*;

fn node(path: &str, uid: u32, gid: u32, mode: u32) -> Node {
    Node {
        path: PathBuf::from(path),
        uid,
        gid,
        mode,
    }
}

/// A host with nothing to find fault with.
fn healthy() -> Facts {
    Facts {
        local: Local {
            simulated: false,
            accelerator: AcceleratorChoice::Auto,
            cpu_flag: true,
            kvm_device: true,
            kvm: (true, "a virtual CPU ran".into()),
            qemu: Some("/usr/bin/qemu-system-x86_64".into()),
            qemu_img: Some("/usr/bin/qemu-img".into()),
            data_dir: "/var/lib/ghost".into(),
            writable: true,
            qemu_user: Some(User {
                name: "libvirt-qemu".into(),
                uid: 64055,
                gids: vec![64055, 104],
            }),
            path: vec![
                node("/", 0, 0, 0o755),
                node("/var", 0, 0, 0o755),
                node("/var/lib", 0, 0, 0o755),
                node("/var/lib/ghost", 0, 0, 0o711),
            ],
            images: vec![node("/var/lib/ghost/images/a.qcow2", 0, 0, 0o644)],
            resources: Ok(HostResources {
                cpus: 4,
                memory: ByteSize::from_gib(16),
                disk: ByteSize::from_gib(100),
                disk_free: ByteSize::from_gib(50),
            }),
            reserved: Reserved::default(),
            guest_program: Ok(Some("/usr/local/lib/ghost/ghost-guest".into())),
        },
        libvirt: Libvirt {
            uri: "qemu:///system".into(),
            info: Ok(HypervisorInfo {
                uri: "qemu:///system".into(),
                libvirt_version: "11.3.0".into(),
                hypervisor_version: "10.0.2".into(),
                accelerator: Accelerator::Kvm,
                accelerator_reason: String::new(),
            }),
            virtlogd: true,
        },
        network: NetworkFacts {
            wanted: "ghost-default".into(),
            networks: Some(vec![Network {
                name: NetworkName::new("default").unwrap(),
                libvirt_name: "ghost-default".into(),
                mode: "nat".into(),
                bridge: Some("ghost3".into()),
                subnet: Some("10.1.2.0/24".into()),
                dhcp_range: None,
                active: true,
            }]),
            dnsmasq: Some("/usr/sbin/dnsmasq".into()),
            ip_forward: true,
            firewall: Firewall::default(),
        },
        ports: vec![Port {
            key: "grpc.listen",
            address: "[::]:9090".into(),
            problem: None,
        }],
        agent_runs: false,
        clock_synchronised: Some(true),
        group_exists: true,
    }
}

fn bad(facts: &Facts) -> Vec<(&'static str, Level, String, String)> {
    all(facts)
        .into_iter()
        .filter(|finding| finding.level != Level::Ok)
        .map(|finding| {
            let fix = finding.fix.expect("what is bad has a remedy");
            (finding.check, finding.level, finding.message, fix)
        })
        .collect()
}

/// The one bad finding of a host that is healthy but for a change.
fn only(change: impl FnOnce(&mut Facts)) -> (&'static str, Level, String, String) {
    let mut facts = healthy();
    change(&mut facts);
    let mut found = bad(&facts);
    assert_eq!(found.len(), 1, "{found:?}");
    found.remove(0)
}

#[test]
fn a_healthy_host_has_no_findings_and_everything_is_looked_at() {
    let findings = all(&healthy());
    assert_eq!(bad(&healthy()), []);
    let checks: BTreeSet<_> = findings.iter().map(|finding| finding.check).collect();
    for check in [
        "cpu",
        "kvm",
        "libvirt",
        "qemu",
        "virtlogd",
        "qemu-img",
        "network",
        "dnsmasq",
        "ip-forward",
        "firewall",
        "data-dir",
        "storage",
        "space",
        "reserved",
        "ports",
        "group",
        "clock",
        "guest-program",
    ] {
        assert!(checks.contains(check), "{check}");
    }
}

#[test]
fn a_program_for_guests_that_is_none_is_told_and_stops_nothing() {
    let mut facts = healthy();
    for (found, word) in [
        (Ok(None), "there is no agent"),
        (
            Err("x is dynamically linked".to_owned()),
            "dynamically linked",
        ),
    ] {
        facts.local.guest_program = found;
        let findings = before_start(&facts.local);
        let told = findings.iter().find(|one| one.check == "guest-program");
        let told = told.unwrap();
        assert_eq!(told.level, Level::Warning);
        assert!(
            told.message.contains(word) && told.fix.is_some(),
            "{told:?}"
        );
    }
}

#[test]
fn kvm_that_does_not_work_is_as_bad_as_it_is_wanted() {
    let broken = |choice| {
        move |facts: &mut Facts| {
            facts.local.accelerator = choice;
            facts.local.kvm = (false, "it crawled".into());
        }
    };
    let (check, level, message, _) = only(broken(AcceleratorChoice::Auto));
    assert_eq!((check, level), ("kvm", Level::Warning));
    assert!(message.contains("it crawled"));
    assert_eq!(only(broken(AcceleratorChoice::Kvm)).1, Level::Fatal);
    let mut facts = healthy();
    broken(AcceleratorChoice::Tcg)(&mut facts);
    assert_eq!(bad(&facts), []);
    facts.local.accelerator = AcceleratorChoice::Auto;
    facts.local.cpu_flag = false;
    let found: Vec<_> = bad(&facts)
        .into_iter()
        .map(|(check, level, ..)| (check, level))
        .collect();
    assert_eq!(found, [("cpu", Level::Warning)]);
}

#[test]
fn libvirt_away_or_old() {
    let (check, level, message, fix) = only(|facts| {
        facts.libvirt.info = Err(Error::new(
            ErrorCode::HypervisorUnavailable,
            "nobody listens",
        ));
    });
    assert_eq!((check, level), ("libvirt", Level::Fatal));
    assert!(message.contains("nobody listens") && fix.contains("systemctl"));
    let (check, level, ..) = only(|facts| {
        if let Ok(info) = &mut facts.libvirt.info {
            info.libvirt_version = "8.10.0".into();
        }
    });
    assert_eq!((check, level), ("libvirt", Level::Warning));
    assert_eq!(only(|facts| facts.libvirt.virtlogd = false).0, "virtlogd");
}

#[test]
fn programs_that_are_missing() {
    assert_eq!(only(|facts| facts.local.qemu = None).1, Level::Fatal);
    assert_eq!(only(|facts| facts.local.qemu_img = None).0, "qemu-img");
    assert_eq!(only(|facts| facts.network.dnsmasq = None).0, "dnsmasq");
}

#[test]
fn packets_that_are_not_forwarded() {
    let (check, level, ..) = only(|facts| facts.network.ip_forward = false);
    assert_eq!((check, level), ("ip-forward", Level::Warning));
    // libvirt switches it on with the network: before that it is no fault.
    let mut facts = healthy();
    facts.network.ip_forward = false;
    facts.network.networks = Some(Vec::new());
    assert_eq!(bad(&facts), []);
}

fn dropping(hook: &str, inside: bool, names: &[&str]) -> Dropping {
    Dropping {
        hook: hook.into(),
        chain: format!("ip filter {hook}"),
        libvirt_inside: inside,
        names: names.iter().map(|name| (*name).to_owned()).collect(),
    }
}

#[test]
fn firewalls_that_cut_guests_off() {
    let (check, level, message, fix) = only(|facts| {
        facts.network.firewall = Firewall {
            docker: true,
            dropping: vec![dropping("forward", false, &["docker0"])],
            ..Firewall::default()
        };
    });
    assert_eq!((check, level), ("firewall", Level::Warning));
    assert!(message.contains("Docker"), "{message}");
    assert!(
        fix.contains("iptables -I DOCKER-USER -i ghost3 -j ACCEPT"),
        "{fix}"
    );

    let (_, _, message, fix) = only(|facts| {
        facts.network.firewall = Firewall {
            ufw: true,
            dropping: vec![dropping("input", false, &[])],
            ..Firewall::default()
        };
    });
    assert!(
        message.contains("ufw") && message.contains("DHCP"),
        "{message}"
    );
    assert!(fix.contains("ufw allow in on ghost3"), "{fix}");

    let (_, _, message, _) = only(|facts| {
        facts.network.firewall.unseen = Some("no permission".into());
    });
    assert!(message.contains("no permission"));
}

#[test]
fn firewalls_that_let_guests_through() {
    for chain in [
        dropping("forward", true, &[]),
        dropping("forward", false, &["ghost3"]),
    ] {
        let mut facts = healthy();
        facts.network.firewall = Firewall {
            docker: true,
            dropping: vec![chain],
            ..Firewall::default()
        };
        assert_eq!(bad(&facts), []);
    }
}

#[test]
fn a_firewall_is_judged_from_its_own_words() {
    let text = "-P FORWARD DROP\n-N DOCKER\n-A FORWARD -i docker0 -j ACCEPT\n";
    let (check, _, message, _) = only(|facts| facts.network.firewall = firewall::of_iptables(text));
    assert_eq!(check, "firewall");
    assert!(message.contains("Docker"), "{message}");
}

#[test]
fn storage_that_qemu_cannot_reach() {
    let (check, level, message, fix) = only(|facts| {
        facts.local.path[2].mode = 0o750;
        facts.local.path[3].mode = 0o700;
    });
    assert_eq!((check, level), ("storage", Level::Fatal));
    assert!(message.contains("/var/lib, /var/lib/ghost"), "{message}");
    assert_eq!(fix, "chmod o+x '/var/lib'\nchmod o+x '/var/lib/ghost'");
    // Its own folder, or one of a group of its, needs no right for others.
    let mut facts = healthy();
    facts.local.path[3] = node("/var/lib/ghost", 64055, 0, 0o700);
    facts.local.path[2] = node("/var/lib", 0, 104, 0o710);
    assert_eq!(bad(&facts), []);
    // The owner's rights count for the owner, also where others have more.
    facts.local.path[3].mode = 0o077;
    assert_eq!(bad(&facts)[0].0, "storage");

    let (check, level, ..) = only(|facts| facts.local.images[0].mode = 0o600);
    assert_eq!((check, level), ("storage", Level::Warning));
    assert_eq!(only(|facts| facts.local.qemu_user = None).0, "storage");
    assert_eq!(only(|facts| facts.local.writable = false).0, "data-dir");
}

#[test]
fn space_and_what_is_reserved_of_it() {
    let (check, ..) = only(|facts| {
        if let Ok(host) = &mut facts.local.resources {
            host.disk_free = ByteSize::from_gib(1);
        }
    });
    assert_eq!(check, "space");
    let (check, level, message, _) = only(|facts| {
        facts.local.reserved.cpus = 4;
        facts.local.reserved.memory = ByteSize::from_gib(16);
    });
    assert_eq!((check, level), ("reserved", Level::Warning));
    assert!(
        message.contains("4 of 4 CPUs") && message.contains("memory"),
        "{message}"
    );
    let (check, level, ..) =
        only(|facts| facts.local.resources = Err(Error::new(ErrorCode::IoFailed, "no /proc")));
    assert_eq!((check, level), ("space", Level::Fatal));
}

#[test]
fn ports_that_are_taken_by_somebody_else() {
    let taken = |facts: &mut Facts| facts.ports[0].problem = Some("in use".into());
    let (check, level, message, fix) = only(taken);
    assert_eq!((check, level), ("ports", Level::Fatal));
    assert!(message.contains("grpc.listen: [::]:9090") && fix.contains("ss -ltnp"));
    let mut facts = healthy();
    taken(&mut facts);
    facts.agent_runs = true;
    assert_eq!(bad(&facts), []);
}

#[test]
fn the_group_and_the_clock() {
    assert_eq!(
        only(|facts| facts.group_exists = false).3,
        "groupadd --system ghost"
    );
    assert_eq!(
        only(|facts| facts.clock_synchronised = Some(false)).0,
        "clock"
    );
    assert_eq!(only(|facts| facts.clock_synchronised = None).0, "clock");
}

#[test]
fn a_simulation_needs_neither_libvirt_nor_a_qemu_user() {
    let mut facts = healthy();
    facts.local.simulated = true;
    facts.local.accelerator = AcceleratorChoice::Tcg;
    facts.local.kvm = (false, "not tried".into());
    facts.local.cpu_flag = false;
    facts.local.qemu = None;
    facts.local.qemu_user = None;
    facts.local.path[3].mode = 0o700;
    facts.libvirt.info = Err(Error::new(ErrorCode::HypervisorUnavailable, "none"));
    facts.libvirt.virtlogd = false;
    facts.network.networks = None;
    assert_eq!(bad(&facts), []);
}

#[test]
fn what_may_come_later_does_not_keep_the_agent_from_starting() {
    let mut facts = healthy();
    facts.libvirt.info = Err(Error::new(ErrorCode::HypervisorUnavailable, "down"));
    facts.libvirt.virtlogd = false;
    facts.network.networks = None;
    let fatal = |local: &Local| {
        before_start(local)
            .into_iter()
            .filter(|finding| finding.level == Level::Fatal)
            .count()
    };
    assert_eq!(fatal(&facts.local), 0);
    facts.local.path[3].mode = 0o700;
    facts.local.qemu_img = None;
    assert_eq!(fatal(&facts.local), 2);
}
