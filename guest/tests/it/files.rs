//! Files.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use ghost_guest::{Capability, Options};
use ghost_proto::guest::v1::agent_message::Payload;
use ghost_proto::guest::v1::{
    Cancel, FileAttributes, FileKind, FileListRequest, FileReadRequest, FileStatRequest,
    FileWriteRequest, MakeDirectoryRequest, MakeLinkRequest, Stream, file_read_response,
    file_write_response,
};
use ghost_proto::guest::{Flow, NEWEST_VERSION};
use prost_types::Timestamp;
use twox_hash::XxHash64;

use crate::host::{Host, Id, code, sh};

fn host(root: &Path) -> Host {
    Host::greeted(Options {
        roots: vec![root.to_path_buf()],
        ..Options::default()
    })
}

fn sum(bytes: &[u8]) -> Vec<u8> {
    XxHash64::oneshot(0, bytes).to_be_bytes().to_vec()
}

fn content(size: usize) -> Vec<u8> {
    (0..size).map(|at| (at * 7 % 253) as u8).collect()
}

fn request(path: &Path, bytes: &[u8]) -> FileWriteRequest {
    FileWriteRequest {
        path: path.to_str().unwrap().into(),
        attributes: Some(FileAttributes {
            size_bytes: bytes.len() as u64,
            mode: 0o640,
            uid: 4711,
            gid: 4712,
            modified_at: Some(Timestamp {
                seconds: 1_000_000_000,
                nanos: 5,
            }),
            ..FileAttributes::default()
        }),
        checksum: sum(bytes),
        ..FileWriteRequest::default()
    }
}

/// Begins to write; says from where on.
fn begin(host: &mut Host, request: FileWriteRequest) -> Result<(Id, u64), String> {
    let id = host.call(Payload::FileWrite(request));
    match host.next(&id) {
        Payload::FileWriteResponse(response) => match response.event {
            Some(file_write_response::Event::Accepted(accepted)) => Ok((id, accepted.offset)),
            other => panic!("{other:?}"),
        },
        other => Err(code(other)),
    }
}

/// Sends bytes within the window; gives the answer to the end, if that was sent.
fn send(host: &mut Host, id: &Id, bytes: &[u8], end: bool) -> Option<Payload> {
    let flow = Flow::of(Stream::File, host.version);
    let mut credit = flow.window;
    let mut chunks = bytes.chunks(flow.most).peekable();
    if bytes.is_empty() {
        host.data(id, Stream::File, &[], end);
    }
    while let Some(chunk) = chunks.next() {
        while credit < chunk.len() as u64 {
            match host.next(id) {
                Payload::WindowUpdate(update) => credit += update.bytes,
                other => return Some(other),
            }
        }
        credit -= chunk.len() as u64;
        host.data(id, Stream::File, chunk, end && chunks.peek().is_none());
    }
    end.then(|| {
        loop {
            match host.next(id) {
                Payload::WindowUpdate(_) => {}
                other => return other,
            }
        }
    })
}

fn write(host: &mut Host, request: FileWriteRequest, bytes: &[u8]) -> Payload {
    let (id, offset) = begin(host, request).unwrap();
    send(host, &id, &bytes[usize::try_from(offset).unwrap()..], true).unwrap()
}

