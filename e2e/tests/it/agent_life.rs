//! The agent's own life: it may be stopped, killed, started twice, lose its state or find no
//! libvirt; VMs go on in the same QEMU.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use ghost_e2e::agent::{Agent, Builder};
use ghost_e2e::binaries::program;
use ghost_e2e::ctl::Ctl;
use ghost_e2e::guest::{self, qemu_pid};
use ghost_e2e::http;
use ghost_e2e::proxy::{LIBVIRTD, Proxy};
use ghost_e2e::wait;

use crate::support::{
    events, id, launch, show, state, text, tiny, wait_event, wait_ready, wait_state,
};

/// Where the store keeps its files.
fn store(agent: &Agent) -> PathBuf {
    let folder = agent.data_dir().join("state");
    assert!(folder.is_dir(), "{} is not there", folder.display());
    folder
}

/// Every regular file below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push(path);
        }
    }
    found
}

#[test]
fn a_stop_in_the_middle_of_work_leaves_it_to_the_next_start() {
    let _room = guest::room(1);
    let mut agent = Builder::new().start();
    agent.import_tiny();
    let web = agent.name("web");
    launch(&agent, &web);
    let vm = id(&agent, &web);
    let qemu = qemu_pid(&vm).unwrap();
    // The firmware does not hear the button yet: the stop goes on for long.
    let ctl = agent.ctl();
    let operation = ctl.ok(&[
        "vm",
        "stop",
        &web,
        "--timeout",
        "100s",
        "--force",
        "--detach",
    ]);
    let operation = operation.trim();
    wait_state(&agent, &web, "stopping", Duration::from_secs(10));
    let waiting = ctl.json(&["operation", "show", operation]);
    assert!(
        waiting["waiting_for"].is_string(),
        "it says what it waits for: {waiting}"
    );
    ctl.fails(&["vm", "start", &web], 4, "vm_busy");
    // A person who waits leaves the operation behind.
    let mut waiting = ctl
        .command(&["operation", "wait", operation])
        .spawn()
        .unwrap();

    let asked = Instant::now();
    agent.terminate();
    let ended = agent
        .wait_end(Duration::from_secs(35))
        .expect("it ends within 30 s");
    assert!(ended.success(), "{ended}: {}", agent.log());
    assert!(
        asked.elapsed() < Duration::from_secs(31),
        "{:?}",
        asked.elapsed()
    );
    assert_eq!(qemu_pid(&vm), Some(qemu), "the VM was not touched");
    assert!(!agent.socket().exists(), "the socket goes with the agent");
    drop(waiting.kill());
    drop(waiting.wait());

    agent.start();
    let resumed = agent.ctl().json(&["operation", "show", operation]);
    assert!(
        ["running", "pending", "succeeded"].contains(&resumed["status"].as_str().unwrap()),
        "it goes on: {resumed}"
    );
    agent.wait_idle(Duration::from_secs(120));
    assert_eq!(state(&agent, &web), "stopped");
    assert_eq!(
        agent.ctl().json(&["operation", "show", operation])["status"],
        "succeeded"
    );
    agent.ctl().ok(&["vm", "delete", &web]);
    agent.audit();
    agent.stop();
}

fn survives(agent: &mut Agent, web: &str, off: &str, what: &str, harm: impl FnOnce(&Agent)) {
    let (running, stopped) = (id(agent, web), id(agent, off));
    let qemu = qemu_pid(&running).unwrap();
    let before = show(agent, web);
    agent.stop();
    harm(agent);
    agent.start();
    agent.wait_idle(Duration::from_secs(60));
    wait_state(agent, web, "running", Duration::from_secs(10));
    assert_eq!(id(agent, web), running, "{what}");
    assert_eq!(qemu_pid(&running), Some(qemu), "{what}: adopted untouched");
    assert_eq!(id(agent, off), stopped, "{what}");
    assert_eq!(state(agent, off), "stopped", "{what}");
    let after = show(agent, web);
    for key in [
        "vcpus",
        "memory_bytes",
        "image",
        "tags",
        "created_at",
        "generation",
        "delete_protection",
    ] {
        assert_eq!(after[key], before[key], "{what}: {key}");
    }
    assert_eq!(after["nics"][0]["mac"], before["nics"][0]["mac"], "{what}");
    agent.audit();
}

