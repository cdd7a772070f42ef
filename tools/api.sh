#!/usr/bin/env bash
# The public items of every library, with all features, beside what docs/api says of them.
#
#     tools/api.sh          # writes docs/api/CRATE.txt
#     tools/api.sh --check  # fails where an item came, went or changed; says which
#
# A line that goes or changes breaks those who build on it. Needs cargo-public-api 0.52.0 (`cargo install --locked
# cargo-public-api@0.52.0`: the one that reads what this rustdoc writes).
set -euo pipefail
cd "$(dirname "$0")/.."

crates=(leank leank-core leank-cpu leank-cuda leank-train leank-candle leank-testkit)
if ! cargo public-api --version 2>/dev/null | grep -q ' 0\.52\.'; then
    echo "tools/api.sh: cargo-public-api 0.52 is missing; cargo install --locked cargo-public-api@0.52.0" >&2
    exit 3
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# rustdoc alone is told that it may write JSON: with that said to all, everything would be compiled anew.
printf '#!/bin/sh\nRUSTC_BOOTSTRAP=1 exec rustdoc "$@"\n' >"$scratch/rustdoc"
chmod +x "$scratch/rustdoc"
RUSTDOC=$scratch/rustdoc RUSTDOCFLAGS='-Zunstable-options --output-format json' \
    cargo doc --quiet --workspace --no-deps --all-features --lib
mkdir -p docs/api
target=$(tools/target_dir.sh)
status=0
for crate in "${crates[@]}"; do
    json=$target/doc/${crate//-/_}.json
    cargo public-api -sss --rustdoc-json "$json" >"$scratch/api.txt"
    rm "$json"
    if [ "${1:-}" = --check ]; then
        diff -u "docs/api/$crate.txt" "$scratch/api.txt" || status=1
    else
        cp "$scratch/api.txt" "docs/api/$crate.txt"
    fi
done
[ $status = 0 ] || echo "tools/api.sh: public items changed; where that is meant, run it without --check" >&2
exit $status
