"""What `ijckd-fast bound` leaves behind: a table, a page with advice, figures class by class, plots."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ijckd_fast import files, plots
from ijckd_fast.data import class_names
from ijckd_fast.distill import Objective
from ijckd_fast.evaluate.bound import BINS, Images, chain_line, overall, per_class, reliability
from ijckd_fast.evaluate.bound_advice import advise

# Shown of each row, in the order of the page: key, name, what it is.
_TERMS = (
    ("student_error_percent", "student wrong %", "through the teacher's classifier"),
    ("teacher_error_percent", "teacher wrong %", ""),
    ("disagreement_percent", "disagreement %", "answers that are not the teacher's"),
    ("margin_form_percent", "margin form %", "logits differ by at least the teacher's margin"),
    ("norm_form_percent", "norm form %", "features differ by enough for that in the worst direction"),
)
_OTHERS = (
    ("own_head_error_percent", "student wrong, own classifier %", ""),
    ("student_only_right_percent", "student right, teacher wrong %", ""),
    ("agreement_at_1_percent", "agreement@1 %", "the teacher's answer is the student's"),
    ("agreement_at_5_percent", "agreement@5 %", "the teacher's answer is among the student's five highest"),
    ("teacher_margin", "teacher's margin", "mean of its highest less its second logit"),
    ("logit_spread", "spread of the logit differences", "mean of the largest less the smallest"),
    ("logit_mse", "logits, mean square difference", "of student's and teacher's, over images and classes"),
    ("feature_distance", "distance of pooled features", "mean length of the difference"),
    ("pooled_mse", "pooled features, mean square difference", "over images and channels"),
    ("map_mse", "maps, mean square difference", "over images, channels and positions"),
    (
        "null_share_percent",
        "of that of the pooled features in null(W) %",
        "where the teacher's classifier sees nothing",
    ),
    ("student_ece_percent", "student's calibration error %", f"{BINS} bins, through the teacher's classifier"),
    ("teacher_ece_percent", "teacher's calibration error %", f"{BINS} bins"),
    ("student_confidence_percent", "student's mean confidence %", ""),
    ("teacher_confidence_percent", "teacher's mean confidence %", ""),
)
_WORST = 20  # classes on the page; bound.csv has all
_BARS = 40  # classes of which each gets its own place in the plot


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value == 0 or abs(value) >= 0.1 else f"{value:.3g}"


def bound_table(row: Mapping[str, Any]) -> Table:
    """The overall figures, for a terminal."""
    shown = Table("figure", "value", "meaning", title=f"the chain and its parts, {row['images']} images")
    shown.columns[1].justify = "right"
    for key, name, meaning in (*_TERMS, *_OTHERS):
        if row[key] is not None:
            shown.add_row(name, _cell(row[key]), meaning)
    return shown


def bound_stem(split: str) -> str:
    """Of the names of the files that `write_bound` leaves: 'bound', or 'bound-train'."""
    return "bound" if split == "val" else f"bound-{split}"


def write_bound(
    folder: Path,
    images: Images,
    classes: Sequence[str],
    about: Mapping[str, Any],
    objective: Objective,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Writes bound.md, bound.json, bound.csv and bound.png (bound-train.* for the training images) into `folder`.

    about    what the figures are of: run, checkpoint, step, split, data, student, teacher, objective, connector,
             answers_through, classes, channels, rank, widest_class_distance
    returns  (rows, advice). The first row is `about` and the figures of all images, then one row for each class:
             "label", "class", its "name" for people and the same figures
    """
    advice = advise(overall(images), objective, about["rank"], about["channels"])
    names = class_names(classes)
    rows: list[dict[str, Any]] = [{"label": None, "class": None, "name": None, **about, **overall(images)}]
    for label, row in enumerate(per_class(images, len(classes))):
        rows.append({"label": label, "class": classes[label], "name": names[label], **row})
    name = bound_stem(about["split"])
    plot_chain(folder / f"{name}.png", images, rows)
    columns = [key for key in rows[0] if key not in about]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write_text(folder / f"{name}.csv", text.getvalue())
    files.write_text(
        folder / f"{name}.json", json.dumps({"about": dict(about), "advice": advice, "rows": rows}, indent=1) + "\n"
    )
    files.write_text(folder / f"{name}.md", _page(name, rows, advice, about))
    return rows, advice


def _called(row: Mapping[str, Any]) -> str:
    """A class in the page and the plot: 'tench (n01440764)'; its name alone where that is all it has."""
    return row["class"] if row["name"] == row["class"] else f"{row['name']} ({row['class']})"


