//! Seeds that bring the guest agent along.

use std::fs;
use std::io::{Cursor, Read};
use std::path::{Path, PathBuf};
use std::process::Command;

use ghost_domain::ErrorCode;
use ghost_domain::guest::GuestInject;
use ghost_domain::ports::{Seed, VmStorage};
use ghost_domain::vm::CloudInit;
use ghost_domain::{VmId, VmName};
use ghost_infrastructure::guest_link::{GuestProgram, MOST_PROGRAM_BYTES};
use sha2::{Digest, Sha256};

use super::Fixture;

/// Bytes as a program has them: the head of a static one (elf(5)), the rest not all alike, and not a
/// whole number of clusters.
pub(crate) fn program(folder: &Path, size: usize) -> (PathBuf, Vec<u8>) {
    let mut bytes: Vec<u8> = (0..size).map(|at| (at * at % 251) as u8).collect();
    bytes[..120].fill(0);
    bytes[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    let machine = if cfg!(target_arch = "aarch64") {
        183
    } else {
        62
    };
    for (at, value) in [(16, 2), (18, machine), (32, 64), (54, 56), (56, 1), (64, 1)] {
        bytes[at] = value;
    }
    let path = folder.join("ghost-guest");
    fs::write(&path, &bytes).unwrap();
    (path, bytes)
}

fn seed(inject: GuestInject, user: Option<&str>) -> Seed {
    Seed {
        vm: VmId::random(),
        hostname: VmName::new("web-1").unwrap(),
        cloud_init: CloudInit {
            user: user.map(str::to_owned),
            user_data: Some("#!/bin/sh\necho hello\n".to_owned()),
            ..CloudInit::default()
        },
        inject,
    }
}

async fn written(fixture: &Fixture, seed: &Seed) -> PathBuf {
    fixture.storage.create_folder(seed.vm).await.unwrap();
    fixture.storage.write_seed(seed).await.unwrap();
    fixture.storage.seed_path(seed.vm)
}

fn read(image: &Path, name: &str) -> Option<Vec<u8>> {
    let volume = fatfs::FileSystem::new(
        Cursor::new(fs::read(image).unwrap()),
        fatfs::FsOptions::new(),
    )
    .unwrap();
    let mut bytes = Vec::new();
    volume
        .root_dir()
        .open_file(name)
        .ok()?
        .read_to_end(&mut bytes)
        .unwrap();
    Some(bytes)
}

#[tokio::test]
async fn the_program_travels_whole_and_others_read_the_volume() {
    let folder = tempfile::tempdir().unwrap();
    for size in [
        120,
        8192,
        3_500_001,
        usize::try_from(MOST_PROGRAM_BYTES).unwrap(),
    ] {
        let (path, bytes) = program(folder.path(), size);
        let fixture = Fixture::with_program(GuestProgram::at(path));
        let seed = seed(GuestInject::Auto, Some("alice"));
        let image = written(&fixture, &seed).await;
        assert!(read(&image, "ghost-guest").unwrap() == bytes, "{size}");
        assert_eq!(
            read(&image, "user-data").unwrap(),
            b"#!/bin/sh\necho hello\n"
        );
        let length = fs::metadata(&image).unwrap().len();
        assert!(length <= size as u64 + (4 << 20), "{size}: {length}");
        for (tool, arguments) in [
            ("/usr/sbin/fsck.vfat", &["-n"][..]),
            ("/usr/sbin/blkid", &["-p", "-o", "export"]),
        ] {
            let output = Command::new(tool)
                .args(arguments)
                .arg(&image)
                .output()
                .unwrap_or_else(|error| panic!("{tool} is needed: {error}"));
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(output.status.success(), "{size}: {text}");
            assert!(
                !tool.ends_with("blkid") || text.contains("LABEL=cidata"),
                "{text}"
            );
        }
        // Written again it is the same.
        let first = fs::read(&image).unwrap();
        fixture.storage.write_seed(&seed).await.unwrap();
        assert!(first == fs::read(&image).unwrap());
    }
}

#[tokio::test]
async fn vendor_data_brings_it_in_beside_the_user() {
    let folder = tempfile::tempdir().unwrap();
    let (path, bytes) = program(folder.path(), 200);
    let sum = hex::encode(Sha256::digest(&bytes));
    let fixture = Fixture::with_program(GuestProgram::at(path));
    let vendor_data = async |inject, user| {
        let image = written(&fixture, &seed(inject, user)).await;
        String::from_utf8(read(&image, "vendor-data").unwrap()).unwrap()
    };
    let plain = vendor_data(GuestInject::Auto, None).await;
    assert!(
        plain.starts_with("#cloud-boothook\n#!/bin/sh\n"),
        "{plain:.60}"
    );
    assert!(plain.contains(&format!("GHOST_GUEST_SHA256={sum}\n")));
    let both = vendor_data(GuestInject::Always, Some("alice")).await;
    let parts = both.strip_prefix("#cloud-config-archive\n").unwrap();
    let parts: Vec<std::collections::BTreeMap<String, String>> =
        serde_saphyr::from_str(parts).unwrap();
    assert_eq!(parts.len(), 2);
    assert_eq!(parts[0]["type"], "text/cloud-config");
    let ours: serde_json::Value = serde_saphyr::from_str(&parts[0]["content"]).unwrap();
    assert_eq!(ours["user"]["name"], "alice");
    assert_eq!(parts[1]["type"], "text/cloud-boothook");
    // Byte for byte what stands alone otherwise, but for the word that says how.
    let always = plain.replace("GHOST_GUEST_INSTALL=\n", "GHOST_GUEST_INSTALL=--force\n");
    assert_eq!(parts[1]["content"], always);
}

/// The shells of the guests that it must run in.
#[tokio::test]
async fn shells_can_read_the_script() {
    let folder = tempfile::tempdir().unwrap();
    let (path, _) = program(folder.path(), 200);
    let fixture = Fixture::with_program(GuestProgram::at(path));
    let image = written(&fixture, &seed(GuestInject::Auto, None)).await;
    let script = read(&image, "vendor-data").unwrap();
    let file = folder.path().join("script");
    fs::write(&file, &script[b"#cloud-boothook\n".len()..]).unwrap();
    for shell in [
        &["/bin/sh"][..],
        &["/bin/bash", "--posix"],
        &["/bin/busybox", "sh"],
    ] {
        let output = Command::new(shell[0])
            .args(&shell[1..])
            .arg("-n")
            .arg(&file)
            .output();
        match output {
            Ok(output) => assert!(
                output.status.success(),
                "{shell:?}: {}",
                String::from_utf8_lossy(&output.stderr)
            ),
            Err(error) => println!("skipped {shell:?}: {error}"),
        }
    }
}

#[tokio::test]
async fn without_a_program_auto_does_without_and_always_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let fixture = Fixture::with_program(GuestProgram::at(folder.path().join("ghost-guest")));
    let image = written(&fixture, &seed(GuestInject::Auto, None)).await;
    assert_eq!(
        (read(&image, "ghost-guest"), read(&image, "vendor-data")),
        (None, None)
    );
    let always = seed(GuestInject::Always, None);
    fixture.storage.create_folder(always.vm).await.unwrap();
    let error = fixture.storage.write_seed(&always).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::IoFailed);
    assert!(error.to_string().contains("ghost-guest"), "{error}");
    assert!(error.hint_text().is_some());
    let left = fs::read_dir(fixture.storage.seed_path(always.vm).parent().unwrap()).unwrap();
    assert_eq!(left.count(), 0);
    // One that is there and must not be carried is not.
    let (path, _) = program(folder.path(), 200);
    let fixture = Fixture::with_program(GuestProgram::at(path));
    let image = written(&fixture, &seed(GuestInject::Never, None)).await;
    assert_eq!(read(&image, "ghost-guest"), None);
}

