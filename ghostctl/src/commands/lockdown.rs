//! `lockdown`: the switch that cuts all sessions into VMs.

use ghost_proto::agent::v1::{GetLockdownRequest, SetLockdownRequest};
use ghost_proto::view::Lockdown;

use crate::arguments::{LockdownArgs, LockdownCommand};
use crate::connect::{Session, ask};
use crate::errors::{Exit, Failure};
use crate::table::Paint;
use crate::text::{age_of, count, printable};

pub(super) async fn run(args: LockdownArgs, session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    let (answer, changed) = match args.command {
        Some(LockdownCommand::Status) => (
            agent.guest().get_lockdown(ask(GetLockdownRequest {})).await,
            false,
        ),
        None => {
            let request = SetLockdownRequest {
                active: !args.lift,
                reason: args.reason.unwrap_or_default(),
            };
            (agent.guest().set_lockdown(ask(request)).await, true)
        }
    };
    let lockdown = answer
        .map(|answer| Lockdown::from(answer.into_inner()))
        .map_err(|status| agent.failure(&status))?;
    session.printer.several(
        std::slice::from_ref(&lockdown),
        1,
        |lockdown| {
            if lockdown.active {
                "active"
            } else {
                "inactive"
            }
        },
        |lockdown, paint| text(lockdown, changed, paint),
    )?;
    if changed && lockdown.active {
        session
            .printer
            .note("VMs run on; it ends with: ghostctl lockdown --lift");
    }
    Ok(Exit::Done)
}

fn text(lockdown: &Lockdown, changed: bool, paint: Paint) -> String {
    if !lockdown.active {
        return if changed {
            "Lifted the lockdown: guests can be reached again\n".to_owned()
        } else {
            "no lockdown: guests can be reached\n".to_owned()
        };
    }
    if changed {
        let sessions = usize::try_from(lockdown.sessions_cut).unwrap_or(usize::MAX);
        return format!(
            "{}: {} cut, no guest can be reached\n",
            paint.red("Locked down"),
            count(sessions, "session was", "sessions were")
        );
    }
    let since = lockdown
        .since
        .as_deref()
        .map(|since| format!(" for {}", age_of(since)))
        .unwrap_or_default();
    let by = lockdown
        .set_by
        .as_ref()
        .map(|by| format!(" by {}", printable(by)))
        .unwrap_or_default();
    let reason = lockdown
        .reason
        .as_ref()
        .map(|reason| format!(": {}", printable(reason)))
        .unwrap_or_default();
    format!("{}{since}{by}{reason}\n", paint.red("locked down"))
}
