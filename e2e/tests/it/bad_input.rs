//! Every kind of bad input that the issue names, through the real programs: its code, its exit
//! code, and nothing left behind.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use ghost_e2e::agent::{Agent, Builder};
use ghost_e2e::binaries::program;
use ghost_e2e::http;
use ghost_e2e::wait;

use crate::support::{launch, sh, text, tiny};

#[test]
fn names_sizes_and_images_that_cannot_be() {
    let agent = Builder::simulated().start();
    let ctl = agent.ctl();
    agent.import_tiny();
    let vm = agent.name("vm");

    ctl.fails(
        &tiny(&["launch", "no-such-image", &vm], &[]),
        3,
        "image_not_found",
    );
    let error = ctl.fails(&["image", "show", "no-such-image"], 3, "image_not_found");
    assert!(!text(&error["hint"]).is_empty(), "{error}");
    for name in ["Bad", "-x", "a_b", "../x", "x y", "", &"a".repeat(80)] {
        let output = ctl.run(&["vm", "create", "--image", "tiny", "-o", "json", "--", name]);
        assert_eq!(output.code, 2, "{name:?}: {}", output.stderr);
    }
    ctl.fails(
        &["vm", "create", "Bad", "--image", "tiny"],
        2,
        "invalid_name",
    );
    for (flag, value) in [
        ("--cpus", "1000"),
        ("--memory", "1MiB"),
        ("--memory", "1000TiB"),
        ("--disk", "1KiB"),
        ("--disk", "1000000TiB"),
    ] {
        ctl.fails(
            &["vm", "create", &vm, "--image", "tiny", flag, value],
            2,
            "invalid_size",
        );
    }
    for (flag, value) in [
        ("--cpus", "0"),
        ("--memory", "0"),
        ("--disk", "0"),
        ("--memory", "much"),
    ] {
        let output = ctl.run(&["vm", "create", &vm, "--image", "tiny", flag, value]);
        assert_eq!(output.code, 2, "{flag} {value}: {}", output.stderr);
    }
    let error = ctl.fails(
        &[
            "vm", "create", &vm, "--image", "tiny", "--disk", "64MiB", "--memory", "128MiB",
        ],
        2,
        "disk_too_small",
    );
    assert!(text(&error["hint"]).contains("--disk"), "{error}");

    // More than the host has is another matter than absurd.
    let error = ctl.fails(
        &[
            "launch", "tiny", &vm, "--memory", "8TiB", "--cpus", "1", "--disk", "128MiB",
        ],
        8,
        "insufficient_resources",
    );
    let said = error.to_string();
    assert!(
        said.contains("8 TiB") || said.contains("8TiB"),
        "what was asked: {said}"
    );
    assert!(said.contains("free"), "what is free: {said}");

    // The same twice, in a row and at once.
    ctl.ok(&tiny(&["vm", "create", &vm, "--image", "tiny"], &[]));
    ctl.fails(
        &tiny(&["vm", "create", &vm, "--image", "tiny"], &[]),
        4,
        "name_taken",
    );
    let race = agent.name("race");
    let mut racers: Vec<_> = (0..4)
        .map(|_| {
            ctl.command(&tiny(
                &["vm", "create", &race, "--image", "tiny", "-q"],
                &[],
            ))
            .stderr(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap()
        })
        .collect();
    let mut codes: Vec<i32> = racers
        .iter_mut()
        .map(|racer| {
            let ended = ghost_e2e::ctl::wait(racer, Duration::from_secs(60)).unwrap();
            ended.code().unwrap()
        })
        .collect();
    codes.sort_unstable();
    assert_eq!(codes, [0, 4, 4, 4], "exactly one wins");

    // In the wrong state, or not there.
    ctl.fails(&["vm", "stop", &vm], 4, "vm_not_running");
    ctl.fails(&["vm", "pause", &vm], 4, "vm_not_running");
    ctl.ok(&["vm", "start", &vm]);
    ctl.fails(&["vm", "start", &vm], 4, "vm_running");
    ctl.fails(&["vm", "delete", &vm], 4, "vm_running");
    ctl.fails(&["vm", "show", "nobody"], 3, "vm_not_found");
    ctl.fails(
        &["operation", "show", "00000000-0000-4000-8000-000000000000"],
        3,
        "operation_not_found",
    );
    ctl.fails(&["network", "show", "nowhere"], 3, "network_not_found");
    ctl.fails(
        &tiny(
            &[
                "vm",
                "create",
                "x",
                "--image",
                "tiny",
                "--network",
                "nowhere",
            ],
            &[],
        ),
        3,
        "network_not_found",
    );
    let known = text(&ctl.json(&["vm", "show", &vm])["id"]);
    let both = text(&ctl.json(&["vm", "show", &race])["id"]);
    if known[..1] == both[..1] {
        ctl.fails(&["vm", "show", &known[..1]], 2, "vm_ambiguous");
    }
    ctl.ok(&["vm", "delete", &vm, &race, "--force"]);
    assert_eq!(ctl.json(&["list"]), serde_json::json!([]));
    agent.audit();
}

#[test]
fn user_data_that_cannot_be() {
    let agent = Builder::simulated().start();
    let ctl = agent.ctl();
    agent.import_tiny();
    let file = agent.folder().join("user-data");
    let given = file.to_str().unwrap();
    let refused = |content: &str| {
        fs::write(&file, content).unwrap();
        ctl.fails(
            &tiny(
                &["vm", "create", "x", "--image", "tiny", "--user-data", given],
                &[],
            ),
            2,
            "invalid_user_data",
        )
    };
    let error = refused("#cloud-config\nusers:\n  - name: [unclosed\n");
    assert!(
        error.to_string().contains("line"),
        "the line is named: {error}"
    );
    refused("just some text\n");
    refused(&format!("#!/bin/sh\n{}", "x".repeat(40 * 1024)));
    let output = ctl.run_with(
        &tiny(
            &[
                "vm",
                "create",
                "x",
                "--image",
                "tiny",
                "--user-data",
                "-",
                "-o",
                "json",
            ],
            &[],
        ),
        b"#cloud-config\nkey: \"no end\n",
    );
    assert_eq!(output.code, 2, "{}", output.stderr);
    // A file that is not there, or is too large to be one.
    assert_eq!(
        ctl.run(&tiny(
            &[
                "vm",
                "create",
                "x",
                "--image",
                "tiny",
                "--user-data",
                "/nonexistent"
            ],
            &[]
        ))
        .code,
        2
    );
    fs::write(&file, "not a key").unwrap();
    ctl.fails(
        &tiny(
            &["vm", "create", "x", "--image", "tiny", "--ssh-key", given],
            &[],
        ),
        2,
        "invalid_argument",
    );
    assert_eq!(ctl.json(&["list"]), serde_json::json!([]));
    agent.audit();
}

/// Makes a file by qemu-img.
fn qemu_img(folder: &Path, name: &str, arguments: &[&str]) -> PathBuf {
    let path = folder.join(name);
    sh(
        "qemu-img",
        &[
            &["create", "-q"],
            arguments,
            &[path.to_str().unwrap(), "16M"],
        ]
        .concat(),
    );
    path
}

#[test]
fn images_that_are_not_what_they_seem() {
    let agent = Builder::simulated()
        .set("images.max_virtual_size", "1GiB")
        .start();
    let ctl = agent.ctl();
    let folder = agent.folder().join("bad");
    fs::create_dir(&folder).unwrap();
    let refused = |path: &Path, codes: &[&str]| {
        let output = ctl.run(&[
            "image",
            "import",
            path.to_str().unwrap(),
            "--name",
            "bad",
            "-o",
            "json",
        ]);
        assert_eq!(
            output.code,
            1,
            "{}: {}{}",
            path.display(),
            output.stdout,
            output.stderr
        );
        assert!(
            codes
                .iter()
                .any(|code| output.stderr.contains(&format!("\"{code}\""))),
            "{}: {}",
            path.display(),
            output.stderr
        );
    };

    let base = qemu_img(&folder, "base", &["-f", "qcow2"]);
    refused(
        &qemu_img(
            &folder,
            "overlay",
            &["-f", "qcow2", "-b", base.to_str().unwrap(), "-F", "qcow2"],
        ),
        &["unsafe_image"],
    );
    let data = format!(
        "data_file={},data_file_raw=on",
        folder.join("data").display()
    );
    refused(
        &qemu_img(&folder, "external", &["-f", "qcow2", "-o", &data]),
        &["unsafe_image"],
    );
    // Unknown incompatible feature bits stand at byte 72 of a version 3 header.
    let mut unknown = fs::read(&base).unwrap();
    unknown[72] |= 0x40;
    let path = folder.join("features");
    fs::write(&path, unknown).unwrap();
    refused(&path, &["unsupported_image"]);
    refused(
        &qemu_img(&folder, "disk.vmdk", &["-f", "vmdk"]),
        &["unsupported_image", "unsafe_image"],
    );
    refused(
        &qemu_img(&folder, "disk.vdi", &["-f", "vdi"]),
        &["unsupported_image", "unsafe_image"],
    );
    let tar = folder.join("archive.img");
    sh(
        "tar",
        &[
            "-cf",
            tar.to_str().unwrap(),
            "-C",
            folder.to_str().unwrap(),
            "base",
        ],
    );
    refused(&tar, &["unsupported_image", "unsafe_image"]);
    let empty = folder.join("empty");
    fs::write(&empty, "").unwrap();
    refused(&empty, &["unsupported_image", "unsafe_image"]);
    // Half of an image, as an upload that broke off would leave it.
    let tiny = fs::read(ghost_e2e::binaries::tiny_image()).unwrap();
    let half = folder.join("half.qcow2");
    fs::write(&half, &tiny[..tiny.len() / 2]).unwrap();
    refused(&half, &["unsupported_image", "unsafe_image", "io_failed"]);
    // A disk larger than may be, and a small file that grows into one.
    let large = folder.join("large");
    sh(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", large.to_str().unwrap(), "2G"],
    );
    refused(&large, &["image_too_large"]);
    let bomb = folder.join("bomb.gz");
    let made = Command::new("sh")
        .args(["-c", "head -c 1500M /dev/zero | gzip -1 > \"$0\""])
        .arg(&bomb)
        .status()
        .unwrap();
    assert!(made.success());
    refused(&bomb, &["image_too_large"]);
    // A name that is taken or illegal.
    ctl.fails(
        &["image", "import", base.to_str().unwrap(), "--name", "../up"],
        2,
        "invalid_name",
    );
    assert_eq!(ctl.json(&["image", "list"]), serde_json::json!([]));
    agent.audit();
    // What is right passes, compressed too.
    let good = folder.join("good.qcow2.gz");
    let made = Command::new("sh")
        .args(["-c", "gzip -1 < \"$1\" > \"$0\""])
        .arg(&good)
        .arg(&base)
        .status()
        .unwrap();
    assert!(made.success());
    ctl.ok(&["image", "import", good.to_str().unwrap(), "--name", "good"]);
    ctl.ok(&["image", "delete", "good"]);
    agent.audit();
}

#[test]
fn unknown_configuration_keys_are_refused_with_their_line() {
    let agent = Builder::simulated()
        .set("grpc.listne", "127.0.0.1:1")
        .set("store.engine", "mysql")
        .prepare();
    let config = agent.folder().join("bad.yaml");
    fs::write(
        &config,
        "agent:\n  data_dir: /var/lib/ghost\ngrpc:\n  listne: 127.0.0.1:1\nstore:\n  engine: mysql\n",
    )
    .unwrap();
    for arguments in [vec!["config", "check"], vec!["run", "--config"]] {
        let output = Command::new(program("ghost-agent"))
            .args(&arguments)
            .arg(&config)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned()
            + &String::from_utf8_lossy(&output.stdout);
        assert!(!output.status.success(), "{arguments:?}: {said}");
        assert!(
            said.contains("listne") && said.contains('4'),
            "the key and its line: {said}"
        );
        assert!(
            said.contains("mysql") || said.contains("engine"),
            "every error at once: {said}"
        );
    }
    assert!(!agent.socket().exists());
}

/// The agent still answers, at once and rightly.
#[track_caller]
fn still_answers(agent: &Agent) {
    assert_eq!(agent.ctl().json(&["list"]).as_array().unwrap().len(), 1);
    assert_eq!(http::get(agent.http_port(), "/health").unwrap().status, 200);
}

#[test]
fn garbage_and_oversized_bodies() {
    let agent = Builder::simulated().start();
    let ctl = agent.ctl();
    agent.import_tiny();
    launch(&agent, &agent.name("vm"));
    let key = ctl.ok(&["key", "create", "test", "--role", "operator"]);
    let key = format!("Bearer {}", key.trim());
    let headers = [
        ("authorization", key.as_str()),
        ("content-type", "application/json"),
    ];
    let post =
        |body: &[u8]| http::request(agent.http_port(), "POST", "/v1/vms", &headers, body).unwrap();

    // HTTP: bodies that are no JSON, not the right JSON, or too much.
    for body in [
        &b"{"[..],
        b"[]",
        b"null",
        b"\xff\xfe",
        br#"{"name":1}"#,
        br#"{"image":"tiny","no_such_key":1}"#,
    ] {
        let answer = post(body);
        assert_eq!(
            answer.status,
            400,
            "{:?}: {}",
            String::from_utf8_lossy(body),
            answer.body
        );
        assert_eq!(answer.header("content-type"), "application/problem+json");
        assert_eq!(answer.json()["code"], "invalid_argument", "{}", answer.body);
    }
    let answer = post(&vec![b' '; 8 << 20]);
    assert_eq!(
        (answer.status, &answer.json()["code"]),
        (413, &"payload_too_large".into()),
        "{}",
        answer.body
    );
    let answer = post(br#"{"name":"x","image":"tiny","vcpus":0}"#);
    assert_eq!(
        (answer.status, &answer.json()["code"]),
        (400, &"invalid_size".into()),
        "{}",
        answer.body
    );
    let answer = http::get(agent.http_port(), "/v1/vms").unwrap();
    assert_eq!(
        (answer.status, &answer.json()["code"]),
        (401, &"unauthenticated".into())
    );
    let answer = http::request(agent.http_port(), "GET", "/v1/nothing", &headers, b"").unwrap();
    assert_eq!(
        (answer.status, &answer.json()["code"]),
        (404, &"not_found".into())
    );
    still_answers(&agent);

    // Bytes of no protocol, on every door.
    let garbage: Vec<u8> = (0..70_000u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    for port in [agent.grpc_port(), agent.http_port(), agent.metrics_port()] {
        for bytes in [
            &garbage[..],
            b"\r\n\r\n\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            &[0x16, 3, 1, 0xff, 0xff],
        ] {
            let mut stream = http::connect(port).unwrap();
            // It may be thrown out at any point.
            drop(stream.write_all(bytes));
            drop(stream.shutdown(std::net::Shutdown::Write));
            drop(stream.read_to_end(&mut Vec::new()));
        }
    }
    for bytes in [
        &garbage[..],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff",
    ] {
        let mut stream = UnixStream::connect(agent.socket()).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        drop(stream.write_all(bytes));
        drop(stream.shutdown(std::net::Shutdown::Write));
        drop(stream.read_to_end(&mut Vec::new()));
    }
    still_answers(&agent);

    // gRPC: a message beyond what is taken.
    let file = agent.folder().join("large");
    fs::write(&file, format!("#!/bin/sh\n{}", "x".repeat(6 << 20))).unwrap();
    let output = ctl.run(&tiny(
        &[
            "vm",
            "create",
            "x",
            "--image",
            "tiny",
            "-o",
            "json",
            "--user-data",
            file.to_str().unwrap(),
        ],
        &[],
    ));
    assert_eq!(output.code, 2, "{}", output.stderr);
    assert!(
        output.stderr.contains("payload_too_large") || output.stderr.contains("invalid_user_data"),
        "{}",
        output.stderr
    );
    still_answers(&agent);
    assert!(
        !agent.log().contains("panicked"),
        "a panic was reachable from input"
    );
    ctl.ok(&["vm", "delete", &agent.name("vm"), "--force"]);
    agent.audit();
}

/// A small file system of its own; unmounted when dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: &Path, size: &str) -> Self {
        fs::create_dir_all(at).unwrap();
        sh(
            "mount",
            &[
                "-t",
                "tmpfs",
                "-o",
                &format!("size={size},mode=0711"),
                "tmpfs",
                at.to_str().unwrap(),
            ],
        );
        Self(at.to_owned())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: QEMU or the agent may still be on its way out.
        drop(Command::new("umount").arg("-l").arg(&self.0).status());
    }
}

#[test]
fn on_a_full_disk_nothing_is_half_made_and_delete_works() {
    let place = tempfile::Builder::new()
        .prefix(&format!("ghost-e2e-{}-", std::process::id()))
        .tempdir_in("/var/tmp")
        .unwrap();
    let disk = SmallDisk::mount(&place.path().join("disk"), "300m");
    let mut agent = Builder::simulated()
        .data_dir(&disk.0.join("data"))
        .set("resources.reserved.disk", 0)
        .set("store.reserve", "8MiB")
        // Promises are not the matter here.
        .set("resources.overcommit.disk", 100)
        .start();
    let ctl = agent.ctl();
    agent.import_tiny();
    let (one, two) = (agent.name("one"), agent.name("two"));
    for name in [&one, &two] {
        ctl.ok(&tiny(&["vm", "create", name, "--image", "tiny"], &[]));
    }
    // The disk fills up to the last block.
    let filler = disk.0.join("filler");
    let mut file = fs::File::create(&filler).unwrap();
    let mut piece = 1 << 20;
    while piece > 0 {
        if file.write_all(&vec![1; piece]).is_err() {
            piece /= 2;
        }
    }
    drop(file);
    let output = ctl.run(&tiny(
        &["vm", "create", "x", "--image", "tiny", "-o", "json"],
        &[],
    ));
    assert_eq!(output.code, 8, "{}", output.stderr);
    assert!(
        ["disk_full", "insufficient_resources"]
            .iter()
            .any(|code| output.stderr.contains(code)),
        "{}",
        output.stderr
    );
    let image = ghost_e2e::binaries::tiny_image().to_str().unwrap();
    ctl.fails(
        &["image", "import", image, "--name", "again"],
        8,
        "disk_full",
    );
    // Delete works on the full disk, also after the agent came up on it.
    ctl.ok(&["vm", "delete", &one]);
    agent.kill();
    agent.start();
    agent.wait_idle(Duration::from_secs(30));
    agent.ctl().ok(&["vm", "delete", &two]);
    assert_eq!(agent.ctl().json(&["list"]), serde_json::json!([]));
    // It heals by itself once there is room.
    fs::remove_file(&filler).unwrap();
    wait::until_ok("it takes work again", Duration::from_secs(30), || {
        let output = agent
            .ctl()
            .run(&tiny(&["vm", "create", &one, "--image", "tiny"], &[]));
        if output.code == 0 {
            Ok(())
        } else {
            Err(output.stderr)
        }
    });
    agent.ctl().ok(&["vm", "delete", &one]);
    agent.audit();
    agent.kill();
}
