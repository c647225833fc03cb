//! Create a VM.

use std::collections::BTreeMap;
use std::sync::Arc;

use ghost_domain::guest::{GuestInject, GuestPolicy};
use ghost_domain::ports::Change;
use ghost_domain::vm::{
    Autostart, CloudInit, DesiredPower, ImageReference, Lifecycle, NetworkInterface, RestartPolicy,
    Vm, VmSpec,
};
use ghost_domain::{
    ByteSize, Demand, Error, ErrorCode, ImageName, MacAddress, NetworkName, OperationKind,
    Principal, RequestId, Result, Role, Timestamp, VmId, VmName,
};

use super::names;
use crate::application::Ports;
use crate::fleet;
use crate::image::source_of;
use crate::operations::{Engine, Submission, check_disk};
use crate::registry::{Model, OperationView, Registry};

/// The VM that a caller wants. What is `None` takes its default.
#[derive(Clone, Debug, Default, Hash)]
pub struct CreateVmCommand {
    /// `None`: a name is made up.
    pub name: Option<String>,
    /// An image of the cache or the catalogue.
    pub image: String,
    /// Default 2, or all that one VM may have where that is less.
    pub vcpus: Option<u32>,
    /// Default 2 GiB.
    pub memory_bytes: Option<u64>,
    /// Default 10 GiB, or the image's size where that is larger.
    pub disk_bytes: Option<u64>,
    /// Empty: one card on `default`.
    pub networks: Vec<String>,
    /// See [`CloudInit`].
    pub user: Option<String>,
    /// See [`CloudInit`].
    pub ssh_authorized_keys: Vec<String>,
    /// See [`CloudInit`].
    pub user_data: Option<String>,
    /// See [`CloudInit`].
    pub network_config: Option<String>,
    /// Labels.
    pub tags: BTreeMap<String, String>,
    /// Order and delay in seconds.
    pub autostart: Option<(i32, u64)>,
    /// Restarts (0: never) and window in seconds.
    pub restart_policy: Option<(u32, u64)>,
    /// Refuse to delete it.
    pub delete_protection: bool,
    /// The agent inside it; `None`: as the host is configured, access on.
    pub guest: Option<GuestPolicy>,
    /// Start it once it is made.
    pub start: bool,
    /// Check everything and change nothing.
    pub dry_run: bool,
    /// The caller's idempotency key.
    pub request_id: Option<RequestId>,
}

const DEFAULT_VCPUS: u32 = 2;
const DEFAULT_MEMORY: ByteSize = ByteSize::from_gib(2);
const DEFAULT_DISK: ByteSize = ByteSize::from_gib(10);

/// Creates a VM.
pub struct CreateVm {
    pub(crate) engine: Arc<Engine>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) ports: Ports,
    /// How the agent comes into VMs whose creator does not say.
    pub(crate) inject: GuestInject,
}

impl CreateVm {
    /// Checks the request, reserves the name and the resources, and submits the operation.
    ///
    /// # Errors
    /// `InvalidName`, `InvalidArgument`, `InvalidSize`, `InvalidUserData`, `ImageNotFound`,
    /// `NetworkNotFound`, `DiskTooSmall`, `NameTaken`, `InsufficientResources`,
    /// `HypervisorUnavailable`, and those of every submission.
    pub async fn execute(
        &self,
        principal: &Principal,
        command: CreateVmCommand,
    ) -> Result<OperationView> {
        principal.require(Role::Operator)?;
        let request_hash = Submission::hash(&command);
        let now = self.registry.clock().now();
        let (mut vm, disk_given) = draft(&command, self.inject, now)?;
        vm.owner = fleet::owner_of(principal);
        self.ports.storage.validate_seed(&vm.cloud_init)?;
        self.refresh_host().await?;
        let cached = self
            .registry
            .read(|model| model.images.contains_key(&vm.spec.image.name));
        if !cached {
            // Fails where the catalogue has no such image, before anything is recorded.
            source_of(&self.ports, &vm.spec.image.name)?;
        }
        let name_given = command.name.is_some();
        let vcpus_given = command.vcpus.is_some();
        let start = command.start;
        let admit = move |model: &Model, mut vm: Vm| -> Result<Vm> {
            if !name_given {
                vm.name = names::unused(model)?;
            } else if model.names.contains_key(&vm.name) {
                return Err(Error::new(
                    ErrorCode::NameTaken,
                    format!("there is a VM {} already", vm.name),
                )
                .hint(format!(
                    "choose another name, or see that one: ghostctl vm show {}",
                    vm.name
                ))
                .field("name", "taken"));
            }
            check_link(model)?;
            if let Some(image) = model.images.get(&vm.spec.image.name) {
                check_image_stays(model, &vm.spec.image.name)?;
                if !disk_given {
                    vm.spec.disk = vm.spec.disk.max(image.virtual_size);
                }
                check_disk(&vm, image)?;
                vm.spec.image.content = Some((image.digest, image.format));
            }
            let capacity = model.capacity(None);
            if !vcpus_given {
                vm.spec.vcpus = vm.spec.vcpus.min(capacity.cpus_per_vm.max(1));
            }
            admit_new(&capacity, &vm, start)?;
            Ok(vm)
        };
        if command.dry_run {
            let vm = self.registry.read(|model| {
                model.check_accepting()?;
                admit(model, vm)
            })?;
            return Ok(OperationView::dry_run(
                vm.name.as_str(),
                OperationKind::CreateVm { start },
                &principal.name,
                now,
            ));
        }
        // A made-up name stands in the operation too, so it is chosen before the submission and
        // checked again within it.
        if !name_given {
            vm.name = self.registry.read(names::unused)?;
        }
        let submission = Submission {
            kind: OperationKind::CreateVm { start },
            vm: Some(vm.id),
            subject: vm.name.to_string(),
            request_id: command.request_id,
            request_hash,
        };
        self.engine
            .submit(principal, submission, move |model| {
                if model.names.contains_key(&vm.name) && !name_given {
                    return Err(Error::new(
                        ErrorCode::NameTaken,
                        "the name that was made up has just been taken",
                    )
                    .retry_after(std::time::Duration::from_millis(100)));
                }
                let chosen = vm.name.clone();
                let mut vm = admit(model, vm)?;
                vm.name = chosen;
                Ok(vec![Change::PutVm(Box::new(vm))])
            })
            .await
    }

