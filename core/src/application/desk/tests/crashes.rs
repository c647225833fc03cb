//! Core is killed at every commit, before it took effect and after: what was queued is done once.

use std::sync::Arc;
use std::time::Duration;

use ghost_domain::fleet::CommandStatus;
use parking_lot::Mutex;

use super::support::*;
use super::*;

/// Three commands over as many lives of Core as it takes; says whether one of them was killed.
async fn live(kill_at: usize, after: bool) -> bool {
    let shared = Arc::new(SharedMemory::default());
    let disk = Arc::new(Mutex::new(Disk::default()));
    let host = {
        let first = core(MemoryStore::shared(&shared), "core-0").await.unwrap();
        first.add_host().await
    };
    let mut killed = false;
    for life in 1..4 {
        let memory = MemoryStore::shared(&shared);
        let left = if life == 1 { kill_at } else { usize::MAX };
        let store = Dying::at(Arc::clone(&memory) as _, left, after);
        let died = store.died.clone();
        let work = async {
            let core = core(Arc::clone(&store) as _, &format!("core-{life}"))
                .await
                .unwrap();
            let link = core.link(peer(host));
            let now = core.fleet.clock().now();
            let obeying = tokio::spawn(obey(link, Arc::clone(&disk), now));
            // A caller that never learns whether it was queued asks again with the same key.
            for number in 0..3 {
                let request = request(host, &format!("key-{number}"), "web");
                core.desk.commands().queue(request).await.unwrap();
            }
            let all_done = || {
                core.fleet.read(|state| {
                    state.commands().count() == 3
                        && state
                            .commands()
                            .all(|command| command.status == CommandStatus::Succeeded)
                })
            };
            let finished = async {
                while !all_done() {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            };
            // Of the paused clock: it costs no time where all goes well.
            let in_time = tokio::time::timeout(Duration::from_secs(600), finished).await;
            if in_time.is_err() {
                let left: Vec<_> = core.fleet.read(|state| {
                    let all = state
                        .commands()
                        .map(|one| (one.generation, one.status, one.sent_at));
                    all.collect()
                });
                panic!("killed at {kill_at}, after: {after}: {left:?}");
            }
            obeying.abort();
        };
        // Its tasks hang at their next commit: to all others that is a death.
        let alive = tokio::select! {
            () = work => true,
            () = died.cancelled() => false,
        };
        memory.lose_lease();
        if alive {
            let done = disk.lock().done.clone();
            let mut once = done.clone();
            once.sort_unstable();
            once.dedup();
            assert_eq!(done.len(), 3, "killed at {kill_at}, after: {after}");
            assert_eq!(once.len(), 3);
            return killed;
        }
        killed = true;
    }
    panic!("killed at {kill_at}: it never came to an end");
}

#[tokio::test(start_paused = true)]
async fn killed_at_any_commit_each_command_is_done_once() {
    for after in [false, true] {
        let mut points = 0;
        // Until a life that nothing kills before its work is done.
        while live(points, after).await {
            points += 1;
            assert!(points < 200, "it commits for ever");
        }
        assert!(points >= 8, "only {points} points: was anything written?");
    }
}
