//! Records for tests, and a model of what a store must hold.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use ghost_domain::guest::Lockdown;
use ghost_domain::ports::{Change, StoreContents};
use ghost_domain::vm::{
    Autostart, CloudInit, DesiredPower, ImageReference, Lifecycle, NetworkInterface, RestartPolicy,
    Vm, VmSpec,
};
use ghost_domain::{
    ApiKey, ByteSize, Certificate, CredentialId, Error, ErrorCode, Image, ImageDigest, ImageFormat,
    ImageName, ImageOrigin, JoinToken, JournalEntry, JournalEvent, NetworkName, Operation,
    OperationId, OperationKind, OperationStatus, RequestId, Role, Timestamp, VmId, VmName,
};
use uuid::Uuid;

fn uuid(number: u64) -> Uuid {
    // Spread over the key space, as random ids are.
    let spread = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    Uuid::from_u64_pair(spread, number)
}

pub(super) fn vm_id(number: u64) -> VmId {
    VmId::from_uuid(uuid(number))
}

pub(super) fn operation_id(number: u64) -> OperationId {
    OperationId::from_uuid(uuid(number))
}

pub(super) fn credential_id(number: u64) -> CredentialId {
    CredentialId::from_uuid(uuid(number))
}

/// A VM with all that a record can have; `generation` tells versions of it apart.
pub(super) fn vm(number: u64, generation: u64) -> Vm {
    Vm {
        id: vm_id(number),
        name: VmName::new(format!("vm-{number}")).unwrap(),
        generation,
        spec: VmSpec {
            vcpus: 2,
            memory: ByteSize::from_gib(2),
            image: ImageReference {
                name: ImageName::new("debian-12").unwrap(),
                content: Some((ImageDigest::from_bytes([7; 32]), ImageFormat::Qcow2)),
            },
            disk: ByteSize::from_gib(10),
            interfaces: vec![NetworkInterface {
                network: NetworkName::new("default").unwrap(),
                mac: "52:54:00:12:34:56".parse().unwrap(),
            }],
            autostart: Some(Autostart {
                order: -3,
                delay: Duration::from_millis(1500),
            }),
            restart_policy: RestartPolicy::default(),
            delete_protection: true,
            guest: Default::default(),
            tags: BTreeMap::from([("team".into(), "grün".into())]),
        },
        cloud_init: CloudInit {
            user: Some("ops".into()),
            ssh_authorized_keys: vec![format!("ssh-ed25519 {} me", "A".repeat(68))],
            user_data: Some(format!("#cloud-config\n# {generation}\n")),
            network_config: None,
        },
        desired: DesiredPower::Running,
        lifecycle: Lifecycle::Failed {
            reason: "the disk is gone".into(),
        },
        created_at: Timestamp::from_unix_millis(1_700_000_000_123),
        registered_addresses: Vec::new(),
        crash_restarts: vec![
            Timestamp::from_unix_millis(1),
            Timestamp::from_unix_millis(2),
        ],
        owner: None,
    }
}

pub(super) fn put_vm(number: u64, generation: u64) -> Change {
    Change::PutVm(Box::new(vm(number, generation)))
}

/// A VM whose user-data has so many bytes.
pub(super) fn bulky_vm(number: u64, bytes: usize) -> Change {
    let mut vm = vm(number, 1);
    vm.cloud_init.user_data = Some("x".repeat(bytes));
    Change::PutVm(Box::new(vm))
}

pub(super) fn operation(number: u64) -> Operation {
    let at = Timestamp::from_unix_millis(1_700_000_000_000);
    Operation {
        id: operation_id(number),
        kind: OperationKind::ImportImage {
            name: ImageName::new("tiny").unwrap(),
            staged: PathBuf::from("upload-1"),
            file_name: "tiny.qcow2".into(),
        },
        vm: Some(vm_id(number)),
        subject: "tiny".into(),
        request_id: Some(RequestId::new("retry-1").unwrap()),
        request_hash: u64::MAX,
        requested_by: "uid 0".into(),
        through_core: false,
        status: OperationStatus::NeedsAttention,
        error: Some(
            Error::new(ErrorCode::DiskFull, "no room")
                .because("0 B free")
                .hint("free some")
                .field("disk_bytes", "too many")
                .retry_after(Duration::from_secs(1))
                .of_operation(operation_id(number)),
        ),
        created_at: at,
        finished_at: Some(at.after(Duration::from_secs(3))),
        deadline: at.after(Duration::from_secs(60)),
        cancel_requested: true,
        journal: vec![JournalEntry {
            step: "define_domain".into(),
            event: JournalEvent::UndoFailed,
            at,
        }],
    }
}

pub(super) fn image(number: u64) -> Image {
    let at = Timestamp::from_unix_millis(1_700_000_000_000);
    Image {
        name: ImageName::new(format!("image-{number}")).unwrap(),
        digest: ImageDigest::from_bytes([9; 32]),
        format: ImageFormat::Raw,
        virtual_size: ByteSize::from_gib(3),
        file_size: ByteSize::from_mib(300),
        origin: ImageOrigin::Pulled {
            url: "https://example.org/image.qcow2".into(),
            checksum: format!("sha512:{}", "ab".repeat(64)).parse().unwrap(),
        },
        created_at: at,
        last_used_at: at,
    }
}

