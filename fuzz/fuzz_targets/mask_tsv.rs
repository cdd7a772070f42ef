//! See `leank_fuzz::mask_tsv`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| leank_fuzz::mask_tsv(data));
