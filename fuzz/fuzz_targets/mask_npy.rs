//! See `leank_fuzz::mask_npy`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| leank_fuzz::mask_npy(data));
