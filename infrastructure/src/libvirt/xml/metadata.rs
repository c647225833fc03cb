//! Our metadata element: enough of the record to rebuild it when the store is lost, and the
//! hardware as we defined it, against which drift is measured. Cloud-init stays out: it may hold
//! secrets, and every libvirt client can read metadata.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ghost_domain::guest::{GuestInject, GuestPolicy};
use ghost_domain::vm::{
    Autostart, CloudInit, DesiredPower, ImageReference, Lifecycle, NetworkInterface, RestartPolicy,
    Vm, VmSpec,
};
use ghost_domain::{
    ByteSize, Error, ErrorCode, ImageDigest, ImageFormat, ImageName, MacAddress, NetworkName,
    Result, Timestamp, VmId, VmName,
};

use super::METADATA_NAMESPACE;
use super::tree::{Element, is_xml_char};

/// What the metadata element of a domain says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Metadata {
    /// The record, without cloud-init.
    pub(crate) vm: Vm,
    /// The disk as we attached it.
    pub(crate) disk: PathBuf,
    /// For each interface, the libvirt network that we plugged it into.
    pub(crate) libvirt_networks: Vec<String>,
}

fn element(name: &str) -> Element {
    Element::in_namespace(METADATA_NAMESPACE, name)
}

fn millis(duration: Duration) -> String {
    u64::try_from(duration.as_millis())
        .unwrap_or(u64::MAX)
        .to_string()
}

/// Percent-encodes what XML cannot carry, so that any string comes back as it was.
fn encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut buffer = [0u8; 4];
    for c in text.chars() {
        if c != '%' && is_xml_char(c) {
            out.push(c);
        } else {
            for byte in c.encode_utf8(&mut buffer).bytes() {
                out.push('%');
                for digit in [byte >> 4, byte & 15] {
                    out.push(char::from_digit(u32::from(digit), 16).unwrap_or('0'));
                }
            }
        }
    }
    out
}

fn decode(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let mut digit = || char::from(bytes.next()?).to_digit(16);
            let value = digit()? * 16 + digit()?;
            out.push(u8::try_from(value).ok()?);
        } else {
            out.push(byte);
        }
    }
    String::from_utf8(out).ok()
}

/// Renders the element.
pub(crate) fn render(vm: &Vm, disk: &Path, libvirt_networks: &[String]) -> Element {
    let spec = &vm.spec;
    let mut image = element("image").with("name", spec.image.name.as_str());
    if let Some((digest, format)) = &spec.image.content {
        image = image
            .with("sha256", digest.to_string())
            .with("format", format.as_str());
    }
    let restart = match spec.restart_policy {
        RestartPolicy::Never => element("restart").with("policy", "never"),
        RestartPolicy::OnCrash {
            max_restarts,
            window,
        } => element("restart")
            .with("policy", "on-crash")
            .with("max", max_restarts.to_string())
            .with("window_milliseconds", millis(window)),
    };
    let interfaces = spec
        .interfaces
        .iter()
        .enumerate()
        .map(|(index, interface)| {
            element("interface")
                .with("network", interface.network.as_str())
                .with("mac", interface.mac.to_string())
                .with(
                    "libvirt_network",
                    encode(libvirt_networks.get(index).map_or("", String::as_str)),
                )
        });
    let tags = spec.tags.iter().map(|(key, value)| {
        element("tag")
            .with("key", encode(key))
            .with("value", encode(value))
    });
    let mut root = element("vm");
    if let Some(owner) = &vm.owner {
        root = root.with("owner", encode(owner));
    }
    root.with("id", vm.id.to_string())
        .with("name", vm.name.as_str())
        .with("generation", vm.generation.to_string())
        .with("desired", vm.desired.as_str())
        .with(
            "created_at_milliseconds",
            vm.created_at.unix_millis().to_string(),
        )
        .child(
            element("spec")
                .with("vcpus", spec.vcpus.to_string())
                .with("memory_bytes", spec.memory.bytes().to_string())
                .with("disk_bytes", spec.disk.bytes().to_string())
                .with(
                    "delete_protection",
                    if spec.delete_protection { "yes" } else { "no" },
                )
                .with("guest_inject", spec.guest.inject.as_str())
                .with("guest_access", yes_or_no(spec.guest.access))
                .child(image)
                .child(restart)
                .children(spec.autostart.map(|autostart| {
                    element("autostart")
                        .with("order", autostart.order.to_string())
                        .with("delay_milliseconds", millis(autostart.delay))
                }))
                .children(interfaces)
                .children(tags),
        )
        .child(element("disk").with("file", encode(&disk.to_string_lossy())))
}

const fn yes_or_no(yes: bool) -> &'static str {
    if yes { "yes" } else { "no" }
}

/// The element as libvirt hands it out by itself and takes it (virDomainGetMetadata and
/// virDomainSetMetadata strip and add the namespace), with another guest access. `None` where it says
/// that already.
///
/// # Errors
/// `HypervisorFailed` where it is damaged; `InvalidArgument` where it cannot be written.
pub(crate) fn with_guest_access(xml: &str, access: bool) -> Result<Option<String>> {
    let mut root = Element::parse(xml)?;
    root.set_namespace("");
    let spec = root.children.iter_mut().find(|child| child.name == "spec");
    let Some(spec) = spec else {
        return Err(
            Error::new(ErrorCode::HypervisorFailed, "cannot read libvirt's XML")
                .because("our metadata in the domain is damaged"),
        );
    };
    let wanted = yes_or_no(access);
    let known = spec
        .attributes
        .iter_mut()
        .find(|(name, _)| name == "guest_access");
    match known {
        Some((_, value)) if value == wanted => return Ok(None),
        Some((_, value)) => wanted.clone_into(value),
        None => spec
            .attributes
            .push(("guest_access".to_owned(), wanted.to_owned())),
    }
    root.to_xml().map(Some)
}

