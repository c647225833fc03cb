//! The fleet: hosts, VMs, commands, tokens, tenants, people, keys and the audit log.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use futures::StreamExt;
use futures::stream::{self, BoxStream};
use ghost_domain::{
    CommandId, Demand, Error, ErrorCode, HostName, Result, Role, TenantName, Timestamp,
};
use ghost_presentation::convert::{duration, request_id};
use ghost_presentation::grpc::status::to_status;
use ghost_proto::core::v1::fleet_service_server::FleetService;
use ghost_proto::core::v1::*;
use prost::Message;
use tonic::{Request, Response, Status};

use super::super::notes::Note;
use super::listing::{self, FRAME, Listed};
use super::{Answer, answer, caller, note};
use crate::application::accounts::{
    CreateKeyCommand, CreateTokenCommand, Keys, Tenants, Tokens, UpdateUserCommand, Users,
    WhoJoins, tenant_of,
};
use crate::application::audit::{FleetAudit, FleetAuditQuery};
use crate::application::desk::{CommandRequest, Desk, MISSED_FOR};
use crate::application::fleet::{Fleet, HostChanges, HostView};
use crate::application::health::problems_with;
use crate::application::hosts::{
    GetHost, ListHosts, ListHostsQuery, RemoveHost, UpdateHost, UpdateHostCommand,
};
use crate::application::quota_check::{Admission, Reserved, Wanted};
use crate::application::vms::{ListVms, ListVmsQuery};
use crate::domain::ports::FleetAuthority;
use crate::domain::{Caller, Form, QueuedCommand as CommandRecord, Replica as ReplicaRecord};
use crate::presentation::convert;
use crate::presentation::route::Router;

/// Entries of the audit log where nobody says how many.
const USUAL_ENTRIES: usize = 1000;
/// Most entries of one answer.
const MOST_ENTRIES: usize = 10_000;

pub(super) struct Fleets {
    pub(super) fleet: Arc<Fleet>,
    pub(super) list_hosts: ListHosts,
    pub(super) get_host: GetHost,
    pub(super) update_host: UpdateHost,
    pub(super) remove_host: RemoveHost,
    pub(super) list_vms: ListVms,
    pub(super) admission: Arc<Admission>,
    pub(super) desk: Arc<Desk>,
    pub(super) tokens: Arc<Tokens>,
    pub(super) tenants: Tenants,
    pub(super) users: Arc<Users>,
    pub(super) keys: Arc<Keys>,
    pub(super) audit: Arc<dyn FleetAudit>,
    pub(super) router: Arc<Router>,
    pub(super) authority: Arc<dyn FleetAuthority>,
    pub(super) version: String,
    pub(super) replica: String,
    pub(super) started: Instant,
}

