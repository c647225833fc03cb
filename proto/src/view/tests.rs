//! The contract of the JSON: exactly these keys, in this order of meaning, with nulls for what is
//! absent.

use prost_types::{Duration, Timestamp};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::*;
use crate::agent::v1 as message;

fn at(seconds: i64) -> Option<Timestamp> {
    Some(Timestamp {
        seconds,
        nanos: 250_999_999,
    })
}

fn json_of(view: impl Serialize) -> Value {
    serde_json::to_value(view).unwrap()
}

fn round_trips<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(view: &T) {
    let text = serde_json::to_string(view).unwrap();
    assert_eq!(&serde_json::from_str::<T>(&text).unwrap(), view);
}

#[test]
fn a_full_vm_has_the_keys_of_the_contract() {
    let vm = Vm::from(message::Vm {
        id: "7c9e6679-7425-40de-944b-e07fc1f90ae7".into(),
        name: "web-1".into(),
        state: message::VmState::Running.into(),
        state_reason: "booted".into(),
        state_source: "libvirt_event".into(),
        state_age: Some(Duration {
            seconds: 2,
            nanos: 500_000_000,
        }),
        desired_state: message::DesiredState::Running.into(),
        vcpus: 2,
        memory_bytes: 2 << 30,
        image: "debian-12".into(),
        disks: vec![message::Disk {
            name: "root".into(),
            size_bytes: 10 << 30,
            allocated_bytes: 1 << 20,
        }],
        nics: vec![message::NetworkInterface {
            network: "default".into(),
            mac: "52:54:00:12:34:56".into(),
            addresses: vec!["10.77.0.2".into()],
            addresses_age: Some(Duration {
                seconds: 7,
                nanos: 0,
            }),
        }],
        conditions: vec![message::Condition {
            r#type: "address".into(),
            status: true,
            reason: String::new(),
            since: at(1_700_000_000),
        }],
        tags: [("env".to_owned(), "prod".to_owned())].into(),
        generation: 3,
        created_at: at(1_700_000_000),
        operation_id: "0d1b7f7e-0000-4000-8000-000000000001".into(),
        autostart: Some(message::Autostart {
            order: 1,
            delay: None,
        }),
        restart_policy: Some(message::RestartPolicy {
            max_restarts: 3,
            window: Some(Duration {
                seconds: 600,
                nanos: 0,
            }),
        }),
        delete_protection: true,
        guest: Some(message::GuestPolicy {
            inject: "auto".into(),
            access: true,
        }),
        owner: "acme/alice".into(),
    });
    round_trips(&vm);
    assert_eq!(
        json_of(vm),
        json!({
            "id": "7c9e6679-7425-40de-944b-e07fc1f90ae7",
            "name": "web-1",
            "state": "running",
            "state_reason": "booted",
            "state_source": "libvirt_event",
            "state_age_seconds": 2.5,
            "desired_state": "running",
            "vcpus": 2,
            "memory_bytes": 2_147_483_648u64,
            "image": "debian-12",
            "disks": [{"name": "root", "size_bytes": 10_737_418_240u64, "allocated_bytes": 1_048_576}],
            "nics": [{"network": "default", "mac": "52:54:00:12:34:56", "addresses": ["10.77.0.2"],
                      "addresses_age_seconds": 7.0}],
            "conditions": [{"type": "address", "status": true, "reason": null,
                            "since": "2023-11-14T22:13:20.250Z"}],
            "tags": {"env": "prod"},
            "generation": 3,
            "created_at": "2023-11-14T22:13:20.250Z",
            "operation_id": "0d1b7f7e-0000-4000-8000-000000000001",
            "autostart": {"order": 1, "delay_seconds": 0.0},
            "restart_policy": {"max_restarts": 3, "window_seconds": 600.0},
            "delete_protection": true,
            "guest": {"inject": "auto", "access": true},
            "owner": "acme/alice",
        })
    );
}

