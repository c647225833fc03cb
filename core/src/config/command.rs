//! `ghost-core config check|show`.

use std::io::Write;
use std::path::PathBuf;

use ghost_infrastructure::config::show;

use super::{DEFAULT_FILE, EXIT_CONFIG, load};

/// What to do with the configuration.
#[derive(Clone, Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Say whether a configuration can be used, and everything that is wrong with it.
    ///
    /// Exit codes: 0 it can be used, 78 (EX_CONFIG) it cannot.
    Check {
        /// The file.
        #[arg(default_value = DEFAULT_FILE)]
        file: PathBuf,
    },
    /// Show the values that Core would use, each with where it came from.
    ///
    /// The output is itself a configuration. Exit codes: 0 done, 78 (EX_CONFIG) the configuration
    /// cannot be used.
    Show {
        /// The file.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// List each key with the variable of the environment that overrules it.
        #[arg(long)]
        environment: bool,
    },
}

/// Carries it out; data goes to `out`, problems to `errors`. Returns the exit code.
///
/// # Errors
/// When nothing can be written.
pub(crate) fn execute(
    command: &Command,
    out: &mut dyn Write,
    errors: &mut dyn Write,
) -> std::io::Result<u8> {
    let file = match command {
        Command::Check { file } => Some(file.as_path()),
        Command::Show { config, .. } => config.as_deref(),
    };
    let loaded = match load(file) {
        Ok(loaded) => loaded,
        Err(faults) => {
            writeln!(errors, "{faults}")?;
            return Ok(EXIT_CONFIG);
        }
    };
    match command {
        Command::Check { file } => writeln!(out, "{}: ok", file.display())?,
        Command::Show { environment, .. } => {
            out.write_all(show(&loaded, *environment).as_bytes())?
        }
    }
    Ok(0)
}
