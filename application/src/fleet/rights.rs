//! What Ghost Core's principals may do on this host: the role that Core says, bounded by what the
//! host's owner allows, and some things never.

use std::sync::Arc;

use ghost_domain::fleet::{CorePermissions, FleetPrincipal};
use ghost_domain::{Error, ErrorCode, Principal, PrincipalSource, Result, Role};

use crate::guest::escape;
use crate::registry::{Model, Registry};

/// Most bytes of the name of a principal that Core says.
const MOST_NAME: usize = 256;

/// What a call of Core's touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CoreReach {
    /// Hosts, VMs, images, operations: by role.
    Plain,
    /// The inside of guests: their programs, files, accounts, consoles and what those have shown.
    Enter,
    /// What stays with the host's owner: credentials, lockdown, the audit log, the link itself.
    Never,
}

/// Makes a principal of somebody whom Core vouches for.
pub struct AdmitCore {
    pub(crate) registry: Arc<Registry>,
}

impl AdmitCore {
    /// The principal, where both Core's word and the owner's permissions allow a call that reaches
    /// so far and needs `role`.
    ///
    /// # Errors
    /// `CorePermissionDenied` where the owner does not let Core, `PermissionDenied` where Core says
    /// a lesser role.
    pub fn execute(
        &self,
        caller: &FleetPrincipal,
        reach: CoreReach,
        role: Role,
    ) -> Result<Principal> {
        let permissions = self.registry.read(|model| model.core_permissions);
        admit(permissions, caller, reach, role)
    }
}

pub(crate) fn admit(
    permissions: CorePermissions,
    caller: &FleetPrincipal,
    reach: CoreReach,
    role: Role,
) -> Result<Principal> {
    let Some(most) = permissions.most_role() else {
        return Err(refused(
            permissions,
            "the host's owner lets Core do nothing",
        ));
    };
    if reach == CoreReach::Never || role > Role::Operator {
        return Err(never());
    }
    let principal = Principal {
        name: escape(&caller.name, MOST_NAME),
        role: caller.role.min(most),
        source: PrincipalSource::Core {
            tenant: caller.tenant.clone(),
        },
        guest_access: permissions >= CorePermissions::OperateAndEnter,
    };
    if caller.role < role {
        return Err(Error::new(
            ErrorCode::PermissionDenied,
            format!(
                "{} has the role {} in the fleet, and this needs {role}",
                principal.name, caller.role
            ),
        )
        .hint("ask an administrator of the fleet"));
    }
    if most < role {
        return Err(refused(permissions, "it needs more than to look"));
    }
    if reach == CoreReach::Enter {
        check_permissions_to_enter(permissions)?;
    }
    Ok(principal)
}

fn refused(permissions: CorePermissions, cause: &str) -> Error {
    Error::new(
        ErrorCode::CorePermissionDenied,
        "the host's owner does not let Ghost Core do this",
    )
    .because(format!("core.permissions is {permissions}: {cause}"))
    .hint("the owner decides: core.permissions in /etc/ghost/agent.yaml on the host")
}

fn never() -> Error {
    Error::new(
        ErrorCode::CorePermissionDenied,
        "this is never done through Ghost Core",
    )
    .because(
        "whatever core.permissions says, this host's credentials, lockdown and audit log, and \
         files and addresses that Core names, stay with its owner",
    )
    .hint("do it on the host itself")
}

fn check_permissions_to_enter(permissions: CorePermissions) -> Result<()> {
    if permissions >= CorePermissions::OperateAndEnter {
        return Ok(());
    }
    Err(refused(permissions, "guests may not be entered"))
}

/// Refuses Core's principals what is for the host's owner alone.
pub(crate) fn check_own(principal: &Principal) -> Result<()> {
    match principal.source {
        PrincipalSource::Core { .. } => Err(never()),
        _ => Ok(()),
    }
}

/// Refuses Core's principals the inside of guests, unless the owner lets them.
pub(crate) fn check_enter(model: &Model, principal: &Principal) -> Result<()> {
    match principal.source {
        PrincipalSource::Core { .. } => check_permissions_to_enter(model.core_permissions),
        _ => Ok(()),
    }
}

/// `<tenant>/<user>` of a principal of Core: whom a VM that it makes belongs to.
pub(crate) fn owner_of(principal: &Principal) -> Option<String> {
    matches!(principal.source, PrincipalSource::Core { .. }).then(|| principal.name.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(role: Role) -> FleetPrincipal {
        FleetPrincipal {
            name: "acme/alice".into(),
            tenant: None,
            role,
        }
    }

    const PERMISSIONS: [CorePermissions; 4] = [
        CorePermissions::Off,
        CorePermissions::Read,
        CorePermissions::Operate,
        CorePermissions::OperateAndEnter,
    ];

    #[test]
    fn nobody_is_more_than_core_says_and_the_owner_allows_and_never_admin() {
        for permissions in PERMISSIONS {
            for said in [Role::Viewer, Role::Operator, Role::Admin] {
                for needs in [Role::Viewer, Role::Operator, Role::Admin] {
                    for reach in [CoreReach::Plain, CoreReach::Enter, CoreReach::Never] {
                        let outcome = admit(permissions, &caller(said), reach, needs);
                        let most = permissions.most_role();
                        let allowed = reach != CoreReach::Never
                            && most.is_some_and(|most| most >= needs)
                            && said >= needs
                            && (reach == CoreReach::Plain
                                || permissions == CorePermissions::OperateAndEnter);
                        let case = format!("{permissions} {said} {needs} {reach:?}");
                        assert_eq!(outcome.is_ok(), allowed, "{case}");
                        match outcome {
                            Ok(principal) => {
                                assert!(principal.role <= said, "{case}");
                                assert!(principal.role <= Role::Operator, "{case}");
                            }
                            Err(error) if error.code() == ErrorCode::CorePermissionDenied => {
                                assert!(
                                    error.cause().unwrap().contains("core.permissions"),
                                    "{case}: {error}"
                                );
                            }
                            Err(error) => {
                                assert_eq!(error.code(), ErrorCode::PermissionDenied, "{case}");
                                assert!(said < needs, "{case}");
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_core_calls_somebody_is_one_bounded_line() {
        let caller = FleetPrincipal {
            name: format!("acme/\n\u{202e}{}", "x".repeat(10_000)),
            ..caller(Role::Viewer)
        };
        let permissions = CorePermissions::default();
        let principal = admit(permissions, &caller, CoreReach::Plain, Role::Viewer).unwrap();
        assert!(principal.name.starts_with("acme/\\n\\u{202e}x"));
        assert!(principal.name.len() < 300);
    }
}
