//! How fast it is. Not a test: `cargo test -p ghost-infrastructure --release --test it -- --ignored
//! --nocapture store::measure`.

use std::time::{Duration, Instant};

use ghost_infrastructure::store::{Engine, open};
use tempfile::tempdir;

use super::samples::put_vm;
use super::{children, on_both_engines, options, reopen, run};

const TIME: Duration = Duration::from_secs(2);

#[test]
#[ignore = "a measurement"]
fn measure() {
    for engine in Engine::ALL {
        measure_one(engine);
    }
}

fn measure_one(engine: Engine) {
    let directory = tempdir().unwrap();
    let store = reopen(directory.path(), engine);
    for committers in [1, 64] {
        let done = run(async {
            let end = Instant::now() + TIME;
            let work = (0..committers).map(|number| {
                let store = &store;
                async move {
                    let mut done = 0u64;
                    while Instant::now() < end {
                        store.commit(vec![put_vm(number, done)]).await.unwrap();
                        done += 1;
                    }
                    done
                }
            });
            futures::future::join_all(work)
                .await
                .into_iter()
                .sum::<u64>()
        });
        println!(
            "{engine}: {committers} committers, {} commits/s",
            done / TIME.as_secs()
        );
    }
    run(async {
        for hundred in 0..10 {
            let vms = (0..100).map(|number| put_vm(hundred * 100 + number, 1));
            store.commit(vms.collect()).await.unwrap();
        }
    });
    drop(store);
    for helper in [None, Some(children::helper())] {
        let with = if helper.is_some() { "with" } else { "without" };
        let mut options = options(directory.path(), engine);
        options.helper = helper;
        let start = Instant::now();
        let store = open(options).unwrap();
        let opened = start.elapsed();
        let vms = run(store.load()).unwrap().vms.len();
        let loaded = start.elapsed() - opened;
        println!(
            "{engine}: {vms} VMs, opened {with} helper in {opened:.1?}, loaded in {loaded:.1?}"
        );
        let start = Instant::now();
        run(store.export()).unwrap();
        println!("{engine}: export in {:.1?}", start.elapsed());
    }
}

on_both_engines!(a_thousand_vms_are_loaded);

/// The numbers above are for people; that a thousand records come back is for the suite.
fn a_thousand_vms_are_loaded(engine: Engine) {
    let directory = tempdir().unwrap();
    let store = reopen(directory.path(), engine);
    run(store.commit((0..1000).map(|number| put_vm(number, 1)).collect())).unwrap();
    drop(store);
    let store = reopen(directory.path(), engine);
    assert_eq!(run(store.load()).unwrap().vms.len(), 1000);
}
