//! The sidecar: what was acknowledged last, kept apart from the engine.
//!
//! An engine that silently falls back to an older state cannot deceive it: at the next open the
//! engine's sequence must not be lower than the one here. It is also what decides whether the
//! newest batch of an engine was acknowledged: a batch that is not noted here was not, and is
//! undone.
//!
//! The file never changes its size, so that noting an acknowledgement cannot fail for want of
//! room. Two slots are written by turns; each lies in its own block, so that a torn write leaves
//! the other whole.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::files;

const MAGIC: [u8; 8] = *b"GhstSeq1";
const SLOT: usize = 64;
const STRIDE: usize = 4096;
const FILE: usize = 2 * STRIDE;

/// What is known of the store at one acknowledged batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    /// The store's identity: an engine directory of another installation is not taken for ours.
    pub(super) store: [u8; 16],
    /// The batch.
    pub(super) sequence: u64,
    /// How many records there are.
    pub(super) count: u64,
    /// The sum of their digests.
    pub(super) digest: u64,
}

/// What a sidecar file says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reading {
    /// There is none.
    Missing,
    /// Both slots as they must be.
    Clean(Mark),
    /// One slot is damaged: the mark may be one batch too old.
    Suspicious(Mark),
    /// Nothing can be read.
    Damaged,
}

/// The sidecar of an open store.
#[derive(Debug)]
pub(super) struct Sidecar {
    file: File,
    generation: u64,
}

impl Sidecar {
    /// Reads what is there.
    ///
    /// # Errors
    /// Only what the file system says; damage is a [`Reading`].
    pub(super) fn read(path: &Path) -> io::Result<Reading> {
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Reading::Missing),
            Err(error) => return Err(error),
        };
        Ok(interpret(&bytes).map_or(Reading::Damaged, |(reading, _)| reading))
    }

    /// Makes a fresh sidecar that notes `mark`, replacing whatever is there.
    pub(super) fn create(path: &Path, mark: Mark) -> io::Result<Self> {
        let mut bytes = vec![0; FILE];
        place(&mut bytes, 1, mark);
        files::write_whole(path, &bytes)?;
        let file = files::private().read(true).write(true).open(path)?;
        Ok(Self {
            file,
            generation: 1,
        })
    }

    /// Opens a sidecar that was read as clean.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let bytes = std::fs::read(path)?;
        let generation = interpret(&bytes).map_or(0, |(_, generation)| generation);
        let file = files::private().read(true).write(true).open(path)?;
        Ok(Self { file, generation })
    }

    /// Writes `mark` into the older slot.
    pub(super) fn write(&mut self, mark: Mark) -> io::Result<()> {
        let generation = self.generation + 1;
        let slot = encode(generation, mark);
        let at = if generation.is_multiple_of(2) {
            STRIDE
        } else {
            0
        };
        self.file.write_all_at(&slot, at as u64)?;
        self.generation = generation;
        Ok(())
    }

    /// Makes it durable. The size never changes, so that the data alone suffices.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

fn place(bytes: &mut [u8], generation: u64, mark: Mark) {
    let at = if generation.is_multiple_of(2) {
        STRIDE
    } else {
        0
    };
    if let Some(slot) = bytes.get_mut(at..at + SLOT) {
        slot.copy_from_slice(&encode(generation, mark));
    }
}

fn encode(generation: u64, mark: Mark) -> [u8; SLOT] {
    let mut slot = [0; SLOT];
    slot[..8].copy_from_slice(&MAGIC);
    slot[8..16].copy_from_slice(&generation.to_be_bytes());
    slot[16..32].copy_from_slice(&mark.store);
    slot[32..40].copy_from_slice(&mark.sequence.to_be_bytes());
    slot[40..48].copy_from_slice(&mark.count.to_be_bytes());
    slot[48..56].copy_from_slice(&mark.digest.to_be_bytes());
    let crc = crc32c::crc32c(&slot[..60]);
    slot[60..].copy_from_slice(&crc.to_be_bytes());
    slot
}

enum Slot {
    Empty,
    Invalid,
    Valid(u64, Mark),
}

