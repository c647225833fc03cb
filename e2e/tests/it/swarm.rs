//! Many hosts at once: all come, and all come back when Core was killed. `make bench` does the same
//! with ten thousand.

use std::time::Duration;

use ghost_e2e::core::{Builder, Core};
use ghost_e2e::swarm::{Swarm, wait_online};
use ghost_e2e::wait;

const HOSTS: usize = 200;
const VMS: u32 = 2;

/// Every VM of every host is listed, once.
fn wait_listed(core: &Core) {
    let wanted = HOSTS * usize::try_from(VMS).unwrap();
    wait::until_ok("all VMs are listed", Duration::from_secs(120), || {
        let listed = core.ctl().json(&["vm", "list", "--all-hosts"]);
        match listed.as_array().map(Vec::len) {
            Some(count) if count == wanted => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
}

#[test]
fn all_hosts_come_back_at_once_when_core_was_killed() {
    let mut core = Builder::new().set("logging.level", "warn").start();
    let mut swarm = Swarm::start(&core, VMS).unwrap();
    swarm.enrol(HOSTS).unwrap();
    swarm.link(HOSTS).unwrap();
    wait_online(&core, HOSTS, Duration::from_secs(120));
    wait_listed(&core);

    core.kill();
    wait::until_ok(
        "the hosts notice",
        Duration::from_secs(60),
        || match swarm.status().unwrap() {
            status if status.up == 0 => Ok(()),
            status => Err(format!("{status:?}")),
        },
    );
    core.start();
    // What Core knew of them it knows still, however many are back by now.
    wait_listed(&core);
    wait_online(&core, HOSTS, Duration::from_secs(240));
    wait::until_ok(
        "the hosts are content",
        Duration::from_secs(60),
        || match swarm.status().unwrap() {
            status if status.up == HOSTS => Ok(()),
            status => Err(format!("{status:?}")),
        },
    );
    let status = swarm.status().unwrap();
    assert_eq!(status.ever_refused, 0, "{status:?}");
    assert!(status.links >= 2 * HOSTS, "{status:?}");
}
