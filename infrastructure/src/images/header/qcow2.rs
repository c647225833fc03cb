//! The qcow2 header, read by the rules of QEMU's `docs/interop/qcow2.txt`.
//!
//! Everything is bounded before it is used: an offset or a length in a header is a claim of
//! whoever made the file.

use super::{malformed, unsupported};
use ghost_domain::{Error, ErrorCode, Result};

/// `QFI\xfb`.
pub(super) const MAGIC: &[u8] = b"QFI\xfb";
const V2_LENGTH: usize = 72;
const V3_LENGTH: usize = 104;
/// Longest backing file name that the format allows.
const MAX_BACKING_NAME: u32 = 1023;
/// QEMU's own limits (`QCOW_MAX_L1_SIZE`, `QCOW_MAX_REFTABLE_SIZE`); beyond them it refuses too.
const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;

const INCOMPATIBLE_DIRTY: u64 = 1 << 0;
const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;
const INCOMPATIBLE_KNOWN: u64 = INCOMPATIBLE_DIRTY
    | INCOMPATIBLE_CORRUPT
    | INCOMPATIBLE_DATA_FILE
    | INCOMPATIBLE_COMPRESSION
    | INCOMPATIBLE_EXTENDED_L2;

const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_ENCRYPTION: u32 = 0x0537_be77;
const EXTENSION_DATA_FILE: u32 = 0x4441_5441;

/// What a qcow2 header says. Reading it does not judge it; [`Qcow2Header::admit`] does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qcow2Header {
    /// 2 or 3.
    pub version: u32,
    /// Bytes that a guest sees.
    pub virtual_size: u64,
    /// log2 of the cluster size, 9 to 21.
    pub cluster_bits: u32,
    /// The backing file, as written (not resolved).
    pub backing_file: Option<String>,
    /// The backing file's format from the header extension.
    pub backing_format: Option<String>,
    /// 0 none, 1 AES, 2 LUKS.
    pub crypt_method: u32,
    /// Number of internal snapshots.
    pub snapshots: u32,
    /// Bit set of the features that a reader must know.
    pub incompatible_features: u64,
    /// 0 deflate, 1 zstd.
    pub compression_type: u8,
    /// A data-file name extension stands in the header.
    pub names_data_file: bool,
    /// An encryption header extension stands in the header.
    pub names_encryption: bool,
    l1_offset: u64,
    l1_bytes: u64,
    refcount_offset: u64,
    refcount_bytes: u64,
}

fn be32(bytes: &[u8], at: usize) -> Result<u32> {
    bytes
        .get(at..at + 4)
        .and_then(|slice| slice.try_into().ok())
        .map(u32::from_be_bytes)
        .ok_or_else(|| malformed("its header is cut short"))
}

fn be64(bytes: &[u8], at: usize) -> Result<u64> {
    Ok(u64::from(be32(bytes, at)?) << 32 | u64::from(be32(bytes, at + 4)?))
}

