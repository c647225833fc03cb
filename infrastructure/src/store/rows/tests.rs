//! Every record kind goes through its bytes unchanged.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use ghost_domain::guest::{GuestInject, GuestPolicy};
use ghost_domain::ports::{Change, StoreContents};
use ghost_domain::vm::{
    Autostart, CloudInit, DesiredPower, ImageReference, Lifecycle, NetworkInterface, RestartPolicy,
    Vm, VmSpec,
};
use ghost_domain::{
    ApiKey, ByteSize, Certificate, Checksum, ChecksumAlgorithm, CredentialId, Error, ErrorCode,
    Image, ImageDigest, ImageFormat, ImageName, ImageOrigin, JoinToken, JournalEntry, JournalEvent,
    MacAddress, NetworkName, Operation, OperationId, OperationKind, OperationStatus, RequestId,
    Role, Timestamp, VmChange, VmId, VmName,
};
use proptest::option;
use proptest::prelude::*;
use uuid::Uuid;

use super::*;

fn text() -> impl Strategy<Value = String> {
    "\\PC{0,40}"
}

fn duration() -> impl Strategy<Value = Duration> {
    (any::<u64>(), 0u32..1_000_000_000).prop_map(|(secs, nanos)| Duration::new(secs, nanos))
}

fn timestamp() -> impl Strategy<Value = Timestamp> {
    any::<i64>().prop_map(Timestamp::from_unix_millis)
}

fn uuid() -> impl Strategy<Value = Uuid> {
    any::<[u8; 16]>().prop_map(Uuid::from_bytes)
}

fn vm_name() -> impl Strategy<Value = VmName> {
    "[a-z0-9][a-z0-9-]{0,62}".prop_map(|name| VmName::new(name).unwrap())
}

fn image_name() -> impl Strategy<Value = ImageName> {
    "[a-z0-9][a-z0-9._-]{0,62}".prop_map(|name| ImageName::new(name).unwrap())
}

fn network_name() -> impl Strategy<Value = NetworkName> {
    "[a-z0-9][a-z0-9-]{0,31}".prop_map(|name| NetworkName::new(name).unwrap())
}

fn mac() -> impl Strategy<Value = MacAddress> {
    any::<[u8; 6]>().prop_map(|mut octets| {
        octets[0] &= 0xfe;
        octets
            .map(|octet| format!("{octet:02x}"))
            .join(":")
            .parse()
            .unwrap()
    })
}

fn format() -> impl Strategy<Value = ImageFormat> {
    prop_oneof![Just(ImageFormat::Raw), Just(ImageFormat::Qcow2)]
}

fn checksum() -> impl Strategy<Value = Checksum> {
    prop_oneof![
        any::<[u8; 32]>()
            .prop_map(|bytes| Checksum::new(ChecksumAlgorithm::Sha256, bytes.into()).unwrap()),
        proptest::collection::vec(any::<u8>(), 64).prop_map(|bytes| Checksum::new(
            ChecksumAlgorithm::Sha512,
            bytes
        )
        .unwrap()),
    ]
}

fn autostart() -> impl Strategy<Value = Autostart> {
    (any::<i32>(), duration()).prop_map(|(order, delay)| Autostart { order, delay })
}

fn restart_policy() -> impl Strategy<Value = RestartPolicy> {
    prop_oneof![
        Just(RestartPolicy::Never),
        (any::<u32>(), duration()).prop_map(|(max_restarts, window)| RestartPolicy::OnCrash {
            max_restarts,
            window
        }),
    ]
}

fn spec() -> impl Strategy<Value = VmSpec> {
    (
        (
            any::<u32>(),
            any::<u64>(),
            any::<u64>(),
            any::<bool>(),
            prop_oneof![
                Just(GuestInject::Auto),
                Just(GuestInject::Always),
                Just(GuestInject::Never)
            ],
        ),
        image_name(),
        option::of((any::<[u8; 32]>(), format())),
        proptest::collection::vec((network_name(), mac()), 0..3),
        option::of(autostart()),
        restart_policy(),
        proptest::collection::btree_map(text(), text(), 0..3),
    )
        .prop_map(
            |(
                (vcpus, memory, disk, protection, inject),
                name,
                content,
                nics,
                autostart,
                policy,
                tags,
            )| {
                VmSpec {
                    vcpus,
                    memory: ByteSize::from_bytes(memory),
                    image: ImageReference {
                        name,
                        content: content
                            .map(|(digest, format)| (ImageDigest::from_bytes(digest), format)),
                    },
                    disk: ByteSize::from_bytes(disk),
                    interfaces: nics
                        .into_iter()
                        .map(|(network, mac)| NetworkInterface { network, mac })
                        .collect(),
                    autostart,
                    restart_policy: policy,
                    delete_protection: protection,
                    guest: GuestPolicy {
                        inject,
                        access: !protection,
                    },
                    tags: tags.into_iter().collect::<BTreeMap<_, _>>(),
                }
            },
        )
}

