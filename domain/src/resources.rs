//! What the host has, what its owner keeps, and what is left for VMs.
//!
//! Capacity is a pure function of the records: nothing is counted up and down, so nothing drifts.

use crate::{ByteSize, Error, ErrorCode};

/// What the host has, read from the system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct HostResources {
    /// Logical CPUs that the agent may use.
    pub cpus: u32,
    /// Physical memory.
    pub memory: ByteSize,
    /// Size of the file system that holds the VMs' disks.
    pub disk: ByteSize,
    /// Free space on it for an unprivileged user.
    pub disk_free: ByteSize,
}

/// What stays with the owner of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Reserved {
    /// Logical CPUs.
    pub cpus: u32,
    /// Memory.
    pub memory: ByteSize,
    /// Disk space.
    pub disk: ByteSize,
}

/// How many times a resource may be promised, in percent: 100 promises each unit once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overcommit {
    /// Virtual CPUs for each hundred real ones.
    pub cpu_percent: u32,
    /// Memory.
    pub memory_percent: u32,
    /// Disk: qcow2 grows as it is written, so the sum of the virtual sizes may exceed the disk.
    pub disk_percent: u32,
}

impl Default for Overcommit {
    fn default() -> Self {
        Self {
            cpu_percent: 400,
            memory_percent: 100,
            disk_percent: 100,
        }
    }
}

/// What a VM asks for, or all of them together hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Demand {
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory.
    pub memory: ByteSize,
    /// Disk: virtual size.
    pub disk: ByteSize,
}

impl Demand {
    /// The sum, saturating.
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        Self {
            cpus: self.cpus.saturating_add(other.cpus),
            memory: self.memory.saturating_add(other.memory),
            disk: self.disk.saturating_add(other.disk),
        }
    }
}

/// What VMs may have in all, and how much of it is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// The most a single VM may have of CPUs: the real ones that are not reserved.
    pub cpus_per_vm: u32,
    /// What VMs may have together.
    pub allocatable: Demand,
    /// What they hold: CPUs and memory of running (or starting) VMs, disks of all VMs.
    pub committed: Demand,
}

impl Capacity {
    /// Computes the capacity.
    ///
    /// `committed` is summed over the records by the caller; `disk_held` is what the VMs' disks
    /// occupy today. Space that others fill on the same file system is not ours to promise:
    /// what is allocatable is the free space plus what the VMs already hold.
    pub fn compute(
        host: HostResources,
        reserved: Reserved,
        overcommit: Overcommit,
        committed: Demand,
        disk_held: ByteSize,
    ) -> Self {
        let cpus_per_vm = host.cpus.saturating_sub(reserved.cpus);
        let cpus = u64::from(cpus_per_vm) * u64::from(overcommit.cpu_percent) / 100;
        Self {
            cpus_per_vm,
            allocatable: Demand {
                cpus: u32::try_from(cpus).unwrap_or(u32::MAX),
                memory: scale(
                    host.memory.saturating_sub(reserved.memory),
                    overcommit.memory_percent,
                ),
                disk: scale(
                    host.disk_free
                        .saturating_add(disk_held)
                        .saturating_sub(reserved.disk),
                    overcommit.disk_percent,
                ),
            },
            committed,
        }
    }

    /// What is left.
    pub const fn free(&self) -> Demand {
        Demand {
            cpus: self.allocatable.cpus.saturating_sub(self.committed.cpus),
            memory: self
                .allocatable
                .memory
                .saturating_sub(self.committed.memory),
            disk: self.allocatable.disk.saturating_sub(self.committed.disk),
        }
    }

