//! The VM record: desired state, owned by us and durable.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use crate::guest::GuestPolicy;
use crate::{
    ByteSize, Demand, Error, ErrorCode, ImageDigest, ImageFormat, ImageName, MacAddress,
    NetworkName, Timestamp, VmId, VmName,
};

/// The image a VM was made from, pinned by content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageReference {
    /// The name at that time.
    pub name: ImageName,
    /// The content; `None` only while the image is still to be pulled.
    pub content: Option<(ImageDigest, ImageFormat)>,
}

/// A network card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkInterface {
    /// The network it is plugged into.
    pub network: NetworkName,
    /// Its address, ours for the VM's whole life.
    pub mac: MacAddress,
}

/// What cloud-init in the guest is told at first boot.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct CloudInit {
    /// A user to make, with sudo; `None` takes the image's default user.
    pub user: Option<String>,
    /// SSH public keys for that user.
    pub ssh_authorized_keys: Vec<String>,
    /// The caller's user-data: opaque to us, validated as YAML or script, at most 32 KiB.
    pub user_data: Option<String>,
    /// The caller's network config (version 1 or 2), at most 8 KiB.
    pub network_config: Option<String>,
}

/// Start with the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Autostart {
    /// Lower starts first.
    pub order: i32,
    /// How long to wait after this VM before the next one.
    pub delay: Duration,
}

/// What happens after the guest crashed or QEMU died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RestartPolicy {
    /// It stays off.
    Never,
    /// It is started again, at most `max_restarts` times within `window`.
    OnCrash {
        /// How many times.
        max_restarts: u32,
        /// Within which time.
        window: Duration,
    },
}

impl Default for RestartPolicy {
    /// Ten times a minute, as Incus does.
    fn default() -> Self {
        Self::OnCrash {
            max_restarts: 10,
            window: Duration::from_secs(60),
        }
    }
}

/// What a VM is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmSpec {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory.
    pub memory: ByteSize,
    /// What its disk starts from.
    pub image: ImageReference,
    /// Virtual size of its disk.
    pub disk: ByteSize,
    /// Its network cards.
    pub interfaces: Vec<NetworkInterface>,
    /// Start with the host.
    pub autostart: Option<Autostart>,
    /// What happens after a crash.
    pub restart_policy: RestartPolicy,
    /// Refuse to delete it.
    pub delete_protection: bool,
    /// The agent inside it.
    pub guest: GuestPolicy,
    /// The owner's labels: keys and values of at most 63 and 255 characters, at most 32 of them.
    pub tags: BTreeMap<String, String>,
}

/// The bounds of a sane VM. They catch typing errors; what the host can bear is admission's matter.
#[derive(Clone, Copy, Debug)]
pub struct VmLimits;

impl VmLimits {
    /// Most vCPUs: what QEMU's q35 machine takes without extended interrupt remapping.
    pub const MAX_VCPUS: u32 = 255;
    /// Least memory: below it no kernel of today boots.
    pub const MIN_MEMORY: ByteSize = ByteSize::from_mib(32);
    /// Most memory.
    pub const MAX_MEMORY: ByteSize = ByteSize::from_gib(16 * 1024);
    /// Least disk.
    pub const MIN_DISK: ByteSize = ByteSize::from_mib(1);
    /// Most disk.
    pub const MAX_DISK: ByteSize = ByteSize::from_gib(64 * 1024);
    /// Most user-data, so that a record stays within the store's value limit.
    pub const MAX_USER_DATA: usize = 32 * 1024;
    /// Most network config.
    pub const MAX_NETWORK_CONFIG: usize = 8 * 1024;
    /// Most tags.
    pub const MAX_TAGS: usize = 32;
    /// Most SSH keys.
    pub const MAX_SSH_KEYS: usize = 32;
    /// Most network cards.
    pub const MAX_INTERFACES: usize = 8;
}

impl VmSpec {
    /// What this VM takes of the host while it runs.
    pub const fn demand(&self) -> Demand {
        Demand {
            cpus: self.vcpus,
            memory: self.memory,
            disk: self.disk,
        }
    }

    /// Checks the bounds.
    ///
    /// # Errors
    /// [`ErrorCode::InvalidSize`] or [`ErrorCode::InvalidArgument`], with every field that broke a
    /// rule.
    pub fn validate(&self) -> Result<(), Error> {
        let mut violations: Vec<(&str, String)> = Vec::new();
        if self.vcpus == 0 || self.vcpus > VmLimits::MAX_VCPUS {
            violations.push((
                "vcpus",
                format!(
                    "{} vCPUs; 1 to {} are possible",
                    self.vcpus,
                    VmLimits::MAX_VCPUS
                ),
            ));
        }
        if self.memory < VmLimits::MIN_MEMORY || self.memory > VmLimits::MAX_MEMORY {
            violations.push((
                "memory_bytes",
                format!(
                    "{} of memory; {} to {} are possible",
                    self.memory,
                    VmLimits::MIN_MEMORY,
                    VmLimits::MAX_MEMORY
                ),
            ));
        }
        if self.disk < VmLimits::MIN_DISK || self.disk > VmLimits::MAX_DISK {
            violations.push((
                "disk_bytes",
                format!(
                    "a disk of {}; {} to {} are possible",
                    self.disk,
                    VmLimits::MIN_DISK,
                    VmLimits::MAX_DISK
                ),
            ));
        }
        let sizes_wrong = !violations.is_empty();
        if self.interfaces.len() > VmLimits::MAX_INTERFACES {
            violations.push((
                "nics",
                format!("at most {} network cards", VmLimits::MAX_INTERFACES),
            ));
        }
        if self.tags.len() > VmLimits::MAX_TAGS {
            violations.push(("tags", format!("at most {} tags", VmLimits::MAX_TAGS)));
        }
        for (key, value) in &self.tags {
            let key_ok = !key.is_empty()
                && key.len() <= 63
                && key
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"-_./".contains(&b));
            if !key_ok || value.chars().count() > 255 || value.chars().any(char::is_control) {
                violations.push((
                    "tags",
                    format!("the tag {key:?} needs a key of 1 to 63 of A-Z, a-z, 0-9, '-', '_', '.', '/' and a value of at most 255 printable characters"),
                ));
            }
        }
        if violations.is_empty() {
            return Ok(());
        }
        let code = if sizes_wrong {
            ErrorCode::InvalidSize
        } else {
            ErrorCode::InvalidArgument
        };
        let cause = violations
            .iter()
            .map(|(_, text)| text.as_str())
            .collect::<Vec<_>>()
            .join("; ");
        let mut error = Error::new(code, "the VM cannot be made like this").because(cause);
        for (field, text) in violations {
            error = error.field(field, text);
        }
        Err(error)
    }
}

