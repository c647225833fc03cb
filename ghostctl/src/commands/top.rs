//! `vm top`: what VMs use, as it changes. A picture that stays in its place on a terminal, a line a
//! report elsewhere.

use std::collections::BTreeMap;
use std::time::Duration;

use ghost_proto::agent::v1::{self as message, WatchTelemetryRequest};
use ghost_proto::view::GuestTelemetry;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tonic::Streaming;

use super::waiting::CtrlC;
use crate::arguments::{Format, TopArgs};
use crate::connect::{Agent, Session};
use crate::errors::{Exit, Failure, timed_out};
use crate::table::Table;
use crate::text::{human_age, human_size, printable};

/// How often the picture is drawn: ages grow by the second.
const DRAW: Duration = Duration::from_secs(1);

/// Reports come every few seconds; a VM that is not heard of for so long is gone.
const GONE: Duration = Duration::from_secs(60);

/// What is known comes at once; then there is a pause.
const FIRST: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(500);

/// The alternate screen without a cursor, and back: what was on the terminal stays there.
const ENTER: &[u8] = b"\x1b[?1049h\x1b[?25l";
const LEAVE: &[u8] = b"\x1b[?25h\x1b[?1049l";

/// The newest report of each VM by name, and when it came.
type Newest = BTreeMap<String, (GuestTelemetry, Instant)>;

pub(super) async fn run(args: TopArgs, session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    let one = args.name.clone();
    let stream = agent
        .guest()
        .watch_telemetry(WatchTelemetryRequest {
            vm: args.name.unwrap_or_default(),
        })
        .await
        .map_err(|status| agent.failure(&status))?
        .into_inner();
    if args.once {
        return once(stream, one, &agent, session).await;
    }
    let live = session.printer.stdout_is_terminal() && session.printer.format() == Format::Table;
    if live {
        draw(stream, &agent, session).await
    } else {
        lines(stream, &agent, session).await
    }
}

async fn next(
    stream: &mut Streaming<message::GuestTelemetry>,
    agent: &Agent,
) -> Result<Option<GuestTelemetry>, Failure> {
    stream
        .message()
        .await
        .map(|telemetry| telemetry.map(Into::into))
        .map_err(|status| agent.failure(&status))
}

/// What is known now.
async fn once(
    mut stream: Streaming<message::GuestTelemetry>,
    one: Option<String>,
    agent: &Agent,
    session: &Session,
) -> Result<Exit, Failure> {
    let mut newest = Newest::new();
    let mut patience = FIRST;
    // Without VMs that run nothing ever comes, and that is an answer; of one VM it is none.
    while let Ok(telemetry) = timeout(patience, next(&mut stream, agent)).await {
        let Some(telemetry) = telemetry? else { break };
        patience = PAUSE;
        let again = newest
            .insert(telemetry.vm_name.clone(), (telemetry, Instant::now()))
            .is_some();
        // Whoever is told of twice has changed: all that was known has come.
        if again || one.is_some() {
            break;
        }
    }
    if let (Some(vm), true) = (&one, newest.is_empty()) {
        return Err(timed_out(format!("nothing is known of {vm}"), FIRST)
            .hint(format!("ghostctl guest status {vm}")));
    }
    let all: Vec<GuestTelemetry> = newest.into_values().map(|(known, _)| known).collect();
    session.printer.list(
        &all,
        |known| &known.vm_name,
        |all| table(all.iter().map(|known| (known, 0.0))),
    )?;
    if all.is_empty() {
        session.printer.note("no VM runs");
    }
    Ok(Exit::Done)
}

/// One line a report.
async fn lines(
    mut stream: Streaming<message::GuestTelemetry>,
    agent: &Agent,
    session: &Session,
) -> Result<Exit, Failure> {
    while let Some(telemetry) = next(&mut stream, agent).await? {
        session.printer.item(&telemetry, &telemetry.vm_name, |_| {
            let cells = cells(&telemetry, 0.0);
            format!(
                "{}: cpu {}, memory {}, load {}, disk {}, net {}, by {}\n",
                printable(&cells[0]),
                cells[1],
                cells[2],
                cells[3],
                cells[4],
                cells[5],
                printable(&cells[7]),
            )
        })?;
    }
    Ok(Exit::Done)
}

/// The alternate screen, left however this ends.
struct Screen<'a>(&'a Session);

