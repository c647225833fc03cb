//! The contract on the simulated hypervisor, and what only it can do.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use ghost_domain::ports::{Hypervisor, HypervisorEvent, NetworkProvider};
use ghost_domain::vm::ObservedPower;
use ghost_domain::{ErrorCode, NetworkName, VmId};
use ghost_infrastructure::simulated::{
    Call, Command, SimulatedHypervisor, SimulatedOptions, SimulationControl, send,
};
use tempfile::TempDir;

use super::contract::contract;
use super::support::{Events, Meddling, PATIENCE, Subject, definition, power};

struct Simulated {
    hypervisor: SimulatedHypervisor,
    folder: TempDir,
    networks: Vec<String>,
}

impl Simulated {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self {
            hypervisor: open(folder.path()),
            folder,
            networks: Vec::new(),
        }
    }

    fn control(&self) -> SimulationControl {
        self.hypervisor.control()
    }

    fn apply(&self, command: Command) {
        self.control().apply(command).unwrap();
    }

    /// Ends the process that holds the world, as far as the world can tell, and begins another.
    fn reopen(self) -> Self {
        let Self {
            hypervisor,
            folder,
            networks,
        } = self;
        drop(hypervisor);
        // The thread in which time passes holds the world for a tick.
        let until = std::time::Instant::now() + PATIENCE;
        let hypervisor = loop {
            match SimulatedHypervisor::open(options(folder.path())) {
                Ok(hypervisor) => break hypervisor,
                Err(error) => assert!(std::time::Instant::now() < until, "{error}"),
            }
        };
        Self {
            hypervisor,
            folder,
            networks,
        }
    }
}

fn options(folder: &Path) -> SimulatedOptions {
    SimulatedOptions {
        check_files: true,
        console: true,
        ..SimulatedOptions::new(folder.join("simulated"))
    }
}

fn open(folder: &Path) -> SimulatedHypervisor {
    SimulatedHypervisor::open(options(folder)).unwrap()
}

#[async_trait]
impl Subject for Simulated {
    fn hypervisor(&self) -> &dyn Hypervisor {
        &self.hypervisor
    }

    fn folder(&self) -> &Path {
        self.folder.path()
    }

    fn networks(&self) -> Vec<String> {
        self.networks.clone()
    }

    async fn meddle(&self, meddling: Meddling) {
        self.apply(match meddling {
            Meddling::Destroy(vm) => Command::Destroy { vm: vm.uuid() },
            Meddling::Undefine(vm) => Command::Undefine { vm: vm.uuid() },
            Meddling::SetVcpus(vm, vcpus) => Command::Edit {
                vm: vm.uuid(),
                vcpus: Some(vcpus),
                memory_bytes: None,
                strip_metadata: false,
            },
            Meddling::DefineForeign(vm, name) => Command::DefineForeign {
                vm: vm.uuid(),
                name,
            },
            Meddling::Crash(vm) => Command::Crash { vm: vm.uuid() },
        });
    }
}

async fn subject(_: &str) -> Option<Simulated> {
    Some(Simulated::new())
}

contract!(subject);

async fn running(subject: &Simulated) -> VmId {
    let definition = definition(subject, "sim");
    subject.hypervisor.define(&definition).await.unwrap();
    subject.hypervisor.start(definition.vm.id).await.unwrap();
    definition.vm.id
}

#[tokio::test]
async fn guests_follow_the_power_button_or_ignore_it() {
    let subject = Simulated::new();
    let (polite, deaf) = (running(&subject).await, running(&subject).await);
    subject.apply(Command::Acpi {
        vm: Some(deaf.uuid()),
        delay_milliseconds: None,
    });
    let mut events = Events::of(&subject.hypervisor);
    subject.hypervisor.shut_down(deaf).await.unwrap();
    subject.hypervisor.shut_down(polite).await.unwrap();
    events.power(polite, ObservedPower::ShuttingDown).await;
    let (reason, crashed) = events.power(polite, ObservedPower::Off).await;
    assert_eq!((reason.as_str(), crashed), ("shutdown", false));
    assert_eq!(
        power(&subject.hypervisor, deaf).await.unwrap(),
        Some(ObservedPower::Running)
    );
}