/// A role that a caller named.
fn role(text: &str) -> Result<Role> {
    text.parse()
        .map_err(|error: Error| error.field("role", "viewer, operator or admin"))
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

impl Fleets {
    /// `ListVms`, as it goes out.
    pub(super) fn listed_vms(
        &self,
        request: Request<ListFleetVmsRequest>,
        form: Form,
    ) -> Answer<Listed> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let filled = |text: String| Some(text).filter(|text| !text.is_empty());
        let listed = || {
            let query = ListVmsQuery {
                tenant: convert::tenant(&request.tenant)?,
                host: filled(request.host),
                tags: request.tags,
                name: filled(request.name),
            };
            let hosts = self.list_vms.execute(&caller, query)?;
            listing::list(hosts, form, self.now())
        };
        answer(listed())
    }

    /// How many hosts there are, of all tenants.
    pub(super) fn host_count(&self) -> usize {
        self.fleet.read(|state| state.hosts().len())
    }

    fn now(&self) -> Timestamp {
        self.fleet.clock().now()
    }

    fn told(&self, view: &HostView) -> Host {
        convert::host(
            view,
            self.desk.link_info(view.record.id).as_ref(),
            self.now(),
        )
    }

    async fn status(&self, caller: &Caller) -> CoreStatus {
        let views = self
            .fleet
            .host_views(|host| caller.sees_host(host.id, &host.tenant));
        let mut hosts: BTreeMap<String, u32> = BTreeMap::new();
        let (mut vms, mut queued) = (0, 0);
        for view in &views {
            *hosts.entry(view.state.as_str().to_owned()).or_default() += 1;
            vms += view.inventory.as_ref().map_or(0, |told| told.vms.len());
            queued += view.open_commands;
        }
        let store = self.fleet.store().health().await;
        let warnings = problems_with(&self.fleet, store.clone());
        self.fleet.read(|state| CoreStatus {
            core_id: state.core_id().to_owned(),
            replica: self.replica.clone(),
            version: self.version.clone(),
            uptime: Some(duration(self.started.elapsed())),
            epoch: state.epoch(),
            store: store.engine,
            store_writable: store.writable,
            store_problem: store.problem.unwrap_or_default(),
            trust_domain: self.authority.trust_domain().to_owned(),
            authority_fingerprint: self.authority.fingerprint(),
            hosts,
            vms: count(vms),
            queued_commands: count(queued),
            // Where replicas are is the business of those who run them.
            replicas: state
                .replicas()
                .filter(|_| caller.tenant.is_none())
                .map(|replica| Replica {
                    name: replica.name.clone(),
                    address: replica.address.clone(),
                    links: count(state.owned_by(&replica.name).count()),
                })
                .collect(),
            warnings,
        })
    }

    /// A command that the caller may see.
    fn command(&self, caller: &Caller, id: &str) -> Result<(Arc<CommandRecord>, String)> {
        let missing = || {
            Error::new(
                ErrorCode::CommandNotFound,
                format!(
                    "there is no command {:?}",
                    id.chars().take(64).collect::<String>()
                ),
            )
            .hint("see which there are: ghostctl command list")
        };
        let parsed: Option<CommandId> = id.parse().ok();
        self.fleet.read(|state| {
            let found = match parsed {
                Some(id) => state.command(id).cloned(),
                // A unique prefix among those that the caller sees.
                None if id.len() >= 4 => {
                    let prefix = id.to_ascii_lowercase();
                    let mut found = state.commands().filter(|command| {
                        caller.sees_host(command.host, &command.tenant)
                            && command.id.to_string().starts_with(&prefix)
                    });
                    match (found.next(), found.next()) {
                        (Some(one), None) => Some(Arc::clone(one)),
                        _ => None,
                    }
                }
                None => None,
            };
            let command = found
                .filter(|command| caller.sees_host(command.host, &command.tenant))
                .ok_or_else(missing)?;
            let host = state
                .host(command.host)
                .map(|host| host.name.to_string())
                .unwrap_or_default();
            Ok((command, host))
        })
    }

    fn named(&self, command: &CommandRecord) -> QueuedCommand {
        let host = self.fleet.read(|state| {
            state
                .host(command.host)
                .map(|host| host.name.to_string())
                .unwrap_or_default()
        });
        convert::command(command, host)
    }

    /// The newest lines of the logs of all replicas, oldest first. Each replica has a log of its own,
    /// of what it was asked; a log that cannot be read, or whose replica does not run, has a line
    /// that says so.
    async fn audit_of_all(&self, query: FleetAuditQuery) -> Result<Vec<FleetAuditEntry>> {
        let limit = query.limit;
        let now = self.now();
        let (others, away): (Vec<ReplicaRecord>, Vec<ReplicaRecord>) = self.fleet.read(|state| {
            let others = state.replicas().filter(|one| one.name != self.replica);
            let away = state.known_replicas().filter(|one| {
                one.name != self.replica
                    && state.replica(&one.name).is_none()
                    && now.since(one.since) < MISSED_FOR
            });
            (others.cloned().collect(), away.cloned().collect())
        });
        let away = away.into_iter().map(|replica| {
            let error = Error::new(
                ErrorCode::CoreUnreachable,
                format!("the replica {} does not run", replica.name),
            );
            self.unread(replica.name, &error)
        });
        let asked = ListOwnAuditRequest {
            tenant: query
                .tenant
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
            host_id: query.host.map(|host| host.to_string()).unwrap_or_default(),
            user: query.user.clone().unwrap_or_default(),
            since: query.since.map(ghost_presentation::convert::timestamp),
            limit: u32::try_from(limit).unwrap_or(u32::MAX),
        };
        let told = futures::future::join_all(others.iter().map(|replica| {
            let asked = asked.clone();
            async move {
                match self.router.audit_of(replica, asked).await {
                    Ok(lines) => lines,
                    Err(error) => vec![self.unread(replica.name.clone(), &error)],
                }
            }
        }));
        let (own, told) = tokio::join!(self.audit.list(query), told);
        let mut all: Vec<FleetAuditEntry> = own?
            .into_iter()
            .map(|entry| convert::audit(entry, &self.replica))
            .chain(told.into_iter().flatten())
            .chain(away)
            .collect();
        let at = |entry: &FleetAuditEntry| {
            entry
                .at
                .as_ref()
                .map(|at| (at.seconds, at.nanos))
                .unwrap_or_default()
        };
        // Those of one replica stay in the order of its log, whatever its clock did.
        all.sort_by_key(at);
        all.drain(..all.len().saturating_sub(limit));
        Ok(all)
    }

    /// The line for a log that cannot be read.
    fn unread(&self, replica: String, error: &Error) -> FleetAuditEntry {
        tracing::warn!(replica, %error, "the audit log of another replica cannot be read");
        FleetAuditEntry {
            at: Some(ghost_presentation::convert::timestamp(self.now())),
            action: "ghost.core.v1.FleetService/ListAudit".to_owned(),
            outcome: error.code().as_str().to_owned(),
            detail: format!("the lines of this replica are missing here: {error}"),
            replica,
            ..FleetAuditEntry::default()
        }
    }

    async fn queue(
        &self,
        caller: &Caller,
        request: QueueCommandRequest,
        note: &Note,
    ) -> Result<QueuedCommand> {
        let (host, tenant, vms) = self.fleet.read(|state| {
            let host = state.find_host(caller, &request.host)?;
            Ok::<_, Error>((
                host.id,
                host.tenant.clone(),
                state.inventory(host.id).cloned(),
            ))
        })?;
        note.host(host, &tenant);
        let action = convert::action(request.action)?;
        note.subject(action.subject());
        note.detail(action.kind());
        let asked_before = request_id(&request.request_id)?.filter(|id| {
            self.fleet
                .read(|state| state.command_by_request(host, id).is_some())
        });
        let reserved: Option<Reserved> = match &action {
            _ if asked_before.is_some() => None,
            ghost_domain::fleet::CommandAction::CreateVm(create) => Some(self.admission.on_host(
                caller,
                host,
                &create.name,
                Demand {
                    cpus: create.vcpus.unwrap_or_default(),
                    memory: create.memory.unwrap_or_default(),
                    disk: create.disk.unwrap_or_default(),
                },
            )?),
            ghost_domain::fleet::CommandAction::UpdateVm {
                vm, vcpus, memory, ..
            } => {
                let known = vms.as_ref().and_then(|told| {
                    told.vms
                        .values()
                        .find(|one| one.name == *vm || one.id.to_string() == *vm)
                });
                let more = known.map_or_else(Demand::default, |known| Demand {
                    cpus: vcpus.unwrap_or_default().saturating_sub(known.demand.cpus),
                    memory: memory
                        .unwrap_or_default()
                        .saturating_sub(known.demand.memory),
                    ..Demand::default()
                });
                self.admission.growth(caller, host, more)?
            }
            _ => None,
        };
        let reserved = self.admission.hold(caller, reserved).await?;
        let queued = self
            .desk
            .commands()
            .queue(CommandRequest {
                host,
                request_id: request_id(&request.request_id)?,
                lifetime: convert::lifetime(request.lifetime.as_ref())?,
                issuer: convert::issuer(caller),
                action,
            })
            .await?;
        // The command's own record counts from now on.
        drop(reserved);
        Ok(self.named(&queued))
    }
}

