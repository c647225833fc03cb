//! The agent's own share of the host's memory, which is meant for guests.

/// Bounds the allocator to two arenas. Each thread that allocates takes one otherwise (mallopt(3)),
/// and threads that wait for libvirt most of the time would keep megabytes for nothing. To be
/// called before threads are started.
pub fn limit_arenas() {
    // SAFETY: mallopt takes two integers, keeps no pointer and is called before other threads run.
    // It tells of failure by its result: then more memory is used, and nothing else happens.
    let _: libc::c_int = unsafe { libc::mallopt(libc::M_ARENA_MAX, 2) };
}

/// Gives back what only the start needed: free heap, and pages of program code. The code is mapped
/// from files and comes back page by page where it is needed again; what runs all the time is back
/// within milliseconds.
pub fn release_startup_memory() {
    // SAFETY: malloc_trim has no precondition and returns unused heap to the kernel.
    unsafe { libc::malloc_trim(0) };
    let Ok(maps) = std::fs::read_to_string("/proc/self/maps") else {
        return;
    };
    for (start, length) in code(&maps) {
        // SAFETY: the range is one mapping of this process, private, executable, never writable
        // and backed by a file, so no page of it differs from the file: the kernel drops the pages
        // and reads the same bytes again at the next access (madvise(2)), also while other threads
        // run in it. Should the mapping be gone by now the call fails, or the range belongs to
        // another library's code mapped there since; nothing unmaps libraries in this program.
        unsafe {
            libc::madvise(
                std::ptr::without_provenance_mut(start),
                length,
                libc::MADV_DONTNEED,
            );
        }
    }
}

/// The mappings of program code from files, as start and length: `r-xp` with an inode
/// (proc_pid_maps(5)). Data is left alone: what was written there is nowhere else.
fn code(maps: &str) -> Vec<(usize, usize)> {
    maps.lines()
        .filter_map(|line| {
            let mut fields = line.split_whitespace();
            let (range, permissions) = (fields.next()?, fields.next()?);
            let inode: u64 = fields.nth(2)?.parse().ok()?;
            let (start, end) = range.split_once('-')?;
            let start = usize::from_str_radix(start, 16).ok()?;
            let end = usize::from_str_radix(end, 16).ok()?;
            (permissions == "r-xp" && inode != 0).then_some((start, end.checked_sub(start)?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_from_files_is_dropped() {
        let maps = "\
55d0c0000000-55d0c0001000 r--p 00000000 08:01 131 /usr/bin/x
55d0c0001000-55d0c0003000 r-xp 00001000 08:01 131 /usr/bin/x
55d0c0003000-55d0c0004000 rw-p 00003000 08:01 131 /usr/bin/x
7f0000000000-7f0000001000 rwxp 00000000 08:01 132 /usr/lib/odd.so
7f0000001000-7f0000002000 r-xp 00000000 00:00 0
7ffd00000000-7ffd00001000 r-xp 00000000 00:00 0 [vdso]
rubbish
";
        assert_eq!(code(maps), [(0x55d0_c000_1000, 0x2000)]);
    }

    #[test]
    fn the_program_runs_on_after_it_and_holds_less_code() {
        let resident = || -> u64 {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix("RssFile:"))
                .unwrap();
            line.split_whitespace().next().unwrap().parse().unwrap()
        };
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        assert!(!code(&maps).is_empty());
        limit_arenas();
        // Other tests run beside this one and touch code of theirs between the two looks.
        let fell = (0..200).any(|_| {
            let before = resident();
            release_startup_memory();
            resident() < before
        });
        assert!(fell, "no code was given back");
    }
}
