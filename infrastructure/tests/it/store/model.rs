//! Random histories against a map in memory, with reopenings in between.

use std::path::Path;

use ghost_domain::Timestamp;
use ghost_domain::ports::Change;
use ghost_infrastructure::store::Engine;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::samples::{
    Model, api_key, bulky_vm, certificate, credential_id, image, join_token, lockdown, operation,
    operation_id, put_vm, vm_id,
};
use super::{on_both_engines, reopen, run, scratch};

on_both_engines!(it_does_what_a_map_does);

#[derive(Clone, Debug)]
enum Act {
    Commit(Vec<Change>),
    Export,
    /// Closed in order, or just dropped.
    Reopen(bool),
}

/// Few identities, so that records are replaced and deleted often.
fn change() -> impl Strategy<Value = Change> {
    let number = 0u64..6;
    prop_oneof![
        3 => (number.clone(), 0u64..100).prop_map(|(number, version)| put_vm(number, version)),
        1 => (number.clone(), 0usize..60_000).prop_map(|(number, size)| bulky_vm(number, size)),
        2 => number.clone().prop_map(|number| Change::DeleteVm(vm_id(number))),
        2 => number.clone().prop_map(|number| Change::PutOperation(Box::new(operation(number)))),
        1 => number.clone().prop_map(|number| Change::DeleteOperation(operation_id(number))),
        1 => number.clone().prop_map(|number| Change::PutImage(image(number))),
        1 => number.clone().prop_map(|number| Change::DeleteImage(image(number).name)),
        1 => number.clone().prop_map(|number| Change::PutCertificate(certificate(number))),
        1 => number.clone().prop_map(|number| Change::DeleteCertificate(credential_id(number))),
        1 => number.clone().prop_map(|number| Change::PutApiKey(api_key(number))),
        1 => number.clone().prop_map(|number| Change::DeleteApiKey(credential_id(number))),
        1 => number.clone().prop_map(|number| Change::PutJoinToken(join_token(number))),
        1 => number.clone().prop_map(|number| Change::DeleteJoinToken(credential_id(number))),
        1 => number.clone().prop_map(|number| Change::PutLockdown(lockdown(number))),
        1 => Just(Change::DeleteLockdown),
        1 => (0i64..9).prop_map(|at| Change::PutDeleteConsent(Timestamp::from_unix_millis(at))),
        1 => number.prop_map(|number| Change::PutBootId(format!("boot {number}"))),
    ]
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        8 => proptest::collection::vec(change(), 0..6).prop_map(Act::Commit),
        1 => Just(Act::Export),
        1 => any::<bool>().prop_map(Act::Reopen),
    ]
}

fn it_does_what_a_map_does(engine: Engine) {
    let mut runner = TestRunner::new(Config {
        cases: 12,
        // A failing history is printed; there is no file of ours to remember it in.
        failure_persistence: None,
        ..Config::default()
    });
    runner
        .run(&proptest::collection::vec(act(), 1..60), |acts| {
            let directory = scratch();
            play(directory.path(), engine, acts);
            Ok(())
        })
        .unwrap();
}

fn play(directory: &Path, engine: Engine, acts: Vec<Act>) {
    let mut model = Model::default();
    let mut store = reopen(directory, engine);
    for act in acts.into_iter().chain([Act::Reopen(false)]) {
        match act {
            Act::Commit(changes) => {
                run(store.commit(changes.clone())).unwrap();
                model.apply(&changes);
            }
            Act::Export => run(store.export()).unwrap(),
            Act::Reopen(in_order) => {
                if in_order {
                    run(store.close()).unwrap();
                }
                drop(store);
                store = reopen(directory, engine);
                assert_eq!(run(store.load()).unwrap(), model.contents());
            }
        }
    }
}
