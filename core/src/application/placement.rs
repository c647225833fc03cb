//! Where a VM goes: a pure function of what is asked and what is known of the hosts.
//!
//! Filters first: what the caller may use, what is online, not cordoned, labelled as asked, let by
//! its owner, with room left over what it holds and what is on its way to it. Of those that pass the
//! one with most room left after the VM wins, counted by its scarcest resource, so that load spreads;
//! equals are told apart by their VMs, then their names: the same question has the same answer.

use std::collections::{BTreeMap, BTreeSet};

use ghost_domain::fleet::CorePermissions;
use ghost_domain::{ByteSize, Demand, Error, ErrorCode, HostId, Result, TenantName};

use crate::domain::{HostState, Labels};

/// What a VM gets that says nothing of it, as the host agent does.
pub const USUAL_DEMAND: Demand = Demand {
    cpus: 2,
    memory: ByteSize::from_gib(2),
    disk: ByteSize::from_gib(10),
};

/// Most hosts that an error names.
const MOST_NAMED: usize = 8;
/// Shares are counted in these: whole numbers have one order.
const WHOLE: u128 = 1_000_000;

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Whose hosts.
    pub tenant: TenantName,
    /// What the VM needs.
    pub demand: Demand,
    /// Only hosts with all of these labels.
    pub labels: Labels,
    /// Only these hosts, where the caller's key is bound to some.
    pub only: Option<BTreeSet<HostId>>,
}

/// What is known of a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The host.
    pub id: HostId,
    /// Its name.
    pub name: String,
    /// Its tenant.
    pub tenant: TenantName,
    /// Its state.
    pub state: HostState,
    /// Why it is not online.
    pub state_reason: String,
    /// Why nothing is placed on it.
    pub cordoned: Option<String>,
    /// Its labels.
    pub labels: Labels,
    /// What its owner lets Core do.
    pub permissions: CorePermissions,
    /// Whether its agent takes new VMs: `running`.
    pub agent_state: String,
    /// Logical CPUs: no VM can have more.
    pub cpus: u32,
    /// What VMs may have together; `None` where the host has not said yet.
    pub allocatable: Option<Demand>,
    /// What they hold.
    pub committed: Demand,
    /// What is on its way there.
    pub reserved: Demand,
    /// Its VMs, those on their way included.
    pub vms: usize,
}

/// A host that was passed over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// Its name.
    pub host: String,
    /// Why.
    pub reason: String,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// The host.
    pub host: HostId,
    /// Its name.
    pub name: String,
    /// Why this one, for people.
    pub reason: String,
    /// Why not the others.
    pub rejected: Vec<Rejected>,
}

/// What is left on a host.
fn room(candidate: &Candidate, allocatable: Demand) -> Demand {
    let taken = candidate.committed.plus(candidate.reserved);
    Demand {
        cpus: allocatable.cpus.saturating_sub(taken.cpus),
        memory: allocatable.memory.saturating_sub(taken.memory),
        disk: allocatable.disk.saturating_sub(taken.disk),
    }
}

/// Why a host cannot take the VM; `None`: it can. Hosts of others are not asked at all.
fn unfit(ask: &Ask, candidate: &Candidate) -> Option<String> {
    match candidate.state {
        HostState::Online => {}
        state if candidate.state_reason.is_empty() => return Some(format!("it is {state}")),
        state => return Some(format!("it is {state}: {}", candidate.state_reason)),
    }
    if let Some(why) = &candidate.cordoned {
        return Some(if why.is_empty() {
            "it is cordoned".to_owned()
        } else {
            format!("it is cordoned: {why}")
        });
    }
    if candidate.permissions < CorePermissions::Operate {
        return Some(format!(
            "its owner lets Core do no more than {}",
            candidate.permissions
        ));
    }
    if candidate.agent_state != "running" {
        return Some(format!("its agent is {}", candidate.agent_state));
    }
    let missing = ask
        .labels
        .iter()
        .find(|(key, value)| candidate.labels.get(*key) != Some(value));
    if let Some((key, value)) = missing {
        return Some(match candidate.labels.get(key) {
            Some(other) => format!("its label {key} is {other} and not {value}"),
            None => format!("it has no label {key}={value}"),
        });
    }
    let Some(allocatable) = candidate.allocatable else {
        return Some("it has not said yet what it has".to_owned());
    };
    if ask.demand.cpus > candidate.cpus {
        return Some(format!(
            "it has {} CPUs, and a VM cannot have more",
            candidate.cpus
        ));
    }
    let left = room(candidate, allocatable);
    if ask.demand.cpus > left.cpus {
        return Some(format!(
            "{} of {} virtual CPUs are left",
            left.cpus, allocatable.cpus
        ));
    }
    if ask.demand.memory > left.memory {
        return Some(format!(
            "{} of {} of memory are left",
            left.memory, allocatable.memory
        ));
    }
    if ask.demand.disk > left.disk {
        return Some(format!(
            "{} of {} of disk are left",
            left.disk, allocatable.disk
        ));
    }
    None
}

