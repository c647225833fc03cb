//! The links to guests, against guests that say what a test has them say.

mod calls;
mod fake;
mod fuzzed;
mod hostility;
mod life;
mod measure;
mod real;
mod update;

#[path = "../../../../e2e/hostile/src/lib.rs"]
#[expect(
    unreachable_pub,
    dead_code,
    reason = "the library of another program, which uses what is not used here"
)]
mod hostile;

use std::sync::Arc;
use std::time::Duration;

use ghost_domain::guest::ExecExit;
use ghost_domain::ports::{ExecEvent, ExecOutput, GuestEvent, GuestEvents, GuestLinks};
use ghost_domain::{Result, VmId};
use ghost_infrastructure::clock::SystemClock;
use ghost_infrastructure::guest_link::{
    GuestLinkOptions, GuestProgram, LinkLimits, VirtioGuestLinks,
};

use fake::{Channel, Guest};

fn options() -> GuestLinkOptions {
    GuestLinkOptions {
        program: GuestProgram::none(),
        ..GuestLinkOptions::new(Arc::new(SystemClock::new()))
    }
}

fn links_with(change: impl FnOnce(&mut LinkLimits)) -> Arc<VirtioGuestLinks> {
    let mut options = options();
    change(&mut options.limits);
    Arc::new(VirtioGuestLinks::new(options))
}

fn links() -> Arc<VirtioGuestLinks> {
    links_with(|_| ())
}

/// A VM whose agent has greeted.
async fn connected(links: &VirtioGuestLinks) -> (VmId, Channel, Guest) {
    let vm = VmId::random();
    let channel = Channel::new();
    let mut events = links.subscribe();
    links.attach(vm, channel.path());
    let guest = channel.greeted().await;
    wait_connected(&mut *events, vm).await;
    (vm, channel, guest)
}

/// A VM with a guest that answers by itself.
async fn served(links: &VirtioGuestLinks) -> (VmId, Channel) {
    let (vm, channel, guest) = connected(links).await;
    tokio::spawn(guest.serve());
    (vm, channel)
}

/// Whether it is a new boot.
async fn wait_connected(events: &mut dyn GuestEvents, which: VmId) -> bool {
    loop {
        if let GuestEvent::Connected { vm, rebooted, .. } = next(events).await
            && vm == which
        {
            return rebooted;
        }
    }
}

async fn wait_lost(events: &mut dyn GuestEvents, which: VmId) -> String {
    loop {
        if let GuestEvent::Disconnected { vm, reason } = next(events).await
            && vm == which
        {
            return reason;
        }
    }
}

async fn next(events: &mut dyn GuestEvents) -> GuestEvent {
    within(events.next()).await.expect("the links are gone")
}

/// A generous bound for what must come, so that a test that waits in vain fails.
async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), work)
        .await
        .expect("it does not come")
}

/// Reads a program's output to its end.
async fn collect(output: &mut dyn ExecOutput) -> Result<(Vec<u8>, Vec<u8>, ExecExit)> {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    loop {
        match within(output.next()).await? {
            ExecEvent::Started(_) => {}
            ExecEvent::Stdout(data) => out.extend(data),
            ExecEvent::Stderr(data) => err.extend(data),
            ExecEvent::Exited(exit) => return Ok((out, err, exit)),
        }
    }
}
