//! What a person sees who speaks to Ghost Core.

use crate::run::Person;

#[test]
fn the_fleet_for_people() {
    let person = Person::of_core();
    insta::assert_snapshot!(person.says_all(&[
        "status",
        "host list",
        "host list --state offline",
        "host show pc absent-1",
        "list",
        "vm list --all-hosts",
        "command list",
        "command show 00000000",
        "tenant list",
        "user list",
        "version",
        "--host pc version",
        "version -o json",
    ]));
}

#[test]
fn changes_of_the_fleet() {
    let person = Person::of_core();
    insta::assert_snapshot!(person.says_all(&[
        "host token --tenant acme --label site=home",
        "host cordon pc --reason maintenance",
        "host uncordon pc",
        "host label pc site=home --remove old",
        "host label pc",
        "host rename pc pc-2",
        "host unlock pc",
        "host remove pc absent-1",
        "command cancel 00000000",
        "tenant create widgets --vms 5",
        "tenant set acme --cpus 8",
        "tenant set acme --user-memory 8GiB --user-disk 100GiB",
        "tenant set absent --cpus 8",
        "tenant delete widgets",
        "trust token --role viewer",
        "user set alice --role viewer",
        "user revoke alice",
    ]));
    let sent = person.agent.requests();
    // What was not named stays as it was.
    assert!(
        sent.iter().any(|one| one.contains("UpdateTenantRequest")
            && one.contains("vms: 10")
            && one.contains("cpus: 8")),
        "{sent:#?}"
    );
    assert!(
        sent.iter().any(|one| one.contains("UpdateTenantRequest")
            && one.contains("memory_bytes: 8589934592, disk_bytes: 107374182400")),
        "{sent:#?}"
    );
}

#[test]
fn a_vm_without_a_host_is_placed_and_followed_where_it_went() {
    let person = Person::of_core();
    insta::assert_snapshot!(person.says_all(&[
        "launch debian-12 web --wait running",
        "launch debian-12 web --detach",
        "launch debian-12 web --host-label site=home --host-label zone=eu --dry-run",
        "launch debian-12 web --host-label site=home --wait running",
        "launch debian-12 web --host-label site=a,b=c",
        "--host pc launch debian-12 web --host-label site=home",
        "--host pc vm start web-1",
        "--host pc vm start web-1 --detach",
        "--host pc vm start web-1 db-1 --queue",
        "--host pc vm stop web-1 --force --queue=10m -o name",
        "vm start web-1 --queue",
        "vm start web-1",
        "--host absent-1 vm delete web-1 --queue",
    ]));
}

#[test]
fn an_agent_knows_no_fleet() {
    let person = Person::new();
    insta::assert_snapshot!(person.says_all(&[
        "host list",
        "vm list --all-hosts",
        "launch debian-12 web --host-label site=home",
    ]));
    // Nothing was made where nobody looks at labels.
    let sent = person.agent.requests();
    assert!(
        !sent.iter().any(|one| one.contains("CreateVmRequest")),
        "{sent:#?}"
    );
}

#[test]
fn the_audit_log_of_the_fleet_says_whose_lines_are_missing() {
    let person = Person::of_core();
    let whole = person.says("audit list --limit 1");
    assert!(
        whole.contains("acme/alice") && whole.contains("core-1"),
        "{whole}"
    );
    assert!(
        whole.trim_end().ends_with("[exit 0]") || !whole.contains("[exit"),
        "{whole}"
    );
    let partial = person.says("audit list");
    for part in [
        "acme/alice",
        "error: the lines of core-2 are missing",
        "cause: the replica core-2 does not run",
        "try: ",
        "[exit 5]",
    ] {
        assert!(partial.contains(part), "no {part:?} in {partial}");
    }
    let args = ["audit", "list", "-o", "json"];
    let output = person.run(&mut person.ghostctl(&args));
    assert_eq!(output.status.code(), Some(5));
    let lines: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(lines[0]["replica"], "core-1");
    assert_eq!(
        (&lines[1]["replica"], &lines[1]["sequence"]),
        (&"core-2".into(), &0.into())
    );
    let told: serde_json::Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!(told["error"]["code"], "core_unreachable");
    assert!(
        told["error"]["hint"]
            .as_str()
            .is_some_and(|hint| !hint.is_empty())
    );
    // On a host it is the host's own log.
    let own = person.says("--host pc audit list");
    assert!(own.contains("printf"), "{own}");
}