/// What cloud-init's own code makes of the archive: content type and payload of each part.
const READ_AS_CLOUD_INIT: &str = r#"
import json, sys
from cloudinit import helpers, settings, user_data
paths = helpers.Paths({"cloud_dir": sys.argv[2], "run_dir": sys.argv[2]})
message = user_data.UserDataProcessor(paths).process(open(sys.argv[1], "rb").read())
print(json.dumps([
    (part.get_content_type(), part.get_payload(decode=True).decode())
    for part in message.walk() if part.get_content_maintype() != "multipart"
]))
"#;

#[tokio::test]
async fn cloud_init_itself_finds_both_parts() {
    let known = Command::new("python3")
        .args(["-c", "import cloudinit.user_data"])
        .output();
    if !known.is_ok_and(|output| output.status.success()) {
        println!("skipped: python3 finds no cloudinit (apt-get install cloud-init, or PYTHONPATH)");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (path, _) = program(folder.path(), 200);
    let fixture = Fixture::with_program(GuestProgram::at(path));
    for (user, kinds) in [
        (
            Some("alice"),
            &["text/cloud-config", "text/cloud-boothook"][..],
        ),
        (None, &["text/cloud-boothook"]),
    ] {
        let image = written(&fixture, &seed(GuestInject::Auto, user)).await;
        let file = folder.path().join("vendor-data");
        fs::write(&file, read(&image, "vendor-data").unwrap()).unwrap();
        let output = Command::new("python3")
            .args(["-c", READ_AS_CLOUD_INIT])
            .arg(&file)
            .arg(folder.path())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}");
        let parts: Vec<(String, String)> = serde_json::from_slice(&output.stdout).unwrap();
        let found: Vec<&str> = parts.iter().map(|(kind, _)| kind.as_str()).collect();
        assert_eq!(found, kinds);
        let hook = &parts.last().unwrap().1;
        assert!(
            hook.starts_with("#cloud-boothook\n#!/bin/sh\n"),
            "{hook:.60}"
        );
        assert!(hook.ends_with("exit 0\n"));
        if user.is_some() {
            assert!(parts[0].1.contains("name: alice"), "{}", parts[0].1);
        }
    }
}
