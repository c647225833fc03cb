//! Steps on images.

use std::path::PathBuf;

use async_trait::async_trait;
use ghost_domain::ports::{CachedContent, Change, ImageSource};
use ghost_domain::vm::Vm;
use ghost_domain::{
    Checksum, ChecksumSource, Error, ErrorCode, EventKind, Image, ImageDigest, ImageName,
    ImageOrigin, Result,
};

use crate::image::{evict, source_of};
use crate::operations::step::{Step, StepContext};
use crate::registry::Decision;

/// The cached file of an image, or an error that says what to do.
pub(crate) async fn cached(
    context: &StepContext,
    digest: &ImageDigest,
    name: &ImageName,
) -> Result<CachedContent> {
    context.ports.images.get(digest).await?.ok_or_else(|| {
        Error::new(
            ErrorCode::ImageNotFound,
            format!("the file of image {name} is gone from the cache"),
        )
        .because(format!("no file with the digest {digest}"))
        .hint(format!(
            "bring it back: ghostctl image pull {name}, or import the same file again"
        ))
    })
}

/// Downloads from `source` and records the image as `name`.
async fn pull(context: &StepContext, name: &ImageName, source: ImageSource) -> Result<Image> {
    let content = context.ports.images.pull(&source, context.sink()).await?;
    let checksum = match (&content.checksum, &source.checksum) {
        (Some(checksum), _) | (None, ChecksumSource::Inline(checksum)) => checksum.clone(),
        (None, ChecksumSource::Url { .. }) => {
            return Err(Error::internal(
                "a download was published without a verified checksum",
            ));
        }
    };
    record(
        context,
        name,
        content,
        ImageOrigin::Pulled {
            url: source.url,
            checksum,
        },
    )
    .await
}

/// Records an image that is in the cache, and evicts others where the cache is over its size.
async fn record(
    context: &StepContext,
    name: &ImageName,
    content: CachedContent,
    origin: ImageOrigin,
) -> Result<Image> {
    let now = context.registry.clock().now();
    let image = Image {
        name: name.clone(),
        digest: content.digest,
        format: content.format,
        virtual_size: content.virtual_size,
        file_size: content.file_size,
        origin,
        created_at: now,
        last_used_at: now,
    };
    let recorded = image.clone();
    let replaced = context
        .registry
        .transact(move |model| {
            let replaced = model.images.get(&recorded.name).map(|old| old.digest);
            let subject = recorded.name.to_string();
            Ok(
                Decision::of(replaced, vec![Change::PutImage(recorded)]).notice(
                    EventKind::ImageAdded,
                    None,
                    subject,
                ),
            )
        })
        .await?;
    if let Some(old) = replaced.filter(|old| *old != image.digest) {
        evict::drop_unused(context, old).await?;
    }
    evict::to_size(context, &image.name).await?;
    Ok(image)
}

/// Makes sure that the image of a new VM is in the cache, pulling it by its catalogue name where
/// it is not, and pins its content in the VM's record.
pub(crate) struct FetchImage;

#[async_trait]
impl Step for FetchImage {
    fn name(&self) -> &'static str {
        "fetch_image"
    }

    fn phase(&self) -> &'static str {
        "fetching the image"
    }

    async fn perform(&self, context: &StepContext) -> Result<()> {
        let vm = context.vm()?;
        if vm.spec.image.content.is_some() {
            return Ok(());
        }
        let name = &vm.spec.image.name;
        let _naming = context.registry.naming().await;
        let known = context
            .registry
            .read(|model| model.images.get(name).cloned());
        let image = match known {
            Some(image) => image,
            None => pull(context, name, source_of(&context.ports, name)?).await?,
        };
        check_disk(&vm, &image)?;
        let (id, content) = (vm.id, (image.digest, image.format));
        context
            .registry
            .transact(move |model| {
                let mut vm = Vm::clone(&model.vm(id)?.vm);
                vm.spec.image.content = Some(content);
                Ok(Decision::of((), vec![Change::PutVm(Box::new(vm))]))
            })
            .await
    }

    async fn undo(&self, context: &StepContext) -> Result<()> {
        evict::undo_bringing(context).await;
        Ok(())
    }
}