impl Qcow2Header {
    /// Reads a header from the first bytes of a file.
    ///
    /// # Errors
    /// `UnsupportedImage` when the bytes are no well-formed qcow2 header of version 2 or 3.
    pub fn parse(head: &[u8]) -> Result<Self> {
        if !head.starts_with(MAGIC) {
            return Err(malformed("it does not start with the qcow2 magic"));
        }
        let version = be32(head, 4)?;
        let (incompatible_features, refcount_order, header_length) = match version {
            2 => (0, 4, V2_LENGTH),
            3 => (
                be64(head, 72)?,
                be32(head, 96)?,
                usize::try_from(be32(head, 100)?).unwrap_or(usize::MAX),
            ),
            1 => {
                return Err(unsupported(
                    "the image is a qcow image of version 1",
                    "convert it: qemu-img convert -f qcow -O qcow2 OLD NEW",
                ));
            }
            other => {
                return Err(malformed(format!(
                    "its version is {other}; 2 and 3 are known"
                )));
            }
        };
        let cluster_bits = be32(head, 20)?;
        if !(9..=21).contains(&cluster_bits) {
            return Err(malformed(format!("its cluster size is 2^{cluster_bits}")));
        }
        let cluster_size = 1usize << cluster_bits;
        if version == 3
            && (header_length < V3_LENGTH
                || header_length > cluster_size
                || !header_length.is_multiple_of(8))
        {
            return Err(malformed("its header length is wrong"));
        }
        if refcount_order > 6 {
            return Err(malformed("its refcount width is wrong"));
        }
        let compression_type = if header_length > V3_LENGTH {
            *head
                .get(104)
                .ok_or_else(|| malformed("its header is cut short"))?
        } else {
            0
        };

        let (backing_file, extensions_end) = Self::backing(head, header_length, cluster_size)?;
        let mut header = Self {
            version,
            virtual_size: be64(head, 24)?,
            cluster_bits,
            backing_file,
            backing_format: None,
            crypt_method: be32(head, 32)?,
            snapshots: be32(head, 60)?,
            incompatible_features,
            compression_type,
            names_data_file: false,
            names_encryption: false,
            l1_offset: be64(head, 40)?,
            l1_bytes: u64::from(be32(head, 36)?) * 8,
            refcount_offset: be64(head, 48)?,
            refcount_bytes: u64::from(be32(head, 56)?) << cluster_bits,
        };
        header.read_extensions(head, header_length, extensions_end)?;
        Ok(header)
    }

    /// The backing file's name and where the header extensions end.
    fn backing(
        head: &[u8],
        header_length: usize,
        cluster_size: usize,
    ) -> Result<(Option<String>, usize)> {
        let offset = be64(head, 8)?;
        let length = be32(head, 16)?;
        if offset == 0 {
            return Ok((None, cluster_size));
        }
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.saturating_add(usize::try_from(length).unwrap_or(usize::MAX));
        if length > MAX_BACKING_NAME || start < header_length || end > cluster_size {
            return Err(malformed("its backing file name lies outside the header"));
        }
        let name = head
            .get(start..end)
            .ok_or_else(|| malformed("its backing file name lies outside the file"))?;
        Ok((Some(String::from_utf8_lossy(name).into_owned()), start))
    }

    fn read_extensions(&mut self, head: &[u8], start: usize, end: usize) -> Result<()> {
        let mut at = start;
        // An area that runs to its end without an end marker is legal, as in QEMU.
        while at.saturating_add(8) <= end {
            let kind = be32(head, at)?;
            let length = usize::try_from(be32(head, at + 4)?).unwrap_or(usize::MAX);
            at += 8;
            if kind == EXTENSION_END {
                return Ok(());
            }
            if length > end - at {
                return Err(malformed("a header extension is longer than the header"));
            }
            let data = head
                .get(at..at + length)
                .ok_or_else(|| malformed("its header extensions are too long"))?;
            match kind {
                EXTENSION_BACKING_FORMAT => {
                    self.backing_format = Some(String::from_utf8_lossy(data).into_owned());
                }
                EXTENSION_ENCRYPTION => self.names_encryption = true,
                EXTENSION_DATA_FILE => self.names_data_file = true,
                // By the format's rules an unknown extension can be ignored.
                _ => {}
            }
            at = at.saturating_add(length.next_multiple_of(8));
        }
        Ok(())
    }

