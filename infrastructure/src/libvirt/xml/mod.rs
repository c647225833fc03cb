//! Domain and network XML: written by a typed writer, read as untrusted input.

mod domain;
mod metadata;
mod network;
mod tree;

pub(crate) use domain::{DomainProfile, Parsed, domain_xml, parse_domain};
pub(crate) use metadata::with_guest_access;
pub(crate) use network::{NetworkPlan, ParsedNetwork, network_xml, parse_network, prefix_mask};
pub(crate) use tree::{Element, PREFIX as METADATA_PREFIX};

/// The namespace of our metadata element in domains and networks.
pub const METADATA_NAMESPACE: &str = "https://ghost.cloud/xmlns/vm/1";
