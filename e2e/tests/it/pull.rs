//! Downloads from a server that breaks: resumed, verified, refused, shared.

use std::time::Duration;

use ghost_e2e::agent::{Agent, Builder};
use ghost_e2e::binaries::tiny_image;
use ghost_e2e::server::FileServer;
use ghost_e2e::wait;

use crate::support::{sh, text, tiny};

fn checksum() -> String {
    let sum = sh("sha256sum", &[tiny_image().to_str().unwrap()]);
    format!("sha256:{}", sum.split_whitespace().next().unwrap())
}

fn server() -> FileServer {
    FileServer::start(std::fs::read(tiny_image()).unwrap())
}

/// The audit of a data folder that may keep partial downloads.
#[track_caller]
fn audit(agent: &Agent, partial_downloads: bool) {
    let mut subject = agent.subject();
    subject.partial_downloads = partial_downloads;
    agent.audit_as(&subject);
}

#[test]
fn a_broken_download_is_resumed_and_verified() {
    let agent = Builder::simulated().start();
    let ctl = agent.ctl();
    let server = server();
    server.break_after(5 << 20, 1);
    let (url, sum) = (server.url("tiny.qcow2"), checksum());
    let done = ctl.json(&["image", "pull", "tiny", "--url", &url, "--checksum", &sum]);
    assert_eq!(done["status"], "succeeded", "{done}");
    let asked = server.requests();
    assert!(
        asked
            .iter()
            .any(|request| request.starts_with("GET") && request.ends_with(" bytes=5242880-")),
        "it went on where it broke: {asked:?}"
    );
    let image = ctl.json(&["image", "show", "tiny"]);
    assert_eq!(
        format!("sha256:{}", text(&image["digest"])),
        sum,
        "kept byte for byte"
    );
    assert_eq!(image["checksum"], sum.as_str());
    // A VM of it works, and the image stays while one does.
    let vm = agent.name("vm");
    ctl.ok(&tiny(&["launch", "tiny", &vm], &[]));
    ctl.fails(&["image", "delete", "tiny"], 4, "image_in_use");
    ctl.ok(&["vm", "delete", &vm, "--force"]);
    ctl.ok(&["image", "delete", "tiny"]);
    audit(&agent, false);
}

#[test]
fn a_wrong_checksum_leaves_nothing_behind() {
    let agent = Builder::simulated().start();
    let ctl = agent.ctl();
    let server = server();
    let wrong = format!("sha256:{}", "0".repeat(64));
    ctl.fails(
        &[
            "image",
            "pull",
            "tiny",
            "--url",
            &server.url("t"),
            "--checksum",
            &wrong,
        ],
        1,
        "checksum_mismatch",
    );
    assert_eq!(ctl.json(&["image", "list"]), serde_json::json!([]));
    audit(&agent, false);
    // Not by any plain way across the network, and not without a checksum.
    ctl.fails(
        &[
            "image",
            "pull",
            "x",
            "--url",
            "http://192.0.2.1/x",
            "--checksum",
            &wrong,
        ],
        2,
        "invalid_argument",
    );
    assert_eq!(
        ctl.run(&["image", "pull", "x", "--url", &server.url("t")])
            .code,
        2
    );
    ctl.fails(&["image", "pull", "no-such-image"], 3, "image_not_found");
    audit(&agent, false);
}

#[test]
fn a_truncated_download_is_refused_and_taken_up_later() {
    let mut agent = Builder::simulated().start();
    let ctl = agent.ctl();
    let server = server();
    let (url, sum) = (server.url("tiny.qcow2"), checksum());
    // Attempts that bring nothing, for longer than its patience.
    server.break_after(1 << 20, 1);
    server.break_after(0, u64::MAX);
    ctl.fails(
        &["image", "pull", "tiny", "--url", &url, "--checksum", &sum],
        1,
        "download_failed",
    );
    assert_eq!(ctl.json(&["image", "list"]), serde_json::json!([]));
    audit(&agent, true);

    // The agent is killed in the middle of the next attempt; it goes on by itself afterwards.
    server.break_after(0, 0);
    server.slow_down(Duration::from_millis(40));
    let operation = ctl.ok(&[
        "image",
        "pull",
        "tiny",
        "--url",
        &url,
        "--checksum",
        &sum,
        "--detach",
    ]);
    wait::until("some bytes are there", Duration::from_secs(30), || {
        let shown = ctl.json(&["operation", "show", operation.trim()]);
        (shown["progress"]["bytes_done"].as_u64() > Some(1 << 20)).then_some(())
    });
    let shown = ctl.json(&["operation", "show", operation.trim()]);
    assert!(
        shown["progress"]["bytes_total"].as_u64() > Some(0),
        "{shown}"
    );
    agent.kill();
    server.slow_down(Duration::ZERO);
    let asked = server.requests().len();
    agent.start();
    agent.wait_idle(Duration::from_secs(60));
    let later = server.requests()[asked..].to_vec();
    assert!(
        later.iter().all(|request| request.contains("bytes=")),
        "what was there was not fetched again: {later:?}"
    );
    assert_eq!(agent.ctl().json(&["image", "list"])[0]["name"], "tiny");
    audit(&agent, false);
}

#[test]
fn two_callers_share_one_download_and_one_can_be_cancelled() {
    let agent = Builder::simulated().start();
    let ctl = agent.ctl();
    let server = server();
    server.slow_down(Duration::from_millis(20));
    let (url, sum) = (server.url("tiny.qcow2"), checksum());
    let mut callers: Vec<_> = ["one", "two"]
        .iter()
        .map(|name| {
            ctl.command(&[
                "image",
                "pull",
                name,
                "--url",
                &url,
                "--checksum",
                &sum,
                "-q",
            ])
            .spawn()
            .unwrap()
        })
        .collect();
    for caller in &mut callers {
        let status = ghost_e2e::ctl::wait(caller, Duration::from_secs(120)).unwrap();
        assert!(status.success());
    }
    let gets = server
        .requests()
        .iter()
        .filter(|request| request.starts_with("GET"))
        .count();
    assert_eq!(gets, 1, "{:?}", server.requests());
    let images = ctl.json(&["image", "list"]);
    assert_eq!(images.as_array().unwrap().len(), 2);
    assert_eq!(images[0]["digest"], images[1]["digest"]);
    ctl.ok(&["image", "delete", "one"]);
    ctl.ok(&["image", "delete", "two"]);

    server.slow_down(Duration::from_millis(100));
    let operation = ctl.ok(&[
        "image",
        "pull",
        "three",
        "--url",
        &url,
        "--checksum",
        &sum,
        "--detach",
    ]);
    ctl.ok(&["operation", "cancel", operation.trim()]);
    let output = ctl.run(&["operation", "wait", operation.trim()]);
    assert_ne!(output.code, 0, "a cancelled operation is not done");
    let shown = ctl.json(&["operation", "show", operation.trim()]);
    assert!(
        ["cancelled", "rolled_back"].contains(&shown["status"].as_str().unwrap()),
        "{shown}"
    );
    audit(&agent, true);
}
