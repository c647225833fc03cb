//! `man`: one page a command, for packages.

use clap::CommandFactory;

use crate::arguments::{Cli, ManArgs};
use crate::errors::{Exit, Failure};

pub(super) fn run(args: &ManArgs) -> Result<Exit, Failure> {
    let failed = |error: &std::io::Error| {
        Failure::io(
            format!("the manual cannot be written to {}", args.folder.display()),
            error,
        )
    };
    std::fs::create_dir_all(&args.folder).map_err(|error| failed(&error))?;
    clap_mangen::generate_to(Cli::command(), &args.folder).map_err(|error| failed(&error))?;
    Ok(Exit::Done)
}
