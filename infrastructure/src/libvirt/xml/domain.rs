//! The domain of a VM: rendered from its definition, read back with its drift.
//!
//! Source of the elements: <https://libvirt.org/formatdomain.html>.

use std::path::{Path, PathBuf};

use ghost_domain::ports::{Accelerator, DomainDefinition};
use ghost_domain::vm::Vm;
use ghost_domain::{Error, ErrorCode, Result, VmId};

use super::METADATA_NAMESPACE;
use super::metadata;
use super::tree::Element;

/// What of a domain depends on the hypervisor rather than on the VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DomainProfile {
    /// `kvm`, `qemu` (software emulation), or `test` for libvirt's test driver.
    pub(crate) domain_type: &'static str,
    /// The QEMU binary; `None` leaves the choice to libvirt.
    pub(crate) emulator: Option<String>,
}

impl DomainProfile {
    /// The profile of QEMU with an accelerator.
    pub(crate) const fn qemu(accelerator: Accelerator, emulator: Option<String>) -> Self {
        Self {
            domain_type: match accelerator {
                Accelerator::Kvm => "kvm",
                Accelerator::Tcg => "qemu",
            },
            emulator,
        }
    }

    /// The profile of libvirt's test driver.
    pub(crate) const fn test() -> Self {
        Self {
            domain_type: "test",
            emulator: None,
        }
    }
}

/// A path as XML carries it: paths of ours are UTF-8, and one that is not would silently become
/// another file.
fn path(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| {
        Error::new(ErrorCode::InvalidArgument, "a path is not valid UTF-8")
            .because(path.display())
            .hint("choose a data directory with a plain name: agent.data_dir")
    })
}

/// CPU features that make a guest slower under software emulation.
const SLOW_WHEN_EMULATED: [&str; 2] = ["erms", "fsrm"];

