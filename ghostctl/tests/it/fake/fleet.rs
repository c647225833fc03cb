//! `FleetService`, for a fake that stands for Ghost Core.

use ghost_proto::agent::v1::{Resources, VmState};
use ghost_proto::core::metadata;
use ghost_proto::core::v1::fleet_service_server::FleetService;
use ghost_proto::core::v1::queue_command_request::Action;
use ghost_proto::core::v1::*;
use tonic::{Request, Response, Status};

use super::{Fake, Stream, error, id_of, moment, seconds};

type Answer<T> = Result<Response<T>, Status>;

fn resources(cpus: u32, gib: u64) -> Option<Resources> {
    Some(Resources {
        cpus,
        memory_bytes: gib << 30,
        disk_bytes: gib << 34,
    })
}

fn host(name: &str, state: &str, reason: &str) -> Host {
    Host {
        id: id_of("host", name),
        name: name.to_owned(),
        tenant: "acme".to_owned(),
        state: state.to_owned(),
        state_reason: reason.to_owned(),
        state_since: moment(-600),
        last_heard_age: seconds(4),
        last_heard_at: moment(-4),
        labels: [("site".to_owned(), "home".to_owned())].into(),
        agent_version: "0.1.0".to_owned(),
        facts: Some(HostFacts {
            hostname: "pc\x1b[2J".to_owned(),
            operating_system: "Debian GNU/Linux 12".to_owned(),
            kernel: "6.1.0".to_owned(),
            cpu_model: "Test CPU".to_owned(),
            accelerator: "tcg".to_owned(),
            ..HostFacts::default()
        }),
        capacity: Some(HostCapacity {
            total: resources(8, 16),
            allocatable: resources(6, 12),
            committed: resources(4, 4),
            memory_available_bytes: 9 << 30,
            disk_free_bytes: 300 << 30,
            load_one_minute: 0.4,
        }),
        health: Some(HostHealth {
            agent_state: "running".to_owned(),
            hypervisor_connected: true,
            store_writable: true,
            warnings: vec!["the clock is off by 3 s".to_owned()],
            lockdown: false,
        }),
        link: Some(LinkFacts {
            round_trip_seconds: 0.0123,
            connects: 2,
            last_loss: "nothing was heard for 15 s".to_owned(),
        }),
        carrier: "link".to_owned(),
        replica: "core".to_owned(),
        permissions: "operate_and_enter".to_owned(),
        vms: [("running".to_owned(), 2), ("stopped".to_owned(), 1)].into(),
        queued_commands: 1,
        enrolled_at: moment(-7200),
        certificate_expires_at: moment(40_000),
        certificate_generation: 3,
        ..Host::default()
    }
}

fn vm(name: &str, on: &str, host_state: &str) -> FleetVm {
    FleetVm {
        host: on.to_owned(),
        host_id: id_of("host", on),
        tenant: "acme".to_owned(),
        host_state: host_state.to_owned(),
        age: seconds(90),
        vm: Some(VmSummary {
            id: id_of("vm", name),
            name: name.to_owned(),
            state: VmState::Running.into(),
            vcpus: 2,
            memory_bytes: 2 << 30,
            disk_bytes: 10 << 30,
            image: "debian-12".to_owned(),
            addresses: vec!["10.77.0.2".to_owned()],
            generation: 3,
            created_at: moment(-3600),
            owner: "acme/alice".to_owned(),
            ..VmSummary::default()
        }),
    }
}

fn command(id: &str, kind: &str, subject: &str, status: CommandStatus) -> QueuedCommand {
    QueuedCommand {
        id: id.to_owned(),
        host: "pc".to_owned(),
        host_id: id_of("host", "pc"),
        tenant: "acme".to_owned(),
        kind: kind.to_owned(),
        subject: subject.to_owned(),
        status: status.into(),
        generation: 7,
        request_id: "once".to_owned(),
        issued_by: "acme/alice".to_owned(),
        issued_at: moment(-60),
        deadline: moment(3500),
        ..QueuedCommand::default()
    }
}

fn tenant(name: &str, quota: Option<Quota>) -> Tenant {
    Tenant {
        name: name.to_owned(),
        quota,
        used: Some(Quota {
            vms: 3,
            cpus: 6,
            memory_bytes: 6 << 30,
            disk_bytes: 30 << 30,
        }),
        user_quota: None,
        hosts: 2,
        created_at: moment(-86_400),
    }
}

fn user(name: &str) -> User {
    User {
        id: id_of("user", name),
        name: name.to_owned(),
        tenant: "acme".to_owned(),
        role: "operator".to_owned(),
        source: "certificate".to_owned(),
        quota: None,
        used: None,
        created_at: moment(-3600),
        certificate_expires_at: moment(40_000),
        revoked_at: None,
    }
}

