//! Changes: what is asked for, how they are waited for, and how they end.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStderr, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::console::Terminal;
use crate::run::{Person, finish, transcript, words};

#[test]
fn every_change_tells_its_outcome() {
    let person = Person::new();
    insta::assert_snapshot!(person.says_all(&[
        "vm create web-9 --image debian-12",
        "vm create web-9 --image debian-12 --start -q",
        "vm create web-9 --image debian-12 --dry-run",
        "launch debian-12 web-9",
        "launch debian-12",
        "launch debian-12 -o name -q",
        "vm start web-1",
        "vm stop web-1 --force --timeout 30s",
        "vm restart web-1",
        "vm pause web-1",
        "vm resume web-1",
        "vm update web-1 --cpus 4",
        "vm delete web-1 --force",
        "image pull debian-12",
        "image delete tiny",
        "trust token --role operator",
        "trust revoke 0000",
        "key create dashboard --role viewer --lifetime 30d",
        "key revoke 0000",
    ]));
}

#[test]
fn documents_and_ids_of_changes() {
    let person = Person::new();
    insta::assert_snapshot!(person.says_all(&[
        "vm start web-1 -o json -q",
        "vm start web-1 -o name -q",
        "vm start web-1 --detach",
        "vm start web-1 --detach -o name",
        "operation wait 00000000 -q",
        "operation show 00000000",
    ]));
}

#[test]
fn several_act_side_by_side_and_the_worst_exit_code_counts() {
    let person = Person::new();
    insta::assert_snapshot!(person.says_all(&[
        "vm start web-1 code.vm_busy absent-1 fail.disk_full db-1 -q",
        "vm stop web-1 db-1 -q -o name",
        "vm delete code.vm_running absent-1",
    ]));
    // Side by side: a slow one does not hold up the others, so all were asked before any ended.
    let requests = person.agent.requests();
    let first_watch = requests
        .iter()
        .position(|request| request.starts_with("WatchOperationRequest"))
        .unwrap();
    let starts = requests[..first_watch]
        .iter()
        .filter(|request| request.starts_with("StartVmRequest"))
        .count();
    assert!(starts >= 1, "{requests:#?}");
}

