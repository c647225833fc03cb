//! Images.

use ghost_application::ImageView;
use ghost_application::image::CatalogueView;
use ghost_domain::ImageOrigin;
use ghost_proto::agent::v1 as message;

use super::timestamp;

/// An image as a message.
pub fn image(view: &ImageView) -> message::Image {
    let image = &view.image;
    let (source, checksum) = match &image.origin {
        ImageOrigin::Pulled { url, checksum } => (url.clone(), checksum.to_string()),
        ImageOrigin::Imported { file_name } => (file_name.clone(), String::new()),
    };
    message::Image {
        name: image.name.to_string(),
        digest: image.digest.to_string(),
        format: image.format.as_str().to_owned(),
        virtual_size_bytes: image.virtual_size.bytes(),
        file_size_bytes: image.file_size.bytes(),
        source,
        checksum,
        created_at: Some(timestamp(image.created_at)),
        last_used_at: Some(timestamp(image.last_used_at)),
        used_by: view.used_by.iter().map(ToString::to_string).collect(),
    }
}

/// An entry of the catalogue as a message.
pub fn catalogue_entry(view: &CatalogueView) -> message::CatalogueEntry {
    message::CatalogueEntry {
        name: view.entry.name.to_string(),
        aliases: view.entry.aliases.iter().map(ToString::to_string).collect(),
        description: view.entry.description.clone(),
        url: view.entry.url.clone(),
        cached: view.cached,
    }
}
