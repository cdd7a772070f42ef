#!/usr/bin/env python3
"""Every `unsafe` of the project, with the invariant it rests on and the tests that run it.

    tools/unsafe_table.py > docs/unsafe.md   # writes the table
    tools/unsafe_table.py --check            # whether that is what is committed

Fails where an `unsafe` has no invariant, a file with `unsafe` names no test, or a named test is not there.

- A block, an impl: the comment above it, or above its statement, that begins with `SAFETY:`.
- A trait, a function: the section `# Safety` of its documentation; or such a comment; in an impl, the trait's.
- A function of the C ABI: the header, which must declare it.
Calls of `#[target_feature]` functions from code without the feature are blocks like any others.
"""

import bisect
import collections
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs/unsafe.md"
HEADER = "leank-cpu/include/leank.h"

KERNELS = [
    "leank-cpu/tests/conformance.rs portable avx2 avx512 avx512_bf16",
    "leank-cpu/src/codes.rs every_instruction_set_packs_alike",
    "leank-cpu/src/panels.rs rows_are_gathered_like_single_elements",
    "leank-cpu/src/kernel/transpose.rs every_instruction_set_transposes",
]
CAPI = [
    "leank-cpu/src/capi/tests.rs results_are_those_of_rust threads_of_others_are_used_and_watched a_cache_in_use_says_so",
    "leank-cpu/tests/capi.c",
]
# With a device. Without one, that it is told.
CUDA = [
    "leank-cuda/tests/conformance.rs where_there_is_a_device",
    "leank-cuda/tests/device.rs results_are_the_same_every_time a_captured_graph_stands_for_the_calls",
    "leank-cuda/src/probe.rs a_device_or_a_reason",
]
DECODER = [
    "leank-bench/tests/decoder.rs logits_are_those_of_the_model sampled_tokens_are_the_next_steps_input_also_in_graphs",
]
# Files, and the tests and fuzz targets that run their unsafe code, as FILE NAME...; the first pattern that
# fits. A file of tests is its own. What stands in brackets is a remark.
TESTS = [
    ("leank-candle/src/gemm.rs", ["leank-candle/src/gemm.rs products_and_transposes_are_right"]),
    ("leank-candle/src/quantized/*.rs", ["leank-candle/src/quantized/mod.rs products_are_those_of_the_widened_weights"]),
    ("leank-cpu/src/capi/*.rs", CAPI),
    ("leank-cpu/src/kernel/neon.rs", ["leank-cpu/tests/conformance.rs neon", "tools/aarch64.sh"]),
    ("leank-cpu/src/kernel/avx*.rs", KERNELS),
    ("leank-cpu/src/kernel/*.rs", [*KERNELS, "fuzz/fuzz_targets/cache_ops.rs"]),
    (
        "leank-cpu/src/pool.rs",
        [
            "leank-cpu/src/pool.rs every_piece_runs_once a_panic_reaches_the_caller_and_the_pool_goes_on",
            "leank-cpu/src/pool/model.rs two_helpers_and_two_runs panics_reach_the_caller panics_end_with_their_run",
            "leank-cpu/tests/conformance.rs pool",
        ],
    ),
    ("leank-cpu/src/store.rs", ["leank-cpu/src/store.rs what_is_given_back_is_zero_and_nothing_else"]),
    ("leank-cuda/src/*.rs", CUDA),
    ("leank-bench/src/cuda/*.rs", [*DECODER, "(`read_bandwidth`: no test, `leank-bench cuda` itself)"]),
    ("leank-bench/src/decoder/*.rs", DECODER),
]

INTRODUCTION = f"""# Every `unsafe`

Written by `tools/unsafe_table.py`, which CI runs: it fails where one has no invariant, where a file with `unsafe`
names no test or fuzz target that runs it, and where this page is not what it writes.
The libraries `leank-core`, `leank-train`, `leank-testkit` and `leank` and the commands forbid `unsafe` outright; the other crates deny it but in
the modules below. "Of the trait": the invariant is that of the trait's function. The C ABI's functions ask for what
[leank.h](../{HEADER}) says.
"""