fn absent(name: &str) -> Result<(), Status> {
    if name.starts_with("absent") {
        return Err(error(
            "host_not_found",
            &format!("there is no host {name}"),
            "",
            "ghostctl host list",
        ));
    }
    Ok(())
}

impl Fake {
    /// What Core says to a call that only a host can answer.
    pub(super) fn needs_host<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let routed = request.metadata().contains_key(metadata::HOST);
        if !self.0.is_core.load(std::sync::atomic::Ordering::Relaxed) || routed {
            return Ok(());
        }
        Err(error(
            "host_required",
            "this is a call for a host",
            "Ghost Core was asked, and no host was named",
            "ghostctl --host HOST, one of: ghostctl host list",
        ))
    }

    fn core(&self) -> Result<(), Status> {
        if self.0.is_core.load(std::sync::atomic::Ordering::Relaxed) {
            return Ok(());
        }
        Err(Status::unimplemented("no such service"))
    }
}

#[tonic::async_trait]
impl FleetService for Fake {
    async fn get_status(&self, request: Request<GetCoreStatusRequest>) -> Answer<CoreStatus> {
        self.core()?;
        self.note(request);
        Ok(Response::new(CoreStatus {
            core_id: id_of("core", "one"),
            replica: "core-1".to_owned(),
            version: "0.1.0".to_owned(),
            uptime: seconds(7200),
            epoch: 4,
            store: "etcd".to_owned(),
            store_writable: true,
            trust_domain: "ghost.local".to_owned(),
            hosts: [("online".to_owned(), 2), ("offline".to_owned(), 1)].into(),
            vms: 5,
            queued_commands: 1,
            replicas: vec![Replica {
                name: "core-1".to_owned(),
                address: "core-1:7443".to_owned(),
                links: 2,
            }],
            warnings: vec!["one member of etcd does not answer".to_owned()],
            ..CoreStatus::default()
        }))
    }

    async fn list_hosts(&self, request: Request<ListHostsRequest>) -> Answer<ListHostsResponse> {
        self.core()?;
        let request = self.note(request);
        let mut hosts = vec![
            host("pc", "online", ""),
            Host {
                cordoned: true,
                cordon_reason: "a new disk".to_owned(),
                ..host("rack-1", "degraded", "link: no answer for 13 s")
            },
        ];
        hosts.retain(|host| request.state.is_empty() || host.state == request.state);
        Ok(Response::new(ListHostsResponse { hosts }))
    }

    async fn get_host(&self, request: Request<GetHostRequest>) -> Answer<Host> {
        self.core()?;
        let request = self.note(request);
        absent(&request.host)?;
        Ok(Response::new(host(&request.host, "online", "")))
    }

    async fn update_host(&self, request: Request<UpdateHostRequest>) -> Answer<Host> {
        self.core()?;
        let request = self.note(request);
        absent(&request.host)?;
        let name = if request.name.is_empty() {
            request.host
        } else {
            request.name
        };
        Ok(Response::new(host(&name, "online", "")))
    }

    async fn remove_host(&self, request: Request<RemoveHostRequest>) -> Answer<RemoveHostResponse> {
        self.core()?;
        let request = self.note(request);
        absent(&request.host)?;
        Ok(Response::new(RemoveHostResponse {}))
    }

    type WatchHostsStream = Stream<Host>;

    async fn watch_hosts(&self, _: Request<WatchHostsRequest>) -> Answer<Self::WatchHostsStream> {
        Err(Status::unimplemented("not asked for"))
    }

    async fn list_vms(
        &self,
        request: Request<ListFleetVmsRequest>,
    ) -> Answer<ListFleetVmsResponse> {
        self.core()?;
        self.note(request);
        Ok(Response::new(ListFleetVmsResponse {
            vms: vec![vm("web-1", "pc", "online"), vm("db-1", "rack-1", "offline")],
        }))
    }

    async fn place(&self, _: Request<PlaceRequest>) -> Answer<Placement> {
        Err(Status::unimplemented("not asked for"))
    }

    async fn queue_command(&self, request: Request<QueueCommandRequest>) -> Answer<QueuedCommand> {
        self.core()?;
        let request = self.note(request);
        absent(&request.host)?;
        let (kind, subject) = match request.action {
            Some(Action::StartVm(start)) => ("start_vm", start.vm),
            Some(Action::StopVm(stop)) => ("stop_vm", stop.vm),
            Some(Action::DeleteVm(delete)) => ("delete_vm", delete.vm),
            _ => ("other", String::new()),
        };
        let id = id_of("command", &subject);
        Ok(Response::new(command(
            &id,
            kind,
            &subject,
            CommandStatus::Queued,
        )))
    }

    async fn get_command(&self, request: Request<GetCommandRequest>) -> Answer<QueuedCommand> {
        self.core()?;
        let id = self.note(request).id;
        Ok(Response::new(QueuedCommand {
            code: "vm_not_found".to_owned(),
            message: "there is no VM web".to_owned(),
            ..command(&id, "start_vm", "web", CommandStatus::Refused)
        }))
    }

