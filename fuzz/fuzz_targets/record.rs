//! See `leank_fuzz::record`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| leank_fuzz::record(data));
