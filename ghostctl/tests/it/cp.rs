//! Files and directories into guests and out of them.

use std::fs;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, SystemTime};

use ghost_proto::agent::v1::{GuestFile, GuestFileKind};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::run::{Person, finish, words};

const PART: u64 = 64 << 20;

fn write(path: impl AsRef<Path>, content: impl AsRef<[u8]>, mode: u32) {
    fs::create_dir_all(path.as_ref().parent().unwrap()).unwrap();
    fs::write(&path, content).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    let then = SystemTime::UNIX_EPOCH + Duration::new(1_500_000_000, 123_000_000);
    let file = fs::File::options().read(true).open(&path).unwrap();
    file.set_modified(then).unwrap();
}

fn noise(size: u32) -> Vec<u8> {
    (0..size)
        .map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect()
}

/// A tree with all that a tree has.
fn grow(root: &Path) {
    write(root.join("a.txt"), "a", 0o640);
    write(root.join("bin/run"), "#!/bin/sh\n", 0o4755);
    write(root.join("bin/deep/er/empty"), "", 0o600);
    write(root.join("Grüße mit Leer"), noise(700_000), 0o644);
    fs::create_dir(root.join("hollow")).unwrap();
    fs::set_permissions(root.join("hollow"), fs::Permissions::from_mode(0o711)).unwrap();
    for number in 0..20 {
        write(
            root.join(format!("many/{number}")),
            number.to_string(),
            0o644,
        );
    }
}

/// Every path below with its mode, time and content.
fn picture(root: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    let mut open = vec![root.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            let known = fs::symlink_metadata(&path).unwrap();
            let name = path.strip_prefix(root).unwrap().display().to_string();
            let mode = known.mode() & 0o777;
            if known.is_dir() {
                lines.push(format!("{name}/ {mode:o}"));
                open.push(path);
            } else if known.is_symlink() {
                let says = fs::read_link(&path).unwrap();
                lines.push(format!("{name} -> {}", says.display()));
            } else {
                let sum: u64 = fs::read(&path).unwrap().iter().map(|b| u64::from(*b)).sum();
                let (seconds, nanos) = (known.mtime(), known.mtime_nsec());
                lines.push(format!(
                    "{name} {mode:o} {} {sum} {seconds}.{nanos}",
                    known.len()
                ));
            }
        }
    }
    lines.sort();
    lines
}

#[test]
fn a_tree_goes_in_and_comes_out_as_it_was() {
    let person = Person::new();
    let (home, guest) = (person.home.path(), &person.agent.state.guest);
    grow(&home.join("tree"));
    fs::create_dir(guest.path("/srv")).unwrap();
    let said = person.says("cp tree web-1:/srv -q");
    assert!(
        said.contains("Copied 24 files and 6 directories (683.6 KiB) to web-1:/srv\n"),
        "{said}"
    );
    assert!(said.ends_with("[exit 0]\n"), "{said}");
    assert_eq!(
        picture(&guest.path("/srv/tree")),
        picture(&home.join("tree"))
    );
    // The whole mode goes in, and the owner.
    assert_eq!(
        guest.path("/srv/tree/bin/run").metadata().unwrap().mode() & 0o7777,
        0o4755
    );
    let mine = fs::metadata(home.join("tree")).unwrap();
    let owners = guest.owners.lock().unwrap().clone();
    assert_eq!(owners["/srv/tree/bin/run"], (mine.uid(), mine.gid()));
    assert_eq!(owners["/srv/tree/hollow"], (mine.uid(), mine.gid()));

    let said = person.says("cp web-1:/srv/tree back -q");
    assert!(said.ends_with("[exit 0]\n"), "{said}");
    assert_eq!(picture(&home.join("back")), picture(&home.join("tree")));
    // A guest's set-user-id bit does not come out.
    assert_eq!(
        home.join("back/bin/run").metadata().unwrap().mode() & 0o7777,
        0o755
    );
    let (_, most) = *guest.running.lock().unwrap();
    assert!((2..=8).contains(&most), "{most} files at once");
}

