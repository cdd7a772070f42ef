#!/usr/bin/env python3
"""Dumps a model, learns masks from it by every method, measures them and prints docs/methods.md's tables.

    tools/methods.py --leank target/release/leank --model qwen.gguf --gguf \
        --learn-from texts/calibrate-*.txt --measure-on texts/evaluate-*.txt --out work --device cuda

Everything goes into --out: dumps, masks, one JSON file per part of the measurements. What is there already
is not done again, so a killed run goes on, and a finished one prints its tables in a moment. Needs
dump_hf.py and eval_hf.py beside it, with what they need.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

TOOLS = pathlib.Path(__file__).resolve().parent
METHODS = {"static": "static", "leank": "LeanK's two stages", "e1": "E1", "e2": "E2", "bytes": "**E2, bytes**"}
began = time.monotonic()


def told(text):
    print(f"[{time.monotonic() - began:7.1f} s] {text}", file=sys.stderr, flush=True)


def run(command, out=None):
    """Runs a command, its words for the user into a log; `out` gets what it prints, whole or not at all."""
    command = [str(word) for word in command]
    found = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if found.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{found.stderr[-4000:]}")
    if out is not None:
        part = out.with_suffix(".part")
        part.write_text(found.stdout, encoding="utf-8")
        os.replace(part, out)
    return found.stdout


class Work:
    def __init__(self, args):
        self.args = args
        # Measuring takes every core by itself; two at a time would only wait for one another.
        self.cores = threading.Lock()
        for folder in ("masks", "measured"):
            (args.out / folder).mkdir(parents=True, exist_ok=True)

    def hf(self, tool):
        model = ["--model", self.args.model, *(["--gguf"] if self.args.gguf else [])]
        return [sys.executable, TOOLS / tool, *model, "--device", self.args.device, "--compute", self.args.compute]

    def dump(self, seed):
        dump = self.args.out / f"dump-{seed}"
        if not dump.exists():
            sizes = ["--sequences", self.args.sequences, "--positions", self.args.positions, "--prefix", self.args.prefix]
            run([*self.hf("dump_hf.py"), "--text", *self.args.learn_from, *sizes, "--seed", seed, "--out", dump])
            told(f"{dump} is written")
        return dump

    def mask(self, seed, align, ratio, method):
        return self.args.out / "masks" / f"seed{seed}-align{align}-{round(100 * ratio)}-{method}.safetensors"

    def learn(self, seed, align, ratio, method):
        """A mask; `bytes` gets those that E2 needs for the same share of K's channels."""
        out = self.mask(seed, align, ratio, method)
        if out.exists():
            return
        if method == "bytes":
            e2 = self.mask(seed, align, ratio, "e2")
            inspected = json.loads(run([self.args.leank, "inspect", e2, "--json"]))
            budget = ["--method", "e2", "--bytes", inspected["middle_bytes"]]
        else:
            budget = ["--method", method, "--k-ratio", ratio]
        with self.cores:
            run([self.args.leank, "learn", self.dump(seed), *budget, "--align", align, "--seed", seed, "--out", out])
        told(f"{out.name} is learned")

    def measure(self, name, masks, options):
        out = self.args.out / "measured" / f"{name}.json"
        if out.exists():
            reports = json.loads(out.read_text(encoding="utf-8"))
            # Other options may share the masks in another way.
            if [pathlib.Path(own["mask"]).name for own in reports] == [own.name for own in masks]:
                return reports
        reports = run([*self.hf("eval_hf.py"), "--text", *self.args.measure_on, *options, "--mask", *masks], out)
        told(f"{out.name} is measured")
        return json.loads(reports)

    def all(self):
        """Measurements of every mask at the first context: (seed, alignment, ratio, method) to its report."""
        args, waiting = self.args, {}
        at_context = ["--context", args.contexts[0], "--tasks", args.tasks, "--items", args.items]
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            # All dumps first: learning does not use the device, measuring does, and then goes on beside it.
            for seed in args.seeds:
                if any(not self.mask(seed, *own).exists() for own in self.chosen(seed)):
                    self.dump(seed)
            for seed in args.seeds:
                for align in args.alignments:
                    chosen = [own for own in self.chosen(seed) if own[0] == align]
                    for own in chosen:
                        self.learn(seed, *own)
                    parts = [chosen[at :: args.parts] for at in range(min(args.parts, len(chosen)))]
                    for at, part in enumerate(parts):
                        masks = [self.mask(seed, *own) for own in part]
                        name = f"seed{seed}-align{align}-{args.contexts[0]}-part{at}"
                        job = pool.submit(self.measure, name, masks, at_context)
                        waiting[job] = [(seed, *own) for own in part]
            for context in args.contexts[1:]:
                masks = [self.mask(args.seeds[0], args.alignments[0], args.long_ratio, own) for own in ("e2", "bytes")]
                options = ["--context", context, "--tasks", args.tasks, "--items", args.items, "--sequences", 8]
                job = pool.submit(self.measure, f"context-{context}", masks, options)
                waiting[job] = [(context, own) for own in ("e2", "bytes")]
        return {own: report for job, owns in waiting.items() for own, report in zip(owns, job.result())}

    def chosen(self, seed):
        """(alignment, ratio, method) of a seed's masks: seeds after the first have one alignment."""
        alignments = self.args.alignments if seed == self.args.seeds[0] else self.args.alignments[:1]
        methods = self.args.methods if seed == self.args.seeds[0] else [own for own in self.args.methods if own != "leank"]
        return [(align, ratio, own) for align in alignments for ratio in self.args.ratios for own in methods]