/// Renders the domain.
///
/// # Errors
/// `InvalidArgument` when a path or a libvirt network's name cannot stand in XML, or the number of
/// networks is not that of the interfaces.
pub(crate) fn domain_xml(
    definition: &DomainDefinition,
    profile: &DomainProfile,
) -> Result<Element> {
    let vm = &definition.vm;
    let spec = &vm.spec;
    if definition.libvirt_networks.len() != spec.interfaces.len() {
        return Err(Error::internal(
            "a domain needs one libvirt network for each of its interfaces",
        ));
    }
    let cpu = match profile.domain_type {
        "kvm" => Some(Element::new("cpu").with("mode", "host-passthrough")),
        // Software emulation offers all that it can emulate; the host's CPU does not matter. But for
        // "fast strings": a kernel or libc that sees them copies and clears memory with `rep movsb`,
        // which is emulated byte by byte. Without them a guest clears a page, and so starts a
        // program or fills a file, two to six times as fast.
        "qemu" => Some(Element::new("cpu").with("mode", "maximum").children(
            SLOW_WHEN_EMULATED.map(|feature| {
                Element::new("feature")
                    .with("policy", "disable")
                    .with("name", feature)
            }),
        )),
        _ => None,
    };
    let (base, base_format) = &definition.base_image;
    // The chain is spelled out and closed by an empty element: libvirt probes nothing (a guest
    // could have written a header that points at a file of the host).
    // libvirt gives every file of the chain to QEMU's user when the VM starts, and leaves backing
    // files there. This one is shared: a guest that breaks out of one QEMU could write into the
    // disks of all others. QEMU only reads it, which its mode allows to everybody.
    // https://libvirt.org/formatdomain.html#security-label
    let keep_owner = Element::new("seclabel")
        .with("model", "dac")
        .with("relabel", "no");
    let backing = Element::new("backingStore")
        .with("type", "file")
        .child(Element::new("format").with("type", base_format.as_str()))
        .child(
            Element::new("source")
                .with("file", path(base)?)
                .child(keep_owner),
        )
        .child(Element::new("backingStore"));
    let disk = Element::new("disk")
        .with("type", "file")
        .with("device", "disk")
        .child(
            Element::new("driver")
                .with("name", "qemu")
                .with("type", "qcow2")
                .with("discard", "unmap"),
        )
        .child(Element::new("source").with("file", path(&definition.disk)?))
        .child(backing)
        .child(
            Element::new("target")
                .with("dev", "vda")
                .with("bus", "virtio"),
        );
    let seed = Element::new("disk")
        .with("type", "file")
        .with("device", "disk")
        .child(
            Element::new("driver")
                .with("name", "qemu")
                .with("type", "raw"),
        )
        .child(Element::new("source").with("file", path(&definition.seed)?))
        .child(Element::new("backingStore"))
        .child(
            Element::new("target")
                .with("dev", "vdb")
                .with("bus", "virtio"),
        )
        .child(Element::new("readonly"));
    let interfaces = spec
        .interfaces
        .iter()
        .zip(&definition.libvirt_networks)
        .map(|(interface, network)| {
            Element::new("interface")
                .with("type", "network")
                .child(Element::new("mac").with("address", interface.mac.to_string()))
                .child(Element::new("source").with("network", network))
                .child(Element::new("model").with("type", "virtio"))
        });
    let socket = path(&definition.console_socket)?;
    let log = path(&definition.console_log)?;
    let console = |name: &str, target: Element| {
        Element::new(name)
            .with("type", "unix")
            .child(
                Element::new("source")
                    .with("mode", "bind")
                    .with("path", socket),
            )
            .child(Element::new("log").with("file", log).with("append", "on"))
            .child(target)
    };
    let guest_socket = path(&definition.guest_socket)?;
    let channel = |name: &str, socket: Option<&str>| {
        let source = Element::new("source").with("mode", "bind");
        Element::new("channel")
            .with("type", "unix")
            .child(match socket {
                Some(socket) => source.with("path", socket),
                None => source,
            })
            .child(
                Element::new("target")
                    .with("type", "virtio")
                    .with("name", name),
            )
    };
    let devices = Element::new("devices")
        .children(
            profile
                .emulator
                .as_ref()
                .map(|emulator| Element::new("emulator").text(emulator)),
        )
        .child(disk)
        .child(seed)
        .children(interfaces)
        .child(console(
            "serial",
            Element::new("target")
                .with("type", "isa-serial")
                .with("port", "0"),
        ))
        .child(console(
            "console",
            Element::new("target")
                .with("type", "serial")
                .with("port", "0"),
        ))
        .child(channel("org.qemu.guest_agent.0", None))
        .child(channel("org.ghost.agent.0", Some(guest_socket)))
        // A server has no use for the USB controller that libvirt would add.
        .child(
            Element::new("controller")
                .with("type", "usb")
                .with("model", "none"),
        )
        .child(Element::new("video").child(Element::new("model").with("type", "none")))
        .child(
            Element::new("rng").with("model", "virtio").child(
                Element::new("backend")
                    .with("model", "random")
                    .text("/dev/urandom"),
            ),
        )
        .child(
            Element::new("memballoon")
                .with("model", "virtio")
                .child(Element::new("stats").with("period", "10")),
        )
        // pvpanic tells us of a guest panic at once.
        .child(Element::new("panic").with("model", "isa"));
    Ok(Element::new("domain")
        .with("type", profile.domain_type)
        .child(Element::new("name").text(vm.name.as_str()))
        .child(Element::new("uuid").text(vm.id.to_string()))
        .child(Element::new("metadata").child(metadata::render(
            vm,
            &definition.disk,
            &definition.libvirt_networks,
        )))
        .child(
            Element::new("memory")
                .with("unit", "bytes")
                .text(spec.memory.bytes().to_string()),
        )
        .child(
            Element::new("vcpu")
                .with("placement", "static")
                .text(spec.vcpus.to_string()),
        )
        .child(
            Element::new("os")
                .child(
                    Element::new("type")
                        .with("arch", "x86_64")
                        .with("machine", "q35")
                        .text("hvm"),
                )
                .child(Element::new("boot").with("dev", "hd")),
        )
        .child(
            Element::new("features")
                .child(Element::new("acpi"))
                .child(Element::new("apic")),
        )
        .children(cpu)
        .child(Element::new("clock").with("offset", "utc"))
        .child(Element::new("on_poweroff").text("destroy"))
        .child(Element::new("on_reboot").text("restart"))
        // A crash is seen as one, and our own policy decides about a restart.
        .child(Element::new("on_crash").text("destroy"))
        .child(devices))
}

