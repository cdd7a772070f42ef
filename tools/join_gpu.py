#!/usr/bin/env python3
"""Joins what `leank-bench cuda --json` and the peers' `composed.py` measured in the same run.

    leank-bench cuda --json > ours.json
    PEERS_OUT=. python3 .../peers/gpu/composed.py          # writes composed.json
    tools/join_gpu.py composed.json ours.json...

Prints a Markdown table: microseconds per layer, and the ratio to the best dense peer. `composed` is the
faster of the peers' two ways to make a library do the same; its merge is not counted.
"""

import json
import sys


def peers(path):
    """Per model and batch: dense and composed microseconds, means over layers."""
    rows = {}
    for row in json.load(open(path)):
        rows.setdefault((row["model"], row["B"], row["T"]), []).append(row)
    means = {}
    for key, of_key in rows.items():
        composed = min(sum(row[way] for row in of_key) / len(of_key) for way in ("serial", "fork"))
        means[key] = (of_key[0]["dense"], composed)
    return means


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    theirs = peers(sys.argv[1])
    print("| model, batch | dense: cuDNN | ours (of read) | lean: composed cuDNN | ours (of read) | by bytes |")
    print("|---|---|---|---|---|---|")
    for path in sys.argv[2:]:
        report = json.load(open(path))
        read = report["read_gb_per_s"]

        def share(size, us):
            return f"{us:.1f} µs ({size / us / 1e3 / read:.0%})"

        for row in report["rows"]:
            batch = row["batch"]
            key = (row["model"], batch["sequences"], batch["context"])
            dense, composed = theirs.get(key, (None, None))
            best = dense or row["dense_us"]
            first = [
                f"{key[0]} {key[1]} × {key[2]}",
                f"{dense:.1f} µs" if dense else "–",
                share(row["dense_bytes"], row["dense_us"]),
            ]
            for lean in row["lean"]:
                cells = [
                    f"{composed:.1f} µs, ×{best / composed:.2f}" if composed else "–",
                    f"{lean['formats']} {share(lean['bytes'], lean['us'])}, ×{best / lean['us']:.2f}",
                    f"×{row['dense_bytes'] / lean['bytes']:.3f}",
                ]
                print("| " + " | ".join(first + cells) + " |")
            if not row["lean"]:
                print("| " + " | ".join(first + ["", "", ""]) + " |")


main()
