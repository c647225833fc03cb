//! See images.

use std::sync::Arc;

use ghost_domain::{CatalogueEntry, ImageName, Principal, Result, Role};

use crate::application::Ports;
use crate::registry::{ImageView, Registry};

/// Lists the images in the cache.
pub struct ListImages {
    pub(crate) registry: Arc<Registry>,
}

impl ListImages {
    /// All images, by name.
    ///
    /// # Errors
    /// `PermissionDenied`.
    pub async fn execute(&self, principal: &Principal) -> Result<Vec<ImageView>> {
        principal.require(Role::Viewer)?;
        Ok(self.registry.read(|model| {
            model
                .images
                .values()
                .map(|image| ImageView::of(model, image))
                .collect()
        }))
    }
}

/// Shows one image.
pub struct GetImage {
    pub(crate) registry: Arc<Registry>,
}

impl GetImage {
    /// The image.
    ///
    /// # Errors
    /// `InvalidName`, `ImageNotFound`.
    pub async fn execute(&self, principal: &Principal, name: &str) -> Result<ImageView> {
        principal.require(Role::Viewer)?;
        let name = ImageName::new(name)?;
        self.registry
            .read(|model| Ok(ImageView::of(model, model.image(&name)?)))
    }
}

/// An entry of the catalogue, and whether it is in the cache.
#[derive(Clone, Debug)]
pub struct CatalogueView {
    /// The entry.
    pub entry: CatalogueEntry,
    /// Whether an image of this name is in the cache.
    pub cached: bool,
}

/// Lists the official images that can be pulled by name.
pub struct ListCatalogue {
    pub(crate) registry: Arc<Registry>,
    pub(crate) ports: Ports,
}

impl ListCatalogue {
    /// All entries.
    ///
    /// # Errors
    /// `PermissionDenied`.
    pub async fn execute(&self, principal: &Principal) -> Result<Vec<CatalogueView>> {
        principal.require(Role::Viewer)?;
        let entries = self.ports.catalogue.entries();
        Ok(self.registry.read(|model| {
            entries
                .into_iter()
                .map(|entry| CatalogueView {
                    cached: model.images.contains_key(&entry.name),
                    entry,
                })
                .collect()
        }))
    }
}
