//! `ghost-agent doctor`: is this host fit to run VMs, and if not, what to do about it.
//!
//! [`collect`] looks at the host and changes nothing; [`checks`] holds pure functions from what
//! was seen to findings, so that every finding can be tested without a host that has the fault.

mod checks;
mod collect;
mod facts;
mod firewall;

use std::io::Write;

use ghost_domain::{Error, ErrorCode, Result};
use serde_json::json;

use crate::config::Loaded;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    /// As it should be.
    Ok,
    /// Something will not work, or not well.
    Warning,
    /// No VM can be run like this.
    Fatal,
}

impl Level {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Fatal => "fatal",
        }
    }
}

/// What was found about one thing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    /// What was looked at; stable, for scripts.
    pub(crate) check: &'static str,
    /// How bad it is.
    pub(crate) level: Level,
    /// What was found, for people.
    pub(crate) message: String,
    /// The command that mends it.
    pub(crate) fix: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, message: impl Into<String>) -> Self {
        Self {
            check,
            level: Level::Ok,
            message: message.into(),
            fix: None,
        }
    }

    fn warning(check: &'static str, message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            check,
            level: Level::Warning,
            message: message.into(),
            fix: Some(fix.into()),
        }
    }

    fn fatal(check: &'static str, message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            level: Level::Fatal,
            ..Self::warning(check, message, fix)
        }
    }
}

/// As what findings are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Text,
    /// An array of objects: check, level, message, fix.
    Json,
}

/// Looks at everything and writes what was found. Whether anything is fatal.
///
/// # Errors
/// `Internal` where the look itself cannot be made; `IoFailed` where nothing can be written.
pub(crate) fn doctor(loaded: &Loaded, output: Output, out: &mut dyn Write) -> Result<bool> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|cause| Error::internal("the async runtime cannot be started").because(cause))?;
    let facts = runtime.block_on(collect::everything(&loaded.config));
    runtime.shutdown_background();
    let findings = checks::all(&facts);
    write(&findings, output, out).map_err(|cause| {
        Error::new(ErrorCode::IoFailed, "the findings cannot be written").because(cause)
    })?;
    Ok(worst(&findings) == Level::Fatal)
}

/// What would keep VMs from running and does not heal by itself: the part of the doctor's work
/// that needs no libvirt (which may come later) and no ports (which are bound right after).
///
/// # Errors
/// The fatal findings, the first as the error itself.
pub(crate) fn before_start(config: &crate::config::Config) -> Result<()> {
    let facts = collect::local(config);
    let mut fatal: Vec<Finding> = checks::before_start(&facts)
        .into_iter()
        .filter(|finding| {
            if finding.level == Level::Warning {
                tracing::warn!(
                    check = finding.check,
                    fix = finding.fix,
                    "{}",
                    finding.message
                );
            }
            finding.level == Level::Fatal
        })
        .collect();
    if fatal.is_empty() {
        return Ok(());
    }
    let first = fatal.remove(0);
    for other in &fatal {
        tracing::error!(check = other.check, fix = other.fix, "{}", other.message);
    }
    let error = Error::new(ErrorCode::IoFailed, "this host cannot run VMs").because(first.message);
    Err(match first.fix {
        Some(fix) => error.hint(fix),
        None => error,
    })
}

fn worst(findings: &[Finding]) -> Level {
    findings
        .iter()
        .map(|finding| finding.level)
        .max()
        .unwrap_or(Level::Ok)
}

fn write(findings: &[Finding], output: Output, out: &mut dyn Write) -> std::io::Result<()> {
    match output {
        Output::Json => {
            let list: Vec<_> = findings
                .iter()
                .map(|finding| {
                    json!({
                        "check": finding.check,
                        "level": finding.level.as_str(),
                        "message": finding.message,
                        "fix": finding.fix,
                    })
                })
                .collect();
            writeln!(out, "{:#}", json!(list))
        }
        Output::Text => {
            let width = findings
                .iter()
                .map(|finding| finding.check.len())
                .max()
                .unwrap_or(0);
            for finding in findings {
                let (level, check) = (finding.level.as_str(), finding.check);
                writeln!(out, "{level:<7}  {check:<width$}  {}", finding.message)?;
                if let Some(fix) = &finding.fix {
                    for line in fix.lines() {
                        writeln!(out, "{:7}  {:width$}  try: {line}", "", "")?;
                    }
                }
            }
            let count = |level| findings.iter().filter(|one| one.level == level).count();
            writeln!(
                out,
                "\n{} fatal, {} warnings, {} ok",
                count(Level::Fatal),
                count(Level::Warning),
                count(Level::Ok),
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_are_written_for_people_and_for_programs() {
        let findings = [
            Finding::ok("cpu", "fine"),
            Finding::fatal("storage", "no way", "chmod o+x /a\nchmod o+x /a/b"),
        ];
        let mut text = Vec::new();
        write(&findings, Output::Text, &mut text).unwrap();
        assert_eq!(
            String::from_utf8(text).unwrap(),
            "ok       cpu      fine\n\
             fatal    storage  no way\n\
             \x20                 try: chmod o+x /a\n\
             \x20                 try: chmod o+x /a/b\n\
             \n1 fatal, 0 warnings, 1 ok\n"
        );
        let mut text = Vec::new();
        write(&findings, Output::Json, &mut text).unwrap();
        let list: serde_json::Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(list[0]["fix"], serde_json::Value::Null);
        assert_eq!(list[1]["level"], "fatal");
        assert_eq!(worst(&findings), Level::Fatal);
    }
}
