//! The shown state is the true one: what others do to our VMs is seen and told, and where libvirt
//! does not answer nobody claims to know.

use std::path::Path;
use std::time::{Duration, Instant};

use ghost_e2e::agent::Builder;
use ghost_e2e::guest::{self, kill_qemu, qemu_pid};
use ghost_e2e::libvirt::{SYSTEM, virsh};
use ghost_e2e::proxy::{LIBVIRTD, Proxy};
use ghost_e2e::wait;
use serde_json::Value;

use crate::support::{id, launch, show, text, tiny, wait_event, wait_ready, wait_state};
use crate::terminal::Terminal;

/// What the issue allows for seeing somebody else's deed.
const SEEN: Duration = Duration::from_secs(5);

#[track_caller]
fn drift(agent: &ghost_e2e::agent::Agent, name: &str, word: &str) {
    let event = wait_event(agent, "vm_drift", SEEN, |event| {
        event["subject"] == name && text(&event["message"]).contains(word)
    });
    assert_eq!(event["severity"], "warning", "{event}");
}

#[test]
fn what_is_done_behind_our_back_is_seen_and_told() {
    let _room = guest::room(1);
    let agent = Builder::new().start();
    let ctl = agent.ctl();
    agent.import_tiny();
    let web = agent.name("web");
    launch(&agent, &web);
    let vm = id(&agent, &web);

    // The power is cut.
    virsh(SYSTEM, &["destroy", &web]).unwrap();
    wait_state(&agent, &web, "stopped", SEEN);
    drift(&agent, &web, "power");
    assert_eq!(qemu_pid(&vm), None, "what somebody wanted off stays off");

    // Another hand starts it, halts it, lets it go on.
    virsh(SYSTEM, &["start", &web]).unwrap();
    wait_state(&agent, &web, "running", SEEN);
    virsh(SYSTEM, &["suspend", &web]).unwrap();
    wait_state(&agent, &web, "paused", SEEN);
    virsh(SYSTEM, &["resume", &web]).unwrap();
    wait_state(&agent, &web, "running", SEEN);
    ctl.ok(&["vm", "stop", &web, "--force"]);

    // The definition is edited.
    let xml = virsh(SYSTEM, &["dumpxml", "--inactive", &web]).unwrap();
    let edited = xml.replace(
        "<vcpu placement='static'>1</vcpu>",
        "<vcpu placement='static'>3</vcpu>",
    );
    assert_ne!(xml, edited);
    let file = agent.folder().join("edited.xml");
    std::fs::write(&file, edited).unwrap();
    virsh(SYSTEM, &["define", file.to_str().unwrap()]).unwrap();
    drift(&agent, &web, "vcpus");
    let shown = show(&agent, &web);
    let condition = shown["conditions"]
        .as_array()
        .unwrap()
        .iter()
        .find(|condition| condition["type"] == "drift")
        .unwrap_or_else(|| panic!("no condition: {shown}"));
    assert_eq!(condition["status"], true, "{condition}");
    std::fs::write(&file, xml).unwrap();
    virsh(SYSTEM, &["define", file.to_str().unwrap()]).unwrap();
    wait::until("the drift is over", SEEN, || {
        let shown = show(&agent, &web);
        let conditions = shown["conditions"].as_array()?;
        conditions
            .iter()
            .all(|condition| condition["type"] != "drift" || condition["status"] == false)
            .then_some(())
    });

    // The definition is taken away: a record without a domain, which a start makes whole again.
    virsh(SYSTEM, &["undefine", &web]).unwrap();
    drift(&agent, &web, "undefined");
    wait_state(&agent, &web, "failed", SEEN);
    ctl.ok(&["vm", "start", &web]);
    wait_state(&agent, &web, "running", SEEN);
    assert_eq!(id(&agent, &web), vm);

    // Foreign domains beside ours are neither shown nor touched.
    let foreign = agent.name("foreign");
    let disk = agent.folder().join("foreign.xml");
    std::fs::write(
        &disk,
        format!(
            "<domain type='qemu'><name>{foreign}</name><memory unit='MiB'>32</memory><vcpu>1</vcpu>\
             <os><type arch='x86_64' machine='q35'>hvm</type></os></domain>"
        ),
    )
    .unwrap();
    virsh(SYSTEM, &["define", disk.to_str().unwrap()]).unwrap();
    ctl.fails(&["vm", "show", &foreign], 3, "vm_not_found");
    ctl.fails(
        &tiny(&["vm", "create", &foreign, "--image", "tiny"], &[]),
        4,
        "name_taken",
    );
    virsh(SYSTEM, &["undefine", &foreign]).unwrap();

    ctl.ok(&["vm", "delete", &web, "--force"]);
    agent.audit();
}

