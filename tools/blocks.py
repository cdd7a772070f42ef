#!/usr/bin/env python3
"""Executes the code blocks of README and docs, or says why one is not.

    tools/blocks.py [DOCUMENT...]

- ```sh is run in a folder where `leank demo` has been, with every folder of the repository beside it; the
  blocks of a document one after the other. `cargo run --release -p leank --` and `leank` are a build here, `cargo
  install` does nothing, `srun` runs its command. "```sh no-run: WHY" is only parsed.
- ```python is run there too; what it leaves as `dump` is learned from. ```yaml and ```toml are parsed.
- ```rust must stand in a document that some lib.rs includes, whose doctests run it.
- Of every line that begins with `leank`, also in indented blocks, the command's --help must have the options.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("*/README.md")), ROOT / "leank/demo/README.md"]
PRELUDE = """
set -euo pipefail
cargo() {
    case "$1 $2" in
        "install --path") ;;
        "run --release") [ "$3 $4 $5" = "-p leank --" ]; shift 5; leank "$@" ;;
        *) echo "cargo $*: not here" >&2; return 1 ;;
    esac
}
# The demo in small: its full size is minutes in a debug build. Where it was made before it stands for itself.
leank() {
    if [ "$1" != demo ]; then command leank "$@"
    elif [ ! -e leank-demo/report.html ]; then rm -rf leank-demo; shift; command leank demo --context 1024 --items 2 "$@"
    fi
}
srun() { "$@"; }
export SLURM_ARRAY_TASK_ID=0 SLURM_CPUS_PER_TASK=2 DUMP=leank-demo/dump RECORDS=records
"""


class Fence:
    def __init__(self, path, line, info):
        self.where, self.path = f"{path.relative_to(ROOT)}:{line}", path
        language, _, rest = info.partition(" ")
        self.language, self.text = language.split(",")[0], ""
        self.reason = rest.removeprefix("no-run:").strip() if rest.startswith("no-run:") else None


def read(path):
    """Fenced blocks, and lines of indented ones."""
    fences, indented, fence = [], [], None
    for at, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            if fence is None:
                fence = Fence(path, at, line[3:].strip())
                # Markdown takes no backtick there (the block would begin where it ends), rustdoc no apostrophe.
                if re.search("[`']", line[3:]):
                    raise SystemExit(f"{fence.where}: a quote or backtick behind the language")
            else:
                fences.append(fence)
                fence = None
        elif fence is not None:
            fence.text += line + "\n"
        elif line.startswith("    "):
            indented.append((f"{path.relative_to(ROOT)}:{at}", line))
    if fence is not None:
        raise SystemExit(f"{fence.where}: the block does not end")
    return fences, indented


def run(command, **options):
    return subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, **options)


def options_of(leank, known, command):
    if command not in known:
        known[command] = set(re.findall(r"--[a-z][a-z-]+", run([leank, command, "--help"]).stdout))
    return known[command]


def check_options(leank, where, text, known):
    failures = []
    for line in text.replace("\\\n", " ").splitlines():
        found = re.match(r"\s*(?:srun )?leank +([a-z]+)(.*)", line)
        if not found or found[1] not in COMMANDS:
            continue
        # Behind # stands a comment.
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", found[2].split(" #")[0]):
            if option not in options_of(leank, known, found[1]):
                failures.append(f"{where}: leank {found[1]} has no {option}")
    return failures


COMMANDS = "demo dump learn merge eval check inspect convert plan report shard generate completions man".split()


def main():
    # python -m pip installs what a block imports, where it is missing.
    packages = ROOT / "target/ci/blocks"
    missing = [name for name in ("numpy", "safetensors", "yaml") if run([sys.executable, "-c", f"import {name}"]).returncode]
    if missing:
        wheels = ["pyyaml" if name == "yaml" else name for name in missing]
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--root-user-action=ignore", "--upgrade", "--target", packages, *wheels], check=True)
        sys.path.insert(0, str(packages))
    # As the tests build it: with optimisation.
    build = "cargo build --quiet --profile test --workspace --all-features --bin leank"
    subprocess.run(build.split(), cwd=ROOT, check=True)
    built = pathlib.Path(subprocess.check_output([ROOT / "tools/target_dir.sh"], text=True).strip()) / "debug"
    environment = {**os.environ, "PATH": f"{built}:{os.environ['PATH']}", "PYTHONPATH": str(packages)}
    doctested = "".join(path.read_text() for path in ROOT.glob("*/src/lib.rs"))

    demo = ROOT / "target/ci/demo"
    demo.mkdir(parents=True, exist_ok=True)
    made = run(["bash", "-c", PRELUDE + "leank demo --progress none"], cwd=demo, env=environment)
    assert made.returncode == 0, made.stdout

    failures, known, ran, left = [], {}, 0, []
    for path in [pathlib.Path(own).resolve() for own in sys.argv[1:]] or DOCUMENTS:
        fences, indented = read(path)
        for where, line in indented:
            failures += check_options(built / "leank", where, line, known)
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            for entry in ROOT.iterdir():
                if entry.name not in ("target", ".git"):
                    (folder / entry.name).symlink_to(entry)
            if any(fence.language in ("sh", "python") and fence.reason is None for fence in fences):
                shutil.copytree(demo / "leank-demo", folder / "leank-demo")
            for fence in fences:
                failures += check_options(built / "leank", fence.where, fence.text, known)
                problem = None
                if fence.reason is not None:
                    left.append(f"{fence.where}: {fence.reason or 'NO REASON'}")
                    parsed = run(["bash", "-n", "-c", fence.text])
                    problem = parsed.stdout if parsed.returncode else None if fence.reason else "no-run: needs a reason"
                elif fence.language == "sh":
                    done = run(["bash", "-c", PRELUDE + fence.text], cwd=folder, env=environment)
                    problem = done.stdout[-3000:] if done.returncode else None
                elif fence.language == "python":
                    done = run([sys.executable, "-c", fence.text], cwd=folder, env=environment)
                    if done.returncode == 0 and (folder / "dump").is_dir():
                        learn = "leank learn dump --k-ratio 0.5 --align 4 --step 4 --out mask.safetensors"
                        done = run(["bash", "-c", PRELUDE + learn], cwd=folder, env=environment)
                    problem = done.stdout[-3000:] if done.returncode else None
                elif fence.language == "yaml":
                    import yaml

                    yaml.safe_load(fence.text)
                elif fence.language == "toml":
                    import tomllib

                    tomllib.loads(fence.text)
                elif fence.language == "rust":
                    if not re.search(rf'include_str!\("[./]*{re.escape(doctest_name(path))}"', doctested):
                        problem = "no lib.rs includes this document: its Rust is not tested"
                elif fence.language != "text":
                    problem = f"a block of {fence.language or 'no language'}: say sh, python, rust, yaml, toml or text"
                if problem:
                    failures.append(f"{fence.where}: {problem}")
                elif fence.reason is None and fence.language in ("sh", "python"):
                    ran += 1
                    print(f"{fence.where}: ran", flush=True)
    print(*left, sep="\n")
    print(f"{ran} blocks ran, {len(left)} did not")
    if failures:
        raise SystemExit("\n".join(["", *failures]))


def doctest_name(path):
    """How a lib.rs includes a document."""
    relative = path.relative_to(ROOT)
    return relative.name if relative.name == "README.md" else str(relative)


if __name__ == "__main__":
    main()
