//! What can be told to the simulation.

use std::path::Path;
use std::time::{Duration, Instant};

use ghost_domain::{Error, ErrorCode, Result};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// A call of the ports, for scripted faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Call {
    /// Every call.
    Any,
    /// `Hypervisor::info`.
    Info,
    /// `Hypervisor::define`.
    Define,
    /// `Hypervisor::set_guest_access`.
    SetGuestAccess,
    /// `Hypervisor::undefine`.
    Undefine,
    /// `Hypervisor::start`.
    Start,
    /// `Hypervisor::shut_down`.
    ShutDown,
    /// `Hypervisor::power_off`.
    PowerOff,
    /// `Hypervisor::pause`.
    Pause,
    /// `Hypervisor::resume`.
    Resume,
    /// `Hypervisor::get`.
    Get,
    /// `Hypervisor::list`.
    List,
    /// `Hypervisor::statistics`.
    Statistics,
    /// `NetworkProvider::ensure`.
    EnsureNetwork,
    /// `NetworkProvider::list`.
    ListNetworks,
    /// `NetworkProvider::leases`.
    Leases,
}

impl Call {
    /// The call in snake case.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Any => "any",
            Self::Info => "info",
            Self::Define => "define",
            Self::SetGuestAccess => "set_guest_access",
            Self::Undefine => "undefine",
            Self::Start => "start",
            Self::ShutDown => "shut_down",
            Self::PowerOff => "power_off",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Get => "get",
            Self::List => "list",
            Self::Statistics => "statistics",
            Self::EnsureNetwork => "ensure_network",
            Self::ListNetworks => "list_networks",
            Self::Leases => "leases",
        }
    }
}

/// Something that happens to the world, or changes how it behaves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case", deny_unknown_fields)]
pub enum Command {
    /// How guests answer the power button from now on: off after the delay, or never (`None`).
    Acpi {
        /// Only this VM; all that have no rule of their own otherwise.
        #[serde(default)]
        vm: Option<Uuid>,
        /// Milliseconds until the guest is off; `None` ignores the button.
        delay_milliseconds: Option<u64>,
    },
    /// The next calls fail.
    FailNext {
        /// Which calls.
        call: Call,
        /// How many.
        times: u32,
        /// With which stable code, such as `hypervisor_failed`.
        code: String,
        /// Only calls for this VM.
        #[serde(default)]
        vm: Option<Uuid>,
        /// The call takes effect first, and only its answer is the error.
        #[serde(default)]
        after_effect: bool,
    },
    /// The next calls hang until `release`, or until their deadline.
    HangNext {
        /// Which calls.
        call: Call,
        /// How many.
        times: u32,
        /// Only calls for this VM.
        #[serde(default)]
        vm: Option<Uuid>,
        /// The call takes effect first, and only its answer hangs.
        #[serde(default)]
        after_effect: bool,
    },
    /// Calls that hang go on; scripted failures and hangs that are left are forgotten.
    Release,
    /// Every call takes at least this long.
    Latency {
        /// How long.
        milliseconds: u64,
    },
    /// libvirt is out of reach until `connect`: calls fail at once.
    Disconnect {
        /// Why.
        reason: String,
    },
    /// libvirt is there again.
    Connect,
    /// Somebody cuts a VM's power.
    Destroy {
        /// Whose.
        vm: Uuid,
    },
    /// Somebody removes a definition.
    Undefine {
        /// Whose.
        vm: Uuid,
    },
    /// QEMU dies.
    Crash {
        /// Whose.
        vm: Uuid,
    },
    /// The guest powers itself off.
    GuestPowerOff {
        /// Which.
        vm: Uuid,
    },
    /// The guest reboots.
    GuestReboot {
        /// Which.
        vm: Uuid,
    },
    /// The disk fails and QEMU pauses the guest.
    IoError {
        /// Whose.
        vm: Uuid,
    },
    /// Somebody edits a definition.
    Edit {
        /// Whose.
        vm: Uuid,
        /// Another number of vCPUs.
        #[serde(default)]
        vcpus: Option<u32>,
        /// Another size of memory.
        #[serde(default)]
        memory_bytes: Option<u64>,
        /// Without our metadata.
        #[serde(default)]
        strip_metadata: bool,
    },
    /// Somebody defines a domain of his own.
    DefineForeign {
        /// Its UUID.
        vm: Uuid,
        /// Its name.
        name: String,
    },
    /// Guests get their lease this long after their start; `None` never.
    LeaseDelay {
        /// Milliseconds.
        milliseconds: Option<u64>,
    },
}

/// Tells the process that uses `directory` to do something, and waits until it has.
///
/// # Errors
/// `InvalidArgument` with the process's words when it refuses; `DeadlineExceeded` when it does not
/// take the command within `patience`; `IoFailed`.
pub fn send(directory: &Path, command: &Command, patience: Duration) -> Result<()> {
    let failed = |error: std::io::Error| {
        Error::new(ErrorCode::IoFailed, "cannot tell the simulation").because(error)
    };
    let control = directory.join("control");
    std::fs::create_dir_all(&control).map_err(failed)?;
    // Names sort by time, so commands of one sender keep their order.
    let nanos = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos());
    let name = format!("{nanos:032}-{}", Uuid::new_v4());
    let json = serde_json::to_vec(command)
        .map_err(|error| Error::internal("cannot encode a command").because(error))?;
    let written = control.join(format!("{name}.tmp"));
    let file = control.join(format!("{name}.json"));
    let refusal = control.join(format!("{name}.error"));
    std::fs::write(&written, json).map_err(failed)?;
    std::fs::rename(&written, &file).map_err(failed)?;
    let until = Instant::now() + patience;
    while Instant::now() < until {
        // Looked at first: a refusal is written before the command goes away.
        let taken = !file.exists();
        if let Ok(why) = std::fs::read_to_string(&refusal) {
            drop(std::fs::remove_file(&refusal));
            return Err(Error::new(
                ErrorCode::InvalidArgument,
                "the simulation refused the command",
            )
            .because(why));
        }
        if taken {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Err(Error::new(
        ErrorCode::DeadlineExceeded,
        "the simulation did not take the command",
    )
    .because(format!("no process uses {}", directory.display())))
}
