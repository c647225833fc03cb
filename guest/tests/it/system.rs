//! What changes the guest as a whole: power, clock, accounts, frozen file systems.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ghost_guest::Options;
use ghost_guest::power::{PowerMode, System};
use ghost_proto::guest::v1::agent_message::Payload;
use ghost_proto::guest::v1::{
    FreezeRequest, FreezeResponse, SetClockRequest, SetPasswordRequest, ShutdownRequest,
    SshKeysRequest, ThawRequest, shutdown_request,
};

use crate::host::{Host, code, sh, until};

#[derive(Default)]
struct Told {
    power: Mutex<Vec<PowerMode>>,
    clock: Mutex<Vec<Duration>>,
}

impl System for Told {
    fn power(&self, mode: PowerMode) -> io::Result<()> {
        self.power.lock().unwrap().push(mode);
        Ok(())
    }

    fn set_clock(&self, now: Duration) -> io::Result<()> {
        self.clock.lock().unwrap().push(now);
        Ok(())
    }
}

fn wire(milliseconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration {
        seconds: milliseconds / 1000,
        nanos: i32::try_from(milliseconds % 1000 * 1_000_000).unwrap(),
    })
}

#[test]
fn power_is_answered_before_it_goes_and_waits_for_its_delay() {
    let told = Arc::new(Told::default());
    let system: Arc<dyn System> = Arc::clone(&told) as _;
    let mut host = Host::greeted(Options {
        system,
        ..Options::default()
    });
    let ask = |mode: shutdown_request::Mode, delay| {
        Payload::Shutdown(ShutdownRequest {
            mode: mode.into(),
            delay,
        })
    };
    assert_eq!(
        code(host.ask(ask(shutdown_request::Mode::Unspecified, None))),
        "invalid_argument"
    );
    assert_eq!(
        code(host.ask(ask(shutdown_request::Mode::Reboot, wire(-5000)))),
        "invalid_argument"
    );
    // One that is far away is replaced by one that is near.
    let far = ask(shutdown_request::Mode::PowerOff, wire(3_600_000));
    assert!(matches!(host.ask(far), Payload::Done(_)));
    assert!(told.power.lock().unwrap().is_empty());
    let near = ask(shutdown_request::Mode::Reboot, wire(50));
    assert!(matches!(host.ask(near), Payload::Done(_)));
    until("it was told", || !told.power.lock().unwrap().is_empty());
    assert_eq!(*told.power.lock().unwrap(), [PowerMode::Reboot]);
}

#[test]
fn the_clock_is_set_to_what_the_host_says() {
    let told = Arc::new(Told::default());
    let system: Arc<dyn System> = Arc::clone(&told) as _;
    let mut host = Host::greeted(Options {
        system,
        ..Options::default()
    });
    let request = Payload::SetClock(SetClockRequest {
        now: Some(prost_types::Timestamp {
            seconds: 1_900_000_000,
            nanos: 7,
        }),
    });
    assert!(matches!(host.ask(request), Payload::Done(_)));
    assert_eq!(
        *told.clock.lock().unwrap(),
        [Duration::new(1_900_000_000, 7)]
    );
}

#[test]
fn accounts_are_changed_over_the_channel() {
    let root = tempfile::tempdir().unwrap();
    fs::create_dir_all(root.path().join("etc")).unwrap();
    fs::create_dir_all(root.path().join("root")).unwrap();
    fs::write(
        root.path().join("etc/passwd"),
        "root:x:0:0::/root:/bin/sh\n",
    )
    .unwrap();
    fs::write(root.path().join("etc/shadow"), "root:*:1:0:99999:7:::\n").unwrap();
    let mut host = Host::greeted(Options {
        sysroot: root.path().to_path_buf(),
        ..Options::default()
    });
    let answer = host.ask(Payload::SetPassword(SetPasswordRequest {
        user: "root".into(),
        password: "let me in".into(),
        hashed: false,
    }));
    assert!(matches!(answer, Payload::Done(_)), "{answer:?}");
    let shadow = fs::read_to_string(root.path().join("etc/shadow")).unwrap();
    assert!(shadow.starts_with("root:$6$"), "{shadow}");
    let answer = host.ask(Payload::SshKeys(SshKeysRequest {
        user: "root".into(),
        add: vec!["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA key".into()],
        remove: Vec::new(),
    }));
    assert!(matches!(answer, Payload::Done(_)), "{answer:?}");
    assert!(root.path().join("root/.ssh/authorized_keys").is_file());
}

