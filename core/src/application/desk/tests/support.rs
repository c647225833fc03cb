//! Hosts that speak with a desk over channels, and a store that dies at a chosen commit.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use futures::stream::BoxStream;
use ghost_domain::fleet::{
    CommandOutcome, CommandStatus, CorePermissions, FleetCommand, FleetFacts, FleetLedger,
    FleetPrincipal, Verdict, VmSummary,
};
use ghost_domain::ports::Clock;
use ghost_domain::{
    ByteSize, CommandId, Demand, Error, ErrorCode, HostId, HostName, HostResources, Monotonic,
    Result, Role, TenantName, Timestamp, VmId,
};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::super::*;
use crate::domain::ports::{
    Committed, Condition, FleetStore, FleetStoreHealth, RecordChange, Write,
};
use crate::domain::{HostHealth, Stored};

pub(super) struct TurnedClock(Mutex<Duration>);

impl TurnedClock {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(Duration::from_secs(1_800_000_000))))
    }

    pub(super) fn turn(&self, by: Duration) {
        *self.0.lock() += by;
    }
}

impl Clock for TurnedClock {
    fn now(&self) -> Timestamp {
        Timestamp::default().after(*self.0.lock())
    }

    fn monotonic(&self) -> Monotonic {
        Monotonic::from_duration(*self.0.lock())
    }
}

/// A digest that tests can compute in their heads.
pub(super) fn digest(vms: &BTreeMap<VmId, VmSummary>) -> u64 {
    vms.values()
        .map(|vm| vm.generation * 100 + vm.name.len() as u64)
        .sum()
}

pub(super) fn options(replica: &str) -> DeskOptions {
    DeskOptions {
        replica: Replica {
            name: replica.into(),
            address: format!("{replica}:7443"),
            since: Timestamp::default(),
        },
        version: "1".into(),
        protocol: (1, 1),
        heartbeat_interval: Duration::from_secs(30),
        ping_interval: Duration::from_secs(5),
        digest,
    }
}

/// A Core of one replica.
pub(super) struct Core {
    pub(super) fleet: Arc<Fleet>,
    pub(super) desk: Arc<Desk>,
    pub(super) clock: Arc<TurnedClock>,
}

pub(super) async fn core(store: Arc<dyn FleetStore>, replica: &str) -> Result<Core> {
    let clock = TurnedClock::new();
    let fleet = Fleet::start(store, Arc::clone(&clock) as _).await?;
    let desk = Desk::start(Arc::clone(&fleet), options(replica)).await?;
    Ok(Core { fleet, desk, clock })
}

impl Core {
    pub(super) async fn add_host(&self) -> HostId {
        let id = HostId::random();
        self.fleet
            .transact(|state| {
                let mut draft = state.draft();
                draft.put_host(record(id));
                Ok(draft.done(()))
            })
            .await
            .unwrap();
        id
    }

    pub(super) async fn change_host(&self, host: HostId, change: impl Fn(&mut HostRecord)) {
        self.fleet
            .transact(|state| {
                let mut draft = state.draft();
                let mut record = HostRecord::clone(state.require_host(host)?);
                change(&mut record);
                draft.put_host(record);
                Ok(draft.done(()))
            })
            .await
            .unwrap();
    }

    /// A host comes.
    pub(super) fn link(&self, peer: HostPeer) -> FakeLink {
        let (to_core, from_host) = mpsc::unbounded_channel();
        let (to_host, from_core) = mpsc::unbounded_channel();
        let closed = CancellationToken::new();
        let reader = FakeReader {
            messages: from_host,
            closed: closed.clone(),
        };
        let writer = FakeWriter {
            waiting: Vec::new(),
            messages: to_host,
        };
        let streams = Arc::new(AtomicUsize::new(0));
        let transport = Arc::new(FakeTransport(closed.clone(), Arc::clone(&streams)));
        let desk = Arc::clone(&self.desk);
        let served = tokio::spawn(async move { desk.serve(peer, transport, reader, writer).await });
        FakeLink {
            to_core,
            from_core,
            served,
            streams,
            closed,
        }
    }

    /// A host comes and is let in.
    pub(super) async fn linked(&self, host: HostId) -> FakeLink {
        let mut link = self.link(peer(host));
        link.hello("a");
        assert!(matches!(link.next().await, Some(ToHost::Welcome(_))));
        link
    }

    pub(super) fn owner(&self, host: HostId) -> Option<u64> {
        self.fleet
            .read(|state| state.owner(host).map(|owner| owner.link))
    }

    pub(super) fn state(&self, host: HostId) -> String {
        self.fleet
            .host_view(host)
            .map(|view| format!("{}", view.state))
            .unwrap_or_default()
    }
}

