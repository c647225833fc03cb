//! The guest agent's program on the host, for seeds and updates.

use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ghost_domain::ports::GuestProgramFile;
use ghost_domain::{Error, ErrorCode};
use parking_lot::Mutex;
use sha2::{Digest, Sha256};

/// Its file name, on the host and in a seed.
pub const PROGRAM_NAME: &str = "ghost-guest";
/// Larger than any release of it by far; a program with all its debug information does not belong
/// into every VM's seed.
pub const MOST_PROGRAM_BYTES: u64 = 16 << 20;

/// Where the guest agent's program lies. Cheap to clone; clones share what was read.
#[derive(Clone, Debug)]
pub struct GuestProgram {
    candidates: Arc<[PathBuf]>,
    known: Arc<Mutex<Option<Known>>>,
}

#[derive(Debug)]
struct Known {
    file: GuestProgramFile,
    stamp: Stamp,
}

/// What changes when a file's content does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.len(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

impl GuestProgram {
    /// The program at `path`.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self::first_of(vec![path.into()])
    }

    /// The program where packages and builds put it: beside this executable, in
    /// `/usr/local/lib/ghost`, in `/usr/lib/ghost`; the first that is there.
    pub fn standard() -> Self {
        let beside = std::env::current_exe()
            .ok()
            .and_then(|path| Some(path.parent()?.join(PROGRAM_NAME)));
        Self::first_of(
            beside
                .into_iter()
                .chain([
                    Path::new("/usr/local/lib/ghost").join(PROGRAM_NAME),
                    Path::new("/usr/lib/ghost").join(PROGRAM_NAME),
                ])
                .collect(),
        )
    }

    /// No program: nothing is injected or updated.
    pub fn none() -> Self {
        Self::first_of(Vec::new())
    }

    fn first_of(candidates: Vec<PathBuf>) -> Self {
        Self {
            candidates: candidates.into(),
            known: Arc::default(),
        }
    }

    /// Where it is looked for.
    pub fn candidates(&self) -> &[PathBuf] {
        &self.candidates
    }

    /// The file with its checksum, which is computed once and again when the file changed. Reads
    /// the disk: not for an executor's thread when the program may have changed.
    ///
    /// # Errors
    /// When a file is there and cannot be read, is no static program for this host's architecture,
    /// is not a regular file or is larger than [`MOST_PROGRAM_BYTES`].
    pub fn find(&self) -> io::Result<Option<GuestProgramFile>> {
        Ok(self.open()?.map(|(file, _)| file))
    }

    /// The same with the open file, at its beginning.
    pub(crate) fn open(&self) -> io::Result<Option<(GuestProgramFile, File)>> {
        for path in self.candidates.iter() {
            let mut file = match File::open(path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            let metadata = file.metadata()?;
            if !metadata.is_file() || metadata.len() == 0 || metadata.len() > MOST_PROGRAM_BYTES {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!(
                        "{} is not a program of at most {} MiB",
                        path.display(),
                        MOST_PROGRAM_BYTES >> 20
                    ),
                ));
            }
            let stamp = Stamp::of(&metadata);
            let mut known = self.known.lock();
            if let Some(known) = known.as_ref()
                && known.stamp == stamp
                && known.file.path == *path
            {
                return Ok(Some((known.file.clone(), file)));
            }
            super::elf::check(&file).map_err(|error| {
                io::Error::new(
                    error.kind(),
                    format!("{} cannot be put into guests: {error}", path.display()),
                )
            })?;
            let found = GuestProgramFile {
                path: path.clone(),
                sha256: checksum(&mut file)?,
                size: metadata.len(),
            };
            io::Seek::rewind(&mut file)?;
            *known = Some(Known {
                file: found.clone(),
                stamp,
            });
            return Ok(Some((found, file)));
        }
        Ok(None)
    }
}

/// The error of those who need a program that is not there.
pub(crate) fn missing(program: &GuestProgram) -> Error {
    let places: Vec<String> = program
        .candidates()
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    Error::new(
        ErrorCode::IoFailed,
        "this host has no program of the guest agent",
    )
    .because(if places.is_empty() {
        "none is configured".to_owned()
    } else {
        format!("it was looked for at {}", places.join(", "))
    })
    .hint("install the package ghost-guest on the host, or set guest.program in the agent's configuration")
}

fn checksum(file: &mut File) -> io::Result<[u8; 32]> {
    let mut sum = Sha256::new();
    let mut piece = vec![0; 64 * 1024];
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(sum.finalize().into()),
            count => sum.update(&piece[..count]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::elf::tests::head;
    use super::*;
    use std::fs;

    /// A program that says `word`, for all that is looked at.
    fn program_of(word: &str) -> Vec<u8> {
        [&head()[..], word.as_bytes()].concat()
    }

    #[test]
    fn the_checksum_follows_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(PROGRAM_NAME);
        let program = GuestProgram::at(&path);
        assert_eq!(program.find().unwrap(), None);
        fs::write(&path, program_of("one")).unwrap();
        let first = program.find().unwrap().unwrap();
        assert_eq!(first.sha256[..], Sha256::digest(program_of("one"))[..]);
        assert_eq!(program.find().unwrap().unwrap(), first);
        // An update replaces the file, as package managers do.
        fs::write(folder.path().join("new"), program_of("two")).unwrap();
        fs::rename(folder.path().join("new"), &path).unwrap();
        let second = program.find().unwrap().unwrap();
        assert_eq!(second.sha256[..], Sha256::digest(program_of("two"))[..]);
    }

    #[test]
    fn what_is_no_program_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        assert!(GuestProgram::at(folder.path()).find().is_err());
        let path = folder.path().join("large");
        let file = fs::File::create(&path).unwrap();
        assert!(GuestProgram::at(&path).find().is_err());
        file.set_len(MOST_PROGRAM_BYTES + 1).unwrap();
        assert!(GuestProgram::at(&path).find().is_err());
        let script = folder.path().join("script");
        fs::write(&script, "#!/bin/sh\n").unwrap();
        let refused = GuestProgram::at(&script).find().unwrap_err().to_string();
        assert!(
            refused.contains("script cannot be put into guests"),
            "{refused}"
        );
        assert_eq!(GuestProgram::none().find().unwrap(), None);
    }
}
