//! A fleet: a real Core and real agents, the agent behind two NATs that let nothing in. What works
//! on a host works through its link.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use ghost_e2e::agent::Builder as AgentBuilder;
use ghost_e2e::fleet::{Fleet, JOIN};
use ghost_e2e::guest::{self, BOOT, TINY};
use ghost_e2e::netlab::Way;
use ghost_e2e::wait;
use serde_json::Value;

#[test]
fn a_host_behind_two_nats_does_all_that_it_does_locally() {
    let _room = guest::room(1);
    let fleet = Fleet::new();
    let inner = SocketAddr::from(([192, 168, 50, 2], fleet.agent.grpc_port()));
    assert!(!fleet.lab.reaches("core", inner), "there is no way in");
    fleet.agent.import_tiny();
    let ctl = fleet.ctl();
    let name = fleet.agent.name("web");

    // launch, list, show, and the list of all hosts.
    // Its files lie in half of its memory.
    ctl.ok(&[
        "launch", "tiny", &name, "--cpus", "1", "--memory", "512MiB", "--disk", "1GiB",
    ]);
    ctl.ok(&["vm", "wait", &name, "--for", "agent", "--timeout", "120s"]);
    assert_eq!(ctl.json(&["vm", "show", &name])["state"], "running");
    let listed = wait::until("Core lists the VM", JOIN, || {
        let vms = fleet.core.ctl().json(&["vm", "list", "--all-hosts"]);
        let vm = vms
            .as_array()?
            .iter()
            .find(|vm| vm["name"] == name.as_str())?;
        (vm["state"] == "running").then(|| vm.clone())
    });
    assert_eq!(listed["host"], "pc-at-home");
    assert_eq!(listed["tenant"], "acme");

    // exec with both streams and a code of its own.
    let ran = ctl.run(&[
        "exec",
        &name,
        "--",
        "sh",
        "-c",
        "echo out; echo err >&2; exit 7",
    ]);
    assert_eq!(
        (ran.code, ran.stdout.as_str()),
        (7, "out\n"),
        "{}",
        ran.stderr
    );
    assert!(ran.stderr.contains("err"), "{}", ran.stderr);

    // 64 MiB there and back.
    let there = fleet.agent.folder().join("there");
    let back = fleet.agent.folder().join("back");
    std::fs::write(&there, content(64 << 20)).unwrap();
    let inside = format!("{name}:/tmp/here");
    ctl.ok(&["cp", there.to_str().unwrap(), &inside]);
    ctl.ok(&["cp", &inside, back.to_str().unwrap()]);
    assert!(
        std::fs::read(&there).unwrap() == std::fs::read(&back).unwrap(),
        "the copy differs"
    );

    // The console's log as a stream, events, and the way down.
    wait::until("the console's log", BOOT, || {
        let log = ctl.run(&["vm", "logs", &name]).stdout;
        log.contains("ghost-tiny: ready").then_some(())
    });
    assert!(ctl.ok(&["events", "-o", "json"]).contains(&name));
    ctl.ok(&["vm", "stop", &name, "--force"]);
    ctl.ok(&["vm", "delete", &name]);
    wait::until("Core forgets the VM", JOIN, || {
        let vms = fleet.core.ctl().json(&["vm", "list", "--all-hosts"]);
        vms.as_array()?.is_empty().then_some(())
    });
    fleet.agent.audit();
}

