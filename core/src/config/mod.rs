//! Core's configuration: `/etc/ghost/core.yaml` below, `GHOST_CORE_…` of the environment above,
//! defaults in code beneath both.

mod check;
mod command;
mod schema;
mod value;

use std::path::Path;

use ghost_infrastructure::config;
pub(crate) use ghost_infrastructure::config::{EXIT_CONFIG, Faults, Listen};

pub(crate) use self::command::{Command, execute};
pub(crate) use self::schema::{Config, Etcd, Oidc};
pub(crate) use self::value::Engine;

/// Where the configuration lies when nobody says otherwise.
pub(crate) const DEFAULT_FILE: &str = "/etc/ghost/core.yaml";

/// A configuration and where it came from.
pub(crate) type Loaded = config::Loaded<Config>;

/// Loads the configuration: from `file` where it is named (then it must be there), or else from
/// [`DEFAULT_FILE`] where that exists.
///
/// # Errors
/// Everything that is wrong with it.
pub(crate) fn load(file: Option<&Path>) -> Result<Loaded, Faults> {
    config::load(file)
}

#[cfg(test)]
mod tests;