impl Drop for Screen<'_> {
    fn drop(&mut self) {
        // Nothing can be done where the terminal is gone.
        drop(self.0.printer.bytes(LEAVE));
    }
}

async fn draw(
    mut stream: Streaming<message::GuestTelemetry>,
    agent: &Agent,
    session: &Session,
) -> Result<Exit, Failure> {
    let failed = |error| Failure::io("signals cannot be watched for", &error);
    let mut ctrl_c = CtrlC::listen()?;
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut hang_up = signal(SignalKind::hangup()).map_err(failed)?;
    let mut tick = interval(DRAW);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut newest = Newest::new();
    session.printer.bytes(ENTER)?;
    let _screen = Screen(session);
    loop {
        tokio::select! {
            telemetry = next(&mut stream, agent) => match telemetry? {
                Some(telemetry) => {
                    newest.insert(telemetry.vm_name.clone(), (telemetry, Instant::now()));
                }
                None => return Ok(Exit::Done),
            },
            _ = tick.tick() => {
                newest.retain(|_, (_, at)| at.elapsed() < GONE);
                session.printer.bytes(&picture(&newest, session))?;
            }
            () = ctrl_c.pressed() => return Ok(Exit::Done),
            _ = terminate.recv() => return Ok(Exit::Failed),
            _ = hang_up.recv() => return Ok(Exit::Failed),
        }
    }
}

fn picture(newest: &Newest, session: &Session) -> Vec<u8> {
    // Home; each line clears its rest, and the end what is below: nothing flickers.
    let mut out = b"\x1b[H".to_vec();
    let head = if newest.is_empty() {
        "nothing was reported yet; Ctrl-C ends\n".to_owned()
    } else {
        let rows = newest
            .values()
            .map(|(known, at)| (known, at.elapsed().as_secs_f64()));
        session.printer.render(&table(rows)) + "\nCtrl-C ends\n"
    };
    for line in head.lines() {
        out.extend_from_slice(line.as_bytes());
        out.extend_from_slice(b"\x1b[K\r\n");
    }
    out.extend_from_slice(b"\x1b[J");
    out
}

fn table<'a>(rows: impl Iterator<Item = (&'a GuestTelemetry, f64)>) -> Table {
    let mut table = Table::new(&[
        "NAME",
        "CPU",
        "MEMORY",
        "LOAD",
        "DISK R/W",
        "NET IN/OUT",
        "PROCS",
        "BY",
        "AGE",
    ]);
    for (known, older) in rows {
        table.row(cells(known, older));
    }
    table
}

/// What is shown of a VM; `older` is how long ago its report came.
fn cells(known: &GuestTelemetry, older: f64) -> [String; 9] {
    let dash = || "-".to_owned();
    let sample = known.sample.as_ref();
    let rate = |bytes: Option<f64>| bytes.map_or_else(dash, size);
    let pair = |one: Option<f64>, other: Option<f64>| format!("{} / {}", rate(one), rate(other));
    // What only the guest knows, and the guest is silent.
    let silent = sample.is_none_or(|sample| sample.source != "guest");
    [
        known.vm_name.clone(),
        sample
            .and_then(|sample| sample.cpu_percent)
            .map_or_else(dash, |percent| format!("{percent:.1}%")),
        match sample.map(|sample| (sample.memory_used_bytes, sample.memory_total_bytes)) {
            Some((Some(used), Some(total))) => {
                format!("{} of {}", human_size(used), human_size(total))
            }
            Some((Some(used), None)) => human_size(used),
            _ => dash(),
        },
        if silent {
            dash()
        } else {
            format!("{:.2}", known.load_1)
        },
        pair(
            sample.map(|sample| sample.disk_read_bytes_per_second),
            sample.map(|sample| sample.disk_write_bytes_per_second),
        ),
        pair(
            sample.map(|sample| sample.network_receive_bytes_per_second),
            sample.map(|sample| sample.network_transmit_bytes_per_second),
        ),
        if silent {
            dash()
        } else {
            known.processes.to_string()
        },
        sample.map_or_else(dash, |sample| sample.source.clone()),
        human_age(known.age_seconds.map(|age| age + older)),
    ]
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "`as` saturates, and a rate is not negative"
)]
fn size(bytes: f64) -> String {
    format!("{}/s", human_size(bytes as u64))
}