#[test]
fn a_crash_is_restarted_by_the_policy_and_not_for_ever() {
    let _room = guest::room(1);
    let agent = Builder::new().start();
    let ctl = agent.ctl();
    agent.import_tiny();
    let web = agent.name("web");
    ctl.ok(&tiny(
        &["launch", "tiny", &web],
        &["--max-restarts", "2", "--restart-window", "1h"],
    ));
    let vm = id(&agent, &web);
    for round in 1..=2 {
        let before = qemu_pid(&vm).expect("it runs");
        assert!(kill_qemu(&vm));
        wait::until("it is started again", Duration::from_secs(30), || {
            qemu_pid(&vm).filter(|pid| *pid != before)
        });
        wait_event(&agent, "vm_crashed", SEEN, |event| {
            text(&event["message"]).contains(&format!("restart {round} "))
        });
        wait_state(&agent, &web, "running", Duration::from_secs(10));
        agent.wait_idle(Duration::from_secs(30));
    }
    // The third within the window is one too many.
    assert!(kill_qemu(&vm));
    wait_state(&agent, &web, "failed", SEEN);
    wait_event(&agent, "vm_crashed", SEEN, |event| {
        text(&event["message"]).contains("left off")
    });
    assert_eq!(qemu_pid(&vm), None);
    assert_eq!(
        agent.ctl().json(&["operation", "list"]),
        Value::Array(Vec::new())
    );

    // A person may start it all the same. Then the guest itself panics, as a kernel does.
    ctl.ok(&["vm", "update", &web, "--max-restarts", "0"]);
    ctl.ok(&["vm", "start", &web]);
    wait_ready(&agent, &web);
    let mut console = Terminal::run(&ctl.command(&["vm", "console", &web]));
    console.expect("attached to the console", Duration::from_secs(20));
    console.send("\r");
    console.expect("root@", Duration::from_secs(60));
    console.send("echo c > /proc/sysrq-trigger\r");
    let shown = wait_state(&agent, &web, "failed", Duration::from_secs(30));
    drop(console);
    assert!(text(&shown["state_reason"]).contains("panic"), "{shown}");
    ctl.ok(&["vm", "delete", &web, "--force"]);
    agent.audit();
}

#[test]
fn without_libvirt_nobody_claims_to_know_and_it_heals_by_itself() {
    let _room = guest::room(1);
    let mut agent = Builder::new().set("libvirt.call_timeout", "5s").prepare();
    let proxy = Proxy::open(&agent.folder().join("libvirt.sock"), Path::new(LIBVIRTD)).unwrap();
    agent.set("libvirt.uri", proxy.uri());
    agent.start();
    let ctl = agent.ctl();
    agent.wait_idle(Duration::from_secs(30));
    agent.import_tiny();
    let web = agent.name("web");
    launch(&agent, &web);
    let vm = id(&agent, &web);
    let pid = qemu_pid(&vm).unwrap();

    for hung in [false, true] {
        if hung {
            proxy.hang();
        } else {
            proxy.shut();
        }
        let shown = wait_state(&agent, &web, "unknown", Duration::from_secs(10));
        assert!(shown["state_age_seconds"].is_number(), "{shown}");
        assert!(
            text(&shown["state_reason"]).contains("running"),
            "the last known state is kept: {shown}"
        );
        let status = ctl.json(&["status"]);
        assert_eq!(status["hypervisor"]["state"], "unreachable", "{status}");
        // What needs libvirt ends in a clear word, within its deadline.
        let asked = Instant::now();
        let new = agent.name("new");
        for arguments in [
            tiny(&["vm", "create", &new, "--image", "tiny"], &[]),
            vec!["vm", "stop", &web],
            vec!["vm", "delete", &web, "--force"],
        ] {
            ctl.fails(&arguments, 1, "hypervisor_unavailable");
        }
        assert!(
            asked.elapsed() < Duration::from_secs(30),
            "{:?}",
            asked.elapsed()
        );
        // What does not need it goes on.
        assert_eq!(ctl.json(&["list"]).as_array().unwrap().len(), 1);
        proxy.heal();
        wait_state(&agent, &web, "running", Duration::from_secs(20));
        assert_eq!(qemu_pid(&vm), Some(pid), "the VM was not touched");
    }
    wait_event(&agent, "hypervisor_lost", SEEN, |_| true);
    wait_event(&agent, "hypervisor_connected", SEEN, |_| true);

    // What happened while nobody looked is seen at the reconnection.
    proxy.shut();
    wait_state(&agent, &web, "unknown", Duration::from_secs(10));
    virsh(SYSTEM, &["destroy", &web]).unwrap();
    proxy.heal();
    wait_state(&agent, &web, "stopped", Duration::from_secs(20));

    // libvirt is lost in the middle of an operation: it ends, and nothing half-true stays.
    ctl.ok(&["vm", "start", &web]);
    let started = ctl.ok(&["vm", "stop", &web, "--timeout", "60s", "--detach"]);
    proxy.shut();
    wait::until("the loss is seen", Duration::from_secs(10), || {
        (ctl.json(&["status"])["hypervisor"]["state"] == "unreachable").then_some(())
    });
    proxy.heal();
    let output = ctl.run(&["operation", "wait", started.trim(), "-o", "json"]);
    assert!(
        output.code == 0 || output.stderr.contains("\"hypervisor_unavailable\""),
        "{}",
        output.stderr
    );
    agent.wait_idle(Duration::from_secs(60));
    ctl.ok(&["vm", "delete", &web, "--force"]);
    agent.audit();
}
