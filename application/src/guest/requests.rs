//! Short requests to a guest: power, accounts, clock, file systems.

use std::sync::Arc;
use std::time::Duration;

use ghost_domain::guest::{FreezeOutcome, GuestRequest};
use ghost_domain::{Error, ErrorCode, Principal, Result, Secret};

use super::door::Door;
use super::{GuestTarget, detail};

/// Shuts a guest down, or restarts it, from within.
pub struct ShutdownGuest {
    pub(crate) door: Arc<Door>,
}

impl ShutdownGuest {
    /// Asks the guest; returns once it agreed, `delay` before it goes down.
    ///
    /// # Errors
    /// `InvalidArgument`, and those of every call into a guest (see [`super::ExecInGuest`]).
    pub async fn execute(
        &self,
        principal: &Principal,
        target: &GuestTarget,
        reboot: bool,
        delay: Duration,
    ) -> Result<()> {
        const LONGEST: Duration = Duration::from_secs(24 * 3600);
        if delay > LONGEST {
            return Err(
                Error::new(ErrorCode::InvalidArgument, "the delay is too long")
                    .field("delay", "at most 24h"),
            );
        }
        let what = if reboot { "reboot" } else { "power off" };
        let visit = self
            .door
            .enter(
                principal,
                target,
                "power",
                format!("{what} after {} s", delay.as_secs_f64()),
            )
            .await?;
        let outcome = self
            .door
            .ports
            .guests
            .request(visit.vm, GuestRequest::Shutdown { reboot, delay })
            .await;
        visit.settle(outcome)
    }
}

/// Whose password, and which.
#[derive(Clone, Debug)]
pub struct SetGuestPasswordCommand {
    /// Whose.
    pub user: String,
    /// Which.
    pub password: Secret,
    /// It is what `crypt(3)` writes.
    pub hashed: bool,
}

/// Sets a password in a guest.
pub struct SetGuestPassword {
    pub(crate) door: Arc<Door>,
}

impl SetGuestPassword {
    /// Sets it. The password is neither logged nor kept.
    ///
    /// # Errors
    /// `InvalidArgument`, and those of every call into a guest (see [`super::ExecInGuest`]).
    pub async fn execute(
        &self,
        principal: &Principal,
        target: &GuestTarget,
        command: SetGuestPasswordCommand,
    ) -> Result<()> {
        check_user(&command.user)?;
        let password = command.password.expose();
        // chpasswd and the shadow file are made of lines with colons.
        let line = password.is_empty()
            || password.len() > 1024
            || password.chars().any(char::is_control)
            || (command.hashed && password.contains(':'));
        if line {
            return Err(
                Error::new(ErrorCode::InvalidArgument, "this cannot be a password").field(
                    "password",
                    "1 to 1024 bytes without control characters; hashed also without ':'",
                ),
            );
        }
        let hashed = if command.hashed { " (hashed)" } else { "" };
        let visit = self
            .door
            .enter(
                principal,
                target,
                "password",
                format!("user={}{hashed}", detail::word(&command.user)),
            )
            .await?;
        let request = GuestRequest::SetPassword {
            user: command.user,
            password: command.password,
            hashed: command.hashed,
        };
        let outcome = self.door.ports.guests.request(visit.vm, request).await;
        visit.settle(outcome)
    }
}

/// Which keys of which user.
#[derive(Clone, Debug, Default)]
pub struct UpdateGuestSshKeysCommand {
    /// Whose.
    pub user: String,
    /// Lines to add.
    pub add: Vec<String>,
    /// Lines to remove, compared without their comments.
    pub remove: Vec<String>,
}

/// Changes a user's authorized SSH keys in a guest.
pub struct UpdateGuestSshKeys {
    pub(crate) door: Arc<Door>,
}

impl UpdateGuestSshKeys {
    /// Adds and removes.
    ///
    /// # Errors
    /// `InvalidArgument`, and those of every call into a guest (see [`super::ExecInGuest`]).
    pub async fn execute(
        &self,
        principal: &Principal,
        target: &GuestTarget,
        command: UpdateGuestSshKeysCommand,
    ) -> Result<()> {
        const MOST: usize = 64;
        check_user(&command.user)?;
        for (field, keys) in [("add", &command.add), ("remove", &command.remove)] {
            let bad = keys.len() > MOST
                || keys.iter().any(|key| {
                    key.trim().is_empty() || key.len() > 8192 || key.chars().any(char::is_control)
                });
            if bad {
                return Err(
                    Error::new(ErrorCode::InvalidArgument, "these are no SSH keys").field(
                        field,
                        format!("at most {MOST} lines such as 'ssh-ed25519 AAAA… comment'"),
                    ),
                );
            }
        }
        if command.add.is_empty() && command.remove.is_empty() {
            return Err(Error::new(
                ErrorCode::InvalidArgument,
                "there is nothing to add or remove",
            )
            .field("add", "keys to add or remove are needed"));
        }
        let listed = |sign: char, keys: &[String]| -> String {
            keys.iter()
                .map(|key| format!(" {sign}{}", detail::word(key)))
                .collect()
        };
        let visit = self
            .door
            .enter(
                principal,
                target,
                "ssh_keys",
                format!(
                    "user={}{}{}",
                    detail::word(&command.user),
                    listed('+', &command.add),
                    listed('-', &command.remove)
                ),
            )
            .await?;
        let request = GuestRequest::SshKeys {
            user: command.user,
            add: command.add,
            remove: command.remove,
        };
        let outcome = self.door.ports.guests.request(visit.vm, request).await;
        visit.settle(outcome)
    }
}

