//! Image files: header checks, downloads, decompression, the content-addressed cache and the
//! catalogue of official images.
//!
//! Start reading at [`DirectoryImageCache`] and [`header::admit`].

mod address;
mod cache;
pub mod catalogue;
pub mod checksum;
pub mod decompress;
mod download;
pub(crate) mod files;
pub mod header;
pub(crate) mod progress;
pub(crate) mod qemu_img;

pub use cache::{DirectoryImageCache, ImageCacheOptions};
pub use catalogue::FileImageCatalogue;
pub use decompress::DecompressionLimits;
pub use download::DownloadOptions;