TOKEN = re.compile(
    r"""
    (?P<comment>//[^\n]*)
    | (?P<nested>/\*)
    | (?P<raw>\b[bc]?r(?P<hashes>\#*)".*?"(?P=hashes))
    | (?P<string>"(?:\\.|[^"\\])*")
    | (?P<char>'(?:\\(?:u\{\w+\}|x\w\w|.)|[^\\'\n])')
    """,
    re.X | re.S,
)


class Wrong(Exception):
    """What is to be mended, with its place."""


def blank(text):
    """Keeps the lines and places of a text, and nothing else."""
    return re.sub(r"[^\n]", " ", text)


def split(text):
    """Code without comments and literals, each character in its place, and line comments by line."""
    code, comments, at = [], {}, 0
    while found := TOKEN.search(text, at):
        start, end = found.span()
        code.append(text[at:start])
        if found["nested"]:
            depth, end = 1, start + 2
            while depth:
                mark = re.compile(r"/\*|\*/").search(text, end)
                depth, end = depth + (1 if mark[0] == "/*" else -1), mark.end()
        elif found["comment"]:
            comments[text.count("\n", 0, start)] = found[0]
        code.append(blank(text[start:end]))
        at = end
    code.append(text[at:])
    return "".join(code), comments


class Source:
    """A file: its code, its comments, and the name of what each brace opens."""

    def __init__(self, path):
        self.name = path.relative_to(ROOT).as_posix()
        self.code, self.comments = split(path.read_text())
        self.starts = [0, *(at.end() for at in re.finditer("\n", self.code))]
        self.lines = self.code.split("\n")
        self.scopes, self.begins = self.read_scopes()

    def line(self, at):
        return bisect.bisect_right(self.starts, at) - 1

    def read_scopes(self):
        """The headers around each `unsafe`, outermost first, and where its statement begins."""
        scopes, begins, stack = {}, {}, []
        start, brackets = 0, 0
        for found in re.finditer(r"[{}()\[\];]|\bunsafe\b", self.code):
            token, at = found[0], found.start()
            if token == "unsafe":
                scopes[at] = [header for header, _, _ in stack]
                begins[at] = start
            elif token == "{":
                stack.append((" ".join(self.code[start:at].split()), start, brackets))
                start, brackets = at + 1, 0
            elif token == "}":
                _, _, brackets = stack.pop()
                start = at + 1
            elif token == ";":
                if not brackets:
                    start = at + 1
            else:
                brackets += 1 if token in "([" else -1
        return scopes, begins

    def above(self, line):
        """The comment that ends right above a line, attributes apart."""
        text = []
        for before in range(line - 1, -1, -1):
            if re.fullmatch(r"\s*#\[.*\]\s*", self.lines[before]):
                continue
            if before not in self.comments or self.lines[before].strip():
                break
            text.append(self.comments[before])
        return text[::-1]

    def safety(self, at):
        """The invariant in a comment above a place or its statement, if there is one."""
        begin = re.compile(r"\s*").match(self.code, self.begins[at]).end()
        for line in dict.fromkeys([self.line(at), self.line(begin)]):
            text = [re.sub(r"^//[/!]?\s?", "", comment) for comment in self.above(line)]
            for number, comment in enumerate(text):
                if comment.startswith("SAFETY:"):
                    return " ".join([comment[len("SAFETY:") :], *text[number + 1 :]]).strip()
                if comment.strip() == "# Safety":
                    section = []
                    for comment in text[number + 1 :]:
                        if comment.startswith("# "):
                            break
                        section.append(comment)
                    return " ".join(" ".join(section).split())
        return None


