//! Why a call failed, in the words of the protocol.

use std::fmt;
use std::io;

use ghost_proto::guest::v1;

/// A code of `ghost.guest.v1.Error` and what a person is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Stable, snake case; the list is at `Error.code` in the protocol.
    pub code: &'static str,
    /// What failed and why.
    pub message: String,
}

impl Failure {
    /// With a code and a message.
    pub fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }

    /// `invalid_argument`.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new("invalid_argument", message)
    }

    /// What the kernel answered when `what` was tried.
    pub fn io(what: impl fmt::Display, error: &io::Error) -> Self {
        let code = match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENXIO | libc::ESRCH) => "not_found",
            Some(libc::EACCES | libc::EPERM | libc::EROFS) => "permission_denied",
            Some(libc::EEXIST | libc::ENOTEMPTY) => "exists",
            Some(libc::ENOTDIR | libc::EISDIR) => "not_a_file",
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => "no_space",
            Some(libc::EXDEV | libc::ELOOP) => "outside_roots",
            Some(libc::ENOSYS | libc::EOPNOTSUPP | libc::ENOTTY) => "unsupported",
            Some(
                libc::EBUSY
                | libc::EAGAIN
                | libc::EMFILE
                | libc::ENFILE
                | libc::ENOMEM
                | libc::ETXTBSY,
            ) => "busy",
            Some(libc::EINVAL | libc::ENAMETOOLONG | libc::E2BIG | libc::ENOEXEC) => {
                "invalid_argument"
            }
            Some(libc::ETIMEDOUT) => "timed_out",
            _ => "io",
        };
        Self::new(code, format!("{what}: {error}"))
    }

    /// [`Failure::io`] for the raw calls.
    pub fn errno(what: impl fmt::Display, error: rustix::io::Errno) -> Self {
        Self::io(what, &error.into())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.message)
    }
}

impl std::error::Error for Failure {}

impl From<Failure> for v1::Error {
    fn from(failure: Failure) -> Self {
        Self {
            code: failure.code.into(),
            // Bounded: a path of 4 KiB may be in it twice.
            message: failure.message.chars().take(4096).collect(),
        }
    }
}
