//! What happens inside VMs.

use std::net::IpAddr;
use std::time::Duration;

use ghost_application::GuestSample;
use ghost_application::guest::{
    GuestAccessView, GuestHistoryView, GuestPing, GuestStatusView, GuestUpdateView, LockdownView,
    TelemetryView,
};
use ghost_domain::guest::{
    AuditEntry, AuditVerdict, DirectoryMake, ExecExit, ExecRequest, FileSum, FileWrite,
    FreezeOutcome, GuestDirectory, GuestFile, GuestFileKind, GuestProgram, LinkMake, Terminal,
};
use ghost_domain::ports::ExecEvent;
use ghost_domain::{Error, ErrorCode, Result, Timestamp};
use ghost_proto::agent::v1 as message;

use super::{duration, filled, length_of, timestamp};

/// Most bytes of output in one message or frame.
pub const MOST_PIECE: usize = 256 * 1024;

/// What a caller wants to run.
///
/// # Errors
/// `InvalidArgument` for what cannot be a terminal's size or a length of time.
pub fn exec_request(start: message::ExecStart) -> Result<ExecRequest> {
    if start.login_shell && !(start.program.is_empty() && start.arguments.is_empty()) {
        return Err(Error::new(
            ErrorCode::InvalidArgument,
            "a login shell is no program with arguments",
        )
        .field("login_shell", "not together with program or arguments"));
    }
    Ok(ExecRequest {
        program: if start.login_shell {
            GuestProgram::LoginShell
        } else {
            GuestProgram::Command {
                program: start.program,
                arguments: start.arguments,
            }
        },
        environment: start.environment.into_iter().collect(),
        working_directory: filled(start.working_directory),
        user: filled(start.user),
        group: filled(start.group),
        stdin: start.stdin,
        terminal: start.terminal.map(terminal).transpose()?,
        timeout: start
            .timeout
            .as_ref()
            .map(|given| length_of(given, "timeout"))
            .transpose()?,
        max_output_bytes: Some(start.max_output_bytes).filter(|most| *most > 0),
    })
}

/// A terminal; an empty kind is what every guest knows.
fn terminal(given: message::GuestTerminal) -> Result<Terminal> {
    let (rows, columns) = terminal_size(given.rows, given.columns)?;
    let kind = match given.kind.as_str() {
        "" => "xterm-256color".to_owned(),
        _ => given.kind,
    };
    terminal_kind(&kind)?;
    Ok(Terminal {
        rows,
        columns,
        kind,
    })
}

/// The size of a terminal.
///
/// # Errors
/// `InvalidArgument` beyond what a terminal's size holds (`struct winsize` of ioctl_tty(2)).
pub fn terminal_size(rows: u32, columns: u32) -> Result<(u16, u16)> {
    let size = |given| u16::try_from(given).ok().filter(|given| *given > 0);
    size(rows).zip(size(columns)).ok_or_else(|| {
        Error::new(ErrorCode::InvalidArgument, "no terminal has that size")
            .field("terminal", "1 to 65535 rows and columns")
    })
}

/// Checks a value of `TERM`, which programs in the guest make a file's path of.
///
/// # Errors
/// `InvalidArgument`.
pub fn terminal_kind(kind: &str) -> Result<()> {
    let legal = kind.len() <= 64
        && kind
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_.+".contains(&byte));
    if legal {
        return Ok(());
    }
    Err(
        Error::new(ErrorCode::InvalidArgument, "no terminal is of that kind").field(
            "terminal.kind",
            "at most 64 of A-Z, a-z, 0-9, '-', '_', '.' and '+'",
        ),
    )
}

/// A signal's number.
///
/// # Errors
/// `InvalidArgument` for what Linux does not have (signal(7)).
pub fn signal(number: u32) -> Result<u8> {
    u8::try_from(number)
        .ok()
        .filter(|number| (1..=64).contains(number))
        .ok_or_else(|| {
            Error::new(ErrorCode::InvalidArgument, "there is no such signal")
                .field("signal", "1 to 64")
        })
}

