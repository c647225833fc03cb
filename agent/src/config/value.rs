//! Kinds of value that only the agent's keys have.

use std::path::PathBuf;

use ghost_domain::fleet::CorePermissions;
use ghost_infrastructure::config::{FullPath, Name, Refusal, Scalar, refuse};
use ghost_infrastructure::config_choice;
use ghost_infrastructure::core_link::direct::Provider;

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

/// What Core may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Permissions(pub(crate) CorePermissions);

config_choice!(Permissions {
    "off" => Permissions(CorePermissions::Off),
    "read" => Permissions(CorePermissions::Read),
    "operate" => Permissions(CorePermissions::Operate),
    "operate_and_enter" => Permissions(CorePermissions::OperateAndEnter),
});

/// Where addresses for Core come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AddressProvider(pub(crate) Provider);

impl Scalar for AddressProvider {
    const EXAMPLE: &'static str = "none";
    const PLAIN: bool = true;

    fn from_text(text: &str) -> Result<Self, Refusal> {
        text.parse()
            .map(Self)
            .map_err(|error: ghost_domain::Error| Refusal {
                message: error.message().to_owned(),
                hint: Some("write none, tailscale, wireguard, wireguard:INTERFACE or lan".into()),
            })
    }

    fn to_text(&self) -> String {
        match &self.0 {
            Provider::WireGuard(Some(interface)) => format!("wireguard:{interface}"),
            other => other.as_str().to_owned(),
        }
    }
}

/// The address of a Piko server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PikoServer(pub(crate) String);

impl Scalar for PikoServer {
    const EXAMPLE: &'static str = "https://piko.example.org";
    const PLAIN: bool = true;

    fn from_text(text: &str) -> Result<Self, Refusal> {
        let known = ["https://", "http://", "wss://", "ws://"];
        let rest = known.iter().find_map(|scheme| text.strip_prefix(scheme));
        let legal = rest.is_some_and(|rest| {
            !rest.is_empty()
                && !rest.starts_with('/')
                && text.bytes().all(|byte| byte.is_ascii_graphic())
        });
        if !legal {
            return refuse(
                format!("{text:?} is not the address of a Piko server"),
                format!("write for example {}", Self::EXAMPLE),
            );
        }
        Ok(Self(text.to_owned()))
    }

    fn to_text(&self) -> String {
        self.0.clone()
    }
}

/// An endpoint of Piko. `tenant-acme/server-001`, as older agents wrote it, stands for
/// `tenant-acme--server-001`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PikoEndpoint(pub(crate) String);

impl Scalar for PikoEndpoint {
    const EXAMPLE: &'static str = "acme--pc-at-home";
    const PLAIN: bool = false;

    fn from_text(text: &str) -> Result<Self, Refusal> {
        let legal = !text.is_empty()
            && text.len() <= 128
            && text
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-_/".contains(&byte));
        if !legal {
            return refuse(
                format!("{text:?} is not an endpoint"),
                "write 1 to 128 letters, digits, '-', '_' and '/', such as acme--pc-at-home",
            );
        }
        Ok(Self(text.to_owned()))
    }

    fn to_text(&self) -> String {
        self.0.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_core_may_do_and_how_it_is_reached_is_one_of_a_few() {
        for good in ["off", "read", "operate", "operate_and_enter"] {
            assert_eq!(read::<Permissions>(good).unwrap(), good);
        }
        assert!(read::<Permissions>("admin").is_err());
        for good in ["none", "tailscale", "wireguard", "wireguard:wg0", "lan"] {
            assert_eq!(read::<AddressProvider>(good).unwrap(), good);
        }
        assert!(read::<AddressProvider>("wireguard:../x").is_err());
        for good in ["https://piko.example.org", "ws://127.0.0.1:8001/below"] {
            assert_eq!(read::<PikoServer>(good).unwrap(), good);
        }
        for bad in [
            "",
            "piko.example.org",
            "https://",
            "https:///x",
            "ftp://x",
            "https://a b",
        ] {
            assert!(read::<PikoServer>(bad).is_err(), "{bad}");
        }
        for good in ["acme--pc", "tenant-acme/server-001"] {
            assert_eq!(read::<PikoEndpoint>(good).unwrap(), good);
        }
        for bad in ["", "a b", "a?b", "ä"] {
            assert!(read::<PikoEndpoint>(bad).is_err(), "{bad}");
        }
    }

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
