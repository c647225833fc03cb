//! `/etc/ghost/guest.yaml`: what the owner of a guest allows. Few keys, all optional.
//!
//! ```yaml
//! roots: [/srv/exchange]       # where files may be read and written; default: /
//! disabled: [exec, password]   # what the host may not ask for; see Capability
//! hooks: /etc/ghost            # holds pre-freeze.d and post-thaw.d
//! http: 0.0.0.0:8080           # GET /metrics and /health; default: off
//! ```
//!
//! A file that cannot be understood allows less, never more: the agent then reports and does nothing
//! else.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::util::read_bounded;
use crate::{Capability, Options};

/// Where it is.
pub const PATH: &str = "/etc/ghost/guest.yaml";
const MOST: u64 = 64 * 1024;

/// The file as it is written.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    roots: Option<Vec<PathBuf>>,
    disabled: Option<Vec<String>>,
    hooks: Option<PathBuf>,
    http: Option<SocketAddr>,
}

/// What of it the agent goes by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// See [`Options::capabilities`].
    pub capabilities: Vec<Capability>,
    /// See [`Options::roots`].
    pub roots: Vec<PathBuf>,
    /// See [`Options::hooks`].
    pub hooks: PathBuf,
    /// Where metrics are served.
    pub http: Option<SocketAddr>,
}

impl Default for Config {
    fn default() -> Self {
        let options = Options::default();
        Self {
            capabilities: options.capabilities,
            roots: options.roots,
            hooks: options.hooks,
            http: None,
        }
    }
}

impl Config {
    /// What holds where the file is wrong.
    pub fn restricted() -> Self {
        Self {
            capabilities: vec![Capability::Telemetry],
            roots: Vec::new(),
            ..Self::default()
        }
    }

    /// Reads a file; one that is not there is an empty one.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn read(path: &Path) -> Result<Self, String> {
        match read_bounded(path, MOST) {
            Ok(text) => Self::parse(&text).map_err(|why| format!("{}: {why}", path.display())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(format!("{}: {error}", path.display())),
        }
    }

    /// Understands the text of a file.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn parse(text: &str) -> Result<Self, String> {
        let empty = text
            .lines()
            .all(|line| line.trim().is_empty() || line.trim_start().starts_with('#'));
        let file: File = if empty {
            File::default()
        } else {
            serde_saphyr::from_str(text).map_err(|error| error.to_string())?
        };
        let mut config = Self::default();
        if let Some(roots) = file.roots {
            if let Some(bad) = roots.iter().find(|root| {
                !root.is_absolute()
                    || root
                        .components()
                        .any(|part| matches!(part, std::path::Component::ParentDir))
            }) {
                return Err(format!("roots: {} is not absolute", bad.display()));
            }
            config.roots = roots;
        }
        for name in file.disabled.unwrap_or_default() {
            let one = Capability::parse(&name).ok_or_else(|| {
                let known: Vec<&str> = Capability::ALL.iter().map(|one| one.as_str()).collect();
                format!("disabled: {name:?} is none of {}", known.join(", "))
            })?;
            config.capabilities.retain(|other| *other != one);
            // A terminal without programs is nothing, nor is a link where no file may be written.
            let with_it = match one {
                Capability::Exec => Some(Capability::Pty),
                Capability::Files => Some(Capability::Links),
                _ => None,
            };
            config.capabilities.retain(|other| Some(*other) != with_it);
        }
        if let Some(hooks) = file.hooks {
            if !hooks.is_absolute() {
                return Err(format!("hooks: {} is not absolute", hooks.display()));
            }
            config.hooks = hooks;
        }
        config.http = file.http;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_said_allows_all_but_http() {
        for text in ["", "\n# only a comment\n"] {
            assert_eq!(Config::parse(text).unwrap(), Config::default());
        }
        let none = Config::read(Path::new("/no/such/file")).unwrap();
        assert_eq!((none.roots, none.http), (vec![PathBuf::from("/")], None));
    }

    #[test]
    fn all_keys_are_understood() {
        let config = Config::parse(
            "roots: [/srv/a, /srv/b]\ndisabled:\n  - exec\n  - password\nhooks: /opt/hooks\nhttp: 127.0.0.1:8080\n",
        )
        .unwrap();
        assert_eq!(config.roots.len(), 2);
        for gone in [Capability::Exec, Capability::Pty, Capability::Password] {
            assert!(!config.capabilities.contains(&gone));
        }
        assert!(config.capabilities.contains(&Capability::Files));
        assert_eq!(config.http, Some("127.0.0.1:8080".parse().unwrap()));
        // No roots at all: no files.
        assert!(Config::parse("roots: []").unwrap().roots.is_empty());
    }

    #[test]
    fn what_is_wrong_is_never_taken_for_permission() {
        for text in [
            "roots: srv",
            "roots: [srv]",
            "roots: [/srv/../etc]",
            "disable: [exec]",
            "disabled: [execute]",
            "disabled: exec",
            "http: yes",
            "hooks: here",
            "{",
            "- roots",
            "\u{0}",
        ] {
            assert!(Config::parse(text).is_err(), "{text:?}");
        }
        assert_eq!(Config::restricted().capabilities, [Capability::Telemetry]);
        assert!(Config::restricted().roots.is_empty());
    }
}
