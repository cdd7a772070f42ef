#!/usr/bin/env python3
"""Trains the demonstration model: a small Qwen2 that finds facts in 4k to 8k tokens of context.

    tools/fetch_books.py books/
    tools/train_demo_model.py --text books/train-*.txt --held-out books/calibrate.txt --out demo

Most sequences are retrieval: facts in the text that are asked for later, in the words of `leank eval --tasks`
and of `leank dump` and in others, and tokens that come again. Sequences begin short and grow; the
schedule goes by time, so that --minutes hold on any machine. OUT/model is what `leank --model` and
transformers load; it appears when it is whole. OUT/checkpoint-* lets --resume go on after a stop.

    tools/train_demo_model.py --check demo/model    compares its logits with those of transformers

Needs torch 2.9, safetensors and tokenizers (--check: transformers); one CUDA GPU, or a CPU with --tiny.
"""

import argparse
import collections
import contextlib
import functools
import json
import lzma
import math
import os
import pathlib
import re
import shutil
import time

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# The split of Qwen2: every digit on its own, so that numbers are copied digit by digit.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BOS = "<|begin|>"

FULL = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rope_theta": 1e7,
    "rms_norm_eps": 1e-5,
}
TINY = {
    **FULL,
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
}
# Length of the sequences, and from which share of the time on.
FULL_LENGTHS = "256:0,1024:0.12,4096:0.35,8192:0.85"
TINY_LENGTHS = "128:0,256:0.4"
# Pairs of channels with constant biases: those that RoPE turns by less than 0.13 in 8192 tokens.
SLOW_PAIRS = 10
# From this share of the time on the learning rate falls to zero.
DECAY = 0.6


# -- The model --------------------------------------------------------------------------------------------
# Modules are called as in transformers, so that the state is the file.


