#!/usr/bin/env python
"""Checks the compiled ops on this machine's GPU, then times them and the whole training step. Made for a GPU that is
there for a quarter of an hour: the most telling results come first, and nothing that fails, hangs or crashes keeps a
later step from running.

parts, each a call of its own, or one behind the other in one call without an option:
  --first   what machine it is, every kernel once, the ops' benchmark, the ops' tests, torch.compile (500 seconds)
  --then    Nsight Compute on single kernels, memcheck, the training step (180 seconds)
  --rest    what those have no time for: racecheck, other workloads, DALI, loaders (no limit as a whole)

Every step is a process with a time limit of its own, named by --plan. DIR gets steps.csv (one row a step),
gpu_check.log (what every step printed, as it was printed: it outlives a kill), environment.json and the benchmarks'
tables. A second call with the same DIR does only what is not yet ok there; --again does a step once more. Rows are
never added to results/: copy the good ones there. The exit status is 1 if a step failed, 2 if nothing was tried.

Without a GPU every step runs what it can on the CPU, which shows that the command lines and the tests are in order.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import pathlib
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import built_from
from gpu_steps import ENVIRONMENT, PARTS, STEPS, Step

ROOT = pathlib.Path(__file__).resolve().parent.parent
COLUMNS = ("step", "part", "result", "seconds", "expected", "what", "device", "tree")
MOST_LOG = 1 << 20  # bytes of one step's output that are kept
ON_CPU_SLOWER = 10  # than a GPU's machine: limits without a GPU
LEAST_SECONDS = 5  # that a step is begun for
BOOT = pathlib.Path("/proc/sys/kernel/random/boot_id")  # another one after every start of a machine


class Refused(Exception):
    """Nothing can be tried; the text says why and what to do."""


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="gpu_check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    for part in PARTS:
        which.add_argument(f"--{part}", dest="parts", action="store_const", const=[part])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/gpu_check"), metavar="DIR",
                        help="default: %(default)s")  # fmt: skip
    parser.add_argument("--pack", type=pathlib.Path, metavar="DIR",
                        help="what scripts/gpu_pack made (default: gpu_pack, where it is there)")  # fmt: skip
    parser.add_argument("--again", nargs="+", default=[], metavar="STEP", help="do these although they are ok")
    parser.add_argument("--plan", action="store_true", help="print steps, expected seconds and limits; do nothing")
    args = parser.parse_args(argv)
    args.parts = args.parts or ["first", "then"]
    return args


# --------------------------------------------------------------------------------------------------------------------
# what the steps are done with


def tree_hash() -> str:
    """Of all that the results depend on: a result of another tree is done again."""
    folders = ("csrc", "ijckd_fast", "scripts", "tests")
    suffixes = {".py", ".cpp", ".h", ".cu", ".cuh", ".sh"}
    paths = sorted(p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in suffixes)
    return hashlib.sha256(b"".join(str(p.relative_to(ROOT)).encode() + p.read_bytes() for p in paths)).hexdigest()[:10]


def take_pack(pack: pathlib.Path | None) -> pathlib.Path | None:
    """The pack's folder; its libraries are put where ours belong. Refused: there is none, or it is of other sources."""
    if pack is None:
        pack = ROOT / "gpu_pack"
        if not pack.is_dir():
            return None
    if not (pack / "pack.json").exists():
        raise Refused(f"--pack: {pack} is no pack (it has no pack.json): make one with scripts/gpu_pack --out {pack}")
    for name in built_from.LIBRARIES:
        if fault := built_from.fault(pack / name):
            raise Refused(f"{fault}: make the pack again, with scripts/gpu_pack")
        here = ROOT / "ijckd_fast/head" / name
        if built_from.fault(here):
            here.unlink(missing_ok=True)  # never write into a mapped library
            shutil.copy2(pack / name, here)
    return pack.resolve()


