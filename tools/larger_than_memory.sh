#!/usr/bin/env bash
# Learns from a made-up dump that is larger than the memory it may use, page cache included.
#
#     tools/larger_than_memory.sh [GIB [MIB]]     # 40 GiB of dump in 2048 MiB of memory
#
# Needs Rust, as much disk below target/ (or $CARGO_TARGET_DIR) and, as root, memory cgroups (version 1 or 2).
# Exit code 3: there are none.
set -euo pipefail
cd "$(dirname "$0")/.."
gib=${1:-40} mib=${2:-2048}
target=$(tools/target_dir.sh)
work=$target/larger-than-memory

# Everything of this shell and below it.
if [ -w /sys/fs/cgroup/cgroup.subtree_control ]; then
    group=/sys/fs/cgroup/leank limit=memory.max peak=memory.peak
    echo +memory >/sys/fs/cgroup/cgroup.subtree_control 2>/dev/null || true
else
    group=/sys/fs/cgroup/memory/leank limit=memory.limit_in_bytes peak=memory.max_usage_in_bytes
fi
mkdir -p "$group" 2>/dev/null && [ -w "$group/$limit" ] || {
    echo 'larger_than_memory: no memory cgroup can be made here' >&2
    exit 3
}
trap 'rmdir "$group"; rm -rf "$work"' EXIT

cargo build --release --package leank --package leank-train --bin leank --example synthetic_dump
time "$target/release/examples/synthetic_dump" "$work" "$gib"
echo $((mib << 20)) >"$group/$limit"
# The last to write is the first to be in memory; the limit is for pages that are read from now on.
sync
echo 3 >/proc/sys/vm/drop_caches
time sh -c "echo \$\$ >$group/cgroup.procs && exec $target/release/leank learn $work --method e1 --k-ratio 0.7 --out $work.safetensors"
echo "$(du -s --block-size=1M "$work" | cut -f1) MiB of dump, a limit of $mib MiB, peak $(($(cat "$group/$peak") >> 20)) MiB, page cache included"
"$target/release/leank" inspect "$work.safetensors"
