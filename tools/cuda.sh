#!/usr/bin/env bash
# Compiles every CUDA kernel for compute capabilities 8.0 to 12.0, or those that are given, with NVRTC,
# which takes no GPU, and prints registers; fails where one does not compile or one of leank-cuda spills
# registers to memory.
#
#     tools/cuda.sh
#     tools/cuda.sh 8.0 9.0
#
# Needs Rust. Takes NVRTC from where the system has it, or else from PyPI, below target/ (90 MB); exits
# with 3 where that does not work.
set -euo pipefail
cd "$(dirname "$0")/.."

target=$(tools/target_dir.sh)
packages=$target/nvrtc
# Pinned, so that the numbers are those of one compiler.
version=13.0.88

if ! ldconfig -p | grep -q 'libnvrtc\.so'; then
    library=$packages/nvidia/cu13/lib
    if [ ! -e "$library/libnvrtc.so.13" ]; then
        python3 -m pip install --quiet --root-user-action=ignore --no-deps --target "$packages" \
            "nvidia-cuda-nvrtc==$version" || exit 3
    fi
    export LD_LIBRARY_PATH=$library${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
fi
# With the profile and the features of tools/test.sh, so that its build serves.
cargo build --quiet --profile test --workspace --all-features --example compile --example compile_decoder
[ $# -gt 0 ] || set -- 8.0 8.6 9.0 10.0 12.0
# The longer ones first.
for example in compile compile_decoder; do
    for capability in "$@"; do echo "$example" "$capability"; done
done | xargs -P "$(nproc)" -n 2 sh -c '"$0/debug/examples/$1" "$2"' "$target"
