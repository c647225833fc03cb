//! What requests carry. Unknown keys are refused everywhere: a misspelt field that is ignored is a
//! change that silently did not happen.

use std::collections::BTreeMap;

use ghost_domain::{Error, ErrorCode, Result};
use ghost_proto::agent::v1 as agent;
use ghost_proto::core::v1 as message;
use serde::Deserialize;
use utoipa::{IntoParams, ToSchema};

/// Seconds as a message's duration; left out: nobody said.
fn length(seconds: Option<f64>, field: &str) -> Result<Option<prost_types::Duration>> {
    seconds
        .map(|seconds| {
            std::time::Duration::try_from_secs_f64(seconds)
                .map(ghost_presentation::convert::duration)
                .map_err(|_| {
                    Error::new(ErrorCode::InvalidArgument, "that is no length of time")
                        .field(field, "a number of seconds that is not negative")
                })
        })
        .transpose()
}

/// `key=value,key=value` of a query.
fn pairs(text: Option<&str>, field: &str) -> Result<BTreeMap<String, String>> {
    let Some(text) = text.filter(|text| !text.is_empty()) else {
        return Ok(BTreeMap::new());
    };
    text.split(',')
        .map(|pair| {
            pair.split_once('=')
                .map(|(key, value)| (key.trim().to_owned(), value.trim().to_owned()))
                .ok_or_else(|| {
                    Error::new(ErrorCode::InvalidArgument, "the query cannot be read")
                        .field(field, "key=value,key=value")
                })
        })
        .collect()
}

/// Which hosts.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct HostsQuery {
    /// Only of this tenant.
    tenant: Option<String>,
    /// Only with all of these: `key=value,key=value`.
    labels: Option<String>,
    /// Only in this state.
    state: Option<String>,
}

impl HostsQuery {
    pub(super) fn message(self) -> Result<message::ListHostsRequest> {
        Ok(message::ListHostsRequest {
            tenant: self.tenant.unwrap_or_default(),
            labels: pairs(self.labels.as_deref(), "labels")?,
            state: self.state.unwrap_or_default(),
        })
    }
}

/// Which events.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct EventsQuery {
    /// Only those of the VM of this name or id.
    #[serde(default)]
    pub(super) vm: String,
    /// Start with what is still remembered (the last 1,000).
    #[serde(default)]
    pub(super) replay: bool,
    /// Go on with what comes (the default).
    #[serde(default = "yes")]
    pub(super) follow: bool,
}

const fn yes() -> bool {
    true
}

/// Which VMs.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct VmsQuery {
    /// Only of this tenant's hosts.
    tenant: Option<String>,
    /// Only of this host.
    host: Option<String>,
    /// Only with all of these: `key=value,key=value`.
    tags: Option<String>,
    /// Only of this name.
    name: Option<String>,
}

impl VmsQuery {
    pub(super) fn message(self) -> Result<message::ListFleetVmsRequest> {
        Ok(message::ListFleetVmsRequest {
            tenant: self.tenant.unwrap_or_default(),
            host: self.host.unwrap_or_default(),
            tags: pairs(self.tags.as_deref(), "tags")?,
            name: self.name.unwrap_or_default(),
        })
    }
}

/// Where a VM that is made may go.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct PlacedQuery {
    /// Whose hosts; the caller's own tenant where it is left out.
    pub(super) tenant: Option<String>,
    /// Only hosts with all of these: `key=value,key=value`.
    pub(super) labels: Option<String>,
}

/// Whether also those that are in use.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ForceQuery {
    /// Also where it is online, or commands wait for it.
    #[serde(default)]
    pub(super) force: bool,
}

/// Of which tenant.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct TenantQuery {
    /// Only of this tenant.
    #[serde(default)]
    pub(super) tenant: String,
}

/// Which commands.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct CommandsQuery {
    /// Only for this host.
    #[serde(default)]
    pub(super) host: String,
    /// Also those that ended.
    #[serde(default)]
    pub(super) all: bool,
}

