//! The CPU backend of leank: lean KV cache and its decode attention
