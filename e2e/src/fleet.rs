//! A real Core and a real agent, the agent behind two NATs that let nothing in.

use std::time::Duration;

use serde_json::Value;

use crate::agent::{Agent, Builder as AgentBuilder};
use crate::clock::FakeClock;
use crate::core::{Builder as CoreBuilder, Core};
use crate::ctl::Ctl;
use crate::netlab::{CORE, Delay, NetLab};
use crate::wait;

/// Enrolling, dialling and a first heartbeat, on a busy machine.
pub const JOIN: Duration = Duration::from_secs(30);
/// Until a host is back whose agent may be in the middle of a wait between two tries.
pub const RETURN: Duration = Duration::from_secs(90);
/// What the host is called.
pub const HOST: &str = "pc-at-home";

/// A Core and a host behind two NATs.
pub struct Fleet {
    /// The host.
    pub agent: Agent,
    /// Its Core.
    pub core: Core,
    /// What lies between them.
    pub lab: NetLab,
}

impl Fleet {
    /// With the real libvirt.
    #[expect(clippy::new_without_default, reason = "it starts processes")]
    pub fn new() -> Self {
        Self::with(AgentBuilder::new(), brisk())
    }

    /// With a simulated hypervisor: for what is about the link alone.
    pub fn simulated() -> Self {
        Self::with(AgentBuilder::simulated(), brisk())
    }

    /// With a simulated hypervisor, and with wall clocks of their own for the host and for Core.
    pub fn with_clocks(host: &FakeClock, core: &FakeClock, mut builder: CoreBuilder) -> Self {
        let mut agent = AgentBuilder::simulated();
        for (name, value) in host.environment() {
            agent = agent.env(name, &value);
        }
        for (name, value) in core.environment() {
            builder = builder.env(name, &value);
        }
        Self::with(agent, builder)
    }

    /// Of parts that are set up already.
    pub fn with(agent: AgentBuilder, core: CoreBuilder) -> Self {
        let lab = NetLab::new();
        let core = core.within(&lab.wrapper("core"), CORE).start();
        let agent = agent.within(&lab.wrapper("host")).start();
        let fleet = Self { agent, core, lab };
        fleet.join();
        fleet
    }

    /// With the real libvirt, Core's own intervals, and a slow way between the host and Core: so long
    /// each way.
    pub fn slow(delay: Duration) -> (Self, Delay) {
        let lab = NetLab::new();
        let mut core = CoreBuilder::new()
            .within(&lab.wrapper("core"), CORE)
            .prepare();
        let way = lab.delay(core.address().port(), delay);
        // The host knows no other way.
        core.set("core.addresses", vec![way.address().to_string()]);
        core.start();
        let agent = AgentBuilder::new().within(&lab.wrapper("host")).start();
        let fleet = Self { agent, core, lab };
        fleet.join();
        (fleet, way)
    }

    fn join(&self) {
        let token = self.core.host_token("acme");
        let done = self.agent.enroll(&token, HOST);
        assert_eq!(done.code, 0, "{}{}", done.stdout, done.stderr);
        self.core.wait_host(HOST, "online", JOIN);
    }

    /// `ghostctl --host pc-at-home`, as the fleet's administrator.
    pub fn ctl(&self) -> Ctl {
        self.core.ctl().with_env("GHOST_HOST", HOST)
    }

    /// The host as Core tells it.
    pub fn host(&self) -> Value {
        self.core.host(HOST)
    }

    /// The link as the host itself tells it.
    #[track_caller]
    pub fn link(&self) -> Value {
        link(&self.agent)
    }

    /// Waits until the host is in a state.
    #[track_caller]
    pub fn wait(&self, state: &str, within: Duration) -> Value {
        self.core.wait_host(HOST, state, within)
    }

    /// What is known of a command.
    #[track_caller]
    pub fn command(&self, id: &str) -> Value {
        self.core.ctl().json(&["command", "show", id])
    }

    /// Waits until a command has come so far.
    #[track_caller]
    pub fn wait_command(&self, id: &str, status: &str, within: Duration) -> Value {
        wait::until_ok(&format!("the command is {status}"), within, || {
            let command = self.command(id);
            if command["status"] == status {
                Ok(command)
            } else {
                Err(command.to_string())
            }
        })
    }
}

/// The link as a host itself tells it.
#[track_caller]
pub fn link(agent: &Agent) -> Value {
    agent.ctl().json(&["core", "status"])
}

/// Operations of a host whose kind has this word in it.
#[track_caller]
pub fn operations(agent: &Agent, kind: &str) -> Vec<Value> {
    let all = agent.ctl().json(&["operation", "list", "--all"]);
    let all = all.as_array().cloned().unwrap_or_default();
    all.into_iter()
        .filter(|one| one["kind"].as_str().is_some_and(|name| name.contains(kind)))
        .collect()
}

/// A Core whose links are looked at more often: faults are noticed sooner than by people's patience,
/// in proportion.
pub fn brisk() -> CoreBuilder {
    CoreBuilder::new()
        .set("link.heartbeat_interval", "5s")
        .set("link.ping_interval", "1s")
}
