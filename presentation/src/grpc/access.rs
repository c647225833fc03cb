//! Which role each RPC needs: one table, which a test holds to the descriptor set, so that no RPC
//! can be forgotten. The use cases check the same again.

use ghost_application::fleet::CoreReach;
use ghost_domain::Role;

use crate::access::{Access, GUEST, HOOKS, Shape, UPDATE, WHOLE_LOG};

/// What is fixed of a method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Method {
    /// The path of its requests.
    pub path: &'static str,
    /// Who may call it.
    pub access: Access,
    /// How it ends.
    pub shape: Shape,
    /// How far it reaches, where it comes through Ghost Core.
    pub core: CoreReach,
}

impl Method {
    /// Never through Ghost Core, whatever the role.
    const fn own(mut self) -> Self {
        self.core = CoreReach::Never;
        self
    }

    /// Through Ghost Core as what enters guests, though the host's own people need not be let in.
    const fn shows_guests(mut self) -> Self {
        self.core = CoreReach::Enter;
        self
    }
}

/// What is for administrators of the host is nothing for Core.
const fn reach(role: Role) -> CoreReach {
    match role {
        Role::Viewer | Role::Operator => CoreReach::Plain,
        Role::Admin => CoreReach::Never,
    }
}

const fn unary(path: &'static str, role: Role) -> Method {
    Method {
        path,
        access: Access::Role(role),
        shape: Shape::Unary,
        core: reach(role),
    }
}

const fn stream(path: &'static str, role: Role) -> Method {
    Method {
        path,
        access: Access::Role(role),
        shape: Shape::Stream,
        core: reach(role),
    }
}

const fn long(path: &'static str, role: Role, shape: Shape) -> Method {
    Method {
        path,
        access: Access::Role(role),
        shape,
        core: reach(role),
    }
}

/// What enters a guest.
const fn enters(path: &'static str, shape: Shape) -> Method {
    Method {
        path,
        access: Access::Guests,
        shape,
        core: CoreReach::Enter,
    }
}

const fn anyone(path: &'static str, shape: Shape) -> Method {
    Method {
        path,
        access: Access::Anyone,
        shape,
        core: CoreReach::Plain,
    }
}

use Role::{Admin, Operator, Viewer};

