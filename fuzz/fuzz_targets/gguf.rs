//! See `leank_fuzz::gguf`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| leank_fuzz::gguf(data));