/// What we make of a domain's XML.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Parsed {
    /// The domain's UUID.
    pub(crate) id: VmId,
    /// Its name.
    pub(crate) name: String,
    /// It carries our metadata element, and that element means this domain.
    pub(crate) ours: bool,
    /// The record in the metadata, if it is readable.
    pub(crate) record: Option<Vm>,
    /// How the hardware differs from the metadata.
    pub(crate) drift: Vec<String>,
    /// The files that it is made of, by the metadata and by the devices.
    files: Vec<PathBuf>,
}

impl Parsed {
    /// Whether anything of the domain lies below `folder`: several agents may share one libvirt,
    /// each with VMs in its own folder, and one that is edited keeps at least one of its files.
    pub(crate) fn lies_in(&self, folder: &Path) -> bool {
        self.files.iter().any(|file| file.starts_with(folder))
    }
}

/// Reads a domain's inactive XML.
///
/// # Errors
/// `HypervisorFailed` when it is not a domain at all.
pub(crate) fn parse_domain(xml: &str) -> Result<Parsed> {
    let root = Element::parse(xml)?;
    let text = |name: &str| root.find(name).map(|element| element.text.clone());
    let broken = |what: &str| {
        Error::new(ErrorCode::HypervisorFailed, "cannot read libvirt's XML").because(what)
    };
    if root.name != "domain" {
        return Err(broken("its root is not a domain"));
    }
    let id: VmId = text("uuid")
        .and_then(|uuid| uuid.parse().ok())
        .ok_or_else(|| broken("the domain has no UUID"))?;
    let name = text("name").ok_or_else(|| broken("the domain has no name"))?;
    let element = root
        .find("metadata")
        .and_then(|metadata| metadata.all_in(METADATA_NAMESPACE, "vm").next());
    let Some(element) = element else {
        return Ok(Parsed {
            id,
            name,
            ours: false,
            record: None,
            drift: Vec::new(),
            files: Vec::new(),
        });
    };
    // Tools that copy a domain copy its metadata too; the copy is not our VM.
    if metadata::id(element).is_some_and(|theirs| theirs != id) {
        return Ok(Parsed {
            id,
            name,
            ours: false,
            record: None,
            drift: Vec::new(),
            files: Vec::new(),
        });
    }
    let (record, drift) = metadata::read(element).map_or_else(
        || {
            (
                None,
                vec!["metadata: Ghost's own element is damaged".to_owned()],
            )
        },
        |expected| {
            let drift = drift(&root, &name, &expected);
            (Some(expected.vm), drift)
        },
    );
    Ok(Parsed {
        id,
        name,
        ours: true,
        record,
        drift,
        files: files(&root, element),
    })
}

/// The files named by the metadata and by disks and consoles.
fn files(root: &Element, metadata: &Element) -> Vec<PathBuf> {
    let disks = root
        .find("devices")
        .into_iter()
        .flat_map(|devices| devices.all("disk"))
        .filter_map(|disk| disk.find("source")?.attribute("file").map(PathBuf::from));
    let consoles = root
        .find("devices")
        .into_iter()
        .flat_map(|devices| devices.all("serial"))
        .filter_map(|serial| serial.find("source")?.attribute("path").map(PathBuf::from));
    metadata::disk(metadata)
        .into_iter()
        .chain(disks)
        .chain(consoles)
        .collect()
}

