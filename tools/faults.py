#!/usr/bin/env python3
"""Kills and disks that fail, at every command of `leank` that writes.

    tools/faults.py kills [--times 200]   # kill -9 at random moments
    tools/faults.py sizes                 # files that may not grow beyond some size, for many sizes
    tools/faults.py calls                 # every call that writes fails, then kills, in turn; needs strace

After each fault every file is the old one or the new one to the byte (of a dump and of a split, which are several
files, all of them are), a command that could not write says so and which file, and leaves nothing else behind. Then
the same command is run again: it ends as if nothing had been, to the bit, and no temporary file is left. Linux.
"""

import argparse
import collections
import dataclasses
import hashlib
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent

DUMP = "dump --model model --text text.txt --sequences 3 --positions 16 --prefix 300..400 --out dump"
LEARN = "learn dump --align 8 --sink 4 --recent 8"
FORMATS = "--formats k16,k8,k4,v16,v8,v4 --bytes 0.3"

# Calls that write; of openat those that make a file.
CALLS = "openat,write,pwrite64,ftruncate,fsync,rename,renameat,renameat2,mkdir,mkdirat,unlink,unlinkat,rmdir".split(",")
# Failing at these leaves a file that should go: no reason to fail, but for the next run to sweep.
SWEEPING = {"unlink", "unlinkat", "rmdir"}


@dataclasses.dataclass
class Scenario:
    """A command, what comes before it, and which of the files that it writes belong together."""

    name: str
    before: list
    command: str
    groups: list = dataclasses.field(default_factory=list)


SCENARIOS = [
    Scenario("dump", [], f"{DUMP} --save-tokens tokens.json", ["dump/"]),
    Scenario("dump over a dump", [DUMP], f"{DUMP} --seed 1 --overwrite", ["dump/"]),
    Scenario("learn", [DUMP], f"{LEARN} {FORMATS} --out mask.safetensors"),
    Scenario(
        "learn over a mask",
        [DUMP, f"{LEARN} --k-ratio 0.5 --out mask.safetensors --pareto front"],
        f"{LEARN} --bytes 0.6 --formats k16,k8,v16 --out mask.safetensors --pareto front",
    ),
    Scenario("learn some layers", [DUMP], f"{LEARN} {FORMATS.split(' --')[0]} --layers 1..3 --records own"),
    Scenario(
        "merge",
        [DUMP, f"{LEARN} --layers 0..2 --records a", f"{LEARN} --layers 1..4 --records b"],
        "merge a b --out all",
    ),
    Scenario("convert over a mask", ["shard {mask} --world 1 --out split"], "convert {mask} mask.npy"),
    Scenario("shard over a split", ["shard {other} --world 2 --out split"], "shard {mask} --world 1 --out split", ["split/"]),
    Scenario("report", ["report --mask {other} --out page.html"], "report --mask {mask} --out page.html --figures figures"),
]


class World:
    """A folder to run commands in, beside what they read."""

    def __init__(self, leank, folder):
        self.leank, self.folder = leank, folder
        self.given = folder / "given"
        self.given.mkdir()
        (self.given / "model").symlink_to(ROOT / "leank/demo/model")
        text = (ROOT / "leank/demo/learn.txt").read_bytes()[:20_000]
        (self.given / "text.txt").write_bytes(text)
        shutil.copy(ROOT / "leank/demo/mask.safetensors", self.given / "mask.safetensors")
        self.here = folder / "here"
        self.fresh([])
        self.run(DUMP)
        for name, ratio in [("mask", 0.5), ("other", 0.7)]:
            self.run(f"{LEARN} --k-ratio {ratio} --out {self.given / name}.safetensors")

    def words(self, command):
        command = command.format(mask=self.given / "mask.safetensors", other=self.given / "other.safetensors")
        return [str(self.leank), *command.split(), "--quiet"]

    def run(self, command):
        subprocess.run(self.words(command), cwd=self.here, check=True, capture_output=True)

    def fresh(self, commands):
        """The folder as these commands leave it."""
        if self.here.exists():
            shutil.rmtree(self.here)
        self.here.mkdir()
        for name in ["model", "text.txt"]:
            (self.here / name).symlink_to(self.given / name)
        for command in commands:
            self.run(command)

    def files(self):
        """What is there; a journal in a finished dump does no harm."""
        found = {}
        for path in sorted(self.here.rglob("*")):
            name = str(path.relative_to(self.here))
            if path.is_symlink() or name == "dump/written.txt":
                continue
            if path.is_dir():
                found[name] = "a folder"
            else:
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found


