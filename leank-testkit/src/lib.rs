//! The conformance suite that every leank backend runs.
//!
//! A backend describes itself as a [`Subject`] and calls [`conformance!`] in one of its test files;
//! that makes one `#[test]` per property. Every property runs random cases ([`Case`]: shapes,
//! masks, windows, block sizes, lengths, storage formats, batches, several query tokens) against
//! the f64 oracle of `leank-core`, or checks one of the invariances of its definition: that a
//! result depends on the tokens and on where the step begins, and on nothing else.
//!
//! Tests of other kinds find here what its cases are held against: [`Reference`], which compares outputs
//! with the oracle, and [`blocks`], the naive model of block bookkeeping.
//!
//! ```
//! use leank_core::{Backend, Cache, CacheConfig, HostView, HostViewMut, Layer, Result};
//! use leank_testkit::{Rows, Subject};
//!
//! struct Host<B>(B);
//!
//! impl<B: Backend> Subject for Host<B>
//! where
//!     B::Cache: for<'a> Cache<View<'a> = HostView<'a>, ViewMut<'a> = HostViewMut<'a>>,
//! {
//!     type Backend = B;
//!     fn backend(&self) -> &B {
//!         &self.0
//!     }
//!     fn append(&self, cache: &mut B::Cache, layer: Layer, k: &Rows, v: &Rows) -> Result<()> {
//!         cache.append(layer, k.view(), v.view())
//!     }
//!     fn attend(&self, cache: &mut B::Cache, layer: Layer, q: &Rows) -> Result<Rows> {
//!         let mut out = q.like(f32::NAN);
//!         cache.attend(layer, q.view(), out.view_mut())?;
//!         Ok(out)
//!     }
//! }
//! ```
#![forbid(unsafe_code)]

pub mod blocks;
mod case;
mod data;
mod life;
mod properties;
mod reference;
mod world;

pub use case::{Case, HeadKind, Load};
pub use data::{Kind, Rows, activations};
pub use life::{
    forks_go_on_as_twins, refused_memory_changes_nothing, saved_sequences_come_back,
    sequences_change_between_steps_only, sequences_live_by_the_oracle,
    tokens_taken_back_leave_no_trace,
};
pub use properties::{
    a_million_tokens_agree, calls_out_of_order_are_refused, cancelled_steps_leave_no_trace,
    chunks_do_not_matter, extremes_agree, long_contexts_agree, neighbours_do_not_matter,
    non_finite_values_are_packed_as_defined, non_finite_values_stay_where_they_are, oracle_agrees,
    out_of_memory_changes_nothing, planner_agrees, pool_order_does_not_matter, twins_agree,
    wrong_shapes_are_refused,
};
pub use reference::{Reference, WriteRow};

use leank_core::{Backend, Dtype, Layer, LeanFormat, Result, quant::INT4_GROUP};

/// A backend under test, fed from host memory.
pub trait Subject {
    /// The backend.
    type Backend: Backend;

    /// The backend.
    fn backend(&self) -> &Self::Backend;

    /// [`leank_core::Cache::append`] with rows in host memory.
    ///
    /// # Errors
    /// Those of the cache.
    fn append(&self, cache: &mut CacheOf<Self>, layer: Layer, k: &Rows, v: &Rows) -> Result<()>;

    /// [`leank_core::Cache::attend`] with rows in host memory; rows that the cache did not write
    /// come back as NaN.
    ///
    /// # Errors
    /// Those of the cache.
    fn attend(&self, cache: &mut CacheOf<Self>, layer: Layer, q: &Rows) -> Result<Rows>;

    /// Types of full blocks that the backend has; formats of lean ones are its
    /// [`Backend::lean_formats`].
    fn dtypes(&self) -> &[Dtype] {
        &Dtype::ALL
    }

    /// Whether a sequence gives the same beside others as alone, bit for bit; where not, as close as
    /// the arithmetic is to the oracle.
    fn rounds_alike_in_any_batch(&self) -> bool {
        true
    }

    /// Largest error against the oracle *on the stored values*, as a share of the largest |v|: the
    /// accuracy of the backend's arithmetic; up to 128 channels, in proportion to them beyond.
    fn arithmetic_error(&self, _dtype: Dtype) -> f64 {
        2e-5
    }

    /// The same for products with codes, whatever full blocks are.
    fn coded_arithmetic_error(&self) -> f64 {
        2e-5
    }

    /// Of V in 4 bits: how many channels of a token, counted from the head's first, become NaN together where
    /// one was infinite or NaN.
    fn spoiled_channels(&self) -> usize {
        INT4_GROUP
    }

    /// Random cases per property; or as many as proptest's `PROPTEST_CASES` says.
    fn cases(&self) -> u32 {
        192
    }
}

/// The cache type of a subject.
pub type CacheOf<S> = <<S as Subject>::Backend as Backend>::Cache;

/// Largest error against the oracle on the values *before* they were stored in this format, as a
/// share of the largest |v|, for data like a model's (|logits| up to about 20).
#[must_use]
pub fn rounding_error(format: LeanFormat) -> f64 {
    match format {
        LeanFormat::Plain(Dtype::F32) => 2e-5,
        LeanFormat::Plain(Dtype::F16) => 1e-2,
        LeanFormat::Plain(Dtype::Bf16) => 8e-2,
        LeanFormat::Int8 => 0.1,
        LeanFormat::Fp8 => 0.5,
        LeanFormat::Int4 => 1.0,
        other => panic!("no bound is stated for {other}"),
    }
}

/// One `#[test]` per property for the [`Subject`] that the expression makes. `with run`, where there
/// may be none, has `run(property)` call the property with a subject, or say why not.
#[macro_export]
macro_rules! conformance {
    (with $run:expr) => {
        $crate::conformance!(@each ($run)
            oracle_agrees
            extremes_agree
            long_contexts_agree
            a_million_tokens_agree
            chunks_do_not_matter
            neighbours_do_not_matter
            pool_order_does_not_matter
            cancelled_steps_leave_no_trace
            out_of_memory_changes_nothing
            planner_agrees
            wrong_shapes_are_refused
            non_finite_values_stay_where_they_are
            non_finite_values_are_packed_as_defined
            calls_out_of_order_are_refused
            sequences_live_by_the_oracle
            forks_go_on_as_twins
            tokens_taken_back_leave_no_trace
            saved_sequences_come_back
            sequences_change_between_steps_only
        );
    };
    ($subject:expr) => {
        $crate::conformance!(with |property: fn(&_)| property(&$subject));
    };
    (@each $run:tt $($property:ident)*) => {$(
        #[test]
        fn $property() {
            $run($crate::$property);
        }
    )*};
}

/// Compiles the README's examples with the documentation's.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
