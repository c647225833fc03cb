//! Whether this host really runs guests in hardware.
//!
//! `/dev/kvm` and libvirt's capabilities prove nothing: in many containers and nested machines the
//! device is there and a guest crawls or QEMU aborts. So we look at the CPU's flag, and then make a
//! virtual machine with one vCPU and let it run one instruction (`hlt`).
//! Source: <https://docs.kernel.org/virt/kvm/api.html>.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::mpsc;
use std::time::Duration;

/// Longest time that the proof may take; a vCPU that never stops is no proof.
const DEADLINE: Duration = Duration::from_secs(5);

/// Proves that KVM works, or says why not, in words for people.
pub fn prove_kvm() -> (bool, String) {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if !has_virtualisation_flag(&cpuinfo) {
        return (
            false,
            "the CPU offers no hardware virtualisation (neither vmx nor svm in /proc/cpuinfo); \
             enable it in the firmware, or nested virtualisation on the host above"
                .into(),
        );
    }
    // On a thread of its own, as a broken KVM may never come back from running the vCPU.
    let (send, result) = mpsc::channel();
    let started = std::thread::Builder::new()
        .name("ghost-kvm-proof".into())
        .spawn(move || {
            // The receiver may have given up; then nobody needs the answer.
            let _ = send.send(run_one_instruction());
        });
    if let Err(error) = started {
        return (false, format!("cannot start a thread to try KVM: {error}"));
    }
    match result.recv_timeout(DEADLINE) {
        Ok(Ok(())) => (true, "a virtual CPU was made and ran on /dev/kvm".into()),
        Ok(Err(why)) => (false, why),
        Err(_) => (
            false,
            "a virtual CPU on /dev/kvm did not come back within 5 s".into(),
        ),
    }
}

fn has_virtualisation_flag(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter(|line| line.starts_with("flags"))
        .flat_map(|line| line.split_whitespace())
        .any(|flag| flag == "vmx" || flag == "svm")
}

// Request numbers of <linux/kvm.h>: _IO(0xAE, nr) without a size, and those with a struct.
const KVM_GET_API_VERSION: libc::c_ulong = 0xAE00;
const KVM_CREATE_VM: libc::c_ulong = 0xAE01;
const KVM_GET_VCPU_MMAP_SIZE: libc::c_ulong = 0xAE04;
const KVM_CREATE_VCPU: libc::c_ulong = 0xAE41;
const KVM_RUN: libc::c_ulong = 0xAE80;
const KVM_SET_USER_MEMORY_REGION: libc::c_ulong = 0x4020_AE46;
const KVM_SET_REGS: libc::c_ulong = 0x4090_AE82;
const KVM_GET_SREGS: libc::c_ulong = 0x8138_AE83;
const KVM_SET_SREGS: libc::c_ulong = 0x4138_AE84;
/// The only version there has been since 2007.
const KVM_API_VERSION: libc::c_int = 12;
const KVM_EXIT_HLT: u32 = 5;
/// Offset of `exit_reason` in `struct kvm_run`.
const EXIT_REASON_OFFSET: usize = 8;
/// Sizes of `struct kvm_sregs` and of one `struct kvm_segment`, whose first member of the former
/// is the code segment.
const SREGS_SIZE: usize = 312;
const PAGE: usize = 4096;

/// `struct kvm_userspace_memory_region`.
#[repr(C)]
struct MemoryRegion {
    slot: u32,
    flags: u32,
    guest_phys_addr: u64,
    memory_size: u64,
    userspace_addr: u64,
}

/// `struct kvm_regs` of x86-64.
#[repr(C)]
#[derive(Default)]
struct Registers {
    general: [u64; 16],
    rip: u64,
    rflags: u64,
}

/// A private mapping that is removed when it is dropped.
struct Mapping {
    address: *mut libc::c_void,
    length: usize,
}

