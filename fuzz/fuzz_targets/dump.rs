//! See `leank_fuzz::dump`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| leank_fuzz::dump(data));
