//! Seeds as a guest reads them.

use std::io::{Cursor, Read};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use ghost_domain::guest::GuestInject;
use ghost_domain::ports::{Seed, VmStorage};
use ghost_domain::vm::CloudInit;
use ghost_domain::{ErrorCode, VmId, VmName};

use super::Fixture;

const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIB0 someone@example";

fn seed(cloud_init: CloudInit) -> Seed {
    Seed {
        vm: "0b9f4d5e-7c1a-4b7e-9f50-3a5d7e1c2b4d".parse().unwrap(),
        hostname: VmName::new("web-1").unwrap(),
        cloud_init,
        inject: GuestInject::Never,
    }
}

async fn write(fixture: &Fixture, seed: &Seed) -> Vec<u8> {
    fixture.storage.create_folder(seed.vm).await.unwrap();
    fixture.storage.write_seed(seed).await.unwrap();
    let path = fixture.storage.seed_path(seed.vm);
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    std::fs::read(path).unwrap()
}

/// The files of a FAT volume, by name.
fn read_back(image: Vec<u8>) -> Vec<(String, String)> {
    let volume = fatfs::FileSystem::new(Cursor::new(image), fatfs::FsOptions::new()).unwrap();
    let mut files: Vec<_> = volume
        .root_dir()
        .iter()
        .map(|entry| {
            let entry = entry.unwrap();
            let mut text = String::new();
            entry.to_file().read_to_string(&mut text).unwrap();
            (entry.file_name(), text)
        })
        .collect();
    files.sort();
    files
}

#[tokio::test]
async fn seeds_look_like_this() {
    let fixture = Fixture::new();
    let plain = read_back(write(&fixture, &seed(CloudInit::default())).await);
    insta::assert_debug_snapshot!("plain", plain);
    let full = CloudInit {
        user: Some("alice".to_owned()),
        ssh_authorized_keys: vec![KEY.to_owned(), format!("{KEY} # 'quoted\": x")],
        user_data: Some("#!/bin/sh\necho hello\n".to_owned()),
        network_config: Some("version: 2\nethernets: {}\n".to_owned()),
    };
    insta::assert_debug_snapshot!("full", read_back(write(&fixture, &seed(full)).await));
    let keys = CloudInit {
        ssh_authorized_keys: vec![KEY.to_owned()],
        ..CloudInit::default()
    };
    insta::assert_debug_snapshot!("keys", read_back(write(&fixture, &seed(keys)).await));
}

#[tokio::test]
async fn a_seed_depends_on_its_input_alone() {
    let fixture = Fixture::new();
    let seed = seed(CloudInit::default());
    let first = write(&fixture, &seed).await;
    let second = write(&fixture, &seed).await;
    assert!(first == second);
    assert!(first.len() >= 1 << 20);
    let folder = fixture.storage.seed_path(seed.vm);
    let left = std::fs::read_dir(folder.parent().unwrap()).unwrap().count();
    assert_eq!(left, 1, "no temporary file is left");
}

/// The tools that guests find and mount it with agree that it is a sound FAT volume.
#[tokio::test]
async fn other_programs_read_it() {
    let fixture = Fixture::new();
    let user_data = format!("#cloud-config\nwrite_files: [] # {}\n", "x".repeat(30_000));
    let seed = seed(CloudInit {
        user: Some("alice".to_owned()),
        user_data: Some(user_data.clone()),
        ..CloudInit::default()
    });
    write(&fixture, &seed).await;
    let path = fixture.storage.seed_path(seed.vm);
    let run = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).arg(&path).output();
        let output = output.unwrap_or_else(|error| panic!("{program} is needed: {error}"));
        (
            output.status.success(),
            String::from_utf8_lossy(&output.stdout).into_owned(),
        )
    };
    let (ok, text) = run("/usr/sbin/blkid", &["-p", "-o", "export"]);
    assert!(ok, "{text}");
    assert!(
        text.contains("LABEL=cidata") && text.contains("TYPE=vfat"),
        "{text}"
    );
    let (ok, text) = run("/usr/sbin/fsck.vfat", &["-n", "-v"]);
    assert!(ok, "{text}");
    let output = Command::new("/usr/bin/mtype")
        .arg("-i")
        .arg(&path)
        .arg("::user-data")
        .output()
        .unwrap_or_else(|error| panic!("mtools are needed: {error}"));
    assert_eq!(String::from_utf8_lossy(&output.stdout), user_data);
}