fn vm() -> impl Strategy<Value = Vm> {
    (
        (uuid(), vm_name(), any::<u64>(), spec()),
        (
            option::of(text()),
            proptest::collection::vec(text(), 0..3),
            option::of(text()),
            option::of(text()),
        ),
        prop_oneof![
            Just(DesiredPower::Running),
            Just(DesiredPower::Stopped),
            Just(DesiredPower::Paused)
        ],
        prop_oneof![
            Just(Lifecycle::Creating),
            Just(Lifecycle::Ready),
            Just(Lifecycle::Deleting),
            text().prop_map(|reason| Lifecycle::Failed { reason })
        ],
        timestamp(),
        (
            proptest::collection::vec(timestamp(), 0..3),
            proptest::collection::vec((mac(), any::<std::net::IpAddr>()), 0..3),
            option::of(text()),
        ),
    )
        .prop_map(
            |(
                (id, name, generation, spec),
                seed,
                desired,
                lifecycle,
                created_at,
                (restarts, registered, owner),
            )| Vm {
                id: VmId::from_uuid(id),
                name,
                generation,
                spec,
                cloud_init: CloudInit {
                    user: seed.0,
                    ssh_authorized_keys: seed.1,
                    user_data: seed.2,
                    network_config: seed.3,
                },
                desired,
                lifecycle,
                created_at,
                registered_addresses: registered,
                crash_restarts: restarts,
                owner,
            },
        )
}

fn change() -> impl Strategy<Value = VmChange> {
    (
        option::of(any::<u32>()),
        option::of(any::<u64>()),
        option::of(any::<bool>()),
        option::of(option::of(autostart())),
        option::of(restart_policy()),
        proptest::collection::vec((text(), option::of(text())), 0..3),
    )
        .prop_map(
            |(vcpus, memory, delete_protection, autostart, restart_policy, tags)| VmChange {
                vcpus,
                memory: memory.map(ByteSize::from_bytes),
                delete_protection,
                guest_access: delete_protection.map(|on| !on),
                autostart,
                restart_policy,
                tags,
            },
        )
}

fn kind() -> impl Strategy<Value = OperationKind> {
    use OperationKind as K;
    prop_oneof![
        any::<bool>().prop_map(|start| K::CreateVm { start }),
        Just(K::StartVm),
        (any::<bool>(), option::of(duration()))
            .prop_map(|(force, timeout)| K::StopVm { force, timeout }),
        (any::<bool>(), option::of(duration()))
            .prop_map(|(force, timeout)| K::RestartVm { force, timeout }),
        Just(K::PauseVm),
        Just(K::ResumeVm),
        any::<bool>().prop_map(|force| K::DeleteVm { force }),
        change().prop_map(|change| K::UpdateVm { change }),
        (image_name(), option::of(text()), option::of(checksum())).prop_map(
            |(name, url, checksum)| K::PullImage {
                name,
                url,
                checksum
            }
        ),
        (image_name(), text(), text()).prop_map(|(name, staged, file_name)| K::ImportImage {
            name,
            staged: PathBuf::from(staged),
            file_name
        }),
        image_name().prop_map(|name| K::DeleteImage { name }),
    ]
}

fn error() -> impl Strategy<Value = Error> {
    (
        proptest::sample::select(ErrorCode::ALL),
        text(),
        option::of(text()),
        option::of(text()),
        option::of(duration()),
        proptest::collection::vec((text(), text()), 0..3),
        option::of(uuid()),
    )
        .prop_map(
            |(code, message, cause, hint, retry, violations, operation)| {
                let mut error = Error::new(code, message);
                if let Some(cause) = cause {
                    error = error.because(cause);
                }
                if let Some(hint) = hint {
                    error = error.hint(hint);
                }
                if let Some(retry) = retry {
                    error = error.retry_after(retry);
                }
                for (field, description) in violations {
                    error = error.field(field, description);
                }
                if let Some(operation) = operation {
                    error = error.of_operation(OperationId::from_uuid(operation));
                }
                error
            },
        )
}

