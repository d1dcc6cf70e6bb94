"""The same run by 1, 2 and 4 processes at one global batch: how far apart are loss, weights and accuracy at its end?

A teacher is trained on the digits, then a student by the whole objective, once for every number of processes, on the
CPU by gloo; with --sync-bn the sums differ in nothing but their order.

    scripts/world_sizes.py --save             # statistics of BatchNorm over all processes
    scripts/world_sizes.py --no-sync-bn       # each process its own, as most people train
The last line is one JSON object {"rows": [...]}.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import records

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # a bare checkout is enough: the package need not be installed
COLUMNS = (
    "what", "processes", "sync_bn", "global_batch", "steps", "first_loss", "last_loss", "last_loss_off_percent",
    "weights_off_percent",
    "top1_percent", "teacher_top1_percent", "val_images", "machine", "torch", "python", "commit", "date",
)  # fmt: skip
GLOBAL_BATCH = 64


def train(processes: int, *options: str) -> None:
    """`ijckd-fast train OPTIONS` by so many processes. CalledProcessError, with what they said, if it fails."""
    command = ["-m", "ijckd_fast.cli", "train", "--device", "cpu", "--no-tensorboard", "--log-interval", "1", *options]
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*start, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        print(done.stdout)
        done.check_returncode()


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--sync-bn", action=argparse.BooleanOptionalAction, default=True)
    records.add_save(parser, "world_sizes.csv")
    args = records.parse_args(parser, COLUMNS)

    import torch

    from ijckd_fast.data import write_digits
    from ijckd_fast.train import checkpoint, run_folder

    where = records.environment("cpu")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        data = ["--data-dir", str(write_digits(folder / "digits")), "--image-size", "32", "--eval-resize", "32"]
        teacher = ["--student", "resnet14", "--objective", "ce", "--epochs", "6", "--batch-size", "32"]
        train(1, *data, *teacher, "--schedule", "cosine", "--output-dir", str(folder / "teacher"))
        for processes in args.processes:
            run = folder / str(processes)
            train(
                processes, *data, "--teacher", str(folder / "teacher"), "--student", "resnet8x0.25", "--global-batch",
                str(GLOBAL_BATCH),
                "--lr", "0.01", "--schedule", "cosine", "--epochs", str(args.epochs), "--output-dir", str(run),
                "--sync-bn" if args.sync_bn else "--no-sync-bn",
            )  # fmt: skip
            losses = [row["loss"] for row in run_folder.read_log(run) if row["kind"] == "train"]
            state = checkpoint.load(run / run_folder.LAST)
            parameters = [x.flatten() for name, x in state["learner"].items() if name.endswith(("weight", "bias"))]
            weights = torch.cat(parameters)
            if not rows:
                loss, first_weights = losses[-1], weights
            rows.append(
                {
                    "what": "world_sizes", "processes": processes, "sync_bn": args.sync_bn,
                    "global_batch": GLOBAL_BATCH,
                    "steps": state["step"], "first_loss": losses[0], "last_loss": losses[-1],
                    "last_loss_off_percent": 100 * (losses[-1] / loss - 1),
                    "weights_off_percent": 100 * float((weights - first_weights).norm() / first_weights.norm()),
                    "top1_percent": state["evaluated"]["top1_percent"],
                    "teacher_top1_percent": run_folder.read_json(run / run_folder.SUMMARY)["teacher_top1_percent"],
                    "val_images": state["evaluated"]["images"], **{key: where[key] for key in COLUMNS[-5:]},
                }
            )  # fmt: skip
            print(
                f"{processes} processes: loss {losses[0]:.7f} at first, {losses[-1]:.5f} at the end "
                f"({rows[-1]['last_loss_off_percent']:+.3f} %), weights {rows[-1]['weights_off_percent']:.3f} % away, "
                f"top-1 {rows[-1]['top1_percent']:.2f} % of {rows[-1]['val_images']}",
                flush=True,
            )
    records.append(args.save, COLUMNS, rows)
    print(json.dumps({"rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