impl Mapping {
    fn new(length: usize, fd: Option<RawFd>) -> Result<Self, String> {
        let flags = if fd.is_some() {
            libc::MAP_SHARED
        } else {
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS
        };
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no memory of ours.
        let address = unsafe {
            libc::mmap(
                ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                fd.unwrap_or(-1),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(last_error("mapping memory for a guest"));
        }
        Ok(Self { address, length })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the address and length are those of our own mapping, unmapped once. The guest
        // whose memory it was has ended: its descriptors are dropped before (declared later).
        unsafe { libc::munmap(self.address, self.length) };
    }
}

fn last_error(doing: &str) -> String {
    format!("KVM failed at {doing}: {}", std::io::Error::last_os_error())
}

/// Calls an ioctl that takes a number.
fn ioctl(
    fd: RawFd,
    request: libc::c_ulong,
    argument: libc::c_ulong,
    doing: &str,
) -> Result<libc::c_int, String> {
    // SAFETY: only used with requests whose argument is a plain number, on a descriptor that is
    // open during the call.
    let result = unsafe { libc::ioctl(fd, request, argument) };
    if result < 0 {
        Err(last_error(doing))
    } else {
        Ok(result)
    }
}

/// Calls an ioctl that reads or writes `argument`.
///
/// # Safety
/// `T` must be the structure (or a buffer of its size) that `request` is documented to use.
unsafe fn ioctl_with<T>(
    fd: RawFd,
    request: libc::c_ulong,
    argument: &mut T,
    doing: &str,
) -> Result<(), String> {
    // SAFETY: the descriptor is open, the argument is exclusively ours and of the right size.
    let result = unsafe { libc::ioctl(fd, request, ptr::from_mut(argument)) };
    if result < 0 {
        Err(last_error(doing))
    } else {
        Ok(())
    }
}

fn owned(fd: libc::c_int) -> OwnedFd {
    // SAFETY: KVM has just made this descriptor for us; nobody else owns it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn run_one_instruction() -> Result<(), String> {
    let kvm = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => {
                "/dev/kvm does not exist; load the kernel module: modprobe kvm_intel (or kvm_amd)"
                    .to_owned()
            }
            std::io::ErrorKind::PermissionDenied => {
                "/dev/kvm may not be opened; add the user to the group kvm".to_owned()
            }
            _ => format!("/dev/kvm cannot be opened: {error}"),
        })?;
    let kvm = kvm.as_raw_fd();
    if ioctl(kvm, KVM_GET_API_VERSION, 0, "asking for its version")? != KVM_API_VERSION {
        return Err("/dev/kvm speaks an unknown version of the API".into());
    }
    // Dropped in reverse: vCPU and VM first, their memory last.
    let memory = Mapping::new(PAGE, None)?;
    let vm = owned(ioctl(kvm, KVM_CREATE_VM, 0, "making a virtual machine")?);
    // SAFETY: the mapping has at least one byte, and no guest runs yet. 0xF4 is `hlt`.
    unsafe { memory.address.cast::<u8>().write(0xF4) };
    let mut region = MemoryRegion {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: PAGE as u64,
        userspace_addr: memory.address as u64,
    };
    // SAFETY: the structure is that of the request; the memory outlives the VM.
    unsafe {
        ioctl_with(
            vm.as_raw_fd(),
            KVM_SET_USER_MEMORY_REGION,
            &mut region,
            "giving a guest memory",
        )?
    };
    let vcpu = owned(ioctl(
        vm.as_raw_fd(),
        KVM_CREATE_VCPU,
        0,
        "making a virtual CPU",
    )?);
    let size = ioctl(
        kvm,
        KVM_GET_VCPU_MMAP_SIZE,
        0,
        "asking for the size of a virtual CPU",
    )?;
    let run = Mapping::new(
        usize::try_from(size).unwrap_or(0).max(PAGE),
        Some(vcpu.as_raw_fd()),
    )?;
    let mut sregs = [0u8; SREGS_SIZE];
    // SAFETY: the buffer has the size of `struct kvm_sregs`, which the request number carries.
    unsafe {
        ioctl_with(
            vcpu.as_raw_fd(),
            KVM_GET_SREGS,
            &mut sregs,
            "reading a virtual CPU",
        )?
    };
    // The code segment comes first: base (8 bytes), limit (4), selector (2). Base and selector 0
    // make the CPU begin at physical address 0, in real mode.
    sregs[..8].fill(0);
    sregs[12..14].fill(0);
    // SAFETY: as above.
    unsafe {
        ioctl_with(
            vcpu.as_raw_fd(),
            KVM_SET_SREGS,
            &mut sregs,
            "writing a virtual CPU",
        )?
    };
    let mut registers = Registers {
        rflags: 2, // bit 1 is always set on x86
        ..Registers::default()
    };
    // SAFETY: the structure is that of the request.
    unsafe {
        ioctl_with(
            vcpu.as_raw_fd(),
            KVM_SET_REGS,
            &mut registers,
            "writing a virtual CPU",
        )?
    };
    ioctl(vcpu.as_raw_fd(), KVM_RUN, 0, "running a virtual CPU")?;
    // SAFETY: `struct kvm_run` lies in the mapping, which has at least a page, and the vCPU has
    // stopped, so nobody writes to it.
    let reason = unsafe {
        run.address
            .cast::<u8>()
            .add(EXIT_REASON_OFFSET)
            .cast::<u32>()
            .read()
    };
    if reason == KVM_EXIT_HLT {
        Ok(())
    } else {
        Err(format!(
            "a virtual CPU stopped for an unexpected reason ({reason})"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_whole_words() {
        assert!(has_virtualisation_flag("flags\t\t: fpu vmx sse"));
        assert!(has_virtualisation_flag("processor: 0\nflags : svm"));
        assert!(!has_virtualisation_flag("flags : fpu svm_lock novmx"));
        assert!(!has_virtualisation_flag("model name : vmx"));
    }

    #[test]
    fn the_proof_ends_with_a_reason() {
        let (works, why) = prove_kvm();
        assert!(!why.is_empty());
        // Whatever this machine has: without the flag there is no proof.
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        assert!(!works || has_virtualisation_flag(&cpuinfo));
    }

    #[test]
    fn an_attempt_on_this_machine_ends() {
        // With or without KVM: the sequence of calls ends in a proof or in words.
        if let Err(why) = run_one_instruction() {
            assert!(!why.is_empty());
        }
    }
}
