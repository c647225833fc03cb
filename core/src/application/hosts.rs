//! Hosts: listed, changed, removed.

use std::sync::Arc;

use ghost_domain::{Error, ErrorCode, HostName, Result, Role, TenantName};

use super::fleet::{Fleet, HostView};
use super::links::HostLinks;
use crate::domain::{
    Caller, HostLife, HostRecord, HostState, Labels, Record, RecordKey, check_label,
};

/// Most labels of a host.
pub const MOST_LABELS: usize = 64;

/// Which hosts to list.
#[derive(Clone, Debug, Default)]
pub struct ListHostsQuery {
    /// Only of this tenant.
    pub tenant: Option<TenantName>,
    /// Only with all of these labels.
    pub labels: Labels,
    /// Only in this state, by its name.
    pub state: Option<String>,
}

/// Lists hosts, from memory.
#[derive(Debug)]
pub struct ListHosts {
    /// The records.
    pub fleet: Arc<Fleet>,
}

/// Whether a record passes what does not need its state.
fn listed(caller: &Caller, query: &ListHostsQuery, host: &HostRecord) -> bool {
    caller.sees_host(host.id, &host.tenant)
        && query
            .tenant
            .as_ref()
            .is_none_or(|tenant| *tenant == host.tenant)
        && query
            .labels
            .iter()
            .all(|(key, value)| host.labels.get(key) == Some(value))
}

impl ListHosts {
    /// The hosts that the caller may see, by tenant and name.
    ///
    /// # Errors
    /// `PermissionDenied`, `InvalidArgument` for a state that there is not.
    pub fn execute(&self, caller: &Caller, query: &ListHostsQuery) -> Result<Vec<HostView>> {
        caller.require(Role::Viewer)?;
        let states = [
            HostState::Online,
            HostState::Degraded,
            HostState::Offline,
            HostState::Locked,
            HostState::NeverSeen,
        ];
        if let Some(state) = &query.state
            && !states.iter().any(|one| one.as_str() == state)
        {
            return Err(Error::new(
                ErrorCode::InvalidArgument,
                format!("{state:?} is not a state of a host"),
            )
            .field("state", "online, degraded, offline, locked or never_seen"));
        }
        let mut views = self.fleet.host_views(|host| listed(caller, query, host));
        if let Some(state) = &query.state {
            views.retain(|view| view.state.as_str() == state);
        }
        views.sort_by(|a, b| {
            (&a.record.tenant, a.record.name.as_str())
                .cmp(&(&b.record.tenant, b.record.name.as_str()))
        });
        Ok(views)
    }
}

/// Shows one host.
#[derive(Debug)]
pub struct GetHost {
    /// The records.
    pub fleet: Arc<Fleet>,
}

impl GetHost {
    /// The host that a selector means.
    ///
    /// # Errors
    /// `HostNotFound`, `HostAmbiguous`, `PermissionDenied`.
    pub fn execute(&self, caller: &Caller, selector: &str) -> Result<HostView> {
        caller.require(Role::Viewer)?;
        let id = self
            .fleet
            .read(|state| state.find_host(caller, selector).map(|host| host.id))?;
        self.fleet.host_view(id).ok_or_else(|| gone(selector))
    }
}

fn gone(selector: &str) -> Error {
    Error::new(
        ErrorCode::HostNotFound,
        format!("the host {selector} was just removed"),
    )
}

/// What to change of a host.
#[derive(Clone, Debug, Default)]
pub struct UpdateHostCommand {
    /// Which.
    pub host: String,
    /// Labels to set.
    pub set_labels: Labels,
    /// Labels to remove.
    pub remove_labels: Vec<String>,
    /// Whether anything new is placed on it: `Some(Some(why))`: not.
    pub cordon: Option<Option<String>>,
    /// Lets a host that was locked as cloned come back.
    pub unlock: bool,
    /// A new name.
    pub name: Option<HostName>,
}

/// Changes a host.
#[derive(Debug)]
pub struct UpdateHost {
    /// The records.
    pub fleet: Arc<Fleet>,
}

