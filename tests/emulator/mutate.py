"""Breaks the CUDA kernels on purpose, one small change at a time, and runs cases.py on each under the emulator: a
change that no case notices is a hole in the tests, unless it changes nothing that can be seen.

    python tests/emulator/mutate.py              all mutants, two at a time (hours)
    python tests/emulator/mutate.py --missing    those without a row: after a change to the kernels, or after a run that
                                                 was ended
    python tests/emulator/mutate.py --survivors  those that survived last time, after a change to the cases
    python tests/emulator/mutate.py --only STR   those of which file or code holds STR; goes with the others
    python tests/emulator/mutate.py --defer      judges none: gives each without a row one that says so, which --missing
                                                 then judges; test_mutants.py counts them as work that is left

mutants.csv has one row per mutant that has been judged: what was changed and what noticed. It is brought up to date as
the run goes on. `explanation` is written by hand for survivors, and kept.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import functools
import itertools
import math
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from emulator import block_cases, build, cases, class_map_cases, schedules, switched, tile_cases

TABLE = build.HERE / "mutants.csv"
KEY = ("file", "code", "nth", "column", "was", "became")
COLUMNS = ("file", "line", *KEY[1:], "verdict", "case", "explanation")
LONG = 0.4  # seconds; a longer case runs in the first order only
ROWS_AT_ONCE = 25  # the table is written again after so many verdicts
SURVIVED, NOT_COMPILED, TIMED_OUT, NOT_JUDGED = "survived", "does not compile", "time limit", "not judged"
TIME_LIMIT = 30  # seconds of the processor, of at most 5 that sound kernels take: other jobs do not count
FLAG = "-Wno-empty-body"  # of a statement removed after an `if`
FEW = 8  # mutants of a file: fewer are compiled one by one in less time than together
TOGETHER = 150  # mutants in one compilation, which takes the longer the more there are

# Which kernels a changed file can break: the launchers that a unit defines, and the units that include a file.
LAUNCHER = re.compile(r"^int (\w+)\(", re.M)
INCLUDE = re.compile(r'^#include "([\w./]+)"', re.M)
UNIT_KERNELS = {unit: tuple(LAUNCHER.findall((build.CSRC / "cuda" / unit).read_text())) for unit in build.UNITS}


def included(file: str) -> set[str]:
    """The files of csrc/, named from there, that `file` includes, and that those do."""
    found: set[str] = set()
    for name in INCLUDE.findall((build.CSRC / file).read_text()):
        beside = pathlib.PurePath(file).parent / name
        path = str(beside if (build.CSRC / beside).exists() else name)
        found |= {path, *included(path)}
    return found


# How the host starts kernels, which cases of single kernels say little of: gpu_ops.py has tests of their own for it.
HOST = {"launch.cuh", "launches.cu"}


def has_code(header: str) -> bool:
    """For the GPU, and not the emulator's own in its place; csrc/*.h mark theirs."""
    if header.endswith(".cuh"):
        return pathlib.PurePath(header).name not in build.REPLACED | HOST
    return "IJCKD_HD" in (build.CSRC / header).read_text()


def mutable_files() -> dict[str, tuple[str, ...]]:
    """The units to compile anew when the file changes."""
    files = {f"cuda/{unit}": (unit,) for unit in UNIT_KERNELS if unit not in HOST}
    for unit in sorted(UNIT_KERNELS, key=lambda unit: (build.CSRC / "cuda" / unit).stat().st_size):
        for header in sorted(filter(has_code, included(f"cuda/{unit}"))):
            files[header] = (*files.get(header, ()), unit)
    return files


FILES = mutable_files()
FORMULAS = {"row_math.h"}  # headers of csrc/ that are code, and little else

