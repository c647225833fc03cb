//! One process per store. The engines lock their own files too, but say neither who holds them nor
//! let go at once when dropped.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::path::Path;

use ghost_domain::{Error, ErrorCode, Result};
use rustix::fs::{FlockOperation, flock};

/// Held as long as the store is open; the kernel lets go when the process ends, however it ends.
#[derive(Debug)]
pub(super) struct Lock {
    file: File,
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing alone would leave it to a process that is being forked at this moment: until it
        // executes its program, it has our descriptor too.
        let _ = flock(&self.file, FlockOperation::Unlock);
    }
}

impl Lock {
    /// Takes the lock.
    ///
    /// # Errors
    /// [`ErrorCode::StoreUnavailable`] naming the process that holds it.
    pub(super) fn take(path: &Path) -> Result<Self> {
        let failed = |error: io::Error| {
            Error::new(
                ErrorCode::StoreUnavailable,
                format!("the lock file {} cannot be used", path.display()),
            )
            .because(error)
        };
        let mut file = super::files::private()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(failed)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(held(path, &mut file)),
            Err(error) => return Err(failed(error.into())),
        }
        // For people only; what counts is the kernel's lock. A full disk must not keep us out.
        let _ = file.set_len(0);
        let _ = write!(file, "{} {}", std::process::id(), process_name());
        Ok(Self { file })
    }
}

fn held(path: &Path, file: &mut File) -> Error {
    let mut text = String::new();
    let _ = file.rewind();
    let _ = file.take(256).read_to_string(&mut text);
    let directory = path.parent().unwrap_or(path).display();
    let holder = match text.split_once(' ') {
        Some((pid, name)) if pid.bytes().all(|b| b.is_ascii_digit()) => {
            format!("process {pid} ({}) has it open", name.escape_debug())
        }
        _ => "another process has it open".to_owned(),
    };
    Error::new(
        ErrorCode::StoreUnavailable,
        format!("the state store in {directory} is in use"),
    )
    .because(holder)
    .hint("stop the other agent first, or give this one a data directory of its own")
}

fn process_name() -> String {
    std::env::current_exe()
        .ok()
        .and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()))
        .unwrap_or_default()
}
