//! A Core with a host, in memory: records, the door, the way through, an agent at the end.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use axum::http::{HeaderMap, Request, Response};
use bytes::{BufMut, Bytes, BytesMut};
use ghost_core::application::callers::Callers;
use ghost_core::application::desk::{Desk, DeskOptions};
use ghost_core::application::events::Chronicle;
use ghost_core::application::fleet::Fleet;
use ghost_core::application::quota_check::Admission;
use ghost_core::domain::ports::FleetAuthority;
use ghost_core::domain::{
    FleetKey, HostHealth, HostLife, HostRecord, Inventory, Labels, Ownership, PeerIdentity, Quota,
    Record, RecordKey, Replica, Tenant, User, UserSource,
};
use ghost_core::infrastructure::audit::FileFleetAudit;
use ghost_core::infrastructure::store::MemoryStore;
use ghost_core::presentation::grpc::{Front, FrontOptions, Limits, Parts};
use ghost_core::presentation::route::{PoolOptions, Router};
use ghost_core::presentation::{Peer, PeerKind};
use ghost_domain::fleet::{CorePermissions, FleetFacts};
use ghost_domain::ports::IssuedCertificate;
use ghost_domain::{
    ByteSize, CredentialId, Demand, Error, ErrorCode, HostId, HostName, HostResources, Result,
    Role, Secret, TenantName, Timestamp,
};
use ghost_infrastructure::clock::SystemClock;
use ghost_presentation::metrics::Recorder;
use http_body::Body as _;
use prost::Message;
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::agent::{FakeAgent, MemoryLinks};

/// Signs nothing.
pub(crate) struct Seal;

#[async_trait]
impl FleetAuthority for Seal {
    async fn sign_host(
        &self,
        _: &str,
        _: &TenantName,
        _: HostId,
        _: u64,
    ) -> Result<(IssuedCertificate, [u8; 32])> {
        Err(Error::new(ErrorCode::InvalidArgument, "the seal is broken"))
    }

    async fn sign_user(&self, _: &str, _: CredentialId, _: &str) -> Result<IssuedCertificate> {
        Err(Error::new(ErrorCode::InvalidArgument, "the seal is broken"))
    }

    fn peer(&self, _: &[u8]) -> Result<PeerIdentity> {
        Err(Error::new(ErrorCode::Unauthenticated, "the seal is broken"))
    }

    fn former_peer(&self, _: &str, _: &str, _: &[u8]) -> Result<(PeerIdentity, Timestamp)> {
        Err(Error::new(ErrorCode::Unauthenticated, "the seal is broken"))
    }

    fn fingerprint(&self) -> String {
        "f".repeat(64)
    }

    fn trust_domain(&self) -> &str {
        "ghost.test"
    }
}

pub(crate) struct World {
    pub(crate) fleet: Arc<Fleet>,
    pub(crate) links: Arc<MemoryLinks>,
    pub(crate) agent: Arc<FakeAgent>,
    pub(crate) front: Arc<Front>,
    pub(crate) admission: Arc<Admission>,
    pub(crate) audit: Arc<FileFleetAudit>,
    /// The host `pc` of the tenant acme.
    pub(crate) host: HostId,
    pub(crate) stop: CancellationToken,
    _folder: tempfile::TempDir,
}

pub(crate) fn tenant(name: &str) -> TenantName {
    TenantName::new(name).unwrap()
}

pub(crate) fn inventory() -> Inventory {
    Inventory {
        total: HostResources {
            cpus: 8,
            memory: ByteSize::from_gib(16),
            ..HostResources::default()
        },
        allocatable: Demand {
            cpus: 32,
            memory: ByteSize::from_gib(16),
            disk: ByteSize::from_gib(500),
        },
        health: HostHealth {
            agent_state: "running".into(),
            hypervisor_connected: true,
            store_writable: true,
            ..HostHealth::default()
        },
        ..Inventory::default()
    }
}

impl World {
    pub(crate) async fn start() -> Self {
        Self::with(FrontOptions {
            recheck: Duration::from_millis(50),
            // Everybody calls from one address here, and a matrix calls as fast as it can.
            limits: Limits {
                per_second: NonZeroU32::MAX,
                burst: NonZeroU32::MAX,
            },
            ..FrontOptions::default()
        })
        .await
    }