SWAPS = {
    " < ": " <= ", " <= ": " < ", " > ": " >= ", " >= ": " > ", " == ": " != ", " != ": " == ", " && ": " || ",
    " || ": " && ", " + ": " - ", " - ": " + ", " * ": " / ", " / ": " * ", " % ": " / ", " += ": " -= ",
    " *= ": " /= ", " /= ": " *= ", " ? ": " && false ? ", "-INFINITY": "INFINITY", "NAN": "0", "(!": "(",
    "threadIdx.x": "(threadIdx.x + 1)", "threadIdx.y": "(threadIdx.y + 1)", "blockIdx.x": "(blockIdx.x + 1)",
    " << ": " >> ", " >> ": " << ", " & ": " | ", "__syncthreads();": ";", "__syncwarp();": ";",
    "copy_async_commit();": ";", "load_matrix_x4(": "load_matrix_x4_transposed(",
    "load_matrix_x4_transposed(": "load_matrix_x4(",
}  # fmt: skip
PATTERN = re.compile("|".join(map(re.escape, sorted(SWAPS, key=len, reverse=True))))
NUMBER = re.compile(r"(?<![\w.\"])\d+(?![\w.\"])")  # shifted by one
CONDITION = re.compile(r"\bif \((.*)\) (?=[^()]*;$)|\bif \((.*)\)(?: \{)?$")  # made true
WAIT = re.compile(r"(copy_async|warpgroup)_wait<([^<>]*)>\(([^;]*)\);")  # removed; for one group less
XOR = re.compile(r" \^ (\([^()]*\)|[\w.]+)")  # removed
CONJUNCTS = re.compile(r"(?:\bbool \w+ = |\breturn )(.* && .*);$|\bif \((.* && .*)\)[^()]*$")  # each made true
CALL = re.compile(r"(?:\w+::)*\w+(?:<[^;]*>)?\(.*\);")  # removed
HINTS = ("allow_next_launch", "prefetch_map")  # calls that change no result
# Of a line without what stands in brackets; a declaration has two words before its =.
STATEMENT = re.compile(r"[^ ]+ [-+*/]?= .*;")
BRACKETS = re.compile(r"\[[^\[\]]*\]|<[^<> ]*>")
NOT_CODE = re.compile(r"^\s*(//|#|template|static_assert|namespace|struct|enum|$)")


def conjuncts(line: str) -> Iterator[tuple[int, str]]:
    """(column, text) of what && joins in a condition; none where brackets would be torn apart."""
    if m := CONJUNCTS.search(line):
        at = m.start(m.lastindex)
        for part in m[m.lastindex].split(" && "):
            if part.count("(") == part.count(")"):
                yield at, part
            at += len(part) + len(" && ")


@dataclass(frozen=True)
class Mutant:
    file: str  # under csrc/
    line: int
    code: str  # the line, without indentation
    nth: int  # among the file's lines that are equal to it, from 1
    column: int  # in `code`
    was: str
    became: str

    @property
    def key(self) -> tuple[str, ...]:
        """Names the mutant also after lines above it have moved."""
        return (self.file, self.code, str(self.nth), str(self.column), self.was, self.became)

    @property
    def drops_order(self) -> bool:
        """Whether it takes away a barrier, or a copy's end."""
        orders = r"__sync|copy_async|warpgroup|barrier|cluster|wait_for_earlier"
        return self.became == ";" and bool(re.match(orders, self.was))

    def apply(self, source: str) -> str:
        lines = source.split("\n")
        line = lines[self.line - 1]
        at = len(line) - len(line.lstrip()) + self.column
        assert line[at:].startswith(self.was)
        lines[self.line - 1] = line[:at] + self.became + line[at + len(self.was) :]
        return "\n".join(lines)


