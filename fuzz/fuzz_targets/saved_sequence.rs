//! See `leank_fuzz::saved_sequence`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| leank_fuzz::saved_sequence(data));
