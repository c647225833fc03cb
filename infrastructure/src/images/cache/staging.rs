//! What is on its way into the cache.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use ghost_domain::ports::CachedContent;
use ghost_domain::{ByteSize, Error, ErrorCode, ImageDigest, Result};
use uuid::Uuid;

use super::super::files::{io_error, no_follow, remove_if_there, write_sparse};
use super::Inner;

/// How long a partial download is kept for a later pull.
const PARTIAL_LIFE: Duration = Duration::from_secs(7 * 24 * 3600);

impl Inner {
    pub(super) fn new_name(&self, kind: &str) -> PathBuf {
        self.staging.join(format!("{kind}-{}", Uuid::new_v4()))
    }

    /// The path of an upload from the name that `stage` gave; nothing else is taken.
    pub(super) fn staged_path(&self, staged: &Path) -> Result<PathBuf> {
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
    pub(super) fn adopted_path(upload: &Path) -> PathBuf {
        upload.with_extension("adopted")
    }

    /// What an earlier adoption of this upload published.
    pub(super) fn adopted(&self, upload: &Path) -> Result<Option<CachedContent>> {
        let digest = fs::read_to_string(Self::adopted_path(upload))
            .ok()
            .and_then(|text| text.parse::<ImageDigest>().ok());
        digest.map_or(Ok(None), |digest| self.look(&digest))
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

    pub(super) fn check_quota(&self, more: u64) -> Result<()> {
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

    pub(super) fn append(&self, path: &Path, data: &[u8]) -> Result<()> {
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

    pub(super) fn sweep(&self, keep: &[PathBuf]) -> Result<()> {
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

/// Removes an upload, and what is noted of it.
pub(super) fn discard(upload: &Path) -> Result<()> {
    remove_if_there(upload)
        .and_then(|()| remove_if_there(&Inner::adopted_path(upload)))
        .map_err(|error| io_error("remove", upload, &error))
}
