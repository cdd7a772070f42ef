"""Writes two masks that look like real ones, and an evaluation of them, without a model.

    made_up_mask.py MASK OTHER EVAL

Needs nothing but Python: a safetensors file is a length, a JSON header and bytes.
"""

import json
import math
import random
import struct
import sys

LAYERS, KV_HEADS, HEAD_DIM = 32, 8, 128
ALIGNMENT = 16


def scores(random_state):
    """Importance that rises towards slow RoPE pairs and differs between layers and heads."""
    all_scores = []
    for layer in range(LAYERS):
        for _ in range(KV_HEADS):
            level = random_state.gauss(-5.5, 0.8) - 0.4 * math.cos(layer / 5)
            for channel in range(HEAD_DIM):
                pair = channel % (HEAD_DIM // 2)
                all_scores.append(10 ** (level + 2.2 * pair / (HEAD_DIM // 2) + random_state.gauss(0, 0.35)))
    return all_scores


def kept(all_scores, share):
    """The best `share` of channels, counts rounded to the alignment."""
    limit = sorted(all_scores, reverse=True)[int(share * len(all_scores))]
    mask = bytearray(len(all_scores))
    for head in range(LAYERS * KV_HEADS):
        own = range(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        count = sum(all_scores[at] > limit for at in own)
        count = round(count / ALIGNMENT) * ALIGNMENT
        for at in sorted(own, key=lambda at: -all_scores[at])[:count]:
            mask[at] = 1
    return mask


def write_mask(path, mask, all_scores, budget, predicted):
    shape = [LAYERS, KV_HEADS, HEAD_DIM]
    model = {"layers": LAYERS, "query_heads": 4 * KV_HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
    info = {
        "version": 1, "model_id": "Made up 8B", "windows": {"sink": 32, "recent": 128}, "alignment": ALIGNMENT,
        "method": "e2", "budget": budget, "predicted_kl": predicted, "seed": 0, "created_by": "made_up_mask.py",
        "fingerprint": {"architecture": "llama", "shape": model, "rope_base": 500000.0, "config_hash": "made up"},
    }
    data = struct.pack(f"<{len(all_scores)}f", *all_scores)
    header = json.dumps({
        "__metadata__": {"leank": json.dumps(info)},
        "scores": {"dtype": "F32", "shape": shape, "data_offsets": [0, len(data)]},
        "mask": {"dtype": "U8", "shape": shape, "data_offsets": [len(data), len(data) + len(mask)]},
    }).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header + data + mask)


def evaluation(path, mask, predicted, factor):
    counts = [sum(mask[at:at + HEAD_DIM]) for at in range(0, len(mask), HEAD_DIM)]
    dead = counts.count(0)
    kl = predicted * factor
    return {
        "mask": path, "kept_k": sum(mask) / len(mask), "dead_heads": dead, "heads": len(counts),
        "heads_by_format": {"k16v16": len(counts) - dead}, "middle_bytes": 0.5, "predicted_kl": predicted,
        "whole_kv_ratio": 0.55, "cache": {"tokens": 16 * 2048}, "tasks": [],
        "text": {"sequences": 16, "positions": 2048, "kl": kl, "kl_standard_error": kl / 8, "dense_perplexity": 8.5,
                 "lean_perplexity": 8.5 * math.exp(kl), "top1_agreement": 0.96},
    }


def main(mask_path, other_path, eval_path):
    all_scores = scores(random.Random(1))
    entries = []
    for path, share, predicted, factor in [(mask_path, 0.4, 0.0045, 1.3), (other_path, 0.25, 0.012, 0.8)]:
        mask = kept(all_scores, share)
        write_mask(path, mask, all_scores, f"k-ratio {1 - share:.2f}", predicted)
        entries.append(evaluation(path, mask, predicted, factor))
        all_scores = [score * math.exp(random.Random(at).gauss(0, 0.3)) for at, score in enumerate(all_scores)]
    with open(eval_path, "w", encoding="utf-8") as file:
        json.dump(entries, file)


main(*sys.argv[1:])
