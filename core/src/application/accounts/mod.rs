//! Whom the fleet belongs to and who may use it: tenants, people, keys, and the tokens by which
//! hosts and people join. How somebody joins with one is the enrolment's business.

mod keys;
pub mod secrets;
mod tenants;
mod tokens;
mod users;

pub use keys::{CreateKeyCommand, Keys};
pub use tenants::{TenantView, Tenants};
pub use tokens::{CreateTokenCommand, CreatedToken, Tokens, WhoJoins};
pub use users::{UpdateUserCommand, UserView, Users};

use ghost_domain::{Error, ErrorCode, Result, Role, TenantName};

use crate::domain::Caller;

/// The tenant that a caller means: its own where it names none, `default` for one of no tenant.
///
/// # Errors
/// `TenantNotFound` for another one than its own.
pub fn tenant_of(caller: &Caller, named: Option<TenantName>) -> Result<TenantName> {
    match (named, &caller.tenant) {
        (Some(named), _) if caller.sees_tenant(&named) => Ok(named),
        (Some(named), _) => Err(Error::new(
            ErrorCode::TenantNotFound,
            format!("there is no tenant {named}"),
        )
        .hint("see which there are: ghostctl tenant list")),
        (None, Some(own)) => Ok(own.clone()),
        (None, None) => TenantName::new(TenantName::DEFAULT),
    }
}

/// Nobody gives a role that is above their own, or reaches further than their own.
fn may_give(caller: &Caller, role: Role, tenant: Option<&TenantName>) -> Result<()> {
    caller.require(Role::Admin)?;
    if tenant.is_none() {
        caller.require_fleet_admin()?;
    }
    caller.require(role)
}

/// A name that people see: 1 to 64 printable characters, without the slash that parts it from its
/// tenant.
pub(super) fn shown_name(name: &str) -> Result<String> {
    let legal = !name.is_empty()
        && name.chars().count() <= 64
        && !name.chars().any(|one| one.is_control() || one == '/');
    if legal {
        return Ok(name.to_owned());
    }
    Err(Error::new(
        ErrorCode::InvalidArgument,
        "a name of 1 to 64 printable characters is needed",
    )
    .field("name", "1 to 64 printable characters without '/'"))
}

#[cfg(test)]
mod tests;
