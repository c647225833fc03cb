//! What is known of the inside of a VM; all of it the guest's word, and none of it durable.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ghost_domain::guest::{GuestCloudInit, GuestHello, GuestTelemetry};
use ghost_domain::ports::DomainStatistics;
use ghost_domain::vm::Observation;
use ghost_domain::{MacAddress, Monotonic, Timestamp};

use super::history::History;
use super::model::VmEntry;
use super::views::{AddressSource, AddressView};

/// See the module's documentation.
#[derive(Default)]
pub(crate) struct GuestSeen {
    /// Its agent is connected.
    pub(crate) connected: bool,
    /// Why it is not; empty for never.
    pub(crate) reason: String,
    /// Since when it is as it is.
    pub(crate) since: Option<Timestamp>,
    /// How it greeted last.
    pub(crate) hello: Option<Arc<GuestHello>>,
    /// What it reported last, and when, since the VM was started.
    pub(crate) telemetry: Option<(Arc<GuestTelemetry>, Monotonic)>,
    /// Until when that counts as of now.
    fresh_until: Monotonic,
    /// What it reported of cloud-init, escaped, and since when that has been so.
    pub(crate) cloud_init: Option<(GuestCloudInit, Timestamp)>,
    /// What it did.
    pub(crate) history: History,
    /// The host's counters of the last look, for rates.
    pub(crate) counters: Option<(DomainStatistics, Monotonic)>,
    /// The rates that came of the last two looks.
    pub(crate) host: Option<HostRates>,
    /// Its agent is being replaced, and will be away for a moment.
    pub(crate) updating: bool,
    /// The agent broke the protocol and is held off.
    pub(crate) misbehaved: Option<String>,
    /// When its coming and going was told last, within the minute.
    told: VecDeque<Monotonic>,
}

/// What the host's counters say of a VM.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HostRates {
    pub(crate) cpu_percent: f64,
    pub(crate) memory_used: u64,
    pub(crate) memory_total: u64,
    /// Disk read and write, network receive and transmit.
    pub(crate) rates: [f64; 4],
}

impl GuestSeen {
    /// Whether its report is of now.
    pub(crate) fn is_fresh(&self, now: Monotonic) -> bool {
        self.telemetry.is_some() && now < self.fresh_until
    }

    /// Whether its coming or going may be told in one more event. A guest that comes and goes all
    /// the time must not crowd out what else happens.
    pub(crate) fn may_tell(&mut self, now: Monotonic) -> bool {
        const MOST: usize = 12;
        while self
            .told
            .front()
            .is_some_and(|at| now.since(*at) > Duration::from_secs(60))
        {
            self.told.pop_front();
        }
        if self.told.len() >= MOST {
            return false;
        }
        self.told.push_back(now);
        true
    }

    /// The VM has gone off: what was of its run no longer holds.
    pub(crate) fn powered_off(&mut self, now: Timestamp) {
        if self.connected || self.since.is_none() {
            self.since = Some(now);
        }
        self.connected = false;
        self.reason.clear();
        self.telemetry = None;
        self.cloud_init = None;
        self.counters = None;
        self.host = None;
        self.misbehaved = None;
    }

    /// Takes a report up, which counts as of now for a while. Whether anything changed that watchers of the VM see.
    pub(crate) fn report(
        &mut self,
        report: GuestTelemetry,
        (at, fresh): (Monotonic, Duration),
        now: Timestamp,
    ) -> bool {
        let told = clean(&report.cloud_init);
        let changed = self.cloud_init.as_ref().map(|(known, _)| known) != Some(&told);
        if changed {
            self.cloud_init = Some((told, now));
        }
        self.telemetry = Some((Arc::new(report), at));
        self.fresh_until = at.after(fresh);
        changed
    }
}

fn clean(told: &GuestCloudInit) -> GuestCloudInit {
    let clean = |text: &str| crate::guest::escape(text, 256);
    GuestCloudInit {
        status: clean(&told.status),
        stage: clean(&told.stage),
        errors: told.errors.iter().take(10).map(|one| clean(one)).collect(),
    }
}

impl VmEntry {
    /// Takes up what was seen of its power.
    pub(crate) fn observe(&mut self, observation: Observation) {
        if !observation.power.is_active() {
            self.addresses.clear();
            self.reported.clear();
            self.guest.powered_off(observation.since);
        }
        self.observation = Some(observation);
    }

    /// The VM's addresses. Each card's come from the best source that knows any: the guest's own
    /// report, its leases, what was registered by hand.
    pub(crate) fn known_addresses(&self) -> Vec<AddressView> {
        let mut known = Vec::new();
        // Kept on the record for the VM's next run; one that is off has no address.
        let active = self
            .observation
            .as_ref()
            .is_none_or(|seen| seen.power.is_active());
        let registered: &[_] = if active {
            &self.vm.registered_addresses
        } else {
            &[]
        };
        for card in &self.vm.spec.interfaces {
            let of = |list: &[(MacAddress, IpAddr)], source| -> Vec<AddressView> {
                list.iter()
                    .filter(|(mac, _)| *mac == card.mac)
                    .map(|(mac, address)| AddressView {
                        mac: *mac,
                        address: *address,
                        source,
                    })
                    .collect()
            };
            let best = [
                (&self.reported[..], AddressSource::Guest),
                (&self.addresses[..], AddressSource::Lease),
                (registered, AddressSource::Registered),
            ]
            .into_iter()
            .map(|(list, source)| of(list, source))
            .find(|found| !found.is_empty());
            known.extend(best.unwrap_or_default());
        }
        known
    }
}

/// What of a guest's report of its interfaces counts: addresses of cards that are ours, that can
/// be reached from without, and that no other VM has leased.
pub(crate) fn reported_addresses(
    report: &GuestTelemetry,
    cards: &[MacAddress],
    owner: impl Fn(IpAddr) -> Option<MacAddress>,
) -> Vec<(MacAddress, IpAddr)> {
    /// Most that are kept of one card.
    const MOST: usize = 8;
    let mut found: Vec<(MacAddress, IpAddr)> = Vec::new();
    for interface in &report.interfaces {
        let Ok(mac) = interface.mac.to_ascii_lowercase().parse::<MacAddress>() else {
            continue;
        };
        if !cards.contains(&mac) {
            continue;
        }
        for address in &interface.addresses {
            let address = address.to_canonical();
            let anothers = owner(address).is_some_and(|owner| owner != mac);
            let many = found.iter().filter(|(of, _)| *of == mac).count() >= MOST;
            if is_usable(address) && !anothers && !many && !found.contains(&(mac, address)) {
                found.push((mac, address));
            }
        }
    }
    found
}

/// Whether an address can be one of a VM's card: no loopback, link-local, multicast or other
/// special one (RFC 6890).
pub(crate) fn is_usable(address: IpAddr) -> bool {
    let special = match address {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast() || v4.octets()[0] == 0,
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    !(special || address.is_loopback() || address.is_multicast() || address.is_unspecified())
}