def check_libraries() -> None:
    """Refused: those that lie in the checkout are of other sources, or there is none."""
    for name in built_from.LIBRARIES:
        library = ROOT / "ijckd_fast/head" / name
        if name == "_C_cuda.so" and not library.exists():
            continue  # the CPU half needs none; on a GPU the first step says so
        if fault := built_from.fault(library):
            raise Refused(f"{fault}: build with scripts/test, or bring a pack made by scripts/gpu_pack (--pack)")


def unpack_wheels(pack: pathlib.Path | None, into: pathlib.Path) -> None:
    """The pack's wheels, which are pure Python."""
    for wheel in sorted((pack / "wheels").glob("*.whl")) if pack else ():
        with zipfile.ZipFile(wheel) as file:
            file.extractall(into)


def variables(pack: pathlib.Path | None, site: pathlib.Path) -> dict[str, str]:
    """The environment of every step."""
    path = [str(ROOT), *([os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []), str(site)]
    found = dict(os.environ, PYTHONPATH=os.pathsep.join(path))
    found |= {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "OMP_WAIT_POLICY": "PASSIVE", "COLUMNS": "140"}
    if pack:
        found["IJCKD_INSTRUCTIONS_IN"] = str(pack)
    found.pop("IJCKD_GPU_TESTS_ON", None)
    return found


# --------------------------------------------------------------------------------------------------------------------
# one step


def run(command: str, env: dict[str, str], limit: float, log: pathlib.Path) -> tuple[str, float, str]:
    """(result, seconds, the last telling line) of a command whose output is appended to the log."""
    began, start = time.monotonic(), log.stat().st_size if log.exists() else 0
    with log.open("ab") as file:
        try:
            process = subprocess.Popen(
                shlex.split(command), stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env,
                cwd=ROOT, start_new_session=True, preexec_fn=no_core,
            )  # fmt: skip
        except OSError as error:
            file.write(f"{error}\n".encode())
            return f"failed ({error.strerror})", 0.0, command.split()[0]
        try:
            code = process.wait(limit)
            result = "ok" if code == 0 else f"failed ({code})" if code > 0 else f"died of {signal.Signals(-code).name}"
        except subprocess.TimeoutExpired:
            result = "time limit"
        finally:
            end_all(process)
    shorten(log, start)
    return result, time.monotonic() - began, last_line(log, start)


def no_core() -> None:
    """A crash must not fill the disk."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def end_all(process: subprocess.Popen) -> None:
    """The step's processes, children that outlived it too: first by a signal at which Python says where it was."""
    for sent, patience in ((signal.SIGABRT, 3.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, sent)
        except ProcessLookupError:
            return
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue  # a process that waits for a dead GPU cannot be killed: go on without it
        time.sleep(0.1)


def shorten(log: pathlib.Path, start: int) -> None:
    """Leaves the ends of what was printed since `start` if it is more than a step may keep."""
    with log.open("r+b") as file:
        size = file.seek(0, os.SEEK_END) - start
        if size <= MOST_LOG:
            return
        file.seek(start + size - MOST_LOG // 2)
        tail = file.read()
        file.seek(start + MOST_LOG // 2)
        file.write(f"\n... {size - MOST_LOG} bytes left out ...\n".encode() + tail)
        file.truncate()


def last_line(log: pathlib.Path, start: int) -> str:
    """pytest's count, the benchmark's, the sanitizer's: the last line, but for the benchmark's JSON."""
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    telling = [line.strip(" =") for line in lines if line.strip() and not line.startswith("{")]
    return telling[-1][:100] if telling else ""


# --------------------------------------------------------------------------------------------------------------------
# all of them


class Check:
    """A call: what was done before, what is known of the machine, and the table of steps."""

    def __init__(
        self, out: pathlib.Path, pack: pathlib.Path | None, again: Sequence[str], steps: Sequence[Step]
    ) -> None:
        self.out, self.pack, self.again, self.steps = out, pack, set(again), steps
        self.log, self.table = out / "gpu_check.log", out / "steps.csv"
        self.tree, self.began = tree_hash(), time.monotonic()
        self.python = os.environ.get("PYTHON") or sys.executable
        self.site = tempfile.TemporaryDirectory()
        unpack_wheels(pack, pathlib.Path(self.site.name))
        self.env = variables(pack, pathlib.Path(self.site.name))
        self.machine: dict[str, Any] = {}
        self.rows: dict[str, dict[str, str]] = {}
        if self.table.exists():
            with self.table.open() as file:
                self.rows = {row["step"]: row for row in csv.DictReader(file)}

    @property
    def device(self) -> str:
        """The GPU's name, or cpu."""
        return self.machine.get("gpu") or "cpu"

    def record(self, step: Step, result: str, seconds: float, what: str) -> None:
        """One row a step, also while it runs: the table is whole whenever this process is killed."""
        row = dict(zip(COLUMNS, (step.name, step.part, result, f"{seconds:.1f}", f"{step.expected:g}",
                                 what.replace(",", ";"), self.device, self.tree), strict=True))  # fmt: skip
        self.rows[step.name] = row
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows.values())
        new = self.table.with_suffix(".new")
        new.write_text(text.getvalue())
        new.replace(self.table)

    def done(self, step: Step) -> bool:
        """Whether it is ok already, on such a device, with these sources, and not wanted again."""
        row = self.rows.get(step.name)
        known = row is not None and (row["result"], row["device"], row["tree"]) == ("ok", self.device, self.tree)
        return known and step.name not in self.again

    def command(self, step: Step) -> tuple[str | None, str]:
        """(the step's command, ""), or (None, why it is skipped)."""
        on_gpu = self.device != "cpu"
        command, tool = step.command if on_gpu else step.on_cpu, ""
        if command is None:
            return None, "needs a GPU"
        for package in step.packages:
            if "packages" in self.machine and not self.machine["packages"].get(package):
                return None, f"{package} is not installed here: scripts/gpu_pack can bring it"
        if on_gpu and step.tool:
            tool = self.machine.get("tools", {}).get(step.tool) or shutil.which(step.tool)
            if not tool:
                return None, f"{step.tool} is not installed here"
        return command.format(python=shlex.quote(self.python), out=shlex.quote(str(self.out)), tool=tool,
                              stage=self.stage()), ""  # fmt: skip

    def stage(self) -> int:
        """The highest stage of kernels up to which every smoke step was ok; 2 where there is none."""
        for stage in range(3):
            if self.rows.get(f"smoke stage {stage}", {}).get("result", "ok") != "ok":
                return max(stage - 1, 0)
        return 2

    def do(self, step: Step, seconds: float) -> None:
        """Runs it, for at most so many seconds."""
        command, reason = self.command(step)
        if command is None:
            self.record(step, "skipped", 0, reason)
            print(f"{step.name}: skipped: {reason}", flush=True)
            return
        shown = f"\n==== {step.name} (at most {seconds:.0f} s): {command}\n"
        print(shown.strip(), flush=True)
        with self.log.open("a") as file:
            file.write(shown)
        self.record(step, "running", 0, "")
        start = self.log.stat().st_size
        on_cpu = {"IJCKD_GPU_TESTS_ON": "cpu", "OMP_NUM_THREADS": "1"} if self.device == "cpu" else {}
        result, took, what = run(command, self.env | on_cpu | step.env, seconds, self.log)
        if step.name == ENVIRONMENT.name:
            self.learn()
        self.record(step, result, took, what)
        print(f"{step.name}: {result} ({took:.1f} s) {what}", flush=True)
        if result != "ok":
            print(tail(self.log, start), flush=True)

    def known(self) -> bool:
        """Whether the environment's step was ok with these sources since this machine was started."""
        row, found = self.rows.get(ENVIRONMENT.name), self.out / "environment.json"
        if row is None or (row["result"], row["tree"]) != ("ok", self.tree) or not found.exists():
            return False
        self.machine = json.loads(found.read_text())
        return self.machine.get("boot") == BOOT.read_text().strip()

    def learn(self) -> None:
        """What the environment's step wrote; where it failed, whether there is a GPU at all."""
        found = self.out / "environment.json"
        if found.exists():
            self.machine = json.loads(found.read_text())
        elif shutil.which("nvidia-smi") and not subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode:
            self.machine = {"gpu": "a GPU"}

    def part(self, name: str, environment: Step) -> None:
        """The steps of a part, in order, within its seconds."""
        end = None if PARTS[name] is None else time.monotonic() + PARTS[name]
        todo = [environment, *(step for step in self.steps if step.part == name)]
        for i, step in enumerate(todo):
            if step is not environment and self.done(step):
                print(f"{step.name}: ok before", flush=True)
                continue
            if step is environment and self.known():
                continue  # of the part before
            slower = 1 if self.device != "cpu" or step is environment else ON_CPU_SLOWER
            limit, left = step.limit * slower, float("inf")
            if end is not None and self.device != "cpu":
                left = end - time.monotonic()
                later = sum(each.expected for each in todo[i + 1 :] if not self.done(each))
                limit = min(limit, left, max(step.expected, left - later))
            if left < LEAST_SECONDS:
                self.record(step, "no time", 0, "the steps before took too long")
                continue
            self.do(step, limit)

    def summary(self, parts: Sequence[str]) -> int:
        """Prints the table of steps and the verdict; the exit status."""
        print()
        wanted = {step.name for step in self.steps if step.part in parts} | {ENVIRONMENT.name}
        rows = [row for row in self.rows.values() if row["step"] in wanted]
        for row in rows:
            print(f"{row['step']:22} {row['result']:16} {row['seconds']:>7} s of {row['expected']:>4}  {row['what']}")
        failed = [row["step"] for row in rows if row["result"] not in ("ok", "skipped")]
        seconds = time.monotonic() - self.began
        verdict = (
            f"{len(failed)} step{'s' * (len(failed) != 1)} FAILED: {'; '.join(failed)}" if failed else "all steps ok"
        )
        if skipped := [row["step"] for row in rows if row["result"] == "skipped"]:
            verdict += f" (skipped: {'; '.join(skipped)})"
        print(f"gpu_check on {self.device}: {verdict}, {seconds:.0f} s; log and rows in {self.out}", flush=True)
        return int(bool(failed))


def tail(log: pathlib.Path, start: int, lines: int = 30) -> str:
    """The last lines since `start`."""
    with log.open("rb") as file:
        file.seek(start)
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])


def plan(steps: Sequence[Step]) -> Iterator[str]:
    """Lines of --plan."""
    for part, whole in PARTS.items():
        its = [ENVIRONMENT._replace(part=part), *(step for step in steps if step.part == part)]
        expected = sum(step.expected for step in its)
        yield f"{part}: {expected:g} s expected" + ("" if whole is None else f" of at most {whole:g} s")
        for step in its:
            yield f"  {step.name:22} {step.expected:4g} s expected, at most {step.limit:4g} s"


def main(argv: Sequence[str] | None = None, steps: Sequence[Step] = STEPS, environment: Step = ENVIRONMENT) -> int:
    """Runs the command line; the exit status. steps, environment: other ones, for tests."""
    args = arguments(argv)
    if args.plan:
        print("\n".join(plan(steps)))
        return 0
    try:
        names = [step.name for step in steps if step.part in args.parts]
        if unknown := sorted(set(args.again) - set(names)):
            raise Refused(f"--again: there is no step {unknown[0]!r} in this part; known are {', '.join(names)}")
        pack = take_pack(args.pack)
        check_libraries()
        args.out.mkdir(parents=True, exist_ok=True)
    except (Refused, OSError) as reason:
        print(f"gpu_check: {reason}", file=sys.stderr)
        return 2
    check = Check(args.out.resolve(), pack, args.again, steps)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        for part in args.parts:
            check.part(part, environment)
    finally:
        status = check.summary(args.parts)
    return status


if __name__ == "__main__":
    sys.exit(main())
