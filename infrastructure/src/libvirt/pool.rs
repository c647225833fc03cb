//! Named threads that make the blocking calls.
//!
//! Jobs of one key (a VM) run one after the other, in the order in which they were given; jobs of
//! different keys run side by side, so that one VM whose QEMU hangs does not hold up the others. A
//! worker that is stuck for longer than `replace_after` is given up: another thread takes its
//! place, and the stuck one ends by itself once its call returns. Its key stays closed until then,
//! so the order within the VM holds even so. At most `max_abandoned` threads are given up; beyond
//! that, jobs wait and run into their deadlines.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use ghost_domain::VmId;

/// A piece of work. It is told whether it is still wanted; it must not panic.
pub(crate) struct Job {
    /// The VM whose order matters, if there is one.
    pub(crate) key: Option<VmId>,
    /// After this moment nobody waits for the result, and the job is dropped unrun.
    pub(crate) expires: Instant,
    /// Whether somebody still waits.
    pub(crate) wanted: Box<dyn Fn() -> bool + Send>,
    /// The work.
    pub(crate) run: Box<dyn FnOnce() + Send>,
}

/// The pool; dropping it lets the threads end after their present job.
pub(crate) struct Pool {
    shared: Arc<Shared>,
}

struct Shared {
    name: &'static str,
    replace_after: Duration,
    max_abandoned: usize,
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    /// Keys whose job runs now, and since when.
    busy: HashMap<VmId, Instant>,
    /// Workers with a job, and since when.
    running: HashMap<u64, Instant>,
    /// Workers that are stuck and were replaced.
    abandoned: usize,
    next_worker: u64,
    stopping: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pool {
    /// Starts `workers` threads.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub(crate) fn start(
        name: &'static str,
        workers: usize,
        replace_after: Duration,
        max_abandoned: usize,
    ) -> std::io::Result<Self> {
        let pool = Self {
            shared: Arc::new(Shared {
                name,
                replace_after,
                max_abandoned,
                state: Mutex::default(),
                wake: Condvar::new(),
            }),
        };
        for _ in 0..workers.max(1) {
            let mut state = pool.shared.lock();
            spawn(&pool.shared, &mut state)?;
        }
        Ok(pool)
    }

    /// Queues a job.
    pub(crate) fn give(&self, job: Job) {
        self.shared.lock().queue.push_back(job);
        self.shared.wake.notify_one();
        self.tend();
    }

    /// For how long a job of this key has been running, if it is beyond what is normal.
    pub(crate) fn stuck(&self, key: VmId) -> Option<Duration> {
        let age = self.shared.lock().busy.get(&key)?.elapsed();
        (age > self.shared.replace_after).then_some(age)
    }

