//! Use cases on VMs.

mod console;
mod create;
mod delete;
mod names;
mod power;
mod show;
mod update;

pub use console::{OpenConsole, OpenLog};
pub use create::{CreateVm, CreateVmCommand};
pub use delete::{DeleteVm, DeleteVmCommand};
pub use power::{PauseVm, PowerCommand, RestartVm, ResumeVm, StartVm, StopCommand, StopVm};
pub use show::{GetVm, ListVms, VmWatch, WatchVm};
pub use update::{UpdateVm, UpdateVmCommand};

#[cfg(test)]
pub(crate) mod tests_support {
    use ghost_domain::vm::{
        CloudInit, DesiredPower, ImageReference, Lifecycle, RestartPolicy, Vm, VmSpec,
    };
    use ghost_domain::{ByteSize, ImageName, Timestamp, VmId, VmName};

    /// A small running VM.
    pub(crate) fn vm(name: &str) -> Vm {
        Vm {
            id: VmId::random(),
            name: VmName::new(name).unwrap(),
            generation: 1,
            spec: VmSpec {
                vcpus: 1,
                memory: ByteSize::from_mib(256),
                image: ImageReference {
                    name: ImageName::new("tiny").unwrap(),
                    content: None,
                },
                disk: ByteSize::from_mib(128),
                interfaces: Vec::new(),
                autostart: None,
                restart_policy: RestartPolicy::default(),
                delete_protection: false,
                guest: Default::default(),
                tags: Default::default(),
            },
            cloud_init: CloudInit::default(),
            desired: DesiredPower::Running,
            lifecycle: Lifecycle::Ready,
            created_at: Timestamp::default(),
            registered_addresses: Vec::new(),
            crash_restarts: Vec::new(),
            owner: None,
        }
    }
}