fn read(host: &mut Host, path: &Path, offset: u64, length: u64) -> Result<Vec<u8>, String> {
    let id = host.call(Payload::FileRead(FileReadRequest {
        path: path.to_str().unwrap().into(),
        offset,
        length,
    }));
    let mut bytes = Vec::new();
    loop {
        match host.next(&id) {
            Payload::FileReadResponse(response) => match response.event.unwrap() {
                file_read_response::Event::Opened(_) => {}
                file_read_response::Event::Finished(finished) => {
                    assert_eq!(finished.size_bytes, bytes.len() as u64);
                    assert_eq!(finished.checksum, sum(&bytes));
                    return Ok(bytes);
                }
            },
            Payload::StreamData(data) => {
                host.grant(&id, data.stream, data.data.len() as u64);
                bytes.extend_from_slice(&data.data);
            }
            other => return Err(code(other)),
        }
    }
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_file_comes_and_goes_unchanged() {
    let root = tempfile::tempdir().unwrap();
    let mut host = host(root.path());
    let bytes = content(3_000_001);
    let path = root.path().join("a/b/file");
    let mut wanted = request(&path, &bytes);
    assert_eq!(begin(&mut host, wanted.clone()).unwrap_err(), "not_found");
    wanted.make_parents = true;
    wanted.keep_owner = rustix::process::geteuid().is_root();
    let Payload::FileWriteResponse(answer) = write(&mut host, wanted.clone(), &bytes) else {
        panic!("not written");
    };
    let Some(file_write_response::Event::Written(written)) = answer.event else {
        panic!("{answer:?}");
    };
    assert_eq!(
        (written.size_bytes, written.checksum),
        (3_000_001, sum(&bytes))
    );
    assert_eq!(fs::read(&path).unwrap(), bytes);
    let data = fs::metadata(&path).unwrap();
    assert_eq!((data.mode() & 0o7777, data.mtime()), (0o640, 1_000_000_000));
    if wanted.keep_owner {
        assert_eq!((data.uid(), data.gid()), (4711, 4712));
    }
    assert_eq!(names(path.parent().unwrap()), ["file"]);
    assert_eq!(read(&mut host, &path, 0, 0).unwrap(), bytes);
    assert_eq!(read(&mut host, &path, 5, 1000).unwrap(), bytes[5..1005]);
    assert_eq!(
        read(&mut host, &path, 3_000_000, 1000).unwrap(),
        bytes[3_000_000..]
    );
    assert!(read(&mut host, &path, 1 << 40, 0).unwrap().is_empty());
    // Replaced, unless that was not wanted.
    write(&mut host, request(&path, b"new"), b"new");
    assert_eq!(fs::read(&path).unwrap(), b"new");
    let mut keep = request(&path, b"newer");
    keep.no_replace = true;
    assert_eq!(begin(&mut host, keep).unwrap_err(), "exists");
    // An empty one, and one of unknown size.
    let empty = root.path().join("empty");
    write(&mut host, request(&empty, b""), b"");
    assert_eq!(fs::metadata(&empty).unwrap().len(), 0);
    let mut piped = request(&empty, b"");
    piped.checksum = Vec::new();
    write(&mut host, piped, b"from a pipe");
    assert_eq!(fs::read(&empty).unwrap(), b"from a pipe");
    assert_eq!(names(root.path()), ["a", "empty"]);
}

/// A host of the protocol's first version is served as ever, and never sent what it does not know.
#[test]
fn files_travel_within_the_checksum_where_the_host_knows_no_other_way() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("old");
    let bytes = content(300_000);
    let mut bulk = Vec::new();
    for version in [1, NEWEST_VERSION] {
        let mut host = host(root.path());
        host.version = version;
        assert_eq!(host.hello(None).protocol_version, version);
        let written = write(&mut host, request(&path, &bytes), &bytes);
        assert!(
            matches!(written, Payload::FileWriteResponse(_)),
            "{written:?}"
        );
        assert_eq!(read(&mut host, &path, 0, 0).unwrap(), bytes);
        bulk.push(host.bulk);
    }
    assert_eq!(bulk[0], 0);
    assert!(bulk[1] >= 300_000 / Flow::FILE.most, "{bulk:?}");
}

#[test]
fn a_wrong_checksum_leaves_the_old_file_and_nothing_else() {
    let root = tempfile::tempdir().unwrap();
    let mut host = host(root.path());
    let path = root.path().join("file");
    fs::write(&path, "old").unwrap();
    let answer = write(&mut host, request(&path, b"good"), b"evil");
    assert_eq!(code(answer), "checksum_mismatch");
    let answer = write(&mut host, request(&path, b"goods"), b"good");
    assert_eq!(code(answer), "checksum_mismatch");
    let answer = write(&mut host, request(&path, b"goo"), b"good");
    assert_eq!(code(answer), "invalid_argument");
    assert_eq!(fs::read(&path).unwrap(), b"old");
}

