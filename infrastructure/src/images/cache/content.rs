//! What is in the cache.

use std::fs;
use std::io;
use std::path::PathBuf;

use ghost_domain::ports::CachedContent;
use ghost_domain::{ByteSize, Checksum, Error, ErrorCode, ImageDigest, ImageFormat, Result};
use serde::{Deserialize, Serialize};

use super::super::files::{io_error, open_plain, remove_if_there, sync_folder, write_whole};
use super::super::header::{Qcow2Header, Sample};
use super::Inner;

/// What is kept beside an image, to know a download again.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Sidecar {
    checksums: Vec<String>,
}

impl Inner {
    pub(super) fn content_path(&self, digest: &ImageDigest, format: ImageFormat) -> PathBuf {
        self.images.join(format!("{digest}.{}", format.as_str()))
    }

    fn sidecar_path(&self, digest: &ImageDigest) -> PathBuf {
        self.images.join(format!("{digest}.json"))
    }

    pub(super) fn checksums(&self, digest: &ImageDigest) -> Vec<Checksum> {
        fs::read(self.sidecar_path(digest))
            .ok()
            .and_then(|bytes| serde_json::from_slice::<Sidecar>(&bytes).ok())
            .unwrap_or_default()
            .checksums
            .iter()
            .filter_map(|text| text.parse().ok())
            .collect()
    }

    pub(super) fn look(&self, digest: &ImageDigest) -> Result<Option<CachedContent>> {
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

    pub(super) fn digests(&self) -> Result<Vec<ImageDigest>> {
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

    pub(super) fn find_by_checksum(&self, checksum: &Checksum) -> Result<Option<CachedContent>> {
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

    /// Notes that a download with this checksum became this image.
    pub(super) fn remember_checksum(
        &self,
        digest: &ImageDigest,
        checksum: &Checksum,
    ) -> Result<()> {
        let path = self.sidecar_path(digest);
        let mut checksums = self.checksums(digest);
        checksums.retain(|known| known != checksum);
        checksums.push(checksum.clone());
        let sidecar = Sidecar {
            checksums: checksums.iter().map(ToString::to_string).collect(),
        };
        let bytes = serde_json::to_vec(&sidecar)
            .map_err(|error| Error::internal(format!("a sidecar: {error}")))?;
        write_whole(&path, &bytes, 0o600).map_err(|error| io_error("publish", &path, &error))
    }

    pub(super) fn list(&self) -> Result<Vec<CachedContent>> {
        let mut contents = Vec::new();
        for digest in self.digests()? {
            match self.look(&digest) {
                Ok(content) => contents.extend(content),
                // One damaged file must not hide the others.
                Err(error) => tracing::warn!(%digest, %error, "a cached image cannot be read"),
            }
        }
        Ok(contents)
    }

    pub(super) fn remove(&self, digest: &ImageDigest) -> Result<()> {
        for path in [
            self.content_path(digest, ImageFormat::Qcow2),
            self.content_path(digest, ImageFormat::Raw),
            self.sidecar_path(digest),
        ] {
            remove_if_there(&path).map_err(|error| io_error("remove", &path, &error))?;
        }
        sync_folder(&self.images).map_err(|error| io_error("remove from", &self.images, &error))
    }
}
