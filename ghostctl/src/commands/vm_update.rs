//! `vm update`.

use ghost_proto::agent::v1::UpdateVmRequest;

use super::vm_create::{autostart, restart_policy};
use super::{change, pairs};
use crate::arguments::{Switch, VmUpdate};
use crate::connect::{Session, ask};
use crate::errors::{Exit, Failure};

pub(super) async fn run(args: VmUpdate, session: &Session) -> Result<Exit, Failure> {
    let request = UpdateVmRequest {
        vm: args.name,
        expected_generation: args.expected_generation.unwrap_or(0),
        request_id: String::new(),
        vcpus: args.cpus,
        memory_bytes: args.memory,
        guest_access: args.guest_access.map(|access| access == Switch::On),
        delete_protection: match (args.protect, args.unprotect) {
            (true, _) => Some(true),
            (false, true) => Some(false),
            (false, false) => None,
        },
        autostart: autostart(&args.life),
        clear_autostart: args.no_autostart,
        restart_policy: restart_policy(&args.life),
        set_tags: pairs(args.tags),
        remove_tags: args.untag,
    };
    let agent = session.agent().await?;
    change::one(
        &args.change,
        "Updated",
        session,
        &agent,
        |agent, request_id| async move {
            let request = UpdateVmRequest {
                request_id,
                ..request
            };
            agent.vms().update(ask(request)).await
        },
    )
    .await?;
    Ok(Exit::Done)
}
