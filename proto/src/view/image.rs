//! Images of the cache and of the catalogue.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{filled, optional_time, time_of};
use crate::agent::v1 as message;

/// An image in the host's cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Image {
    /// The name by which VMs are made from it.
    pub name: String,
    /// SHA-256 of the file in the cache, 64 hexadecimal digits.
    pub digest: String,
    /// `raw` or `qcow2`.
    pub format: String,
    /// The size that a guest sees.
    pub virtual_size_bytes: u64,
    /// The size of the file in the cache.
    pub file_size_bytes: u64,
    /// The URL, or the name of the imported file.
    pub source: Option<String>,
    /// The verified checksum of the download; null for an import.
    pub checksum: Option<String>,
    /// When it came into the cache, RFC 3339.
    #[schema(format = DateTime)]
    pub created_at: String,
    /// When a VM was last made from it, RFC 3339.
    #[schema(format = DateTime)]
    pub last_used_at: Option<String>,
    /// Names of the VMs built on it.
    pub used_by: Vec<String>,
}

impl From<message::Image> for Image {
    fn from(image: message::Image) -> Self {
        Self {
            name: image.name,
            digest: image.digest,
            format: image.format,
            virtual_size_bytes: image.virtual_size_bytes,
            file_size_bytes: image.file_size_bytes,
            source: filled(image.source),
            checksum: filled(image.checksum),
            created_at: time_of(image.created_at.as_ref()),
            last_used_at: optional_time(image.last_used_at.as_ref()),
            used_by: image.used_by,
        }
    }
}

/// An official image that can be pulled by name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CatalogueEntry {
    /// The name to pull.
    pub name: String,
    /// Other names for it.
    pub aliases: Vec<String>,
    /// One line for people.
    pub description: String,
    /// From where it is pulled.
    pub url: String,
    /// Whether the cache has it.
    pub cached: bool,
}

impl From<message::CatalogueEntry> for CatalogueEntry {
    fn from(entry: message::CatalogueEntry) -> Self {
        Self {
            name: entry.name,
            aliases: entry.aliases,
            description: entry.description,
            url: entry.url,
            cached: entry.cached,
        }
    }
}
