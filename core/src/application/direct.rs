//! Direct ways: connections that Core makes to a host's own listener, where the host says that it can
//! be dialled and Core's owner allows that address.
//!
//! ```text
//! hello with addresses ─> DirectPolicy ─> dial (TLS: it is that host) ─> a round trip ─> used
//!                            │ no                │ no                        │ no
//!                            └───────────────────┴───> the link, and later once more
//! ```
//!
//! - The link stays what says that a host is there: it carries heartbeats and commands. A direct way
//!   only takes calls off it, and a host without a link is offline.
//! - A way counts while data frames come back over it. Before a call after a silence it is tried by a
//!   round trip; where that fails the call takes the link at once.
//! - New calls follow the best way; those under way stay where they are ([`HostLinks::way`]).
//!
//! [`HostLinks::way`]: super::links::HostLinks::way

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Weak};
use std::time::Duration;

use async_trait::async_trait;
use ghost_domain::{HostId, Result, TenantName};
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::fleet::Fleet;
use super::links::ByteStream;
use crate::domain::{DirectPolicy, HostLife};

/// A way that was silent for longer is tried before it is used.
const FRESH: Duration = Duration::from_secs(1);
/// How long a round trip may take, of a way that had shown that it works.
const TRIAL: Duration = Duration::from_secs(1);
/// How long dialling and the first round trip may take together.
const DIALLING: Duration = Duration::from_secs(10);
/// Waits between tries.
const FIRST_WAIT: Duration = Duration::from_secs(5);
const LONGEST_WAIT: Duration = Duration::from_secs(300);
/// Dialled at once, over all hosts.
const MOST_DIALLING: usize = 32;
/// A way gets a successor after this, by the certificates of that time.
const RENEWED: Duration = Duration::from_secs(6 * 3600);
/// How long a way outlives its host's link: one that comes back at once finds it as it was.
const LINGER: Duration = Duration::from_secs(60);
/// How long calls may go on over a way that has a successor.
const DRAIN: Duration = Duration::from_secs(6 * 3600);

/// A connection to a host's own listener.
#[async_trait]
pub trait DirectWay: Send + Sync {
    /// Opens a stream.
    ///
    /// # Errors
    /// `HostOffline` where the connection is over; `TooManyRequests`.
    async fn open(&self) -> Result<Box<dyn ByteStream>>;

    /// Sends a data frame and waits for its answer. May be dropped.
    ///
    /// # Errors
    /// `HostOffline` where the connection is over.
    async fn try_out(&self) -> Result<()>;

    /// For how long nothing came.
    fn silence(&self) -> Duration;

    /// Whether it is over.
    fn is_over(&self) -> bool;

    /// Streams that are open, beside that for trials.
    fn streams(&self) -> usize;

    /// Ends it, with all streams.
    fn close(&self, reason: &str);
}

/// Makes direct ways.
#[async_trait]
pub trait DirectDialer: Send + Sync {
    /// Connects to `address`, where nobody but this host is accepted: nothing but TLS's own hello is
    /// sent before that is proved.
    ///
    /// # Errors
    /// `HostOffline`, `Unauthenticated`.
    async fn dial(
        &self,
        tenant: &TenantName,
        host: HostId,
        address: SocketAddr,
    ) -> Result<Arc<dyn DirectWay>>;
}

/// What is shown of a host's direct way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DirectInfo {
    /// The address in use.
    pub used: Option<String>,
    /// Why none is; empty where one is.
    pub problem: String,
}

/// The direct ways of this replica's hosts.
pub struct Directs {
    fleet: Arc<Fleet>,
    dialer: Arc<dyn DirectDialer>,
    policy: DirectPolicy,
    ping_interval: Duration,
    room: Semaphore,
    hosts: Mutex<HashMap<HostId, Arc<Entry>>>,
}

impl std::fmt::Debug for Directs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Directs")
            .field("policy", &self.policy)
            .field("hosts", &self.hosts.lock().len())
            .finish_non_exhaustive()
    }
}

