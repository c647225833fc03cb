//! The links that this replica has.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use ghost_domain::{HostId, Result, Timestamp};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::messages::{Goodbye, HostLinkFacts};
use crate::application::direct::DirectInfo;
use crate::application::links::ByteStream;

/// What carries a link.
#[async_trait]
pub trait LinkTransport: Send + Sync {
    /// Opens a stream to the host.
    ///
    /// # Errors
    /// `HostOffline` where the link is over; `TooManyRequests` where too many are open.
    async fn open(&self) -> Result<Box<dyn ByteStream>>;

    /// Streams that Core opened and that have not ended.
    fn streams(&self) -> usize;

    /// Ends the link below.
    fn close(&self, reason: &str);
}

/// What is known of a link, for people.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct LinkInfo {
    /// How it came to be: `link`, `piko`, `direct`.
    pub carrier: String,
    /// Addresses by which the host could be dialled: the provider and `ip:port`.
    pub direct_addresses: Vec<(String, String)>,
    /// How it fares, as the host sees it.
    pub facts: HostLinkFacts,
    /// Whether calls go by a direct way instead.
    pub direct: DirectInfo,
}

/// Tells a session to say goodbye.
#[derive(Default)]
pub(super) struct Cut {
    goodbye: Mutex<Option<Goodbye>>,
    told: Notify,
}

impl Cut {
    /// The first goodbye counts.
    pub(super) fn tell(&self, goodbye: Goodbye) {
        self.goodbye.lock().get_or_insert(goodbye);
        self.told.notify_one();
    }

    /// Resolves when there is one to say. May be dropped.
    pub(super) async fn wait(&self) -> Goodbye {
        loop {
            if let Some(goodbye) = self.goodbye.lock().clone() {
                return goodbye;
            }
            self.told.notified().await;
        }
    }
}

/// One link.
pub(super) struct Link {
    pub(super) host: HostId,
    /// Random, so that the end of this one does not take a newer one away.
    pub(super) number: u64,
    pub(super) transport: Arc<dyn LinkTransport>,
    pub(super) cut: Cut,
    /// When its certificate ends, whatever it carries.
    pub(super) expires_at: Timestamp,
    /// The start of the agent that made it.
    instance: String,
    /// Whether a newer link of the same agent took its place, and it stays for what it carries.
    followed: AtomicBool,
    left: CancellationToken,
    info: Mutex<LinkInfo>,
}

impl Link {
    pub(super) fn new(
        host: HostId,
        transport: Arc<dyn LinkTransport>,
        (instance, expires_at): (String, Timestamp),
        info: LinkInfo,
    ) -> Self {
        Self {
            host,
            number: rand::random(),
            transport,
            cut: Cut::default(),
            expires_at,
            instance,
            followed: AtomicBool::new(false),
            left: CancellationToken::new(),
            info: Mutex::new(info),
        }
    }

    pub(super) fn info(&self) -> LinkInfo {
        self.info.lock().clone()
    }

    pub(super) fn set_direct_addresses(&self, addresses: Vec<(String, String)>) {
        self.info.lock().direct_addresses = addresses;
    }

    pub(super) fn set_facts(&self, facts: HostLinkFacts) {
        self.info.lock().facts = facts;
    }

    /// Whether it stays for what it carries, though a newer one took its place.
    pub(super) fn is_followed(&self) -> bool {
        self.followed.load(Ordering::Acquire)
    }

    /// Its session takes no more part in what happens to the host.
    pub(super) fn left(&self) {
        self.left.cancel();
    }

    pub(super) async fn has_left(&self, patience: Duration) {
        let _ = tokio::time::timeout(patience, self.left.cancelled()).await;
    }
}

/// All links of this replica, one for each host.
#[derive(Default)]
pub(super) struct Links {
    all: Mutex<HashMap<HostId, Arc<Link>>>,
}

impl Links {
    pub(super) fn get(&self, host: HostId) -> Option<Arc<Link>> {
        self.all.lock().get(&host).cloned()
    }

    pub(super) fn len(&self) -> usize {
        self.all.lock().len()
    }

    pub(super) fn all(&self) -> Vec<Arc<Link>> {
        self.all.lock().values().cloned().collect()
    }

    /// Takes the place of the host's older link, which is told to go, and waits until it has left.
    /// Where it `follows` one of the same agent, that one ends only with the streams over it.
    pub(super) async fn enter(&self, link: &Arc<Link>, follows: bool) {
        let older = self.all.lock().insert(link.host, Arc::clone(link));
        if let Some(older) = older {
            let follows = follows && older.instance == link.instance;
            older.followed.store(follows, Ordering::Release);
            older
                .cut
                .tell(Goodbye::new("replaced", "a newer link of this host came"));
            older.has_left(Duration::from_secs(2)).await;
            if !follows {
                older.transport.close("a newer link of this host came");
            }
        }
    }

    /// Gives the place up; says whether it was still this link's.
    pub(super) fn leave(&self, link: &Link) -> bool {
        let mut all = self.all.lock();
        let ours = all
            .get(&link.host)
            .is_some_and(|current| current.number == link.number);
        if ours {
            all.remove(&link.host);
        }
        ours
    }
}
