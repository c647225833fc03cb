//! The stored forms of credentials and of a lockdown. Secrets are never among them, only their
//! hashes.

use ghost_domain::guest::Lockdown;
use ghost_domain::{ApiKey, Certificate, CredentialId, JoinToken, Result, Role, Timestamp};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Bytes, TryFromRow};

#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum RoleRow {
    Viewer,
    Operator,
    Admin,
}

/// Credentials of before there was such a thing may enter guests. It is written only where it
/// says something, so that an older agent can read what it can honour, and refuses the rest.
const fn guest_access() -> bool {
    true
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
const fn is_usual(guest_access: &bool) -> bool {
    *guest_access
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CertificateRow {
    id: Uuid,
    name: String,
    role: RoleRow,
    #[serde(default = "guest_access", skip_serializing_if = "is_usual")]
    guest_access: bool,
    created_at: i64,
    expires_at: i64,
    revoked_at: Option<i64>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ApiKeyRow {
    id: Uuid,
    name: String,
    role: RoleRow,
    #[serde(default = "guest_access", skip_serializing_if = "is_usual")]
    guest_access: bool,
    secret_hash: Bytes,
    created_at: i64,
    expires_at: Option<i64>,
    revoked_at: Option<i64>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct JoinTokenRow {
    id: Uuid,
    secret_hash: Bytes,
    role: RoleRow,
    #[serde(default = "guest_access", skip_serializing_if = "is_usual")]
    guest_access: bool,
    created_at: i64,
    expires_at: i64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LockdownRow {
    reason: String,
    set_by: String,
    since: i64,
}

impl From<&Lockdown> for LockdownRow {
    fn from(lockdown: &Lockdown) -> Self {
        let Lockdown {
            reason,
            set_by,
            since,
        } = lockdown;
        Self {
            reason: reason.clone(),
            set_by: set_by.clone(),
            since: since.unix_millis(),
        }
    }
}

impl TryFromRow<LockdownRow> for Lockdown {
    fn try_from_row(row: LockdownRow) -> Result<Self> {
        let LockdownRow {
            reason,
            set_by,
            since,
        } = row;
        Ok(Self {
            reason,
            set_by,
            since: Timestamp::from_unix_millis(since),
        })
    }
}

impl From<Role> for RoleRow {
    fn from(role: Role) -> Self {
        match role {
            Role::Viewer => Self::Viewer,
            Role::Operator => Self::Operator,
            Role::Admin => Self::Admin,
        }
    }
}

impl From<RoleRow> for Role {
    fn from(row: RoleRow) -> Self {
        match row {
            RoleRow::Viewer => Self::Viewer,
            RoleRow::Operator => Self::Operator,
            RoleRow::Admin => Self::Admin,
        }
    }
}

impl From<&Certificate> for CertificateRow {
    fn from(certificate: &Certificate) -> Self {
        let Certificate {
            id,
            name,
            role,
            guest_access,
            created_at,
            expires_at,
            revoked_at,
        } = certificate;
        Self {
            id: id.uuid(),
            name: name.clone(),
            role: (*role).into(),
            guest_access: *guest_access,
            created_at: created_at.unix_millis(),
            expires_at: expires_at.unix_millis(),
            revoked_at: revoked_at.map(Timestamp::unix_millis),
        }
    }
}

impl TryFromRow<CertificateRow> for Certificate {
    fn try_from_row(row: CertificateRow) -> Result<Self> {
        Ok(Self {
            id: CredentialId::from_uuid(row.id),
            name: row.name,
            role: row.role.into(),
            guest_access: row.guest_access,
            created_at: Timestamp::from_unix_millis(row.created_at),
            expires_at: Timestamp::from_unix_millis(row.expires_at),
            revoked_at: row.revoked_at.map(Timestamp::from_unix_millis),
        })
    }
}

impl From<&ApiKey> for ApiKeyRow {
    fn from(key: &ApiKey) -> Self {
        let ApiKey {
            id,
            name,
            role,
            guest_access,
            secret_hash,
            created_at,
            expires_at,
            revoked_at,
        } = key;
        Self {
            id: id.uuid(),
            name: name.clone(),
            role: (*role).into(),
            guest_access: *guest_access,
            secret_hash: Bytes(secret_hash.to_vec()),
            created_at: created_at.unix_millis(),
            expires_at: expires_at.map(Timestamp::unix_millis),
            revoked_at: revoked_at.map(Timestamp::unix_millis),
        }
    }
}

impl TryFromRow<ApiKeyRow> for ApiKey {
    fn try_from_row(row: ApiKeyRow) -> Result<Self> {
        Ok(Self {
            id: CredentialId::from_uuid(row.id),
            name: row.name,
            role: row.role.into(),
            guest_access: row.guest_access,
            secret_hash: row.secret_hash.array()?,
            created_at: Timestamp::from_unix_millis(row.created_at),
            expires_at: row.expires_at.map(Timestamp::from_unix_millis),
            revoked_at: row.revoked_at.map(Timestamp::from_unix_millis),
        })
    }
}

impl From<&JoinToken> for JoinTokenRow {
    fn from(token: &JoinToken) -> Self {
        let JoinToken {
            id,
            secret_hash,
            role,
            guest_access,
            created_at,
            expires_at,
        } = token;
        Self {
            id: id.uuid(),
            secret_hash: Bytes(secret_hash.to_vec()),
            role: (*role).into(),
            guest_access: *guest_access,
            created_at: created_at.unix_millis(),
            expires_at: expires_at.unix_millis(),
        }
    }
}

impl TryFromRow<JoinTokenRow> for JoinToken {
    fn try_from_row(row: JoinTokenRow) -> Result<Self> {
        Ok(Self {
            id: CredentialId::from_uuid(row.id),
            secret_hash: row.secret_hash.array()?,
            role: row.role.into(),
            guest_access: row.guest_access,
            created_at: Timestamp::from_unix_millis(row.created_at),
            expires_at: Timestamp::from_unix_millis(row.expires_at),
        })
    }
}
