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

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use futures::FutureExt;
use futures::future::{BoxFuture, Shared, WeakShared};
use ghost_domain::ports::{CachedContent, ImageCache, ImageSource, ProgressSink};
use ghost_domain::{
    ByteSize, Checksum, ChecksumSource, Error, ErrorCode, ImageDigest, ImageFormat, Progress,
    Result,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::checksum::{find_in_list, hash_file};
use super::decompress::{Compression, DecompressionLimits, decompress};
use super::download::{DownloadOptions, Downloader, Partial, check_free_space};
use super::files::{
    Cancellation, RemoveOnDrop, TemporaryFile, blocking, blocking_long, create_new, io_error,
    make_passable_folder, no_follow, open_plain, publish, remove_if_there, sync_folder,
    write_sparse, write_whole,
};
use super::header::{Admitted, Qcow2Header, Sample, admit};
use super::progress::Meter;
use super::qemu_img::QemuImg;

const PARTIAL_LIFE: Duration = Duration::from_secs(7 * 24 * 3600);

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

type Flight = Shared<BoxFuture<'static, Result<CachedContent>>>;
type WeakFlight = WeakShared<BoxFuture<'static, Result<CachedContent>>>;

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
    flights: Mutex<HashMap<String, (WeakFlight, Arc<FanOut>)>>,
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

/// Passes progress on to everybody who waits for one download.
#[derive(Default)]
struct FanOut(Mutex<FanOutState>);

#[derive(Default)]
struct FanOutState {
    last: Option<Progress>,
    next: u64,
    sinks: HashMap<u64, Arc<dyn ProgressSink>>,
}

struct Listening {
    fan_out: Arc<FanOut>,
    id: u64,
}

impl FanOut {
    fn state(&self) -> std::sync::MutexGuard<'_, FanOutState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn join(self: &Arc<Self>, sink: Arc<dyn ProgressSink>) -> Listening {
        let mut state = self.state();
        let id = state.next;
        state.next += 1;
        if let Some(last) = &state.last {
            sink.report(last.clone());
        }
        state.sinks.insert(id, sink);
        drop(state);
        Listening {
            fan_out: Arc::clone(self),
            id,
        }
    }
}

impl ProgressSink for FanOut {
    fn report(&self, progress: Progress) {
        let mut state = self.state();
        for sink in state.sinks.values() {
            sink.report(progress.clone());
        }
        state.last = Some(progress);
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.fan_out.state().sinks.remove(&self.id);
    }
}

/// Where a candidate comes from.
enum Source {
    /// A download with this checksum.
    Download(Checksum),
    /// The upload at this path.
    Upload(PathBuf),
}

/// What is kept beside an image, to know a download again.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Sidecar {
    checksums: Vec<String>,
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

    /// Joins the download of this source that is under way, or starts one.
    fn flight(&self, source: &ImageSource) -> (Flight, Arc<FanOut>) {
        let key = format!("{source:?}");
        let mut flights = self
            .inner
            .flights
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some((weak, fan_out)) = flights.get(&key)
            && let Some(flight) = weak.upgrade()
            // A finished one would hand on an old failure.
            && flight.peek().is_none()
        {
            return (flight, Arc::clone(fan_out));
        }
        flights.retain(|_, (weak, _)| weak.upgrade().is_some());
        let fan_out = Arc::new(FanOut::default());
        let (inner, source, sink) = (
            Arc::clone(&self.inner),
            source.clone(),
            Arc::clone(&fan_out) as Arc<dyn ProgressSink>,
        );
        let flight = async move { inner.pull(&source, sink).await }
            .boxed()
            .shared();
        if let Some(weak) = flight.downgrade() {
            flights.insert(key, (weak, Arc::clone(&fan_out)));
        }
        (flight, fan_out)
    }
}

impl Inner {
    fn new_name(&self, kind: &str) -> PathBuf {
        self.staging.join(format!("{kind}-{}", Uuid::new_v4()))
    }

