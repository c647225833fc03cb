//! Folders and disks.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use ghost_domain::ports::VmStorage;
use ghost_domain::{ByteSize, ErrorCode, ImageFormat, VmId};

use super::Fixture;

fn base(folder: &Path, format: &str) -> PathBuf {
    let path = folder.join(format!("base, with comma.{format}"));
    let status = Command::new("/usr/bin/qemu-img")
        .args(["create", "-q", "-f", format])
        .arg(&path)
        .arg("8M")
        .status()
        .expect("qemu-img is needed: apt-get install qemu-utils");
    assert!(status.success());
    path
}

#[tokio::test]
async fn a_disk_is_an_overlay_made_once() {
    let fixture = Fixture::new();
    let storage = &fixture.storage;
    for (format, name) in [(ImageFormat::Raw, "raw"), (ImageFormat::Qcow2, "qcow2")] {
        let base = base(fixture.folder.path(), name);
        let vm = VmId::random();
        assert_eq!(storage.usage(vm).await.unwrap(), None);
        storage.create_folder(vm).await.unwrap();
        storage.create_folder(vm).await.unwrap();
        let folder = fixture.folder.path().join("vms").join(vm.to_string());
        assert_eq!(
            std::fs::metadata(&folder).unwrap().permissions().mode() & 0o777,
            0o711
        );

        let size = ByteSize::from_mib(64);
        storage.create_disk(vm, &base, format, size).await.unwrap();
        let disk = storage.disk_path(vm);
        assert_eq!(disk, folder.join("disk.qcow2"));
        let info = Command::new("/usr/bin/qemu-img")
            .args(["info", "-f", "qcow2", "--output=json"])
            .arg(&disk)
            .output()
            .unwrap();
        let info: serde_json::Value = serde_json::from_slice(&info.stdout).unwrap();
        assert_eq!(info["backing-filename"], base.to_str().unwrap());
        assert_eq!(info["backing-filename-format"], name);
        assert_eq!(info["virtual-size"], 64 << 20);
        let usage = storage.usage(vm).await.unwrap().unwrap();
        assert_eq!(usage.disk_virtual, size);
        assert!(
            usage.disk_allocated > ByteSize::ZERO && usage.disk_allocated < ByteSize::from_mib(2)
        );

        // Again: the same file stays, with what a guest wrote to it.
        let before = std::fs::read(&disk).unwrap();
        std::fs::write(folder.join("disk.qcow2.new"), "left by a kill").unwrap();
        storage.create_disk(vm, &base, format, size).await.unwrap();
        assert!(std::fs::read(&disk).unwrap() == before);
        // Another size or base is not what is there, and never replaces it.
        for (other, size) in [
            (base.clone(), ByteSize::from_mib(65)),
            (fixture.folder.path().join("other"), size),
        ] {
            if !other.exists() {
                std::fs::copy(&base, &other).unwrap();
            }
            let error = storage
                .create_disk(vm, &other, format, size)
                .await
                .unwrap_err();
            assert_eq!(error.code(), ErrorCode::WrongState, "{error}");
        }
        assert!(std::fs::read(&disk).unwrap() == before);
        std::fs::remove_file(fixture.folder.path().join("other")).unwrap();
    }
}

#[tokio::test]
async fn a_disk_below_its_image_is_refused_with_both_sizes() {
    let fixture = Fixture::new();
    let base = base(fixture.folder.path(), "qcow2");
    let vm = VmId::random();
    fixture.storage.create_folder(vm).await.unwrap();
    let error = fixture
        .storage
        .create_disk(vm, &base, ImageFormat::Qcow2, ByteSize::from_mib(4))
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::DiskTooSmall);
    assert!(
        error.message().contains("4 MiB") && error.message().contains("8 MiB"),
        "{error}"
    );
    assert!(error.hint_text().unwrap().contains("8MiB"));
    // An odd size is rounded up to sectors, and still the same disk the next time.
    let odd = ByteSize::from_bytes((8 << 20) + 1);
    for _ in 0..2 {
        fixture
            .storage
            .create_disk(vm, &base, ImageFormat::Qcow2, odd)
            .await
            .unwrap();
    }
    let missing = fixture.folder.path().join("missing");
    let error = fixture
        .storage
        .create_disk(VmId::random(), &missing, ImageFormat::Qcow2, odd)
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::IoFailed, "{error}");
}

#[tokio::test]
async fn a_folder_goes_with_all_in_it_and_nothing_else() {
    let fixture = Fixture::new();
    let storage = &fixture.storage;
    let precious = fixture.folder.path().join("precious");
    std::fs::create_dir(&precious).unwrap();
    std::fs::write(precious.join("file"), "keep me").unwrap();
    let vm = VmId::random();
    storage.create_folder(vm).await.unwrap();
    let folder = fixture.folder.path().join("vms").join(vm.to_string());
    std::fs::create_dir_all(folder.join("foreign/deep")).unwrap();
    std::fs::write(folder.join("foreign/deep/file"), "x").unwrap();
    std::os::unix::fs::symlink(&precious, folder.join("link")).unwrap();
    std::os::unix::fs::symlink(&precious, folder.join("foreign/link")).unwrap();
    let _listener = std::os::unix::net::UnixListener::bind(folder.join("console.sock")).unwrap();
    // A link in place of a whole folder.
    let linked = VmId::random();
    let linked_path = fixture.folder.path().join("vms").join(linked.to_string());
    std::os::unix::fs::symlink(&precious, &linked_path).unwrap();
    // What is no VM's folder.
    std::fs::create_dir(fixture.folder.path().join("vms/lost+found")).unwrap();
    std::fs::create_dir(
        fixture
            .folder
            .path()
            .join("vms")
            .join(vm.to_string().to_uppercase()),
    )
    .unwrap();

    assert_eq!(storage.list().await.unwrap(), vec![vm]);
    for vm in [vm, linked, VmId::random()] {
        storage.remove(vm).await.unwrap();
        storage.remove(vm).await.unwrap();
    }
    assert!(!folder.exists() && std::fs::symlink_metadata(&linked_path).is_err());
    assert_eq!(
        std::fs::read_to_string(precious.join("file")).unwrap(),
        "keep me"
    );
    assert_eq!(storage.list().await.unwrap(), Vec::new());
}

#[tokio::test]
async fn a_disk_that_is_a_link_or_no_qcow2_is_told() {
    let fixture = Fixture::new();
    let vm = VmId::random();
    fixture.storage.create_folder(vm).await.unwrap();
    let base = base(fixture.folder.path(), "qcow2");
    let disk = fixture.storage.disk_path(vm);
    std::os::unix::fs::symlink(&base, &disk).unwrap();
    assert_eq!(
        fixture.storage.usage(vm).await.unwrap_err().code(),
        ErrorCode::IoFailed
    );
    std::fs::remove_file(&disk).unwrap();
    std::fs::write(&disk, "garbage").unwrap();
    assert_eq!(
        fixture.storage.usage(vm).await.unwrap_err().code(),
        ErrorCode::IoFailed
    );
}
