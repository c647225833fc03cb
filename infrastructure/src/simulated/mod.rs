//! A hypervisor that runs nothing, keeps libvirt's promises, and does what tests tell it.
//!
//! It is the double for the tests of the application and of whole agents (`libvirt.uri:
//! simulated:DIR`). Its world (domains, leases, how guests behave) lies in a directory, and every
//! effect of a call is there before the call returns: like libvirt's, it survives a `kill -9` of
//! the agent. One process at a time uses a directory.
//!
//! ```text
//! DIR/lock                 held while a process uses the directory
//! DIR/world.json           settings: behaviour of guests, scripted faults, leases
//! DIR/domains/<id>.json    a domain: its XML and its power
//! DIR/control/NAME.json    a Command for the running process: written whole (write another name,
//!                          then rename), removed once it took effect; NAME.error says why not
//! ```
//!
//! Within a process the world is changed through [`SimulationControl::apply`]; from outside by
//! [`send`], which writes such a file and waits until it took effect:
//!
//! ```text
//! {"command": "crash", "vm": "…"}
//! {"command": "fail_next", "call": "start", "times": 2, "code": "hypervisor_failed"}
//! {"command": "acpi", "delay_milliseconds": null}          guests ignore the power button
//! {"command": "disconnect", "reason": "stopped"} {"command": "connect"}
//! ```
//!
//! Files that are in `control/` before the process starts take effect, in the order of their
//! names, before the first call.

mod command;
mod console;
mod hypervisor;
mod networks;
mod world;

use std::path::PathBuf;
use std::time::Duration;

pub use self::command::{Call, Command, send};
pub use self::hypervisor::{SimulatedHypervisor, SimulationControl};
pub use self::networks::SimulatedNetworks;

/// How the simulation is set up.
#[derive(Clone, Debug)]
pub struct SimulatedOptions {
    /// Where its world lies; made where it is absent.
    pub directory: PathBuf,
    /// Longest time that a call may take, as for libvirt.
    pub call_deadline: Duration,
    /// Refuse to start a VM whose disk or seed file is missing, as QEMU would.
    pub check_files: bool,
    /// Serve a serial console for running VMs: what is sent to its socket comes back, and goes to
    /// its log.
    pub console: bool,
}

impl SimulatedOptions {
    /// The plain simulation in a directory: no files are looked at, no console is served.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self {
            directory: directory.into(),
            call_deadline: Duration::from_secs(20),
            check_files: false,
            console: false,
        }
    }
}