/// What a program does, as one message.
pub fn exec_output(event: ExecEvent) -> message::ExecOutput {
    use message::exec_output::Output;
    message::ExecOutput {
        output: Some(match event {
            ExecEvent::Started(pid) => Output::Started(message::ExecStarted { pid }),
            ExecEvent::Stdout(data) => Output::Stdout(data.into()),
            ExecEvent::Stderr(data) => Output::Stderr(data.into()),
            ExecEvent::Exited(exit) => Output::Exited(exec_exit(&exit)),
        }),
    }
}

/// How a program ended.
pub fn exec_exit(exit: &ExecExit) -> message::ExecExited {
    message::ExecExited {
        code: exit.code.into(),
        signal: exit.signal.unwrap_or_default().into(),
        timed_out: exit.timed_out,
        cancelled: exit.cancelled,
        truncated_bytes: exit.truncated_bytes,
    }
}

/// A file in a guest; an empty name for one that was named by the caller.
pub fn guest_file(name: String, file: &GuestFile) -> message::GuestFile {
    message::GuestFile {
        name,
        kind: match file.kind {
            GuestFileKind::File => message::GuestFileKind::File,
            GuestFileKind::Directory => message::GuestFileKind::Directory,
            GuestFileKind::Symlink => message::GuestFileKind::Symlink,
            GuestFileKind::Other => message::GuestFileKind::Other,
        }
        .into(),
        size_bytes: file.size,
        mode: file.mode,
        uid: file.uid,
        gid: file.gid,
        modified_at: file.modified_at.map(timestamp),
        symlink_target: file.symlink_target.clone().unwrap_or_default(),
    }
}

/// A page of a directory.
pub fn guest_directory(page: GuestDirectory) -> message::ListGuestFilesResponse {
    message::ListGuestFilesResponse {
        files: page
            .entries
            .into_iter()
            .map(|(name, file)| guest_file(name, &file))
            .collect(),
        more: page.more,
    }
}

/// What a transfer carried.
pub fn file_sum(sum: &FileSum) -> message::GuestFileSum {
    message::GuestFileSum {
        size_bytes: sum.size,
        checksum: sum.checksum.to_vec(),
    }
}

/// Permission bits.
///
/// # Errors
/// `InvalidArgument` for bits that are none (inode(7)).
pub fn mode(given: u32) -> Result<u32> {
    if given <= 0o7777 {
        return Ok(given);
    }
    Err(
        Error::new(ErrorCode::InvalidArgument, "these are no permission bits")
            .field("mode", "at most 07777"),
    )
}

/// What a caller wants to write.
///
/// # Errors
/// `InvalidArgument` naming the field.
pub fn file_write(start: message::WriteGuestFileStart) -> Result<FileWrite> {
    let checksum = match start.checksum.len() {
        0 => None,
        _ => Some(<[u8; 8]>::try_from(start.checksum.as_slice()).map_err(|_| {
            Error::new(ErrorCode::InvalidArgument, "this is no XXH64 checksum")
                .field("checksum", "8 bytes, big endian")
        })?),
    };
    if start.resume && checksum.is_none() {
        return Err(Error::new(
            ErrorCode::InvalidArgument,
            "a transfer goes on only where it is known what the whole is",
        )
        .field("checksum", "needed with resume"));
    }
    Ok(FileWrite {
        path: start.path,
        size: start.size_bytes,
        mode: mode(start.mode)?,
        owner: start.keep_owner.then_some((start.uid, start.gid)),
        modified_at: start.modified_at.as_ref().map(stamp).transpose()?,
        checksum,
        resume: start.resume,
        make_parents: start.make_parents,
        no_replace: start.no_replace,
    })
}

