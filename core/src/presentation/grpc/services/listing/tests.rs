use std::collections::BTreeMap;
use std::pin::Pin;

use bytes::{Buf, BytesMut};
use ghost_domain::fleet::{CorePermissions, FleetFacts, VmSummary};
use ghost_domain::vm::{DesiredPower, VmState};
use ghost_domain::{ByteSize, Demand, HostId, HostName, Role, TenantName, VmId};
use ghost_infrastructure::clock::SystemClock;
use ghost_proto::agent::v1 as agent;
use ghost_proto::view;
use http_body::Body as _;
use prost::Message;

use super::*;
use crate::application::fleet::{Fleet, ToldHost};
use crate::application::vms::{ListVms, ListVmsQuery};
use crate::domain::{
    Caller, CallerSource, HostLife, HostRecord, HostState, Inventory, Labels, Record, RecordKey,
    Tenant,
};
use crate::infrastructure::store::MemoryStore;

fn rich(id: VmId) -> VmSummary {
    VmSummary {
        id,
        name: "rich".into(),
        state: VmState::Running,
        state_reason: "since a while".into(),
        desired: DesiredPower::Running,
        demand: Demand {
            cpus: 4,
            memory: ByteSize::from_gib(8),
            disk: ByteSize::from_gib(80),
        },
        image: "debian-12".into(),
        addresses: vec!["192.0.2.7".into(), "192.0.2.8".into()],
        generation: 9,
        created_at: Timestamp::from_unix_millis(1_700_000_000_123),
        tags: BTreeMap::from([
            ("a".into(), "b".into()),
            ("c".into(), "\",\"state\":,\"host\":".into()),
        ]),
        owner: Some("acme/alice".into()),
    }
}

/// With nothing that could be left from another one.
fn poor(id: VmId) -> VmSummary {
    VmSummary {
        name: "poor".into(),
        state: VmState::Stopped,
        state_reason: String::new(),
        desired: DesiredPower::Stopped,
        demand: Demand::default(),
        image: String::new(),
        addresses: Vec::new(),
        generation: 0,
        created_at: Timestamp::from_unix_millis(0),
        tags: BTreeMap::new(),
        owner: None,
        ..rich(id)
    }
}

fn host(name: &str, tenant: &TenantName, heard: Option<Timestamp>) -> HostRecord {
    HostRecord {
        id: HostId::random(),
        name: HostName::new(name).unwrap(),
        tenant: tenant.clone(),
        labels: Labels::new(),
        cordoned: None,
        life: HostLife::Active,
        certificate_generation: 1,
        key_hash: [0; 32],
        previous_key_hash: None,
        certificate_expires_at: Timestamp::default(),
        enrolled_at: Timestamp::default(),
        agent_version: String::new(),
        permissions: CorePermissions::Operate,
        facts: FleetFacts::default(),
        last_heard_at: heard,
        command_generation: 0,
        machine: None,
    }
}