    async fn list_commands(
        &self,
        request: Request<ListCommandsRequest>,
    ) -> Answer<ListCommandsResponse> {
        self.core()?;
        self.note(request);
        let id = id_of("command", "web");
        Ok(Response::new(ListCommandsResponse {
            commands: vec![command(&id, "start_vm", "web", CommandStatus::Queued)],
        }))
    }

    async fn cancel_command(
        &self,
        request: Request<CancelCommandRequest>,
    ) -> Answer<QueuedCommand> {
        self.core()?;
        let id = self.note(request).id;
        Ok(Response::new(command(
            &id,
            "start_vm",
            "web",
            CommandStatus::Cancelled,
        )))
    }

    async fn create_token(&self, request: Request<CreateFleetTokenRequest>) -> Answer<FleetToken> {
        self.core()?;
        let request = self.note(request);
        Ok(Response::new(FleetToken {
            token: "ghost-host-v1.addresses.id.secret.fingerprint".to_owned(),
            expires_at: moment(590),
            tenant: request.tenant,
            role: request.role,
            hint: "ghost-agent enroll --token TOKEN".to_owned(),
        }))
    }

    async fn create_tenant(&self, request: Request<CreateTenantRequest>) -> Answer<Tenant> {
        self.core()?;
        let request = self.note(request);
        Ok(Response::new(tenant(&request.name, request.quota)))
    }

    async fn list_tenants(
        &self,
        request: Request<ListTenantsRequest>,
    ) -> Answer<ListTenantsResponse> {
        self.core()?;
        self.note(request);
        let quota = Some(Quota {
            vms: 10,
            ..Quota::default()
        });
        Ok(Response::new(ListTenantsResponse {
            tenants: vec![tenant("acme", quota), tenant("default", None)],
        }))
    }

    async fn update_tenant(&self, request: Request<UpdateTenantRequest>) -> Answer<Tenant> {
        self.core()?;
        let request = self.note(request);
        Ok(Response::new(tenant(&request.name, request.quota)))
    }

    async fn delete_tenant(
        &self,
        request: Request<DeleteTenantRequest>,
    ) -> Answer<DeleteTenantResponse> {
        self.core()?;
        self.note(request);
        Ok(Response::new(DeleteTenantResponse {}))
    }

    async fn list_users(&self, request: Request<ListUsersRequest>) -> Answer<ListUsersResponse> {
        self.core()?;
        self.note(request);
        Ok(Response::new(ListUsersResponse {
            users: vec![user("alice@laptop")],
        }))
    }

    async fn update_user(&self, request: Request<UpdateUserRequest>) -> Answer<User> {
        self.core()?;
        let request = self.note(request);
        Ok(Response::new(user(&request.user)))
    }

    async fn revoke_user(&self, request: Request<RevokeUserRequest>) -> Answer<User> {
        self.core()?;
        let request = self.note(request);
        Ok(Response::new(User {
            revoked_at: moment(0),
            ..user(&request.user)
        }))
    }

    async fn create_key(&self, _: Request<CreateFleetKeyRequest>) -> Answer<CreatedFleetKey> {
        Err(Status::unimplemented("not asked for"))
    }

    async fn list_keys(&self, _: Request<ListFleetKeysRequest>) -> Answer<ListFleetKeysResponse> {
        Err(Status::unimplemented("not asked for"))
    }

    async fn revoke_key(&self, _: Request<RevokeFleetKeyRequest>) -> Answer<FleetKey> {
        Err(Status::unimplemented("not asked for"))
    }

    type ListAuditStream = Stream<FleetAuditEntry>;

    async fn list_audit(
        &self,
        request: Request<ListFleetAuditRequest>,
    ) -> Answer<Self::ListAuditStream> {
        self.core()?;
        let request = self.note(request);
        let mut entries = vec![Ok(FleetAuditEntry {
            sequence: 1,
            at: moment(-60),
            principal: "acme/alice".to_owned(),
            tenant: "acme".to_owned(),
            source: "key".to_owned(),
            action: "ghost.core.v1.FleetService/UpdateHost".to_owned(),
            host: id_of("host", "pc"),
            outcome: "ok".to_owned(),
            request_id: "r-1".to_owned(),
            replica: "core-1".to_owned(),
            ..FleetAuditEntry::default()
        })];
        // Whoever asks for more than one line learns that some are missing.
        if request.limit != 1 {
            entries.push(Ok(FleetAuditEntry {
                at: moment(0),
                action: "ghost.core.v1.FleetService/ListAudit".to_owned(),
                outcome: "core_unreachable".to_owned(),
                detail: "the replica core-2 does not run".to_owned(),
                replica: "core-2".to_owned(),
                ..FleetAuditEntry::default()
            }));
        }
        Ok(Response::new(Box::pin(tokio_stream::iter(entries))))
    }
}
