//! Replicas, members of etcd and hosts that cannot hear each other: packets vanish without a word.
//! Nothing hangs, nothing acknowledged is lost, and all of it heals by itself.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ghost_e2e::agent::{Agent, Builder as AgentBuilder};
use ghost_e2e::core::Core;
use ghost_e2e::ctl::{Ctl, Output, failed};
use ghost_e2e::guest::TINY;
use ghost_e2e::partition::Switch;
use ghost_e2e::replicas::Replicas;
use ghost_e2e::wait;
use serde_json::Value;

use crate::replicas::{BACK, JOIN, at, join, operations, surely, wait_command};

/// The longest that Core lets a call without a deadline of its own wait.
const LONGEST: Duration = Duration::from_secs(60);
/// Everything of one machine.
const MEMBERS: [&str; 3] = ["m0", "m1", "m2"];

/// Two replicas, three members of etcd, and hosts behind a fourth kind of machine.
struct Lab {
    agent: Agent,
    replicas: Replicas,
    switch: Arc<Switch>,
}

impl Lab {
    fn new() -> Self {
        let switch = Arc::new(Switch::new(&["a", "b", "m0", "m1", "m2", "home"]));
        let replicas = Replicas::start_on(Some(&switch));
        let agent = AgentBuilder::simulated()
            .within(&switch.wrapper("home"))
            .start();
        join(&replicas.cores[0], &agent, "pc");
        replicas.wait_joined(0, 2);
        replicas.wait_joined(1, 2);
        Self {
            agent,
            replicas,
            switch,
        }
    }

    /// The replica that has the host's link, and the other one.
    fn owner_first(&self) -> (&Core, &Core) {
        let first = self.replicas.owner_of("pc");
        (&self.replicas.cores[first], &self.replicas.cores[1 - first])
    }

    fn name_of(&self, core: &Core) -> &'static str {
        if std::ptr::eq(core, &self.replicas.cores[0]) {
            "a"
        } else {
            "b"
        }
    }

    /// A replica hears no member of etcd.
    fn cut_from_etcd(&self, core: &Core) {
        let name = self.name_of(core);
        self.switch.cut(&MEMBERS.map(|member| (name, member)));
    }

    fn pids(&self) -> Vec<u32> {
        self.replicas.cores.iter().map(Core::pid).collect()
    }

    /// How often the host was linked, to either replica.
    fn links(&self) -> usize {
        let cores = self.replicas.cores.iter();
        cores
            .map(|core| core.log().matches("a host is linked").count())
            .sum()
    }
}

/// A command that is answered before anybody's patience ends, however it is answered.
fn in_time(ctl: &Ctl, arguments: &[&str]) -> Output {
    let begun = Instant::now();
    let done = ctl.run(arguments);
    let took = begun.elapsed();
    assert!(took < LONGEST, "{arguments:?} took {took:?}");
    done
}

/// A command that is refused in time, with a code and what to do.
fn refused(ctl: &Ctl, arguments: &[&str], exit: i32, code: &str) -> Value {
    let done = in_time(ctl, &[arguments, &["-o", "json"]].concat());
    let error = failed(&done, exit, code, &arguments.join(" ")).expect("a refusal");
    let hint = error["hint"].as_str().unwrap_or_default();
    assert!(!hint.is_empty(), "{error}");
    error
}

fn wait_owner(core: &Core, name: &str) {
    wait::until_ok(&format!("{name} has the host"), BACK, || {
        let host = core.host("pc");
        if host["link"]["replica"] == name && host["state"] == "online" {
            Ok(())
        } else {
            Err(format!("{} {}", host["state"], host["link"]))
        }
    });
}

fn warns_of_age(core: &Core) {
    wait::until_ok("the age of what it knows is told", JOIN, || {
        let status = core.ctl().json(&["status"]);
        assert_eq!(status["store"]["writable"], false, "{status}");
        let aged = |one: &Value| one.as_str().is_some_and(|text| text.contains("s old"));
        if status["warnings"]
            .as_array()
            .expect("a list")
            .iter()
            .any(aged)
        {
            Ok(())
        } else {
            Err(status["warnings"].to_string())
        }
    });
}