impl UpdateHost {
    /// Labels and cordon are an operator's; a name and whether a locked host may come back are an
    /// administrator's.
    ///
    /// # Errors
    /// `HostNotFound`, `PermissionDenied`, `InvalidArgument`, `HostNameTaken`, `StoreUnavailable`.
    pub async fn execute(&self, caller: &Caller, command: UpdateHostCommand) -> Result<HostView> {
        caller.require(Role::Operator)?;
        if command.unlock || command.name.is_some() {
            caller.require(Role::Admin)?;
        }
        for (key, value) in &command.set_labels {
            check_label(key, value)?;
        }
        if let Some(Some(why)) = &command.cordon
            && (why.chars().count() > 200 || why.chars().any(char::is_control))
        {
            return Err(
                Error::new(ErrorCode::InvalidArgument, "the reason is too long")
                    .field("cordon_reason", "at most 200 printable characters"),
            );
        }
        let id = self
            .fleet
            .transact(|state| {
                let old = state.find_host(caller, &command.host)?;
                let mut host = HostRecord::clone(old);
                let mut draft = state.draft();
                for key in &command.remove_labels {
                    host.labels.remove(key);
                }
                host.labels.extend(command.set_labels.clone());
                if host.labels.len() > MOST_LABELS {
                    return Err(Error::new(
                        ErrorCode::InvalidArgument,
                        format!("a host has at most {MOST_LABELS} labels"),
                    ));
                }
                if let Some(cordon) = &command.cordon {
                    host.cordoned.clone_from(cordon);
                }
                if command.unlock {
                    match host.life {
                        HostLife::Locked { .. } => {
                            host.life = HostLife::Active;
                            // Whichever machine comes next is the right one.
                            host.machine = None;
                        }
                        HostLife::Active => {
                            return Err(Error::new(
                                ErrorCode::WrongState,
                                format!("the host {} is not locked", host.name),
                            ));
                        }
                        HostLife::Revoked { .. } => {
                            return Err(Error::new(
                                ErrorCode::HostLocked,
                                format!("the host {} was revoked for good", host.name),
                            )
                            .hint("remove it, and let it join anew"));
                        }
                    }
                }
                if let Some(name) = &command.name
                    && *name != host.name
                {
                    if state.host_named(&host.tenant, name.as_str()).is_some() {
                        return Err(Error::new(
                            ErrorCode::HostNameTaken,
                            format!("{} has a host {name} already", host.tenant),
                        ));
                    }
                    let key = |name: &HostName| {
                        RecordKey::HostName(host.tenant.clone(), name.as_str().to_owned())
                    };
                    draft.delete(key(&host.name));
                    draft.put(key(name), Record::HostName(host.id));
                    host.name = name.clone();
                }
                let id = host.id;
                if host != **old {
                    draft.put_host(host);
                }
                Ok(draft.done(id))
            })
            .await?;
        self.fleet.host_view(id).ok_or_else(|| gone(&command.host))
    }
}

/// Removes a host.
pub struct RemoveHost {
    /// The records.
    pub fleet: Arc<Fleet>,
    /// Its link ends with it.
    pub links: Arc<dyn HostLinks>,
}

impl RemoveHost {
    /// Forgets the host: its certificate is good for nothing from now on. Its VMs go on.
    ///
    /// # Errors
    /// `HostNotFound`, `PermissionDenied`, `WrongState` for one that is online or has commands
    /// waiting, without `force`; `StoreUnavailable`.
    pub async fn execute(
        &self,
        caller: &Caller,
        selector: &str,
        force: bool,
    ) -> Result<HostRecord> {
        caller.require(Role::Admin)?;
        let id = self
            .fleet
            .read(|state| state.find_host(caller, selector).map(|host| host.id))?;
        let view = self.fleet.host_view(id).ok_or_else(|| gone(selector))?;
        let in_use = match view.state {
            HostState::Online | HostState::Degraded => Some(format!("it is {}", view.state)),
            HostState::Offline | HostState::Locked | HostState::NeverSeen => (view.open_commands
                > 0)
            .then(|| format!("{} commands wait for it", view.open_commands)),
        };
        if let Some(why) = in_use
            && !force
        {
            return Err(Error::new(
                ErrorCode::WrongState,
                format!("the host {} is in use", view.record.name),
            )
            .because(why)
            .hint(format!(
                "leave the fleet on the host itself: ghost-agent unenroll; or: ghostctl host remove {selector} --force"
            )));
        }
        let removed = self
            .fleet
            .transact(|state| {
                let host = HostRecord::clone(state.require_host(id)?);
                let mut draft = state.draft();
                draft.delete(RecordKey::Host(id));
                draft.delete(RecordKey::HostName(
                    host.tenant.clone(),
                    host.name.as_str().to_owned(),
                ));
                if state.inventory(id).is_some() {
                    draft.delete(RecordKey::Inventory(id));
                }
                for command in state.commands_of(id) {
                    draft.delete(RecordKey::Command(id, command.id));
                }
                Ok(draft.done(host))
            })
            .await?;
        self.links
            .cut(id, "revoked", "this host was removed from the fleet");
        tracing::warn!(host = %id, name = %removed.name, principal = caller.full_name(), "host removed");
        Ok(removed)
    }
}
