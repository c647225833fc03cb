//! The auditor: compares what libvirt, the kernel and the disk have with what the agent's records
//! say, and names every orphan and every dangling thing.
//!
//! Start reading at [`audit`]. It has two halves: [`collect`] gathers [`Evidence`] and judges
//! nothing, [`judge`] is a pure function of it, so that each rule is tested with a planted fault.

mod evidence;
mod judge;

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

pub use self::evidence::{
    Evidence, FileKind, Image, Interface, Operation, OwnFile, Process, Records, Tap, Vm, collect,
};
pub use self::judge::judge;
use crate::ctl::Ctl;
use crate::wait;

/// Where domains are looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hypervisor {
    /// libvirt at a URI.
    Libvirt(String),
    /// The folder of a simulated hypervisor.
    Simulated(PathBuf),
}

impl Hypervisor {
    /// Reads `libvirt.uri` of an agent's configuration.
    pub fn parse(uri: &str) -> Self {
        uri.strip_prefix("simulated:").map_or_else(
            || Self::Libvirt(uri.to_owned()),
            |folder| Self::Simulated(PathBuf::from(folder)),
        )
    }
}

/// What is audited.
#[derive(Clone, Debug)]
pub struct Subject {
    /// The agent's data folder.
    pub data_dir: PathBuf,
    /// Where its domains are.
    pub hypervisor: Hypervisor,
    /// How its records are read.
    pub ctl: Ctl,
    /// Partial downloads, which a later pull takes up again, are not orphans.
    pub partial_downloads: bool,
}

/// What kind of thing is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A domain of ours without a record.
    OrphanDomain,
    /// A record without a domain.
    MissingDomain,
    /// Record and domain disagree.
    Disagreement,
    /// A VM folder without a record.
    OrphanFolder,
    /// A record without a part of its files.
    MissingFile,
    /// A file that belongs to nothing.
    OrphanFile,
    /// A cached image without a record.
    OrphanImage,
    /// A record of an image without its file, or a disk without its base.
    MissingImage,
    /// A file in staging that no operation is working on.
    OrphanStaging,
    /// A process (QEMU, a tool) that works on our files for nobody.
    OrphanProcess,
    /// A socket somebody listens on in our folders for nobody.
    OrphanSocket,
    /// A tap device that no domain has.
    OrphanTap,
    /// A file lock held by somebody who is not the agent.
    OrphanLock,
    /// A DHCP lease that contradicts the records.
    WrongLease,
    /// An operation that has not ended, or needs a person.
    OpenOperation,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// Of what kind.
    pub kind: Kind,
    /// What it is about: a VM, a path, a device.
    pub subject: String,
    /// What is wrong with it.
    pub detail: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}: {}", self.kind, self.subject, self.detail)
    }
}

/// Looks once.
///
/// # Errors
/// Where the evidence cannot be had: libvirt or the agent does not answer.
pub fn audit(subject: &Subject) -> Result<Vec<Finding>, String> {
    Ok(judge(&collect(subject)?))
}

/// Looks until nothing is wrong, because libvirt, QEMU and the agent take moments to finish what
/// they do; what is still wrong when the time is up is wrong.
///
/// # Errors
/// As for [`audit`].
pub fn audit_settled(subject: &Subject, within: Duration) -> Result<Vec<Finding>, String> {
    let mut last = Ok(Vec::new());
    wait::poll(within, || {
        last = audit(subject);
        matches!(&last, Ok(findings) if findings.is_empty()).then_some(())
    });
    last
}
