#!/usr/bin/env bash
# Makes a report as `leank report` writes it, of a mask that looks like a real one, and opens it in
# headless Chromium: in light and dark, at 360 pixels, and in print. Fails when the page logs an error,
# asks for anything, is wider than its window, or shows nothing. See tools/report_screenshots.py.
#
#     tools/report_screenshots.sh                        # a mask made up here
#     tools/report_screenshots.sh OUT --mask m.safetensors --dump DIR …   # a report of your own
#
# Pictures go to OUT (target/ci/report). Needs Python 3 and Chromium. Exit code 3: one of them is not
# here and cannot be installed.
set -euo pipefail
out=$(realpath -m "${1:-$(dirname "$0")/../target/ci/report}")
[ $# = 0 ] || shift
start=$PWD # what the arguments' paths are relative to
cd "$(dirname "$0")/.."
mkdir -p "$out"

command -v python3 >/dev/null || { echo "report_screenshots: python3 is missing" >&2; exit 3; }

# Where it is, whatever this system calls it. Not called like any of the names: `command -v` finds functions too.
find_browser() {
    local name
    for name in chromium chromium-browser google-chrome; do
        command -v $name && return 0
    done
    return 1
}

# Installs it, where this is Debian and we may.
install() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
    { timeout 600 apt-get update && DEBIAN_FRONTEND=noninteractive timeout 600 \
        apt-get install --yes --no-install-recommends chromium; } >"$out/apt.log" 2>&1
}

browser=$(find_browser) || { install && browser=$(find_browser); } || {
    echo "report_screenshots: there is no Chromium, and it cannot be installed" >&2
    exit 3
}

# With the profile and the features of tools/test.sh, so that its build serves.
cargo build --quiet --profile test --workspace --all-features --bin leank
leank=$(realpath "$(tools/target_dir.sh)")/debug/leank
if [ $# = 0 ]; then
    python3 tools/made_up_mask.py "$out/mask.safetensors" "$out/other.safetensors" "$out/eval.json"
    set -- --mask "$out/mask.safetensors" --compare "$out/other.safetensors" --eval "$out/eval.json"
fi
(cd "$start" && "$leank" report "$@" --out "$out/report.html")
python3 tools/report_screenshots.py "$browser" "$out/report.html" "$out"
echo "pictures: $out"
