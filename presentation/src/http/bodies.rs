//! What requests carry. Unknown keys are refused everywhere: a misspelt field that is ignored is a
//! change that silently did not happen.

use std::collections::BTreeMap;
use std::time::Duration;

use ghost_application::vm::{CreateVmCommand, UpdateVmCommand};
use ghost_domain::guest::GuestPolicy;
use ghost_domain::vm::{Autostart, RestartPolicy};
use ghost_domain::{ByteSize, Error, ErrorCode, RequestId, Result, VmChange};
use serde::{Deserialize, Deserializer};
use utoipa::{IntoParams, ToSchema};

/// The agent inside a VM.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct GuestBody {
    /// How it gets there: `auto` (the default), `always` or `never`.
    inject: Option<String>,
    /// Whether the guest may be entered through it; it may where this is left out.
    access: Option<bool>,
}

impl GuestBody {
    fn policy(self) -> Result<GuestPolicy, Error> {
        let usual = GuestPolicy::default();
        Ok(GuestPolicy {
            inject: match self.inject {
                None => usual.inject,
                Some(text) => text.parse()?,
            },
            access: self.access.unwrap_or(usual.access),
        })
    }
}

/// Start with the host.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct AutostartBody {
    /// Lower starts first.
    #[serde(default)]
    order: i32,
    /// How long to wait after this VM before the next one.
    #[serde(default)]
    delay_seconds: f64,
}

/// What happens after a crash.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct RestartPolicyBody {
    /// 0: it stays off.
    max_restarts: u32,
    /// Within which time.
    #[serde(default)]
    window_seconds: f64,
}

/// The VM that is wanted. What is left out takes its default.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct CreateVmBody {
    /// Left out: a name is made up.
    name: Option<String>,
    /// An image of the cache or the catalogue.
    image: String,
    /// Default 2.
    vcpus: Option<u32>,
    /// Default 2 GiB.
    memory_bytes: Option<u64>,
    /// Default 10 GiB, or the image's size where that is larger.
    disk_bytes: Option<u64>,
    /// Default: one card on `default`.
    #[serde(default)]
    networks: Vec<String>,
    /// A user for cloud-init to make.
    user: Option<String>,
    /// That user's SSH public keys.
    #[serde(default)]
    ssh_authorized_keys: Vec<String>,
    /// cloud-init's user-data.
    user_data: Option<String>,
    /// cloud-init's network config.
    network_config: Option<String>,
    /// Labels.
    #[serde(default)]
    tags: BTreeMap<String, String>,
    /// Start with the host.
    autostart: Option<AutostartBody>,
    /// What happens after a crash.
    restart_policy: Option<RestartPolicyBody>,
    /// Refuse to delete it.
    #[serde(default)]
    delete_protection: bool,
    /// The agent inside it.
    guest: Option<GuestBody>,
    /// Start it once it is made.
    #[serde(default)]
    start: bool,
    /// Check everything and change nothing.
    #[serde(default)]
    pub(super) dry_run: bool,
}

impl CreateVmBody {
    pub(super) fn command(self, request_id: Option<RequestId>) -> Result<CreateVmCommand> {
        Ok(CreateVmCommand {
            name: self.name,
            image: self.image,
            vcpus: self.vcpus,
            memory_bytes: self.memory_bytes,
            disk_bytes: self.disk_bytes,
            networks: self.networks,
            user: self.user,
            ssh_authorized_keys: self.ssh_authorized_keys,
            user_data: self.user_data,
            network_config: self.network_config,
            tags: self.tags,
            autostart: self
                .autostart
                .map(|given| {
                    let delay = seconds(given.delay_seconds, "autostart.delay_seconds")?;
                    Ok::<_, Error>((given.order, delay.as_secs()))
                })
                .transpose()?,
            restart_policy: self
                .restart_policy
                .map(|given| {
                    let window = seconds(given.window_seconds, "restart_policy.window_seconds")?;
                    Ok::<_, Error>((given.max_restarts, window.as_secs()))
                })
                .transpose()?,
            delete_protection: self.delete_protection,
            guest: self.guest.map(GuestBody::policy).transpose()?,
            start: self.start,
            dry_run: self.dry_run,
            request_id,
        })
    }
}

/// What to change. What is left out stays.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct UpdateVmBody {
    /// The VM must be stopped.
    vcpus: Option<u32>,
    /// The VM must be stopped.
    memory_bytes: Option<u64>,
    /// Refuse to delete it.
    delete_protection: Option<bool>,
    /// Whether the guest may be entered through its agent.
    guest_access: Option<bool>,
    /// `null` switches it off.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<AutostartBody>)]
    autostart: Option<Option<AutostartBody>>,
    /// What happens after a crash.
    restart_policy: Option<RestartPolicyBody>,
    /// Labels to set; `null` removes one.
    #[serde(default)]
    tags: BTreeMap<String, Option<String>>,
}

/// Tells `null` from left out.
fn present<'de, D, T>(deserializer: D) -> std::result::Result<Option<Option<T>>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    Option::deserialize(deserializer).map(Some)
}

