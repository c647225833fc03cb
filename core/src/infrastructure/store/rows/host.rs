//! Hosts, their owners, replicas.

use std::collections::BTreeMap;

use ghost_domain::fleet::FleetFacts;
use ghost_domain::{Error, HostId, HostName, TenantName};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Hash, millis, time, times};
use crate::domain::{HostLife, HostRecord, Ownership, Replica};

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct HostRow {
    id: Uuid,
    name: String,
    tenant: String,
    labels: BTreeMap<String, String>,
    cordoned: Option<String>,
    life: LifeRow,
    certificate_generation: u64,
    key_hash: Hash,
    previous_key_hash: Option<Hash>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    machine: Option<Hash>,
    certificate_expires_at: i64,
    enrolled_at: i64,
    agent_version: String,
    permissions: String,
    facts: FactsRow,
    last_heard_at: Option<i64>,
    command_generation: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum LifeRow {
    Active,
    Locked { since: i64, reason: String },
    Revoked { since: i64 },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FactsRow {
    hostname: String,
    operating_system: String,
    kernel: String,
    cpu_model: String,
    boot_id: String,
    accelerator: String,
    hypervisor_version: String,
    libvirt_version: String,
}

impl From<&HostRecord> for HostRow {
    fn from(host: &HostRecord) -> Self {
        let HostRecord {
            id,
            name,
            tenant,
            labels,
            cordoned,
            life,
            certificate_generation,
            key_hash,
            previous_key_hash,
            machine,
            certificate_expires_at,
            enrolled_at,
            agent_version,
            permissions,
            facts,
            last_heard_at,
            command_generation,
        } = host;
        Self {
            id: id.uuid(),
            name: name.as_str().to_owned(),
            tenant: tenant.as_str().to_owned(),
            labels: labels.clone(),
            cordoned: cordoned.clone(),
            life: match life {
                HostLife::Active => LifeRow::Active,
                HostLife::Locked { since, reason } => LifeRow::Locked {
                    since: since.unix_millis(),
                    reason: reason.clone(),
                },
                HostLife::Revoked { since } => LifeRow::Revoked {
                    since: since.unix_millis(),
                },
            },
            certificate_generation: *certificate_generation,
            key_hash: Hash(*key_hash),
            previous_key_hash: previous_key_hash.map(Hash),
            machine: machine.map(Hash),
            certificate_expires_at: certificate_expires_at.unix_millis(),
            enrolled_at: enrolled_at.unix_millis(),
            agent_version: agent_version.clone(),
            permissions: permissions.as_str().to_owned(),
            facts: FactsRow::from(facts),
            last_heard_at: millis(*last_heard_at),
            command_generation: *command_generation,
        }
    }
}

impl TryFrom<HostRow> for HostRecord {
    type Error = Error;

    fn try_from(row: HostRow) -> Result<Self, Error> {
        let HostRow {
            id,
            name,
            tenant,
            labels,
            cordoned,
            life,
            certificate_generation,
            key_hash,
            previous_key_hash,
            machine,
            certificate_expires_at,
            enrolled_at,
            agent_version,
            permissions,
            facts,
            last_heard_at,
            command_generation,
        } = row;
        Ok(Self {
            id: HostId::from_uuid(id),
            name: HostName::new(name)?,
            tenant: TenantName::new(tenant)?,
            labels,
            cordoned,
            life: match life {
                LifeRow::Active => HostLife::Active,
                LifeRow::Locked { since, reason } => HostLife::Locked {
                    since: time(since),
                    reason,
                },
                LifeRow::Revoked { since } => HostLife::Revoked { since: time(since) },
            },
            certificate_generation,
            key_hash: key_hash.0,
            previous_key_hash: previous_key_hash.map(|hash| hash.0),
            machine: machine.map(|hash| hash.0),
            certificate_expires_at: time(certificate_expires_at),
            enrolled_at: time(enrolled_at),
            agent_version,
            permissions: permissions.parse()?,
            facts: facts.into(),
            last_heard_at: times(last_heard_at),
            command_generation,
        })
    }
}

impl From<&FleetFacts> for FactsRow {
    fn from(facts: &FleetFacts) -> Self {
        let FleetFacts {
            hostname,
            operating_system,
            kernel,
            cpu_model,
            boot_id,
            accelerator,
            hypervisor_version,
            libvirt_version,
        } = facts.clone();
        Self {
            hostname,
            operating_system,
            kernel,
            cpu_model,
            boot_id,
            accelerator,
            hypervisor_version,
            libvirt_version,
        }
    }
}

impl From<FactsRow> for FleetFacts {
    fn from(row: FactsRow) -> Self {
        let FactsRow {
            hostname,
            operating_system,
            kernel,
            cpu_model,
            boot_id,
            accelerator,
            hypervisor_version,
            libvirt_version,
        } = row;
        Self {
            hostname,
            operating_system,
            kernel,
            cpu_model,
            boot_id,
            accelerator,
            hypervisor_version,
            libvirt_version,
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct OwnerRow {
    host: Uuid,
    replica: String,
    link: u64,
    since: i64,
}

impl From<&Ownership> for OwnerRow {
    fn from(owner: &Ownership) -> Self {
        let Ownership {
            host,
            replica,
            link,
            since,
        } = owner;
        Self {
            host: host.uuid(),
            replica: replica.clone(),
            link: *link,
            since: since.unix_millis(),
        }
    }
}

impl From<OwnerRow> for Ownership {
    fn from(row: OwnerRow) -> Self {
        let OwnerRow {
            host,
            replica,
            link,
            since,
        } = row;
        Self {
            host: HostId::from_uuid(host),
            replica,
            link,
            since: time(since),
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ReplicaRow {
    name: String,
    address: String,
    since: i64,
}

impl From<&Replica> for ReplicaRow {
    fn from(replica: &Replica) -> Self {
        let Replica {
            name,
            address,
            since,
        } = replica;
        Self {
            name: name.clone(),
            address: address.clone(),
            since: since.unix_millis(),
        }
    }
}

impl From<ReplicaRow> for Replica {
    fn from(row: ReplicaRow) -> Self {
        let ReplicaRow {
            name,
            address,
            since,
        } = row;
        Self {
            name,
            address,
            since: time(since),
        }
    }
}
