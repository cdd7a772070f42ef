#!/usr/bin/env python3
"""Checks dump_hf.py and eval_hf.py against the `leank` command, on the same GGUF file and tokens.

    tools/check_hf.py --leank target/release/leank --model smollm2.gguf --text a.txt b.txt [--sequences 4]

Queries, keys and values must be equal within rounding, fingerprints to the letter. The probes are other
draws from the same distribution, so of them and of what is learned from them agreement is stated and must
be far from chance: the share of the channels that either mask keeps that both keep. The KL of a mask must
be what `leank eval` measures from a cache. Exit code 1 where something differs.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

from safetensors.torch import load_file

TOOLS = pathlib.Path(__file__).resolve().parent


def run(*command, **options):
    return subprocess.run([str(word) for word in command], check=True, **options)


def compare_dumps(ours, theirs, layers):
    """The largest relative difference per tensor, and the ratio of the probes' norms."""
    worst, ratios = {"q": 0.0, "k": 0.0, "v": 0.0}, []
    for layer in range(layers):
        name = f"layer-{layer:03}.safetensors"
        a, b = load_file(ours / name), load_file(theirs / name)
        if {key: own.shape for key, own in a.items()} != {key: own.shape for key, own in b.items()}:
            sys.exit(f"{name}: other tensors or shapes")
        for key, own in a.items():
            if key[0] == "g":
                ratios.append((b[key].norm() / own.norm()).item())
            else:
                worst[key[0]] = max(worst[key[0]], ((b[key] - own).norm() / own.norm()).item())
    return worst, sum(ratios) / len(ratios)


def overlap(a, b):
    a, b = load_file(a)["mask"].bool(), load_file(b)["mask"].bool()
    return ((a & b).sum() / (a | b).sum()).item(), a.float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--leank", type=lambda path: pathlib.Path(path).resolve(), required=True)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="a GGUF file")
    parser.add_argument("--text", type=pathlib.Path, nargs="+", required=True)
    parser.add_argument("--sequences", type=int, default=4)
    args = parser.parse_args()
    good = True

    def told(what, value, fine):
        nonlocal good
        good &= fine
        print(f"{'' if fine else 'WRONG  '}{what}: {value}")

    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        ours, theirs, tokens = folder / "ours", folder / "theirs", folder / "tokens.json"
        sizes = ["--sequences", args.sequences, "--positions", 32, "--prefix", "200..500", "--dtype", "f32"]
        given = ["--model", args.model, "--text", *args.text]
        run(args.leank, "dump", *given, *sizes, "--save-tokens", tokens, "--out", ours)
        hf = [sys.executable, TOOLS / "dump_hf.py", "--model", args.model, "--gguf", "--dtype", "f32"]
        run(*hf, "--tokens", tokens, "--out", theirs)

        manifests = [json.loads((dump / "manifest.json").read_text()) for dump in (ours, theirs)]
        same = manifests[0]["fingerprint"] == manifests[1]["fingerprint"]
        told("fingerprints are equal", same, same)
        worst, ratio = compare_dumps(ours, theirs, manifests[0]["shape"]["layers"])
        for tensor, difference in worst.items():
            told(f"relative difference of {tensor}", f"{difference:.1e}", difference < 1e-4)
        told("norm of their probe over ours", f"{ratio:.3f}", 0.8 < ratio < 1.25)

        masks = [dump.with_suffix(".safetensors") for dump in (ours, theirs)]
        learn = ["--k-ratio", 0.5, "--align", 8, "--recent", 64, "--out"]
        for dump, mask in zip((ours, theirs), masks):
            run(args.leank, "learn", dump, *learn, mask, stdout=subprocess.DEVNULL)
        both, kept = overlap(*masks)
        chance = kept / (2 - kept)
        told("kept by both masks, of what either keeps", f"{both:.3f} (by chance {chance:.3f})", both > 0.7)

        sizes = ["--context", 400, "--positions", 32, "--sequences", args.sequences]
        eval_ = [*sizes, "--save-tokens", tokens, "--dtype", "f32", "--json"]
        found = run(args.leank, "eval", *given, "--mask", masks[1], *eval_, capture_output=True)
        cache = json.loads(found.stdout)[0]["text"]
        hf = [sys.executable, TOOLS / "eval_hf.py", "--model", args.model, "--gguf", "--tokens", tokens]
        found = run(*hf, "--mask", masks[1], stdout=subprocess.PIPE)
        simulated = json.loads(found.stdout)[0]["text"]
        for key in ("kl", "dense_perplexity", "lean_perplexity"):
            close = abs(simulated[key] / cache[key] - 1) < 1e-2
            told(f"{key} with their mask", f"{cache[key]:.6f} from a cache, {simulated[key]:.6f} in transformers", close)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
