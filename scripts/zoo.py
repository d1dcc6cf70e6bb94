"""One net of every family of timm and torchvision through the distiller, as teacher and as student, with random weights
and made-up images: nothing is downloaded, no data is needed.

    scripts/zoo                              # every family: 120 nets; at night
    scripts/zoo --sample                     # twelve nets of different kinds; minutes
    scripts/zoo timm/convnextv2_atto vit_b_16
    scripts/zoo --save                       # append the rows to results/zoo.csv; what has a row there is left out
    scripts/zoo --table                      # the newest rows of results/zoo.csv as docs/zoo.md shows them

Asked of each net, in a process of its own with a limit of time and memory: is it accepted, and if not, does it take
images of another size, as the refusal advises? Which map was found, and is its mean what the classifier sees, on other
images and with weights as after training? Does folding BatchNorm keep map and pooled vector? Does a step by each
objective, as student and as teacher of a small net, give a finite loss that is the sum of its weighted parts, a
gradient to every parameter and none to the teacher? Where a step is refused: does what the refusal advises work? Of a
sample: is the deployed net written as ONNX, and does that answer as PyTorch? A refusal is a row, and so are a crash, a
net that takes too long or too much memory, and one that is left out for its size.

Stopped and started again with the same --save it continues: a net has its row once for this code and these versions.
The last line is one JSON object {"rows": [...]}. Exit code 1 for a crash, a wrong figure or advice that does not work.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import pathlib
import resource
import signal
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import records

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # a bare checkout is enough: the package need not be installed

from zoo_nets import EXPORTED, SAMPLE, TIMM, TORCHVISION, Net, every, named, parameters_of  # noqa: E402

COLUMNS = (
    "library", "family", "name", "params_M", "ended", "image_size", "map", "map_use", "channels", "side", "stages",
    "map_check",
    "norms", "folded", "fold_difference", "step_size", "student_ok", "student_refused", "student_wrong", "teacher_ok",
    "teacher_refused", "teacher_wrong", "refusals", "advice", "export", "seconds", "peak_mb", "timm", "torchvision",
    "code", "machine", "torch", "python", "commit", "date",
)  # fmt: skip
KEY = ("library", "name", "code", "torch", "timm", "torchvision")  # what a row is known by
ROWS = ROOT / "results" / "zoo.csv"
MB = 1 << 20


class Limits(NamedTuple):
    """Of one net's process: seconds, and 2^20 bytes above what it begins with."""

    seconds: float
    memory_mb: int


# --------------------------------------------------------------------------------------------------------------------
# one net, in its own process


class Running(NamedTuple):
    """A net's process, and the file in which it says what it finds."""

    net: Net
    process: multiprocessing.process.BaseProcess
    said: pathlib.Path
    began: float


def begin(net: Net, work: Callable[..., None], folder: pathlib.Path, limits: Limits) -> Running:
    """Starts `work(net, say)` in a forked process."""
    said = folder / f"{net.library}-{net.name}.jsonl"
    process = multiprocessing.get_context("fork").Process(target=_work, args=(net, work, said, limits.memory_mb))
    process.start()
    return Running(net, process, said, time.monotonic())


def _work(net: Net, work: Callable[..., None], said: pathlib.Path, memory_mb: int) -> None:
    """What the process does. Its output goes to a file beside `said`; it ends with code 0, or as it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to act on
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with said.open("a") as file, said.with_suffix(".log").open("wb") as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        began_with = int(pathlib.Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (began_with + memory_mb * MB,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

        def say(**found: Any) -> None:
            file.write(json.dumps(found) + "\n")
            file.flush()

        try:
            work(net, say)
            say(ended="ok")
        except Exception as error:
            memory = isinstance(error, MemoryError) or "memory" in str(error)
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            say(ended=f"{'OUT OF MEMORY' if memory else 'FAILED'} in {{doing}}: {reason}")
        say(peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def row_of(running: Running, seconds: float, timed_out: bool) -> dict[str, Any]:
    """What the process said, and how it ended."""
    found: dict[str, Any] = {"doing": "start"}
    for line in running.said.read_text().splitlines():
        for key, value in json.loads(line).items():
            if isinstance(value, list):
                found[key] = list(dict.fromkeys([*found.get(key, []), *value]))
            else:
                found[key] = value
    doing = found.pop("doing")
    code = running.process.exitcode
    if timed_out:
        found["ended"] = f"TIMED OUT after {seconds:.0f} s in {doing}"
    elif code is not None and code < 0:
        found["ended"] = f"CRASHED by {signal.Signals(-code).name} in {doing}"
    found["ended"] = found.get("ended", f"CRASHED with exit code {code} in {doing}").replace("{doing}", doing)
    for key in ("refusals", "advice"):
        found[key] = " | ".join(found.get(key, []))
    about = {"library": running.net.library, "family": running.net.family, "name": running.net.name}
    return {**about, **found, "seconds": round(seconds, 1)}


def run_all(
    nets: Sequence[Net], work: Callable[..., None], limits: Limits, at_once: int, folder: pathlib.Path
) -> Iterator[dict[str, Any]]:
    """The row of each net, in the order in which they end; processes are ended with the generator."""
    waiting, running = list(reversed(nets)), list[Running]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(begin(waiting.pop(), work, folder, limits))
            wait([one.process.sentinel for one in running], timeout=1)
            for one in list(running):
                seconds = time.monotonic() - one.began
                late = one.process.is_alive() and seconds > limits.seconds
                if late:
                    one.process.kill()
                if late or not one.process.is_alive():
                    one.process.join()
                    running.remove(one)
                    yield row_of(one, seconds, late)
    finally:
        for one in running:
            one.process.kill()
            one.process.join()


# --------------------------------------------------------------------------------------------------------------------
# rows


def read(path: pathlib.Path) -> list[dict[str, str]]:
    """The rows of a file; [] where there is none."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def environment() -> dict[str, Any]:
    """Where and when, and of which code and versions."""
    import timm
    import torchvision

    from ijckd_fast.train.code_hash import code_hash

    where = records.environment("cpu")
    versions = {"timm": timm.__version__, "torchvision": torchvision.__version__, "code": code_hash()}
    return {**{key: where[key] for key in COLUMNS if key in where}, **versions}


