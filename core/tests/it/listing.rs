//! The list of all VMs of ten thousand hosts: how long it takes within Core, with no link and no
//! network. Not a test by itself, but where to look when `bench fleet` misses its budget:
//!
//! ```sh
//! cargo test --release -p ghost-core --test it listing::how_long -- --ignored --nocapture
//! ```

use std::time::{Duration, Instant};

use axum::http::StatusCode;
use ghost_core::domain::{HostRecord, Inventory, Record, RecordKey};
use ghost_domain::fleet::VmSummary;
use ghost_domain::vm::{DesiredPower, VmState};
use ghost_domain::{ByteSize, Demand, HostId, HostName, Role, Timestamp, VmId};
use ghost_proto::core::v1 as message;

use crate::http;
use crate::world::{World, inventory, root, tenant};

const HOSTS: usize = 10_000;
const ROUNDS: usize = 21;

fn vm(number: usize) -> VmSummary {
    VmSummary {
        id: VmId::random(),
        name: format!("web-{number}"),
        state: VmState::Running,
        state_reason: String::new(),
        desired: DesiredPower::Running,
        demand: Demand {
            cpus: 2,
            memory: ByteSize::from_gib(2),
            disk: ByteSize::from_gib(20),
        },
        image: "debian-12".into(),
        addresses: vec![format!("192.168.122.{}", number + 2)],
        generation: 3,
        created_at: Timestamp::from_unix_millis(1_750_000_000_000),
        tags: [("purpose".to_owned(), "benchmark".to_owned())].into(),
        owner: None,
    }
}

fn told(at: Timestamp) -> Inventory {
    Inventory {
        vms: (0..2).map(vm).map(|vm| (vm.id, vm)).collect(),
        at,
        ..inventory()
    }
}

/// So many hosts, linked and just heard.
async fn hosts(world: &World, count: usize) {
    let like = world
        .fleet
        .read(|state| HostRecord::clone(state.host(world.host).unwrap()));
    let numbers: Vec<usize> = (0..count).collect();
    for some in numbers.chunks(50) {
        let records: Vec<HostRecord> = some
            .iter()
            .map(|number| HostRecord {
                id: HostId::random(),
                name: HostName::new(format!("host-{number}")).unwrap(),
                ..like.clone()
            })
            .collect();
        world
            .fleet
            .transact(|state| {
                let mut draft = state.draft();
                for record in &records {
                    draft.put_host(record.clone());
                    let name = RecordKey::HostName(tenant("acme"), record.name.to_string());
                    draft.put(name, Record::HostName(record.id));
                }
                Ok(draft.done(()))
            })
            .await
            .unwrap();
        for record in records {
            let live = world.fleet.live(record.id);
            live.set_linked(true);
            live.heard(world.fleet.clock().monotonic(), world.now());
            world.fleet.set_inventory(record.id, told(world.now()));
        }
    }
}

fn shown(what: &str, mut taken: Vec<Duration>) -> String {
    let first = taken[0];
    taken.sort_unstable();
    let (median, worst) = (taken[taken.len() / 2], taken[taken.len() - 1]);
    format!("{what}: first {first:.1?}, median {median:.1?}, worst {worst:.1?}")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn how_long() {
    let world = World::start().await;
    hosts(&world, HOSTS).await;
    let mut taken = Vec::new();
    let mut bytes = 0;
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        let path = "/ghost.core.v1.FleetService/ListVms";
        let request = message::ListFleetVmsRequest::default();
        let answered = world.call(&root(), path, &[], &request).await;
        taken.push(begun.elapsed());
        bytes = answered.message.len();
        assert_eq!(answered.reason(), "ok");
    }
    println!("{}", shown(&format!("ListVms, {bytes} bytes"), taken));
    let key = world.new_key(None, Role::Admin).await;
    let mut taken = Vec::new();
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        let response = http::send(&world, http::build("GET", "/v1/vms", &key, None)).await;
        assert_eq!(response.status(), StatusCode::OK);
        bytes = axum::body::to_bytes(response.into_body(), 1 << 28)
            .await
            .unwrap()
            .len();
        taken.push(begun.elapsed());
    }
    println!("{}", shown(&format!("GET /v1/vms, {bytes} bytes"), taken));
}
