//! What a heartbeat says: all VMs at first, then what changed since the last one that Core answered.

use std::collections::BTreeMap;

use ghost_domain::Timestamp;
use ghost_domain::fleet::{FleetFacts, HeartbeatReport};
use ghost_proto::core::MOST_LINK_MESSAGE;
use ghost_proto::core::v1 as proto;
use prost::Message;

use super::convert;
use crate::tunnel::{vm_digest, vms_digest};

/// A message of a heartbeat that is near the most is written without what can be long.
const ROOM: usize = MOST_LINK_MESSAGE - 64 * 1024;

/// The heartbeats of one link.
#[derive(Debug, Default)]
pub(super) struct Heartbeats {
    sequence: u64,
    /// What Core knows: VMs with the digests of their summaries. `None`: nothing, so that the next
    /// heartbeat is full.
    known: Option<BTreeMap<String, u64>>,
    /// The same, once Core answers the heartbeat that is under way.
    under_way: Option<(u64, BTreeMap<String, u64>)>,
    /// The facts that Core has.
    facts: FleetFacts,
    /// The addresses that Core has.
    direct: Vec<proto::DirectAddress>,
}

impl Heartbeats {
    /// Begins a link on which these facts and addresses were told in the hello.
    pub(super) fn new(facts: FleetFacts, direct: Vec<proto::DirectAddress>) -> Self {
        Self {
            facts,
            direct,
            ..Self::default()
        }
    }

    /// Whether Core has yet to answer one.
    pub(super) const fn is_under_way(&self) -> bool {
        self.under_way.is_some()
    }

    /// The next heartbeat must be a full one.
    pub(super) fn want_full(&mut self) {
        self.known = None;
        self.under_way = None;
    }

    /// Core answered. Says whether that was the one that is under way.
    pub(super) fn answered(&mut self, sequence: u64, want_full: bool) -> bool {
        let answered = self.under_way.take_if(|(sent, _)| *sent == sequence);
        let is_answer = answered.is_some();
        if want_full {
            self.want_full();
        } else if let Some((_, vms)) = answered {
            self.known = Some(vms);
        }
        is_answer
    }

    /// The next heartbeat. `direct`: the addresses now, where they are known.
    pub(super) fn next(
        &mut self,
        report: &HeartbeatReport,
        direct: Option<Vec<proto::DirectAddress>>,
        link: proto::LinkFacts,
        now: Timestamp,
    ) -> proto::Heartbeat {
        self.sequence += 1;
        let mut vms: Vec<proto::VmSummary> = report.vms.iter().map(convert::vm_summary).collect();
        vms.sort_by(|one, other| one.id.cmp(&other.id));
        if vms.iter().map(Message::encoded_len).sum::<usize>() > ROOM {
            // Thousands of VMs with long tags. Better without those than not at all.
            for vm in &mut vms {
                vm.tags.clear();
                vm.state_reason.clear();
                vm.addresses.truncate(1);
            }
        }
        let digests: BTreeMap<String, u64> = vms
            .iter()
            .map(|vm| (vm.id.clone(), vm_digest(vm)))
            .collect();
        let vms_digest = vms_digest(&vms);
        let removed_vms = match &self.known {
            None => Vec::new(),
            Some(known) => {
                vms.retain(|vm| known.get(&vm.id) != digests.get(&vm.id));
                known
                    .keys()
                    .filter(|id| !digests.contains_key(*id))
                    .cloned()
                    .collect()
            }
        };
        let facts = (self.facts != report.facts).then(|| convert::facts(&report.facts));
        self.facts.clone_from(&report.facts);
        let direct = direct.filter(|direct| *direct != self.direct);
        if let Some(direct) = &direct {
            self.direct.clone_from(direct);
        }
        self.under_way = Some((self.sequence, digests));
        proto::Heartbeat {
            sequence: self.sequence,
            sent_at: Some(convert::timestamp(now)),
            full: self.known.is_none(),
            vms,
            removed_vms,
            vms_digest,
            capacity: Some(convert::capacity(report)),
            health: Some(convert::health(report)),
            link: Some(link),
            facts,
            direct: direct.map(|addresses| proto::DirectAddresses { addresses }),
        }
    }
}

#[cfg(test)]
mod tests {
    use ghost_domain::fleet::VmSummary;
    use ghost_domain::vm::{DesiredPower, VmState};
    use ghost_domain::{Demand, VmId};

    use super::*;

    fn vm(number: u128, state: VmState) -> VmSummary {
        VmSummary {
            id: VmId::from_uuid(uuid::Uuid::from_u128(number)),
            name: format!("vm-{number}"),
            state,
            state_reason: String::new(),
            desired: DesiredPower::Running,
            demand: Demand::default(),
            image: "tiny".into(),
            addresses: Vec::new(),
            generation: 1,
            created_at: Timestamp::from_unix_millis(1),
            tags: BTreeMap::new(),
            owner: None,
        }
    }

    fn report(vms: Vec<VmSummary>) -> HeartbeatReport {
        HeartbeatReport {
            vms,
            ..HeartbeatReport::default()
        }
    }

