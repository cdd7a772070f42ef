//! Activation dumps and mask learning for leank
#![deny(unsafe_code)]

pub mod allocate;
pub mod baseline;
pub mod dump;
mod error;
pub mod order;
mod rng;
pub mod stats;
pub mod synthetic;

pub use error::{ElementPosition, Error, Result};
