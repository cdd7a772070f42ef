#!/usr/bin/env bash
# Builds leank-core and leank-cpu for 64-bit ARM, without default features as an edge device takes
# them, and runs their tests under qemu: the NEON kernel, the state machines.
#
#     tools/aarch64.sh
#
# Needs an x86-64 Debian with apt-get and root. What it installs beside that is unpacked below
# target/: Debian's Rust (rustc-web) with its standard library for ARM, at least as new as the
# workspace's rust-version. Exit code 3: something of this cannot be had here.
set -euo pipefail
cd "$(dirname "$0")/.."

target=aarch64-unknown-linux-gnu
work=$PWD/target/ci/aarch64
root=$work/root
mkdir -p "$work"

missing() {
    echo "aarch64: $1" >&2
    exit 3
}

[ "$(uname -m)" = x86_64 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null ||
    missing 'this needs an x86-64 Debian and root'

emulator() {
    command -v qemu-aarch64-static >/dev/null && command -v aarch64-linux-gnu-gcc >/dev/null && return
    apt-get update &&
        DEBIAN_FRONTEND=noninteractive timeout 600 apt-get install --yes --no-install-recommends \
            qemu-user-static gcc-aarch64-linux-gnu libc6-dev-arm64-cross
}

# An apt of its own, for both architectures: the system's stays as it is.
compiler() {
    [ -x "$root/usr/bin/rustc" ] && return
    local apt=$work/apt
    mkdir -p "$apt"/{state/lists/partial,cache/archives/partial,dpkg} "$work/debs"
    touch "$apt/dpkg/status"
    cat >"$apt/apt.conf" <<CONF
APT::Architecture "amd64";
APT::Architectures { "amd64"; "arm64"; };
Dir::State "$apt/state";
Dir::State::status "$apt/dpkg/status";
Dir::Cache "$apt/cache";
CONF
    export APT_CONFIG=$apt/apt.conf
    apt-get update || return 1
    local std llvm deb
    std=$(depends libstd-rust-web-dev 'libstd-rust-web-[0-9.]*')
    llvm=$(depends "$std" 'libllvm[0-9]*')
    (
        cd "$work/debs" &&
            apt-get download rustc-web libstd-rust-web-dev "$std" "$llvm" libstd-rust-web-dev:arm64
    ) || return 1
    unset APT_CONFIG
    for deb in "$work"/debs/*.deb; do dpkg -x "$deb" "$root.partial" || return 1; done
    mv "$root.partial" "$root"
}

# depends PACKAGE PATTERN: the first of its dependencies that is called so.
depends() {
    apt-cache depends "$1" | sed -n "s/.*Depends: \($2\)\$/\1/p" | head -n 1
}

{ emulator && compiler; } >"$work/install.log" 2>&1 || {
    tail -n 5 "$work/install.log" >&2
    missing 'the emulator or the compiler cannot be installed'
}
cat >"$work/rustc" <<RUSTC
#!/bin/sh
LD_LIBRARY_PATH=$root/usr/lib/x86_64-linux-gnu exec $root/usr/bin/rustc "\$@"
RUSTC
chmod +x "$work/rustc"
"$work/rustc" --version

export RUSTC=$work/rustc CARGO_TARGET_DIR=$work/target
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER='qemu-aarch64-static -L /usr/aarch64-linux-gnu'
# An emulated core is a tenth of a real one: few cases, and none of the search for a smaller one.
export PROPTEST_CASES=8 PROPTEST_MAX_SHRINK_ITERS=1
common=(--quiet --locked --target "$target" --no-default-features)
cargo test "${common[@]}" --package leank-core --lib --tests
cargo test "${common[@]}" --package leank-cpu --features capi --lib --test life
# With the same features, so that the library is compiled once.
cargo test "${common[@]}" --package leank-cpu --features capi --test conformance -- neon:: --skip a_million_tokens
