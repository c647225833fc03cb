//! Pure readers of what the kernel writes in `/proc` and `/sys/fs/cgroup`. Each takes the text of
//! a file and gives `None` (or an empty value) for what it cannot read; none of them panics.

/// A field of `/proc/meminfo` in bytes (proc_meminfo(5): the unit is always kB, 1024 bytes).
pub(super) fn meminfo(text: &str, field: &str) -> Option<u64> {
    let rest = text
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    let kib: u64 = rest.split_whitespace().next()?.parse().ok()?;
    kib.checked_mul(1024)
}

/// Clock ticks that all CPUs together were busy since boot, from `/proc/stat` (proc_stat(5)).
/// Idle, waiting for I/O and stolen by a hypervisor above is not busy; guest time is part of user
/// time and is not counted twice.
pub(super) fn busy_ticks(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let fields: Vec<u64> = line
        .split_whitespace()
        .map_while(|field| field.parse().ok())
        .collect();
    let [user, nice, system, _idle, rest @ ..] = fields.as_slice() else {
        return None;
    };
    let interrupts: u64 = rest.iter().skip(1).take(2).sum();
    Some(user + nice + system + interrupts)
}

/// The load average over one minute, from `/proc/loadavg`.
pub(super) fn load(text: &str) -> Option<f64> {
    text.split_whitespace().next()?.parse().ok()
}

/// Whole seconds since boot, from `/proc/uptime`.
pub(super) fn uptime(text: &str) -> Option<u64> {
    let seconds = text.split_whitespace().next()?;
    seconds.split('.').next()?.parse().ok()
}

/// What `/etc/os-release` calls the system (os-release(5)): its `PRETTY_NAME`, else its `NAME`.
pub(super) fn operating_system(text: &str) -> Option<String> {
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.trim().strip_prefix(name)?.strip_prefix('='))
            .map(unquote)
            .filter(|value| !value.is_empty())
    };
    field("PRETTY_NAME").or_else(|| field("NAME"))
}

/// A value in the shell-like quoting of os-release(5).
fn unquote(value: &str) -> String {
    let value = value.trim();
    let inner = ['"', '\'']
        .into_iter()
        .find_map(|quote| value.strip_prefix(quote)?.strip_suffix(quote))
        .unwrap_or(value);
    let mut plain = String::with_capacity(inner.len());
    let mut characters = inner.chars();
    while let Some(character) = characters.next() {
        match character {
            '\\' => plain.extend(characters.next()),
            other => plain.push(other),
        }
    }
    plain
}

/// The CPU's model from `/proc/cpuinfo`: `model name` on x86; on ARM, where there is none, the
/// implementer and part numbers.
pub(super) fn cpu_model(text: &str) -> Option<String> {
    let field = |name: &str| {
        text.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            (key.trim() == name && !value.trim().is_empty()).then(|| value.trim().to_owned())
        })
    };
    field("model name").or_else(|| {
        let (implementer, part) = (field("CPU implementer")?, field("CPU part")?);
        Some(format!("CPU implementer {implementer}, part {part}"))
    })
}

/// Where a process stands in one cgroup hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Membership {
    /// Names of the v1 controllers of the hierarchy; empty for v2.
    pub(super) controllers: Vec<String>,
    /// The path below the hierarchy's mount.
    pub(super) path: String,
}

/// `/proc/self/cgroup` (cgroups(7)): `hierarchy-ID:controller-list:path`.
pub(super) fn memberships(text: &str) -> Vec<Membership> {
    text.lines()
        .filter_map(|line| {
            let mut fields = line.splitn(3, ':');
            let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
            Some(Membership {
                controllers: controllers
                    .split(',')
                    .filter(|name| !name.is_empty())
                    .map(str::to_owned)
                    .collect(),
                path: path.to_owned(),
            })
        })
        .collect()
}

/// CPUs by `cpu.max` of cgroup v2 (`max 100000` or `150000 100000`): quota over period.
pub(super) fn cpu_max(text: &str) -> Option<f64> {
    let mut fields = text.split_whitespace();
    let quota: f64 = fields.next()?.parse().ok()?;
    let period: f64 = fields.next()?.parse().ok()?;
    ratio(quota, period)
}

/// CPUs by `cpu.cfs_quota_us` and `cpu.cfs_period_us` of cgroup v1; the quota -1 is none.
pub(super) fn cfs_quota(quota: &str, period: &str) -> Option<f64> {
    ratio(quota.trim().parse().ok()?, period.trim().parse().ok()?)
}

fn ratio(quota: f64, period: f64) -> Option<f64> {
    (quota > 0.0 && period > 0.0).then(|| quota / period)
}

/// A number of bytes; `max` (v2), and the huge number that v1 writes for no limit, are none.
pub(super) fn memory_limit(text: &str) -> Option<u64> {
    let bytes: u64 = text.trim().parse().ok()?;
    (bytes < u64::MAX / 4).then_some(bytes)
}

