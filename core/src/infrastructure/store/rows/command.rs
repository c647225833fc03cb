//! Commands in the queues of hosts.

use std::collections::BTreeMap;
use std::time::Duration;

use ghost_domain::fleet::{
    CommandAction, CommandOutcome, CommandStatus, CreateVmCommand, FleetPrincipal,
};
use ghost_domain::{
    ByteSize, CommandId, Error, ErrorCode, HostId, OperationId, RequestId, TenantName,
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{millis, role, tenant, time, times, unknown};
use crate::domain::QueuedCommand;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CommandRow {
    id: Uuid,
    request_id: String,
    host: Uuid,
    tenant: String,
    generation: u64,
    issuer: IssuerRow,
    action: ActionRow,
    issued_at: i64,
    deadline: i64,
    sent_at: Option<i64>,
    status: StatusRow,
    outcome: Option<OutcomeRow>,
    finished_at: Option<i64>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct IssuerRow {
    name: String,
    tenant: Option<String>,
    role: String,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[expect(
    clippy::enum_variant_names,
    reason = "they are the names of the domain's actions"
)]
enum ActionRow {
    CreateVm(Box<CreateRow>),
    StartVm {
        vm: String,
    },
    StopVm {
        vm: String,
        force: bool,
        timeout_ms: Option<u64>,
    },
    RestartVm {
        vm: String,
        force: bool,
        timeout_ms: Option<u64>,
    },
    PauseVm {
        vm: String,
    },
    ResumeVm {
        vm: String,
    },
    DeleteVm {
        vm: String,
        force: bool,
    },
    UpdateVm {
        vm: String,
        vcpus: Option<u32>,
        memory: Option<u64>,
        delete_protection: Option<bool>,
        set_tags: BTreeMap<String, String>,
        remove_tags: Vec<String>,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CreateRow {
    name: String,
    image: String,
    vcpus: Option<u32>,
    memory: Option<u64>,
    disk: Option<u64>,
    networks: Vec<String>,
    user: String,
    ssh_authorized_keys: Vec<String>,
    user_data: String,
    tags: BTreeMap<String, String>,
    start: bool,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum StatusRow {
    Queued,
    Accepted,
    Succeeded,
    Failed,
    Refused,
    Expired,
    Cancelled,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct OutcomeRow {
    id: Uuid,
    generation: u64,
    status: StatusRow,
    operation: Option<Uuid>,
    code: Option<String>,
    message: String,
    at: i64,
}

fn timeout_ms(timeout: Option<Duration>) -> Option<u64> {
    timeout.map(|timeout| u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX))
}

fn timeout(millis: Option<u64>) -> Option<Duration> {
    millis.map(Duration::from_millis)
}

impl From<CommandStatus> for StatusRow {
    fn from(status: CommandStatus) -> Self {
        match status {
            CommandStatus::Queued => Self::Queued,
            CommandStatus::Accepted => Self::Accepted,
            CommandStatus::Succeeded => Self::Succeeded,
            CommandStatus::Failed => Self::Failed,
            CommandStatus::Refused => Self::Refused,
            CommandStatus::Expired => Self::Expired,
            CommandStatus::Cancelled => Self::Cancelled,
        }
    }
}

impl From<StatusRow> for CommandStatus {
    fn from(row: StatusRow) -> Self {
        match row {
            StatusRow::Queued => Self::Queued,
            StatusRow::Accepted => Self::Accepted,
            StatusRow::Succeeded => Self::Succeeded,
            StatusRow::Failed => Self::Failed,
            StatusRow::Refused => Self::Refused,
            StatusRow::Expired => Self::Expired,
            StatusRow::Cancelled => Self::Cancelled,
        }
    }
}

impl From<CommandAction> for ActionRow {
    fn from(action: CommandAction) -> Self {
        use CommandAction as A;
        match action {
            A::CreateVm(create) => Self::CreateVm(Box::new((*create).into())),
            A::StartVm { vm } => Self::StartVm { vm },
            A::StopVm { vm, force, timeout } => Self::StopVm {
                vm,
                force,
                timeout_ms: timeout_ms(timeout),
            },
            A::RestartVm { vm, force, timeout } => Self::RestartVm {
                vm,
                force,
                timeout_ms: timeout_ms(timeout),
            },
            A::PauseVm { vm } => Self::PauseVm { vm },
            A::ResumeVm { vm } => Self::ResumeVm { vm },
            A::DeleteVm { vm, force } => Self::DeleteVm { vm, force },
            A::UpdateVm {
                vm,
                vcpus,
                memory,
                delete_protection,
                set_tags,
                remove_tags,
            } => Self::UpdateVm {
                vm,
                vcpus,
                memory: memory.map(ByteSize::bytes),
                delete_protection,
                set_tags,
                remove_tags,
            },
        }
    }
}

impl From<ActionRow> for CommandAction {
    fn from(row: ActionRow) -> Self {
        use ActionRow as R;
        match row {
            R::CreateVm(create) => Self::CreateVm(Box::new((*create).into())),
            R::StartVm { vm } => Self::StartVm { vm },
            R::StopVm {
                vm,
                force,
                timeout_ms,
            } => Self::StopVm {
                vm,
                force,
                timeout: timeout(timeout_ms),
            },
            R::RestartVm {
                vm,
                force,
                timeout_ms,
            } => Self::RestartVm {
                vm,
                force,
                timeout: timeout(timeout_ms),
            },
            R::PauseVm { vm } => Self::PauseVm { vm },
            R::ResumeVm { vm } => Self::ResumeVm { vm },
            R::DeleteVm { vm, force } => Self::DeleteVm { vm, force },
            R::UpdateVm {
                vm,
                vcpus,
                memory,
                delete_protection,
                set_tags,
                remove_tags,
            } => Self::UpdateVm {
                vm,
                vcpus,
                memory: memory.map(ByteSize::from_bytes),
                delete_protection,
                set_tags,
                remove_tags,
            },
        }
    }
}

impl From<CreateVmCommand> for CreateRow {
    fn from(create: CreateVmCommand) -> Self {
        let CreateVmCommand {
            name,
            image,
            vcpus,
            memory,
            disk,
            networks,
            user,
            ssh_authorized_keys,
            user_data,
            tags,
            start,
        } = create;
        Self {
            name,
            image,
            vcpus,
            memory: memory.map(ByteSize::bytes),
            disk: disk.map(ByteSize::bytes),
            networks,
            user,
            ssh_authorized_keys,
            user_data,
            tags,
            start,
        }
    }
}

impl From<CreateRow> for CreateVmCommand {
    fn from(row: CreateRow) -> Self {
        let CreateRow {
            name,
            image,
            vcpus,
            memory,
            disk,
            networks,
            user,
            ssh_authorized_keys,
            user_data,
            tags,
            start,
        } = row;
        Self {
            name,
            image,
            vcpus,
            memory: memory.map(ByteSize::from_bytes),
            disk: disk.map(ByteSize::from_bytes),
            networks,
            user,
            ssh_authorized_keys,
            user_data,
            tags,
            start,
        }
    }
}

impl From<CommandOutcome> for OutcomeRow {
    fn from(outcome: CommandOutcome) -> Self {
        let CommandOutcome {
            id,
            generation,
            status,
            operation,
            code,
            message,
            at,
        } = outcome;
        Self {
            id: id.uuid(),
            generation,
            status: status.into(),
            operation: operation.map(OperationId::uuid),
            code: code.map(|code| code.as_str().to_owned()),
            message,
            at: at.unix_millis(),
        }
    }
}

impl TryFrom<OutcomeRow> for CommandOutcome {
    type Error = Error;

    fn try_from(row: OutcomeRow) -> Result<Self, Error> {
        let OutcomeRow {
            id,
            generation,
            status,
            operation,
            code,
            message,
            at,
        } = row;
        Ok(Self {
            id: CommandId::from_uuid(id),
            generation,
            status: status.into(),
            operation: operation.map(OperationId::from_uuid),
            code: code
                .map(|text| ErrorCode::parse(&text).ok_or_else(|| unknown("the code", &text)))
                .transpose()?,
            message,
            at: time(at),
        })
    }
}

impl From<&QueuedCommand> for CommandRow {
    fn from(command: &QueuedCommand) -> Self {
        let QueuedCommand {
            id,
            request_id,
            host,
            tenant,
            generation,
            issuer:
                FleetPrincipal {
                    name: issuer,
                    tenant: issuer_tenant,
                    role,
                },
            action,
            issued_at,
            deadline,
            sent_at,
            status,
            outcome,
            finished_at,
        } = command.clone();
        Self {
            id: id.uuid(),
            request_id: request_id.as_str().to_owned(),
            host: host.uuid(),
            tenant: tenant.as_str().to_owned(),
            generation,
            issuer: IssuerRow {
                name: issuer,
                tenant: issuer_tenant.map(|one| one.as_str().to_owned()),
                role: role.as_str().to_owned(),
            },
            action: action.into(),
            issued_at: issued_at.unix_millis(),
            deadline: deadline.unix_millis(),
            sent_at: millis(sent_at),
            status: status.into(),
            outcome: outcome.map(Into::into),
            finished_at: millis(finished_at),
        }
    }
}

impl TryFrom<CommandRow> for QueuedCommand {
    type Error = Error;

    fn try_from(row: CommandRow) -> Result<Self, Error> {
        let CommandRow {
            id,
            request_id,
            host,
            tenant: of,
            generation,
            issuer,
            action,
            issued_at,
            deadline,
            sent_at,
            status,
            outcome,
            finished_at,
        } = row;
        Ok(Self {
            id: CommandId::from_uuid(id),
            request_id: RequestId::new(request_id)?,
            host: HostId::from_uuid(host),
            tenant: TenantName::new(of)?,
            generation,
            issuer: FleetPrincipal {
                name: issuer.name,
                tenant: tenant(issuer.tenant)?,
                role: role(&issuer.role)?,
            },
            action: action.into(),
            issued_at: time(issued_at),
            deadline: time(deadline),
            sent_at: times(sent_at),
            status: status.into(),
            outcome: outcome.map(TryInto::try_into).transpose()?,
            finished_at: times(finished_at),
        })
    }
}
