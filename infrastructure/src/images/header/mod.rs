//! What an image file is, decided by us before any tool opens it (threats T1 and T2).
//!
//! Two kinds are taken:
//! - **qcow2** of version 2 or 3 that is self-contained: no backing file, no external data file,
//!   no encryption, no unknown incompatible feature, tables inside the file. Internal snapshots
//!   and a dirty mark are taken, but the image is re-encoded
//!   ([`Qcow2Header::must_be_flattened`]).
//! - **raw** that is plausibly a disk a VM can boot: a whole number of 512-byte sectors with the
//!   boot signature `55 AA` at byte 510 (MBR, hybrid, boot sector of a file system) or a GPT
//!   header at 512 or 4096. Bytes without either cannot boot by BIOS or UEFI, and are nearly
//!   always the wrong file.
//!
//! Everything else is refused by a sentence that says what the file is and what to do with it.
//! All of this is pure and never panics, whatever the bytes.

mod foreign;
mod qcow2;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use ghost_domain::{ByteSize, Error, ErrorCode, ImageFormat, Result};

pub use qcow2::Qcow2Header;

/// How much of a file's start is looked at: the CD signature lies at 32 KiB, qcow2 header
/// extensions in the first cluster (64 KiB by default).
pub const HEAD_LENGTH: usize = 128 * 1024;
const SECTOR: u64 = 512;

/// The parts of a file that decide what it is.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    /// The first bytes, at most [`HEAD_LENGTH`].
    pub head: Vec<u8>,
    /// The last bytes, at most 512.
    pub tail: Vec<u8>,
    /// The length of the whole file.
    pub file_size: u64,
}

impl Sample {
    /// Reads the sample of an open file.
    ///
    /// # Errors
    /// As reading does.
    pub fn of(file: &File) -> io::Result<Self> {
        let file_size = file.metadata()?.len();
        let head_length = usize::try_from(file_size).map_or(HEAD_LENGTH, |n| n.min(HEAD_LENGTH));
        let mut head = vec![0; head_length];
        file.read_exact_at(&mut head, 0)?;
        let tail_length = head_length.min(512);
        let mut tail = vec![0; tail_length];
        file.read_exact_at(&mut tail, file_size.saturating_sub(tail_length as u64))?;
        Ok(Self {
            head,
            tail,
            file_size,
        })
    }

    /// The sample of bytes in memory.
    pub fn of_bytes(bytes: &[u8]) -> Self {
        Self {
            head: bytes[..bytes.len().min(HEAD_LENGTH)].to_vec(),
            tail: bytes[bytes.len().saturating_sub(512)..].to_vec(),
            file_size: bytes.len() as u64,
        }
    }
}

/// An image that passed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admitted {
    /// raw or qcow2.
    pub format: ImageFormat,
    /// Bytes that a guest sees.
    pub virtual_size: ByteSize,
    /// Why it must be re-encoded before it is published, if so.
    pub flatten: Option<&'static str>,
}

pub(crate) fn unsupported(what: impl Into<String>, hint: impl Into<String>) -> Error {
    Error::new(ErrorCode::UnsupportedImage, what).hint(hint)
}

fn malformed(why: impl Into<String>) -> Error {
    unsupported(
        "the image is not a well-formed qcow2 file",
        "download or copy it again",
    )
    .because(why.into())
}

/// Decides whether a file may become an image of the cache.
///
/// # Errors
/// `UnsafeImage`, `UnsupportedImage`, or `ImageTooLarge` when a guest would see more than
/// `max_virtual_size`.
pub fn admit(sample: &Sample, max_virtual_size: ByteSize) -> Result<Admitted> {
    let admitted = if sample.head.starts_with(qcow2::MAGIC) {
        let header = Qcow2Header::parse(&sample.head)?;
        header.admit(sample.file_size)?;
        Admitted {
            format: ImageFormat::Qcow2,
            virtual_size: ByteSize::from_bytes(header.virtual_size),
            flatten: header.must_be_flattened(),
        }
    } else {
        admit_raw(sample)?;
        Admitted {
            format: ImageFormat::Raw,
            virtual_size: ByteSize::from_bytes(sample.file_size),
            flatten: None,
        }
    };
    if admitted.virtual_size > max_virtual_size {
        return Err(Error::new(
            ErrorCode::ImageTooLarge,
            format!(
                "the image's disk has {}, at most {max_virtual_size} are taken",
                admitted.virtual_size
            ),
        )
        .hint("raise images.max_virtual_size in the agent's configuration if that is wanted"));
    }
    Ok(admitted)
}

fn admit_raw(sample: &Sample) -> Result<()> {
    if sample.file_size == 0 {
        return Err(unsupported(
            "the file is empty",
            "check the file or the address",
        ));
    }
    if let Some(foreign) = foreign::identify(&sample.head, &sample.tail) {
        return Err(unsupported(
            format!("the file is {}, not a disk image", foreign.what),
            foreign.hint,
        )
        .because("raw and qcow2 disk images are taken"));
    }
    let at = |offset: usize, bytes: &[u8]| {
        sample
            .head
            .get(offset..)
            .is_some_and(|rest| rest.starts_with(bytes))
    };
    let bootable = at(510, b"\x55\xaa") || at(512, b"EFI PART") || at(4096, b"EFI PART");
    if !bootable {
        return Err(unsupported(
            "the file is not a disk that can boot",
            "give a cloud image as qcow2, or the raw bytes of a whole disk (not of one partition)",
        )
        .because("it is neither qcow2 nor has it a boot signature (55 AA at byte 510) or a GPT"));
    }
    if !sample.file_size.is_multiple_of(SECTOR) {
        return Err(unsupported(
            "the raw image is not a whole number of 512-byte sectors",
            "it was probably cut short: download or copy it again",
        )
        .because(format!("it has {} bytes", sample.file_size)));
    }
    Ok(())
}