fn record(id: HostId) -> HostRecord {
    HostRecord {
        id,
        name: HostName::new("pc").unwrap(),
        tenant: TenantName::new("acme").unwrap(),
        labels: BTreeMap::new(),
        cordoned: None,
        life: HostLife::Active,
        certificate_generation: 3,
        key_hash: [3; 32],
        previous_key_hash: Some([2; 32]),
        machine: None,
        certificate_expires_at: Timestamp::default(),
        enrolled_at: Timestamp::default(),
        agent_version: String::new(),
        permissions: CorePermissions::default(),
        facts: FleetFacts::default(),
        last_heard_at: None,
        command_generation: 0,
    }
}

pub(super) fn peer(host: HostId) -> HostPeer {
    HostPeer {
        tenant: TenantName::new("acme").unwrap(),
        host,
        generation: 3,
        key_hash: [3; 32],
        expires_at: Timestamp::from_unix_millis(i64::MAX),
    }
}

pub(super) struct FakeLink {
    pub(super) to_core: mpsc::UnboundedSender<FromHost>,
    pub(super) from_core: mpsc::UnboundedReceiver<ToHost>,
    pub(super) served: JoinHandle<()>,
    /// Streams that Core has open.
    pub(super) streams: Arc<AtomicUsize>,
    /// The link below is over.
    pub(super) closed: CancellationToken,
}

impl FakeLink {
    pub(super) fn say(&self, message: FromHost) {
        self.to_core.send(message).unwrap();
    }

    pub(super) fn hello(&self, instance: &str) {
        self.say(hello(instance, 0));
    }

    /// What Core says next, pings aside.
    pub(super) async fn next(&mut self) -> Option<ToHost> {
        loop {
            match self.from_core.recv().await {
                Some(ToHost::Ping(number)) => drop(self.to_core.send(FromHost::Pong(number))),
                other => return other,
            }
        }
    }

    pub(super) async fn goodbye(&mut self) -> &'static str {
        loop {
            match self.next().await {
                Some(ToHost::Goodbye(goodbye)) => return goodbye.code,
                Some(_) => {}
                None => return "",
            }
        }
    }
}

pub(super) fn hello(instance: &str, command_generation: u64) -> FromHost {
    FromHost::Hello(Box::new(HostHello {
        protocol_version: 1,
        agent_version: "1.2.3".into(),
        instance: instance.into(),
        command_generation,
        permissions: CorePermissions::OperateAndEnter,
        carrier: "link".into(),
        direct_addresses: Vec::new(),
        facts: FleetFacts::default(),
        machine: None,
        follows: false,
    }))
}

pub(super) fn vm(number: u128, name: &str) -> VmSummary {
    VmSummary {
        id: VmId::from_uuid(uuid::Uuid::from_u128(number)),
        name: name.into(),
        state: ghost_domain::vm::VmState::Running,
        state_reason: String::new(),
        desired: ghost_domain::vm::DesiredPower::Running,
        demand: Demand::default(),
        image: "tiny".into(),
        addresses: Vec::new(),
        generation: 1,
        created_at: Timestamp::default(),
        tags: BTreeMap::new(),
        owner: None,
    }
}

pub(super) fn beat(sequence: u64, full: bool, vms: Vec<VmSummary>, digest: u64) -> FromHost {
    FromHost::Heartbeat(Box::new(HostHeartbeat {
        sequence,
        full,
        vms,
        removed: Vec::new(),
        digest,
        total: HostResources::default(),
        allocatable: Demand {
            cpus: 8,
            memory: ByteSize::from_gib(8),
            disk: ByteSize::from_gib(100),
        },
        committed: Demand::default(),
        memory_available: ByteSize::from_gib(4),
        load_one_minute: 0.5,
        health: HostHealth {
            agent_state: "running".into(),
            hypervisor_connected: true,
            store_writable: true,
            warnings: Vec::new(),
            lockdown: false,
        },
        link: HostLinkFacts::default(),
        facts: None,
        direct_addresses: None,
    }))
}

pub(super) fn request(host: HostId, key: &str, vm: &str) -> CommandRequest {
    CommandRequest {
        host,
        request_id: Some(ghost_domain::RequestId::new(key).unwrap()),
        lifetime: None,
        issuer: FleetPrincipal {
            name: "acme/alice".into(),
            tenant: Some(TenantName::new("acme").unwrap()),
            role: Role::Operator,
        },
        action: ghost_domain::fleet::CommandAction::StartVm { vm: vm.into() },
    }
}

struct FakeReader {
    messages: mpsc::UnboundedReceiver<FromHost>,
    closed: CancellationToken,
}

impl ControlReader for FakeReader {
    async fn next(&mut self) -> Result<Option<FromHost>> {
        tokio::select! {
            biased;
            () = self.closed.cancelled() => Ok(None),
            message = self.messages.recv() => Ok(message),
        }
    }
}

struct FakeWriter {
    waiting: Vec<ToHost>,
    messages: mpsc::UnboundedSender<ToHost>,
}

impl ControlWriter for FakeWriter {
    fn queue(&mut self, message: ToHost) -> Result<()> {
        self.waiting.push(message);
        Ok(())
    }

    fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    async fn flush(&mut self) -> Result<()> {
        for message in self.waiting.drain(..) {
            // A host that is gone reads nothing.
            let _ = self.messages.send(message);
        }
        Ok(())
    }
}

struct FakeTransport(CancellationToken, Arc<AtomicUsize>);

#[async_trait]
impl LinkTransport for FakeTransport {
    async fn open(&self) -> Result<Box<dyn ByteStream>> {
        if self.0.is_cancelled() {
            return Err(Error::new(ErrorCode::HostOffline, "closed"));
        }
        let (near, _far) = tokio::io::duplex(16);
        Ok(Box::new(near))
    }

    fn streams(&self) -> usize {
        self.1.load(Ordering::SeqCst)
    }

    fn close(&self, _reason: &str) {
        self.0.cancel();
    }
}

/// What a host keeps on its disk, whatever happens to Core and to links.
#[derive(Default)]
pub(super) struct Disk {
    pub(super) ledger: FleetLedger,
    /// What it did, each time.
    pub(super) done: Vec<CommandId>,
}

impl Disk {
    fn take(&mut self, command: &FleetCommand, now: Timestamp) -> Vec<CommandOutcome> {
        let outcome = |status| CommandOutcome {
            id: command.id,
            generation: command.generation,
            status,
            operation: None,
            code: None,
            message: String::new(),
            at: now,
        };
        match self.ledger.judge(command, now) {
            Verdict::Take => {
                self.ledger.epoch = command.epoch;
                self.ledger.generation = command.generation;
                self.done.push(command.id);
                let last = outcome(CommandStatus::Succeeded);
                self.ledger.unreported.push_back(last.clone());
                vec![outcome(CommandStatus::Accepted), last]
            }
            Verdict::Expired => {
                self.ledger.generation = command.generation;
                let last = outcome(CommandStatus::Expired);
                self.ledger.unreported.push_back(last.clone());
                vec![last]
            }
            Verdict::Known(known) => known.into_iter().collect(),
            Verdict::Stale(_) => Vec::new(),
        }
    }
}

/// A host that takes commands by the rules, until its link ends.
pub(super) async fn obey(mut link: FakeLink, disk: Arc<Mutex<Disk>>, now: Timestamp) {
    let (generation, unreported) = {
        let disk = disk.lock();
        (disk.ledger.generation, disk.ledger.unreported.clone())
    };
    link.say(hello("a", generation));
    for outcome in unreported {
        link.say(FromHost::Outcome(Box::new(outcome)));
    }
    while let Some(message) = link.next().await {
        match message {
            ToHost::Command { command, .. } => {
                for outcome in disk.lock().take(&command, now) {
                    drop(link.to_core.send(FromHost::Outcome(Box::new(outcome))));
                }
            }
            ToHost::CommandKept(generation) => {
                disk.lock()
                    .ledger
                    .unreported
                    .retain(|one| one.generation != generation || !one.status.is_finished());
            }
            ToHost::Goodbye(_) => return,
            _ => {}
        }
    }
}

/// A store whose process dies at one commit: before it took effect, or after. From then on nothing
/// is answered any more.
pub(super) struct Dying {
    pub(super) inner: Arc<dyn FleetStore>,
    pub(super) left: AtomicUsize,
    pub(super) after: bool,
    pub(super) died: CancellationToken,
    pub(super) commits: AtomicUsize,
}

impl Dying {
    pub(super) fn at(inner: Arc<dyn FleetStore>, left: usize, after: bool) -> Arc<Self> {
        Arc::new(Self {
            inner,
            left: AtomicUsize::new(left),
            after,
            died: CancellationToken::new(),
            commits: AtomicUsize::new(0),
        })
    }
}

#[async_trait]
impl FleetStore for Dying {
    async fn load(&self) -> Result<(u64, Vec<Stored>)> {
        self.inner.load().await
    }

    async fn watch(&self, revision: u64) -> Result<BoxStream<'static, Vec<RecordChange>>> {
        self.inner.watch(revision).await
    }

    async fn commit(&self, conditions: Vec<Condition>, writes: Vec<Write>) -> Result<Committed> {
        if self.died.is_cancelled() {
            return std::future::pending().await;
        }
        self.commits.fetch_add(1, Ordering::SeqCst);
        if self.left.fetch_sub(1, Ordering::SeqCst) == 0 {
            self.died.cancel();
            if self.after {
                self.inner.commit(conditions, writes).await?;
            }
            return std::future::pending().await;
        }
        self.inner.commit(conditions, writes).await
    }

    fn is_shared(&self) -> bool {
        self.inner.is_shared()
    }

    async fn lease_lost(&self) {
        self.inner.lease_lost().await;
    }

    async fn health(&self) -> FleetStoreHealth {
        self.inner.health().await
    }

    async fn close(&self) -> Result<()> {
        self.inner.close().await
    }
}