#[test]
fn whatever_goes_in_comes_out_again() {
    use proptest::prelude::*;
    let fixture = Fixture::new();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let text = || proptest::option::of("(?s).{0,400}");
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 128,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let strategy = (
        text(),
        text(),
        "[a-z0-9][a-z0-9-]{0,62}",
        proptest::collection::vec("[ -~]{1,80}", 0..4),
    );
    runner
        .run(&strategy, |(user_data, network_config, hostname, keys)| {
            let seed = Seed {
                vm: VmId::random(),
                hostname: VmName::new(hostname.clone()).unwrap(),
                cloud_init: CloudInit {
                    user: Some("alice".to_owned()),
                    ssh_authorized_keys: keys.clone(),
                    user_data: user_data.clone(),
                    network_config: network_config.clone(),
                },
                inject: GuestInject::Never,
            };
            let files = read_back(runtime.block_on(write(&fixture, &seed)));
            runtime.block_on(fixture.storage.remove(seed.vm)).unwrap();
            let find = |name: &str| {
                files
                    .iter()
                    .find(|(n, _)| n == name)
                    .map(|(_, t)| t.clone())
            };
            if let Some(user_data) = user_data {
                prop_assert_eq!(find("user-data"), Some(user_data));
            }
            prop_assert_eq!(find("network-config"), network_config);
            // Read as YAML there are our keys and no others, with the values that went in.
            let meta: std::collections::BTreeMap<String, serde_json::Value> =
                serde_saphyr::from_str(&find("meta-data").unwrap()).unwrap();
            prop_assert_eq!(
                &meta["instance-id"],
                &serde_json::json!(seed.vm.to_string())
            );
            prop_assert_eq!(&meta["local-hostname"], &serde_json::json!(hostname));
            prop_assert_eq!(meta.len(), if keys.is_empty() { 2 } else { 3 });
            if !keys.is_empty() {
                prop_assert_eq!(&meta["public-keys"], &serde_json::json!(keys));
            }
            let vendor: serde_json::Value =
                serde_saphyr::from_str(&find("vendor-data").unwrap()).unwrap();
            prop_assert_eq!(vendor.as_object().unwrap().len(), 1);
            prop_assert_eq!(&vendor["user"]["name"], "alice");
            Ok(())
        })
        .unwrap();
}

/// cloud-init reads YAML 1.1: names that it would take for a number, a date or a boolean.
#[tokio::test]
async fn host_names_stay_strings() {
    let fixture = Fixture::new();
    for name in [
        "on",
        "no",
        "y",
        "null",
        "123",
        "1e3",
        "0x10",
        "2024-01-01",
        "0b1",
        "12",
    ] {
        let mut seed = seed(CloudInit::default());
        seed.hostname = VmName::new(name).unwrap();
        let files = read_back(write(&fixture, &seed).await);
        let meta = &files.iter().find(|(n, _)| n == "meta-data").unwrap().1;
        let quoted = meta.contains(&format!("local-hostname: \"{name}\""))
            || meta.contains(&format!("local-hostname: '{name}'"));
        assert!(quoted, "{meta}");
    }
}

