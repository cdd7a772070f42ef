//! See `leank_fuzz::mask_pth`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| leank_fuzz::mask_pth(data));