#[test]
fn a_replica_that_alone_hears_nothing_of_etcd_leaves_its_hosts_to_the_other() {
    let lab = Lab::new();
    let (cut, other) = lab.owner_first();
    let (pids, name) = (lab.pids(), lab.name_of(other));
    surely(&cut.ctl(), &["host", "label", "pc", "site=attic"]);

    lab.cut_from_etcd(cut);
    // It takes the others' word for it that there is a store, and gives the host up; the other one
    // takes it. That is four seconds of lease, as many of asking, and the host's first wait.
    wait_owner(other, name);
    assert!(in_time(&at(other, "pc"), &["list"]).code == 0);
    surely(&other.ctl(), &["host", "label", "pc", "site=cellar"]);

    // Here what is known is told, as old as it is, and nothing is changed.
    warns_of_age(cut);
    let host = cut.host("pc");
    assert_eq!(host["labels"]["site"], "attic", "{host}");
    assert!(host["last_heard_age_seconds"].is_number(), "{host}");
    refused(
        &cut.ctl(),
        &["host", "label", "pc", "site=roof"],
        1,
        "store_unavailable",
    );
    refused(&at(cut, "pc"), &["list"], 5, "host_offline");

    // Back among the others it catches up by itself, and takes no host away.
    lab.switch.heal();
    wait::until_ok("it knows what came meanwhile", BACK, || {
        let host = cut.host("pc");
        if host["labels"]["site"] == "cellar" {
            Ok(())
        } else {
            Err(host["labels"].to_string())
        }
    });
    surely(&cut.ctl(), &["host", "label", "pc", "site=roof"]);
    surely(&at(cut, "pc"), &["list"]);
    lab.replicas.wait_joined(0, 2);
    lab.replicas.wait_joined(1, 2);
    assert_eq!(other.host("pc")["link"]["replica"], name);
    assert_eq!(lab.pids(), pids, "nobody had to be started again");
    lab.agent.audit();
}

#[test]
fn without_the_leader_of_etcd_both_replicas_go_on_and_nothing_acknowledged_is_lost() {
    let lab = Lab::new();
    let pids = lab.pids();
    lab.agent.import_tiny();
    let vm = lab.agent.name("cold");
    lab.agent
        .ctl()
        .ok(&[&["vm", "create", &vm, "--image", "tiny"], &TINY[..]].concat());
    lab.agent.wait_idle(JOIN);

    // It hears the replicas, and no other member: clients that stay with it get no answer.
    let leader = lab.replicas.etcd.leader();
    let alone = MEMBERS[leader];
    let others = MEMBERS.iter().filter(|one| **one != alone);
    let pairs: Vec<_> = others.map(|one| (alone, *one)).collect();
    lab.switch.cut(&pairs);
    let mut acknowledged = BTreeMap::new();
    let mut commands = Vec::new();
    let begun = Instant::now();
    for number in 0..24 {
        let core = &lab.replicas.cores[number % 2];
        let (key, value) = (format!("n{number}"), format!("v{number}"));
        let label = ["host", "label", "pc", &format!("{key}={value}")];
        // A change whose fate is not known is an error, and may be made again.
        wait::until_ok("a change is taken", BACK, || {
            let done = in_time(&core.ctl(), &label);
            (done.code == 0).then_some(()).ok_or(done.stderr)
        });
        acknowledged.insert(key, Value::from(value));
        if number % 8 == 0 {
            let id = format!("queued-{number}");
            let queue = [
                "vm",
                "start",
                &vm,
                "--queue=10m",
                "--request-id",
                &id,
                "-o",
                "json",
            ];
            let queued = wait::until_ok("a command is taken", BACK, || {
                let done = in_time(&at(core, "pc"), &queue);
                (done.code == 0).then_some(done.stdout).ok_or(done.stderr)
            });
            let queued: Value = serde_json::from_str(&queued).expect("JSON");
            commands.push(queued["id"].as_str().expect("its id").to_owned());
        }
    }
    println!("24 changes without the leader took {:?}", begun.elapsed());
    let holds = |core: &Core| {
        wait::until_ok("all that was acknowledged is there", BACK, || {
            let labels = core.host("pc")["labels"].clone();
            let all = acknowledged
                .iter()
                .all(|(key, value)| labels[key] == *value);
            all.then_some(()).ok_or(labels.to_string())
        });
    };
    for core in &lab.replicas.cores {
        holds(core);
        core.wait_host("pc", "online", BACK);
        surely(&at(core, "pc"), &["list"]);
    }
    // The first start does what it says; those after it find that it runs.
    wait_command(&lab.replicas.cores[0], &commands[0], "succeeded");

    lab.switch.heal();
    for core in &lab.replicas.cores {
        surely(&core.ctl(), &["host", "label", "pc", "healed=yes"]);
        holds(core);
        for id in &commands {
            let command = core.ctl().json(&["command", "show", id]);
            assert!(command["id"] == id.as_str(), "{command}");
        }
    }
    let started = operations(&lab.agent, "start");
    assert!((1..=commands.len()).contains(&started), "{started} starts");
    assert_eq!(lab.pids(), pids, "nobody had to be started again");
    lab.agent.ctl().ok(&["vm", "delete", &vm, "--force"]);
    lab.agent.audit();
}

