//! Uploads.

use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use ghost_domain::ports::ImageCache;
use ghost_domain::{ByteSize, ErrorCode, ImageDigest, ImageFormat};

use super::support::*;

#[tokio::test]
async fn a_raw_disk_is_published_under_its_digest() {
    let fixture = Fixture::new();
    let disk = raw_disk(4);
    let content = fixture.import(&disk).await.unwrap();
    assert_eq!(content.digest.to_string(), sha256(&disk));
    assert_eq!(content.format, ImageFormat::Raw);
    assert_eq!(content.virtual_size, ByteSize::from_mib(4));
    assert_eq!(std::fs::read(&content.path).unwrap(), disk);
    let metadata = std::fs::metadata(&content.path).unwrap();
    assert_eq!(metadata.permissions().mode() & 0o777, 0o644);
    assert!(metadata.blocks() * 512 < 1 << 20, "zeros take no space");
    assert_eq!(fixture.staged(), Vec::<String>::new());
    // QEMU's user passes through the folder but cannot list it; staging is ours alone.
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&fixture.folder.path().join("images")), 0o711);
    assert_eq!(mode(&fixture.staging()), 0o700);

    assert_eq!(fixture.cache.list().await.unwrap(), vec![content.clone()]);
    assert_eq!(
        fixture.cache.get(&content.digest).await.unwrap(),
        Some(content.clone())
    );
    fixture.cache.remove(&content.digest).await.unwrap();
    fixture.cache.remove(&content.digest).await.unwrap();
    assert_eq!(fixture.cache.get(&content.digest).await.unwrap(), None);
    assert_eq!(fixture.published(), Vec::<String>::new());
}

#[tokio::test]
async fn qcow2_is_kept_byte_for_byte_in_every_flavour() {
    let fixture = Fixture::new();
    for options in [
        &[][..],
        &["-c"],
        &["-c", "-o", "compression_type=zstd"],
        &["-o", "compat=0.10"],
        &["-o", "extended_l2=on"],
        &["-o", "cluster_size=2M"],
        &["-o", "cluster_size=512"],
        &["-o", "preallocation=metadata"],
    ] {
        let image = qcow2_disk(8, options);
        let content = fixture
            .import(&image)
            .await
            .unwrap_or_else(|error| panic!("{options:?}: {error}"));
        assert_eq!(content.digest.to_string(), sha256(&image), "{options:?}");
        assert_eq!(content.format, ImageFormat::Qcow2);
        assert_eq!(content.virtual_size, ByteSize::from_mib(8));
    }
}

#[tokio::test]
async fn snapshots_and_unclean_images_are_made_flat() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let name = path.to_str().unwrap();
    std::fs::write(&path, qcow2_disk(8, &[])).unwrap();
    qemu_img(&["snapshot", "-c", "old", name]);
    let with_snapshot = std::fs::read(&path).unwrap();

    let mut dirty = qcow2_disk(8, &["-o", "lazy_refcounts=on"]);
    dirty[79] |= 1;

    for image in [with_snapshot, dirty] {
        let fixture = Fixture::new();
        let content = fixture.import(&image).await.unwrap();
        assert_ne!(content.digest.to_string(), sha256(&image));
        let flat = folder.path().join("flat");
        qemu_img(&[
            "convert",
            "-f",
            "qcow2",
            "-O",
            "raw",
            content.path.to_str().unwrap(),
            flat.to_str().unwrap(),
        ]);
        assert!(
            std::fs::read(&flat).unwrap() == raw_disk(8),
            "the content is kept"
        );
        let header = std::fs::read(&content.path).unwrap();
        assert_eq!(&header[60..64], &[0; 4], "no snapshot is left");
        assert_eq!(header[79] & 1, 0, "the dirty mark is gone");
        assert_eq!(fixture.staged(), Vec::<String>::new());
    }
}

#[tokio::test]
async fn compressed_uploads_are_unpacked() {
    let fixture = Fixture::new();
    let disk = raw_disk(6);
    let image = qcow2_disk(8, &[]);
    for compress in [gzip, xz, zstd] {
        let content = fixture.import(&compress(&disk)).await.unwrap();
        assert_eq!(content.digest.to_string(), sha256(&disk));
        let content = fixture.import(&compress(&image)).await.unwrap();
        assert_eq!(content.digest.to_string(), sha256(&image));
    }
    // Several members in one file are one stream: gzip, xz and zstd all say so.
    let (first, second) = disk.split_at(2 << 20);
    for compress in [gzip, xz, zstd] {
        let mut joined = compress(first);
        joined.extend(compress(second));
        let content = fixture.import(&joined).await.unwrap();
        assert_eq!(content.digest.to_string(), sha256(&disk));
    }
    assert_eq!(fixture.cache.list().await.unwrap().len(), 2);
    assert_eq!(fixture.staged(), Vec::<String>::new());
}

