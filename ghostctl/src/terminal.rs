//! The terminal that a person sits at, while it belongs to a guest.

use std::os::fd::AsFd;

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use crate::errors::Failure;

/// Raw mode on stdin; puts the terminal back as it was, however the session ends.
pub(crate) struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// Switches stdin to raw mode: every key goes to the guest, Ctrl-C too.
    pub(crate) fn enter() -> Result<Self, Failure> {
        let before = tcgetattr(std::io::stdin()).map_err(failed)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(std::io::stdin().as_fd(), OptionalActions::Drain, &raw).map_err(failed)?;
        Ok(Self { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore(&self.before);
    }
}

/// Stdin without echo, for a secret.
pub(crate) struct SilentTerminal {
    before: Termios,
}

impl SilentTerminal {
    /// Lines are still edited and Ctrl-C still works; only nothing is shown.
    pub(crate) fn enter() -> Result<Self, Failure> {
        use rustix::termios::LocalModes;
        let before = tcgetattr(std::io::stdin()).map_err(failed)?;
        let mut silent = before.clone();
        silent.local_modes.remove(LocalModes::ECHO);
        silent.local_modes.insert(LocalModes::ECHONL);
        tcsetattr(std::io::stdin().as_fd(), OptionalActions::Flush, &silent).map_err(failed)?;
        Ok(Self { before })
    }
}

impl Drop for SilentTerminal {
    fn drop(&mut self) {
        restore(&self.before);
    }
}

fn failed(error: rustix::io::Errno) -> Failure {
    Failure::io("the terminal cannot be switched", &error.into())
}

fn restore(before: &Termios) {
    // Nothing can be done where the terminal is gone.
    let _ = tcsetattr(std::io::stdin().as_fd(), OptionalActions::Drain, before);
}

/// Rows and columns of the terminal at stdin; `None` where there is none or it does not say.
pub(crate) fn size() -> Option<(u32, u32)> {
    let size = tcgetwinsize(std::io::stdin()).ok()?;
    (size.ws_row > 0 && size.ws_col > 0).then(|| (size.ws_row.into(), size.ws_col.into()))
}
