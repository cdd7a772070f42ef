//! The conformance suite on the first CUDA device; skipped, loudly, where there is none:
//!
//!     cargo test --release -p leank-cuda

#[path = "support/subject.rs"]
mod subject;
mod support;

use subject::OnCuda;

fn where_there_is_a_device(property: impl Fn(&OnCuda)) {
    if let Some(cuda) = support::cuda() {
        property(&OnCuda::new(cuda));
    }
}

leank_testkit::conformance!(with where_there_is_a_device);
