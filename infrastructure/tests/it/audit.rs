//! The audit log: what it keeps, and what it notices.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ghost_domain::VmId;
use ghost_domain::guest::AuditRecord;
use ghost_domain::ports::AuditLog;
use ghost_infrastructure::audit::{AuditOptions, FileAuditLog};
use ghost_infrastructure::clock::SystemClock;

fn options(folder: &Path) -> AuditOptions {
    AuditOptions::new(folder, Arc::new(SystemClock::new()))
}

fn record(number: u64) -> AuditRecord {
    AuditRecord {
        principal: "uid 0".into(),
        action: "exec".into(),
        detail: format!("program \"/bin/true\" {number}\n\u{1b}[31m"),
        outcome: "ok".into(),
        bytes_out: number,
        duration: Some(Duration::from_millis(number)),
        ..AuditRecord::default()
    }
}

/// A log with so many entries, closed again; its only file.
async fn filled(folder: &Path, count: u64) -> PathBuf {
    let log = FileAuditLog::open(options(folder)).unwrap();
    for number in 1..=count {
        let entry = log.append(record(number)).await.unwrap();
        assert_eq!(entry.sequence, number);
    }
    let verdict = log.verify().await.unwrap();
    assert_eq!((verdict.entries, verdict.broken), (count, None));
    folder.join("audit/audit-00000000000000000001.jsonl")
}

async fn broken(folder: &Path) -> Option<(u64, String)> {
    let log = FileAuditLog::open(options(folder)).unwrap();
    log.verify().await.unwrap().broken
}

fn lines(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().map(str::to_owned).collect()
}

fn put(path: &Path, lines: &[String]) {
    fs::write(
        path,
        lines
            .iter()
            .map(|line| format!("{line}\n"))
            .collect::<String>(),
    )
    .unwrap();
}

#[tokio::test]
async fn entries_are_kept_and_the_chain_goes_on_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let file = filled(folder.path(), 3).await;
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(file.parent().unwrap()), mode(&file)), (0o700, 0o600));
    let log = FileAuditLog::open(options(folder.path())).unwrap();
    let entry = log.append(record(4)).await.unwrap();
    assert_eq!(entry.sequence, 4);
    let verdict = log.verify().await.unwrap();
    assert_eq!((verdict.entries, verdict.broken), (4, None));
    assert_eq!(verdict.head, entry.hash);
    let all = log.list(None, None, 100).await.unwrap();
    assert_eq!(all.len(), 4);
    assert_eq!(all[3], entry);
    assert_eq!(all[1].record, record(2));
}

#[tokio::test]
async fn listings_are_of_one_vm_and_a_time_and_the_newest() {
    let folder = tempfile::tempdir().unwrap();
    let log = FileAuditLog::open(options(folder.path())).unwrap();
    let vm = VmId::random();
    for number in 0..10 {
        let mut record = record(number);
        if number % 2 == 0 {
            record.vm_id = vm.to_string();
        }
        log.append(record).await.unwrap();
    }
    let found = log.list(Some(vm), None, 3).await.unwrap();
    let numbers: Vec<u64> = found.iter().map(|entry| entry.record.bytes_out).collect();
    assert_eq!(numbers, [4, 6, 8]);
    let since = found[2].at;
    assert!(
        log.list(None, Some(since), 100)
            .await
            .unwrap()
            .iter()
            .all(|entry| entry.at >= since)
    );
    assert!(
        log.list(None, Some(since.after(Duration::from_secs(60))), 100)
            .await
            .unwrap()
            .is_empty()
    );
    assert!(log.list(None, None, 0).await.unwrap().is_empty());
}

#[tokio::test]
async fn every_kind_of_tampering_is_found_where_it_was_done() {
    type Change = fn(&mut Vec<String>);
    let changes: [(&str, u64, Change); 8] = [
        ("edited", 3, |lines| {
            lines[2] = lines[2].replace("/bin/true", "/bin/sh!!")
        }),
        ("time changed", 2, |lines| {
            lines[1] = lines[1].replacen("\"at_unix_millis\":", "\"at_unix_millis\":1", 1);
        }),
        ("removed", 3, |lines| drop(lines.remove(2))),
        ("first removed", 1, |lines| drop(lines.remove(0))),
        ("reordered", 2, |lines| lines.swap(1, 3)),
        ("inserted", 4, |lines| lines.insert(3, lines[0].clone())),
        ("cut off", 5, |lines| lines.truncate(4)),
        ("emptied", 1, Vec::clear),
    ];
    for (what, place, change) in changes {
        let folder = tempfile::tempdir().unwrap();
        let file = filled(folder.path(), 6).await;
        let mut all = lines(&file);
        change(&mut all);
        put(&file, &all);
        let (at, why) = broken(folder.path())
            .await
            .unwrap_or_else(|| panic!("{what}: not found"));
        assert_eq!(at, place, "{what}: {why}");
        // It stays found: what is written afterwards does not heal it.
        let log = FileAuditLog::open(options(folder.path())).unwrap();
        log.append(record(99)).await.unwrap();
        assert_eq!(
            log.verify().await.unwrap().broken.unwrap().0,
            place,
            "{what}"
        );
    }
}

