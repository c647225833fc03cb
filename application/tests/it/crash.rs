//! Every crash point of create, start, stop, restart and delete: whatever is cut off where, the
//! next start brings it to an end that leaves nothing behind and nothing half-true.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use ghost_application::vm::{DeleteVmCommand, PowerCommand, StopCommand};
use ghost_application::{FailAction, FailMoment, FailSite, OperationView};
use ghost_domain::vm::ObservedPower;
use ghost_domain::{Error, ErrorCode, OperationStatus, Result};
use parking_lot::Mutex;

use crate::world::{Agent, Failpoint, World};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scenario {
    Create,
    CreateAndStart,
    Start,
    Stop,
    ForceStop,
    Restart,
    Delete,
    ForceDelete,
}

const SCENARIOS: [Scenario; 8] = [
    Scenario::Create,
    Scenario::CreateAndStart,
    Scenario::Start,
    Scenario::Stop,
    Scenario::ForceStop,
    Scenario::Restart,
    Scenario::Delete,
    Scenario::ForceDelete,
];

impl Scenario {
    /// What is there before: a VM `web`, running or not, or nothing.
    async fn prepare(self, agent: &Agent) {
        match self {
            Self::Create | Self::CreateAndStart => {}
            Self::Start | Self::Delete => drop(agent.created("web", false).await),
            Self::Stop | Self::ForceStop | Self::Restart | Self::ForceDelete => {
                drop(agent.created("web", true).await)
            }
        }
        agent.created("bystander", true).await;
    }

    async fn act(self, agent: &Agent) -> Result<OperationView> {
        let me = Agent::me();
        let use_cases = &agent.use_cases;
        let power = PowerCommand {
            vm: "web".into(),
            request_id: None,
        };
        let stop = |force| StopCommand {
            vm: "web".into(),
            force,
            timeout: None,
            request_id: None,
        };
        let delete = |force| DeleteVmCommand {
            vm: "web".into(),
            force,
            ..DeleteVmCommand::default()
        };
        match self {
            Self::Create => agent.create("web", false).await,
            Self::CreateAndStart => agent.create("web", true).await,
            Self::Start => use_cases.start_vm.execute(&me, power).await,
            Self::Stop => use_cases.stop_vm.execute(&me, stop(false)).await,
            Self::ForceStop => use_cases.stop_vm.execute(&me, stop(true)).await,
            Self::Restart => use_cases.restart_vm.execute(&me, stop(false)).await,
            Self::Delete => use_cases.delete_vm.execute(&me, delete(false)).await,
            Self::ForceDelete => use_cases.delete_vm.execute(&me, delete(true)).await,
        }
    }

    /// The power of `web` once it is done; `None`: it is gone.
    fn outcome(self) -> Option<ObservedPower> {
        match self {
            Self::Create => Some(ObservedPower::Off),
            Self::CreateAndStart | Self::Start | Self::Restart => Some(ObservedPower::Running),
            Self::Stop | Self::ForceStop => Some(ObservedPower::Off),
            Self::Delete | Self::ForceDelete => None,
        }
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
}

/// Breaks at one site, and remembers whether it came there and which sites there are.
struct Breaker {
    at: Mutex<Option<(FailSite, FailAction)>>,
    armed: Mutex<bool>,
    reached: Mutex<bool>,
    seen: Mutex<Vec<FailSite>>,
}

impl Breaker {
    fn new(at: Option<(FailSite, FailAction)>) -> Arc<Self> {
        Arc::new(Self {
            at: Mutex::new(at),
            armed: Mutex::new(false),
            reached: Mutex::new(false),
            seen: Mutex::new(Vec::new()),
        })
    }

    fn failpoint(self: &Arc<Self>) -> Failpoint {
        let this = Arc::clone(self);
        Arc::new(move |site| {
            if !*this.armed.lock() {
                return FailAction::Continue;
            }
            this.seen.lock().push(site.clone());
            match &*this.at.lock() {
                Some((wanted, action)) if wanted == site => {
                    *this.reached.lock() = true;
                    action.clone()
                }
                _ => FailAction::Continue,
            }
        })
    }