/// Every method that is served.
pub const METHODS: &[Method] = &[
    unary("/ghost.agent.v1.VmService/Create", Operator),
    unary("/ghost.agent.v1.VmService/Get", Viewer),
    unary("/ghost.agent.v1.VmService/List", Viewer),
    unary("/ghost.agent.v1.VmService/Update", Operator),
    unary("/ghost.agent.v1.VmService/Delete", Operator),
    stream("/ghost.agent.v1.VmService/Watch", Viewer),
    unary("/ghost.agent.v1.VmService/Start", Operator),
    unary("/ghost.agent.v1.VmService/Stop", Operator),
    unary("/ghost.agent.v1.VmService/Restart", Operator),
    unary("/ghost.agent.v1.VmService/Pause", Operator),
    unary("/ghost.agent.v1.VmService/Resume", Operator),
    // A console is the guest's keyboard, and its log may hold what was typed or printed there.
    enters("/ghost.agent.v1.VmService/Console", Shape::Stream),
    stream("/ghost.agent.v1.VmService/Logs", Operator).shows_guests(),
    unary("/ghost.agent.v1.ImageService/Get", Viewer),
    unary("/ghost.agent.v1.ImageService/List", Viewer),
    unary("/ghost.agent.v1.ImageService/ListCatalogue", Viewer),
    unary("/ghost.agent.v1.ImageService/Pull", Operator),
    // Core names images of the catalogue and brings none.
    stream("/ghost.agent.v1.ImageService/Import", Operator).own(),
    unary("/ghost.agent.v1.ImageService/Delete", Operator),
    unary("/ghost.agent.v1.OperationService/Get", Viewer),
    unary("/ghost.agent.v1.OperationService/List", Viewer),
    stream("/ghost.agent.v1.OperationService/Watch", Viewer),
    unary("/ghost.agent.v1.OperationService/Cancel", Operator),
    unary("/ghost.agent.v1.HostService/GetStatus", Viewer),
    unary("/ghost.agent.v1.HostService/GetCoreLink", Viewer),
    unary("/ghost.agent.v1.HostService/ReconnectCore", Operator).own(),
    unary("/ghost.agent.v1.HostService/AllowCoreDeletes", Admin),
    unary("/ghost.agent.v1.NetworkService/Get", Viewer),
    unary("/ghost.agent.v1.NetworkService/List", Viewer),
    stream("/ghost.agent.v1.EventService/Watch", Viewer),
    unary("/ghost.agent.v1.AccessService/CreateToken", Admin),
    // Whoever enrols has no identity yet: the token decides.
    anyone("/ghost.agent.v1.AccessService/Enroll", Shape::Unary).own(),
    unary("/ghost.agent.v1.AccessService/Renew", Viewer).own(),
    unary("/ghost.agent.v1.AccessService/WhoAmI", Viewer).own(),
    unary("/ghost.agent.v1.AccessService/ListCertificates", Admin),
    unary("/ghost.agent.v1.AccessService/RevokeCertificate", Admin),
    unary("/ghost.agent.v1.AccessService/CreateKey", Admin),
    unary("/ghost.agent.v1.AccessService/ListKeys", Admin),
    unary("/ghost.agent.v1.AccessService/RevokeKey", Admin),
    unary("/ghost.agent.v1.GuestService/GetStatus", Viewer),
    unary("/ghost.agent.v1.GuestService/Ping", Viewer),
    enters("/ghost.agent.v1.GuestService/Exec", Shape::Stream),
    enters("/ghost.agent.v1.GuestService/StatFile", GUEST),
    enters("/ghost.agent.v1.GuestService/ListFiles", GUEST),
    enters("/ghost.agent.v1.GuestService/MakeDirectory", GUEST),
    enters("/ghost.agent.v1.GuestService/MakeLink", GUEST),
    enters("/ghost.agent.v1.GuestService/ReadFile", Shape::Stream),
    enters("/ghost.agent.v1.GuestService/WriteFile", Shape::Stream),
    enters("/ghost.agent.v1.GuestService/Shutdown", GUEST),
    enters("/ghost.agent.v1.GuestService/SetPassword", GUEST),
    enters("/ghost.agent.v1.GuestService/UpdateSshKeys", GUEST),
    enters("/ghost.agent.v1.GuestService/SyncClock", GUEST),
    enters("/ghost.agent.v1.GuestService/Freeze", HOOKS),
    enters("/ghost.agent.v1.GuestService/Thaw", HOOKS),
    enters("/ghost.agent.v1.GuestService/UpdateGuest", UPDATE),
    // Off is for every operator; the use case asks for more where it is to be on.
    unary("/ghost.agent.v1.GuestService/SetAccess", Operator),
    unary("/ghost.agent.v1.GuestService/GetHistory", Viewer),
    stream("/ghost.agent.v1.GuestService/WatchTelemetry", Viewer),
    unary("/ghost.agent.v1.GuestService/RegisterAddress", Operator),
    unary("/ghost.agent.v1.GuestService/SetLockdown", Admin),
    unary("/ghost.agent.v1.GuestService/GetLockdown", Viewer),
    // Who did what is for those who answer for it.
    stream("/ghost.agent.v1.GuestService/ListAudit", Admin),
    long("/ghost.agent.v1.GuestService/VerifyAudit", Admin, WHOLE_LOG),
    // For load balancers and orchestrators, which have no identity; says nothing but "serving".
    anyone("/grpc.health.v1.Health/Check", Shape::Unary),
    anyone("/grpc.health.v1.Health/Watch", Shape::Stream),
    stream(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        Viewer,
    ),
    stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        Viewer,
    ),
];

