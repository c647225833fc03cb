//! The simulated world and its files. Every change is on disk before anybody hears of it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use ghost_domain::ports::HypervisorEvent;
use ghost_domain::vm::{Observation, ObservationSource, ObservedPower};
use ghost_domain::{Error, ErrorCode, Result, Timestamp, VmId};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::command::{Call, Command};
use crate::libvirt::xml::{Element, METADATA_NAMESPACE, Parsed, parse_domain, with_guest_access};

/// A scripted fault.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Fault {
    pub(super) call: Call,
    pub(super) times: u32,
    pub(super) vm: Option<Uuid>,
    pub(super) after_effect: bool,
    /// The stable code; `None` hangs.
    pub(super) code: Option<String>,
}

/// What is not a domain.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Settings {
    /// Why libvirt is out of reach, if it is.
    pub(super) disconnected: Option<String>,
    /// How guests answer the power button.
    acpi_default: Option<u64>,
    acpi: BTreeMap<Uuid, Option<u64>>,
    pub(super) faults: Vec<Fault>,
    pub(super) latency_milliseconds: u64,
    pub(super) lease_delay_milliseconds: Option<u64>,
    /// Networks that were made or that exist from the start, with the third octet of their /24.
    pub(super) networks: BTreeMap<String, u8>,
    /// The last octet of each MAC that ever had a lease.
    pub(super) leases: BTreeMap<String, u8>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            disconnected: None,
            acpi_default: Some(50),
            acpi: BTreeMap::new(),
            faults: Vec::new(),
            latency_milliseconds: 0,
            lease_delay_milliseconds: Some(20),
            networks: BTreeMap::new(),
            leases: BTreeMap::new(),
        }
    }
}

/// Power as it is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Power {
    Running,
    Paused,
    ShuttingDown,
    Off,
    Crashed,
}

impl Power {
    pub(super) const fn observed(self) -> ObservedPower {
        match self {
            Self::Running => ObservedPower::Running,
            Self::Paused => ObservedPower::Paused,
            Self::ShuttingDown => ObservedPower::ShuttingDown,
            Self::Off => ObservedPower::Off,
            Self::Crashed => ObservedPower::Crashed,
        }
    }

    pub(super) const fn is_active(self) -> bool {
        self.observed().is_active()
    }
}

/// A domain.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Domain {
    /// Its definition; of a running domain that was undefined, the one it was started with.
    pub(super) xml: String,
    /// Whether it has a definition that outlives its power.
    pub(super) persistent: bool,
    pub(super) power: Power,
    pub(super) reason: String,
    pub(super) since_milliseconds: i64,
    /// When it was last started.
    pub(super) started_milliseconds: i64,
    /// When the guest, asked by ACPI, will be off.
    pub(super) off_at_milliseconds: Option<i64>,
    #[serde(skip)]
    pub(super) parsed: Option<Parsed>,
}

impl Domain {
    pub(super) fn observation(&self, source: ObservationSource) -> Observation {
        Observation {
            power: self.power.observed(),
            reason: self.reason.clone(),
            source,
            since: Timestamp::from_unix_millis(self.since_milliseconds),
        }
    }
}

/// All of it.
pub(super) struct World {
    directory: PathBuf,
    pub(super) settings: Settings,
    pub(super) domains: BTreeMap<VmId, Domain>,
    /// Events that are to be told once the lock is released.
    pub(super) news: Vec<HypervisorEvent>,
    /// Rises with `Release`; whoever hangs looks at it.
    pub(super) releases: u64,
    /// Held as long as the world is used.
    _lock: File,
}

pub(super) fn now() -> i64 {
    Timestamp::from(SystemTime::now()).unix_millis()
}

pub(super) fn io(doing: &str, path: &Path, error: &std::io::Error) -> Error {
    Error::new(
        ErrorCode::IoFailed,
        format!("the simulation cannot {doing}"),
    )
    .because(format!("{}: {error}", path.display()))
}