/// Which entries of the audit log.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct AuditQuery {
    /// Only of this tenant.
    #[serde(default)]
    tenant: String,
    /// Only what concerns this host.
    #[serde(default)]
    host: String,
    /// Only what this user did.
    #[serde(default)]
    user: String,
    /// Only the newest so many; 1,000 where it is left out.
    #[serde(default)]
    limit: u32,
    /// Only since this many seconds after 1970-01-01 UTC.
    since_unix_seconds: Option<i64>,
}

impl AuditQuery {
    pub(super) fn message(self) -> message::ListFleetAuditRequest {
        message::ListFleetAuditRequest {
            tenant: self.tenant,
            host: self.host,
            user: self.user,
            limit: self.limit,
            since: self
                .since_unix_seconds
                .map(|seconds| prost_types::Timestamp { seconds, nanos: 0 }),
        }
    }
}

/// What to change of a host.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct UpdateHostBody {
    /// Labels to set.
    #[serde(default)]
    set_labels: BTreeMap<String, String>,
    /// Labels to remove.
    #[serde(default)]
    remove_labels: Vec<String>,
    /// Whether nothing new is placed on it.
    cordoned: Option<bool>,
    /// Why.
    #[serde(default)]
    cordon_reason: String,
    /// Let a host that was locked as cloned come back.
    #[serde(default)]
    unlock: bool,
    /// A new name.
    #[serde(default)]
    name: String,
}

impl UpdateHostBody {
    pub(super) fn message(self, host: String) -> message::UpdateHostRequest {
        message::UpdateHostRequest {
            host,
            set_labels: self.set_labels,
            remove_labels: self.remove_labels,
            cordoned: self.cordoned,
            cordon_reason: self.cordon_reason,
            unlock: self.unlock,
            name: self.name,
        }
    }
}

/// What a VM would need.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct PlaceBody {
    /// Whose hosts; the caller's own tenant where it is left out.
    #[serde(default)]
    tenant: String,
    /// Virtual CPUs; default 2.
    #[serde(default)]
    vcpus: u32,
    /// Memory; default 2 GiB.
    #[serde(default)]
    memory_bytes: u64,
    /// Disk; default 10 GiB.
    #[serde(default)]
    disk_bytes: u64,
    /// Only hosts with all of these labels.
    #[serde(default)]
    labels: BTreeMap<String, String>,
}

impl PlaceBody {
    pub(super) fn message(self) -> message::PlaceRequest {
        message::PlaceRequest {
            tenant: self.tenant,
            demand: Some(agent::Resources {
                cpus: self.vcpus,
                memory_bytes: self.memory_bytes,
                disk_bytes: self.disk_bytes,
            }),
            labels: self.labels,
            image: String::new(),
        }
    }
}

/// A VM that a queued command makes.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct QueuedVmBody {
    /// Left out: a name is made up.
    #[serde(default)]
    name: String,
    /// An image of the cache or the catalogue.
    image: String,
    /// Default 2.
    #[serde(default)]
    vcpus: u32,
    /// Default 2 GiB.
    #[serde(default)]
    memory_bytes: u64,
    /// Default 10 GiB, or the image's size where that is larger.
    #[serde(default)]
    disk_bytes: u64,
    /// Default: one card on `default`.
    #[serde(default)]
    networks: Vec<String>,
    /// A user for cloud-init to make.
    #[serde(default)]
    user: String,
    /// That user's SSH public keys.
    #[serde(default)]
    ssh_authorized_keys: Vec<String>,
    /// cloud-init's user-data.
    #[serde(default)]
    user_data: String,
    /// Tags.
    #[serde(default)]
    tags: BTreeMap<String, String>,
    /// Start it once it is made.
    #[serde(default)]
    start: bool,
}

/// What a command does: one of the kinds, with what that needs.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[expect(
    clippy::enum_variant_names,
    reason = "the kinds of commands as they are named everywhere"
)]
pub(super) enum ActionBody {
    /// Make a VM.
    CreateVm(QueuedVmBody),
    /// Start one.
    StartVm(PowerBody),
    /// Stop one.
    StopVm(StopBody),
    /// Restart one.
    RestartVm(StopBody),
    /// Halt one, memory kept.
    PauseVm(PowerBody),
    /// Let it go on.
    ResumeVm(PowerBody),
    /// Delete one.
    DeleteVm(DeleteBody),
    /// Change one.
    UpdateVm(UpdateBody),
}

