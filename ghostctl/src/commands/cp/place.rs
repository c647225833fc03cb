//! Where a copy comes from and where it goes.

use std::path::PathBuf;

use crate::errors::{ErrorCode, Failure};

/// One side of a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// stdin or stdout.
    Stream,
    /// Here.
    Local(PathBuf),
    /// In a VM.
    Guest(GuestPath),
}

/// A path in a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct GuestPath {
    pub(super) vm: String,
    /// Absolute, as the person wrote it.
    pub(super) path: String,
}

impl Place {
    /// Reads `-`, `NAME:/PATH` or a local path. A colon behind a slash or in a path that begins
    /// with a dot is the local path's own, as for scp.
    pub(super) fn parse(text: &str) -> Result<Self, Failure> {
        if text == "-" {
            return Ok(Self::Stream);
        }
        if text.is_empty() {
            return Err(Failure::usage("an empty path names nothing"));
        }
        let guest = text
            .split_once(':')
            .filter(|(vm, _)| !vm.is_empty() && !vm.contains('/') && !vm.starts_with('.'));
        let Some((vm, path)) = guest else {
            return Ok(Self::Local(PathBuf::from(text)));
        };
        if !path.starts_with('/') {
            return Err(
                Failure::usage(format!("{text:?} does not say where in {vm}"))
                    .because("a path in a VM begins with /")
                    .hint(format!("{vm}:/root/{path}, or ./{text} for a local file")),
            );
        }
        Ok(Self::Guest(GuestPath {
            vm: vm.to_owned(),
            path: path.to_owned(),
        }))
    }
}

impl GuestPath {
    /// The same path with another under it.
    pub(super) fn join(&self, name: &str) -> Self {
        Self {
            vm: self.vm.clone(),
            path: format!("{}/{name}", self.path.trim_end_matches('/')),
        }
    }

    /// The last part; `None` where the contents are meant (`/`, `DIR/.`).
    pub(super) fn name(&self) -> Option<&str> {
        let name = self.path.trim_end_matches('/').rsplit('/').next()?;
        Some(name).filter(|name| !matches!(*name, "" | "." | ".."))
    }

    /// `NAME:/PATH`.
    pub(super) fn shown(&self) -> String {
        format!("{}:{}", self.vm, self.path)
    }
}

/// What a name that a guest chose may do.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Name {
    Good,
    /// It cannot be written here, or not be seen.
    Odd(&'static str),
}

/// Checks a name that a guest sent.
///
/// # Errors
/// `guest_path_denied` for one that would lead out of its directory: no file system has such
/// names, so whoever sends one means harm, and nothing more of that guest is taken.
pub(super) fn check_name(name: &str) -> Result<Name, Failure> {
    if matches!(name, "" | "." | "..") || name.contains(['/', '\0']) {
        return Err(Failure::new(
            ErrorCode::GuestPathDenied,
            format!("the guest sent a file name that leads elsewhere: {name:?}"),
        )
        .because("no file has such a name: the guest is not to be trusted"));
    }
    if name.chars().any(char::is_control) {
        return Ok(Name::Odd("its name has control characters"));
    }
    if name.len() > 255 {
        return Ok(Name::Odd("its name is too long"));
    }
    Ok(Name::Good)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_are_told_apart_as_scp_does() {
        let local = |text: &str| Ok(Place::Local(PathBuf::from(text)));
        let guest = |vm: &str, path: &str| {
            Ok(Place::Guest(GuestPath {
                vm: vm.to_owned(),
                path: path.to_owned(),
            }))
        };
        assert_eq!(Place::parse("-"), Ok(Place::Stream));
        assert_eq!(Place::parse("a"), local("a"));
        assert_eq!(Place::parse("./a:b"), local("./a:b"));
        assert_eq!(Place::parse("/a:b"), local("/a:b"));
        assert_eq!(Place::parse("x/a:b"), local("x/a:b"));
        assert_eq!(Place::parse(":b"), local(":b"));
        assert_eq!(Place::parse("web:/a:b"), guest("web", "/a:b"));
        for bad in ["web:", "web:a", ""] {
            assert!(Place::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn names_and_paths_of_guests() {
        let path = |text: &str| GuestPath {
            vm: "web".to_owned(),
            path: text.to_owned(),
        };
        for (text, name) in [
            ("/", None),
            ("/etc", Some("etc")),
            ("/etc/", Some("etc")),
            ("/etc/.", None),
            ("/etc/..", None),
        ] {
            assert_eq!(path(text).name(), name, "{text}");
        }
        assert_eq!(path("/").join("a").path, "/a");
        assert_eq!(path("/b/").join("a").path, "/b/a");
        for evil in ["", ".", "..", "a/b", "/etc", "../x", "a\0b"] {
            assert!(check_name(evil).is_err(), "{evil:?}");
        }
        for odd in ["a\nb", "\x1b[2J", "\u{9b}", &"x".repeat(256)] {
            assert!(matches!(check_name(odd), Ok(Name::Odd(_))), "{odd:?}");
        }
        for good in ["a", "...", ".x", "Grüße", "a b"] {
            assert_eq!(check_name(good), Ok(Name::Good), "{good}");
        }
    }
}
