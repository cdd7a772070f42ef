//! The examples run, and what they check of themselves holds.

#![allow(missing_docs, clippy::duplicate_mod, reason = "each example has the toy model for itself")]

#[path = "../examples/candle_llama/main.rs"]
mod candle_llama;
#[path = "../examples/continuous_batching.rs"]
mod continuous_batching;
#[path = "../examples/mistralrs_cache.rs"]
mod mistralrs_cache;
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

#[test]
fn a_candle_model_is_made_lean_in_under_100_lines() {
    candle_llama::main().unwrap();
    let (dense, lean) = (
        include_str!("../examples/candle_llama/dense.rs"),
        include_str!("../examples/candle_llama/lean.rs"),
    );
    let diff = similar::TextDiff::from_lines(dense, lean);
    let changed = |tag| diff.iter_all_changes().filter(|change| change.tag() == tag).count();
    let (added, removed) =
        (changed(similar::ChangeTag::Insert), changed(similar::ChangeTag::Delete));
    assert!(added + removed < 100, "{added} lines added, {removed} removed");
}

#[test]
fn an_engine_takes_it_through_a_trait() {
    mistralrs_cache::main().unwrap();
}
