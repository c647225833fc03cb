//! The stored form of an image.

use ghost_domain::{
    ByteSize, Image, ImageDigest, ImageFormat, ImageName, ImageOrigin, Result, Timestamp,
};
use serde::{Deserialize, Serialize};

use super::{Bytes, TryFromRow};

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ImageRow {
    name: String,
    digest: Bytes,
    format: FormatRow,
    virtual_size: u64,
    file_size: u64,
    origin: OriginRow,
    created_at: i64,
    last_used_at: i64,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum FormatRow {
    Raw,
    Qcow2,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum OriginRow {
    Pulled { url: String, checksum: String },
    Imported { file_name: String },
}

impl From<&Image> for ImageRow {
    fn from(image: &Image) -> Self {
        let Image {
            name,
            digest,
            format,
            virtual_size,
            file_size,
            origin,
            created_at,
            last_used_at,
        } = image;
        Self {
            name: name.as_str().to_owned(),
            digest: Bytes(digest.bytes().to_vec()),
            format: (*format).into(),
            virtual_size: virtual_size.bytes(),
            file_size: file_size.bytes(),
            origin: match origin {
                ImageOrigin::Pulled { url, checksum } => OriginRow::Pulled {
                    url: url.clone(),
                    checksum: checksum.to_string(),
                },
                ImageOrigin::Imported { file_name } => OriginRow::Imported {
                    file_name: file_name.clone(),
                },
            },
            created_at: created_at.unix_millis(),
            last_used_at: last_used_at.unix_millis(),
        }
    }
}

impl TryFromRow<ImageRow> for Image {
    fn try_from_row(row: ImageRow) -> Result<Self> {
        Ok(Self {
            name: ImageName::new(row.name)?,
            digest: ImageDigest::from_bytes(row.digest.array()?),
            format: row.format.into(),
            virtual_size: ByteSize::from_bytes(row.virtual_size),
            file_size: ByteSize::from_bytes(row.file_size),
            origin: match row.origin {
                OriginRow::Pulled { url, checksum } => ImageOrigin::Pulled {
                    url,
                    checksum: checksum.parse()?,
                },
                OriginRow::Imported { file_name } => ImageOrigin::Imported { file_name },
            },
            created_at: Timestamp::from_unix_millis(row.created_at),
            last_used_at: Timestamp::from_unix_millis(row.last_used_at),
        })
    }
}

impl From<ImageFormat> for FormatRow {
    fn from(format: ImageFormat) -> Self {
        match format {
            ImageFormat::Raw => Self::Raw,
            ImageFormat::Qcow2 => Self::Qcow2,
        }
    }
}

impl From<FormatRow> for ImageFormat {
    fn from(row: FormatRow) -> Self {
        match row {
            FormatRow::Raw => Self::Raw,
            FormatRow::Qcow2 => Self::Qcow2,
        }
    }
}
