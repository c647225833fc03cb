//! What a link costs in Core's memory: a Core in a process of its own, real TLS, idle links.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};

use rcgen::KeyPair;

use super::links::{Identity, core, link};

/// Links of the measurement, and those before it, which fill pools and caches.
const WARM: usize = 50;
const LINKS: usize = 250;
/// The most that a host may cost (issue: 10,000 hosts).
const MOST_BYTES: usize = 100 * 1024;

/// Resident memory of this process (proc_pid_statm(5)).
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: usize = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

/// Not a test by itself: the Core of the one below, in its own process, told what to do by lines.
#[test]
#[ignore = "the other half of another test"]
fn the_core() {
    let Ok(folder) = std::env::var("GHOST_TEST_WEIGHT") else {
        return;
    };
    let links: usize = std::env::var("GHOST_TEST_LINKS").unwrap().parse().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let core = runtime.block_on(async {
        let core = core(Default::default()).await;
        let key = KeyPair::generate().unwrap();
        for number in 0..links {
            let (_, identity) = core.enrol(&key).await;
            std::fs::write(format!("{folder}/{number}.pem"), identity.certificate).unwrap();
            std::fs::write(format!("{folder}/key.pem"), identity.key).unwrap();
            std::fs::write(format!("{folder}/ca.pem"), identity.authority).unwrap();
        }
        core
    });
    println!("\nat {}", core.address);
    for line in std::io::stdin().lock().lines() {
        let wanted: usize = line.unwrap().parse().unwrap();
        while core.desk.link_count() < wanted {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        println!("\nresident {}", resident());
    }
}

struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_link_costs_core_less_than_100_kib() {
    let links = std::env::var("GHOST_TEST_LINKS")
        .ok()
        .and_then(|count| count.parse().ok())
        .unwrap_or(LINKS)
        .max(2 * WARM);
    let folder = tempfile::tempdir().unwrap();
    let mut child = Ended(
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "weight::the_core", "--ignored", "--nocapture"])
            .env("GHOST_TEST_WEIGHT", folder.path())
            .env("GHOST_TEST_LINKS", links.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let mut commands = child.0.stdin.take().unwrap();
    let mut lines = BufReader::new(child.0.stdout.take().unwrap()).lines();
    let mut told = move |word: &str| {
        lines
            .find_map(|line| line.unwrap().strip_prefix(word).map(str::to_owned))
            .unwrap()
    };
    let address = told("at ").parse().unwrap();
    let read = |name: String| std::fs::read_to_string(folder.path().join(name)).unwrap();
    let identity = |number: usize| Identity {
        certificate: read(format!("{number}.pem")),
        key: read("key.pem".into()),
        authority: read("ca.pem".into()),
    };
    let mut all = Vec::new();
    for number in 0..WARM {
        all.push(link(address, &identity(number)).await.unwrap());
    }
    writeln!(commands, "{WARM}").unwrap();
    let before: usize = told("resident ").parse().unwrap();
    for number in WARM..links {
        all.push(link(address, &identity(number)).await.unwrap());
    }
    writeln!(commands, "{links}").unwrap();
    let after: usize = told("resident ").parse().unwrap();
    let each = after.saturating_sub(before) / (links - WARM);
    println!("{links} links: {each} bytes each ({before} to {after})");
    assert!(each <= MOST_BYTES, "{each} bytes for each link");
}
