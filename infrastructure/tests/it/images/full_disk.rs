//! A full file system (fault F7): refused with `disk_full`, nothing left, and delete still works.

use std::path::Path;
use std::process::Command;

use ghost_domain::guest::GuestInject;
use ghost_domain::ports::{ImageCache, ImageSource, Seed, VmStorage};
use ghost_domain::vm::CloudInit;
use ghost_domain::{ByteSize, ChecksumSource, ErrorCode, ImageFormat, VmId, VmName};
use ghost_infrastructure::images::{DirectoryImageCache, ImageCacheOptions};
use ghost_infrastructure::vm_storage::{DirectoryVmStorage, VmStorageOptions};

use super::support::*;

/// A small file system of its own; unmounted when dropped.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    /// `None`, said aloud, where this user cannot mount.
    fn mount(megabytes: usize) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let output = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={megabytes}m"), "tmpfs"])
            .arg(folder.path())
            .output()
            .unwrap();
        if output.status.success() {
            return Some(Self(folder));
        }
        println!(
            "SKIPPED: a small file system cannot be mounted here (root is needed): {}",
            String::from_utf8_lossy(&output.stderr)
        );
        None
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// Takes all space that is left.
    fn fill(&self) {
        use std::io::Write;
        let mut file = std::fs::File::create(self.path().join("filler")).unwrap();
        let block = [1u8; 4096];
        while file.write_all(&block).is_ok() {}
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

fn noise(megabytes: usize) -> Vec<u8> {
    let one = raw_disk(1);
    let block = &one[4096..266_240];
    let mut bytes = one.clone();
    while bytes.len() < megabytes << 20 {
        bytes.extend_from_slice(block);
    }
    bytes.truncate(megabytes << 20);
    bytes
}

#[tokio::test]
async fn imports_and_pulls_give_the_space_back() {
    let Some(disk) = SmallDisk::mount(8) else {
        return;
    };
    let cache = DirectoryImageCache::open(ImageCacheOptions::new(disk.path())).unwrap();
    let staging = disk.path().join("images/staging");
    let large = noise(16);

    // An upload that outgrows the disk.
    let staged = cache.stage().await.unwrap();
    let mut failure = None;
    for piece in large.chunks(1 << 20) {
        if let Err(error) = cache.append(&staged, piece).await {
            failure = Some(error);
            break;
        }
    }
    let error = failure.expect("16 MiB fit in 8");
    assert_eq!(error.code(), ErrorCode::DiskFull, "{error}");
    assert!(error.hint_text().is_some());
    assert_eq!(names(&staging), Vec::<String>::new());

    // A small upload that outgrows it when decompressed.
    let mut repeated = raw_disk(1);
    for _ in 0..15 {
        repeated.extend_from_slice(&[0xa5; 1 << 20]);
    }
    let staged = cache.stage().await.unwrap();
    cache.append(&staged, &zstd(&repeated)).await.unwrap();
    let error = cache.adopt(&staged, Sink::new()).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::DiskFull, "{error}");
    assert_eq!(names(&staging), Vec::<String>::new());

    // A download without a length; one with a length is refused before its first byte.
    let copy = large.clone();
    let server = Server::start(move |request, _| match request.path.as_str() {
        "/unknown" => Answer::status("200 OK", "", &copy),
        _ => Answer::file(request, &copy, "\"v1\""),
    })
    .await;
    for path in ["/unknown", "/known"] {
        let source = ImageSource {
            url: server.url(path),
            checksum: ChecksumSource::Inline(sha256(&large).parse().unwrap()),
        };
        let error = cache.pull(&source, Sink::new()).await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::DiskFull, "{path}: {error}");
        assert_eq!(names(&staging), Vec::<String>::new(), "{path}");
    }

    // With space again it works without a restart.
    let staged = cache.stage().await.unwrap();
    cache.append(&staged, &raw_disk(2)).await.unwrap();
    let content = cache.adopt(&staged, Sink::new()).await.unwrap();
    disk.fill();
    cache.remove(&content.digest).await.unwrap();
    assert_eq!(cache.list().await.unwrap(), vec![]);
}

#[tokio::test]
async fn a_vm_is_refused_and_another_removed() {
    let Some(disk) = SmallDisk::mount(16) else {
        return;
    };
    let storage = DirectoryVmStorage::open(VmStorageOptions::new(disk.path())).unwrap();
    let base = disk.path().join("base.raw");
    std::fs::write(&base, raw_disk(1)).unwrap();
    let seed = |vm| Seed {
        vm,
        hostname: VmName::new("web").unwrap(),
        cloud_init: CloudInit::default(),
        inject: GuestInject::Never,
    };
    let size = ByteSize::from_mib(64);
    let old = VmId::random();
    storage.create_folder(old).await.unwrap();
    storage
        .create_disk(old, &base, ImageFormat::Raw, size)
        .await
        .unwrap();
    storage.write_seed(&seed(old)).await.unwrap();
    let new = VmId::random();
    storage.create_folder(new).await.unwrap();

    disk.fill();
    let error = storage
        .create_disk(new, &base, ImageFormat::Raw, size)
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::DiskFull, "{error}");
    let error = storage.write_seed(&seed(new)).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::DiskFull, "{error}");
    let folder = storage.disk_path(new);
    assert_eq!(names(folder.parent().unwrap()), Vec::<String>::new());
    // The seed that was there survives a failed replacement.
    let before = std::fs::read(storage.seed_path(old)).unwrap();
    assert!(storage.write_seed(&seed(old)).await.is_err());
    assert!(std::fs::read(storage.seed_path(old)).unwrap() == before);

    storage.remove(old).await.unwrap();
    storage.remove(new).await.unwrap();
    assert_eq!(storage.list().await.unwrap(), vec![]);
    // The space of the old one is free again.
    storage.create_folder(new).await.unwrap();
    storage
        .create_disk(new, &base, ImageFormat::Raw, size)
        .await
        .unwrap();
    storage.write_seed(&seed(new)).await.unwrap();
}
