//! A fleet and time: hosts that sleep, clocks that are stepped, a Core that is away for an hour or
//! for weeks, and certificates that are due meanwhile. The wall clocks are libfaketime's, those of
//! single processes: all lives and deadlines are the real ones.

use std::time::Duration;

use ghost_e2e::agent::Agent;
use ghost_e2e::clock::FakeClock;
use ghost_e2e::fleet::{Fleet, HOST, JOIN, RETURN, brisk, operations};
use ghost_e2e::guest::TINY;
use ghost_e2e::netlab::Way;
use ghost_e2e::wait;
use serde_json::Value;

const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);
/// Certificates are looked at every 20 seconds.
const RENEWAL: Duration = Duration::from_secs(60);

/// An agent that stands still; it goes on at the end of the value, however that comes.
struct Asleep(i32);

impl Asleep {
    fn new(agent: &Agent) -> Self {
        let pid = i32::try_from(agent.pid()).unwrap();
        signal(pid, libc::SIGSTOP);
        Self(pid)
    }
}

impl Drop for Asleep {
    fn drop(&mut self) {
        signal(self.0, libc::SIGCONT);
    }
}

fn signal(pid: i32, signal: i32) {
    // SAFETY: kill takes two numbers and touches no memory of ours; the process is the agent of this
    // test, which has not been waited for, so the id is still its own.
    unsafe { libc::kill(pid, signal) };
}

/// Puts a VM on the host that is switched off.
fn vm(fleet: &Fleet, name: &str) -> String {
    let name = fleet.agent.name(name);
    let create = ["vm", "create", &name, "--image", "tiny"];
    fleet.agent.ctl().ok(&[&create[..], &TINY[..]].concat());
    name
}

/// Leaves a command in the queue.
fn queue(fleet: &Fleet, words: &[&str]) -> String {
    let command = fleet.ctl().json(words);
    assert_eq!(command["status"], "queued", "{command}");
    command["id"].as_str().unwrap().to_owned()
}

/// The number of the host's certificate, as the host itself has it.
fn generation(fleet: &Fleet) -> u64 {
    fleet.link()["certificate_generation"].as_u64().unwrap()
}

fn wait_generation(fleet: &Fleet, beyond: u64, within: Duration) {
    wait::until_ok("another certificate", within, || {
        let link = fleet.link();
        match link["certificate_generation"].as_u64() {
            Some(now) if now > beyond => Ok(()),
            _ => Err(link.to_string()),
        }
    });
}

/// How long ago Core heard the host, as it says itself where somebody calls it.
fn age(fleet: &Fleet) -> Duration {
    let error = fleet.ctl().fails(&["list"], 5, "host_offline");
    let cause = error["cause"].as_str().unwrap_or_default();
    let told = cause.split_once("last heard ").map(|(_, rest)| rest);
    let words: Vec<&str> = told.unwrap_or_default().split(' ').collect();
    let [number, unit, "ago"] = words[..] else {
        panic!("no age in {error}");
    };
    let unit = match unit {
        "s" => 1,
        "min" => 60,
        "h" => 3600,
        _ => panic!("{error}"),
    };
    Duration::from_secs(number.parse::<u64>().unwrap() * unit)
}