#[test]
fn replicas_that_do_not_hear_each_other_say_so_and_serve_what_they_have() {
    let lab = Lab::new();
    let (owner, other) = lab.owner_first();
    // Over a connection that exists when the cut comes, and over one that has to be made.
    surely(&at(other, "pc"), &["list"]);
    lab.switch.cut(&[("a", "b")]);
    for _ in 0..2 {
        let error = refused(&at(other, "pc"), &["list"], 5, "host_offline");
        let text = error.to_string();
        let named = format!("the replica {}", lab.name_of(owner));
        assert!(text.contains(&named), "{text}");
    }
    // The store takes changes from both, what is known is told, and the owner serves its host.
    assert_eq!(in_time(&at(owner, "pc"), &["list"]).code, 0);
    for (core, value) in [(owner, "attic"), (other, "cellar")] {
        let label = format!("site={value}");
        assert_eq!(
            in_time(&core.ctl(), &["host", "label", "pc", &label]).code,
            0
        );
        wait::until("both know it", JOIN, || {
            let both = [owner, other].map(|core| core.host("pc")["labels"]["site"] == value);
            (both == [true; 2]).then_some(())
        });
        assert_eq!(core.host("pc")["state"], "online");
    }
    // What the other was asked cannot be told here, and that is said.
    let audit = in_time(&other.ctl(), &["audit", "list", "-o", "json"]);
    assert!(
        format!("{}{}", audit.stdout, audit.stderr).contains("missing"),
        "{}{}",
        audit.stdout,
        audit.stderr
    );

    lab.switch.heal();
    surely(&at(other, "pc"), &["list"]);
    lab.agent.audit();
}

#[test]
fn while_nobody_hears_etcd_hosts_are_kept_and_reached() {
    let lab = Lab::new();
    let (owner, other) = lab.owner_first();
    let (name, links) = (lab.name_of(owner), lab.links());
    let all: Vec<_> = ["a", "b"]
        .iter()
        .flat_map(|core| MEMBERS.map(|member| (*core, member)))
        .collect();
    lab.switch.cut(&all);
    for core in [owner, other] {
        wait::until_ok("its lease is lost", JOIN, || {
            let log = core.log();
            log.contains("this replica's lease was lost")
                .then_some(())
                .ok_or("not yet".to_owned())
        });
    }
    // Longer than the lease, and than the asking of each other.
    for core in [owner, other] {
        warns_of_age(core);
        refused(
            &core.ctl(),
            &["host", "label", "pc", "site=cellar"],
            1,
            "store_unavailable",
        );
        let queue = ["vm", "start", "any", "--queue=10m"];
        refused(&at(core, "pc"), &queue, 1, "store_unavailable");
        assert_eq!(in_time(&at(core, "pc"), &["list"]).code, 0);
        assert_eq!(in_time(&at(core, "pc"), &["status"]).code, 0);
    }
    assert_eq!(owner.host("pc")["state"], "online");

    lab.switch.heal();
    for core in [owner, other] {
        surely(&core.ctl(), &["host", "label", "pc", "site=cellar"]);
        core.wait_host("pc", "online", BACK);
        surely(&at(core, "pc"), &["list"]);
    }
    wait_owner(other, name);
    assert!(links > 0);
    assert_eq!(lab.links(), links, "its link was cut meanwhile");
    lab.agent.audit();
}