#[test]
fn a_broken_copy_is_gone_on_with() {
    let root = tempfile::tempdir().unwrap();
    let bytes = content(1_000_000);
    let path = root.path().join("file");
    let mut wanted = request(&path, &bytes);
    wanted.resume = true;
    {
        let mut host = host(root.path());
        let (id, offset) = begin(&mut host, wanted.clone()).unwrap();
        assert_eq!(offset, 0);
        assert!(send(&mut host, &id, &bytes[..400_000], false).is_none());
        // Two at once would write into each other.
        assert_eq!(begin(&mut host, wanted.clone()).unwrap_err(), "busy");
        crate::host::until("all is written", || {
            names(root.path())
                .iter()
                .any(|name| fs::metadata(root.path().join(name)).unwrap().len() == 400_000)
        });
        host.send(&id, Payload::Cancel(Cancel {}));
        let answer = loop {
            match host.next(&id) {
                Payload::WindowUpdate(_) => {}
                other => break other,
            }
        };
        assert_eq!(code(answer), "cancelled");
    }
    let mut host = host(root.path());
    let (id, offset) = begin(&mut host, wanted.clone()).unwrap();
    assert_eq!(offset, 400_000);
    let answer = send(&mut host, &id, &bytes[400_000..], true).unwrap();
    assert!(
        matches!(answer, Payload::FileWriteResponse(_)),
        "{answer:?}"
    );
    assert_eq!(fs::read(&path).unwrap(), bytes);
    assert_eq!(names(root.path()), ["file"]);
    // What an earlier try left and was damaged meanwhile is found out, and the next try is clean.
    let (id, _) = begin(&mut host, wanted.clone()).unwrap();
    send(&mut host, &id, &bytes[..100_000], false);
    let part = root.path().join(&names(root.path())[0]);
    crate::host::until("it is written", || {
        fs::metadata(&part).unwrap().len() == 100_000
    });
    host.hello(None);
    let mut damaged = fs::read(&part).unwrap();
    damaged[5] ^= 1;
    fs::write(&part, damaged).unwrap();
    crate::host::until("the old call has let go", || {
        match begin(&mut host, wanted.clone()) {
            Err(code) => {
                assert_eq!(code, "busy");
                false
            }
            Ok((id, offset)) => {
                assert_eq!(offset, 100_000);
                let answer = send(&mut host, &id, &bytes[100_000..], true).unwrap();
                assert_eq!(code(answer), "checksum_mismatch");
                true
            }
        }
    });
    assert_eq!(begin(&mut host, wanted).unwrap().1, 0);
}

#[test]
fn stale_leftovers_are_swept_and_others_files_are_not() {
    let root = tempfile::tempdir().unwrap();
    let mut host = host(root.path());
    let stale = root
        .path()
        .join(".ghost-00112233445566778899aabbccddeeff.part");
    let fresh = root
        .path()
        .join(".ghost-ff112233445566778899aabbccddeeff.part");
    let other = root.path().join(".ghost-my-own.part");
    for path in [&stale, &fresh, &other] {
        fs::write(path, "x").unwrap();
    }
    let old = std::time::SystemTime::now() - std::time::Duration::from_secs(90_000);
    for path in [&stale, &other] {
        fs::File::options()
            .write(true)
            .open(path)
            .unwrap()
            .set_modified(old)
            .unwrap();
    }
    write(&mut host, request(&root.path().join("file"), b"x"), b"x");
    assert!(!stale.exists() && fresh.exists() && other.exists());
}

#[test]
fn nothing_leads_out_of_the_roots() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), "secret").unwrap();
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    symlink(outside.path(), at("absolute")).unwrap();
    symlink("../../../../../../..", at("up")).unwrap();
    symlink("/proc/self/root", at("magic")).unwrap();
    symlink(outside.path().join("secret"), at("file")).unwrap();
    fs::create_dir(at("inside")).unwrap();
    fs::write(at("inside/good"), "good").unwrap();
    symlink("inside", at("fine")).unwrap();
    let mut host = host(root.path());
    assert_eq!(read(&mut host, &at("fine/good"), 0, 0).unwrap(), b"good");
    let secret = outside.path().strip_prefix("/").unwrap().join("secret");
    for path in [
        at("absolute/secret"),
        at("up").join(&secret),
        at("magic").join(&secret),
        at("file"),
        outside.path().join("secret"),
        at("inside/../../secret"),
    ] {
        assert_eq!(
            read(&mut host, &path, 0, 0).unwrap_err(),
            "outside_roots",
            "{path:?}"
        );
    }
    for path in [
        at("absolute/new"),
        at("up").join("tmp/new"),
        at("magic").join("tmp/new"),
    ] {
        let refused = begin(&mut host, request(&path, b"x")).unwrap_err();
        assert_eq!(refused, "outside_roots", "{path:?}");
        let refused = host.ask(Payload::MakeDirectory(MakeDirectoryRequest {
            path: path.to_str().unwrap().into(),
            make_parents: true,
            ..MakeDirectoryRequest::default()
        }));
        assert_eq!(code(refused), "outside_roots", "{path:?}");
    }
    // A link at the target's place is replaced, not followed.
    write(&mut host, request(&at("file"), b"mine"), b"mine");
    assert_eq!(fs::read(at("file")).unwrap(), b"mine");
    assert_eq!(fs::read(outside.path().join("secret")).unwrap(), b"secret");
}