def _page(name: str, rows: Sequence[Mapping[str, Any]], advice: Sequence[str], about: Mapping[str, Any]) -> str:
    row, of_classes = rows[0], rows[1:]
    figures = [
        f"| {what} | {_cell(row[key])} | {meaning} |"
        for key, what, meaning in (*_TERMS, *_OTHERS)
        if row[key] is not None
    ]
    worst = sorted((r for r in of_classes if r["images"]), key=lambda r: -r["student_error_percent"])[:_WORST]
    by_class = [
        f"| {_called(r)} | {r['images']} | " + " | ".join(_cell(r[key]) for key, _, _ in _TERMS) + " |" for r in worst
    ]
    whose = (
        f"all {len(of_classes)} classes"
        if len(worst) == len(of_classes)
        else f"the {len(worst)} classes with most errors"
    )
    advised = "\n".join(f"- {sentence}" for sentence in advice)
    other_head = ""
    if about["answers_through"] == "student":
        other_head = (
            "\nThis student answers through its own classifier. The chain is about its answers through the teacher's, "
            f"which the same features give: {row['student_error_percent']:.2f} % wrong, against "
            f"{row['own_head_error_percent']:.2f} % by its own.\n"
        )
    lines = "\n".join(figures)
    return f"""# Bound on the error of {about["student"]} by {about["objective"]}

`{about["checkpoint"]}` (step {about["step"]}, connector {about["connector"]}) against its teacher {about["teacher"]},
on {row["images"]} {about["split"]} images of `{about["data"]}`.

    student wrong <= teacher wrong + disagreement <= teacher wrong + margin form <= teacher wrong + norm form
    {chain_line(row)}     (% of the images)
{other_head}
## What dominates, what to change

{advised}

The sentences follow from the figures by fixed rules.

## Figures

| | | |
|---|---:|---|
{lines}

Teacher's classifier: {about["classes"]} classes, {about["channels"]} channels, rank {about["rank"]}; \
max ||w_j - w_k|| = {about["widest_class_distance"]:.4g}. Answers are those of float64 logits; `ijckd-fast evaluate` has
them in the run's precision.

![bound]({name}.png)

## Classes

{whose[0].upper() + whose[1:]}, by the student's error; every figure of every class: `{name}.csv`.

| class | images | {" | ".join(what for _, what, _ in _TERMS)} |
|---|---:|{"---:|" * len(_TERMS)}
{chr(10).join(by_class)}

The chain holds for these images, one by one, and says nothing of others. It is a diagnostic of ijckd-fast, not the
theorem of the IJCKD paper.
"""


def plot_chain(path: Path, images: Images, rows: Sequence[Mapping[str, Any]]) -> None:
    """The chain, the classes, how far agreement is certain, and calibration: a PNG of about 1400 x 960 pixels."""
    drawing, ((chain, classes), (certain, calibration)) = plots.figure(2, 2)
    row = rows[0]
    error_t = row["teacher_error_percent"]
    names = ["student wrong", "+ disagreement", "+ margin form", "+ norm form"]
    added = [row[f"{name}_percent"] for name in ("disagreement", "margin_form", "norm_form")]
    chain.bar(names[:1], [row["student_error_percent"]], color="tab:blue", label="student wrong")
    chain.bar(names[1:], [error_t] * 3, color="tab:gray", label="teacher wrong")
    chain.bar(names[1:], added, bottom=[error_t] * 3, color="tab:orange", label="what bounds the rest")
    for place, height in enumerate((row["student_error_percent"], *(error_t + each for each in added))):
        text = f"{height:.1f}" if place == 0 or height < 100 else f"{height:.1f}: says nothing"
        chain.annotate(text, (place, height), ha="center", va="bottom", fontsize="small")
    chain.tick_params(axis="x", labelsize="small")
    chain.set(title="% of images")
    plots.legend_above(chain)

    of_classes = sorted((r for r in rows[1:] if r["images"]), key=lambda r: r["student_error_percent"])
    places = range(len(of_classes))
    for key, label, marker in (  # no lines: between two classes there is nothing
        ("bound_margin_form_percent", "teacher wrong + margin form", "^"),
        ("bound_disagreement_percent", "teacher wrong + disagreement", "x"),
        ("student_error_percent", "student wrong", "o"),
        ("teacher_error_percent", "teacher wrong", "_"),
    ):
        size = 4 if len(of_classes) <= _BARS else 1.5
        classes.plot(places, [r[key] for r in of_classes], marker, label=label, markersize=size)
    classes.axhline(100, color="gray", linewidth=0.6, linestyle=":")
    if len(of_classes) <= _BARS:
        classes.set_xticks(places, [_called(r) for r in of_classes], rotation=90, fontsize="x-small")
    classes.annotate("a bound of 100 says nothing", (0, 100), fontsize="x-small", color="gray", va="bottom")
    classes.set(title="% of each class's images, by the student's error", ylim=(0, None))
    plots.legend_above(classes)

    floor = torch.finfo(torch.float32).tiny
    edges = torch.linspace(-3, 3, 61)
    for reach, label in (
        (images.spread, "spread / margin"),
        (images.distance * row["widest_class_distance"], "norm bound / margin"),
    ):
        ratio = (reach.clamp(min=floor) / images.margin.clamp(min=floor)).log10().clamp(-3, 3).float()
        certain.hist(ratio.numpy(), edges.numpy(), alpha=0.6, label=label)
    certain.axvline(0, color="black", linewidth=1)
    certain.set(xlabel="log10 of the ratio; left of 0 the agreement is certain", title="images")
    plots.legend_above(certain)

    one_group = torch.zeros_like(images.labels)
    for confidence, answer, label in (
        (images.confidence, images.answer, "student"),
        (images.confidence_t, images.answer_t, "teacher"),
    ):
        count, confident, hits = (x[0] for x in reliability(confidence, answer == images.labels, one_group))
        some = count > 0
        calibration.plot((confident / count)[some].numpy(), (hits / count)[some].numpy(), ".-", label=label)
    calibration.plot([0, 1], [0, 1], color="gray", linewidth=1, linestyle=":")
    calibration.set(xlabel="mean confidence of a bin", title="share of right answers", xlim=(0, 1), ylim=(0, 1.02))
    plots.legend(calibration, loc="upper left")
    drawing.savefig(path, dpi=150)
