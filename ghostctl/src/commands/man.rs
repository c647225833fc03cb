//! `man`: the manual, for packages.

use clap::CommandFactory;

use crate::arguments::{Cli, ManArgs};
use crate::connect::Session;
use crate::errors::{Exit, Failure};

pub(super) fn run(args: ManArgs, session: &Session) -> Result<Exit, Failure> {
    let Some(folder) = args.folder else {
        let mut page = Vec::new();
        clap_mangen::Man::new(Cli::command())
            .render(&mut page)
            .map_err(|error| Failure::io("the manual cannot be written", &error))?;
        session.printer.bytes(&page)?;
        return Ok(Exit::Done);
    };
    std::fs::create_dir_all(&folder)
        .and_then(|()| clap_mangen::generate_to(Cli::command(), &folder))
        .map_err(|error| {
            Failure::io(
                format!("the manual cannot be written to {}", folder.display()),
                &error,
            )
        })?;
    Ok(Exit::Done)
}
