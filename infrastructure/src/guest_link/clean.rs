//! What a guest says, made harmless: bounded, finite, without characters that drive terminals.
//!
//! Nothing of it becomes true by that (threat T8): it is what a stranger claims, in a form that
//! neither takes room nor breaks what shows it.

use std::net::IpAddr;

use ghost_domain::Timestamp;
use ghost_domain::guest::{
    GuestCloudInit, GuestCpuTimes, GuestFile, GuestFileKind, GuestFilesystem, GuestHello,
    GuestInterface, GuestTelemetry,
};
use ghost_proto::guest::v1;
use ghost_proto::guest::{NEWEST_VERSION, OLDEST_VERSION};

/// The largest number that all who read it as JSON or in a signed field can hold.
const MOST_COUNT: u64 = i64::MAX as u64;
/// Ten thousand years, in seconds: above it no clock of a guest is right.
const MOST_SECONDS: f64 = 3.2e11;

/// Whether a character moves the cursor, hides text or turns its direction.
fn is_unsafe(character: char) -> bool {
    character.is_control()
        || matches!(character,
            '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// At most `most` bytes of a text, unsafe characters replaced by U+FFFD.
pub fn text(text: &str, most: usize) -> String {
    let mut clean = String::with_capacity(text.len().min(most));
    for character in text.chars() {
        let character = if is_unsafe(character) {
            char::REPLACEMENT_CHARACTER
        } else {
            character
        };
        if clean.len() + character.len_utf8() > most {
            break;
        }
        clean.push(character);
    }
    clean
}

/// A guest's words within an error: bounded, with line breaks as blanks.
pub(super) fn words(words: &str) -> String {
    let lines: Vec<&str> = words
        .split(['\n', '\r', '\t'])
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .take(16)
        .collect();
    text(&lines.join(" "), 512)
}

fn number(value: f64, most: f64) -> f64 {
    if value.is_finite() {
        value.clamp(0.0, most)
    } else {
        0.0
    }
}

fn count(value: u64) -> u64 {
    value.min(MOST_COUNT)
}

/// One of the words that the protocol knows, or nothing.
fn one_of(word: &str, known: &[&str]) -> String {
    known
        .iter()
        .find(|known| **known == word)
        .map_or_else(String::new, |known| (*known).to_owned())
}

pub(super) fn hello(ready: &v1::AgentReady) -> GuestHello {
    let version = ready.protocol_version;
    GuestHello {
        agent_version: text(&ready.agent_version, 64),
        protocol_version: if (OLDEST_VERSION..=NEWEST_VERSION).contains(&version) {
            version
        } else {
            0
        },
        capabilities: ready
            .capabilities
            .iter()
            .filter(|name| {
                (1..=32).contains(&name.len())
                    && name
                        .bytes()
                        .all(|byte| byte.is_ascii_lowercase() || byte == b'_')
            })
            .take(32)
            .cloned()
            .collect(),
        boot_id: text(&ready.boot_id, 64),
        operating_system: text(&ready.operating_system, 128),
        kernel: text(&ready.kernel, 128),
        hostname: text(&ready.hostname, 253),
        program_sha256: match ready.program_sha256.len() {
            32 => ready.program_sha256.clone(),
            _ => Vec::new(),
        },
    }
}

pub(super) fn telemetry(report: &v1::Telemetry) -> GuestTelemetry {
    let cpu = report.cpu.unwrap_or_default();
    let seconds = |value| number(value, MOST_SECONDS);
    let total = count(report.memory_total_bytes);
    let swap = count(report.swap_total_bytes);
    let cloud_init = report.cloud_init.clone().unwrap_or_default();
    let health = report.health.unwrap_or_default();
    GuestTelemetry {
        cpu: GuestCpuTimes {
            user: seconds(cpu.user),
            nice: seconds(cpu.nice),
            system: seconds(cpu.system),
            idle: seconds(cpu.idle),
            iowait: seconds(cpu.iowait),
            irq: seconds(cpu.irq),
            softirq: seconds(cpu.softirq),
            steal: seconds(cpu.steal),
        },
        cpu_percent: number(report.cpu_percent, 100.0),
        cpus: report.cpus.min(1 << 16),
        memory_total_bytes: total,
        memory_available_bytes: report.memory_available_bytes.min(total),
        swap_total_bytes: swap,
        swap_free_bytes: report.swap_free_bytes.min(swap),
        load: [report.load_1, report.load_5, report.load_15].map(|load| number(load, 1e6)),
        filesystems: report
            .filesystems
            .iter()
            .take(32)
            .map(|filesystem| GuestFilesystem {
                mount_point: text(&filesystem.mount_point, 256),
                kind: text(&filesystem.kind, 32),
                total_bytes: count(filesystem.total_bytes),
                available_bytes: count(filesystem.available_bytes.min(filesystem.total_bytes)),
            })
            .collect(),
        interfaces: report
            .interfaces
            .iter()
            .take(16)
            .map(|interface| GuestInterface {
                name: text(&interface.name, 32),
                mac: text(&interface.mac, 32),
                addresses: interface
                    .addresses
                    .iter()
                    // "10.0.0.5/24" is how some write them.
                    .filter_map(|address| address.split('/').next()?.parse::<IpAddr>().ok())
                    .take(8)
                    .collect(),
                receive_bytes: count(interface.receive_bytes),
                transmit_bytes: count(interface.transmit_bytes),
            })
            .collect(),
        processes: report.processes.min(1 << 22),
        users: report
            .users
            .iter()
            .take(16)
            .map(|user| text(user, 64))
            .collect(),
        cloud_init: GuestCloudInit {
            status: one_of(
                &cloud_init.status,
                &["absent", "waiting", "running", "done", "error", "disabled"],
            ),
            stage: one_of(
                &cloud_init.stage,
                &["init-local", "init", "modules-config", "modules-final"],
            ),
            errors: cloud_init
                .errors
                .iter()
                .take(10)
                .map(|error| words(error))
                .collect(),
        },
        uptime_seconds: seconds(report.uptime_seconds),
        agent_resident_bytes: count(health.resident_bytes),
        frozen: health.frozen,
    }
}

/// Milliseconds since the epoch, saturating at the ends.
fn time(stamp: &prost_types::Timestamp) -> Timestamp {
    Timestamp::from_unix_millis(
        stamp
            .seconds
            .saturating_mul(1000)
            .saturating_add(i64::from(stamp.nanos.clamp(0, 999_999_999)) / 1_000_000),
    )
}

/// Attributes of a file. A link's target is kept as it is, for those who copy it: whoever prints it
/// escapes it.
pub(super) fn file(attributes: &v1::FileAttributes) -> GuestFile {
    let kind = match attributes.kind() {
        v1::FileKind::File => GuestFileKind::File,
        v1::FileKind::Directory => GuestFileKind::Directory,
        v1::FileKind::Symlink => GuestFileKind::Symlink,
        v1::FileKind::Other | v1::FileKind::Unspecified => GuestFileKind::Other,
    };
    let target = &attributes.symlink_target;
    GuestFile {
        kind,
        size: count(attributes.size_bytes),
        mode: attributes.mode & 0o7777,
        uid: attributes.uid,
        gid: attributes.gid,
        modified_at: attributes.modified_at.as_ref().map(time),
        symlink_target: (kind == GuestFileKind::Symlink
            && !target.is_empty()
            && target.len() <= 4096
            && !target.contains('\0'))
        .then(|| target.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_drives_a_terminal_is_replaced_and_all_is_bounded() {
        assert_eq!(
            text("a\x1b[31mb\r\n\u{202e}c\u{9b}d", 64),
            "a\u{fffd}[31mb\u{fffd}\u{fffd}\u{fffd}c\u{fffd}d"
        );
        assert_eq!(text("äöü", 5), "äö");
        assert_eq!(
            words("  no such file\r\n\tor directory\0 "),
            "no such file or directory\u{fffd}"
        );
        assert!(words(&"x\n".repeat(10_000)).len() <= 512);
    }

    #[test]
    fn numbers_are_finite_and_sane() {
        let lies = v1::Telemetry {
            cpu: Some(v1::telemetry::CpuTimes {
                user: f64::NAN,
                system: f64::INFINITY,
                idle: -5.0,
                steal: 1e300,
                ..Default::default()
            }),
            cpu_percent: 250.0,
            cpus: u32::MAX,
            memory_total_bytes: u64::MAX,
            memory_available_bytes: u64::MAX,
            swap_total_bytes: 5,
            swap_free_bytes: u64::MAX,
            load_1: f64::NEG_INFINITY,
            load_5: 1e18,
            uptime_seconds: f64::NAN,
            processes: u32::MAX,
            ..Default::default()
        };
        let clean = telemetry(&lies);
        assert_eq!(clean.cpu.user, 0.0);
        assert_eq!(clean.cpu.system, 0.0);
        assert_eq!(clean.cpu.idle, 0.0);
        assert_eq!(clean.cpu.steal, MOST_SECONDS);
        assert_eq!(clean.cpu_percent, 100.0);
        assert_eq!(clean.memory_total_bytes, MOST_COUNT);
        assert_eq!(clean.swap_free_bytes, 5);
        assert_eq!(clean.load, [0.0, 1e6, 0.0]);
        assert_eq!(clean.uptime_seconds, 0.0);
        assert!(clean.cpus <= 1 << 16 && clean.processes <= 1 << 22);
    }

    #[test]
    fn lists_are_bounded_and_addresses_are_addresses() {
        let lies = v1::Telemetry {
            filesystems: vec![
                v1::telemetry::Filesystem {
                    mount_point: "/\n".repeat(9999),
                    ..Default::default()
                };
                1000
            ],
            interfaces: vec![
                v1::telemetry::Interface {
                    name: "e".repeat(999),
                    addresses: vec!["nonsense".into(), "10.1.2.3/24".into(), "fe80::1".into()],
                    ..Default::default()
                };
                1000
            ],
            users: vec!["\x1b]0;x\x07".into(); 1000],
            cloud_init: Some(v1::telemetry::CloudInit {
                status: "done\n".into(),
                stage: "init".into(),
                errors: vec!["e".into(); 1000],
            }),
            ..Default::default()
        };
        let clean = telemetry(&lies);
        assert_eq!((clean.filesystems.len(), clean.interfaces.len()), (32, 16));
        assert_eq!((clean.users.len(), clean.cloud_init.errors.len()), (16, 10));
        assert!(clean.filesystems[0].mount_point.len() <= 256);
        assert_eq!(clean.interfaces[0].addresses.len(), 2);
        assert!(!clean.users[0].contains('\x1b'));
        // Not a word of the protocol: it decides whether somebody goes on waiting.
        assert_eq!(clean.cloud_init.status, "");
        assert_eq!(clean.cloud_init.stage, "init");
    }
}
