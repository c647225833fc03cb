//! The links to the agents in VMs, over the Unix sockets at which QEMU offers the guests'
//! virtio-serial ports.
//!
//! One task a VM keeps a connection, greets, sorts what comes and watches that the guest is alive;
//! callers write to the socket themselves. The guest is the enemy: what it may cost is said in
//! [`connection`], what it says is bounded and cleaned in [`clean`], and a call is reached only by
//! an id of 128 random bits in a session of 128 random bits.
//!
//! [`link`] connects, again and again, and holds off; [`connection`] is one connection, with the
//! rules a guest is held to; [`session`] one life of the guest's agent with its calls; [`call`] one
//! call, its windows and how it ends; [`wire`] sends.

mod call;
mod clean;
mod connection;
mod elf;
mod events;
mod exec;
mod files;
mod link;
mod pace;
mod program;
mod requests;
mod session;
mod wire;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use ghost_domain::guest::{
    DirectoryMake, ExecRequest, FileWrite, FreezeOutcome, GuestDirectory, GuestFile,
    GuestLinkStatus, GuestRequest, LinkMake,
};
use ghost_domain::ports::{
    Clock, ExecSession, GuestEvents, GuestFileReader, GuestFileWriter, GuestLinks, GuestProgramFile,
};
use ghost_domain::{Error, ErrorCode, Result, VmId};
use parking_lot::RwLock;
use tokio::runtime::Handle;
use tokio_util::task::TaskTracker;

pub use clean::text as clean_text;
pub(crate) use program::missing as missing_program;
pub use program::{GuestProgram, MOST_PROGRAM_BYTES, PROGRAM_NAME};

use events::Broadcast;
use link::Link;
use session::{Session, lockdown, unreachable};

/// Why links end with the agent.
const ENDING: &str = "the host's agent is shutting down";

/// What links need.
#[derive(Clone)]
pub struct GuestLinkOptions {
    /// The clock whose marks stand in [`GuestLinkStatus`].
    pub clock: Arc<dyn Clock>,
    /// The program for updates.
    pub program: GuestProgram,
    /// The host agent's release, told to guests.
    pub host_version: String,
    /// How often guests shall report; `None`: never.
    pub telemetry_interval: Option<Duration>,
    /// How long things may take.
    pub limits: LinkLimits,
}

impl GuestLinkOptions {
    /// Reports every five seconds, the program where packages put it.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self {
            clock,
            program: GuestProgram::standard(),
            host_version: env!("CARGO_PKG_VERSION").to_owned(),
            telemetry_interval: Some(Duration::from_secs(5)),
            limits: LinkLimits::default(),
        }
    }
}

impl std::fmt::Debug for GuestLinkOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestLinkOptions")
            .field("program", &self.program)
            .field("telemetry_interval", &self.telemetry_interval)
            .finish_non_exhaustive()
    }
}

/// How long things may take. The defaults are what the design promises; tests shorten them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkLimits {
    /// Until the first answer of a call.
    pub answer: Duration,
    /// Silence after which the guest is asked whether it is there.
    pub ping_after: Duration,
    /// Silence after that, which means that it is lost.
    pub silence: Duration,
    /// Until a greeting that is not answered is repeated, at first.
    pub greet_again: Duration,
    /// Until a frame that has begun must have come to its end.
    pub partial_frame: Duration,
    /// Between two tries to connect: at first and at most.
    pub reconnect: (Duration, Duration),
    /// How long a guest is held off that broke the rules: at first and at most.
    pub hold_off: (Duration, Duration),
    /// Until QEMU must have seen that a channel is let go. It does so within a millisecond or two,
    /// unless its guest takes nothing.
    pub parting: Duration,
    /// Until an updated agent must have said hello.
    pub update: Duration,
}