#[tokio::test]
async fn bombs_are_refused_early() {
    let fixture = Fixture::with(|options| {
        options.decompression.max_output = ByteSize::from_mib(16);
        options.decompression.ratio_floor = ByteSize::from_mib(2);
    });
    let zeros = vec![0u8; 8 << 20];
    let long = vec![0u8; 20 << 20];
    let mut random_then_zeros = raw_disk(1);
    random_then_zeros.resize(40 << 20, 0xff);
    let mut bombs = Vec::new();
    for compress in [gzip, xz, zstd] {
        // Too large by ratio, by absolute size, with a decent start, and nested.
        bombs.push((compress(&zeros), ErrorCode::ImageTooLarge));
        bombs.push((compress(&long), ErrorCode::ImageTooLarge));
        bombs.push((compress(&random_then_zeros), ErrorCode::ImageTooLarge));
        bombs.push((compress(&compress(&zeros)), ErrorCode::UnsupportedImage));
    }
    // A frame that asks for a window of 2 GiB (RFC 8878 section 3.1.1.1.2).
    let mut window = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 21 << 3];
    window.extend([0; 64]);
    bombs.push((window, ErrorCode::ImageTooLarge));
    for (index, (bomb, code)) in bombs.iter().enumerate() {
        let error = fixture.import(bomb).await.unwrap_err();
        assert_eq!(error.code(), *code, "bomb {index}: {error}");
        assert_eq!(fixture.staged(), Vec::<String>::new(), "bomb {index}");
    }
    assert_eq!(fixture.published(), Vec::<String>::new());

    let slow = Fixture::with(|options| options.decompression.deadline = Duration::ZERO);
    let error = slow.import(&gzip(&zeros)).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::ImageTooLarge, "{error}");
}

#[tokio::test]
async fn damaged_compression_is_refused() {
    let fixture = Fixture::new();
    for compress in [gzip, xz, zstd] {
        let good = compress(&raw_disk(2));
        let cut = &good[..good.len() / 2];
        let mut flipped = good.clone();
        let middle = good.len() / 2;
        flipped[middle] ^= 0xff;
        for bad in [cut, &flipped] {
            let error = fixture.import(bad).await.unwrap_err();
            assert_eq!(error.code(), ErrorCode::UnsupportedImage, "{error}");
            assert!(error.hint_text().is_some());
        }
    }
    assert_eq!(fixture.staged(), Vec::<String>::new());
}

#[tokio::test]
async fn an_upload_has_limits() {
    let fixture = Fixture::with(|options| {
        options.max_upload = ByteSize::from_mib(2);
        options.staging_quota = ByteSize::from_mib(3);
    });
    let staged = fixture.cache.stage().await.unwrap();
    let noise: Vec<u8> = (0..1 << 20).map(|at: u32| (at % 251) as u8).collect();
    fixture.cache.append(&staged, &noise).await.unwrap();
    fixture.cache.append(&staged, &noise).await.unwrap();
    let error = fixture.cache.append(&staged, b"x").await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::PayloadTooLarge);
    assert_eq!(
        fixture.staged(),
        Vec::<String>::new(),
        "its bytes are given back"
    );

    let first = fixture.cache.stage().await.unwrap();
    let second = fixture.cache.stage().await.unwrap();
    for staged in [&first, &second] {
        fixture.cache.append(staged, &noise).await.unwrap();
    }
    fixture
        .cache
        .append(&first, &noise[..512 << 10])
        .await
        .unwrap();
    let error = fixture.cache.append(&second, &noise).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::DiskFull, "{error}");
    fixture.cache.discard(&first).await.unwrap();
    fixture.cache.discard(&first).await.unwrap();
    assert_eq!(fixture.staged(), Vec::<String>::new());
}

#[tokio::test]
async fn a_staged_name_is_no_way_out_of_staging() {
    let fixture = Fixture::new();
    let victim = fixture.folder.path().join("victim");
    std::fs::write(&victim, "precious").unwrap();
    let uuid = "7f4a7c15-9e37-4b79-8c15-9e3779b97f4a";
    for name in [
        "../victim",
        "../../victim",
        victim.to_str().unwrap(),
        "upload-../../victim",
        "upload-",
        "",
        ".",
        "pull-00.partial",
        &format!("upload-{uuid}/../../victim"),
        &format!("upload-{uuid}\n"),
    ] {
        let path = Path::new(name);
        assert_eq!(
            fixture.cache.append(path, b"x").await.unwrap_err().code(),
            ErrorCode::InvalidArgument,
            "{name}"
        );
        assert_eq!(
            fixture.cache.discard(path).await.unwrap_err().code(),
            ErrorCode::InvalidArgument,
            "{name}"
        );
        assert_eq!(
            fixture
                .cache
                .adopt(path, Sink::new())
                .await
                .unwrap_err()
                .code(),
            ErrorCode::InvalidArgument,
            "{name}"
        );
    }
    // A link under a legal name is not followed, in any of the three.
    let link = fixture.staging().join(format!("upload-{uuid}"));
    for _ in 0..2 {
        let _ = std::fs::remove_file(&link);
        std::os::unix::fs::symlink(&victim, &link).unwrap();
        let name = Path::new(link.file_name().unwrap());
        assert!(fixture.cache.append(name, b"x").await.is_err());
        let _ = std::fs::remove_file(&link);
        std::os::unix::fs::symlink(&victim, &link).unwrap();
        assert!(fixture.cache.adopt(name, Sink::new()).await.is_err());
    }
    assert_eq!(std::fs::read_to_string(&victim).unwrap(), "precious");
}