fn number<T: std::str::FromStr>(element: &Element, name: &str) -> Option<T> {
    element.attribute(name)?.parse().ok()
}

fn one<'a>(parent: &'a Element, name: &'a str) -> Option<&'a Element> {
    parent.all_in(METADATA_NAMESPACE, name).next()
}

/// Reads the id alone, for domains whose metadata is otherwise damaged.
pub(crate) fn id(vm: &Element) -> Option<VmId> {
    vm.attribute("id")?.parse().ok()
}

/// Reads the disk alone, likewise.
pub(crate) fn disk(vm: &Element) -> Option<PathBuf> {
    Some(PathBuf::from(decode(one(vm, "disk")?.attribute("file")?)?))
}

/// Reads the element; `None` where anything that we always write is missing or malformed.
pub(crate) fn read(vm: &Element) -> Option<Metadata> {
    let spec = one(vm, "spec")?;
    let image = one(spec, "image")?;
    let content = match image.attribute("sha256") {
        None => None,
        Some(digest) => Some((
            digest.parse::<ImageDigest>().ok()?,
            match image.attribute("format")? {
                "raw" => ImageFormat::Raw,
                "qcow2" => ImageFormat::Qcow2,
                _ => return None,
            },
        )),
    };
    let restart = one(spec, "restart")?;
    let restart_policy = match restart.attribute("policy")? {
        "never" => RestartPolicy::Never,
        "on-crash" => RestartPolicy::OnCrash {
            max_restarts: number(restart, "max")?,
            window: Duration::from_millis(number(restart, "window_milliseconds")?),
        },
        _ => return None,
    };
    let autostart = match one(spec, "autostart") {
        None => None,
        Some(autostart) => Some(Autostart {
            order: number(autostart, "order")?,
            delay: Duration::from_millis(number(autostart, "delay_milliseconds")?),
        }),
    };
    // Domains of before there was a guest agent do not say it.
    let guest = GuestPolicy {
        inject: match spec.attribute("guest_inject") {
            None => GuestInject::default(),
            Some(text) => text.parse().ok()?,
        },
        access: match spec.attribute("guest_access") {
            None | Some("yes") => true,
            Some("no") => false,
            Some(_) => return None,
        },
    };
    let mut interfaces = Vec::new();
    let mut libvirt_networks = Vec::new();
    for interface in spec.all_in(METADATA_NAMESPACE, "interface") {
        interfaces.push(NetworkInterface {
            network: NetworkName::new(interface.attribute("network")?).ok()?,
            mac: interface.attribute("mac")?.parse::<MacAddress>().ok()?,
        });
        libvirt_networks.push(decode(interface.attribute("libvirt_network")?)?);
    }
    let mut tags = BTreeMap::new();
    for tag in spec.all_in(METADATA_NAMESPACE, "tag") {
        tags.insert(
            decode(tag.attribute("key")?)?,
            decode(tag.attribute("value")?)?,
        );
    }
    Some(Metadata {
        vm: Vm {
            id: id(vm)?,
            name: VmName::new(vm.attribute("name")?).ok()?,
            generation: number(vm, "generation")?,
            spec: VmSpec {
                vcpus: number(spec, "vcpus")?,
                memory: ByteSize::from_bytes(number(spec, "memory_bytes")?),
                image: ImageReference {
                    name: ImageName::new(image.attribute("name")?).ok()?,
                    content,
                },
                disk: ByteSize::from_bytes(number(spec, "disk_bytes")?),
                interfaces,
                autostart,
                restart_policy,
                delete_protection: match spec.attribute("delete_protection")? {
                    "yes" => true,
                    "no" => false,
                    _ => return None,
                },
                guest,
                tags,
            },
            cloud_init: CloudInit::default(),
            desired: match vm.attribute("desired")? {
                "running" => DesiredPower::Running,
                "stopped" => DesiredPower::Stopped,
                "paused" => DesiredPower::Paused,
                _ => return None,
            },
            lifecycle: Lifecycle::Ready,
            created_at: Timestamp::from_unix_millis(number(vm, "created_at_milliseconds")?),
            registered_addresses: Vec::new(),
            crash_restarts: Vec::new(),
            owner: match vm.attribute("owner") {
                None => None,
                Some(owner) => Some(decode(owner)?),
            },
        },
        disk: PathBuf::from(decode(one(vm, "disk")?.attribute("file")?)?),
        libvirt_networks,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn damaged_escapes_are_refused() {
        for bad in ["%", "%1", "%zz", "%ff"] {
            assert_eq!(decode(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_string_comes_back(text in any::<String>()) {
            let encoded = encode(&text);
            prop_assert!(encoded.chars().all(is_xml_char));
            prop_assert_eq!(decode(&encoded), Some(text));
        }
    }
}
