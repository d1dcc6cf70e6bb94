"""What the runs of a comparison say: means, and differences seed by seed with intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ijckd_fast.compare.comparison import Comparison

if TYPE_CHECKING:
    from ijckd_fast.compare.training import Outcome

CONFIDENCE = 0.95

Summaries = Mapping[int, Mapping[str, Any]]  # seed -> summary.json


def paired_interval(ours: Mapping[int, float], theirs: Mapping[int, float]) -> tuple[float, float, float] | None:
    """(mean, low, high) of the differences ours - theirs over the seeds that both have; None for fewer than two.

    low, high  ends of the 95 % interval by Student's t with n - 1 degrees of freedom: mean +- t s / sqrt(n), s the
               sample standard deviation of the n differences. It supposes that these come from a normal distribution.
    """
    from scipy.special import stdtrit  # a second to import

    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if len(differences) < 2:
        return None
    mean = statistics.mean(differences)
    n = len(differences)
    t = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2))  # P(|T| <= t) = CONFIDENCE
    half = t * statistics.stdev(differences) / math.sqrt(n)
    return mean, mean - half, mean + half


def top1(summaries: Summaries) -> dict[int, float]:
    """seed -> top-1 of the last epoch, percent"""
    return {seed: summary["last"]["top1_percent"] for seed, summary in summaries.items()}


def method_row(method: str, summaries: Summaries) -> dict[str, Any]:
    """The figures of the runs of a method.

    returns  {"method", "top1_mean", "top1_std", "seeds", "agreement_mean", "params", "macs", "seconds"}: accuracies and
             agreement in percent, of the last epoch; top1_std the sample standard deviation, null for one seed;
             agreement null without a teacher; params and macs as deployed; seconds the mean of a run, training and
             evaluation
    """
    values = list(top1(summaries).values())
    each = list(summaries.values())
    agreements = [summary["last"]["agreement_percent"] for summary in each]
    return {
        "method": method,
        "top1_mean": statistics.mean(values),
        "top1_std": statistics.stdev(values) if len(values) > 1 else None,
        "seeds": len(values),
        "agreement_mean": None if None in agreements else statistics.mean(agreements),
        "params": each[0]["params"],
        "macs": each[0]["macs"],
        "seconds": statistics.mean(summary["seconds"] for summary in each),
    }


def comparison_rows(comparison: Comparison, outcome: Outcome) -> list[dict[str, Any]]:
    """`method_row` of every method in every regime, with "regime" and the differences to the methods of `against`.

    The difference to NAME is the paired one of top-1, in points: "minus_NAME", "minus_NAME_low", "minus_NAME_high",
    null for NAME itself. A method without a finished run has no row.
    """
    rows = []
    for regime, methods in outcome.runs.items():
        for method, summaries in methods.items():
            if not summaries:
                continue
            one = {**method_row(method, summaries), "regime": regime}
            for reference in comparison.against:
                interval = None
                if reference != method:
                    interval = paired_interval(top1(summaries), top1(methods[reference]))
                names = (f"minus_{reference}", f"minus_{reference}_low", f"minus_{reference}_high")
                one.update(zip(names, interval or (None, None, None), strict=True))
            rows.append(one)
    return rows