#[tokio::test]
async fn the_world_outlives_its_process() {
    let subject = Simulated::new();
    let on = running(&subject).await;
    let paused = running(&subject).await;
    subject.hypervisor.pause(paused).await.unwrap();
    let before = subject.hypervisor.list().await.unwrap();
    let subject = subject.reopen();
    assert_eq!(subject.hypervisor.list().await.unwrap(), before);
    assert_eq!(
        power(&subject.hypervisor, on).await.unwrap(),
        Some(ObservedPower::Running)
    );
    assert_eq!(
        power(&subject.hypervisor, paused).await.unwrap(),
        Some(ObservedPower::Paused)
    );
}

#[tokio::test]
async fn two_processes_never_share_a_world() {
    let subject = Simulated::new();
    let error = SimulatedHypervisor::open(options(subject.folder.path())).unwrap_err();
    assert_eq!(error.code(), ErrorCode::HypervisorUnavailable);
}

#[tokio::test]
async fn scripted_failures_strike_as_often_as_asked() {
    let subject = Simulated::new();
    let vm = running(&subject).await;
    let fail = |call, after_effect| Command::FailNext {
        call,
        times: 2,
        code: "hypervisor_failed".into(),
        vm: Some(vm.uuid()),
        after_effect,
    };
    subject.apply(fail(Call::Pause, false));
    for _ in 0..2 {
        let error = subject.hypervisor.pause(vm).await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::HypervisorFailed);
        assert_eq!(
            power(&subject.hypervisor, vm).await.unwrap(),
            Some(ObservedPower::Running)
        );
    }
    subject.hypervisor.pause(vm).await.unwrap();

    subject.apply(fail(Call::Any, true));
    subject.hypervisor.power_off(vm).await.unwrap_err();
    subject.hypervisor.get(vm).await.unwrap_err();
    assert_eq!(
        power(&subject.hypervisor, vm).await.unwrap(),
        Some(ObservedPower::Off)
    );
    let refused = subject.control().apply(Command::FailNext {
        call: Call::Any,
        times: 1,
        code: "no_such_code".into(),
        vm: None,
        after_effect: false,
    });
    assert_eq!(refused.unwrap_err().code(), ErrorCode::InvalidArgument);
}

#[tokio::test]
async fn a_hang_ends_by_its_deadline_or_a_release() {
    let folder = tempfile::tempdir().unwrap();
    let subject = Simulated {
        hypervisor: SimulatedHypervisor::open(SimulatedOptions {
            call_deadline: Duration::from_millis(300),
            ..SimulatedOptions::new(folder.path().join("simulated"))
        })
        .unwrap(),
        folder,
        networks: Vec::new(),
    };
    let vm = running(&subject).await;
    subject.apply(Command::HangNext {
        call: Call::Pause,
        times: 1,
        vm: None,
        after_effect: false,
    });
    let error = subject.hypervisor.pause(vm).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::HypervisorUnavailable);
    // The VM stays closed while its call hangs; others go on.
    running(&subject).await;
    subject.apply(Command::Release);
    let mut events = Events::of(&subject.hypervisor);
    loop {
        match subject.hypervisor.resume(vm).await {
            Ok(()) => break,
            Err(error) => assert_eq!(error.code(), ErrorCode::HypervisorUnavailable),
        }
    }
    events.power(vm, ObservedPower::Running).await;
}

#[tokio::test]
async fn losing_libvirt_is_told_and_calls_fail_at_once() {
    let subject = Simulated::new();
    let vm = running(&subject).await;
    let mut events = Events::of(&subject.hypervisor);
    subject.apply(Command::Disconnect {
        reason: "stopped".into(),
    });
    events
        .until("Disconnected", |event| {
            matches!(event, HypervisorEvent::Disconnected { reason } if reason == "stopped")
        })
        .await;
    let error = subject.hypervisor.get(vm).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::HypervisorUnavailable);
    subject.apply(Command::Connect);
    events
        .until("Connected", |event| *event == HypervisorEvent::Connected)
        .await;
    assert!(subject.hypervisor.get(vm).await.unwrap().is_some());
}