fn rebuilds(engine: &str) {
    let _room = guest::room(1);
    let mut agent = Builder::new().set("store.engine", engine).start();
    agent.import_tiny();
    let (web, off) = (agent.name("web"), agent.name("off"));
    agent.ctl().ok(&tiny(
        &["launch", "tiny", &web],
        &["--tag", "tier=front", "--protect"],
    ));
    agent
        .ctl()
        .ok(&tiny(&["vm", "create", &off, "--image", "tiny"], &[]));

    survives(&mut agent, &web, &off, "an undisturbed restart", |_| {});
    survives(&mut agent, &web, &off, "the state is deleted", |agent| {
        fs::remove_dir_all(store(agent)).unwrap();
    });
    wait_event(&agent, "vm_added", Duration::from_secs(10), |event| {
        text(&event["message"]).contains("adopted")
    });
    assert_eq!(
        agent.ctl().json(&["image", "list"])[0]["name"],
        "tiny",
        "its image is known again"
    );
    // Twice: first what the engine wrote, then with the exports as well.
    for exports in [false, true] {
        survives(&mut agent, &web, &off, "the state is damaged", |agent| {
            let mut harmed = 0;
            for path in files(&store(agent)) {
                let inside = path.strip_prefix(store(agent)).unwrap();
                if inside.starts_with("exports") != exports && !inside.starts_with("state") {
                    continue;
                }
                let mut bytes = fs::read(&path).unwrap();
                let step = (bytes.len() / 97).max(1);
                for byte in bytes.iter_mut().step_by(step) {
                    *byte ^= 0x5a;
                }
                harmed += usize::from(!bytes.is_empty());
                fs::write(&path, bytes).unwrap();
            }
            assert!(harmed > 0, "nothing was harmed");
        });
        let told = events(&agent, &[]);
        assert!(
            told.iter().any(|event| event["kind"] == "state_rebuilt"),
            "the damage is told: {told:#?}"
        );
    }
    agent.ctl().ok(&["vm", "update", &web, "--unprotect"]);
    agent.ctl().ok(&["vm", "delete", &web, &off, "--force"]);
    agent.ctl().ok(&["image", "delete", "tiny"]);
    agent.audit();
}

#[test]
fn lost_or_damaged_state_is_rebuilt_with_sled() {
    rebuilds("sled");
}

#[test]
fn lost_or_damaged_state_is_rebuilt_with_redb() {
    rebuilds("redb");
}

/// Revoked credentials must stay revoked when the store is lost a moment later.
fn stays_revoked(engine: &str) {
    let mut agent = Builder::simulated().set("store.engine", engine).start();
    let home = agent.folder().join("laptop");
    let remote = Ctl::new(program("ghostctl"), None).with_env("XDG_CONFIG_HOME", &home);
    let token = agent.ctl().ok(&["trust", "token", "--role", "operator"]);
    let endpoint = format!("https://127.0.0.1:{}", agent.grpc_port());
    let add = [
        "--endpoint",
        &endpoint,
        "context",
        "add",
        "lab",
        "--use",
        "--token",
        token.trim(),
    ];
    remote.ok(&add);
    remote.ok(&["list"]);
    let ask = |agent: &Agent, key: &str| {
        let key = format!("Bearer {key}");
        http::request(
            agent.http_port(),
            "GET",
            "/v1/vms",
            &[("authorization", &key)],
            b"",
        )
        .unwrap()
        .status
    };
    let (kept, revoked) = (make_key(&agent, "kept"), make_key(&agent, "revoked"));
    assert_eq!((ask(&agent, &kept), ask(&agent, &revoked)), (200, 200));
    for (list, revoke) in [("key", "revoked"), ("trust", "")] {
        for known in agent.ctl().json(&[list, "list"]).as_array().unwrap() {
            if revoke.is_empty() || known["name"] == revoke {
                agent.ctl().ok(&[list, "revoke", &text(&known["id"])]);
            }
        }
    }
    // No orderly end, which would export by itself.
    agent.kill();
    fs::remove_dir_all(store(&agent).join("state")).unwrap();
    agent.start();
    let told = events(&agent, &[]);
    assert!(
        told.iter().any(|event| event["kind"] == "state_rebuilt"),
        "the store was rebuilt: {told:#?}"
    );
    assert_eq!((ask(&agent, &kept), ask(&agent, &revoked)), (200, 401));
    let output = remote.run(&["list"]);
    assert_eq!(output.code, 6, "{}", output.stderr);
    let certificates = agent.ctl().json(&["trust", "list"]);
    assert!(
        !certificates[0]["revoked_at"].is_null(),
        "known, and revoked: {certificates}"
    );
    agent.audit();
}

fn make_key(agent: &Agent, name: &str) -> String {
    let secret = agent.ctl().ok(&["key", "create", name, "--role", "viewer"]);
    secret.trim().to_owned()
}