#[test]
fn links_are_made_and_never_followed() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), "secret").unwrap();
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    fs::create_dir_all(at("dir/inside")).unwrap();
    fs::write(at("file"), "old").unwrap();
    let mut host = host(root.path());
    let link = |path: &Path, says: &str| {
        Payload::MakeLink(MakeLinkRequest {
            path: path.to_str().unwrap().into(),
            target: says.into(),
            modified_at: Some(prost_types::Timestamp {
                seconds: 1_500_000_000,
                nanos: 7,
            }),
            ..MakeLinkRequest::default()
        })
    };
    let away = outside.path().to_str().unwrap().to_owned();
    // In a new place, in a file's and in a link's; the last one says is there.
    for (name, says) in [
        ("new", "dir"),
        ("file", "/no/such/\u{1b}thing"),
        ("new", &away),
        ("up", "../../../../../../.."),
    ] {
        let answer = host.ask(link(&at(name), says));
        assert!(matches!(answer, Payload::Done(_)), "{name}: {answer:?}");
        assert_eq!(fs::read_link(at(name)).unwrap(), Path::new(says));
        let known = at(name).symlink_metadata().unwrap();
        assert_eq!((known.mtime(), known.mtime_nsec()), (1_500_000_000, 7));
    }
    // What was made leads nowhere for those who ask: it is replaced, and not gone through.
    for path in [at("new/secret"), at("new/x"), at("up").join("tmp/x")] {
        assert_eq!(
            code(host.ask(link(&path, "x"))),
            "outside_roots",
            "{path:?}"
        );
        let refused = begin(&mut host, request(&path, b"x")).unwrap_err();
        assert_eq!(refused, "outside_roots", "{path:?}");
        assert_eq!(read(&mut host, &path, 0, 0).unwrap_err(), "outside_roots");
    }
    write(&mut host, request(&at("new"), b"mine"), b"mine");
    assert!(at("new").is_file() && !at("new").is_symlink());
    for (path, says, refusal) in [
        (at("dir"), "x", "not_a_file"),
        (at("dir/inside"), "x", "not_a_file"),
        (at("none/x"), "x", "not_found"),
        (at("x"), "", "invalid_argument"),
        (at("x"), "a\0b", "invalid_argument"),
        (at("x"), &"y".repeat(4096), "invalid_argument"),
        (outside.path().join("x"), "x", "outside_roots"),
    ] {
        assert_eq!(code(host.ask(link(&path, says))), refusal, "{path:?}");
    }
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
    // Nothing of a try that failed stays.
    let mut left: Vec<_> = fs::read_dir(root.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    assert_eq!(left, ["dir", "file", "new", "up"]);

    // Its owner may have none of it; without files there are none either.
    for gone in [Capability::Links, Capability::Files] {
        let mut options = Options::default();
        options.capabilities.retain(|one| *one != gone);
        let mut host = Host::greeted(options);
        let refused = code(host.ask(link(&at("never"), "x")));
        assert_eq!(refused, "permission_denied", "{gone:?}");
    }
    assert!(at("never").symlink_metadata().is_err());
}

#[test]
fn the_whole_guest_as_root_has_no_magic_doors_either() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("file"), "x").unwrap();
    symlink(directory.path().join("file"), directory.path().join("link")).unwrap();
    let mut host = Host::greeted(Options::default());
    assert_eq!(
        read(&mut host, &directory.path().join("link"), 0, 0).unwrap(),
        b"x"
    );
    for door in [
        "/proc/self/root",
        "/proc/self/cwd",
        "/proc/thread-self/root",
    ] {
        let path = Path::new(door).join("etc/passwd");
        assert_eq!(
            read(&mut host, &path, 0, 0).unwrap_err(),
            "outside_roots",
            "{door}"
        );
    }
    // Of unknown size, and still read to its end.
    assert!(
        !read(&mut host, Path::new("/proc/version"), 0, 0)
            .unwrap()
            .is_empty()
    );
}

