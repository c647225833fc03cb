//! Core's own services: each decodes, calls a use case and encodes.

mod access;
mod enrolment;
mod events;
mod fleet;
mod health;
pub(super) mod listing;
mod replica;

use std::sync::Arc;
use std::time::Instant;

use ghost_domain::{Error, ErrorCode, Result};
use ghost_presentation::grpc::status::to_status;
use ghost_proto::agent::v1::access_service_server::AccessServiceServer;
use ghost_proto::agent::v1::event_service_server::EventServiceServer;
use ghost_proto::core::v1::enrolment_service_server::EnrolmentServiceServer;
use ghost_proto::core::v1::fleet_service_server::FleetServiceServer;
use ghost_proto::core::v1::replica_service_server::ReplicaServiceServer;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::{Request, Response, Status};
use tonic_health::pb::health_server::HealthServer;

use super::front::{FrontOptions, Parts};
use super::notes::Note;
use crate::application::accounts::{Keys, Tenants, Tokens, Users};
use crate::application::enrolment::{HostEnrolment, PersonEnrolment};
use crate::application::hosts::{GetHost, ListHosts, RemoveHost, UpdateHost};
use crate::application::vms::ListVms;
use crate::domain::Caller;

/// What a service answers with.
type Answer<T> = std::result::Result<Response<T>, Status>;

/// The caller, whom the guard has put there.
fn caller<T>(request: &Request<T>) -> Result<Caller, Status> {
    request
        .extensions()
        .get::<Caller>()
        .cloned()
        .ok_or_else(|| {
            to_status(&Error::new(
                ErrorCode::Unauthenticated,
                "the call has no identity",
            ))
        })
}

/// What the call is about, for the audit log.
fn note<T>(request: &Request<T>) -> Note {
    request
        .extensions()
        .get::<Note>()
        .cloned()
        .unwrap_or_default()
}

fn answer<T>(result: Result<T>) -> Answer<T> {
    result.map(Response::new).map_err(|error| to_status(&error))
}

/// The names that health is told for; the empty one stands for the whole server.
const SERVICES: &[&str] = &[
    "",
    "ghost.core.v1.FleetService",
    "ghost.core.v1.EnrolmentService",
    "ghost.agent.v1.AccessService",
    "ghost.agent.v1.VmService",
    "ghost.agent.v1.ImageService",
    "ghost.agent.v1.OperationService",
    "ghost.agent.v1.HostService",
    "ghost.agent.v1.NetworkService",
    "ghost.agent.v1.EventService",
    "ghost.agent.v1.GuestService",
];

pub(super) fn routes(
    parts: &Parts,
    options: &FrontOptions,
    shutdown: &CancellationToken,
) -> Result<Routes> {
    let unusable =
        |cause| Error::internal("reflection cannot describe the services").because(cause);
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(ghost_proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let fleet = || Arc::clone(&parts.fleet);
    let authority = || Arc::clone(&parts.authority);
    let users = Arc::new(Users {
        fleet: fleet(),
        admission: Arc::clone(&parts.admission),
    });
    let keys = Arc::new(Keys { fleet: fleet() });
    let tokens = Arc::new(Tokens {
        fleet: fleet(),
        authority: authority(),
        addresses: options.addresses.clone(),
    });
    let fleets = Arc::new(fleet::Fleets {
        fleet: fleet(),
        list_hosts: ListHosts { fleet: fleet() },
        get_host: GetHost { fleet: fleet() },
        update_host: UpdateHost { fleet: fleet() },
        remove_host: RemoveHost {
            fleet: fleet(),
            links: Arc::clone(&parts.links),
        },
        list_vms: ListVms { fleet: fleet() },
        admission: Arc::clone(&parts.admission),
        desk: Arc::clone(&parts.desk),
        tokens: Arc::clone(&tokens),
        tenants: Tenants {
            fleet: fleet(),
            admission: Arc::clone(&parts.admission),
        },
        users: Arc::clone(&users),
        keys: Arc::clone(&keys),
        audit: Arc::clone(&parts.audit),
        router: Arc::clone(&parts.router),
        authority: authority(),
        version: options.version.clone(),
        replica: options.replica.clone(),
        started: Instant::now(),
    });
    let access = access::Access {
        enrolment: PersonEnrolment::new(fleet(), authority()),
        tokens,
        users,
        keys,
    };
    let enrolment = enrolment::Enrolments {
        enrolment: HostEnrolment::new(fleet(), authority(), options.addresses.clone()),
    };
    let health = health::Health {
        fleet: fleet(),
        known: SERVICES,
        shutdown: shutdown.clone(),
    };
    Ok(Routes::new(listing::Listing {
        rest: FleetServiceServer::from_arc(Arc::clone(&fleets)),
        fleets,
    })
    .add_service(AccessServiceServer::new(access))
    .add_service(EventServiceServer::new(events::Events {
        chronicle: Arc::clone(&parts.events),
    }))
    .add_service(EnrolmentServiceServer::new(enrolment))
    .add_service(ReplicaServiceServer::new(replica::Replicas {
        links: Arc::clone(&parts.links),
        audit: Arc::clone(&parts.audit),
        desk: Arc::clone(&parts.desk),
        replica: options.replica.clone(),
    }))
    .add_service(HealthServer::new(health))
    .add_service(reflection().build_v1().map_err(unusable)?)
    .add_service(reflection().build_v1alpha().map_err(unusable)?))
}
