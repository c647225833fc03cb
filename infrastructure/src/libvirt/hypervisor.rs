//! [`Hypervisor`] on libvirt.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use ghost_domain::ports::{
    DomainDefinition, DomainSnapshot, DomainStatistics, Hypervisor, HypervisorEvents,
    HypervisorInfo,
};
use ghost_domain::vm::ObservedPower;
use ghost_domain::{Error, ErrorCode, Result, VmId};
use virt::domain::Domain;
use virt::error::ErrorNumber;
use virt::sys;

use super::LibvirtOptions;
use super::core::Core;
use super::ffi::{self, Guarded};
use super::link::LinkState;
use super::networks::LibvirtNetworks;
use super::session::{Session, is};
use super::state;
use super::xml::{METADATA_NAMESPACE, METADATA_PREFIX, domain_xml, with_guest_access};

/// The hypervisor behind libvirt. Cheap to share; its threads end when the last user drops it.
pub struct LibvirtHypervisor {
    core: Arc<Core>,
}

impl std::fmt::Debug for LibvirtHypervisor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LibvirtHypervisor")
            .field("uri", &self.core.link.uri())
            .finish_non_exhaustive()
    }
}

impl LibvirtHypervisor {
    /// Starts the adapter and returns at once; the connection is made, kept and made anew in the
    /// background. libvirt need not be there.
    ///
    /// # Errors
    /// `InvalidArgument` for an impossible URI, `Internal` when a thread cannot be started.
    pub fn start(options: LibvirtOptions) -> Result<Self> {
        Ok(Self {
            core: Core::start(options)?,
        })
    }

    /// Waits until libvirt is connected, for at most `within`.
    ///
    /// # Errors
    /// `HypervisorUnavailable` with the reason of the last attempt.
    pub async fn connected(&self, within: Duration) -> Result<()> {
        let mut state = self.core.link.watch();
        let up = state.wait_for(|state| matches!(state, LinkState::Up { .. }));
        if let Ok(Ok(_)) = tokio::time::timeout(within, up).await {
            return Ok(());
        }
        // Nobody is up: the reason stands in the state, and the call would fail with it.
        self.core.link.connection().map(drop)
    }

    /// The networks behind the same connection.
    pub fn networks(&self) -> LibvirtNetworks {
        LibvirtNetworks::new(Arc::clone(&self.core))
    }
}

/// `major * 1,000,000 + minor * 1,000 + release`, as libvirt encodes versions.
fn version(encoded: u32) -> String {
    format!(
        "{}.{}.{}",
        encoded / 1_000_000,
        encoded / 1_000 % 1_000,
        encoded % 1_000
    )
}

fn not_running(vm: VmId, doing: &str) -> Error {
    Error::new(
        ErrorCode::VmNotRunning,
        format!("cannot {doing}: the VM is off"),
    )
    .because(format!("the domain {vm} has no QEMU process"))
    .hint("start it first: ghostctl vm start NAME")
}

