//! `kill -9` of the agent at random moments while real QEMU guests are created, started, stopped
//! and deleted. After each the agent is started on the same data, brings what was open to an end,
//! and the auditor finds nothing; guests that nobody asked to change run on in the same QEMU.

use std::collections::BTreeMap;
use std::time::Duration;

use ghost_e2e::agent::{Agent, Builder};
use ghost_e2e::guest::{self, qemu_pid};
use serde_json::Value;

use crate::random::Random;
use crate::support::{id, launch, text, tiny};

const ROUNDS: usize = 50;
/// Longer than any of the changes takes, boots aside.
const WINDOW: Duration = Duration::from_millis(1800);

/// Name, state and QEMU of every VM.
fn look(agent: &Agent) -> BTreeMap<String, (String, Option<u32>)> {
    agent
        .ctl()
        .json(&["list"])
        .as_array()
        .unwrap()
        .iter()
        .map(|vm: &Value| {
            let qemu = qemu_pid(&text(&vm["id"]));
            (text(&vm["name"]), (text(&vm["state"]), qemu))
        })
        .collect()
}

#[test]
fn the_agent_dies_at_random_moments() {
    let _room = guest::room(2);
    let mut random = Random::seeded("random kills on QEMU");
    let mut agent = Builder::new().start();
    agent.import_tiny();
    let bystander = agent.name("bystander");
    launch(&agent, &bystander);
    let bystander_qemu = qemu_pid(&id(&agent, &bystander)).unwrap();
    let names = [agent.name("a"), agent.name("b")];
    let mut asked: BTreeMap<&str, u32> = BTreeMap::new();
    let mut cut_off = 0;

    for round in 0..ROUNDS {
        let before = look(&agent);
        let mut open = Vec::new();
        // One or both of the two are changed when the agent dies.
        let chosen: Vec<&String> = match random.below(3) {
            0 => vec![&names[0]],
            1 => vec![&names[1]],
            _ => names.iter().collect(),
        };
        for name in &chosen {
            let (what, arguments) = match before.get(*name).map(|(state, _)| state.as_str()) {
                None => ("create", tiny(&["launch", "tiny", name], &[])),
                Some("running") => random
                    .pick(&[
                        ("stop", vec!["vm", "stop", name, "--force"]),
                        (
                            "stop",
                            vec!["vm", "stop", name, "--timeout", "2s", "--force"],
                        ),
                        ("delete", vec!["vm", "delete", name, "--force"]),
                        ("delete", vec!["vm", "delete", name, "--force"]),
                    ])
                    .clone(),
                Some(_) => random
                    .pick(&[
                        ("start", vec!["vm", "start", name]),
                        ("delete", vec!["vm", "delete", name]),
                    ])
                    .clone(),
            };
            *asked.entry(what).or_default() += 1;
            let output = agent.ctl().run(&[&arguments[..], &["--detach"]].concat());
            assert_eq!(
                output.code, 0,
                "round {round}, {what} {name}: {}",
                output.stderr
            );
            open.push(output.stdout.trim().to_owned());
        }
        let moment = random.moment(WINDOW);
        std::thread::sleep(moment);
        agent.kill();
        let log = agent.log();
        cut_off += open
            .iter()
            .filter(|operation| !log.contains(&format!("operation {operation} succeeded")))
            .count();
        agent.start();
        agent.wait_idle(Duration::from_secs(90));
        for operation in &open {
            let shown = agent.ctl().json(&["operation", "show", operation]);
            assert_eq!(
                shown["status"], "succeeded",
                "round {round} after {moment:?}: {shown}"
            );
        }
        agent.audit();
        let after = look(&agent);
        for (name, (state, qemu)) in &before {
            if !chosen.contains(&name) {
                assert_eq!(
                    after.get(name),
                    Some(&(state.clone(), *qemu)),
                    "round {round} after {moment:?}: {name} was touched"
                );
            }
        }
        for (name, (state, _)) in &after {
            assert!(
                ["running", "stopped"].contains(&state.as_str()),
                "round {round} after {moment:?}: {name} is {state}"
            );
        }
    }
    println!("{ROUNDS} kills during {asked:?}; {cut_off} operations were cut off and went on");
    assert!(cut_off >= 10, "too few operations were hit: {cut_off}");
    assert!(
        asked.len() == 4,
        "not every kind of change was asked for: {asked:?}"
    );
    assert_eq!(qemu_pid(&id(&agent, &bystander)), Some(bystander_qemu));
    for name in look(&agent).keys() {
        agent.ctl().ok(&["vm", "delete", name, "--force"]);
    }
    agent.audit();
}
