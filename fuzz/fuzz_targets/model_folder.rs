//! See `leank_fuzz::model_folder`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| leank_fuzz::model_folder(data));
