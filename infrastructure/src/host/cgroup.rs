//! The limits that cgroups set to this process, version 1 and 2 (cgroups(7), and the kernel's
//! `admin-guide/cgroup-v2.rst`).
//!
//! A limit of any group above counts as much as the own one, so all levels up to the mount are
//! looked at and the lowest wins. In a container without a cgroup namespace the path of
//! `/proc/self/cgroup` does not exist below the mount; what is mounted is then the container's
//! own group, and the walk reaches it as the last level.

use std::fs;
use std::path::{Path, PathBuf};

use super::parse;

/// What the groups allow; `None` is no limit.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub(super) struct Limits {
    /// CPUs, as quota over period.
    pub(super) cpus: Option<f64>,
    /// Bytes of memory.
    pub(super) memory: Option<u64>,
    /// Bytes that may still be taken under the tightest memory limit.
    pub(super) memory_left: Option<u64>,
}

impl Limits {
    fn lower(&mut self, other: Self) {
        fn least<T: PartialOrd + Copy>(one: Option<T>, other: Option<T>) -> Option<T> {
            match (one, other) {
                (Some(one), Some(other)) => Some(if other < one { other } else { one }),
                (one, other) => one.or(other),
            }
        }
        self.cpus = least(self.cpus, other.cpus);
        self.memory = least(self.memory, other.memory);
        self.memory_left = least(self.memory_left, other.memory_left);
    }
}

/// Reads the limits of the process whose `/proc/PID/cgroup` is `membership`, with the groups
/// mounted at `mount` (`/sys/fs/cgroup`). A file that is missing or unreadable sets no limit.
pub(super) fn limits(membership: &str, mount: &Path) -> Limits {
    let mut limits = Limits::default();
    for member in parse::memberships(membership) {
        let has = |name: &str| member.controllers.iter().any(|one| one == name);
        if member.controllers.is_empty() {
            // v2 alone is mounted at the top, beside v1 controllers in a folder `unified`.
            for root in [mount.to_owned(), mount.join("unified")] {
                for folder in levels(&root, &member.path) {
                    limits.lower(version_two(&folder));
                }
            }
        } else if has("memory") {
            for folder in levels(
                &controller(mount, &member.controllers, "memory"),
                &member.path,
            ) {
                limits.lower(memory(
                    &folder,
                    "memory.limit_in_bytes",
                    "memory.usage_in_bytes",
                ));
            }
        } else if has("cpu") {
            for folder in levels(&controller(mount, &member.controllers, "cpu"), &member.path) {
                limits.lower(Limits {
                    cpus: read(&folder, "cpu.cfs_quota_us")
                        .zip(read(&folder, "cpu.cfs_period_us"))
                        .and_then(|(quota, period)| parse::cfs_quota(&quota, &period)),
                    ..Limits::default()
                });
            }
        }
    }
    limits
}

/// Where a v1 controller is mounted: under the names of all that share its hierarchy
/// (`cpu,cpuacct`) or under its own.
fn controller(mount: &Path, together: &[String], name: &str) -> PathBuf {
    let joined = mount.join(together.join(","));
    if joined.is_dir() {
        joined
    } else {
        mount.join(name)
    }
}

/// The folder of the group and those of all groups above it, up to the mount.
fn levels(mount: &Path, path: &str) -> Vec<PathBuf> {
    let own = mount.join(path.trim_start_matches('/'));
    own.ancestors()
        .take_while(|folder| folder.starts_with(mount))
        .map(Path::to_owned)
        .collect()
}

fn version_two(folder: &Path) -> Limits {
    Limits {
        cpus: read(folder, "cpu.max").and_then(|text| parse::cpu_max(&text)),
        ..memory(folder, "memory.max", "memory.current")
    }
}

fn memory(folder: &Path, limit: &str, usage: &str) -> Limits {
    let limit = read(folder, limit).and_then(|text| parse::memory_limit(&text));
    let left = limit.and_then(|limit| {
        let used: u64 = read(folder, usage)?.trim().parse().ok()?;
        let droppable =
            read(folder, "memory.stat").map_or(0, |statistics| parse::reclaimable(&statistics));
        Some(limit.saturating_sub(used.saturating_sub(droppable)))
    });
    Limits {
        cpus: None,
        memory: limit,
        memory_left: left,
    }
}

fn read(folder: &Path, file: &str) -> Option<String> {
    fs::read_to_string(folder.join(file)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        folder
    }

    #[test]
    fn the_lowest_limit_of_all_levels_wins_in_version_two() {
        let folder = tree(&[
            ("a.slice/cpu.max", "150000 100000\n"),
            ("a.slice/memory.max", "4096\n"),
            ("a.slice/memory.current", "3000\n"),
            ("a.slice/memory.stat", "anon 1\ninactive_file 1000\n"),
            ("a.slice/b.service/cpu.max", "max 100000\n"),
            ("a.slice/b.service/memory.max", "8192\n"),
            ("other/memory.max", "1\n"),
        ]);
        let limits = limits("0::/a.slice/b.service\n", folder.path());
        assert_eq!(limits.cpus, Some(1.5));
        assert_eq!(limits.memory, Some(4096));
        assert_eq!(limits.memory_left, Some(4096 - 2000));
    }

    #[test]
    fn version_one_is_found_in_its_own_folders() {
        let folder = tree(&[
            ("cpu,cpuacct/box/cpu.cfs_quota_us", "200000\n"),
            ("cpu,cpuacct/box/cpu.cfs_period_us", "100000\n"),
            ("memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("memory/box/memory.limit_in_bytes", "2048\n"),
        ]);
        let text = "3:cpu,cpuacct:/box\n2:memory:/box\n1:name=systemd:/\n0::/\n";
        let limits = limits(text, folder.path());
        assert_eq!(limits.cpus, Some(2.0));
        assert_eq!(limits.memory, Some(2048));
        assert_eq!(limits.memory_left, None);
    }

    #[test]
    fn a_container_without_namespace_finds_its_group_at_the_mount() {
        let folder = tree(&[("memory.max", "1024\n"), ("memory.current", "24\n")]);
        let limits = limits("0::/docker/0123\n", folder.path());
        assert_eq!(
            (limits.memory, limits.memory_left),
            (Some(1024), Some(1000))
        );
    }

    #[test]
    fn no_groups_are_no_limits() {
        let folder = tree(&[]);
        assert_eq!(limits("", folder.path()), Limits::default());
        // A path that would lead out of the mount is not followed upwards.
        assert_eq!(limits("0::/../../etc\n", folder.path()), Limits::default());
    }
}
