//! The hosts: how they join, and their links.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use ghost_domain::HostName;
use ghost_domain::ports::{Clock, CoreLinkHandler};
use ghost_infrastructure::clock::SystemClock;
use ghost_infrastructure::core_link::direct::DirectOptions;
use ghost_infrastructure::core_link::{CoreLinkOptions, CoreLinkService, EnrolOptions, enrol};
use ghost_proto::core::v1::CreateFleetTokenRequest;
use ghost_proto::core::v1::fleet_service_client::FleetServiceClient;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};

use crate::Failure;
use crate::handler::{Counters, Simulated};
use crate::streams;

/// Hosts that join at once.
const JOINING: usize = 32;
/// Between the beginnings of two hosts.
const BETWEEN: Duration = Duration::from_millis(2);

/// All of them, numbered.
pub(crate) struct Hosts {
    folder: PathBuf,
    socket: PathBuf,
    vms: u32,
    enrolled: usize,
    hosts: Vec<Arc<Simulated>>,
    counters: Arc<Counters>,
    clock: Arc<dyn Clock>,
}

impl Hosts {
    pub(crate) fn new(folder: PathBuf, socket: PathBuf, vms: u32) -> Self {
        Self {
            folder,
            socket,
            vms,
            enrolled: 0,
            hosts: Vec::new(),
            counters: Arc::default(),
            clock: Arc::new(SystemClock::new()),
        }
    }

    /// Has hosts join, each by a token of its own, until there are so many.
    pub(crate) async fn enrol(&mut self, count: usize) -> Result<usize, Failure> {
        let core = Endpoint::from_shared(format!("unix:{}", self.socket.display()))?
            .connect()
            .await?;
        let fleet = FleetServiceClient::new(core);
        futures::stream::iter(self.enrolled..count)
            .map(|number| join(fleet.clone(), &self.folder, number))
            .buffer_unordered(JOINING)
            .try_collect::<()>()
            .await?;
        self.enrolled = self.enrolled.max(count);
        Ok(self.enrolled)
    }

    /// Has hosts keep their links up, until so many do. They begin one after the other: what they do
    /// at once is another matter, of which Core's restart is the occasion.
    pub(crate) async fn link(&mut self, count: usize) -> Result<usize, Failure> {
        for number in self.hosts.len()..count.min(self.enrolled) {
            let host = Arc::new(Simulated::new(number, self.vms, Arc::clone(&self.counters)));
            let options = CoreLinkOptions {
                data_dir: data_dir(&self.folder, number),
                agent_version: env!("CARGO_PKG_VERSION").into(),
                direct: DirectOptions::default(),
            };
            let handler: Arc<dyn CoreLinkHandler> = Arc::clone(&host) as _;
            let service = CoreLinkService::open(options, handler, Arc::clone(&self.clock))?;
            if let Some(incoming) = service.incoming() {
                tokio::spawn(streams::serve(incoming));
            }
            tokio::spawn(async move { service.run_unwatched(CancellationToken::new()).await });
            self.hosts.push(host);
            tokio::time::sleep(BETWEEN).await;
        }
        Ok(self.hosts.len())
    }

    /// How they fare, in one line.
    pub(crate) fn status(&self) -> String {
        let up = self.hosts.iter().filter(|host| host.is_up()).count();
        let refused = self.hosts.iter().filter(|host| host.is_refused()).count();
        let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        format!(
            "up {up} waiting {} refused {refused} ever-refused {} heartbeats {} lost {} links {}",
            self.hosts.len() - up - refused,
            count(&self.counters.refused),
            count(&self.counters.heartbeats),
            count(&self.counters.lost),
            count(&self.counters.links),
        )
    }
}

fn data_dir(folder: &Path, number: usize) -> PathBuf {
    folder.join(number.to_string())
}

async fn join(
    mut fleet: FleetServiceClient<Channel>,
    folder: &Path,
    number: usize,
) -> Result<(), Failure> {
    let token = fleet
        .create_token(CreateFleetTokenRequest::default())
        .await?
        .into_inner()
        .token;
    let data_dir = data_dir(folder, number);
    std::fs::create_dir_all(&data_dir)?;
    let options = EnrolOptions {
        data_dir,
        name: HostName::new(format!("host-{number}"))?,
        agent_version: env!("CARGO_PKG_VERSION").into(),
        replace: false,
    };
    enrol(&token, options).await?;
    Ok(())
}