def mutants_of(file: str) -> Iterator[Mutant]:
    lines = (build.CSRC / file).read_text().split("\n")
    declares = file.endswith(".h") and file not in FORMULAS  # structs, between a few functions
    in_code = not declares
    equal: collections.Counter[str] = collections.Counter()
    for number, whole in enumerate(lines, 1):
        code = whole.split("//")[0].rstrip()
        begins = declares and whole.startswith("IJCKD_HD ")
        if not (in_code or begins) or NOT_CODE.match(code):
            continue
        if declares:
            in_code = not code.endswith("}") if begins else code != "}"
        indent = len(code) - len(code.lstrip())
        equal[code.strip()] += 1
        nth = equal[code.strip()]

        def mutant(at: int, was: str, became: str, number=number, code=code, indent=indent, nth=nth) -> Mutant:
            return Mutant(file, number, code.strip(), nth, at - indent, was, became)

        for m in PATTERN.finditer(code):
            yield mutant(m.start(), m[0], SWAPS[m[0]])
        for m in NUMBER.finditer(code):
            yield mutant(m.start(), m[0], str(int(m[0]) + 1))
        if (m := CONDITION.search(code)) and (group := 1 if m[1] is not None else 2):
            yield mutant(m.start(group), m[group], "true")
            if code.endswith("return;"):
                yield mutant(m.start(), code[m.start() :], ";")
        for m in WAIT.finditer(code):
            yield mutant(m.start(), m[0], ";")
            yield mutant(m.start(), m[0], f"{m[1]}_wait<{m[2]} + 1>();")  # as one that names no accumulators
        for m in XOR.finditer(code):
            yield mutant(m.start(), m[0], "")
        for at, condition in conjuncts(code):
            yield mutant(at, condition, "true")
        call = CALL.fullmatch(code.strip())
        if (
            call
            and call[0].count("(") == call[0].count(")")
            and not call[0].startswith(("__sync", "copy_async", "warpgroup_wait", *HINTS))
        ):
            yield mutant(indent, call[0], ";")
        if STATEMENT.fullmatch(BRACKETS.sub("", code.strip())):
            yield mutant(indent, code.strip(), ";")


def all_mutants() -> list[Mutant]:
    return list(dict.fromkeys(m for file in FILES for m in mutants_of(file)))  # two rules may make the same change


class Workshop:
    """What mutants have in common, compiled once."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.objects = [pathlib.Path(shutil.copy(p, folder)) for p in build.built("kernels").glob("*.o")]

    def judge(self, mutant: Mutant, units: Iterable[str]) -> tuple[str, str]:
        """(what noticed the mutant or SURVIVED, in which case), by the kernels of these units."""
        with self.changed(mutant.file, mutant.apply((build.CSRC / mutant.file).read_text())) as work:
            for unit in units:
                try:
                    fresh = self.compiled(work, unit, FLAG)
                except RuntimeError:
                    return NOT_COMPILED, ""
                if code_of(fresh) == code_of(self.folder / fresh.name):
                    continue  # a launch bound, a size that this unit has no tile of
                verdict, case = self.run(self.linked(fresh), UNIT_KERNELS[unit])
                if verdict != SURVIVED:
                    return verdict, case
        return SURVIVED, ""

    def judge_together(
        self, mutants: list[Mutant], units: Iterable[str], pool: ThreadPoolExecutor
    ) -> dict[Mutant, tuple[str, str]]:
        """As `judge` does, of one file's mutants those that can be compiled together (switched.py)."""
        file = mutants[0].file
        source = (build.CSRC / file).read_text()
        left = {number: (m.line, m.apply(source)) for number, m in enumerate(mutants, 1)}
        verdicts: dict[int, tuple[str, str]] = {}
        for unit in units:
            while left:
                text, lines = switched.switched(source, left)
                left = {n: left[n] for line in lines.values() for n in sorted(line.numbers)}
                with self.changed(file, text) as work:
                    try:
                        library = self.linked(self.compiled(work, unit, "-w"))
                    except RuntimeError as error:
                        wrong = switched.at_fault(pathlib.PurePath(file).name, str(error), lines) or set(lines)
                        verdicts = {n: v for n, v in verdicts.items() if n not in left or left[n][0] not in wrong}
                        left = {n: change for n, change in left.items() if change[0] not in wrong}
                        continue
                    runs = pool.map(functools.partial(self.run, library, UNIT_KERNELS[unit]), left)
                    verdicts |= zip(left, runs, strict=True)
                left = {n: change for n, change in left.items() if verdicts[n][0] == SURVIVED}
                break
        return {mutants[n - 1]: verdict for n, verdict in verdicts.items()}

    @contextlib.contextmanager
    def changed(self, file: str, text: str) -> Iterator[pathlib.Path]:
        """A folder with csrc/, of which `file` has this text."""
        with tempfile.TemporaryDirectory(dir=self.folder) as temporary:
            work = pathlib.Path(temporary)
            shutil.copytree(build.CSRC, work / "csrc", ignore=shutil.ignore_patterns("cpu", "*.cpp"))
            (work / "csrc" / file).write_text(text)
            yield work

    def compiled(self, work: pathlib.Path, unit: str, flag: str) -> pathlib.Path:
        """The object of this unit of `work`."""
        out = work / unit
        out.mkdir()
        return build.compile_kernels(work / "csrc/cuda" / unit, out, work / "csrc", flag)

    def linked(self, fresh: pathlib.Path) -> pathlib.Path:
        """The kernels with this object in the place of the sound one."""
        others = [p for p in self.objects if p.name != fresh.name]
        return build.link([fresh, *others], fresh.parent / "emulated_kernels.so")

    def run(self, library: pathlib.Path, kernels: Iterable[str], number: int = 0) -> tuple[str, str]:
        """The cases of these kernels, of a library that holds several mutants with that of this number."""
        command = [sys.executable, __file__, "--run", str(library), *kernels]
        environment = os.environ | {switched.NUMBER: str(number)}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20 * TIME_LIMIT, env=environment)
        except subprocess.TimeoutExpired:
            return TIMED_OUT, ""
        if done.returncode == -signal.SIGXCPU:
            return TIMED_OUT, ""
        if done.returncode < 0:  # by a signal
            return "crash", str(done.returncode)
        if done.returncode:
            raise RuntimeError(f"the cases could not be run:\n{done.stderr}")
        verdict, _, case = done.stdout.strip().partition("\t")
        return verdict, case