    /// The path of an upload from the name that `stage` gave; nothing else is taken.
    fn staged_path(&self, staged: &Path) -> Result<PathBuf> {
        let known = staged
            .to_str()
            .and_then(|name| name.strip_prefix("upload-"))
            .and_then(|id| Uuid::parse_str(id).ok());
        match known {
            Some(id) => Ok(self.staging.join(format!("upload-{}", id.as_hyphenated()))),
            None => Err(Error::new(
                ErrorCode::InvalidArgument,
                "that is not the name of an upload",
            )),
        }
    }

    /// Where it is noted what became of an upload.
    fn adopted_path(upload: &Path) -> PathBuf {
        upload.with_extension("adopted")
    }

    /// What an earlier adoption of this upload published.
    fn adopted(&self, upload: &Path) -> Result<Option<CachedContent>> {
        let digest = fs::read_to_string(Self::adopted_path(upload))
            .ok()
            .and_then(|text| text.parse::<ImageDigest>().ok());
        digest.map_or(Ok(None), |digest| self.look(&digest))
    }

    fn content_path(&self, digest: &ImageDigest, format: ImageFormat) -> PathBuf {
        self.images.join(format!("{digest}.{}", format.as_str()))
    }

    fn sidecar_path(&self, digest: &ImageDigest) -> PathBuf {
        self.images.join(format!("{digest}.json"))
    }

    fn checksums(&self, digest: &ImageDigest) -> Vec<Checksum> {
        fs::read(self.sidecar_path(digest))
            .ok()
            .and_then(|bytes| serde_json::from_slice::<Sidecar>(&bytes).ok())
            .unwrap_or_default()
            .checksums
            .iter()
            .filter_map(|text| text.parse().ok())
            .collect()
    }

    fn look(&self, digest: &ImageDigest) -> Result<Option<CachedContent>> {
        for format in [ImageFormat::Qcow2, ImageFormat::Raw] {
            let path = self.content_path(digest, format);
            let file = match open_plain(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(io_error("open", &path, &error)),
            };
            let sample = Sample::of(&file).map_err(|error| io_error("read", &path, &error))?;
            let virtual_size = match format {
                ImageFormat::Raw => sample.file_size,
                ImageFormat::Qcow2 => {
                    Qcow2Header::parse(&sample.head)
                        .map_err(|error| {
                            Error::new(
                                ErrorCode::IoFailed,
                                format!("the cached image {} is damaged", path.display()),
                            )
                            .because(error)
                            .hint("delete the image and pull it again")
                        })?
                        .virtual_size
                }
            };
            return Ok(Some(CachedContent {
                digest: *digest,
                path,
                format,
                virtual_size: ByteSize::from_bytes(virtual_size),
                file_size: ByteSize::from_bytes(sample.file_size),
                checksum: self.checksums(digest).pop(),
            }));
        }
        Ok(None)
    }

