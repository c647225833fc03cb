//! The contract of [`ghost_domain::ports::Hypervisor`], as checks that hold for every adapter.

use ghost_domain::ErrorCode;
use ghost_domain::ports::HypervisorEvent;
use ghost_domain::vm::{ObservationSource, ObservedPower};
use ghost_domain::{ByteSize, VmId};

use super::support::{Events, Meddling, Subject, definition, power, rebuilt};

/// Makes a test of each check for one kind of subject; `$subject` is an async function that takes
/// the name of the check and returns a [`Subject`].
macro_rules! contract {
    ($subject:path) => {
        $crate::hypervisor::contract::contract!(@each $subject:
            define_is_idempotent_and_the_record_comes_back
            redefining_changes_the_record
            power_on_and_off_is_idempotent_and_told
            pause_and_resume_are_idempotent_and_told
            undefine_is_idempotent_and_told
            a_running_vm_survives_undefine
            names_are_not_taken_from_others
            unknown_vms_are_not_found
            strangers_are_not_touched
            a_vm_that_is_off_is_not_paused_resumed_or_shut_down
            statistics_are_of_active_vms
            order_holds_when_calls_are_dropped
            a_destroy_behind_our_back_is_no_crash
            an_undefine_behind_our_back_is_told
            an_edit_behind_our_back_is_drift
            a_crash_is_told_as_one
            guest_access_is_written_and_nothing_else
            two_calls_at_once_agree
            what_is_there_is_told
        );
    };
    (@each $subject:path: $($check:ident)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $check() {
                if let Some(subject) = $subject(stringify!($check)).await {
                    $crate::hypervisor::contract::$check(&subject).await;
                }
            }
        )*
    };
}
pub(crate) use contract;

pub(crate) async fn define_is_idempotent_and_the_record_comes_back(subject: &dyn Subject) {
    let hypervisor = subject.hypervisor();
    let mut events = Events::of(hypervisor);
    let definition = definition(subject, "ct-define");
    let id = definition.vm.id;
    hypervisor.define(&definition).await.unwrap();
    events
        .until(
            "Defined",
            |event| matches!(event, HypervisorEvent::Defined { id: of } if *of == id),
        )
        .await;
    hypervisor.define(&definition).await.unwrap();
    let seen = hypervisor.get(id).await.unwrap().expect("it is there");
    assert_eq!(seen.id, id);
    assert_eq!(seen.name, definition.vm.name.as_str());
    assert_eq!(seen.observation.power, ObservedPower::Off);
    assert_eq!(seen.observation.source, ObservationSource::LibvirtSync);
    assert_eq!(seen.record, Some(rebuilt(&definition.vm)));
    assert_eq!(seen.drift, Vec::<String>::new());
    let listed = hypervisor.list().await.unwrap();
    let listed = listed
        .iter()
        .find(|one| one.id == id)
        .expect("it is listed");
    assert_eq!(listed.record, seen.record);
    assert_eq!(listed.drift, seen.drift);
    hypervisor.undefine(id).await.unwrap();
}

pub(crate) async fn redefining_changes_the_record(subject: &dyn Subject) {
    let hypervisor = subject.hypervisor();
    let mut definition = definition(subject, "ct-redefine");
    let id = definition.vm.id;
    hypervisor.define(&definition).await.unwrap();
    assert!(hypervisor.get(id).await.unwrap().is_some());
    definition.vm.generation = 2;
    definition.vm.spec.vcpus = 2;
    definition.vm.spec.memory = ByteSize::from_mib(64);
    hypervisor.define(&definition).await.unwrap();
    let seen = hypervisor.get(id).await.unwrap().unwrap();
    assert_eq!(seen.record, Some(rebuilt(&definition.vm)));
    assert_eq!(seen.drift, Vec::<String>::new());
    hypervisor.undefine(id).await.unwrap();
}

pub(crate) async fn power_on_and_off_is_idempotent_and_told(subject: &dyn Subject) {
    let hypervisor = subject.hypervisor();
    let definition = definition(subject, "ct-power");
    let id = definition.vm.id;
    hypervisor.define(&definition).await.unwrap();
    let mut events = Events::of(hypervisor);
    hypervisor.start(id).await.unwrap();
    events.power(id, ObservedPower::Running).await;
    hypervisor.start(id).await.unwrap();
    assert_eq!(
        power(hypervisor, id).await.unwrap(),
        Some(ObservedPower::Running)
    );
    hypervisor.power_off(id).await.unwrap();
    let (reason, crashed) = events.power(id, ObservedPower::Off).await;
    assert_eq!(reason, "destroyed");
    assert!(!crashed);
    hypervisor.power_off(id).await.unwrap();
    assert_eq!(
        power(hypervisor, id).await.unwrap(),
        Some(ObservedPower::Off)
    );
    hypervisor.undefine(id).await.unwrap();
}

