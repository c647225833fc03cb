//! What VMs use: now, as it changes, and in the past.

use ghost_proto::agent::v1::GuestSample;
use rustix::process::Signal;
use serde_json::Value;

use crate::console::Terminal;
use crate::fake::{guest, moment};
use crate::run::{Person, words};

#[test]
fn top_shows_who_says_so() {
    let person = Person::new();
    insta::assert_snapshot!(person.says_all(&[
        "vm top --once",
        "vm top web-1 --once",
        "vm top --once -o name",
        "vm top absent-1 --once",
    ]));
    let output = person.run(&mut person.ghostctl(&words("vm top --once -o json")));
    let known: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(known[0]["sample"]["source"], "host");
    assert_eq!(known[1]["cloud_init"]["status"], "done");
}

#[test]
fn top_is_a_picture_on_a_terminal_and_leaves_no_trace() {
    let person = Person::new();
    let mut terminal = Terminal::start(&person, "vm top");
    terminal.shows("\x1b[?1049h");
    terminal.shows("12.5%");
    terminal.shows("Ctrl-C ends");
    terminal.signal(Signal::INT);
    let (code, _, seen) = terminal.exit("\x1b[?25h\x1b[?1049l");
    assert_eq!(code, Some(0));
    assert!(
        !seen.contains("\x1b[31m"),
        "the guest's colours stay out: {seen:?}"
    );
}

#[test]
fn off_a_terminal_top_is_a_line_a_report() {
    use std::io::{BufRead as _, BufReader};
    let person = Person::new();
    let mut child = person
        .ghostctl(&words("vm top"))
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let (first, second) = (
        lines.next().unwrap().unwrap(),
        lines.next().unwrap().unwrap(),
    );
    child.kill().unwrap();
    child.wait().unwrap();
    insta::assert_snapshot!(format!("{first}\n{second}"));
}

fn sample(ago: i64, cpu: Option<f64>, source: &str) -> GuestSample {
    GuestSample {
        at: moment(-ago),
        cpu_percent: cpu,
        source: source.to_owned(),
        ..guest::telemetry("web-1").sample.unwrap()
    }
}

#[test]
fn history_is_spark_lines_with_their_source() {
    let person = Person::new();
    // In the middle of their columns, so that a slow machine draws the same.
    let samples = (0..16).map(|number| {
        let ago = 3600 - 56 - number * 112;
        sample(
            ago,
            Some(f64::from(i32::try_from(number).unwrap()) * 6.5),
            "guest",
        )
    });
    let mut samples: Vec<GuestSample> = samples.collect();
    samples.push(sample(56, Some(50.0), "host"));
    *person.agent.state.guest.history.lock().unwrap() = samples;
    insta::assert_snapshot!(person.says_all(&[
        "vm show web-1 --history 1h",
        "vm show web-1 absent-1 --history",
        "vm show web-1 --history 25h",
    ]));
    let output = person.run(&mut person.ghostctl(&words("vm show web-1 --history 1h -o json")));
    let history: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(history["samples"].as_array().unwrap().len(), 17);
    assert_eq!(history["samples"][16]["source"], "host");
    person.agent.state.guest.history.lock().unwrap().clear();
    assert!(
        person
            .says("vm show web-1 --history 1h")
            .contains("nothing is known of the last 1h")
    );
}

#[test]
fn show_tells_of_the_guest() {
    let person = Person::new();
    insta::assert_snapshot!(person.says("vm show guest-ready"));
}
