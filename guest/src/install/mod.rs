//! `ghost-guest install`: puts this program where it belongs and has the guest's service manager
//! start it. Can be run again and again; what is newer stays unless it is told otherwise.

mod render;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::log::say;
use crate::update::sha256;

pub use render::{openrc, systemd, sysv};

/// Who starts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// systemd.
    Systemd,
    /// OpenRC.
    OpenRc,
    /// SysV's `/etc/init.d`.
    SysV,
    /// Nobody: the program is only copied.
    None,
}

impl Service {
    /// By name.
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "systemd" => Self::Systemd,
            "openrc" => Self::OpenRc,
            "sysv" => Self::SysV,
            "none" => Self::None,
            _ => return None,
        })
    }

    /// What the guest has.
    pub fn detect(root: &Path) -> Self {
        let has = |path: &str| fs::symlink_metadata(root.join(path)).is_ok();
        // What has booted says so itself (sd_booted(3); OpenRC makes its folder at once).
        if has("run/systemd/system") {
            return Self::Systemd;
        }
        if has("run/openrc") {
            return Self::OpenRc;
        }
        // Elsewhere, what would boot. Several may be installed: Debian keeps systemd's programs
        // beside SysV's init, and OpenRC's beside either.
        let init = ["sbin/init", "usr/sbin/init"]
            .iter()
            .find_map(|path| fs::read_link(root.join(path)).ok());
        let starts_systemd =
            init.is_some_and(|target| target.file_name().is_some_and(|name| name == "systemd"));
        let other = !starts_systemd && (has("sbin/init") || has("usr/sbin/init"));
        let systemd = has("lib/systemd/systemd") || has("usr/lib/systemd/systemd");
        if starts_systemd || (systemd && !other) {
            Self::Systemd
        } else if has("sbin/openrc-run") || has("usr/sbin/openrc-run") {
            Self::OpenRc
        } else if has("etc/init.d") {
            Self::SysV
        } else {
            Self::None
        }
    }
}

/// What to do.
#[derive(Clone, Debug)]
pub struct Install {
    /// `None`: what the guest has.
    pub service: Option<Service>,
    /// Below it `sbin/ghost-guest`.
    pub prefix: PathBuf,
    /// The guest's file system: `/`, or where another's is mounted. Nothing is started there then.
    pub root: PathBuf,
    /// Also over a newer one.
    pub force: bool,
}

impl Default for Install {
    fn default() -> Self {
        Self {
            service: None,
            prefix: PathBuf::from("/usr/local"),
            root: PathBuf::from("/"),
            force: false,
        }
    }
}

/// What was done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// This program is in place, where there was none or another.
    Installed,
    /// The same is there already.
    Unchanged,
    /// A newer one is there and was left.
    NewerKept(String),
}

impl Install {
    /// Installs the program `source` of version `version`.
    ///
    /// # Errors
    /// What could not be written or started.
    pub fn run(&self, source: &Path, version: &str) -> io::Result<Outcome> {
        let inside = self.prefix.strip_prefix("/").unwrap_or(&self.prefix);
        let program = Path::new("/").join(inside).join("sbin/ghost-guest");
        // A package's own, elsewhere, is as good where it is not older.
        for known in [&program, Path::new("/usr/sbin/ghost-guest")] {
            let path = self.inside(known);
            let there = path.exists().then(|| version_of(&path)).flatten();
            if let Some(there) = there
                && !self.force
                && is_newer(&there, version)
            {
                self.start(false, known)?;
                return Ok(Outcome::NewerKept(there));
            }
        }
        let target = self.inside(&program);
        let same = match (sha256(source), sha256(&target)) {
            (Ok(ours), Ok(theirs)) => ours == theirs,
            (Err(error), _) => return Err(error),
            (_, Err(_)) => false,
        };
        if !same {
            let bytes = fs::read(source)?;
            write_file(&target, &bytes, 0o755)?;
        }
        let changed = self.start(!same, &program)?;
        Ok(if same && !changed {
            Outcome::Unchanged
        } else {
            Outcome::Installed
        })
    }

