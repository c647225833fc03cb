//! Downloads, and whether they are what was asked for.

use std::sync::{Arc, PoisonError, Weak};

use ghost_domain::ports::{CachedContent, ImageSource, ProgressSink};
use ghost_domain::{Checksum, ChecksumSource, Error, ErrorCode, ImageDigest, Progress, Result};
use sha2::{Digest, Sha256};

use super::super::address;
use super::super::checksum::find_in_list;
use super::super::download::Partial;
use super::super::files::{RemoveOnDrop, TemporaryFile, blocking, blocking_long};
use super::Inner;
use super::intake::{Source, hash_with_progress, open_candidate};

impl Inner {
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
                let (address, _) = address::start(&source.url)?;
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

    pub(super) async fn pull(
        self: &Arc<Self>,
        source: &ImageSource,
        sink: Arc<dyn ProgressSink>,
    ) -> Result<CachedContent> {
        address::start(&source.url)?;
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
}
