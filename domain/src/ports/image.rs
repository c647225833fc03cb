//! The image cache of the host and the catalogue of official images.

use std::path::PathBuf;

use async_trait::async_trait;

use crate::{
    ByteSize, CatalogueEntry, Checksum, ChecksumSource, ImageDigest, ImageFormat, ImageName,
    Progress, Result,
};

/// Takes progress reports; cheap, may be called for every block.
pub trait ProgressSink: Send + Sync {
    /// How far it is now.
    fn report(&self, progress: Progress);
}

/// What to download.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageSource {
    /// An https address (http only for loopback).
    pub url: String,
    /// The checksum of the file, or where it is published.
    pub checksum: ChecksumSource,
}

/// One file of the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CachedContent {
    /// Its digest, also its name.
    pub digest: ImageDigest,
    /// Where it lies; never written again.
    pub path: PathBuf,
    /// Its format, by our own header parser.
    pub format: ImageFormat,
    /// The size that a guest sees.
    pub virtual_size: ByteSize,
    /// The file's size.
    pub file_size: ByteSize,
    /// The checksum of the download, where it was one.
    pub checksum: Option<Checksum>,
}

/// Content-addressed image files, verified before they are published.
///
/// Common errors: `DiskFull`; `UnsafeImage`, `UnsupportedImage`, `ImageTooLarge` from the header
/// checks and decompression bounds; `IoFailed`. A failed call leaves nothing but, for `pull`, the
/// partial download that a later pull resumes.
#[cfg_attr(feature = "mocks", mockall::automock)]
#[async_trait]
pub trait ImageCache: Send + Sync {
    /// Downloads, resuming what an earlier break left, verifies, checks the header and publishes
    /// under its digest (fsync, rename, fsync of the folder). Two calls for one source share one
    /// download.
    ///
    /// # Errors
    /// Besides the common ones `DownloadFailed` and `ChecksumMismatch` (the partial file is removed).
    async fn pull(
        &self,
        source: &ImageSource,
        progress: std::sync::Arc<dyn ProgressSink>,
    ) -> Result<CachedContent>;

    /// A new empty staging file for an upload, within the staging quota; its name without folder.
    async fn stage(&self) -> Result<PathBuf>;

    /// Appends to a staged upload.
    ///
    /// # Errors
    /// Besides the common ones `PayloadTooLarge` past the upload limit.
    async fn append(&self, staged: &std::path::Path, data: &[u8]) -> Result<()>;

    /// Takes a staged upload into the cache: decompresses (gzip, xz, zstd, bounded), checks the
    /// header, publishes. Consumes the staged file in success and failure. After a success the
    /// same call gives the same answer until `discard`, so that a step may be repeated after a
    /// crash.
    async fn adopt(
        &self,
        staged: &std::path::Path,
        progress: std::sync::Arc<dyn ProgressSink>,
    ) -> Result<CachedContent>;

    /// Removes a staged upload and forgets what became of it. Succeeds where there is none.
    async fn discard(&self, staged: &std::path::Path) -> Result<()>;

    /// Looks at one file of the cache.
    async fn get(&self, digest: &ImageDigest) -> Result<Option<CachedContent>>;

    /// All files of the cache.
    async fn list(&self) -> Result<Vec<CachedContent>>;

    /// Removes a file from the cache. Succeeds where there is none. The caller knows that no VM
    /// and no name uses it.
    async fn remove(&self, digest: &ImageDigest) -> Result<()>;

    /// Removes staging files that no open operation names (those in `keep`), and partial
    /// downloads older than a week. Called once at start.
    async fn sweep(&self, keep: &[PathBuf]) -> Result<()>;
}

/// Official images by name.
#[cfg_attr(feature = "mocks", mockall::automock)]
pub trait ImageCatalogue: Send + Sync {
    /// All entries.
    fn entries(&self) -> Vec<CatalogueEntry>;
    /// An entry by name or alias.
    fn find(&self, name: &ImageName) -> Option<CatalogueEntry>;
}
