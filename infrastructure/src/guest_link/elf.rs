//! Whether a file is a program that can be put into any guest.
//!
//! The few fields that decide it, read from the ELF header and the program headers as the System V
//! ABI and elf(5) lay them out: 64 bits, little endian, of this host's architecture, executable,
//! and without an interpreter, since a guest may have another C library or none. Everything is
//! read at bounded places; nothing of the file is believed beyond that.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes of the ELF header of 64-bit files.
const HEADER: usize = 64;
/// Bytes of one program header of 64-bit files.
const PROGRAM_HEADER: u16 = 56;
/// More program headers than any linker makes for a static program.
const MOST_HEADERS: u16 = 64;
/// `PT_LOAD`: what is mapped.
const PT_LOAD: u32 = 1;
/// `PT_INTERP`: the dynamic loader that the program needs.
const PT_INTERP: u32 = 3;
/// `e_machine` of this host, and so of its guests.
const MACHINE: u16 = if cfg!(target_arch = "aarch64") {
    183
} else {
    62
};

/// Checks that an open file is a static program for this host's guests.
///
/// # Errors
/// What it is instead, as [`io::ErrorKind::InvalidData`], or those of reading it.
pub(super) fn check(file: &File) -> io::Result<()> {
    let mut header = [0; HEADER];
    read_at(file, &mut header, 0)?;
    if header[..4] != *b"\x7fELF" {
        return Err(refuse("it is no ELF program"));
    }
    // EI_CLASS: ELFCLASS64; EI_DATA: ELFDATA2LSB; EI_VERSION: EV_CURRENT.
    if header[4..7] != [2, 1, 1] {
        return Err(refuse("it is no 64-bit little endian ELF program"));
    }
    let machine = half(&header, 18);
    if machine != MACHINE {
        return Err(refuse(&format!(
            "it is for another architecture (ELF machine {machine}, not {MACHINE})"
        )));
    }
    // ET_EXEC, or ET_DYN for programs that are loaded anywhere.
    if !matches!(half(&header, 16), 2 | 3) {
        return Err(refuse("it is an ELF file, but no program"));
    }
    let (at, size, count) = (long(&header, 32), half(&header, 54), half(&header, 56));
    if size != PROGRAM_HEADER || count == 0 || count > MOST_HEADERS {
        return Err(refuse("its program headers are not to be understood"));
    }
    let mut loaded = false;
    for number in 0..count {
        let mut entry = [0; PROGRAM_HEADER as usize];
        let place = at
            .checked_add(u64::from(number) * u64::from(PROGRAM_HEADER))
            .ok_or_else(|| refuse("its program headers are not to be understood"))?;
        read_at(file, &mut entry, place)?;
        match word(&entry) {
            PT_INTERP => {
                return Err(refuse(
                    "it is dynamically linked: guests have another C library, or none",
                ));
            }
            PT_LOAD => loaded = true,
            _ => {}
        }
    }
    if loaded {
        Ok(())
    } else {
        Err(refuse("it is an ELF file, but no program"))
    }
}

fn refuse(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.to_owned())
}

fn read_at(file: &File, into: &mut [u8], at: u64) -> io::Result<()> {
    file.read_exact_at(into, at).map_err(|error| {
        // An offset beyond what a file can have is no valid argument to the system.
        if matches!(
            error.kind(),
            io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidInput
        ) {
            refuse("it is no ELF program, or cut off")
        } else {
            error
        }
    })
}

fn half(bytes: &[u8; HEADER], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn long(bytes: &[u8; HEADER], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(value)
}

fn word(bytes: &[u8; PROGRAM_HEADER as usize]) -> u32 {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::Write;

    use super::*;

    /// The head of a static program with nothing in it.
    pub(in super::super) fn head() -> Vec<u8> {
        let mut bytes = vec![0; HEADER + usize::from(PROGRAM_HEADER)];
        bytes[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        bytes[16] = 2;
        bytes[18..20].copy_from_slice(&MACHINE.to_le_bytes());
        bytes[32] = 64;
        bytes[54] = 56;
        bytes[56] = 1;
        bytes[64] = 1;
        bytes
    }

    fn said(bytes: &[u8]) -> Result<(), String> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        check(&file).map_err(|error| {
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
            error.to_string()
        })
    }

    #[test]
    fn only_a_static_program_of_this_architecture_passes() {
        assert_eq!(said(&head()), Ok(()));
        for (at, value, why) in [
            (0, 0, "no ELF"),
            (4, 1, "64-bit"),
            (5, 2, "little endian"),
            (16, 1, "no program"),
            (18, 40, "architecture (ELF machine 40"),
            (54, 32, "understood"),
            (56, 0, "understood"),
            (57, 1, "understood"),
            (39, 255, "cut off"),
            (56, 2, "cut off"),
            (64, 3, "dynamically linked"),
            (64, 4, "no program"),
        ] {
            let mut bytes = head();
            bytes[at] = value;
            let refused = said(&bytes).unwrap_err();
            assert!(refused.contains(why), "{at}: {refused}");
        }
        for length in 0..head().len() {
            assert!(said(&head()[..length]).is_err(), "{length}");
        }
        assert!(said(b"#!/bin/sh\nexec true\n").is_err());
        let mut far = head();
        far[32..40].fill(255);
        assert!(said(&far).is_err(), "an offset that overflows");
    }

    #[test]
    fn this_very_test_is_dynamic_and_refused() {
        let own = File::open(std::env::current_exe().unwrap()).unwrap();
        let refused = check(&own).unwrap_err().to_string();
        assert!(refused.contains("dynamically linked"), "{refused}");
    }
}