impl Default for LinkLimits {
    fn default() -> Self {
        Self {
            answer: Duration::from_secs(10),
            ping_after: Duration::from_secs(7),
            silence: Duration::from_secs(5),
            greet_again: Duration::from_secs(5),
            partial_frame: Duration::from_secs(10),
            reconnect: (Duration::from_millis(50), Duration::from_secs(2)),
            hold_off: (Duration::from_secs(5), Duration::from_secs(300)),
            parting: Duration::from_millis(400),
            update: Duration::from_secs(60),
        }
    }
}

/// What all links share.
#[derive(Debug)]
struct Shared {
    clock: SharedClock,
    host_version: String,
    telemetry_interval: Option<Duration>,
    limits: LinkLimits,
    locked: Arc<AtomicBool>,
    events: Broadcast,
}

struct SharedClock(Arc<dyn Clock>);

impl std::ops::Deref for SharedClock {
    type Target = dyn Clock;
    fn deref(&self) -> &Self::Target {
        &*self.0
    }
}

impl std::fmt::Debug for SharedClock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Clock")
    }
}

/// [`GuestLinks`] over the sockets of virtio-serial ports.
#[derive(Debug)]
pub struct VirtioGuestLinks {
    shared: Arc<Shared>,
    program: GuestProgram,
    links: RwLock<HashMap<VmId, Arc<Link>>>,
    tasks: TaskTracker,
    runtime: Handle,
}

impl VirtioGuestLinks {
    /// Makes it, with no links yet. Their tasks run on the runtime in which this is called.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn new(options: GuestLinkOptions) -> Self {
        Self {
            shared: Arc::new(Shared {
                clock: SharedClock(options.clock),
                host_version: options.host_version,
                telemetry_interval: options.telemetry_interval,
                limits: options.limits,
                locked: Arc::default(),
                events: Broadcast::default(),
            }),
            program: options.program,
            links: RwLock::default(),
            tasks: TaskTracker::new(),
            runtime: Handle::current(),
        }
    }

    fn link(&self, vm: VmId) -> Result<Arc<Link>> {
        self.links
            .read()
            .get(&vm)
            .map(Arc::clone)
            .ok_or_else(|| unreachable("the VM does not run, or has no channel for an agent"))
    }

    fn session(&self, vm: VmId) -> Result<Arc<Session>> {
        if self.shared.locked.load(Ordering::SeqCst) {
            return Err(lockdown());
        }
        self.link(vm)?.session()
    }

    /// Lets go of all channels for good, within `most`. A plain end of the process would do that too,
    /// but in the midst of a flood it costs the guest's port a buffer, as [`link`] says.
    pub async fn let_go(&self, most: Duration) {
        let links = std::mem::take(&mut *self.links.write());
        for link in links.values() {
            link.stop(ENDING);
        }
        self.tasks.close();
        if tokio::time::timeout(most, self.tasks.wait()).await.is_err() {
            tracing::warn!("some guests' channels were not let go in time");
        }
    }

    fn patience(&self) -> Duration {
        self.shared.limits.answer
    }
}

impl Drop for VirtioGuestLinks {
    fn drop(&mut self) {
        for link in self.links.get_mut().values() {
            link.stop(ENDING);
        }
    }
}

#[async_trait]
impl GuestLinks for VirtioGuestLinks {
    fn attach(&self, vm: VmId, socket: &Path) {
        let mut links = self.links.write();
        if links.contains_key(&vm) {
            return;
        }
        let link = Arc::new(Link::new(vm, Arc::clone(&self.shared)));
        links.insert(vm, Arc::clone(&link));
        self.tasks
            .spawn_on(link.run(socket.to_owned()), &self.runtime);
    }

    fn detach(&self, vm: VmId, reason: &str) {
        let link = self.links.write().remove(&vm);
        if let Some(link) = link {
            link.stop(reason);
        }
    }

    fn status(&self, vm: VmId) -> GuestLinkStatus {
        let Ok(link) = self.link(vm) else {
            return GuestLinkStatus::default();
        };
        let session = link.session.borrow().clone();
        let mut status = link.status.lock().clone();
        match session {
            Some(session) => {
                status.running_calls = u32::try_from(session.running()).unwrap_or(u32::MAX);
                status.hello = Some(session.hello.clone());
            }
            None => status.connected_at = None,
        }
        status
    }

