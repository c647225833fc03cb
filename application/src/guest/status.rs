//! Explain the way into a guest, layer by layer.

use std::sync::Arc;
use std::time::Duration;

use ghost_domain::guest::{GuestHello, GuestLinkStatus};
use ghost_domain::{Principal, Result, Role, Timestamp, VmId, VmName};

use super::detail::escape;
use super::door::{Door, check_access, check_link, check_power};
use crate::registry::{Model, VmEntry};

/// So many connections without a word are no chance.
const MUTE: u32 = 2;

/// One layer between the caller and the guest's agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestLayer {
    /// `domain`, `access`, `channel`, `agent`, `version` or `telemetry`.
    pub name: &'static str,
    /// Whether it is as it must be.
    pub ok: bool,
    /// What is there, or what is wrong.
    pub detail: String,
    /// What to do where it is not ok; empty elsewhere.
    pub hint: String,
}

/// How the way into a guest stands. The guest's words in it are escaped.
#[derive(Clone, Debug)]
pub struct GuestStatusView {
    /// The VM.
    pub vm_id: VmId,
    /// Its name.
    pub vm_name: VmName,
    /// From the outside in.
    pub layers: Vec<GuestLayer>,
    /// All that a call needs is there.
    pub ready: bool,
    /// How its agent greeted, where it did since the agent on the host runs.
    pub hello: Option<GuestHello>,
    /// When it did, in this session.
    pub connected_at: Option<Timestamp>,
    /// How long ago it was last heard.
    pub last_seen_age: Option<Duration>,
    /// The host has another program than the guest.
    pub outdated: bool,
}

/// Explains the way into a guest.
pub struct GetGuestStatus {
    pub(crate) door: Arc<Door>,
}

impl GetGuestStatus {
    /// Every layer; what is wrong with one is told, not returned as an error.
    ///
    /// # Errors
    /// `PermissionDenied`, `VmNotFound`, `VmAmbiguous`.
    pub async fn execute(&self, principal: &Principal, vm: &str) -> Result<GuestStatusView> {
        principal.require(Role::Viewer)?;
        let door = &self.door;
        let id = door
            .registry
            .read(|model| model.find_vm(vm).map(|entry| entry.vm.id))?;
        let status = door.ports.guests.status(id);
        let program = door.program().await;
        let now = door.registry.clock().monotonic();
        door.registry.read(|model| {
            let entry = model.vm(id)?;
            let outdated = match (&status.hello, &program) {
                (Some(hello), Some(program)) => {
                    !hello.program_sha256.is_empty() && hello.program_sha256 != program.sha256
                }
                _ => false,
            };
            let layers = vec![
                domain(model, entry),
                access(model, entry, door.access),
                channel(entry, &status),
                agent(entry, &status, now),
                version(entry, &status, outdated),
                telemetry(entry, now),
            ];
            let needed = layers.iter().filter(|layer| layer.name != "telemetry");
            let ready = needed
                .clone()
                .all(|layer| layer.ok || layer.name == "version")
                && check_link(&status, entry.vm.name.as_str()).is_ok();
            Ok(GuestStatusView {
                vm_id: id,
                vm_name: entry.vm.name.clone(),
                layers,
                ready,
                hello: status
                    .hello
                    .as_ref()
                    .or(entry.guest.hello.as_deref())
                    .map(escaped),
                connected_at: status.connected_at,
                last_seen_age: status.last_seen.map(|seen| now.since(seen)),
                outdated,
            })
        })
    }
}

fn ok(name: &'static str, detail: impl Into<String>) -> GuestLayer {
    GuestLayer {
        name,
        ok: true,
        detail: detail.into(),
        hint: String::new(),
    }
}

fn bad(name: &'static str, detail: impl Into<String>, hint: impl Into<String>) -> GuestLayer {
    GuestLayer {
        name,
        ok: false,
        detail: detail.into(),
        hint: hint.into(),
    }
}

fn error(name: &'static str, error: &ghost_domain::Error) -> GuestLayer {
    bad(name, error.message(), error.hint_text().unwrap_or_default())
}

fn domain(model: &Model, entry: &VmEntry) -> GuestLayer {
    match check_power(model, entry.vm.id) {
        Err(why) => error("domain", &why),
        Ok(()) if !model.link.connected => bad(
            "domain",
            format!("libvirt cannot be reached: {}", model.link.reason),
            "look at libvirt on the host: ghost-agent doctor",
        ),
        Ok(()) => match &entry.observation {
            Some(seen) => ok("domain", seen.power.as_str()),
            None => bad("domain", "not seen yet", "ghostctl status"),
        },
    }
}

fn access(model: &Model, entry: &VmEntry, host: bool) -> GuestLayer {
    if let Err(why) = check_access(entry, host) {
        return error("access", &why);
    }
    match &model.lockdown {
        Some(lockdown) => bad(
            "access",
            format!(
                "all ways into guests are closed by {}: {}",
                lockdown.set_by, lockdown.reason
            ),
            "an admin opens them again: ghostctl lockdown --lift",
        ),
        None => ok("access", "on"),
    }
}

