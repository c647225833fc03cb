//! The content-addressed cache: `<data_dir>/images/<sha256>.qcow2|raw`, and what is on its way
//! into it in `<data_dir>/images/staging/`.
//!
//! Invariants:
//! - a file under a digest's name has that digest, passed [`super::header::admit`] (and, for
//!   qcow2, QEMU's own check), is durable, has mode 0644 and is never written again;
//! - the extension states the format; it is never probed again (threat T2);
//! - a failed or dropped call leaves nothing in staging but a partial download, and on a full
//!   disk not even that;
//! - a qcow2 is kept byte for byte unless [`super::header::Qcow2Header::must_be_flattened`] says
//!   otherwise: re-encoding costs minutes and the digest that the publisher vouched for.
//!
//! | file | what it does |
//! |---|---|
//! | `content` | what is in the cache: looking, finding, listing, removing |
//! | `staging` | uploads, the quota of what is on its way, sweeping |
//! | `flight` | one download for all who ask for one source |
//! | `pull` | download and verification |
//! | `intake` | from a staged file to a published one |

mod content;
mod flight;
mod intake;
mod pull;
mod staging;

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};

use async_trait::async_trait;
use ghost_domain::ports::{CachedContent, ImageCache, ImageSource, ProgressSink};
use ghost_domain::{ByteSize, Error, ImageDigest, Result};

use super::decompress::DecompressionLimits;
use super::download::{DownloadOptions, Downloader};
use super::files::{
    RemoveOnDrop, blocking, blocking_long, create_new, io_error, make_passable_folder,
};
use super::qemu_img::QemuImg;
use flight::Flights;
use intake::{Source, open_candidate};
use staging::discard;

/// Where images lie and how much they may take.
#[derive(Clone, Debug)]
pub struct ImageCacheOptions {
    /// The agent's data folder; images lie in `images` below it.
    pub data_dir: PathBuf,
    /// QEMU's image tool.
    pub qemu_img: PathBuf,
    /// The largest disk that an image may show to a guest.
    pub max_virtual_size: ByteSize,
    /// The largest file that is downloaded.
    pub max_download: ByteSize,
    /// The largest file that is uploaded.
    pub max_upload: ByteSize,
    /// Space that staging files may take together.
    pub staging_quota: ByteSize,
    /// Bounds of decompression.
    pub decompression: DecompressionLimits,
    /// Patience of downloads.
    pub download: DownloadOptions,
}

impl ImageCacheOptions {
    /// The defaults, in `data_dir`.
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Self {
            data_dir: data_dir.into(),
            qemu_img: PathBuf::from("/usr/bin/qemu-img"),
            max_virtual_size: ByteSize::from_gib(2048),
            max_download: ByteSize::from_gib(64),
            max_upload: ByteSize::from_gib(64),
            staging_quota: ByteSize::from_gib(128),
            decompression: DecompressionLimits::default(),
            download: DownloadOptions::default(),
        }
    }
}

/// [`ImageCache`] in a folder of the host.
pub struct DirectoryImageCache {
    inner: Arc<Inner>,
}

struct Inner {
    images: PathBuf,
    staging: PathBuf,
    options: ImageCacheOptions,
    qemu_img: QemuImg,
    downloader: Downloader,
    flights: Flights,
    /// One publication at a time: two sources may bring the same bytes.
    publishing: Mutex<()>,
    partials: Mutex<HashMap<PathBuf, Weak<tokio::sync::Mutex<()>>>>,
}

impl std::fmt::Debug for DirectoryImageCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DirectoryImageCache")
            .field("images", &self.inner.images)
            .finish_non_exhaustive()
    }
}

