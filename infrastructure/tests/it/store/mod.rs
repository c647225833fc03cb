//! One suite for the `StateStore` port, run on both engines.

mod children;
mod contract;
mod crash;
mod damage;
mod full;
mod measure;
mod model;
mod samples;

use std::future::Future;
use std::path::Path;
use std::sync::{Arc, Once};
use std::time::Duration;

use ghost_domain::ports::{StateStore, StoreContents};
use ghost_infrastructure::store::{Engine, StoreOptions, open};
use tempfile::TempDir;

/// Runs each function, which takes an `Engine`, as one test for each engine.
macro_rules! on_both_engines {
    ($($name:ident),* $(,)?) => {
        mod sled {
            $(#[test] fn $name() { super::$name(ghost_infrastructure::store::Engine::Sled); })*
        }
        mod redb {
            $(#[test] fn $name() { super::$name(ghost_infrastructure::store::Engine::Redb); })*
        }
    };
}
use on_both_engines;

/// Options for tests: a small reserve, and healing without a pause.
fn options(directory: &Path, engine: Engine) -> StoreOptions {
    let mut options = StoreOptions::new(directory.join("store"));
    options.engine = engine;
    options.ballast_bytes = 1 << 20;
    options.limits.heal_interval = Duration::ZERO;
    options
}

fn reopen(directory: &Path, engine: Engine) -> Arc<dyn StateStore> {
    open(options(directory, engine)).unwrap()
}

/// Opens the store, reads everything, and closes it.
fn contents_of(directory: &Path, engine: Engine) -> StoreContents {
    let store = reopen(directory, engine);
    run(async {
        let contents = store.load().await.unwrap();
        store.close().await.unwrap();
        contents
    })
}

/// A directory in memory where there is one: these tests ask what is in the files, not how they
/// survive, and thousands of syncs on a busy disk take minutes.
fn scratch() -> TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap())
}

/// Damaged files make the engines panic, which the store catches. Hundreds of backtraces would take
/// minutes and hide what matters; panics elsewhere are shown as ever.
fn hush_engine_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let shown = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if std::thread::current().name() != Some("ghost-store-io") {
                shown(panic);
            }
        }));
    });
}

fn run<F: Future>(work: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(work)
}