/// One host.
struct Entry {
    host: HostId,
    tenant: TenantName,
    named: Vec<(String, String)>,
    now: Mutex<Now>,
    /// The way in use failed.
    failed: Notify,
    task: Mutex<Option<AbortOnDropHandle<()>>>,
}

#[derive(Default)]
struct Now {
    used: Option<Used>,
    problem: String,
    /// Since when the host has no link.
    left: Option<Instant>,
}

#[derive(Clone)]
struct Used {
    way: Arc<dyn DirectWay>,
    number: u64,
    address: SocketAddr,
}

impl Entry {
    fn used(&self) -> Option<Used> {
        self.now.lock().used.clone()
    }

    /// Gives the way of this number up, so that everything goes over the link.
    fn fail(&self, number: u64, why: &str) {
        let failed = {
            let mut now = self.now.lock();
            let failed = now.used.take_if(|used| used.number == number);
            if let Some(used) = &failed {
                now.problem = format!("{}: {why}", used.address);
            }
            failed
        };
        if let Some(used) = failed {
            tracing::info!(host = %self.host, address = %used.address, why, "a direct way failed; calls take the link");
            used.way.close(why);
            self.failed.notify_one();
        }
    }
}

impl Directs {
    /// Dials what `policy` allows. `ping_interval`: how often a way is tried.
    pub fn new(
        fleet: Arc<Fleet>,
        dialer: Arc<dyn DirectDialer>,
        policy: DirectPolicy,
        ping_interval: Duration,
    ) -> Arc<Self> {
        Arc::new(Self {
            fleet,
            dialer,
            policy,
            ping_interval,
            room: Semaphore::new(MOST_DIALLING),
            hosts: Mutex::default(),
        })
    }

    /// A host's link came, and it said where it can be dialled. Call it within a Tokio runtime.
    pub(crate) fn linked(
        self: &Arc<Self>,
        tenant: &TenantName,
        host: HostId,
        named: Vec<(String, String)>,
    ) {
        let mut hosts = self.hosts.lock();
        if let Some(known) = hosts.get(&host)
            && known.named == named
        {
            known.now.lock().left = None;
            return;
        }
        let before = if named.is_empty() {
            hosts.remove(&host)
        } else {
            let entry = Arc::new(Entry {
                host,
                tenant: tenant.clone(),
                named,
                now: Mutex::default(),
                failed: Notify::new(),
                task: Mutex::default(),
            });
            let kept = keep(Arc::downgrade(self), Arc::clone(&entry));
            *entry.task.lock() = Some(AbortOnDropHandle::new(tokio::spawn(kept)));
            hosts.insert(host, entry)
        };
        drop(hosts);
        if let Some(before) = before {
            before.task.lock().take();
            if let Some(used) = before.now.lock().used.take() {
                let until = Instant::now() + LINGER;
                tokio::spawn(drain(Arc::downgrade(self), host, used.way, until));
            }
        }
    }

    /// A host's link ended, and no other took its place.
    pub(crate) fn left(&self, host: HostId) {
        let Some(entry) = self.hosts.lock().get(&host).cloned() else {
            return;
        };
        if self.is_admitted(host) {
            entry.now.lock().left.get_or_insert_with(Instant::now);
        } else {
            self.forget(host, "the host is not let in any more");
        }
    }

    fn is_admitted(&self, host: HostId) -> bool {
        self.fleet.read(|state| {
            state
                .host(host)
                .is_some_and(|record| record.life == HostLife::Active)
        })
    }

    fn forget(&self, host: HostId, why: &str) {
        let entry = self.hosts.lock().remove(&host);
        if let Some(entry) = entry {
            if let Some(used) = entry.now.lock().used.take() {
                used.way.close(why);
            }
            // Last: it may be the one that calls.
            entry.task.lock().take();
        }
    }

