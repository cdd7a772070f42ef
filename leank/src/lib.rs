//! Decode attention over a KV cache with its useless key channels removed