#[test]
fn what_is_no_file_is_not_read_or_replaced() {
    let root = tempfile::tempdir().unwrap();
    let mut host = host(root.path());
    let pipe = root.path().join("pipe");
    assert_eq!(
        host.run(sh(&format!("mkfifo {}", pipe.display())))
            .exited
            .code,
        0
    );
    assert_eq!(read(&mut host, &pipe, 0, 0).unwrap_err(), "not_a_file");
    assert_eq!(
        read(&mut host, root.path(), 0, 0).unwrap_err(),
        "not_a_file"
    );
    assert_eq!(
        begin(&mut host, request(&pipe, b"x")).unwrap_err(),
        "not_a_file"
    );
    fs::create_dir(root.path().join("directory")).unwrap();
    let refused = begin(&mut host, request(&root.path().join("directory"), b"x"));
    assert_eq!(refused.unwrap_err(), "not_a_file");
    assert_eq!(
        begin(&mut host, request(root.path(), b"x")).unwrap_err(),
        "invalid_argument"
    );
}

#[test]
fn an_unread_file_stalls_no_other_call() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("large");
    fs::write(&path, content(2_000_000)).unwrap();
    let mut host = host(root.path());
    let id = host.call(Payload::FileRead(FileReadRequest {
        path: path.to_str().unwrap().into(),
        ..FileReadRequest::default()
    }));
    let mut seen = 0;
    while seen < Flow::FILE.window {
        if let Payload::StreamData(data) = host.next(&id) {
            seen += data.data.len() as u64;
        }
    }
    assert_eq!(seen, Flow::FILE.window);
    assert_eq!(host.run(sh("echo here")).text(), "here\n");
    host.send(&id, Payload::Cancel(Cancel {}));
    assert_eq!(code(host.next(&id)), "cancelled");
}

#[test]
fn directories_are_made_listed_and_told_of() {
    let root = tempfile::tempdir().unwrap();
    let mut host = host(root.path());
    let path = |name: &str| root.path().join(name).to_str().unwrap().to_owned();
    let make = |path: String, make_parents: bool| {
        Payload::MakeDirectory(MakeDirectoryRequest {
            path,
            mode: 0o750,
            make_parents,
            ..MakeDirectoryRequest::default()
        })
    };
    assert_eq!(code(host.ask(make(path("a/b/c"), false))), "not_found");
    assert!(matches!(
        host.ask(make(path("a/b/c"), true)),
        Payload::Done(_)
    ));
    assert!(matches!(
        host.ask(make(path("a/b/c"), true)),
        Payload::Done(_)
    ));
    assert_eq!(code(host.ask(make(path("a/b/c"), false))), "exists");
    let mode = fs::metadata(root.path().join("a/b/c"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o7777, 0o750);
    for at in 0..25 {
        fs::write(root.path().join(format!("a/b/c/{at:02}")), "x").unwrap();
    }
    symlink("00", root.path().join("a/b/c/link")).unwrap();
    let mut all = Vec::new();
    let mut after = String::new();
    loop {
        let Payload::FileListResponse(page) = host.ask(Payload::FileList(FileListRequest {
            path: path("a/b/c"),
            after: after.clone(),
            limit: 10,
        })) else {
            panic!("no list");
        };
        assert!(page.entries.len() <= 10);
        all.extend(page.entries);
        if !page.more {
            break;
        }
        after = all.last().unwrap().name.clone();
    }
    assert_eq!(all.len(), 26);
    assert!(all.is_sorted_by(|a, b| a.name < b.name));
    let last = all.last().unwrap().attributes.as_ref().unwrap();
    assert_eq!(
        (last.kind(), last.symlink_target.as_str()),
        (FileKind::Symlink, "00")
    );
    let stat = |host: &mut Host, path: String, follow: bool| match host
        .ask(Payload::FileStat(FileStatRequest { path, follow }))
    {
        Payload::FileStatResponse(response) => Ok(response.attributes.unwrap()),
        other => Err(code(other)),
    };
    assert_eq!(
        stat(&mut host, path("a/b/c/link"), false).unwrap().kind(),
        FileKind::Symlink
    );
    let followed = stat(&mut host, path("a/b/c/link"), true).unwrap();
    assert_eq!((followed.kind(), followed.size_bytes), (FileKind::File, 1));
    assert_eq!(
        stat(&mut host, path("."), false).unwrap().kind(),
        FileKind::Directory
    );
    assert_eq!(
        stat(&mut host, path("none"), false).unwrap_err(),
        "not_found"
    );
}