#[test]
fn a_host_that_slept_is_back_at_once_and_does_what_waited_once() {
    let (mut host, mut core) = (FakeClock::new(), FakeClock::new());
    let fleet = Fleet::with_clocks(&host, &core, brisk());
    fleet.agent.import_tiny();
    let (web, db) = (vm(&fleet, "web"), vm(&fleet, "db"));

    // Ten minutes of sleep: the process stands still, and the world goes on.
    let asleep = Asleep::new(&fleet.agent);
    fleet.wait("offline", RETURN);
    // Longer than three heartbeats.
    wait::until("it is away for long enough", RETURN, || {
        (age(&fleet) > Duration::from_secs(15)).then_some(())
    });
    let once = [
        "vm",
        "start",
        &web,
        "--queue=1h",
        "--request-id",
        "the-start",
    ];
    let start = queue(&fleet, &once);
    assert_eq!(
        queue(&fleet, &once),
        start,
        "the key gives the same command"
    );
    let late = queue(&fleet, &["vm", "start", &db, "--queue=5m"]);
    host.forward(10 * MINUTE);
    core.forward(10 * MINUTE);
    let expired = fleet.wait_command(&late, "expired", JOIN);
    assert!(
        expired.to_string().contains("deadline"),
        "an expired command says why: {expired}"
    );
    assert_eq!(fleet.host()["state"], "offline");
    let seen = age(&fleet);
    assert!((10 * MINUTE..HOUR).contains(&seen), "{seen:?}");
    drop(asleep);
    fleet.wait("online", JOIN);
    fleet.wait_command(&start, "succeeded", JOIN);
    let at = |name: &str| fleet.agent.ctl().json(&["vm", "show", name])["state"].clone();
    assert_eq!(at(&web), "running");
    assert_eq!(at(&db), "stopped", "what expired is not done later");
    assert_eq!(operations(&fleet.agent, "start").len(), 1);
    // Its process noticed by itself that it had stood still, and did not wait for silence.
    assert!(fleet.agent.log().contains("this host was asleep"));

    // A night: the certificate's renewal was due meanwhile, and is made up for.
    let first = generation(&fleet);
    let asleep = Asleep::new(&fleet.agent);
    fleet.wait("offline", RETURN);
    host.forward(17 * HOUR);
    core.forward(17 * HOUR);
    drop(asleep);
    fleet.wait("online", JOIN);
    wait_generation(&fleet, first, RENEWAL);
    assert_eq!(fleet.ctl().run(&["list"]).code, 0);

    // The host's clock back by ten minutes while it slept, as one that was wrong and is set right.
    let asleep = Asleep::new(&fleet.agent);
    fleet.wait("offline", RETURN);
    let stop = queue(&fleet, &["vm", "stop", &web, "--force", "--queue=5m"]);
    host.back(10 * MINUTE);
    drop(asleep);
    fleet.wait("online", JOIN);
    fleet.wait_command(&stop, "succeeded", JOIN);
    assert_eq!(at(&web), "stopped");
    assert_eq!(operations(&fleet.agent, "stop").len(), 1);

    // And Core's: to it the host's certificate has not begun yet. The host gets another one.
    let second = generation(&fleet);
    core.back(10 * MINUTE);
    fleet.agent.ctl().ok(&["core", "reconnect"]);
    wait_generation(&fleet, second, RETURN);
    fleet.wait("online", JOIN);
    fleet.ctl().ok(&["vm", "start", &web]);
    assert_eq!(fleet.ctl().json(&["vm", "show", &web])["state"], "running");
    let host = fleet.host();
    assert_eq!(host["state"], "online", "nobody took it for a copy: {host}");
    fleet.agent.audit();
}