    fn digests(&self) -> Result<Vec<ImageDigest>> {
        let failed = |error: io::Error| io_error("list", &self.images, &error);
        let mut digests = Vec::new();
        for entry in fs::read_dir(&self.images).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            let digest: Option<ImageDigest> = name.to_str().and_then(|name| {
                let (stem, extension) = name.split_once('.')?;
                matches!(extension, "qcow2" | "raw")
                    .then(|| stem.parse::<ImageDigest>().ok())
                    .flatten()
            });
            digests.extend(digest);
        }
        digests.sort();
        digests.dedup();
        Ok(digests)
    }

    fn find_by_checksum(&self, checksum: &Checksum) -> Result<Option<CachedContent>> {
        for digest in self.digests()? {
            if self.checksums(&digest).contains(checksum)
                && let Some(mut content) = self.look(&digest)?
            {
                content.checksum = Some(checksum.clone());
                return Ok(Some(content));
            }
        }
        Ok(None)
    }

    async fn expected(
        &self,
        source: &ImageSource,
        sink: &Arc<dyn ProgressSink>,
    ) -> Result<Checksum> {
        match &source.checksum {
            ChecksumSource::Inline(checksum) => Ok(checksum.clone()),
            ChecksumSource::Url { url, algorithm } => {
                sink.report(Progress::phase("reading the checksums"));
                let list = self.downloader.text(url, &**sink).await?;
                let (address, _) = super::address::start(&source.url)?;
                let name = address
                    .path_segments()
                    .and_then(|mut segments| segments.next_back())
                    .unwrap_or("");
                find_in_list(&list, name, *algorithm)
                    .map_err(|error| error.because(format!("looked up in {url}")))
            }
        }
    }

    /// One at a time per partial file: two sources may name the same bytes.
    fn partial_lock(&self, partial: &Partial) -> Arc<tokio::sync::Mutex<()>> {
        let mut partials = self.partials.lock().unwrap_or_else(PoisonError::into_inner);
        partials.retain(|_, lock| lock.strong_count() > 0);
        if let Some(lock) = partials.get(&partial.path).and_then(Weak::upgrade) {
            return lock;
        }
        let lock = Arc::new(tokio::sync::Mutex::new(()));
        partials.insert(partial.path.clone(), Arc::downgrade(&lock));
        lock
    }

    async fn pull(
        self: &Arc<Self>,
        source: &ImageSource,
        sink: Arc<dyn ProgressSink>,
    ) -> Result<CachedContent> {
        super::address::start(&source.url)?;
        let checksum = self.expected(source, &sink).await?;
        let key = Sha256::digest(format!("{}\n{checksum}", source.url));
        let partial = Partial {
            path: self
                .staging
                .join(format!("pull-{}.partial", hex::encode(&key[..16]))),
        };
        let lock = self.partial_lock(&partial);
        let _one_at_a_time = lock.lock().await;
        let cached = {
            let (inner, checksum) = (Arc::clone(self), checksum.clone());
            blocking(move |_| inner.find_by_checksum(&checksum)).await?
        };
        if let Some(content) = cached {
            partial.remove()?;
            return Ok(content);
        }
        let fetched = self
            .downloader
            .file(&source.url, &partial, self.options.max_download, &sink)
            .await;
        if let Err(error) = fetched {
            // On a full disk the partial is part of the trouble.
            if matches!(error.code(), ErrorCode::DiskFull | ErrorCode::ImageTooLarge) {
                partial.remove()?;
            }
            return Err(error);
        }
        let verified = self.verify(&partial, checksum.clone(), &sink).await;
        // From here on nothing of it can be resumed: it is wrong, or becomes the image.
        let sidecar = RemoveOnDrop(partial.sidecar());
        let (candidate, digest) = verified?;
        let content = self
            .take_in(candidate, Some(digest), Source::Download(checksum), &sink)
            .await;
        drop(sidecar);
        content
    }

    async fn verify(
        &self,
        partial: &Partial,
        expected: Checksum,
        sink: &Arc<dyn ProgressSink>,
    ) -> Result<(TemporaryFile, ImageDigest)> {
        let (path, sink) = (partial.path.clone(), Arc::clone(sink));
        let (candidate, digest, actual) = blocking_long(move |cancellation| {
            let candidate = open_candidate(path)?;
            let (digest, actual) = hash_with_progress(
                &candidate.file,
                candidate.path(),
                Some(expected.algorithm()),
                sink,
                cancellation,
            )?;
            Ok((candidate, digest, (actual, expected)))
        })
        .await?;
        let (actual, expected) = actual;
        match actual {
            Some(actual) if actual == expected => Ok((candidate, digest)),
            actual => Err(Error::new(
                ErrorCode::ChecksumMismatch,
                "the download does not have the expected checksum",
            )
            .because(format!(
                "expected {expected}, got {}",
                actual.map_or_else(|| "none".to_owned(), |actual| actual.to_string())
            ))
            .hint("pull it again; if it stays so, the publisher replaced the file or somebody tampers with it")),
        }
    }

    /// Decompresses, checks and publishes a staged file, which is consumed either way.
    async fn take_in(
        self: &Arc<Self>,
        candidate: TemporaryFile,
        digest: Option<ImageDigest>,
        source: Source,
        sink: &Arc<dyn ProgressSink>,
    ) -> Result<CachedContent> {
        let (inner, worker_sink) = (Arc::clone(self), Arc::clone(sink));
        let (candidate, admitted, digest) = blocking_long(move |cancellation| {
            let (candidate, digest) =
                match inner.decompressed(candidate, &worker_sink, cancellation)? {
                    (candidate, true) => (candidate, None),
                    (candidate, false) => (candidate, digest),
                };
            let admitted = inner.admit(&candidate)?;
            Ok((candidate, admitted, digest))
        })
        .await?;
        let (candidate, admitted, digest) = match admitted.flatten {
            None => (candidate, admitted, digest),
            Some(reason) => {
                tracing::info!(reason, "the image is re-encoded");
                let (candidate, admitted) = self.flattened(candidate, sink).await?;
                (candidate, admitted, None)
            }
        };
        if admitted.format == ImageFormat::Qcow2 {
            sink.report(Progress::phase("checking"));
            self.qemu_img
                .verify_qcow2(candidate.path(), admitted.virtual_size)
                .await?;
        }
        let (inner, sink) = (Arc::clone(self), Arc::clone(sink));
        blocking_long(move |cancellation| {
            let digest = match digest {
                Some(digest) => digest,
                None => {
                    hash_with_progress(
                        &candidate.file,
                        candidate.path(),
                        None,
                        Arc::clone(&sink),
                        cancellation,
                    )?
                    .0
                }
            };
            sink.report(Progress::phase("publishing"));
            inner.publish(&candidate, &admitted, digest, source)
        })
        .await
    }

    fn admit(&self, candidate: &TemporaryFile) -> Result<Admitted> {
        let sample = Sample::of(&candidate.file)
            .map_err(|error| io_error("read", candidate.path(), &error))?;
        admit(&sample, self.options.max_virtual_size)
    }

    /// The candidate, or what came out of it, and whether it was compressed.
    fn decompressed(
        &self,
        candidate: TemporaryFile,
        sink: &Arc<dyn ProgressSink>,
        cancellation: &Cancellation,
    ) -> Result<(TemporaryFile, bool)> {
        let failed = |error: io::Error| io_error("read", candidate.path(), &error);
        let sample = Sample::of(&candidate.file).map_err(failed)?;
        let Some(compression) = Compression::detect(&sample.head) else {
            return Ok((candidate, false));
        };
        let input = open_plain(candidate.path()).map_err(failed)?;
        let work = self.new_name("work");
        let output =
            TemporaryFile::at(work.clone()).map_err(|error| io_error("write", &work, &error))?;
        let mut limits = self.options.decompression;
        limits.max_output = limits.max_output.min(self.options.max_virtual_size);
        let mut meter = Meter::start(Arc::clone(sink), "decompressing", 0, Some(sample.file_size));
        decompress(
            input,
            compression,
            &output,
            &limits,
            &mut meter,
            cancellation,
        )?;
        Ok((output, true))
    }

    async fn flattened(
        &self,
        candidate: TemporaryFile,
        sink: &Arc<dyn ProgressSink>,
    ) -> Result<(TemporaryFile, Admitted)> {
        sink.report(Progress::phase("re-encoding"));
        let from = candidate.path().to_owned();
        let to = RemoveOnDrop(self.new_name("work"));
        let length = candidate
            .file
            .metadata()
            .map_err(|error| io_error("read", &from, &error))?
            .len();
        check_free_space(&to.0, length)?;
        self.qemu_img
            .flatten(
                &from,
                &to.0,
                self.options.max_download,
                self.options.decompression.deadline,
            )
            .await?;
        let path = to.0.clone();
        let flat = to.open().map_err(|error| io_error("open", &path, &error))?;
        let admitted = self.admit(&flat)?;
        if admitted.flatten.is_some() || admitted.format != ImageFormat::Qcow2 {
            return Err(Error::internal("a re-encoded image is not flat"));
        }
        Ok((flat, admitted))
    }

    fn publish(
        &self,
        candidate: &TemporaryFile,
        admitted: &Admitted,
        digest: ImageDigest,
        source: Source,
    ) -> Result<CachedContent> {
        let path = self.content_path(&digest, admitted.format);
        let failed = |error: io::Error| io_error("publish", &path, &error);
        let _one_at_a_time = self
            .publishing
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let length = candidate.file.metadata().map_err(failed)?.len();
        let checksum = match source {
            Source::Download(checksum) => Some(checksum),
            Source::Upload(path) => {
                // Noted first: a kill right after the rename finds it.
                let note = Self::adopted_path(&path);
                write_whole(&note, digest.to_string().as_bytes(), 0o600).map_err(failed)?;
                None
            }
        };
        // VMs may have the file open that is there already: the same content stays as it is.
        let there =
            fs::symlink_metadata(&path).is_ok_and(|old| old.is_file() && old.len() == length);
        if !there {
            publish(&candidate.file, candidate.path(), &path, 0o644).map_err(failed)?;
        }
        if let Some(checksum) = &checksum {
            let mut checksums = self.checksums(&digest);
            checksums.retain(|known| known != checksum);
            checksums.push(checksum.clone());
            let sidecar = Sidecar {
                checksums: checksums.iter().map(ToString::to_string).collect(),
            };
            let bytes = serde_json::to_vec(&sidecar)
                .map_err(|error| Error::internal(format!("a sidecar: {error}")))?;
            write_whole(&self.sidecar_path(&digest), &bytes, 0o600).map_err(failed)?;
        }
        Ok(CachedContent {
            digest,
            path,
            format: admitted.format,
            virtual_size: admitted.virtual_size,
            file_size: ByteSize::from_bytes(length),
            checksum,
        })
    }

    /// Space that staging takes now.
    fn staged_bytes(&self) -> io::Result<u64> {
        let mut bytes = 0u64;
        for entry in fs::read_dir(&self.staging)? {
            match entry?.metadata() {
                Ok(metadata) => bytes = bytes.saturating_add(metadata.blocks().saturating_mul(512)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(bytes)
    }

    fn check_quota(&self, more: u64) -> Result<()> {
        let staged = self
            .staged_bytes()
            .map_err(|error| io_error("list", &self.staging, &error))?;
        if staged.saturating_add(more) > self.options.staging_quota.bytes() {
            return Err(Error::new(
                ErrorCode::DiskFull,
                "the space for uploads and downloads on their way is used up",
            )
            .because(format!(
                "{} of {} are taken",
                ByteSize::from_bytes(staged),
                self.options.staging_quota
            ))
            .hint("wait until other imports have ended, then try again"));
        }
        Ok(())
    }

    fn append(&self, path: &Path, data: &[u8]) -> Result<()> {
        use std::os::unix::fs::OpenOptionsExt;
        let failed = |error: io::Error| io_error("write", path, &error);
        let file = fs::OpenOptions::new()
            .write(true)
            .custom_flags(no_follow())
            .open(path)
            .map_err(failed)?;
        let have = file.metadata().map_err(failed)?.len();
        let after = have.saturating_add(data.len() as u64);
        if after > self.options.max_upload.bytes() {
            return Err(Error::new(
                ErrorCode::PayloadTooLarge,
                format!("the upload is larger than {}", self.options.max_upload),
            )
            .hint("raise images.max_upload in the agent's configuration if that is wanted"));
        }
        self.check_quota(data.len() as u64)?;
        write_sparse(&file, data, have)
            .and_then(|()| file.set_len(after))
            .map_err(failed)
    }

    fn sweep(&self, keep: &[PathBuf]) -> Result<()> {
        let failed = |error: io::Error| io_error("clean up", &self.staging, &error);
        let now = SystemTime::now();
        for entry in fs::read_dir(&self.staging).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name();
            let text = name.to_string_lossy();
            let kept = if text.starts_with("pull-") && !text.ends_with(".new") {
                let age = entry
                    .metadata()
                    .and_then(|metadata| metadata.modified())
                    .map(|modified| now.duration_since(modified).unwrap_or_default());
                age.is_ok_and(|age| age < PARTIAL_LIFE)
            } else {
                let upload = Path::new(&name).with_extension("");
                let note = name.to_str().is_some_and(|name| name.ends_with(".adopted"));
                keep.iter()
                    .any(|path| path.as_os_str() == name || (note && *path == upload))
            };
            if kept {
                continue;
            }
            let gone = if entry.file_type().map_err(failed)?.is_dir() {
                fs::remove_dir_all(entry.path())
            } else {
                remove_if_there(&entry.path())
            };
            gone.map_err(failed)?;
            tracing::info!(file = %text, "a staging file of an earlier run was removed");
        }
        for entry in fs::read_dir(&self.images).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if entry.file_name().to_string_lossy().ends_with(".json.new") {
                remove_if_there(&entry.path()).map_err(failed)?;
            }
        }
        Ok(())
    }
}