impl DirectoryImageCache {
    /// Opens it, making its folders (mode 0711) where they are missing.
    ///
    /// # Errors
    /// `IoFailed` or `DiskFull` when a folder cannot be made.
    pub fn open(options: ImageCacheOptions) -> Result<Self> {
        let data_dir = std::path::absolute(&options.data_dir)
            .map_err(|error| io_error("use", &options.data_dir, &error))?;
        let images = data_dir.join("images");
        let staging = images.join("staging");
        for folder in [&images, &staging] {
            make_passable_folder(folder).map_err(|error| io_error("make", folder, &error))?;
        }
        // What is not vetted yet is nobody's but ours.
        fs::set_permissions(&staging, fs::Permissions::from_mode(0o700))
            .map_err(|error| io_error("protect", &staging, &error))?;
        Ok(Self {
            inner: Arc::new(Inner {
                images,
                staging,
                qemu_img: QemuImg::new(options.qemu_img.clone()),
                downloader: Downloader::new(options.download),
                options,
                flights: Mutex::default(),
                publishing: Mutex::default(),
                partials: Mutex::default(),
            }),
        })
    }
}

#[async_trait]
impl ImageCache for DirectoryImageCache {
    async fn pull(
        &self,
        source: &ImageSource,
        progress: Arc<dyn ProgressSink>,
    ) -> Result<CachedContent> {
        let (flight, fan_out) = self.flight(source);
        let _listening = fan_out.join(progress);
        // The work belongs to those who wait: when the last of them goes, it stops.
        flight.await
    }

    async fn stage(&self) -> Result<PathBuf> {
        let inner = Arc::clone(&self.inner);
        blocking(move |_| {
            inner.check_quota(0)?;
            let path = inner.new_name("upload");
            create_new(&path).map_err(|error| io_error("make", &path, &error))?;
            path.file_name()
                .map(PathBuf::from)
                .ok_or_else(|| Error::internal("a staging file without a name"))
        })
        .await
    }

    async fn append(&self, staged: &Path, data: &[u8]) -> Result<()> {
        let path = self.inner.staged_path(staged)?;
        let (inner, data) = (Arc::clone(&self.inner), data.to_vec());
        blocking(move |_| {
            let appended = inner.append(&path, &data);
            // An upload that failed cannot go on; its bytes are given back at once.
            if appended.is_err() {
                drop(RemoveOnDrop(path));
            }
            appended
        })
        .await
    }

    async fn adopt(&self, staged: &Path, progress: Arc<dyn ProgressSink>) -> Result<CachedContent> {
        let path = self.inner.staged_path(staged)?;
        let _consumed = RemoveOnDrop(path.clone());
        let (inner, upload) = (Arc::clone(&self.inner), path.clone());
        let found = blocking(move |_| match inner.adopted(&upload)? {
            Some(content) => Ok(Err(content)),
            None => open_candidate(upload).map(Ok),
        })
        .await?;
        match found {
            Err(content) => Ok(content),
            Ok(candidate) => {
                let note = Inner::adopted_path(&path);
                let taken = self
                    .inner
                    .take_in(candidate, None, Source::Upload(path), &progress)
                    .await;
                if taken.is_err() {
                    drop(RemoveOnDrop(note));
                }
                taken
            }
        }
    }

    async fn discard(&self, staged: &Path) -> Result<()> {
        let path = self.inner.staged_path(staged)?;
        blocking(move |_| discard(&path)).await
    }

    async fn get(&self, digest: &ImageDigest) -> Result<Option<CachedContent>> {
        let (inner, digest) = (Arc::clone(&self.inner), *digest);
        blocking(move |_| inner.look(&digest)).await
    }

    async fn list(&self) -> Result<Vec<CachedContent>> {
        let inner = Arc::clone(&self.inner);
        blocking(move |_| inner.list()).await
    }

    async fn remove(&self, digest: &ImageDigest) -> Result<()> {
        let (inner, digest) = (Arc::clone(&self.inner), *digest);
        blocking_long(move |_| inner.remove(&digest)).await
    }

    async fn sweep(&self, keep: &[PathBuf]) -> Result<()> {
        let (inner, keep) = (Arc::clone(&self.inner), keep.to_vec());
        blocking_long(move |_| inner.sweep(&keep)).await
    }
}
