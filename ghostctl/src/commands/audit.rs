//! `audit list|verify`: who did what in VMs, and whether the log of it is whole; at Core, who did
//! what in the fleet.

use std::time::{SystemTime, UNIX_EPOCH};

use ghost_proto::agent::v1::{ListAuditRequest, VerifyAuditRequest};
use ghost_proto::core::v1::ListFleetAuditRequest;
use ghost_proto::view::{AuditEntry, AuditVerdict, FleetAuditEntry};

use crate::arguments::{AuditCommand, AuditList};
use crate::connect::{Agent, Session};
use crate::errors::{ErrorCode, Exit, Failure};
use crate::table::{Paint, Table};
use crate::text::{count, human_size};

pub(super) async fn run(command: AuditCommand, session: &Session) -> Result<Exit, Failure> {
    match command {
        AuditCommand::List(args) => list(args, session).await,
        AuditCommand::Verify => verify(session).await,
    }
}

async fn list(args: AuditList, session: &Session) -> Result<Exit, Failure> {
    let since = args.since.and_then(|span| {
        let at = SystemTime::now().checked_sub(span)?;
        let at = at.duration_since(UNIX_EPOCH).ok()?;
        Some(prost_types::Timestamp {
            seconds: i64::try_from(at.as_secs()).ok()?,
            nanos: 0,
        })
    });
    let agent = session.agent().await?;
    let failed = |status| agent.failure(&status);
    let limit = args.limit.unwrap_or(0);
    let of_the_fleet = args.vm.is_none();
    let asked = agent
        .guest()
        .list_audit(ListAuditRequest {
            vm: args.vm.unwrap_or_default(),
            since,
            limit,
        })
        .await
        .map_err(failed);
    let mut stream = match asked {
        Err(failure) if of_the_fleet && Agent::is_core(&failure) => {
            let request = ListFleetAuditRequest {
                since,
                limit,
                ..Default::default()
            };
            return list_fleet(request, &agent, session).await;
        }
        asked => asked?.into_inner(),
    };
    let mut entries = Vec::new();
    while let Some(entry) = stream.message().await.map_err(failed)? {
        entries.push(AuditEntry::from(entry));
    }
    session.printer.list(&entries, |entry| &entry.hash, table)?;
    if entries.is_empty() {
        session.printer.note("nothing of that kind was done");
    }
    Ok(Exit::Done)
}

/// The log of the fleet, where Core is spoken to and no host is named. Lines that a replica did not
/// give are an error, after those that there are.
async fn list_fleet(
    request: ListFleetAuditRequest,
    agent: &Agent,
    session: &Session,
) -> Result<Exit, Failure> {
    let failed = |status| agent.fleet_failure(&status);
    let answer = agent.fleet().list_audit(request).await;
    let mut stream = answer.map_err(failed)?.into_inner();
    let mut entries = Vec::new();
    while let Some(entry) = stream.message().await.map_err(failed)? {
        entries.push(FleetAuditEntry::from(entry));
    }
    session.printer.list(
        &entries,
        |entry| entry.request_id.as_deref().unwrap_or_default(),
        fleet_table,
    )?;
    if entries.is_empty() {
        session.printer.note("nothing of that kind was done");
    }
    // A line without a number stands for a log that could not be read.
    let missing: Vec<&FleetAuditEntry> =
        entries.iter().filter(|entry| entry.sequence == 0).collect();
    let Some(first) = missing.first() else {
        return Ok(Exit::Done);
    };
    let names: Vec<&str> = missing.iter().map(|one| one.replica.as_str()).collect();
    let code = ErrorCode::parse(&first.outcome).unwrap_or(ErrorCode::CoreUnreachable);
    let mut failure = Failure::new(
        code,
        format!("the lines of {} are missing", names.join(", ")),
    )
    .hint("see which replicas run: ghostctl status; their lines are told once they do");
    if let Some(why) = &first.detail {
        failure = failure.because(why);
    }
    Err(failure)
}

fn fleet_table(entries: &[FleetAuditEntry]) -> Table {
    let mut table = Table::new(&[
        "REPLICA", "NUMBER", "TIME", "WHO", "HOST", "ACTION", "ON", "OUTCOME", "WHAT",
    ]);
    let dash = |text: Option<&String>| text.cloned().unwrap_or_else(|| "-".to_owned());
    for entry in entries {
        table.row([
            entry.replica.clone(),
            match entry.sequence {
                0 => "-".to_owned(),
                number => number.to_string(),
            },
            entry.at.clone(),
            match entry.principal.as_str() {
                "" => "-".to_owned(),
                name => name.to_owned(),
            },
            dash(entry.host.as_ref()),
            entry.action.clone(),
            dash(entry.subject.as_ref()),
            entry.outcome.clone(),
            dash(entry.detail.as_ref()),
        ]);
    }
    table
}

fn table(entries: &[AuditEntry]) -> Table {
    let mut table = Table::new(&[
        "NUMBER", "TIME", "WHO", "VM", "ACTION", "OUTCOME", "IN", "OUT", "TOOK", "WHAT",
    ]);
    let dash = |text: Option<&String>| text.cloned().unwrap_or_else(|| "-".to_owned());
    for entry in entries {
        table.row([
            entry.sequence.to_string(),
            entry.at.clone(),
            entry.principal.clone(),
            dash(entry.vm_name.as_ref().or(entry.vm_id.as_ref())),
            entry.action.clone(),
            entry.outcome.clone(),
            human_size(entry.bytes_in),
            human_size(entry.bytes_out),
            entry
                .duration_seconds
                .map_or_else(|| "-".to_owned(), |took| format!("{took:.1}s")),
            dash(entry.detail.as_ref()),
        ]);
    }
    table
}

async fn verify(session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    // A long log takes longer than a question: no deadline.
    let verdict = agent
        .guest()
        .verify_audit(VerifyAuditRequest {})
        .await
        .map(|answer| AuditVerdict::from(answer.into_inner()))
        .map_err(|status| agent.failure(&status))?;
    session.printer.several(
        std::slice::from_ref(&verdict),
        1,
        |verdict| if verdict.intact { "intact" } else { "broken" },
        text,
    )?;
    Ok(if verdict.intact {
        Exit::Done
    } else {
        Exit::Failed
    })
}

fn text(verdict: &AuditVerdict, paint: Paint) -> String {
    let entries = usize::try_from(verdict.entries).unwrap_or(usize::MAX);
    let entries = count(entries, "entry", "entries");
    let said = |text: Option<&String>, label: &str| {
        text.map(|text| format!("  {label} {}\n", crate::text::printable(text)))
            .unwrap_or_default()
    };
    match verdict.broken_at {
        None => format!(
            "{}: {entries}\n{}",
            paint.green("intact"),
            said(verdict.head.as_ref(), "head:")
        ),
        Some(number) => format!(
            "{} at entry {number} of {entries}\n{}",
            paint.red("broken"),
            said(verdict.detail.as_ref(), "cause:")
        ),
    }
}
