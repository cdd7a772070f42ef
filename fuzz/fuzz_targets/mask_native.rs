//! See `leank_fuzz::mask_native`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| leank_fuzz::mask_native(data));