    /// Free space changes without us, so it is read for each admission.
    async fn refresh_host(&self) -> Result<()> {
        let host = self.ports.host.resources().await?;
        self.registry.report(|model| model.host = host);
        Ok(())
    }
}

/// Refuses what needs libvirt while it is out of reach.
pub(crate) fn check_link(model: &Model) -> Result<()> {
    if model.link.connected {
        return Ok(());
    }
    Err(Error::new(
        ErrorCode::HypervisorUnavailable,
        "libvirt cannot be reached",
    )
    .because(&model.link.reason)
    .hint("look at libvirt on the host: ghost-agent doctor")
    .retry_after(std::time::Duration::from_secs(5)))
}

fn check_image_stays(model: &Model, name: &ImageName) -> Result<()> {
    let leaving = model
        .open_operations()
        .any(|operation| matches!(&operation.kind, OperationKind::DeleteImage { name: other } if other == name));
    if leaving {
        return Err(Error::new(
            ErrorCode::ImageNotFound,
            format!("image {name} is being deleted"),
        )
        .hint(format!(
            "pull it again afterwards: ghostctl image pull {name}"
        )));
    }
    Ok(())
}

/// A VM that is not started now must fit the host by itself; its disk counts in any case.
fn admit_new(capacity: &ghost_domain::Capacity, vm: &Vm, start: bool) -> Result<()> {
    let demand = vm.spec.demand();
    if start {
        return capacity.admit(demand);
    }
    let empty = ghost_domain::Capacity {
        committed: Demand {
            disk: capacity.committed.disk,
            ..Demand::default()
        },
        ..*capacity
    };
    empty.admit(demand)
}

/// Checks all that can be checked without looking at the host.
fn draft(command: &CreateVmCommand, inject: GuestInject, now: Timestamp) -> Result<(Vm, bool)> {
    let name = match &command.name {
        Some(name) => VmName::new(name.clone())?,
        None => VmName::new("unnamed")?,
    };
    let image = ImageName::new(command.image.clone()).map_err(|error| {
        Error::new(ErrorCode::InvalidName, error.message())
            .hint("see ghostctl image list and ghostctl image catalogue")
            .field("image", "not an image name")
    })?;
    let networks = if command.networks.is_empty() {
        vec![NetworkName::new("default")?]
    } else {
        command
            .networks
            .iter()
            .map(|name| NetworkName::new(name.clone()))
            .collect::<Result<_>>()?
    };
    let spec = VmSpec {
        vcpus: command.vcpus.unwrap_or(DEFAULT_VCPUS),
        memory: command
            .memory_bytes
            .map_or(DEFAULT_MEMORY, ByteSize::from_bytes),
        image: ImageReference {
            name: image,
            content: None,
        },
        disk: command
            .disk_bytes
            .map_or(DEFAULT_DISK, ByteSize::from_bytes),
        interfaces: networks
            .into_iter()
            .map(|network| NetworkInterface {
                network,
                mac: MacAddress::random(),
            })
            .collect(),
        autostart: command.autostart.map(|(order, delay)| Autostart {
            order,
            delay: std::time::Duration::from_secs(delay),
        }),
        restart_policy: match command.restart_policy {
            None => RestartPolicy::default(),
            Some((0, _)) => RestartPolicy::Never,
            Some((max_restarts, window)) => RestartPolicy::OnCrash {
                max_restarts,
                window: std::time::Duration::from_secs(window.max(1)),
            },
        },
        delete_protection: command.delete_protection,
        guest: command.guest.unwrap_or(GuestPolicy {
            inject,
            access: true,
        }),
        tags: command.tags.clone(),
    };
    spec.validate()?;
    let cloud_init = CloudInit {
        user: command.user.clone(),
        ssh_authorized_keys: command.ssh_authorized_keys.clone(),
        user_data: command.user_data.clone(),
        network_config: command.network_config.clone(),
    };
    cloud_init.validate()?;
    let vm = Vm {
        id: VmId::random(),
        name,
        generation: 1,
        spec,
        cloud_init,
        desired: if command.start {
            DesiredPower::Running
        } else {
            DesiredPower::Stopped
        },
        lifecycle: Lifecycle::Creating,
        created_at: now,
        registered_addresses: Vec::new(),
        crash_restarts: Vec::new(),
        owner: None,
    };
    Ok((vm, command.disk_bytes.is_some()))
}
