//! A VM's life, on a real guest.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

use ghost_e2e::agent::{Agent, Builder};
use ghost_e2e::guest::{self, BOOT, libvirt_state, qemu_pid};
use serde_json::Value;

use crate::support::{
    events, id, launch, show, state, text, tiny, wait_console, wait_ready, wait_state,
};
use crate::terminal::Terminal;

/// The keys that section 4 of the design promises.
const KEYS: [&str; 17] = [
    "id",
    "name",
    "state",
    "state_reason",
    "state_source",
    "state_age_seconds",
    "desired_state",
    "vcpus",
    "memory_bytes",
    "image",
    "disks",
    "nics",
    "conditions",
    "tags",
    "generation",
    "created_at",
    "operation_id",
];

fn holds_the_contract(vm: &Value) {
    for key in KEYS {
        assert!(vm.get(key).is_some(), "{key} is missing in {vm}");
    }
    assert!(vm["disks"][0]["size_bytes"].is_u64(), "{vm}");
    assert!(vm["disks"][0]["allocated_bytes"].is_u64(), "{vm}");
    assert!(vm["nics"][0]["mac"].is_string(), "{vm}");
    assert!(vm["nics"][0]["addresses"].is_array(), "{vm}");
    assert!(text(&vm["created_at"]).ends_with('Z'), "{vm}");
}

#[test]
fn a_tiny_guest_lives_its_whole_life() {
    let _room = guest::room(1);
    let agent = Builder::new().start();
    let ctl = agent.ctl();
    agent.import_tiny();
    let images = ctl.json(&["image", "list"]);
    assert_eq!(images[0]["name"], "tiny");

    let web = agent.name("web");
    let created = ctl.json(&tiny(&["launch", "tiny", &web], &["--tag", "tier=front"]));
    assert_eq!(created["kind"], "create_vm");
    assert_eq!(created["status"], "succeeded");
    let address = ctl.ok(&["vm", "wait", &web, "--for", "address", "--timeout", "120s"]);
    let address = address.trim();

    // What is told of it, and that it is the same everywhere.
    let vm = show(&agent, &web);
    holds_the_contract(&vm);
    assert_eq!(vm["state"], "running");
    assert_eq!(vm["desired_state"], "running");
    assert_eq!(
        (&vm["vcpus"], &vm["memory_bytes"]),
        (&Value::from(1), &Value::from(128u64 << 20))
    );
    assert_eq!(vm["tags"]["tier"], "front");
    assert_eq!(vm["nics"][0]["addresses"][0], address);
    assert!(
        vm["nics"][0]["addresses_age_seconds"].is_number()
            || vm["nics"][0].get("addresses_age_seconds").is_some(),
        "{vm}"
    );
    let list = ctl.json(&["list"]);
    assert_eq!(list[0]["id"], vm["id"]);
    assert_eq!(
        list.as_array().unwrap().len(),
        1,
        "other agents' VMs are not ours"
    );
    assert_eq!(
        ctl.json(&["list", "--tag", "tier=back"]),
        serde_json::json!([])
    );
    let prefix = &text(&vm["id"])[..8];
    assert_eq!(
        show(&agent, prefix)["name"],
        web.as_str(),
        "a unique prefix names it"
    );
    let network = ctl.json(&["network", "show", "default"]);
    assert_eq!(network["leases"][0]["address"], address);

    // Its console: the log, and a person at it.
    wait_ready(&agent, &web);
    let log = ctl.ok(&["vm", "logs", &web]);
    assert!(
        log.contains(&format!("ghost-tiny: hostname {web}")),
        "{log}"
    );
    assert!(
        log.contains(&format!("ghost-tiny: address {address}")),
        "{log}"
    );
    let tail = ctl.ok(&["vm", "logs", &web, "--tail", "64"]);
    assert!(tail.len() <= 256 && !tail.is_empty(), "{tail}");
    let mut console = Terminal::run(&ctl.command(&["vm", "console", &web]));
    console.expect("attached to the console", Duration::from_secs(20));
    console.send("\r");
    console.expect(&format!("root@{web}"), Duration::from_secs(30));
    console.send("echo gh$((20+22))st\r");
    console.expect("gh42st", Duration::from_secs(30));
    console.send("\u{1d}");
    assert_eq!(console.end(Duration::from_secs(10)), 0);
    assert_eq!(state(&agent, &web), "running", "detaching stops nothing");
    // What was typed stands in the log as well, and the next one can attach.
    wait_console(&agent, &web, "gh42st", Duration::from_secs(10));
    let console = Terminal::run(&ctl.command(&["vm", "console", &web]));
    console.expect("attached to the console", Duration::from_secs(20));
    drop(console);

    // Pause and resume.
    ctl.ok(&["vm", "pause", &web]);
    assert_eq!(state(&agent, &web), "paused");
    assert_eq!(libvirt_state(&web).as_deref(), Some("paused"));
    ctl.ok(&["vm", "resume", &web]);
    assert_eq!(libvirt_state(&web).as_deref(), Some("running"));

    // Restart: another QEMU, the same VM.
    let vm_id = id(&agent, &web);
    let before = qemu_pid(&vm_id).unwrap();
    ctl.ok(&["vm", "restart", &web]);
    assert_ne!(qemu_pid(&vm_id), Some(before));
    ctl.ok(&["vm", "wait", &web, "--for", "running"]);
    let log = ctl.ok(&["vm", "logs", &web]);
    assert!(
        log.contains("ghost-tiny: power button"),
        "the guest was asked: {log}"
    );

    // Stop by ACPI, once it is up again.
    ghost_e2e::wait::until("the second boot", BOOT, || {
        let log = ctl.ok(&["vm", "logs", &web]);
        (log.matches("ghost-tiny: ready").count() >= 2).then_some(())
    });
    ctl.ok(&["vm", "stop", &web, "--timeout", "60s"]);
    let vm = wait_state(&agent, &web, "stopped", Duration::from_secs(10));
    assert_eq!(vm["desired_state"], "stopped");
    assert_eq!(libvirt_state(&web).as_deref(), Some("shut off"));
    ctl.fails(&["vm", "console", &web], 4, "vm_not_running");

    // Start again, cut the power, delete.
    ctl.ok(&["vm", "start", &web]);
    assert_eq!(state(&agent, &web), "running");
    ctl.ok(&["vm", "stop", &web, "--force"]);
    ctl.ok(&["vm", "delete", &web]);
    ctl.fails(&["vm", "show", &web], 3, "vm_not_found");
    assert_eq!(libvirt_state(&web), None);

    let told = events(&agent, &[]);
    let kinds: Vec<&str> = told
        .iter()
        .filter_map(|event| event["kind"].as_str())
        .collect();
    for kind in [
        "image_added",
        "vm_added",
        "vm_state",
        "operation",
        "vm_removed",
    ] {
        assert!(kinds.contains(&kind), "no {kind} among {kinds:?}");
    }
    assert!(
        !kinds.contains(&"vm_drift"),
        "our own doing is no drift: {told:#?}"
    );
    ctl.ok(&["image", "delete", "tiny"]);
    agent.audit();
}

