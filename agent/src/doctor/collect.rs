//! Looks at the host. Reads only: nothing is made, started or changed.

use std::ffi::OsStr;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use ghost_domain::ports::{Hypervisor, NetworkProvider};
use ghost_domain::{Error, ErrorCode, Reserved};
use ghost_infrastructure::host::{LinuxHost, clock_synchronised};
use ghost_infrastructure::libvirt::{AcceleratorChoice, LibvirtHypervisor, prove_kvm};
use ghost_presentation::SOCKET_GROUP;

use super::facts::{Facts, Libvirt, Local, NetworkFacts, Node, Port, User};
use super::firewall::{self, Firewall};
use crate::compose;
use crate::config::{Config, HypervisorUri, Listen};

/// How long libvirt may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Where Debian and its like have their programs, also where PATH lacks the administrator's.
const PROGRAMS: [&str; 6] = [
    "/usr/sbin",
    "/usr/bin",
    "/sbin",
    "/bin",
    "/usr/local/sbin",
    "/usr/local/bin",
];

/// Everything.
pub(super) async fn everything(config: &Config) -> Facts {
    let local = local(config);
    let (libvirt, networks) = libvirt(config).await;
    Facts {
        network: NetworkFacts {
            wanted: config.network.name.0.clone(),
            networks,
            dnsmasq: program("dnsmasq"),
            ip_forward: fs::read_to_string("/proc/sys/net/ipv4/ip_forward")
                .is_ok_and(|text| text.trim() == "1"),
            firewall: if local.simulated {
                Firewall::default()
            } else {
                look_at_firewall().await
            },
        },
        libvirt,
        ports: ports(config),
        agent_runs: agent_runs(local.data_dir.as_path()),
        clock_synchronised: clock_synchronised(),
        group_exists: line_of("/etc/group", SOCKET_GROUP).is_some(),
        local,
    }
}

/// What can be seen without waiting for anybody.
pub(super) fn local(config: &Config) -> Local {
    // libvirt's test driver runs no guests either.
    let simulated = match &config.libvirt.uri {
        HypervisorUri::Simulated(_) => true,
        HypervisorUri::Libvirt(uri) => uri.starts_with("test"),
    };
    let data_dir = config.agent.data_dir.path().to_owned();
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu_flag = cpuinfo
        .lines()
        .filter(|line| line.starts_with("flags"))
        .flat_map(str::split_whitespace)
        .any(|flag| flag == "vmx" || flag == "svm");
    let accelerator = if simulated {
        AcceleratorChoice::Tcg
    } else {
        config.libvirt.accelerator
    };
    let kvm = if accelerator == AcceleratorChoice::Tcg {
        (false, "not tried".into())
    } else {
        prove_kvm()
    };
    let existing = existing(&data_dir);
    Local {
        simulated,
        accelerator,
        cpu_flag,
        kvm_device: Path::new("/dev/kvm").exists(),
        kvm,
        qemu: program(&format!("qemu-system-{}", std::env::consts::ARCH))
            .or_else(|| Some(PathBuf::from("/usr/libexec/qemu-kvm")).filter(|path| path.exists())),
        qemu_img: Some(PathBuf::from("/usr/bin/qemu-img")).filter(|path| path.exists()),
        writable: existing.last().is_some_and(|folder| {
            rustix::fs::access(
                &folder.path,
                rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK,
            )
            .is_ok()
        }),
        qemu_user: qemu_user(),
        path: existing,
        images: images(&data_dir),
        resources: LinuxHost::new(&data_dir).resources_now(),
        reserved: Reserved {
            cpus: config.resources.reserved.cpus,
            memory: config.resources.reserved.memory,
            disk: config.resources.reserved.disk,
        },
        guest_program: compose::guest_program(config)
            .find()
            .map(|found| found.map(|file| file.path))
            .map_err(|error| error.to_string()),
        data_dir,
    }
}

async fn libvirt(config: &Config) -> (Libvirt, Option<Vec<ghost_domain::Network>>) {
    let HypervisorUri::Libvirt(uri) = &config.libvirt.uri else {
        let none = Error::new(
            ErrorCode::HypervisorUnavailable,
            "the simulation is not asked",
        );
        let libvirt = Libvirt {
            uri: "simulated".into(),
            info: Err(none),
            virtlogd: true,
        };
        return (libvirt, None);
    };
    let asked = async {
        let hypervisor = LibvirtHypervisor::start(compose::libvirt_options(config, uri))?;
        hypervisor.connected(PATIENCE).await?;
        let info = hypervisor.info().await?;
        Ok((info, hypervisor.networks().list().await.ok()))
    };
    let asked = tokio::time::timeout(PATIENCE * 2, asked)
        .await
        .unwrap_or_else(|_| {
            Err(Error::new(
                ErrorCode::HypervisorUnavailable,
                "libvirt does not answer",
            ))
        });
    let (info, networks) = match asked {
        Ok((info, networks)) => (Ok(info), networks),
        Err(error) => (Err(error), None),
    };
    let virtlogd = [
        "/run/libvirt/virtlogd-sock",
        "/var/run/libvirt/virtlogd-sock",
    ]
    .into_iter()
    .any(|path| UnixStream::connect(path).is_ok());
    let libvirt = Libvirt {
        uri: uri.clone(),
        info,
        virtlogd,
    };
    (libvirt, networks)
}

/// A program in the usual folders.
fn program(name: &str) -> Option<PathBuf> {
    PROGRAMS
        .iter()
        .map(|folder| Path::new(folder).join(name))
        .find(|path| path.is_file())
}