fn decode(block: &[u8]) -> Slot {
    if block.iter().all(|byte| *byte == 0) {
        return Slot::Empty;
    }
    let Some((slot, rest)) = block.split_first_chunk::<SLOT>() else {
        return Slot::Invalid;
    };
    let crc = u32::from_be_bytes([slot[60], slot[61], slot[62], slot[63]]);
    if slot[..8] != MAGIC || crc32c::crc32c(&slot[..60]) != crc || rest.iter().any(|b| *b != 0) {
        return Slot::Invalid;
    }
    let number = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&slot[at..at + 8]);
        u64::from_be_bytes(bytes)
    };
    let mut store = [0; 16];
    store.copy_from_slice(&slot[16..32]);
    Slot::Valid(
        number(8),
        Mark {
            store,
            sequence: number(32),
            count: number(40),
            digest: number(48),
        },
    )
}

/// The reading and the generation of its slot; `None` where nothing can be read.
fn interpret(bytes: &[u8]) -> Option<(Reading, u64)> {
    let whole = bytes.len() == FILE;
    let odd = decode(bytes.get(..STRIDE.min(bytes.len()))?);
    let even = decode(bytes.get(STRIDE.min(bytes.len())..)?);
    let (generation, mark, clean) = match (odd, even) {
        // The second slot is untouched only until the second mark is written.
        (Slot::Valid(generation, mark), Slot::Empty) => (generation, mark, generation == 1),
        (Slot::Valid(first, one), Slot::Valid(second, two)) => {
            let neighbours = first.abs_diff(second) == 1;
            if first > second {
                (first, one, neighbours)
            } else {
                (second, two, neighbours)
            }
        }
        (Slot::Valid(generation, mark), Slot::Invalid)
        | (Slot::Invalid | Slot::Empty, Slot::Valid(generation, mark)) => (generation, mark, false),
        (Slot::Invalid | Slot::Empty, Slot::Invalid | Slot::Empty) => return None,
    };
    let reading = if clean && whole {
        Reading::Clean(mark)
    } else {
        Reading::Suspicious(mark)
    };
    Some((reading, generation))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(sequence: u64) -> Mark {
        Mark {
            store: [7; 16],
            sequence,
            count: sequence * 2,
            digest: sequence * 3,
        }
    }

    #[test]
    fn the_newest_mark_is_read_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sequence");
        assert_eq!(Sidecar::read(&path).unwrap(), Reading::Missing);
        let mut sidecar = Sidecar::create(&path, mark(1)).unwrap();
        assert_eq!(Sidecar::read(&path).unwrap(), Reading::Clean(mark(1)));
        for sequence in 2..9 {
            sidecar.write(mark(sequence)).unwrap();
            sidecar.sync().unwrap();
            assert_eq!(
                Sidecar::read(&path).unwrap(),
                Reading::Clean(mark(sequence))
            );
            sidecar = Sidecar::open(&path).unwrap();
        }
        assert_eq!(std::fs::metadata(&path).unwrap().len(), FILE as u64);
    }

    #[test]
    fn no_damaged_byte_passes_as_clean() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sequence");
        let mut sidecar = Sidecar::create(&path, mark(1)).unwrap();
        for sequence in 2..5 {
            sidecar.write(mark(sequence)).unwrap();
        }
        let whole = std::fs::read(&path).unwrap();
        for at in (0..SLOT)
            .chain(STRIDE..STRIDE + SLOT)
            .chain([100, FILE - 1])
        {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x10;
            let (reading, _) = interpret(&bytes).unwrap();
            let newest_hit = (STRIDE..STRIDE + SLOT).contains(&at) || at >= STRIDE;
            let expected = if newest_hit { mark(3) } else { mark(4) };
            assert_eq!(reading, Reading::Suspicious(expected), "byte {at}");
        }
        for length in 0..FILE {
            match interpret(&whole[..length]) {
                None | Some((Reading::Suspicious(_), _)) => {}
                Some(other) => panic!("cut to {length}: {other:?}"),
            }
        }
        for slot in [0, STRIDE] {
            let mut bytes = whole.clone();
            bytes[slot..slot + STRIDE].fill(0);
            assert!(matches!(
                interpret(&bytes),
                Some((Reading::Suspicious(_), _))
            ));
        }
    }
}
