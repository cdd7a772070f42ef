//! See `leank_fuzz::cache_ops`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| leank_fuzz::cache_ops(data));
