//! `HostService`, `NetworkService` and `EventService`.

use ghost_proto::agent::v1::event_service_server::EventService;
use ghost_proto::agent::v1::host_service_server::HostService;
use ghost_proto::agent::v1::network_service_server::NetworkService;
use ghost_proto::agent::v1::*;
use tonic::{Request, Response, Status};

use super::{Fake, Stream, error, id_of, moment, seconds, stream};

type Answer<T> = Result<Response<T>, Status>;

fn resources(cpus: u32, memory_gib: u64, disk_gib: u64) -> Option<Resources> {
    Some(Resources {
        cpus,
        memory_bytes: memory_gib << 30,
        disk_bytes: disk_gib << 30,
    })
}

/// A host in a fleet, with its link up.
fn core_link() -> CoreLink {
    CoreLink {
        enrolled: true,
        host_id: id_of("host", "pc-at-home"),
        host_name: "pc-at-home".to_owned(),
        tenant: "acme".to_owned(),
        trust_domain: "fleet.example".to_owned(),
        addresses: vec!["core.example:7443".to_owned()],
        authority_fingerprint: "cd".repeat(32),
        certificate_expires_at: moment(86_400),
        certificate_generation: 3,
        permissions: "operate".to_owned(),
        state: "up".to_owned(),
        since: moment(0),
        carrier: "link".to_owned(),
        replica: "core-1".to_owned(),
        round_trip: seconds(0),
        ..CoreLink::default()
    }
}

#[tonic::async_trait]
impl HostService for Fake {
    async fn get_status(&self, request: Request<GetStatusRequest>) -> Answer<HostStatus> {
        self.needs_host(&request)?;
        self.note(request);
        Ok(Response::new(HostStatus {
            name: "pc-1".to_owned(),
            agent_version: "0.1.0".to_owned(),
            agent_uptime: seconds(7200),
            agent_state: "running".to_owned(),
            hostname: "pc".to_owned(),
            operating_system: "Debian GNU/Linux 12".to_owned(),
            kernel: "6.1.0".to_owned(),
            cpu_model: "Test CPU".to_owned(),
            total: resources(8, 16, 500),
            reserved: resources(2, 4, 50),
            allocatable: resources(6, 12, 450),
            committed: resources(4, 4, 20),
            memory_available_bytes: 9 << 30,
            disk_free_bytes: 300 << 30,
            load_one_minute: 0.42,
            hypervisor_state: "connected".to_owned(),
            hypervisor_state_age: seconds(7100),
            hypervisor_reason: String::new(),
            hypervisor_uri: "qemu:///system".to_owned(),
            libvirt_version: "11.3.0".to_owned(),
            hypervisor_version: "10.0.2".to_owned(),
            accelerator: "tcg".to_owned(),
            accelerator_reason: "the CPU offers no virtualisation".to_owned(),
            vms: [("running".to_owned(), 2), ("stopped".to_owned(), 1)].into(),
            open_operations: 1,
            store_engine: "sled".to_owned(),
            store_writable: true,
            store_problem: String::new(),
            warnings: vec![
                "Docker drops forwarded packets: iptables -I FORWARD -i virbr-ghost -j ACCEPT"
                    .to_owned(),
            ],
            authority_fingerprint: "ef".repeat(32),
            core: None,
        }))
    }

    async fn get_core_link(&self, request: Request<GetCoreLinkRequest>) -> Answer<CoreLink> {
        self.note(request);
        Ok(Response::new(core_link()))
    }

    async fn reconnect_core(&self, request: Request<ReconnectCoreRequest>) -> Answer<CoreLink> {
        self.note(request);
        Ok(Response::new(core_link()))
    }

    async fn allow_core_deletes(
        &self,
        request: Request<AllowCoreDeletesRequest>,
    ) -> Answer<AllowCoreDeletesResponse> {
        self.note(request);
        Ok(Response::new(AllowCoreDeletesResponse {
            until: moment(600),
        }))
    }
}

fn network(name: &str) -> Network {
    Network {
        name: name.to_owned(),
        libvirt_name: format!("ghost-{name}"),
        mode: "nat".to_owned(),
        bridge: "virbr-ghost".to_owned(),
        subnet: "10.77.0.0/24".to_owned(),
        dhcp_first: "10.77.0.2".to_owned(),
        dhcp_last: "10.77.0.254".to_owned(),
        active: true,
        leases: vec![Lease {
            mac: "52:54:00:00:00:01".to_owned(),
            address: "10.77.0.2".to_owned(),
            hostname: "evil\x1b[31m".to_owned(),
            // In the middle of a minute: the seconds until then must not show.
            expires_at: moment(1830),
            vm: "web-1".to_owned(),
        }],
    }
}

#[tonic::async_trait]
impl NetworkService for Fake {
    async fn get(&self, request: Request<GetNetworkRequest>) -> Answer<Network> {
        let name = self.note(request).name;
        if name.starts_with("absent") {
            return Err(error(
                "network_not_found",
                &format!("there is no network {name}"),
                "",
                "ghostctl network list",
            ));
        }
        Ok(Response::new(network(&name)))
    }

    async fn list(&self, request: Request<ListNetworksRequest>) -> Answer<ListNetworksResponse> {
        self.note(request);
        let networks = vec![network("default")];
        Ok(Response::new(ListNetworksResponse { networks }))
    }
}

#[tonic::async_trait]
impl EventService for Fake {
    type WatchStream = Stream<Event>;

    async fn watch(&self, request: Request<WatchEventsRequest>) -> Answer<Self::WatchStream> {
        let request = self.note(request);
        let event = |sequence, kind: &str, severity: &str, text: &str| Event {
            sequence,
            at: moment(-10),
            kind: kind.to_owned(),
            severity: severity.to_owned(),
            vm: id_of("vm", "web-1"),
            subject: "web-1".to_owned(),
            message: text.to_owned(),
            operation_id: String::new(),
            ..Event::default()
        };
        let mut events = Vec::new();
        if request.replay {
            events.push(event(1, "vm_added", "info", "made"));
            events.push(event(2, "vm_crashed", "error", "QEMU \x1b[2J crashed"));
        }
        if request.follow {
            // One was missed.
            events.push(event(4, "vm_state", "info", "running"));
        }
        Ok(Response::new(stream(|sender| async move {
            for event in events {
                let _ = sender.send(Ok(event)).await;
            }
        })))
    }
}
