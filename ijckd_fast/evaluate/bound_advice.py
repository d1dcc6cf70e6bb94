"""What dominates the bound and what to change: sentences that follow from the figures by fixed rules.

docs/bound.md has the rules as a table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ijckd_fast.distill import Objective

DOMINATES = 2.0  # times the other term
LOOSE = 2.0  # times the tighter form, and at least a point more
CORRECTS_PERCENT = 25.0  # of the disagreement: images where the student is right and the teacher wrong
HIDDEN_PERCENT = 50.0  # of the squared feature difference in null(W)
ECE_POINTS = 5.0  # and DOMINATES times the teacher's
HEADS_POINTS = 0.5  # between the errors of the student's two heads
VACUOUS_PERCENT = 99.0
FEW_IMAGES = 1000

Row = Mapping[str, Any]


def advise(row: Row, objective: Objective, rank: int, channels: int) -> list[str]:
    """Which term dominates and what to change: the sentences of the rules that apply, the most important first.

    row             of `overall`
    objective       of the run
    rank, channels  of the teacher's classifier: r and Ct
    """
    return [
        _which_term(row),
        *_beyond_the_teacher(row),
        *_null_space(row, objective, rank, channels),
        *_loose_forms(row),
        *_calibration(row),
        *_heads(row, objective),
        *_few_images(row),
    ]


def _terms(row: Row) -> tuple[float, float, float]:
    """(error of the student, error of the teacher, disagreement), percent"""
    return row["student_error_percent"], row["teacher_error_percent"], row["disagreement_percent"]


def _disagreement_dominates(row: Row) -> bool:
    _, error_t, apart = _terms(row)
    return apart >= DOMINATES * error_t


def _which_term(row: Row) -> str:
    _, error_t, apart = _terms(row)
    against = f"the teacher's error is {error_t:.2f} %, the disagreement {apart:.2f} %"
    if error_t == apart == 0:
        return "Neither term: teacher and student are right on every image. These images cannot tell what to change."
    if error_t >= DOMINATES * apart:
        return (
            f"The teacher dominates: {against}. Closer matching can take away no more than the disagreement: a better "
            "teacher lowers the bound most."
        )
    if _disagreement_dominates(row):
        return (
            f"The disagreement dominates: {against}. The student does not follow its teacher yet, and a better teacher "
            "would not fix that: train longer or on more images, match more (--sr, --fm), or take a wider connector or "
            "a larger student."
        )
    return (
        f"Both terms count: {against}. A better teacher and closer matching each lower the bound by at most their own "
        "term."
    )


def _beyond_the_teacher(row: Row) -> list[str]:
    error, error_t, apart = _terms(row)
    said = []
    corrected = row["student_only_right_percent"]
    if corrected and corrected >= CORRECTS_PERCENT / 100 * apart:
        said.append(
            f"On {corrected:.2f} % of the images the student is right and the teacher wrong, which counts as "
            "disagreement: perfect matching would cost these; the hard labels (--ce) are what can keep them."
        )
    if error < error_t:
        said.append(
            f"The student's error ({error:.2f} %) is below its teacher's, where no bound of this kind can follow: it "
            "is never below the teacher's."
        )
    return said


def _null_space(row: Row, objective: Objective, rank: int, channels: int) -> list[str]:
    hidden = row["null_share_percent"]
    if hidden is None:
        return []
    if hidden >= HIDDEN_PERCENT:
        return [
            f"{hidden:.1f} % of the squared feature difference lies in null(W) ({channels - rank} of {channels} "
            "dimensions), which the teacher's classifier does not see: it changes no logit and no answer here, the "
            "logit match (--sr) has no gradient there, only feature matching has. If the features themselves are "
            "needed, raise --fm rather than --sr; for the answers alone leave it."
        ]
    if row["disagreement_percent"] == 0 or not _disagreement_dominates(row):
        return []
    seen = f"{100 - hidden:.1f} % of the squared feature difference is seen by the teacher's classifier"
    if objective.sr > 0:
        return [f"{seen}: raise --sr, which matches exactly that part (now {objective.sr:g})."]
    return [f"{seen}, and the objective has no logit match, which works on exactly that part: try --sr 1."]


def _loose_forms(row: Row) -> list[str]:
    apart = row["disagreement_percent"]
    margin_form, norm_form = row["margin_form_percent"], row["norm_form_percent"]
    said = []
    if margin_form >= max(LOOSE * apart, apart + 1):
        spread, margin = row["logit_spread"], row["teacher_margin"]
        said.append(
            f"The margin form is loose: on {margin_form:.2f} % of the images the logits differ by enough to change the "
            f"answer, on {apart:.2f} % it changes (mean spread of the differences {spread:.2f}, mean margin "
            f"{margin:.2f}). It says for how many images the agreement is certain, {100 - margin_form:.2f} %, not how "
            "many are wrong; the logit match (--sr) works on it."
        )
    if norm_form >= VACUOUS_PERCENT > margin_form:
        said.append(
            f"The norm form is vacuous ({norm_form:.2f} %): the length of the feature difference says nothing here, "
            "its direction does."
        )
    elif norm_form >= max(LOOSE * margin_form, margin_form + 1):
        said.append(
            f"The norm form is loose ({norm_form:.2f} % against {margin_form:.2f} %): feature differences hardly point "
            "from one class to another."
        )
    return said


def _calibration(row: Row) -> list[str]:
    ece, ece_t = row["student_ece_percent"], row["teacher_ece_percent"]
    if ece < max(ECE_POINTS, DOMINATES * ece_t):
        return []
    confidence, right = row["student_confidence_percent"], 100 - row["student_error_percent"]
    which = "over" if confidence > right else "under"
    return [
        f"The student is {which}confident: it claims {confidence:.2f} % and is right on {right:.2f} % (calibration "
        f"error {ece:.2f} %, the teacher's {ece_t:.2f} %). Fit a temperature on held-out images before its "
        "probabilities are used."
    ]


def _heads(row: Row, objective: Objective) -> list[str]:
    error, own = row["student_error_percent"], row["own_head_error_percent"]
    if own is None or abs(own - error) < HEADS_POINTS:
        return []
    name, head = ("the teacher's classifier", "teacher") if error < own else ("its own classifier", "student")
    answers = head == objective.infer_head
    return [
        f"The student's error is {error:.2f} % through the teacher's classifier and {own:.2f} % through its own: here "
        f"{name} is the better" + ("." if answers else f", but the other one answers (--infer-head {head}).")
    ]


def _few_images(row: Row) -> list[str]:
    images = row["images"]
    if images >= FEW_IMAGES:
        return []
    low, high = wilson(row["student_error_percent"] / 100, images)
    return [
        f"{images} images only: one image is {100 / images:.2f} %, and the student's error on such images lies between "
        f"{100 * low:.2f} and {100 * high:.2f} % (95 %, Wilson's interval)."
    ]


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share seen in n images.

    Unlike share ± two standard errors it is no point for a share of 0 or 1.
    """
    square = 1.96**2 / n
    middle = share + square / 2
    half = math.sqrt(square * share * (1 - share) + square**2 / 4)
    return max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))
