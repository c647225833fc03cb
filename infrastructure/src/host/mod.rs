//! The Linux host behind the [`HostProbe`] port. Every value is read from the system at the time
//! of the call; nothing is assumed and nothing is kept.
//!
//! What VMs may have is what this machine, or the container it is, really gives: CPUs after the
//! affinity mask and the cgroup quota, memory after the cgroup limit. The pure readers stand in
//! `parse`, the walk over the groups in `cgroup`.

mod cgroup;
mod footprint;
mod parse;

pub use footprint::{limit_arenas, release_startup_memory};

use std::fs;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use ghost_domain::ports::{HostFacts, HostProbe, HostUsage};
use ghost_domain::{ByteSize, Error, ErrorCode, HostResources, Result};

/// Reads the Linux host.
#[derive(Clone, Debug)]
pub struct LinuxHost {
    /// The agent's data folder: its file system is the one that VMs fill.
    data_dir: PathBuf,
    /// `/`, or the folder of a test that holds `proc`, `sys` and `etc`.
    root: PathBuf,
}

impl LinuxHost {
    /// Of the machine we run on, with its disk being the file system of `data_dir` (or, where that
    /// is not made yet, of the folder it will be made in).
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Self {
            data_dir: data_dir.into(),
            root: PathBuf::from("/"),
        }
    }

    /// What [`HostProbe::resources`] tells, for callers outside async code.
    ///
    /// # Errors
    /// [`ErrorCode::IoFailed`] where the host cannot be read.
    pub fn resources_now(&self) -> Result<HostResources> {
        self.read_resources()
    }

    async fn blocking<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Self) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        // Files of /proc answer at once, but statvfs of a dead network file system does not.
        let host = self.clone();
        tokio::task::spawn_blocking(move || read(&host))
            .await
            .map_err(|cause| Error::internal("reading the host failed").because(cause))?
    }

    fn read(&self, path: &str) -> Result<String> {
        let path = self.root.join(path);
        fs::read_to_string(&path).map_err(|cause| unreadable(&path).because(cause))
    }

    fn limits(&self) -> cgroup::Limits {
        let membership = self.read("proc/self/cgroup").unwrap_or_default();
        cgroup::limits(&membership, &self.root.join("sys/fs/cgroup"))
    }

    fn read_facts(&self) -> Result<HostFacts> {
        let name = rustix::system::uname();
        let boot_id = self.read("proc/sys/kernel/random/boot_id")?;
        let os_release = self
            .read("etc/os-release")
            .or_else(|_| self.read("usr/lib/os-release"))
            .unwrap_or_default();
        let cpuinfo = self.read("proc/cpuinfo")?;
        Ok(HostFacts {
            hostname: name.nodename().to_string_lossy().into_owned(),
            operating_system: parse::operating_system(&os_release)
                .unwrap_or_else(|| name.sysname().to_string_lossy().into_owned()),
            kernel: name.release().to_string_lossy().into_owned(),
            boot_id: boot_id.trim().to_owned(),
            cpu_model: parse::cpu_model(&cpuinfo)
                .unwrap_or_else(|| name.machine().to_string_lossy().into_owned()),
        })
    }

    fn read_resources(&self) -> Result<HostResources> {
        let affinity = rustix::thread::sched_getaffinity(None).map_err(|cause| {
            Error::new(
                ErrorCode::IoFailed,
                "cannot read which CPUs this process may use",
            )
            .because(cause)
        })?;
        let limits = self.limits();
        let memory = parse::meminfo(&self.read("proc/meminfo")?, "MemTotal")
            .ok_or_else(|| unreadable(&self.root.join("proc/meminfo")))?;
        let (disk, disk_free) = file_system(&self.data_dir)?;
        Ok(HostResources {
            cpus: usable_cpus(affinity.count(), limits.cpus),
            memory: ByteSize::from_bytes(limits.memory.map_or(memory, |limit| limit.min(memory))),
            disk,
            disk_free,
        })
    }

    fn read_usage(&self) -> Result<HostUsage> {
        let wrong = |file: &str| unreadable(&self.root.join(file));
        let ticks =
            parse::busy_ticks(&self.read("proc/stat")?).ok_or_else(|| wrong("proc/stat"))?;
        let available = parse::meminfo(&self.read("proc/meminfo")?, "MemAvailable")
            .ok_or_else(|| wrong("proc/meminfo"))?;
        let left = self.limits().memory_left;
        #[expect(clippy::cast_precision_loss, reason = "a count of ticks, for a gauge")]
        let busy = ticks as f64 / rustix::param::clock_ticks_per_second() as f64;
        Ok(HostUsage {
            cpu_busy_seconds: busy,
            memory_available_bytes: left.map_or(available, |left| left.min(available)),
            load_one_minute: parse::load(&self.read("proc/loadavg")?)
                .ok_or_else(|| wrong("proc/loadavg"))?,
            uptime_seconds: parse::uptime(&self.read("proc/uptime")?)
                .ok_or_else(|| wrong("proc/uptime"))?,
        })
    }
}

