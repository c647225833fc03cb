//! What is fixed of each of Core's own methods: who may call it, how it ends, whether it is written
//! down. A test holds the table to the descriptors. The methods of hosts are in
//! [`ghost_presentation::grpc::access`].

use ghost_domain::Role;
use ghost_presentation::Shape;

/// Who may call a method of Core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CoreAccess {
    /// Anybody who reaches the listener: the token in the call decides, or there is nothing to hide.
    Anyone,
    /// Somebody with at least this role; of objects of other tenants there are none.
    Role(Role),
    /// An administrator of no tenant.
    FleetAdmin,
    /// A host, by its certificate.
    Host,
    /// Another replica of this Core, by its certificate.
    Replica,
}

/// What is fixed of a method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CoreMethod {
    /// The path of its requests.
    pub path: &'static str,
    /// Who may call it.
    pub access: CoreAccess,
    /// How it ends.
    pub shape: Shape,
    /// Whether each call is written to the audit log.
    pub audited: bool,
}

const fn reads(path: &'static str, role: Role) -> CoreMethod {
    CoreMethod {
        path,
        access: CoreAccess::Role(role),
        shape: Shape::Unary,
        audited: false,
    }
}

const fn watches(path: &'static str, role: Role) -> CoreMethod {
    CoreMethod {
        path,
        access: CoreAccess::Role(role),
        shape: Shape::Stream,
        audited: false,
    }
}

const fn changes(path: &'static str, access: CoreAccess) -> CoreMethod {
    CoreMethod {
        path,
        access,
        shape: Shape::Unary,
        audited: true,
    }
}

const fn open(path: &'static str, shape: Shape) -> CoreMethod {
    CoreMethod {
        path,
        access: CoreAccess::Anyone,
        shape,
        audited: false,
    }
}

use CoreAccess::{Anyone, FleetAdmin, Host, Replica};
use Role::{Admin, Operator, Viewer};

/// Watching events, which is Core's where no host is named.
pub(super) const EVENTS: &str = "/ghost.agent.v1.EventService/Watch";

/// Every method that Core serves itself.
pub const CORE_METHODS: &[CoreMethod] = &[
    reads("/ghost.core.v1.FleetService/GetStatus", Viewer),
    reads("/ghost.core.v1.FleetService/ListHosts", Viewer),
    reads("/ghost.core.v1.FleetService/GetHost", Viewer),
    changes(
        "/ghost.core.v1.FleetService/UpdateHost",
        CoreAccess::Role(Operator),
    ),
    changes(
        "/ghost.core.v1.FleetService/RemoveHost",
        CoreAccess::Role(Admin),
    ),
    watches("/ghost.core.v1.FleetService/WatchHosts", Viewer),
    reads("/ghost.core.v1.FleetService/ListVms", Viewer),
    reads("/ghost.core.v1.FleetService/Place", Viewer),
    changes(
        "/ghost.core.v1.FleetService/QueueCommand",
        CoreAccess::Role(Operator),
    ),
    reads("/ghost.core.v1.FleetService/GetCommand", Viewer),
    reads("/ghost.core.v1.FleetService/ListCommands", Viewer),
    changes(
        "/ghost.core.v1.FleetService/CancelCommand",
        CoreAccess::Role(Operator),
    ),
    changes(
        "/ghost.core.v1.FleetService/CreateToken",
        CoreAccess::Role(Admin),
    ),
    changes("/ghost.core.v1.FleetService/CreateTenant", FleetAdmin),
    reads("/ghost.core.v1.FleetService/ListTenants", Viewer),
    changes("/ghost.core.v1.FleetService/UpdateTenant", FleetAdmin),
    changes("/ghost.core.v1.FleetService/DeleteTenant", FleetAdmin),
    reads("/ghost.core.v1.FleetService/ListUsers", Admin),
    changes(
        "/ghost.core.v1.FleetService/UpdateUser",
        CoreAccess::Role(Admin),
    ),
    changes(
        "/ghost.core.v1.FleetService/RevokeUser",
        CoreAccess::Role(Admin),
    ),
    changes(
        "/ghost.core.v1.FleetService/CreateKey",
        CoreAccess::Role(Admin),
    ),
    reads("/ghost.core.v1.FleetService/ListKeys", Admin),
    changes(
        "/ghost.core.v1.FleetService/RevokeKey",
        CoreAccess::Role(Admin),
    ),
    watches("/ghost.core.v1.FleetService/ListAudit", Admin),
    // The token, or the certificate that ended and the proof, decide.
    changes("/ghost.core.v1.EnrolmentService/Enroll", Anyone),
    changes("/ghost.core.v1.EnrolmentService/Recover", Anyone),
    // Ten thousand hosts renew every twelve hours: that is no news.
    CoreMethod {
        path: "/ghost.core.v1.EnrolmentService/Renew",
        access: Host,
        shape: Shape::Unary,
        audited: false,
    },
    CoreMethod {
        path: "/ghost.core.v1.ReplicaService/Owns",
        access: Replica,
        shape: Shape::Unary,
        audited: false,
    },
    // Whom it is for was looked at, and written down, by the replica that asks.
    CoreMethod {
        path: "/ghost.core.v1.ReplicaService/Carry",
        access: Replica,
        shape: Shape::Stream,
        audited: false,
    },
    CoreMethod {
        path: "/ghost.core.v1.ReplicaService/ListOwnAudit",
        access: Replica,
        shape: Shape::Stream,
        audited: false,
    },
    CoreMethod {
        path: "/ghost.core.v1.ReplicaService/GetLease",
        access: Replica,
        shape: Shape::Unary,
        audited: false,
    },
    // Core's own operators, as ghostctl knows them from a host's agent.
    changes(
        "/ghost.agent.v1.AccessService/CreateToken",
        CoreAccess::Role(Admin),
    ),
    changes("/ghost.agent.v1.AccessService/Enroll", Anyone),
    reads("/ghost.agent.v1.AccessService/Renew", Viewer),
    reads("/ghost.agent.v1.AccessService/WhoAmI", Viewer),
    reads("/ghost.agent.v1.AccessService/ListCertificates", Admin),
    changes(
        "/ghost.agent.v1.AccessService/RevokeCertificate",
        CoreAccess::Role(Admin),
    ),
    changes(
        "/ghost.agent.v1.AccessService/CreateKey",
        CoreAccess::Role(Admin),
    ),
    reads("/ghost.agent.v1.AccessService/ListKeys", Admin),
    changes(
        "/ghost.agent.v1.AccessService/RevokeKey",
        CoreAccess::Role(Admin),
    ),
    // What happens in the fleet; with the metadata `ghost-host` on that host.
    watches(EVENTS, Viewer),
    // For load balancers and orchestrators, which have no identity; says nothing but "serving".
    open("/grpc.health.v1.Health/Check", Shape::Unary),
    open("/grpc.health.v1.Health/Watch", Shape::Stream),
    watches(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        Viewer,
    ),
    watches(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        Viewer,
    ),
];

