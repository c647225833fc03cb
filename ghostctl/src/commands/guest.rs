//! `guest …`: what the agent in a VM can do, besides running programs and copying files.

use std::io::{BufRead, IsTerminal, Read};

use ghost_proto::agent::v1::{
    FreezeGuestRequest, GetGuestStatusRequest, PingGuestRequest, RegisterGuestAddressRequest,
    SetGuestAccessRequest, SetGuestPasswordRequest, ShutdownGuestRequest, SyncGuestClockRequest,
    ThawGuestRequest, UpdateGuestRequest, UpdateGuestSshKeysRequest,
};
use ghost_proto::view::{
    GuestAccess as AccessView, GuestFreeze as FreezeView, GuestPing, GuestStatus, GuestUpdate,
};
use serde::Serialize;

use super::vm_create::ssh_keys;
use super::waiting::CtrlC;
use super::{each, wire};
use crate::arguments::{
    GuestAccess, GuestAddress, GuestCommand, GuestFreeze, GuestPassword, GuestShutdown,
    SshKeyCommand, Switch,
};
use crate::connect::{Session, ask, ask_guest, ask_long};
use crate::errors::{ErrorCode, Exit, Failure, worst};
use crate::table::Paint;
use crate::terminal::SilentTerminal;
use crate::text::{count, human_age, printable};

/// When frozen file systems thaw by themselves, where nobody says otherwise; the agent's default.
const FREEZE: std::time::Duration = std::time::Duration::from_secs(10);

/// No password is longer; more is a file by mistake.
const PASSWORD_LIMIT: u64 = 4096;

/// Something was done to a guest that has nothing to say about it.
#[derive(Serialize)]
struct Done {
    vm: String,
}

pub(super) async fn run(command: GuestCommand, session: &Session) -> Result<Exit, Failure> {
    match command {
        GuestCommand::Status(args) => status(args.names, session).await,
        GuestCommand::Ping(args) => ping(args.name, session).await,
        GuestCommand::Password(args) => password(args, session).await,
        GuestCommand::SshKey(command) => ssh_key(command, session).await,
        GuestCommand::SyncClock(args) => sync_clock(args.names, session).await,
        GuestCommand::Freeze(args) => freeze(args, session).await,
        GuestCommand::Thaw(args) => thaw(args.name, session).await,
        GuestCommand::Update(args) => update(args.names, session).await,
        GuestCommand::Access(args) => access(args, session).await,
        GuestCommand::Address(args) => address(args, session).await,
        GuestCommand::Shutdown(args) => shutdown(args, session).await,
    }
}

/// The answer of one VM, which says nothing of whose it is.
#[derive(Serialize)]
struct Of<T> {
    vm: String,
    #[serde(flatten)]
    answer: T,
}

async fn status(names: Vec<String>, session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    let (statuses, exit) = each(&names, session, |vm| async {
        agent
            .guest()
            .get_status(ask(GetGuestStatusRequest { vm }))
            .await
            .map(|answer| GuestStatus::from(answer.into_inner()))
            .map_err(|status| agent.failure(&status))
    })
    .await;
    session
        .printer
        .several(&statuses, names.len(), |status| &status.vm_name, layers)?;
    let ready = statuses.iter().all(|status| status.ready);
    Ok(worst([exit, if ready { Exit::Done } else { Exit::Failed }]))
}

