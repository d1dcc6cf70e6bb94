"""The one-page report of a run: what it was, how accurate it is, what it costs to deploy, how it went; with plots."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ijckd_fast import files, plots
from ijckd_fast.train import run_folder
from ijckd_fast.train.progress import bottleneck


def write_report(folder: Path, summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes report.md and training.png.

    summary  what summary.json holds
    rows     the rows of log.jsonl
    """
    plot_training(folder / run_folder.PLOT, rows)
    bounds = [row for row in rows if row["kind"] == "bound"]
    if bounds:
        plot_bound(folder / run_folder.BOUND_PLOT, bounds)
    config, last, best = summary["config"], summary["last"], summary["best"]
    teacher, top1 = config["teacher"] or "none", summary["teacher_top1_percent"]
    if top1 is not None:
        teacher += f", top-1 {top1:.2f} %"
    if config["teacher_cache"] is not None:
        teacher += f", features from `{config['teacher_cache']}`"
    student = (
        f"{config['student']}, connector {config['connector']}, answers through the {config['infer_head']}'s classifier"
    )
    deployed = (
        f"{summary['params']:,} parameters, {summary['macs']:,} multiply-accumulates per image (backbone, connector, "
        "classifier)"
    )
    schedule = (
        f"{summary['steps']} steps ({last['epoch']:.2f} epochs) of {config['batch_size']} images, lr {config['lr']} "
        f"({config['schedule']}), seed {config['seed']}"
    )
    files.write_text(
        folder / run_folder.REPORT,
        f"""# {config["student"]} by {config["objective"]}

| | |
|---|---|
| data | `{config["data_dir"]}`, {last["images"]} validation images |
| teacher | {teacher} |
| student | {student} |
| schedule | {schedule} |
| deployed | {deployed} |
| speed | {_speed(summary, rows)} |
| memory | {_memory(rows)} |
| skipped steps | {summary["skipped_steps"]} (loss or gradient not finite) |
| unreadable files | {summary["unreadable_files"]} (went bad after they were indexed) |

| validation | step | top-1 % | top-5 % | agreement with the teacher % |
|---|---|---|---|---|
{_accuracy("last epoch", last)}
{_accuracy("best epoch", best)}

IJCKD's authors report the last epoch. The best one is chosen on the very images it is judged by.

![training]({run_folder.PLOT})
{_bound(bounds)}
Weights: `{run_folder.LAST}`, `{run_folder.BEST}`. Every setting: `{run_folder.CONFIG}`. Machine and versions:
`{run_folder.ENVIRONMENT}`. Every figure plotted: `{run_folder.LOG}`.
""",
    )


def _memory(rows: Sequence[Mapping[str, Any]]) -> str:
    figures = [row["memory_mb"] for row in rows if row["kind"] == "train"]
    return f"{max(figures):,.0f} MB at most, in one process" if figures else f"not known without {run_folder.LOG}"