impl Session<'_> {
    fn power(&self, domain: &Domain) -> Result<state::Power> {
        ffi::domain_state(domain)
            .map(|(state, reason)| state::of_state(state, reason))
            .map_err(|error| self.error("ask for the VM's state", &error))
    }

    fn is_active(&self, domain: &Domain) -> Result<bool> {
        domain
            .is_active()
            .map_err(|error| self.error("ask whether the VM runs", &error))
    }

    fn define(&self, definition: &DomainDefinition) -> Result<()> {
        let vm = &definition.vm;
        let xml = domain_xml(definition, &self.profile()?)?.to_xml()?;
        self.check_name(vm.id, vm.name.as_str())?;
        if let Some(existing) = self.lookup(vm.id)? {
            let parsed = self.parsed(vm.id, &existing)?;
            if !parsed.ours {
                return Err(Error::new(
                    ErrorCode::HypervisorFailed,
                    format!("cannot define {}", vm.name),
                )
                .because(format!(
                    "libvirt has a domain with its id {} that does not carry Ghost's metadata",
                    vm.id
                ))
                .hint("look at it: virsh dumpxml ID; Ghost does not touch what is not its own"));
            }
            // libvirt does not rename by redefining. Somebody renamed it behind our back; it gets
            // its name back where libvirt allows that, which is while it is off.
            if parsed.name != vm.name.as_str()
                && !self.is_active(&existing)?
                && let Err(error) = existing.rename(vm.name.as_str(), 0)
            {
                return Err(self.error("give the VM its name back", &error));
            }
        }
        let defined = self.libvirt().define_domain_xml(&xml).map(Guarded::new);
        self.core.forget(vm.id);
        match defined {
            Ok(_) => Ok(()),
            Err(error) => {
                // Somebody may have taken the name between the look and the definition.
                self.check_name(vm.id, vm.name.as_str())?;
                Err(self.error("define the VM", &error))
            }
        }
    }

    fn check_name(&self, id: VmId, name: &str) -> Result<()> {
        match self.libvirt().lookup_domain_by_name(name).map(Guarded::new) {
            Ok(holder) => match holder.uuid() {
                Ok(uuid) if uuid == id.uuid() => Ok(()),
                Ok(uuid) => Err(Error::new(
                    ErrorCode::NameTaken,
                    format!("the name {name} is taken in libvirt"),
                )
                .because(format!("another domain, {uuid}, has it"))
                .hint("choose another name; see what there is: virsh list --all")),
                Err(error) => Err(self.error("read a domain's id", &error)),
            },
            Err(error) if is(&error, ErrorNumber::NoDomain) && !self.connection.is_dead() => Ok(()),
            Err(error) => Err(self.error("look for a name in libvirt", &error)),
        }
    }

    /// The jobs of a VM run one after the other, so that no definition of ours comes between reading
    /// and writing.
    fn set_guest_access(&self, id: VmId, access: bool) -> Result<()> {
        let domain = self.ours(id)?;
        let doing = "write whether the guest may be entered";
        let failed = |error| self.error(doing, &error);
        let mut places = Vec::new();
        if domain.is_persistent().map_err(failed)? {
            places.push(sys::VIR_DOMAIN_AFFECT_CONFIG);
        }
        if self.is_active(&domain)? {
            places.push(sys::VIR_DOMAIN_AFFECT_LIVE);
        }
        let kind = i32::try_from(sys::VIR_DOMAIN_METADATA_ELEMENT).unwrap_or(i32::MAX);
        for place in places {
            let known = domain
                .metadata(kind, Some(METADATA_NAMESPACE), place)
                .map_err(failed)?;
            if let Some(wanted) = with_guest_access(&known, access)? {
                domain
                    .set_metadata(
                        kind,
                        Some(&wanted),
                        Some(METADATA_PREFIX),
                        Some(METADATA_NAMESPACE),
                        place,
                    )
                    .map_err(failed)?;
            }
        }
        self.core.forget(id);
        Ok(())
    }

    fn undefine(&self, id: VmId) -> Result<()> {
        let Some(domain) = self.lookup(id)? else {
            self.core.forget(id);
            return Ok(());
        };
        drop(domain);
        let domain = self.ours(id)?;
        // A driver refuses flags that it does not know; the first set that it takes is the fullest.
        let sets = [
            sys::VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
                | sys::VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
                | sys::VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
                | sys::VIR_DOMAIN_UNDEFINE_NVRAM,
            sys::VIR_DOMAIN_UNDEFINE_MANAGED_SAVE | sys::VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA,
            0,
        ];
        let mut outcome = Ok(());
        for flags in sets {
            outcome = domain.undefine_flags(flags);
            match &outcome {
                Err(error)
                    if is(error, ErrorNumber::InvalidArg)
                        || is(error, ErrorNumber::ArgumentUnsupported)
                        || is(error, ErrorNumber::NoSupport) => {}
                _ => break,
            }
        }
        self.core.forget(id);
        match outcome {
            Ok(()) => Ok(()),
            Err(error) if is(&error, ErrorNumber::NoDomain) && !self.connection.is_dead() => Ok(()),
            // A transient domain has no definition to remove.
            Err(error) if matches!(domain.is_persistent(), Ok(false)) => {
                tracing::debug!(%error, "the domain has no definition any more");
                Ok(())
            }
            Err(error) => Err(self.error("remove the VM's definition", &error)),
        }
    }

    fn start(&self, id: VmId) -> Result<()> {
        let domain = self.ours(id)?;
        if self.is_active(&domain)? {
            if self.power(&domain)?.0 != ObservedPower::Crashed {
                return Ok(());
            }
            // A crashed guest that somebody chose to preserve: its QEMU must go before a new start.
            domain
                .destroy()
                .map_err(|error| self.error("end the crashed VM", &error))?;
        }
        match domain.create() {
            Ok(()) => Ok(()),
            // Somebody else may have been faster.
            Err(_) if matches!(domain.is_active(), Ok(true)) => Ok(()),
            Err(error) => Err(self.error("start the VM", &error)),
        }
    }

    fn shut_down(&self, id: VmId) -> Result<()> {
        let domain = self.ours(id)?;
        if !self.is_active(&domain)? {
            return Err(not_running(id, "shut down"));
        }
        let outcome = match domain.shutdown_flags(sys::VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN) {
            Err(error)
                if is(&error, ErrorNumber::InvalidArg)
                    || is(&error, ErrorNumber::ArgumentUnsupported) =>
            {
                domain.shutdown()
            }
            other => other,
        };
        match outcome {
            Ok(()) => Ok(()),
            Err(_) if matches!(domain.is_active(), Ok(false)) => Err(not_running(id, "shut down")),
            Err(error) => Err(self.error("ask the VM to shut down", &error)),
        }
    }

    fn power_off(&self, id: VmId) -> Result<()> {
        let domain = self.ours(id)?;
        if !self.is_active(&domain)? {
            return Ok(());
        }
        match domain.destroy() {
            Ok(()) => Ok(()),
            // It went down by itself meanwhile.
            Err(_) if matches!(domain.is_active(), Ok(false)) => Ok(()),
            Err(error) => Err(self.error("cut the VM's power", &error)),
        }
    }

    fn pause(&self, id: VmId) -> Result<()> {
        let domain = self.ours(id)?;
        match self.power(&domain)?.0 {
            ObservedPower::Paused => Ok(()),
            ObservedPower::Running | ObservedPower::ShuttingDown => domain
                .suspend()
                .map(drop)
                .map_err(|error| self.error("pause the VM", &error)),
            _ => Err(not_running(id, "pause")),
        }
    }

    fn resume(&self, id: VmId) -> Result<()> {
        let domain = self.ours(id)?;
        match self.power(&domain)? {
            (ObservedPower::Running | ObservedPower::ShuttingDown, _) => Ok(()),
            (ObservedPower::Paused, "pm_suspended") => domain
                .pm_wakeup(0)
                .map(drop)
                .map_err(|error| self.error("wake the VM up", &error)),
            (ObservedPower::Paused, _) => domain
                .resume()
                .map(drop)
                .map_err(|error| self.error("resume the VM", &error)),
            _ => Err(not_running(id, "resume")),
        }
    }

    fn get(&self, id: VmId) -> Result<Option<DomainSnapshot>> {
        let look = || -> Result<Option<DomainSnapshot>> {
            let Some(domain) = self.lookup(id)? else {
                self.core.forget(id);
                return Ok(None);
            };
            let parsed = self.parsed(id, &domain)?;
            if !parsed.ours {
                return Ok(None);
            }
            let power = self.power(&domain)?;
            let name = domain
                .name()
                .map_err(|error| self.error("read the VM's name", &error))?;
            Ok(Some(self.snapshot(name, &parsed, power)))
        };
        match look() {
            // It went away while we looked.
            Err(error) if error.code() == ErrorCode::VmNotFound => Ok(None),
            other => other,
        }
    }

    fn list(&self) -> Result<Vec<DomainSnapshot>> {
        let records = ffi::all_domain_stats(self.libvirt(), sys::VIR_DOMAIN_STATS_STATE, 0)
            .map_err(|error| self.error("list the VMs", &error))?;
        let present: HashSet<VmId> = records
            .iter()
            .map(|record| VmId::from_uuid(record.id))
            .collect();
        self.core.keep_only(|id| present.contains(&id));
        // Many that are new (the first list after connecting): one call fetches all their handles.
        let unknown = present.iter().filter(|id| self.core.recall(**id).is_none());
        if unknown.count() > 8 {
            self.learn_all()?;
        }
        let mut snapshots = Vec::with_capacity(records.len());
        for record in records {
            let Some(parsed) = self.parsed_of(VmId::from_uuid(record.id))? else {
                continue;
            };
            if !parsed.ours {
                continue;
            }
            let field = |name| u32::try_from(record.get(name).unwrap_or(0)).unwrap_or(u32::MAX);
            let power = state::of_state(field("state.state"), field("state.reason"));
            snapshots.push(self.snapshot(record.name, &parsed, power));
        }
        Ok(snapshots)
    }

    /// Reads the definitions of all domains that are not known.
    fn learn_all(&self) -> Result<()> {
        let domains = self
            .libvirt()
            .list_all_domains(0)
            .map_err(|error| self.error("list the VMs", &error))?;
        for domain in domains.into_iter().map(Guarded::new) {
            let Ok(uuid) = domain.uuid() else { continue };
            match self.parsed(VmId::from_uuid(uuid), &domain) {
                Err(error) if error.code() == ErrorCode::HypervisorUnavailable => {
                    return Err(error);
                }
                // One that went away or is odd is met again, alone, by the list itself.
                Ok(_) | Err(_) => {}
            }
        }
        Ok(())
    }

    /// What is known of a domain, asking libvirt only where nothing is; `None` where it is gone or
    /// its XML cannot be read.
    fn parsed_of(&self, id: VmId) -> Result<Option<Arc<super::xml::Parsed>>> {
        if let Some(parsed) = self.core.recall(id) {
            return Ok(Some(parsed));
        }
        let Some(domain) = self.lookup(id)? else {
            return Ok(None);
        };
        match self.parsed(id, &domain) {
            Ok(parsed) => Ok(Some(parsed)),
            Err(error) if error.code() == ErrorCode::VmNotFound => Ok(None),
            Err(error) if error.code() == ErrorCode::HypervisorUnavailable => Err(error),
            Err(error) => {
                // One odd domain must not hide all others.
                tracing::warn!(vm = %id, %error, "a domain's definition cannot be read");
                Ok(None)
            }
        }
    }

    fn statistics(&self) -> Result<Vec<DomainStatistics>> {
        let groups = sys::VIR_DOMAIN_STATS_STATE
            | sys::VIR_DOMAIN_STATS_CPU_TOTAL
            | sys::VIR_DOMAIN_STATS_BALLOON
            | sys::VIR_DOMAIN_STATS_INTERFACE
            | sys::VIR_DOMAIN_STATS_BLOCK;
        // NOWAIT: a VM with a long job (or a stopped QEMU) must not hold up everybody's figures.
        let flags = sys::VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE
            | sys::VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT;
        let records = ffi::all_domain_stats(self.libvirt(), groups, flags)
            .or_else(|error| {
                // The test driver knows fewer groups and flags.
                if is(&error, ErrorNumber::InvalidArg)
                    || is(&error, ErrorNumber::ArgumentUnsupported)
                {
                    ffi::all_domain_stats(
                        self.libvirt(),
                        sys::VIR_DOMAIN_STATS_STATE,
                        sys::VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE,
                    )
                } else {
                    Err(error)
                }
            })
            .map_err(|error| self.error("read the VMs' statistics", &error))?;
        let mut statistics = Vec::with_capacity(records.len());
        for record in records {
            let id = VmId::from_uuid(record.id);
            if !self.parsed_of(id)?.is_some_and(|parsed| parsed.ours) {
                continue;
            }
            // libvirt counts memory in KiB.
            let bytes = |name| record.get(name).unwrap_or(0).saturating_mul(1024);
            statistics.push(DomainStatistics {
                id: Some(id),
                cpu_time_nanoseconds: record.get("cpu.time").unwrap_or(0),
                memory_bytes: bytes("balloon.current"),
                memory_resident_bytes: bytes("balloon.rss"),
                block_read_bytes: record.sum("block", "rd.bytes"),
                block_write_bytes: record.sum("block", "wr.bytes"),
                network_receive_bytes: record.sum("net", "rx.bytes"),
                network_transmit_bytes: record.sum("net", "tx.bytes"),
            });
        }
        Ok(statistics)
    }

    fn info(&self) -> Result<HypervisorInfo> {
        let failed = |error| self.error("ask libvirt for its version", &error);
        let (accelerator, reason) = self.core.accelerator();
        Ok(HypervisorInfo {
            uri: self.core.link.uri().to_owned(),
            libvirt_version: version(self.libvirt().lib_version().map_err(failed)?),
            hypervisor_version: version(self.libvirt().hyp_version().map_err(failed)?),
            accelerator: *accelerator,
            accelerator_reason: reason.clone(),
        })
    }
}

