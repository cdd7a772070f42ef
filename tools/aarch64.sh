#!/usr/bin/env bash
# Builds leank-core and leank-cpu for 64-bit ARM, without default features as an edge device takes
# them, and runs their tests under qemu: the NEON kernel, the state machines.
#
#     tools/aarch64.sh
#
# Needs rustup, which brings the standard library, and qemu-aarch64-static, or a Debian with apt-get and root to
# install it. No C compiler: musl comes with the standard library. Exit code 3: something of this cannot be had here.
set -euo pipefail
cd "$(dirname "$0")/.."

target=aarch64-unknown-linux-musl
work=$PWD/target/ci/aarch64
mkdir -p "$work"

missing() {
    echo "aarch64: $1" >&2
    exit 3
}

emulator() {
    command -v qemu-aarch64-static >/dev/null && return
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null &&
        timeout 600 apt-get update &&
        DEBIAN_FRONTEND=noninteractive timeout 600 apt-get install --yes --no-install-recommends qemu-user-static
}

{ rustup target add "$target" && emulator; } >"$work/install.log" 2>&1 || {
    tail -n 5 "$work/install.log" >&2
    missing 'the emulator or the standard library for it cannot be installed'
}

export CARGO_TARGET_DIR=$work/target
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_MUSL_LINKER=rust-lld
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_MUSL_RUNNER=qemu-aarch64-static
# An emulated core is a tenth of a real one: few cases, and none of the search for a smaller one.
export PROPTEST_CASES=4 PROPTEST_MAX_SHRINK_ITERS=1
common=(--quiet --locked --target "$target" --no-default-features)
cargo test "${common[@]}" --package leank-core --lib --tests
cargo test "${common[@]}" --package leank-cpu --features capi,huge-pages --lib --test life
# With the same features, so that the library is compiled once.
cargo test "${common[@]}" --package leank-cpu --features capi,huge-pages --test conformance -- neon:: --skip a_million_tokens
