#!/usr/bin/env python3
"""Dumps the activations of a Hugging Face model for `leank learn`.

    tools/dump_hf.py --model DIR --text a.txt b.txt --out dump

writes what `leank dump` writes: queries, keys and values after RoPE and the Fisher probe, from any
decoder of transformers whose attention goes through its attention interface. Nothing is patched: the
probe is an attention function of its own, so Q/K norms, biases and every RoPE scaling are in what it
sees. Layers with a sliding window are left out, as in a mask: their memory does not grow.

DIR is a folder with config.json and weights (or a GGUF file with --gguf). Needs Python 3.9, torch and
transformers 5. Nothing appears at --out before the dump is whole.
"""

import argparse
import hashlib
import inspect
import json
import math
import os
import pathlib
import random
import shutil
import struct
import sys
import tempfile
import zlib

import torch
import transformers
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "leank_dump"
DTYPES = {"f16": (torch.float16, "F16"), "bf16": (torch.bfloat16, "BF16"), "f32": (torch.float32, "F32")}
# What an attention function may be told that changes the logits or the softmax, and learning does not know.
UNKNOWN = {"softcap": "soft-capped logits", "s_aux": "attention sinks of their own", "position_bias": "a position bias"}


def behind(model, tokens, cache=None, **options):
    """A forward pass of `tokens` behind what `cache` holds: the output, and the cache with them."""
    # transformers 5.40 renames the argument.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    out = model(tokens, use_cache=True, **{name: cache}, **options)
    return out, out["cache"] if "cache" in out else out["past_key_values"]


class Recorder:
    """An attention function that notes what passes and lets gradients be taken at its outputs."""

    def __init__(self):
        self.keys, self.values, self.queries, self.taps = {}, {}, {}, {}
        self.decoding = False

    def start(self):
        self.keys.clear(), self.values.clear(), self.queries.clear(), self.taps.clear()
        self.decoding = False

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        layer = module.layer_idx
        if kwargs.get("sliding_window"):
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        for option, what in UNKNOWN.items():
            if kwargs.get(option) is not None:
                raise SystemExit(f"layer {layer} has {what}: leank cannot learn for this model")
        if key.shape[-1] != value.shape[-1] or query.shape[-1] != key.shape[-1]:
            raise SystemExit(f"layer {layer}: q, k and v have other head_dims; leank wants one for all")
        new = query.shape[2]
        self.keys.setdefault(layer, []).append(key[0, :, -new:].detach())
        self.values.setdefault(layer, []).append(value[0, :, -new:].detach())
        out, weights = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        if self.decoding:
            # leank scales logits by 1/sqrt(head_dim): any other scale goes into the queries.
            scale = 1.0 if scaling is None else scaling * math.sqrt(query.shape[-1])
            self.queries[layer] = (query[0] * scale).detach()
            # Zeros whose gradient is the output's; `out` is [batch, tokens, heads, head_dim].
            tap = torch.zeros_like(out).requires_grad_()
            self.taps[layer] = tap
            out = out + tap
        return out, weights


def probe(model, recorder, tokens, prefix, draws, generator):
    """Per layer q [heads, N, D], k and v [KV heads, T + N, D], g [draws, heads, N, D].

    g is the gradient of sum_t log p(y_t) at the attention output, y_t drawn from the model's own
    distribution; it goes through the later layers and through the keys and values that the decode
    positions leave for each other, those of the prefix are constants.
    """
    recorder.start()
    tokens = torch.tensor(tokens, device=model.device)[None]
    with torch.no_grad():
        _, past = behind(model, tokens[:, :prefix], logits_to_keep=1)
    recorder.decoding = True
    out, _ = behind(model, tokens[:, prefix:], past)
    log_p = out.logits[0].float().log_softmax(-1)
    layers = sorted(recorder.taps)
    taps = [recorder.taps[layer] for layer in layers]
    drawn = torch.multinomial(log_p.detach().exp().cpu(), draws, replacement=True, generator=generator)
    gradients = []
    for draw in range(draws):
        score = log_p.gather(1, drawn[:, draw, None].to(log_p.device)).sum()
        found = torch.autograd.grad(score, taps, retain_graph=draw + 1 < draws)
        gradients.append([g[0].transpose(0, 1) for g in found])
    for at, layer in enumerate(layers):
        yield {
            "q": recorder.queries[layer],
            "g": torch.stack([own[at] for own in gradients]),
            "k": torch.cat(recorder.keys[layer], 1),
            "v": torch.cat(recorder.values[layer], 1),
        }