fn channel(entry: &VmEntry, status: &GuestLinkStatus) -> GuestLayer {
    if status.channel {
        return ok("channel", "virtio-serial org.ghost.agent.0 is open");
    }
    let why = match &status.channel_error {
        Some(why) => escape(why, 256),
        None => "not open".into(),
    };
    bad(
        "channel",
        why,
        format!(
            "a VM that was made before this version gets its channel with the next start: ghostctl vm restart {}",
            entry.vm.name
        ),
    )
}

fn agent(entry: &VmEntry, status: &GuestLinkStatus, now: ghost_domain::Monotonic) -> GuestLayer {
    let name = &entry.vm.name;
    if status.held_off_until.is_some() {
        return bad(
            "agent",
            format!(
                "held off for a while: it broke the protocol {} times",
                status.violations
            ),
            format!("look at the guest on its console: ghostctl vm console {name}"),
        );
    }
    if let Some(since) = status.silent_since {
        return bad(
            "agent",
            format!("connected, but silent for {} s", now.since(since).as_secs()),
            format!("the guest hangs, is busy or paused: ghostctl vm console {name}"),
        );
    }
    match &status.hello {
        Some(hello) => ok(
            "agent",
            format!(
                "greeted as {} ({}), {} calls under way",
                escape(&hello.hostname, 64),
                escape(&hello.operating_system, 64),
                status.running_calls
            ),
        ),
        // An agent that is there announces itself on every new connection.
        None if status.mute_connections >= MUTE => bad(
            "agent",
            format!(
                "not a byte came from the guest on {} connections one after the other",
                status.mute_connections
            ),
            format!(
                "see whether its agent runs: ghostctl vm console {name}; where it does, its port has lost all buffers to floods, and has them again after a restart: ghostctl vm restart {name}"
            ),
        ),
        None => {
            let hint = if entry.vm.spec.guest.inject == ghost_domain::guest::GuestInject::Never {
                "this VM was made without it (guest.inject: never): install ghost-guest in it"
                    .to_owned()
            } else {
                format!(
                    "it comes with the first boot; see how far that is: ghostctl vm logs {name}"
                )
            };
            bad("agent", "it has not greeted", hint)
        }
    }
}

fn version(entry: &VmEntry, status: &GuestLinkStatus, outdated: bool) -> GuestLayer {
    let Some(hello) = &status.hello else {
        return bad("version", "not known before it greets", "");
    };
    let said = escape(&hello.agent_version, 64);
    if hello.protocol_version == 0 {
        return bad(
            "version",
            format!("{said}: there is no common protocol version"),
            "bring the agents on the host and in the guest to releases near each other",
        );
    }
    if outdated {
        return bad(
            "version",
            format!("{said}: not the program that this host has"),
            format!(
                "it is replaced by itself unless guest.update is off; see ghostctl events {}",
                entry.vm.name
            ),
        );
    }
    ok(
        "version",
        format!("{said}, protocol {}", hello.protocol_version),
    )
}

fn telemetry(entry: &VmEntry, now: ghost_domain::Monotonic) -> GuestLayer {
    match &entry.guest.telemetry {
        Some((_, at)) if entry.guest.is_fresh(now) => ok(
            "telemetry",
            format!("reported {} s ago", now.since(*at).as_secs()),
        ),
        Some((_, at)) => bad(
            "telemetry",
            format!(
                "silent for {} s; the host's figures are shown",
                now.since(*at).as_secs()
            ),
            "",
        ),
        None => bad("telemetry", "none yet; the host's figures are shown", ""),
    }
}

/// A greeting fit to be shown.
fn escaped(hello: &GuestHello) -> GuestHello {
    let clean = |text: &str| escape(text, 256);
    GuestHello {
        agent_version: clean(&hello.agent_version),
        protocol_version: hello.protocol_version,
        capabilities: hello
            .capabilities
            .iter()
            .take(32)
            .map(|one| clean(one))
            .collect(),
        boot_id: clean(&hello.boot_id),
        operating_system: clean(&hello.operating_system),
        kernel: clean(&hello.kernel),
        hostname: clean(&hello.hostname),
        program_sha256: hello.program_sha256.clone(),
    }
}

/// The answer to a ping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestPing {
    /// From frame to frame.
    pub round_trip: Duration,
    /// What answered, escaped.
    pub agent_version: String,
}

/// Measures the way to a guest's agent.
pub struct PingGuest {
    pub(crate) door: Arc<Door>,
}

impl PingGuest {
    /// The round trip. Nothing of the guest is entered: a viewer may ask, and it works while
    /// access is off.
    ///
    /// # Errors
    /// `PermissionDenied`, `VmNotFound`, `VmNotRunning`, `GuestUnreachable`, `DeadlineExceeded`.
    pub async fn execute(&self, principal: &Principal, vm: &str) -> Result<GuestPing> {
        principal.require(Role::Viewer)?;
        let door = &self.door;
        let (id, name) = door.registry.read(|model| {
            let entry = model.find_vm(vm)?;
            check_power(model, entry.vm.id)?;
            Ok::<_, ghost_domain::Error>((entry.vm.id, entry.vm.name.clone()))
        })?;
        let status = door.ports.guests.status(id);
        check_link(&status, name.as_str())?;
        let round_trip = door.ports.guests.ping(id).await?;
        Ok(GuestPing {
            round_trip,
            agent_version: status
                .hello
                .map(|hello| escape(&hello.agent_version, 64))
                .unwrap_or_default(),
        })
    }
}