pub(crate) async fn pause_and_resume_are_idempotent_and_told(subject: &dyn Subject) {
    let hypervisor = subject.hypervisor();
    let definition = definition(subject, "ct-pause");
    let id = definition.vm.id;
    hypervisor.define(&definition).await.unwrap();
    hypervisor.start(id).await.unwrap();
    let mut events = Events::of(hypervisor);
    hypervisor.resume(id).await.unwrap();
    hypervisor.pause(id).await.unwrap();
    let (reason, _) = events.power(id, ObservedPower::Paused).await;
    assert_eq!(reason, "user");
    hypervisor.pause(id).await.unwrap();
    assert_eq!(
        power(hypervisor, id).await.unwrap(),
        Some(ObservedPower::Paused)
    );
    hypervisor.resume(id).await.unwrap();
    events.power(id, ObservedPower::Running).await;
    hypervisor.resume(id).await.unwrap();
    assert_eq!(
        power(hypervisor, id).await.unwrap(),
        Some(ObservedPower::Running)
    );
    hypervisor.power_off(id).await.unwrap();
    hypervisor.undefine(id).await.unwrap();
}

pub(crate) async fn undefine_is_idempotent_and_told(subject: &dyn Subject) {
    let hypervisor = subject.hypervisor();
    let definition = definition(subject, "ct-undefine");
    let id = definition.vm.id;
    hypervisor.define(&definition).await.unwrap();
    let mut events = Events::of(hypervisor);
    hypervisor.undefine(id).await.unwrap();
    events
        .until(
            "Undefined",
            |event| matches!(event, HypervisorEvent::Undefined { id: of } if *of == id),
        )
        .await;
    hypervisor.undefine(id).await.unwrap();
    assert_eq!(hypervisor.get(id).await.unwrap(), None);
    assert!(
        !hypervisor
            .list()
            .await
            .unwrap()
            .iter()
            .any(|one| one.id == id)
    );
}

pub(crate) async fn a_running_vm_survives_undefine(subject: &dyn Subject) {
    let hypervisor = subject.hypervisor();
    let definition = definition(subject, "ct-survive");
    let id = definition.vm.id;
    hypervisor.define(&definition).await.unwrap();
    hypervisor.start(id).await.unwrap();
    hypervisor.undefine(id).await.unwrap();
    assert_eq!(
        power(hypervisor, id).await.unwrap(),
        Some(ObservedPower::Running)
    );
    // Once more, as an undo that is repeated.
    hypervisor.undefine(id).await.unwrap();
    hypervisor.define(&definition).await.unwrap();
    assert_eq!(
        power(hypervisor, id).await.unwrap(),
        Some(ObservedPower::Running)
    );
    hypervisor.power_off(id).await.unwrap();
    hypervisor.undefine(id).await.unwrap();
    assert_eq!(hypervisor.get(id).await.unwrap(), None);
}

pub(crate) async fn names_are_not_taken_from_others(subject: &dyn Subject) {
    let hypervisor = subject.hypervisor();
    let first = definition(subject, "ct-name");
    let foreign = VmId::random();
    let name = first.vm.name.to_string();
    subject.meddle(Meddling::DefineForeign(foreign, name)).await;
    let error = hypervisor.define(&first).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::NameTaken, "{error:?}");
    assert!(error.hint_text().is_some());
    assert_eq!(hypervisor.get(first.vm.id).await.unwrap(), None);

    let mine = definition(subject, "ct-name");
    let mut twin = definition(subject, "ct-name");
    twin.vm.name = mine.vm.name.clone();
    hypervisor.define(&mine).await.unwrap();
    let error = hypervisor.define(&twin).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::NameTaken, "{error:?}");
    hypervisor.undefine(mine.vm.id).await.unwrap();
}

pub(crate) async fn unknown_vms_are_not_found(subject: &dyn Subject) {
    let hypervisor = subject.hypervisor();
    nothing_can_be_done(subject, VmId::random()).await;
    hypervisor.undefine(VmId::random()).await.unwrap();
}

async fn nothing_can_be_done(subject: &dyn Subject, id: VmId) {
    let hypervisor = subject.hypervisor();
    assert_eq!(hypervisor.get(id).await.unwrap(), None);
    for (what, outcome) in [
        ("start", hypervisor.start(id).await),
        ("shut_down", hypervisor.shut_down(id).await),
        ("power_off", hypervisor.power_off(id).await),
        ("pause", hypervisor.pause(id).await),
        ("resume", hypervisor.resume(id).await),
    ] {
        let error = outcome.expect_err(what);
        assert_eq!(error.code(), ErrorCode::VmNotFound, "{what}: {error:?}");
    }
}