# -- Tables ---------------------------------------------------------------------------------------------


def table(head, rows):
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def number(value, digits=3):
    return f"{value:.{digits}f}".removeprefix("0")


def kl(report):
    text = report["text"]
    return f"{number(text['kl'], 4)} ± {number(text['kl_standard_error'], 4)}"


def perplexity(report):
    text = report["text"]
    return f"{100 * (text['lean_perplexity'] / text['dense_perplexity'] - 1):+.2f} %"


def whole_cache(report, context):
    """Share of a dense cache's bytes at a context length, blocks of 64."""
    block = 64
    lean = max((context - report["recent"]) // block - -(-report["sink"] // block), 0) * block
    return 1 - lean / context * (1 - report["middle_bytes"])


def right(report, which="lean_right"):
    return ", ".join(str(task[which]) for task in report["tasks"])


def tables(args, reports):
    first, align, context = args.seeds[0], args.alignments[0], args.contexts[0]
    some = next(report for own, report in reports.items() if len(own) == 4)
    names = ", ".join(task["task"] for task in some["tasks"])
    items = some["tasks"][0]["items"] if some["tasks"] else 0
    yield f"## At an alignment of {align}\n"
    head = ["pruned", "method", "kept K, V", "dead heads", "middle", f"whole cache {context} / 32k", "KL", "predicted"]
    head += ["perplexity", f"{names} of {items} (dense {right(some, 'dense_right')})"]
    rows = []
    for ratio in args.ratios:
        for method in args.methods:
            own = reports[first, align, ratio, method]
            cache = [number(whole_cache(own, tokens)) for tokens in (context, 32768)]
            row = [f"{100 * ratio:.0f} %", METHODS[method], f"{number(own['kept_k'])}, {number(own['kept_v'])}"]
            row += [str(own["dead_heads"]), number(own["middle_bytes"]), " / ".join(cache), kl(own)]
            rows.append(row + [number(own["predicted_kl"], 4), perplexity(own), right(own)])
    yield table(head, rows)
    ratios = [f"{100 * ratio:.0f} %" for ratio in args.ratios]
    if len(args.alignments) > 1:
        yield "## KL by alignment\n"
        rows = []
        for align in sorted(args.alignments):
            for method in args.methods:
                owns = [reports[first, align, ratio, method] for ratio in args.ratios]
                cells = [f"{number(own['text']['kl'], 4)} at {number(own['middle_bytes'])}" for own in owns]
                rows.append([str(align), METHODS[method], *cells])
        yield table(["alignment", "method", *ratios], rows)
    if len(args.seeds) > 1:
        yield "## Several dumps\n"
        rows = []
        for method in [own for own in args.methods if own != "leank"]:
            row = [METHODS[method]]
            for ratio in args.ratios:
                kls = [reports[seed, args.alignments[0], ratio, method]["text"]["kl"] for seed in args.seeds]
                mean = sum(kls) / len(kls)
                error = (sum((own - mean) ** 2 for own in kls) / (len(kls) - 1) / len(kls)) ** 0.5
                row.append(f"{number(mean, 4)} ± {number(error, 4)}")
            rows.append(row)
        yield table([f"seeds {', '.join(map(str, args.seeds))}", *ratios], rows)
    if len(args.contexts) > 1:
        yield f"## Other lengths, {100 * args.long_ratio:.0f} %\n"
        rows = []
        for context in args.contexts:
            place = (first, args.alignments[0], args.long_ratio)
            for method in ("e2", "bytes"):
                own = reports[(*place, method) if context == args.contexts[0] else (context, method)]
                rows.append([str(context), METHODS[method], kl(own), perplexity(own), right(own, "dense_right"), right(own)])
        yield table(["context", "method", "KL", "perplexity", f"{names}, dense", "lean"], rows)


def numbers(kind):
    return lambda text: [kind(own) for own in text.split(",")]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    path = pathlib.Path
    parser.add_argument("--leank", type=path, required=True, help="the command")
    parser.add_argument("--model", type=path, required=True, help="folder with config.json and weights")
    parser.add_argument("--gguf", action="store_true", help="--model is a GGUF file (dequantized)")
    parser.add_argument("--learn-from", type=path, nargs="+", required=True, metavar="TEXT")
    parser.add_argument("--measure-on", type=path, nargs="+", required=True, metavar="TEXT")
    parser.add_argument("--out", type=path, required=True, help="folder for everything")
    parser.add_argument("--ratios", type=numbers(float), default=[0.5, 0.6, 0.7, 0.8], help="shares of K to prune")
    parser.add_argument("--alignments", type=numbers(int), default=[16, 8, 32], help="the first one gets the long table")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    parser.add_argument("--seeds", type=numbers(int), default=[0], help="a dump each; the first gets all tables")
    parser.add_argument("--contexts", type=numbers(int), default=[2048], help="the first for all masks, others for --long-ratio")
    parser.add_argument("--long-ratio", type=float, default=0.7)
    parser.add_argument("--tasks", default="passkey,needle")
    parser.add_argument("--items", type=int, default=32)
    parser.add_argument("--sequences", type=int, default=48, help="of a dump")
    parser.add_argument("--positions", type=int, default=128, help="of a dump's sequence")
    parser.add_argument("--prefix", default="1024..3584", help="of a dump's sequences, FROM..TO")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compute", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--parts", type=int, default=2, help="processes that share the masks of one alignment")
    parser.add_argument("--jobs", type=int, default=4, help="measurements at a time")
    args = parser.parse_args()
    if unknown := set(args.methods) - set(METHODS):
        parser.error(f"--methods: {unknown.pop()} is none of {', '.join(METHODS)}")
    if "bytes" in args.methods and "e2" not in args.methods[: args.methods.index("bytes")]:
        parser.error("--methods: bytes takes the bytes of e2, which must stand before it")
    if len(args.contexts) > 1 and not ({"e2", "bytes"} <= set(args.methods) and args.long_ratio in args.ratios):
        parser.error("--contexts: more than one needs e2 and bytes, and --long-ratio among --ratios")
    return args


def main():
    args = arguments()
    found = "\n".join(tables(args, Work(args).all()))
    (args.out / "tables.md").write_text(found, encoding="utf-8")
    print(found)


if __name__ == "__main__":
    main()