    pub(crate) async fn with(options: FrontOptions) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let clock = Arc::new(SystemClock::new());
        let fleet = Fleet::start(MemoryStore::new(), clock.clone())
            .await
            .unwrap();
        let links = Arc::new(MemoryLinks::default());
        let audit = Arc::new(FileFleetAudit::open(folder.path(), clock).unwrap());
        let admission = Arc::new(Admission::new(Arc::clone(&fleet)));
        let desk = Desk::start(
            Arc::clone(&fleet),
            DeskOptions {
                replica: Replica {
                    name: "core".into(),
                    address: "127.0.0.1:7443".into(),
                    since: fleet.clock().now(),
                },
                version: "1".into(),
                protocol: (1, 1),
                heartbeat_interval: Duration::from_secs(30),
                ping_interval: Duration::from_secs(5),
                digest: |_| 0,
            },
        )
        .await
        .unwrap();
        let stop = CancellationToken::new();
        let front = Front::new(
            Parts {
                fleet: Arc::clone(&fleet),
                links: links.clone(),
                router: Arc::new(Router::new(links.clone(), None, PoolOptions::default())),
                callers: Arc::new(Callers::new(Arc::clone(&fleet), None)),
                admission: Arc::clone(&admission),
                audit: audit.clone(),
                recorder: Recorder::new(),
                desk,
                authority: Arc::new(Seal),
                events: Chronicle::start(&fleet),
            },
            options,
            stop.clone(),
        )
        .unwrap();
        let mut world = Self {
            fleet,
            links,
            agent: FakeAgent::start(),
            front,
            admission,
            audit,
            host: HostId::random(),
            stop,
            _folder: folder,
        };
        world
            .add_tenant("acme", Quota::default(), Quota::default())
            .await;
        world
            .add_tenant("other", Quota::default(), Quota::default())
            .await;
        world.host = world.add_host("acme", "pc").await;
        world
            .links
            .0
            .lock()
            .insert(world.host, Arc::clone(&world.agent));
        world
    }

    pub(crate) async fn put(&self, key: RecordKey, record: Record) {
        self.fleet
            .transact(|state| {
                let mut draft = state.draft();
                draft.put(key.clone(), record.clone());
                Ok(draft.done(()))
            })
            .await
            .unwrap();
    }

    pub(crate) fn now(&self) -> Timestamp {
        self.fleet.clock().now()
    }

    pub(crate) async fn add_tenant(&self, name: &str, quota: Quota, user_quota: Quota) {
        let record = Tenant {
            name: tenant(name),
            quota,
            user_quota,
            created_at: self.now(),
        };
        self.put(RecordKey::Tenant(tenant(name)), Record::Tenant(record))
            .await;
    }

    /// A host that is online, with room.
    pub(crate) async fn add_host(&self, of: &str, name: &str) -> HostId {
        let (id, now) = (HostId::random(), self.now());
        let record = HostRecord {
            id,
            name: HostName::new(name).unwrap(),
            tenant: tenant(of),
            labels: Labels::new(),
            cordoned: None,
            life: HostLife::Active,
            certificate_generation: 1,
            key_hash: [0; 32],
            previous_key_hash: None,
            machine: None,
            certificate_expires_at: now,
            enrolled_at: now,
            agent_version: "0.1.0".into(),
            permissions: CorePermissions::OperateAndEnter,
            facts: FleetFacts::default(),
            last_heard_at: Some(now),
            command_generation: 0,
        };
        self.put(RecordKey::Host(id), Record::Host(Box::new(record)))
            .await;
        self.put(
            RecordKey::HostName(tenant(of), name.to_owned()),
            Record::HostName(id),
        )
        .await;
        let owner = Ownership {
            host: id,
            replica: "core".into(),
            link: 1,
            since: now,
        };
        self.put(RecordKey::Owner(id), Record::Owner(owner)).await;
        let told = Record::Inventory(Box::new(inventory()));
        self.put(RecordKey::Inventory(id), told).await;
        id
    }

    pub(crate) async fn change_host(&self, id: HostId, change: impl Fn(&mut HostRecord)) {
        self.fleet
            .transact(|state| {
                let mut host = HostRecord::clone(state.require_host(id)?);
                change(&mut host);
                let mut draft = state.draft();
                draft.put_host(host);
                Ok(draft.done(()))
            })
            .await
            .unwrap();
    }

    /// A key's record and its text.
    pub(crate) fn key(&self, of: Option<&str>, role: Role) -> (FleetKey, Secret) {
        let id = CredentialId::random();
        let key = FleetKey {
            id,
            secret_hash: Sha256::digest(b"hidden").into(),
            name: format!("{}-{role}", of.unwrap_or("root")),
            tenant: of.map(tenant),
            role,
            hosts: None,
            created_at: self.now(),
            expires_at: self.now().after(Duration::from_secs(3600)),
            revoked_at: None,
        };
        (key, Secret::new(format!("ghost_{id}_hidden")))
    }

    pub(crate) async fn add_key(&self, key: FleetKey) {
        self.put(RecordKey::Key(key.id), Record::Key(key)).await;
    }

    /// A key that is good, as text.
    pub(crate) async fn new_key(&self, of: Option<&str>, role: Role) -> String {
        let (key, secret) = self.key(of, role);
        self.add_key(key).await;
        secret.expose().to_owned()
    }

    pub(crate) async fn add_user(&self, of: Option<&str>, name: &str, role: Role) -> User {
        let user = User {
            id: CredentialId::random(),
            name: name.into(),
            tenant: of.map(tenant),
            role,
            source: UserSource::Certificate {
                expires_at: self.now(),
            },
            quota: None,
            created_at: self.now(),
            revoked_at: None,
        };
        self.put(RecordKey::User(user.id), Record::User(user.clone()))
            .await;
        user
    }

    /// Somebody with a certificate that is good for an hour.
    pub(crate) fn certified(&self, identity: PeerIdentity) -> Peer {
        Peer {
            address: None,
            kind: PeerKind::Certified {
                identity: Ok(identity),
                expires_at: self.now().after(Duration::from_secs(3600)),
            },
        }
    }

    /// A call by whoever has `key`.
    pub(crate) async fn by_key<M: Message>(
        &self,
        key: &str,
        path: &str,
        host: Option<&str>,
        message: &M,
    ) -> Answered {
        let key = format!("Bearer {key}");
        let mut headers = vec![("authorization", key.as_str())];
        headers.extend(host.map(|host| ("ghost-host", host)));
        self.call(&nobody(), path, &headers, message).await
    }

    pub(crate) async fn call<M: Message>(
        &self,
        peer: &Peer,
        path: &str,
        headers: &[(&str, &str)],
        message: &M,
    ) -> Answered {
        Answered::read(self.front.call(peer, request(path, headers, message)).await).await
    }
}

