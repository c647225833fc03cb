//! Gathering what is there. Nothing is judged here.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;

use super::{Hypervisor, Subject};
use crate::libvirt::{self, Domain, Lease};
use crate::xml::read_domain;

/// A network card of a record.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
pub struct Interface {
    /// Its address, the record's for life.
    pub mac: String,
    /// What the agent says it has from DHCP.
    #[serde(default)]
    pub addresses: Vec<String>,
}

/// A VM's record, as the agent tells it.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
pub struct Vm {
    /// The id.
    pub id: String,
    /// The name.
    pub name: String,
    /// The state that is shown.
    pub state: String,
    /// The operation that holds it.
    pub operation_id: Option<String>,
    /// Its cards.
    #[serde(default)]
    pub nics: Vec<Interface>,
}

/// An image's record.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
pub struct Image {
    /// The name.
    pub name: String,
    /// SHA-256 in hexadecimal.
    pub digest: String,
    /// `raw` or `qcow2`.
    pub format: String,
}

/// An operation's record.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
pub struct Operation {
    /// The id.
    pub id: String,
    /// Such as `create_vm`.
    pub kind: String,
    /// The VM or image.
    pub subject: String,
    /// Where it stands.
    pub status: String,
}

/// What the agent says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Records {
    /// VMs.
    pub vms: Vec<Vm>,
    /// Images.
    pub images: Vec<Image>,
    /// Operations, finished ones too.
    pub operations: Vec<Operation>,
}

/// What kind of file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A folder.
    Folder,
    /// A regular file.
    Regular,
    /// A socket.
    Socket,
    /// Anything else: a link, a pipe, a device.
    Other,
}

/// A file below `vms/` or `images/`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnFile {
    /// Relative to the data folder.
    pub path: PathBuf,
    /// What it is.
    pub kind: FileKind,
}

/// A process that names our data folder in its command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// The program's file name.
    pub program: String,
    /// The UUID that QEMU was given, where it is QEMU.
    pub vm: Option<String>,
}

/// A tap device of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tap {
    /// Its name.
    pub name: String,
    /// The bridge it is plugged into.
    pub bridge: Option<String>,
}

/// All that was found.
#[derive(Clone, Debug, Default)]
pub struct Evidence {
    /// What the agent says.
    pub records: Records,
    /// Whether partial downloads may be there.
    pub partial_downloads: bool,
    /// The data folder.
    pub data_dir: PathBuf,
    /// Domains with our metadata and a file below the data folder.
    pub domains: Vec<Domain>,
    /// Whether QEMU runs what is active: not in a simulation.
    pub real: bool,
    /// Taps that any domain of the host has.
    pub taps_in_use: BTreeSet<String>,
    /// Taps of the host on the bridges of libvirt's networks or on none.
    pub taps: Vec<Tap>,
    /// Leases on the networks that our domains are plugged into.
    pub leases: Vec<Lease>,
    /// Files below `vms/` and `images/`.
    pub files: Vec<OwnFile>,
    /// The base image of each VM's disk.
    pub bases: BTreeMap<String, PathBuf>,
    /// Processes that name the data folder.
    pub processes: Vec<Process>,
    /// Unix sockets below the data folder that somebody has bound.
    pub sockets: Vec<PathBuf>,
    /// Locks on files below the data folder: path and the program that holds it.
    pub locks: Vec<(PathBuf, String)>,
}

/// Gathers everything.
///
/// # Errors
/// Where libvirt or the agent does not answer, or a folder cannot be read.
pub fn collect(subject: &Subject) -> Result<Evidence, String> {
    let data_dir = std::path::absolute(&subject.data_dir).map_err(|error| error.to_string())?;
    // libvirt before the records: a VM that comes up meanwhile then looks like a record without a
    // domain for one look, and is looked at again.
    let (domains, taps_in_use, real) = match &subject.hypervisor {
        Hypervisor::Libvirt(uri) => {
            let all = libvirt::domains(uri)?;
            let taps = all
                .iter()
                .flat_map(|domain| domain.xml.taps.clone())
                .collect();
            (ours(all, &data_dir), taps, true)
        }
        Hypervisor::Simulated(folder) => (simulated(folder)?, BTreeSet::new(), false),
    };
    let mut leases = Vec::new();
    if let Hypervisor::Libvirt(uri) = &subject.hypervisor {
        let networks: BTreeSet<&String> = domains
            .iter()
            .flat_map(|domain| &domain.xml.networks)
            .collect();
        for network in networks {
            leases.extend(libvirt::leases(uri, network)?);
        }
    }
    let files = files(&data_dir)?;
    let bases = bases(&data_dir, &files);
    Ok(Evidence {
        records: records(subject)?,
        partial_downloads: subject.partial_downloads,
        domains,
        real,
        taps_in_use,
        taps: if real { taps() } else { Vec::new() },
        leases,
        files,
        bases,
        processes: processes(&data_dir),
        sockets: sockets(&data_dir),
        locks: locks(&data_dir),
        data_dir,
    })
}

