#!/usr/bin/env bash
# Mutation testing: which changes to a crate does no test of it notice? cargo-mutants says which changes there are;
# tools/mutants.py compiles them all at once and runs the tests. Needs Python 3 with pip; installs cargo-mutants where it
# is missing. Everything else lies below target/mutants.
#
#     tools/mutants.sh leank-core                       # minutes
#     PROPTEST_CASES=8 tools/mutants.sh leank-cpu --tests '^(avx2|portable)::' --only 'src/(store|write)'
#
# Arguments behind the crate go to tools/mutants.py: --tests REGEX chooses tests, --only REGEX mutants (of a part of a
# large crate: only those are compiled), --step build compiles and runs nothing, --step run the opposite. A second run
# tries again what survived, with the tests as they are then.
set -euo pipefail
cd "$(dirname "$0")/.."
crate=$1
shift

work=$PWD/target/mutants
mkdir -p "$work/$crate"
cargo mutants --version 2>/dev/null | grep -q ' 27\.1\.' || cargo install --locked --quiet --debug cargo-mutants@27.1.0
[ -x "$work/python/bin/python" ] || python3 -m venv "$work/python"
"$work/python/bin/pip" install --quiet --disable-pip-version-check tree_sitter tree_sitter_rust

# A copy, since it is changed; tracked files and those that git does not ignore.
rm -rf "$work/tree-$crate"
mkdir "$work/tree-$crate"
git ls-files -z --cached --others --exclude-standard | tar c --null --files-from=- | tar x -C "$work/tree-$crate"
(cd "$work/tree-$crate" && cargo mutants --list --json --package "$crate") >"$work/$crate/mutants.json"

# Compiled a third as long as with the tests' own profile.
export CARGO_TARGET_DIR=$work/target CARGO_PROFILE_TEST_OPT_LEVEL=1
programs=
if [ "$crate" = leank-cpu ]; then
    programs='
        cargo rustc --package leank-cpu --lib --no-default-features --features avx512,capi,huge-pages \
            --crate-type staticlib
        cc -std=c99 -I leank-cpu/include leank-cpu/tests/capi.c "$CARGO_TARGET_DIR/debug/libleank_cpu.a" \
            -lgcc_s -lpthread -lm -ldl -lc -o "$PROGRAMS/capi.c"'
fi
"$work/python/bin/python" tools/mutants.py "$work/tree-$crate" "$crate" "$work/$crate/mutants.json" "$work/$crate" \
    --programs "$programs" "$@"