KIND = re.compile(
    r"""unsafe\s*(?:
    (?P<block>\{)
    | (?P<impl>impl)\b
    | (?P<trait>trait)\s+(?P<trait_name>\w+)
    | (?P<fn>(?:extern\s+)?fn)\s+(?P<fn_name>[\w$]+)
    | (?P<type>(?:extern\s+)?fn\s*\()
    | (?P<attribute>\(\s*(?P<word>\w+)\s*\))
    | (?P<foreign>extern\s*\{)
    )""",
    re.X,
)


def owner(scopes):
    """`Type::function` of the innermost function, or what is around."""
    names = []
    for header in scopes:
        if found := re.search(r"\bfn\s+([\w$]+)", header):
            names = [name for name in names if name[0] == "type"] + [("fn", found[1])]
        elif found := re.search(r"\bimpl\b.*?\bfor\s+([^{]*)$|\bimpl\b(?:<[^{]*?>)?\s*([^{]*)$", header):
            kind = re.sub(r"<.*|\bwhere\b.*", "", found[1] or found[2]).strip()
            names = [("type", kind)]
        elif found := re.search(r"\btrait\s+(\w+)|\bmacro_rules!\s*(\w+)", header):
            names = [("type", found[1] or found[2] + "!")]
    return "::".join(name for _, name in names) or "(module)"


def trait_of(scopes):
    """The trait of the innermost impl."""
    for header in reversed(scopes):
        if found := re.search(r"\bimpl\b(?:<.*?>)?\s+([\w:]+)(?:<.*>)?\s+for\b", header):
            return found[1].split("::")[-1]
    return None


def rows(source, traits, exported, wrong):
    """(what, where, invariant) of every `unsafe` in a file; what lacks one goes to `wrong`."""
    for at, scopes in source.scopes.items():
        place = f"{source.name}:{source.line(at) + 1}"
        kind = KIND.match(source.code, at)
        if not kind:
            raise Wrong(f"{place}: an `unsafe` of no known kind")
        if kind["type"]:
            continue
        where, said = owner(scopes), source.safety(at)
        if kind["attribute"]:
            function = re.compile(r"\bfn\s+(\w+)").search(source.code, at)
            what, where = f"`{kind['word']}`", function[1]
            said = said or (exported(function[1]) and "the header declares this name")
        elif kind["fn"]:
            what, name = "fn", kind["fn_name"]
            trait = trait_of(scopes)
            if trait:
                if (trait, name) in traits:
                    said = said or "of the trait"
                elif trait not in {trait for trait, _ in traits}:
                    said = said or f"of the trait: `{trait}` of another crate"
            elif exported(name):
                said = said or "the header says what it asks for"
            where = f"{where}::{name}" if where != "(module)" else name
        elif kind["trait"]:
            what, where = "trait", kind["trait_name"]
        elif kind["impl"]:
            what = "impl"
            end = source.code.index("{", at)
            where = " ".join(source.code[at + len("unsafe impl") : end].split())
        else:
            what = "extern" if kind["foreign"] else "block"
        if said:
            yield what, where, said
        else:
            wrong.append(f"{place}: {what} in {where} has no invariant: write `// SAFETY:` above it, or `# Safety` in its documentation")


def traits_with_safety(sources):
    """(trait, function) of the unsafe functions that traits of this project declare."""
    found = set()
    for source in sources:
        for at, scopes in source.scopes.items():
            kind = KIND.match(source.code, at)
            trait = scopes and re.search(r"\btrait\s+(\w+)", scopes[-1])
            if trait and kind and kind["fn"] and source.safety(at):
                found.add((trait[1], kind["fn_name"]))
    return found


def tests_of(source, used):
    """The tests of a file; each is there."""
    if re.search(r"#\[test\]|\bfuzz_target!|\bproptest!", source.code) and re.search(r"/tests/|/tests\.rs$|/model\.rs$", source.name):
        return ["this file"]
    for pattern, tests in TESTS:
        if pathlib.PurePosixPath(source.name).match(pattern):
            used.add(pattern)
            return tests
    raise Wrong(f"{source.name}: has `unsafe`, but TESTS of tools/unsafe_table.py names no test that runs it")


