#!/usr/bin/env python3
"""Compares leank-candle with Hugging Face transformers on tiny random models of every family.

    cargo build --release -p leank-candle --example logits
    python tools/compare_tiny.py                                    # compare
    python tools/compare_tiny.py --write leank-candle/tests/golden  # write what cargo test compares with

Needs torch, transformers, tokenizers and safetensors; no network. transformers makes each model from
a configuration below with a fixed seed, saves it as it saves any model, and computes the logits in
f32. Exit code 1 when tokens differ or a logit differs by more than --tolerance.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models

TARGET_DIR = pathlib.Path(__file__).resolve().parent / "target_dir.sh"
LETTERS = "abcdefghijklmnopqrstuvwxyz .,!\n"
TEXT = "the quick brown fox, the lazy dog. "
SIZES = dict(
    vocab_size=32, hidden_size=16, intermediate_size=20, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, max_position_embeddings=256, bos_token_id=None, eos_token_id=31, pad_token_id=None,
)
LOCAL = {"rope_type": "default", "rope_theta": 50.0}


def rope(**details):
    return {"rope_type": "default", "rope_theta": 1000.0, **details}


YARN = rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
LINEAR = rope(rope_type="linear", factor=4.0)
LLAMA3 = rope(
    rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)


def gemma3(**changes):
    """Three layers, the last one global; the window is shorter than the text."""
    return transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig(
        **SIZES, num_hidden_layers=3, sliding_window=9, query_pre_attn_scalar=5,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"], **changes,
    )


def model(name):
    """The class and the configuration of a model, by its name."""
    two = dict(SIZES, num_hidden_layers=2)
    if name == "llama-llama3":
        return transformers.LlamaForCausalLM, transformers.LlamaConfig(**two, rope_parameters=LLAMA3)
    if name == "mistral":
        return transformers.MistralForCausalLM, transformers.MistralConfig(
            **two, sliding_window=None, rope_parameters=rope()
        )
    if name == "mistral-sliding":
        return transformers.MistralForCausalLM, transformers.MistralConfig(
            **two, sliding_window=9, rope_parameters=rope()
        )
    if name == "qwen3-yarn":
        return transformers.Qwen3ForCausalLM, transformers.Qwen3Config(
            **two, rope_parameters=YARN, tie_word_embeddings=True
        )
    if name == "qwen3-sliding":
        return transformers.Qwen3ForCausalLM, transformers.Qwen3Config(
            **two, use_sliding_window=True, sliding_window=9, max_window_layers=1, rope_parameters=rope()
        )
    if name == "gemma3":
        return gemma3(rope_parameters={"full_attention": rope(), "sliding_attention": LOCAL})
    if name == "gemma3-linear":
        return gemma3(rope_parameters={"full_attention": LINEAR, "sliding_attention": LOCAL})
    raise ValueError(name)


NAMES = ["llama-llama3", "mistral", "mistral-sliding", "qwen3-yarn", "qwen3-sliding", "gemma3", "gemma3-linear"]
# What these show, the others show again, and files in a repository should be few.
WRITTEN = ["mistral-sliding", "qwen3-yarn", "qwen3-sliding", "gemma3-linear"]


def make(name, folder):
    """Saves a random model with its tokenizer and returns the tokens of TEXT and their logits."""
    torch.manual_seed(NAMES.index(name))
    kind, config = model(name)
    config._attn_implementation = "eager"
    made = kind(config).eval()
    with torch.no_grad():
        for tensor_name, tensor in made.named_parameters():
            spread = 0.3 if "norm" in tensor_name else 1.5 / tensor.shape[-1] ** 0.5
            middle = 1.0 if "norm" in tensor_name and not name.startswith("gemma") else 0.0
            tensor.copy_(middle + spread * torch.randn_like(tensor))
            # Stored as bf16, and computed with what is stored.
            tensor.copy_(tensor.bfloat16())
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {letter: i for i, letter in enumerate(LETTERS)} | {"<unk>": 31}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    tokens = torch.tensor(tokenizer.encode(TEXT).ids)
    with torch.no_grad():
        logits = made(tokens[None]).logits[0].float()
    made.bfloat16().save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return tokens.to(torch.uint32), logits.contiguous()


def ours(example, folder, count):
    """Tokens and logits of leank-candle."""
    text, out = folder / "text.txt", folder / "ours.safetensors"
    text.write_text(TEXT)
    subprocess.run([str(word) for word in (example, folder, text, out, count, count)], check=True, stderr=subprocess.PIPE)
    found = load_file(out)
    return found["tokens"], found["logits"]


def compare(args):
    good = True
    target = subprocess.run([TARGET_DIR], check=True, capture_output=True, text=True).stdout.strip()
    example = args.example or pathlib.Path(target) / "release" / "examples" / "logits"
    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            tokens, logits = make(name, folder)
            our_tokens, our_logits = ours(example, folder, len(tokens))
        same = torch.equal(tokens.long(), our_tokens.long())
        difference = (logits - our_logits).abs().max().item()
        print(f"{name:>16}  same tokens {same}  largest difference {difference:.1e} of {logits.abs().max():.2f}")
        good &= same and difference < args.tolerance
    return good


def write(folder):
    for name in WRITTEN:
        tokens, logits = make(name, folder / name)
        save_file({"tokens": tokens, "logits": logits}, folder / name / "golden.safetensors")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {len(WRITTEN)} models, {size} bytes")
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=pathlib.Path, metavar="FOLDER", help="write models and logits, compare nothing")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--example", type=pathlib.Path, help="our side, already built; by default where cargo puts it")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    good = write(args.write) if args.write else compare(args)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
