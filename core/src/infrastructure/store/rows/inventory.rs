//! What a host last said of itself. There are as many as hosts, and each names all of its VMs.

use std::collections::BTreeMap;

use ghost_domain::fleet::VmSummary;
use ghost_domain::vm::{DesiredPower, VmState};
use ghost_domain::{ByteSize, Error, HostResources, VmId};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{DemandRow, time, unknown};
use crate::domain::{HostHealth, Inventory};

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct InventoryRow {
    vms: Vec<VmRow>,
    total: ResourcesRow,
    allocatable: DemandRow,
    committed: DemandRow,
    memory_available: u64,
    load_one_minute: f64,
    health: HealthRow,
    at: i64,
}

/// CPUs, memory, disk, free disk.
#[derive(Clone, Copy, Serialize, Deserialize)]
struct ResourcesRow(u32, u64, u64, u64);

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct HealthRow {
    agent_state: String,
    hypervisor_connected: bool,
    store_writable: bool,
    warnings: Vec<String>,
    lockdown: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct VmRow {
    id: Uuid,
    name: String,
    state: String,
    state_reason: String,
    desired: String,
    demand: DemandRow,
    image: String,
    addresses: Vec<String>,
    generation: u64,
    created_at: i64,
    tags: BTreeMap<String, String>,
    owner: Option<String>,
}

impl From<&Inventory> for InventoryRow {
    fn from(inventory: &Inventory) -> Self {
        let Inventory {
            vms,
            total,
            allocatable,
            committed,
            memory_available,
            load_one_minute,
            health,
            at,
        } = inventory;
        let HostResources {
            cpus,
            memory,
            disk,
            disk_free,
        } = *total;
        let HostHealth {
            agent_state,
            hypervisor_connected,
            store_writable,
            warnings,
            lockdown,
        } = health.clone();
        Self {
            vms: vms.values().map(VmRow::from).collect(),
            total: ResourcesRow(cpus, memory.bytes(), disk.bytes(), disk_free.bytes()),
            allocatable: (*allocatable).into(),
            committed: (*committed).into(),
            memory_available: memory_available.bytes(),
            load_one_minute: *load_one_minute,
            health: HealthRow {
                agent_state,
                hypervisor_connected,
                store_writable,
                warnings,
                lockdown,
            },
            at: at.unix_millis(),
        }
    }
}

impl TryFrom<InventoryRow> for Inventory {
    type Error = Error;

    fn try_from(row: InventoryRow) -> Result<Self, Error> {
        let InventoryRow {
            vms,
            total: ResourcesRow(cpus, memory, disk, disk_free),
            allocatable,
            committed,
            memory_available,
            load_one_minute,
            health:
                HealthRow {
                    agent_state,
                    hypervisor_connected,
                    store_writable,
                    warnings,
                    lockdown,
                },
            at,
        } = row;
        Ok(Self {
            vms: vms
                .into_iter()
                .map(|vm| Ok((VmId::from_uuid(vm.id), vm.try_into()?)))
                .collect::<Result<_, Error>>()?,
            total: HostResources {
                cpus,
                memory: ByteSize::from_bytes(memory),
                disk: ByteSize::from_bytes(disk),
                disk_free: ByteSize::from_bytes(disk_free),
            },
            allocatable: allocatable.into(),
            committed: committed.into(),
            memory_available: ByteSize::from_bytes(memory_available),
            load_one_minute,
            health: HostHealth {
                agent_state,
                hypervisor_connected,
                store_writable,
                warnings,
                lockdown,
            },
            at: time(at),
        })
    }
}

impl From<&VmSummary> for VmRow {
    fn from(vm: &VmSummary) -> Self {
        let VmSummary {
            id,
            name,
            state,
            state_reason,
            desired,
            demand,
            image,
            addresses,
            generation,
            created_at,
            tags,
            owner,
        } = vm.clone();
        Self {
            id: id.uuid(),
            name,
            state: state.as_str().to_owned(),
            state_reason,
            desired: desired.as_str().to_owned(),
            demand: demand.into(),
            image,
            addresses,
            generation,
            created_at: created_at.unix_millis(),
            tags,
            owner,
        }
    }
}

impl TryFrom<VmRow> for VmSummary {
    type Error = Error;

    fn try_from(row: VmRow) -> Result<Self, Error> {
        let VmRow {
            id,
            name,
            state,
            state_reason,
            desired,
            demand,
            image,
            addresses,
            generation,
            created_at,
            tags,
            owner,
        } = row;
        let powers = [
            DesiredPower::Running,
            DesiredPower::Stopped,
            DesiredPower::Paused,
        ];
        Ok(Self {
            id: VmId::from_uuid(id),
            name,
            state: VmState::ALL
                .into_iter()
                .find(|one| one.as_str() == state)
                .ok_or_else(|| unknown("the state", &state))?,
            state_reason,
            desired: powers
                .into_iter()
                .find(|one| one.as_str() == desired)
                .ok_or_else(|| unknown("the wanted state", &desired))?,
            demand: demand.into(),
            image,
            addresses,
            generation,
            created_at: time(created_at),
            tags,
            owner,
        })
    }
}