/// Gives this thread, and those that it starts, a mount namespace of their own: the kernel takes away
/// what is mounted there with the last of them, also where a signal ends the test.
fn apart() -> Result<(), String> {
    // SAFETY: it changes what this thread sees of mounts, and shares its working directory with nobody
    // from here on; nobody else is touched.
    if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
        return Err(format!("unshare: {}", std::io::Error::last_os_error()));
    }
    // What is mounted from here on stays here.
    // SAFETY: all pointers are terminated strings or null, as mount(2) wants them for a change of
    // propagation.
    let made = unsafe {
        libc::mount(
            c"none".as_ptr(),
            c"/".as_ptr(),
            std::ptr::null(),
            libc::MS_REC | libc::MS_PRIVATE,
            std::ptr::null(),
        )
    };
    match made {
        0 => Ok(()),
        _ => Err(format!("mount: {}", std::io::Error::last_os_error())),
    }
}

/// A file system of its own, on a loop device, that nobody else sees.
struct Mounted {
    directory: tempfile::TempDir,
}

impl Mounted {
    /// `Err` says why this machine cannot.
    fn new() -> Result<Self, String> {
        let directory = tempfile::tempdir().unwrap();
        let run = |program: &str, arguments: &[&str]| {
            let output = Command::new(program)
                .args(arguments)
                .output()
                .map_err(|error| format!("{program}: {error}"))?;
            if output.status.success() {
                Ok(())
            } else {
                Err(format!(
                    "{program}: {}",
                    String::from_utf8_lossy(&output.stderr).trim()
                ))
            }
        };
        let image = directory.path().join("image");
        let mount = directory.path().join("mount");
        fs::create_dir(&mount).unwrap();
        fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
        apart()?;
        run("mke2fs", &["-q", "-t", "ext4", image.to_str().unwrap()])?;
        run(
            "mount",
            &[
                "-o",
                "loop",
                image.to_str().unwrap(),
                mount.to_str().unwrap(),
            ],
        )?;
        // What nobody else sees nobody has to clear away.
        let seen = fs::read_to_string("/proc/1/mountinfo").unwrap();
        assert!(!seen.contains(mount.to_str().unwrap()), "{seen}");
        Ok(Self { directory })
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("mount")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // A frozen one cannot be unmounted.
        let _ = Command::new("fsfreeze").arg("-u").arg(self.path()).output();
        let _ = Command::new("umount").arg(self.path()).output();
    }
}

/// Whether the kernel says that it is frozen already; it is left as it was.
fn is_frozen(path: &Path) -> bool {
    let output = Command::new("fsfreeze")
        .arg("-f")
        .arg(path)
        .output()
        .unwrap();
    if output.status.success() {
        Command::new("fsfreeze")
            .arg("-u")
            .arg(path)
            .output()
            .unwrap();
    }
    !output.status.success()
}

fn frozen(payload: Payload) -> FreezeResponse {
    match payload {
        Payload::FreezeResponse(response) => response,
        other => panic!("{other:?}"),
    }
}

