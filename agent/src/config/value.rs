//! Kinds of value that only the agent's keys have.

use std::path::PathBuf;

use ghost_infrastructure::config::{FullPath, Name, Refusal, Scalar, refuse};

/// Where VMs run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum HypervisorUri {
    /// libvirt at this address.
    Libvirt(String),
    /// The simulation, with its world in this folder.
    Simulated(PathBuf),
}

impl Scalar for HypervisorUri {
    const EXAMPLE: &'static str = "qemu:///system";
    const PLAIN: bool = true;

    fn from_text(text: &str) -> Result<Self, Refusal> {
        if let Some(folder) = text.strip_prefix("simulated:") {
            return FullPath::from_text(folder).map(|path| Self::Simulated(path.0));
        }
        let scheme = text.split_once(":///").or_else(|| text.split_once("://"));
        let driver = scheme.map(|(scheme, _)| scheme.split('+').next().unwrap_or(scheme));
        match driver {
            Some("qemu" | "test") if !text.contains(char::is_whitespace) => {
                Ok(Self::Libvirt(text.to_owned()))
            }
            Some(driver) => refuse(
                format!("the libvirt driver {driver:?} is not supported"),
                "write qemu:///system",
            ),
            None => refuse(
                format!("{text:?} is not a libvirt address"),
                "write qemu:///system, or simulated:/FOLDER for a simulation that runs nothing",
            ),
        }
    }

    fn to_text(&self) -> String {
        match self {
            Self::Libvirt(uri) => uri.clone(),
            Self::Simulated(folder) => format!("simulated:{}", folder.display()),
        }
    }
}

/// The name of a libvirt network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LibvirtNetwork(pub(crate) String);

impl Scalar for LibvirtNetwork {
    const EXAMPLE: &'static str = "ghost-default";
    const PLAIN: bool = false;

    fn from_text(text: &str) -> Result<Self, Refusal> {
        match Name::from_text(text) {
            Ok(name) => Ok(Self(name.0)),
            Err(refusal) => Err(refusal),
        }
    }

    fn to_text(&self) -> String {
        self.0.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read<T: Scalar>(text: &str) -> Result<String, String> {
        T::from_text(text)
            .map(|value| value.to_text())
            .map_err(|refusal| refusal.message)
    }

    #[test]
    fn hypervisors_are_of_this_host() {
        assert_eq!(
            read::<HypervisorUri>("qemu:///system").unwrap(),
            "qemu:///system"
        );
        assert_eq!(
            HypervisorUri::from_text("simulated:/tmp/x").unwrap(),
            HypervisorUri::Simulated("/tmp/x".into())
        );
        for bad in ["", "xen:///", "simulated:x", "qemu", "qemu:///a b"] {
            assert!(read::<HypervisorUri>(bad).is_err(), "{bad}");
        }
    }
}
