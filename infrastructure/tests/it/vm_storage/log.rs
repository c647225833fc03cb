//! The console log across rotations.

use std::fs;
use std::io::Write;
use std::path::PathBuf;

use ghost_domain::VmId;
use ghost_domain::ports::{LogReader, VmStorage};

use super::Fixture;

struct Log {
    fixture: Fixture,
    vm: VmId,
    path: PathBuf,
}

impl Log {
    async fn new() -> Self {
        let fixture = Fixture::new();
        let vm = VmId::random();
        fixture.storage.create_folder(vm).await.unwrap();
        let path = fixture.storage.console_log_path(vm);
        Self { fixture, vm, path }
    }

    fn backup(&self, index: usize) -> PathBuf {
        PathBuf::from(format!("{}.{index}", self.path.display()))
    }

    /// As virtlogd does it.
    fn rotate(&self) {
        for index in (0..3).rev() {
            if self.backup(index).exists() {
                fs::rename(self.backup(index), self.backup(index + 1)).unwrap();
            }
        }
        fs::rename(&self.path, self.backup(0)).unwrap();
    }

    fn write(&self, text: &str) {
        fs::File::options()
            .append(true)
            .create(true)
            .open(&self.path)
            .unwrap()
            .write_all(text.as_bytes())
            .unwrap();
    }

    async fn open(&self, tail: Option<u64>) -> Box<dyn LogReader> {
        self.fixture.storage.open_log(self.vm, tail).await.unwrap()
    }
}

/// Everything that is there now.
async fn drain(reader: &mut Box<dyn LogReader>) -> String {
    let mut text = Vec::new();
    loop {
        let bytes = reader.read().await.unwrap();
        if bytes.is_empty() {
            return String::from_utf8(text).unwrap();
        }
        text.extend(bytes);
    }
}

#[tokio::test]
async fn it_follows_across_rotations() {
    let log = Log::new().await;
    let mut reader = log.open(None).await;
    assert_eq!(drain(&mut reader).await, "");
    log.write("one ");
    assert_eq!(drain(&mut reader).await, "one ");
    log.write("two ");
    log.rotate();
    log.write("three ");
    assert_eq!(drain(&mut reader).await, "two three ");
    // Two rotations between two reads.
    log.write("four ");
    log.rotate();
    log.write("five ");
    log.rotate();
    assert_eq!(drain(&mut reader).await, "four five ");
    log.write("six ");
    assert_eq!(drain(&mut reader).await, "six ");
    // So many that the file being read is gone by name: what is left is shown.
    for text in ["a ", "b ", "c ", "d ", "e "] {
        log.rotate();
        log.write(text);
    }
    let text = drain(&mut reader).await;
    assert!(text.ends_with("c d e "), "{text}");
    assert_eq!(drain(&mut log.open(Some(4)).await).await, "d e ");
}

#[tokio::test]
async fn the_tail_reaches_into_older_files() {
    let log = Log::new().await;
    log.write("0123456789");
    log.rotate();
    log.write("abcdefghij");
    log.rotate();
    log.write("XYZ");
    for (tail, expected) in [
        (None, "0123456789abcdefghijXYZ"),
        (Some(0), ""),
        (Some(2), "YZ"),
        (Some(3), "XYZ"),
        (Some(5), "ijXYZ"),
        (Some(15), "89abcdefghijXYZ"),
        (Some(1000), "0123456789abcdefghijXYZ"),
    ] {
        assert_eq!(drain(&mut log.open(tail).await).await, expected, "{tail:?}");
    }
    let mut reader = log.open(Some(0)).await;
    log.write(" more");
    assert_eq!(drain(&mut reader).await, " more");
    // Just rotated, nothing new yet.
    log.rotate();
    assert_eq!(drain(&mut log.open(Some(4)).await).await, "more");
}

#[tokio::test]
async fn a_log_emptied_in_place_starts_over() {
    let log = Log::new().await;
    log.write("first boot");
    let mut reader = log.open(None).await;
    assert_eq!(drain(&mut reader).await, "first boot");
    fs::File::create(&log.path).unwrap();
    log.write("second");
    assert_eq!(drain(&mut reader).await, "second");
}

#[tokio::test]
async fn a_dropped_read_loses_nothing() {
    let log = Log::new().await;
    log.write("all of it");
    let mut reader = log.open(None).await;
    let mut text = String::new();
    for _ in 0..50 {
        let mut read = reader.read();
        // Polled once, then dropped; a worker may be quick enough to have it ready.
        if let std::task::Poll::Ready(bytes) = futures::poll!(&mut read) {
            text.push_str(std::str::from_utf8(&bytes.unwrap()).unwrap());
        }
    }
    text.push_str(&drain(&mut reader).await);
    assert_eq!(text, "all of it");
}

#[tokio::test]
async fn a_link_in_place_of_the_log_is_not_followed() {
    let log = Log::new().await;
    std::os::unix::fs::symlink("/etc/hostname", &log.path).unwrap();
    assert!(log.fixture.storage.open_log(log.vm, None).await.is_err());
}