#[test]
fn several_names_side_by_side_and_delete_protection() {
    let agent = Builder::new().start();
    let ctl = agent.ctl();
    agent.import_tiny();
    let (one, two, three) = (agent.name("one"), agent.name("two"), agent.name("three"));
    for name in [&one, &two] {
        ctl.ok(&tiny(&["vm", "create", name, "--image", "tiny"], &[]));
    }
    ctl.ok(&tiny(
        &["vm", "create", &three, "--image", "tiny"],
        &["--protect"],
    ));
    assert_eq!(show(&agent, &one)["state"], "stopped");

    // Each name has its own outcome, the worst of which is the exit code.
    let absent = agent.name("absent");
    let output = ctl.run(&["vm", "delete", &one, &absent, &two]);
    assert_eq!(output.code, 3, "{}{}", output.stdout, output.stderr);
    assert!(output.stderr.contains(&absent), "{}", output.stderr);
    for name in [&one, &two] {
        ctl.fails(&["vm", "show", name], 3, "vm_not_found");
    }

    ctl.fails(&["vm", "delete", &three], 4, "delete_protected");
    ctl.fails(&["vm", "delete", &three, "--force"], 4, "delete_protected");
    ctl.ok(&["vm", "update", &three, "--unprotect"]);
    ctl.ok(&["vm", "delete", &three]);

    // A made-up name, and the same key twice.
    let first = ctl.json(&tiny(
        &[
            "vm",
            "create",
            &one,
            "--image",
            "tiny",
            "--request-id",
            "k-1",
        ],
        &[],
    ));
    let again = ctl.json(&tiny(
        &[
            "vm",
            "create",
            &one,
            "--image",
            "tiny",
            "--request-id",
            "k-1",
        ],
        &[],
    ));
    assert_eq!(first["id"], again["id"], "one key, one operation");
    ctl.fails(
        &tiny(
            &[
                "vm",
                "create",
                &two,
                "--image",
                "tiny",
                "--request-id",
                "k-1",
            ],
            &[],
        ),
        4,
        "request_id_reused",
    );
    assert_eq!(ctl.json(&["list"]).as_array().unwrap().len(), 1);
    ctl.ok(&["vm", "delete", &one]);
    agent.audit();
}