    /// Replaces workers that are stuck. Called with every job and now and then by a supervisor.
    pub(crate) fn tend(&self) {
        let shared = &self.shared;
        let mut state = shared.lock();
        let stuck: Vec<u64> = state
            .running
            .iter()
            .filter(|(_, since)| since.elapsed() > shared.replace_after)
            .map(|(worker, _)| *worker)
            .collect();
        for worker in stuck {
            if state.abandoned >= shared.max_abandoned {
                return;
            }
            state.running.remove(&worker);
            state.abandoned += 1;
            tracing::warn!(worker, "a libvirt call hangs; its thread was replaced");
            if let Err(error) = spawn(shared, &mut state) {
                tracing::error!(%error, "cannot start another thread for libvirt calls");
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.stopping = true;
        state.queue.clear();
        drop(state);
        self.shared.wake.notify_all();
    }
}

fn spawn(shared: &Arc<Shared>, state: &mut State) -> std::io::Result<()> {
    let worker = state.next_worker;
    state.next_worker += 1;
    let shared = Arc::clone(shared);
    thread::Builder::new()
        .name(format!("{}-{worker}", shared.name))
        .spawn(move || work(&shared, worker))?;
    Ok(())
}

fn work(shared: &Shared, worker: u64) {
    loop {
        let mut state = shared.lock();
        let job = loop {
            if state.stopping {
                return;
            }
            let now = Instant::now();
            state
                .queue
                .retain(|job| job.expires > now && (job.wanted)());
            let next = next_runnable(&state);
            match next {
                Some(at) => break state.queue.remove(at),
                // The time-out lets expired jobs of a closed key go even when nothing else happens.
                None => {
                    state = shared
                        .wake
                        .wait_timeout(state, Duration::from_secs(1))
                        .unwrap_or_else(PoisonError::into_inner)
                        .0;
                }
            }
        };
        let Some(job) = job else { continue };
        let now = Instant::now();
        if let Some(key) = job.key {
            state.busy.insert(key, now);
        }
        state.running.insert(worker, now);
        drop(state);

        if catch_unwind(AssertUnwindSafe(job.run)).is_err() {
            tracing::error!("a libvirt call panicked");
        }

        let mut state = shared.lock();
        if let Some(key) = job.key {
            state.busy.remove(&key);
        }
        let replaced = state.running.remove(&worker).is_none();
        if replaced {
            state.abandoned -= 1;
        }
        drop(state);
        shared.wake.notify_all();
        if replaced {
            return;
        }
    }
}

/// The first job whose key is free. A job behind another one of its key in the queue is never
/// first, because both keys are the same and the earlier one is met first.
fn next_runnable(state: &State) -> Option<usize> {
    state
        .queue
        .iter()
        .position(|job| job.key.is_none_or(|key| !state.busy.contains_key(&key)))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn job(key: Option<VmId>, run: impl FnOnce() + Send + 'static) -> Job {
        Job {
            key,
            expires: Instant::now() + Duration::from_secs(60),
            wanted: Box::new(|| true),
            run: Box::new(run),
        }
    }

    #[test]
    fn jobs_of_one_vm_keep_their_order_and_do_not_block_others() {
        let pool = Pool::start("t", 3, Duration::from_secs(60), 1).unwrap();
        let (a, b) = (VmId::random(), VmId::random());
        let (gate, blocked) = mpsc::channel::<()>();
        let (send, seen) = mpsc::channel();
        let first = send.clone();
        pool.give(job(Some(a), move || {
            blocked.recv().unwrap();
            first.send("a0").unwrap();
        }));
        for name in ["a1", "a2", "a3"] {
            let send = send.clone();
            pool.give(job(Some(a), move || send.send(name).unwrap()));
        }
        let other = send.clone();
        pool.give(job(Some(b), move || other.send("b").unwrap()));
        assert_eq!(seen.recv().unwrap(), "b");
        gate.send(()).unwrap();
        let order: Vec<_> = (0..4).map(|_| seen.recv().unwrap()).collect();
        assert_eq!(order, ["a0", "a1", "a2", "a3"]);
    }

    #[test]
    fn a_stuck_worker_is_replaced_and_its_vm_stays_closed() {
        let pool = Pool::start("t", 1, Duration::ZERO, 1).unwrap();
        let (a, b) = (VmId::random(), VmId::random());
        let (gate, blocked) = mpsc::channel::<()>();
        let (send, seen) = mpsc::channel();
        let (begun, began) = mpsc::channel();
        let stuck = send.clone();
        pool.give(job(Some(a), move || {
            begun.send(()).unwrap();
            blocked.recv().unwrap();
            stuck.send("a0").unwrap();
        }));
        began.recv().unwrap();
        let later = send.clone();
        pool.give(job(Some(a), move || later.send("a1").unwrap()));
        let other = send.clone();
        pool.give(job(Some(b), move || other.send("b").unwrap()));
        assert_eq!(seen.recv().unwrap(), "b", "another thread took over");
        assert!(pool.stuck(a).is_some());
        assert!(seen.try_recv().is_err(), "a1 waits for a0");
        gate.send(()).unwrap();
        assert_eq!(seen.recv().unwrap(), "a0");
        assert_eq!(seen.recv().unwrap(), "a1");
    }

    #[test]
    fn panics_unwanted_and_expired_jobs_leave_the_pool_working() {
        let pool = Pool::start("t", 1, Duration::from_secs(60), 1).unwrap();
        let key = VmId::random();
        pool.give(job(Some(key), || panic!("on purpose")));
        pool.give(Job {
            wanted: Box::new(|| false),
            ..job(Some(key), || unreachable!())
        });
        pool.give(Job {
            expires: Instant::now(),
            ..job(Some(key), || unreachable!())
        });
        let (send, seen) = mpsc::channel();
        pool.give(job(Some(key), move || send.send(()).unwrap()));
        seen.recv().unwrap();
    }
}
