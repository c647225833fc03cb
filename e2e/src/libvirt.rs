//! libvirt with the eyes and hands of an outsider: what is there, and what somebody does behind
//! the agent's back.

use std::path::Path;
use std::process::Command;

use virt::connect::Connect;
use virt::enumutil::Enum;
use virt::sys;

use crate::xml::{DomainXml, read_domain};

/// The hypervisor that the system tests use.
pub const SYSTEM: &str = "qemu:///system";

/// A domain as libvirt has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Domain {
    /// What its XML says; the live one where it runs.
    pub xml: DomainXml,
    /// Whether it has a QEMU process.
    pub active: bool,
    /// Whether it has a definition.
    pub persistent: bool,
    /// libvirt's word for the state, such as `running`.
    pub state: String,
}

/// A DHCP lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The libvirt network.
    pub network: String,
    /// The card.
    pub mac: String,
    /// The address, without the prefix.
    pub address: String,
}

/// All domains of a libvirt.
///
/// # Errors
/// libvirt's own words.
pub fn domains(uri: &str) -> Result<Vec<Domain>, String> {
    let told = |error: virt::error::Error| format!("{uri}: {error}");
    let connection = Connect::open(Some(uri)).map_err(told)?;
    let mut domains = Vec::new();
    for domain in connection.list_all_domains(0).map_err(told)? {
        // One that goes away while we look is not there.
        let (Ok(active), Ok(xml)) = (domain.is_active(), domain.xml_desc(0)) else {
            continue;
        };
        domains.push(Domain {
            xml: read_domain(&xml),
            active,
            persistent: domain.is_persistent().unwrap_or(false),
            state: domain.info().map_or_else(
                |_| String::new(),
                |info| match info.state {
                    Enum::Known(state) => format!("{state:?}").to_lowercase(),
                    other => format!("{other:?}"),
                },
            ),
        });
    }
    Ok(domains)
}

/// The leases of a network, by `virsh`: its table is stable and needs no call that the binding
/// lacks.
///
/// # Errors
/// What virsh says.
pub fn leases(uri: &str, network: &str) -> Result<Vec<Lease>, String> {
    let table = virsh(uri, &["net-dhcp-leases", network])?;
    Ok(table
        .lines()
        .filter_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            // Date, time, MAC, protocol, address with prefix, host name, client id.
            let (mac, address) = (words.get(2)?, words.get(4)?);
            mac.contains(':').then(|| Lease {
                network: network.to_owned(),
                mac: (*mac).to_owned(),
                address: address.split('/').next().unwrap_or_default().to_owned(),
            })
        })
        .collect())
}

/// Runs virsh, as an administrator would.
///
/// # Errors
/// What it wrote to stderr.
pub fn virsh(uri: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new("virsh")
        .args(["-c", uri])
        .args(arguments)
        .env("LC_ALL", "C")
        .output()
        .map_err(|error| format!("virsh: {error}"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(format!(
            "virsh {}: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        ))
    }
}

/// Removes every domain of which a file lies below `folder`, running or not. For the end of a
/// test, however it ends; what cannot be removed is told.
pub fn remove_domains_below(uri: &str, folder: &Path) -> Vec<String> {
    let mut problems = Vec::new();
    let connection = match Connect::open(Some(uri)) {
        Ok(connection) => connection,
        Err(error) => return vec![error.to_string()],
    };
    for domain in connection.list_all_domains(0).unwrap_or_default() {
        let Ok(xml) = domain.xml_desc(0) else {
            continue;
        };
        let xml = read_domain(&xml);
        if !xml.files.iter().any(|file| file.starts_with(folder)) {
            continue;
        }
        if domain.is_active().unwrap_or(false)
            && let Err(error) = domain.destroy()
        {
            problems.push(error.to_string());
        }
        if domain.is_persistent().unwrap_or(false)
            && let Err(error) = domain.undefine_flags(sys::VIR_DOMAIN_UNDEFINE_MANAGED_SAVE)
        {
            problems.push(error.to_string());
        }
        // libvirt keeps the QEMU log of every name it ever saw.
        if !xml.name.contains('/') {
            drop(std::fs::remove_file(format!(
                "/var/log/libvirt/qemu/{}.log",
                xml.name
            )));
        }
    }
    problems
}
