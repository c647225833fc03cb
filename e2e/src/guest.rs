//! Real guests: how many run at once, and what they are made of.

use std::path::Path;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::libvirt;

/// Under software emulation more of them at once only make each other slow.
const AT_ONCE: usize = 3;

/// How long a tiny guest may take to boot in emulation on a busy machine.
pub const BOOT: Duration = Duration::from_secs(120);

/// Flags of a tiny VM.
pub const TINY: [&str; 6] = ["--cpus", "1", "--memory", "128MiB", "--disk", "128MiB"];

static FREE: Mutex<usize> = Mutex::new(AT_ONCE);
static FREED: Condvar = Condvar::new();

/// Room for a number of guests; given back when dropped.
#[must_use]
pub struct Room(usize);

/// Waits for room for `guests` guests.
pub fn room(guests: usize) -> Room {
    let guests = guests.min(AT_ONCE);
    let free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut free = FREED
        .wait_while(free, |free| *free < guests)
        .unwrap_or_else(PoisonError::into_inner);
    *free -= guests;
    Room(guests)
}

impl Drop for Room {
    fn drop(&mut self) {
        *FREE.lock().unwrap_or_else(PoisonError::into_inner) += self.0;
        FREED.notify_all();
    }
}

/// The QEMU process of a VM, by its id; `None` where there is none.
pub fn qemu_pid(vm: &str) -> Option<u32> {
    for entry in std::fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        let Ok(line) = std::fs::read(entry.path().join("cmdline")) else {
            continue;
        };
        let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
        let qemu = words
            .first()
            .is_some_and(|first| first.windows(11).any(|part| part == b"qemu-system"));
        let at = words.iter().position(|word| *word == b"-uuid");
        if qemu && at.and_then(|at| words.get(at + 1)) == Some(&vm.as_bytes()) {
            return Some(pid);
        }
    }
    None
}

/// Kills the QEMU process of a VM with SIGKILL; whether there was one.
pub fn kill_qemu(vm: &str) -> bool {
    let Some(pid) = qemu_pid(vm).and_then(|pid| i32::try_from(pid).ok()) else {
        return false;
    };
    // SAFETY: kill takes two numbers and touches no memory of ours. The id was read from a process
    // that carries this VM's own UUID.
    unsafe { libc::kill(pid, libc::SIGKILL) == 0 }
}

/// libvirt's word for a domain's state; `None` where there is no such domain.
pub fn libvirt_state(name: &str) -> Option<String> {
    libvirt::virsh(libvirt::SYSTEM, &["domstate", name])
        .ok()
        .map(|state| state.trim().to_owned())
}

/// Whether `path` holds `text`.
pub fn file_contains(path: &Path, text: &str) -> bool {
    std::fs::read(path).is_ok_and(|bytes| String::from_utf8_lossy(&bytes).contains(text))
}