/// What directory a caller wants made.
///
/// # Errors
/// `InvalidArgument` naming the field.
pub fn directory_make(request: message::MakeGuestDirectoryRequest) -> Result<DirectoryMake> {
    Ok(DirectoryMake {
        path: request.path,
        mode: mode(request.mode)?,
        owner: request.keep_owner.then_some((request.uid, request.gid)),
        make_parents: request.make_parents,
    })
}

/// What symbolic link a caller wants made.
///
/// # Errors
/// `InvalidArgument` naming the field.
pub fn link_make(request: message::MakeGuestLinkRequest) -> Result<LinkMake> {
    Ok(LinkMake {
        path: request.path,
        target: request.target,
        owner: request.keep_owner.then_some((request.uid, request.gid)),
        modified_at: request.modified_at.as_ref().map(stamp).transpose()?,
    })
}

/// A wall-clock stamp that a caller gave.
///
/// # Errors
/// `InvalidArgument` for one that no calendar knows (years 1 to 9999, as `timestamp.proto` has it).
pub fn stamp(given: &prost_types::Timestamp) -> Result<Timestamp> {
    const FIRST: i64 = -62_135_596_800;
    const LAST: i64 = 253_402_300_799;
    if !(FIRST..=LAST).contains(&given.seconds) || !(0..1_000_000_000).contains(&given.nanos) {
        return Err(
            Error::new(ErrorCode::InvalidArgument, "this is no time of day")
                .because("years 1 to 9999 are possible"),
        );
    }
    let millis = given.seconds * 1000 + i64::from(given.nanos / 1_000_000);
    Ok(Timestamp::from_unix_millis(millis))
}

/// An address that a caller gave.
///
/// # Errors
/// `InvalidArgument`.
pub fn address(text: &str) -> Result<IpAddr> {
    text.parse().map_err(|_| {
        Error::new(ErrorCode::InvalidArgument, "this is no IP address").field(
            "address",
            "an IPv4 or IPv6 address, without a prefix length",
        )
    })
}

/// What became of an update.
pub fn guest_update(view: &GuestUpdateView) -> message::UpdateGuestResponse {
    message::UpdateGuestResponse {
        from_version: view.from.clone(),
        to_version: view.to.clone(),
        replaced: view.replaced,
    }
}

/// How the guest access of a VM stands.
pub fn guest_access(view: GuestAccessView) -> message::GuestAccess {
    message::GuestAccess {
        vm_id: view.vm.to_string(),
        access: view.access,
        sessions_cut: view.sessions_cut,
    }
}

/// How the way into a guest stands.
pub fn guest_status(view: GuestStatusView) -> message::GuestStatus {
    let hello = view.hello.unwrap_or_default();
    message::GuestStatus {
        vm_id: view.vm_id.to_string(),
        vm_name: view.vm_name.to_string(),
        layers: view
            .layers
            .into_iter()
            .map(|layer| message::GuestLayer {
                name: layer.name.to_owned(),
                ok: layer.ok,
                detail: layer.detail,
                hint: layer.hint,
            })
            .collect(),
        ready: view.ready,
        agent_version: hello.agent_version,
        protocol_version: hello.protocol_version,
        capabilities: hello.capabilities,
        operating_system: hello.operating_system,
        kernel: hello.kernel,
        hostname: hello.hostname,
        connected_at: view.connected_at.map(timestamp),
        last_seen_age: view.last_seen_age.map(duration),
        outdated: view.outdated,
    }
}

/// The answer to a ping.
pub fn guest_ping(ping: GuestPing) -> message::PingGuestResponse {
    message::PingGuestResponse {
        round_trip: Some(duration(ping.round_trip)),
        agent_version: ping.agent_version,
    }
}

/// What freezing or thawing did.
pub fn freeze(outcome: FreezeOutcome) -> message::FreezeGuestResponse {
    message::FreezeGuestResponse {
        count: outcome.count,
        warnings: outcome.warnings,
    }
}

/// How a VM fared.
pub fn guest_history(view: GuestHistoryView) -> message::GuestHistory {
    message::GuestHistory {
        vm_id: view.vm_id.to_string(),
        vm_name: view.vm_name.to_string(),
        samples: view.samples.iter().map(guest_sample).collect(),
    }
}

