//! From a staged file to a published one: decompress, admit, flatten, check, publish.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};

use ghost_domain::ports::{CachedContent, ProgressSink};
use ghost_domain::{
    ByteSize, Checksum, ChecksumAlgorithm, Error, ImageDigest, ImageFormat, Progress, Result,
};

use super::super::checksum::hash_file;
use super::super::decompress::{Compression, decompress};
use super::super::download::check_free_space;
use super::super::files::{
    Cancellation, RemoveOnDrop, TemporaryFile, blocking_long, io_error, open_plain, publish,
    write_whole,
};
use super::super::header::{Admitted, Sample, admit};
use super::super::progress::Meter;
use super::Inner;

/// Where a candidate comes from.
pub(super) enum Source {
    /// A download with this checksum.
    Download(Checksum),
    /// The upload at this path.
    Upload(PathBuf),
}

impl Inner {
    /// Decompresses, checks and publishes a staged file, which is consumed either way.
    pub(super) async fn take_in(
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
            self.remember_checksum(&digest, checksum)?;
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
}

/// A staged file, removed unless it is published.
pub(super) fn open_candidate(path: PathBuf) -> Result<TemporaryFile> {
    TemporaryFile::existing(path.clone()).map_err(|error| io_error("open", &path, &error))
}

pub(super) fn hash_with_progress(
    file: &File,
    path: &Path,
    also: Option<ChecksumAlgorithm>,
    sink: Arc<dyn ProgressSink>,
    cancellation: &Cancellation,
) -> Result<(ImageDigest, Option<Checksum>)> {
    let total = file.metadata().map(|metadata| metadata.len()).ok();
    let mut meter = Meter::start(sink, "verifying", 0, total);
    hash_file(file, path, also, &mut meter, cancellation)
}