pub(super) fn certificate(number: u64) -> Certificate {
    Certificate {
        id: credential_id(number),
        name: "laptop".into(),
        role: Role::Operator,
        guest_access: true,
        created_at: Timestamp::from_unix_millis(1),
        expires_at: Timestamp::from_unix_millis(2),
        revoked_at: Some(Timestamp::from_unix_millis(3)),
    }
}

pub(super) fn api_key(number: u64) -> ApiKey {
    ApiKey {
        id: credential_id(number),
        name: "ci".into(),
        role: Role::Viewer,
        guest_access: true,
        secret_hash: [5; 32],
        created_at: Timestamp::from_unix_millis(1),
        expires_at: None,
        revoked_at: None,
    }
}

pub(super) fn join_token(number: u64) -> JoinToken {
    JoinToken {
        id: credential_id(number),
        secret_hash: [6; 32],
        role: Role::Admin,
        guest_access: true,
        created_at: Timestamp::from_unix_millis(1),
        expires_at: Timestamp::from_unix_millis(2),
    }
}

pub(super) fn lockdown(number: u64) -> Lockdown {
    Lockdown {
        reason: format!("reason {number}"),
        set_by: "uid 0".into(),
        since: Timestamp::from_unix_millis(1_700_000_000_000 + i64::try_from(number).unwrap()),
    }
}

/// One record of every kind.
pub(super) fn one_of_every_kind() -> Vec<Change> {
    vec![
        put_vm(1, 1),
        Change::PutOperation(Box::new(operation(1))),
        Change::PutImage(image(1)),
        Change::PutCertificate(certificate(1)),
        Change::PutApiKey(api_key(1)),
        Change::PutJoinToken(join_token(1)),
        Change::PutBootId("7e0d1c7a".into()),
    ]
}

/// What a store must hold after some changes.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Model {
    vms: BTreeMap<VmId, Vm>,
    operations: BTreeMap<OperationId, Operation>,
    images: BTreeMap<ImageName, Image>,
    certificates: BTreeMap<CredentialId, Certificate>,
    api_keys: BTreeMap<CredentialId, ApiKey>,
    join_tokens: BTreeMap<CredentialId, JoinToken>,
    boot_id: Option<String>,
    lockdown: Option<Lockdown>,
    fleet_ledger: Option<ghost_domain::fleet::FleetLedger>,
    delete_consent: Option<Timestamp>,
}

impl Model {
    pub(super) fn of(changes: &[Change]) -> Self {
        let mut model = Self::default();
        model.apply(changes);
        model
    }

    pub(super) fn apply(&mut self, changes: &[Change]) {
        for change in changes.iter().cloned() {
            match change {
                Change::PutVm(vm) => drop(self.vms.insert(vm.id, *vm)),
                Change::DeleteVm(id) => drop(self.vms.remove(&id)),
                Change::PutOperation(row) => drop(self.operations.insert(row.id, *row)),
                Change::DeleteOperation(id) => drop(self.operations.remove(&id)),
                Change::PutImage(row) => drop(self.images.insert(row.name.clone(), row)),
                Change::DeleteImage(name) => drop(self.images.remove(&name)),
                Change::PutCertificate(row) => drop(self.certificates.insert(row.id, row)),
                Change::DeleteCertificate(id) => drop(self.certificates.remove(&id)),
                Change::PutApiKey(row) => drop(self.api_keys.insert(row.id, row)),
                Change::DeleteApiKey(id) => drop(self.api_keys.remove(&id)),
                Change::PutJoinToken(row) => drop(self.join_tokens.insert(row.id, row)),
                Change::DeleteJoinToken(id) => drop(self.join_tokens.remove(&id)),
                Change::PutBootId(boot_id) => self.boot_id = Some(boot_id),
                Change::PutLockdown(lockdown) => self.lockdown = Some(lockdown),
                Change::DeleteLockdown => self.lockdown = None,
                Change::PutFleetLedger(ledger) => self.fleet_ledger = Some(ledger),
                Change::PutDeleteConsent(until) => self.delete_consent = Some(until),
            }
        }
    }

    /// As `load` returns it: every kind in the order of its identities.
    pub(super) fn contents(&self) -> StoreContents {
        StoreContents {
            vms: self.vms.values().cloned().collect(),
            operations: self.operations.values().cloned().collect(),
            images: self.images.values().cloned().collect(),
            certificates: self.certificates.values().cloned().collect(),
            api_keys: self.api_keys.values().cloned().collect(),
            join_tokens: self.join_tokens.values().cloned().collect(),
            boot_id: self.boot_id.clone(),
            lockdown: self.lockdown.clone(),
            fleet_ledger: self.fleet_ledger.clone(),
            delete_consent: self.delete_consent,
            damage: None,
        }
    }
}