/// A line a layer, and what to do under those that are not as they must be.
fn layers(status: &GuestStatus, paint: Paint) -> String {
    let mut text = format!(
        "{}: {}\n",
        printable(&status.vm_name),
        if status.ready {
            paint.green("ready")
        } else {
            paint.red("not ready")
        }
    );
    for layer in &status.layers {
        let mark = if layer.ok {
            paint.green("✓")
        } else {
            paint.red("✗")
        };
        text.push_str(&format!(
            "  {mark} {:10} {}\n",
            printable(&layer.name),
            printable(&layer.detail)
        ));
        if let Some(hint) = layer.hint.as_ref().filter(|_| !layer.ok) {
            text.push_str(&format!(
                "      {} {}\n",
                paint.dim("try:"),
                printable(hint)
            ));
        }
    }
    let mut say = |key: &str, value: Option<String>| {
        if let Some(value) = value.filter(|value| !value.is_empty()) {
            text.push_str(&format!(
                "    {} {}\n",
                paint.dim(&format!("{key:11}")),
                value
            ));
        }
    };
    let known = |text: &Option<String>| text.as_deref().map(printable);
    say(
        "system",
        match (known(&status.operating_system), known(&status.kernel)) {
            (Some(system), Some(kernel)) => Some(format!("{system}, {kernel}")),
            (system, kernel) => system.or(kernel),
        },
    );
    say("hostname", known(&status.hostname));
    say(
        "agent",
        known(&status.agent_version).map(|version| {
            let outdated = if status.outdated {
                ", a newer one is at hand"
            } else {
                ""
            };
            format!("{version}{outdated}")
        }),
    );
    say("can", Some(printable(&status.capabilities.join(", "))));
    say(
        "heard",
        status
            .last_seen_age_seconds
            .map(|_| format!("{} ago", human_age(status.last_seen_age_seconds))),
    );
    text
}

async fn ping(vm: String, session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    let request = PingGuestRequest { vm: vm.clone() };
    let answer = agent
        .guest()
        .ping(ask(request))
        .await
        .map_err(|status| agent.failure(&status))?
        .into_inner();
    let ping = Of {
        vm,
        answer: GuestPing::from(answer),
    };
    session.printer.several(
        &[ping],
        1,
        |ping| &ping.vm,
        |ping, _| {
            format!(
                "{}: {:.1} ms to the agent{} and back\n",
                printable(&ping.vm),
                ping.answer.round_trip_seconds * 1000.0,
                ping.answer
                    .agent_version
                    .as_ref()
                    .map(|version| format!(" ({})", printable(version)))
                    .unwrap_or_default()
            )
        },
    )?;
    Ok(Exit::Done)
}

/// Tells of something that was done to one VM.
fn tell(vm: &str, text: &str, session: &Session) -> Result<Exit, Failure> {
    let done = Done { vm: vm.to_owned() };
    session
        .printer
        .several(&[done], 1, |done| &done.vm, |_, _| format!("{text}\n"))?;
    Ok(Exit::Done)
}

async fn password(args: GuestPassword, session: &Session) -> Result<Exit, Failure> {
    // Before anything is typed: a mistake in the name is told first.
    let agent = session.agent().await?;
    let mut ctrl_c = CtrlC::listen()?;
    let (vm, user) = (printable(&args.name), printable(&args.user));
    let password = if std::io::stdin().is_terminal() {
        let first = prompt(&format!("New password of {user} in {vm}: "), &mut ctrl_c).await?;
        let again = prompt("The same again: ", &mut ctrl_c).await?;
        if first != again {
            return Err(Failure::usage("the two are not the same").because("nothing was changed"));
        }
        first
    } else {
        let mut text = String::new();
        std::io::stdin()
            .take(PASSWORD_LIMIT + 1)
            .read_to_string(&mut text)
            .map_err(|error| Failure::io("stdin cannot be read", &error))?;
        line_of(&text)?
    };
    if password.is_empty() {
        return Err(Failure::usage("the password is empty").because("nothing was changed"));
    }
    agent
        .guest()
        .set_password(ask_guest(SetGuestPasswordRequest {
            vm: args.name.clone(),
            user: args.user,
            password,
            hashed: args.hashed,
        }))
        .await
        .map_err(|status| agent.failure(&status))?;
    let text = format!("Set the password of {user} in {vm}");
    tell(&args.name, &text, session)
}