#[async_trait]
impl HostProbe for LinuxHost {
    async fn facts(&self) -> Result<HostFacts> {
        self.blocking(Self::read_facts).await
    }

    async fn resources(&self) -> Result<HostResources> {
        self.blocking(Self::read_resources).await
    }

    async fn usage(&self) -> Result<HostUsage> {
        self.blocking(Self::read_usage).await
    }
}

fn unreadable(path: &Path) -> Error {
    Error::new(
        ErrorCode::IoFailed,
        format!("cannot read {}", path.display()),
    )
}

/// Whether the kernel knows that the wall clock follows a reference (adjtimex(2): a daemon such as
/// chrony or systemd-timesyncd clears `STA_UNSYNC`); `None` where it cannot be asked.
pub fn clock_synchronised() -> Option<bool> {
    // SAFETY: `timex` is plain old data, for which all zeroes are valid; the call with no modes
    // only reads, and writes to nothing but the structure, which outlives it.
    let (result, status) = unsafe {
        let mut state: libc::timex = std::mem::zeroed();
        (libc::adjtimex(&raw mut state), state.status)
    };
    (result >= 0).then_some(status & libc::STA_UNSYNC == 0)
}

/// Whole CPUs: those of the mask, and no more than the quota pays for; a part of one counts as
/// one, because none at all would admit no VM.
fn usable_cpus(mask: u32, quota: Option<f64>) -> u32 {
    let quota = quota.map_or(u32::MAX, |quota| {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "float to integer saturates, and the value is positive"
        )]
        let whole = quota.floor() as u32;
        whole
    });
    mask.min(quota).max(1)
}

