//! See `leank_fuzz::kernel`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| leank_fuzz::kernel(data));
