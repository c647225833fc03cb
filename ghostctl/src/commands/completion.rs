//! `completion`: the script that a shell sources. It asks ghostctl itself at each Tab, so names
//! are live and the script never grows old.

use clap_complete::env::{Bash, Elvish, EnvCompleter, Fish, Powershell, Zsh};

use crate::arguments::{CompletionArgs, Shell};
use crate::connect::Session;
use crate::errors::{Exit, Failure};

/// The variable by which the script asks; `main` looks at it first.
pub(crate) const VARIABLE: &str = "COMPLETE";

pub(super) fn run(args: CompletionArgs, session: &Session) -> Result<Exit, Failure> {
    let shell: &dyn EnvCompleter = match args.shell {
        Shell::Bash => &Bash,
        Shell::Elvish => &Elvish,
        Shell::Fish => &Fish,
        Shell::Powershell => &Powershell,
        Shell::Zsh => &Zsh,
    };
    let mut script = Vec::new();
    shell
        .write_registration(VARIABLE, "ghostctl", "ghostctl", "ghostctl", &mut script)
        .map_err(|error| Failure::io("the script cannot be written", &error))?;
    session.printer.bytes(&script)?;
    Ok(Exit::Done)
}