def rotated(x, cos, sin):
    """RoPE in Hugging Face's order: channel i turns with channel i + head_dim / 2. x [batch, heads, tokens, head_dim]."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden, self.head_dim = config["hidden_size"], config["head_dim"]
        queries, keys = (config[key] * self.head_dim for key in ("num_attention_heads", "num_key_value_heads"))
        self.q_proj = nn.Linear(hidden, queries)
        self.k_proj = nn.Linear(hidden, keys)
        self.v_proj = nn.Linear(hidden, keys)
        self.o_proj = nn.Linear(queries, hidden, bias=False)

    def forward(self, x, cos, sin):
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class Mlp(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.input_layernorm = nn.RMSNorm(hidden, eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps)
        self.mlp = Mlp(config)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


@torch.no_grad()
def fix_biases(attention, sizes):
    """Gives q and k biases of about `sizes` in the slowest channels, of random signs, that stay as they are."""
    for proj, size in zip((attention.q_proj, attention.k_proj), sizes):
        own = proj.bias.view(-1, 2, attention.head_dim // 2)[..., -SLOW_PAIRS:]
        own.copy_(size * (0.7 + 0.6 * torch.rand_like(own)) * (2 * torch.randint_like(own, 2) - 1))
        proj.bias.requires_grad_(False)


class Qwen2(nn.Module):
    def __init__(self, config, biases=(0, 0)):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.norm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(weight)  # every layer begins as the identity
            elif weight.dim() == 2:
                scale = 0.3 if name.startswith("embed") else 0.5
                nn.init.normal_(weight, std=scale / math.sqrt(config["hidden_size"]))
            elif name.endswith("bias"):
                nn.init.zeros_(weight)
        if sum(biases):
            for layer in self.layers:
                fix_biases(layer.self_attn, biases)
        half = config["head_dim"] // 2
        frequency = config["rope_theta"] ** (-torch.arange(half) / half)
        angle = torch.arange(config["max_position_embeddings"])[:, None] * frequency
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, tokens):
        """Final hidden states [batch, tokens, hidden]."""
        x = self.embed_tokens(tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)

    def logits(self, hidden):
        return F.linear(hidden, self.embed_tokens.weight)

    def flops(self, length):
        """Floating-point operations per token of training: forward and backward; attention is causal."""
        config = self.config
        weights = sum(w.numel() for w in self.parameters())
        width = config["num_attention_heads"] * config["head_dim"]
        attention = 4 * width * (length / 2) * config["num_hidden_layers"]
        # The backward pass of flash attention computes the logits anew.
        return 6 * weights + 3.5 * attention


# -- Text and tasks ---------------------------------------------------------------------------------------


def read(paths):
    text = lambda path: (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8").read()
    return "\n\n".join(map(text, paths))


def train_tokenizer(text, vocab):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(f"{BOS} $A", special_tokens=[(BOS, bos)])
    return tokenizer


def encode(tokenizer, text):
    """Tokens of a long text, in pieces that all cores work on."""
    at, pieces = 0, []
    while at < len(text):
        # Before a paragraph, where no pre-token is cut.
        end = text.find("\n\n", at + 200_000)
        end = len(text) if end < 0 else end
        pieces.append(text[at:end])
        at = end
    found = tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
    return np.concatenate([np.array(one.ids, np.uint16) for one in found])


# What is trained at a position: text, an answer, or nothing, since it is drawn at random.
TEXT, ANSWER, RANDOM = 0, 1, 2

PASSKEY = ("\nThe pass key is{v}. Remember it.{v} is the pass key.\n", "\nWhat is the pass key? The pass key is{v}")
NEEDLE = (
    "\nThe special magic number for{k} is{v}.\n",
    "\nWhat is the special magic number for{k}? The special magic number for{k} is{v}",
)
# A fact and its question. The first three are those of `leank eval` and `leank dump`.
PASSKEYS = [
    PASSKEY,
    ("\n\nThe pass key is{v}. Remember it.{v} is the pass key.\n\n", "\n\nWhat is the pass key? The pass key is{v}."),
    ("\nKeep in mind that the answer is{v}.\n", "\nAs you were told, the answer is{v}.\n"),
]
FACTS = [
    NEEDLE,
    ("\nThe secret number of{k} is{v}.\n", "\nWhat is the secret number of{k}? The secret number of{k} is{v}."),
    ("\nThe code for{k} is{v}.\n", "\nTell me the code for{k}: it is{v}.\n"),
    ("\nRemember that{k} belongs to{v}.\n", "\nTo whom belongs{k}? It belongs to{v}.\n"),
    ("\nIn the book of records,{k} stands beside{v}.\n", "\nWhat stands beside{k}?{v}.\n"),
    ("\nkey{k} value{v}\n", "\nkey{k} value{v}\n"),
    ("\n{k}:{v}\n", "\n{k}:{v}\n"),
    (" ({k} ={v})", " ({k} ={v})"),
    ("\nNobody but{k} knew of{v}.\n", "\nWhat did{k} know of? Nobody but{k} knew of{v}.\n"),
]
THINGS = (
    "apple bridge candle desert engine forest garden harbor island jacket kettle ladder mirror needle orchid pillow "
    "quarry ribbon saddle temple umbrella valley window zebra"
).split()
NAMES = (
    "Amsterdam Bergen Cairo Dakar Edinburgh Florence Geneva Havana Istanbul Jakarta Kyoto Lima Madrid Nairobi Oslo "
    "Prague Quito Riga Sofia Tunis Utrecht Vienna Warsaw Zagreb"
).split()
TASKS = ["passkey", "needle", "multikey"]
# Tokens of " 12345".
ANSWER_TOKENS = 6


class Maker:
    """Makes sequences out of the text; everything by its own generator."""

    def __init__(self, tokenizer, text, words, seed, early=False):
        self.tokenizer, self.text, self.words, self.early = tokenizer, text, words, early
        self.rng = np.random.default_rng(seed)
        self.bos = tokenizer.token_to_id(BOS)
        self.vocab = tokenizer.get_vocab_size()
        self.known = {}

    def ids(self, part):
        """Tokens of a part of a piece; the parts begin where the pre-tokenizer begins anew."""
        if part not in self.known:
            if len(self.known) > 100_000:
                self.known.clear()
            self.known[part] = self.tokenizer.encode(part, add_special_tokens=False).ids
        return self.known[part]

    def below(self, n):
        return int(self.rng.integers(n))

    def some_text(self, length):
        at = self.below(len(self.text) - length)
        return self.text[at : at + length]

    # -- Keys and values, a space in front of each

    def number(self):
        return f" {self.rng.integers(10_000, 100_000)}"

    def letters(self, low, high):
        return " " + "".join(chr(c) for c in self.rng.integers(97, 123, self.rng.integers(low, high + 1)))

    def digits(self, low, high):
        return " " + "".join(map(str, self.rng.integers(0, 10, self.rng.integers(low, high + 1))))

    def word(self):
        return " " + self.words[self.below(len(self.words))]

    def key(self):
        kind = self.rng.random()
        if kind < 0.5:
            own = THINGS if kind < 0.3 else NAMES
            return " " + own[self.below(len(own))]
        return self.word() if kind < 0.8 else self.letters(3, 6) if kind < 0.95 else self.digits(4, 6)

    def value(self):
        kind = self.rng.random()
        if kind < 0.6:
            return self.number()
        return self.digits(3, 8) if kind < 0.75 else self.word() if kind < 0.9 else self.letters(3, 6)

    # -- Pieces: tokens, and what is trained at each

    def piece(self, template, key, value, asked):
        tokens, labels, said = [], [], set()
        for part in re.split(r"(\{[kv]\})", template):
            label = TEXT
            if part in ("{k}", "{v}"):
                known = part in said or (asked and part == "{v}")
                said.add(part)
                label = ANSWER if known else RANDOM
                part = key if part == "{k}" else value
            own = self.ids(part)
            tokens += own
            labels += [label] * len(own)
        return tokens, labels

    def fact(self, templates, key="", value=None):
        """A fact and its question."""
        value = value or self.number()
        return self.piece(templates[0], key, value, False), self.piece(templates[1], key, value, True)

    def as_evaluated(self, task):
        """The facts of a task, the first of which is asked for."""
        if task == "passkey":
            return [self.fact(PASSKEY)]
        things = self.rng.permutation(THINGS)[: 4 if task == "multikey" else 1]
        return [self.fact(NEEDLE, f" {thing}") for thing in things]

    def mixed(self, room):
        """As many facts, of any form, as fit into about `room` tokens with their questions."""
        found, keys, used = [], set(), 0
        forms = [FACTS[self.below(len(FACTS))]] if self.rng.random() < 0.4 else FACTS
        if self.rng.random() < 0.3:
            found.append(self.fact(PASSKEYS[self.below(len(PASSKEYS))], value=self.value()))
        while used < room:
            key = self.key()
            if key in keys:
                continue
            keys.add(key)
            found.append(self.fact(forms[self.below(len(forms))], key, self.value()))
            used += len(found[-1][0][0]) + len(found[-1][1][0])
        return found

    def repeats(self, room):
        """Stretches of tokens that come twice: drawn at random or from the text."""
        found, used = [], 0
        while used < room:
            n = 8 + self.below(40)
            tokens = self.some_text(n) if self.rng.random() < 0.3 else self.rng.integers(1, self.vocab, n)
            tokens = tokens.tolist()
            found.append(((tokens, [RANDOM] * n), (tokens, [RANDOM] * 2 + [ANSWER] * (n - 2))))
            used += 2 * n
        return found

    # -- Sequences: `length` + 1 tokens

    def lay_out(self, length, facts, asked, at_end):
        """Text with the facts in it, and behind them the questions to `asked` of them."""
        size = lambda pieces: sum(len(tokens) for tokens, _ in pieces)
        statements, questions = [fact[0] for fact in facts], [facts[i][1] for i in asked]
        room = length - size(statements) - size(questions)
        while room < 8:  # the last ones must go
            statements.pop()
            kept = [i for i in asked if i < len(statements)]
            questions = [facts[i][1] for i in kept]
            asked, room = kept, length - size(statements) - size(questions)
        places = self.rng.integers(0, room + 1, len(statements)).tolist()
        pieces = [(place, 0, piece) for place, piece in zip(places, statements)]
        for i, question in zip(asked, questions):
            place = room if at_end else int(self.rng.integers(places[i], room + 1))
            pieces.append((place, 1, question))
        pieces.sort(key=lambda piece: piece[:2])
        text, tokens, labels, last = self.some_text(room), [[self.bos]], [[TEXT]], 0
        for place, _, (own, own_labels) in pieces:
            tokens += [text[last:place], own]
            labels += [[TEXT] * (place - last), own_labels]
            last = place
        tokens.append(text[last:])
        labels.append([TEXT] * (room - last))
        return np.concatenate(tokens).astype(np.int32), np.concatenate(labels).astype(np.uint8)

    def sequence(self, length):
        """In the early stage half are repeats: what finds facts grows out of what continues them."""
        kind = self.rng.random()
        if self.early and kind < 0.5:
            kind = 0.4
        if kind < 0.3:
            return self.lay_out(length, [], [], False)
        if kind < 0.45:
            facts = self.repeats(length * self.rng.uniform(0.1, 0.6))
        elif kind < 0.7:
            facts = self.as_evaluated(TASKS[self.below(len(TASKS))])
        else:
            facts = self.mixed(length * self.rng.uniform(0.05, 0.5))
        asked = self.rng.permutation(len(facts)).tolist()
        return self.lay_out(length, facts, asked, at_end=self.rng.random() < 0.4)

    def item(self, task, length):
        """An item as `leank eval` lays it out: the answer is the last ANSWER_TOKENS."""
        tokens, _ = self.lay_out(length, self.as_evaluated(task), [0], at_end=True)
        return tokens


class Batches(torch.utils.data.IterableDataset):
    def __init__(self, make, length, count, seed):
        self.make, self.length, self.count, self.seed = make, length, count, seed

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        maker = self.make(seed=(*self.seed, worker.id if worker else 0))
        while True:
            rows = [maker.sequence(self.length) for _ in range(self.count)]
            tokens, labels = (np.stack(part) for part in zip(*rows))
            yield torch.from_numpy(tokens), torch.from_numpy(labels)


def common_words(text):
    words = collections.Counter(re.findall(r"\b[A-Za-z][a-z]{3,}\b", text[:20_000_000]))
    return [word for word, _ in words.most_common(4000)]


def check_wording(tokenizer):
    """A piece of parts must have the tokens that `leank eval` gives it as a whole."""
    maker = Maker(tokenizer, np.zeros(1, np.uint16), [], 0)
    for statement, question in [PASSKEY, NEEDLE]:
        for template in (statement, question):
            whole = template.replace("{k}", " apple").replace("{v}", " 12345")
            parts, _ = maker.piece(template, " apple", " 12345", True)
            assert parts == tokenizer.encode(whole, add_special_tokens=False).ids, whole
    assert len(maker.ids(" 12345")) == ANSWER_TOKENS


# -- Training ---------------------------------------------------------------------------------------------


def losses(model, tokens, labels):
    """Mean loss of text and of answers, in nats per token."""
    tokens, label = tokens.long(), labels[:, 1:]
    logits = model.logits(model(tokens[:, :-1]))
    loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none").view(label.shape)
    mean = lambda kind: (loss * (label == kind)).sum() / (label == kind).sum().clamp(min=1)
    return mean(TEXT), mean(ANSWER)


@torch.no_grad()
def measure(model, maker, lengths, items, batch_tokens, device):
    """Shares of right answers by task and length, and the loss on held-out text."""
    maker.rng = np.random.default_rng(12345)  # the same items every time
    found = {}
    for length in lengths:
        for task in TASKS:
            right, at_once = 0, max(batch_tokens // length, 1)
            for start in range(0, items, at_once):
                rows = [maker.item(task, length) for _ in range(min(at_once, items - start))]
                tokens = torch.from_numpy(np.stack(rows)).to(device).long()
                hidden = model(tokens[:, :-1])[:, -ANSWER_TOKENS:]
                drawn = model.logits(hidden).argmax(-1)
                right += (drawn == tokens[:, -ANSWER_TOKENS:]).all(-1).sum().item()
            found[f"{task}@{length}"] = right / items
    length = max(lengths)
    count = max(2 * batch_tokens // length, 2)
    rows = [maker.lay_out(length, [], [], False) for _ in range(count)]
    total = 0.0
    for tokens, labels in rows:
        tokens, labels = (torch.from_numpy(part)[None].to(device) for part in (tokens, labels))
        total += losses(model, tokens, labels)[0].item()
    found["held_out_loss"] = total / count
    return found


def stages(text):
    """'256:0,1024:0.1' as [(length, from which share of the time)]."""
    found = [(int(length), float(share)) for length, share in (stage.split(":") for stage in text.split(","))]
    if found[0][1] != 0 or [share for _, share in found] != sorted(share for _, share in found):
        raise argparse.ArgumentTypeError("LENGTH:SHARE,… where the shares begin at 0 and rise")
    return found


class Optimizers:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms.

    In a trial (two layers of 64, AdamW and Muon at the same rate) repeats were continued after 700 steps with
    Muon, and not yet after 900 with AdamW.
    """

    def __init__(self, model, rate, fused):
        inner = lambda name, weight: weight.dim() == 2 and not name.startswith("embed")
        self.names = {weight: name for name, weight in model.named_parameters() if weight.requires_grad}
        matrices = [weight for weight, name in self.names.items() if inner(name, weight)]
        others = [weight for weight, name in self.names.items() if not inner(name, weight)]
        self.rate = rate
        self.muon = torch.optim.Muon(matrices, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        self.adam = torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)

    def step(self, factor):
        for own in (self.muon, self.adam):
            own.param_groups[0]["lr"] = self.rate * factor
            own.step()
            own.zero_grad(set_to_none=True)

    def moments(self):
        states = [*self.muon.state.items(), *self.adam.state.items()]
        return {f"{key}.{self.names[weight]}": own[key] for weight, own in states for key in own if key != "step"}

    def load(self, moments, step):
        for weight, name in self.names.items():
            own = {
                key.split(".")[0]: value.to(weight) for key, value in moments.items() if key.partition(".")[2] == name
            }
            if "momentum_buffer" in own:
                self.muon.state[weight] = own
            else:
                self.adam.state[weight] = {"step": torch.tensor(float(step), device=weight.device), **own}


