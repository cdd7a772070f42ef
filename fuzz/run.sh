#!/bin/sh
# Runs every fuzz target for SECONDS, from its committed seeds and what earlier runs found.
#
#     fuzz/run.sh SECONDS [TARGET...]
#
# Needs cargo-fuzz, installs nothing. Exit code 0: nothing found; 1: a target failed (the input lies
# under fuzz/artifacts/, keep it under fuzz/seeds/ once mended); 2: wrong usage or no cargo-fuzz.
set -eu

case "${1:-}" in
    '' | *[!0-9]*)
        echo "usage: fuzz/run.sh SECONDS [TARGET...]" >&2
        exit 2
        ;;
esac
seconds=$1
shift
cd "$(dirname "$0")"
if ! cargo fuzz --version >/dev/null 2>&1; then
    echo "fuzz/run.sh: cargo-fuzz is missing; cargo install cargo-fuzz" >&2
    exit 2
fi
# The sanitizer's flags are unstable; this lets the stable compiler take them.
RUSTC_BOOTSTRAP=1
export RUSTC_BOOTSTRAP
[ $# -gt 0 ] || set -- $(cargo fuzz list)

failed=
for target in "$@"; do
    mkdir -p "corpus/$target"
    echo "== $target, $seconds s" >&2
    cargo fuzz run "$target" "corpus/$target" "seeds/$target" -- \
        -max_total_time="$seconds" -timeout=20 -max_len=8192 \
        -rss_limit_mb=1024 -malloc_limit_mb=64 -print_final_stats=1 || failed="$failed $target"
done
if [ -n "$failed" ]; then
    echo "fuzz/run.sh: failed:$failed" >&2
    exit 1
fi