def code_of(compiled: pathlib.Path) -> bytes:
    """An object without what debuggers read of it: the folder of its source."""
    with tempfile.NamedTemporaryFile() as plain:
        subprocess.run(["strip", "-g", "-o", plain.name, str(compiled)], check=True)
        return pathlib.Path(plain.name).read_bytes()


def size(case: str) -> int:
    return math.prod(map(int, re.findall(r" (\d+)\b", case)))


def run_cases(library: str, names: list[str]) -> tuple[str, str]:
    kernels = build.load(pathlib.Path(library))
    everything = cases.CASES | class_map_cases.CASES | tile_cases.CASES | block_cases.CASES
    chosen = {name: case for name, case in everything.items() if name.split()[0] in names}
    chosen = dict(sorted(chosen.items(), key=lambda item: size(item[0])))  # most mutants fall in a small one
    before: dict[str, list[bytes]] = {}
    runs = collections.deque((name, schedules.FIRST) for name in chosen)  # most mutants fall in the first order
    while runs:
        name, order = runs.popleft()
        schedules.set_order(kernels, order)
        began = time.perf_counter()
        try:
            outputs = [out.tobytes() for out in chosen[name](kernels)]
        except AssertionError:
            return "wrong result", name
        except RuntimeError as error:
            return str(error).split(":")[0], name
        if before.setdefault(name, outputs) != outputs:
            return f"other bits, {' '.join(order)}", name
        if kernels.counts().bank_conflicts:
            return "bank conflicts", name
        if kernels.refused():
            return "launch refused", name
        if order == schedules.FIRST and time.perf_counter() - began < LONG:  # what is long has short ones of its kind
            runs.extend((name, other) for other in schedules.others(kernels))
    for name, case in cases.LARGE_GRIDS.items():
        if name in names:
            try:
                case(kernels)
            except (AssertionError, RuntimeError) as error:
                return str(error).split(":")[0], f"{name} large grid"
    return SURVIVED, ""