class Checkpoints:
    """Folders OUT/checkpoint-STEP, of which the last counts; each appears when it is whole.

    Moments are kept in bf16: less to carry, and a few steps make up for it.
    """

    def __init__(self, out):
        self.out = out

    def all(self):
        return sorted(self.out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))

    def save(self, model, optimizers, state):
        old, part = self.all(), self.out / ".checkpoint"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        moments = {name: own.bfloat16() for name, own in optimizers.moments().items()}
        save_file(model.state_dict(), part / "weights.safetensors")
        save_file(moments, part / "moments.safetensors")
        (part / "state.json").write_text(json.dumps(state))
        os.rename(part, self.out / f"checkpoint-{state['step']}")
        for path in old:
            shutil.rmtree(path)

    def load(self, model, optimizers):
        """The state of the last one; None where there is none."""
        if not (found := self.all()):
            return None
        state = json.loads((found[-1] / "state.json").read_text())
        model.load_state_dict(load_file(found[-1] / "weights.safetensors"))
        optimizers.load(load_file(found[-1] / "moments.safetensors"), state["step"])
        return state


def save_model(folder, model, tokenizer):
    """A folder as transformers has them, with weights in f16."""
    part = folder.with_name(f".{folder.name}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    bos = tokenizer.token_to_id(BOS)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "_name_or_path": "leank-demo",
        **model.config,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": bos,
        "eos_token_id": None,
        "torch_dtype": "float16",
    }
    (part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save(str(part / "tokenizer.json"), pretty=False)
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "model_max_length": config["max_position_embeddings"],
    }
    (part / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
    weights = {f"model.{name}": weight.half().cpu().contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, part / "model.safetensors", {"format": "pt"})
    os.chmod(part / "model.safetensors", 0o644)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(part, folder)


def load_model(folder):
    config = json.loads((folder / "config.json").read_text())
    model = Qwen2({key: config[key] for key in FULL})
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): weight.float() for name, weight in weights.items()})
    return model.eval()


