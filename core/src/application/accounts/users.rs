//! People.

use std::sync::Arc;

use ghost_domain::{CredentialId, Error, ErrorCode, Result, Role, TenantName};

use crate::application::fleet::{Fleet, FleetState};
use crate::application::quota_check::Admission;
use crate::domain::{Caller, Quota, Record, RecordKey, Usage, User};

/// A user and what it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserView {
    /// Its record.
    pub user: Arc<User>,
    /// What its VMs use.
    pub used: Usage,
}

/// What to change of a user.
#[derive(Clone, Debug, Default)]
pub struct UpdateUserCommand {
    /// Which: a name, an id or a unique prefix of one.
    pub user: String,
    /// Its own quota; `Some(None)`: its tenant's again.
    pub quota: Option<Option<Quota>>,
    /// Its role.
    pub role: Option<Role>,
}

/// Lists, changes and revokes people.
#[derive(Debug)]
pub struct Users {
    /// The records.
    pub fleet: Arc<Fleet>,
    /// What is used.
    pub admission: Arc<Admission>,
}

/// The user that a selector means among those that the caller sees.
fn find<'a>(state: &'a FleetState, caller: &Caller, selector: &str) -> Result<&'a Arc<User>> {
    let seen = || {
        state.users().filter(|user| match &user.tenant {
            Some(tenant) => caller.sees_tenant(tenant),
            None => caller.tenant.is_none(),
        })
    };
    let shown: String = selector.chars().take(100).collect();
    let pick = |mut found: Box<dyn Iterator<Item = &'a Arc<User>> + '_>| match (
        found.next(),
        found.next(),
    ) {
        (Some(one), None) => Ok(Some(one)),
        (Some(_), Some(_)) => Err(Error::new(
            ErrorCode::InvalidArgument,
            format!("{shown:?} means more than one user"),
        )
        .hint("give the id: ghostctl user list")),
        (None, _) => Ok(None),
    };
    let named = |user: &&Arc<User>| {
        user.name == selector
            || user
                .tenant
                .as_ref()
                .is_some_and(|tenant| selector == format!("{tenant}/{}", user.name))
    };
    // Somebody who was revoked does not make the name of who came after ambiguous.
    let active = |user: &&Arc<User>| user.revoked_at.is_none();
    if let Some(user) = pick(Box::new(seen().filter(named).filter(active)))? {
        return Ok(user);
    }
    let prefix = selector.to_ascii_lowercase();
    let prefixed =
        |user: &&Arc<User>| !prefix.is_empty() && user.id.to_string().starts_with(&prefix);
    if let Some(user) = pick(Box::new(seen().filter(prefixed)))? {
        return Ok(user);
    }
    if let Some(user) = pick(Box::new(seen().filter(named)))? {
        return Ok(user);
    }
    Err(Error::new(
        ErrorCode::UserNotFound,
        format!("there is no user {shown:?}"),
    )
    .hint("see which there are: ghostctl user list"))
}

impl Users {
    fn view(&self, user: Arc<User>) -> UserView {
        let used = user.tenant.as_ref().map_or_else(Usage::default, |tenant| {
            self.admission
                .used_by_user(tenant, &format!("{tenant}/{}", user.name))
        });
        UserView { user, used }
    }

    fn show(&self, id: CredentialId) -> Result<UserView> {
        self.fleet
            .read(|state| state.user(id).cloned())
            .map(|user| self.view(user))
            .ok_or_else(|| Error::new(ErrorCode::UserNotFound, "the user was just removed"))
    }

    /// Those that the caller sees, by tenant and name.
    ///
    /// # Errors
    /// `PermissionDenied`.
    pub fn list(&self, caller: &Caller, tenant: Option<&TenantName>) -> Result<Vec<UserView>> {
        caller.require(Role::Admin)?;
        let mut seen: Vec<Arc<User>> = self.fleet.read(|state| {
            state
                .users()
                .filter(|user| match &user.tenant {
                    Some(own) => caller.sees_tenant(own),
                    None => caller.tenant.is_none(),
                })
                .filter(|user| tenant.is_none() || user.tenant.as_ref() == tenant)
                .cloned()
                .collect()
        });
        seen.sort_by(|a, b| (&a.tenant, &a.name, a.id).cmp(&(&b.tenant, &b.name, b.id)));
        Ok(seen.into_iter().map(|user| self.view(user)).collect())
    }

    /// Changes the quota or the role. The quota of people is their administrator's: a tenant's own
    /// quota bounds them all.
    ///
    /// # Errors
    /// `PermissionDenied`, `UserNotFound`, `StoreUnavailable`.
    pub async fn update(&self, caller: &Caller, command: UpdateUserCommand) -> Result<UserView> {
        caller.require(Role::Admin)?;
        let id = self
            .fleet
            .transact(|state| {
                let mut user = User::clone(find(state, caller, &command.user)?);
                if let Some(role) = command.role {
                    super::may_give(caller, role, user.tenant.as_ref())?;
                    user.role = role;
                }
                if let Some(quota) = command.quota {
                    user.quota = quota;
                }
                let id = user.id;
                let mut draft = state.draft();
                draft.put(RecordKey::User(id), Record::User(user));
                Ok(draft.done(id))
            })
            .await?;
        self.show(id)
    }

    /// Revokes all that the user proves itself with, for good. Revoking twice changes nothing.
    ///
    /// # Errors
    /// `PermissionDenied`, `UserNotFound`, `StoreUnavailable`.
    pub async fn revoke(&self, caller: &Caller, selector: &str) -> Result<UserView> {
        caller.require(Role::Admin)?;
        let now = self.fleet.clock().now();
        let id = self
            .fleet
            .transact(|state| {
                let found = find(state, caller, selector)?;
                let mut draft = state.draft();
                if found.revoked_at.is_none() {
                    let mut user = User::clone(found);
                    user.revoked_at = Some(now);
                    draft.put(RecordKey::User(user.id), Record::User(user));
                }
                Ok(draft.done(found.id))
            })
            .await?;
        tracing::warn!(user = %id, principal = caller.full_name(), "user revoked");
        self.show(id)
    }
}
