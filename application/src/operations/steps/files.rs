//! Steps on a VM's own folder.

use async_trait::async_trait;
use ghost_domain::ports::Seed;
use ghost_domain::{Error, Result};

use crate::operations::step::{Step, StepContext};

/// Makes the VM's folder; undoing removes all that is in it.
pub(crate) struct CreateFolder;

#[async_trait]
impl Step for CreateFolder {
    fn name(&self) -> &'static str {
        "create_folder"
    }

    fn phase(&self) -> &'static str {
        "making the VM's folder"
    }

    async fn perform(&self, context: &StepContext) -> Result<()> {
        context.ports.storage.create_folder(context.vm_id()?).await
    }

    async fn undo(&self, context: &StepContext) -> Result<()> {
        context.ports.storage.remove(context.vm_id()?).await
    }
}

/// Makes the disk over the image; goes with the folder.
pub(crate) struct CreateDisk;

#[async_trait]
impl Step for CreateDisk {
    fn name(&self) -> &'static str {
        "create_disk"
    }

    fn phase(&self) -> &'static str {
        "making the disk"
    }

    async fn perform(&self, context: &StepContext) -> Result<()> {
        let vm = context.vm()?;
        let (digest, format) = vm
            .spec
            .image
            .content
            .ok_or_else(|| Error::internal("the image was not resolved before the disk"))?;
        let base = super::image::cached(context, &digest, &vm.spec.image.name).await?;
        context
            .ports
            .storage
            .create_disk(vm.id, &base.path, format, vm.spec.disk)
            .await
    }
}

/// Writes the NoCloud seed; goes with the folder.
pub(crate) struct WriteSeed;

#[async_trait]
impl Step for WriteSeed {
    fn name(&self) -> &'static str {
        "write_seed"
    }

    fn phase(&self) -> &'static str {
        "writing the cloud-init seed"
    }

    async fn perform(&self, context: &StepContext) -> Result<()> {
        let vm = context.vm()?;
        let seed = Seed {
            vm: vm.id,
            hostname: vm.name.clone(),
            cloud_init: vm.cloud_init.clone(),
            inject: vm.spec.guest.inject,
        };
        context.ports.storage.write_seed(&seed).await
    }
}

/// Removes the VM's folder for good.
pub(crate) struct RemoveFolder;

#[async_trait]
impl Step for RemoveFolder {
    fn name(&self) -> &'static str {
        "remove_folder"
    }

    fn phase(&self) -> &'static str {
        "removing the disks"
    }

    async fn perform(&self, context: &StepContext) -> Result<()> {
        context.ports.storage.remove(context.vm_id()?).await
    }
}
