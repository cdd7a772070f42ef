#!/usr/bin/env python3
"""Measures what masks cost a Hugging Face model, as `leank eval` does for its own.

    tools/eval_hf.py --model DIR --mask a.safetensors b.safetensors --text other.txt

The prefix is read densely; then the decode positions are run once densely and once per mask, where what
lies between sink and recent window is seen through the kept channels alone, and not at all by dead heads.
Which tokens those are follows leank's blocks position by position, so the logits are those of decoding
token by token from a lean cache in the precision of --compute. Masks that ask for 8 or 4 bits are refused:
`leank eval` measures them.

Prints one JSON object per mask, with the names of `leank eval --json`. Needs dump_hf.py beside it, torch
and transformers 5; a GPU with --device cuda.
"""

import argparse
import copy
import json
import math
import pathlib
import random
import sys

import torch
from safetensors import safe_open

from dump_hf import begin, behind, load, read_plan, read_texts, scatter, sliding_layers
from transformers.integrations.sdpa_attention import sdpa_attention_forward

THINGS = (
    "apple bridge candle desert engine forest garden harbor island jacket kettle ladder mirror needle orchid pillow "
    "quarry ribbon saddle temple umbrella valley window zebra"
).split()


class Mask:
    def __init__(self, path, own):
        with safe_open(path, "pt") as file:
            if "bits" in file.keys():
                raise SystemExit(f"{path} asks for 8 or 4 bits; measure it with `leank eval`")
            self.kept = file.get_tensor("mask").bool()
            info = json.loads(file.metadata()["leank"])
        learned = info.get("windows") or {"sink": 32, "recent": 128}
        self.path, self.info = str(path), info
        self.sink, self.recent = own or (learned["sink"], learned["recent"])

    def to(self, device):
        self.kept = self.kept.to(device)
        return self

    def summary(self):
        dead = ~self.kept.any(-1)
        width = self.kept.shape[-1]
        bytes_ = self.kept.sum() + width * (~dead).sum()
        return {
            "mask": self.path,
            "sink": self.sink,
            "recent": self.recent,
            "kept_k": self.kept.double().mean().item(),
            "kept_v": 1 - dead.double().mean().item(),
            "dead_heads": int(dead.sum()),
            "heads": dead.numel(),
            "middle_bytes": bytes_.item() / (2 * self.kept.numel()),
            "predicted_kl": self.info.get("predicted_kl"),
            "method": self.info.get("method"),
            "budget": self.info.get("budget"),
            "alignment": self.info.get("alignment"),
            "seed": self.info.get("runs", [{}])[0].get("seed") if self.info.get("runs") else None,
        }


