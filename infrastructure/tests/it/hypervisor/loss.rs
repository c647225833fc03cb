//! Losing libvirt in every way, and getting it back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ghost_domain::ports::{Hypervisor, HypervisorEvent};
use ghost_domain::{ErrorCode, VmId};
use ghost_infrastructure::libvirt::{LibvirtHypervisor, LibvirtOptions};

use super::proxy::{Mode, Proxy};
use super::support::{Events, PATIENCE};

async fn through(proxy: &Proxy) -> LibvirtHypervisor {
    let hypervisor = LibvirtHypervisor::start(LibvirtOptions {
        uri: proxy.uri(),
        ..LibvirtOptions::default()
    })
    .unwrap();
    hypervisor.connected(PATIENCE).await.unwrap();
    hypervisor
}

async fn lost(events: &mut Events) {
    events
        .until("Disconnected", |event| {
            matches!(event, HypervisorEvent::Disconnected { .. })
        })
        .await;
}

async fn healed(events: &mut Events) {
    events
        .until("Connected", |event| *event == HypervisorEvent::Connected)
        .await;
}

async fn is_unavailable(hypervisor: &LibvirtHypervisor) {
    let error = hypervisor.get(VmId::random()).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::HypervisorUnavailable);
    assert!(error.hint_text().unwrap().contains("doctor"));
    assert!(error.retry_delay().is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_daemon_is_noticed_and_comes_back() {
    let Some(proxy) = Proxy::start().await else {
        return;
    };
    let hypervisor = through(&proxy).await;
    let mut events = Events::of(&hypervisor);
    for _ in 0..2 {
        proxy.set(Mode::Dead);
        lost(&mut events).await;
        is_unavailable(&hypervisor).await;
        proxy.set(Mode::Pass);
        healed(&mut events).await;
        hypervisor.list().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hung_daemon_is_noticed_and_comes_back() {
    let Some(proxy) = Proxy::start().await else {
        return;
    };
    let hypervisor = Arc::new(through(&proxy).await);
    let mut events = Events::of(&*hypervisor);
    proxy.set(Mode::Hang);
    let began = Instant::now();
    // Calls that are on their way: more than there are workers.
    let calls: Vec<_> = (0..8)
        .map(|_| {
            let hypervisor = Arc::clone(&hypervisor);
            tokio::spawn(async move { hypervisor.get(VmId::random()).await })
        })
        .collect();
    lost(&mut events).await;
    println!("a hang was told after {:?}", began.elapsed());
    for call in calls {
        let error = call.await.unwrap().unwrap_err();
        assert_eq!(error.code(), ErrorCode::HypervisorUnavailable);
    }
    is_unavailable(&hypervisor).await;
    proxy.set(Mode::Pass);
    let back = Instant::now();
    healed(&mut events).await;
    println!("it healed after {:?}", back.elapsed());
    // No worker stayed behind in the hang: as many calls as there are workers, side by side.
    let (a, b, c, d) = tokio::join!(
        hypervisor.list(),
        hypervisor.list(),
        hypervisor.list(),
        hypervisor.info()
    );
    a.unwrap();
    b.unwrap();
    c.unwrap();
    d.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_that_hangs_from_the_start_is_connected_once_it_answers() {
    let Some(proxy) = Proxy::start().await else {
        return;
    };
    proxy.set(Mode::Hang);
    let hypervisor = LibvirtHypervisor::start(LibvirtOptions {
        uri: proxy.uri(),
        ..LibvirtOptions::default()
    })
    .unwrap();
    let mut events = Events::of(&hypervisor);
    lost(&mut events).await;
    is_unavailable(&hypervisor).await;
    proxy.set(Mode::Pass);
    healed(&mut events).await;
    hypervisor.list().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_that_was_never_there_is_found_later() {
    let Some(proxy) = Proxy::start().await else {
        return;
    };
    proxy.set(Mode::Dead);
    let hypervisor = LibvirtHypervisor::start(LibvirtOptions {
        uri: proxy.uri(),
        ..LibvirtOptions::default()
    })
    .unwrap();
    let mut events = Events::of(&hypervisor);
    let error = hypervisor
        .connected(Duration::from_millis(100))
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::HypervisorUnavailable);
    proxy.set(Mode::Pass);
    healed(&mut events).await;
    hypervisor.connected(PATIENCE).await.unwrap();
    hypervisor.list().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropping_the_adapter_ends_its_events_and_threads() {
    let Some(proxy) = Proxy::start().await else {
        return;
    };
    let hypervisor = through(&proxy).await;
    let mut events = hypervisor.subscribe();
    drop(hypervisor);
    let end = tokio::time::timeout(PATIENCE, async {
        while let Some(event) = events.next().await {
            println!("{event:?}");
        }
    });
    end.await.unwrap();
}