#[test]
fn file_systems_are_frozen_and_thawed_whatever_happens() {
    let mounted = match Mounted::new() {
        Ok(mounted) => mounted,
        Err(why) => {
            eprintln!("skipped: no file system to freeze: {why}");
            return;
        }
    };
    let path = mounted.path();
    let root = tempfile::tempdir().unwrap();
    let hooks = root.path().join("hooks");
    for (name, text) in [
        (
            "pre-freeze.d/10-good",
            format!("echo pre >>{}/log", root.path().display()),
        ),
        (
            "pre-freeze.d/20-bad",
            "echo no such database; exit 4".into(),
        ),
        (
            "post-thaw.d/10-good",
            format!("echo post >>{}/log", root.path().display()),
        ),
    ] {
        let hook = hooks.join(name);
        fs::create_dir_all(hook.parent().unwrap()).unwrap();
        fs::write(&hook, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).unwrap();
    }
    fs::create_dir(root.path().join("run")).unwrap();
    let mut host = Host::greeted(Options {
        sysroot: root.path().to_path_buf(),
        hooks,
        ..Options::default()
    });
    let freeze = |timeout, mount: &str| {
        Payload::Freeze(FreezeRequest {
            timeout,
            mount_points: vec![mount.to_owned()],
        })
    };
    let mount = path.to_str().unwrap();
    assert_eq!(
        code(host.ask(freeze(wire(61_000), mount))),
        "invalid_argument"
    );
    assert_eq!(code(host.ask(freeze(None, "/no/such"))), "not_found");
    assert_eq!(code(host.ask(freeze(None, "/proc"))), "unsupported");
    assert_eq!(
        code(host.ask(Payload::Thaw(ThawRequest {}))),
        "invalid_argument"
    );
    fs::remove_file(root.path().join("log")).unwrap();

    let response = frozen(host.ask(freeze(wire(60_000), mount)));
    assert_eq!(response.count, 1);
    assert_eq!(response.warnings.len(), 1);
    assert!(
        response.warnings[0].contains("no such database"),
        "{response:?}"
    );
    assert!(is_frozen(&path));
    // What would hang is refused; a second freeze too.
    assert_eq!(code(host.ask(Payload::Execute(sh("true")))), "frozen");
    assert_eq!(code(host.ask(freeze(None, mount))), "busy");
    let response = frozen(host.ask(Payload::Thaw(ThawRequest {})));
    assert_eq!((response.count, response.warnings.len()), (1, 0));
    assert!(!is_frozen(&path));
    assert_eq!(
        fs::read_to_string(root.path().join("log")).unwrap(),
        "pre\npost\n"
    );
    assert_eq!(
        code(host.ask(Payload::Thaw(ThawRequest {}))),
        "invalid_argument"
    );

    // Nobody thaws: the deadline does. A write waits for it.
    frozen(host.ask(freeze(wire(300), mount)));
    fs::write(path.join("file"), "x").unwrap();
    until(
        "programs run again",
        || matches!(host.ask(Payload::Thaw(ThawRequest {})), Payload::Error(error) if error.code == "invalid_argument"),
    );
    assert_eq!(host.run(sh("echo alive")).text(), "alive\n");

    // The host goes away: the deadline holds all the same.
    frozen(host.ask(freeze(wire(300), mount)));
    host.hang_up();
    fs::write(path.join("file"), "y").unwrap();
    assert!(!is_frozen(&path));
}

#[test]
fn what_an_agent_that_died_left_frozen_is_thawed_at_the_next_start() {
    let mounted = match Mounted::new() {
        Ok(mounted) => mounted,
        Err(why) => {
            eprintln!("skipped: no file system to freeze: {why}");
            return;
        }
    };
    let path = mounted.path();
    let root = tempfile::tempdir().unwrap();
    fs::create_dir(root.path().join("run")).unwrap();
    let note = root.path().join("run/ghost-guest.frozen");
    fs::write(&note, format!("{}\n", path.display())).unwrap();
    let output = Command::new("fsfreeze")
        .arg("-f")
        .arg(&path)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let options = Options {
        sysroot: root.path().to_path_buf(),
        ..Options::default()
    };
    ghost_guest::freeze::Freezer::new(&options).thaw_leftovers();
    assert!(!is_frozen(&path));
    assert!(!note.exists());
}