    fn inside(&self, path: &Path) -> PathBuf {
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Writes the service and starts it; says whether the service's file was changed.
    fn start(&self, fresh: bool, program: &Path) -> io::Result<bool> {
        let service = self.service.unwrap_or_else(|| Service::detect(&self.root));
        let (path, text, mode) = match service {
            Service::None => return Ok(false),
            Service::Systemd => (
                "/etc/systemd/system/ghost-guest.service",
                systemd(program),
                0o644,
            ),
            Service::OpenRc => ("/etc/init.d/ghost-guest", openrc(program), 0o755),
            Service::SysV => ("/etc/init.d/ghost-guest", sysv(program), 0o755),
        };
        // A package brings its own unit.
        let packaged = service == Service::Systemd
            && program == Path::new("/usr/sbin/ghost-guest")
            && (self
                .inside(Path::new("/lib/systemd/system/ghost-guest.service"))
                .exists()
                || self
                    .inside(Path::new("/usr/lib/systemd/system/ghost-guest.service"))
                    .exists());
        let file = self.inside(Path::new(path));
        let changed = !packaged && fs::read_to_string(&file).ok().as_deref() != Some(&text);
        if changed {
            write_file(&file, text.as_bytes(), mode)?;
        }
        let here = self.root == Path::new("/");
        match service {
            Service::Systemd if here => {
                run("systemctl", &["daemon-reload"])?;
                run("systemctl", &["enable", "ghost-guest.service"])?;
                // Not waited for: this may run within the boot that the service is ordered against.
                let verb = if fresh || changed { "restart" } else { "start" };
                run("systemctl", &["--no-block", verb, "ghost-guest.service"])?;
            }
            Service::Systemd => {
                let wants = self.inside(Path::new("/etc/systemd/system/multi-user.target.wants"));
                fs::create_dir_all(&wants)?;
                link(path, &wants.join("ghost-guest.service"))?;
            }
            Service::OpenRc if here => {
                run("rc-update", &["add", "ghost-guest", "default"])?;
                let verb = if fresh || changed { "restart" } else { "start" };
                run("rc-service", &["ghost-guest", verb])?;
            }
            Service::OpenRc => {
                let level = self.inside(Path::new("/etc/runlevels/default"));
                fs::create_dir_all(&level)?;
                link(path, &level.join("ghost-guest"))?;
            }
            Service::SysV => {
                // Where the scripts are started by their dependencies, as Debian does, a link alone
                // starts nothing: the distribution's own program keeps both.
                let keeper = [
                    ("/usr/sbin/update-rc.d", ["ghost-guest", "defaults"]),
                    ("/sbin/chkconfig", ["--add", "ghost-guest"]),
                ]
                .into_iter()
                .find(|(program, _)| here && Path::new(program).exists());
                if let Some((program, arguments)) = keeper {
                    run(program, &arguments)?;
                } else {
                    for level in 2..=5 {
                        let directory = self.inside(Path::new(&format!("/etc/rc{level}.d")));
                        if directory.is_dir() {
                            link("../init.d/ghost-guest", &directory.join("S20ghost-guest"))?;
                        }
                    }
                }
                if here {
                    let verb = if fresh || changed { "restart" } else { "start" };
                    run("/etc/init.d/ghost-guest", &[verb])?;
                }
            }
            Service::None => {}
        }
        Ok(changed)
    }
}

fn link(target: &str, at: &Path) -> io::Result<()> {
    match symlink(target, at) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// Writes a file at once or not at all: a program that runs cannot be written to anyway.
fn write_file(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(directory)?;
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let temporary = path.with_file_name(name);
    let _ = fs::remove_file(&temporary);
    let outcome = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)?;
        io::Write::write_all(&mut file, bytes)?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        File::open(directory)?.sync_all()
    })();
    if outcome.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    outcome
}

fn run(program: &str, arguments: &[&str]) -> io::Result<()> {
    let status = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .status()
        .map_err(|error| io::Error::new(error.kind(), format!("{program}: {error}")))?;
    if status.success() {
        return Ok(());
    }
    let command = format!("{program} {}", arguments.join(" "));
    say!("{command}: {status}");
    Err(io::Error::other(format!("{command}: {status}")))
}