#[tokio::test]
async fn another_process_commands_through_files() {
    let subject = Simulated::new();
    let vm = running(&subject).await;
    let directory = subject.control().directory().to_owned();
    let mut events = Events::of(&subject.hypervisor);
    let crash = Command::Crash { vm: vm.uuid() };
    let told = {
        let (directory, crash) = (directory.clone(), crash.clone());
        tokio::task::spawn_blocking(move || send(&directory, &crash, PATIENCE))
    };
    told.await.unwrap().unwrap();
    let (_, crashed) = events.power(vm, ObservedPower::Crashed).await;
    assert!(crashed);
    let refused = tokio::task::spawn_blocking(move || send(&directory, &crash, PATIENCE))
        .await
        .unwrap()
        .unwrap_err();
    assert_eq!(refused.code(), ErrorCode::InvalidArgument);
    assert!(refused.cause().unwrap().contains("off"), "{refused:?}");
}

#[tokio::test]
async fn a_missing_disk_is_refused_at_start() {
    let subject = Simulated::new();
    let definition = definition(&subject, "sim");
    subject.hypervisor.define(&definition).await.unwrap();
    std::fs::remove_file(&definition.disk).unwrap();
    let error = subject
        .hypervisor
        .start(definition.vm.id)
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::HypervisorFailed);
    assert!(error.cause().unwrap().contains("disk.qcow2"));
}

#[tokio::test]
async fn running_guests_get_leases() {
    let mut subject = Simulated::new();
    subject.networks = vec!["ghost-default".into()];
    let networks = subject.hypervisor.networks();
    let name = NetworkName::new("default").unwrap();
    assert_eq!(
        networks.leases(&name).await.unwrap_err().code(),
        ErrorCode::NetworkNotFound
    );
    let made = networks.ensure(&name).await.unwrap();
    assert_eq!(networks.list().await.unwrap(), [made]);
    assert_eq!(
        networks
            .ensure(&NetworkName::new("other").unwrap())
            .await
            .unwrap_err()
            .code(),
        ErrorCode::NetworkNotFound
    );
    let definition = definition(&subject, "sim");
    subject.hypervisor.define(&definition).await.unwrap();
    assert_eq!(networks.leases(&name).await.unwrap(), []);
    subject.hypervisor.start(definition.vm.id).await.unwrap();
    let leases = tokio::time::timeout(PATIENCE, async {
        loop {
            let leases = networks.leases(&name).await.unwrap();
            if !leases.is_empty() {
                return leases;
            }
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    assert_eq!(leases[0].mac, definition.vm.spec.interfaces[0].mac);
    assert_eq!(leases[0].address.to_string(), "10.113.0.2");
}

#[tokio::test]
async fn the_console_answers_while_the_guest_runs() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    let subject = Simulated::new();
    let definition = definition(&subject, "sim");
    subject.hypervisor.define(&definition).await.unwrap();
    subject.hypervisor.start(definition.vm.id).await.unwrap();
    let mut console = tokio::time::timeout(PATIENCE, async {
        loop {
            if let Ok(console) = tokio::net::UnixStream::connect(&definition.console_socket).await {
                return console;
            }
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    console.write_all(b"hello").await.unwrap();
    let mut answer = [0u8; 5];
    console.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"hello");
    subject
        .hypervisor
        .power_off(definition.vm.id)
        .await
        .unwrap();
    assert_eq!(console.read(&mut answer).await.unwrap(), 0);
    let log = std::fs::read_to_string(&definition.console_log).unwrap();
    assert!(log.contains("up") && log.contains("hello"));
}

#[tokio::test]
async fn many_vms_are_listed_from_memory() {
    let subject = Simulated::new();
    let template = definition(&subject, "sim");
    let mut ids = Vec::new();
    for number in 0..50 {
        let mut definition = template.clone();
        definition.vm.id = VmId::random();
        definition.vm.name = ghost_domain::VmName::new(format!("many-{number}")).unwrap();
        ids.push(definition.vm.id);
        subject.hypervisor.define(&definition).await.unwrap();
    }
    let subject = Arc::new(subject);
    let listed = subject.hypervisor.list().await.unwrap();
    assert_eq!(listed.len(), ids.len());
}
