//! Completion, versions, manual.

use crate::run::{Person, bare, words};

/// What a shell gets at Tab, in fish's form: a candidate and its description a line.
fn tab(person: &Person, line: &str) -> Vec<String> {
    let mut command = person.ghostctl::<&str>(&[]);
    command
        .env("COMPLETE", "fish")
        .arg("--")
        .args(line.split(' '));
    let output = person.run(&mut command);
    assert!(output.status.success());
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(|line| line.split('\t').next().unwrap().to_owned())
        .filter(|candidate| !candidate.starts_with('-'))
        .collect()
}

#[test]
fn names_are_completed_live() {
    let person = Person::new();
    assert_eq!(tab(&person, "ghostctl vm start w"), ["web-1"]);
    assert_eq!(
        tab(&person, "ghostctl vm start "),
        ["web-1", "db-1", "old-1"]
    );
    assert_eq!(tab(&person, "ghostctl image delete t"), ["tiny"]);
    assert_eq!(
        tab(&person, "ghostctl launch "),
        ["debian-12", "tiny", "ubuntu-24.04"]
    );
    assert_eq!(tab(&person, "ghostctl network show "), ["default"]);
    assert_eq!(tab(&person, "ghostctl operation wait ").len(), 1);
    assert_eq!(tab(&person, "ghostctl context use l"), ["local"]);
    assert_eq!(
        tab(&person, "ghostctl vm wait web-1 --for a"),
        ["address", "agent"]
    );
    for line in [
        "exec d",
        "shell d",
        "guest status d",
        "vm top d",
        "audit list --vm d",
    ] {
        assert_eq!(
            tab(&person, &format!("ghostctl {line}")),
            ["db-1"],
            "{line}"
        );
    }
    // A copy has a VM on one side and a local path on the other.
    std::fs::write(person.home.path().join("dump.sql"), "").unwrap();
    assert_eq!(tab(&person, "ghostctl cp d"), ["db-1:/", "dump.sql"]);
    assert!(tab(&person, "ghostctl vm re").contains(&"restart".to_owned()));
}

#[test]
fn tab_asks_the_agent_of_the_line_and_never_complains() {
    let person = Person::new();
    let other = Person::new();
    other.agent.state.vms.lock().unwrap().truncate(1);
    let line = format!("ghostctl --endpoint {} vm start ", other.agent.endpoint());
    assert_eq!(tab(&person, &line), ["web-1"]);
    let none: [&str; 0] = [];
    assert_eq!(
        tab(&person, "ghostctl --endpoint unix:/none vm start "),
        none
    );
    assert_eq!(tab(&person, "ghostctl --endpoint nonsense vm start "), none);
}

#[test]
fn every_shell_has_a_script() {
    let person = Person::new();
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let mut command = bare(person.home.path(), &["completion", shell]);
        let output = person.run(&mut command);
        assert!(output.status.success(), "{shell}");
        let script = String::from_utf8(output.stdout).unwrap();
        assert!(
            script.contains("ghostctl") && script.contains("COMPLETE"),
            "{shell}"
        );
    }
}

#[test]
fn the_manual_has_a_page_a_command() {
    let person = Person::new();
    let output = person.run(&mut bare(person.home.path(), &["man", "pages"]));
    assert!(output.status.success());
    for page in [
        "ghostctl",
        "ghostctl-vm",
        "ghostctl-vm-create",
        "ghostctl-trust-token",
        "ghostctl-exec",
        "ghostctl-cp",
        "ghostctl-guest-ssh-key-add",
    ] {
        let path = person.home.path().join("pages").join(format!("{page}.1"));
        assert!(
            std::fs::read_to_string(path).unwrap().contains(".TH"),
            "{page}"
        );
    }
    let output = person.run(&mut bare(person.home.path(), &["man"]));
    assert!(
        String::from_utf8(output.stdout)
            .unwrap()
            .contains(".TH ghostctl 1")
    );
}

#[test]
fn versions_are_told_with_and_without_an_agent() {
    let person = Person::new();
    insta::assert_snapshot!(person.says_all(&[
        "version",
        "version --client",
        "version -o json",
        "version --endpoint unix:/none",
    ]));
    let output = person.run(&mut person.ghostctl(&words("version --client")));
    assert!(output.status.success());
}