pub(crate) async fn strangers_are_not_touched(subject: &dyn Subject) {
    let hypervisor = subject.hypervisor();
    let foreign = VmId::random();
    let name = format!("ct-stranger-{}", &foreign.to_string()[..8]);
    subject.meddle(Meddling::DefineForeign(foreign, name)).await;
    nothing_can_be_done(subject, foreign).await;
    assert!(
        !hypervisor
            .list()
            .await
            .unwrap()
            .iter()
            .any(|one| one.id == foreign)
    );
    let error = hypervisor.undefine(foreign).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::VmNotFound);
    // It is still there: its name is still taken.
    let mut mine = definition(subject, "ct-stranger");
    mine.vm.name =
        ghost_domain::VmName::new(format!("ct-stranger-{}", &foreign.to_string()[..8])).unwrap();
    let error = hypervisor.define(&mine).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::NameTaken);
}

pub(crate) async fn a_vm_that_is_off_is_not_paused_resumed_or_shut_down(subject: &dyn Subject) {
    let hypervisor = subject.hypervisor();
    let definition = definition(subject, "ct-off");
    let id = definition.vm.id;
    hypervisor.define(&definition).await.unwrap();
    for outcome in [
        hypervisor.pause(id).await,
        hypervisor.resume(id).await,
        hypervisor.shut_down(id).await,
    ] {
        assert_eq!(outcome.unwrap_err().code(), ErrorCode::VmNotRunning);
    }
    hypervisor.undefine(id).await.unwrap();
}

pub(crate) async fn statistics_are_of_active_vms(subject: &dyn Subject) {
    let hypervisor = subject.hypervisor();
    let on = definition(subject, "ct-stats");
    let off = definition(subject, "ct-stats");
    hypervisor.define(&on).await.unwrap();
    hypervisor.define(&off).await.unwrap();
    hypervisor.start(on.vm.id).await.unwrap();
    let statistics = hypervisor.statistics().await.unwrap();
    let of = |id: VmId| statistics.iter().find(|one| one.id == Some(id));
    assert!(of(on.vm.id).is_some());
    assert!(of(off.vm.id).is_none());
    hypervisor.power_off(on.vm.id).await.unwrap();
    for id in [on.vm.id, off.vm.id] {
        hypervisor.undefine(id).await.unwrap();
    }
}

pub(crate) async fn order_holds_when_calls_are_dropped(subject: &dyn Subject) {
    use std::future::Future as _;
    use std::task::{Context, Waker};

    let hypervisor = subject.hypervisor();
    let definition = definition(subject, "ct-order");
    let id = definition.vm.id;
    hypervisor.define(&definition).await.unwrap();
    for _ in 0..3 {
        // The start is asked for and nobody waits for it; whether it happens is open, but never
        // after the power was cut.
        {
            let mut start = Box::pin(hypervisor.start(id));
            let _ = start.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        }
        hypervisor.power_off(id).await.unwrap();
        assert_eq!(
            power(hypervisor, id).await.unwrap(),
            Some(ObservedPower::Off)
        );
    }
    hypervisor.undefine(id).await.unwrap();
}

pub(crate) async fn a_destroy_behind_our_back_is_no_crash(subject: &dyn Subject) {
    let hypervisor = subject.hypervisor();
    let definition = definition(subject, "ct-destroy");
    let id = definition.vm.id;
    hypervisor.define(&definition).await.unwrap();
    hypervisor.start(id).await.unwrap();
    let mut events = Events::of(hypervisor);
    subject.meddle(Meddling::Destroy(id)).await;
    let (_, crashed) = events.power(id, ObservedPower::Off).await;
    assert!(!crashed);
    hypervisor.undefine(id).await.unwrap();
}

pub(crate) async fn an_undefine_behind_our_back_is_told(subject: &dyn Subject) {
    let hypervisor = subject.hypervisor();
    let definition = definition(subject, "ct-gone");
    let id = definition.vm.id;
    hypervisor.define(&definition).await.unwrap();
    assert!(hypervisor.get(id).await.unwrap().is_some());
    let mut events = Events::of(hypervisor);
    subject.meddle(Meddling::Undefine(id)).await;
    events
        .until(
            "Undefined",
            |event| matches!(event, HypervisorEvent::Undefined { id: of } if *of == id),
        )
        .await;
    assert_eq!(hypervisor.get(id).await.unwrap(), None);
    assert_eq!(
        hypervisor.start(id).await.unwrap_err().code(),
        ErrorCode::VmNotFound
    );
}

