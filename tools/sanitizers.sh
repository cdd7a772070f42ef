#!/usr/bin/env bash
# Runs the tests of the crates that hold `unsafe` or threads under a sanitizer of LLVM.
#
#     tools/sanitizers.sh address|thread
#     tools/sanitizers.sh thread -p leank-cpu -E 'test(pool)'   # other arguments of cargo-nextest
#     tools/sanitizers.sh address --all-features --no-fail-fast -p leank-candle -p leank -p leank-cuda \
#         -E 'not test(larger_than_memory)'   # half an hour of compiling
#
# Needs an x86-64 Linux, Rust and cargo-nextest. The flags are unstable; RUSTC_BOOTSTRAP lets a stable compiler
# take them. The standard library is instrumented too where its source is there (`rustup component add
# rust-src`). Where it is not, ThreadSanitizer does not see what is ordered inside it.
set -euo pipefail
cd "$(dirname "$0")/.."

sanitizer=${1:-}
case "$sanitizer" in
    address | thread) shift ;;
    *)
        echo "usage: tools/sanitizers.sh address|thread [ARGUMENT...]" >&2
        exit 2
        ;;
esac

export RUSTC_BOOTSTRAP=1 CARGO_INCREMENTAL=0
export CARGO_TARGET_DIR=$PWD/target/sanitizers/$sanitizer
export RUSTFLAGS="-Zsanitizer=$sanitizer"
std=()
if [ -e "$(rustc --print sysroot)/lib/rustlib/src/rust/library/std/Cargo.toml" ]; then
    std=(-Zbuild-std)
else
    echo "sanitizers: no rust-src here, so that the standard library is not instrumented" >&2
    RUSTFLAGS+=' -Cunsafe-allow-abi-mismatch=sanitizer'
fi
# Compiles in a part of the time, and leaves more for the sanitizer to see.
export CARGO_PROFILE_TEST_OPT_LEVEL=${CARGO_PROFILE_TEST_OPT_LEVEL:-1}
# Several times as slow as without: a part of the random cases.
export PROPTEST_CASES=${PROPTEST_CASES:-16}
# A test that asks for more memory than there is wants to be refused; limits of a process are too small for a sanitizer.
export ASAN_OPTIONS=allocator_may_return_null=1:detect_stack_use_after_return=1:${ASAN_OPTIONS:-}
export LEANK_ATTACK_MEMORY=unlimited
export TSAN_OPTIONS=halt_on_error=0:${TSAN_OPTIONS:-}
[ $# -gt 0 ] || set -- --all-features --no-fail-fast -p leank-core -p leank-cpu -p leank-train -p leank-testkit
cargo nextest run --target x86_64-unknown-linux-gnu "${std[@]}" "$@"
