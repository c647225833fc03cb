//! One record of each kind, with every field set to something.

use std::collections::BTreeMap;
use std::time::Duration;

use ghost_domain::fleet::{
    CommandAction, CommandOutcome, CommandStatus, CorePermissions, CreateVmCommand, FleetFacts,
    FleetPrincipal, VmSummary,
};
use ghost_domain::vm::{DesiredPower, VmState};
use ghost_domain::{
    ByteSize, CommandId, CredentialId, Demand, ErrorCode, HostId, HostName, HostResources,
    OperationId, RequestId, Role, TenantName, Timestamp, VmId,
};
use uuid::Uuid;

use crate::domain::{
    FleetKey, HeldRoom, HostHealth, HostLife, HostRecord, Inventory, JoinToken, Ownership,
    QueuedCommand, Quota, Record, RecordKey, Replica, SentCreate, Tenant, TokenKind, User,
    UserSource,
};

fn at(millis: i64) -> Timestamp {
    Timestamp::from_unix_millis(1_800_000_000_000 + millis)
}

fn acme() -> TenantName {
    TenantName::new("acme").unwrap()
}

fn labels() -> BTreeMap<String, String> {
    BTreeMap::from([
        ("zone".into(), "north".into()),
        ("gpu".into(), String::new()),
    ])
}

fn demand(cpus: u32) -> Demand {
    Demand {
        cpus,
        memory: ByteSize::from_gib(cpus.into()),
        disk: ByteSize::from_gib(40),
    }
}

pub(super) fn host(id: u128) -> HostRecord {
    HostRecord {
        id: HostId::from_uuid(Uuid::from_u128(id)),
        name: HostName::new(format!("pc-{id}")).unwrap(),
        tenant: acme(),
        labels: labels(),
        cordoned: Some("new disk".into()),
        life: HostLife::Locked {
            since: at(1),
            reason: "two machines".into(),
        },
        certificate_generation: 7,
        key_hash: [7; 32],
        previous_key_hash: Some([6; 32]),
        machine: Some([5; 32]),
        certificate_expires_at: at(2),
        enrolled_at: at(3),
        agent_version: "0.1.0".into(),
        permissions: CorePermissions::Operate,
        facts: FleetFacts {
            hostname: "pc".into(),
            operating_system: "Debian 12".into(),
            kernel: "6.1".into(),
            cpu_model: "Model ü".into(),
            boot_id: "b".into(),
            accelerator: "kvm".into(),
            hypervisor_version: "10.0".into(),
            libvirt_version: "11.3".into(),
        },
        last_heard_at: Some(at(4)),
        command_generation: 9,
    }
}

pub(super) fn inventory(vms: u128) -> Inventory {
    let vm = |number: u128| VmSummary {
        id: VmId::random(),
        name: format!("web-{number}"),
        state: VmState::ALL[usize::try_from(number).unwrap() % VmState::ALL.len()],
        state_reason: "asked".into(),
        desired: DesiredPower::Paused,
        demand: demand(2),
        image: "debian-12".into(),
        addresses: vec![format!("192.168.1.{}", number % 250), "fe80::1".into()],
        generation: u64::try_from(number).unwrap(),
        created_at: at(5),
        tags: labels(),
        owner: number.is_multiple_of(2).then(|| "acme/alice".to_owned()),
    };
    Inventory {
        vms: (0..vms).map(vm).map(|vm| (vm.id, vm)).collect(),
        total: HostResources {
            cpus: 16,
            memory: ByteSize::from_gib(64),
            disk: ByteSize::from_gib(1000),
            disk_free: ByteSize::from_gib(100),
        },
        allocatable: demand(12),
        committed: demand(3),
        memory_available: ByteSize::from_gib(20),
        load_one_minute: 0.25,
        health: HostHealth {
            agent_state: "running".into(),
            hypervisor_connected: true,
            store_writable: true,
            warnings: vec!["the clock is off".into()],
            lockdown: true,
        },
        at: at(6),
    }
}

fn command(number: u128, action: CommandAction) -> QueuedCommand {
    let id = CommandId::from_uuid(Uuid::from_u128(number));
    QueuedCommand {
        id,
        request_id: RequestId::new(format!("r{number}")).unwrap(),
        host: HostId::from_uuid(Uuid::from_u128(1)),
        tenant: acme(),
        generation: u64::try_from(number).unwrap(),
        issuer: FleetPrincipal {
            name: "acme/alice".into(),
            tenant: Some(acme()),
            role: Role::Operator,
        },
        action,
        issued_at: at(7),
        deadline: at(8),
        sent_at: Some(at(9)),
        status: CommandStatus::Failed,
        outcome: Some(CommandOutcome {
            id,
            generation: 3,
            status: CommandStatus::Failed,
            operation: Some(OperationId::from_uuid(Uuid::from_u128(5))),
            code: Some(ErrorCode::VmBusy),
            message: "busy".into(),
            at: at(10),
        }),
        finished_at: Some(at(11)),
    }
}

