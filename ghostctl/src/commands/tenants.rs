//! `tenant …` and `user …`.

use ghost_proto::core::v1 as message;
use ghost_proto::core::v1::{
    CreateTenantRequest, DeleteTenantRequest, ListTenantsRequest, ListUsersRequest, Quota,
    RevokeUserRequest, UpdateTenantRequest, UpdateUserRequest,
};
use ghost_proto::view::{FleetUser, Tenant};

use super::{describe_fleet, each};
use crate::arguments::{QuotaArgs, TenantCommand, TenantSet, UserCommand, UserSet};
use crate::connect::{Agent, Session, ask};
use crate::errors::{ErrorCode, Exit, Failure};
use crate::text::printable;

pub(super) async fn tenant(command: TenantCommand, session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    let (tenant, done): (Tenant, &str) = match command {
        TenantCommand::List => {
            let tenants: Vec<Tenant> = all(&agent).await?.into_iter().map(Tenant::from).collect();
            session.printer.list(
                &tenants,
                |tenant| &tenant.name,
                describe_fleet::tenant_table,
            )?;
            return Ok(Exit::Done);
        }
        TenantCommand::Create(args) => {
            let (quota, user_quota) = quotas(&args, Quota::default(), Quota::default());
            let request = CreateTenantRequest {
                name: args.name,
                quota: Some(quota),
                user_quota: Some(user_quota),
            };
            let answer = agent.fleet().create_tenant(ask(request)).await;
            (told(&agent, answer)?.into(), "Created")
        }
        TenantCommand::Set(args) => {
            let known = all(&agent).await?;
            let Some(known) = known.into_iter().find(|one| one.name == args.name) else {
                return Err(Failure::new(
                    ErrorCode::TenantNotFound,
                    format!("there is no tenant {}", args.name),
                )
                .hint("ghostctl tenant list"));
            };
            let (quota, user_quota) = quotas(
                &args,
                known.quota.unwrap_or_default(),
                known.user_quota.unwrap_or_default(),
            );
            let request = UpdateTenantRequest {
                name: args.name,
                quota: Some(quota),
                user_quota: Some(user_quota),
            };
            let answer = agent.fleet().update_tenant(ask(request)).await;
            (told(&agent, answer)?.into(), "Changed")
        }
        TenantCommand::Delete { name } => {
            let request = DeleteTenantRequest { name: name.clone() };
            let answer = agent.fleet().delete_tenant(ask(request)).await;
            told(&agent, answer)?;
            session.printer.several(
                &[name],
                1,
                |name| name,
                |name, _| format!("Deleted {}\n", printable(name)),
            )?;
            return Ok(Exit::Done);
        }
    };
    session.printer.several(
        std::slice::from_ref(&tenant),
        1,
        |tenant| &tenant.name,
        |tenant, _| format!("{done} {}\n", printable(&tenant.name)),
    )?;
    Ok(Exit::Done)
}

async fn all(agent: &Agent) -> Result<Vec<message::Tenant>, Failure> {
    let answer = agent.fleet().list_tenants(ask(ListTenantsRequest {})).await;
    Ok(told(agent, answer)?.tenants)
}

fn told<T>(agent: &Agent, answer: Result<tonic::Response<T>, tonic::Status>) -> Result<T, Failure> {
    answer
        .map(tonic::Response::into_inner)
        .map_err(|status| agent.fleet_failure(&status))
}

/// What is given over what was there.
fn quotas(args: &TenantSet, quota: Quota, user_quota: Quota) -> (Quota, Quota) {
    let of_users = QuotaArgs {
        vms: args.user_vms,
        cpus: args.user_cpus,
        memory: args.user_memory,
        disk: args.user_disk,
    };
    (over(args.quota, quota), over(of_users, user_quota))
}

fn over(given: QuotaArgs, quota: Quota) -> Quota {
    Quota {
        vms: given.vms.unwrap_or(quota.vms),
        cpus: given.cpus.unwrap_or(quota.cpus),
        memory_bytes: given.memory.unwrap_or(quota.memory_bytes),
        disk_bytes: given.disk.unwrap_or(quota.disk_bytes),
    }
}

pub(super) async fn user(command: UserCommand, session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    match command {
        UserCommand::List { tenant } => {
            let users: Vec<FleetUser> = users(&agent, tenant.unwrap_or_default())
                .await?
                .into_iter()
                .map(FleetUser::from)
                .collect();
            session
                .printer
                .list(&users, |user| &user.name, describe_fleet::user_table)?;
            Ok(Exit::Done)
        }
        UserCommand::Set(args) => {
            let user = set_user(args, &agent).await?;
            session.printer.several(
                std::slice::from_ref(&user),
                1,
                |user| &user.name,
                |user, _| format!("Changed {}\n", printable(&user.name)),
            )?;
            Ok(Exit::Done)
        }
        UserCommand::Revoke { users } => {
            let (revoked, exit) = each(&users, session, |user| async {
                let answer = agent
                    .fleet()
                    .revoke_user(ask(RevokeUserRequest { user }))
                    .await;
                told(&agent, answer).map(FleetUser::from)
            })
            .await;
            session.printer.several(
                &revoked,
                users.len(),
                |user| &user.name,
                |user, _| format!("Revoked {}\n", printable(&user.name)),
            )?;
            Ok(exit)
        }
    }
}

async fn users(agent: &Agent, tenant: String) -> Result<Vec<message::User>, Failure> {
    let answer = agent
        .fleet()
        .list_users(ask(ListUsersRequest { tenant }))
        .await;
    Ok(told(agent, answer)?.users)
}

async fn set_user(args: UserSet, agent: &Agent) -> Result<FleetUser, Failure> {
    let QuotaArgs {
        vms,
        cpus,
        memory,
        disk,
    } = args.quota;
    let quota = if vms.is_none() && cpus.is_none() && memory.is_none() && disk.is_none() {
        None
    } else {
        let known = users(agent, String::new()).await?;
        let known = known
            .into_iter()
            .find(|one| one.name == args.user || one.id.starts_with(&args.user))
            .and_then(|user| user.quota)
            .unwrap_or_default();
        Some(over(args.quota, known))
    };
    let request = UpdateUserRequest {
        user: args.user,
        quota,
        role: args
            .role
            .map(|role| role.as_str().to_owned())
            .unwrap_or_default(),
    };
    let answer = agent.fleet().update_user(ask(request)).await;
    told(agent, answer).map(FleetUser::from)
}