/// The method of a request's path; `None` for what is not served.
pub fn method(path: &str) -> Option<&'static Method> {
    METHODS.iter().find(|method| method.path == path)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use prost::Message;

    use super::*;

    /// Path of every RPC of an encoded descriptor set, and whether it streams.
    fn described(encoded: &[u8]) -> BTreeMap<String, bool> {
        let set = prost_types::FileDescriptorSet::decode(encoded).unwrap();
        let mut found = BTreeMap::new();
        for file in &set.file {
            // Served by Core alone.
            if file.package() == "ghost.core.v1" {
                continue;
            }
            for service in &file.service {
                for method in &service.method {
                    let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                    let streams = method.client_streaming() || method.server_streaming();
                    found.insert(path, streams);
                }
            }
        }
        found
    }

    #[test]
    fn every_rpc_declares_its_role_and_no_other_is_declared() {
        let mut expected = described(ghost_proto::DESCRIPTORS);
        assert!(expected.len() > 30);
        expected.extend(described(tonic_health::pb::FILE_DESCRIPTOR_SET));
        expected.extend(described(tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET));
        expected.extend(described(
            tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
        ));
        let declared: BTreeMap<String, bool> = METHODS
            .iter()
            .map(|method| (method.path.to_owned(), method.shape.is_stream()))
            .collect();
        assert_eq!(declared, expected);
        assert_eq!(declared.len(), METHODS.len(), "a path stands twice");
    }

    /// What a guest service's call needs is decided here by name, so that a new one is not forgotten.
    #[test]
    fn whatever_enters_a_guest_needs_more_than_a_role() {
        let elsewhere = [
            // What is looked at, or is of the host's own.
            "GetStatus",
            "Ping",
            "GetHistory",
            "WatchTelemetry",
            "RegisterAddress",
            "SetAccess",
            "SetLockdown",
            "GetLockdown",
            "ListAudit",
            "VerifyAudit",
        ];
        let mut entering = 0;
        for method in METHODS {
            let guest = method.path.strip_prefix("/ghost.agent.v1.GuestService/");
            let enters = guest.is_some_and(|name| !elsewhere.contains(&name))
                || method.path == "/ghost.agent.v1.VmService/Console";
            assert_eq!(method.access == Access::Guests, enters, "{}", method.path);
            entering += usize::from(enters);
        }
        assert!(entering > 10);
    }

    #[test]
    fn what_is_the_host_owner_s_is_never_core_s() {
        for method in METHODS {
            let own = method.path.starts_with("/ghost.agent.v1.AccessService/")
                || method.access == Access::Role(Role::Admin);
            if own {
                assert_eq!(method.core, CoreReach::Never, "{}", method.path);
            }
            if method.access == Access::Guests {
                assert_eq!(method.core, CoreReach::Enter, "{}", method.path);
            }
        }
        let others: Vec<_> = METHODS
            .iter()
            .filter(|one| {
                one.core != CoreReach::Plain && one.access == Access::Role(Role::Operator)
            })
            .map(|one| one.path)
            .collect();
        assert_eq!(
            others,
            [
                "/ghost.agent.v1.VmService/Logs",
                "/ghost.agent.v1.ImageService/Import",
                "/ghost.agent.v1.HostService/ReconnectCore",
            ]
        );
    }

    #[test]
    fn only_enrolment_and_health_are_open() {
        let open: Vec<_> = METHODS
            .iter()
            .filter(|method| method.access == Access::Anyone)
            .map(|method| method.path)
            .collect();
        assert_eq!(
            open,
            [
                "/ghost.agent.v1.AccessService/Enroll",
                "/grpc.health.v1.Health/Check",
                "/grpc.health.v1.Health/Watch",
            ]
        );
    }
}