#[async_trait]
impl Hypervisor for LibvirtHypervisor {
    async fn info(&self) -> Result<HypervisorInfo> {
        self.core.call("info", None, |session| session.info()).await
    }

    fn subscribe(&self) -> Box<dyn HypervisorEvents> {
        self.core.subscribe()
    }

    async fn define(&self, definition: &DomainDefinition) -> Result<()> {
        let definition = definition.clone();
        self.core
            .call("define", Some(definition.vm.id), move |session| {
                session.define(&definition)
            })
            .await
    }

    async fn undefine(&self, vm: VmId) -> Result<()> {
        self.core
            .call("undefine", Some(vm), move |session| session.undefine(vm))
            .await
    }

    async fn set_guest_access(&self, vm: VmId, access: bool) -> Result<()> {
        self.core
            .call("set guest access", Some(vm), move |session| {
                session.set_guest_access(vm, access)
            })
            .await
    }

    async fn start(&self, vm: VmId) -> Result<()> {
        self.core
            .call("start", Some(vm), move |session| session.start(vm))
            .await
    }

    async fn shut_down(&self, vm: VmId) -> Result<()> {
        self.core
            .call("shut down", Some(vm), move |session| session.shut_down(vm))
            .await
    }

    async fn power_off(&self, vm: VmId) -> Result<()> {
        self.core
            .call("power off", Some(vm), move |session| session.power_off(vm))
            .await
    }

