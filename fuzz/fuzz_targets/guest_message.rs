#![no_main]

unsafe extern "C" {
    fn signal(number: i32, handler: usize) -> usize;
}

libfuzzer_sys::fuzz_target!(
    init: {
        // As Rust's own start of a program does (SIGPIPE, SIG_IGN), which libFuzzer's does not: a program
        // that ends with input on its way is no end of the agent.
        // SAFETY: two numbers that signal(2) defines; nothing else of this process handles that signal.
        unsafe { signal(13, 1) };
    },
    |data: &[u8]| ghost_fuzz::message(data)
);
