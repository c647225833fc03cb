//! Steps on the libvirt domain and its networks.

use async_trait::async_trait;
use ghost_domain::ports::DomainDefinition;
use ghost_domain::vm::Vm;
use ghost_domain::{Error, Result, VmChange};

use crate::operations::step::{Step, StepContext};

/// Makes sure that the VM's networks are there. Networks are shared: nothing is undone.
pub(crate) struct EnsureNetworks;

#[async_trait]
impl Step for EnsureNetworks {
    fn name(&self) -> &'static str {
        "ensure_networks"
    }

    fn phase(&self) -> &'static str {
        "preparing the network"
    }

    async fn perform(&self, context: &StepContext) -> Result<()> {
        for interface in &context.vm()?.spec.interfaces {
            context.ports.networks.ensure(&interface.network).await?;
        }
        Ok(())
    }
}

/// Assembles what the domain is defined from.
async fn definition(context: &StepContext, vm: Vm) -> Result<DomainDefinition> {
    let (digest, format) = vm
        .spec
        .image
        .content
        .ok_or_else(|| Error::internal("the image was not resolved before the domain"))?;
    let base = super::image::cached(context, &digest, &vm.spec.image.name).await?;
    let mut libvirt_networks = Vec::new();
    for interface in &vm.spec.interfaces {
        libvirt_networks.push(
            context
                .ports
                .networks
                .ensure(&interface.network)
                .await?
                .libvirt_name,
        );
    }
    let storage = &context.ports.storage;
    Ok(DomainDefinition {
        disk: storage.disk_path(vm.id),
        seed: storage.seed_path(vm.id),
        console_socket: storage.console_socket_path(vm.id),
        guest_socket: storage.guest_socket_path(vm.id),
        console_log: storage.console_log_path(vm.id),
        libvirt_networks,
        base_image: (base.path, format),
        vm,
    })
}

/// Defines the domain.
pub(crate) struct DefineDomain;

#[async_trait]
impl Step for DefineDomain {
    fn name(&self) -> &'static str {
        "define_domain"
    }

    fn phase(&self) -> &'static str {
        "defining the domain"
    }

    async fn perform(&self, context: &StepContext) -> Result<()> {
        let vm = Vm::clone(&*context.vm()?);
        let definition = definition(context, vm).await?;
        context.ports.hypervisor.define(&definition).await?;
        context.observe().await;
        Ok(())
    }

    async fn undo(&self, context: &StepContext) -> Result<()> {
        let id = context.vm_id()?;
        super::power::ignore_absent(context.ports.hypervisor.power_off(id).await)?;
        context.ports.hypervisor.undefine(id).await
    }
}

/// Defines the domain anew where somebody undefined it behind our back; a definition that is
/// there, edited or not, is left as it is.
pub(crate) struct RestoreDomain;

#[async_trait]
impl Step for RestoreDomain {
    fn name(&self) -> &'static str {
        "restore_domain"
    }

    fn phase(&self) -> &'static str {
        "checking the domain"
    }

    async fn perform(&self, context: &StepContext) -> Result<()> {
        let id = context.vm_id()?;
        if context.ports.hypervisor.get(id).await?.is_some() {
            return Ok(());
        }
        let vm = Vm::clone(&*context.vm()?);
        let definition = definition(context, vm).await?;
        context.ports.hypervisor.define(&definition).await
    }
}

/// Removes the definition for good.
pub(crate) struct UndefineDomain;

#[async_trait]
impl Step for UndefineDomain {
    fn name(&self) -> &'static str {
        "undefine_domain"
    }

    fn phase(&self) -> &'static str {
        "undefining the domain"
    }

    async fn perform(&self, context: &StepContext) -> Result<()> {
        context.ports.hypervisor.undefine(context.vm_id()?).await
    }
}

/// Puts a changed record into the domain; undoing puts the old one back.
pub(crate) struct RedefineDomain {
    pub(crate) change: VmChange,
}

#[async_trait]
impl Step for RedefineDomain {
    fn name(&self) -> &'static str {
        "redefine_domain"
    }

    fn phase(&self) -> &'static str {
        "changing the domain"
    }

    async fn perform(&self, context: &StepContext) -> Result<()> {
        let mut vm = Vm::clone(&*context.vm()?);
        apply_change(&mut vm, &self.change);
        let definition = definition(context, vm).await?;
        context.ports.hypervisor.define(&definition).await
    }

    async fn undo(&self, context: &StepContext) -> Result<()> {
        let vm = Vm::clone(&*context.vm()?);
        let definition = definition(context, vm).await?;
        context.ports.hypervisor.define(&definition).await
    }
}

/// Applies a change to a record and raises its generation. Not so guest access, which was switched
/// when the change was asked for and may have been switched again since.
pub(crate) fn apply_change(vm: &mut Vm, change: &VmChange) {
    let spec = &mut vm.spec;
    spec.vcpus = change.vcpus.unwrap_or(spec.vcpus);
    spec.memory = change.memory.unwrap_or(spec.memory);
    spec.delete_protection = change.delete_protection.unwrap_or(spec.delete_protection);
    spec.restart_policy = change.restart_policy.unwrap_or(spec.restart_policy);
    if let Some(autostart) = change.autostart {
        spec.autostart = autostart;
    }
    for (key, value) in &change.tags {
        match value {
            Some(value) => spec.tags.insert(key.clone(), value.clone()),
            None => spec.tags.remove(key),
        };
    }
    vm.generation += 1;
}
