//! Power and clock of the guest, through whatever runs as its process 1. No shell, no bus.

use std::io;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::process::Pid;

/// Off, or again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerMode {
    /// Power off.
    PowerOff,
    /// Restart.
    Reboot,
}

impl PowerMode {
    /// For sentences.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::PowerOff => "power off",
            Self::Reboot => "reboot",
        }
    }
}

/// What of the guest cannot be tried in a test.
pub trait System: Send + Sync {
    /// Begins an orderly shutdown or restart.
    ///
    /// # Errors
    /// Where process 1 cannot be told.
    fn power(&self, mode: PowerMode) -> io::Result<()>;

    /// Sets the clock, and the hardware's where there is one.
    ///
    /// # Errors
    /// `EPERM`, `EINVAL`.
    fn set_clock(&self, since_epoch: Duration) -> io::Result<()>;
}

/// The guest itself.
#[derive(Clone, Copy, Debug)]
pub struct HostSystem;

/// How process 1 is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// A signal to process 1.
    Signal(i32),
    /// A program with arguments.
    Command(&'static str, &'static [&'static str]),
}

/// Finds the way for the init system that runs.
///
/// - systemd: SIGRTMIN+4 and SIGRTMIN+5 start `poweroff.target` and `reboot.target` (systemd(1));
/// - busybox, and OpenRC on it: SIGUSR2 and SIGTERM (busybox init/init.c);
/// - openrc-init: `openrc-shutdown`;
/// - SysV and others: `shutdown`.
pub(crate) fn way(sysroot: &Path, mode: PowerMode) -> Way {
    let off = mode == PowerMode::PowerOff;
    if sysroot.join("run/systemd/system").is_dir() {
        return Way::Signal(libc::SIGRTMIN() + if off { 4 } else { 5 });
    }
    let init = std::fs::read_link(sysroot.join("proc/1/exe")).unwrap_or_default();
    match init.file_name().and_then(|name| name.to_str()) {
        Some(name) if name.starts_with("busybox") => {
            Way::Signal(if off { libc::SIGUSR2 } else { libc::SIGTERM })
        }
        Some("openrc-init") => Way::Command(
            "openrc-shutdown",
            if off { &["-p", "now"] } else { &["-r", "now"] },
        ),
        _ => Way::Command(
            "shutdown",
            if off { &["-P", "now"] } else { &["-r", "now"] },
        ),
    }
}

impl System for HostSystem {
    fn power(&self, mode: PowerMode) -> io::Result<()> {
        match way(Path::new("/"), mode) {
            Way::Signal(number) => {
                // SAFETY: a plain call; number and process are constants of the init system.
                if unsafe { libc::kill(Pid::INIT.as_raw_nonzero().get(), number) } == 0 {
                    Ok(())
                } else {
                    Err(io::Error::last_os_error())
                }
            }
            Way::Command(program, arguments) => {
                let program = ["/sbin", "/usr/sbin", "/bin", "/usr/bin"]
                    .into_iter()
                    .map(|directory| Path::new(directory).join(program))
                    .find(|path| path.exists())
                    .ok_or_else(|| {
                        io::Error::new(
                            io::ErrorKind::NotFound,
                            format!("there is no {program}, and process 1 is unknown"),
                        )
                    })?;
                let _waiting = crate::exec::waiting_for_children();
                let status = Command::new(program).args(arguments).env_clear().status()?;
                if status.success() {
                    Ok(())
                } else {
                    Err(io::Error::other(status.to_string()))
                }
            }
        }
    }

    fn set_clock(&self, since_epoch: Duration) -> io::Result<()> {
        crate::clock::set_system(since_epoch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_init_system_is_told_in_its_own_way() {
        use PowerMode::{PowerOff, Reboot};
        let root = tempfile::tempdir().unwrap();
        assert_eq!(
            way(root.path(), PowerOff),
            Way::Command("shutdown", &["-P", "now"])
        );
        let one = root.path().join("proc/1");
        std::fs::create_dir_all(&one).unwrap();
        for (exe, off, again) in [
            (
                "/bin/busybox",
                Way::Signal(libc::SIGUSR2),
                Way::Signal(libc::SIGTERM),
            ),
            (
                "/sbin/openrc-init",
                Way::Command("openrc-shutdown", &["-p", "now"]),
                Way::Command("openrc-shutdown", &["-r", "now"]),
            ),
            (
                "/sbin/init",
                Way::Command("shutdown", &["-P", "now"]),
                Way::Command("shutdown", &["-r", "now"]),
            ),
        ] {
            let _ = std::fs::remove_file(one.join("exe"));
            std::os::unix::fs::symlink(exe, one.join("exe")).unwrap();
            assert_eq!(way(root.path(), PowerOff), off, "{exe}");
            assert_eq!(way(root.path(), Reboot), again, "{exe}");
        }
        std::fs::create_dir_all(root.path().join("run/systemd/system")).unwrap();
        assert_eq!(
            way(root.path(), PowerOff),
            Way::Signal(libc::SIGRTMIN() + 4)
        );
        assert_eq!(way(root.path(), Reboot), Way::Signal(libc::SIGRTMIN() + 5));
    }
}
