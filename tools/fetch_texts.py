#!/usr/bin/env python3
"""Makes plain text to learn from and other text to evaluate on, out of Debian's documentation.

    tools/fetch_texts.py texts/

writes calibrate-*.txt and evaluate-*.txt. Needs apt and dpkg; nothing is installed. Files that are
there already are kept.
"""

import argparse
import html.parser
import os
import pathlib
import re
import subprocess
import sys
import tempfile

# file -> (package, folder of HTML below it, pattern of file names)
TEXTS = {
    "calibrate-anarchism.txt": ("anarchism", "usr/share/doc/anarchism/html", r"sec[A-F]\w*\.html"),
    "calibrate-handbook.txt": (
        "debian-handbook",
        "usr/share/doc/debian-handbook/html/en-US",
        r"(sect|[a-z-]+)\..*\.html|[a-z-]+\.html",
    ),
    "evaluate-anarchism.txt": ("anarchism", "usr/share/doc/anarchism/html", r"sec[H-J]\w*\.html"),
    "evaluate-rust-book.txt": ("rust-doc", "usr/share/doc/rust-doc/html/book", r"ch\d\d-\d\d-.*\.html"),
}
BLOCKS = {"p", "div", "li", "h1", "h2", "h3", "h4", "pre", "tr", "dt", "dd", "blockquote", "br"}
SKIPPED = {"script", "style", "nav", "head", "button"}


class Text(html.parser.HTMLParser):
    """Text of a page: blocks on lines of their own, blank lines between."""

    def __init__(self):
        super().__init__()
        self.parts, self.skipping, self.preformatted = [], 0, 0

    def handle_starttag(self, tag, attrs):
        self.skipping += tag in SKIPPED
        self.preformatted += tag == "pre"
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag):
        self.skipping -= tag in SKIPPED
        self.preformatted -= tag == "pre"
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data):
        if not self.skipping:
            self.parts.append(data if self.preformatted else re.sub(r"\s+", " ", data))

    def text(self):
        lines = [line.rstrip() for line in "".join(self.parts).split("\n")]
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def page_text(path):
    parser = Text()
    parser.feed(path.read_text(encoding="utf-8", errors="replace"))
    return parser.text()


def unpack(package, folder):
    """The package's files, below `folder`."""
    root = folder / package
    if not root.exists():
        print(f"fetching {package}", file=sys.stderr)
        # As root apt would warn that its sandbox user cannot write here.
        download = ["apt-get", "-o", "APT::Sandbox::User=root", "download", "-qq", package]
        if subprocess.run(download, cwd=folder).returncode != 0:
            subprocess.run(["apt-get", "update", "-qq"], check=True)
            subprocess.run(download, cwd=folder, check=True)
        (deb,) = folder.glob(f"{package}_*.deb")
        subprocess.run(["dpkg-deb", "-x", deb, root], check=True)
    return root


def store(target, text, least, source):
    """Writes a text of at least so many characters, whole or not at all."""
    if len(text) < least:
        sys.exit(f"{target}: only {len(text)} characters from {source}")
    part = target.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, target)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, (package, pages, pattern) in TEXTS.items():
            target = out / name
            if target.exists():
                continue
            root = unpack(package, pathlib.Path(folder)) / pages
            # Links to a page under a second name would repeat it.
            files = sorted(p for p in root.iterdir() if re.fullmatch(pattern, p.name) and not p.is_symlink())
            text = "\n\n".join(page_text(p) for p in files)
            store(target, text, 100_000, f"{len(files)} pages of {package}")
            print(f"{target}: {len(text)} characters from {len(files)} pages")


if __name__ == "__main__":
    main()
