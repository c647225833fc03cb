//! The little of a libvirt domain's XML that an outsider wants to know. Written anew and not taken
//! from the adapter: an auditor that reads with the eyes of the audited sees what it sees.

use std::path::PathBuf;

use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};

/// The namespace of Ghost's metadata element, a part of the public contract.
pub const METADATA_NAMESPACE: &str = "https://ghost.cloud/xmlns/vm/1";

/// What of a domain's XML matters here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DomainXml {
    /// The UUID.
    pub id: String,
    /// The name.
    pub name: String,
    /// Whether it carries Ghost's metadata.
    pub ghost: bool,
    /// Every file and socket that the devices name.
    pub files: Vec<PathBuf>,
    /// Tap devices; only a running domain has them.
    pub taps: Vec<String>,
    /// MAC addresses of its cards.
    pub macs: Vec<String>,
    /// The libvirt networks that it is plugged into.
    pub networks: Vec<String>,
}

fn attribute(element: &BytesStart<'_>, name: &str) -> Option<String> {
    element.attributes().flatten().find_map(|attribute| {
        (attribute.key.as_ref() == name)
            .then(|| {
                attribute
                    .normalized_value(quick_xml::XmlVersion::Implicit1_0)
                    .ok()
                    .map(|value| value.into_owned())
            })
            .flatten()
    })
}

/// Reads a domain's XML as far as it goes; what is malformed is simply not there.
pub fn read_domain(xml: &str) -> DomainXml {
    let mut domain = DomainXml::default();
    let mut reader = Reader::from_str(xml);
    let mut path: Vec<String> = Vec::new();
    loop {
        match reader.read_event() {
            Ok(Event::Start(element)) => {
                path.push(name_of(&element));
                look(&mut domain, &path, &element);
            }
            Ok(Event::Empty(element)) => {
                path.push(name_of(&element));
                look(&mut domain, &path, &element);
                path.pop();
            }
            Ok(Event::End(_)) => {
                path.pop();
            }
            Ok(Event::Text(text)) => {
                let text = text.trim().to_owned();
                match path.iter().map(String::as_str).collect::<Vec<_>>()[..] {
                    ["domain", "uuid"] => domain.id = text,
                    ["domain", "name"] => domain.name = text,
                    _ => {}
                }
            }
            Ok(Event::Eof) | Err(_) => return domain,
            Ok(_) => {}
        }
    }
}

fn name_of(element: &BytesStart<'_>) -> String {
    element.local_name().as_ref().to_owned()
}

fn look(domain: &mut DomainXml, path: &[String], element: &BytesStart<'_>) {
    let path: Vec<&str> = path.iter().map(String::as_str).collect();
    match path[..] {
        // Whatever prefix libvirt gives it, the namespace stands on the element.
        ["domain", "metadata", "vm"] => {
            domain.ghost |= element.attributes().flatten().any(|attribute| {
                attribute.key.as_ref().starts_with("xmlns")
                    && attribute.value.as_ref() == METADATA_NAMESPACE
            });
        }
        ["domain", "devices", .., "source"] => {
            for name in ["file", "path"] {
                domain
                    .files
                    .extend(attribute(element, name).map(PathBuf::from));
            }
            if path.get(2) == Some(&"interface") {
                domain.networks.extend(attribute(element, "network"));
            }
        }
        ["domain", "devices", "interface", "target"] => {
            domain.taps.extend(attribute(element, "dev"));
        }
        ["domain", "devices", "interface", "mac"] => {
            domain.macs.extend(attribute(element, "address"));
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_running_domain_is_read() {
        let domain = read_domain(
            "<domain type='qemu' id='3'><name>web</name><uuid>5b1a</uuid><metadata>\
             <ghost:vm xmlns:ghost='https://ghost.cloud/xmlns/vm/1' id='5b1a'/></metadata><devices>\
             <disk type='file'><source file='/d/vms/x/disk.qcow2'/><backingStore type='file'>\
             <source file='/d/images/a.qcow2'/></backingStore><target dev='vda'/></disk>\
             <interface type='network'><mac address='52:54:00:00:00:01'/><source network='ghost-default' bridge='b'/>\
             <target dev='vnet7'/></interface><serial type='unix'><source mode='bind' path='/d/c.sock'/></serial>\
             </devices></domain>",
        );
        assert_eq!((domain.id.as_str(), domain.name.as_str()), ("5b1a", "web"));
        assert!(domain.ghost);
        assert_eq!(domain.files.len(), 3);
        assert_eq!(domain.taps, ["vnet7"]);
        assert_eq!(domain.networks, ["ghost-default"]);
        assert_eq!(domain.macs, ["52:54:00:00:00:01"]);
    }

    #[test]
    fn a_stranger_and_rubbish_are_not_ours() {
        assert!(!read_domain("<domain><metadata><vm xmlns='urn:else'/></metadata></domain>").ghost);
        assert_eq!(read_domain("<domain><na"), DomainXml::default());
    }
}