    /// Whether the image may become a base: self-contained, plain, complete in its tables.
    /// `file_size` is the length of the file.
    ///
    /// # Errors
    /// `UnsafeImage` for anything that reaches outside the file; `UnsupportedImage` for what we
    /// or QEMU would not read.
    pub fn admit(&self, file_size: u64) -> Result<()> {
        let flat = "make it flat first: qemu-img convert -O qcow2 OLD NEW";
        if let Some(name) = &self.backing_file {
            let name: String = name.chars().take(80).collect();
            return Err(Error::new(
                ErrorCode::UnsafeImage,
                format!("the image needs another file, its backing file {name:?}"),
            )
            .because("an image must hold all of its own data; a backing file could be any file of the host")
            .hint(flat));
        }
        if self.incompatible_features & INCOMPATIBLE_DATA_FILE != 0 || self.names_data_file {
            return Err(Error::new(
                ErrorCode::UnsafeImage,
                "the image keeps its data in another file (external data file)",
            )
            .because("an image must hold all of its own data; the data file could be any file of the host")
            .hint(flat));
        }
        if self.backing_format.is_some() {
            return Err(Error::new(
                ErrorCode::UnsafeImage,
                "the image names the format of a backing file without having one",
            )
            .because("the header contradicts itself")
            .hint(flat));
        }
        if self.crypt_method != 0 || self.names_encryption {
            return Err(unsupported(
                "the image is encrypted",
                "decrypt it first with qemu-img convert, or encrypt inside the guest",
            ));
        }
        let unknown = self.incompatible_features & !INCOMPATIBLE_KNOWN;
        if unknown != 0 {
            return Err(unsupported(
                format!(
                    "the image needs qcow2 features that are not known here (bits {unknown:#x})"
                ),
                flat,
            ));
        }
        if self.incompatible_features & INCOMPATIBLE_CORRUPT != 0 {
            return Err(unsupported(
                "the image is marked as corrupt",
                "repair a copy of it: qemu-img check -f qcow2 -r all FILE",
            ));
        }
        let compression_flag = self.incompatible_features & INCOMPATIBLE_COMPRESSION != 0;
        if self.compression_type > 1 || (self.compression_type != 0) != compression_flag {
            return Err(unsupported(
                "the image's clusters are compressed in a way that is not known here",
                flat,
            ));
        }
        if self.virtual_size == 0 {
            return Err(unsupported(
                "the image is empty",
                "give an image with a disk in it",
            ));
        }
        self.check_tables(file_size)
    }

    fn check_tables(&self, file_size: u64) -> Result<()> {
        let aligned = |offset: u64| offset.is_multiple_of(1 << self.cluster_bits) && offset != 0;
        if self.l1_bytes > MAX_L1_BYTES || self.refcount_bytes > MAX_REFCOUNT_TABLE_BYTES {
            return Err(malformed("its tables are absurdly large"));
        }
        if !aligned(self.refcount_offset)
            || self.refcount_bytes == 0
            || (self.l1_bytes > 0 && !aligned(self.l1_offset))
        {
            return Err(malformed("its tables are misplaced"));
        }
        // One L1 entry covers a table of cluster_size / 8 (16 with extended L2) clusters.
        let entry = if self.incompatible_features & INCOMPATIBLE_EXTENDED_L2 == 0 {
            8
        } else {
            16
        };
        let covers = ((1u64 << self.cluster_bits) / entry) << self.cluster_bits;
        if self.virtual_size.div_ceil(covers) > self.l1_bytes / 8 {
            return Err(malformed("its table is too small for its size"));
        }
        let within = |offset: u64, length: u64| {
            offset
                .checked_add(length)
                .is_some_and(|end| end <= file_size)
        };
        if !within(self.l1_offset, self.l1_bytes)
            || !within(self.refcount_offset, self.refcount_bytes)
        {
            return Err(unsupported(
                "the image is cut short: its tables lie beyond the end of the file",
                "download or copy it again",
            ));
        }
        Ok(())
    }

    /// Why the image must be re-encoded before it becomes a base, if so.
    ///
    /// Internal snapshots would keep old data of somebody else's disk alive under every VM, and a
    /// dirty image has refcounts that a writer must rebuild first. Both are cured by copying the
    /// active layer; everything else is kept as it is, byte for byte.
    pub fn must_be_flattened(&self) -> Option<&'static str> {
        if self.snapshots > 0 {
            Some("it holds internal snapshots")
        } else if self.incompatible_features & INCOMPATIBLE_DIRTY != 0 {
            Some("it was not closed cleanly")
        } else {
            None
        }
    }
}