impl CloudInit {
    /// Checks sizes and SSH keys. Whether user-data parses is the seed writer's matter.
    ///
    /// # Errors
    /// [`ErrorCode::InvalidArgument`] or [`ErrorCode::InvalidUserData`] with the field.
    pub fn validate(&self) -> Result<(), Error> {
        if let Some(user) = &self.user {
            let legal = !user.is_empty()
                && user.len() <= 32
                && user
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_".contains(&b))
                && user
                    .bytes()
                    .next()
                    .is_some_and(|b| b.is_ascii_lowercase() || b == b'_');
            if !legal {
                return Err(Error::new(
                    ErrorCode::InvalidArgument,
                    format!("{user:?} is not a legal user name"),
                )
                .field(
                    "user",
                    "1 to 32 of a-z, 0-9, '-' and '_', starting with a letter or '_'",
                ));
            }
        }
        if self.ssh_authorized_keys.len() > VmLimits::MAX_SSH_KEYS {
            return Err(
                Error::new(ErrorCode::InvalidArgument, "too many SSH keys").field(
                    "ssh_authorized_keys",
                    format!("at most {}", VmLimits::MAX_SSH_KEYS),
                ),
            );
        }
        for key in &self.ssh_authorized_keys {
            let mut words = key.split(' ');
            let kind_ok = words.next().is_some_and(|kind| {
                kind.starts_with("ssh-")
                    || kind.starts_with("ecdsa-sha2-")
                    || kind.starts_with("sk-")
            });
            let body_ok = words.next().is_some_and(|body| {
                body.len() >= 16
                    && body
                        .bytes()
                        .all(|b| b.is_ascii_alphanumeric() || b"+/=".contains(&b))
            });
            if !kind_ok || !body_ok || key.len() > 8192 || key.chars().any(char::is_control) {
                return Err(Error::new(
                    ErrorCode::InvalidArgument,
                    "that is not an SSH public key",
                )
                .because("one line such as 'ssh-ed25519 AAAA… comment' is expected")
                .hint("give the .pub file: --ssh-key ~/.ssh/id_ed25519.pub")
                .field("ssh_authorized_keys", "not an OpenSSH public key"));
            }
        }
        for (field, text, most) in [
            ("user_data", &self.user_data, VmLimits::MAX_USER_DATA),
            (
                "network_config",
                &self.network_config,
                VmLimits::MAX_NETWORK_CONFIG,
            ),
        ] {
            if text.as_ref().is_some_and(|text| text.len() > most) {
                return Err(Error::new(
                    ErrorCode::InvalidUserData,
                    format!("{field} is longer than {most} bytes"),
                )
                .field(field, format!("at most {most} bytes")));
            }
        }
        Ok(())
    }
}

/// The power state that the owner wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DesiredPower {
    /// Running.
    Running,
    /// Off.
    Stopped,
    /// Halted, memory kept.
    Paused,
}

impl DesiredPower {
    /// The state in snake case.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Stopped => "stopped",
            Self::Paused => "paused",
        }
    }
}

/// Where a VM stands in its own life, beside its power.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lifecycle {
    /// Being made; nothing may rely on its parts.
    Creating,
    /// Whole.
    Ready,
    /// Being removed; its parts may be gone.
    Deleting,
    /// Something of it is missing or an undo failed; only delete (and start, to try) make sense.
    Failed {
        /// What.
        reason: String,
    },
}

/// A VM as we want it. The observed state is kept beside it and never stored with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vm {
    /// Identity, and the UUID of the libvirt domain.
    pub id: VmId,
    /// Unique name.
    pub name: VmName,
    /// Rises with every change of the spec; callers may demand the one they saw.
    pub generation: u64,
    /// What it is made of.
    pub spec: VmSpec,
    /// What cloud-init is told.
    pub cloud_init: CloudInit,
    /// The power state wanted.
    pub desired: DesiredPower,
    /// Where it stands in its life.
    pub lifecycle: Lifecycle,
    /// When it was asked for.
    pub created_at: Timestamp,
    /// Addresses that somebody registered by hand, by card, at most one each: for guests without
    /// agent and without DHCP.
    pub registered_addresses: Vec<(MacAddress, IpAddr)>,
    /// When it was started again after crashes, newest last; pruned to the policy's window.
    pub crash_restarts: Vec<Timestamp>,
    /// Who created it through Ghost Core, `<tenant>/<user>`; `None` for the host's owner.
    pub owner: Option<String>,
}

impl Vm {
    /// Most bytes of [`Vm::owner`]: a tenant's name, a stroke and a user's name.
    pub const MOST_OWNER: usize = 256;
}