/// Bytes without a pattern that a compressor or a repeated block could hide behind.
fn content(length: usize) -> Vec<u8> {
    let mut state: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

#[test]
fn a_dead_link_is_never_green_and_comes_back_by_itself() {
    let fleet = Fleet::simulated();
    // Black-holed: the sockets still exist on both sides, and yet the host is not online.
    fleet.lab.set(Way::BlackHole);
    let begun = Instant::now();
    let host = wait::until_ok("the link is seen as dead", Duration::from_secs(15), || {
        let host = fleet.core.host("pc-at-home");
        match host["state"].as_str() {
            Some("degraded" | "offline") => Ok(host),
            _ => Err(host["state"].to_string()),
        }
    });
    println!("noticed after {:.1} s", begun.elapsed().as_secs_f32());
    assert!(
        host["state_reason"]
            .as_str()
            .is_some_and(|why| why.contains("link")),
        "{host}"
    );
    // Everything local goes on meanwhile.
    assert_eq!(fleet.agent.ctl().run(&["list"]).code, 0);
    // A call does not hang: it says that the host is away, and since when.
    let refused = fleet.ctl().run(&["list", "-o", "json"]);
    assert_ne!(refused.code, 0);
    wait::until("the host is offline", Duration::from_secs(30), || {
        (fleet.core.host("pc-at-home")["state"] == "offline").then_some(())
    });
    let error = fleet.ctl().fails(&["list"], 5, "host_offline");
    assert!(error.to_string().contains("pc-at-home"), "{error}");
    fleet.lab.set(Way::Open);
    fleet
        .core
        .wait_host("pc-at-home", "online", Duration::from_secs(90));
    assert_eq!(fleet.ctl().run(&["list"]).code, 0);

    // The cable out and in again.
    fleet.lab.set(Way::Cut);
    wait::until("the cut is seen", Duration::from_secs(15), || {
        (fleet.core.host("pc-at-home")["state"] != "online").then_some(())
    });
    fleet.lab.set(Way::Open);
    fleet
        .core
        .wait_host("pc-at-home", "online", Duration::from_secs(90));

    // Three of ten packets lost: slower, and still there.
    fleet.lab.set(Way::Loses(30));
    let mut worked = 0;
    wait::until_ok("calls go through", Duration::from_secs(120), || {
        let listed = fleet.ctl().run(&["list", "-q"]);
        assert!(matches!(listed.code, 0 | 5), "{}", listed.stderr);
        worked += usize::from(listed.code == 0);
        if worked >= 3 {
            Ok(())
        } else {
            Err(format!("{worked} worked; the last: {}", listed.stderr))
        }
    });
    fleet.lab.set(Way::Open);
    fleet
        .core
        .wait_host("pc-at-home", "online", Duration::from_secs(90));
    fleet.agent.audit();
}

#[test]
fn core_killed_and_restarted_finds_its_hosts_again() {
    let mut fleet = Fleet::simulated();
    let pid = fleet.agent.pid();
    fleet.core.kill();
    assert_eq!(
        fleet.agent.ctl().run(&["list"]).code,
        0,
        "local work goes on"
    );
    fleet.core.start();
    // It knows the host at once, and says how old that is.
    let host = fleet.core.host("pc-at-home");
    assert_eq!(host["tenant"], "acme", "{host}");
    fleet
        .core
        .wait_host("pc-at-home", "online", Duration::from_secs(90));
    assert_eq!(fleet.agent.pid(), pid);
    assert_eq!(fleet.ctl().run(&["list"]).code, 0);
    fleet.agent.audit();
}

#[test]
fn a_command_for_a_host_that_is_away_is_done_once_when_it_returns() {
    let fleet = Fleet::simulated();
    let ctl = fleet.ctl();
    fleet.agent.import_tiny();
    let name = fleet.agent.name("later");
    fleet
        .agent
        .ctl()
        .ok(&[&["vm", "create", &name, "--image", "tiny"], &TINY[..]].concat());
    fleet.lab.set(Way::Cut);
    // What went out to a link that is dead without Core knowing it yet, only the host can tell of.
    fleet
        .core
        .wait_host("pc-at-home", "offline", Duration::from_secs(60));
    let queued: Value = ctl.json(&["vm", "start", &name, "--queue=10m", "--request-id", "once"]);
    let again: Value = ctl.json(&["vm", "start", &name, "--queue=10m", "--request-id", "once"]);
    assert_eq!(queued["id"], again["id"], "the key gives the same command");
    let late: Value = ctl.json(&["vm", "stop", &name, "--force", "--queue=1s"]);
    assert_eq!(queued["status"], "queued");
    let id = queued["id"].as_str().unwrap().to_owned();
    let shown = |id: &str| ctl.json(&["command", "show", id]);
    wait::until("the late one expires", Duration::from_secs(30), || {
        (shown(late["id"].as_str()?)["status"] == "expired").then_some(())
    });
    fleet.lab.set(Way::Open);
    wait::until_ok("it was done", Duration::from_secs(90), || {
        let command = shown(&id);
        if command["status"] == "succeeded" {
            Ok(())
        } else {
            Err(command.to_string())
        }
    });
    assert_eq!(
        fleet.agent.ctl().json(&["vm", "show", &name])["state"],
        "running"
    );
    let operations = fleet.agent.ctl().json(&["operation", "list", "--all"]);
    let starts = operations
        .as_array()
        .unwrap()
        .iter()
        .filter(|one| {
            one["kind"]
                .as_str()
                .is_some_and(|kind| kind.contains("start"))
        })
        .count();
    assert_eq!(starts, 1, "{operations}");
    fleet.agent.audit();
}

#[test]
fn a_person_sees_the_own_tenant_and_nothing_else() {
    let fleet = Fleet::simulated();
    let endpoint = format!("https://{}", fleet.core.address());
    let person = |name: &str, tenant: &str, role: &str| {
        let token = fleet.core.token(&["--tenant", tenant, "--role", role]);
        let ctl = fleet.core.person(name).within(&fleet.lab.wrapper("second"));
        ctl.ok(&[
            "context",
            "add",
            "fleet",
            "--endpoint",
            &endpoint,
            "--token",
            &token,
            "--use",
        ]);
        ctl
    };
    fleet.core.ctl().run(&["tenant", "create", "widgets"]);
    let alice = person("alice", "acme", "operator");
    let mallory = person("mallory", "widgets", "operator");
    assert_eq!(alice.json(&["host", "list"]).as_array().unwrap().len(), 1);
    assert_eq!(mallory.json(&["host", "list"]).as_array().unwrap().len(), 0);
    alice.ok(&["--host", "pc-at-home", "list"]);
    mallory.fails(&["--host", "pc-at-home", "list"], 3, "host_not_found");
    let viewer = person("victor", "acme", "viewer");
    viewer.ok(&["--host", "pc-at-home", "list"]);
    viewer.fails(
        &["--host", "pc-at-home", "vm", "start", "web"],
        6,
        "permission_denied",
    );
    // A used token is used up.
    let token = fleet.core.host_token("acme");
    let second = AgentBuilder::simulated()
        .within(&fleet.lab.wrapper("second"))
        .start();
    assert_eq!(second.enroll(&token, "other").code, 0);
    fleet.core.wait_host("other", "online", JOIN);
    let third = AgentBuilder::simulated().prepare();
    let refused = third.enroll(&token, "third");
    assert_ne!(refused.code, 0, "{}", refused.stdout);
    // A removed host is out at once, and its VMs are its owner's business.
    fleet.core.ctl().ok(&["host", "remove", "other", "--force"]);
    wait::until("the removed host is gone", JOIN, || {
        fleet.core.host("other").is_null().then_some(())
    });
    assert_eq!(second.ctl().run(&["list"]).code, 0);
}
