//! `FleetService.ListVms`: the one answer that is large by its nature, for twenty thousand VMs some
//! megabytes. Made as one message it would be a quarter of a million small allocations first and bytes
//! afterwards; here each VM is written down as soon as it is looked at, through one message that is
//! used again and again. On the wire it is the same.

use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::http;
use bytes::{BufMut, Bytes, BytesMut};
use futures::future::BoxFuture;
use ghost_domain::Timestamp;
use ghost_proto::core::v1 as message;
use prost::Message;
use prost::encoding::{WireType, encode_key};
use tonic::body::Body;
use tonic::codec::{BufferSettings, Codec, EncodeBuf, Encoder};
use tonic::server::{Grpc, NamedService, UnaryService};
use tonic::{Request, Status};
use tonic_prost::{ProstCodec, ProstDecoder};
use tower::Service;

use super::Answer;
use super::fleet::Fleets;
use crate::application::vms::ListedHost;
use crate::presentation::convert;

const PATH: &str = "/ghost.core.v1.FleetService/ListVms";
/// `ListFleetVmsResponse.vms`.
const VMS: u32 = 1;
/// About what one VM takes.
const ONE: usize = 256;

/// A `ListFleetVmsResponse`, encoded.
///
/// # Errors
/// Where there is no room left: never, as the buffer grows.
pub(super) fn encode(hosts: &[ListedHost], now: Timestamp) -> Result<Bytes, prost::EncodeError> {
    let mut bytes = BytesMut::with_capacity(ONE * hosts.len());
    let mut scratch = message::FleetVm::default();
    for host in hosts {
        convert::listed_host(&mut scratch, host, now);
        for vm in host.vms() {
            convert::listed_vm(&mut scratch, vm);
            encode_key(VMS, WireType::LengthDelimited, &mut bytes);
            scratch.encode_length_delimited(&mut bytes)?;
        }
    }
    Ok(bytes.freeze())
}

/// The service, with this one call answered from here.
#[derive(Clone)]
pub(super) struct Listing<S> {
    pub(super) rest: S,
    pub(super) fleets: Arc<Fleets>,
}

impl<S: NamedService> NamedService for Listing<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<http::Request<Body>> for Listing<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.rest.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        if request.uri().path() != PATH {
            return Box::pin(self.rest.call(request));
        }
        let listed = List(Arc::clone(&self.fleets));
        Box::pin(async move { Ok(Grpc::new(Encoded).unary(listed, request).await) })
    }
}

struct List(Arc<Fleets>);

impl UnaryService<message::ListFleetVmsRequest> for List {
    type Response = Bytes;
    type Future = BoxFuture<'static, Answer<Bytes>>;

    fn call(&mut self, request: Request<message::ListFleetVmsRequest>) -> Self::Future {
        let answer = self.0.listed_vms(request);
        Box::pin(async move { answer })
    }
}

/// Answers that are bytes already.
struct Encoded;

impl Codec for Encoded {
    type Encode = Bytes;
    type Decode = message::ListFleetVmsRequest;
    type Encoder = Copied;
    type Decoder = ProstDecoder<Self::Decode>;

    fn encoder(&mut self) -> Copied {
        Copied
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstCodec::<message::ListFleetVmsResponse, Self::Decode>::raw_decoder(
            BufferSettings::default(),
        )
    }
}

struct Copied;

impl Encoder for Copied {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.reserve(item.len());
        buffer.put(item);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use ghost_domain::fleet::{CorePermissions, FleetFacts, VmSummary};
    use ghost_domain::vm::{DesiredPower, VmState};
    use ghost_domain::{ByteSize, Demand, HostId, HostName, Role, TenantName, VmId};
    use ghost_infrastructure::clock::SystemClock;
    use ghost_proto::agent::v1 as agent;

    use super::*;
    use crate::application::fleet::Fleet;
    use crate::application::vms::{ListVms, ListVmsQuery};
    use crate::domain::{
        Caller, CallerSource, HostLife, HostRecord, Inventory, Labels, Record, RecordKey, Tenant,
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
            tags: BTreeMap::from([("a".into(), "b".into()), ("c".into(), "d".into())]),
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
        let listed = ListVms { fleet }
            .execute(&caller, ListVmsQuery::default())
            .unwrap();
        let answer = message::ListFleetVmsResponse::decode(encode(&listed, now).unwrap()).unwrap();

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
                BTreeMap::from([("a".into(), "b".into()), ("c".into(), "d".into())])
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
    }
}
