"""`benchmark.py objectives`: what a step costs by each objective, beside kd's: both nets forward, losses, backward.

No loader and no optimizer: they cost the same whatever the objective. Random weights, noise, random labels. An
objective is timed only where its loss is finite and the sum of its weighted parts, as far as they have one weight each.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import records
import torch
from step_benchmark import PAIRS

COLUMNS = (
    "what", "objective", "settings", "pair", "device", "dtype", "ms", "ms_p20", "ms_p80", "ratio_to_kd", "batch",
    "image_size", "repeats", "threads", "machine", "torch", "cuda", "python", "commit", "date",
)  # fmt: skip
# Beside the presets: terms through the teacher's classifier, which the fused op does not have, beside the one it has
# (kl), and distances that it does not have.
VARIANTS = (
    "ijckd:kl=1", *(f"ijckd:{name}=1:{name}_head=teacher" for name in ("hard", "nkd")),
    "ijckd:wttm=1:ttm_head=teacher", "ijckd:dist_inter=1:dist_intra=1:dist_head=teacher",
    "ijckd:sdd=1:sdd_head=teacher", "ijckd:cat=400:cat_head=teacher",
    "ijckd:match_distance=cosine", "ijckd:match_distance=smooth-l1", "ijckd-pooled:match_distance=cosine",
    "kd:standardize_logits=true",
)  # fmt: skip


def objective_of(text: str) -> Any:
    """The objective NAME:SETTING=VALUE:... ; UserError for what is none."""
    from ijckd_fast.distill import get_objective
    from ijckd_fast.errors import UserError

    name, *settings = text.split(":")
    overrides: dict[str, Any] = {}
    for each in settings:
        key, equals, value = each.partition("=")
        if not equals:
            raise UserError(f"objective {text!r}: expected NAME:SETTING=VALUE:..., got {each!r}")
        overrides[key] = {"true": True, "false": False}[value] if value in ("true", "false") else _number(value)
    try:
        return get_objective(name, **overrides)
    except TypeError as error:
        raise UserError(f"objective {text!r}: {error}") from error


def _number(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value


def step_of(text: str, args: argparse.Namespace) -> Callable[[], None] | None:
    """One step by that objective; None, and a line that says so, where its loss is not what its parts make."""
    from ijckd_fast.distill import Distiller
    from ijckd_fast.nets import create_model

    pair, objective = PAIRS[args.pair], objective_of(text)
    torch.manual_seed(0)
    student, teacher = (
        create_model(name, pair.classes, image_size=args.image_size) for name in (pair.student, pair.teacher)
    )
    distiller = Distiller(student, teacher if objective.needs_teacher else None, objective).train()
    distiller.to(args.device, memory_format=torch.channels_last)
    images = torch.randn(args.batch, 3, args.image_size, args.image_size, device=args.device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(pair.classes, (args.batch,), device=args.device)

    def run() -> Any:
        distiller.zero_grad(set_to_none=True)
        out = distiller(images, labels, progress=0.0)
        out.loss.backward()
        return out

    out = run()
    loss = float(out.loss.detach())
    weights = {part: getattr(objective, part, None) for part in out.parts}
    total = sum(weight * float(out.parts[part]) for part, weight in weights.items() if weight is not None)
    whole = None not in weights.values()  # a term of several weights, or with a warm-up, has none of its part's name
    if not math.isfinite(loss) or (whole and abs(total - loss) > 1e-3 * abs(total)):
        print(f"benchmark: refused to time {text}: a loss of {loss}, by its parts {total}", file=sys.stderr)
        return None
    return run


def add_parser(commands: Any) -> None:
    """`benchmark.py objectives`."""
    parser = commands.add_parser(
        "objectives",
        help="a training step by each objective",
        description="Times a step of training by each objective, in turns: both nets forward, the losses, backward, "
        "without loader and optimizer. ratio_to_kd is the median of the turns' ratios. Prints a table; the last line "
        'is one JSON object {"rows": [...]}.',
    )
    parser.add_argument("--pair", choices=tuple(PAIRS), default="r34-r18", help="teacher and student")
    parser.add_argument(
        "--objectives", nargs="+", metavar="NAME[:SETTING=VALUE...]", help="default: every preset, and variants"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=8, help="images a step")
    parser.add_argument("--image-size", type=int, default=112, help="pixels")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each")
    records.add_save(parser, "objectives.csv")


def run(args: argparse.Namespace, environment: dict[str, Any]) -> int:
    """Prints and saves the rows; the exit status."""
    from ijckd_fast.distill import PRESETS

    records.check(args.save, COLUMNS)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmark.py objectives: --device cuda wants a GPU, and torch finds none; leave it out")
    names = list(dict.fromkeys(["kd", *(args.objectives or [*PRESETS, *VARIANTS])]))
    for name in names:
        objective_of(name)  # before an hour is spent on the others
    steps = {name: step_of(name, args) for name in names}
    runs = {name: step for name, step in steps.items() if step is not None}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, step in runs.items():
            seconds[name].append(_timed(step, args.device))
    rows = [_row(args, name, seconds, environment) for name in runs]
    for row in rows:
        spread = f"{row['ms_p20']:,.1f} to {row['ms_p80']:,.1f}"
        text = ":".join(filter(None, (row["objective"], row["settings"])))
        print(f"{text:58} {row['ms']:9,.1f} ms ({spread}), {row['ratio_to_kd']:.3f} of kd's")
    records.append(args.save, COLUMNS, rows)
    print(json.dumps({"rows": rows}), flush=True)
    return int(len(runs) < len(names))


def _timed(step: Callable[[], Any], device: str) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - began


def _row(args: argparse.Namespace, name: str, seconds: dict[str, list[float]], where: dict[str, Any]) -> dict[str, Any]:
    times = sorted(seconds[name])
    fifths = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 4
    objective, _, settings = name.partition(":")
    row = {
        "what": "objectives",
        "objective": objective,
        "settings": settings,
        "pair": args.pair,
        "device": args.device,
        "dtype": "float32",
        "ms": 1e3 * statistics.median(times),
        "ms_p20": 1e3 * fifths[0],
        "ms_p80": 1e3 * fifths[3],
        "ratio_to_kd": statistics.median(a / b for a, b in zip(seconds[name], seconds["kd"], strict=True)),
        **{key: getattr(args, key) for key in ("batch", "image_size", "repeats")},
        **{key: where[key] for key in ("threads", "machine", "torch", "cuda", "python", "commit", "date")},
    }
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
