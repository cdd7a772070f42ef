#!/usr/bin/env bash
# Prints the folder that cargo builds into, wherever its configuration puts it.
#
#     tools/target_dir.sh
set -euo pipefail
cd "$(dirname "$0")/.."

cargo metadata --format-version 1 --no-deps |
    python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])'
