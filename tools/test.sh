#!/usr/bin/env bash
# Runs every test of the workspace: unit, integration, property and documentation tests, with all
# features. Needs Rust and cargo-nextest (`cargo install --locked cargo-nextest`); no GPU, no
# network beyond the crates.
#
#     tools/test.sh              # everything
#     tools/test.sh -E 'test(mask)'   # arguments go to `cargo nextest run`
set -euo pipefail
cd "$(dirname "$0")/.."

if cargo nextest --version >/dev/null 2>&1; then
    cargo nextest run --workspace --all-features --no-fail-fast "$@"
else
    echo "tools/test.sh: cargo-nextest is missing, using cargo test without \"$*\"" >&2
    cargo test --workspace --all-features --no-fail-fast --all-targets
fi
# nextest leaves out the examples of the documentation.
[ $# -gt 0 ] || cargo test --workspace --all-features --doc --quiet
