//! Virtual machines.

use ghost_application::VmView;
use ghost_application::vm::{CreateVmCommand, StopCommand, UpdateVmCommand};
use ghost_domain::guest::{GuestInject, GuestPolicy};
use ghost_domain::vm::{Autostart, DesiredPower, RestartPolicy, VmState};
use ghost_domain::{ByteSize, Error, ErrorCode, Result, VmChange};
use ghost_proto::agent::v1 as message;

use super::{duration, filled, length_of, request_id, timestamp};

/// A VM as a message.
pub fn vm(view: &VmView) -> message::Vm {
    let vm = &view.vm;
    let usage = view.usage.unwrap_or_default();
    let size = usage.disk_virtual.max(vm.spec.disk);
    message::Vm {
        id: vm.id.to_string(),
        name: vm.name.to_string(),
        state: vm_state(view.shown.state).into(),
        state_reason: view.shown.reason.clone(),
        state_source: view.source.as_str().to_owned(),
        state_age: Some(duration(view.age)),
        desired_state: desired_state(vm.desired).into(),
        vcpus: vm.spec.vcpus,
        memory_bytes: vm.spec.memory.bytes(),
        image: vm.spec.image.name.to_string(),
        disks: vec![message::Disk {
            name: "root".to_owned(),
            size_bytes: size.bytes(),
            allocated_bytes: usage.disk_allocated.bytes(),
        }],
        nics: vm
            .spec
            .interfaces
            .iter()
            .map(|card| message::NetworkInterface {
                network: card.network.to_string(),
                mac: card.mac.to_string(),
                addresses: view
                    .addresses
                    .iter()
                    .filter(|known| known.mac == card.mac)
                    .map(|known| known.address.to_string())
                    .collect(),
                addresses_age: view.addresses_age.map(duration),
            })
            .collect(),
        conditions: view
            .conditions
            .iter()
            .map(|condition| message::Condition {
                r#type: condition.kind.to_owned(),
                status: condition.status,
                reason: condition.reason.clone(),
                since: condition.since.map(timestamp),
            })
            .collect(),
        tags: vm.spec.tags.clone(),
        generation: vm.generation,
        created_at: Some(timestamp(vm.created_at)),
        owner: vm.owner.clone().unwrap_or_default(),
        operation_id: view.operation.map(|id| id.to_string()).unwrap_or_default(),
        autostart: vm.spec.autostart.map(|autostart| message::Autostart {
            order: autostart.order,
            delay: Some(duration(autostart.delay)),
        }),
        restart_policy: Some(match vm.spec.restart_policy {
            RestartPolicy::Never => message::RestartPolicy {
                max_restarts: 0,
                window: None,
            },
            RestartPolicy::OnCrash {
                max_restarts,
                window,
            } => message::RestartPolicy {
                max_restarts,
                window: Some(duration(window)),
            },
        }),
        delete_protection: vm.spec.delete_protection,
        guest: Some(message::GuestPolicy {
            inject: vm.spec.guest.inject.as_str().to_owned(),
            access: vm.spec.guest.access,
        }),
    }
}

/// Reads what a caller wants of the guest agent; an empty `inject` is the default.
fn guest_policy(given: message::GuestPolicy) -> Result<GuestPolicy> {
    Ok(GuestPolicy {
        inject: match given.inject.as_str() {
            "" => GuestInject::default(),
            text => text.parse()?,
        },
        access: given.access,
    })
}

/// A state as a message.
pub const fn vm_state(state: VmState) -> message::VmState {
    match state {
        VmState::Creating => message::VmState::Creating,
        VmState::Stopped => message::VmState::Stopped,
        VmState::Starting => message::VmState::Starting,
        VmState::Running => message::VmState::Running,
        VmState::Pausing => message::VmState::Pausing,
        VmState::Paused => message::VmState::Paused,
        VmState::Stopping => message::VmState::Stopping,
        VmState::Restarting => message::VmState::Restarting,
        VmState::Deleting => message::VmState::Deleting,
        VmState::Failed => message::VmState::Failed,
        VmState::Unknown => message::VmState::Unknown,
    }
}

/// What is wanted, as a message.
pub const fn desired_state(power: DesiredPower) -> message::DesiredState {
    match power {
        DesiredPower::Running => message::DesiredState::Running,
        DesiredPower::Stopped => message::DesiredState::Stopped,
        DesiredPower::Paused => message::DesiredState::Paused,
    }
}