/// Which VM.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct PowerBody {
    /// A name, a full id or a unique prefix of one.
    vm: String,
}

/// Which VM, and how.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct StopBody {
    /// A name, a full id or a unique prefix of one.
    vm: String,
    /// Cut the power: at once, or after the timeout where one is given.
    #[serde(default)]
    force: bool,
    /// How long the guest may take.
    timeout_seconds: Option<f64>,
}

/// Which VM to delete.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct DeleteBody {
    /// A name, a full id or a unique prefix of one.
    vm: String,
    /// Also a running one.
    #[serde(default)]
    force: bool,
}

/// What to change of a VM.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct UpdateBody {
    /// A name, a full id or a unique prefix of one.
    vm: String,
    /// Virtual CPUs.
    vcpus: Option<u32>,
    /// Memory.
    memory_bytes: Option<u64>,
    /// Refuse to delete it.
    delete_protection: Option<bool>,
    /// Tags to set.
    #[serde(default)]
    set_tags: BTreeMap<String, String>,
    /// Tags to remove.
    #[serde(default)]
    remove_tags: Vec<String>,
}

/// A command for a host, which may be away.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct QueueBody {
    /// The host.
    host: String,
    /// How long it may wait; an hour where it is left out, at most 30 days.
    lifetime_seconds: Option<f64>,
    /// What to do.
    action: ActionBody,
}

impl QueueBody {
    pub(super) fn message(self, request_id: String) -> Result<message::QueueCommandRequest> {
        use message::queue_command_request::Action;
        let action = match self.action {
            ActionBody::CreateVm(vm) => Action::CreateVm(agent::CreateVmRequest {
                name: vm.name,
                image: vm.image,
                vcpus: vm.vcpus,
                memory_bytes: vm.memory_bytes,
                disk_bytes: vm.disk_bytes,
                networks: vm.networks,
                user: vm.user,
                ssh_authorized_keys: vm.ssh_authorized_keys,
                user_data: vm.user_data,
                tags: vm.tags,
                start: vm.start,
                ..agent::CreateVmRequest::default()
            }),
            ActionBody::StartVm(body) => Action::StartVm(agent::StartVmRequest {
                vm: body.vm,
                ..agent::StartVmRequest::default()
            }),
            ActionBody::StopVm(body) => Action::StopVm(agent::StopVmRequest {
                vm: body.vm,
                force: body.force,
                timeout: length(body.timeout_seconds, "timeout_seconds")?,
                ..agent::StopVmRequest::default()
            }),
            ActionBody::RestartVm(body) => Action::RestartVm(agent::RestartVmRequest {
                vm: body.vm,
                force: body.force,
                timeout: length(body.timeout_seconds, "timeout_seconds")?,
                ..agent::RestartVmRequest::default()
            }),
            ActionBody::PauseVm(body) => Action::PauseVm(agent::PauseVmRequest {
                vm: body.vm,
                ..agent::PauseVmRequest::default()
            }),
            ActionBody::ResumeVm(body) => Action::ResumeVm(agent::ResumeVmRequest {
                vm: body.vm,
                ..agent::ResumeVmRequest::default()
            }),
            ActionBody::DeleteVm(body) => Action::DeleteVm(agent::DeleteVmRequest {
                vm: body.vm,
                force: body.force,
                ..agent::DeleteVmRequest::default()
            }),
            ActionBody::UpdateVm(body) => Action::UpdateVm(agent::UpdateVmRequest {
                vm: body.vm,
                vcpus: body.vcpus,
                memory_bytes: body.memory_bytes,
                delete_protection: body.delete_protection,
                set_tags: body.set_tags,
                remove_tags: body.remove_tags,
                ..agent::UpdateVmRequest::default()
            }),
        };
        Ok(message::QueueCommandRequest {
            host: self.host,
            request_id,
            lifetime: length(self.lifetime_seconds, "lifetime_seconds")?,
            action: Some(action),
        })
    }
}

