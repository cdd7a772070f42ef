//! The examples run, and what they check of themselves holds.

#![allow(missing_docs, clippy::duplicate_mod, reason = "each example has the toy model for itself")]

#[path = "../examples/continuous_batching.rs"]
mod continuous_batching;
#[path = "../examples/shared_prefix.rs"]
mod shared_prefix;
#[path = "../examples/speculative_decoding.rs"]
mod speculative_decoding;

#[test]
fn requests_are_served_together_as_alone() {
    continuous_batching::main().unwrap();
}

#[test]
fn a_draft_saves_steps() {
    speculative_decoding::main().unwrap();
}

#[test]
fn a_document_is_read_once() {
    shared_prefix::main().unwrap();
}
