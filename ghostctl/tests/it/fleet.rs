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
        "tenant set absent --cpus 8",
        "tenant delete widgets",
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
}

#[test]
fn a_vm_without_a_host_is_placed_and_followed_where_it_went() {
    let person = Person::of_core();
    insta::assert_snapshot!(person.says_all(&[
        "launch debian-12 web --wait running",
        "launch debian-12 web --detach",
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
    insta::assert_snapshot!(person.says_all(&["host list", "vm list --all-hosts"]));
}