def _speed(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    waits = [row["loader_wait_percent"] for row in rows if row["kind"] == "train"]
    if not waits:
        return f"not known without {run_folder.LOG}; {summary['seconds']:,.0f} s in all"
    wait = statistics.median(waits)
    processes = "" if summary["processes"] == 1 else f" by {summary['processes']} processes"
    return (
        f"{summary['images_per_s']:,.0f} images/s{processes} (median over the log, loader included), "
        f"{summary['seconds']:,.0f} s in all; {bottleneck(wait)}"
    )


def _accuracy(name: str, row: Mapping[str, Any]) -> str:
    agreement = "-" if row["agreement_percent"] is None else f"{row['agreement_percent']:.2f}"
    return f"| {name} | {row['step']} | {row['top1_percent']:.2f} | {row['top5_percent']:.2f} | {agreement} |"


def _bound(bounds: Sequence[Mapping[str, Any]]) -> str:
    if not bounds:
        return ""
    last = bounds[-1]
    terms = ("student_error", "teacher_error", "disagreement", "margin_form", "norm_form")
    figures = " | ".join(f"{last[f'{name}_percent']:.2f}" for name in terms)
    return f"""
Bound on the student's error through the teacher's classifier, last epoch, % of the validation images: student wrong is
at most teacher wrong plus any of the three to its right. `ijckd-fast bound` says what dominates, and has the classes.

| student wrong | teacher wrong | disagreement | margin form | norm form |
|---|---|---|---|---|
| {figures} |

![bound]({run_folder.BOUND_PLOT})
"""


def loss_terms(train: Sequence[Mapping[str, Any]]) -> list[str]:
    """The loss and its terms, as a run's log names them: in a row of kind "train" they stand from loss to grad_norm."""
    names = list(train[0]) if train else []
    return names[names.index("loss") : names.index("grad_norm")] if names else []


def plot_training(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Loss terms, accuracies, learning rate and speed over the epochs, as a PNG of about 1400 x 960 pixels."""
    train = [row for row in rows if row["kind"] == "train"]
    val = [row for row in rows if row["kind"] == "eval"]
    drawing, ((losses, accuracy), (rate, speed)) = plots.figure(2, 2)
    for label, points in _distinct_losses(train).items():
        plots.curve(losses, points, label=label)
    plots.log_scale(losses)
    losses.set(title="loss and its unweighted terms")
    for source, name, label in (
        (train, "top1_train_percent", "top-1, training images as augmented"),
        (val, "top1_percent", "top-1, validation images"),
        (val, "agreement_percent", "agreement with the teacher, validation"),
    ):
        plots.curve(accuracy, [(row["epoch"], row[name]) for row in source], label=label)
    accuracy.set(title="% of the images")
    plots.curve(rate, [(row["epoch"], row["lr"]) for row in train])
    rate.set(title="learning rate", xlabel="epoch", ylim=(0, None))
    plots.curve(speed, [(row["epoch"], row["images_per_s"]) for row in train], label="images/s, left")
    speed.set(title="images/s, and waiting for data", xlabel="epoch", ylabel="images/s", ylim=(0, None))
    for axes, shown in ((losses, losses.lines), (accuracy, accuracy.lines), (rate, train), (speed, train)):
        if not shown:
            plots.say_nothing_to_show(axes, "nothing logged")
    if train:
        wait = speed.twinx()
        waited = [(row["epoch"], row["loader_wait_percent"]) for row in train]
        plots.curve(
            wait,
            waited,
            color="tab:orange",
        )
        wait.set(ylim=(0, 100), ylabel="% of the time waiting for data")
        speed.plot([], [], color="tab:orange", label="% waiting for data, right")
        plots.legend_above(speed)
    for axes in (losses, accuracy):
        plots.legend(axes)
    drawing.savefig(path, dpi=150)


def _distinct_losses(train: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float | None]]]:
    """(epoch, value) of the loss and its terms by what a legend calls them; those that are one curve, by one name."""
    found: dict[str, list[tuple[float, float | None]]] = {}
    for name in loss_terms(train):
        points = [(row["epoch"], row[name]) for row in train]
        if all(value is None for _, value in points):
            continue
        same = next((other for other, theirs in found.items() if theirs == points), None)
        if same is None:
            found[name] = points
        else:
            found = {(f"{other} = {name}" if other == same else other): theirs for other, theirs in found.items()}
    return found


def plot_bound(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The terms of the bound, and the discrepancies behind them, over the epochs: a PNG of about 1400 x 480 pixels.

    rows  those of kind "bound"
    """
    drawing, ((terms, distances),) = plots.figure(2)
    for name in ("student_error", "teacher_error", "disagreement", "margin_form", "norm_form"):
        points = [(row["epoch"], row[f"{name}_percent"]) for row in rows]
        plots.curve(terms, points, label=name.replace("_", " ").replace("error", "wrong"))
    terms.set(title="terms of the bound, % of images", xlabel="epoch", ylim=(0, None))
    for name, label in (("logit_mse", "logits"), ("pooled_mse", "pooled features"), ("map_mse", "maps")):
        plots.curve(distances, [(row["epoch"], row[name]) for row in rows], label=label)
    plots.log_scale(distances)
    distances.set(title="mean square difference from the teacher", xlabel="epoch")
    for axes in (terms, distances):
        plots.legend(axes)
    drawing.savefig(path, dpi=150)
