//! Activation dumps and mask learning for leank
#![deny(unsafe_code)]

pub mod dump;
mod error;
mod rng;
pub mod stats;
pub mod synthetic;

pub use error::{ElementPosition, Error, Result};
