//! Keeps the cache within its size, and removes files that nothing names any more.

use ghost_domain::ports::Change;
use ghost_domain::{
    ByteSize, Error, ErrorCode, EventKind, ImageDigest, ImageName, OperationId, OperationKind,
    Result,
};

use crate::application::Ports;
use crate::operations::StepContext;
use crate::registry::{Decision, Model, Registry};

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
    if context.registry.read(|model| is_needed(model, digest)) {
        return Ok(());
    }
    context.ports.images.remove(&digest).await
}

/// Whether a name or a VM stands on a file of the cache.
fn is_needed(model: &Model, digest: ImageDigest) -> bool {
    model.images.values().any(|image| image.digest == digest) || !model.users_of(digest).is_empty()
}

/// Whether an operation other than `own` is open that may bring an image, or may have brought one
/// in an earlier run of the agent and has yet to name it.
pub(crate) fn is_bringing(model: &Model, own: Option<OperationId>) -> bool {
    model.open_operations().any(|operation| {
        Some(operation.id) != own
            && matches!(
                operation.kind,
                OperationKind::CreateVm { .. }
                    | OperationKind::PullImage { .. }
                    | OperationKind::ImportImage { .. }
            )
    })
}

/// Removes the files of the cache that were published and never named: their operation was
/// cancelled, or the agent killed, between the two. `own` is the operation that asks.
///
/// Does nothing where something might still need one of them: while images are on their way, while
/// lost records are being recovered, and while there is a VM's folder without a record, whose disk
/// may stand on any of them.
pub(crate) async fn sweep_unnamed(
    registry: &Registry,
    ports: &Ports,
    own: Option<OperationId>,
) -> Result<()> {
    let Some(_nobody_names) = registry.nobody_names() else {
        return Ok(());
    };
    let contents = ports.images.list().await?;
    let unneeded = |digest: ImageDigest| registry.read(|model| !is_needed(model, digest));
    if !contents.iter().any(|content| unneeded(content.digest)) {
        return Ok(());
    }
    let folders = ports.storage.list().await?;
    let sure = registry.read(|model| {
        !model.recovering
            && !is_bringing(model, own)
            && folders.iter().all(|folder| model.vms.contains_key(folder))
    });
    if !sure {
        return Ok(());
    }
    for content in contents {
        if unneeded(content.digest) {
            ports.images.remove(&content.digest).await?;
            tracing::info!(digest = %content.digest, bytes = content.file_size.bytes(), "an image's file that was never named was removed");
        }
    }
    Ok(())
}

/// What undoes bringing an image: a name that was given stays, a file without one goes. A failure
/// is told only; the file is swept later.
pub(crate) async fn undo_bringing(context: &StepContext) {
    let own = Some(context.operation.id);
    if let Err(error) = sweep_unnamed(&context.registry, &context.ports, own).await {
        tracing::warn!(%error, "the image cache could not be swept; it will be later");
    }
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
