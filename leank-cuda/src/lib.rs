//! The CUDA backend of leank (probe only, so far)