/// The command of a create request. Zero and empty stand for the default, as the protocol says.
///
/// # Errors
/// `InvalidArgument` for times and request ids that are none.
pub fn create_vm(request: message::CreateVmRequest) -> Result<CreateVmCommand> {
    Ok(CreateVmCommand {
        name: filled(request.name),
        image: request.image,
        vcpus: Some(request.vcpus).filter(|count| *count > 0),
        memory_bytes: Some(request.memory_bytes).filter(|size| *size > 0),
        disk_bytes: Some(request.disk_bytes).filter(|size| *size > 0),
        networks: request.networks,
        user: filled(request.user),
        ssh_authorized_keys: request.ssh_authorized_keys,
        user_data: filled(request.user_data),
        network_config: filled(request.network_config),
        tags: request.tags,
        autostart: request
            .autostart
            .map(|given| {
                Ok((
                    given.order,
                    seconds(given.delay.as_ref(), "autostart.delay")?,
                ))
            })
            .transpose()?,
        restart_policy: request
            .restart_policy
            .map(|given| {
                let window = seconds(given.window.as_ref(), "restart_policy.window")?;
                Ok((given.max_restarts, window))
            })
            .transpose()?,
        delete_protection: request.delete_protection,
        guest: request.guest.map(guest_policy).transpose()?,
        start: request.start,
        dry_run: request.dry_run,
        request_id: request_id(&request.request_id)?,
    })
}

fn seconds(given: Option<&prost_types::Duration>, field: &str) -> Result<u64> {
    given.map_or(Ok(0), |given| Ok(length_of(given, field)?.as_secs()))
}

/// The command of an update request.
///
/// # Errors
/// `InvalidArgument` for fields that contradict each other, and times and request ids that are none.
pub fn update_vm(request: message::UpdateVmRequest) -> Result<UpdateVmCommand> {
    if request.clear_autostart && request.autostart.is_some() {
        return Err(Error::new(
            ErrorCode::InvalidArgument,
            "autostart cannot be set and cleared at once",
        )
        .field("clear_autostart", "not together with autostart"));
    }
    let autostart = match request.autostart {
        Some(given) => Some(Some(Autostart {
            order: given.order,
            delay: given
                .delay
                .as_ref()
                .map(|delay| length_of(delay, "autostart.delay"))
                .transpose()?
                .unwrap_or_default(),
        })),
        None => request.clear_autostart.then_some(None),
    };
    let restart_policy = request
        .restart_policy
        .map(|given| {
            let window = given
                .window
                .as_ref()
                .map(|window| length_of(window, "restart_policy.window"))
                .transpose()?
                .unwrap_or_default();
            Ok::<_, Error>(match given.max_restarts {
                0 => RestartPolicy::Never,
                max_restarts => RestartPolicy::OnCrash {
                    max_restarts,
                    window: window.max(std::time::Duration::from_secs(1)),
                },
            })
        })
        .transpose()?;
    let mut tags: Vec<(String, Option<String>)> = request
        .set_tags
        .into_iter()
        .map(|(key, value)| (key, Some(value)))
        .collect();
    tags.extend(request.remove_tags.into_iter().map(|key| (key, None)));
    Ok(UpdateVmCommand {
        vm: request.vm,
        change: VmChange {
            vcpus: request.vcpus,
            memory: request.memory_bytes.map(ByteSize::from_bytes),
            delete_protection: request.delete_protection,
            guest_access: request.guest_access,
            autostart,
            restart_policy,
            tags,
        },
        expected_generation: Some(request.expected_generation).filter(|seen| *seen > 0),
        request_id: request_id(&request.request_id)?,
    })
}

/// The command of a stop or restart request.
///
/// # Errors
/// `InvalidArgument` for times and request ids that are none.
pub fn stop(
    vm: String,
    force: bool,
    timeout: Option<&prost_types::Duration>,
    request: &str,
) -> Result<StopCommand> {
    Ok(StopCommand {
        vm,
        force,
        timeout: timeout
            .map(|given| length_of(given, "timeout"))
            .transpose()?,
        request_id: request_id(request)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_and_empty_take_the_defaults() {
        let command = create_vm(message::CreateVmRequest {
            image: "tiny".into(),
            ..Default::default()
        })
        .unwrap();
        assert_eq!(command.name, None);
        assert_eq!(command.vcpus, None);
        assert_eq!(command.memory_bytes, None);
        assert_eq!(command.disk_bytes, None);
        assert_eq!(command.restart_policy, None);
        assert_eq!(command.autostart, None);
        assert_eq!(command.request_id, None);
    }

    #[test]
    fn an_update_tells_unset_from_cleared() {
        let unset = update_vm(message::UpdateVmRequest::default()).unwrap();
        assert_eq!(unset.change, VmChange::default());
        let cleared = update_vm(message::UpdateVmRequest {
            clear_autostart: true,
            remove_tags: vec!["a".into()],
            ..Default::default()
        })
        .unwrap();
        assert_eq!(cleared.change.autostart, Some(None));
        assert_eq!(cleared.change.tags, [("a".to_owned(), None)]);
        let both = message::UpdateVmRequest {
            clear_autostart: true,
            autostart: Some(message::Autostart::default()),
            ..Default::default()
        };
        let error = update_vm(both).unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidArgument);
    }

    #[test]
    fn a_negative_timeout_is_refused() {
        let given = prost_types::Duration {
            seconds: -5,
            nanos: 0,
        };
        let error = stop("web".into(), true, Some(&given), "").unwrap_err();
        assert_eq!(error.violations()[0].field, "timeout");
    }
}