#[test]
fn flags_become_the_request() {
    let person = Person::new();
    let home = person.home.path();
    std::fs::write(home.join("id.pub"), "# mine\nssh-ed25519 AAAA alice\n\n").unwrap();
    std::fs::write(home.join("user.yaml"), "#cloud-config\n").unwrap();
    std::fs::write(home.join("net.yaml"), "version: 2\n").unwrap();
    for line in [
        "vm create web-9 --image debian-12 --cpus 4 --memory 1.5GiB --disk 20G --network default \
         --network lab --user admin --ssh-key id.pub --user-data user.yaml --network-config \
         net.yaml --tag env=prod --autostart-order -1 --autostart-delay 5s --max-restarts 2 \
         --restart-window 1h --protect --start --guest-inject always --no-guest-access --request-id abc",
        "launch debian-12 --request-id abc",
        "vm update web-1 --memory 4GiB --tag a=b --untag c --unprotect --no-autostart \
         --expected-generation 7 --request-id abc",
        "vm update web-1 --guest-access off --request-id abc",
        "vm stop web-1 --timeout 1500ms --request-id abc",
        "vm delete web-1 --force --request-id abc",
        "image pull mine --url https://x/y.qcow2 --checksum sha256:00 --request-id abc",
        "vm logs web-1 --follow --tail 16KiB",
        "events --new --vm web-1",
        "operation list --vm web-1 --all",
    ] {
        let output = person.run(&mut person.ghostctl(&words(line)));
        assert!(
            output.status.success(),
            "{line}\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let requests: Vec<String> = person
        .agent
        .requests()
        .into_iter()
        .filter(|request| !request.starts_with("WatchOperationRequest"))
        .collect();
    insta::assert_snapshot!(requests.join("\n"));
}

#[test]
fn user_data_comes_from_stdin_too() {
    let person = Person::new();
    let mut child = person
        .ghostctl(&words("vm create web-9 --image x --user-data - -q"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"#!/bin/sh\necho hello\n").unwrap();
    drop(stdin);
    assert!(finish(child).status.success());
    let request = &person.agent.requests()[0];
    assert!(
        request.contains(r#"user_data: "\#!/bin/sh\necho hello\n""#)
            || request.contains(r##"user_data: "#!/bin/sh\necho hello\n""##),
        "{request}"
    );
}

#[test]
fn a_private_key_does_not_leave_this_machine() {
    let person = Person::new();
    let key = "-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n";
    std::fs::write(person.home.path().join("id"), key).unwrap();
    insta::assert_snapshot!(person.says("vm create web-9 --image x --ssh-key id"));
    assert!(person.agent.requests().is_empty());
}

#[test]
fn without_a_key_of_the_caller_each_change_gets_one_of_its_own() {
    let person = Person::new();
    let output = person.run(&mut person.ghostctl(&words("vm start web-1 db-1 -q")));
    assert!(output.status.success());
    let keys: Vec<String> = person
        .agent
        .requests()
        .iter()
        .filter_map(|request| {
            let rest = request.strip_prefix("StartVmRequest")?;
            let (_, key) = rest.split_once("request_id: \"")?;
            Some(key.split('"').next().unwrap().to_owned())
        })
        .collect();
    assert_eq!(keys.len(), 2);
    assert_ne!(keys[0], keys[1]);
    assert!(keys.iter().all(|key| key.len() == 36), "{keys:?}");
}

/// A line that runs, and what it has written to stderr so far.
struct Running {
    child: Child,
    stderr: BufReader<ChildStderr>,
    seen: Vec<u8>,
}

impl Running {
    fn start(person: &Person, line: &str) -> Self {
        let mut child = person
            .ghostctl(&words(line))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            stderr: BufReader::new(child.stderr.take().unwrap()),
            child,
            seen: Vec::new(),
        }
    }

    /// Returns when stderr has shown a text.
    fn shows(&mut self, text: &str) {
        while !String::from_utf8_lossy(&self.seen).contains(text) {
            let read = self.stderr.read_until(b'\n', &mut self.seen).unwrap();
            assert_ne!(read, 0, "{}", String::from_utf8_lossy(&self.seen));
        }
    }

    fn interrupt(&self) {
        kill_process(Pid::from_child(&self.child), Signal::INT).unwrap();
    }

    fn end(self) -> Output {
        let Self {
            child,
            mut stderr,
            mut seen,
        } = self;
        let rest = std::thread::spawn(move || {
            let mut rest = Vec::new();
            stderr.read_to_end(&mut rest).unwrap();
            rest
        });
        let mut output = finish(child);
        seen.extend(rest.join().unwrap());
        output.stderr = seen;
        output
    }
}

#[test]
fn ctrl_c_leaves_the_operation_running_and_says_how_to_come_back() {
    let person = Person::new();
    let mut text = String::new();
    // Where the line says whom it asks, the next one has to say so too.
    let elsewhere = format!("--endpoint {} vm start slow-1", person.agent.endpoint());
    for line in [
        "vm start slow-1",
        "vm start slow-1 -o json",
        "operation wait 00000000",
        elsewhere.as_str(),
    ] {
        let mut running = Running::start(&person, line);
        running.shows("slow-1: working");
        running.interrupt();
        let output = running.end();
        assert_eq!(output.status.code(), Some(130));
        text.push_str(&transcript(line, &output, &person.secrets()));
    }
    insta::assert_snapshot!(text);
    assert!(
        !person
            .agent
            .requests()
            .iter()
            .any(|request| request.starts_with("Cancel")),
        "nothing was cancelled"
    );
}

#[test]
fn a_cancelled_operation_ends_its_wait() {
    let person = Person::new();
    let mut running = Running::start(&person, "vm start slow-1");
    running.shows("slow-1: working");
    insta::assert_snapshot!("cancel", person.says("operation cancel 00000000"));
    let output = running.end();
    insta::assert_snapshot!(
        "cancelled",
        transcript("vm start slow-1", &output, &person.secrets())
    );
}

#[test]
fn a_broken_stream_does_not_end_a_wait() {
    let person = Person::new();
    insta::assert_snapshot!(person.says("vm start shaky-1"));
}

#[test]
fn an_agent_that_restarts_does_not_end_a_wait() {
    let mut person = Person::new();
    let mut running = Running::start(&person, "vm start slow-1");
    running.shows("slow-1: working");
    person.agent.restart();
    running.shows("the agent was lost; trying to reach it again");
    person.says("operation cancel 00000000");
    let output = running.end();
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(
        stderr.contains("error: start vm slow-1 was cancelled"),
        "{stderr}"
    );
}

#[test]
fn waits_have_a_deadline_of_the_callers() {
    let person = Person::new();
    person.says("vm start slow-1 --detach");
    insta::assert_snapshot!(person.says("operation wait 00000000 --timeout 300ms"));
}

#[test]
fn vm_wait_follows_the_vm() {
    let person = Person::new();
    insta::assert_snapshot!(person.says_all(&[
        "vm wait booting --for running",
        "vm wait booting --for address",
        "vm wait booting --for address -o name -q",
        "vm wait stuck --for running --timeout 300ms",
        "vm wait broken --for running",
        "vm wait vanishing --for stopped",
        "vm wait absent-1 --for running",
        "vm wait web-1 --for agent --timeout 300ms",
        "vm wait guest-ready --for agent",
        "vm wait guest-ready --for cloud-init",
        "vm wait guest-spotty --for cloud-init -q",
        "vm wait guest-plain --for cloud-init -q",
        "vm wait guest-broken --for cloud-init -q",
        "vm wait guest-slow --for cloud-init -q --timeout 300ms",
    ]));
}

/// `launch` tells how the guest comes up, stage by stage, and never stops it.
#[test]
fn a_launch_follows_the_guest_as_far_as_is_wanted() {
    let person = Person::new();
    insta::assert_snapshot!(person.says_all(&[
        "launch debian-12 guest-ready --wait cloud-init",
        "launch debian-12 guest-plain --wait cloud-init",
        "launch debian-12 guest-slow --wait agent -q",
        "launch debian-12 guest-ready --wait running",
        "launch debian-12 guest-ready --wait none",
        "vm create guest-ready --image debian-12 --start --wait address",
        "vm create guest-ready --image debian-12 --wait agent",
        "launch debian-12 guest-broken --wait cloud-init",
        "launch debian-12 guest-slow --wait cloud-init --wait-timeout 300ms",
        "launch debian-12 web-9 --wait agent --wait-timeout 300ms",
        "launch debian-12 web-9 --wait agent --wait-timeout 300ms -o json -q",
        "launch debian-12 broken --wait agent",
    ]));
    let requests = person.agent.requests();
    assert!(
        !requests
            .iter()
            .any(|request| request.starts_with("StopVm") || request.starts_with("DeleteVm")),
        "{requests:#?}"
    );
}

#[test]
fn a_launch_on_a_terminal_shows_the_guest_come_up_and_can_be_left() {
    let person = Person::new();
    let terminal = Terminal::start(&person, "launch debian-12 guest-ready");
    let (code, _, seen) = terminal.exit("cloud-init has finished");
    assert_eq!(code, Some(0));
    assert!(seen.contains("guest-ready: address 10.77.0.2"), "{seen}");
    assert!(
        seen.contains("guest-ready: agent answers, ghost-guest 0.1.0"),
        "{seen}"
    );

    let mut terminal = Terminal::start(&person, "launch debian-12 guest-slow");
    terminal.shows("agent answers");
    terminal.signal(Signal::INT);
    let (code, _, seen) = terminal.exit("interrupted; guest-slow goes on");
    assert_eq!(code, Some(130), "{seen}");
    assert!(
        seen.contains("ghostctl vm wait guest-slow --for agent"),
        "{seen}"
    );

    // A VM without our agent is not waited for in vain.
    let terminal = Terminal::start(&person, "launch debian-12 web-9");
    let (code, _, _) = terminal.exit("its console: ghostctl vm console web-9");
    assert_eq!(code, Some(0));
}

#[test]
fn an_import_sends_the_whole_file() {
    let person = Person::new();
    let content: Vec<u8> = (0..3_500_000u32)
        .map(|number| (number % 251) as u8)
        .collect();
    let file = person.home.path().join("Tiny.qcow2.xz");
    std::fs::write(&file, &content).unwrap();
    let output =
        person.run(&mut person.ghostctl(&["image", "import", "Tiny.qcow2.xz", "-o", "name"]));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "tiny\n");
    assert!(*person.agent.state.imported.lock().unwrap() == content);
    let request = &person.agent.requests()[0];
    assert!(
        request.contains("file_name: \"Tiny.qcow2.xz\""),
        "{request}"
    );
}

#[test]
fn a_refused_import_ends_with_the_agents_reason() {
    let person = Person::new();
    // More than fits in flight: the refusal comes while the upload still runs.
    let file = person.home.path().join("big.raw");
    std::fs::File::create(&file)
        .unwrap()
        .set_len(256 << 20)
        .unwrap();
    insta::assert_snapshot!(person.says("image import big.raw --name code.image_exists -q"));
}
