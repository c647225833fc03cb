//! Quotas: computed from records on each admission, never counted up and down.

use ghost_domain::{ByteSize, Demand, HostId, Timestamp};
use uuid::Uuid;

use super::Inventory;

/// The most that a tenant or a user may have; `None`: no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Quota {
    /// VMs.
    pub vms: Option<u32>,
    /// Virtual CPUs.
    pub cpus: Option<u32>,
    /// Memory.
    pub memory: Option<ByteSize>,
    /// Disk: virtual size.
    pub disk: Option<ByteSize>,
}

/// What a tenant or a user has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Usage {
    /// VMs, running or not.
    pub vms: u32,
    /// What all of them ask for, running or not.
    pub demand: Demand,
}

impl Usage {
    /// With one VM more.
    #[must_use]
    pub fn with(self, demand: Demand) -> Self {
        Self {
            vms: self.vms.saturating_add(1),
            demand: self.demand.plus(demand),
        }
    }
}

impl Quota {
    /// The first limit that `usage` exceeds, for people: `4 of 3 VMs`.
    pub fn exceeded_by(&self, usage: &Usage) -> Option<String> {
        let over = |has: u64, most: Option<u64>| most.is_some_and(|most| has > most);
        let demand = usage.demand;
        if over(usage.vms.into(), self.vms.map(Into::into)) {
            return self.vms.map(|most| format!("{} of {most} VMs", usage.vms));
        }
        if over(demand.cpus.into(), self.cpus.map(Into::into)) {
            return self
                .cpus
                .map(|most| format!("{} of {most} virtual CPUs", demand.cpus));
        }
        if over(demand.memory.bytes(), self.memory.map(|most| most.bytes())) {
            return self
                .memory
                .map(|most| format!("{} of {most} of memory", demand.memory));
        }
        if over(demand.disk.bytes(), self.disk.map(|most| most.bytes())) {
            return self
                .disk
                .map(|most| format!("{} of {most} of disk", demand.disk));
        }
        None
    }
}

/// Room that a replica holds in the records for a VM that is being made, so that the other replicas
/// count it before its host tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldRoom {
    /// Which one.
    pub id: Uuid,
    /// Where the VM goes.
    pub host: HostId,
    /// Who made it, `<tenant>/<name>`.
    pub owner: String,
    /// Its name; empty where the host makes one up.
    pub name: String,
    /// Its id, where there is no name to know it by.
    pub vm: Option<String>,
    /// How many VMs it is: none where one that there is grows.
    pub vms: u32,
    /// How much.
    pub demand: Demand,
    /// Until when it counts without a word of its host.
    pub until: Timestamp,
}

/// Where a create went for which a host was found. Written before it is sent, so that whichever
/// replica is asked again sends it there too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SentCreate {
    /// The host.
    pub host: HostId,
    /// How often it was sent, without those that certainly made nothing. At none it may go anywhere.
    pub attempts: u32,
    /// So long it is remembered.
    pub until: Timestamp,
}

impl HeldRoom {
    /// Whether its host tells of the VM.
    pub fn is_told(&self, inventory: &Inventory) -> bool {
        self.vms > 0
            && inventory.vms.values().any(|vm| match &self.vm {
                Some(id) => vm.id.to_string() == *id,
                None => !self.name.is_empty() && vm.name == self.name,
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_reached_and_not_exceeded() {
        let quota = Quota {
            vms: Some(2),
            memory: Some(ByteSize::from_gib(4)),
            ..Quota::default()
        };
        let one = Demand {
            cpus: 64,
            memory: ByteSize::from_gib(2),
            disk: ByteSize::from_gib(900),
        };
        let two = Usage::default().with(one).with(one);
        assert_eq!(quota.exceeded_by(&two), None);
        let third = two.with(Demand::default());
        assert_eq!(quota.exceeded_by(&third).as_deref(), Some("3 of 2 VMs"));
        let larger = Usage {
            vms: 1,
            demand: Demand {
                memory: ByteSize::from_gib(5),
                ..Demand::default()
            },
        };
        assert!(quota.exceeded_by(&larger).unwrap().contains("of memory"));
    }
}