/// Refuses a disk that is smaller than the image.
pub(crate) fn check_disk(vm: &Vm, image: &Image) -> Result<()> {
    if vm.spec.disk >= image.virtual_size {
        return Ok(());
    }
    Err(Error::new(
        ErrorCode::DiskTooSmall,
        format!(
            "a disk of {} is too small for image {}",
            vm.spec.disk, image.name
        ),
    )
    .because(format!(
        "the image needs {} ({} bytes)",
        image.virtual_size,
        image.virtual_size.bytes()
    ))
    .hint(format!(
        "ask for at least that: --disk {}",
        image.virtual_size.bytes()
    ))
    .field(
        "disk_bytes",
        format!("at least {}", image.virtual_size.bytes()),
    ))
}

/// Downloads an image.
pub(crate) struct PullImage {
    pub(crate) name: ImageName,
    pub(crate) url: Option<String>,
    pub(crate) checksum: Option<Checksum>,
}

#[async_trait]
impl Step for PullImage {
    fn name(&self) -> &'static str {
        "pull_image"
    }

    fn phase(&self) -> &'static str {
        "downloading"
    }

    async fn perform(&self, context: &StepContext) -> Result<()> {
        let source = match (&self.url, &self.checksum) {
            (Some(url), Some(checksum)) => ImageSource {
                url: url.clone(),
                checksum: ChecksumSource::Inline(checksum.clone()),
            },
            _ => source_of(&context.ports, &self.name)?,
        };
        let _naming = context.registry.naming().await;
        pull(context, &self.name, source).await.map(drop)
    }

    async fn undo(&self, context: &StepContext) -> Result<()> {
        evict::undo_bringing(context).await;
        Ok(())
    }
}

/// Takes an uploaded file into the cache; undoing throws the upload away.
pub(crate) struct ImportImage {
    pub(crate) name: ImageName,
    pub(crate) staged: PathBuf,
    pub(crate) file_name: String,
}

#[async_trait]
impl Step for ImportImage {
    fn name(&self) -> &'static str {
        "import_image"
    }

    fn phase(&self) -> &'static str {
        "importing"
    }

    async fn perform(&self, context: &StepContext) -> Result<()> {
        // A crash after the record was written: the staged file is gone and the work done.
        let since = context.operation.created_at;
        let done = context.registry.read(|model| {
            model
                .images
                .get(&self.name)
                .is_some_and(|image| image.created_at >= since)
        });
        if done {
            return context.ports.images.discard(&self.staged).await;
        }
        let _naming = context.registry.naming().await;
        let content = context
            .ports
            .images
            .adopt(&self.staged, context.sink())
            .await?;
        let origin = ImageOrigin::Imported {
            file_name: self.file_name.clone(),
        };
        record(context, &self.name, content, origin).await?;
        // Recorded: the cache need not know any more what became of the upload.
        if let Err(error) = context.ports.images.discard(&self.staged).await {
            tracing::warn!(%error, "a staging file stays behind until the next start");
        }
        Ok(())
    }

    async fn undo(&self, context: &StepContext) -> Result<()> {
        context.ports.images.discard(&self.staged).await?;
        evict::undo_bringing(context).await;
        Ok(())
    }
}

/// Removes an image's name, and its file where nothing else stands on it.
pub(crate) struct DeleteImage {
    pub(crate) name: ImageName,
}

#[async_trait]
impl Step for DeleteImage {
    fn name(&self) -> &'static str {
        "delete_image"
    }

    fn phase(&self) -> &'static str {
        "deleting the image"
    }

    async fn perform(&self, context: &StepContext) -> Result<()> {
        evict::forget(context, &self.name, false).await
    }
}