/// Every host that the caller sees, and again at each change.
fn hosts(
    desk: Arc<Desk>,
    fleet: Arc<Fleet>,
    caller: Caller,
    only: Option<TenantName>,
) -> BoxStream<'static, Result<Host, Status>> {
    // Watched before the first look, so that nothing falls between.
    let watch = fleet.watch_hosts();
    let seen = move |host: &crate::domain::HostRecord| {
        caller.sees_host(host.id, &host.tenant)
            && only.as_ref().is_none_or(|only| *only == host.tenant)
    };
    let tell = move |desk: &Desk, fleet: &Fleet, views: Vec<HostView>| {
        let now = fleet.clock().now();
        views
            .iter()
            .filter(|view| seen(&view.record))
            .map(|view| {
                let link = desk.link_info(view.record.id);
                Ok(convert::host(view, link.as_ref(), now))
            })
            .collect::<Vec<_>>()
    };
    let first = tell(&desk, &fleet, fleet.host_views(|_| true));
    let changes = stream::unfold(
        (desk, fleet, watch, tell),
        |(desk, fleet, mut watch, tell)| async move {
            loop {
                let views = match watch.next().await? {
                    HostChanges::All => fleet.host_views(|_| true),
                    HostChanges::Some(ids) => {
                        ids.iter().filter_map(|id| fleet.host_view(*id)).collect()
                    }
                };
                let told = tell(&desk, &fleet, views);
                if !told.is_empty() {
                    return Some((stream::iter(told), (desk, fleet, watch, tell)));
                }
            }
        },
    );
    stream::iter(first).chain(changes.flatten()).boxed()
}