fn actions() -> Vec<CommandAction> {
    let vm = || "web".to_owned();
    let timeout = Some(Duration::from_millis(1_500));
    vec![
        CommandAction::CreateVm(Box::new(CreateVmCommand {
            name: "web".into(),
            image: "debian-12".into(),
            vcpus: Some(2),
            memory: Some(ByteSize::from_gib(2)),
            disk: Some(ByteSize::from_gib(10)),
            networks: vec!["default".into()],
            user: "alice".into(),
            ssh_authorized_keys: vec!["ssh-ed25519 AAAA".into()],
            user_data: "#cloud-config\n".repeat(100),
            tags: labels(),
            start: true,
        })),
        CommandAction::StartVm { vm: vm() },
        CommandAction::StopVm {
            vm: vm(),
            force: true,
            timeout,
        },
        CommandAction::RestartVm {
            vm: vm(),
            force: false,
            timeout,
        },
        CommandAction::PauseVm { vm: vm() },
        CommandAction::ResumeVm { vm: vm() },
        CommandAction::DeleteVm {
            vm: vm(),
            force: true,
        },
        CommandAction::UpdateVm {
            vm: vm(),
            vcpus: Some(3),
            memory: Some(ByteSize::from_gib(3)),
            delete_protection: Some(false),
            set_tags: labels(),
            remove_tags: vec!["old".into()],
        },
    ]
}

/// Records of all kinds, and of all variants within them.
pub(super) fn all() -> Vec<(RecordKey, Record)> {
    let id = |number: u128| CredentialId::from_uuid(Uuid::from_u128(number));
    let host_id = |number: u128| HostId::from_uuid(Uuid::from_u128(number));
    let quota = Quota {
        vms: Some(3),
        cpus: None,
        memory: Some(ByteSize::from_gib(4)),
        disk: None,
    };
    let mut all = Vec::new();
    let lives = [
        HostLife::Active,
        HostLife::Revoked { since: at(12) },
        host(1).life,
    ];
    for (number, life) in (1..).zip(lives) {
        let one = HostRecord {
            life,
            ..host(number)
        };
        all.push((RecordKey::Host(one.id), Record::Host(Box::new(one))));
    }
    let name = RecordKey::HostName(acme(), "pc-1".into());
    all.push((name, Record::HostName(host_id(1))));
    for vms in [0, 1, 30] {
        let key = RecordKey::Inventory(host_id(vms));
        all.push((key, Record::Inventory(Box::new(inventory(vms)))));
    }
    let owner = Ownership {
        host: host_id(1),
        replica: "core-1".into(),
        link: u64::MAX,
        since: at(13),
    };
    all.push((RecordKey::Owner(host_id(1)), Record::Owner(owner)));
    for (number, action) in (1..).zip(actions()) {
        let one = command(number, action);
        let key = RecordKey::Command(one.host, one.id);
        all.push((key, Record::Command(Box::new(one))));
    }
    let tenant = Tenant {
        name: acme(),
        quota,
        user_quota: Quota::default(),
        created_at: at(14),
    };
    all.push((RecordKey::Tenant(acme()), Record::Tenant(tenant)));
    let sources = [
        UserSource::Certificate { expires_at: at(15) },
        UserSource::OpenIdConnect {
            issuer: "https://id.example".into(),
            subject: "42".into(),
        },
    ];
    for (number, source) in (1..).zip(sources) {
        let user = User {
            id: id(number),
            name: "Alice".into(),
            tenant: (number == 1).then(acme),
            role: Role::Admin,
            source,
            quota: (number == 2).then_some(quota),
            created_at: at(16),
            revoked_at: Some(at(17)),
        };
        all.push((RecordKey::User(user.id), Record::User(user)));
    }
    let key = FleetKey {
        id: id(20),
        secret_hash: [2; 32],
        name: "ci".into(),
        tenant: Some(acme()),
        role: Role::Viewer,
        hosts: Some([host_id(1), host_id(2)].into()),
        created_at: at(18),
        expires_at: at(19),
        revoked_at: None,
    };
    all.push((RecordKey::Key(key.id), Record::Key(key)));
    let kinds = [
        TokenKind::Host {
            tenant: acme(),
            labels: labels(),
        },
        TokenKind::Operator {
            tenant: None,
            role: Role::Admin,
        },
    ];
    for (number, kind) in (30..).zip(kinds) {
        let token = JoinToken {
            id: id(number),
            secret_hash: [3; 32],
            kind,
            created_by: "root".into(),
            created_at: at(20),
            expires_at: at(21),
            used_at: (number == 30).then(|| at(22)),
        };
        all.push((RecordKey::Token(token.id), Record::Token(token)));
    }
    let replica = Replica {
        name: "core-1".into(),
        address: "core:7443".into(),
        since: at(23),
    };
    all.push((
        RecordKey::Room(acme()),
        Record::Room(vec![HeldRoom {
            id: Uuid::from_u128(8),
            host: HostId::from_uuid(Uuid::from_u128(1)),
            owner: "acme/alice".into(),
            name: "web".into(),
            vm: Some("x".into()),
            vms: 1,
            demand: demand(2),
            until: at(9),
        }]),
    ));
    all.push((
        RecordKey::Sent(Uuid::from_u128(9)),
        Record::Sent(SentCreate {
            host: HostId::from_uuid(Uuid::from_u128(1)),
            attempts: 2,
            until: at(10),
        }),
    ));
    all.push((
        RecordKey::Replica("core-1".into()),
        Record::Replica(replica.clone()),
    ));
    all.push((
        RecordKey::KnownReplica("core-1".into()),
        Record::KnownReplica(replica),
    ));
    all.push((RecordKey::Epoch, Record::Epoch(u64::MAX)));
    all.push((RecordKey::CoreId, Record::CoreId("c".into())));
    all.push((RecordKey::Authority, Record::Authority("f".repeat(64))));
    all
}
