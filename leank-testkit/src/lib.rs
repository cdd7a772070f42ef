//! The conformance suite that every leank backend runs