class Dump:
    """A dump that grows beside its place and is renamed when it is whole (docs/architecture.md)."""

    def __init__(self, out, manifest):
        self.out, self.manifest = out, manifest
        out.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{out.name}.growing-"
        sweep(out, prefix)
        self.dir = pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
        os.chmod(self.dir, 0o755)
        text = json.dumps(manifest, indent=1).encode()
        # Locked until this process ends, however it does.
        self.lock = open(self.dir / "manifest.json", "xb")
        lock(self.lock)
        self.lock.write(text)
        self.lock.flush()
        os.fsync(self.lock.fileno())
        self.id = hashlib.sha256(text).hexdigest()
        shape = manifest["shape"]
        self.sums = [{} for _ in range(shape["layers"])]
        self.torch_dtype, self.name = DTYPES[manifest["dtype"]]
        size = self.torch_dtype.itemsize
        self.offsets, end = {}, 0
        for i, sequence in enumerate(manifest["sequences"]):
            for tensor in "qgkv":
                dims = self.dims(tensor, sequence["prefix"])
                self.offsets[tensor, i] = (end, end + math.prod(dims) * size, dims)
                end += math.prod(dims) * size
        for layer in range(shape["layers"]):
            with open(self.path(layer), "wb") as file:
                header = self.header(layer)
                file.write(header)
                file.truncate(len(header) + end)

    def dims(self, tensor, prefix):
        shape, n = self.manifest["shape"], self.manifest["positions"]
        heads, kv_heads, d = shape["query_heads"], shape["kv_heads"], shape["head_dim"]
        rows = {"q": [heads, n, d], "g": [self.manifest["draws"], heads, n, d]}
        return rows.get(tensor, [kv_heads, prefix + n, d])

    def path(self, layer):
        return self.dir / f"layer-{layer:03}.safetensors"

    def parts(self, tensor):
        draws = self.manifest["draws"] if tensor == "g" else 1
        return draws * self.manifest["shape"]["kv_heads"]

    def header(self, layer):
        """safetensors header; checksums that are not known yet hold their place."""
        count = len(self.manifest["sequences"])
        sums = [self.sums[layer].get((t, i), [0] * self.parts(t)) for i in range(count) for t in "qgkv"]
        text = "".join(f"{part:08x}" for parts in sums for part in parts)
        entries = {"__metadata__": {"leank.layer": str(layer), "leank.dump": self.id, "leank.sums": text}}
        for (tensor, i), (start, end, dims) in self.offsets.items():
            entries[f"{tensor}.{i}"] = {"dtype": self.name, "shape": dims, "data_offsets": [start, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    def write(self, layer, sequence, tensors):
        with open(self.path(layer), "r+b") as file:
            begin = len(self.header(layer))
            for tensor, values in tensors.items():
                start, _, dims = self.offsets[tensor, sequence]
                stored = values.to(self.torch_dtype)
                where = f"layer {layer}, sequence {sequence}, tensor {tensor}"
                if list(stored.shape) != dims:
                    raise SystemExit(f"{where} has shape {list(stored.shape)} where {dims} is expected")
                if not stored.isfinite().all():
                    mend = "it overflows f16: use --dtype bf16" if values.isfinite().all() else "check the weights"
                    raise SystemExit(f"{where} has values that are not finite: {mend}")
                data = stored.contiguous().cpu().view(torch.uint8).numpy().tobytes()
                part = len(data) // self.parts(tensor)
                cuts = range(0, len(data), part)
                self.sums[layer][tensor, sequence] = [zlib.crc32(data[at : at + part]) for at in cuts]
                file.seek(begin + start)
                file.write(data)

    def finish(self, replace):
        for layer in range(self.manifest["shape"]["layers"]):
            with open(self.path(layer), "r+b") as file:
                file.write(self.header(layer))
                file.flush()
                os.fsync(file.fileno())
        sync_names(self.dir)
        if replace and self.out.exists():
            aside = self.dir.with_name(self.dir.name + REPLACED)
            os.rename(self.out, aside)
            try:
                os.rename(self.dir, self.out)
            except OSError:
                os.rename(aside, self.out)
                raise
            shutil.rmtree(aside)
        else:
            os.rename(self.dir, self.out)
        sync_names(self.out.parent)


REPLACED = "-replaced"


def lock(file):
    """Whether nobody else has it; on systems without these locks what is left over stays."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except (ImportError, OSError):
        return False


def sync_names(folder):
    """Makes the names in a folder durable; only Unix can."""
    if os.name == "posix":
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def sweep(out, prefix):
    """Removes what killed runs left of dumps for `out`; an old dump that was moved aside goes back."""
    for path in [path for path in out.parent.iterdir() if path.name.startswith(prefix)]:
        growing = path.with_name(path.name.removesuffix(REPLACED))
        try:
            with open(growing / "manifest.json", "r+b") as manifest:
                left = lock(manifest)
                if left and path == growing:
                    shutil.rmtree(path)
        except OSError:
            left = not growing.exists()
        if not left or path == growing:
            continue
        if out.exists():
            shutil.rmtree(path)
        else:
            os.rename(path, out)


def sliding_layers(config):
    """Whether each layer has a sliding window; the other ones are what a dump and a mask hold."""
    count = config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    if not window:
        return [False] * count
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * count
    if unknown := set(kinds) - {"sliding_attention", "full_attention"}:
        raise SystemExit(f"layers of the kind {unknown.pop()}: leank knows full and sliding attention")
    slides = [kind == "sliding_attention" for kind in kinds]
    if all(slides):
        raise SystemExit("every layer has a sliding window: there is no cache that grows, and nothing to learn")
    return slides


def norms(model):
    """Weights of all norms, as the forward pass multiplies with them, in the order of leank's fingerprint."""
    decoder, config = model.get_decoder(), model.config.get_text_config()
    gemma = config.model_type.startswith("gemma")
    around = gemma and hasattr(decoder.layers[0], "pre_feedforward_layernorm")
    second = "pre_feedforward_layernorm" if around else "post_attention_layernorm"
    names = ["input_layernorm", second, "self_attn.q_norm", "self_attn.k_norm"]
    names += ["post_attention_layernorm", "post_feedforward_layernorm"] if around else []
    for layer in decoder.layers:
        own = dict(layer.named_modules())
        for name in names:
            if name not in own:
                continue
            weight = own[name].weight.detach().float().cpu()
            weight = weight + 1 if gemma else weight
            if name == "self_attn.q_norm" and (scalar := getattr(config, "query_pre_attn_scalar", None)):
                weight = weight * math.sqrt(config.head_dim / scalar)
            yield weight
    yield decoder.norm.weight.detach().float().cpu() + (1 if gemma else 0)


def fingerprint(model, shape):
    """As leank computes it from the model's own files, so that the mask fits there too."""
    config = model.config.get_text_config()
    ropes = getattr(config, "rope_parameters", None) or {}
    # Models with two kinds of layers have one entry for each.
    rope = ropes.get("full_attention", ropes)
    biased = any(name.endswith("q_proj.bias") for name, _ in model.named_parameters())
    data = struct.pack("<QQf?", config.hidden_size, config.intermediate_size, config.rms_norm_eps, biased)
    slides = sliding_layers(config)
    if any(slides):
        local = ropes.get("sliding_attention", {}).get("rope_theta", 0.0)
        data += struct.pack("<Q", config.sliding_window) + bytes(slides) + struct.pack("<d", local)
    for weight in norms(model):
        data += weight.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    name = config.model_type.removesuffix("_text")
    found = {
        "architecture": {"mistral": "llama"}.get(name, name),
        "shape": shape,
        "rope_base": float(rope.get("rope_theta", 0.0)),
        "config_hash": hashlib.sha256(data).hexdigest(),
    }
    if any(slides):
        found["sliding"] = {"layers": sum(slides), "window": config.sliding_window}
    scaling = rope.get("rope_type", "default")
    number = lambda key: f"{rope.get(key, 0):g}"
    if scaling == "yarn":
        found["rope_scaling"] = f"yarn {number('factor')} from {number('original_max_position_embeddings')}"
    elif scaling != "default":
        found["rope_scaling"] = f"linear {number('factor')}" if scaling == "linear" else scaling
    return found


# -- What to dump ------------------------------------------------------------------------------------


def facts(rng):
    """A task as leank's own: (name, statements, questions, whether asked once)."""
    number = lambda: rng.randrange(10_000, 100_000)
    if rng.random() < 0.5:
        key = number()
        said = f"\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
        return "passkey", [said], [f"\n\nWhat is the pass key? The pass key is {key}."], True
    names = "Amsterdam Bergen Cairo Dakar Edinburgh Florence Geneva Havana Istanbul Jakarta Kyoto Lima".split()
    chosen = [(name, number()) for name in rng.sample(names, 8)]
    said = [f"\nThe secret number of {name} is {n}.\n" for name, n in chosen]
    asked = "\nWhat is the secret number of {0}? The secret number of {0} is {1}."
    return "key-value", said, [asked.format(*fact) for fact in chosen], False


def scatter(tokens, facts, rng):
    """The tokens with facts among them, at random places behind the first, which may be BOS."""
    tokens = list(tokens)
    for place, fact in zip(sorted((rng.randrange(1, len(tokens)) for _ in facts), reverse=True), facts):
        tokens[place:place] = fact
    return tokens


def read_texts(paths, tokenizer, needed):
    """The tokens of each text, of which `needed` must be there."""
    texts = [list(tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False).input_ids) for path in paths]
    for path, tokens in zip(paths, texts):
        if len(tokens) < needed:
            raise SystemExit(f"{path} has {len(tokens)} tokens, {needed} are needed; give longer texts")
    return texts


def begin(tokens, tokenizer):
    """A piece of a text as the model has seen texts begin: with BOS for its first token where it wants one."""
    bos = tokenizer.bos_token_id
    return [bos] + tokens[1:] if bos is not None and tokenizer("a").input_ids[0] == bos else list(tokens)


def hide(encode, tokens, prefix, rng):
    """Puts a task into a sequence: facts into its prefix, questions and answers at its end."""
    name, said, asked, once = facts(rng)
    said, asked = [encode(text) for text in said], [encode(text) for text in asked]
    while said and sum(map(len, said)) > prefix // 2:
        said.pop(), asked.pop()
    if not said:
        raise SystemExit(f"a prefix of {prefix} tokens is too short to hide a fact in; use --retrieval 0")
    positions = len(tokens) - prefix
    end = []
    while len(end) < positions:
        rng.shuffle(asked)
        end += [token for question in asked for token in question]
        if once:
            break
    end = end[-positions:]
    around = scatter(tokens[: prefix - sum(map(len, said))], said, rng)
    return name, around + tokens[prefix : len(tokens) - len(end)] + end


def plan(args, tokenizer):
    """Sequences from texts: prefixes spread evenly, every text cut in turn, some with a task hidden."""
    rng = random.Random(args.seed)
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    low, high = args.prefix
    steps = max(args.sequences - 1, 1)
    prefixes = [low + (high - low) * i // steps for i in range(args.sequences)]
    rng.shuffle(prefixes)
    tasks = set(rng.sample(range(args.sequences), round(args.retrieval * args.sequences)))
    texts = read_texts(args.text, tokenizer, high + args.positions)
    sequences = []
    for i, prefix in enumerate(prefixes):
        name, tokens = args.text[i % len(texts)].name, texts[i % len(texts)]
        length = prefix + args.positions
        # One place in each stratum of the text, so that sequences overlap as little as they can.
        share = (i // len(texts) + rng.random()) / math.ceil(args.sequences / len(texts))
        start = int((len(tokens) - length) * min(share, 1))
        own, source = begin(tokens[start : start + length], tokenizer), f"{name} tokens {start}..{start + length}"
        if i in tasks:
            task, own = hide(encode, own, prefix, rng)
            source = f"{task} in {source}"
        sequences.append({"prefix": prefix, "source": source, "tokens": own})
    return sequences


def read_plan(path):
    """Sequences that `leank dump --save-tokens` wrote."""
    found = json.loads(path.read_text(encoding="utf-8"))
    positions = {len(own["tokens"]) - own["prefix"] for own in found["sequences"]}
    if len(positions) != 1 or min(positions) < 1:
        raise SystemExit(f"{path}: every sequence must have the same number of tokens behind its prefix, at least 1")
    return found["sequences"], positions.pop()


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="folder with config.json and weights")
    parser.add_argument("--gguf", action="store_true", help="--model is a GGUF file (dequantized to f32)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=pathlib.Path, nargs="+", help="text files, UTF-8")
    source.add_argument("--tokens", type=pathlib.Path, help="sequences that `leank dump --save-tokens` wrote")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the folder to write")
    parser.add_argument("--sequences", type=int, default=48)
    parser.add_argument("--positions", type=int, default=128, help="decode positions per sequence")
    parser.add_argument("--prefix", default="1024..3584", help="tokens before them, FROM..TO")
    parser.add_argument("--probes", type=int, default=2, help="draws of the probe")
    parser.add_argument("--retrieval", type=float, default=0.3, help="share of sequences with a task in them")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="f16", help="element type on disk")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="where the model runs: cpu, cuda, cuda:1, ...")
    parser.add_argument("--compute", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--overwrite", action="store_true", help="replace a dump that is there")
    args = parser.parse_args()
    try:
        args.prefix = tuple(int(n) for n in args.prefix.split(".."))
        low, high = args.prefix
    except ValueError:
        parser.error("--prefix: give it as FROM..TO, e.g. 1024..3584")
    if not 0 < low <= high:
        parser.error("--prefix: at least one token, the shortest first")
    if min(args.sequences, args.positions, args.probes) < 1 or not 0 <= args.retrieval <= 1:
        parser.error("--sequences, --positions and --probes are at least 1, --retrieval is between 0 and 1")
    if args.out.exists() and not (args.overwrite and (args.out / "manifest.json").exists()):
        parser.error(f"{args.out} is there already; choose another folder, or --overwrite a dump")
    if not args.model.exists():
        parser.error(f"{args.model}: no such file or folder")
    return args


def load(args, recorder):
    """The model with `recorder` as its attention, and its tokenizer where texts are to be read."""
    transformers.AttentionInterface.register(NAME, recorder)
    transformers.AttentionMaskInterface.register(NAME, sdpa_mask)
    where = {"pretrained_model_name_or_path": str(args.model)}
    if args.gguf:
        where = {"pretrained_model_name_or_path": str(args.model.parent), "gguf_file": args.model.name}
    dtype = getattr(torch, args.compute)
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=dtype, attn_implementation=NAME)
    model.to(args.device).eval().requires_grad_(False)
    tokenizer = None if args.tokens else transformers.AutoTokenizer.from_pretrained(**where)
    return model, tokenizer


def main():
    args = arguments()
    recorder = Recorder()
    model, tokenizer = load(args, recorder)
    if args.tokens:
        sequences, positions = read_plan(args.tokens)
    else:
        sequences, positions = plan(args, tokenizer), args.positions
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    shape = {
        "layers": sliding_layers(config).count(False),
        "query_heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
    }
    longest = max(len(own["tokens"]) for own in sequences)
    if longest > config.max_position_embeddings:
        raise SystemExit(f"the longest sequence has {longest} tokens, the model {config.max_position_embeddings}")
    inputs = args.text or [args.tokens]
    digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()
    manifest = {
        "version": 1,
        "model_id": args.model.resolve().name,
        "fingerprint": fingerprint(model, shape),
        "shape": shape,
        "dtype": args.dtype,
        "probe": "fisher",
        "draws": args.probes,
        "positions": positions,
        "seed": args.seed,
        "sequences": [
            {"prefix": own["prefix"], "valid": list(range(positions)), "source": own["source"]} for own in sequences
        ],
        "run": {
            "command": ["dump_hf.py", *sys.argv[1:]],
            "created_by": f"dump_hf.py, transformers {transformers.__version__}, torch {torch.__version__}",
            "seed": args.seed,
            "inputs": [{"role": "text", "name": path.name, "sha256": digest(path)} for path in inputs],
        },
    }
    dump = Dump(args.out, manifest)
    try:
        for i, own in enumerate(sequences):
            generator = torch.Generator().manual_seed(args.seed * 1_000_003 + i)
            found = probe(model, recorder, own["tokens"], own["prefix"], args.probes, generator)
            for layer, tensors in enumerate(found):
                dump.write(layer, i, tensors)
            print(f"{i + 1} of {len(sequences)} sequences", file=sys.stderr)
        dump.finish(args.overwrite)
    except BaseException as error:
        shutil.rmtree(dump.dir, ignore_errors=True)
        if isinstance(error, OSError):
            # Writing does not name the file.
            raise SystemExit(f"{error.filename or args.out}: writing the dump: {error.strerror or error}") from error
        raise
    print(f"{args.out}: {manifest['model_id']}, {len(sequences)} sequences × {positions} positions")


if __name__ == "__main__":
    main()
