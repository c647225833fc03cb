//! What the modules share.

use std::process::Command;
use std::time::Duration;

use ghost_e2e::agent::Agent;
use ghost_e2e::guest::{BOOT, TINY};
use ghost_e2e::wait;
use serde_json::Value;

/// A VM as the agent tells it.
#[track_caller]
pub(crate) fn show(agent: &Agent, name: &str) -> Value {
    agent.ctl().json(&["vm", "show", name])
}

/// Its state; empty where it is not there.
pub(crate) fn state(agent: &Agent, name: &str) -> String {
    let output = agent.ctl().run(&["vm", "show", name, "-o", "json"]);
    serde_json::from_str::<Value>(&output.stdout)
        .ok()
        .and_then(|vm| vm["state"].as_str().map(str::to_owned))
        .unwrap_or_default()
}

/// Its id.
#[track_caller]
pub(crate) fn id(agent: &Agent, name: &str) -> String {
    text(&show(agent, name)["id"])
}

/// A string of a document.
#[track_caller]
pub(crate) fn text(value: &Value) -> String {
    value
        .as_str()
        .unwrap_or_else(|| panic!("{value} is no text"))
        .to_owned()
}

/// The flags of a command on a tiny VM.
pub(crate) fn tiny<'a>(head: &[&'a str], tail: &[&'a str]) -> Vec<&'a str> {
    [head, &TINY, tail].concat()
}

/// Launches a tiny VM, and waits for nothing but that.
#[track_caller]
pub(crate) fn launch(agent: &Agent, name: &str) {
    agent.ctl().ok(&tiny(&["launch", "tiny", name], &[]));
}

/// Waits for a state.
#[track_caller]
pub(crate) fn wait_state(agent: &Agent, name: &str, wanted: &str, within: Duration) -> Value {
    wait::until_ok(&format!("{name} is {wanted}"), within, || {
        let vm = show(agent, name);
        if vm["state"] == wanted {
            Ok(vm)
        } else {
            Err(vm.to_string())
        }
    })
}

/// Waits until the guest has written a line.
#[track_caller]
pub(crate) fn wait_console(agent: &Agent, name: &str, wanted: &str, within: Duration) {
    wait::until_ok(
        &format!("{wanted:?} on the console of {name}"),
        within,
        || {
            let log = agent.ctl().run(&["vm", "logs", name]).stdout;
            if log.contains(wanted) {
                Ok(())
            } else {
                Err(log.lines().rev().take(5).collect::<Vec<_>>().join(" | "))
            }
        },
    );
}

/// Waits until a tiny guest is up, the power button included.
#[track_caller]
pub(crate) fn wait_ready(agent: &Agent, name: &str) {
    wait_console(agent, name, "ghost-tiny: ready", BOOT);
}

/// What happened so far, oldest first.
#[track_caller]
pub(crate) fn events(agent: &Agent, arguments: &[&str]) -> Vec<Value> {
    let output = agent
        .ctl()
        .ok(&[&["events", "-o", "json"], arguments].concat());
    serde_json::Deserializer::from_str(&output)
        .into_iter::<Value>()
        .map(|event| event.expect("an event is a JSON document"))
        .collect()
}

/// Waits for an event of a kind that `wanted` says yes to.
#[track_caller]
pub(crate) fn wait_event(
    agent: &Agent,
    kind: &str,
    within: Duration,
    wanted: impl Fn(&Value) -> bool,
) -> Value {
    wait::until_ok(&format!("an event {kind}"), within, || {
        let events = events(agent, &[]);
        events
            .iter()
            .rev()
            .find(|event| event["kind"] == kind && wanted(event))
            .cloned()
            .ok_or_else(|| {
                let seen: Vec<String> = events
                    .iter()
                    .rev()
                    .take(8)
                    .map(ToString::to_string)
                    .collect();
                seen.join("\n")
            })
    })
}

/// Runs a command of the host that must succeed.
#[track_caller]
pub(crate) fn sh(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}
