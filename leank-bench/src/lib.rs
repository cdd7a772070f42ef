//! Benches, peers and end-to-end measurements of leank