/// The one line that stdin has.
fn line_of(text: &str) -> Result<String, Failure> {
    let line = text.strip_suffix('\n').unwrap_or(text);
    let line = line.strip_suffix('\r').unwrap_or(line);
    if line.contains('\n') || text.len() as u64 > PASSWORD_LIMIT {
        return Err(
            Failure::usage("stdin has more than one line").because("a password is one line")
        );
    }
    Ok(line.to_owned())
}

/// Asks on stderr and reads a line that is not shown.
async fn prompt(question: &str, ctrl_c: &mut CtrlC) -> Result<String, Failure> {
    use std::io::Write as _;
    let silent = SilentTerminal::enter()?;
    // Nobody is left to tell where stderr is closed.
    drop(std::io::stderr().lock().write_all(question.as_bytes()));
    let read = async {
        tokio::task::spawn_blocking(|| {
            let mut line = String::new();
            std::io::stdin()
                .lock()
                .take(PASSWORD_LIMIT)
                .read_line(&mut line)
                .map(|_| line)
        })
        .await
        .map_err(|_| Failure::new(ErrorCode::Internal, "the terminal was not read"))?
        .map_err(|error| Failure::io("the terminal cannot be read", &error))
    };
    let line = ctrl_c
        .or(read, || {
            Failure::new(ErrorCode::Interrupted, "interrupted; nothing was changed")
        })
        .await;
    drop(silent);
    line_of(&line?)
}

async fn ssh_key(command: SshKeyCommand, session: &Session) -> Result<Exit, Failure> {
    let (args, adds) = match command {
        SshKeyCommand::Add(args) => (args, true),
        SshKeyCommand::Remove(args) => (args, false),
    };
    let keys = ssh_keys(&args.files)?;
    let text = format!(
        "{} {} of {} in {}",
        if adds { "Added" } else { "Removed" },
        count(keys.len(), "SSH key", "SSH keys"),
        printable(&args.user),
        printable(&args.name)
    );
    let (add, remove) = if adds {
        (keys, Vec::new())
    } else {
        (Vec::new(), keys)
    };
    let agent = session.agent().await?;
    agent
        .guest()
        .update_ssh_keys(ask_guest(UpdateGuestSshKeysRequest {
            vm: args.name.clone(),
            user: args.user,
            add,
            remove,
        }))
        .await
        .map_err(|status| agent.failure(&status))?;
    tell(&args.name, &text, session)
}

async fn sync_clock(names: Vec<String>, session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    let (done, exit) = each(&names, session, |vm| async {
        agent
            .guest()
            .sync_clock(ask_guest(SyncGuestClockRequest { vm: vm.clone() }))
            .await
            .map(|_| Done { vm })
            .map_err(|status| agent.failure(&status))
    })
    .await;
    session.printer.several(
        &done,
        names.len(),
        |done| &done.vm,
        |done, _| format!("Set the clock of {}\n", printable(&done.vm)),
    )?;
    Ok(exit)
}

async fn freeze(args: GuestFreeze, session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    let limit = args.timeout.unwrap_or(FREEZE);
    let answer = agent
        .guest()
        .freeze(ask_long(FreezeGuestRequest {
            vm: args.name.clone(),
            timeout: args.timeout.map(wire),
            mount_points: args.mounts,
        }))
        .await
        .map_err(|status| agent.failure(&status))?
        .into_inner();
    let text = |frozen: &FreezeView| {
        format!(
            "Froze {} of {}; they thaw in {}, or with: ghostctl guest thaw {}\n",
            filesystems(frozen),
            printable(&args.name),
            crate::text::exact_duration(limit),
            printable(&args.name)
        )
    };
    held(answer.into(), &args.name, text, session)
}

async fn thaw(vm: String, session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    let answer = agent
        .guest()
        .thaw(ask_long(ThawGuestRequest { vm: vm.clone() }))
        .await
        .map_err(|status| agent.failure(&status))?
        .into_inner();
    let text =
        |thawed: &FreezeView| format!("Thawed {} of {}\n", filesystems(thawed), printable(&vm));
    held(answer.into(), &vm, text, session)
}

