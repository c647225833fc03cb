#![no_main]
#[path = "../src/host.rs"]
mod host;

libfuzzer_sys::fuzz_target!(|data: &[u8]| host::host(data));
