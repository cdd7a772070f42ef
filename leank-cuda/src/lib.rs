//! The CUDA backend of leank. So far it only tells whether a device could run it.
//!
//! [`probe`] never panics and needs neither a GPU nor a driver to build or run:
//!
//! ```
//! match leank_cuda::probe(0) {
//!     Ok(device) => println!("{device}"),
//!     Err(leank_core::Error::Unavailable { why, .. }) => println!("no CUDA: {why}"),
//!     Err(other) => panic!("{other}"),
//! }
//! ```
#![deny(unsafe_code)]

mod probe;

pub use probe::{Device, probe};

/// Compiles the README's examples with the documentation's.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