fn drift(root: &Element, name: &str, expected: &metadata::Metadata) -> Vec<String> {
    let mut lines = Vec::new();
    let mut differ = |what: &str, libvirt: String, record: String| {
        if libvirt != record {
            lines.push(format!(
                "{what}: libvirt has {libvirt}, the record has {record}"
            ));
        }
    };
    let spec = &expected.vm.spec;
    differ("name", name.to_owned(), expected.vm.name.to_string());
    differ(
        "vcpus",
        root.find("vcpu")
            .map_or_else(|| "none".to_owned(), |vcpu| vcpu.text.clone()),
        spec.vcpus.to_string(),
    );
    // libvirt keeps whole KiB and rounds up.
    let kib = spec.memory.bytes().div_ceil(1024);
    differ(
        "memory",
        root.find("memory")
            .and_then(memory_kib)
            .map_or_else(|| "none".to_owned(), |kib| format!("{kib} KiB")),
        format!("{kib} KiB"),
    );
    let devices = root.find("devices");
    let disks: Vec<&Element> = devices
        .map(|devices| {
            devices
                .all("disk")
                .filter(|disk| disk.find("readonly").is_none())
                .collect()
        })
        .unwrap_or_default();
    let shown = |disk: &Element| {
        disk.find("source")
            .and_then(|source| source.attribute("file"))
            .unwrap_or("something that is not a file")
            .to_owned()
    };
    differ(
        "disk",
        if disks.is_empty() {
            "none".to_owned()
        } else {
            disks
                .iter()
                .map(|disk| shown(disk))
                .collect::<Vec<_>>()
                .join(", ")
        },
        expected.disk.to_string_lossy().into_owned(),
    );
    let found: Vec<(String, String)> = devices
        .map(|devices| {
            devices
                .all("interface")
                .map(|interface| {
                    let mac = interface
                        .find("mac")
                        .and_then(|mac| mac.attribute("address"))
                        .unwrap_or("none");
                    let network = interface
                        .find("source")
                        .and_then(|source| source.attribute("network"))
                        .unwrap_or("none");
                    (mac.to_ascii_lowercase(), network.to_owned())
                })
                .collect()
        })
        .unwrap_or_default();
    let wanted: Vec<(String, String)> = spec
        .interfaces
        .iter()
        .zip(&expected.libvirt_networks)
        .map(|(interface, network)| (interface.mac.to_string(), network.clone()))
        .collect();
    let nothing = (String::from("none"), String::from("none"));
    for index in 0..found.len().max(wanted.len()) {
        let (found_mac, found_network) = found.get(index).unwrap_or(&nothing);
        let (wanted_mac, wanted_network) = wanted.get(index).unwrap_or(&nothing);
        differ(
            &format!("nic {index} mac"),
            found_mac.clone(),
            wanted_mac.clone(),
        );
        differ(
            &format!("nic {index} network"),
            found_network.clone(),
            wanted_network.clone(),
        );
    }
    lines
}

/// Reads a memory element: libvirt's units, KiB where none is given, whole KiB rounded up.
fn memory_kib(memory: &Element) -> Option<u64> {
    let value: u64 = memory.text.parse().ok()?;
    let unit: u64 = match memory.attribute("unit").unwrap_or("KiB") {
        "b" | "bytes" => 1,
        "KB" => 1_000,
        "k" | "KiB" => 1 << 10,
        "MB" => 1_000_000,
        "M" | "MiB" => 1 << 20,
        "GB" => 1_000_000_000,
        "G" | "GiB" => 1 << 30,
        "TB" => 1_000_000_000_000,
        "T" | "TiB" => 1 << 40,
        _ => return None,
    };
    Some(value.checked_mul(unit)?.div_ceil(1024))
}

#[cfg(test)]
mod tests;
