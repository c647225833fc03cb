//! Pull an image.

use std::sync::Arc;

use ghost_domain::{
    Checksum, Error, ErrorCode, ImageName, OperationKind, Principal, RequestId, Result, Role,
};

use super::source_of;
use crate::application::Ports;
use crate::fleet::check_own;
use crate::operations::{Engine, Submission};
use crate::registry::OperationView;

/// What to pull.
#[derive(Clone, Debug)]
pub struct PullImageCommand {
    /// A name of the catalogue, or with `url` the name that the image gets.
    pub name: String,
    /// An https address outside the catalogue.
    pub url: Option<String>,
    /// Needed with `url`.
    pub checksum: Option<String>,
    /// The caller's idempotency key.
    pub request_id: Option<RequestId>,
}

/// Downloads an image into the cache.
pub struct PullImage {
    pub(crate) engine: Arc<Engine>,
    pub(crate) ports: Ports,
}

impl PullImage {
    /// Submits the operation.
    ///
    /// # Errors
    /// `ImageNotFound` for a name that the catalogue does not have, `InvalidArgument` for a URL
    /// without a checksum, `ImageExists` where a pull under this name is under way, and those of
    /// every submission.
    pub async fn execute(
        &self,
        principal: &Principal,
        command: PullImageCommand,
    ) -> Result<OperationView> {
        principal.require(Role::Operator)?;
        if command.url.is_some() || command.checksum.is_some() {
            check_own(principal)?;
        }
        let name = ImageName::new(command.name)?;
        let checksum = command
            .checksum
            .as_deref()
            .map(str::parse::<Checksum>)
            .transpose()?;
        match (&command.url, &checksum) {
            (Some(_), None) => {
                return Err(
                    Error::new(ErrorCode::InvalidArgument, "a URL needs a checksum")
                        .because("what is downloaded from the network is never used unverified")
                        .hint("give it: --checksum sha256:…")
                        .field("checksum", "needed with url"),
                );
            }
            (None, Some(_)) => {
                return Err(
                    Error::new(ErrorCode::InvalidArgument, "a checksum needs a URL")
                        .because("the images of the catalogue carry their own")
                        .field("url", "needed with checksum"),
                );
            }
            (Some(_), Some(_)) => {}
            (None, None) => {
                source_of(&self.ports, &name)?;
            }
        }
        let request = (
            "pull_image",
            name.as_str(),
            &command.url,
            checksum.as_ref().map(ToString::to_string),
        );
        let submission = Submission {
            request_hash: Submission::hash(&request),
            kind: OperationKind::PullImage {
                name: name.clone(),
                url: command.url,
                checksum,
            },
            vm: None,
            subject: name.to_string(),
            request_id: command.request_id,
        };
        self.engine
            .submit(principal, submission, |_| Ok(Vec::new()))
            .await
    }
}
