//! Every exit code, and what an error says.

use std::fmt::Write as _;
use std::os::unix::net::UnixListener;
use std::process::Stdio;

use serde_json::Value;

use crate::run::{Person, bare, finish, transcript, words};

/// One line a code: what a refused call and what a failed operation end in.
#[test]
fn every_code_of_the_domain_ends_in_its_exit_code() {
    let person = Person::new();
    let mut table = String::new();
    for code in ghost_domain::ErrorCode::ALL {
        let exit = |subject: String| {
            let mut command = person.ghostctl(&["vm", "start", &subject, "-o", "json"]);
            let output = person.run(&mut command);
            let stderr = String::from_utf8(output.stderr).unwrap();
            let last = stderr.lines().last().unwrap();
            let body: Value = serde_json::from_str(last).unwrap();
            assert_eq!(body["error"]["code"], code.as_str());
            assert!(output.stdout.is_empty(), "{subject}");
            output.status.code().unwrap()
        };
        let refused = exit(format!("code.{code}"));
        let failed = exit(format!("fail.{code}"));
        assert_eq!(refused, failed, "{code}");
        writeln!(table, "{refused} {code}").unwrap();
    }
    insta::assert_snapshot!(table);
}

#[test]
fn errors_say_what_why_and_what_next() {
    let person = Person::new();
    insta::assert_snapshot!(person.says_all(&[
        "vm show absent-1",
        "vm show absent-1 -o json",
        "vm start fail.insufficient_resources",
        "vm start fail.insufficient_resources -o json -q",
        "vm start fail.cancelled -q",
        "operation show 77777777",
        "image show absent-1",
        "network show absent-1",
        "trust revoke absent-1",
        "key revoke absent-1",
    ]));
}

#[test]
fn wrong_command_lines_end_in_two() {
    let person = Person::new();
    let lines = [
        "",
        "frobnicate",
        "vm create web-1",
        "vm create web-1 --image x --memory lots",
        "vm create web-1 --image x --cpus 0",
        "vm create web-1 --image x --disk 0",
        "vm create web-1 --image x --tag nothing",
        "vm create web-1 --image x --user-data - --network-config -",
        "vm create web-1 --image x --user-data no/such/file",
        "vm start",
        "vm start a b --request-id x",
        "vm stop web-1 --timeout soon",
        "vm update web-1",
        "vm update web-1 --protect --unprotect",
        "vm wait web-1",
        "vm wait web-1 --for lunch",
        "vm create web-1 --image x --wait agent",
        "vm create web-1 --image x --guest-inject maybe",
        "vm update web-1 --guest-access perhaps",
        "vm show web-1 --history 2d",
        "exec web-1",
        "exec web-1 uname",
        "exec web-1 -i -n -- true",
        "exec web-1 -u : -- true",
        "exec web-1 -t -o yaml -- true",
        "shell web-1 -o name",
        "cp a",
        "lockdown status --lift",
        "audit list --limit 0",
        "image pull x --url https://x",
        "image import no/such/file",
        "image import -",
        "trust token",
        "trust token --role king",
        "list --endpoint somewhere",
        "list --endpoint http://10.0.0.1:9090",
        "list --endpoint https://nowhere.example",
        "context add lab",
        "context add lab --endpoint https://x",
        "frobnicate -o json",
        "vm update web-1 -o json",
    ];
    for line in lines {
        let output = person.run(&mut person.ghostctl(&words(line)));
        assert_eq!(output.status.code(), Some(2), "{line}");
        assert!(output.stdout.is_empty(), "{line}");
        let stderr = String::from_utf8(output.stderr).unwrap();
        if line.ends_with("-o json") {
            let body: Value = serde_json::from_str(&stderr).unwrap();
            assert_eq!(body["error"]["code"], "invalid_argument", "{line}");
        } else {
            assert!(!stderr.is_empty(), "{line}");
        }
    }
    assert!(person.agent.requests().is_empty(), "nothing was asked for");
}

#[test]
fn no_agent_is_five_and_says_how_to_find_one() {
    let person = Person::new();
    let folder = person.agent.folder();
    // Nobody listens any more.
    drop(UnixListener::bind(folder.join("left.sock")).unwrap());
    let port = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port()
    };
    let mut text = String::new();
    for endpoint in [
        format!("unix:{}", folder.join("none.sock").display()),
        format!("unix:{}", folder.join("left.sock").display()),
        format!("http://127.0.0.1:{port}"),
    ] {
        let output = person.run(&mut person.ghostctl(&["status", "--endpoint", &endpoint]));
        assert_eq!(output.status.code(), Some(5));
        text.push_str(&transcript("status", &output, &person.secrets()));
    }
    let text = text
        .replace(&folder.display().to_string(), "[FOLDER]")
        .replace(&port.to_string(), "[PORT]");
    insta::assert_snapshot!(text);
}

/// Something listens and speaks no HTTP/2: the wait for its answer is bounded.
#[test]
fn a_stranger_on_the_socket_is_no_agent() {
    let person = Person::new();
    let socket = person.agent.folder().join("stranger.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let stranger = std::thread::spawn(move || {
        use std::io::Write;
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").unwrap();
    });
    let endpoint = format!("unix:{}", socket.display());
    let output = person.run(&mut person.ghostctl(&["status", "--endpoint", &endpoint]));
    stranger.join().unwrap();
    assert_eq!(
        output.status.code(),
        Some(5),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn the_agent_of_this_host_is_asked_where_nothing_is_named() {
    let person = Person::new();
    let output = person.run(&mut bare(person.home.path(), &["vm", "list", "--debug"]));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(
        stderr.starts_with("debug: endpoint unix:/run/ghost/agent.sock\n"),
        "{stderr}"
    );
}

#[test]
fn help_goes_to_stdout_and_is_done() {
    let person = Person::new();
    for line in ["--help", "vm create -h", "help vm wait", "--version"] {
        let child = person
            .ghostctl(&words(line))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let output = finish(child);
        assert_eq!(output.status.code(), Some(0), "{line}");
        assert!(
            !output.stdout.is_empty() && output.stderr.is_empty(),
            "{line}"
        );
    }
}