/// Replaces a file in one step: a reader sees the old or the new one.
fn replace(path: &Path, contents: &[u8]) -> Result<()> {
    let temporary = path.with_extension("tmp");
    fs::write(&temporary, contents)
        .and_then(|()| fs::rename(&temporary, path))
        .map_err(|error| io("write its state", path, &error))
}

fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    serde_json::to_vec_pretty(value)
        .map_err(|error| Error::internal("cannot encode the simulation's state").because(error))
}

fn decode<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<Option<T>> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|error| {
            Error::new(ErrorCode::IoFailed, "the simulation cannot read its state")
                .because(format!("{}: {error}", path.display()))
        }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io("read its state", path, &error)),
    }
}

impl World {
    /// Opens or makes the world in a directory.
    ///
    /// # Errors
    /// `HypervisorUnavailable` when another process uses it, `IoFailed`.
    pub(super) fn open(directory: &Path) -> Result<Self> {
        for folder in [directory.join("domains"), directory.join("control")] {
            fs::create_dir_all(&folder)
                .map_err(|error| io("make its directory", &folder, &error))?;
        }
        let lock_path = directory.join("lock");
        let lock =
            File::create(&lock_path).map_err(|error| io("make its lock", &lock_path, &error))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|error| {
            Error::new(
                ErrorCode::HypervisorUnavailable,
                "another process uses the simulation",
            )
            .because(format!("{}: {error}", lock_path.display()))
            .hint("stop the other agent, or choose another directory in libvirt.uri")
        })?;
        let mut world = Self {
            settings: decode(&directory.join("world.json"))?.unwrap_or_default(),
            directory: directory.to_owned(),
            domains: BTreeMap::new(),
            news: Vec::new(),
            releases: 0,
            _lock: lock,
        };
        let folder = directory.join("domains");
        for entry in fs::read_dir(&folder).map_err(|error| io("read its state", &folder, &error))? {
            let path = entry
                .map_err(|error| io("read its state", &folder, &error))?
                .path();
            let id = path
                .file_stem()
                .and_then(|stem| stem.to_str())
                .and_then(|stem| stem.parse::<VmId>().ok());
            let is_state = path
                .extension()
                .is_some_and(|extension| extension == "json");
            if let (Some(id), true) = (id, is_state)
                && let Some(mut domain) = decode::<Domain>(&path)?
            {
                domain.parsed = Some(parse_domain(&domain.xml)?);
                world.domains.insert(id, domain);
            }
        }
        Ok(world)
    }

    pub(super) fn control(&self) -> PathBuf {
        self.directory.join("control")
    }

    /// Changes the settings.
    pub(super) fn set(&mut self, change: impl FnOnce(&mut Settings)) -> Result<()> {
        let mut settings = self.settings.clone();
        change(&mut settings);
        replace(&self.directory.join("world.json"), &encode(&settings)?)?;
        self.settings = settings;
        Ok(())
    }

    fn path(&self, id: VmId) -> PathBuf {
        self.directory.join("domains").join(format!("{id}.json"))
    }

    fn put(&mut self, id: VmId, mut domain: Domain) -> Result<()> {
        domain.parsed = Some(parse_domain(&domain.xml)?);
        replace(&self.path(id), &encode(&domain)?)?;
        self.domains.insert(id, domain);
        Ok(())
    }

    fn remove(&mut self, id: VmId) -> Result<()> {
        let path = self.path(id);
        match fs::remove_file(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(io("remove a domain", &path, &error)),
        }
        self.domains.remove(&id);
        Ok(())
    }

    /// A domain of anybody.
    fn any(&self, id: VmId) -> Result<Domain> {
        self.domains.get(&id).cloned().ok_or_else(|| {
            Error::new(
                ErrorCode::VmNotFound,
                format!("the simulation has no domain {id}"),
            )
        })
    }

    /// A domain of ours, with what its XML says.
    pub(super) fn ours(&self, id: VmId) -> Result<(Domain, Parsed)> {
        let missing = || {
            Error::new(
                ErrorCode::VmNotFound,
                format!("libvirt has no domain of Ghost with the id {id}"),
            )
            .hint("see what there is: ghostctl vm list")
        };
        let domain = self.domains.get(&id).ok_or_else(missing)?;
        match &domain.parsed {
            Some(parsed) if parsed.ours => Ok((domain.clone(), parsed.clone())),
            _ => Err(missing()),
        }
    }

    /// The holder of a name.
    pub(super) fn named(&self, name: &str) -> Option<VmId> {
        self.domains
            .iter()
            .find(|(_, domain)| {
                domain
                    .parsed
                    .as_ref()
                    .is_some_and(|parsed| parsed.name == name)
            })
            .map(|(id, _)| *id)
    }

    /// Defines or redefines.
    pub(super) fn define(&mut self, id: VmId, xml: String) -> Result<()> {
        let mut domain = self.domains.get(&id).cloned().unwrap_or(Domain {
            xml: String::new(),
            persistent: true,
            power: Power::Off,
            reason: "unknown".into(),
            since_milliseconds: now(),
            started_milliseconds: 0,
            off_at_milliseconds: None,
            parsed: None,
        });
        domain.xml = xml;
        domain.persistent = true;
        self.put(id, domain)?;
        self.news.push(HypervisorEvent::Defined { id });
        Ok(())
    }

    /// Changes our element alone; of a domain there is one definition here.
    pub(super) fn set_guest_access(&mut self, id: VmId, access: bool) -> Result<()> {
        let mut domain = self.any(id)?;
        let mut root = Element::parse(&domain.xml)?;
        let ours = root
            .children
            .iter_mut()
            .filter(|child| child.name == "metadata")
            .flat_map(|metadata| &mut metadata.children)
            .find(|child| child.namespace == METADATA_NAMESPACE);
        let Some(ours) = ours else {
            return Ok(());
        };
        let Some(changed) = with_guest_access(&ours.to_xml()?, access)? else {
            return Ok(());
        };
        *ours = Element::parse(&changed)?;
        ours.set_namespace(METADATA_NAMESPACE);
        domain.xml = root.to_xml()?;
        self.put(id, domain)?;
        self.news.push(HypervisorEvent::Defined { id });
        Ok(())
    }

    /// Removes a definition; a running domain runs on without one.
    pub(super) fn undefine(&mut self, id: VmId) -> Result<()> {
        let mut domain = self.any(id)?;
        if !domain.persistent {
            return Ok(());
        }
        if domain.power.is_active() {
            domain.persistent = false;
            self.put(id, domain)?;
        } else {
            self.remove(id)?;
        }
        self.news.push(HypervisorEvent::Undefined { id });
        Ok(())
    }

    /// Changes a domain's power.
    pub(super) fn power(
        &mut self,
        id: VmId,
        power: Power,
        reason: &str,
        crashed: bool,
    ) -> Result<()> {
        let mut domain = self.any(id)?;
        let time = now();
        if power == Power::Running && !domain.power.is_active() {
            domain.started_milliseconds = time;
            domain.off_at_milliseconds = None;
        }
        if power != Power::ShuttingDown && power != Power::Running {
            domain.off_at_milliseconds = None;
        }
        domain.power = power;
        domain.reason = reason.to_owned();
        domain.since_milliseconds = time;
        let observation = domain.observation(ObservationSource::LibvirtEvent);
        if power.is_active() || domain.persistent {
            self.put(id, domain)?;
        } else {
            self.remove(id)?;
        }
        self.news.push(HypervisorEvent::Power {
            id,
            observation,
            crashed,
        });
        Ok(())
    }

    /// Presses a guest's power button.
    pub(super) fn press(&mut self, id: VmId) -> Result<()> {
        let rule = match self.settings.acpi.get(&id.uuid()) {
            Some(rule) => *rule,
            None => self.settings.acpi_default,
        };
        let mut domain = self.any(id)?;
        // A halted guest cannot see the button.
        if let Some(delay) = rule
            && domain.power == Power::Running
            && domain.off_at_milliseconds.is_none()
        {
            let delay = i64::try_from(delay).unwrap_or(i64::MAX);
            domain.off_at_milliseconds = Some(now().saturating_add(delay));
            self.put(id, domain)?;
        }
        Ok(())
    }

    /// Lets happen what is due.
    pub(super) fn pass(&mut self) -> Result<()> {
        let time = now();
        let due: Vec<VmId> = self
            .domains
            .iter()
            .filter(|(_, domain)| domain.off_at_milliseconds.is_some_and(|at| at <= time))
            .map(|(id, _)| *id)
            .collect();
        for id in due {
            self.power(id, Power::ShuttingDown, "guest", false)?;
            self.power(id, Power::Off, "shutdown", false)?;
        }
        let Some(delay) = self.settings.lease_delay_milliseconds else {
            return Ok(());
        };
        let delay = i64::try_from(delay).unwrap_or(i64::MAX);
        let fresh: Vec<String> = self
            .domains
            .values()
            .filter(|domain| {
                domain.power == Power::Running
                    && domain.started_milliseconds.saturating_add(delay) <= time
            })
            .filter_map(|domain| domain.parsed.as_ref()?.record.as_ref())
            .flat_map(|record| &record.spec.interfaces)
            .map(|interface| interface.mac.to_string())
            .filter(|mac| !self.settings.leases.contains_key(mac))
            .collect();
        if !fresh.is_empty() {
            self.set(|settings| {
                for mac in fresh {
                    // Addresses of MACs long gone are given again, oldest knowledge first.
                    let free = (2..=254).find(|last| !settings.leases.values().any(|l| l == last));
                    if let Some(last) = free {
                        settings.leases.insert(mac, last);
                    }
                }
            })?;
        }
        Ok(())
    }

    /// Takes one use of the first fault that fits.
    pub(super) fn fault(&mut self, call: Call, vm: Option<VmId>) -> Result<Option<Fault>> {
        let fits = |fault: &Fault| {
            (fault.call == call || fault.call == Call::Any)
                && fault
                    .vm
                    .is_none_or(|of| vm.is_some_and(|vm| vm.uuid() == of))
        };
        let Some(fault) = self
            .settings
            .faults
            .iter()
            .find(|fault| fits(fault))
            .cloned()
        else {
            return Ok(None);
        };
        self.set(|settings| {
            if let Some(at) = settings.faults.iter().position(fits) {
                settings.faults[at].times = settings.faults[at].times.saturating_sub(1);
                if settings.faults[at].times == 0 {
                    settings.faults.remove(at);
                }
            }
        })?;
        Ok(Some(fault))
    }

    /// Carries out a command.
    ///
    /// # Errors
    /// `InvalidArgument` or `VmNotFound` when it makes no sense now.
    pub(super) fn apply(&mut self, command: Command) -> Result<()> {
        let refuse = |why: &str| {
            Err(
                Error::new(ErrorCode::InvalidArgument, "the simulation cannot do that")
                    .because(why),
            )
        };
        let active = |world: &Self, vm: Uuid| -> Result<VmId> {
            let id = VmId::from_uuid(vm);
            if world.any(id)?.power.is_active() {
                Ok(id)
            } else {
                refuse("the VM is off").map(|()| id)
            }
        };
        match command {
            Command::Acpi {
                vm,
                delay_milliseconds,
            } => self.set(|settings| match vm {
                Some(vm) => {
                    settings.acpi.insert(vm, delay_milliseconds);
                }
                None => settings.acpi_default = delay_milliseconds,
            }),
            Command::FailNext {
                call,
                times,
                code,
                vm,
                after_effect,
            } => {
                if ErrorCode::parse(&code).is_none() || times == 0 {
                    return refuse("the code is not known, or it is to happen zero times");
                }
                self.set(|settings| {
                    settings.faults.push(Fault {
                        call,
                        times,
                        vm,
                        after_effect,
                        code: Some(code),
                    });
                })
            }
            Command::HangNext {
                call,
                times,
                vm,
                after_effect,
            } => self.set(|settings| {
                settings.faults.push(Fault {
                    call,
                    times,
                    vm,
                    after_effect,
                    code: None,
                });
            }),
            Command::Release => {
                self.releases += 1;
                self.set(|settings| settings.faults.clear())
            }
            Command::Latency { milliseconds } => {
                self.set(|settings| settings.latency_milliseconds = milliseconds)
            }
            Command::Disconnect { reason } => {
                let told = self.settings.disconnected.is_none();
                self.set(|settings| settings.disconnected = Some(reason.clone()))?;
                if told {
                    self.news.push(HypervisorEvent::Disconnected { reason });
                }
                Ok(())
            }
            Command::Connect => {
                let told = self.settings.disconnected.is_some();
                self.set(|settings| settings.disconnected = None)?;
                if told {
                    self.news.push(HypervisorEvent::Connected);
                }
                Ok(())
            }
            Command::Destroy { vm } => {
                let id = active(self, vm)?;
                self.power(id, Power::Off, "destroyed", false)
            }
            Command::Undefine { vm } => self.undefine(VmId::from_uuid(vm)),
            Command::Crash { vm } => {
                let id = active(self, vm)?;
                self.power(id, Power::Crashed, "crashed", true)
            }
            Command::GuestPowerOff { vm } => {
                let id = active(self, vm)?;
                self.power(id, Power::ShuttingDown, "guest", false)?;
                self.power(id, Power::Off, "shutdown", false)
            }
            Command::GuestReboot { vm } => {
                let id = active(self, vm)?;
                self.power(id, Power::Running, "rebooted", false)
            }
            Command::IoError { vm } => {
                let id = active(self, vm)?;
                self.power(id, Power::Paused, "io_error", false)
            }
            Command::Edit {
                vm,
                vcpus,
                memory_bytes,
                strip_metadata,
            } => {
                let id = VmId::from_uuid(vm);
                let mut root = Element::parse(&self.any(id)?.xml)?;
                if strip_metadata {
                    root.children.retain(|child| child.name != "metadata");
                }
                for child in &mut root.children {
                    match (child.name.as_str(), vcpus, memory_bytes) {
                        ("vcpu", Some(vcpus), _) => child.text = vcpus.to_string(),
                        ("memory", _, Some(bytes)) => child.text = bytes.to_string(),
                        _ => {}
                    }
                }
                self.define(id, root.to_xml()?)
            }
            Command::DefineForeign { vm, name } => {
                let xml = Element::new("domain")
                    .with("type", "test")
                    .child(Element::new("name").text(name))
                    .child(Element::new("uuid").text(vm.to_string()))
                    .to_xml()?;
                self.define(VmId::from_uuid(vm), xml)
            }
            Command::LeaseDelay { milliseconds } => {
                self.set(|settings| settings.lease_delay_milliseconds = milliseconds)
            }
        }
    }

    /// Carries out what lies in the control folder.
    pub(super) fn obey(&mut self) {
        let Ok(entries) = fs::read_dir(self.control()) else {
            return;
        };
        let mut files: Vec<PathBuf> = entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| {
                path.extension()
                    .is_some_and(|extension| extension == "json")
            })
            .collect();
        files.sort();
        for file in files {
            let outcome = fs::read(&file)
                .map_err(|error| error.to_string())
                .and_then(|bytes| {
                    serde_json::from_slice::<Command>(&bytes).map_err(|error| error.to_string())
                })
                .and_then(|command| self.apply(command).map_err(|error| error.to_string()));
            if let Err(why) = outcome {
                tracing::warn!(file = %file.display(), why, "the simulation refused a command");
                drop(fs::write(file.with_extension("error"), why));
            }
            // The sender takes the file's end for the effect, so it goes last.
            drop(fs::remove_file(&file));
        }
    }
}

/// The name by which the simulated NAT network is known to libvirt.
pub(super) const DEFAULT_NETWORK: &str = "ghost-default";
