//! What real guests do by themselves, with guests of one boot sector.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use ghost_domain::ErrorCode;
use ghost_domain::ports::DomainDefinition;
use ghost_domain::vm::ObservedPower;

use super::libvirt::Libvirt;
use super::support::{Events, PATIENCE, Subject, definition, power};

async fn qemu(check: &str) -> Option<Libvirt> {
    if !Path::new("/run/libvirt/libvirt-sock").exists() {
        println!("skipped: {check} needs libvirtd (deploy/host-setup.sh starts it)");
        return None;
    }
    Some(Libvirt::connect("qemu:///system").await)
}

/// A guest whose boot sector is this 16-bit code.
fn guest(subject: &Libvirt, prefix: &str, code: &[u8]) -> DomainDefinition {
    let definition = definition(subject, prefix);
    let mut sector = [0u8; 512];
    sector[..code.len()].copy_from_slice(code);
    sector[510..].copy_from_slice(&[0x55, 0xAA]);
    let mut base = std::fs::read(&definition.base_image.0).unwrap();
    base[..512].copy_from_slice(&sector);
    std::fs::write(&definition.base_image.0, base).unwrap();
    definition
}

/// Tells pvpanic (I/O port 0x505) that it panicked (bit 0), as Linux does.
const PANIC: &[u8] = &[
    0xBA, 0x05, 0x05, // mov dx, 0x505
    0xB0, 0x01, // mov al, 1
    0xEE, // out dx, al
    0xF4, // hlt
];

/// Powers itself off through q35's ACPI registers (PM1a control at 0x604: SLP_EN).
const POWER_OFF: &[u8] = &[
    0xBA, 0x04, 0x06, // mov dx, 0x604
    0xB8, 0x00, 0x20, // mov ax, 0x2000
    0xEF, // out dx, ax
    0xF4, // hlt
];