class Lean:
    """Dense attention without a mask, that of a lean cache with one."""

    def __init__(self, block):
        self.mask, self.block = None, block
        # A layer's number among those that a mask holds.
        self.number = {}

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        if self.mask is None or kwargs.get("sliding_window"):
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return self.lean(self.number[module.layer_idx], query, key, value, scaling), None

    def lean(self, layer, query, key, value, scaling):
        kept = self.mask.kept[layer]
        _, heads, new, d = query.shape
        _, kv_heads, tokens, _ = key.shape
        scale = 1 / math.sqrt(d) if scaling is None else scaling
        q = query[0].view(kv_heads, heads // kv_heads, new, d).float() * scale
        k, v = key[0].float(), value[0].float()
        position = torch.arange(tokens - new, tokens, device=q.device)
        token = torch.arange(tokens, device=q.device)
        block = token // self.block
        after_sink = block >= -(-self.mask.sink // self.block)
        old = (block + 1)[None] * self.block <= position[:, None] + 1 - self.mask.recent
        lean = after_sink[None] & old
        whole = torch.einsum("hgnd,hmd->hgnm", q, k)
        pruned = torch.einsum("hgnd,hmd->hgnm", q * kept[:, None, None], k)
        logits = torch.where(lean, pruned, whole)
        unseen = token[None] > position[:, None]
        dead = ~kept.any(-1)
        hidden = unseen[None] | (dead[:, None, None] & lean[None])
        weights = logits.masked_fill(hidden[:, None], -math.inf).softmax(-1)
        out = torch.einsum("hgnm,hmd->hgnd", weights, v)
        return out.reshape(heads, new, d).transpose(0, 1)[None].to(query.dtype)


def forward(model, past, tokens):
    """Logits of `tokens` behind the prefix; the prefix stays as it is."""
    out, _ = behind(model, tokens, copy.deepcopy(past))
    return out.logits[0]


def measure(model, lean, masks, item):
    """Per mask, per scored position: KL, losses, right or wrong. `item`: tokens, prefix, scored."""
    tokens = torch.tensor(item["tokens"], device=model.device)[None]
    prefix, scored = item["prefix"], item["scored"]
    lean.mask = None
    _, past = behind(model, tokens[:, :prefix], logits_to_keep=1)
    fed, first = tokens[:, prefix:-1], scored - 1 - prefix
    target = tokens[0, scored:]
    dense = forward(model, past, fed)[first:].double().log_softmax(-1)
    for mask in masks:
        lean.mask = mask
        found = forward(model, past, fed)[first:].double().log_softmax(-1)
        yield {
            "kl": (dense.exp() * (dense - found)).sum(-1),
            "dense_loss": -dense.gather(1, target[:, None])[:, 0],
            "lean_loss": -found.gather(1, target[:, None])[:, 0],
            "same_top": dense.argmax(-1) == found.argmax(-1),
            "dense_right": dense.argmax(-1) == target,
            "lean_right": found.argmax(-1) == target,
        }
    lean.mask = None


def mean_and_error(values):
    n = len(values)
    mean = sum(values) / n
    error = math.sqrt(sum((x - mean) ** 2 for x in values) / (n - 1) / n) if n > 1 else None
    return mean, error


def divergence(items, first):
    kls = [item["kl"].mean().item() for item in items]
    over = [kl - item["kl"].mean().item() for kl, item in zip(kls, first)]
    kl, error = mean_and_error(kls)
    paired, paired_error = mean_and_error(over)
    names = ["kl", "kl_standard_error", "kl_over_first", "kl_over_first_standard_error"]
    return dict(zip(names, [kl, error, paired, paired_error]))


def text_score(items, first):
    joined = lambda key: torch.cat([item[key].double() for item in items]).mean().item()
    return {
        "sequences": len(items),
        "positions": sum(len(item["kl"]) for item in items),
        "dense_perplexity": math.exp(joined("dense_loss")),
        "lean_perplexity": math.exp(joined("lean_loss")),
        **divergence(items, first),
        "top1_agreement": joined("same_top"),
    }


def task_score(task, items, first):
    right = lambda key: [bool(item[key].all()) for item in items]
    dense, lean = right("dense_right"), right("lean_right")
    return {
        "task": task,
        "items": len(items),
        "dense_right": sum(dense),
        "lean_right": sum(lean),
        "both_right": sum(a and b for a, b in zip(dense, lean)),
        **divergence(items, first),
    }


# -- What is measured -----------------------------------------------------------------------------------


def starts(texts, length, count, rng):
    """Places in turn from every text, evenly spread over it with a random shift."""
    per_text = math.ceil(count / len(texts))
    found = []
    for turn in range(per_text):
        for text in texts:
            room = len(text) - length + 1
            low, high = room * turn // per_text, room * (turn + 1) // per_text
            at = low + rng.randrange(max(high - low, 1))
            found.append(text[at : at + length])
    return found[:count]


def riddle(task, rng):
    number = lambda: rng.randrange(10_000, 100_000)
    if task == "passkey":
        key = number()
        said = f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
        return [said], "\nWhat is the pass key? The pass key is", f" {key}"
    things = rng.sample(THINGS, 4 if task == "multikey" else 1)
    facts = [(thing, number()) for thing in things]
    said = [f"\nThe special magic number for {thing} is {n}.\n" for thing, n in facts]
    thing, asked = rng.choice(facts)
    question = f"\nWhat is the special magic number for {thing}? The special magic number for {thing} is"
    return said, question, f" {asked}"


def lay_out(task, encode, text, length, rng):
    said, question, answer = riddle(task, rng)
    said = [encode(fact) for fact in said]
    asking, whole = encode(question), encode(question + answer)
    shared = next((i for i, (a, b) in enumerate(zip(asking, whole)) if a != b), len(asking))
    around = scatter(text[: length - len(whole) - sum(map(len, said))], said, rng)
    return {"tokens": around + whole, "prefix": len(around), "scored": len(around) + shared}


def items(args, tokenizer):
    """Groups of items: (task or None, items)."""
    if args.tokens:
        sequences, _ = read_plan(args.tokens)
        return [(None, [{**own, "scored": own["prefix"] + 1} for own in sequences])]
    encode = lambda text: list(tokenizer(text, add_special_tokens=False).input_ids)
    length = args.context + 1
    texts = read_texts(args.text, tokenizer, length)
    rng = random.Random(args.seed)
    prefix = args.context - args.positions
    text = [
        {"tokens": begin(start, tokenizer), "prefix": prefix, "scored": prefix + 1}
        for start in starts(texts, length, args.sequences, rng)
    ]
    groups = [(None, text)]
    for task in args.tasks:
        own = [lay_out(task, encode, begin(start, tokenizer), length, rng) for start in starts(texts, length, args.items, rng)]
        groups.append((task, own))
    return groups


def windows(text):
    sink, recent = text.split(":")
    return int(sink), int(recent)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="folder with config.json and weights")
    parser.add_argument("--gguf", action="store_true", help="--model is a GGUF file (dequantized to f32)")
    parser.add_argument("--mask", type=pathlib.Path, nargs="+", required=True)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=pathlib.Path, nargs="+", help="text files, UTF-8")
    source.add_argument("--tokens", type=pathlib.Path, help="sequences that `leank eval --save-tokens` wrote")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--positions", type=int, default=128)
    parser.add_argument("--tasks", default="", help="passkey, needle, multikey")
    parser.add_argument("--items", type=int, default=32)
    parser.add_argument(
        "--windows", type=windows, nargs="+", default=[None], help="each mask with each SINK:RECENT; its own by default"
    )
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compute", choices=["float32", "bfloat16", "float16"], default="float32")
    args = parser.parse_args()
    args.tasks = [task for task in args.tasks.split(",") if task]
    if unknown := set(args.tasks) - {"passkey", "needle", "multikey"}:
        parser.error(f"--tasks: {unknown.pop()} is none of passkey, needle and multikey")
    if not 0 < args.positions < args.context:
        parser.error("--positions: at least 1 and fewer than --context")
    return args


@torch.no_grad()
def main():
    args = arguments()
    masks = [Mask(path, own) for path in args.mask for own in args.windows]
    lean = Lean(args.block)
    model, tokenizer = load(args, lean)
    whole = [layer for layer, slides in enumerate(sliding_layers(model.config.get_text_config())) if not slides]
    lean.number = {layer: number for number, layer in enumerate(whole)}
    for mask in masks:
        if mask.kept.shape[0] != len(whole):
            raise SystemExit(f"{mask.path} is of {mask.kept.shape[0]} layers, the model has {len(whole)} that do not slide")
        mask.to(model.device)
    reports = [{**mask.summary(), "text": None, "tasks": []} for mask in masks]
    for task, own in items(args, tokenizer):
        found = [[] for _ in masks]
        for done, item in enumerate(own):
            for at, measured in enumerate(measure(model, lean, masks, item)):
                found[at].append({key: value.cpu() for key, value in measured.items()})
            print(f"{task or 'text'}: {done + 1} of {len(own)}", file=sys.stderr)
        for report, measured in zip(reports, found):
            if task is None:
                report["text"] = text_score(measured, found[0])
            else:
                report["tasks"].append(task_score(task, measured, found[0]))
    json.dump(reports, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
