//! Tenants, users, keys, tokens.

use std::collections::{BTreeMap, BTreeSet};

use ghost_domain::{ByteSize, Error, HostId, TenantName};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{DemandRow, Hash, credential, millis, role, tenant, time, times};
use crate::domain::{
    FleetKey, HeldRoom, JoinToken, Quota, SentCreate, Tenant, TokenKind, User, UserSource,
};

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct QuotaRow {
    vms: Option<u32>,
    cpus: Option<u32>,
    memory: Option<u64>,
    disk: Option<u64>,
}

impl From<Quota> for QuotaRow {
    fn from(quota: Quota) -> Self {
        let Quota {
            vms,
            cpus,
            memory,
            disk,
        } = quota;
        Self {
            vms,
            cpus,
            memory: memory.map(ByteSize::bytes),
            disk: disk.map(ByteSize::bytes),
        }
    }
}

impl From<QuotaRow> for Quota {
    fn from(row: QuotaRow) -> Self {
        let QuotaRow {
            vms,
            cpus,
            memory,
            disk,
        } = row;
        Self {
            vms,
            cpus,
            memory: memory.map(ByteSize::from_bytes),
            disk: disk.map(ByteSize::from_bytes),
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TenantRow {
    name: String,
    quota: QuotaRow,
    user_quota: QuotaRow,
    created_at: i64,
}

impl From<&Tenant> for TenantRow {
    fn from(tenant: &Tenant) -> Self {
        let Tenant {
            name,
            quota,
            user_quota,
            created_at,
        } = tenant;
        Self {
            name: name.as_str().to_owned(),
            quota: (*quota).into(),
            user_quota: (*user_quota).into(),
            created_at: created_at.unix_millis(),
        }
    }
}

impl TryFrom<TenantRow> for Tenant {
    type Error = Error;

    fn try_from(row: TenantRow) -> Result<Self, Error> {
        let TenantRow {
            name,
            quota,
            user_quota,
            created_at,
        } = row;
        Ok(Self {
            name: TenantName::new(name)?,
            quota: quota.into(),
            user_quota: user_quota.into(),
            created_at: time(created_at),
        })
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct HeldRow {
    id: Uuid,
    host: Uuid,
    owner: String,
    name: String,
    vm: Option<String>,
    vms: u32,
    demand: DemandRow,
    until: i64,
}

impl From<&HeldRoom> for HeldRow {
    fn from(held: &HeldRoom) -> Self {
        let HeldRoom {
            id,
            host,
            owner,
            name,
            vm,
            vms,
            demand,
            until,
        } = held;
        Self {
            id: *id,
            host: host.uuid(),
            owner: owner.clone(),
            name: name.clone(),
            vm: vm.clone(),
            vms: *vms,
            demand: (*demand).into(),
            until: until.unix_millis(),
        }
    }
}

impl From<HeldRow> for HeldRoom {
    fn from(row: HeldRow) -> Self {
        let HeldRow {
            id,
            host,
            owner,
            name,
            vm,
            vms,
            demand,
            until,
        } = row;
        Self {
            id,
            host: HostId::from_uuid(host),
            owner,
            name,
            vm,
            vms,
            demand: demand.into(),
            until: time(until),
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SentRow {
    host: Uuid,
    attempts: u32,
    until: i64,
}

impl From<&SentCreate> for SentRow {
    fn from(sent: &SentCreate) -> Self {
        let SentCreate {
            host,
            attempts,
            until,
        } = sent;
        Self {
            host: host.uuid(),
            attempts: *attempts,
            until: until.unix_millis(),
        }
    }
}

impl From<SentRow> for SentCreate {
    fn from(row: SentRow) -> Self {
        let SentRow {
            host,
            attempts,
            until,
        } = row;
        Self {
            host: HostId::from_uuid(host),
            attempts,
            until: time(until),
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct UserRow {
    id: Uuid,
    name: String,
    tenant: Option<String>,
    role: String,
    source: SourceRow,
    quota: Option<QuotaRow>,
    created_at: i64,
    revoked_at: Option<i64>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum SourceRow {
    Certificate { expires_at: i64 },
    OpenIdConnect { issuer: String, subject: String },
}

impl From<&User> for UserRow {
    fn from(user: &User) -> Self {
        let User {
            id,
            name,
            tenant,
            role,
            source,
            quota,
            created_at,
            revoked_at,
        } = user.clone();
        Self {
            id: id.uuid(),
            name,
            tenant: tenant.map(|one| one.as_str().to_owned()),
            role: role.as_str().to_owned(),
            source: match source {
                UserSource::Certificate { expires_at } => SourceRow::Certificate {
                    expires_at: expires_at.unix_millis(),
                },
                UserSource::OpenIdConnect { issuer, subject } => {
                    SourceRow::OpenIdConnect { issuer, subject }
                }
            },
            quota: quota.map(Into::into),
            created_at: created_at.unix_millis(),
            revoked_at: millis(revoked_at),
        }
    }
}

impl TryFrom<UserRow> for User {
    type Error = Error;

    fn try_from(row: UserRow) -> Result<Self, Error> {
        let UserRow {
            id,
            name,
            tenant: of,
            role: text,
            source,
            quota,
            created_at,
            revoked_at,
        } = row;
        Ok(Self {
            id: credential(id),
            name,
            tenant: tenant(of)?,
            role: role(&text)?,
            source: match source {
                SourceRow::Certificate { expires_at } => UserSource::Certificate {
                    expires_at: time(expires_at),
                },
                SourceRow::OpenIdConnect { issuer, subject } => {
                    UserSource::OpenIdConnect { issuer, subject }
                }
            },
            quota: quota.map(Into::into),
            created_at: time(created_at),
            revoked_at: times(revoked_at),
        })
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct KeyRow {
    id: Uuid,
    secret_hash: Hash,
    name: String,
    tenant: Option<String>,
    role: String,
    hosts: Option<BTreeSet<Uuid>>,
    created_at: i64,
    expires_at: i64,
    revoked_at: Option<i64>,
}

impl From<&FleetKey> for KeyRow {
    fn from(key: &FleetKey) -> Self {
        let FleetKey {
            id,
            secret_hash,
            name,
            tenant,
            role,
            hosts,
            created_at,
            expires_at,
            revoked_at,
        } = key.clone();
        Self {
            id: id.uuid(),
            secret_hash: Hash(secret_hash),
            name,
            tenant: tenant.map(|one| one.as_str().to_owned()),
            role: role.as_str().to_owned(),
            hosts: hosts.map(|all| all.into_iter().map(HostId::uuid).collect()),
            created_at: created_at.unix_millis(),
            expires_at: expires_at.unix_millis(),
            revoked_at: millis(revoked_at),
        }
    }
}

impl TryFrom<KeyRow> for FleetKey {
    type Error = Error;

    fn try_from(row: KeyRow) -> Result<Self, Error> {
        let KeyRow {
            id,
            secret_hash,
            name,
            tenant: of,
            role: text,
            hosts,
            created_at,
            expires_at,
            revoked_at,
        } = row;
        Ok(Self {
            id: credential(id),
            secret_hash: secret_hash.0,
            name,
            tenant: tenant(of)?,
            role: role(&text)?,
            hosts: hosts.map(|all| all.into_iter().map(HostId::from_uuid).collect()),
            created_at: time(created_at),
            expires_at: time(expires_at),
            revoked_at: times(revoked_at),
        })
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TokenRow {
    id: Uuid,
    secret_hash: Hash,
    kind: KindRow,
    created_by: String,
    created_at: i64,
    expires_at: i64,
    used_at: Option<i64>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum KindRow {
    Host {
        tenant: String,
        labels: BTreeMap<String, String>,
    },
    Operator {
        tenant: Option<String>,
        role: String,
    },
}

impl From<&JoinToken> for TokenRow {
    fn from(token: &JoinToken) -> Self {
        let JoinToken {
            id,
            secret_hash,
            kind,
            created_by,
            created_at,
            expires_at,
            used_at,
        } = token.clone();
        Self {
            id: id.uuid(),
            secret_hash: Hash(secret_hash),
            kind: match kind {
                TokenKind::Host { tenant, labels } => KindRow::Host {
                    tenant: tenant.as_str().to_owned(),
                    labels,
                },
                TokenKind::Operator { tenant, role } => KindRow::Operator {
                    tenant: tenant.map(|one| one.as_str().to_owned()),
                    role: role.as_str().to_owned(),
                },
            },
            created_by,
            created_at: created_at.unix_millis(),
            expires_at: expires_at.unix_millis(),
            used_at: millis(used_at),
        }
    }
}

impl TryFrom<TokenRow> for JoinToken {
    type Error = Error;

    fn try_from(row: TokenRow) -> Result<Self, Error> {
        let TokenRow {
            id,
            secret_hash,
            kind,
            created_by,
            created_at,
            expires_at,
            used_at,
        } = row;
        Ok(Self {
            id: credential(id),
            secret_hash: secret_hash.0,
            kind: match kind {
                KindRow::Host { tenant, labels } => TokenKind::Host {
                    tenant: TenantName::new(tenant)?,
                    labels,
                },
                KindRow::Operator {
                    tenant: of,
                    role: text,
                } => TokenKind::Operator {
                    tenant: tenant(of)?,
                    role: role(&text)?,
                },
            },
            created_by,
            created_at: time(created_at),
            expires_at: time(expires_at),
            used_at: times(used_at),
        })
    }
}
