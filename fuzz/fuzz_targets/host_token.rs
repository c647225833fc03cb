#![no_main]
#[path = "../src/link.rs"]
#[expect(dead_code, reason = "each target runs one of its functions")]
mod link;

libfuzzer_sys::fuzz_target!(|data: &[u8]| link::host_token(data));