def units_of(mutant: Mutant) -> tuple[str, ...]:
    """All that it can break, the quickest to compile first: mostly it is enough."""
    return FILES[mutant.file]


def judge_all(
    mutants: list[Mutant], workers: int = 2, units: Callable[[Mutant], Iterable[str]] = units_of
) -> Iterator[tuple[Mutant, str, str]]:
    """(mutant, what noticed it or SURVIVED, in which case), in any order."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        workshop = Workshop(pathlib.Path(folder))
        alone = []
        for (_, of_file), group in itertools.groupby(mutants, lambda m: (m.file, tuple(units(m)))):
            of_one = list(group)
            for first in range(0, len(of_one), TOGETHER):
                some = of_one[first : first + TOGETHER]
                verdicts = workshop.judge_together(some, of_file, pool) if len(some) >= FEW else {}
                yield from ((mutant, *verdict) for mutant, verdict in verdicts.items())
                alone += [m for m in some if m not in verdicts]
        judged = pool.map(workshop.judge, alone, map(units, alone))
        for mutant, verdict in zip(alone, judged, strict=True):
            yield mutant, *verdict


def read_table() -> list[dict[str, str]]:
    if not TABLE.exists():
        return []
    with TABLE.open(newline="") as f:
        return list(csv.DictReader(f))


def write_table(rows: list[dict[str, str]]) -> None:
    with tempfile.NamedTemporaryFile("w", newline="", dir=TABLE.parent, delete=False) as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    pathlib.Path(f.name).chmod(0o644)
    pathlib.Path(f.name).replace(TABLE)


def key(row: dict[str, str]) -> tuple[str, ...]:
    """A row's Mutant.key."""
    return tuple(row[c] for c in KEY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutants of which file or code holds this")
    parser.add_argument("--survivors", action="store_true", help="mutants that survived last time")
    parser.add_argument("--missing", action="store_true", help="mutants without a row, or with a deferred one")
    parser.add_argument("--defer", action="store_true", help="judge none; give those without a row one")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)  # library, kernels: one mutant's own process
    args = parser.parse_args()
    if args.run:
        resource.setrlimit(resource.RLIMIT_CPU, (TIME_LIMIT, TIME_LIMIT + 1))
        print(*run_cases(args.run[0], args.run[1:]), sep="\t")
        return
    if (reason := build.why_not()) is not None:
        raise SystemExit(f"mutate.py: {reason}")
    before = {key(row): row for row in read_table()}
    mutants = all_mutants()
    chosen = [m for m in mutants if args.only in m.file or args.only in m.code]
    if args.survivors:
        chosen = [m for m in chosen if before.get(m.key, {}).get("verdict", SURVIVED) == SURVIVED]
    if args.missing or args.defer:
        judged = {k for k, row in before.items() if row["verdict"] != NOT_JUDGED}
        chosen = [m for m in chosen if m.key not in judged]
    after = dict(before)
    verdicts = ((m, NOT_JUDGED, "") for m in chosen) if args.defer else judge_all(chosen, args.workers)
    for done, (mutant, verdict, case) in enumerate(verdicts, 1):
        explanation = before.get(mutant.key, {}).get("explanation", "") if verdict == SURVIVED else ""
        values = (mutant.file, mutant.line, *mutant.key[1:], verdict, case, explanation)
        after[mutant.key] = dict(zip(COLUMNS, map(str, values), strict=True))
        if verdict == SURVIVED and not explanation:
            print(
                f"survived: {mutant.file}:{mutant.line}: {mutant.code} : "
                f"{mutant.was.strip()} -> {mutant.became.strip()}"
            )
        if done % ROWS_AT_ONCE == 0:
            write_table([after[m.key] for m in mutants if m.key in after])
    rows = [after[m.key] for m in mutants if m.key in after]
    write_table(rows)
    counts = collections.Counter("survived, explained" if row["explanation"] else row["verdict"] for row in rows)
    print(f"{len(rows)} mutants:", ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common()))


if __name__ == "__main__":
    main()