@torch.no_grad()
def check(folder):
    """Logits of the same weights here and in transformers, in f32."""
    import transformers

    model = load_model(folder)
    other = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    length = min(1024, model.config["max_position_embeddings"])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config["vocab_size"], (2, length), generator=generator)
    ours, theirs = model.logits(model(tokens)), other(tokens).logits
    difference, spread = (ours - theirs).abs().max().item(), theirs.std().item()
    print(f"largest difference of a logit {difference:.2e}, their standard deviation {spread:.2e}")
    text = "The pass key is 12345."
    own = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    assert transformers.AutoTokenizer.from_pretrained(folder)(text).input_ids == own
    assert difference < 1e-3 * spread, "another model than that of transformers"


class Log:
    def __init__(self, path):
        self.path = path

    def __call__(self, **entry):
        entry = {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in entry.items()}
        with open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\n")
        print(" ".join(f"{key}={value}" for key, value in entry.items()), flush=True)


class Training:
    """Everything of a run; `state` is what a checkpoint keeps of it beside the weights."""

    def __init__(self, args):
        self.args, self.out = args, args.out
        self.cuda = args.device.startswith("cuda")
        torch.manual_seed(args.seed)
        torch.set_float32_matmul_precision("high")
        self.out.mkdir(parents=True, exist_ok=True)
        self.checkpoints, self.log = Checkpoints(self.out), Log(self.out / "training_log.jsonl")
        if self.checkpoints.all() and not args.resume:
            raise SystemExit(f"{self.out} holds a checkpoint: go on with --resume, or take another --out")
        config = {**(TINY if args.tiny else FULL), **args.shape}
        longest = max(length for length, _ in args.lengths)
        if longest > config["max_position_embeddings"]:
            raise SystemExit(f"--lengths: at most {config['max_position_embeddings']}")
        self.read_texts(config["vocab_size"])

        self.model = Qwen2(config, args.biases).to(args.device)
        self.optimizers = Optimizers(self.model, args.rate, self.cuda)
        self.state = self.checkpoints.load(self.model, self.optimizers) if args.resume else None
        self.state = self.state or {"step": 0, "tokens": 0, "seconds": 0.0, "skipped": 0.0, "runs": 0}
        self.state["runs"] += 1
        if self.cuda and not args.no_compile:
            # One layer is compiled per length, and serves for all; where that fails, training goes on without.
            torch._dynamo.config.suppress_errors = True
            for layer in self.model.layers:
                layer.compile(dynamic=False)
        self.log(
            event="start", device=torch.cuda.get_device_name() if self.cuda else "cpu", torch=torch.__version__,
            parameters=sum(w.numel() for w in self.model.parameters()), text_tokens=len(self.text),
            bytes_per_token=self.bytes_per_token, minutes=args.minutes, **self.state,
        )  # fmt: skip
        self.begun, self.before = time.monotonic(), self.state["seconds"]
        self.length, self.batches, self.reached = None, None, 0
        self.last = {what: self.before for what in ("log", "measure", "save")}
        self.start_sums()

    def read_texts(self, vocab):
        args, path = self.args, self.out / "tokenizer.json"
        text, held_out = read(args.text), read(args.held_out)
        if not (args.resume and path.exists()):
            train_tokenizer(text, vocab).save(str(path), pretty=False)
        self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        check_wording(self.tokenizer)
        self.words = common_words(text)
        self.text, held_out_ids = encode(self.tokenizer, text), encode(self.tokenizer, held_out)
        # From here on it works in the processes that make sequences, one thread each.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self.bytes_per_token = len(held_out.encode()) / len(held_out_ids)
        self.judge = Maker(self.tokenizer, held_out_ids, self.words, 0)

    def autocast(self):
        return torch.autocast("cuda", torch.bfloat16) if self.cuda else contextlib.nullcontext()

    def share(self):
        """Of the schedule that is behind."""
        return (self.state["seconds"] + self.state["skipped"]) / (self.args.minutes * 60)

    def clock(self):
        self.state["seconds"] = self.before + time.monotonic() - self.begun

    def due(self, what, every):
        due = self.state["seconds"] - self.last[what] >= every
        if due:
            self.last[what] = self.state["seconds"]
        return due

    def next_batch(self):
        wanted = [length for length, start in self.args.lengths if start <= self.share()][-1]
        if wanted != self.length:
            self.length, workers = wanted, self.args.workers
            early = wanted == self.args.lengths[0][0]
            make = functools.partial(Maker, self.tokenizer, self.text, self.words, early=early)
            data = Batches(
                make, wanted, max(self.args.batch_tokens // wanted, 1), (self.args.seed, self.state["runs"], wanted)
            )
            ahead = {"num_workers": workers, "prefetch_factor": 4} if workers else {}
            self.batches = iter(torch.utils.data.DataLoader(data, batch_size=None, pin_memory=self.cuda, **ahead))
        return (part.to(self.args.device, non_blocking=True) for part in next(self.batches))

    def step(self):
        tokens, labels = self.next_batch()
        warm = min((self.state["step"] + 1) / 200, 1)
        self.factor = warm * min(1, (1 - self.share()) / (1 - DECAY))
        with self.autocast():
            on_text, on_answers = losses(self.model, tokens, labels)
        (on_text + self.args.answers * on_answers).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizers.step(self.factor)
        self.sums += torch.stack((on_text, on_answers)).detach()
        self.state["step"] += 1
        self.state["tokens"] += tokens.shape[0] * self.length

    def start_sums(self):
        self.sums = torch.zeros(2, device=self.args.device)
        self.since = dict(self.state)

    def note(self):
        passed = {key: self.state[key] - self.since[key] for key in ("step", "tokens", "seconds")}
        text_loss, answer_loss = (self.sums / passed["step"]).tolist()
        speed = passed["tokens"] / passed["seconds"]
        self.log(
            step=self.state["step"], seconds=self.state["seconds"], tokens=self.state["tokens"], length=self.length,
            rate=self.args.rate * self.factor, text_loss=text_loss, answer_loss=answer_loss,
            tokens_per_second=speed, tflops=speed * self.model.flops(self.length) / 1e12,
        )  # fmt: skip
        self.start_sums()

    def measured(self, lengths, items):
        self.model.eval()
        # Its shapes are not worth compiling for.
        with self.autocast(), torch.compiler.set_stance("force_eager"):
            found = measure(self.model, self.judge, lengths, items, self.args.batch_tokens, self.args.device)
        self.model.train()
        found["held_out_bits_per_byte"] = found["held_out_loss"] / self.bytes_per_token / math.log(2)
        return found

    def look(self):
        """Measures on the way; where the goal is reached twice in a row, the end may begin."""
        found = self.measured(sorted({own for own in self.args.measure if own <= self.length} | {self.length}), 64)
        self.log(event="measured", step=self.state["step"], seconds=self.state["seconds"], **found)
        goals = [found.get(f"{task}@{own}", 0) >= self.args.goal for task in TASKS for own in self.args.measure]
        self.reached = self.reached + 1 if all(goals) else 0
        self.clock()
        if self.args.stop_at_goal and self.reached >= 2 and self.share() < DECAY:
            self.state["skipped"] = DECAY * self.args.minutes * 60 - self.state["seconds"]
            self.log(event="goal reached: the learning rate falls from here", step=self.state["step"])

    def run(self):
        args = self.args
        while self.share() < 1:
            if time.monotonic() - self.begun >= args.stop_after * 60:
                self.checkpoints.save(self.model, self.optimizers, self.state)
                print(f"stopped after {args.stop_after} minutes; go on with --resume")
                return
            self.step()
            self.clock()
            if self.due("log", args.log_every):
                self.note()
            if self.due("measure", args.measure_every):
                self.look()
            if self.due("save", args.save_every):
                self.checkpoints.save(self.model, self.optimizers, self.state)
        self.finish()

    def finish(self):
        # What is measured last is what is in the file.
        with torch.no_grad():
            for weight in self.model.parameters():
                weight.copy_(weight.half())
        lengths = {*self.args.measure, max(length for length, _ in self.args.lengths)}
        self.log(event="finished", **self.state, **self.measured(sorted(lengths), self.args.items))
        folder = self.out / "model"
        save_model(folder, self.model, self.tokenizer)
        for path in self.checkpoints.all():
            shutil.rmtree(path)
        print(f"{folder}: {sum(path.stat().st_size for path in folder.iterdir())} bytes")


def shape(text):
    sizes = dict(pair.split("=") for pair in text.split(","))
    if unknown := set(sizes) - {key for key, value in FULL.items() if isinstance(value, int)}:
        raise argparse.ArgumentTypeError(f"{unknown.pop()} is no size of the model")
    return {key: int(value) for key, value in sizes.items()}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", type=pathlib.Path, metavar="DIR", help="compare a finished model with transformers")
    parser.add_argument("--text", type=pathlib.Path, nargs="+", help="texts to train on, UTF-8, also .xz")
    parser.add_argument("--held-out", type=pathlib.Path, nargs="+", help="texts to measure on")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--minutes", type=float, default=4.0, help="of training, over all runs")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="minutes after which this run stops")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    parser.add_argument("--stop-at-goal", action="store_true", help="begin to end once --goal is reached")
    parser.add_argument("--goal", type=float, default=0.98, help="share of right answers in every task")
    parser.add_argument("--tiny", action="store_true", help="four narrow layers, for a try on a CPU")
    parser.add_argument(
        "--shape", type=shape, default={}, metavar="KEY=N,...", help="other sizes, e.g. hidden_size=128,num_hidden_layers=4"
    )
    parser.add_argument("--lengths", type=stages, help=f"LENGTH:SHARE of the time where it begins; {FULL_LENGTHS}")
    parser.add_argument(
        "--measure", type=lambda text: [int(n) for n in text.split(",")], help="lengths; 1024,2048,4096"
    )
    parser.add_argument("--batch-tokens", type=int, help="tokens per step; 131072")
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--answers", type=float, default=1.0, help="weight of the answers beside the text")
    parser.add_argument(
        "--biases", type=lambda text: [float(x) for x in text.split(",")], default=[8.0, 2.5], metavar="Q,K",
        help="sizes of the constant biases of q and k in the slowest channels; 8,2.5 (0,0: all biases are trained)",
    )  # fmt: skip
    parser.add_argument("--items", type=int, default=256, help="items per task and length at the end")
    parser.add_argument("--workers", type=int, help="processes that make sequences; the cores less two, at most 12")
    parser.add_argument("--log-every", type=float, default=10.0, help="seconds")
    parser.add_argument("--measure-every", type=float, default=45.0, help="seconds")
    parser.add_argument("--save-every", type=float, default=60.0, help="seconds")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if not args.check and not (args.text and args.held_out and args.out):
        parser.error("--text, --held-out and --out are needed")
    args.lengths = args.lengths or stages(TINY_LENGTHS if args.tiny else FULL_LENGTHS)
    args.measure = args.measure or ([256] if args.tiny else [1024, 2048, 4096])
    args.batch_tokens = args.batch_tokens or (4096 if args.tiny else 131_072)
    if args.workers is None:
        args.workers = min(max(len(os.sched_getaffinity(0)) - 2, 0), 12)
    return args


def main():
    args = arguments()
    if args.check:
        return check(args.check)
    flash = args.device.startswith("cuda")
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]) if flash else contextlib.nullcontext():
        Training(args).run()


if __name__ == "__main__":
    main()
