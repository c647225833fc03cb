//! Import an image: an upload in pieces, then an operation that checks and publishes it.

use std::path::PathBuf;
use std::sync::Arc;

use ghost_domain::ports::ImageCache;
use ghost_domain::{
    Error, ErrorCode, ImageName, OperationKind, Principal, RequestId, Result, Role,
};

use crate::application::Ports;
use crate::fleet::check_own;
use crate::operations::{Engine, Submission};
use crate::registry::{OperationView, Registry};

/// What to import.
#[derive(Clone, Debug)]
pub struct ImportImageCommand {
    /// The name that the image gets.
    pub name: String,
    /// The file's name where it came from, for people.
    pub file_name: String,
    /// The caller's idempotency key.
    pub request_id: Option<RequestId>,
}

/// Takes an image from a caller.
pub struct ImportImage {
    pub(crate) engine: Arc<Engine>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) ports: Ports,
}

/// An upload under way; dropping it throws away what came.
pub struct Upload {
    engine: Arc<Engine>,
    cache: Arc<dyn ImageCache>,
    principal: Principal,
    name: ImageName,
    file_name: String,
    request_id: Option<RequestId>,
    staged: Option<PathBuf>,
}

impl ImportImage {
    /// Begins an upload.
    ///
    /// # Errors
    /// `InvalidName`, `ImageExists`, `ShuttingDown`, `DiskFull`, `IoFailed`.
    pub async fn execute(
        &self,
        principal: &Principal,
        command: ImportImageCommand,
    ) -> Result<Upload> {
        principal.require(Role::Operator)?;
        check_own(principal)?;
        let name = ImageName::new(command.name)?;
        let known = command.request_id.clone();
        self.registry.read(|model| {
            model.check_accepting()?;
            // A retry of an import that is done must reach the submission, which answers with the
            // operation of the first one.
            let retry = known
                .as_ref()
                .is_some_and(|key| model.requests.contains_key(key));
            if retry {
                Ok(())
            } else {
                check_free(model, &name)
            }
        })?;
        let staged = self.ports.images.stage().await?;
        Ok(Upload {
            engine: Arc::clone(&self.engine),
            cache: Arc::clone(&self.ports.images),
            principal: principal.clone(),
            name,
            file_name: printable(&command.file_name),
            request_id: command.request_id,
            staged: Some(staged),
        })
    }
}

impl Upload {
    /// Takes the next piece.
    ///
    /// # Errors
    /// `PayloadTooLarge`, `DiskFull`, `IoFailed`.
    pub async fn append(&mut self, data: &[u8]) -> Result<()> {
        let staged = self
            .staged
            .as_ref()
            .ok_or_else(|| Error::internal("the upload has ended"))?;
        self.cache.append(staged, data).await
    }

    /// All is there: submits the operation.
    ///
    /// # Errors
    /// `ImageExists`, and those of every submission.
    pub async fn finish(mut self) -> Result<OperationView> {
        let staged = self
            .staged
            .clone()
            .ok_or_else(|| Error::internal("the upload has ended"))?;
        let name = self.name.clone();
        let submission = Submission {
            request_hash: Submission::hash(&("import_image", name.as_str(), &self.file_name)),
            kind: OperationKind::ImportImage {
                name: name.clone(),
                staged: staged.clone(),
                file_name: self.file_name.clone(),
            },
            vm: None,
            subject: name.to_string(),
            request_id: self.request_id.clone(),
        };
        let view = self
            .engine
            .submit(&self.principal, submission, move |model| {
                check_free(model, &name)?;
                Ok(Vec::new())
            })
            .await?;
        // From here on the staged file is the operation's, unless this was a retry of another one.
        let ours = matches!(&view.operation.kind, OperationKind::ImportImage { staged: theirs, .. } if *theirs == staged);
        if ours {
            self.staged = None;
        }
        Ok(view)
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        let Some(staged) = self.staged.take() else {
            return;
        };
        let cache = Arc::clone(&self.cache);
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                if let Err(error) = cache.discard(&staged).await {
                    tracing::warn!(%error, "an abandoned upload stays until the next start");
                }
            });
        }
    }
}

fn check_free(model: &crate::registry::Model, name: &ImageName) -> Result<()> {
    let open = model.open_operations().any(|operation| {
        matches!(&operation.kind, OperationKind::ImportImage { name: other, .. } if other == name)
    });
    if open || model.images.contains_key(name) {
        return Err(Error::new(
            ErrorCode::ImageExists,
            format!("there is an image {name} already"),
        )
        .hint(format!(
            "choose another name (--name), or delete it: ghostctl image delete {name}"
        )));
    }
    Ok(())
}

/// File names come from callers and are shown to people: no control characters, bounded.
fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(255).collect()
}