#[tokio::test]
async fn what_is_listed_is_what_is_known_and_nothing_of_the_one_before() {
    let fleet = Fleet::start(MemoryStore::new(), Arc::new(SystemClock::new()))
        .await
        .unwrap();
    let tenant = TenantName::new("acme").unwrap();
    let heard = Timestamp::from_unix_millis(1_000_000);
    let now = Timestamp::from_unix_millis(1_002_500);
    let hosts = [host("a", &tenant, Some(heard)), host("b", &tenant, None)];
    let ids: Vec<VmId> = (1..=4)
        .map(|n| VmId::from_uuid(uuid::Uuid::from_u128(n)))
        .collect();
    let vms = [
        vec![rich(ids[0]), poor(ids[1])],
        vec![poor(ids[2]), rich(ids[3])],
    ];
    fleet
        .transact(|state| {
            let mut draft = state.draft();
            let record = Tenant {
                name: tenant.clone(),
                quota: Default::default(),
                user_quota: Default::default(),
                created_at: now,
            };
            draft.put(RecordKey::Tenant(tenant.clone()), Record::Tenant(record));
            for (host, vms) in hosts.iter().zip(&vms) {
                draft.put_host(host.clone());
                let told = Inventory {
                    vms: vms.iter().map(|vm| (vm.id, vm.clone())).collect(),
                    ..Inventory::default()
                };
                let told = Record::Inventory(Box::new(told));
                draft.put(RecordKey::Inventory(host.id), told);
            }
            Ok(draft.done(()))
        })
        .await
        .unwrap();
    let caller = Caller {
        name: "root".into(),
        user: None,
        tenant: None,
        role: Role::Admin,
        hosts: None,
        source: CallerSource::Socket { uid: 0 },
    };
    let lists = ListVms { fleet };
    let ask = |query: ListVmsQuery| lists.execute(&caller, query).unwrap();
    let listed = ask(ListVmsQuery::default());
    let whole = |form| list(listed.clone(), form, now).unwrap().whole();
    let answer = message::ListFleetVmsResponse::decode(whole(Form::Message).slice(5..)).unwrap();

    let summary = |id: &VmId, rich: bool| message::VmSummary {
        id: id.to_string(),
        name: if rich { "rich" } else { "poor" }.into(),
        state: if rich {
            agent::VmState::Running
        } else {
            agent::VmState::Stopped
        }
        .into(),
        state_reason: if rich { "since a while" } else { "" }.into(),
        desired_state: if rich {
            agent::DesiredState::Running
        } else {
            agent::DesiredState::Stopped
        }
        .into(),
        vcpus: if rich { 4 } else { 0 },
        memory_bytes: if rich { 8 << 30 } else { 0 },
        disk_bytes: if rich { 80 << 30 } else { 0 },
        image: if rich { "debian-12" } else { "" }.into(),
        addresses: if rich {
            vec!["192.0.2.7".into(), "192.0.2.8".into()]
        } else {
            Vec::new()
        },
        generation: if rich { 9 } else { 0 },
        created_at: Some(if rich {
            prost_types::Timestamp {
                seconds: 1_700_000_000,
                nanos: 123_000_000,
            }
        } else {
            prost_types::Timestamp::default()
        }),
        tags: if rich {
            BTreeMap::from([
                ("a".into(), "b".into()),
                ("c".into(), "\",\"state\":,\"host\":".into()),
            ])
        } else {
            BTreeMap::new()
        },
        owner: if rich { "acme/alice" } else { "" }.into(),
    };
    let expected = |host: usize, vm: usize, rich: bool| message::FleetVm {
        host: hosts[host].name.to_string(),
        host_id: hosts[host].id.to_string(),
        tenant: "acme".into(),
        host_state: if host == 0 { "offline" } else { "never_seen" }.into(),
        age: (host == 0).then_some(prost_types::Duration {
            seconds: 2,
            nanos: 500_000_000,
        }),
        vm: Some(summary(&ids[vm], rich)),
    };
    assert_eq!(
        answer.vms,
        [
            expected(0, 0, true),
            expected(0, 1, false),
            expected(1, 2, false),
            expected(1, 3, true),
        ]
    );

    // As JSON it is what the views are, to the byte, however much the texts look like it.
    let views = |vms: &[message::FleetVm]| -> Vec<u8> {
        let views: Vec<_> = vms.iter().cloned().map(view::FleetVm::from).collect();
        serde_json::to_vec(&views).unwrap()
    };
    assert_eq!(whole(Form::Json), views(&answer.vms));

    // Only some of them.
    let some = |query: ListVmsQuery| {
        let listed = ask(query);
        let whole = |form| list(listed.clone(), form, now).unwrap().whole();
        let vms = message::ListFleetVmsResponse::decode(whole(Form::Message).slice(5..))
            .unwrap()
            .vms;
        assert_eq!(whole(Form::Json), views(&vms));
        vms
    };
    let tagged = some(ListVmsQuery {
        tags: BTreeMap::from([("a".into(), "b".into())]),
        ..ListVmsQuery::default()
    });
    assert_eq!(tagged, [expected(0, 0, true), expected(1, 3, true)]);
    let of_one = some(ListVmsQuery {
        host: Some(hosts[1].id.to_string()),
        name: Some("poor".into()),
        ..ListVmsQuery::default()
    });
    assert_eq!(of_one, [expected(1, 2, false)]);
    let none = some(ListVmsQuery {
        name: Some("nobody".into()),
        ..ListVmsQuery::default()
    });
    assert_eq!(none, []);
}

/// As it goes out.
#[tokio::test]
async fn a_long_list_comes_in_pieces_that_are_one_message() {
    let tenant = TenantName::new("acme").unwrap();
    let vms: BTreeMap<VmId, VmSummary> = (1..=2000)
        .map(|n| VmId::from_uuid(uuid::Uuid::from_u128(n)))
        .map(|id| (id, rich(id)))
        .collect();
    let listed = || {
        let hosts = ["a", "b"].map(|name| ToldHost {
            record: Arc::new(host(name, &tenant, None)),
            inventory: Arc::new(Inventory {
                vms: vms.clone().into(),
                ..Inventory::default()
            }),
            state: HostState::Online,
            last_heard_at: None,
        });
        let query = Arc::new(ListVmsQuery::default());
        Vec::from(hosts.map(|host| ListedHost::from((host, &query))))
    };
    for form in [Form::Message, Form::Json] {
        let hosts = listed();
        let now = Timestamp::default();
        let whole = list(hosts.clone(), form, now).unwrap().whole();
        let listed = Arc::new(list(hosts, form, now).unwrap());
        let mut pieces = body::Pieces::new(listed);
        let mut told = BytesMut::new();
        let (mut count, mut trailers) = (0, None);
        while let Some(frame) =
            std::future::poll_fn(|context| Pin::new(&mut pieces).poll_frame(context)).await
        {
            match frame.unwrap().into_data() {
                Ok(data) => {
                    assert!(trailers.is_none());
                    count += 1;
                    told.extend_from_slice(&data);
                }
                Err(frame) => trailers = frame.into_trailers().ok(),
            }
        }
        assert_eq!(trailers.unwrap()["grpc-status"], "0");
        assert!(count > 1, "{count}");
        assert_eq!(told, whole);
        match form {
            Form::Json => {
                let views: Vec<view::FleetVm> = serde_json::from_slice(&told).unwrap();
                assert_eq!(views.len(), 4000);
            }
            Form::Message => {
                assert_eq!(told[0], 0, "not compressed");
                let length = (&told[1..5]).get_u32() as usize;
                assert_eq!(length, told.len() - 5);
                let answer = message::ListFleetVmsResponse::decode(&told[5..]).unwrap();
                assert_eq!(answer.vms.len(), 4000);
            }
        }
    }
}