/// Writes one sector into each 64 KiB of its disk, for ever (INT 13h, AH=43h).
const WRITE: &[u8] = &[
    0x31, 0xC0, // xor ax, ax
    0x8E, 0xD8, // mov ds, ax
    0xBE, 0x20, 0x7C, // mov si, packet
    0xB4, 0x43, // again: mov ah, 0x43
    0xB0, 0x00, // mov al, 0
    0xB2, 0x80, // mov dl, 0x80
    0xCD, 0x13, // int 0x13
    0x66, 0x81, 0x06, 0x28, 0x7C, 0x80, 0x00, 0x00, 0x00, // add dword [packet + 8], 128
    0xEB, 0xED, // jmp again
    0, 0, 0, 0, 0, 0, // (to offset 0x20)
    0x10, 0x00, 0x01, 0x00, 0x00, 0x7C, 0x00, 0x00, // packet: size, sectors, address
    0x80, 0, 0, 0, 0, 0, 0, 0, // first sector
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_panic_is_one_crash() {
    let Some(subject) = qemu("a guest panic").await else {
        return;
    };
    let hypervisor = subject.hypervisor();
    let definition = guest(&subject, "ct-panic", PANIC);
    let id = definition.vm.id;
    hypervisor.define(&definition).await.unwrap();
    let mut events = Events::of(hypervisor);
    hypervisor.start(id).await.unwrap();
    let (reason, crashed) = events.power(id, ObservedPower::Crashed).await;
    assert_eq!((reason.as_str(), crashed), ("panicked", false));
    let (reason, crashed) = events.power(id, ObservedPower::Crashed).await;
    assert_eq!((reason.as_str(), crashed), ("crashed", true));
    assert_eq!(
        power(hypervisor, id).await.unwrap(),
        Some(ObservedPower::Crashed)
    );
    hypervisor.undefine(id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_powers_itself_off_is_off() {
    let Some(subject) = qemu("a guest's power-off").await else {
        return;
    };
    let hypervisor = subject.hypervisor();
    let definition = guest(&subject, "ct-poweroff", POWER_OFF);
    let id = definition.vm.id;
    hypervisor.define(&definition).await.unwrap();
    let mut events = Events::of(hypervisor);
    hypervisor.start(id).await.unwrap();
    events.power(id, ObservedPower::ShuttingDown).await;
    let (reason, crashed) = events.power(id, ObservedPower::Off).await;
    assert_eq!((reason.as_str(), crashed), ("shutdown", false));
    hypervisor.undefine(id).await.unwrap();
}

/// A small file system; unmounted at the end.
struct Small(PathBuf);

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_pauses_the_guest_with_an_io_error() {
    let Some(subject) = qemu("a full disk").await else {
        return;
    };
    let mut definition = guest(&subject, "ct-full", WRITE);
    let mount = subject.folder().join("small");
    std::fs::create_dir(&mount).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=512k,mode=0755", "tmpfs"])
        .arg(&mount)
        .status();
    if !mounted.is_ok_and(|status| status.success()) {
        println!("skipped: a full disk needs the right to mount a tmpfs");
        return;
    }
    let small = Small(mount.clone());
    let disk = mount.join("disk.qcow2");
    std::fs::copy(&definition.disk, &disk).unwrap();
    definition.disk = disk;
    let id = definition.vm.id;
    let hypervisor = subject.hypervisor();
    hypervisor.define(&definition).await.unwrap();
    let mut events = Events::of(hypervisor);
    hypervisor.start(id).await.unwrap();
    let (reason, crashed) = events.power(id, ObservedPower::Paused).await;
    assert_eq!((reason.as_str(), crashed), ("io_error", false));
    let seen = hypervisor.get(id).await.unwrap().unwrap();
    assert_eq!(seen.observation.power, ObservedPower::Paused);
    assert_eq!(seen.observation.reason, "io_error");
    hypervisor.power_off(id).await.unwrap();
    hypervisor.undefine(id).await.unwrap();
    drop(small);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_guest_has_figures_and_a_console() {
    let Some(subject) = qemu("statistics").await else {
        return;
    };
    let hypervisor = subject.hypervisor();
    let definition = guest(&subject, "ct-figures", WRITE);
    let id = definition.vm.id;
    hypervisor.define(&definition).await.unwrap();
    hypervisor.start(id).await.unwrap();
    // The guest writes for ever, so this comes.
    let figures = tokio::time::timeout(PATIENCE, async {
        loop {
            let all = hypervisor.statistics().await.unwrap();
            if let Some(one) = all.into_iter().find(|one| one.id == Some(id))
                && one.block_write_bytes > 0
                && one.cpu_time_nanoseconds > 0
            {
                return one;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .unwrap();
    assert_eq!(figures.memory_bytes, definition.vm.spec.memory.bytes());
    assert!(figures.memory_resident_bytes > 0);
    assert!(figures.block_read_bytes > 0);
    // QEMU listens for one peer, and virtlogd keeps the log.
    tokio::net::UnixStream::connect(&definition.console_socket)
        .await
        .unwrap();
    assert!(definition.console_log.exists());
    hypervisor.power_off(id).await.unwrap();
    hypervisor.undefine(id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_qemu_that_hangs_holds_up_nobody_else() {
    use rustix::process::Signal;

    let Some(subject) = qemu("a hanging QEMU").await else {
        return;
    };
    let (hung, well) = (
        definition(&subject, "ct-hung"),
        definition(&subject, "ct-well"),
    );
    for one in [&hung, &well] {
        subject.hypervisor().define(one).await.unwrap();
        subject.hypervisor().start(one.vm.id).await.unwrap();
    }
    let (hung, well) = (hung.vm.id, well.vm.id);
    // Short, as the test waits for it, and still long enough for a busy machine.
    let subject = subject.with_deadline(Duration::from_secs(8)).await;
    let hypervisor = subject.hypervisor();
    subject.signal(hung, Signal::STOP);
    let error = hypervisor.pause(hung).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::HypervisorUnavailable, "{error:?}");
    // The next call of that VM does not overtake the one that hangs.
    let error = hypervisor.power_off(hung).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::HypervisorUnavailable, "{error:?}");
    hypervisor.pause(well).await.unwrap();
    hypervisor.resume(well).await.unwrap();
    assert!(
        hypervisor
            .list()
            .await
            .unwrap()
            .iter()
            .any(|one| one.id == hung)
    );
    assert!(
        hypervisor
            .statistics()
            .await
            .unwrap()
            .iter()
            .any(|one| one.id == Some(well))
    );
    subject.signal(hung, Signal::CONT);
    let healed = tokio::time::timeout(PATIENCE, async {
        while let Err(error) = hypervisor.power_off(hung).await {
            assert_eq!(error.code(), ErrorCode::HypervisorUnavailable, "{error:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    healed.await.unwrap();
    hypervisor.power_off(well).await.unwrap();
    for id in [hung, well] {
        hypervisor.undefine(id).await.unwrap();
    }
}