/// The share that stays free of the scarcest resource, and which that is.
fn free_after(ask: &Ask, candidate: &Candidate) -> (u128, &'static str) {
    let Some(allocatable) = candidate.allocatable else {
        return (0, "memory");
    };
    let left = room(candidate, allocatable);
    let share = |left: u64, needed: u64, whole: u64| match whole {
        // Nothing of it there is, and nothing of it is needed.
        0 => WHOLE,
        whole => u128::from(left.saturating_sub(needed)) * WHOLE / u128::from(whole),
    };
    let demand = ask.demand;
    [
        (
            share(
                left.memory.bytes(),
                demand.memory.bytes(),
                allocatable.memory.bytes(),
            ),
            "memory",
        ),
        (
            share(
                left.cpus.into(),
                demand.cpus.into(),
                allocatable.cpus.into(),
            ),
            "CPUs",
        ),
        (
            share(
                left.disk.bytes(),
                demand.disk.bytes(),
                allocatable.disk.bytes(),
            ),
            "disk",
        ),
    ]
    .into_iter()
    .min_by_key(|(share, _)| *share)
    .unwrap_or((0, "memory"))
}

/// Chooses a host.
///
/// # Errors
/// `NoHostFits`, saying of each host why not.
pub fn place(ask: &Ask, candidates: &[Candidate]) -> Result<Placed> {
    let asked = candidates.iter().filter(|one| {
        one.tenant == ask.tenant && ask.only.as_ref().is_none_or(|only| only.contains(&one.id))
    });
    let mut rejected = BTreeMap::new();
    let mut fitting = Vec::new();
    for candidate in asked {
        match unfit(ask, candidate) {
            Some(reason) => {
                let name = candidate.name.clone();
                rejected.insert((name, candidate.id), reason);
            }
            None => fitting.push((free_after(ask, candidate), candidate)),
        }
    }
    fitting.sort_by(|((a_share, _), a), ((b_share, _), b)| {
        b_share
            .cmp(a_share)
            .then(a.vms.cmp(&b.vms))
            .then_with(|| a.name.cmp(&b.name))
            .then_with(|| a.id.cmp(&b.id))
    });
    let rejected: Vec<Rejected> = rejected
        .into_iter()
        .map(|((host, _), reason)| Rejected { host, reason })
        .collect();
    let Some(((share, scarce), best)) = fitting.first() else {
        return Err(nothing_fits(ask, &rejected));
    };
    let percent = share * 100 / WHOLE;
    let reason = match fitting.len() {
        1 if rejected.is_empty() => format!("it is the only host of {}", ask.tenant),
        1 => format!("no other host fits; {percent} % of its {scarce} stay free"),
        many => format!(
            "of {many} hosts that fit it has the most room left: {percent} % of its {scarce} stay free"
        ),
    };
    Ok(Placed {
        host: best.id,
        name: best.name.clone(),
        reason,
        rejected,
    })
}