/// A staged file, removed unless it is published.
fn open_candidate(path: PathBuf) -> Result<TemporaryFile> {
    TemporaryFile::existing(path.clone()).map_err(|error| io_error("open", &path, &error))
}

fn hash_with_progress(
    file: &File,
    path: &Path,
    also: Option<ghost_domain::ChecksumAlgorithm>,
    sink: Arc<dyn ProgressSink>,
    cancellation: &Cancellation,
) -> Result<(ImageDigest, Option<Checksum>)> {
    let total = file.metadata().map(|metadata| metadata.len()).ok();
    let mut meter = Meter::start(sink, "verifying", 0, total);
    hash_file(file, path, also, &mut meter, cancellation)
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
        blocking(move |_| {
            remove_if_there(&path)
                .and_then(|()| remove_if_there(&Inner::adopted_path(&path)))
                .map_err(|error| io_error("remove", &path, &error))
        })
        .await
    }

    async fn get(&self, digest: &ImageDigest) -> Result<Option<CachedContent>> {
        let (inner, digest) = (Arc::clone(&self.inner), *digest);
        blocking(move |_| inner.look(&digest)).await
    }

    async fn list(&self) -> Result<Vec<CachedContent>> {
        let inner = Arc::clone(&self.inner);
        blocking(move |_| {
            let mut contents = Vec::new();
            for digest in inner.digests()? {
                match inner.look(&digest) {
                    Ok(content) => contents.extend(content),
                    // One damaged file must not hide the others.
                    Err(error) => tracing::warn!(%digest, %error, "a cached image cannot be read"),
                }
            }
            Ok(contents)
        })
        .await
    }

    async fn remove(&self, digest: &ImageDigest) -> Result<()> {
        let (inner, digest) = (Arc::clone(&self.inner), *digest);
        blocking_long(move |_| {
            for path in [
                inner.content_path(&digest, ImageFormat::Qcow2),
                inner.content_path(&digest, ImageFormat::Raw),
                inner.sidecar_path(&digest),
            ] {
                remove_if_there(&path).map_err(|error| io_error("remove", &path, &error))?;
            }
            sync_folder(&inner.images)
                .map_err(|error| io_error("remove from", &inner.images, &error))
        })
        .await
    }

    async fn sweep(&self, keep: &[PathBuf]) -> Result<()> {
        let (inner, keep) = (Arc::clone(&self.inner), keep.to_vec());
        blocking_long(move |_| inner.sweep(&keep)).await
    }
}