    fn next(beats: &mut Heartbeats, report: &HeartbeatReport) -> proto::Heartbeat {
        let link = proto::LinkFacts::default();
        beats.next(report, None, link, Timestamp::default())
    }

    /// Core's half: applies a heartbeat to what it knows and compares.
    fn apply(known: &mut BTreeMap<String, proto::VmSummary>, beat: &proto::Heartbeat) -> bool {
        if beat.full {
            known.clear();
        }
        for id in &beat.removed_vms {
            known.remove(id);
        }
        for vm in &beat.vms {
            known.insert(vm.id.clone(), vm.clone());
        }
        vms_digest(known.values()) == beat.vms_digest
    }

    #[test]
    fn only_what_changed_since_the_last_answer_is_told() {
        let mut beats = Heartbeats::new(FleetFacts::default(), Vec::new());
        let mut core = BTreeMap::new();
        let first = next(
            &mut beats,
            &report(vec![vm(1, VmState::Running), vm(2, VmState::Stopped)]),
        );
        assert!(first.full && first.vms.len() == 2 && first.facts.is_none());
        assert!(apply(&mut core, &first));

        // Not answered yet: what changes now is told on top of nothing.
        let again = next(&mut beats, &report(vec![vm(1, VmState::Stopped)]));
        assert!(again.full);
        assert!(apply(&mut core, &again));
        beats.answered(1, false);
        assert!(
            beats.is_under_way(),
            "an old answer says nothing of the newer one"
        );
        beats.answered(again.sequence, false);

        let changed = report(vec![vm(1, VmState::Stopped), vm(3, VmState::Creating)]);
        let delta = next(&mut beats, &changed);
        assert!(!delta.full);
        assert_eq!(delta.vms.len(), 1);
        assert!(apply(&mut core, &delta));
        // Lost: the next one says it again.
        let delta = next(&mut beats, &changed);
        assert_eq!(delta.vms.len(), 1);
        beats.answered(delta.sequence, false);

        let gone = next(&mut beats, &report(vec![vm(3, VmState::Creating)]));
        assert_eq!((gone.vms.len(), gone.removed_vms.len()), (0, 1));
        assert!(apply(&mut core, &gone));
        assert_eq!(core.len(), 1);

        // Core lost something: its digest differs, and it asks for all.
        core.clear();
        beats.answered(gone.sequence, false);
        let delta = next(&mut beats, &report(vec![vm(3, VmState::Creating)]));
        assert!(!apply(&mut core, &delta));
        beats.answered(delta.sequence, true);
        let full = next(&mut beats, &report(vec![vm(3, VmState::Creating)]));
        assert!(full.full && apply(&mut core, &full));
    }

    #[test]
    fn facts_are_told_when_they_change() {
        let facts = FleetFacts {
            kernel: "6.1".into(),
            ..FleetFacts::default()
        };
        let mut beats = Heartbeats::new(facts.clone(), Vec::new());
        let mut report = HeartbeatReport {
            facts,
            ..HeartbeatReport::default()
        };
        assert!(next(&mut beats, &report).facts.is_none());
        report.facts.kernel = "6.2".into();
        assert_eq!(next(&mut beats, &report).facts.unwrap().kernel, "6.2");
        assert!(next(&mut beats, &report).facts.is_none());
    }

    #[test]
    fn more_vms_than_fit_are_told_without_their_tags() {
        let many = (0..3_000)
            .map(|number| VmSummary {
                tags: BTreeMap::from([("note".into(), "x".repeat(1000))]),
                ..vm(number, VmState::Running)
            })
            .collect();
        let mut core = BTreeMap::new();
        let beat = next(&mut Heartbeats::default(), &report(many));
        assert!(beat.encoded_len() < MOST_LINK_MESSAGE);
        assert!(apply(&mut core, &beat));
        assert_eq!(core.len(), 3_000);
    }

    #[test]
    fn addresses_are_told_where_they_changed() {
        let address = |text: &str| proto::DirectAddress {
            provider: "tailscale".into(),
            address: text.into(),
        };
        let first = vec![address("100.64.0.1:9090")];
        let mut beats = Heartbeats::new(FleetFacts::default(), first.clone());
        let mut told = |direct: Option<Vec<proto::DirectAddress>>| {
            let link = proto::LinkFacts::default();
            let beat = beats.next(&report(Vec::new()), direct, link, Timestamp::default());
            beats.answered(beat.sequence, false);
            beat.direct.map(|direct| direct.addresses)
        };
        assert_eq!(told(Some(first.clone())), None, "the hello told of it");
        let second = vec![address("100.64.0.2:9090"), address("[fd7a::2]:9090")];
        assert_eq!(told(Some(second.clone())), Some(second.clone()));
        assert_eq!(told(Some(second)), None);
        assert_eq!(told(None), None, "nobody knows");
        assert_eq!(told(Some(Vec::new())), Some(Vec::new()), "it has none");
        assert_eq!(told(Some(first.clone())), Some(first));
    }
}
