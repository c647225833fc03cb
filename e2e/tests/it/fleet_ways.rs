//! The way between a host and Core: slow ones, ones that change under it, and what people do over
//! them with a guest.

use std::collections::BTreeSet;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ghost_e2e::agent::Builder as AgentBuilder;
use ghost_e2e::core::Builder as CoreBuilder;
use ghost_e2e::fleet::{Fleet, HOST, JOIN, RETURN};
use ghost_e2e::guest::{self, BOOT};
use ghost_e2e::wait;

use crate::terminal::Terminal;

/// Each way: a link over a satellite is hardly slower.
const DELAY: Duration = Duration::from_millis(200);

/// A command that goes on, with what it says in a file; ended with the value.
struct Following {
    child: Child,
    output: tempfile::NamedTempFile,
}

impl Following {
    fn begin(mut command: Command) -> Self {
        let output = tempfile::NamedTempFile::new().unwrap();
        let child = command
            .stdin(Stdio::null())
            .stdout(output.reopen().unwrap())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self { child, output }
    }

    fn wait(&mut self, wanted: &[&str]) {
        wait::until_ok(&format!("{wanted:?} is told"), JOIN, || {
            assert_eq!(self.child.try_wait().unwrap(), None, "it ended");
            let told = std::fs::read_to_string(self.output.path()).unwrap();
            let here = wanted.iter().all(|word| told.contains(word));
            here.then_some(()).ok_or(told)
        });
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Looks at the state of the host again and again until the value ends.
struct Watch {
    stop: Arc<AtomicBool>,
    looking: Option<JoinHandle<BTreeSet<String>>>,
}

impl Watch {
    fn begin(fleet: &Fleet) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (ctl, stopped) = (fleet.core.ctl(), Arc::clone(&stop));
        let looking = std::thread::spawn(move || {
            let mut seen = BTreeSet::new();
            while !stopped.load(Ordering::Relaxed) {
                let host = ctl.json(&["host", "show", HOST]);
                seen.insert(format!("{}{}", host["state"], host["state_reason"]));
                std::thread::sleep(Duration::from_millis(300));
            }
            seen
        });
        Self {
            stop,
            looking: Some(looking),
        }
    }

    /// All the states that there were.
    fn end(mut self) -> BTreeSet<String> {
        self.stop.store(true, Ordering::Relaxed);
        self.looking.take().unwrap().join().unwrap()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_slow_link_is_a_good_link_and_people_type_through_it() {
    let _room = guest::room(1);
    let (fleet, way) = Fleet::slow(DELAY);
    fleet.agent.import_tiny();
    let ctl = fleet.ctl();
    let name = fleet.agent.name("slow");
    let states = Watch::begin(&fleet);
    let mut events = Following::begin(ctl.command(&["events", "--follow", "-o", "json"]));
    ctl.ok(&[
        "launch", "tiny", &name, "--cpus", "1", "--memory", "256MiB", "--disk", "128MiB",
    ]);
    ctl.ok(&["vm", "wait", &name, "--for", "agent", "--timeout", "120s"]);
    events.wait(&[&name, "vm_state", "running"]);
    assert!(ctl.ok(&["list"]).contains(&name));
    let listed = fleet.core.ctl().json(&["vm", "list", "--all-hosts"]);
    assert_eq!(listed[0]["name"], name.as_str(), "{listed}");

    let ran = ctl.run(&["exec", &name, "--", "sh", "-c", "echo out; exit 7"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (7, "out\n"));
    let there = fleet.agent.folder().join("there");
    let back = fleet.agent.folder().join("back");
    let bytes: Vec<u8> = (0..4_u32 << 20)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    std::fs::write(&there, bytes).unwrap();
    let inside = format!("{name}:/tmp/here");
    ctl.ok(&["cp", there.to_str().unwrap(), &inside]);
    ctl.ok(&["cp", &inside, back.to_str().unwrap()]);
    assert!(std::fs::read(&there).unwrap() == std::fs::read(&back).unwrap());

    // A shell on a terminal inside, typed and read through both NATs.
    let mut shell = Terminal::run(&ctl.command(&["exec", "-it", &name, "--", "sh"]));
    shell.send("tty; echo sum $((20 + 22))\n");
    shell.expect("/dev/pts/", JOIN);
    shell.expect("sum 42", JOIN);
    shell.send("exit 9\n");
    assert_eq!(shell.end(JOIN), 9);

    // The console: the guest's own serial line.
    let mut console = Terminal::run(&ctl.command(&["vm", "console", &name]));
    console.expect("attached to the console", JOIN);
    console.send("\r");
    console.expect(&format!("root@{name}"), BOOT);
    console.send("echo gh$((20+22))st\r");
    console.expect("gh42st", JOIN);
    console.send("\u{1d}");
    assert_eq!(console.end(JOIN), 0);

    // Slow it is, and nobody calls it bad for that.
    assert!(way.carried() > 8 << 20, "{}", way.carried());
    let link = fleet.link();
    let round_trip = link["round_trip_seconds"].as_f64().unwrap();
    assert!(round_trip >= 0.4, "{link}");
    assert_eq!(link["state"], "up");
    assert_eq!(fleet.host()["state"], "online");
    let log = fleet.agent.log();
    assert_eq!(log.matches("the link to Core is up").count(), 1, "{log}");
    let states = states.end();
    assert!(
        states.iter().all(|state| state.starts_with("\"online\"")),
        "{states:?}"
    );
    drop(events);
    ctl.ok(&["vm", "delete", &name, "--force"]);
    fleet.agent.audit();
}

#[test]
fn a_host_that_changes_its_network_is_back_at_once() {
    // Silence is noticed only after minutes here: whatever comes back sooner saw the change itself.
    let core = CoreBuilder::new()
        .set("link.heartbeat_interval", "60s")
        .set("link.ping_interval", "30s");
    let fleet = Fleet::with(AgentBuilder::simulated(), core);
    let links = || fleet.agent.log().matches("the link to Core is up").count();
    let list = || fleet.ctl().run(&["list"]).code;
    assert_eq!((links(), list()), (1, 0));

    // Another network: another address.
    fleet.lab.move_host("192.168.50.77/24");
    wait::until("a link from the new address", RETURN, || {
        (links() == 2).then_some(())
    });
    assert!(fleet.agent.log().contains("lost the address of the link"));
    wait::until("calls go through", JOIN, || (list() == 0).then_some(()));

    // The interface down until tries have become rare, and up again: nobody waits for the next one.
    fleet.lab.plug_host(false);
    fleet.agent.ctl().ok(&["core", "reconnect"]);
    let (at, wait_for) = wait::until_ok("tries become rare", RETURN, || {
        let link = fleet.link();
        match link["retry_in_seconds"].as_f64() {
            Some(seconds) if seconds >= 12.0 => Ok((Instant::now(), seconds)),
            _ => Err(link.to_string()),
        }
    });
    fleet.lab.plug_host(true);
    wait::until("a link over the interface", RETURN, || {
        (links() == 3).then_some(())
    });
    let after = at.elapsed().as_secs_f64();
    assert!(
        after < wait_for,
        "it came after {after:.1} s, and the next try was to come in {wait_for:.1} s"
    );
    wait::until("calls go through", JOIN, || (list() == 0).then_some(()));
    fleet.agent.audit();
}
