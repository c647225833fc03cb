//! What the guest says of itself, from `/proc` and `/sys`.
//!
//! A thread of each report's own reads it: a file system that hangs delays reports, never calls. The
//! share of CPU time is the difference of two full samples, one for each report.

use std::collections::{BTreeMap, HashSet};
use std::ffi::CStr;
use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ghost_proto::guest::v1::Telemetry;
use ghost_proto::guest::v1::telemetry::{CloudInit, CpuTimes, Filesystem, Health, Interface};

use crate::Options;
use crate::calls::{Mail, Mailbox, lock};
use crate::freeze::unescape;
use crate::util::{clip, read_bounded};

const MOST_FILESYSTEMS: usize = 32;
const MOST_INTERFACES: usize = 16;
const MOST_ADDRESSES: usize = 8;
const MOST_USERS: usize = 16;
const MOST_ERRORS: usize = 10;
/// More often would be work for its own sake.
const SHORTEST: Duration = Duration::from_millis(200);

/// Makes reports while somebody wants them.
pub(crate) struct Reporter {
    sampler: Arc<Mutex<Sampler>>,
    mailbox: Mailbox,
    interval: Option<Duration>,
    next: Option<Instant>,
    under_way: bool,
}

impl Reporter {
    pub(crate) fn new(options: &Options, mailbox: Mailbox) -> Self {
        Self {
            sampler: Arc::new(Mutex::new(Sampler::new(&options.sysroot))),
            mailbox,
            interval: None,
            next: None,
            under_way: false,
        }
    }

    /// From now on, the first at once; `None` stops it.
    pub(crate) fn every(&mut self, interval: Option<Duration>) {
        self.interval = interval
            .filter(|time| !time.is_zero())
            .map(|time| time.max(SHORTEST));
        self.next = self.interval.map(|_| Instant::now());
    }

    pub(crate) fn due_at(&self) -> Option<Instant> {
        // The one under way wakes the loop when it is there.
        self.next.filter(|_| !self.under_way)
    }

    pub(crate) fn start(&mut self) {
        self.next = self
            .interval
            .and_then(|time| Instant::now().checked_add(time));
        let (sampler, mailbox) = (Arc::clone(&self.sampler), self.mailbox.clone());
        self.under_way = std::thread::Builder::new()
            .name("telemetry".into())
            .stack_size(256 * 1024)
            .spawn(move || {
                let report = lock(&sampler).sample();
                mailbox.put(Mail::Telemetry(Box::new(report)));
            })
            .is_ok();
    }

    pub(crate) fn arrived(&mut self) {
        self.under_way = false;
    }
}

/// Takes samples; keeps the last one's counters for the rate.
pub struct Sampler {
    sysroot: PathBuf,
    last: Option<[u64; 8]>,
    percent: f64,
}

impl Sampler {
    /// Of the guest under `sysroot`.
    pub fn new(sysroot: &Path) -> Self {
        Self {
            sysroot: sysroot.to_path_buf(),
            last: None,
            percent: 0.0,
        }
    }

    fn read(&self, path: &str) -> String {
        read_bounded(self.sysroot.join(path), 1024 * 1024).unwrap_or_default()
    }