    /// What is shown of a host.
    pub(crate) fn info(&self, host: HostId) -> DirectInfo {
        let entry = self.hosts.lock().get(&host).cloned();
        let Some(entry) = entry else {
            return DirectInfo {
                used: None,
                problem: "the host names no address of its own (network.provider there)".into(),
            };
        };
        let now = entry.now.lock();
        match &now.used {
            Some(used) => DirectInfo {
                used: Some(used.address.to_string()),
                problem: String::new(),
            },
            None if now.problem.is_empty() => DirectInfo {
                used: None,
                problem: "it is being tried".into(),
            },
            None => DirectInfo {
                used: None,
                problem: now.problem.clone(),
            },
        }
    }

    /// The number of the way that a call would take now, where there is one that works.
    pub(crate) async fn number(&self, host: HostId) -> Option<u64> {
        self.working(host).await.map(|used| used.number)
    }

    /// A stream over a way that works.
    pub(crate) async fn open(&self, host: HostId) -> Option<Box<dyn ByteStream>> {
        let used = self.working(host).await?;
        match used.way.open().await {
            Ok(stream) => Some(stream),
            Err(error) => {
                tracing::debug!(%host, %error, "a direct way takes no stream");
                if used.way.is_over() {
                    let entry = self.hosts.lock().get(&host).cloned()?;
                    entry.fail(used.number, "the connection ended");
                }
                None
            }
        }
    }

    async fn working(&self, host: HostId) -> Option<Used> {
        let entry = self.hosts.lock().get(&host).cloned()?;
        let used = entry.used()?;
        if used.way.is_over() {
            entry.fail(used.number, "the connection ended");
            return None;
        }
        if used.way.silence() < FRESH {
            return Some(used);
        }
        match tokio::time::timeout(TRIAL, used.way.try_out()).await {
            Ok(Ok(())) => Some(used),
            Ok(Err(_)) => {
                entry.fail(used.number, "the connection ended");
                None
            }
            Err(_) => {
                entry.fail(used.number, "nothing came back for a second");
                None
            }
        }
    }

    /// Dials one after the other what the host named and the policy allows.
    async fn dial(&self, entry: &Entry) -> std::result::Result<Used, String> {
        let mut problem = String::new();
        for (_, named) in &entry.named {
            let address = match self.policy.check(named) {
                Ok(address) => address,
                Err(why) => {
                    if problem.is_empty() {
                        problem = format!("{named} is not dialled: {why}");
                    }
                    continue;
                }
            };
            let Ok(_place) = self.room.acquire().await else {
                continue;
            };
            let proved = async {
                let way = self.dialer.dial(&entry.tenant, entry.host, address).await?;
                way.try_out().await?;
                Ok::<_, ghost_domain::Error>(way)
            };
            match tokio::time::timeout(DIALLING, proved).await {
                Ok(Ok(way)) => {
                    return Ok(Used {
                        way,
                        // Never that of a link, by all likelihood.
                        number: rand::random(),
                        address,
                    });
                }
                Ok(Err(error)) => {
                    tracing::debug!(host = %entry.host, %address, %error, "a direct way cannot be made");
                }
                Err(_) => {
                    tracing::debug!(host = %entry.host, %address, "a direct way cannot be made in time");
                }
            }
            // No more is told: what answers at which address is nobody's business who can make a
            // host name it.
            problem = format!("{address} does not answer as this host");
        }
        Err(problem)
    }
}

