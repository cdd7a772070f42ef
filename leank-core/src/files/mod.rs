//! Mask files.