/// The method of a request's path; `None` for what Core does not serve itself.
pub fn core_method(path: &str) -> Option<&'static CoreMethod> {
    CORE_METHODS.iter().find(|method| method.path == path)
}

/// Methods of Core's AccessService that mean Core whatever host the rest of a program's calls are
/// for: a program renews its certificate and asks who it is where it logged in.
pub(super) fn is_always_ours(path: &str) -> bool {
    matches!(
        path,
        "/ghost.agent.v1.AccessService/Enroll"
            | "/ghost.agent.v1.AccessService/Renew"
            | "/ghost.agent.v1.AccessService/WhoAmI"
    )
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use ghost_presentation::grpc::access;
    use prost::Message;

    use super::*;

    /// Every RPC of the descriptors: its path and whether it streams.
    fn described(encoded: &[u8]) -> BTreeMap<String, bool> {
        let set = prost_types::FileDescriptorSet::decode(encoded).unwrap();
        let mut found = BTreeMap::new();
        for file in &set.file {
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
    fn every_rpc_is_cores_or_goes_to_a_host() {
        let all = described(ghost_proto::DESCRIPTORS);
        assert!(all.len() > 80);
        for (path, streams) in &all {
            let ours = core_method(path);
            let theirs = access::method(path);
            let access = path.starts_with("/ghost.agent.v1.AccessService/") || path == EVENTS;
            assert_eq!(
                ours.is_some(),
                path.starts_with("/ghost.core.v1.") || access,
                "{path}"
            );
            assert_eq!(
                theirs.is_some(),
                path.starts_with("/ghost.agent.v1."),
                "{path}"
            );
            if let Some(ours) = ours {
                assert_eq!(ours.shape.is_stream(), *streams, "{path}");
            }
        }
        for method in CORE_METHODS {
            let standard = method.path.starts_with("/grpc.");
            assert!(standard || all.contains_key(method.path), "{}", method.path);
            let twice = CORE_METHODS.iter().filter(|one| one.path == method.path);
            assert_eq!(twice.count(), 1, "{} stands twice", method.path);
        }
    }

    #[test]
    fn only_enrolment_and_health_are_open() {
        let open: Vec<_> = CORE_METHODS
            .iter()
            .filter(|method| method.access == Anyone)
            .map(|method| method.path)
            .collect();
        assert_eq!(
            open,
            [
                "/ghost.core.v1.EnrolmentService/Enroll",
                "/ghost.core.v1.EnrolmentService/Recover",
                "/ghost.agent.v1.AccessService/Enroll",
                "/grpc.health.v1.Health/Check",
                "/grpc.health.v1.Health/Watch",
            ]
        );
    }

    #[test]
    fn whatever_changes_something_is_written_down() {
        for method in CORE_METHODS {
            let verb = method.path.rsplit('/').next().unwrap();
            let reads = [
                "Get", "List", "Watch", "Place", "Check", "Owns", "Carry", "WhoAmI", "Renew",
                "Server",
            ];
            let only_reads = reads.iter().any(|prefix| verb.starts_with(prefix));
            assert_eq!(method.audited, !only_reads, "{}", method.path);
        }
    }
}