/// A token to make.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct TokenBody {
    /// `default` where it is left out; `*` with the role admin: a person of no tenant.
    #[serde(default)]
    tenant: String,
    /// Left out: for a host. Otherwise `viewer`, `operator` or `admin`: for a person.
    #[serde(default)]
    role: String,
    /// Ten minutes where it is left out; at most an hour.
    lifetime_seconds: Option<f64>,
    /// For a host: the labels that it begins with.
    #[serde(default)]
    labels: BTreeMap<String, String>,
}

impl TokenBody {
    pub(super) fn message(self) -> Result<message::CreateFleetTokenRequest> {
        Ok(message::CreateFleetTokenRequest {
            tenant: self.tenant,
            role: self.role,
            lifetime: length(self.lifetime_seconds, "lifetime_seconds")?,
            labels: self.labels,
        })
    }
}

/// The most that somebody may have; null: no limit.
#[derive(Clone, Copy, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct QuotaBody {
    /// VMs.
    vms: Option<u32>,
    /// Virtual CPUs.
    cpus: Option<u32>,
    /// Memory.
    memory_bytes: Option<u64>,
    /// Disk: virtual size.
    disk_bytes: Option<u64>,
}

impl QuotaBody {
    fn message(self) -> message::Quota {
        message::Quota {
            vms: self.vms.unwrap_or_default(),
            cpus: self.cpus.unwrap_or_default(),
            memory_bytes: self.memory_bytes.unwrap_or_default(),
            disk_bytes: self.disk_bytes.unwrap_or_default(),
        }
    }
}

/// A tenant to make.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct TenantBody {
    /// Its name.
    name: String,
    /// What it may have in all.
    quota: Option<QuotaBody>,
    /// What each of its users may have.
    user_quota: Option<QuotaBody>,
}

impl TenantBody {
    pub(super) fn message(self) -> message::CreateTenantRequest {
        message::CreateTenantRequest {
            name: self.name,
            quota: self.quota.map(QuotaBody::message),
            user_quota: self.user_quota.map(QuotaBody::message),
        }
    }
}

/// What to change of a tenant; what is left out stays.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct UpdateTenantBody {
    /// What it may have in all.
    quota: Option<QuotaBody>,
    /// What each of its users may have.
    user_quota: Option<QuotaBody>,
}

impl UpdateTenantBody {
    pub(super) fn message(self, name: String) -> message::UpdateTenantRequest {
        message::UpdateTenantRequest {
            name,
            quota: self.quota.map(QuotaBody::message),
            user_quota: self.user_quota.map(QuotaBody::message),
        }
    }
}

/// What to change of a user; what is left out stays.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct UpdateUserBody {
    /// Its own quota; without any limit: its tenant's again.
    quota: Option<QuotaBody>,
    /// `viewer`, `operator` or `admin`.
    #[serde(default)]
    role: String,
}

impl UpdateUserBody {
    pub(super) fn message(self, user: String) -> message::UpdateUserRequest {
        message::UpdateUserRequest {
            user,
            quota: self.quota.map(QuotaBody::message),
            role: self.role,
        }
    }
}

/// A key to make.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct KeyBody {
    /// The caller's own tenant where it is left out; `*`: bound to none.
    #[serde(default)]
    tenant: String,
    /// A name for people.
    name: String,
    /// `viewer`, `operator` or `admin`.
    role: String,
    /// 90 days where it is left out; at most a year.
    lifetime_seconds: Option<f64>,
    /// Only these hosts; empty: all of the tenant.
    #[serde(default)]
    hosts: Vec<String>,
}

impl KeyBody {
    pub(super) fn message(self) -> Result<message::CreateFleetKeyRequest> {
        Ok(message::CreateFleetKeyRequest {
            tenant: self.tenant,
            name: self.name,
            role: self.role,
            lifetime: length(self.lifetime_seconds, "lifetime_seconds")?,
            hosts: self.hosts,
        })
    }
}