    fn arm(&self) {
        *self.armed.lock() = true;
    }
}

/// Runs a scenario undisturbed and lists the sites it passes.
fn sites(scenario: Scenario, fail_last: bool) -> Vec<FailSite> {
    let world = World::new();
    let breaker = Breaker::new(None);
    runtime().block_on(async {
        let agent = world.start_with(Some(breaker.failpoint())).await;
        scenario.prepare(&agent).await;
        breaker.arm();
        if fail_last {
            let last = passed(scenario);
            *breaker.at.lock() = last.map(|site| {
                (
                    site,
                    FailAction::Fail(Error::new(ErrorCode::IoFailed, "made to fail")),
                )
            });
        }
        let view = scenario.act(&agent).await.unwrap();
        agent.finished(&view).await;
    });
    let mut seen = breaker.seen.lock().clone();
    let mut once = BTreeSet::new();
    seen.retain(|site| once.insert(format!("{site:?}")));
    seen
}

/// The last step's `after` site of the undisturbed run.
fn passed(scenario: Scenario) -> Option<FailSite> {
    // A runtime within a runtime is not allowed: look from another thread.
    std::thread::spawn(move || sites(scenario, false))
        .join()
        .unwrap()
        .into_iter()
        .rfind(|site| site.moment == FailMoment::AfterPerform)
}

/// Runs a scenario until it hangs at `site`, then drops everything, as `kill -9` does.
fn crash(world: &World, scenario: Scenario, first: Option<FailSite>, site: &FailSite) {
    let breaker = Breaker::new(Some((site.clone(), FailAction::Hang)));
    let other = first.map(|site| {
        Breaker::new(Some((
            site,
            FailAction::Fail(Error::new(ErrorCode::IoFailed, "made to fail")),
        )))
    });
    let runtime = runtime();
    runtime.block_on(async {
        let crash_at = breaker.failpoint();
        let fail_at = other.as_ref().map(Breaker::failpoint);
        let both: Failpoint =
            Arc::new(
                move |site| match fail_at.as_ref().map(|fail_at| fail_at(site)) {
                    Some(FailAction::Fail(error)) => FailAction::Fail(error),
                    _ => crash_at(site),
                },
            );
        let agent = world.start_with(Some(both)).await;
        scenario.prepare(&agent).await;
        breaker.arm();
        if let Some(other) = &other {
            other.arm();
        }
        scenario.act(&agent).await.unwrap();
        agent
            .until("the crash site", |_| {
                Box::pin(async { *breaker.reached.lock() })
            })
            .await;
    });
    runtime.shutdown_timeout(Duration::from_millis(200));
    assert!(*breaker.reached.lock(), "{site:?} was not reached");
}

/// Starts again, waits until all is done and audits. Returns the last operation's status.
fn recover(
    world: &World,
    scenario: Scenario,
    crash_in_recovery: Option<&FailSite>,
) -> OperationStatus {
    if let Some(site) = crash_in_recovery {
        let breaker = Breaker::new(Some((site.clone(), FailAction::Hang)));
        breaker.arm();
        let runtime = runtime();
        runtime.block_on(async {
            let agent = world.start_with(Some(breaker.failpoint())).await;
            // The recovery may end before it comes to this site: then there is nothing to crash.
            agent
                .until("the second crash or the end", |agent| {
                    let breaker = Arc::clone(&breaker);
                    Box::pin(async move {
                        *breaker.reached.lock()
                            || agent
                                .use_cases
                                .list_operations
                                .execute(&Agent::me(), &Default::default())
                                .await
                                .unwrap()
                                .is_empty()
                    })
                })
                .await;
        });
        runtime.shutdown_timeout(Duration::from_millis(200));
    }
    let status = runtime().block_on(async {
        let agent = world.start().await;
        agent.idle().await;
        let all = ghost_application::operation::ListOperationsCommand {
            vm: None,
            all: true,
        };
        let operations = agent
            .use_cases
            .list_operations
            .execute(&Agent::me(), &all)
            .await
            .unwrap();
        let name = match scenario {
            Scenario::Create | Scenario::CreateAndStart => "create_vm",
            Scenario::Start => "start_vm",
            Scenario::Stop | Scenario::ForceStop => "stop_vm",
            Scenario::Restart => "restart_vm",
            Scenario::Delete | Scenario::ForceDelete => "delete_vm",
        };
        let ours = operations
            .iter()
            .find(|view| view.operation.kind.name() == name && view.operation.subject == "web")
            .expect("the operation is still known");
        ours.operation.status
    });
    world.audit();
    assert_eq!(
        world.power("bystander"),
        Some(ObservedPower::Running),
        "a bystander was touched"
    );
    status
}

#[test]
fn a_crash_at_every_site_is_resumed_to_the_end() {
    let mut cases = 0;
    for scenario in SCENARIOS {
        for site in sites(scenario, false) {
            let world = World::new();
            crash(&world, scenario, None, &site);
            let status = recover(&world, scenario, None);
            assert_eq!(
                status,
                OperationStatus::Succeeded,
                "{scenario:?} at {site:?}"
            );
            assert_eq!(
                world.power("web"),
                scenario.outcome(),
                "{scenario:?} at {site:?}"
            );
            cases += 1;
        }
    }
    assert!(cases >= 60, "only {cases} crash sites");
}

#[test]
fn a_second_crash_in_the_recovery_is_survived_too() {
    for scenario in [Scenario::CreateAndStart, Scenario::Delete] {
        let all = sites(scenario, false);
        for first in &all {
            for second in &all {
                let world = World::new();
                crash(&world, scenario, None, first);
                let status = recover(&world, scenario, Some(second));
                assert_eq!(
                    status,
                    OperationStatus::Succeeded,
                    "{scenario:?} at {first:?} then {second:?}"
                );
                assert_eq!(world.power("web"), scenario.outcome());
            }
        }
    }
}

#[test]
fn a_failure_at_every_step_of_create_leaves_nothing_behind() {
    for site in sites(Scenario::CreateAndStart, false) {
        if site.moment == FailMoment::BeforeFinish {
            continue;
        }
        let world = World::new();
        let breaker = Breaker::new(Some((
            site.clone(),
            FailAction::Fail(Error::new(ErrorCode::IoFailed, "made to fail")),
        )));
        runtime().block_on(async {
            let agent = world.start_with(Some(breaker.failpoint())).await;
            breaker.arm();
            let view = agent.create("web", true).await.unwrap();
            let view = agent.finished(&view).await;
            assert_eq!(view.operation.status, OperationStatus::Failed, "{site:?}");
            assert_eq!(
                view.operation.error.as_ref().unwrap().code(),
                ErrorCode::IoFailed
            );
            let failed: Vec<_> = view
                .operation
                .journal
                .iter()
                .filter(|line| line.event == ghost_domain::JournalEvent::Failed)
                .map(|line| line.step.as_str())
                .collect();
            assert_eq!(
                failed,
                [site.step],
                "it failed at another step than it was made to"
            );
            assert_eq!(
                agent.vm("web").await.unwrap_err().code(),
                ErrorCode::VmNotFound
            );
        });
        world.audit();
        assert_eq!(world.power("web"), None);
    }
}

#[test]
fn a_crash_while_undoing_a_create_goes_on_undoing() {
    let last = passed(Scenario::CreateAndStart).unwrap();
    let undo_sites: Vec<FailSite> = sites(Scenario::CreateAndStart, true)
        .into_iter()
        .filter(|site| matches!(site.moment, FailMoment::BeforeUndo | FailMoment::AfterUndo))
        .collect();
    assert!(
        undo_sites.len() >= 10,
        "only {} undo sites",
        undo_sites.len()
    );
    for site in undo_sites {
        let world = World::new();
        crash(&world, Scenario::CreateAndStart, Some(last.clone()), &site);
        let status = recover(&world, Scenario::CreateAndStart, None);
        assert_eq!(status, OperationStatus::Failed, "{site:?}");
        assert_eq!(world.power("web"), None, "{site:?}");
    }
}