#[test]
fn user_data_is_checked_before_anything_is_made() {
    let fixture = Fixture::new();
    let check = |text: &str| {
        fixture.storage.validate_seed(&CloudInit {
            user_data: Some(text.to_owned()),
            ..CloudInit::default()
        })
    };
    for good in [
        "#cloud-config\n",
        "#cloud-config\n{}\n",
        "#cloud-config  \r\npackages:\r\n  - vim\r\n",
        "#cloud-config\nusers:\n  - default\n  - {name: bob}\nruncmd:\n  - [ls, -l]\n",
        "#cloud-config\nwrite_files:\n- path: /x\n  content: !!binary |\n    aGVsbG8=\n",
        "#cloud-config\na: &x {b: 1}\nc: *x\n",
        "#cloud-config\non: yes\n1: 2\n",
        "#cloud-config-archive\n- type: text/cloud-config\n  content: 'a: b'\n",
        "#cloud-config-jsonp\n[]\n",
        "#!/bin/sh\necho : : }{ [\n",
        "#! /usr/bin/env python3\n",
        "#include\nhttps://example.com/x\n",
        "#include-once\nhttps://example.com/x\n",
        "#cloud-boothook\n#!/bin/sh\n",
        "#part-handler\nimport x\n",
        "## template: jinja\n#cloud-config\nhostname: {{ v1.region }}\n",
        "Content-Type: multipart/mixed; boundary=\"==1==\"\nMIME-Version: 1.0\n\n--==1==\n",
        "MIME-Version: 1.0\nContent-Type: multipart/mixed;\n boundary=x\n\n--x--\n",
    ] {
        check(good).unwrap_or_else(|error| panic!("{good:?}: {error}"));
    }
    for (bad, told) in [
        ("", "line 1"),
        ("packages: [vim]\n", "#cloud-config"),
        (" #cloud-config\n", "line 1"),
        ("\n#cloud-config\n", "line 1"),
        ("#cloud-confg\nx: y\n", "#cloud-confg"),
        ("#cloud-config: x\n", "line 1"),
        ("#!\n", "interpreter"),
        ("#!sh\n", "interpreter"),
        ("echo hello\n", "line 1"),
        ("Content-Type: text/plain\n\nx", "line 1"),
        ("MIME-Version: 1.0\n\nx", "line 1"),
        ("#cloud-config\n- a\n- b\n", "key: value"),
        ("#cloud-config\njust words\n", "key: value"),
        ("#cloud-config\nruncmd:\n  - a\n bad: [\n", "line 4"),
        ("#cloud-config\na: 'open\n", "line 3"),
        ("#cloud-config\na: b: c\n", "line 2"),
        ("#cloud-config\na: 1\na: 2\n", "line 3"),
        ("#cloud-config\na:\n\tb: 1\n", "line 3"),
        ("#cloud-config\na: *missing\n", "line 2"),
        ("#cloud-config-archive\na: b\n", "list"),
        ("#cloud-config\na: \0\n", "NUL"),
    ] {
        let Err(error) = check(bad) else {
            panic!("taken: {bad:?}");
        };
        assert_eq!(error.code(), ErrorCode::InvalidUserData, "{bad:?}");
        assert!(error.to_string().contains(told), "{bad:?}: {error}");
        assert_eq!(error.violations()[0].field, "user_data");
    }
    let error = check("#cloud-config\npackages:\n  - [vim\nruncmd: x\n").unwrap_err();
    assert!(error.to_string().contains("column"), "{error}");
}

#[test]
fn yaml_bombs_are_defused() {
    let fixture = Fixture::new();
    let mut bomb = "#cloud-config\na0: &a0 [x,x,x,x,x,x,x,x,x]\n".to_owned();
    for level in 1..9 {
        let inner = vec![format!("*a{}", level - 1); 9].join(",");
        bomb.push_str(&format!("a{level}: &a{level} [{inner}]\n"));
    }
    let deep = format!(
        "#cloud-config\na: {}{}\n",
        "[".repeat(10_000),
        "]".repeat(10_000)
    );
    for text in [bomb, deep] {
        let error = fixture
            .storage
            .validate_seed(&CloudInit {
                user_data: Some(text),
                ..CloudInit::default()
            })
            .unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidUserData, "{error}");
    }
}

#[test]
fn network_config_is_checked() {
    let fixture = Fixture::new();
    let check = |text: &str| {
        fixture.storage.validate_seed(&CloudInit {
            network_config: Some(text.to_owned()),
            ..CloudInit::default()
        })
    };
    for good in [
        "version: 2\nethernets:\n  e0:\n    match: {name: 'e*'}\n    dhcp4: true\n",
        "version: 1\nconfig: []\n",
        "network:\n  version: 2\n  ethernets: {}\n",
        "#comment\nversion: 2\n",
    ] {
        check(good).unwrap_or_else(|error| panic!("{good:?}: {error}"));
    }
    for bad in [
        "",
        "x",
        "- version: 2\n",
        "version: 3\n",
        "ethernets: {}\n",
        "network: {}\n",
        "version: two\n",
        "version: [\n",
    ] {
        let error = check(bad).unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidUserData, "{bad:?}: {error}");
        assert_eq!(error.violations()[0].field, "network_config");
    }
}