/// Bytes of the page cache that can be dropped at once: `inactive_file` of v2's `memory.stat`,
/// `total_inactive_file` of v1's.
pub(super) fn reclaimable(text: &str) -> u64 {
    let field = |name: &str| {
        text.lines().find_map(|line| {
            let (key, value) = line.split_once(' ')?;
            (key == name).then(|| value.trim().parse::<u64>().ok())?
        })
    };
    field("total_inactive_file")
        .or_else(|| field("inactive_file"))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MEMINFO: &str =
        "MemTotal:       24684092 kB\nMemFree:        18508288 kB\nMemAvailable:   23872272 kB\n";

    #[test]
    fn meminfo_is_read_by_whole_names() {
        assert_eq!(meminfo(MEMINFO, "MemTotal"), Some(24_684_092 * 1024));
        assert_eq!(meminfo(MEMINFO, "MemAvailable"), Some(23_872_272 * 1024));
        assert_eq!(meminfo(MEMINFO, "Mem"), None);
        assert_eq!(meminfo("MemTotal: much kB\n", "MemTotal"), None);
    }

    #[test]
    fn busy_time_counts_neither_idle_nor_stolen_nor_guests_twice() {
        let text = "cpu  100 20 30 4000 500 6 7 80 90 9\ncpu0 50 10 15 2000 250 3 3 40 45 4\n";
        assert_eq!(busy_ticks(text), Some(100 + 20 + 30 + 6 + 7));
        // Linux before 2.6 had four fields only.
        assert_eq!(busy_ticks("cpu  1 2 3 4\n"), Some(6));
        assert_eq!(busy_ticks("intr 5\n"), None);
    }

    #[test]
    fn load_and_uptime() {
        assert_eq!(load("2.77 2.65 1.89 1/118 11118\n"), Some(2.77));
        assert_eq!(uptime("4257.85 5661.89\n"), Some(4257));
        assert_eq!(uptime(""), None);
    }

    #[test]
    fn the_system_has_its_pretty_name() {
        let debian = "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nNAME=\"Debian GNU/Linux\"\n";
        assert_eq!(
            operating_system(debian).as_deref(),
            Some("Debian GNU/Linux 12 (bookworm)")
        );
        assert_eq!(operating_system("NAME=Arch\n").as_deref(), Some("Arch"));
        assert_eq!(
            operating_system("PRETTY_NAME='a \\\"b\\\"'\n").as_deref(),
            Some("a \"b\"")
        );
        assert_eq!(operating_system("ID=x\n"), None);
    }

    #[test]
    fn cpus_name_themselves_on_x86_and_arm() {
        assert_eq!(
            cpu_model("processor\t: 0\nmodel name\t: AMD EPYC\nflags\t: fpu\n").as_deref(),
            Some("AMD EPYC")
        );
        assert_eq!(
            cpu_model("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n").as_deref(),
            Some("CPU implementer 0x41, part 0xd0c")
        );
        assert_eq!(cpu_model(""), None);
    }

    #[test]
    fn cgroups_of_both_versions() {
        let found =
            memberships("4:cpu,cpuacct:/user.slice\n0::/system.slice/a:b.service\nrubbish\n");
        assert_eq!(
            found,
            [
                Membership {
                    controllers: vec!["cpu".into(), "cpuacct".into()],
                    path: "/user.slice".into()
                },
                Membership {
                    controllers: Vec::new(),
                    path: "/system.slice/a:b.service".into()
                },
            ]
        );
        assert_eq!(cpu_max("max 100000\n"), None);
        assert_eq!(cpu_max("150000 100000\n"), Some(1.5));
        assert_eq!(cpu_max("100000 0\n"), None);
        assert_eq!(cfs_quota("-1\n", "100000\n"), None);
        assert_eq!(cfs_quota("50000\n", "100000\n"), Some(0.5));
        assert_eq!(memory_limit("max\n"), None);
        assert_eq!(memory_limit("9223372036854771712\n"), None);
        assert_eq!(memory_limit("1073741824\n"), Some(1 << 30));
        assert_eq!(reclaimable("inactive_file 5\ntotal_inactive_file 7\n"), 7);
        assert_eq!(reclaimable("inactive_file 5\n"), 5);
        assert_eq!(reclaimable("anon 5\n"), 0);
    }

    proptest! {
        #[test]
        fn nothing_panics(text in "\\PC{0,64}(\n\\PC{0,64}){0,3}") {
            let _ = (meminfo(&text, "MemTotal"), busy_ticks(&text), load(&text), uptime(&text));
            let _ = (operating_system(&text), cpu_model(&text), memberships(&text));
            let _ = (cpu_max(&text), cfs_quota(&text, &text), memory_limit(&text), reclaimable(&text));
        }
    }
}
