//! How a host and its VMs are written down, as messages and as JSON.

use std::collections::BTreeMap;
use std::ops::Range;

use ghost_domain::fleet::VmSummary;
use ghost_domain::{Error, Result, Timestamp, VmId};
use ghost_proto::core::v1 as message;
use ghost_proto::view;
use prost::Message;

use crate::application::vms::ListedHost;
use crate::domain::Written;
use crate::presentation::convert;

/// Parts of a VM as a message: `FleetVm.vm` with its key and length.
pub(super) const MESSAGE_PARTS: usize = 1;
/// Parts of a VM as JSON: what stands before what is said of its host, and what behind.
pub(super) const JSON_PARTS: usize = 2;
/// About what one VM takes.
const ONE: usize = 256;

struct Writer {
    bytes: Vec<u8>,
    ends: Vec<u32>,
}

impl Writer {
    fn new(parts: usize) -> Self {
        Self {
            bytes: Vec::with_capacity(parts * ONE),
            ends: Vec::with_capacity(parts),
        }
    }

    fn end(&mut self) {
        // A host has at most some thousands of VMs, and a heartbeat has a most length.
        self.ends
            .push(u32::try_from(self.bytes.len()).unwrap_or(u32::MAX));
    }

    fn done(self) -> Written {
        Written {
            bytes: self.bytes.into(),
            ends: self.ends.into(),
        }
    }
}

/// VMs as the field of a `FleetVm`.
pub(super) fn messages(vms: &BTreeMap<VmId, VmSummary>) -> Written {
    let mut writer = Writer::new(vms.len() * MESSAGE_PARTS);
    for vm in vms.values() {
        let one = message::FleetVm {
            vm: Some(convert::vm_summary(vm)),
            ..message::FleetVm::default()
        };
        // A vector takes whatever comes.
        let _ = one.encode(&mut writer.bytes);
        writer.end();
    }
    writer.done()
}

/// What a `FleetVm` says of the host.
pub(super) fn host_message(host: &ListedHost, now: Timestamp, into: &mut Vec<u8>) {
    // As above.
    let _ = convert::listed_host(host, now).encode(into);
}

/// VMs as what stands around what is said of their host.
pub(super) fn jsons(vms: &BTreeMap<VmId, VmSummary>) -> Written {
    let mut writer = Writer::new(vms.len() * JSON_PARTS);
    for vm in vms.values() {
        let one = message::FleetVm {
            vm: Some(convert::vm_summary(vm)),
            ..message::FleetVm::default()
        };
        let (text, host) = view_of(one);
        writer
            .bytes
            .extend_from_slice(text.get(..host.start).unwrap_or_default());
        writer.end();
        writer
            .bytes
            .extend_from_slice(text.get(host.end..).unwrap_or_default());
        writer.end();
    }
    writer.done()
}

/// What the JSON of a VM says of its host.
pub(super) fn host_json(host: &ListedHost, now: Timestamp, into: &mut Vec<u8>) {
    let (text, host) = view_of(convert::listed_host(host, now));
    into.extend_from_slice(text.get(host).unwrap_or_default());
}

/// The JSON of a VM, and where in it its host is spoken of. Quotes within texts are escaped, so that
/// nothing but the fields themselves looks like them; a test holds the whole against the view.
fn view_of(vm: message::FleetVm) -> (Vec<u8>, Range<usize>) {
    let text = serde_json::to_vec(&view::FleetVm::from(vm)).unwrap_or_default();
    let find = |what: &str, from: usize| {
        let rest = text.get(from..).unwrap_or_default();
        rest.windows(what.len())
            .position(|window| window == what.as_bytes())
            .map_or(text.len(), |found| from + found)
    };
    let begin = find(",\"host\":", 0);
    let end = find(",\"state\":", begin);
    (text, begin..end)
}

/// A list that is longer than any message can be.
pub(super) fn too_long() -> Error {
    Error::new(
        ghost_domain::ErrorCode::PayloadTooLarge,
        "the list is too long for one answer",
    )
    .hint("ask for one tenant or one host")
}

/// The length of a part, as lengths stand in a message.
pub(super) fn fits(length: usize) -> Result<u32> {
    u32::try_from(length).map_err(|_| too_long())
}