#[test]
fn an_empty_vm_has_the_same_keys_with_nulls() {
    let vm = Vm::from(message::Vm::default());
    round_trips(&vm);
    assert_eq!(
        json_of(vm),
        json!({
            "id": "", "name": "", "state": "unknown", "state_reason": null,
            "state_source": "none", "state_age_seconds": null, "desired_state": null,
            "vcpus": 0, "memory_bytes": 0, "image": "", "disks": [], "nics": [],
            "conditions": [], "tags": {}, "generation": 0, "created_at": "",
            "operation_id": null, "autostart": null, "restart_policy": null,
            "delete_protection": false, "guest": null, "owner": null,
        })
    );
}

#[test]
fn an_operation_has_the_keys_of_the_contract() {
    let operation = Operation::from(message::Operation {
        id: "0d1b7f7e-0000-4000-8000-000000000001".into(),
        kind: "pull_image".into(),
        vm: String::new(),
        subject: "debian-12".into(),
        status: message::OperationStatus::RolledBack.into(),
        phase: "downloading".into(),
        progress: Some(message::Progress {
            bytes_done: 25,
            bytes_total: 100,
            bytes_per_second: 5,
            remaining: Some(Duration {
                seconds: 15,
                nanos: 0,
            }),
        }),
        waiting_for: "the server".into(),
        error: Some(message::OperationError {
            code: "download_failed".into(),
            message: "cannot download".into(),
            cause: "connection reset".into(),
            hint: String::new(),
        }),
        request_id: "abc".into(),
        requested_by: "root".into(),
        created_at: at(0),
        finished_at: at(1),
        deadline: at(2),
    });
    round_trips(&operation);
    assert_eq!(
        json_of(operation),
        json!({
            "id": "0d1b7f7e-0000-4000-8000-000000000001",
            "kind": "pull_image",
            "vm": null,
            "subject": "debian-12",
            "status": "rolled_back",
            "phase": "downloading",
            "progress": {"bytes_done": 25, "bytes_total": 100, "bytes_per_second": 5,
                         "remaining_seconds": 15.0, "fraction": 0.25},
            "waiting_for": "the server",
            "error": {"code": "download_failed", "message": "cannot download",
                      "cause": "connection reset", "hint": null},
            "request_id": "abc",
            "requested_by": "root",
            "created_at": "1970-01-01T00:00:00.250Z",
            "finished_at": "1970-01-01T00:00:01.250Z",
            "deadline": "1970-01-01T00:00:02.250Z",
        })
    );
    assert_eq!(
        json_of(Operation::from(message::Operation {
            progress: Some(message::Progress::default()),
            ..message::Operation::default()
        })),
        json!({
            "id": "", "kind": "", "vm": null, "subject": "", "status": "running", "phase": null,
            "progress": {"bytes_done": 0, "bytes_total": null, "bytes_per_second": null,
                         "remaining_seconds": null, "fraction": null},
            "waiting_for": null, "error": null, "request_id": null, "requested_by": null,
            "created_at": "", "finished_at": null, "deadline": null,
        })
    );
}

/// Holds the names that DESIGN writes to the enums, in both directions.
#[test]
fn states_and_statuses_are_the_names_of_the_contract() {
    let names: Vec<String> = (0..=11)
        .filter_map(|number| message::VmState::try_from(number).ok())
        .filter(|state| *state != message::VmState::Unspecified)
        .map(|state| {
            let state = VmState::from(state);
            assert_eq!(json_of(state), json!(state.as_str()));
            state.to_string()
        })
        .collect();
    assert_eq!(
        names.join(" "),
        "creating stopped starting running pausing paused stopping restarting deleting failed \
         unknown"
    );
    let names: Vec<String> = (1..=7)
        .filter_map(|number| message::OperationStatus::try_from(number).ok())
        .map(|status| {
            let status = OperationStatus::from(status);
            assert_eq!(json_of(status), json!(status.as_str()));
            status.to_string()
        })
        .collect();
    assert_eq!(
        names.join(" "),
        "pending running succeeded failed cancelled rolled_back needs_attention"
    );
}

