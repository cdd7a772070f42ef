#!/usr/bin/env python3
"""Decode steps of llama.cpp, for `leank-bench decode-cpu --llama-cpp PYTHON`.

Answers commands on standard input, one line each:

    fill TOKENS   a cache of TOKENS tokens: `ok BYTES`, bytes of its K and V in so many tokens
    run STEPS     that many steps of one token: `t SECONDS`, per step
    quit

What cannot be done is answered with `unsupported REASON`. Needs the PyPI package llama-cpp-python.

A prompt of 32k tokens takes many minutes on two cores. So PIECE random tokens are computed once, and
their state is copied to all positions of the sequence: each copy lies in cells of its own, as a real
prompt's would, and a step reads all of them.
"""

import argparse
import ctypes
import random
import sys
import time

PIECE = 512


class Decoder:
    def __init__(self, llama, args):
        self.llama, self.args = llama, args
        llama.llama_backend_init()
        # Its log would drown the answers' errors.
        self.quiet = llama.llama_log_callback(lambda level, text, data: None)
        llama.llama_log_set(self.quiet, ctypes.c_void_p(0))
        self.model = llama.llama_model_load_from_file(
            args.model.encode(), llama.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"{args.model} was not loaded")
        vocab = llama.llama_model_get_vocab(self.model)
        self.vocab = llama.llama_vocab_n_tokens(vocab)
        self.context, self.tokens = None, 0
        self.random = random.Random(1)

    def decode(self, tokens, start, sequence):
        llama = self.llama
        batch = llama.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, start + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = i + 1 == len(tokens)
        failed = llama.llama_decode(self.context, batch)
        llama.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama_decode: {failed}")

    def fill(self, tokens):
        llama, args = self.llama, self.args
        if self.context:
            llama.llama_free(self.context)
        params = llama.llama_context_default_params()
        # Room for the copies' last piece and for steps.
        params.n_ctx = (tokens + 2 * PIECE + 255) // 256 * 256
        params.n_batch = params.n_ubatch = PIECE
        params.n_seq_max, params.kv_unified = 2, True
        params.n_threads = params.n_threads_batch = args.threads
        params.type_k = params.type_v = {"f16": 1, "q8_0": 8}[args.cache]
        params.flash_attn_type = 1
        self.context = llama.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"no context of {tokens} tokens in {args.cache}")
        memory = llama.llama_get_memory(self.context)
        self.decode([self.random.randrange(self.vocab) for _ in range(PIECE)], 0, 0)
        size = llama.llama_state_seq_get_size(self.context, 0)
        state = (ctypes.c_uint8 * size)()
        if llama.llama_state_seq_get_data(self.context, state, size, 0) == 0:
            raise RuntimeError("the state of a sequence cannot be copied")
        self.tokens = PIECE
        while self.tokens < tokens:
            if llama.llama_state_seq_set_data(self.context, state, size, 1) == 0:
                raise RuntimeError("the state of a sequence cannot be copied")
            fits = min(PIECE, tokens - self.tokens)
            llama.llama_memory_seq_rm(memory, 1, fits, -1)
            llama.llama_memory_seq_add(memory, 1, 0, -1, self.tokens)
            llama.llama_memory_seq_cp(memory, 1, 0, -1, -1)
            llama.llama_memory_seq_rm(memory, 1, -1, -1)
            self.tokens += fits
        held = llama.llama_memory_seq_pos_max(memory, 0) + 1
        if held != tokens:
            raise RuntimeError(f"{tokens} tokens were copied, {held} are held")
        # The first step after a copy turns keys to their new positions.
        self.run(1)
        return f"ok {llama.llama_state_seq_get_size(self.context, 0)}"

    def run(self, steps):
        start = time.perf_counter()
        for _ in range(steps):
            self.decode([self.random.randrange(self.vocab)], self.tokens, 0)
            self.tokens += 1
        return f"t {(time.perf_counter() - start) / steps:.9f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a GGUF file")
    parser.add_argument("--cache", choices=["f16", "q8_0"], default="f16", help="type of K and V")
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    try:
        import llama_cpp
        decoder = Decoder(llama_cpp, args)
        print(f"ok llama-cpp-python {llama_cpp.__version__}", flush=True)
    except Exception as error:
        print(f"unsupported {error}".replace("\n", " "), flush=True)
        return
    for line in sys.stdin:
        command, *rest = line.split()
        if command == "quit":
            break
        try:
            answer = {"fill": decoder.fill, "run": decoder.run}[command](*map(int, rest))
        except Exception as error:
            answer = f"unsupported {error}".replace("\n", " ")
        print(answer, flush=True)


if __name__ == "__main__":
    main()