class Trial:
    """One scenario, with what it begins and ends with."""

    def __init__(self, world, scenario):
        self.world, self.scenario = world, scenario
        world.fresh(scenario.before)
        self.kept = world.folder / f"before {scenario.name}"
        shutil.copytree(world.here, self.kept, symlinks=True)
        self.old = world.files()
        began = time.monotonic()
        world.run(scenario.command)
        self.seconds = time.monotonic() - began
        self.new = world.files()
        assert self.old != self.new, scenario.name

    def reset(self):
        shutil.rmtree(self.world.here)
        shutil.copytree(self.kept, self.world.here, symlinks=True)

    def check(self, fault, may_leave=False):
        """Old or new, file by file, and group by group."""
        found = self.world.files()
        wrong = []
        for name, digest in found.items():
            if name in self.old or name in self.new:
                if digest not in (self.old.get(name), self.new.get(name)):
                    wrong.append(f"{name} is neither the old nor the new one")
            elif not may_leave:
                wrong.append(f"{name} is left")
        for name in self.old:
            if name in self.new and name not in found and not self.group(name):
                wrong.append(f"{name} is lost")
        for group in self.scenario.groups:
            own = [n for n in self.old.keys() | self.new.keys() if n.startswith(group)]
            states = [{n: files.get(n) for n in own} for files in (found, self.old, self.new)]
            # Without its listing a split is none.
            unlisted = group == "split/" and "split/partition.json" not in found
            if states[0] not in states[1:] and not unlisted:
                wrong.append(f"{group} is a mixture: {states[0]}")
        self.report(fault, wrong)

    def group(self, name):
        return any(name.startswith(group) for group in self.scenario.groups)

    def again(self, fault):
        """The next run ends as if nothing had been."""
        if self.world.files() == self.new:
            return
        words = self.world.words(self.scenario.command)
        ended = subprocess.run(words, cwd=self.world.here, capture_output=True, text=True)
        wrong = [f"the next run failed: {ended.stderr}"] if ended.returncode else []
        found = self.world.files()
        differ = sorted(n for n in found.keys() | self.new.keys() if found.get(n) != self.new.get(n))
        wrong += [f"after the next run these differ: {differ}"] if differ else []
        self.report(fault, wrong)

    def report(self, fault, wrong):
        if wrong:
            raise SystemExit(f"FAILED: {self.scenario.name}, {fault}: " + "; ".join(wrong))

    def failed(self, fault, ended, words):
        """It must say why, in one line, with exit code 1."""
        wrong = []
        if ended.returncode != 1:
            wrong.append(f"exit code {ended.returncode}")
        said = ended.stderr.strip()
        if "\n" in said or not said.startswith("leank: ") or not any(word in said for word in words):
            wrong.append(f"said {said!r}")
        names = {pathlib.PurePath(name).parts[0].split(".")[0] for name in self.new.keys() - set(["text.txt"])}
        if not any(name in said for name in names):
            wrong.append(f"names no file: {said!r}")
        self.report(fault, wrong)


