//! `kill -9` of a real agent before and after every journal step of create, start, stop, restart
//! and delete, on the simulated hypervisor: the next start brings everything to an end that leaves
//! nothing behind and nothing half-true.

use std::time::Duration;

use ghost_e2e::agent::{Agent, Builder};

use crate::support::{state, tiny};

/// One change, the steps that it has, and what must be true once it was resumed.
struct Change {
    operation: &'static str,
    steps: &'static [&'static str],
    /// The VM is there and runs, before.
    before: Before,
    arguments: &'static [&'static str],
    /// The state in the end; empty: it is gone.
    after: &'static str,
}

#[derive(Clone, Copy, PartialEq)]
enum Before {
    Nothing,
    Stopped,
    Running,
}

const CHANGES: [Change; 6] = [
    Change {
        operation: "create_vm",
        steps: &[
            "fetch_image",
            "create_folder",
            "create_disk",
            "write_seed",
            "ensure_networks",
            "define_domain",
            "start_domain",
        ],
        before: Before::Nothing,
        arguments: &["launch", "tiny"],
        after: "running",
    },
    Change {
        operation: "start_vm",
        steps: &["ensure_networks", "restore_domain", "start_domain"],
        before: Before::Stopped,
        arguments: &["vm", "start"],
        after: "running",
    },
    Change {
        operation: "stop_vm",
        steps: &["shut_down"],
        before: Before::Running,
        arguments: &["vm", "stop"],
        after: "stopped",
    },
    Change {
        operation: "stop_vm",
        steps: &["cut_power"],
        before: Before::Running,
        arguments: &["vm", "stop", "--force"],
        after: "stopped",
    },
    Change {
        operation: "restart_vm",
        steps: &["shut_down", "ensure_networks", "start_domain"],
        before: Before::Running,
        arguments: &["vm", "restart"],
        after: "running",
    },
    Change {
        operation: "delete_vm",
        steps: &["cut_power", "undefine_domain", "remove_folder"],
        before: Before::Running,
        arguments: &["vm", "delete", "--force"],
        after: "",
    },
];

fn sites(change: &Change) -> Vec<String> {
    let mut sites: Vec<String> = change
        .steps
        .iter()
        .flat_map(|step| {
            ["before_perform", "after_perform"]
                .map(|moment| format!("{}/{step}/{moment}", change.operation))
        })
        .collect();
    sites.push(format!("{}/finish/before_finish", change.operation));
    sites
}

/// The agent dies at `site` while it carries `change` out; then it is started again.
fn die_and_recover(agent: &mut Agent, change: &Change, site: &str, name: &str) {
    agent.set_env("GHOST_FAILPOINT", Some(&format!("{site}=abort")));
    agent.start();
    let ctl = agent.ctl();
    if change.before != Before::Nothing {
        // The failpoint stands in another operation than these.
        ctl.ok(&tiny(&["vm", "create", name, "--image", "tiny"], &[]));
        if change.before == Before::Running {
            ctl.ok(&["vm", "start", name]);
        }
    }
    let arguments = if change.before == Before::Nothing {
        tiny(change.arguments, &[name])
    } else {
        [change.arguments, &[name]].concat()
    };
    let output = ctl.run(&[&arguments[..], &["--detach"]].concat());
    let ended = agent
        .wait_end(Duration::from_secs(30))
        .unwrap_or_else(|| panic!("{site} was not reached: {}{}", output.stdout, output.stderr));
    assert!(!ended.success(), "{site}: it was to die, not to end");

    agent.set_env("GHOST_FAILPOINT", None);
    agent.start();
    agent.wait_idle(Duration::from_secs(60));
    assert_eq!(state(agent, name), change.after, "{site}");
    let done = agent.ctl().json(&["operation", "list", "--all"]);
    let operation = done
        .as_array()
        .unwrap()
        .iter()
        .find(|known| known["kind"] == change.operation && known["subject"] == name)
        .unwrap_or_else(|| panic!("{site}: the operation is forgotten: {done}"));
    assert_eq!(operation["status"], "succeeded", "{site}: {operation}");
    agent.audit();
    if !change.after.is_empty() {
        agent.ctl().ok(&["vm", "delete", name, "--force"]);
    }
    agent.kill();
}

fn every_site(engine: &str, changes: &[Change]) {
    let mut agent = Builder::simulated().set("store.engine", engine).start();
    agent.import_tiny();
    let bystander = agent.name("bystander");
    agent.ctl().ok(&tiny(&["launch", "tiny", &bystander], &[]));
    agent.kill();
    let mut count = 0;
    for change in changes {
        for site in sites(change) {
            let name = agent.name(&format!("s{count}"));
            die_and_recover(&mut agent, change, &site, &name);
            count += 1;
        }
    }
    agent.start();
    assert_eq!(state(&agent, &bystander), "running");
    agent.ctl().ok(&["vm", "delete", &bystander, "--force"]);
    agent.audit();
    println!("{engine}: died at {count} sites");
}

#[test]
fn create_dies_at_every_step() {
    every_site("sled", &CHANGES[..1]);
}

#[test]
fn start_stop_and_restart_die_at_every_step() {
    every_site("sled", &CHANGES[1..5]);
}

#[test]
fn delete_dies_at_every_step() {
    every_site("sled", &CHANGES[5..]);
}

#[test]
fn create_and_delete_die_at_every_step_on_redb() {
    every_site("redb", &CHANGES[..1]);
    every_site("redb", &CHANGES[5..]);
}