#[test]
fn the_revoked_stay_revoked_in_a_lost_store_with_sled() {
    stays_revoked("sled");
}

#[test]
fn the_revoked_stay_revoked_in_a_lost_store_with_redb() {
    stays_revoked("redb");
}

#[test]
fn a_second_agent_on_the_same_data_is_refused() {
    let agent = Builder::simulated().start();
    let config = agent.folder().join("second.yaml");
    let first = fs::read_to_string(agent.config_file()).unwrap();
    let mut second: serde_json::Value = serde_json::from_str(&first).unwrap();
    // All but the data folder is its own.
    second["grpc"]["socket"] = agent.folder().join("second.sock").to_str().unwrap().into();
    second["libvirt"]["uri"] =
        format!("simulated:{}", agent.folder().join("world2").display()).into();
    for (section, port) in [
        ("grpc", ghost_e2e::agent::free_port()),
        ("http", ghost_e2e::agent::free_port()),
        ("metrics", ghost_e2e::agent::free_port()),
    ] {
        second[section]["listen"] = format!("127.0.0.1:{port}").into();
    }
    fs::write(&config, second.to_string()).unwrap();
    let started = Instant::now();
    let output = Command::new(program("ghost-agent"))
        .args(["run", "--config", config.to_str().unwrap()])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{said}");
    assert!(started.elapsed() < Duration::from_secs(30));
    assert!(said.contains("another ghost-agent"), "it says why: {said}");
    assert!(said.contains("try: "), "and what to do: {said}");
    assert!(agent.ctl().run(&["status"]).code == 0, "the first goes on");
    // The same socket and ports are refused too, and the first keeps them.
    let output = Command::new(program("ghost-agent"))
        .args(["run", "--config", agent.config_file().to_str().unwrap()])
        .output()
        .unwrap();
    assert!(!output.status.success());
    assert_eq!(agent.ctl().run(&["status"]).code, 0);
    agent.audit();
}

#[test]
fn an_agent_that_finds_no_libvirt_waits_for_it() {
    let mut agent = Builder::new().prepare();
    let proxy = Proxy::open(&agent.folder().join("libvirt.sock"), Path::new(LIBVIRTD)).unwrap();
    proxy.shut();
    wait::until("libvirt is away", Duration::from_secs(5), || {
        (!agent.folder().join("libvirt.sock").exists()).then_some(())
    });
    agent.set("libvirt.uri", proxy.uri());
    agent.spawn();
    agent.wait_ready();
    let ctl = agent.ctl();
    let status = ctl.json(&["status"]);
    assert_eq!(status["hypervisor"]["state"], "unreachable", "{status}");
    assert!(!status["hypervisor"]["reason"].is_null(), "{status}");
    agent.import_tiny();
    let web = agent.name("web");
    ctl.fails(
        &tiny(&["vm", "create", &web, "--image", "tiny"], &[]),
        1,
        "hypervisor_unavailable",
    );
    proxy.heal();
    agent.wait_idle(Duration::from_secs(30));
    ctl.ok(&tiny(&["vm", "create", &web, "--image", "tiny"], &[]));
    ctl.ok(&["vm", "delete", &web]);
    agent.audit();
    agent.stop();
}

#[test]
fn an_upgrade_in_place_touches_no_guest() {
    let _room = guest::room(1);
    let mut agent = Builder::new().start();
    agent.import_tiny();
    let web = agent.name("web");
    launch(&agent, &web);
    wait_ready(&agent, &web);
    let vm = id(&agent, &web);
    let qemu = qemu_pid(&vm);
    // The guest knows its address a moment before the agent has read the lease.
    agent
        .ctl()
        .ok(&["vm", "wait", &web, "--for", "address", "--timeout", "60s"]);
    let address = show(&agent, &web)["nics"][0]["addresses"].clone();
    for _ in 0..3 {
        agent.stop();
        assert_eq!(qemu_pid(&vm), qemu);
        agent.start();
    }
    agent.kill();
    agent.start();
    agent.wait_idle(Duration::from_secs(30));
    wait::until(
        "its address is known again",
        Duration::from_secs(20),
        || (show(&agent, &web)["nics"][0]["addresses"] == address).then_some(()),
    );
    assert_eq!(qemu_pid(&vm), qemu);
    // The console can be had again, and the guest still answers the button.
    agent.ctl().ok(&["vm", "stop", &web, "--timeout", "60s"]);
    agent.ctl().ok(&["vm", "delete", &web]);
    agent.audit();
    agent.stop();
}
