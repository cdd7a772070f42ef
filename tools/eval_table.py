#!/usr/bin/env python3
"""Prints the JSON of `leank eval --json` as one table, a row per mask.

    leank eval ... --json > eval.json
    tools/eval_table.py eval.json
"""

import json
import pathlib
import sys


def row(entry):
    """(column, cell) of one mask."""
    yield "mask", pathlib.PurePath(entry["mask"]).stem
    yield "kept K", f"{entry['kept_k']:.1%}"
    yield "kept V", f"{entry['kept_v']:.1%}"
    yield "dead heads", f"{entry['dead_heads']}/{entry['heads']}"
    if text := entry["text"]:
        error = text["kl_standard_error"]
        yield "KL", f"{text['kl']:.4f}" + (f" ± {error:.4f}" if error is not None else "")
        yield "perplexity", f"{text['lean_perplexity']:.2f} ({entry['perplexity_change']:+.1%})"
        yield "top-1", f"{text['top1_agreement']:.1%}"
    for task in entry["tasks"]:
        yield f"{task['task']} (dense)", f"{task['lean_right']} ({task['dense_right']}) of {task['items']}"
    if entry["whole_kv_ratio"] is not None:
        yield "whole-KV ratio", f"{entry['whole_kv_ratio']:.3f}"


def main():
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    entries = json.loads(pathlib.Path(sys.argv[1]).read_text())
    rows = [dict(row(entry)) for entry in entries]
    columns = list(dict.fromkeys(column for one in rows for column in one))
    cells = [columns] + [[one.get(column, "") for column in columns] for one in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line, one in enumerate(cells):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(one, widths)) + " |")
        if line == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    if text := entries[0]["text"]:
        print(
            f"\n{text['sequences']} sequences, {text['positions']} positions; the dense model's "
            f"perplexity is {text['dense_perplexity']:.2f}. KL in nats against the dense model; "
            "whole-KV ratio measured on the caches, windows and padding included."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
