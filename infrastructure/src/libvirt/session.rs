//! What a worker does with the connection during one job.

use std::sync::{Arc, PoisonError};

use ghost_domain::ports::{Accelerator, DomainSnapshot};
use ghost_domain::vm::ObservationSource;
use ghost_domain::{Error, ErrorCode, Result, VmId};
use virt::connect::Connect;
use virt::domain::Domain;
use virt::enumutil::Enum;
use virt::error::{Error as VirtError, ErrorNumber};
use virt::sys;

use super::AcceleratorChoice;
use super::core::Core;
use super::ffi::Guarded;
use super::link::{Connection, unavailable};
use super::state::Power;
use super::xml::{DomainProfile, Element, Parsed, parse_domain};

/// One job's view.
pub(super) struct Session<'a> {
    pub(super) core: &'a Core,
    pub(super) connection: &'a Connection,
}

/// Whether libvirt's error has this number.
pub(super) fn is(error: &VirtError, number: ErrorNumber) -> bool {
    matches!(error.code(), Enum::Known(known) if known == number)
}

impl Session<'_> {
    /// The handle.
    pub(super) fn libvirt(&self) -> &Connect {
        self.connection.handle()
    }

    /// Turns libvirt's error into ours; `doing` is what failed, such as `start the VM`.
    pub(super) fn error(&self, doing: &str, error: &VirtError) -> Error {
        if self.connection.is_dead() {
            self.core
                .link
                .report_lost(self.connection.generation, error.message());
            return unavailable(error.message());
        }
        if is(error, ErrorNumber::NoDomain) {
            return Error::new(ErrorCode::VmNotFound, format!("cannot {doing}"))
                .because("libvirt has no such domain")
                .hint("see what there is: ghostctl vm list");
        }
        Error::new(ErrorCode::HypervisorFailed, format!("cannot {doing}"))
            .because(error.message())
            .hint("look at the host: ghost-agent doctor")
    }

    /// The domain with this UUID, ours or not.
    pub(super) fn lookup(&self, id: VmId) -> Result<Option<Guarded<Domain>>> {
        match self.libvirt().lookup_domain_by_uuid(id.uuid()) {
            Ok(domain) => Ok(Some(Guarded::new(domain))),
            Err(error) if is(&error, ErrorNumber::NoDomain) && !self.connection.is_dead() => {
                Ok(None)
            }
            Err(error) => Err(self.error("look for the VM in libvirt", &error)),
        }
    }

    /// What the definition of a domain says; from memory where nothing has changed.
    pub(super) fn parsed(&self, id: VmId, domain: &Domain) -> Result<Arc<Parsed>> {
        if let Some(parsed) = self.core.recall(id) {
            return Ok(parsed);
        }
        let epoch = self.core.epoch();
        let xml = domain
            .xml_desc(sys::VIR_DOMAIN_XML_INACTIVE)
            .map_err(|error| self.error("read the VM's definition", &error))?;
        let mut parsed = parse_domain(&xml)?;
        if let Some(folder) = &self.core.options.data_dir {
            parsed.ours &= parsed.lies_in(folder);
        }
        let parsed = Arc::new(parsed);
        self.core.remember(epoch, &parsed);
        Ok(parsed)
    }

    /// The domain with this UUID, if it is ours.
    ///
    /// # Errors
    /// `VmNotFound` where there is none, or it is somebody else's.
    pub(super) fn ours(&self, id: VmId) -> Result<Guarded<Domain>> {
        let missing = || {
            Error::new(
                ErrorCode::VmNotFound,
                format!("libvirt has no domain of Ghost with the id {id}"),
            )
            .hint("see what there is: ghostctl vm list")
        };
        let domain = self.lookup(id)?.ok_or_else(missing)?;
        if self.parsed(id, &domain)?.ours {
            Ok(domain)
        } else {
            Err(missing())
        }
    }

    /// Puts together what the port returns.
    pub(super) fn snapshot(&self, name: String, parsed: &Parsed, power: Power) -> DomainSnapshot {
        DomainSnapshot {
            id: parsed.id,
            name,
            observation: self
                .core
                .observe(parsed.id, power, ObservationSource::LibvirtSync),
            record: parsed.record.clone(),
            drift: parsed.drift.clone(),
        }
    }

    /// How domains of this hypervisor are made.
    pub(super) fn profile(&self) -> Result<DomainProfile> {
        let mut cached = self
            .core
            .profile
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some((generation, profile)) = &*cached
            && *generation == self.connection.generation
        {
            return Ok(profile.clone());
        }
        let profile = self.find_profile()?;
        *cached = Some((self.connection.generation, profile.clone()));
        Ok(profile)
    }

    fn find_profile(&self) -> Result<DomainProfile> {
        let driver = self
            .libvirt()
            .driver_type()
            .map_err(|error| self.error("ask libvirt for its driver", &error))?;
        if driver.eq_ignore_ascii_case("test") {
            return Ok(DomainProfile::test());
        }
        let (accelerator, _) = self.core.accelerator();
        let emulator = match self.emulator(*accelerator) {
            // A host without the capability says so at start, with libvirt's own words.
            Err(error)
                if *accelerator == Accelerator::Kvm
                    && self.core.options.accelerator == AcceleratorChoice::Auto
                    && error.code() == ErrorCode::HypervisorFailed =>
            {
                tracing::warn!(%error, "KVM works but libvirt offers no KVM domains");
                None
            }
            other => other?,
        };
        Ok(DomainProfile::qemu(*accelerator, emulator))
    }

    /// The QEMU binary that libvirt prefers for this kind of domain.
    fn emulator(&self, accelerator: Accelerator) -> Result<Option<String>> {
        let kind = match accelerator {
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "qemu",
        };
        let xml = self
            .libvirt()
            .domain_capabilities(None, Some("x86_64"), Some("q35"), Some(kind), 0)
            .map_err(|error| self.error("ask libvirt what domains it can run", &error))?;
        Ok(Element::parse(&xml)?
            .find("path")
            .map(|path| path.text.clone())
            .filter(|path| !path.is_empty()))
    }
}