/// What a program prints, for at most five seconds.
async fn output(program: &Path, arguments: &[&str]) -> Result<String, String> {
    let mut command = tokio::process::Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = tokio::time::timeout(Duration::from_secs(5), command.output())
        .await
        .map_err(|_| format!("{} does not end", program.display()))?
        .map_err(|cause| format!("{}: {cause}", program.display()))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        let words = String::from_utf8_lossy(&output.stderr);
        let first = words.lines().next().unwrap_or("it failed").to_owned();
        Err(format!("{}: {first}", program.display()))
    }
}

async fn look_at_firewall() -> Firewall {
    let unseen = |reason: String| Firewall {
        unseen: Some(reason),
        ..Firewall::default()
    };
    let by_nft = match program("nft") {
        None => Err("nft is not installed".to_owned()),
        Some(nft) => output(&nft, &["-j", "list", "ruleset"])
            .await
            .and_then(|text| {
                firewall::of_nft(&text).ok_or_else(|| "nft's answer cannot be read".to_owned())
            }),
    };
    // The rules of the old iptables are not among those of nftables.
    let by_iptables = match program("iptables-legacy").or_else(|| program("iptables")) {
        None => Err("iptables is not installed".to_owned()),
        Some(iptables) => output(&iptables, &["-w", "2", "-S"])
            .await
            .map(|text| firewall::of_iptables(&text)),
    };
    match (by_nft, by_iptables) {
        (Ok(mut nft), Ok(iptables)) => {
            for one in iptables.dropping {
                if !nft.dropping.iter().any(|known| known.chain == one.chain) {
                    nft.dropping.push(one);
                }
            }
            nft.docker |= iptables.docker;
            nft.ufw |= iptables.ufw;
            nft
        }
        (Ok(firewall), Err(_)) | (Err(_), Ok(firewall)) => firewall,
        // Neither tool: nothing can have set rules with them.
        (Err(nft), Err(_)) => unseen(nft),
    }
}

/// The folders from the root down to `path`, as far as they exist.
fn existing(path: &Path) -> Vec<Node> {
    let mut folders: Vec<&Path> = path.ancestors().collect();
    folders.reverse();
    folders.into_iter().map_while(node).collect()
}

fn node(path: &Path) -> Option<Node> {
    let metadata = fs::metadata(path).ok()?;
    Some(Node {
        path: path.to_owned(),
        uid: metadata.uid(),
        gid: metadata.gid(),
        mode: metadata.mode(),
    })
}

/// The folder of images and the images in it.
fn images(data_dir: &Path) -> Vec<Node> {
    let Ok(entries) = fs::read_dir(data_dir.join("images")) else {
        return Vec::new();
    };
    entries
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .filter(|path| {
            path.is_file()
                && matches!(
                    path.extension().and_then(OsStr::to_str),
                    Some("qcow2" | "raw")
                )
        })
        .filter_map(|path| node(&path))
        .collect()
}

/// The user that libvirt runs QEMU as: that of its configuration, or its distribution's default.
fn qemu_user() -> Option<User> {
    let configured = fs::read_to_string("/etc/libvirt/qemu.conf")
        .ok()
        .and_then(|text| {
            text.lines().find_map(|line| {
                let value = line
                    .trim()
                    .strip_prefix("user")?
                    .trim_start()
                    .strip_prefix('=')?;
                Some(
                    value
                        .trim()
                        .trim_matches('"')
                        .trim_start_matches('+')
                        .to_owned(),
                )
            })
        });
    configured
        .into_iter()
        .chain(["libvirt-qemu".to_owned(), "qemu".to_owned()])
        .find_map(|name| user(&name))
}

fn line_of(file: &str, name: &str) -> Option<Vec<String>> {
    let text = fs::read_to_string(file).ok()?;
    text.lines()
        .map(|line| line.split(':').map(str::to_owned).collect::<Vec<_>>())
        .find(|fields| fields.first().is_some_and(|field| field == name))
}

fn user(name: &str) -> Option<User> {
    let fields = line_of("/etc/passwd", name)?;
    let number = |at: usize| fields.get(at)?.parse::<u32>().ok();
    let (uid, gid) = (number(2)?, number(3)?);
    let groups = fs::read_to_string("/etc/group").unwrap_or_default();
    let listed = groups.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let member = fields.get(3)?.split(',').any(|member| member == name);
        member.then(|| fields.get(2)?.parse().ok())?
    });
    Some(User {
        name: name.into(),
        uid,
        gids: std::iter::once(gid).chain(listed).collect(),
    })
}

/// Tries each listener of the configuration.
fn ports(config: &Config) -> Vec<Port> {
    let mut ports: Vec<Port> = [
        ("grpc.listen", config.grpc.listen),
        ("http.listen", config.http.listen),
        ("metrics.listen", config.metrics.listen),
    ]
    .into_iter()
    .filter_map(|(key, listen)| {
        let address = listen.address()?;
        let bound = match (TcpListener::bind(address), listen) {
            (Err(cause), Listen::All(port)) if cause.kind() != std::io::ErrorKind::AddrInUse => {
                TcpListener::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)))
            }
            (bound, _) => bound,
        };
        Some(Port {
            key,
            address: address.to_string(),
            problem: bound.err().map(|cause| cause.to_string()),
        })
    })
    .collect();
    if let Some(path) = &config.grpc.socket.0 {
        ports.push(Port {
            key: "grpc.socket",
            address: path.display().to_string(),
            problem: UnixStream::connect(path)
                .is_ok()
                .then(|| "another process listens there".into()),
        });
    }
    ports
}

/// Whether an agent holds the lock of the data folder.
fn agent_runs(data_dir: &Path) -> bool {
    fs::File::open(data_dir.join(compose::LOCK_FILE))
        .is_ok_and(|file| matches!(file.try_lock_shared(), Err(fs::TryLockError::WouldBlock)))
}