fn operation() -> impl Strategy<Value = Operation> {
    use JournalEvent as J;
    use OperationStatus as S;
    let status = proptest::sample::select(vec![
        S::Pending,
        S::Running,
        S::Succeeded,
        S::Failed,
        S::Cancelled,
        S::RolledBack,
        S::NeedsAttention,
    ]);
    let event = proptest::sample::select(vec![
        J::Started,
        J::Done,
        J::Failed,
        J::UndoStarted,
        J::Undone,
        J::UndoFailed,
    ]);
    (
        (uuid(), kind(), option::of(uuid()), text()),
        (option::of("[!-~]{1,128}"), any::<u64>(), text()),
        (status, option::of(error())),
        (timestamp(), option::of(timestamp()), timestamp()),
        (any::<bool>(), any::<bool>()),
        proptest::collection::vec((text(), event, timestamp()), 0..4),
    )
        .prop_map(
            |(what, request, (status, error), times, (cancel_requested, through_core), journal)| {
                Operation {
                    id: OperationId::from_uuid(what.0),
                    kind: what.1,
                    vm: what.2.map(VmId::from_uuid),
                    subject: what.3,
                    request_id: request.0.map(|id| RequestId::new(id).unwrap()),
                    request_hash: request.1,
                    requested_by: request.2,
                    through_core,
                    status,
                    error,
                    created_at: times.0,
                    finished_at: times.1,
                    deadline: times.2,
                    cancel_requested,
                    journal: journal
                        .into_iter()
                        .map(|(step, event, at)| JournalEntry { step, event, at })
                        .collect(),
                }
            },
        )
}

fn image() -> impl Strategy<Value = Image> {
    (
        image_name(),
        any::<[u8; 32]>(),
        format(),
        (any::<u64>(), any::<u64>()),
        prop_oneof![
            (text(), checksum()).prop_map(|(url, checksum)| ImageOrigin::Pulled { url, checksum }),
            text().prop_map(|file_name| ImageOrigin::Imported { file_name }),
        ],
        (timestamp(), timestamp()),
    )
        .prop_map(|(name, digest, format, sizes, origin, times)| Image {
            name,
            digest: ImageDigest::from_bytes(digest),
            format,
            virtual_size: ByteSize::from_bytes(sizes.0),
            file_size: ByteSize::from_bytes(sizes.1),
            origin,
            created_at: times.0,
            last_used_at: times.1,
        })
}

/// A role, and whether it enters guests.
fn role() -> impl Strategy<Value = (Role, bool)> {
    let role = prop_oneof![Just(Role::Viewer), Just(Role::Operator), Just(Role::Admin)];
    (role, any::<bool>())
}

fn certificate() -> impl Strategy<Value = Certificate> {
    (
        (uuid(), text(), role()),
        (timestamp(), timestamp(), option::of(timestamp())),
    )
        .prop_map(|((id, name, role), times)| Certificate {
            id: CredentialId::from_uuid(id),
            name,
            role: role.0,
            guest_access: role.1,
            created_at: times.0,
            expires_at: times.1,
            revoked_at: times.2,
        })
}

fn api_key() -> impl Strategy<Value = ApiKey> {
    (
        (uuid(), text(), role(), any::<[u8; 32]>()),
        (
            timestamp(),
            option::of(timestamp()),
            option::of(timestamp()),
        ),
    )
        .prop_map(|((id, name, role, secret_hash), times)| ApiKey {
            id: CredentialId::from_uuid(id),
            name,
            role: role.0,
            guest_access: role.1,
            secret_hash,
            created_at: times.0,
            expires_at: times.1,
            revoked_at: times.2,
        })
}

fn join_token() -> impl Strategy<Value = JoinToken> {
    (uuid(), any::<[u8; 32]>(), role(), timestamp(), timestamp()).prop_map(
        |(id, secret_hash, role, created_at, expires_at)| JoinToken {
            id: CredentialId::from_uuid(id),
            secret_hash,
            role: role.0,
            guest_access: role.1,
            created_at,
            expires_at,
        },
    )
}

