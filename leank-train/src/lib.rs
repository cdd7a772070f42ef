//! Activation dumps and mask learning for leank
