//! Networks on libvirt: the test driver for what needs no kernel, and the real NAT network with a
//! DHCP client in a network namespace.

use std::process::Command;
use std::time::Duration;

use ghost_domain::ports::NetworkProvider;
use ghost_domain::{ErrorCode, MacAddress, NetworkName};
use ghost_infrastructure::libvirt::{LibvirtHypervisor, LibvirtNetworks, LibvirtOptions};
use virt::connect::Connect;

use super::support::PATIENCE;

fn name(text: &str) -> NetworkName {
    NetworkName::new(text).unwrap()
}

fn unique(prefix: &str) -> String {
    format!("{prefix}-{}", &uuid::Uuid::new_v4().to_string()[..8])
}

async fn networks(uri: &str, default_network: &str) -> LibvirtNetworks {
    let hypervisor = LibvirtHypervisor::start(LibvirtOptions {
        uri: uri.into(),
        default_network: default_network.into(),
        ..LibvirtOptions::default()
    })
    .unwrap();
    hypervisor.connected(PATIENCE).await.unwrap();
    hypervisor.networks()
}

/// Removes a network at the end, however the test ends.
struct NetworkGuard {
    connection: Connect,
    name: String,
}

impl Drop for NetworkGuard {
    fn drop(&mut self) {
        if let Ok(network) = self.connection.lookup_network_by_name(&self.name) {
            let _ = network.destroy();
            let _ = network.undefine();
        }
    }
}

#[tokio::test]
async fn the_default_network_is_made_once_and_others_are_used_as_they_are() {
    let own = unique("gt-net");
    let guard = NetworkGuard {
        connection: Connect::open(Some("test:///default")).unwrap(),
        name: own.clone(),
    };
    let networks = networks("test:///default", &own).await;
    let made = networks.ensure(&name("default")).await.unwrap();
    assert_eq!(made.name.as_str(), "default");
    assert_eq!(made.libvirt_name, own);
    assert_eq!(made.mode, "nat");
    assert!(made.active && made.dhcp_range.is_some() && made.subnet.is_some());
    assert_eq!(networks.ensure(&name("default")).await.unwrap(), made);
    assert!(networks.list().await.unwrap().contains(&made));

    // It is ours, so it is brought up again.
    guard
        .connection
        .lookup_network_by_name(&own)
        .unwrap()
        .destroy()
        .unwrap();
    assert!(networks.ensure(&name("default")).await.unwrap().active);

    let foreign = unique("gt-foreign");
    let _foreign = NetworkGuard {
        connection: Connect::open(Some("test:///default")).unwrap(),
        name: foreign.clone(),
    };
    let defined = guard
        .connection
        .define_network_xml(&format!(
            "<network><name>{foreign}</name><bridge name='gtx'/></network>"
        ))
        .unwrap();
    let error = networks.ensure(&name(&foreign)).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::NetworkFailed);
    assert!(error.hint_text().unwrap().contains("virsh net-start"));
    defined.create().unwrap();
    let used = networks.ensure(&name(&foreign)).await.unwrap();
    assert_eq!(used.libvirt_name, foreign);

    let missing = name("no-such-network");
    for error in [
        networks.ensure(&missing).await.unwrap_err(),
        networks.leases(&missing).await.unwrap_err(),
    ] {
        assert_eq!(error.code(), ErrorCode::NetworkNotFound);
    }
}

/// A network namespace with one end of a cable in a bridge.
struct Cable {
    namespace: String,
    outer: String,
}

fn run(program: &str, arguments: &[&str]) -> bool {
    Command::new(program)
        .args(arguments)
        .output()
        .is_ok_and(|output| {
            let ok = output.status.success();
            if !ok {
                println!(
                    "{program} {arguments:?}: {}",
                    String::from_utf8_lossy(&output.stderr)
                );
            }
            ok
        })
}

impl Cable {
    fn plug(bridge: &str, mac: MacAddress) -> Self {
        let id = &uuid::Uuid::new_v4().to_string()[..6];
        let cable = Self {
            namespace: format!("gt-{id}"),
            outer: format!("gt{id}o"),
        };
        let inner = format!("gt{id}i");
        let mac = mac.to_string();
        for arguments in [
            vec!["netns", "add", &cable.namespace],
            vec![
                "link",
                "add",
                &cable.outer,
                "type",
                "veth",
                "peer",
                "name",
                &inner,
                "address",
                &mac,
            ],
            vec![
                "link",
                "set",
                &inner,
                "netns",
                &cable.namespace,
                "name",
                "eth0",
            ],
            vec!["link", "set", &cable.outer, "master", bridge, "up"],
            vec!["-n", &cable.namespace, "link", "set", "eth0", "up"],
        ] {
            assert!(run("ip", &arguments), "{arguments:?}");
        }
        cable
    }

    /// Asks for an address and says whether one was given.
    fn ask(&self, hostname: &str) -> bool {
        run(
            "ip",
            &[
                "netns",
                "exec",
                &self.namespace,
                "busybox",
                "udhcpc",
                "-i",
                "eth0",
                "-s",
                "/bin/true",
                "-q",
                "-n",
                "-f",
                "-t",
                "20",
                "-T",
                "1",
                "-x",
                &format!("hostname:{hostname}"),
            ],
        )
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        run("ip", &["link", "del", &self.outer]);
        run("ip", &["netns", "del", &self.namespace]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_on_the_nat_network_gets_a_lease() {
    let possible = rustix::process::geteuid().is_root()
        && std::path::Path::new("/run/libvirt/libvirt-sock").exists()
        && run("ip", &["-V"])
        && run("busybox", &["true"]);
    if !possible {
        println!("skipped: needs root, libvirtd, ip and busybox");
        return;
    }
    let own = unique("gt-nat");
    let _guard = NetworkGuard {
        connection: Connect::open(Some("qemu:///system")).unwrap(),
        name: own.clone(),
    };
    let networks = networks("qemu:///system", &own).await;
    let made = networks.ensure(&name("default")).await.unwrap();
    assert!(made.active);
    let bridge = made.bridge.clone().expect("a NAT network has a bridge");
    assert!(bridge.starts_with("ghost"), "{bridge}");
    // No route of the host but the bridge's own lies in the range.
    let subnet = made.subnet.clone().unwrap();
    let routes = Command::new("ip")
        .args(["-4", "route", "show", "root", &subnet])
        .output()
        .unwrap();
    let routes = String::from_utf8_lossy(&routes.stdout).into_owned();
    assert!(
        routes.lines().all(|line| line.contains(&bridge)),
        "{routes}"
    );
    assert_eq!(networks.leases(&name("default")).await.unwrap(), []);

    let mac = MacAddress::random();
    let cable = Cable::plug(&bridge, mac);
    let given = tokio::task::spawn_blocking(move || {
        let given = cable.ask("guest1");
        (cable, given)
    });
    let (_cable, given) = given.await.unwrap();
    assert!(given, "the DHCP server answers");
    let lease = tokio::time::timeout(PATIENCE, async {
        loop {
            let leases = networks.leases(&name("default")).await.unwrap();
            if let Some(lease) = leases.into_iter().find(|lease| lease.mac == mac) {
                return lease;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .unwrap();
    let (first, last) = made.dhcp_range.unwrap();
    assert!(lease.address >= first && lease.address <= last);
    assert_eq!(lease.hostname.as_deref(), Some("guest1"));
    assert!(lease.expires_at.is_some());
}