/// Size and free space (for an unprivileged user, statvfs(3)) of the file system of `path`, or of
/// the nearest folder above it that exists.
fn file_system(path: &Path) -> Result<(ByteSize, ByteSize)> {
    let mut last = None;
    for folder in path.ancestors() {
        let folder = if folder.as_os_str().is_empty() {
            Path::new(".")
        } else {
            folder
        };
        match rustix::fs::statvfs(folder) {
            Ok(found) => {
                let bytes =
                    |blocks: u64| ByteSize::from_bytes(blocks.saturating_mul(found.f_frsize));
                return Ok((bytes(found.f_blocks), bytes(found.f_bavail)));
            }
            Err(rustix::io::Errno::NOENT) => last = Some(rustix::io::Errno::NOENT),
            Err(error) => {
                last = Some(error);
                break;
            }
        }
    }
    let error = Error::new(
        ErrorCode::IoFailed,
        format!("cannot read the file system of {}", path.display()),
    );
    Err(last.map_or_else(|| error.clone(), |cause| error.clone().because(cause)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host made of files.
    fn fixture(files: &[(&str, &str)]) -> (tempfile::TempDir, LinuxHost) {
        let folder = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let host = LinuxHost {
            data_dir: folder.path().to_owned(),
            root: folder.path().to_owned(),
        };
        (folder, host)
    }

    const FILES: &[(&str, &str)] = &[
        ("proc/meminfo", "MemTotal: 8192 kB\nMemAvailable: 4096 kB\n"),
        ("proc/self/cgroup", "0::/box\n"),
        ("proc/stat", "cpu  100 0 100 5000 0 0 0 0 0 0\n"),
        ("proc/loadavg", "0.50 0.40 0.30 1/2 3\n"),
        ("proc/uptime", "61.5 100.0\n"),
        ("proc/cpuinfo", "model name : Test CPU\n"),
        ("proc/sys/kernel/random/boot_id", "b007\n"),
        ("etc/os-release", "PRETTY_NAME=\"Test OS 1\"\n"),
    ];

    #[tokio::test]
    async fn a_host_of_files_is_told_as_it_is() {
        let (_folder, host) = fixture(FILES);
        let facts = host.facts().await.unwrap();
        assert_eq!(facts.boot_id, "b007");
        assert_eq!(facts.operating_system, "Test OS 1");
        assert_eq!(facts.cpu_model, "Test CPU");
        assert!(!facts.kernel.is_empty());
        let usage = host.usage().await.unwrap();
        #[expect(clippy::cast_precision_loss, reason = "a small number")]
        let ticks = rustix::param::clock_ticks_per_second() as f64;
        assert!((usage.cpu_busy_seconds - 200.0 / ticks).abs() < 1e-9);
        assert_eq!(usage.memory_available_bytes, 4096 * 1024);
        assert_eq!(usage.uptime_seconds, 61);
        let resources = host.resources().await.unwrap();
        assert_eq!(resources.memory, ByteSize::from_mib(8));
        assert!(resources.disk > ByteSize::ZERO);
        assert!(resources.disk >= resources.disk_free);
    }

    #[tokio::test]
    async fn a_group_limit_below_the_machine_counts() {
        let mut files = FILES.to_vec();
        files.extend([
            ("sys/fs/cgroup/box/memory.max", "1048576\n"),
            ("sys/fs/cgroup/box/memory.current", "48576\n"),
            ("sys/fs/cgroup/box/cpu.max", "100000 100000\n"),
        ]);
        let (_folder, host) = fixture(&files);
        let resources = host.resources().await.unwrap();
        assert_eq!(resources.memory, ByteSize::from_mib(1));
        assert_eq!(resources.cpus, 1);
        assert_eq!(
            host.usage().await.unwrap().memory_available_bytes,
            1_000_000
        );
    }

    #[tokio::test]
    async fn what_is_missing_is_named() {
        let (_folder, host) = fixture(&[("proc/meminfo", "nothing of use\n")]);
        let error = host.usage().await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::IoFailed);
        assert!(error.message().contains("proc/stat"), "{error}");
        let error = host.resources().await.unwrap_err();
        assert!(error.message().contains("proc/meminfo"), "{error}");
    }

    #[tokio::test]
    async fn this_machine_is_readable_before_its_data_folder_is_made() {
        let host = LinuxHost::new("/var/lib/ghost-that-is-not-there/data");
        let resources = host.resources().await.unwrap();
        assert_eq!(
            resources.cpus as usize,
            std::thread::available_parallelism().unwrap().get()
        );
        assert!(resources.disk > ByteSize::ZERO);
        assert!(!host.facts().await.unwrap().boot_id.is_empty());
        assert!(host.usage().await.unwrap().uptime_seconds > 0);
    }

    #[test]
    fn a_part_of_a_cpu_is_one() {
        assert_eq!(usable_cpus(8, None), 8);
        assert_eq!(usable_cpus(8, Some(2.9)), 2);
        assert_eq!(usable_cpus(8, Some(0.2)), 1);
        assert_eq!(usable_cpus(2, Some(64.0)), 2);
    }
}
