//! What the commands that read show, to people and to programs.

use serde_json::Value;

use crate::run::{Person, words};

#[test]
fn lists_and_sheets_for_people() {
    let person = Person::new();
    insta::assert_snapshot!(person.says_all(&[
        "list",
        "vm list --tag env=test",
        "vm list --tag env=other",
        "vm show web-1",
        "vm show old-1 absent-1",
        "image list",
        "image catalogue",
        "image show debian-12",
        "network list",
        "network show default",
        "operation list",
        "operation list --all",
        "trust list",
        "key list",
        "events",
        "events --follow",
    ]));
}

#[test]
fn status_says_what_a_newcomer_and_an_operator_want() {
    let person = Person::new();
    insta::assert_snapshot!(person.says("status"));
}

#[test]
fn documents_for_programs() {
    let person = Person::new();
    insta::assert_snapshot!(person.says_all(&[
        "vm list -o json --tag env=test",
        "vm show web-1 -o yaml",
        "image show debian-12 -o json",
        "network show default -o json",
        "events -o json",
        "key list -o json",
        "status -o json",
    ]));
}

#[test]
fn one_thing_is_an_object_and_several_are_an_array() {
    let person = Person::new();
    let json = |line: &str| -> Value {
        let output = person.run(&mut person.ghostctl(&words(line)));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    assert!(json("vm show web-1 -o json").is_object());
    assert!(json("vm show web-1 db-1 -o json").is_array());
    // Whoever asked for two and got one still gets an array.
    assert_eq!(
        json("vm show web-1 absent-1 -o json")
            .as_array()
            .unwrap()
            .len(),
        1
    );
    assert_eq!(
        json("vm list -o json --tag env=other"),
        serde_json::json!([])
    );
}

/// The documents must be those of `ghost_proto::view`, key by key.
#[test]
fn documents_are_the_shared_views() {
    let person = Person::new();
    let output = |line: &str| person.run(&mut person.ghostctl(&words(line))).stdout;
    let vms: Vec<ghost_proto::view::Vm> =
        serde_json::from_slice(&output("vm list -o json")).unwrap();
    let expected: Vec<ghost_proto::view::Vm> = {
        let vms = person.agent.state.vms.lock().unwrap();
        vms.iter().cloned().map(Into::into).collect()
    };
    assert_eq!(vms, expected);
    // An evil text is data in a document: escaped by JSON, and whole.
    assert_eq!(vms[2].nics[0].addresses, ["\x1b[2J10.0.0.9"]);
    let text = String::from_utf8(output("vm list -o json")).unwrap();
    assert!(!text.contains('\x1b'));
    let status: ghost_proto::view::HostStatus =
        serde_json::from_slice(&output("status -o json")).unwrap();
    assert_eq!(status.resources.free.memory_bytes, 8 << 30);
    let operations: Vec<ghost_proto::view::Operation> =
        serde_json::from_slice(&output("operation list --all -o json")).unwrap();
    assert_eq!(
        operations[0].progress.as_ref().unwrap().fraction,
        Some(0.25)
    );
}

#[test]
fn names_are_one_a_line_for_scripts() {
    let person = Person::new();
    insta::assert_snapshot!(person.says_all(&[
        "list -o name",
        "image list -o name",
        "image catalogue -o name",
        "network list -o name",
        "operation list -o name",
        "trust list -o name",
    ]));
}

#[test]
fn every_request_carries_the_trace_of_its_run() {
    let person = Person::new();
    let output = person.run(&mut person.ghostctl(&words("vm show web-1 db-1 --debug")));
    let stderr = String::from_utf8(output.stderr).unwrap();
    let shown = stderr
        .lines()
        .find_map(|line| line.strip_prefix("debug: traceparent "))
        .unwrap();
    let parts: Vec<&str> = shown.split('-').collect();
    assert_eq!(
        parts.iter().map(|part| part.len()).collect::<Vec<_>>(),
        [2, 32, 16, 2],
        "{shown}"
    );
    let requests = person.agent.state.requests.lock().unwrap();
    assert_eq!(requests.len(), 2);
    for (request, parent) in requests.iter() {
        assert_eq!(parent.as_deref(), Some(shown), "{request}");
    }
}

/// 1,000 VMs are more than the 4 MiB that gRPC takes unasked.
#[test]
fn a_large_host_is_listed_whole() {
    let person = Person::new();
    {
        let mut vms = person.agent.state.vms.lock().unwrap();
        *vms = (0..1000)
            .map(|number| {
                let mut vm = crate::fake::Fake::example(&format!("vm-{number}"));
                vm.state_reason = "x".repeat(5000);
                vm
            })
            .collect();
    }
    let output = person.run(&mut person.ghostctl(&words("list -o name")));
    assert!(output.status.success());
    assert_eq!(
        output.stdout.iter().filter(|byte| **byte == b'\n').count(),
        1000
    );
}

/// `ghostctl list | head -1` is no failure.
#[test]
fn a_reader_that_leaves_is_no_failure() {
    use std::process::Stdio;
    let person = Person::new();
    let mut child = person
        .ghostctl(&words("list -o json"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = crate::run::finish(child);
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}
