//! Ends all that an execution has started, also what left its process group.
//!
//! Found are, round after round until none is left: the members of the session that was opened for
//! the execution; all descendants of its first process and of those; and processes whose environment
//! holds the mark of the call ([`MARK`]), which finds daemons that left both. A program that opens a
//! new session, loses its parent and clears its environment escapes; it was started by somebody with
//! the right to do so.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal};

/// The variable that marks what a call has started.
pub(crate) const MARK: &str = "GHOST_CALL";

/// More rounds than any honest program needs; a fork bomb is left to the guest's own limits.
const ROUNDS: usize = 50;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Process {
    pid: i32,
    parent: i32,
    session: i32,
    zombie: bool,
    started: u64,
}

/// Kills the tree of `root`, which must not have been waited for yet: its number is what the others
/// are known by.
pub(crate) fn kill_tree(root: Pid, mark: &str) {
    let root = root.as_raw_nonzero().get();
    let wanted = format!("{MARK}={mark}");
    for round in 0..ROUNDS {
        let mut killed = 0;
        for process in tree(&processes(), root, |pid| has_mark(pid, &wanted)) {
            killed += usize::from(kill(process));
        }
        if killed == 0 {
            return;
        }
        if round > 0 {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

fn tree(all: &[Process], root: i32, has_mark: impl Fn(i32) -> bool) -> Vec<Process> {
    let mut children: HashMap<i32, Vec<usize>> = HashMap::new();
    for (at, process) in all.iter().enumerate() {
        children.entry(process.parent).or_default().push(at);
    }
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    let mut seen = HashSet::new();
    let mut work: Vec<usize> = Vec::new();
    for (at, process) in all.iter().enumerate() {
        if process.pid != own
            && process.pid != 1
            && (process.pid == root || process.session == root || has_mark(process.pid))
        {
            work.push(at);
        }
    }
    let mut found = Vec::new();
    while let Some(at) = work.pop() {
        let process = all[at];
        if !seen.insert(process.pid) {
            continue;
        }
        if !process.zombie {
            found.push(process);
        }
        if let Some(more) = children.get(&process.pid) {
            work.extend(more);
        }
    }
    found
}

fn has_mark(pid: i32, wanted: &str) -> bool {
    fs::read(format!("/proc/{pid}/environ")).is_ok_and(|bytes| {
        bytes
            .split(|byte| *byte == 0)
            .any(|one| one == wanted.as_bytes())
    })
}

fn kill(process: Process) -> bool {
    let Some(pid) = Pid::from_raw(process.pid) else {
        return false;
    };
    match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
        // Looked at again with the descriptor held: the number may be another process by now.
        Ok(fd) => {
            stat(process.pid).is_some_and(|now| now.started == process.started)
                && rustix::process::pidfd_send_signal(&fd, Signal::KILL).is_ok()
        }
        Err(rustix::io::Errno::NOSYS) => rustix::process::kill_process(pid, Signal::KILL).is_ok(),
        Err(_) => false,
    }
}

fn processes() -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(stat)
        .collect()
}

fn stat(pid: i32) -> Option<Process> {
    parse_stat(pid, &fs::read(format!("/proc/{pid}/stat")).ok()?)
}

/// `proc_pid_stat(5)`. The name in parentheses may hold anything, parentheses too.
fn parse_stat(pid: i32, line: &[u8]) -> Option<Process> {
    let end = line.iter().rposition(|byte| *byte == b')')?;
    let rest = std::str::from_utf8(line.get(end + 1..)?).ok()?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    Some(Process {
        pid,
        zombie: matches!(*fields.first()?, "Z" | "X"),
        parent: fields.get(1)?.parse().ok()?,
        session: fields.get(3)?.parse().ok()?,
        started: fields.get(19)?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: i32, parent: i32, session: i32) -> Process {
        Process {
            pid,
            parent,
            session,
            zombie: false,
            started: 0,
        }
    }

    #[test]
    fn sessions_descendants_and_marks_are_found() {
        let all = [
            process(1, 0, 1),
            process(10, 1, 10),
            process(20, 10, 20),
            process(21, 20, 20),
            process(22, 21, 22),
            process(23, 22, 23),
            process(24, 1, 20),
            process(25, 1, 25),
            process(26, 25, 25),
            process(30, 1, 30),
        ];
        let mut found: Vec<i32> = tree(&all, 20, |pid| pid == 25)
            .into_iter()
            .map(|one| one.pid)
            .collect();
        found.sort_unstable();
        assert_eq!(found, [20, 21, 22, 23, 24, 25, 26]);
    }

    #[test]
    fn names_of_processes_may_hold_anything() {
        let line = b"7 (a) b ) R 3 7 5 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 12345 9 9";
        let parsed = parse_stat(7, line).unwrap();
        assert_eq!(
            (parsed.parent, parsed.session, parsed.started),
            (3, 5, 12345)
        );
        assert_eq!(parse_stat(7, b"7 (x"), None);
        assert_eq!(parse_stat(7, b"7 (x) R 1"), None);
    }
}