/// What `cp` does with names, slashes and what is there already.
#[test]
fn things_land_where_cp_would_put_them() {
    let person = Person::new();
    let (home, guest) = (person.home.path(), &person.agent.state.guest);
    write(home.join("f"), "f", 0o644);
    write(home.join("d/x"), "x", 0o644);
    write(guest.path("/dir/old"), "old", 0o644);
    write(guest.path("/plain"), "plain", 0o644);
    write(guest.path("/src/y"), "y", 0o644);
    write(home.join("here/old"), "old", 0o644);
    write(home.join("plain"), "plain", 0o644);
    let mut said = String::new();
    for (line, there) in [
        ("cp f web-1:/new", "/new"),
        ("cp f web-1:/dir", "/dir/f"),
        ("cp f web-1:/dir/", "/dir/f"),
        ("cp f web-1:/nodir/", ""),
        ("cp f web-1:/plain/", ""),
        ("cp f d web-1:/dir", "/dir/d/x"),
        ("cp f d web-1:/plain", ""),
        ("cp d web-1:/copy", "/copy/x"),
        ("cp d web-1:/copy2/", "/copy2/x"),
        ("cp d/. web-1:/dir", "/dir/x"),
        ("cp d web-1:/plain", ""),
        ("cp none web-1:/dir", ""),
        ("cp f web-1:/full", ""),
    ] {
        said.push_str(&person.says(&format!("{line} -q")));
        assert!(
            there.is_empty() || guest.path(there).is_file(),
            "{line}: {there}\n{said}"
        );
    }
    for (line, there) in [
        ("cp web-1:/plain got", "got"),
        ("cp web-1:/plain here", "here/plain"),
        ("cp web-1:/plain nodir/", ""),
        ("cp web-1:/plain web-1:/src here", "here/src/y"),
        ("cp web-1:/plain web-1:/src plain", ""),
        ("cp web-1:/src copy", "copy/y"),
        ("cp web-1:/src/. here", "here/y"),
        ("cp web-1:/src plain", ""),
        ("cp web-1:/none here", ""),
        ("cp absent-1:/x here", ""),
    ] {
        said.push_str(&person.says(&format!("{line} -q")));
        assert!(
            there.is_empty() || home.join(there).is_file(),
            "{line}: {there}\n{said}"
        );
    }
    insta::assert_snapshot!(said);
}

#[test]
fn lines_that_mean_nothing_are_refused() {
    let person = Person::new();
    insta::assert_snapshot!(person.says_all(&[
        "cp a web-1:x",
        "cp a:/x b:/y",
        "cp a b",
        "cp - a",
        "cp - - web-1:/x",
        "cp web-1:/x web-1:/y -",
        "cp web-1:/x",
    ]));
    assert_eq!(person.agent.requests(), [""; 0]);
}

#[test]
fn what_a_broken_upload_has_sent_is_not_sent_again() {
    let person = Person::new();
    let guest = &person.agent.state.guest;
    let content = noise(3_000_000);
    write(person.home.path().join("big"), &content, 0o644);
    guest.break_off("/big", &[1_000_000, 500_000]);
    let said = person.says("cp big web-1:/big -q");
    assert!(said.ends_with("[exit 0]\n"), "{said}");
    assert!(fs::read(guest.path("/big")).unwrap() == content);
    assert_eq!(
        *guest.transfers.lock().unwrap(),
        ["write /big 0", "write /big 1048576", "write /big 1572864"]
    );
}

