//! Direct ways: a host that Core can dial itself, in another network namespace, and a link beside it
//! that goes through two NATs.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use ghost_e2e::agent::{Agent, Builder as AgentBuilder};
use ghost_e2e::core::{Builder as CoreBuilder, Core};
use ghost_e2e::ctl::Ctl;
use ghost_e2e::netlab::{CORE, NetLab};
use ghost_e2e::wait;
use serde_json::Value;

/// Enrolling, dialling and a first heartbeat, on a busy machine.
const JOIN: Duration = Duration::from_secs(60);
/// Dialling a way, after one wait.
const DIRECT: Duration = Duration::from_secs(60);

struct Fleet {
    agent: Agent,
    core: Core,
    lab: NetLab,
}

impl Fleet {
    fn new(core: CoreBuilder) -> Self {
        let lab = NetLab::new();
        lab.lay_private();
        let core = core
            .set("link.heartbeat_interval", "5s")
            .set("link.ping_interval", "1s")
            .within(&lab.wrapper("core"), CORE)
            .start();
        let agent = AgentBuilder::simulated()
            .set("grpc.listen", "0.0.0.0:9090")
            .set("network.provider", "lan")
            .within(&lab.wrapper("host"))
            .start();
        let token = core.host_token("acme");
        let done = agent.enroll(&token, "pc-at-home");
        assert_eq!(done.code, 0, "{}{}", done.stdout, done.stderr);
        core.wait_host("pc-at-home", "online", JOIN);
        Self { agent, core, lab }
    }

    fn ctl(&self) -> Ctl {
        self.core.ctl().with_env("GHOST_HOST", "pc-at-home")
    }

    fn link(&self) -> Value {
        self.core.ctl().json(&["host", "show", "pc-at-home"])["link"].clone()
    }

    fn wait_way(&self, way: &str) -> Value {
        wait::until_ok(&format!("calls go by {way}"), DIRECT, || {
            let link = self.link();
            if link["way"] == way {
                Ok(link)
            } else {
                Err(link.to_string())
            }
        })
    }
}

#[test]
fn calls_take_a_direct_way_where_there_is_one_and_the_link_where_not() {
    let fleet = Fleet::new(CoreBuilder::new().set("direct.enabled", true));
    assert!(
        fleet
            .lab
            .reaches("core", SocketAddr::from(([192, 168, 50, 2], 9090)))
    );
    let link = fleet.wait_way("direct");
    assert_eq!(link["direct_address"], "192.168.50.2:9090", "{link}");
    assert_eq!(link["carrier"], "link", "{link}");
    let shown = fleet.core.ctl().ok(&["host", "show", "pc-at-home"]);
    assert!(shown.contains("direct, 192.168.50.2:9090"), "{shown}");

    // What is asked is answered over the private cable.
    let before = fleet.lab.private_bytes();
    for _ in 0..20 {
        fleet.ctl().ok(&["status"]);
    }
    let carried = fleet.lab.private_bytes() - before;
    assert!(carried > 4_000, "{carried} bytes came over the direct way");

    // The way dies without a word. A call within the second after something was heard over it is
    // under way over it, and takes the link when it is given up; the next one takes the link at once.
    fleet.lab.let_private(false);
    fleet.ctl().ok(&["list"]);
    let begun = Instant::now();
    fleet.ctl().ok(&["list"]);
    println!(
        "the next call over the link took {:.1} s",
        begun.elapsed().as_secs_f32()
    );
    let link = fleet.wait_way("link");
    let why = link["direct_problem"].as_str().unwrap_or_default();
    assert!(why.contains("192.168.50.2:9090"), "{link}");
    let shown = fleet.core.ctl().ok(&["host", "show", "pc-at-home"]);
    assert!(shown.contains("link (not directly: "), "{shown}");
    assert_eq!(fleet.core.host("pc-at-home")["state"], "online");
    fleet.ctl().ok(&["list"]);

    // And back, by itself.
    fleet.lab.let_private(true);
    fleet.wait_way("direct");
    fleet.ctl().ok(&["list"]);

    // A host that is removed is left alone at once.
    fleet
        .core
        .ctl()
        .ok(&["host", "remove", "pc-at-home", "--force"]);
    wait::until("Core lets go of the host", JOIN, || {
        fleet
            .agent
            .log()
            .contains("a direct connection of Core ended")
            .then_some(())
    });
    fleet.agent.audit();
}

#[test]
fn core_dials_nobody_unasked_and_nothing_that_is_not_allowed() {
    // Not enabled: the host says where it is, and nobody comes.
    let mut fleet = Fleet::new(CoreBuilder::new());
    let link = fleet.wait_way("link");
    assert_eq!(
        link["direct_addresses"][0]["address"], "192.168.50.2:9090",
        "{link}"
    );
    assert!(
        link["direct_problem"]
            .as_str()
            .is_some_and(|why| why.contains("direct.enabled")),
        "{link}"
    );
    // Enabled for another network alone.
    fleet.core.stop();
    fleet.core.set("direct.enabled", true);
    fleet
        .core
        .set("direct.networks", serde_json::json!(["10.0.0.0/8"]));
    let before = fleet.lab.private_bytes();
    fleet.core.start();
    fleet
        .core
        .wait_host("pc-at-home", "online", Duration::from_secs(90));
    let link = wait::until("the address is judged", JOIN, || {
        let link = fleet.link();
        link["direct_problem"]
            .as_str()
            .is_some_and(|why| why.contains("direct.networks"))
            .then_some(link)
    });
    assert_eq!(link["way"], "link", "{link}");
    fleet.ctl().ok(&["list"]);
    // What the kernels say to each other by themselves is less than one handshake.
    let came = fleet.lab.private_bytes() - before;
    assert!(came < 1500, "{came} bytes");
    fleet.agent.audit();
}