fn records(subject: &Subject) -> Result<Records, String> {
    fn read<T: for<'a> Deserialize<'a>>(
        subject: &Subject,
        arguments: &[&str],
    ) -> Result<Vec<T>, String> {
        let output = subject.ctl.run(&[arguments, &["-o", "json"]].concat());
        if output.code != 0 {
            return Err(format!(
                "ghostctl {}: {}",
                arguments.join(" "),
                output.stderr
            ));
        }
        serde_json::from_str(&output.stdout)
            .map_err(|error| format!("ghostctl {}: {error}", arguments.join(" ")))
    }
    Ok(Records {
        vms: read(subject, &["vm", "list"])?,
        images: read(subject, &["image", "list"])?,
        operations: read(subject, &["operation", "list", "--all"])?,
    })
}

/// Another agent on the same libvirt has its VMs in its own folder. A domain all of whose devices
/// were edited away still has its id for a folder's name.
fn ours(domains: Vec<Domain>, data_dir: &Path) -> Vec<Domain> {
    domains
        .into_iter()
        .filter(|domain| {
            domain
                .xml
                .files
                .iter()
                .any(|file| file.starts_with(data_dir))
                || (domain.xml.ghost && data_dir.join("vms").join(&domain.xml.id).exists())
        })
        .collect()
}

fn simulated(folder: &Path) -> Result<Vec<Domain>, String> {
    #[derive(Deserialize)]
    struct Stored {
        xml: String,
        persistent: bool,
        power: String,
    }
    let folder = folder.join("domains");
    let told = |error: std::io::Error| format!("{}: {error}", folder.display());
    let mut domains = Vec::new();
    for entry in fs::read_dir(&folder).map_err(told)? {
        let path = entry.map_err(told)?.path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        // It may have been removed since.
        let Ok(text) = fs::read_to_string(&path) else {
            continue;
        };
        let stored: Stored =
            serde_json::from_str(&text).map_err(|error| format!("{}: {error}", path.display()))?;
        domains.push(Domain {
            xml: read_domain(&stored.xml),
            active: matches!(
                stored.power.as_str(),
                "running" | "paused" | "shutting_down"
            ),
            persistent: stored.persistent,
            state: stored.power,
        });
    }
    Ok(domains)
}

fn files(data_dir: &Path) -> Result<Vec<OwnFile>, String> {
    let mut found = Vec::new();
    for top in ["vms", "images"] {
        let top = data_dir.join(top);
        if top.exists() {
            walk(data_dir, &top, &mut found)
                .map_err(|error| format!("{}: {error}", top.display()))?;
        }
    }
    Ok(found)
}

fn walk(data_dir: &Path, folder: &Path, found: &mut Vec<OwnFile>) -> std::io::Result<()> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        // Removed while we look.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        let Ok(kind) = entry.file_type() else {
            continue;
        };
        let path = entry.path();
        let kind = if kind.is_dir() {
            FileKind::Folder
        } else if kind.is_file() {
            FileKind::Regular
        } else if kind.is_socket() {
            FileKind::Socket
        } else {
            FileKind::Other
        };
        if kind == FileKind::Folder {
            walk(data_dir, &path, found)?;
        }
        let path = path
            .strip_prefix(data_dir)
            .map(Path::to_owned)
            .unwrap_or(path);
        found.push(OwnFile { path, kind });
    }
    Ok(())
}

/// The bases that disks say they stand on, by QEMU's own tool.
fn bases(data_dir: &Path, files: &[OwnFile]) -> BTreeMap<String, PathBuf> {
    files
        .iter()
        .filter(|file| {
            file.path
                .file_name()
                .is_some_and(|name| name == "disk.qcow2")
        })
        .filter_map(|file| {
            let vm = file.path.parent()?.file_name()?.to_str()?.to_owned();
            // The guest may be writing: the image is looked at without QEMU's lock.
            let output = Command::new("qemu-img")
                .args(["info", "-U", "-f", "qcow2", "--output=json"])
                .arg(data_dir.join(&file.path))
                .output()
                .ok()?;
            let told: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
            Some((vm, PathBuf::from(told.get("backing-filename")?.as_str()?)))
        })
        .collect()
}