fn guest_sample(sample: &GuestSample) -> message::GuestSample {
    message::GuestSample {
        at: Some(timestamp(sample.at)),
        source: sample.source.as_str().to_owned(),
        cpu_percent: sample.cpu_percent,
        memory_used_bytes: sample.memory_used_bytes,
        memory_total_bytes: sample.memory_total_bytes,
        disk_read_bytes_per_second: sample.disk_read_bytes_per_second.unwrap_or_default(),
        disk_write_bytes_per_second: sample.disk_write_bytes_per_second.unwrap_or_default(),
        network_receive_bytes_per_second: sample
            .network_receive_bytes_per_second
            .unwrap_or_default(),
        network_transmit_bytes_per_second: sample
            .network_transmit_bytes_per_second
            .unwrap_or_default(),
    }
}

/// The newest that is known of a running VM.
pub fn guest_telemetry(view: &TelemetryView) -> message::GuestTelemetry {
    let mut told = message::GuestTelemetry {
        vm_id: view.vm_id.to_string(),
        vm_name: view.vm_name.to_string(),
        sample: view.sample.as_ref().map(guest_sample),
        age: view.sample.is_some().then(|| duration(view.age)),
        ..Default::default()
    };
    if let Some(hello) = &view.hello {
        told.operating_system.clone_from(&hello.operating_system);
        told.kernel.clone_from(&hello.kernel);
    }
    let Some(report) = view.report.as_deref() else {
        return told;
    };
    told.cpus = report.cpus;
    told.swap_total_bytes = report.swap_total_bytes;
    told.swap_used_bytes = report
        .swap_total_bytes
        .saturating_sub(report.swap_free_bytes);
    [told.load_1, told.load_5, told.load_15] = report.load;
    told.filesystems = report
        .filesystems
        .iter()
        .map(|one| message::GuestFilesystem {
            mount_point: one.mount_point.clone(),
            kind: one.kind.clone(),
            total_bytes: one.total_bytes,
            available_bytes: one.available_bytes,
        })
        .collect();
    told.interfaces = report
        .interfaces
        .iter()
        .map(|one| message::GuestInterface {
            name: one.name.clone(),
            mac: one.mac.clone(),
            addresses: one.addresses.iter().map(ToString::to_string).collect(),
            receive_bytes: one.receive_bytes,
            transmit_bytes: one.transmit_bytes,
        })
        .collect();
    told.processes = report.processes;
    told.users.clone_from(&report.users);
    told.cloud_init = Some(message::GuestCloudInit {
        status: report.cloud_init.status.clone(),
        stage: report.cloud_init.stage.clone(),
        errors: report.cloud_init.errors.clone(),
    });
    told.uptime_seconds = report.uptime_seconds;
    told.agent_resident_bytes = report.agent_resident_bytes;
    told
}

/// Whether the ways into guests are closed.
pub fn lockdown(view: LockdownView) -> message::Lockdown {
    let sessions_cut = view.sessions_cut;
    view.lockdown.map_or_else(
        || message::Lockdown {
            sessions_cut,
            ..Default::default()
        },
        |lockdown| message::Lockdown {
            active: true,
            reason: lockdown.reason,
            set_by: lockdown.set_by,
            since: Some(timestamp(lockdown.since)),
            sessions_cut,
        },
    )
}

/// A line of the audit log.
pub fn audit_entry(entry: AuditEntry) -> message::AuditEntry {
    let record = entry.record;
    message::AuditEntry {
        sequence: entry.sequence,
        at: Some(timestamp(entry.at)),
        principal: record.principal,
        vm_id: record.vm_id,
        vm_name: record.vm_name,
        action: record.action,
        detail: record.detail,
        outcome: record.outcome,
        bytes_in: record.bytes_in,
        bytes_out: record.bytes_out,
        duration: record.duration.map(duration),
        request_id: record.request_id,
        hash: hex::encode(entry.hash),
    }
}