/// Encodes a change and decodes the record again.
fn through_bytes(change: &Change) -> StoreContents {
    let (key, row) = encode_change(change).unwrap();
    let mut contents = StoreContents::default();
    decode_into(&mut contents, &key, &row.unwrap()).unwrap();
    contents
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn vms_round_trip(vm in vm()) {
        let contents = through_bytes(&Change::PutVm(Box::new(vm.clone())));
        prop_assert_eq!(contents, StoreContents { vms: vec![vm], ..Default::default() });
    }

    #[test]
    fn operations_round_trip(operation in operation()) {
        let contents = through_bytes(&Change::PutOperation(Box::new(operation.clone())));
        prop_assert_eq!(contents, StoreContents { operations: vec![operation], ..Default::default() });
    }

    #[test]
    fn images_round_trip(image in image()) {
        let contents = through_bytes(&Change::PutImage(image.clone()));
        prop_assert_eq!(contents, StoreContents { images: vec![image], ..Default::default() });
    }

    #[test]
    fn credentials_round_trip(certificate in certificate(), key in api_key(), token in join_token()) {
        let contents = through_bytes(&Change::PutCertificate(certificate.clone()));
        prop_assert_eq!(contents.certificates, vec![certificate]);
        let contents = through_bytes(&Change::PutApiKey(key.clone()));
        prop_assert_eq!(contents.api_keys, vec![key]);
        let contents = through_bytes(&Change::PutJoinToken(token.clone()));
        prop_assert_eq!(contents.join_tokens, vec![token]);
    }

    #[test]
    fn the_boot_id_round_trips(boot_id in text()) {
        let contents = through_bytes(&Change::PutBootId(boot_id.clone()));
        prop_assert_eq!(contents.boot_id, Some(boot_id));
    }

    #[test]
    fn a_fleet_ledger_round_trips(core_id in text(), epoch in any::<u64>(), generation in any::<u64>(), message in text(), at in any::<i64>(), failed in any::<bool>()) {
        use ghost_domain::fleet::{CommandOutcome, CommandStatus, FleetLedger};
        let outcome = CommandOutcome {
            id: ghost_domain::CommandId::random(),
            generation,
            status: if failed { CommandStatus::Failed } else { CommandStatus::Accepted },
            operation: failed.then(OperationId::random),
            code: failed.then_some(ErrorCode::VmNotFound),
            message,
            at: Timestamp::from_unix_millis(at),
        };
        let ledger = FleetLedger { core_id, epoch, generation, unreported: [outcome].into() };
        let contents = through_bytes(&Change::PutFleetLedger(ledger.clone()));
        prop_assert_eq!(contents.fleet_ledger, Some(ledger));
        let until = Timestamp::from_unix_millis(at);
        prop_assert_eq!(through_bytes(&Change::PutDeleteConsent(until)).delete_consent, Some(until));
    }

    #[test]
    fn a_lockdown_round_trips(reason in text(), set_by in text(), since in any::<i64>()) {
        let lockdown = ghost_domain::guest::Lockdown {
            reason,
            set_by,
            since: Timestamp::from_unix_millis(since),
        };
        let contents = through_bytes(&Change::PutLockdown(lockdown.clone()));
        prop_assert_eq!(contents.lockdown, Some(lockdown));
    }

    /// Bytes that are no record of ours are an error, whatever they are.
    #[test]
    fn garbage_is_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let key = Key::vm(VmId::random());
        prop_assert!(decode_into(&mut StoreContents::default(), &key, &bytes).is_err());
    }

    /// A record with its end cut off is an error and not a shorter record.
    #[test]
    fn a_cut_record_is_an_error(operation in operation(), cut: proptest::sample::Index) {
        let (key, row) = encode_change(&Change::PutOperation(Box::new(operation))).unwrap();
        let row = row.unwrap();
        let cut = &row[..cut.index(row.len())];
        prop_assert!(decode_into(&mut StoreContents::default(), &key, cut).is_err());
    }
}

#[test]
fn a_field_of_a_newer_version_is_refused_not_dropped() {
    #[derive(Serialize)]
    struct Newer {
        id: Uuid,
        secret_hash: Bytes,
        role: String,
        created_at: i64,
        expires_at: i64,
        uses_left: u32,
    }
    let id = CredentialId::random();
    let bytes = to_cbor(&Newer {
        id: id.uuid(),
        secret_hash: Bytes(vec![0; 32]),
        role: "viewer".into(),
        created_at: 0,
        expires_at: 0,
        uses_left: 3,
    })
    .unwrap();
    let error = decode_into(&mut StoreContents::default(), &Key::join_token(id), &bytes);
    assert!(error.unwrap_err().contains("uses_left"));
}