fn nothing_fits(ask: &Ask, rejected: &[Rejected]) -> Error {
    let error = Error::new(
        ErrorCode::NoHostFits,
        format!(
            "no host of {} can take {} CPUs, {} of memory and {} of disk",
            ask.tenant, ask.demand.cpus, ask.demand.memory, ask.demand.disk
        ),
    );
    if rejected.is_empty() {
        return error
            .because(format!("{} has no hosts that you may use", ask.tenant))
            .hint("let one join: ghost-core token create, then ghost-agent enroll on the host");
    }
    let mut cause: Vec<String> = rejected
        .iter()
        .take(MOST_NAMED)
        .map(|one| format!("{}: {}", one.host, one.reason))
        .collect();
    if rejected.len() > MOST_NAMED {
        cause.push(format!("and {} more", rejected.len() - MOST_NAMED));
    }
    error
        .because(cause.join("; "))
        .hint("see the hosts and what is free: ghostctl host list")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn demand(cpus: u32, memory: u64, disk: u64) -> Demand {
        Demand {
            cpus,
            memory: ByteSize::from_gib(memory),
            disk: ByteSize::from_gib(disk),
        }
    }

    fn tenant() -> TenantName {
        TenantName::new("acme").unwrap()
    }

    fn ask() -> Ask {
        Ask {
            tenant: tenant(),
            demand: demand(2, 2, 10),
            labels: Labels::new(),
            only: None,
        }
    }

    fn host(name: &str) -> Candidate {
        Candidate {
            id: HostId::random(),
            name: name.into(),
            tenant: tenant(),
            state: HostState::Online,
            state_reason: String::new(),
            cordoned: None,
            labels: Labels::new(),
            permissions: CorePermissions::Operate,
            agent_state: "running".into(),
            cpus: 8,
            allocatable: Some(demand(32, 16, 100)),
            committed: Demand::default(),
            reserved: Demand::default(),
            vms: 0,
        }
    }

    #[test]
    fn the_host_with_most_room_wins_and_says_why() {
        let full = Candidate {
            committed: demand(4, 8, 20),
            ..host("a")
        };
        let empty = host("b");
        let placed = place(&ask(), &[full, empty.clone()]).unwrap();
        assert_eq!(placed.host, empty.id);
        assert_eq!(
            placed.reason,
            "of 2 hosts that fit it has the most room left: 87 % of its memory stay free"
        );
        assert!(placed.rejected.is_empty());
    }

    #[test]
    fn what_is_on_its_way_counts() {
        let busy = Candidate {
            reserved: demand(0, 15, 0),
            ..host("a")
        };
        let placed = place(&ask(), &[busy, host("b")]).unwrap();
        assert_eq!(placed.name, "b");
        assert_eq!(placed.rejected[0].host, "a");
        assert_eq!(
            placed.rejected[0].reason,
            "1 GiB of 16 GiB of memory are left"
        );
    }

    #[test]
    fn every_reason_is_told() {
        let labels = |value: &str| Labels::from([("zone".to_owned(), value.to_owned())]);
        let asked = Ask {
            labels: labels("eu"),
            ..ask()
        };
        let fits = Candidate {
            labels: labels("eu"),
            ..host("fits")
        };
        let others = [
            (
                Candidate {
                    state: HostState::Offline,
                    state_reason: "it has no link".into(),
                    ..fits.clone()
                },
                "it is offline: it has no link",
            ),
            (
                Candidate {
                    cordoned: Some("disk swap".into()),
                    ..fits.clone()
                },
                "it is cordoned: disk swap",
            ),
            (
                Candidate {
                    permissions: CorePermissions::Read,
                    ..fits.clone()
                },
                "its owner lets Core do no more than read",
            ),
            (
                Candidate {
                    agent_state: "draining".into(),
                    ..fits.clone()
                },
                "its agent is draining",
            ),
            (
                Candidate {
                    labels: labels("us"),
                    ..fits.clone()
                },
                "its label zone is us and not eu",
            ),
            (
                Candidate {
                    labels: Labels::new(),
                    ..fits.clone()
                },
                "it has no label zone=eu",
            ),
            (
                Candidate {
                    allocatable: None,
                    ..fits.clone()
                },
                "it has not said yet what it has",
            ),
            (
                Candidate {
                    cpus: 1,
                    ..fits.clone()
                },
                "it has 1 CPUs, and a VM cannot have more",
            ),
            (
                Candidate {
                    committed: demand(31, 0, 0),
                    ..fits.clone()
                },
                "1 of 32 virtual CPUs are left",
            ),
            (
                Candidate {
                    committed: demand(0, 0, 95),
                    ..fits.clone()
                },
                "5 GiB of 100 GiB of disk are left",
            ),
        ];
        for (other, reason) in others {
            let other = Candidate {
                id: HostId::random(),
                name: "other".into(),
                ..other
            };
            let placed = place(&asked, &[other.clone(), fits.clone()]).unwrap();
            assert_eq!(placed.host, fits.id);
            assert_eq!(placed.rejected[0].reason, reason);
            let error = place(&asked, &[other]).unwrap_err();
            assert_eq!(error.code(), ErrorCode::NoHostFits);
            assert_eq!(error.cause(), Some(format!("other: {reason}").as_str()));
        }
    }

    #[test]
    fn hosts_of_others_are_not_even_named() {
        let foreign = Candidate {
            tenant: TenantName::new("other").unwrap(),
            ..host("secret")
        };
        let outside = host("outside");
        let inside = host("inside");
        let asked = Ask {
            only: Some(BTreeSet::from([inside.id])),
            ..ask()
        };
        let all = [foreign.clone(), outside, inside.clone()];
        let placed = place(&asked, &all).unwrap();
        assert_eq!(placed.host, inside.id);
        assert!(placed.rejected.is_empty());
        let error = place(&ask(), &[foreign]).unwrap_err();
        assert!(!error.to_string().contains("secret"), "{error}");
    }

    fn any_host() -> impl Strategy<Value = Candidate> {
        let state = prop_oneof![
            4 => Just(HostState::Online),
            1 => Just(HostState::Offline),
            1 => Just(HostState::Degraded),
        ];
        let demands = || (0u32..40, 0u64..40, 0u64..200).prop_map(|(a, b, c)| demand(a, b, c));
        (
            (
                "[a-c]",
                any::<u128>(),
                state,
                proptest::option::of(demands()),
            ),
            (demands(), demands(), any::<bool>(), 0u32..16, 0usize..5),
        )
            .prop_map(
                |((name, id, state, all), (held, coming, cordoned, cpus, vms))| Candidate {
                    id: HostId::from_uuid(uuid::Uuid::from_u128(id)),
                    state,
                    cordoned: cordoned.then(String::new),
                    cpus,
                    allocatable: all,
                    committed: held,
                    reserved: coming,
                    vms,
                    ..host(&name)
                },
            )
    }

    proptest! {
        #[test]
        fn the_chosen_host_has_room_and_no_other_has_more(
            mut hosts in proptest::collection::vec(any_host(), 0..12),
            needed in (1u32..8, 1u64..16, 1u64..50),
        ) {
            let asked = Ask { demand: demand(needed.0, needed.1, needed.2), ..ask() };
            let chosen = place(&asked, &hosts);
            // The order in which hosts are told of changes nothing.
            hosts.reverse();
            prop_assert_eq!(chosen.clone().ok(), place(&asked, &hosts).ok());
            let fits = |one: &&Candidate| {
                one.state == HostState::Online && one.cordoned.is_none() && one.cpus >= asked.demand.cpus
                    && one.allocatable.is_some_and(|all| {
                        let taken = one.committed.plus(one.reserved).plus(asked.demand);
                        taken.cpus <= all.cpus && taken.memory <= all.memory && taken.disk <= all.disk
                    })
            };
            match chosen {
                Err(error) => {
                    prop_assert_eq!(error.code(), ErrorCode::NoHostFits);
                    prop_assert!(!hosts.iter().any(|one| fits(&one)));
                }
                Ok(placed) => {
                    let best = hosts.iter().find(|one| one.id == placed.host).unwrap();
                    prop_assert!(fits(&best));
                    let all_fitting = hosts.iter().filter(fits).count();
                    prop_assert_eq!(placed.rejected.len(), hosts.len() - all_fitting);
                    for one in hosts.iter().filter(fits) {
                        prop_assert!(free_after(&asked, one).0 <= free_after(&asked, best).0);
                    }
                }
            }
        }
    }
}