/// Whether the audit log is whole.
pub fn audit_verdict(verdict: AuditVerdict) -> message::VerifyAuditResponse {
    let (broken_at, detail) = verdict.broken.clone().unwrap_or_default();
    message::VerifyAuditResponse {
        intact: verdict.broken.is_none(),
        entries: verdict.entries,
        broken_at,
        detail,
        head: hex::encode(verdict.head),
    }
}

/// How long a caller gives; `None` where nothing is said.
///
/// # Errors
/// As [`length_of`].
pub fn optional_length(
    given: Option<&prost_types::Duration>,
    field: &str,
) -> Result<Option<Duration>> {
    given.map(|given| length_of(given, field)).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_run_is_refused_before_it_reaches_a_guest() {
        let start = message::ExecStart {
            program: "sh".into(),
            terminal: Some(message::GuestTerminal {
                rows: 24,
                columns: 80,
                kind: String::new(),
            }),
            ..Default::default()
        };
        let request = exec_request(start.clone()).unwrap();
        assert_eq!(request.terminal.unwrap().kind, "xterm-256color");
        assert_eq!(request.max_output_bytes, None);
        let bad = [
            message::ExecStart {
                login_shell: true,
                ..start.clone()
            },
            message::ExecStart {
                terminal: Some(message::GuestTerminal::default()),
                ..start.clone()
            },
            message::ExecStart {
                terminal: Some(message::GuestTerminal {
                    rows: 1,
                    columns: 65_536,
                    kind: String::new(),
                }),
                ..start.clone()
            },
            message::ExecStart {
                terminal: Some(message::GuestTerminal {
                    rows: 1,
                    columns: 1,
                    kind: "../../etc/passwd".into(),
                }),
                ..start.clone()
            },
            message::ExecStart {
                timeout: Some(prost_types::Duration {
                    seconds: -1,
                    nanos: 0,
                }),
                ..start
            },
        ];
        for bad in bad {
            let error = exec_request(bad).unwrap_err();
            assert_eq!(error.code(), ErrorCode::InvalidArgument);
            assert!(!error.violations().is_empty());
        }
        for number in [0, 65, 256, u32::MAX] {
            assert!(signal(number).is_err(), "{number}");
        }
        assert_eq!(signal(15).unwrap(), 15);
    }

    #[test]
    fn a_write_is_checked_and_an_owner_is_kept_only_where_it_is_wanted() {
        let start = message::WriteGuestFileStart {
            path: "/a".into(),
            mode: 0o644,
            uid: 7,
            gid: 8,
            ..Default::default()
        };
        assert_eq!(file_write(start.clone()).unwrap().owner, None);
        let kept = message::WriteGuestFileStart {
            keep_owner: true,
            checksum: vec![1; 8],
            resume: true,
            ..start.clone()
        };
        let kept = file_write(kept).unwrap();
        assert_eq!((kept.owner, kept.checksum), (Some((7, 8)), Some([1; 8])));
        let bad = [
            message::WriteGuestFileStart {
                resume: true,
                ..start.clone()
            },
            message::WriteGuestFileStart {
                checksum: vec![1; 16],
                ..start.clone()
            },
            message::WriteGuestFileStart {
                mode: 0o10_000,
                ..start.clone()
            },
            message::WriteGuestFileStart {
                modified_at: Some(prost_types::Timestamp {
                    seconds: i64::MAX,
                    nanos: 0,
                }),
                ..start
            },
        ];
        for bad in bad {
            assert_eq!(
                file_write(bad).unwrap_err().code(),
                ErrorCode::InvalidArgument
            );
        }
    }

    #[test]
    fn stamps_survive_both_ways() {
        for millis in [0, -1, 1_700_000_000_123, -62_135_596_800_000] {
            let at = Timestamp::from_unix_millis(millis);
            assert_eq!(stamp(&timestamp(at)).unwrap(), at);
        }
    }
}