    async fn pause(&self, vm: VmId) -> Result<()> {
        self.core
            .call("pause", Some(vm), move |session| session.pause(vm))
            .await
    }

    async fn resume(&self, vm: VmId) -> Result<()> {
        self.core
            .call("resume", Some(vm), move |session| session.resume(vm))
            .await
    }

    async fn get(&self, vm: VmId) -> Result<Option<DomainSnapshot>> {
        self.core
            .call("get", Some(vm), move |session| session.get(vm))
            .await
    }

    async fn list(&self) -> Result<Vec<DomainSnapshot>> {
        self.core.call("list", None, |session| session.list()).await
    }

    async fn statistics(&self) -> Result<Vec<DomainStatistics>> {
        self.core
            .call("statistics", None, |session| session.statistics())
            .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_decoded() {
        assert_eq!(version(11_003_000), "11.3.0");
        assert_eq!(version(10_000_002), "10.0.2");
    }

    #[tokio::test]
    async fn without_libvirt_calls_fail_at_once_and_say_what_to_do() {
        let hypervisor = LibvirtHypervisor::start(LibvirtOptions {
            uri: "qemu+unix:///system?socket=/nonexistent/ghost-test".into(),
            ..LibvirtOptions::default()
        })
        .unwrap();
        let error = hypervisor
            .connected(Duration::from_millis(300))
            .await
            .unwrap_err();
        assert_eq!(error.code(), ErrorCode::HypervisorUnavailable);
        let error = hypervisor.list().await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::HypervisorUnavailable);
        assert!(error.hint_text().unwrap().contains("ghost-agent doctor"));
    }
}