fn version_of(program: &Path) -> Option<String> {
    let output = Command::new(program)
        .arg("version")
        .stdin(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut words = text.split_ascii_whitespace();
    (words.next() == Some("ghost-guest")).then(|| words.next().map(ToOwned::to_owned))?
}

/// Whether `there` is a later release than `ours`: numbers between dots.
fn is_newer(there: &str, ours: &str) -> bool {
    let numbers = |version: &str| -> Vec<u64> {
        version
            .split(['.', '-', '+'])
            .take(3)
            .map(|part| part.parse().unwrap_or(0))
            .collect()
    };
    numbers(there) > numbers(ours)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest(init: &str) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join(init);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        if init.ends_with('/') {
            fs::create_dir_all(&path).unwrap();
        } else {
            fs::write(&path, "").unwrap();
        }
        root
    }

    /// A program that says a version.
    fn program(directory: &Path, version: &str) -> PathBuf {
        let path = directory.join(format!("program-{version}"));
        fs::write(&path, format!("#!/bin/sh\necho ghost-guest {version}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn every_service_manager_is_found_and_served() {
        for (init, service, file, enabled) in [
            (
                "usr/lib/systemd/systemd",
                Service::Systemd,
                "etc/systemd/system/ghost-guest.service",
                "etc/systemd/system/multi-user.target.wants/ghost-guest.service",
            ),
            (
                "sbin/openrc-run",
                Service::OpenRc,
                "etc/init.d/ghost-guest",
                "etc/runlevels/default/ghost-guest",
            ),
            (
                "etc/init.d/rc",
                Service::SysV,
                "etc/init.d/ghost-guest",
                "etc/rc3.d/S20ghost-guest",
            ),
        ] {
            let root = guest(init);
            fs::create_dir_all(root.path().join("etc/rc3.d")).unwrap();
            assert_eq!(Service::detect(root.path()), service);
            let source = program(root.path(), "0.1.0");
            let install = Install {
                root: root.path().to_path_buf(),
                ..Install::default()
            };
            assert_eq!(install.run(&source, "0.1.0").unwrap(), Outcome::Installed);
            assert!(root.path().join(file).is_file(), "{init}");
            assert!(root.path().join(enabled).is_symlink(), "{init}");
            let mode = fs::metadata(root.path().join("usr/local/sbin/ghost-guest"))
                .unwrap()
                .permissions()
                .mode();
            assert_eq!(mode & 0o7777, 0o755);
            assert_eq!(install.run(&source, "0.1.0").unwrap(), Outcome::Unchanged);
        }
        let bare = guest("bin/");
        assert_eq!(Service::detect(bare.path()), Service::None);
    }

    #[test]
    fn of_several_service_managers_the_one_that_boots_is_taken() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            path
        };
        // Debian with sysvinit-core: systemd's programs stay, its links and folders too.
        fs::write(at("usr/lib/systemd/systemd"), "").unwrap();
        fs::write(at("etc/init.d/rc"), "").unwrap();
        fs::write(at("usr/sbin/init"), "").unwrap();
        symlink("usr/sbin", at("sbin")).unwrap();
        assert_eq!(Service::detect(root.path()), Service::SysV);
        // With openrc beside it.
        fs::write(at("usr/sbin/openrc-run"), "").unwrap();
        assert_eq!(Service::detect(root.path()), Service::OpenRc);
        // systemd-sysv makes init a link.
        fs::remove_file(at("usr/sbin/init")).unwrap();
        symlink("/lib/systemd/systemd", at("usr/sbin/init")).unwrap();
        assert_eq!(Service::detect(root.path()), Service::Systemd);
        // What runs goes before what is there.
        fs::create_dir_all(at("run/openrc")).unwrap();
        assert_eq!(Service::detect(root.path()), Service::OpenRc);
        fs::create_dir_all(at("run/systemd/system")).unwrap();
        assert_eq!(Service::detect(root.path()), Service::Systemd);
    }

    #[test]
    fn what_is_newer_stays_unless_forced() {
        let root = guest("bin/");
        let mut install = Install {
            root: root.path().to_path_buf(),
            ..Install::default()
        };
        let (old, new) = (
            program(root.path(), "0.9.9"),
            program(root.path(), "0.10.0"),
        );
        install.run(&new, "0.10.0").unwrap();
        assert_eq!(
            install.run(&old, "0.9.9").unwrap(),
            Outcome::NewerKept("0.10.0".into())
        );
        install.force = true;
        assert_eq!(install.run(&old, "0.9.9").unwrap(), Outcome::Installed);
        install.force = false;
        assert_eq!(install.run(&new, "0.10.0").unwrap(), Outcome::Installed);
    }

    #[test]
    fn versions_are_compared_as_numbers() {
        assert!(is_newer("0.10.0", "0.9.9") && is_newer("1.0.0", "0.99.99"));
        assert!(!is_newer("0.1.0", "0.1.0") && !is_newer("nonsense", "0.1.0"));
    }
}