#[test]
fn an_unanswered_power_button_is_not_a_power_cut() {
    let _room = guest::room(1);
    let agent = Builder::new().start();
    let ctl = agent.ctl();
    agent.import_tiny();
    let deaf = agent.name("deaf");
    launch(&agent, &deaf);
    // The guest is halted, so nobody answers.
    let vm = id(&agent, &deaf);
    ghost_e2e::libvirt::virsh(ghost_e2e::libvirt::SYSTEM, &["suspend", &vm]).unwrap();
    wait_state(&agent, &deaf, "paused", Duration::from_secs(5));
    ghost_e2e::libvirt::virsh(ghost_e2e::libvirt::SYSTEM, &["resume", &vm]).unwrap();
    wait_state(&agent, &deaf, "running", Duration::from_secs(5));
    // Right after the start the firmware is not listening yet: without --force it goes on.
    ctl.ok(&["vm", "restart", &deaf, "--force"]);
    let before = qemu_pid(&vm);
    ctl.fails(
        &["vm", "stop", &deaf, "--timeout", "1s"],
        7,
        "deadline_exceeded",
    );
    assert_eq!(qemu_pid(&vm), before, "the power was not cut");
    assert_eq!(state(&agent, &deaf), "running");
    ctl.ok(&["vm", "stop", &deaf, "--timeout", "1s", "--force"]);
    assert_eq!(qemu_pid(&vm), None);
    ctl.ok(&["vm", "delete", &deaf]);
    agent.audit();
}

/// Owner, group and mode of every image in the cache.
fn owners(agent: &Agent) -> Vec<(PathBuf, u32, u32, u32)> {
    let mut found: Vec<_> = fs::read_dir(agent.data_dir().join("images"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|kind| kind == "qcow2"))
        .map(|path| {
            let metadata = fs::metadata(&path).unwrap();
            (path, metadata.uid(), metadata.gid(), metadata.mode())
        })
        .collect();
    found.sort();
    found
}

/// A base image is shared: were it given to QEMU's user, as libvirt's DAC driver does with what it
/// takes for a VM's own, a guest that breaks out could write into every other VM's disk.
#[test]
fn a_base_image_stays_ours_while_guests_run_on_it() {
    let _room = guest::room(1);
    let agent = Builder::new().start();
    agent.import_tiny();
    let before = owners(&agent);
    assert_eq!(before.len(), 1);
    assert_eq!(before[0].3 & 0o777, 0o644, "read by all, written by us");
    let web = agent.name("web");
    launch(&agent, &web);
    let vm = id(&agent, &web);
    let qemu = qemu_pid(&vm).unwrap();
    let runs_as = fs::metadata(format!("/proc/{qemu}")).unwrap().uid();
    assert_eq!(owners(&agent), before, "while QEMU runs as user {runs_as}");
    // Its own disk is QEMU's, and it does boot from the image that is not.
    let disk = fs::metadata(agent.data_dir().join("vms").join(&vm).join("disk.qcow2")).unwrap();
    assert_eq!(disk.uid(), runs_as, "the VM's own disk");
    wait_ready(&agent, &web);
    agent.ctl().ok(&["vm", "restart", &web, "--force"]);
    assert_eq!(owners(&agent), before, "after a restart");
    agent.ctl().ok(&["vm", "stop", &web, "--force"]);
    assert_eq!(owners(&agent), before, "once it is off");
    agent.ctl().ok(&["vm", "delete", &web]);
    assert_eq!(owners(&agent), before, "once it is gone");
    agent.audit();
}
