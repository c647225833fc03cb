//! What can be wrong with an engine or its data, sorted by what has to be done about it.

use std::fmt;
use std::io;
use std::path::Path;
use std::time::Duration;

use ghost_domain::{Error, ErrorCode};

use super::files;

/// Why something did not work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// Another handle has it open: wait.
    Busy(String),
    /// There is no room: free the ballast.
    Full(String),
    /// The system failed (permissions, input or output, limits). It says nothing about the data, so
    /// nothing is set aside or rebuilt for it.
    Io(String),
    /// The data is not what was written: set it aside and recover.
    Damaged(String),
    /// The data is whole, but of a version that this agent does not know: touch nothing.
    Newer(String),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Busy(what)
        | Self::Full(what)
        | Self::Io(what)
        | Self::Damaged(what)
        | Self::Newer(what)) = self;
        f.write_str(what)
    }
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        let text = error.to_string();
        if files::is_full(&error) {
            return Self::Full(text);
        }
        match error.kind() {
            // Ends, lengths and values that cannot be: the file's contents, not the system.
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::InvalidData
            | io::ErrorKind::InvalidInput
            | io::ErrorKind::NotFound
            | io::ErrorKind::IsADirectory
            | io::ErrorKind::NotADirectory => Self::Damaged(text),
            _ => Self::Io(text),
        }
    }
}

impl Fault {
    /// The error for the one who wanted to open the store in `directory`.
    pub(super) fn into_open_error(self, directory: &Path) -> Error {
        let error = Error::new(
            ErrorCode::StoreUnavailable,
            format!(
                "the state store in {} cannot be opened",
                directory.display()
            ),
        )
        .because(&self);
        match self {
            Self::Newer(_) => error.hint(
                "a newer ghost-agent wrote it: install that version again, or move the directory \
                 away to start anew from what libvirt knows",
            ),
            Self::Full(_) => error.hint("free space on its file system"),
            Self::Busy(_) => error.hint("another process uses its files: end it"),
            Self::Io(_) | Self::Damaged(_) => {
                error.hint("look at the kernel's log and at the directory's owner and mode")
            }
        }
    }
}

/// The error of a commit that did not take place.
pub(super) fn unavailable(cause: impl fmt::Display) -> Error {
    Error::new(
        ErrorCode::StoreUnavailable,
        "the state store takes no writes at present",
    )
    .because(cause)
    .hint("free space on the agent's file system, or see the store's state: ghostctl status")
    .retry_after(Duration::from_secs(1))
}
