//! Delete an image.

use std::sync::Arc;

use ghost_domain::{ImageName, OperationKind, Principal, RequestId, Result, Role};

use super::evict;
use crate::operations::{Engine, Submission};
use crate::registry::OperationView;

/// What to delete.
#[derive(Clone, Debug)]
pub struct DeleteImageCommand {
    /// The image's name.
    pub name: String,
    /// The caller's idempotency key.
    pub request_id: Option<RequestId>,
}

/// Deletes an image that no VM stands on.
pub struct DeleteImage {
    pub(crate) engine: Arc<Engine>,
}

impl DeleteImage {
    /// Submits the operation.
    ///
    /// # Errors
    /// `ImageNotFound`, `ImageInUse`, `Recovering`, and those of every submission.
    pub async fn execute(
        &self,
        principal: &Principal,
        command: DeleteImageCommand,
    ) -> Result<OperationView> {
        principal.require(Role::Operator)?;
        let name = ImageName::new(command.name)?;
        let submission = Submission {
            kind: OperationKind::DeleteImage { name: name.clone() },
            vm: None,
            subject: name.to_string(),
            request_id: command.request_id,
            request_hash: Submission::hash(&("delete_image", name.as_str())),
        };
        self.engine
            .submit(principal, submission, move |model| {
                model.check_recovered()?;
                evict::check_unused(model, &name)?;
                Ok(Vec::new())
            })
            .await
    }
}