    /// Admits a demand or says what is missing.
    ///
    /// # Errors
    /// [`ErrorCode::InsufficientResources`] naming what is free and what was asked, one field
    /// violation for each resource that does not suffice.
    pub fn admit(&self, demand: Demand) -> Result<(), Error> {
        let free = self.free();
        let mut lacks: Vec<(&str, String)> = Vec::new();
        if demand.cpus > self.cpus_per_vm {
            lacks.push((
                "vcpus",
                format!(
                    "{} vCPUs asked, one VM can have {}",
                    demand.cpus, self.cpus_per_vm
                ),
            ));
        } else if demand.cpus > free.cpus {
            lacks.push((
                "vcpus",
                format!(
                    "{} vCPUs asked, {} of {} free",
                    demand.cpus, free.cpus, self.allocatable.cpus
                ),
            ));
        }
        if demand.memory > free.memory {
            lacks.push((
                "memory_bytes",
                format!(
                    "{} of memory asked, {} of {} free",
                    demand.memory, free.memory, self.allocatable.memory
                ),
            ));
        }
        if demand.disk > free.disk {
            lacks.push((
                "disk_bytes",
                format!(
                    "{} of disk asked, {} of {} free",
                    demand.disk, free.disk, self.allocatable.disk
                ),
            ));
        }
        if lacks.is_empty() {
            return Ok(());
        }
        let cause = lacks
            .iter()
            .map(|(_, text)| text.as_str())
            .collect::<Vec<_>>()
            .join("; ");
        let mut error = Error::new(ErrorCode::InsufficientResources, "the host has not enough left for VMs")
            .because(cause)
            .hint("ask for less, stop or delete a VM (ghostctl list), or lower resources.reserved in the agent's configuration");
        for (field, text) in lacks {
            error = error.field(field, text);
        }
        Err(error)
    }
}

fn scale(size: ByteSize, percent: u32) -> ByteSize {
    let scaled = u128::from(size.bytes()) * u128::from(percent) / 100;
    ByteSize::from_bytes(u64::try_from(scaled).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn host() -> HostResources {
        HostResources {
            cpus: 4,
            memory: ByteSize::from_gib(8),
            disk: ByteSize::from_gib(100),
            disk_free: ByteSize::from_gib(40),
        }
    }

    fn capacity(committed: Demand) -> Capacity {
        let reserved = Reserved {
            cpus: 1,
            memory: ByteSize::from_gib(2),
            disk: ByteSize::from_gib(10),
        };
        Capacity::compute(
            host(),
            reserved,
            Overcommit::default(),
            committed,
            ByteSize::from_gib(5),
        )
    }

    #[test]
    fn the_owners_share_is_never_given_away() {
        let capacity = capacity(Demand::default());
        assert_eq!(capacity.cpus_per_vm, 3);
        assert_eq!(capacity.allocatable.cpus, 12);
        assert_eq!(capacity.allocatable.memory, ByteSize::from_gib(6));
        assert_eq!(capacity.allocatable.disk, ByteSize::from_gib(35));
    }

    #[test]
    fn a_refusal_says_what_is_free_and_what_was_asked() {
        let capacity = capacity(Demand {
            cpus: 2,
            memory: ByteSize::from_gib(5),
            disk: ByteSize::ZERO,
        });
        let error = capacity
            .admit(Demand {
                cpus: 4,
                memory: ByteSize::from_gib(2),
                disk: ByteSize::from_gib(50),
            })
            .unwrap_err();
        assert_eq!(error.code(), ErrorCode::InsufficientResources);
        let cause = error.cause().unwrap();
        assert!(
            cause.contains("4 vCPUs asked, one VM can have 3"),
            "{cause}"
        );
        assert!(
            cause.contains("2 GiB of memory asked, 1 GiB of 6 GiB free"),
            "{cause}"
        );
        assert!(
            cause.contains("50 GiB of disk asked, 35 GiB of 35 GiB free"),
            "{cause}"
        );
        assert_eq!(error.violations().len(), 3);
    }

    proptest! {
        #[test]
        fn what_is_admitted_fits(cpus in 0u32..64, memory: u64, disk: u64, held_cpus in 0u32..64, held: u64) {
            let committed = Demand { cpus: held_cpus, memory: ByteSize::from_bytes(held), disk: ByteSize::from_bytes(held) };
            let capacity = capacity(committed);
            let demand = Demand { cpus, memory: ByteSize::from_bytes(memory), disk: ByteSize::from_bytes(disk) };
            if capacity.admit(demand).is_ok() {
                let after = committed.plus(demand);
                prop_assert!(cpus == 0 || after.cpus <= capacity.allocatable.cpus);
                prop_assert!(memory == 0 || after.memory <= capacity.allocatable.memory);
                prop_assert!(disk == 0 || after.disk <= capacity.allocatable.disk);
            }
        }
    }
}