#[tokio::test]
async fn every_changed_byte_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let file = filled(folder.path(), 2).await;
    let good = fs::read(&file).unwrap();
    for at in (0..good.len()).step_by(7).chain([good.len() - 1]) {
        let mut bad = good.clone();
        bad[at] ^= 1;
        fs::write(&file, &bad).unwrap();
        assert!(broken(folder.path()).await.is_some(), "byte {at}");
        fs::remove_dir_all(folder.path().join("audit")).unwrap();
        filled(folder.path(), 2).await;
    }
}

#[tokio::test]
async fn tampering_under_a_running_agent_is_found_too() {
    let folder = tempfile::tempdir().unwrap();
    let log = FileAuditLog::open(options(folder.path())).unwrap();
    for number in 1..=4 {
        log.append(record(number)).await.unwrap();
    }
    let file = folder.path().join("audit/audit-00000000000000000001.jsonl");
    let mut all = lines(&file);
    all.truncate(3);
    put(&file, &all);
    // Whoever cuts the log off may cut its note too: this process knows better.
    fs::remove_file(folder.path().join("audit/head")).unwrap();
    assert_eq!(log.verify().await.unwrap().broken.unwrap().0, 4);
}

#[tokio::test]
async fn a_torn_last_line_is_repaired_and_the_log_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let file = filled(folder.path(), 3).await;
    let whole = fs::read(&file).unwrap();
    let mut torn = whole.clone();
    torn.extend_from_slice(&whole[..100]);
    fs::write(&file, &torn).unwrap();
    let log = FileAuditLog::open(options(folder.path())).unwrap();
    let verdict = log.verify().await.unwrap();
    assert_eq!((verdict.entries, verdict.broken), (4, None));
    let told = log.list(None, None, 1).await.unwrap().remove(0);
    assert_eq!(told.record.action, "audit_opened");
    assert!(
        told.record.detail.contains("100 bytes"),
        "{:?}",
        told.record
    );
}

/// An entry that was acknowledged is not taken for one that a power cut left unfinished.
#[tokio::test]
async fn a_torn_entry_that_was_acknowledged_is_tampering() {
    let folder = tempfile::tempdir().unwrap();
    let file = filled(folder.path(), 3).await;
    let whole = fs::read(&file).unwrap();
    fs::write(&file, &whole[..whole.len() - 20]).unwrap();
    assert_eq!(broken(folder.path()).await.unwrap().0, 3);
}

#[tokio::test]
async fn old_files_go_and_the_chain_still_holds() {
    let folder = tempfile::tempdir().unwrap();
    let small = || AuditOptions {
        max_file_bytes: 2_000,
        max_files: 3,
        ..options(folder.path())
    };
    let log = FileAuditLog::open(small()).unwrap();
    for number in 1..=60 {
        log.append(record(number)).await.unwrap();
    }
    let count = || {
        let names = fs::read_dir(folder.path().join("audit")).unwrap();
        names
            .filter(|name| {
                name.as_ref()
                    .unwrap()
                    .file_name()
                    .to_string_lossy()
                    .starts_with("audit-")
            })
            .count()
    };
    assert_eq!(count(), 3);
    let verdict = log.verify().await.unwrap();
    assert!(verdict.entries < 60 && verdict.entries > 5, "{verdict:?}");
    assert_eq!(verdict.broken, None);
    assert_eq!(log.list(None, None, 5).await.unwrap()[4].sequence, 60);
    assert_eq!(
        log.list(None, None, 1000).await.unwrap().len() as u64,
        verdict.entries
    );
    drop(log);
    let log = FileAuditLog::open(small()).unwrap();
    assert_eq!(log.append(record(61)).await.unwrap().sequence, 61);
    assert_eq!(log.verify().await.unwrap().broken, None);
    drop(log);
    // A file from the middle is missed.
    let mut names: Vec<_> = fs::read_dir(folder.path().join("audit"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|kind| kind == "jsonl"))
        .collect();
    names.sort();
    fs::remove_file(&names[1]).unwrap();
    let log = FileAuditLog::open(small()).unwrap();
    assert!(log.verify().await.unwrap().broken.is_some());
}

#[tokio::test]
async fn many_at_once_are_all_written() {
    let folder = tempfile::tempdir().unwrap();
    let log = Arc::new(FileAuditLog::open(options(folder.path())).unwrap());
    let tasks: Vec<_> = (0..500)
        .map(|number| {
            let log = Arc::clone(&log);
            tokio::spawn(async move { log.append(record(number)).await.unwrap().sequence })
        })
        .collect();
    let mut seen = std::collections::BTreeSet::new();
    for task in tasks {
        seen.insert(task.await.unwrap());
    }
    assert_eq!(seen, (1..=500).collect());
    assert_eq!(log.verify().await.unwrap().broken, None);
}

#[tokio::test]
async fn a_link_in_the_place_of_the_log_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let elsewhere = folder.path().join("elsewhere");
    fs::write(&elsewhere, "mine\n").unwrap();
    fs::create_dir(folder.path().join("audit")).unwrap();
    std::os::unix::fs::symlink(
        &elsewhere,
        folder.path().join("audit/audit-00000000000000000001.jsonl"),
    )
    .unwrap();
    assert!(FileAuditLog::open(options(folder.path())).is_err());
    assert_eq!(fs::read_to_string(&elsewhere).unwrap(), "mine\n");
}