#[test]
fn what_a_broken_download_has_got_is_checked_and_kept() {
    let person = Person::new();
    let (home, guest) = (person.home.path(), &person.agent.state.guest);
    let size = PART + 3_000_000;
    for name in ["big", "hang"] {
        write(guest.path(name), noise(1_000_000), 0o644);
        fs::File::options()
            .write(true)
            .open(guest.path(name))
            .unwrap()
            .set_len(size)
            .unwrap();
    }
    // Never, then in the middle of the second part.
    guest.break_off("/big", &[u64::MAX, 1_000_000]);
    let said = person.says("cp web-1:/big . -q");
    assert!(said.ends_with("[exit 0]\n"), "{said}");
    let same =
        |name: &str| fs::read(home.join(name)).unwrap() == fs::read(guest.path(name)).unwrap();
    assert!(same("big"));
    let second = format!("read /big {PART}");
    assert_eq!(
        *guest.transfers.lock().unwrap(),
        ["read /big 0", &second, &second]
    );

    // One that is left in the middle goes on in the next run.
    guest.break_off("/hang", &[u64::MAX, 1_000_000]);
    let child = person
        .ghostctl(&words("cp web-1:/hang ."))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    person.until_happened("hangs");
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let output = finish(child);
    assert_eq!(output.status.code(), Some(130));
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(stderr.contains("the same line again"), "{stderr}");
    assert!(!home.join("hang").exists());
    guest.transfers.lock().unwrap().clear();
    let said = person.says("cp web-1:/hang . -q");
    assert!(said.ends_with("[exit 0]\n"), "{said}");
    assert_eq!(
        *guest.transfers.lock().unwrap(),
        [format!("read /hang {PART}")]
    );
    assert!(same("hang"));
    let left: Vec<_> = fs::read_dir(home)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

#[test]
fn damage_on_the_way_is_noticed() {
    let person = Person::new();
    let (home, guest) = (person.home.path(), &person.agent.state.guest);
    write(guest.path("/corrupt"), "x", 0o644);
    write(guest.path("/good"), "x", 0o644);
    write(home.join("corrupt"), "mine", 0o644);
    insta::assert_snapshot!(person.says("cp web-1:/corrupt web-1:/good . -q"));
    // What was there is as before, and the others came.
    assert_eq!(fs::read_to_string(home.join("corrupt")).unwrap(), "mine");
    assert_eq!(fs::read_dir(home).unwrap().count(), 2);
    assert!(person.says("cp web-1:/corrupt - -q").contains("[exit 1]"));
}

#[test]
fn links_are_copied_as_links_and_devices_are_named_and_left_out() {
    let person = Person::new();
    let (home, guest) = (person.home.path(), &person.agent.state.guest);
    for root in [home.join("tree"), guest.path("/tree")] {
        write(root.join("real/file"), "x", 0o644);
        symlink("real/file", root.join("link")).unwrap();
        symlink("real", root.join("linked")).unwrap();
        symlink("/nowhere/\x1b[2J", root.join("dangling")).unwrap();
        symlink("../../../..", root.join("real/up")).unwrap();
        let odd = std::ffi::OsStr::from_bytes(b"caf\xe9");
        symlink(odd, root.join("odd")).unwrap();
        drop(std::os::unix::net::UnixListener::bind(root.join("socket")).unwrap());
    }
    insta::assert_snapshot!(person.says_all(&[
        "cp tree web-1:/in -q",
        "cp web-1:/tree out -q",
        "cp web-1:/tree out3 -q -o json",
    ]));
    for root in [guest.path("/in"), home.join("out")] {
        assert_eq!(
            picture(&root),
            [
                "dangling -> /nowhere/\x1b[2J",
                "link -> real/file",
                "linked -> real",
                "real/ 755",
                "real/file 644 1 120 1500000000.123000000",
                "real/up -> ../../../..",
            ],
            "{root:?}"
        );
    }
    // Once more: what is there is replaced, and nothing is followed.
    for line in ["cp tree web-1:/in -q", "cp web-1:/tree out -q"] {
        person.says(&line.replace("tree", "tree/."));
    }
    assert_eq!(picture(&guest.path("/in")), picture(&home.join("out")));
    for name in ["tree", "out"] {
        let real = home.join(name).join("real");
        assert_eq!(fs::read_dir(real).unwrap().count(), 2);
    }
    assert_eq!(
        home.join("out/link").symlink_metadata().unwrap().mtime(),
        guest.path("/tree/link").symlink_metadata().unwrap().mtime()
    );
    // `-L` would follow `up` for ever.
    for root in [home.join("tree"), guest.path("/tree")] {
        fs::remove_file(root.join("real/up")).unwrap();
    }
    insta::assert_snapshot!(person.says_all(&[
        "cp -L tree web-1:/in2 -q",
        "cp --follow web-1:/tree out2 -q",
    ]));
    for root in [guest.path("/in2"), home.join("out2")] {
        assert!(root.join("link").is_file() && root.join("linked/file").is_file());
        assert!(!root.join("link").is_symlink() && !root.join("linked").is_symlink());
    }
    // An agent that is older makes none, and the rest comes all the same.
    let said = person.says("cp tree web-1:/oldlinks -q");
    assert!(
        said.contains("tree/link: a symbolic link, which this VM's agent does not make; left out"),
        "{said}"
    );
    assert!(guest.path("/oldlinks/real/file").is_file(), "{said}");
    // The names of a command line are followed, as cp does.
    symlink("tree/real/file", home.join("named")).unwrap();
    person.says("cp named web-1:/named -q");
    assert_eq!(fs::read_to_string(guest.path("/named")).unwrap(), "x");
}

fn lie(name: &str, kind: GuestFileKind) -> GuestFile {
    GuestFile {
        name: name.to_owned(),
        kind: kind.into(),
        size_bytes: 1,
        mode: 0o777,
        ..GuestFile::default()
    }
}

#[test]
fn a_hostile_guest_writes_nothing_elsewhere() {
    for evil in ["..", "../escaped", "/etc/escaped", "a/b", ".", "", "a\0b"] {
        let person = Person::new();
        let guest = &person.agent.state.guest;
        fs::create_dir(guest.path("/tree")).unwrap();
        let files = vec![
            lie("good", GuestFileKind::File),
            lie(evil, GuestFileKind::Directory),
        ];
        guest.lies.lock().unwrap().insert("/tree".to_owned(), files);
        let said = person.says("cp web-1:/tree into -q");
        assert!(
            said.contains("error: the guest sent a file name that leads elsewhere"),
            "{said}"
        );
        assert!(said.ends_with("[exit 6]\n"), "{said}");
        assert_eq!(
            fs::read_dir(person.home.path()).unwrap().count(),
            0,
            "{evil}"
        );
    }
    let person = Person::new();
    let (home, guest) = (person.home.path(), &person.agent.state.guest);
    write(guest.path("/tree/good"), "x", 0o644);
    let odd = "\x1b[2Jevil\n";
    let files = vec![
        lie(odd, GuestFileKind::File),
        lie("good", GuestFileKind::File),
    ];
    guest.lies.lock().unwrap().insert("/tree".to_owned(), files);
    let said = person.says("cp web-1:/tree into -q");
    assert!(
        said.contains(r"web-1:/tree/\x1b[2Jevil\n: its name has control characters"),
        "{said}"
    );
    assert!(
        !said.contains('\x1b') && said.ends_with("[exit 1]\n"),
        "{said}"
    );
    assert_eq!(fs::read_dir(home.join("into")).unwrap().count(), 1);
}

fn lying_link(name: &str, says: &str) -> GuestFile {
    GuestFile {
        symlink_target: says.to_owned(),
        ..lie(name, GuestFileKind::Symlink)
    }
}

/// A guest tells of a link and of something below it, or in its place: whatever it says, and in
/// whatever order, nothing is written where the link leads.
#[test]
fn nothing_is_written_through_a_link_that_was_just_made() {
    let directory = |name: &str| lie(name, GuestFileKind::Directory);
    let file = |name: &str| lie(name, GuestFileKind::File);
    let elsewhere = "../elsewhere";
    for (case, top) in [
        (
            "link first",
            vec![lying_link("x", elsewhere), directory("x")],
        ),
        (
            "link last",
            vec![directory("x"), lying_link("x", elsewhere)],
        ),
        (
            "twice",
            vec![lying_link("x", elsewhere), lying_link("x", "y")],
        ),
        (
            "file",
            vec![lying_link("x", "../elsewhere/mine"), file("x")],
        ),
    ] {
        let person = Person::new();
        let (home, guest) = (person.home.path(), &person.agent.state.guest);
        write(home.join("elsewhere/mine"), "mine", 0o644);
        write(guest.path("/tree/x/mine"), "evil", 0o644);
        {
            let mut lies = guest.lies.lock().unwrap();
            lies.insert("/tree".to_owned(), top);
            lies.insert("/tree/x".to_owned(), vec![file("mine"), file("new")]);
        }
        let mut said = person.says("cp web-1:/tree into -q");
        // The second run meets the links of the first.
        said.push_str(&person.says("cp web-1:/tree/. into -q"));
        assert_eq!(
            picture(&home.join("elsewhere")),
            ["mine 644 4 425 1500000000.123000000"],
            "{case}: {said}"
        );
    }

    // Two sources, the first with a link where the second has a directory.
    let person = Person::new();
    let (home, guest) = (person.home.path(), &person.agent.state.guest);
    write(home.join("elsewhere/mine"), "mine", 0o644);
    fs::create_dir_all(home.join("into")).unwrap();
    fs::create_dir_all(guest.path("/one")).unwrap();
    symlink("../elsewhere", guest.path("/one/x")).unwrap();
    write(guest.path("/two/x/mine"), "evil", 0o644);
    let said = person.says("cp web-1:/one/. web-1:/two/. into -q");
    assert!(
        said.contains("x is a symbolic link") && said.ends_with("[exit 1]\n"),
        "{said}"
    );
    assert_eq!(
        fs::read_to_string(home.join("elsewhere/mine")).unwrap(),
        "mine"
    );
    // A link does not take the place of a directory.
    let said = person.says("cp web-1:/two/. other -q");
    assert!(said.ends_with("[exit 0]\n"), "{said}");
    let said = person.says("cp web-1:/one/. other -q");
    assert!(
        said.contains("the link x cannot be made") && said.ends_with("[exit 1]\n"),
        "{said}"
    );
    assert!(home.join("other/x/mine").is_file());
    assert_eq!(fs::read_dir(home.join("other")).unwrap().count(), 1);
}

#[test]
fn a_directory_that_never_ends_is_not_listed_for_ever() {
    let person = Person::new();
    let guest = &person.agent.state.guest;
    fs::create_dir(guest.path("/deep")).unwrap();
    // Each directory has itself in it.
    for depth in 0..200 {
        let path = format!("/deep{}", "/deep".repeat(depth));
        let files = vec![lie("deep", GuestFileKind::Directory)];
        guest.lies.lock().unwrap().insert(path, files);
    }
    let said = person.says("cp web-1:/deep into -q");
    assert!(
        said.contains("too deep; left out") && said.ends_with("[exit 1]\n"),
        "{said}"
    );
}

#[test]
fn links_below_the_destination_are_not_followed() {
    let person = Person::new();
    let (home, guest) = (person.home.path(), &person.agent.state.guest);
    write(guest.path("/tree/dir/file"), "evil", 0o644);
    write(guest.path("/tree/target"), "evil", 0o644);
    let elsewhere = home.join("elsewhere");
    write(elsewhere.join("target"), "mine", 0o644);
    fs::create_dir_all(home.join("into/tree")).unwrap();
    symlink(&elsewhere, home.join("into/tree/dir")).unwrap();
    let said = person.says("cp web-1:/tree into -q");
    assert!(
        said.contains("dir is a symbolic link") && said.ends_with("[exit 1]\n"),
        "{said}"
    );
    fs::remove_file(home.join("into/tree/dir")).unwrap();
    symlink(elsewhere.join("target"), home.join("into/tree/target")).unwrap();
    let said = person.says("cp web-1:/tree into -q");
    assert!(said.ends_with("[exit 0]\n"), "{said}");
    assert_eq!(
        fs::read_to_string(elsewhere.join("target")).unwrap(),
        "mine"
    );
    assert_eq!(
        fs::read_to_string(home.join("into/tree/target")).unwrap(),
        "evil"
    );
    assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 1);
}