#[tokio::test]
async fn a_dropped_adoption_stops_and_leaves_nothing() {
    let fixture = Fixture::new();
    // Much to decompress: the future is dropped while a worker is at it.
    let mut compressed = gzip(&raw_disk(64));
    for _ in 0..6 {
        let again = compressed.clone();
        compressed.extend(again);
    }
    let staged = fixture.cache.stage().await.unwrap();
    fixture.cache.append(&staged, &compressed).await.unwrap();
    let sink = Sink::new();
    {
        let mut adoption = fixture.cache.adopt(&staged, sink.clone());
        let decompressing = async {
            while !sink.phases().iter().any(|phase| phase == "decompressing") {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::select! {
            result = &mut adoption => panic!("it was faster than expected: {result:?}"),
            () = decompressing => {}
        }
    }
    tokio::time::timeout(Duration::from_secs(30), async {
        while !fixture.staged().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("the worker goes on after its future was dropped");
    assert_eq!(fixture.published(), Vec::<String>::new());
}

#[tokio::test]
async fn a_sweep_removes_what_nobody_names() {
    let fixture = Fixture::new();
    let kept = fixture.cache.stage().await.unwrap();
    let lost = fixture.cache.stage().await.unwrap();
    for name in [
        "work-1",
        "pull-aa.partial",
        "pull-aa.json",
        "pull-bb.partial",
        "pull-bb.json.new",
    ] {
        std::fs::File::create(fixture.staging().join(name))
            .unwrap()
            .write_all(b"x")
            .unwrap();
    }
    let old = std::fs::File::options()
        .write(true)
        .open(fixture.staging().join("pull-bb.partial"))
        .unwrap();
    let long_ago = std::time::SystemTime::now() - Duration::from_secs(8 * 24 * 3600);
    old.set_modified(long_ago).unwrap();
    fixture
        .cache
        .sweep(std::slice::from_ref(&kept))
        .await
        .unwrap();
    let mut expected = vec![
        kept.to_str().unwrap().to_owned(),
        "pull-aa.json".to_owned(),
        "pull-aa.partial".to_owned(),
    ];
    expected.sort();
    assert_eq!(fixture.staged(), expected);
    assert!(!expected.contains(&lost.to_str().unwrap().to_owned()));
}

#[tokio::test]
async fn a_damaged_file_of_the_cache_hides_no_other() {
    let fixture = Fixture::new();
    let good = fixture.import(&raw_disk(1)).await.unwrap();
    let digest: ImageDigest = "11".repeat(32).parse().unwrap();
    let damaged = fixture
        .folder
        .path()
        .join("images")
        .join(format!("{digest}.qcow2"));
    std::fs::write(&damaged, "no header").unwrap();
    assert_eq!(fixture.cache.list().await.unwrap(), vec![good]);
    assert_eq!(
        fixture.cache.get(&digest).await.unwrap_err().code(),
        ErrorCode::IoFailed
    );
}

/// A kill between the publication and the record of it: the step is repeated (fault F1).
#[tokio::test]
async fn an_adoption_can_be_repeated_until_it_is_discarded() {
    let fixture = Fixture::new();
    for bytes in [raw_disk(1), gzip(&raw_disk(2))] {
        let staged = fixture.cache.stage().await.unwrap();
        fixture.cache.append(&staged, &bytes).await.unwrap();
        let first = fixture.cache.adopt(&staged, Sink::new()).await.unwrap();
        assert!(
            !fixture.staging().join(&staged).exists(),
            "the bytes are consumed"
        );
        fixture
            .cache
            .sweep(std::slice::from_ref(&staged))
            .await
            .unwrap();
        assert_eq!(
            fixture.cache.adopt(&staged, Sink::new()).await.unwrap(),
            first
        );
        // The kill came before the rename: the upload is still there, the image is not.
        fixture.cache.remove(&first.digest).await.unwrap();
        std::fs::write(fixture.staging().join(&staged), &bytes).unwrap();
        assert_eq!(
            fixture.cache.adopt(&staged, Sink::new()).await.unwrap(),
            first
        );
        fixture.cache.discard(&staged).await.unwrap();
        assert_eq!(fixture.staged(), Vec::<String>::new());
        let error = fixture.cache.adopt(&staged, Sink::new()).await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::IoFailed, "{error}");
    }
    // Nobody names it any more: swept.
    let staged = fixture.cache.stage().await.unwrap();
    fixture.cache.append(&staged, &raw_disk(1)).await.unwrap();
    fixture.cache.adopt(&staged, Sink::new()).await.unwrap();
    fixture.cache.sweep(&[]).await.unwrap();
    assert_eq!(fixture.staged(), Vec::<String>::new());
}
