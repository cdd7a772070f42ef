#!/usr/bin/env bash
# Builds every fuzz target, then runs each for SECONDS, from its committed seeds, the attack files and what
# earlier runs found (corpora.tar.gz, and those on this machine). Ends with a table of what was run.
#
#     fuzz/run.sh SECONDS [TARGET...]
#
# Needs cargo-fuzz, installs nothing. Exit code 0: nothing found; 1: a target failed (the end of its log is
# shown, the input lies under fuzz/artifacts/: keep it under fuzz/seeds/ once mended); 2: wrong usage or no
# cargo-fuzz.
set -euo pipefail

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
export RUSTC_BOOTSTRAP=1
[ $# -gt 0 ] || set -- $(cargo fuzz list)
# All at once where all are wanted: a build of one target does little else than link.
if [ "$*" = "$(cargo fuzz list | xargs)" ]; then
    cargo fuzz build --dev
else
    for target in "$@"; do cargo fuzz build --dev "$target"; done
fi
host=$(rustc -vV | sed -n 's/^host: //p')
built=${CARGO_TARGET_DIR:-target}/$host/debug
# cargo-fuzz sets it too: parts of the standard library are there twice.
export ASAN_OPTIONS=detect_odr_violation=0

# The number of a final statistic, or of the last `cov:`, in a log.
stat() { sed -n "s/^stat::$1: *//p" "$2" | tail -n 1; }
coverage() { grep -o 'cov: [0-9]*' "$1" | tail -n 1 | cut -d ' ' -f 2; }

TIMEFORMAT='%U %S'
# Fuzzes one target; leaves its row of the table, and says so where it failed.
one() {
    local target=$1 found=corpus/$1 artifacts=artifacts/$1 folders
    mkdir -p "$found" "$artifacts"
    folders=("$found" "seeds/$target")
    [ ! -d "../attacks/$target" ] || folders+=("../attacks/$target")
    local log=$artifacts.log spent=$artifacts.time status=0
    {
        time "$built/$target" "${folders[@]}" -artifact_prefix="$artifacts/" \
            -max_total_time="$seconds" -timeout=20 -max_len=16384 \
            -rss_limit_mb=1024 -malloc_limit_mb=64 -print_final_stats=1 >"$log" 2>&1
    } 2>"$spent" || status=$?
    printf '%-16s %12s %10.0f %8s %8s\n' "$target" "$(stat number_of_executed_units "$log")" \
        "$(tail -n 1 "$spent" | awk '{ print $1 + $2 }')" "$(coverage "$log")" "$(stat peak_rss_mb "$log")" >"$artifacts.row"
    if [ $status != 0 ]; then
        tail -n 60 "$log" >&2
        echo "$target" >>artifacts/failed
    fi
}

mkdir -p artifacts
rm -f artifacts/failed
mkdir -p corpus
tar -xzf corpora.tar.gz --skip-old-files -C corpus
# As many at a time as there are cores.
cores=$(nproc)
for target in "$@"; do
    while [ "$(jobs -rp | wc -l)" -ge "$cores" ]; do wait -n; done
    one "$target" &
done
wait
printf '%-16s %12s %10s %8s %8s\n' target executions 'CPU s' edges 'MiB'
for target in "$@"; do cat "artifacts/$target.row"; done
if [ -e artifacts/failed ]; then
    echo "fuzz/run.sh: failed:" $(cat artifacts/failed) >&2
    exit 1
fi
