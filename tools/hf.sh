#!/usr/bin/env bash
# Dumps and evaluates SmolLM2 with transformers (dump_hf.py, eval_hf.py) and with `leank`, and compares.
#
#     tools/hf.sh [--leank PATH]
#
# --leank  use this command instead of the one that the tests build
#
# Needs Rust, Python 3 with pip, apt and dpkg, and 7 GB below target/ for torch and transformers. Exit code 3:
# the packages or the model are not to be had here.
set -euo pipefail
cd "$(dirname "$0")/.."

target=$(tools/target_dir.sh)
work=$target/ci/hf
python=$work/venv/bin/python
mkdir -p "$work"

leank=$target/debug/leank
if [ "${1:-}" = --leank ]; then
    leank=$2
else
    # With the profile and the features of tools/test.sh, so that its build serves.
    cargo build --quiet --profile test --workspace --all-features --bin leank
fi

missing() {
    echo "hf: $*" >&2
    exit 3
}
if ! "$python" -c 'import torch, transformers, accelerate, gguf, safetensors' 2>/dev/null; then
    python3 -m venv --clear "$work/venv" || missing 'no virtual environment can be made'
    "$python" -m pip install --quiet torch==2.15.0 transformers==5.24.0 accelerate gguf safetensors numpy ||
        missing 'torch and transformers cannot be installed with pip'
fi
python3 tools/fetch_model.py smollm2 "$work/smollm2.gguf" >/dev/null || missing 'the model cannot be fetched'
python3 tools/fetch_texts.py "$work/texts" >/dev/null || missing 'the texts cannot be fetched'

# Bars of the loaders are thousands of lines: kept for a failure alone.
if ! "$python" tools/check_hf.py --leank "$leank" --model "$work/smollm2.gguf" \
    --text "$work"/texts/calibrate-*.txt 2>"$work/log"; then
    tail -n 20 "$work/log" >&2
    exit 1
fi