    /// A report; what cannot be read is left at nothing.
    pub fn sample(&mut self) -> Telemetry {
        let stat = self.read("proc/stat");
        let (ticks, cpus) = cpu_ticks(&stat);
        if let Some(ticks) = ticks {
            if let Some(percent) = percent(self.last.as_ref(), &ticks) {
                self.percent = percent;
            }
            self.last = Some(ticks);
        }
        let memory = self.read("proc/meminfo");
        let memory = meminfo(&memory);
        let size = |name: &str| memory.get(name).copied().unwrap_or(0);
        let load = self.read("proc/loadavg");
        let mut load = load
            .split_ascii_whitespace()
            .map(|word| word.parse().unwrap_or(0.0));
        let mut next = || load.next().unwrap_or(0.0);
        let (load_1, load_5, load_15) = (next(), next(), next());
        let uptime = self.read("proc/uptime");
        Telemetry {
            cpu: ticks.map(|ticks| cpu_times(&ticks)),
            cpu_percent: self.percent,
            cpus,
            memory_total_bytes: size("MemTotal"),
            // Kernels before 3.14 do not say.
            memory_available_bytes: memory
                .get("MemAvailable")
                .copied()
                .unwrap_or_else(|| size("MemFree") + size("Buffers") + size("Cached")),
            swap_total_bytes: size("SwapTotal"),
            swap_free_bytes: size("SwapFree"),
            load_1,
            load_5,
            load_15,
            filesystems: filesystems(&self.read("proc/self/mounts")),
            interfaces: self.interfaces(),
            processes: self.processes(),
            users: self.users(),
            cloud_init: Some(cloud_init(&self.sysroot)),
            health: Some(Health {
                resident_bytes: resident(),
                ..Health::default()
            }),
            uptime_seconds: uptime
                .split_ascii_whitespace()
                .next()
                .and_then(|word| word.parse().ok())
                .unwrap_or(0.0),
        }
    }

    /// The share of CPU time that was not idle, of the last sample.
    pub fn cpu_percent(&self) -> f64 {
        self.percent
    }