    fn subscribe(&self) -> Box<dyn GuestEvents> {
        self.shared.events.subscribe()
    }

    fn lock_down(&self, closed: bool) -> u32 {
        self.shared.locked.store(closed, Ordering::SeqCst);
        if !closed {
            return 0;
        }
        let links: Vec<Arc<Link>> = self.links.read().values().map(Arc::clone).collect();
        let mut ended = 0;
        for link in links {
            let session = link.session.borrow().clone();
            if let Some(session) = session {
                ended += session.cut(&lockdown());
            }
        }
        u32::try_from(ended).unwrap_or(u32::MAX)
    }

    fn cut(&self, vm: VmId, reason: &str) -> u32 {
        let Ok(link) = self.link(vm) else {
            return 0;
        };
        let session = link.session.borrow().clone();
        let ended = session.map_or(0, |session| session.cut(&unreachable(reason)));
        u32::try_from(ended).unwrap_or(u32::MAX)
    }

    async fn ping(&self, vm: VmId) -> Result<Duration> {
        requests::ping(&self.session(vm)?, self.patience()).await
    }

    async fn execute(&self, vm: VmId, request: ExecRequest) -> Result<ExecSession> {
        exec::execute(&self.session(vm)?, request, self.patience()).await
    }

    async fn stat(&self, vm: VmId, path: &str, follow: bool) -> Result<GuestFile> {
        files::stat(&self.session(vm)?, path, follow, self.patience()).await
    }

    async fn list(&self, vm: VmId, path: &str, after: &str, limit: u32) -> Result<GuestDirectory> {
        files::list(&self.session(vm)?, path, after, limit, self.patience()).await
    }

    async fn make_directory(&self, vm: VmId, directory: DirectoryMake) -> Result<()> {
        files::make_directory(&self.session(vm)?, directory, self.patience()).await
    }

    async fn make_link(&self, vm: VmId, link: LinkMake) -> Result<()> {
        files::make_link(&self.session(vm)?, link, self.patience()).await
    }

    async fn read_file(
        &self,
        vm: VmId,
        path: &str,
        offset: u64,
        length: Option<u64>,
    ) -> Result<(GuestFile, Box<dyn GuestFileReader>)> {
        files::read(&self.session(vm)?, path, offset, length, self.patience()).await
    }

    async fn write_file(&self, vm: VmId, file: FileWrite) -> Result<Box<dyn GuestFileWriter>> {
        files::write(&self.session(vm)?, file, self.patience()).await
    }

    async fn request(&self, vm: VmId, request: GuestRequest) -> Result<()> {
        requests::request(&self.session(vm)?, request, self.patience()).await
    }

    async fn freeze(
        &self,
        vm: VmId,
        timeout: Duration,
        mount_points: Vec<String>,
    ) -> Result<FreezeOutcome> {
        requests::freeze(&self.session(vm)?, timeout, mount_points, self.patience()).await
    }

    async fn thaw(&self, vm: VmId) -> Result<FreezeOutcome> {
        requests::thaw(&self.session(vm)?, self.patience()).await
    }

    async fn update(&self, vm: VmId) -> Result<()> {
        let session = self.session(vm)?;
        let program = self.program.clone();
        let found = crate::images::files::blocking(move |_| {
            program.open().map_err(|error| {
                Error::new(
                    ErrorCode::IoFailed,
                    "the guest agent's program cannot be read",
                )
                .because(error)
            })
        })
        .await?;
        let Some((program, file)) = found else {
            return Err(missing_program(&self.program));
        };
        if session.hello.program_sha256 == program.sha256 {
            return Ok(());
        }
        let link = self.link(vm)?;
        requests::update(&link, &session, &program, file).await
    }

    fn program(&self) -> Option<GuestProgramFile> {
        match self.program.find() {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(%error, "the guest agent's program cannot be used");
                None
            }
        }
    }
}