def kills(world, args, scenarios):
    """kill -9 at random moments of a run, again and again until a run ends by itself."""
    rng = random.Random(args.seed)
    counts = collections.Counter()
    trials = [Trial(world, scenario) for scenario in scenarios]
    while sum(counts.values()) < args.times:
        trial = min(trials, key=lambda trial: counts[trial.scenario.name])
        scenario = trial.scenario
        trial.reset()
        # A chain of kills; what one left is what the next begins with.
        for _ in range(1 + args.times // (4 * len(scenarios))):
            if world.files() == trial.new:
                break
            moment = rng.uniform(0, trial.seconds)
            words = world.words(scenario.command)
            child = subprocess.Popen(words, cwd=world.here, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            try:
                child.wait(moment)
                if child.returncode:
                    raise SystemExit(f"FAILED: {scenario.name}: {child.stderr.read().decode()}")
                break
            except subprocess.TimeoutExpired:
                child.kill()
                counts[scenario.name] += child.wait() == -signal.SIGKILL
                trial.check(f"killed after {moment:.3f} s", may_leave=True)
        trial.again("killed")
    for name, count in counts.items():
        print(f"{count:5} kills: {name}")
    print(f"{sum(counts.values()):5} kills in all; every mask, dump, record, split and page as without them")


def sizes(world, args, scenarios):
    """No file may grow beyond a size: short writes, then errors; or the signal that ends the process."""
    count = 0
    for scenario in scenarios:
        trial = Trial(world, scenario)
        written = [path.stat().st_size for path in world.here.rglob("*") if path.is_file() and not path.is_symlink()]
        largest = max(written)
        limits = {0, 1, largest - 1} | {size - 1 for size in written} | {largest * i // args.steps for i in range(args.steps)}
        for limit in sorted(limit for limit in limits if 0 <= limit < largest):
            for dies in [False, True]:
                trial.reset()

                def restrict():
                    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if dies else signal.SIG_IGN)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

                ended = subprocess.run(
                    world.words(scenario.command), cwd=world.here, capture_output=True, text=True,
                    preexec_fn=restrict, restore_signals=False,
                )  # fmt: skip
                fault = f"files up to {limit} bytes"
                if ended.returncode and not dies:
                    trial.failed(fault, ended, ["too large", "too big"])
                trial.check(fault, may_leave=dies)
                trial.again(fault)
                count += ended.returncode != 0
        print(f"{scenario.name}: {len(limits)} sizes", flush=True)
    print(f"{count} runs that could not write, or were ended by SIGXFSZ")


def written_calls(world, trial, trace):
    """Calls of an undisturbed run that write: name, number among those of its name and thread, descriptor."""
    trial.reset()
    options = ["strace", "-f", "-qq", "-s", "8", "-o", str(trace), "-e", "trace=" + ",".join(CALLS)]
    words = world.words(trial.scenario.command)
    subprocess.run([*options, *words, "--threads", "1"], cwd=world.here, check=True, stdout=subprocess.DEVNULL)
    counts, found = collections.Counter(), {}
    for line in trace.read_text().splitlines():
        match = re.match(r"(\d+)\s+(\w+)\((\w*)", line)
        if not match:
            continue
        thread, call, first = match.groups()
        counts[thread, call] += 1
        if call == "openat" and "O_CREAT" not in line:
            continue
        # Nobody is told of what standard error does not take.
        if call == "write" and first == "2":
            continue
        found[call, counts[thread, call]] = first
    return found


def calls(world, args, scenarios):
    """Every call that writes fails in turn; then it is where the process is killed."""
    if not shutil.which("strace"):
        print("strace is missing: apt-get install strace", file=sys.stderr)
        raise SystemExit(3)
    trace, total = world.folder / "trace", collections.Counter()
    for scenario in scenarios:
        trial = Trial(world, scenario)
        found = written_calls(world, trial, trace)
        picked = sorted(found)[:: args.every]
        for call, number in picked:
            first = found[call, number]
            error = "EIO" if call == "fsync" else "ENOSPC"
            for what in [f"error={error}", "signal=KILL"]:
                trial.reset()
                inject = f"inject={call}:{what}:when={number}"
                strace = ["strace", "-f", "-qq", "-s", "8", "-o", str(trace), "-e", f"trace={call}", "-e", inject]
                words = [*strace, *world.words(scenario.command), "--threads", "1"]
                ended = subprocess.run(words, cwd=world.here, capture_output=True, text=True)
                fault = f"{call} number {number}, {what}"
                killed = what == "signal=KILL"
                # The number is one of every thread's calls: the message itself may be among them.
                mute = re.search(r"write\(2,.*INJECTED", trace.read_text())
                if ended.returncode and not killed and not mute and not (call == "write" and first == "1"):
                    trial.failed(fault, ended, ["No space left", "no space left", "nput/output error"])
                if not ended.returncode:
                    trial.report(fault, [] if world.files().items() >= trial.new.items() else ["it went unnoticed"])
                trial.check(fault, may_leave=killed or call in SWEEPING)
                trial.again(fault)
                total[what.split("=")[0], ended.returncode != 0] += 1
        print(f"{scenario.name}: {len(picked)} of {len(found)} calls", flush=True)
    print(f"{total['error', True]} errors that were told, {total['error', False]} that cost nothing")
    print(f"{total['signal', True]} kills")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kills", "sizes", "calls"])
    parser.add_argument("--leank", type=pathlib.Path, default=ROOT / "target/release/leank", help="the command")
    parser.add_argument("--only", help="the scenarios with this in their names")
    parser.add_argument("--times", type=int, default=200, help="kills")
    parser.add_argument("--steps", type=int, default=24, help="sizes of a scenario, beside those of its files")
    parser.add_argument("--every", type=int, default=1, help="only every so manyth call")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.leank = args.leank.resolve()
    scenarios = [own for own in SCENARIOS if not args.only or args.only in own.name]
    with tempfile.TemporaryDirectory() as folder:
        world = World(args.leank, pathlib.Path(folder))
        {"kills": kills, "sizes": sizes, "calls": calls}[args.what](world, args, scenarios)


if __name__ == "__main__":
    main()