    fn processes(&self) -> u32 {
        let Ok(entries) = fs::read_dir(self.sysroot.join("proc")) else {
            return 0;
        };
        let count = entries
            .flatten()
            .filter(|entry| {
                entry
                    .file_name()
                    .to_str()
                    .is_some_and(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
            })
            .count();
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    fn interfaces(&self) -> Vec<Interface> {
        let mut addresses = addresses();
        let mut list: Vec<Interface> = Vec::new();
        for line in self.read("proc/net/dev").lines().skip(2) {
            let Some((name, counters)) = line.split_once(':') else {
                continue;
            };
            let name = name.trim();
            let counters: Vec<u64> = counters
                .split_ascii_whitespace()
                .map(|word| word.parse().unwrap_or(0))
                .collect();
            // What a container's bridge adds by the hundred comes after what the host knows.
            if name == "lo" || list.len() >= MOST_INTERFACES {
                continue;
            }
            let mac = self.read(&format!("sys/class/net/{name}/address"));
            let mut of_this = addresses.remove(name).unwrap_or_default();
            of_this.truncate(MOST_ADDRESSES);
            list.push(Interface {
                name: clip(name, 64),
                mac: clip(mac.trim(), 64),
                addresses: of_this,
                receive_bytes: counters.first().copied().unwrap_or(0),
                transmit_bytes: counters.get(8).copied().unwrap_or(0),
            });
        }
        list
    }

    /// Who is logged on, from utmp(5), or from logind where distributions gave utmp up.
    fn users(&self) -> Vec<String> {
        let mut users: Vec<String> = Vec::new();
        let mut add = |name: String| {
            if !name.is_empty() && users.len() < MOST_USERS && !users.contains(&name) {
                users.push(name);
            }
        };
        for name in utmp(&self.sysroot.join("run/utmp")) {
            add(name);
        }
        if let Ok(entries) = fs::read_dir(self.sysroot.join("run/systemd/sessions")) {
            for entry in entries.flatten().take(256) {
                let text = read_bounded(entry.path(), 16 * 1024).unwrap_or_default();
                let value = |key: &str| {
                    text.lines()
                        .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
                        .unwrap_or_default()
                };
                if value("CLASS") == "user" {
                    add(clip(value("USER"), 64));
                }
            }
        }
        users
    }
}

/// user nice system idle iowait irq softirq steal, in ticks, and how many CPUs there are.
fn cpu_ticks(stat: &str) -> (Option<[u64; 8]>, u32) {
    let mut all = None;
    let mut cpus = 0;
    for line in stat.lines() {
        let Some(rest) = line.strip_prefix("cpu") else {
            continue;
        };
        if let Some(rest) = rest.strip_prefix(' ') {
            let mut ticks = [0; 8];
            for (slot, word) in ticks.iter_mut().zip(rest.split_ascii_whitespace()) {
                *slot = word.parse().unwrap_or(0);
            }
            all = Some(ticks);
        } else {
            cpus += 1;
        }
    }
    (all, cpus)
}

/// `None` where nothing can be said: no earlier sample, no time between them, or counters that ran
/// backwards (iowait does).
fn percent(before: Option<&[u64; 8]>, now: &[u64; 8]) -> Option<f64> {
    let before = before?;
    let mut total = 0u64;
    let mut idle = 0u64;
    for (at, (then, now)) in before.iter().zip(now).enumerate() {
        let passed = now.saturating_sub(*then);
        total = total.saturating_add(passed);
        if at == 3 || at == 4 {
            idle = idle.saturating_add(passed);
        }
    }
    (total > 0).then(|| (total - idle) as f64 * 100.0 / total as f64)
}

fn cpu_times(ticks: &[u64; 8]) -> CpuTimes {
    let frequency = rustix::param::clock_ticks_per_second().max(1) as f64;
    let seconds = |at: usize| ticks[at] as f64 / frequency;
    CpuTimes {
        user: seconds(0),
        nice: seconds(1),
        system: seconds(2),
        idle: seconds(3),
        iowait: seconds(4),
        irq: seconds(5),
        softirq: seconds(6),
        steal: seconds(7),
    }
}

fn meminfo(text: &str) -> BTreeMap<&str, u64> {
    text.lines()
        .filter_map(|line| {
            let (name, rest) = line.split_once(':')?;
            let kib: u64 = rest.split_ascii_whitespace().next()?.parse().ok()?;
            Some((name, kib.saturating_mul(1024)))
        })
        .collect()
}

/// Those on disks, each once. Network file systems are not asked: one whose server is gone would
/// hang for ever.
fn filesystems(mounts: &str) -> Vec<Filesystem> {
    let mut seen = HashSet::new();
    let mut list = Vec::new();
    for line in mounts.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let &[source, target, kind, ..] = fields.as_slice() else {
            continue;
        };
        let local = source.starts_with("/dev/") || matches!(kind, "zfs" | "btrfs" | "bcachefs");
        if !local || kind == "squashfs" || !seen.insert(source) || list.len() >= MOST_FILESYSTEMS {
            continue;
        }
        let target = unescape(target);
        let Ok(stat) = rustix::fs::statvfs(target.as_str()) else {
            continue;
        };
        list.push(Filesystem {
            mount_point: clip(&target, 255),
            kind: clip(kind, 32),
            total_bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
            available_bytes: stat.f_bavail.saturating_mul(stat.f_frsize),
        });
    }
    list
}

/// Addresses by interface, without loopback and link-local ones.
fn addresses() -> BTreeMap<String, Vec<String>> {
    let mut map: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut first: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: the list is the library's until `freeifaddrs`; each address is read as the structure
    // that its family names, and only where there is one.
    unsafe {
        if libc::getifaddrs(&raw mut first) != 0 {
            return map;
        }
        let mut at = first;
        while let Some(one) = at.as_ref() {
            at = one.ifa_next;
            let Some(address) = one.ifa_addr.as_ref() else {
                continue;
            };
            let text = match i32::from(address.sa_family) {
                libc::AF_INET => {
                    let address = one.ifa_addr.cast::<libc::sockaddr_in>().read_unaligned();
                    let ip = Ipv4Addr::from(u32::from_be(address.sin_addr.s_addr));
                    (!ip.is_loopback() && !ip.is_link_local()).then(|| ip.to_string())
                }
                libc::AF_INET6 => {
                    let address = one.ifa_addr.cast::<libc::sockaddr_in6>().read_unaligned();
                    let ip = Ipv6Addr::from(address.sin6_addr.s6_addr);
                    (!ip.is_loopback() && !ip.is_unicast_link_local()).then(|| ip.to_string())
                }
                _ => None,
            };
            if let Some(text) = text {
                let name = CStr::from_ptr(one.ifa_name).to_string_lossy().into_owned();
                map.entry(name).or_default().push(text);
            }
        }
        libc::freeifaddrs(first);
    }
    map
}

/// Names of `USER_PROCESS` records of utmp(5) on 64-bit Linux: 384 bytes each.
fn utmp(path: &Path) -> Vec<String> {
    const RECORD: usize = 384;
    const USER_PROCESS: i16 = 7;
    let Ok(bytes) = fs::read(path) else {
        return Vec::new();
    };
    bytes
        .chunks_exact(RECORD)
        .take(4096)
        .filter(|record| i16::from_ne_bytes([record[0], record[1]]) == USER_PROCESS)
        .map(|record| {
            let name = &record[44..76];
            let end = name.iter().position(|byte| *byte == 0).unwrap_or(32);
            String::from_utf8_lossy(&name[..end]).into_owned()
        })
        .collect()
}

/// From the files that cloud-init keeps for `cloud-init status`.
fn cloud_init(sysroot: &Path) -> CloudInit {
    let file = |name: &str| read_bounded(sysroot.join("run/cloud-init").join(name), 1024 * 1024);
    let mut found = CloudInit {
        status: "absent".into(),
        ..CloudInit::default()
    };
    let installed = ["usr/bin/cloud-init", "usr/local/bin/cloud-init"]
        .iter()
        .any(|path| sysroot.join(path).exists());
    if file("disabled").is_ok()
        || (installed && sysroot.join("etc/cloud/cloud-init.disabled").exists())
    {
        found.status = "disabled".into();
        return found;
    }
    let Ok(status) = file("status.json") else {
        if installed {
            found.status = "waiting".into();
        }
        return found;
    };
    let Ok(status) = serde_json::from_str::<serde_json::Value>(&status) else {
        // It is being written.
        found.status = "running".into();
        return found;
    };
    let v1 = &status["v1"];
    let mut errors = Vec::new();
    let mut add = |list: &serde_json::Value| {
        for text in list.as_array().into_iter().flatten() {
            let text = text
                .as_str()
                .map_or_else(|| text.to_string(), ToOwned::to_owned);
            let text = clip(&text, 500);
            if errors.len() < MOST_ERRORS && !errors.contains(&text) {
                errors.push(text);
            }
        }
    };
    let mut last = String::new();
    let mut all_ended = true;
    for stage in ["init-local", "init", "modules-config", "modules-final"] {
        let times = &v1[stage];
        if times["start"].is_number() {
            last = stage.to_owned();
        }
        all_ended &= times["finished"].is_number();
        add(&times["errors"]);
    }
    let running = v1["stage"].as_str().unwrap_or_default();
    if !running.is_empty() {
        last = clip(running, 64);
    }
    // Written when all is over.
    let result = file("result.json").ok();
    let over = result.is_some() || (all_ended && running.is_empty());
    if let Some(result) =
        result.and_then(|text| serde_json::from_str::<serde_json::Value>(&text).ok())
    {
        add(&result["v1"]["errors"]);
    }
    found.status = match (over, errors.is_empty()) {
        (true, true) => "done",
        (true, false) => "error",
        (false, _) => "running",
    }
    .into();
    found.stage = last;
    found.errors = errors;
    found
}

/// Resident memory of this process, bytes.
fn resident() -> u64 {
    let text = read_bounded("/proc/self/statm", 256).unwrap_or_default();
    let pages: u64 = text
        .split_ascii_whitespace()
        .nth(1)
        .and_then(|word| word.parse().ok())
        .unwrap_or(0);
    pages.saturating_mul(rustix::param::page_size() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_of_full_counters() {
        // Beyond 16 and 32 bits.
        let before = [1 << 40, 0, 70_000, 1 << 41, 5, 0, 0, 0];
        let mut now = before;
        now[0] += 30;
        now[2] += 20;
        now[3] += 40;
        now[4] += 10;
        assert_eq!(percent(Some(&before), &now), Some(50.0));
        assert_eq!(percent(None, &now), None);
        assert_eq!(percent(Some(&now), &now), None);
        assert_eq!(percent(Some(&now), &[0; 8]), None);
    }

    #[test]
    fn stat_is_read() {
        let (ticks, cpus) = cpu_ticks("cpu  1 2 3 4 5 6 7 8 9 10\ncpu0 1 2\ncpu1 1\nintr 5\n");
        assert_eq!((ticks, cpus), (Some([1, 2, 3, 4, 5, 6, 7, 8]), 2));
        assert_eq!(cpu_ticks("nonsense"), (None, 0));
    }

    #[test]
    fn this_machine_has_sensible_figures() {
        let mut sampler = Sampler::new(Path::new("/"));
        sampler.sample();
        let report = sampler.sample();
        assert!(report.cpus > 0 && report.processes > 0);
        assert!(report.memory_total_bytes >= report.memory_available_bytes);
        assert!(report.memory_available_bytes > 0 && report.uptime_seconds > 0.0);
        assert!((0.0..=100.0).contains(&report.cpu_percent));
        assert!(report.health.unwrap().resident_bytes > 0);
        assert!(report.cpu.unwrap().user > 0.0);
    }

    #[test]
    fn cloud_init_is_told_in_its_stages() {
        let root = tempfile::tempdir().unwrap();
        let run = root.path().join("run/cloud-init");
        fs::create_dir_all(&run).unwrap();
        let state = || {
            let found = cloud_init(root.path());
            (found.status, found.stage, found.errors)
        };
        assert_eq!(state(), ("absent".into(), String::new(), vec![]));
        fs::create_dir_all(root.path().join("usr/bin")).unwrap();
        fs::write(root.path().join("usr/bin/cloud-init"), "").unwrap();
        assert_eq!(state().0, "waiting");
        fs::write(
            run.join("status.json"),
            r#"{"v1":{"datasource":"x","init":{"errors":[],"finished":2.0,"start":1.0},
               "init-local":{"errors":[],"finished":1.0,"start":0.5},
               "modules-config":{"errors":["('ssh', ProcessExecutionError())"],"finished":null,"start":3.0},
               "modules-final":{"errors":[],"finished":null,"start":null},"stage":"modules-config"}}"#,
        )
        .unwrap();
        assert_eq!(
            state(),
            (
                "running".into(),
                "modules-config".into(),
                vec!["('ssh', ProcessExecutionError())".into()]
            )
        );
        fs::write(
            run.join("result.json"),
            r#"{"v1":{"datasource":"x","errors":["late"]}}"#,
        )
        .unwrap();
        let (status, _, errors) = state();
        assert_eq!((status.as_str(), errors.len()), ("error", 2));
        fs::write(run.join("status.json"), "{").unwrap();
        assert_eq!(state().0, "running");
        fs::write(run.join("disabled"), "").unwrap();
        assert_eq!(state().0, "disabled");
    }

    #[test]
    fn utmp_names_users_only() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut bytes = vec![0u8; 384 * 2 + 17];
        bytes[..2].copy_from_slice(&7i16.to_ne_bytes());
        bytes[44..47].copy_from_slice(b"ada");
        bytes[384..386].copy_from_slice(&2i16.to_ne_bytes());
        bytes[384 + 44..384 + 50].copy_from_slice(b"reboot");
        fs::write(file.path(), bytes).unwrap();
        assert_eq!(utmp(file.path()), ["ada"]);
    }
}