/// Somebody who shows nothing.
pub(crate) fn nobody() -> Peer {
    Peer {
        address: Some([192, 0, 2, 1].into()),
        kind: PeerKind::Nobody,
    }
}

/// A process of root on Core's machine.
pub(crate) fn root() -> Peer {
    Peer {
        address: None,
        kind: PeerKind::Local {
            uid: 0,
            name: "root".into(),
            admitted: true,
        },
    }
}

/// A unary call's request.
pub(crate) fn request<M: Message>(
    path: &str,
    headers: &[(&str, &str)],
    message: &M,
) -> Request<Body> {
    let body = message.encode_to_vec();
    let mut framed = BytesMut::new();
    framed.put_u8(0);
    framed.put_u32(u32::try_from(body.len()).unwrap());
    framed.put_slice(&body);
    let mut request = Request::post(format!("http://core{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request
        .body(Body::new(axum::body::Body::from(framed.freeze())))
        .unwrap()
}

/// What came back.
#[derive(Debug)]
pub(crate) struct Answered {
    pub(crate) headers: HeaderMap,
    pub(crate) message: Bytes,
    pub(crate) status: Status,
}

impl Answered {
    async fn read(response: Response<Body>) -> Self {
        let (parts, mut body) = response.into_parts();
        let mut message = BytesMut::new();
        let mut trailers = None;
        loop {
            let frame =
                std::future::poll_fn(|context| std::pin::Pin::new(&mut body).poll_frame(context));
            let waited = tokio::time::timeout(Duration::from_secs(20), frame).await;
            match waited.expect("the answer never ended") {
                None => break,
                Some(frame) => match frame.unwrap().into_data() {
                    Ok(data) => message.put(data),
                    Err(frame) => trailers = frame.into_trailers().ok(),
                },
            }
        }
        let status = trailers
            .as_ref()
            .and_then(Status::from_header_map)
            .or_else(|| Status::from_header_map(&parts.headers))
            .expect("an answer without a status");
        Self {
            headers: parts.headers,
            message: message.freeze(),
            status,
        }
    }

    /// The stable code, or `ok`.
    pub(crate) fn reason(&self) -> String {
        reason(&self.status)
    }

    pub(crate) fn message<M: Message + Default>(&self) -> M {
        assert_eq!(self.status.code(), Code::Ok, "{:?}", self.status);
        M::decode(&self.message[5..]).unwrap()
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers[name].to_str().unwrap()
    }
}

pub(crate) fn reason(status: &Status) -> String {
    match status.code() {
        Code::Ok => "ok".to_owned(),
        code => status
            .get_details_error_info()
            .map_or_else(|| format!("{code:?}"), |info| info.reason),
    }
}
