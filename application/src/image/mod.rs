//! Use cases on images.

mod delete;
pub(crate) mod evict;
mod import;
mod list;
mod pull;

pub use delete::{DeleteImage, DeleteImageCommand};
pub use import::{ImportImage, ImportImageCommand, Upload};
pub use list::{CatalogueView, GetImage, ListCatalogue, ListImages};
pub use pull::{PullImage, PullImageCommand};

use ghost_domain::ports::ImageSource;
use ghost_domain::{Error, ErrorCode, ImageName, Result};

use crate::application::Ports;

/// Where the catalogue says an image comes from.
pub(crate) fn source_of(ports: &Ports, name: &ImageName) -> Result<ImageSource> {
    let entry = ports.catalogue.find(name).ok_or_else(|| {
        Error::new(ErrorCode::ImageNotFound, format!("there is no image {name}"))
            .because("neither the cache nor the catalogue has it")
            .hint("see ghostctl image list and ghostctl image catalogue, or bring your own: ghostctl image import FILE")
    })?;
    Ok(ImageSource {
        url: entry.url,
        checksum: entry.checksum,
    })
}
