//! A guest that means harm, on real QEMU, beside two that do not.

use std::time::Duration;

use ghost_e2e::guest;
use ghost_e2e::siege::{self, Latencies, Outcome, Plan};
use ghost_hostile::Behaviour;

/// For how many seconds the siege lasts; at most ten minutes.
const SECONDS: &str = "GHOST_E2E_SIEGE_SECONDS";
/// Host memory that one hostile guest may cost.
const MEMORY: u64 = 16 << 20;
/// Below so many calls a single behaviour's p99 is chance.
const ENOUGH: usize = 1000;

/// What keeps within the rules, or needs more than half a minute to break them, or is too slow for it
/// in an emulated guest.
const NOT_HELD_OFF: [Behaviour; 6] = [
    Behaviour::Telemetry,
    Behaviour::OneByte,
    Behaviour::Drip,
    Behaviour::NeverAnswer,
    Behaviour::NeverRead,
    Behaviour::Lies,
];
/// In a shorter time a guest may not even have got hold of the channel again.
const SURE: Duration = Duration::from_secs(10);

#[test]
fn a_hostile_guest_harms_neither_the_host_nor_the_others() {
    let time = Duration::from_secs(match std::env::var(SECONDS) {
        Ok(seconds) => seconds.parse().expect(SECONDS),
        Err(_) => 60,
    });
    assert!(time <= Duration::from_secs(600), "{SECONDS}: at most 600");
    let _room = guest::room(3);
    let agent = siege::builder().start();
    agent.import_tiny();
    let plan = Plan::within(time);
    let outcome = siege::lay(&agent, plan).unwrap_or_else(|why| panic!("{why}"));
    tell(&outcome);

    // The others: every call of theirs succeeds, and takes no more than twice as long as beside a
    // guest that burns its processor and leaves the channel alone.
    assert!(outcome.failed.is_empty(), "{:?}", outcome.failed);
    assert!(
        outcome.burning.count() > 200 && outcome.attacked.count() > 200,
        "too few calls to say anything"
    );
    let within = |peers: &Latencies| peers.percentile(99) <= 2 * outcome.before();
    assert!(within(&outcome.attacked), "{:.2}", outcome.ratio());
    for assault in &outcome.assaults {
        assert!(
            assault.peers.count() < ENOUGH || within(&assault.peers),
            "{}: {}",
            assault.behaviour.as_str(),
            assault.peers
        );
    }

    // The host.
    assert!(
        outcome.growth() <= MEMORY,
        "the agent grew by {} KiB",
        outcome.growth() >> 10
    );

    // Whoever breaks the rules is held off, again and again, and that is said where one looks.
    let held_off: Vec<&str> = outcome
        .assaults
        .iter()
        .filter(|assault| assault.held_off > 0)
        .map(|assault| assault.behaviour.as_str())
        .collect();
    assert!(held_off.len() >= 5, "only {held_off:?}");
    for assault in &outcome.assaults {
        assert!(
            assault.held_off > 0 || plan.attack < SURE || NOT_HELD_OFF.contains(&assault.behaviour),
            "{} was let go on",
            assault.behaviour.as_str()
        );
    }
    let said = |command: &str, what: &str| {
        let views = || {
            outcome
                .shown
                .iter()
                .filter(|(view, _)| view.starts_with(command))
        };
        assert!(
            views().any(|(_, text)| text.contains(what)),
            "{command} never said {what:?}, but: {:#?}",
            views().collect::<Vec<_>>()
        );
    };
    said("guest status", "held off");
    said("guest status", "broke the rules of the protocol");
    said("events", "guest_misbehaved");
    said("events", "frame");

    // Nothing of it drives the terminal of a person who looks.
    for (view, text) in &outcome.shown {
        let bad = text
            .chars()
            .find(|c| (c.is_control() && *c != '\n') || *c == '\u{202e}');
        assert_eq!(bad, None, "{view}: {text:?}");
    }
    agent.audit();
}

fn tell(outcome: &Outcome) {
    println!("quiet: {}", outcome.quiet);
    println!("burning: {}", outcome.burning);
    println!("attacked: {}", outcome.attacked);
    for assault in &outcome.assaults {
        println!(
            "{:>13}: {}; held off {} times, agent {} KiB",
            assault.behaviour.as_str(),
            assault.peers,
            assault.held_off,
            assault.memory >> 10
        );
    }
    println!(
        "p99 x {:.2}; the agent grew by {} KiB from {} KiB; {} views; back after {:.1} s",
        outcome.ratio(),
        outcome.growth() >> 10,
        outcome.memory_before >> 10,
        outcome.shown.len(),
        outcome.recovery.as_secs_f64()
    );
}