/// Looks after a host's direct way until the host is forgotten.
async fn keep(directs: Weak<Directs>, entry: Arc<Entry>) {
    let mut wait = FIRST_WAIT;
    // Not all at once, where all hosts come at once.
    tokio::time::sleep(Duration::from_millis(rand::random_range(0..500))).await;
    loop {
        let Some(directs) = directs.upgrade() else {
            return;
        };
        match directs.dial(&entry).await {
            Ok(used) => {
                tracing::info!(host = %entry.host, address = %used.address, "calls go to a host directly");
                wait = FIRST_WAIT;
                let before = {
                    let mut now = entry.now.lock();
                    now.problem.clear();
                    now.used.replace(used)
                };
                if let Some(before) = before {
                    let (all, until) = (Arc::downgrade(&directs), Instant::now() + DRAIN);
                    tokio::spawn(drain(all, entry.host, before.way, until));
                }
                if !hold(directs, &entry).await {
                    return;
                }
            }
            Err(problem) => {
                if entry.used().is_none() {
                    entry.now.lock().problem = problem;
                }
                let until = Instant::now() + wait.mul_f64(rand::random_range(0.75..=1.25));
                wait = (wait * 2).min(LONGEST_WAIT);
                while Instant::now() < until {
                    let look = directs.ping_interval.min(until - Instant::now());
                    tokio::time::sleep(look).await;
                    if !is_wanted(&directs, &entry) {
                        return;
                    }
                }
            }
        }
    }
}

/// Tries the way again and again. Returns when it failed or should have a successor (`true`), or the
/// host is gone (`false`).
async fn hold(directs: Arc<Directs>, entry: &Entry) -> bool {
    let begun = Instant::now();
    loop {
        tokio::select! {
            () = entry.failed.notified() => {}
            () = tokio::time::sleep(directs.ping_interval) => {}
        }
        if !is_wanted(&directs, entry) {
            return false;
        }
        if entry.used().is_none() {
            // The wait is for whatever made it fail.
            tokio::time::sleep(Duration::from_secs(1)).await;
            return true;
        }
        directs.working(entry.host).await;
        if begun.elapsed() >= RENEWED {
            return true;
        }
    }
}

/// Whether the host may still be reached; it is forgotten where not.
fn is_wanted(directs: &Directs, entry: &Entry) -> bool {
    let lost = entry
        .now
        .lock()
        .left
        .is_some_and(|left| left.elapsed() >= LINGER);
    if lost {
        directs.forget(entry.host, "the host has no link any more");
        false
    } else if directs.is_admitted(entry.host) {
        true
    } else {
        directs.forget(entry.host, "the host is not let in any more");
        false
    }
}

