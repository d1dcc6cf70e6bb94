"""Training runs killed (SIGKILL) at random moments and resumed, again and again: is a checkpoint ever broken, are the
bits the same?

A tiny net learns by the whole objective, with EMA and mixing, and writes a checkpoint after every step, so that many
kills hit a file that is being written. Every attempt is a process of its own, forked once the libraries are loaded.
After each kill both checkpoints are read; at its end a run must have the bits of one that was never disturbed.

    scripts/kill_resume.py --kills 200 --save
The last line is one JSON object {"rows": [...]}. Exit code 1 if a checkpoint was broken or a bit differed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import pathlib
import random
import shutil
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import records
import torch
from PIL import Image

if TYPE_CHECKING:
    from ijckd_fast.train import TrainConfig

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # a bare checkout is enough: the package need not be installed
COLUMNS = (
    "what", "kills", "during_writing", "before_the_first_checkpoint", "runs", "steps", "broken", "differing",
    "seconds", "seed", "machine",
    "torch", "python", "commit", "date",
)  # fmt: skip
KILLS_OF_A_RUN = 8  # then it is left to come to its end


def write_data(root: pathlib.Path) -> pathlib.Path:
    """Three classes of noise of different tint, 12 and 6 images each, and a file with random weights of the teacher."""
    from ijckd_fast.nets import create_model

    rng = np.random.default_rng(0)
    for split, images in (("train", 12), ("val", 6)):
        for channel, name in enumerate(("red", "green", "blue")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(images):
                pixels = rng.integers(0, 128, (20, 24, 3), dtype=np.uint8)
                pixels[:, :, channel] += 100
                Image.fromarray(pixels).save(folder / f"{i:02d}.jpg")
    torch.manual_seed(1)
    torch.save(create_model("resnet8x0.5", 3, image_size=16).native_state_dict(), root / "teacher.pt")
    return root


def config_of(data: pathlib.Path, output: pathlib.Path, epochs: int) -> TrainConfig:
    from ijckd_fast.train import TrainConfig

    return TrainConfig(
        data_dir=str(data),
        output_dir=str(output),
        student="resnet8x0.25",
        teacher="resnet8x0.5",
        teacher_checkpoint=str(data / "teacher.pt"),
        allow_weak_teacher=True,
        image_size=16,
        eval_resize=16,
        epochs=epochs,
        batch_size=8,
        lr=0.05,
        schedule="cosine",
        warmup_epochs=1,
        clip_grad=5.0,
        ema_decay=0.9,
        mixup=0.2,
        checkpoint_steps=1,
        log_interval=1,
        eval_every=2,
        data_backend="pillow",
        device="cpu",
        tensorboard=False,
    )


def attempt(config: TrainConfig, resume: bool) -> None:
    """Trains in this process until it is done or killed."""
    from rich.console import Console

    from ijckd_fast.train import train

    with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):
        train(config, resume=resume, console=Console(quiet=True))


def differing(a: Any, b: Any) -> int:
    """How many tensors and numbers of two states do not have the same bits; clock times do not count."""
    if isinstance(a, dict):
        keys = (a.keys() | b.keys()) - {"seconds", "images_per_s", "config", "output_dir"}
        return sum(differing(a.get(key), b.get(key)) for key in keys)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return sum(map(differing, a, b))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return int(not torch.equal(a, b))
    return int(a != b)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="how many (default 200)")
    parser.add_argument("--epochs", type=int, default=10, help="length of a run, four steps each (default 10)")
    parser.add_argument("--seed", type=int, help="of the moments (default: another one each time)")
    records.add_save(parser, "kill_resume.csv")
    args = records.parse_args(parser, COLUMNS)
    if args.kills < 1 or args.epochs < 1:
        parser.error("--kills and --epochs must be at least 1")

    # loaded before the forks, the plots' library with its first figure
    from ijckd_fast import plots
    from ijckd_fast.errors import UserError
    from ijckd_fast.train import checkpoint, run_folder

    torch.set_num_threads(1)
    plots.figure(1)[0].canvas.draw()
    context = multiprocessing.get_context("fork")
    seed = random.randrange(1_000_000) if args.seed is None else args.seed
    moments = random.Random(seed)
    began = time.perf_counter()
    kills = runs = writing = first = broken = unequal = 0
    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(temporary)
        data = write_data(root / "data")
        whole = float("inf")
        for _ in range(2):  # the first is slow for reasons of its own
            start = time.perf_counter()
            undisturbed = context.Process(
                target=attempt, args=(config_of(data, root / "undisturbed", args.epochs), False)
            )
            shutil.rmtree(root / "undisturbed", ignore_errors=True)
            undisturbed.start()
            undisturbed.join()
            whole = min(whole, time.perf_counter() - start)
        want = checkpoint.load(root / "undisturbed" / run_folder.LAST)
        print(f"an undisturbed run of {want['step']} steps takes {whole:.1f} s; random.Random({seed})", flush=True)
        while kills < args.kills:
            folder = root / f"run{runs}"
            config = config_of(data, folder, args.epochs)
            runs += 1
            resume, end = False, min(args.kills, kills + KILLS_OF_A_RUN)
            while True:
                process = context.Process(target=attempt, args=(config, resume))
                process.start()
                process.join(moments.uniform(0.1, 1.2) * whole if kills < end else None)
                if moments.random() < 0.5:  # wait for a file that is being written
                    while process.is_alive() and not any(folder.glob("*.pt.tmp")):
                        pass
                if process.exitcode is not None:
                    break
                process.kill()
                process.join()
                kills += 1
                writing += any(folder.glob("*.pt.tmp"))
                resume = (folder / run_folder.CONFIG).exists()
                first += not (folder / run_folder.LAST).exists()
                for name in (run_folder.LAST, run_folder.BEST):
                    try:
                        if (folder / name).exists():
                            checkpoint.load(folder / name)
                    except UserError as error:
                        broken += 1
                        print(error)
            if process.exitcode != 0:
                print(f"run {runs} ended with exit code {process.exitcode} instead of going on")
                broken += 1
                continue
            found = differing(checkpoint.load(folder / run_folder.LAST), want)
            unequal += found > 0
            print(f"run {runs}: {kills} kills so far, {found} differences", flush=True)
    where = records.environment("cpu")
    row = {
        "what": "kill_resume", "kills": kills, "during_writing": writing, "before_the_first_checkpoint": first,
        "runs": runs,
        "steps": want["step"], "broken": broken, "differing": unequal, "seconds": round(time.perf_counter() - began),
        "seed": seed,
        **{key: where[key] for key in COLUMNS[10:]},
    }  # fmt: skip
    records.append(args.save, COLUMNS, [row])
    print(
        f"{kills} kills in {runs} runs, {writing} of them while a file was being written: {broken} broken, {unequal} "
        "runs with other bits"
    )
    print(json.dumps({"rows": [row]}))
    return int(broken > 0 or unequal > 0)


if __name__ == "__main__":
    sys.exit(main())
