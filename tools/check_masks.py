#!/usr/bin/env python3
"""Check our mask files against PyTorch, NumPy and safetensors, in both directions.

Give the command that converts mask file A to mask file B as arguments:

    tools/check_masks.py target/release/leank convert
    tools/check_masks.py cargo run -q -p leank-core --example convert_mask --

A random mask is saved by torch.save (element types, pickle protocols, strides, dictionaries) and
numpy.save; each is converted to our .safetensors, .pth and .npy; those are loaded by
torch.load(weights_only=True), numpy.load and safetensors and must all equal the mask. Files that
are no masks must be refused. Exit code 0: all well, 1: a difference, 2: wrong usage.

Needs torch, numpy and safetensors.
"""

import json
import subprocess
import sys
import tempfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
import torch


def sources(mask: torch.Tensor):
    """(name, function that saves the mask in that way)"""

    def torch_save(what, **options):
        return lambda path: torch.save(what, path.with_suffix(".pth"), **options)

    def numpy_save(array):
        return lambda path: np.save(path.with_suffix(".npy"), array)

    for dtype in (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    ):
        yield f"torch {dtype}", torch_save(mask.to(dtype))
    for protocol in range(2, 6):
        yield f"pickle protocol {protocol}", torch_save(mask, pickle_protocol=protocol)
    yield "transposed", torch_save(mask.permute(2, 0, 1).contiguous().permute(1, 2, 0))
    yield "slice", torch_save(torch.cat([mask + 5, mask, mask + 5])[len(mask) : 2 * len(mask)])
    yield "parameter", torch_save(torch.nn.Parameter(mask))
    yield "dictionary", torch_save({"mask": mask})
    module = torch.nn.Module()
    module.register_buffer("mask", mask)
    yield "state dictionary", torch_save(module.state_dict())
    yield "OrderedDict", torch_save(OrderedDict(mask=mask), pickle_protocol=4)
    array = mask.numpy()
    for dtype in ("bool", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8", ">i4", ">f8"):
        yield f"numpy {dtype}", numpy_save(array.astype(dtype))
    yield "numpy Fortran", numpy_save(np.asfortranarray(array))


class Evil:
    """Creates a file when it is unpickled carelessly."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def bad_sources(mask: torch.Tensor, trace: Path):
    """(name, what is saved) that must be refused"""
    yield "scaling factors", mask * 0.5
    yield "two tensors", {"a": mask, "b": mask}
    yield "code", Evil(trace)
    yield "code beside a mask", {"mask": mask, "code": Evil(trace)}
    yield "no tensor", 3
    yield "two axes", mask[0]
    yield "expanded", mask[:1].clone().expand(len(mask), -1, -1)


def convert(command, source: Path, target: Path) -> str | None:
    """None when it went well, else what the command said."""
    result = subprocess.run([*command, source, target], capture_output=True, text=True)
    if result.returncode == 0:
        return None
    return result.stderr.strip() or f"exit code {result.returncode}"


def differences(command, name, source: Path, expected: np.ndarray):
    """Converts to each format, loads each, and yields what is wrong."""
    loaders = {
        ".safetensors": lambda path: safetensors.numpy.load_file(path)["mask"],
        ".pth": lambda path: torch.load(path, weights_only=True).numpy(),
        ".npy": lambda path: np.load(path, allow_pickle=False),
    }
    dtypes = {".safetensors": np.uint8, ".pth": np.float32, ".npy": np.bool_}
    for suffix, load in loaders.items():
        target = source.with_name("out" + suffix)
        if error := convert(command, source, target):
            yield f"{name} to {suffix}: {error}"
            continue
        found = load(target)
        if found.dtype != dtypes[suffix]:
            yield f"{name} to {suffix}: type {found.dtype}, expected {dtypes[suffix]}"
        if found.shape != expected.shape or not np.array_equal(found, expected):
            yield f"{name} to {suffix}: another mask"
    native = source.with_name("out.safetensors")
    if not native.exists():
        return
    with safetensors.safe_open(native, "numpy") as file:
        if json.loads(file.metadata()["leank"])["version"] != 1:
            yield f"{name}: metadata version is not 1"


def main(command) -> int:
    if not command:
        print(__doc__, file=sys.stderr)
        return 2
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(5, 3, 16, generator=generator) < 0.3).float()
    mask[2, 1] = 0
    mask[4] = 1
    problems, checked = [], 0
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        for name, save in sources(mask):
            for old in directory.iterdir():
                old.unlink()
            save(directory / "source")
            (source,) = directory.iterdir()
            problems += differences(command, name, source, mask.numpy())
            checked += 1
        trace, source = directory / "trace", directory / "bad.pth"
        for name, what in bad_sources(mask, trace):
            torch.save(what, source)
            error = convert(command, source, directory / "out.npy")
            if error is None or "panicked" in error:
                problems.append(f"{name}: should have been refused: {error}")
            if trace.exists():
                problems.append(f"{name}: its code was run")
            checked += 1
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{checked} files checked, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