pub(crate) async fn an_edit_behind_our_back_is_drift(subject: &dyn Subject) {
    let hypervisor = subject.hypervisor();
    let definition = definition(subject, "ct-edit");
    let id = definition.vm.id;
    hypervisor.define(&definition).await.unwrap();
    assert!(hypervisor.get(id).await.unwrap().unwrap().drift.is_empty());
    let mut events = Events::of(hypervisor);
    subject.meddle(Meddling::SetVcpus(id, 3)).await;
    events
        .until(
            "Defined",
            |event| matches!(event, HypervisorEvent::Defined { id: of } if *of == id),
        )
        .await;
    let seen = hypervisor.get(id).await.unwrap().unwrap();
    assert_eq!(seen.drift, ["vcpus: libvirt has 3, the record has 1"]);
    assert_eq!(seen.record, Some(rebuilt(&definition.vm)));
    hypervisor.define(&definition).await.unwrap();
    assert!(hypervisor.get(id).await.unwrap().unwrap().drift.is_empty());
    hypervisor.undefine(id).await.unwrap();
}

pub(crate) async fn a_crash_is_told_as_one(subject: &dyn Subject) {
    if !subject.can_crash() {
        println!("skipped: this hypervisor has no process to kill");
        return;
    }
    let hypervisor = subject.hypervisor();
    let definition = definition(subject, "ct-crash");
    let id = definition.vm.id;
    hypervisor.define(&definition).await.unwrap();
    hypervisor.start(id).await.unwrap();
    let mut events = Events::of(hypervisor);
    subject.meddle(Meddling::Crash(id)).await;
    let (_, crashed) = events.power(id, ObservedPower::Crashed).await;
    assert!(crashed);
    assert_eq!(
        power(hypervisor, id).await.unwrap(),
        Some(ObservedPower::Crashed)
    );
    hypervisor.start(id).await.unwrap();
    events.power(id, ObservedPower::Running).await;
    hypervisor.power_off(id).await.unwrap();
    hypervisor.undefine(id).await.unwrap();
}

pub(crate) async fn guest_access_is_written_and_nothing_else(subject: &dyn Subject) {
    let hypervisor = subject.hypervisor();
    let mut definition = definition(subject, "ct-access");
    definition.vm.spec.tags = [("a <&\"'> b".to_owned(), "100 %\u{7}ö".to_owned())].into();
    let id = definition.vm.id;
    let record = async || hypervisor.get(id).await.unwrap().unwrap();
    hypervisor.define(&definition).await.unwrap();
    let before = record().await;
    assert!(before.record.as_ref().unwrap().spec.guest.access);
    let mut events = Events::of(hypervisor);
    // Off, running, and paused.
    for (round, access) in [false, true, true, false].into_iter().enumerate() {
        match round {
            1 => hypervisor.start(id).await.unwrap(),
            2 => hypervisor.pause(id).await.unwrap(),
            _ => {}
        }
        hypervisor.set_guest_access(id, access).await.unwrap();
        let mut expected = before.record.clone().unwrap();
        expected.spec.guest.access = access;
        let now = record().await;
        assert_eq!(now.record, Some(expected), "round {round}");
        assert_eq!(now.drift, before.drift);
        if round == 0 {
            events
                .until(
                    "Defined",
                    |event| matches!(event, HypervisorEvent::Defined { id: of } if *of == id),
                )
                .await;
        }
    }
    // One that runs without a definition.
    hypervisor.undefine(id).await.unwrap();
    hypervisor.set_guest_access(id, true).await.unwrap();
    hypervisor.power_off(id).await.unwrap();
    let error = hypervisor.set_guest_access(id, true).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::VmNotFound);
    let foreign = VmId::random();
    let name = format!("ct-access-{}", &foreign.to_string()[..8]);
    subject.meddle(Meddling::DefineForeign(foreign, name)).await;
    let error = hypervisor.set_guest_access(foreign, false).await;
    assert_eq!(error.unwrap_err().code(), ErrorCode::VmNotFound);
    subject.meddle(Meddling::Undefine(foreign)).await;
}

pub(crate) async fn two_calls_at_once_agree(subject: &dyn Subject) {
    let hypervisor = subject.hypervisor();
    let definition = definition(subject, "ct-both");
    let id = definition.vm.id;
    let (one, two) = tokio::join!(
        hypervisor.define(&definition),
        hypervisor.define(&definition)
    );
    one.unwrap();
    two.unwrap();
    let (one, two) = tokio::join!(hypervisor.start(id), hypervisor.start(id));
    one.unwrap();
    two.unwrap();
    let (one, two) = tokio::join!(hypervisor.power_off(id), hypervisor.power_off(id));
    one.unwrap();
    two.unwrap();
    let (one, two) = tokio::join!(hypervisor.undefine(id), hypervisor.undefine(id));
    one.unwrap();
    two.unwrap();
}

pub(crate) async fn what_is_there_is_told(subject: &dyn Subject) {
    let info = subject.hypervisor().info().await.unwrap();
    assert!(!info.uri.is_empty());
    assert!(!info.libvirt_version.is_empty());
    assert!(!info.accelerator_reason.is_empty());
}
