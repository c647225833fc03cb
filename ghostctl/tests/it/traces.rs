//! Collectors that are away, silent or no collectors: the command goes on as if there were none.

use std::net::TcpListener;
use std::process::Output;

use crate::run::Person;

/// Runs a command that succeeds and one that fails, with this collector.
fn with_collector(person: &Person, collector: &str) -> [Output; 2] {
    ["web-1", "absent-1"].map(|vm| {
        let mut command = person.ghostctl(&["vm", "show", vm, "--debug"]);
        if !collector.is_empty() {
            command.env("OTEL_EXPORTER_OTLP_ENDPOINT", collector);
        }
        person.run(&mut command)
    })
}

/// Lines of stderr but those of `--debug`, and whether one of them tells of the trace.
fn stderr(output: &Output) -> (String, bool) {
    let text = String::from_utf8_lossy(&output.stderr);
    let undelivered = text.contains("debug: the trace was not delivered");
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.starts_with("debug: "))
        .collect();
    (lines.join("\n"), undelivered)
}

#[test]
fn a_collector_that_is_of_no_use_changes_nothing() {
    let person = Person::new();
    let expected = with_collector(&person, "");
    assert_eq!(expected[0].status.code(), Some(0));
    assert_eq!(expected[1].status.code(), Some(3));

    // Takes the connection and never says a word.
    let silent = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let silent = format!("http://{}", silent.local_addr().unwrap());
    let nobody = {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        format!("http://{}", listener.local_addr().unwrap())
    };
    for collector in [
        silent.as_str(),
        &nobody,
        "no address",
        "https://127.0.0.1:1",
    ] {
        let outputs = with_collector(&person, collector);
        for (output, expected) in outputs.iter().zip(&expected) {
            assert_eq!(output.status.code(), expected.status.code(), "{collector}");
            assert_eq!(output.stdout, expected.stdout, "{collector}");
            let (lines, undelivered) = stderr(output);
            assert_eq!(lines, stderr(expected).0, "{collector}");
            assert!(undelivered, "{collector}: it did try");
        }
    }
}

#[test]
fn a_command_without_an_agent_tells_no_collector() {
    let person = Person::new();
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    listener.set_nonblocking(true).unwrap();
    let collector = format!("http://{}", listener.local_addr().unwrap());
    for arguments in [&["completion", "bash"][..], &["context", "list"]] {
        let mut command = person.ghostctl(arguments);
        command.env("OTEL_EXPORTER_OTLP_ENDPOINT", &collector);
        assert_eq!(person.run(&mut command).status.code(), Some(0));
    }
    // Nor one that is switched off, or speaks another protocol.
    for (name, value) in [
        ("OTEL_SDK_DISABLED", "true"),
        ("OTEL_TRACES_EXPORTER", "none"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"),
    ] {
        let mut command = person.ghostctl(&["list"]);
        command.env("OTEL_EXPORTER_OTLP_ENDPOINT", &collector);
        command.env(name, value);
        assert_eq!(person.run(&mut command).status.code(), Some(0));
    }
    assert!(listener.accept().is_err(), "nobody came");
}
