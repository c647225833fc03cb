//! The stored form of a VM.

use std::collections::BTreeMap;
use std::time::Duration;

use ghost_domain::guest::{GuestInject, GuestPolicy};
use ghost_domain::vm::{
    Autostart, CloudInit, DesiredPower, ImageReference, Lifecycle, NetworkInterface, RestartPolicy,
    Vm, VmSpec,
};
use ghost_domain::{
    ByteSize, Error, ErrorCode, ImageDigest, ImageFormat, ImageName, NetworkName, Result,
    Timestamp, VmId, VmName,
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::image::FormatRow;
use super::{Bytes, TryFromRow};

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct VmRow {
    id: Uuid,
    name: String,
    generation: u64,
    spec: SpecRow,
    cloud_init: CloudInitRow,
    desired: DesiredRow,
    lifecycle: LifecycleRow,
    created_at: i64,
    crash_restarts: Vec<i64>,
    /// Since addresses outlast the agent; absent where there are none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    registered_addresses: Vec<AddressRow>,
    /// Since hosts can join a fleet; not written where there is none, so that an agent of before
    /// still reads what is the host's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    owner: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SpecRow {
    vcpus: u32,
    memory: u64,
    image: String,
    content: Option<(Bytes, FormatRow)>,
    disk: u64,
    interfaces: Vec<InterfaceRow>,
    autostart: Option<AutostartRow>,
    restart_policy: RestartPolicyRow,
    delete_protection: bool,
    /// Since the second release of the schema; older records have what was the rule then.
    #[serde(default)]
    guest: GuestRow,
    tags: BTreeMap<String, String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct InterfaceRow {
    network: String,
    mac: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct AddressRow {
    mac: String,
    address: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AutostartRow {
    order: i32,
    delay: Duration,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum RestartPolicyRow {
    Never,
    OnCrash { max_restarts: u32, window: Duration },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct GuestRow {
    inject: InjectRow,
    access: bool,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum InjectRow {
    Auto,
    Always,
    Never,
}

impl Default for GuestRow {
    fn default() -> Self {
        GuestPolicy::default().into()
    }
}

impl From<GuestPolicy> for GuestRow {
    fn from(GuestPolicy { inject, access }: GuestPolicy) -> Self {
        Self {
            inject: match inject {
                GuestInject::Auto => InjectRow::Auto,
                GuestInject::Always => InjectRow::Always,
                GuestInject::Never => InjectRow::Never,
            },
            access,
        }
    }
}

impl From<GuestRow> for GuestPolicy {
    fn from(GuestRow { inject, access }: GuestRow) -> Self {
        Self {
            inject: match inject {
                InjectRow::Auto => GuestInject::Auto,
                InjectRow::Always => GuestInject::Always,
                InjectRow::Never => GuestInject::Never,
            },
            access,
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CloudInitRow {
    user: Option<String>,
    ssh_authorized_keys: Vec<String>,
    user_data: Option<String>,
    network_config: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum DesiredRow {
    Running,
    Stopped,
    Paused,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum LifecycleRow {
    Creating,
    Ready,
    Deleting,
    Failed { reason: String },
}

impl From<&Vm> for VmRow {
    fn from(vm: &Vm) -> Self {
        let Vm {
            id,
            name,
            generation,
            spec,
            cloud_init,
            desired,
            lifecycle,
            created_at,
            registered_addresses,
            crash_restarts,
            owner,
        } = vm;
        Self {
            id: id.uuid(),
            name: name.as_str().to_owned(),
            generation: *generation,
            spec: spec.into(),
            cloud_init: cloud_init.into(),
            desired: match desired {
                DesiredPower::Running => DesiredRow::Running,
                DesiredPower::Stopped => DesiredRow::Stopped,
                DesiredPower::Paused => DesiredRow::Paused,
            },
            lifecycle: match lifecycle {
                Lifecycle::Creating => LifecycleRow::Creating,
                Lifecycle::Ready => LifecycleRow::Ready,
                Lifecycle::Deleting => LifecycleRow::Deleting,
                Lifecycle::Failed { reason } => LifecycleRow::Failed {
                    reason: reason.clone(),
                },
            },
            created_at: created_at.unix_millis(),
            crash_restarts: crash_restarts.iter().map(|at| at.unix_millis()).collect(),
            registered_addresses: registered_addresses
                .iter()
                .map(|(mac, address)| AddressRow {
                    mac: mac.to_string(),
                    address: address.to_string(),
                })
                .collect(),
            owner: owner.clone(),
        }
    }
}

impl TryFromRow<VmRow> for Vm {
    fn try_from_row(row: VmRow) -> Result<Self> {
        Ok(Self {
            id: VmId::from_uuid(row.id),
            name: VmName::new(row.name)?,
            generation: row.generation,
            spec: VmSpec::try_from_row(row.spec)?,
            cloud_init: CloudInit {
                user: row.cloud_init.user,
                ssh_authorized_keys: row.cloud_init.ssh_authorized_keys,
                user_data: row.cloud_init.user_data,
                network_config: row.cloud_init.network_config,
            },
            desired: match row.desired {
                DesiredRow::Running => DesiredPower::Running,
                DesiredRow::Stopped => DesiredPower::Stopped,
                DesiredRow::Paused => DesiredPower::Paused,
            },
            lifecycle: match row.lifecycle {
                LifecycleRow::Creating => Lifecycle::Creating,
                LifecycleRow::Ready => Lifecycle::Ready,
                LifecycleRow::Deleting => Lifecycle::Deleting,
                LifecycleRow::Failed { reason } => Lifecycle::Failed { reason },
            },
            created_at: Timestamp::from_unix_millis(row.created_at),
            registered_addresses: row
                .registered_addresses
                .into_iter()
                .map(|row| {
                    let address = row.address.parse().map_err(|error| {
                        Error::new(ErrorCode::InvalidArgument, "a stored address is none")
                            .because(error)
                    })?;
                    Ok((row.mac.parse()?, address))
                })
                .collect::<Result<_>>()?,
            crash_restarts: row
                .crash_restarts
                .into_iter()
                .map(Timestamp::from_unix_millis)
                .collect(),
            owner: row.owner,
        })
    }
}

impl From<&VmSpec> for SpecRow {
    fn from(spec: &VmSpec) -> Self {
        let VmSpec {
            vcpus,
            memory,
            image: ImageReference { name, content },
            disk,
            interfaces,
            autostart,
            restart_policy,
            delete_protection,
            guest,
            tags,
        } = spec;
        Self {
            vcpus: *vcpus,
            memory: memory.bytes(),
            image: name.as_str().to_owned(),
            content: content
                .map(|(digest, format)| (Bytes(digest.bytes().to_vec()), format.into())),
            disk: disk.bytes(),
            interfaces: interfaces
                .iter()
                .map(|NetworkInterface { network, mac }| InterfaceRow {
                    network: network.as_str().to_owned(),
                    mac: mac.to_string(),
                })
                .collect(),
            autostart: autostart.map(Into::into),
            restart_policy: (*restart_policy).into(),
            delete_protection: *delete_protection,
            guest: (*guest).into(),
            tags: tags.clone(),
        }
    }
}

impl TryFromRow<SpecRow> for VmSpec {
    fn try_from_row(row: SpecRow) -> Result<Self> {
        let content = match row.content {
            Some((digest, format)) => Some((
                ImageDigest::from_bytes(digest.array()?),
                ImageFormat::from(format),
            )),
            None => None,
        };
        Ok(Self {
            vcpus: row.vcpus,
            memory: ByteSize::from_bytes(row.memory),
            image: ImageReference {
                name: ImageName::new(row.image)?,
                content,
            },
            disk: ByteSize::from_bytes(row.disk),
            interfaces: row
                .interfaces
                .into_iter()
                .map(|row| {
                    Ok(NetworkInterface {
                        network: NetworkName::new(row.network)?,
                        mac: row.mac.parse()?,
                    })
                })
                .collect::<Result<_>>()?,
            autostart: row.autostart.map(Into::into),
            restart_policy: row.restart_policy.into(),
            delete_protection: row.delete_protection,
            guest: row.guest.into(),
            tags: row.tags,
        })
    }
}

impl From<&CloudInit> for CloudInitRow {
    fn from(cloud_init: &CloudInit) -> Self {
        let CloudInit {
            user,
            ssh_authorized_keys,
            user_data,
            network_config,
        } = cloud_init;
        Self {
            user: user.clone(),
            ssh_authorized_keys: ssh_authorized_keys.clone(),
            user_data: user_data.clone(),
            network_config: network_config.clone(),
        }
    }
}

impl From<Autostart> for AutostartRow {
    fn from(Autostart { order, delay }: Autostart) -> Self {
        Self { order, delay }
    }
}

impl From<AutostartRow> for Autostart {
    fn from(AutostartRow { order, delay }: AutostartRow) -> Self {
        Self { order, delay }
    }
}

impl From<RestartPolicy> for RestartPolicyRow {
    fn from(policy: RestartPolicy) -> Self {
        match policy {
            RestartPolicy::Never => Self::Never,
            RestartPolicy::OnCrash {
                max_restarts,
                window,
            } => Self::OnCrash {
                max_restarts,
                window,
            },
        }
    }
}

impl From<RestartPolicyRow> for RestartPolicy {
    fn from(row: RestartPolicyRow) -> Self {
        match row {
            RestartPolicyRow::Never => Self::Never,
            RestartPolicyRow::OnCrash {
                max_restarts,
                window,
            } => Self::OnCrash {
                max_restarts,
                window,
            },
        }
    }
}
