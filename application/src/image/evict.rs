//! Keeps the cache within its size, and removes files that nothing names any more.

use ghost_domain::ports::Change;
use ghost_domain::{
    ByteSize, Error, ErrorCode, EventKind, ImageDigest, ImageName, OperationKind, Result,
};

use crate::operations::StepContext;
use crate::registry::{Decision, Model};

/// Why an image cannot go, if it cannot.
pub(crate) fn check_unused(model: &Model, name: &ImageName) -> Result<()> {
    let image = model.image(name)?;
    let last_name = model
        .images
        .values()
        .filter(|other| other.digest == image.digest)
        .count()
        == 1;
    let users = if last_name {
        model.users_of(image.digest)
    } else {
        Vec::new()
    };
    let waiting = model.open_operations().any(|operation| {
        matches!(operation.kind, OperationKind::CreateVm { .. })
            && operation
                .vm
                .and_then(|vm| model.vms.get(&vm))
                .is_some_and(|entry| {
                    entry.vm.spec.image.name == *name && entry.vm.spec.image.content.is_none()
                })
    });
    if users.is_empty() && !waiting {
        return Ok(());
    }
    let names = users
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(", ");
    let by = if waiting && users.is_empty() {
        "a VM that is being made".to_owned()
    } else {
        names
    };
    Err(
        Error::new(ErrorCode::ImageInUse, format!("image {name} is in use"))
            .because(format!("the disks of these VMs stand on it: {by}"))
            .hint("delete those VMs first: ghostctl vm delete NAME"),
    )
}

/// Forgets an image by name; its file goes too where no other name and no VM stands on it.
pub(crate) async fn forget(context: &StepContext, name: &ImageName, evicted: bool) -> Result<()> {
    let wanted = name.clone();
    let digest = context
        .registry
        .transact(move |model| {
            let Some(image) = model.images.get(&wanted) else {
                return Ok(Decision::nothing(None));
            };
            check_unused(model, &wanted)?;
            let subject = wanted.to_string();
            Ok(
                Decision::of(Some(image.digest), vec![Change::DeleteImage(wanted)]).notice(
                    EventKind::ImageRemoved { evicted },
                    None,
                    subject,
                ),
            )
        })
        .await?;
    match digest {
        Some(digest) => drop_unused(context, digest).await,
        None => Ok(()),
    }
}

/// Removes a file of the cache that no name and no VM stands on.
pub(crate) async fn drop_unused(context: &StepContext, digest: ImageDigest) -> Result<()> {
    let used = context.registry.read(|model| {
        model.images.values().any(|image| image.digest == digest)
            || !model.users_of(digest).is_empty()
    });
    if used {
        return Ok(());
    }
    context.ports.images.remove(&digest).await
}

/// Evicts the least recently used images that nothing stands on until the cache is within its
/// size; never the one that has just come.
pub(crate) async fn to_size(context: &StepContext, newest: &ImageName) -> Result<()> {
    let cap = context.ports.image_cache_size;
    loop {
        let victim = context.registry.read(|model| {
            let total: ByteSize = model
                .images
                .values()
                .map(|image| (image.digest, image.file_size))
                .collect::<std::collections::BTreeMap<_, _>>()
                .into_values()
                .sum();
            if total <= cap {
                return None;
            }
            model
                .images
                .values()
                .filter(|image| image.name != *newest && check_unused(model, &image.name).is_ok())
                .min_by_key(|image| image.last_used_at)
                .map(|image| image.name.clone())
        });
        let Some(victim) = victim else { return Ok(()) };
        match forget(context, &victim, true).await {
            // Somebody began to use it in between: look again.
            Err(error) if error.code() == ErrorCode::ImageInUse => {}
            outcome => outcome?,
        }
    }
}
