#!/usr/bin/env bash
# Packs every crate that is published, and compiles what is in the packages, in place of the repository.
#
#     tools/package.sh
#
# Dependencies are those that the workspace has compiled already.
set -euo pipefail
cd "$(dirname "$0")/.."

target=$(tools/target_dir.sh)
packages=$target/ci/packages
rm -rf "$packages" "$target"/package/*.crate
mkdir -p "$packages"
log=$packages/package.log
cargo package --quiet --workspace --exclude leank-bench --allow-dirty --no-verify >"$log" 2>&1 || {
    cat "$log" >&2
    exit 1
}
for crate in "$target"/package/*.crate; do
    tar -xzf "$crate" -C "$packages"
    printf '%-28s %6d KiB\n' "$(basename "$crate")" $(($(stat -c %s "$crate") / 1024))
    # What a registry takes at most.
    [ "$(stat -c %s "$crate")" -lt 10000000 ] || { echo "$crate is too large" >&2; exit 1; }
done

{
    printf '[workspace]\nresolver = "3"\nmembers = ["*-0.*"]\n\n[patch.crates-io]\n'
    for folder in "$packages"/*/; do
        name=$(basename "$folder")
        printf '%s = { path = "%s" }\n' "${name%-*}" "$name"
    done
} >"$packages/Cargo.toml"
cp Cargo.lock "$packages/"
# In a folder below the repository: its settings and its compiled dependencies are used.
(cd "$packages" && CARGO_TARGET_DIR=$target cargo check --quiet --workspace --all-features)
echo "$(find "$packages" -maxdepth 1 -name '*-0.*' | wc -l) packages compile"