fn processes(data_dir: &Path) -> Vec<Process> {
    let needle = format!("{}/", data_dir.display());
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        let Ok(line) = fs::read(entry.path().join("cmdline")) else {
            continue;
        };
        let words: Vec<String> = line
            .split(|byte| *byte == 0)
            .map(|word| String::from_utf8_lossy(word).into_owned())
            .collect();
        let program = words
            .first()
            .and_then(|first| first.rsplit('/').next())
            .unwrap_or_default()
            .to_owned();
        // Only what works for the agent: an editor or a test that looks at a file there is not its.
        let of_interest = program.starts_with("qemu-") || program.starts_with("ghost-agent");
        if !of_interest || !words.iter().any(|word| word.contains(&needle)) {
            continue;
        }
        let vm = program.starts_with("qemu-system").then(|| {
            let at = words.iter().position(|word| word == "-uuid");
            at.and_then(|at| words.get(at + 1))
                .cloned()
                .unwrap_or_default()
        });
        found.push(Process { pid, program, vm });
    }
    found
}

fn sockets(data_dir: &Path) -> Vec<PathBuf> {
    // Num RefCount Protocol Flags Type St Inode Path; the flag __SO_ACCEPTCON marks a listener.
    let mut found: Vec<PathBuf> = fs::read_to_string("/proc/net/unix")
        .unwrap_or_default()
        .lines()
        .filter(|line| line.split_whitespace().nth(3) == Some("00010000"))
        .filter_map(|line| line.split_whitespace().nth(7).map(PathBuf::from))
        .filter(|path| path.starts_with(data_dir))
        .collect();
    found.sort();
    found.dedup();
    found
}

fn taps() -> Vec<Tap> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/class/net")
        .into_iter()
        .flatten()
        .flatten()
    {
        let path = entry.path();
        // Only taps have this file.
        if !path.join("tun_flags").exists() {
            continue;
        }
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        // libvirt's own names: a tap of a VPN is not our matter.
        if !name.starts_with("vnet") {
            continue;
        }
        let bridge = fs::read_link(path.join("master"))
            .ok()
            .and_then(|link| Some(link.file_name()?.to_string_lossy().into_owned()));
        found.push(Tap { name, bridge });
    }
    found
}

/// Locks of the kernel's table on files below the data folder.
fn locks(data_dir: &Path) -> Vec<(PathBuf, String)> {
    let mut inodes = BTreeMap::new();
    index(data_dir, &mut inodes, 0);
    fs::read_to_string("/proc/locks")
        .unwrap_or_default()
        .lines()
        .filter_map(|line| {
            let words: Vec<&str> = line
                .split_whitespace()
                .filter(|word| *word != "->")
                .collect();
            // 1: FLOCK ADVISORY WRITE 4242 fe:01:131 0 EOF
            let pid = words.get(4)?;
            let mut file = words.get(5)?.split(':');
            let major = u32::from_str_radix(file.next()?, 16).ok()?;
            let minor = u32::from_str_radix(file.next()?, 16).ok()?;
            let inode: u64 = file.next()?.parse().ok()?;
            let path = inodes.get(&(libc::makedev(major, minor), inode))?;
            // A lock of an open file description has no process in the table; QEMU takes those.
            let pid = match *pid {
                "-1" => who_has_open(path)?,
                pid => pid.to_owned(),
            };
            let holder = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            Some((PathBuf::clone(path), holder.trim().to_owned()))
        })
        .collect()
}

/// A process that has the file open; none where it was closed since the table was read.
fn who_has_open(path: &Path) -> Option<String> {
    for entry in fs::read_dir("/proc").ok()?.flatten() {
        let name = entry.file_name().into_string().unwrap_or_default();
        if name.parse::<u32>().is_err() {
            continue;
        }
        let open = fs::read_dir(entry.path().join("fd"))
            .into_iter()
            .flatten()
            .flatten();
        if open
            .filter_map(|link| fs::read_link(link.path()).ok())
            .any(|target| target == path)
        {
            return Some(name);
        }
    }
    None
}

fn index(folder: &Path, inodes: &mut BTreeMap<(u64, u64), PathBuf>, depth: usize) {
    if depth > 6 {
        return;
    }
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(metadata) = entry.metadata() else {
            continue;
        };
        if metadata.is_dir() {
            index(&entry.path(), inodes, depth + 1);
        } else {
            inodes.insert((metadata.dev(), metadata.ino()), entry.path());
        }
    }
}