#[test]
fn free_is_what_is_allocatable_and_not_committed() {
    let share = |cpus| {
        Some(message::Resources {
            cpus,
            memory_bytes: u64::from(cpus) << 30,
            disk_bytes: 0,
        })
    };
    let status = HostStatus::from(message::HostStatus {
        allocatable: share(4),
        committed: share(1),
        ..message::HostStatus::default()
    });
    round_trips(&status);
    assert_eq!(status.resources.free.cpus, 3);
    assert_eq!(status.resources.free.memory_bytes, 3 << 30);
    // An owner who raised the reservation below what VMs hold leaves nothing, not a wrap-around.
    let status = HostStatus::from(message::HostStatus {
        allocatable: share(1),
        committed: share(4),
        ..message::HostStatus::default()
    });
    assert_eq!(status.resources.free, Resources::default());
}

#[test]
fn times_out_of_range_are_absent() {
    for seconds in [i64::MIN, i64::MAX, -100_000_000_000, 300_000_000_000] {
        assert_eq!(rfc3339(&Timestamp { seconds, nanos: 0 }), None, "{seconds}");
    }
    assert_eq!(
        rfc3339(&Timestamp {
            seconds: -1,
            nanos: 0
        })
        .as_deref(),
        Some("1969-12-31T23:59:59.000Z")
    );
}

#[test]
fn the_other_views_have_stable_keys() {
    let keys = |value: Value| -> String {
        value
            .as_object()
            .unwrap()
            .keys()
            .cloned()
            .collect::<Vec<_>>()
            .join(" ")
    };
    let sorted = |text: &str| {
        let mut words: Vec<_> = text.split_whitespace().collect();
        words.sort_unstable();
        words.join(" ")
    };
    for (value, expected) in [
        (
            json_of(Image::from(message::Image::default())),
            "name digest format virtual_size_bytes file_size_bytes source checksum created_at \
             last_used_at used_by",
        ),
        (
            json_of(CatalogueEntry::from(message::CatalogueEntry::default())),
            "name aliases description url cached",
        ),
        (
            json_of(Network::from(message::Network::default())),
            "name libvirt_name mode bridge subnet dhcp_first dhcp_last active leases",
        ),
        (
            json_of(Lease::from(message::Lease::default())),
            "mac address hostname expires_at vm",
        ),
        (
            json_of(Event::from(message::Event::default())),
            "sequence at kind severity vm subject message operation_id host host_id tenant missed",
        ),
        (
            json_of(HostStatus::from(message::HostStatus::default())),
            "name agent machine hypervisor resources vms store warnings core",
        ),
        (
            json_of(CoreLink::from(message::CoreLink::default())),
            "enrolled host_id host_name tenant trust_domain addresses authority_fingerprint \
             certificate_expires_at certificate_generation permissions state reason since carrier \
             replica round_trip_seconds retry_in_seconds last_failure deletes_allowed_until \
             carriers",
        ),
        (
            json_of(Certificate::from(message::Certificate::default())),
            "id name role created_at expires_at revoked_at guest_access",
        ),
        (
            json_of(CreatedKey::from(message::CreatedKey::default())),
            "key secret",
        ),
        (
            json_of(JoinToken::from(message::JoinToken::default())),
            "token expires_at role guest_access",
        ),
        (
            json_of(Identity::from(message::Identity::default())),
            "name role source id server tenant guest_access",
        ),
        (
            json_of(ErrorDetail {
                code: String::new(),
                message: String::new(),
                cause: None,
                hint: None,
                operation_id: None,
                violations: Vec::new(),
            }),
            "code message cause hint operation_id violations",
        ),
    ] {
        assert_eq!(sorted(&keys(value)), sorted(expected));
    }
}
