//! The VMs that a host told of, shared by whoever looks at them.
//!
//! Most heartbeats change load and free memory and no VM, and a list of all hosts is asked for again
//! and again: both share what is there instead of copying it, and a list keeps with it how it wrote
//! it down.

use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, OnceLock};

use ghost_domain::VmId;
use ghost_domain::fleet::VmSummary;

/// As what VMs are written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// As messages.
    Message,
    /// As JSON.
    Json,
}

/// Something written down for each VM, in the order of their ids, one behind the other.
#[derive(Debug, Default)]
pub struct Written {
    /// All of it.
    pub bytes: Box<[u8]>,
    /// Where each part ends.
    pub ends: Box<[u32]>,
}

impl Written {
    /// The parts, in order.
    pub fn parts(&self) -> impl Iterator<Item = &[u8]> {
        let mut begin = 0;
        self.ends.iter().map(move |end| {
            let end = *end as usize;
            let part = self.bytes.get(begin..end).unwrap_or_default();
            begin = end;
            part
        })
    }
}

/// The VMs of a host by id. A copy costs nothing until it is changed.
#[derive(Clone, Debug, Default)]
pub struct ToldVms(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    vms: BTreeMap<VmId, VmSummary>,
    message: OnceLock<Written>,
    json: OnceLock<Written>,
}

/// What was written down is of what stood there before a change.
impl Clone for Inner {
    fn clone(&self) -> Self {
        Self::from(self.vms.clone())
    }
}

impl From<BTreeMap<VmId, VmSummary>> for Inner {
    fn from(vms: BTreeMap<VmId, VmSummary>) -> Self {
        Self {
            vms,
            ..Self::default()
        }
    }
}

impl ToldVms {
    /// How they are written in a form; `write` is asked once, until they change.
    pub fn written(
        &self,
        form: Form,
        write: impl FnOnce(&BTreeMap<VmId, VmSummary>) -> Written,
    ) -> &Written {
        let slot = match form {
            Form::Message => &self.0.message,
            Form::Json => &self.0.json,
        };
        slot.get_or_init(|| write(&self.0.vms))
    }
}

impl Deref for ToldVms {
    type Target = BTreeMap<VmId, VmSummary>;

    fn deref(&self) -> &Self::Target {
        &self.0.vms
    }
}

impl DerefMut for ToldVms {
    fn deref_mut(&mut self) -> &mut Self::Target {
        let inner = Arc::make_mut(&mut self.0);
        inner.message = OnceLock::new();
        inner.json = OnceLock::new();
        &mut inner.vms
    }
}

impl PartialEq for ToldVms {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.0.vms == other.0.vms
    }
}

impl From<BTreeMap<VmId, VmSummary>> for ToldVms {
    fn from(vms: BTreeMap<VmId, VmSummary>) -> Self {
        Self(Arc::new(vms.into()))
    }
}

impl FromIterator<(VmId, VmSummary)> for ToldVms {
    fn from_iter<I: IntoIterator<Item = (VmId, VmSummary)>>(vms: I) -> Self {
        BTreeMap::from_iter(vms).into()
    }
}

impl<'a> IntoIterator for &'a ToldVms {
    type Item = (&'a VmId, &'a VmSummary);
    type IntoIter = std::collections::btree_map::Iter<'a, VmId, VmSummary>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.vms.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(vms: &BTreeMap<VmId, VmSummary>) -> Written {
        let mut bytes = Vec::new();
        let mut ends = Vec::new();
        for vm in vms.values() {
            bytes.extend_from_slice(vm.name.as_bytes());
            ends.push(u32::try_from(bytes.len()).unwrap());
        }
        Written {
            bytes: bytes.into(),
            ends: ends.into(),
        }
    }

    fn shown(vms: &ToldVms) -> Vec<String> {
        vms.written(Form::Message, names)
            .parts()
            .map(|part| String::from_utf8(part.to_vec()).unwrap())
            .collect()
    }

    #[test]
    fn what_was_written_down_goes_with_a_copy_and_ends_with_a_change() {
        let samples = crate::infrastructure::store::sample_inventory(3).vms;
        let written = shown(&samples);
        assert_eq!(written.len(), 3);
        let mut changed = samples.clone();
        let again = changed.written(Form::Message, |_| panic!("it is written already"));
        assert_eq!(again.parts().count(), 3);
        let other = changed.written(Form::Json, |_| Written::default());
        assert_eq!(other.parts().count(), 0);
        let first = *changed.keys().next().unwrap();
        changed.get_mut(&first).unwrap().name = "renamed".into();
        assert_eq!(shown(&changed)[0], "renamed");
        assert_eq!(shown(&changed)[1..], written[1..]);
        assert_eq!(shown(&samples), written, "the copy stays as it was");
        assert!(changed != samples);
        changed.remove(&first);
        assert_eq!(shown(&changed), written[1..]);
        // The only one of its kind is changed in place, and is written anew all the same.
        let mut alone = ToldVms::from(BTreeMap::clone(&samples));
        assert_eq!(shown(&alone), written);
        assert!(alone == samples);
        alone.remove(&first);
        assert_eq!(shown(&alone), written[1..]);
    }
}
