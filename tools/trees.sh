#!/usr/bin/env bash
# Which crates each library needs with which features: prints how many, and fails where they are not those of
# docs/trees.txt, or where the library needs what only the command or the models may.
#
#     tools/trees.sh          # checks
#     tools/trees.sh --write  # writes docs/trees.txt
set -euo pipefail
cd "$(dirname "$0")/.."

recorded=docs/trees.txt
# Crates of the command and of the models: never in the trees of the caches or of learning.
only_cli='anyhow|clap|clap_builder|clap_derive|comfy-table|indicatif|console|maud|resvg|dejavu'
only_models='candle-core|candle-nn|tokenizers|onig|leank-candle'
failed=0
found=$(mktemp)
trap 'rm -f "$found"' EXIT

# crates PACKAGE FEATURES: names of the crates in the tree, itself left out; on one system, since others need others.
crates() {
    cargo tree --locked --package "$1" --no-default-features ${2:+--features "$2"} \
        --target x86_64-unknown-linux-gnu --edges normal --prefix none --format '{p}' |
        awk '{ print $1 }' | LC_ALL=C sort -u | grep -vx "$1"
}

# row PACKAGE FEATURES FORBIDDEN
row() {
    local names forbidden
    names=$(crates "$1" "$2")
    printf '%-14s %-22s %4d crates\n' "$1" "${2:-(none)}" "$(wc -l <<<"$names")"
    { echo "$1 ${2:-(none)}"; sed 's/^/    /' <<<"$names"; } >>"$found"
    [ -n "$3" ] || return 0
    if forbidden=$(grep -xE "$3" <<<"$names"); then
        echo "tools/trees.sh: $1 with the features \"$2\" must not need:" $forbidden >&2
        failed=1
    fi
}

library="$only_cli|$only_models"
row leank-core '' "$library|serde|safetensors"
row leank-core files "$library"
row leank-core files,interop "$library"
row leank-cpu '' "$library|rayon"
row leank-cpu capi "$library|serde|rayon"
row leank-cpu capi-files "$library|rayon"
row leank-cpu rayon "$library"
row leank-cuda '' "$library"
row leank-train '' "$library"
row leank-testkit '' "$library"
row leank-candle '' "$only_cli"
row leank '' "$library"
row leank cpu "$library"
row leank cuda "$library"
row leank train "$library"
row leank cpu,interop "$library"
row leank candle "$only_cli"
row leank cli ''
if [ "${1:-}" = --write ]; then
    cp "$found" $recorded
elif ! diff -u $recorded "$found"; then
    echo "tools/trees.sh: other crates than in $recorded; where that is meant, run it with --write" >&2
    failed=1
fi
exit $failed
