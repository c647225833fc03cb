//! Decompression within bounds (threat T3): absolute size, ratio, memory, time, one layer.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::Path;
use std::time::{Duration, Instant};

use ghost_domain::{ByteSize, Error, ErrorCode, Result};

use super::files::{Cancellation, TemporaryFile, io_error, write_sparse};
use super::progress::Meter;

/// Memory for the dictionary of xz; presets reach 64 MiB (`xz -9`).
const XZ_MEMORY: u64 = 128 << 20;
/// 128 MiB window: what `zstd --long` makes, and what the format recommends to support.
const ZSTD_WINDOW_LOG: u32 = 27;
const CHUNK: usize = 256 * 1024;

/// Compressions that are undone on the way in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// RFC 1952.
    Gzip,
    /// The .xz format.
    Xz,
    /// RFC 8878.
    Zstd,
}

impl Compression {
    /// Tells by the first bytes, never by a file's name.
    pub fn detect(head: &[u8]) -> Option<Self> {
        if head.starts_with(b"\x1f\x8b") {
            Some(Self::Gzip)
        } else if head.starts_with(b"\xfd7zXZ\0") {
            Some(Self::Xz)
        } else if head.starts_with(b"\x28\xb5\x2f\xfd") {
            Some(Self::Zstd)
        } else {
            None
        }
    }

    const fn as_str(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
        }
    }
}

/// How far a compressed file may grow.
#[derive(Clone, Copy, Debug)]
pub struct DecompressionLimits {
    /// Bytes that may come out.
    pub max_output: ByteSize,
    /// Bytes out per byte in, judged beyond `ratio_floor`. Disks with content stay below 40;
    /// bombs reach 1,000 (gzip) and far more (xz, zstd).
    pub max_ratio: u64,
    /// Output up to here is never judged by the ratio: small disks are mostly zeros.
    pub ratio_floor: ByteSize,
    /// How long it may take.
    pub deadline: Duration,
}

impl Default for DecompressionLimits {
    fn default() -> Self {
        Self {
            max_output: ByteSize::from_gib(64),
            max_ratio: 100,
            ratio_floor: ByteSize::from_gib(2),
            deadline: Duration::from_secs(30 * 60),
        }
    }
}

/// Counts what the decoder took of the file.
struct Counted {
    file: File,
    read: std::rc::Rc<std::cell::Cell<u64>>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(buffer)?;
        self.read.set(self.read.get() + count as u64);
        Ok(count)
    }
}

/// Decompresses `input` into `output`, a new empty file; zero blocks become holes.
pub(super) fn decompress(
    input: File,
    compression: Compression,
    output: &TemporaryFile,
    limits: &DecompressionLimits,
    meter: &mut Meter,
    cancellation: &Cancellation,
) -> Result<()> {
    let read = std::rc::Rc::new(std::cell::Cell::new(0));
    let counted = BufReader::with_capacity(
        CHUNK,
        Counted {
            file: input,
            read: std::rc::Rc::clone(&read),
        },
    );
    let mut decoder: Box<dyn Read> = match compression {
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(counted)),
        Compression::Xz => {
            let stream = liblzma::stream::Stream::new_stream_decoder(
                XZ_MEMORY,
                liblzma::stream::CONCATENATED,
            )
            .map_err(|error| Error::internal(format!("no xz decoder: {error}")))?;
            Box::new(liblzma::bufread::XzDecoder::new_stream(counted, stream))
        }
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(counted)
                .map_err(|error| Error::internal(format!("no zstd decoder: {error}")))?;
            decoder
                .window_log_max(ZSTD_WINDOW_LOG)
                .map_err(|error| Error::internal(format!("no zstd decoder: {error}")))?;
            Box::new(decoder)
        }
    };
    let started = Instant::now();
    let mut buffer = vec![0; CHUNK];
    let (mut written, mut seen) = (0u64, 0u64);
    loop {
        cancellation.check()?;
        if started.elapsed() > limits.deadline {
            return Err(Error::new(
                ErrorCode::ImageTooLarge,
                "the image did not decompress within its time",
            )
            .because(format!("{} s are allowed", limits.deadline.as_secs())));
        }
        let count = match decoder.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(damaged(compression, &error)),
        };
        let total = written + count as u64;
        check_growth(limits, read.get(), total)?;
        write_sparse(&output.file, &buffer[..count], written)
            .map_err(|error| write_error(output.path(), &error))?;
        written = total;
        meter.add(read.get().saturating_sub(seen));
        seen = read.get();
    }
    output
        .file
        .set_len(written)
        .map_err(|error| write_error(output.path(), &error))
}

fn write_error(path: &Path, error: &io::Error) -> Error {
    io_error("write", path, error)
}

fn check_growth(limits: &DecompressionLimits, read: u64, written: u64) -> Result<()> {
    let too_large = |cause: String| {
        Err(Error::new(
            ErrorCode::ImageTooLarge,
            "the compressed image grows beyond its limit",
        )
        .because(cause)
        .hint("if the image is good, decompress it yourself and import the result"))
    };
    if written > limits.max_output.bytes() {
        return too_large(format!("more than {} came out", limits.max_output));
    }
    if written > limits.ratio_floor.bytes() && written / limits.max_ratio.max(1) > read {
        return too_large(format!("it expands more than {} times", limits.max_ratio));
    }
    Ok(())
}

fn damaged(compression: Compression, error: &io::Error) -> Error {
    let message = error.to_string().to_ascii_lowercase();
    let memory = message.contains("memory") || message.contains("window");
    let what = format!("the {} file cannot be decompressed", compression.as_str());
    if memory {
        return Error::new(ErrorCode::ImageTooLarge, what)
            .because(format!("its dictionary is larger than allowed ({error})"))
            .hint("compress it with an ordinary level, such as xz -6 or zstd -10");
    }
    Error::new(ErrorCode::UnsupportedImage, what)
        .because(error)
        .hint("it is damaged or cut short: download or copy it again")
}