def key_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What a row is known by."""
    return tuple(str(row[key]) for key in KEY)


def faults(row: Mapping[str, Any]) -> list[str]:
    """What is wrong in a row: a crash, a wrong figure, advice that does not work. Refusals are not."""
    ended = str(row.get("ended", ""))
    found = [] if ended == "ok" or ended.startswith("left out") else [ended]
    for key in ("map_check", "fold_difference", "export"):
        if str(row.get(key, "")).startswith("WRONG"):
            found.append(f"{key} {row[key]}")
    found += [f"{key}: {row[key]}" for key in ("student_wrong", "teacher_wrong") if row.get(key)]
    ways = [way for way in str(row.get("advice", "")).split(" | ") if way]
    return [*found, *(f"advice {way}" for way in ways if not way.endswith(": ok"))]


def newest(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The last row of each family's net; of nets that stand for none: of each net."""
    last = {(row["library"], row["family"] or row["name"]): row for row in rows}
    return sorted(last.values(), key=lambda row: (row["library"] == "timm", not row["family"], row["name"]))


def summary(rows: Iterable[Mapping[str, Any]]) -> str:
    """The counts as a table in Markdown, a line for each library's families and for its other nets."""
    head = ("", "tried", "too large", "accepted", "steps in both roles", "map", "map to match only", "ONNX", "faults")
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    rows = list(rows)
    for library, stands in (("torchvision", True), ("timm", True), ("torchvision", False), ("timm", False)):
        chosen = [row for row in rows if row["library"] == library and bool(row["family"]) == stands]
        tried = [row for row in chosen if not str(row["ended"]).startswith("left out")]
        uses = [row["map_use"] for row in tried]
        exported = [str(row["export"]) for row in tried if row["export"]]
        counts = (
            len(tried),
            len(chosen) - len(tried),
            sum(bool(row["image_size"]) for row in tried),
            sum(bool(row["student_ok"] and row["teacher_ok"]) for row in tried),
            uses.count("pooled"),
            uses.count("match only"),
            f"{sum(not text.startswith(('refused', 'WRONG')) for text in exported)} of {len(exported)}",
            sum(bool(faults(row)) for row in tried),
        )
        if chosen:
            name = f"{library}'s {'families' if stands else 'other nets'}"
            lines.append(f"| {name} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def left(rows: Iterable[Mapping[str, Any]]) -> str:
    """A sentence in Markdown on the families in the tables of zoo_nets.py that have no row."""
    have = {(row["library"], row["family"]) for row in rows}
    families = [("timm", TIMM), ("torchvision", TORCHVISION)]
    names = [f"`{lib}/{name}`" for lib, nets in families for family, name in nets.items() if (lib, family) not in have]
    if not names:
        return "Every family has its row."
    text = f"{len(names)} families have not been run so far; `scripts/zoo --save` runs them: {', '.join(names)}."
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """The newest rows as a table in Markdown."""
    head = ("net", "parameters, M", "side", "map", "folded", "as student", "as teacher", "advice", "ONNX")
    lines = [f"| {' | '.join(head)} |", "|---|---:|---:|---|---:|---|---|---|---|"]
    for row in newest(rows):
        cells = (
            f"`{row['library']}/{row['name']}`",
            row["params_M"],
            row["image_size"],
            _map_cell(row),
            f"{row['folded']} of {row['norms']}" if row["norms"] not in ("", "0") else "",
            _steps_cell(row, "student"),
            _steps_cell(row, "teacher"),
            "; ".join(f"`{way.removesuffix(': ok')}`" for way in row["advice"].split(" | ") if way),
            row["export"],
        )
        lines.append(f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


def _map_cell(row: Mapping[str, Any]) -> str:
    if not row["image_size"]:
        if row["ended"] != "ok":
            return str(row["ended"])
        return "refused: " + row["refusals"].split(" | ")[-1].removeprefix(f"model '{row['library']}/{row['name']}' ")
    wrong = "" if row["map_check"] in ("ok", "") else f" {row['map_check']}"
    if not row["map"]:
        return "none"
    use = ", to match only" if row["map_use"] == "match only" else ""
    return f"`{row['map']}` {row['side']} x {row['side']}{use}{wrong}"


def _steps_cell(row: Mapping[str, Any], role: str) -> str:
    if not row["image_size"]:
        return ""
    text = "all" if not row[f"{role}_refused"] else f"all but {row[f'{role}_refused'].replace(' ', ', ')}"
    return f"{text}; WRONG: {row[f'{role}_wrong']}" if row[f"{role}_wrong"] else text


# --------------------------------------------------------------------------------------------------------------------


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="zoo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("nets", nargs="*", metavar="NET", help="names as --student takes them; default: all families")
    parser.add_argument("--sample", action="store_true", help="a dozen nets of different kinds")
    parser.add_argument("--objectives", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--no-export", action="store_true", help="write no ONNX of the nets in its sample")
    parser.add_argument("--image-size", type=int, default=224, help="pixels (default: %(default)s)")
    parser.add_argument("--step-size", type=int, default=64,
                        help="pixels in a step, of nets that take such images (default: %(default)s)")  # fmt: skip
    parser.add_argument("--most-params", type=float, default=90.0, metavar="MILLIONS",
                        help="larger nets are left out (default: %(default)g)")  # fmt: skip
    parser.add_argument("--at-once", type=int, default=2, metavar="N", help="processes (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=900.0, metavar="SECONDS",
                        help="of one net (default: %(default)g)")  # fmt: skip
    parser.add_argument("--memory", type=int, default=6144, metavar="MIB",
                        help="that one net may take (default: %(default)s)")  # fmt: skip
    parser.add_argument("--again", action="store_true", help="also nets that have their row")
    parser.add_argument("--table", action="store_true", help="print the table of what is saved, and run nothing")
    records.add_save(parser, "zoo.csv")
    args = parser.parse_args(argv)
    try:
        records.check(args.save, COLUMNS)
    except Exception as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = arguments(argv)
    if args.table:
        rows = read(args.save or ROWS)
        print(f"{left(rows)}\n\n{summary(newest(rows))}\n\n{table(rows)}")
        return 0

    import torch

    from ijckd_fast.errors import UserError

    torch.set_num_threads(1)  # of each process; they are forked, so no threads must run before
    import zoo_checks

    try:
        nets = named(args.nets or (list(SAMPLE) if args.sample else [])) or every()
        names = [zoo_checks.objective_named(name) for name in args.objectives or zoo_checks.PRESETS]
    except UserError as error:
        print(f"zoo: {error}", file=sys.stderr)
        return 2
    where = environment()
    if args.save and not args.again:
        done = {key_of(row) for row in read(args.save)}
        nets = [net for net in nets if key_of({**where, **net._asdict()}) not in done]

    def work(net: Net, say: Callable[..., None]) -> None:
        say(doing="count of parameters")
        millions = parameters_of(net) / 1e6
        say(params_M=round(millions, 2))
        if millions > args.most_params:
            say(left_out=f"left out: more than {args.most_params:g} million parameters")
            return
        export = not args.no_export and net.full in EXPORTED
        sizes = {"image_size": args.image_size, "step_size": args.step_size}
        zoo_checks.check(net, say, **sizes, objectives=names, export=export)

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        limits = Limits(args.limit, args.memory)
        for i, found in enumerate(run_all(nets, work, limits, args.at_once, pathlib.Path(folder)), 1):
            if found.pop("left_out", ""):
                found["ended"] = f"left out: more than {args.most_params:g} million parameters"
            row = {**dict.fromkeys(COLUMNS, ""), **where, **found}
            records.append(args.save, COLUMNS, [row])
            rows.append(row)
            wrong = "; ".join(faults(row))
            text = wrong or (row["map"] and f"map {row['map']}") or ("no map" if row["image_size"] else row["ended"])
            print(f"{i}/{len(nets)} {row['library']}/{row['name']}: {text} ({row['seconds']} s)", flush=True)
    print(summary(rows))
    print(json.dumps({"rows": rows}), flush=True)
    return int(any(faults(row) for row in rows))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that no process is left behind
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