impl UpdateVmBody {
    pub(super) fn command(
        self,
        vm: String,
        expected_generation: Option<u64>,
        request_id: Option<RequestId>,
    ) -> Result<UpdateVmCommand> {
        let autostart = match self.autostart {
            None => None,
            Some(None) => Some(None),
            Some(Some(given)) => Some(Some(Autostart {
                order: given.order,
                delay: seconds(given.delay_seconds, "autostart.delay_seconds")?,
            })),
        };
        let restart_policy = self
            .restart_policy
            .map(|given| {
                let window = seconds(given.window_seconds, "restart_policy.window_seconds")?;
                Ok::<_, Error>(match given.max_restarts {
                    0 => RestartPolicy::Never,
                    max_restarts => RestartPolicy::OnCrash {
                        max_restarts,
                        window: window.max(Duration::from_secs(1)),
                    },
                })
            })
            .transpose()?;
        Ok(UpdateVmCommand {
            vm,
            change: VmChange {
                vcpus: self.vcpus,
                memory: self.memory_bytes.map(ByteSize::from_bytes),
                delete_protection: self.delete_protection,
                guest_access: self.guest_access,
                autostart,
                restart_policy,
                tags: self.tags.into_iter().collect(),
            },
            expected_generation,
            request_id,
        })
    }
}

/// How to stop.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct StopBody {
    /// Cut the power: at once, or after the timeout where one is given.
    #[serde(default)]
    pub(super) force: bool,
    /// How long the guest may take to follow the ACPI request.
    timeout_seconds: Option<f64>,
}

impl StopBody {
    pub(super) fn timeout(&self) -> Result<Option<Duration>> {
        self.timeout_seconds
            .map(|given| seconds(given, "timeout_seconds"))
            .transpose()
    }
}

/// What to pull.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct PullImageBody {
    /// A name of the catalogue, or with `url` the name that the image gets.
    pub(super) name: String,
    /// An https address outside the catalogue.
    pub(super) url: Option<String>,
    /// Needed with `url`: `sha256:…` or `sha512:…`.
    pub(super) checksum: Option<String>,
}

/// Which VMs.
#[derive(Clone, Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ListVmsQuery {
    /// Only VMs with all of these tags: `key=value`, several with commas between.
    tags: Option<String>,
}

impl ListVmsQuery {
    pub(super) fn tags(&self) -> Result<BTreeMap<String, String>> {
        let given = self.tags.as_deref().unwrap_or_default();
        given
            .split(',')
            .filter(|one| !one.is_empty())
            .map(|one| {
                let (key, value) = one.split_once('=').ok_or_else(|| {
                    Error::new(ErrorCode::InvalidArgument, format!("{one:?} is not a tag"))
                        .field("tags", "key=value, several with commas between")
                })?;
                Ok((key.to_owned(), value.to_owned()))
            })
            .collect()
    }
}

/// How to delete.
#[derive(Clone, Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct DeleteVmQuery {
    /// Cut the power first where it runs.
    #[serde(default)]
    pub(super) force: bool,
}

/// Which part of the log.
#[derive(Clone, Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct LogsQuery {
    /// Go on with what comes.
    #[serde(default)]
    pub(super) follow: bool,
    /// Only the last so many bytes.
    pub(super) tail_bytes: Option<u64>,
}

/// What the upload is.
#[derive(Clone, Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ImportQuery {
    /// The file's name where it came from, for people.
    #[serde(default)]
    pub(super) file_name: String,
}

/// Which operations.
#[derive(Clone, Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ListOperationsQuery {
    /// Only those of this VM.
    pub(super) vm: Option<String>,
    /// Also those that have finished.
    #[serde(default)]
    pub(super) all: bool,
}

/// Which events.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct EventsQuery {
    /// Only those of this VM.
    pub(super) vm: Option<String>,
    /// Start with what is still remembered (the last 1,000).
    #[serde(default)]
    pub(super) replay: bool,
    /// Go on with what comes (the default).
    #[serde(default = "yes")]
    pub(super) follow: bool,
}

const fn yes() -> bool {
    true
}

/// A number of seconds as a length of time.
pub(super) fn seconds(given: f64, field: &str) -> Result<Duration> {
    Duration::try_from_secs_f64(given)
        .ok()
        .filter(|length| *length <= Duration::from_secs(366 * 24 * 3600))
        .ok_or_else(|| {
            Error::new(
                ErrorCode::InvalidArgument,
                format!("{field} is not a length of time"),
            )
            .because("0 seconds to 366 days are possible")
            .field(field, "0 seconds to 366 days")
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn null_clears_and_left_out_keeps() {
        let change = |text: &str| {
            let body: UpdateVmBody = serde_json::from_str(text).unwrap();
            body.command("web".into(), None, None).unwrap().change
        };
        assert_eq!(change("{}"), VmChange::default());
        assert_eq!(change(r#"{"autostart": null}"#).autostart, Some(None));
        let set = change(
            r#"{"autostart": {"order": 3, "delay_seconds": 1.5}, "tags": {"a": null, "b": "c"}}"#,
        );
        let autostart = set.autostart.unwrap().unwrap();
        assert_eq!(
            (autostart.order, autostart.delay),
            (3, Duration::from_millis(1500))
        );
        assert_eq!(
            set.tags,
            [("a".into(), None), ("b".into(), Some("c".into()))]
        );
    }

    #[test]
    fn unknown_keys_and_absurd_times_are_refused() {
        assert!(serde_json::from_str::<CreateVmBody>(r#"{"image":"a","cpus":2}"#).is_err());
        assert!(serde_json::from_str::<StopBody>(r#"{"forse":true}"#).is_err());
        for bad in [-1.0, f64::NAN, f64::INFINITY, 1e300] {
            assert_eq!(
                seconds(bad, "x").unwrap_err().code(),
                ErrorCode::InvalidArgument
            );
        }
    }
}