/// The names that `useradd` makes, and those with dots and capitals that directories have.
fn check_user(user: &str) -> Result<()> {
    let legal = !user.is_empty()
        && user.len() <= 64
        && !user.starts_with('-')
        && user
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"_-.@".contains(&byte));
    if legal {
        return Ok(());
    }
    Err(
        Error::new(ErrorCode::InvalidArgument, "not a user's name").field(
            "user",
            "1 to 64 of A-Z, a-z, 0-9, '_', '-', '.' and '@', not starting with '-'",
        ),
    )
}

/// Sets a guest's clock to the host's.
pub struct SyncGuestClock {
    pub(crate) door: Arc<Door>,
}

impl SyncGuestClock {
    /// Sets it.
    ///
    /// # Errors
    /// Those of every call into a guest (see [`super::ExecInGuest`]).
    pub async fn execute(&self, principal: &Principal, target: &GuestTarget) -> Result<()> {
        let visit = self
            .door
            .enter(principal, target, "clock", "set to the host's".into())
            .await?;
        let now = self.door.registry.clock().now();
        let outcome = self
            .door
            .ports
            .guests
            .request(visit.vm, GuestRequest::SetClock { now })
            .await;
        visit.settle(outcome)
    }
}

/// How to freeze.
#[derive(Clone, Debug, Default)]
pub struct FreezeGuestCommand {
    /// After this the guest thaws by itself; `None`: ten seconds. At most a minute.
    pub timeout: Option<Duration>,
    /// Empty: all file systems.
    pub mount_points: Vec<String>,
}

/// Freezes file systems of a guest.
pub struct FreezeGuest {
    pub(crate) door: Arc<Door>,
}

impl FreezeGuest {
    /// Freezes them.
    ///
    /// # Errors
    /// `InvalidArgument`, and those of every call into a guest (see [`super::ExecInGuest`]).
    pub async fn execute(
        &self,
        principal: &Principal,
        target: &GuestTarget,
        command: FreezeGuestCommand,
    ) -> Result<FreezeOutcome> {
        const LONGEST: Duration = Duration::from_secs(60);
        let timeout = command.timeout.unwrap_or(Duration::from_secs(10));
        if timeout.is_zero() || timeout > LONGEST {
            return Err(Error::new(
                ErrorCode::InvalidArgument,
                "nothing is frozen for that long",
            )
            .field("timeout", "more than nothing and at most 60s"));
        }
        if command.mount_points.len() > 32 {
            return Err(
                Error::new(ErrorCode::InvalidArgument, "too many mount points")
                    .field("mount_points", "at most 32"),
            );
        }
        for path in &command.mount_points {
            ghost_domain::guest::check_guest_path(path)?;
        }
        let mounts: String = command
            .mount_points
            .iter()
            .map(|path| format!(" {}", detail::word(path)))
            .collect();
        let visit = self
            .door
            .enter(
                principal,
                target,
                "freeze",
                format!("for {} s{mounts}", timeout.as_secs_f64()),
            )
            .await?;
        let outcome = self
            .door
            .ports
            .guests
            .freeze(visit.vm, timeout, command.mount_points)
            .await;
        visit.settle(outcome)
    }
}

/// Thaws file systems of a guest.
pub struct ThawGuest {
    pub(crate) door: Arc<Door>,
}

impl ThawGuest {
    /// Thaws them.
    ///
    /// # Errors
    /// Those of every call into a guest (see [`super::ExecInGuest`]).
    pub async fn execute(
        &self,
        principal: &Principal,
        target: &GuestTarget,
    ) -> Result<FreezeOutcome> {
        let visit = self
            .door
            .enter(principal, target, "thaw", String::new())
            .await?;
        let outcome = self.door.ports.guests.thaw(visit.vm).await;
        visit.settle(outcome)
    }
}