/// Closes a way once the calls over it have ended, the host is not let in any more, or at that time.
async fn drain(directs: Weak<Directs>, host: HostId, way: Arc<dyn DirectWay>, until: Instant) {
    while way.streams() > 0
        && !way.is_over()
        && Instant::now() < until
        && directs.upgrade().is_some_and(|all| all.is_admitted(host))
    {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    way.close("another way took its place");
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use ghost_domain::fleet::{CorePermissions, FleetFacts};
    use ghost_domain::{Error, ErrorCode, HostName, Timestamp};
    use ghost_infrastructure::clock::SystemClock;

    use super::*;
    use crate::domain::HostRecord;
    use crate::infrastructure::store::MemoryStore;

    const GOOD: &str = "192.168.50.2:9090";

    /// Hosts that answer, or do not, as the test says.
    #[derive(Default)]
    struct World {
        answers: AtomicBool,
        /// What comes back over ways that stand.
        carries: AtomicBool,
        dialled: Mutex<Vec<SocketAddr>>,
        open: AtomicUsize,
        closed: AtomicUsize,
    }

    struct FakeDialer(Arc<World>);

    struct FakeWay {
        world: Arc<World>,
        over: AtomicBool,
    }

    fn away() -> Error {
        Error::new(ErrorCode::HostOffline, "away")
    }

    #[async_trait]
    impl DirectDialer for FakeDialer {
        async fn dial(
            &self,
            _: &TenantName,
            _: HostId,
            address: SocketAddr,
        ) -> Result<Arc<dyn DirectWay>> {
            self.0.dialled.lock().push(address);
            if self.0.answers.load(Ordering::SeqCst) {
                Ok(Arc::new(FakeWay {
                    world: Arc::clone(&self.0),
                    over: AtomicBool::new(false),
                }))
            } else {
                Err(away())
            }
        }
    }

    #[async_trait]
    impl DirectWay for FakeWay {
        async fn open(&self) -> Result<Box<dyn ByteStream>> {
            if self.over.load(Ordering::SeqCst) {
                return Err(away());
            }
            self.world.open.fetch_add(1, Ordering::SeqCst);
            Ok(Box::new(tokio::io::duplex(64).0))
        }

        async fn try_out(&self) -> Result<()> {
            if self.world.carries.load(Ordering::SeqCst) {
                Ok(())
            } else {
                std::future::pending().await
            }
        }

        fn silence(&self) -> Duration {
            Duration::from_secs(5)
        }

        fn is_over(&self) -> bool {
            self.over.load(Ordering::SeqCst)
        }

        fn streams(&self) -> usize {
            0
        }

        fn close(&self, _: &str) {
            if !self.over.swap(true, Ordering::SeqCst) {
                self.world.closed.fetch_add(1, Ordering::SeqCst);
            }
        }
    }

    struct Scene {
        fleet: Arc<Fleet>,
        world: Arc<World>,
        directs: Arc<Directs>,
        host: HostId,
        tenant: TenantName,
    }

    async fn scene() -> Scene {
        let fleet = Fleet::start(MemoryStore::new(), Arc::new(SystemClock::new()))
            .await
            .unwrap();
        let world = Arc::new(World::default());
        world.answers.store(true, Ordering::SeqCst);
        world.carries.store(true, Ordering::SeqCst);
        let directs = Directs::new(
            Arc::clone(&fleet),
            Arc::new(FakeDialer(Arc::clone(&world))),
            DirectPolicy::default(),
            Duration::from_secs(5),
        );
        let scene = Scene {
            fleet,
            world,
            directs,
            host: HostId::random(),
            tenant: TenantName::new("acme").unwrap(),
        };
        scene.live(HostLife::Active).await;
        scene
    }

    impl Scene {
        async fn live(&self, life: HostLife) {
            let record = HostRecord {
                id: self.host,
                name: HostName::new("pc").unwrap(),
                tenant: self.tenant.clone(),
                labels: Default::default(),
                cordoned: None,
                life,
                certificate_generation: 1,
                key_hash: [0; 32],
                previous_key_hash: None,
                machine: None,
                certificate_expires_at: Timestamp::default(),
                enrolled_at: Timestamp::default(),
                agent_version: String::new(),
                permissions: CorePermissions::default(),
                facts: FleetFacts::default(),
                last_heard_at: None,
                command_generation: 0,
            };
            self.fleet
                .transact(|state| {
                    let mut draft = state.draft();
                    draft.put_host(record.clone());
                    Ok(draft.done(()))
                })
                .await
                .unwrap();
        }

        fn link(&self, addresses: &[&str]) {
            let named = addresses
                .iter()
                .map(|one| ("lan".to_owned(), (*one).to_owned()))
                .collect();
            self.directs.linked(&self.tenant, self.host, named);
        }

        async fn until(&self, what: &str, done: impl Fn(&DirectInfo) -> bool) {
            for _ in 0..600 {
                if done(&self.directs.info(self.host)) {
                    return;
                }
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            panic!("{what}: {:?}", self.directs.info(self.host));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_way_is_used_once_it_is_proved_and_only_where_it_may_be_dialled() {
        let scene = scene().await;
        scene.link(&["127.0.0.1:9090", "198.51.100.7:9090", "10.0.0.1:22", GOOD]);
        scene.until("used", |info| info.used.is_some()).await;
        assert_eq!(*scene.world.dialled.lock(), [GOOD.parse().unwrap()]);
        let info = scene.directs.info(scene.host);
        assert_eq!(info.used.as_deref(), Some(GOOD));
        let number = scene.directs.number(scene.host).await;
        assert!(number.is_some());
        assert!(scene.directs.open(scene.host).await.is_some());
        // The same link again, as after a moment without: the same way.
        scene.directs.left(scene.host);
        scene.link(&["127.0.0.1:9090", "198.51.100.7:9090", "10.0.0.1:22", GOOD]);
        assert_eq!(scene.directs.number(scene.host).await, number);
        assert_eq!(scene.world.dialled.lock().len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn another_address_is_dialled_and_the_way_to_the_one_before_ends() {
        let scene = scene().await;
        scene.link(&[GOOD]);
        scene.until("used", |info| info.used.is_some()).await;
        let before = scene.directs.number(scene.host).await;
        let other = "10.1.2.3:9090";
        scene.link(&[other]);
        let used = |info: &DirectInfo| info.used.as_deref() == Some(other);
        scene.until("used there", used).await;
        assert_ne!(scene.directs.number(scene.host).await, before);
        let dialled = [GOOD, other].map(|one| one.parse().unwrap());
        assert_eq!(*scene.world.dialled.lock(), dialled);
        assert_eq!(scene.world.closed.load(Ordering::SeqCst), 1);
        // And none at all.
        scene.link(&[]);
        tokio::time::sleep(LINGER * 2).await;
        assert_eq!(scene.directs.number(scene.host).await, None);
        assert_eq!(scene.world.closed.load(Ordering::SeqCst), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn what_may_not_be_dialled_is_named_and_what_does_not_answer_tells_nothing() {
        let scene = scene().await;
        scene.link(&["169.254.169.254:9090"]);
        let told = |text: &'static str| move |info: &DirectInfo| info.problem.contains(text);
        scene.until("judged", told("never dials")).await;
        assert!(scene.world.dialled.lock().is_empty());
        assert_eq!(scene.directs.number(scene.host).await, None);
        assert!(scene.directs.open(scene.host).await.is_none());

        scene.world.answers.store(false, Ordering::SeqCst);
        scene.link(&[GOOD]);
        let text = "192.168.50.2:9090 does not answer as this host";
        scene.until("tried", told(text)).await;
        // It is tried again, and taken when it answers.
        scene.world.answers.store(true, Ordering::SeqCst);
        scene.until("used", |info| info.used.is_some()).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_way_that_goes_silent_is_left_at_once_and_taken_again_when_it_works() {
        let scene = scene().await;
        scene.link(&[GOOD]);
        scene.until("used", |info| info.used.is_some()).await;
        let before = scene.directs.number(scene.host).await.unwrap();
        scene.world.carries.store(false, Ordering::SeqCst);
        let asked = Instant::now();
        assert_eq!(scene.directs.number(scene.host).await, None);
        assert!(asked.elapsed() <= TRIAL + Duration::from_millis(10));
        assert_eq!(scene.world.closed.load(Ordering::SeqCst), 1);
        // The next call does not even wait.
        let asked = Instant::now();
        assert!(scene.directs.open(scene.host).await.is_none());
        assert_eq!(asked.elapsed(), Duration::ZERO);
        assert!(!scene.directs.info(scene.host).problem.is_empty());
        scene.world.carries.store(true, Ordering::SeqCst);
        scene.until("used again", |info| info.used.is_some()).await;
        assert_ne!(scene.directs.number(scene.host).await, Some(before));
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_that_is_not_let_in_any_more_loses_its_way() {
        let scene = scene().await;
        scene.link(&[GOOD]);
        scene.until("used", |info| info.used.is_some()).await;
        scene
            .live(HostLife::Revoked {
                since: Timestamp::default(),
            })
            .await;
        // Well within five minutes, whatever became of the link.
        tokio::time::sleep(Duration::from_secs(12)).await;
        assert_eq!(scene.world.closed.load(Ordering::SeqCst), 1);
        assert!(scene.directs.open(scene.host).await.is_none());

        // One whose link is gone keeps its way for a moment only.
        scene.live(HostLife::Active).await;
        scene.link(&[GOOD]);
        scene.until("used", |info| info.used.is_some()).await;
        scene.directs.left(scene.host);
        tokio::time::sleep(LINGER / 2).await;
        assert!(scene.directs.open(scene.host).await.is_some());
        tokio::time::sleep(LINGER).await;
        assert!(scene.directs.open(scene.host).await.is_none());
        assert_eq!(scene.world.closed.load(Ordering::SeqCst), 2);
    }
}
