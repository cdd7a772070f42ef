#!/usr/bin/env bash
# Prints how many crates each feature of `leank` brings to a program that depends on it, and fails
# when the library brings what only the command or the models need.
#
#     tools/trees.sh
set -euo pipefail
cd "$(dirname "$0")/.."

# Crates of the command and of the models: never in the trees of the caches or of learning.
only_cli='anyhow|clap|clap_builder|clap_derive|comfy-table|indicatif|console|maud|resvg|dejavu'
only_models='candle-core|candle-nn|tokenizers|onig|leank-candle'
failed=0

# crates PACKAGE FEATURES: names of the crates in the tree, itself left out.
crates() {
    cargo tree --package "$1" --no-default-features ${2:+--features "$2"} \
        --edges normal --prefix none --format '{p}' |
        awk '{ print $1 }' | sort -u | grep -vx "$1"
}

# row PACKAGE FEATURES FORBIDDEN
row() {
    local names found
    names=$(crates "$1" "$2")
    printf '%-14s %-22s %4d crates\n' "$1" "${2:-(none)}" "$(wc -l <<<"$names")"
    [ -n "$3" ] || return 0
    if found=$(grep -xE "$3" <<<"$names"); then
        echo "tools/trees.sh: $1 with the features \"$2\" must not need:" $found >&2
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
row leank '' "$library"
row leank cpu "$library"
row leank cuda "$library"
row leank train "$library"
row leank cpu,interop "$library"
row leank candle "$only_cli"
row leank cli ''
exit $failed