#[tonic::async_trait]
impl FleetService for Fleets {
    type WatchHostsStream = BoxStream<'static, Result<Host, Status>>;
    type ListAuditStream = BoxStream<'static, Result<FleetAuditEntry, Status>>;

    async fn get_status(&self, request: Request<GetCoreStatusRequest>) -> Answer<CoreStatus> {
        let caller = caller(&request)?;
        Ok(Response::new(self.status(&caller).await))
    }

    async fn list_hosts(&self, request: Request<ListHostsRequest>) -> Answer<ListHostsResponse> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let listed = || {
            let query = ListHostsQuery {
                tenant: convert::tenant(&request.tenant)?,
                labels: request.labels,
                state: Some(request.state).filter(|state| !state.is_empty()),
            };
            let views = self.list_hosts.execute(&caller, &query)?;
            Ok(ListHostsResponse {
                hosts: views.iter().map(|view| self.told(view)).collect(),
            })
        };
        answer(listed())
    }

    async fn get_host(&self, request: Request<GetHostRequest>) -> Answer<Host> {
        let caller = caller(&request)?;
        let view = self.get_host.execute(&caller, &request.into_inner().host);
        answer(view.map(|view| self.told(&view)))
    }

    async fn update_host(&self, request: Request<UpdateHostRequest>) -> Answer<Host> {
        let (caller, note) = (caller(&request)?, note(&request));
        let request = request.into_inner();
        note.subject(&request.host);
        let changed = async {
            let name = match request.name.as_str() {
                "" => None,
                name => Some(HostName::new(name)?),
            };
            let command = UpdateHostCommand {
                host: request.host,
                set_labels: request.set_labels,
                remove_labels: request.remove_labels,
                cordon: request
                    .cordoned
                    .map(|cordoned| cordoned.then_some(request.cordon_reason)),
                unlock: request.unlock,
                name,
            };
            self.update_host.execute(&caller, command).await
        };
        let changed = changed.await;
        if let Ok(view) = &changed {
            note.host(view.record.id, &view.record.tenant);
        }
        answer(changed.map(|view| self.told(&view)))
    }

    async fn remove_host(&self, request: Request<RemoveHostRequest>) -> Answer<RemoveHostResponse> {
        let (caller, note) = (caller(&request)?, note(&request));
        let request = request.into_inner();
        note.subject(&request.host);
        let removed = self
            .remove_host
            .execute(&caller, &request.host, request.force)
            .await;
        if let Ok(host) = &removed {
            note.host(host.id, &host.tenant);
        }
        answer(removed.map(|_| RemoveHostResponse {}))
    }

    async fn watch_hosts(
        &self,
        request: Request<WatchHostsRequest>,
    ) -> Answer<Self::WatchHostsStream> {
        let caller = caller(&request)?;
        let tenant = convert::tenant(&request.into_inner().tenant);
        let only = tenant.map_err(|error| to_status(&error))?;
        let (desk, fleet) = (Arc::clone(&self.desk), Arc::clone(&self.fleet));
        Ok(Response::new(hosts(desk, fleet, caller, only)))
    }

    /// As a message; [`super::listing`] answers before this is asked.
    async fn list_vms(
        &self,
        request: Request<ListFleetVmsRequest>,
    ) -> Answer<ListFleetVmsResponse> {
        let listed = self.listed_vms(request, Form::Message)?.into_inner();
        answer(
            ListFleetVmsResponse::decode(listed.whole().slice(FRAME..))
                .map_err(|cause| Error::internal("a list cannot be read back").because(cause)),
        )
    }

    async fn place(&self, request: Request<PlaceRequest>) -> Answer<Placement> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let placed = || {
            let wanted = Wanted {
                tenant: tenant_of(&caller, convert::tenant(&request.tenant)?)?,
                name: String::new(),
                demand: convert::demand(request.demand),
                labels: request.labels,
                request_id: None,
            };
            self.admission.preview(&caller, &wanted)
        };
        answer(placed().map(convert::placement))
    }

    async fn queue_command(&self, request: Request<QueueCommandRequest>) -> Answer<QueuedCommand> {
        let (caller, note) = (caller(&request)?, note(&request));
        answer(self.queue(&caller, request.into_inner(), &note).await)
    }

    async fn get_command(&self, request: Request<GetCommandRequest>) -> Answer<QueuedCommand> {
        let caller = caller(&request)?;
        let found = self.command(&caller, &request.into_inner().id);
        answer(found.map(|(command, host)| convert::command(&command, host)))
    }

    async fn list_commands(
        &self,
        request: Request<ListCommandsRequest>,
    ) -> Answer<ListCommandsResponse> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let listed = self.fleet.read(|state| {
            let only = match request.host.as_str() {
                "" => None,
                selector => Some(state.find_host(&caller, selector)?.id),
            };
            let mut found: Vec<(Arc<CommandRecord>, String)> = state
                .commands()
                .filter(|command| {
                    caller.sees_host(command.host, &command.tenant)
                        && only.is_none_or(|only| only == command.host)
                        && (request.all || !command.status.is_finished())
                })
                .map(|command| {
                    let host = state.host(command.host);
                    let name = host.map(|host| host.name.to_string()).unwrap_or_default();
                    (Arc::clone(command), name)
                })
                .collect();
            found.sort_by_key(|(command, _)| (command.issued_at, command.id));
            Ok(found)
        });
        answer(listed.map(|found| {
            ListCommandsResponse {
                commands: found
                    .into_iter()
                    .map(|(command, host)| convert::command(&command, host))
                    .collect(),
            }
        }))
    }

    async fn cancel_command(
        &self,
        request: Request<CancelCommandRequest>,
    ) -> Answer<QueuedCommand> {
        let (caller, note) = (caller(&request)?, note(&request));
        let id = request.into_inner().id;
        note.subject(&id);
        let cancelled = async {
            let (command, _) = self.command(&caller, &id)?;
            note.host(command.host, &command.tenant);
            let command = self.desk.commands().cancel(command.id).await?;
            Ok(self.named(&command))
        };
        answer(cancelled.await)
    }

    async fn create_token(&self, request: Request<CreateFleetTokenRequest>) -> Answer<FleetToken> {
        let (caller, note) = (caller(&request)?, note(&request));
        let request = request.into_inner();
        let created = async {
            let who = match request.role.as_str() {
                "" => WhoJoins::Host(request.labels),
                text => WhoJoins::Person(role(text)?),
            };
            let tenant = match request.tenant.as_str() {
                "*" => None,
                text => Some(tenant_of(&caller, convert::tenant(text)?)?),
            };
            let command = CreateTokenCommand {
                tenant,
                who,
                lifetime: convert::lifetime(request.lifetime.as_ref())?,
            };
            self.tokens.create(&caller, command).await
        };
        let created = created.await;
        if let Ok(created) = &created {
            note.subject(&created.token.id.to_string());
            let tenant = created.token.kind.tenant();
            note.detail(&format!(
                "for a {} of {}",
                created
                    .token
                    .kind
                    .role()
                    .map_or("host", |role| role.as_str()),
                tenant.map_or("no tenant", |tenant| tenant.as_str())
            ));
        }
        answer(created.map(|created| convert::token(&created)))
    }

    async fn create_tenant(&self, request: Request<CreateTenantRequest>) -> Answer<Tenant> {
        let (caller, note) = (caller(&request)?, note(&request));
        let request = request.into_inner();
        note.subject(&request.name);
        let made = async {
            let quota = convert::quota_of(request.quota.unwrap_or_default());
            let user_quota = convert::quota_of(request.user_quota.unwrap_or_default());
            let name = TenantName::new(request.name)?;
            self.tenants.create(&caller, name, quota, user_quota).await
        };
        answer(made.await.map(|view| convert::tenant_view(&view)))
    }

    async fn list_tenants(
        &self,
        request: Request<ListTenantsRequest>,
    ) -> Answer<ListTenantsResponse> {
        let caller = caller(&request)?;
        let listed = self.tenants.list(&caller);
        answer(listed.map(|views| ListTenantsResponse {
            tenants: views.iter().map(convert::tenant_view).collect(),
        }))
    }

    async fn update_tenant(&self, request: Request<UpdateTenantRequest>) -> Answer<Tenant> {
        let (caller, note) = (caller(&request)?, note(&request));
        let request = request.into_inner();
        note.subject(&request.name);
        let changed = async {
            let name = TenantName::new(request.name)?;
            let quota = request.quota.map(convert::quota_of);
            let user_quota = request.user_quota.map(convert::quota_of);
            self.tenants.update(&caller, &name, quota, user_quota).await
        };
        answer(changed.await.map(|view| convert::tenant_view(&view)))
    }

    async fn delete_tenant(
        &self,
        request: Request<DeleteTenantRequest>,
    ) -> Answer<DeleteTenantResponse> {
        let (caller, note) = (caller(&request)?, note(&request));
        let name = request.into_inner().name;
        note.subject(&name);
        let deleted = async {
            let name = TenantName::new(name)?;
            self.tenants.delete(&caller, &name).await
        };
        answer(deleted.await.map(|()| DeleteTenantResponse {}))
    }

    async fn list_users(&self, request: Request<ListUsersRequest>) -> Answer<ListUsersResponse> {
        let caller = caller(&request)?;
        let listed = convert::tenant(&request.into_inner().tenant)
            .and_then(|tenant| self.users.list(&caller, tenant.as_ref()));
        answer(listed.map(|views| ListUsersResponse {
            users: views.iter().map(convert::user).collect(),
        }))
    }

    async fn update_user(&self, request: Request<UpdateUserRequest>) -> Answer<User> {
        let (caller, note) = (caller(&request)?, note(&request));
        let request = request.into_inner();
        note.subject(&request.user);
        let changed = async {
            // A quota without any limit is that of the tenant again.
            let quota = request.quota.map(|given| {
                let quota = convert::quota_of(given);
                Some(quota).filter(|quota| *quota != crate::domain::Quota::default())
            });
            let role = match request.role.as_str() {
                "" => None,
                text => Some(role(text)?),
            };
            let command = UpdateUserCommand {
                user: request.user,
                quota,
                role,
            };
            self.users.update(&caller, command).await
        };
        answer(changed.await.map(|view| convert::user(&view)))
    }

    async fn revoke_user(&self, request: Request<RevokeUserRequest>) -> Answer<User> {
        let (caller, note) = (caller(&request)?, note(&request));
        let user = request.into_inner().user;
        note.subject(&user);
        let revoked = self.users.revoke(&caller, &user).await;
        answer(revoked.map(|view| convert::user(&view)))
    }

    async fn create_key(&self, request: Request<CreateFleetKeyRequest>) -> Answer<CreatedFleetKey> {
        let (caller, note) = (caller(&request)?, note(&request));
        let request = request.into_inner();
        note.subject(&request.name);
        let created = async {
            let tenant = match request.tenant.as_str() {
                "*" => None,
                text => Some(tenant_of(&caller, convert::tenant(text)?)?),
            };
            let command = CreateKeyCommand {
                name: request.name,
                tenant,
                role: role(&request.role)?,
                lifetime: convert::lifetime(request.lifetime.as_ref())?,
                hosts: request.hosts,
            };
            self.keys.create(&caller, command).await
        };
        let created = created.await;
        if let Ok((_, key)) = &created {
            note.detail(&format!("{} for {}", key.id, key.role));
        }
        answer(created.map(|(secret, key)| CreatedFleetKey {
            key: Some(convert::key(&key)),
            secret: secret.expose().to_owned(),
        }))
    }

    async fn list_keys(
        &self,
        request: Request<ListFleetKeysRequest>,
    ) -> Answer<ListFleetKeysResponse> {
        let caller = caller(&request)?;
        let listed = convert::tenant(&request.into_inner().tenant)
            .and_then(|tenant| self.keys.list(&caller, tenant.as_ref()));
        answer(listed.map(|keys| ListFleetKeysResponse {
            keys: keys.iter().map(|key| convert::key(key)).collect(),
        }))
    }

    async fn revoke_key(&self, request: Request<RevokeFleetKeyRequest>) -> Answer<FleetKey> {
        let (caller, note) = (caller(&request)?, note(&request));
        let id = request.into_inner().id;
        note.subject(&id);
        let revoked = self.keys.revoke(&caller, &id).await;
        answer(revoked.map(|key| convert::key(&key)))
    }

    async fn list_audit(
        &self,
        request: Request<ListFleetAuditRequest>,
    ) -> Answer<Self::ListAuditStream> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let listed = async {
            let tenant = match (&caller.tenant, convert::tenant(&request.tenant)?) {
                (Some(_), named) => Some(tenant_of(&caller, named)?),
                (None, named) => named,
            };
            let host = match request.host.as_str() {
                "" => None,
                // Of a host that was removed there is still what was done to it.
                selector => Some(
                    self.fleet
                        .read(|state| state.find_host(&caller, selector).map(|host| host.id))
                        .or_else(|error| selector.parse().map_err(|_| error))?,
                ),
            };
            let since = request
                .since
                .as_ref()
                .map(ghost_presentation::convert::stamp)
                .transpose()?;
            let limit = match request.limit as usize {
                0 => USUAL_ENTRIES,
                limit => limit.min(MOST_ENTRIES),
            };
            let query = FleetAuditQuery {
                tenant,
                host,
                user: Some(request.user).filter(|user| !user.is_empty()),
                since,
                limit,
            };
            self.audit_of_all(query).await
        };
        let entries = listed.await.map_err(|error| to_status(&error))?;
        Ok(Response::new(
            stream::iter(entries.into_iter().map(Ok)).boxed(),
        ))
    }
}