fn filesystems(freeze: &FreezeView) -> String {
    let number = usize::try_from(freeze.count).unwrap_or(usize::MAX);
    count(number, "file system", "file systems")
}

/// Tells of a freeze or a thaw, and of the hooks that failed.
fn held(
    answer: FreezeView,
    vm: &str,
    text: impl Fn(&FreezeView) -> String,
    session: &Session,
) -> Result<Exit, Failure> {
    let held = Of {
        vm: vm.to_owned(),
        answer,
    };
    session.printer.several(
        std::slice::from_ref(&held),
        1,
        |held| &held.vm,
        |held, _| text(&held.answer),
    )?;
    for warning in &held.answer.warnings {
        session.printer.warning(warning);
    }
    Ok(Exit::Done)
}

async fn update(names: Vec<String>, session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    let (done, exit) = each(&names, session, |vm| async {
        agent
            .guest()
            .update_guest(ask_long(UpdateGuestRequest { vm: vm.clone() }))
            .await
            .map(|answer| Of {
                vm,
                answer: GuestUpdate::from(answer.into_inner()),
            })
            .map_err(|status| agent.failure(&status))
    })
    .await;
    session.printer.several(
        &done,
        names.len(),
        |done| &done.vm,
        |done, _| {
            let (vm, update) = (printable(&done.vm), &done.answer);
            let (from, to) = (
                printable(&update.from_version),
                printable(&update.to_version),
            );
            if !update.replaced {
                format!("The agent in {vm} is the host's program already ({to})\n")
            } else if from == to {
                format!("Replaced the agent in {vm} by another build of {to}\n")
            } else {
                format!("Replaced the agent in {vm}: {from} is now {to}\n")
            }
        },
    )?;
    Ok(exit)
}

async fn access(args: GuestAccess, session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    let answer = agent
        .guest()
        .set_access(ask(SetGuestAccessRequest {
            vm: args.name.clone(),
            access: args.access == Switch::On,
        }))
        .await
        .map_err(|status| agent.failure(&status))?
        .into_inner();
    let of = Of {
        vm: args.name,
        answer: AccessView::from(answer),
    };
    session.printer.several(
        &[of],
        1,
        |of| &of.vm,
        |of, _| {
            let vm = printable(&of.vm);
            if of.answer.access {
                return format!("Guest access of {vm} is on\n");
            }
            let cut = usize::try_from(of.answer.sessions_cut).unwrap_or(usize::MAX);
            format!(
                "Guest access of {vm} is off; cut {}\n",
                count(cut, "session", "sessions")
            )
        },
    )?;
    Ok(Exit::Done)
}

async fn address(args: GuestAddress, session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    let address = args.address.0.map(|address| address.to_string());
    agent
        .guest()
        .register_address(ask(RegisterGuestAddressRequest {
            vm: args.name.clone(),
            address: address.clone().unwrap_or_default(),
        }))
        .await
        .map_err(|status| agent.failure(&status))?;
    let vm = printable(&args.name);
    let text = match address {
        Some(address) => format!("Registered {address} for {vm}"),
        None => format!("Forgot what was registered for {vm}"),
    };
    tell(&args.name, &text, session)
}

async fn shutdown(args: GuestShutdown, session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    agent
        .guest()
        .shutdown(ask_guest(ShutdownGuestRequest {
            vm: args.name.clone(),
            reboot: args.reboot,
            delay: args.delay.map(wire),
        }))
        .await
        .map_err(|status| agent.failure(&status))?;
    let what = if args.reboot { "restart" } else { "shut down" };
    let text = format!("Told {} to {what}", printable(&args.name));
    let exit = tell(&args.name, &text, session)?;
    if !args.reboot {
        session.printer.note(&format!(
            "follow it with: ghostctl vm wait {} --for stopped",
            printable(&args.name)
        ));
    }
    Ok(exit)
}
