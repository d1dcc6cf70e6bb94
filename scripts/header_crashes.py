"""How often a file whose header cannot be parsed makes DALI crash the process: behind our guard, and without it.

Every run is a process of its own, forked once the libraries are loaded, that makes one batch of sound pictures and one
that went bad after it was indexed. Left to itself, DALI 2.4.0 segfaults in some of these runs; data/dali.py makes it
look at the header first, which raises an error instead.

    scripts/header_crashes.py --save                         # 200 runs behind the guard
    scripts/header_crashes.py --unguarded --runs 40 --save   # what it guards against
The last line is one JSON object {"rows": [...]}. Exit code 1 if a run behind the guard did not end as it should.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import pathlib
import sys
import tempfile
import time
from multiprocessing.connection import wait
from typing import TYPE_CHECKING

import numpy as np
import records
from PIL import Image

if TYPE_CHECKING:
    from ijckd_fast.data import Index

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # a bare checkout is enough: the package need not be installed
COLUMNS = (
    "what", "guard", "kinds", "runs", "crashes", "other_failures", "batch", "threads", "s_per_run", "machine", "torch",
    "dali", "pillow", "python", "commit", "date",
)  # fmt: skip
WIDTH, HEIGHT = 200, 150
PICTURES = 65  # a large batch makes the crash likelier
KINDS = {
    "text": lambda jpeg: b"<html>404 not found</html>" * 40,
    "cut-in-header": lambda jpeg: jpeg[:200],
    "two-bytes": lambda jpeg: jpeg[:2],
    "zeros": lambda jpeg: bytes(len(jpeg)),
}
THREADS = 2


def spoilt_index(root: pathlib.Path, kind: str) -> Index:
    """The index of PICTURES sound pictures in root, the middle one of which is spoilt now."""
    from ijckd_fast.data import build_index

    folder = root / "train" / "class"
    folder.mkdir(parents=True)
    for i in range(PICTURES):
        Image.effect_noise((WIDTH, HEIGHT), 60).convert("RGB").save(folder / f"{i:03d}.jpg")
    index = build_index(root, "train")
    bad = pathlib.Path(index.absolute(PICTURES // 2))
    bad.write_bytes(KINDS[kind](bad.read_bytes()))
    return index


def one_run(index: Index, seed: int, unguarded: bool) -> None:
    """One batch, in this process. AssertionError where it is not the batch with a stand-in for the bad file."""
    from ijckd_fast.data import Augment, TrainPlan, make_loader

    if unguarded:
        from nvidia.dali import fn, types

        fn.peek_image_shape = lambda *_, **__: types.Constant(np.array([HEIGHT, WIDTH, 3], np.int32))
    said = []
    plan = TrainPlan(index, Augment(image_size=64, eval_resize=64), PICTURES, seed)
    with make_loader("dali", plan, threads=THREADS, stop=1, on_bad=lambda path, why: said.append(path)) as loader:
        (batch,) = loader
    assert said == [index.absolute(PICTURES // 2)], said
    assert len(batch.ids) == PICTURES
    assert PICTURES // 2 not in batch.ids


def run_all(indexes: list[Index], runs: int, unguarded: bool, at_once: int) -> list[int]:
    """The exit codes of so many processes, -n where signal n ended one."""
    context = multiprocessing.get_context("fork")
    running, codes, started = [], [], 0
    while started < runs or running:
        while started < runs and len(running) < at_once:
            process = context.Process(target=one_run, args=(indexes[started % len(indexes)], started, unguarded))
            process.start()
            running.append(process)
            started += 1
        wait([process.sentinel for process in running])
        for process in [process for process in running if not process.is_alive()]:
            process.join()
            codes.append(process.exitcode)
            running.remove(process)
    return codes


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--unguarded", action="store_true", help="tell DALI the sizes instead of letting it look")
    parser.add_argument("--at-once", type=int, default=2, help="processes")
    records.add_save(parser, "header_crashes.csv")
    args = records.parse_args(parser, COLUMNS)

    from ijckd_fast.data.load.parity import versions

    where = records.environment("cpu") | versions("dali")  # loads torch and DALI, which then every run has
    with tempfile.TemporaryDirectory() as folder:
        indexes = [spoilt_index(pathlib.Path(folder) / kind, kind) for kind in KINDS]
        began = time.perf_counter()
        codes = run_all(indexes, args.runs, args.unguarded, args.at_once)
        seconds = time.perf_counter() - began
    crashes, failures = sum(code < 0 for code in codes), sum(code > 0 for code in codes)
    row = {
        "what": "header_crashes",
        "guard": "no" if args.unguarded else "yes",
        "kinds": " ".join(KINDS),
        "runs": args.runs,
        "crashes": crashes,
        "other_failures": failures,
        "batch": PICTURES,
        "s_per_run": round(seconds * args.at_once / args.runs, 2),
        **{k: where[k] for k in COLUMNS if k in where},
        "threads": THREADS,
    }
    print(f"{crashes} of {args.runs} processes died of a signal, {failures} ended otherwise than they should")
    records.append(args.save, COLUMNS, [row])
    print(json.dumps({"rows": [row]}), flush=True)
    return int(not args.unguarded and crashes + failures > 0)


if __name__ == "__main__":
    sys.exit(main())