#[test]
fn core_away_for_an_hour_finds_all_as_it_was_and_gives_its_queue_once() {
    let (mut host, mut core) = (FakeClock::new(), FakeClock::new());
    // Time enough for a command on a link that is half dead.
    let pings = brisk().set("link.ping_interval", "3s");
    let mut fleet = Fleet::with_clocks(&host, &core, pings);
    fleet.agent.import_tiny();
    let (web, db) = (vm(&fleet, "web"), vm(&fleet, "db"));
    let first = generation(&fleet);

    // One command is taken and done, and Core never hears of it: what the host says does not arrive.
    fleet.lab.set(Way::Unheard);
    let unheard = queue(&fleet, &["vm", "start", &db, "--queue=2h"]);
    wait::until("it is done on the host", JOIN, || {
        let vm = fleet.agent.ctl().json(&["vm", "show", &db]);
        (vm["state"] == "running").then_some(())
    });
    // Two more lie in the queue, acknowledged, when Core dies; the host never saw them.
    let asleep = Asleep::new(&fleet.agent);
    fleet.wait("offline", RETURN);
    assert_eq!(fleet.command(&unheard)["status"], "queued");
    let start = queue(&fleet, &["vm", "start", &web, "--queue=2h"]);
    let late = queue(&fleet, &["vm", "restart", &web, "--queue=30m"]);
    fleet.core.kill();
    fleet.lab.set(Way::Open);
    drop(asleep);

    // An hour without it: all that is local goes on.
    wait::until_ok("the host sees that Core is away", RETURN, || {
        let link = fleet.link();
        let away = link["state"] == "waiting" && link["reason"].is_string();
        away.then_some(()).ok_or_else(|| link.to_string())
    });
    host.forward(HOUR);
    core.forward(HOUR);
    let local = vm(&fleet, "local");
    fleet.agent.ctl().ok(&["vm", "start", &local]);
    fleet.agent.ctl().ok(&["vm", "stop", &local, "--force"]);
    fleet.agent.ctl().ok(&["vm", "delete", &local]);
    assert_eq!(operations(&fleet.agent, "start").len(), 2);

    // Back, it knows at once how old that is what it knows.
    let asleep = Asleep::new(&fleet.agent);
    fleet.core.start();
    assert_eq!(fleet.host()["state"], "offline");
    let seen = age(&fleet);
    assert!((HOUR..2 * HOUR).contains(&seen), "{seen:?}");
    drop(asleep);
    fleet.wait("online", RETURN);
    // The one is told of, though it was done an hour ago; the other is done; both only once.
    fleet.wait_command(&unheard, "succeeded", JOIN);
    fleet.wait_command(&start, "succeeded", JOIN);
    let expired = fleet.wait_command(&late, "expired", JOIN);
    assert!(expired.to_string().contains("deadline"), "{expired}");
    assert_eq!(operations(&fleet.agent, "start").len(), 3);
    assert_eq!(operations(&fleet.agent, "restart").len(), 0);
    assert_eq!(generation(&fleet), first, "a day's certificate outlives it");

    // Away over the time of renewal: it fails, is told, and is made up for.
    fleet.core.kill();
    host.forward(17 * HOUR);
    core.forward(17 * HOUR);
    wait::until("the renewal fails", RENEWAL, || {
        let log = fleet.agent.log();
        log.contains("certificate could not be renewed")
            .then_some(())
    });
    fleet.core.start();
    fleet.wait("online", RETURN);
    assert_eq!(generation(&fleet), first, "by the one that it had");
    // The next try comes by the wall clock.
    host.forward(10 * MINUTE);
    core.forward(10 * MINUTE);
    wait_generation(&fleet, first, RENEWAL);
    fleet.wait("online", JOIN);
    fleet.agent.audit();
}

#[test]
fn a_certificate_that_ended_with_core_away_is_recovered_and_after_a_month_it_says_what_to_do() {
    let (mut host, mut core) = (FakeClock::new(), FakeClock::new());
    let mut fleet = Fleet::with_clocks(&host, &core, brisk());
    let first = generation(&fleet);
    fleet.core.kill();
    host.forward(3 * DAY);
    core.forward(3 * DAY);
    assert_eq!(fleet.agent.ctl().run(&["list"]).code, 0);
    fleet.core.start();
    // Nobody does anything: the old key gets a new certificate.
    fleet.wait("online", RETURN);
    assert!(generation(&fleet) > first);
    assert_eq!(fleet.ctl().run(&["list"]).code, 0);

    // For longer than a month: somebody has to.
    fleet.core.kill();
    host.forward(40 * DAY);
    core.forward(40 * DAY);
    fleet.core.start();
    let link: Value = wait::until_ok("the host is refused", RETURN, || {
        let link = fleet.link();
        if link["state"] == "refused" {
            Ok(link)
        } else {
            Err(link.to_string())
        }
    });
    let reason = link["reason"].as_str().unwrap();
    assert!(reason.contains("away for too long"), "{link}");
    assert!(
        reason.contains("enroll --replace"),
        "it says what to do: {link}"
    );
    assert_eq!(fleet.agent.ctl().run(&["list"]).code, 0);
    let token = fleet.core.host_token("acme");
    let done = fleet.agent.enroll_again(&token, "pc-again");
    assert_eq!(done.code, 0, "{}{}", done.stdout, done.stderr);
    fleet.core.wait_host("pc-again", "online", JOIN);
    assert_ne!(fleet.core.host(HOST)["state"], "online");
    fleet.agent.audit();
}
