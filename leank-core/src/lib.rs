//! Masks, block bookkeeping, backend traits and the f64 oracle of the leank pruned KV cache
