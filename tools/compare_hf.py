#!/usr/bin/env python3
"""Compares leank-candle's logits and tokens with Hugging Face transformers on the same GGUF file.

    cargo build --release -p leank-candle --example logits
    python tools/compare_hf.py MODEL.gguf TEXT [--tokens 512] [--last 64] [--json]

Needs torch, transformers, accelerate, gguf and safetensors; sentencepiece and protobuf for
files with such a vocabulary. transformers dequantizes the file to f32 and runs
its own forward pass; its own conversion builds the reference tokenizer. Exit code 1 when tokens
differ, a top-1 prediction differs, or a logit differs by more than --tolerance.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import types

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, AddedToken, Regex
from transformers import AutoModelForCausalLM

TARGET_DIR = pathlib.Path(__file__).resolve().parent / "target_dir.sh"


def built_example():
    target = subprocess.run([TARGET_DIR], check=True, capture_output=True, text=True).stdout.strip()
    return pathlib.Path(target) / "release" / "examples" / "logits"


def run_ours(args, out):
    command = [args.example or built_example(), args.model, args.text, out, str(args.tokens), str(args.last)]
    if args.as_stored:
        command.append("as-stored")
    subprocess.run([str(word) for word in command], check=True)
    return load_file(out)


class SentencePiece:
    """Google's sentencepiece itself on the file's pieces, scores and types."""

    def __init__(self, tokens, kinds, read):
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2

        model = sentencepiece_model_pb2.ModelProto()
        for token, score, kind in zip(tokens, read("tokenizer.ggml.scores"), kinds):
            # llama.cpp's converter writes spaces into tokens that the user defined.
            model.pieces.add(piece=token.replace(" ", "\u2581"), score=score, type=kind)
        trainer, normalizer = model.trainer_spec, model.normalizer_spec
        trainer.model_type = trainer.BPE
        trainer.byte_fallback = True
        trainer.vocab_size = len(tokens)
        for name, key in (("unk", "unknown"), ("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
            setattr(trainer, f"{name}_id", read(f"tokenizer.ggml.{key}_token_id"))
            setattr(trainer, f"{name}_piece", tokens[getattr(trainer, f"{name}_id")])
        model.pieces[trainer.unk_id].type = 2
        normalizer.name = "identity"
        normalizer.add_dummy_prefix = read("tokenizer.ggml.add_space_prefix")
        normalizer.remove_extra_whitespaces = False
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        self.add_bos = read("tokenizer.ggml.add_bos_token")

    def encode(self, text):
        return types.SimpleNamespace(ids=self.processor.encode(text, add_bos=self.add_bos))


def reference_tokenizer(path):
    """Byte-level BPE built with Python's tokenizers from the file's own vocabulary and merges.

    transformers' GGUF conversion ignores the pre-tokenizer that the file names, so the steps that
    the original repositories' tokenizer.json list are spelled out here.
    """
    import gguf

    fields = gguf.GGUFReader(path).fields
    read = lambda key: fields[key].contents()
    tokens, kinds = read("tokenizer.ggml.tokens"), read("tokenizer.ggml.token_type")
    if read("tokenizer.ggml.model") == "llama":
        return SentencePiece(tokens, kinds, read)
    merges = [tuple(merge.split(" ", 1)) for merge in read("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    pre = read("tokenizer.ggml.pre")
    if pre == "smollm":
        steps = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    elif pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
        pattern = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        steps = [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    else:
        sys.exit(f"no reference for the pre-tokenizer {pre}; add its tokenizer.json's steps here")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    for kind, special in ((3, True), (4, False)):
        added = [AddedToken(t, special=special, normalized=False) for t, k in zip(tokens, kinds) if k == kind]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    return tokenizer


def reference_logits(path, tokens, last):
    model = AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    model.eval()
    with torch.no_grad():
        return model(tokens[None].long(), logits_to_keep=last).logits[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("text", type=pathlib.Path)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--last", type=int, default=64)
    parser.add_argument("--tolerance", type=float, default=2e-2)
    parser.add_argument("--as-stored", action="store_true", help="our side on quantized weights")
    parser.add_argument("--example", type=pathlib.Path, help="our side, already built; by default where cargo puts it")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        ours = run_ours(args, pathlib.Path(folder) / "ours.safetensors")
    text = args.text.read_text()
    theirs_tokens = torch.tensor(reference_tokenizer(args.model).encode(text).ids)[: args.tokens]
    same_tokens = torch.equal(ours["tokens"].long(), theirs_tokens)
    theirs = reference_logits(args.model, ours["tokens"], len(ours["logits"]))
    difference = (ours["logits"] - theirs).abs()
    kl = torch.nn.functional.kl_div(
        ours["logits"].double().log_softmax(-1), theirs.double().log_softmax(-1), log_target=True, reduction="batchmean"
    )
    result = {
        "model": args.model.name,
        "tokens": len(ours["tokens"]),
        "positions": len(theirs),
        "same_tokens": same_tokens,
        "max_abs_difference": difference.max().item(),
        "mean_abs_difference": difference.mean().item(),
        "largest_logit": theirs.abs().max().item(),
        "top1_agreement": (ours["logits"].argmax(-1) == theirs.argmax(-1)).double().mean().item(),
        "kl": kl.item(),
    }
    if args.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:>20}  {value}")
    good = same_tokens and (args.as_stored or (result["max_abs_difference"] < args.tolerance and result["top1_agreement"] == 1.0))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