def check_tests():
    for _, tests in TESTS:
        for test in tests:
            if test.startswith("("):
                continue
            file, *names = test.split()
            path = ROOT / file
            if not path.is_file():
                raise Wrong(f"TESTS of tools/unsafe_table.py: there is no {file}")
            code = split(path.read_text())[0] if path.suffix == ".rs" else ""
            for name in names:
                test_function = rf"#\[test\]\s*(?:#\[[^\]]*\]\s*)*fn\s+{name}\b"
                suite = rf"\bmod\s+{name}\s*\{{|!\(\s*{name}\s*,|\bwith\s+{name}\s*\)"
                if not re.search(rf"{test_function}|{suite}", code):
                    raise Wrong(f"TESTS of tools/unsafe_table.py: {file} has no test {name}")


def shown(test):
    if test.startswith("(") or " " not in test:
        return test
    file, *names = test.split()
    return f"{file} ({', '.join(names)})"


def cell(text):
    """Links of rustdoc lead nowhere here."""
    return re.sub(r"\[(.*?)\](?:\(.*?\))?", r"\1", text).replace("|", "\\|")


def table():
    paths = [path for manifest in sorted(ROOT.glob("*/Cargo.toml")) for path in sorted(manifest.parent.rglob("*.rs"))]
    sources = [Source(path) for path in paths if "target" not in path.relative_to(ROOT).parts]
    sources = [source for source in sources if source.scopes]
    declared = (ROOT / HEADER).read_text()
    exported = lambda name: re.search(rf"\b{name}\s*\(", declared)
    traits = traits_with_safety(sources)
    check_tests()
    used, wrong, counts, sections = set(), [], collections.Counter(), []
    for source in sources:
        grouped = {}
        for what, where, said in rows(source, traits, exported, wrong):
            counts[source.name.split("/")[0], what] += 1
            grouped.setdefault((said, what), collections.Counter())[where] += 1
        if not grouped:
            continue
        lines = [f"## {source.name}", "", f"Run by: {'; '.join(map(shown, tests_of(source, used)))}", ""]
        lines += ["| invariant | what | where |", "|---|---|---|"]
        for (said, what), places in grouped.items():
            total = sum(places.values())
            where = ", ".join(f"`{place}`" + (f" ×{times}" if times > 1 else "") for place, times in places.items())
            lines.append(f"| {cell(said)} | {what}{f' ×{total}' if total > 1 else ''} | {cell(where)} |")
        sections.append("\n".join(lines))
    if wrong:
        raise Wrong("\n".join(wrong))
    if stale := [pattern for pattern, _ in TESTS if pattern not in used]:
        raise Wrong(f"TESTS of tools/unsafe_table.py: no file with `unsafe` fits {', '.join(stale)}")
    crates = sorted({crate for crate, _ in counts})
    kinds = [kind for kind in ["block", "fn", "impl", "trait", "extern", "`no_mangle`"] if any(counts[crate, kind] for crate in crates)]
    if strange := {kind for _, kind in counts} - set(kinds):
        raise Wrong(f"no column for {strange}")
    summary = [f"| crate | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    summary += [f"| {crate} | {' | '.join(str(counts[crate, kind] or '–') for kind in kinds)} |" for crate in crates]
    return "\n\n".join([INTRODUCTION.rstrip(), "\n".join(summary), *sections]) + "\n"


def main():
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit(__doc__)
    try:
        text = table()
    except Wrong as wrong:
        sys.exit(str(wrong))
    if not sys.argv[1:]:
        sys.stdout.write(text)
    elif not DOCUMENT.is_file() or DOCUMENT.read_text() != text:
        sys.exit(f"tools/unsafe_table.py: {DOCUMENT.relative_to(ROOT)} is not what the sources say; write it anew with `tools/unsafe_table.py > docs/unsafe.md`")


if __name__ == "__main__":
    main()