#[test]
fn pipes_at_both_ends() {
    let person = Person::new();
    let guest = &person.agent.state.guest;
    let content = noise(2_000_000);
    let mut child = person
        .ghostctl(&words("cp - web-1:/piped -q"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(&content).unwrap();
    let output = finish(child);
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "Copied 1 file (1.9 MiB) to web-1:/piped\n"
    );
    assert!(fs::read(guest.path("/piped")).unwrap() == content);
    assert_eq!(
        guest.path("/piped").metadata().unwrap().mode() & 0o777,
        0o644
    );
    let output = person.run(&mut person.ghostctl(&words("cp web-1:/piped -")));
    assert!(output.stdout == content);
    assert_eq!(output.status.code(), Some(0));
    fs::create_dir(guest.path("/dir")).unwrap();
    insta::assert_snapshot!(person.says_all(&["cp - web-1:/dir -q", "cp web-1:/dir - -q"]));
}

#[test]
fn a_document_says_what_was_copied() {
    let person = Person::new();
    write(person.home.path().join("d/x"), "x", 0o644);
    let output = person.run(&mut person.ghostctl(&words("cp d web-1:/d -o json -q --no-owner")));
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        document,
        serde_json::json!({
            "destination": "web-1:/d", "files": 1, "directories": 1, "links": 0, "size_bytes": 1,
            "skipped": [],
        })
    );
    assert!(person.agent.state.guest.owners.lock().unwrap().is_empty());
}
