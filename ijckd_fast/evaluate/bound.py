"""How far a student can be from its teacher: a chain of upper bounds on its error, measured image by image.

With l = W z + b and l_t = W pooled_t + b, both through the teacher's classifier W [K, Ct], d = z - pooled_t, answers by
the highest logit, and m_t the teacher's highest logit less its second highest:

    P[student wrong] <= P[teacher wrong] + P[student's answer is not the teacher's]         (disagreement)
                     <= P[teacher wrong] + P[max_k (W d)_k - min_k (W d)_k >= m_t]          (margin form)
                     <= P[teacher wrong] + P[max_jk ||w_j - w_k|| ||d|| >= m_t]             (norm form)

It holds on every finite set of images and is no statement about others. It is this project's own diagnostic, not the
theorem of the IJCKD paper. Proof, meaning and use: docs/bound.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ijckd_fast.distill import Compared, Distiller
from ijckd_fast.errors import UserError
from ijckd_fast.parallel import Processes

BINS = 15  # of the calibration error, equal widths
_ROUNDING = torch.finfo(torch.float64).eps  # 2^-52, twice what one operation rounds by at most
_LOGITS_AT_ONCE = 1 << 22  # float64 numbers: 32 MB for each of a few such matrices


# ----------------------------------------------------------------------------------------------------------------------
# What is measured


class Geometry(NamedTuple):
    """The teacher's classifier, as the bound sees it; float64.

    weight     [K, Ct], bias [K]
    row_space  [r, Ct], orthonormal rows that span what W sees; the rest is null(W)
    longest    max_k ||w_k||
    widest     max_jk ||w_j - w_k||, rounded up by as much as its computation may have lost
    """

    weight: Tensor
    bias: Tensor
    row_space: Tensor
    longest: float
    widest: float

    @property
    def rank(self) -> int:
        return len(self.row_space)


def geometry(classifier: nn.Linear) -> Geometry:
    """Of a classifier Ct -> K, with or without a bias, on its device.

    Singular values of W up to max(K, Ct) x 2^-23 times the largest count as 0: W is kept in float32, and directions
    that it sees less than that are rounding.
    raises  UserError for fewer than two classes
    """
    weight = classifier.weight.detach().double()  # [K, Ct]
    classes, channels = weight.shape
    if classes < 2:
        raise UserError(f"the bound compares classes, and the teacher's classifier has {classes}: expected at least 2")
    bias = weight.new_zeros(classes) if classifier.bias is None else classifier.bias.detach().double()
    # R of W = QR has the singular values and the row space of W, and Ct rows instead of K
    small = torch.linalg.qr(weight, mode="r").R if classes > channels else weight
    _, values, rows = torch.linalg.svd(small, full_matrices=False)
    rank = int((values > max(classes, channels) * torch.finfo(torch.float32).eps * values[0]).sum())
    longest = weight.square().sum(1).max().sqrt().item()
    return Geometry(weight, bias, rows[:rank], longest, widest_pair(weight))


def widest_pair(weight: Tensor, block: int = 2048) -> float:
    """max_jk ||w_j - w_k||_2 over the rows of weight [K, Ct] float64, never too small by rounding.

    The distances come from products of blocks, which take block^2 x 8 bytes. The largest is then computed again from
    its two rows, and what the products may have lost is added.
    """
    channels = weight.shape[1]
    squares = weight.square().sum(1)  # [K]
    largest, pair = -math.inf, (0, 0)
    for i in range(0, len(weight), block):
        for j in range(i, len(weight), block):
            distances = weight[i : i + block] @ weight[j : j + block].T  # [block, block]
            distances.mul_(-2).add_(squares[i : i + block, None]).add_(squares[None, j : j + block])
            place = int(distances.argmax())
            row, column = divmod(place, distances.shape[1])
            found = distances[row, column].item()
            if found > largest:
                largest, pair = found, (i + row, j + column)
    exact = (weight[pair[0]] - weight[pair[1]]).square().sum().item()
    lost = 4 * (channels + 4) * _ROUNDING * squares.max().item()  # of one distance; the true widest pair may be another
    return math.sqrt(exact + 2 * lost)


class Images(NamedTuple):
    """One row per image, float64 where nothing else is said; about 110 bytes an image.

    ids, labels        [n] int64
    answer, answer_t   [n] int64: class of student (through the teacher's classifier) and teacher; of equal logits the
                       first class's
    own_answer         [n] int64 of the student through its own classifier; None without one
    rank               [n] int64: how many classes the student puts before the teacher's answer
    margin             [n] m_t, the teacher's highest logit less its second
    spread             [n] max_k (l - l_t)_k - min_k (l - l_t)_k
    spread_reaches     [n] bool: spread >= m_t, spread rounded up
    distance           [n] ||z - pooled_t||
    distance_reaches   [n] bool: max_jk ||w_j - w_k|| x distance >= m_t, the product rounded up
    pooled_mse         [n] ||z - pooled_t||^2 / Ct; null_mse: of its part in null(W)
    map_mse            [n] mean square difference of the maps; None without maps
    logit_mse          [n] mean over classes of (l - l_t)^2
    confidence, confidence_t   [n] highest probability of student (through the teacher's classifier) and teacher
    """

    ids: Tensor
    labels: Tensor
    answer: Tensor
    answer_t: Tensor
    own_answer: Tensor | None
    rank: Tensor
    margin: Tensor
    spread: Tensor
    spread_reaches: Tensor
    distance: Tensor
    distance_reaches: Tensor
    pooled_mse: Tensor
    null_mse: Tensor
    map_mse: Tensor | None
    logit_mse: Tensor
    confidence: Tensor
    confidence_t: Tensor


def measure(classifier: Geometry, seen: Compared, labels: Tensor, ids: Tensor) -> Images:
    """The figures of a batch, on its device; the host waits for nothing.

    seen         what Distiller.compare returned; of its logits only own_logits are used
    labels, ids  [B] int64

    Logits are computed again, in float64, from z and pooled_t [B, Ct], so that one student's and teacher's answer is
    meant throughout: that of the highest float64 logit, of equal ones the first class's. Spread and distance are
    compared with the margin after they have been rounded up by more than float64 can have lost. So the chain holds for
    every image, also where exact arithmetic has equality. That is 1e-11 or so, against margins of 0.01 and more.
    Features must be float32 or narrower, or float64 of that range.
    """
    rows = max(1, _LOGITS_AT_ONCE // len(classifier.weight))
    chunks = [
        _measure(classifier, seen.z[i : i + rows].double(), seen.pooled_t[i : i + rows].double())
        for i in range(0, len(ids), rows)
    ]
    columns = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    return Images(
        ids=ids,
        labels=labels,
        own_answer=None if seen.own_logits is None else seen.own_logits.argmax(1),
        map_mse=None if seen.map_mse is None else seen.map_mse.double(),
        **columns,
    )


def _measure(classifier: Geometry, z: Tensor, pooled_t: Tensor) -> dict[str, Tensor]:
    """z, pooled_t [n, Ct] float64 -> columns of Images."""
    channels = z.shape[1]
    logits = torch.addmm(classifier.bias, z, classifier.weight.T)  # [n, K]
    logits_t = torch.addmm(classifier.bias, pooled_t, classifier.weight.T)
    answer, answer_t = logits.argmax(1), logits_t.argmax(1)  # argmax, not topk: it alone says which of equal ones
    best_two = logits_t.topk(2, 1).values  # [n, 2]
    margin = best_two[:, 0] - best_two[:, 1]
    moved = logits - logits_t
    spread = moved.amax(1) - moved.amin(1)
    difference = z - pooled_t  # [n, Ct]
    squared = difference.square().sum(1)
    distance = squared.sqrt()

    # Rounded up. Given the logits, spread and margin are off by less than 4 eps (max|l| + max|l_t|) together. The
    # logits themselves are off by less than Ct eps (||w|| ||z|| + |b|), which separates the spread from W d, whose
    # spread is at most widest x distance.
    sizes = logits.abs().amax(1) + logits_t.abs().amax(1)
    spread_up = spread + 8 * _ROUNDING * sizes
    lengths = z.square().sum(1).sqrt() + pooled_t.square().sum(1).sqrt()
    lost = (channels + 8) * _ROUNDING
    logits_off = lost * (classifier.longest * lengths + 2 * classifier.bias.abs().max())
    distance_up = classifier.widest * distance * (1 + lost) + 2 * logits_off + 16 * _ROUNDING * sizes

    null = difference - difference @ classifier.row_space.T @ classifier.row_space
    null_squared = null.square().sum(1) if classifier.rank < channels else torch.zeros_like(squared)
    of_teacher = logits.gather(1, answer_t[:, None])  # [n, 1] the student's logit of the teacher's answer
    before = torch.arange(logits.shape[1], device=z.device) < answer_t[:, None]  # [n, K] that win a tie with it
    return {
        "answer": answer,
        "answer_t": answer_t,
        "rank": ((logits > of_teacher) | ((logits == of_teacher) & before)).sum(1),
        "margin": margin,
        "spread": spread,
        "spread_reaches": spread_up >= margin,
        "distance": distance,
        "distance_reaches": distance_up >= margin,
        "pooled_mse": squared / channels,
        "null_mse": null_squared / channels,
        "logit_mse": moved.square().mean(1),
        "confidence": 1 / (logits - logits.amax(1, keepdim=True)).exp().sum(1),
        "confidence_t": 1 / (logits_t - logits_t.amax(1, keepdim=True)).exp().sum(1),
    }


def merge(parts: Sequence[Images]) -> Images:
    """All rows in the order of their ids.

    So they are the same, and so are all sums over them, however the images were divided into parts.
    raises  UserError where there is no image
    """
    if not parts:
        raise UserError("there is no image to measure the bound on: the split is empty")
    columns = [
        None if column is None else torch.cat([part[i] for part in parts])  # type: ignore[misc] # None in none or all
        for i, column in enumerate(parts[0])
    ]
    order = columns[0].argsort()  # type: ignore[union-attr] # of the ids
    return Images._make(None if column is None else column[order] for column in columns)


def check_chain(images: Images) -> None:
    """RuntimeError unless every line of the chain holds for every image: it does, unless this file has a mistake."""
    wrong, wrong_t = images.answer != images.labels, images.answer_t != images.labels
    differs = images.answer != images.answer_t
    lines = {
        "student wrong, teacher right, same answer": wrong & ~wrong_t & ~differs,
        "other answers though the logits' spread is below the margin": differs & ~images.spread_reaches,
        "the spread reaches the margin and the distance does not": images.spread_reaches & ~images.distance_reaches,
    }
    for what, broken in lines.items():
        if broken.any():
            n = int(broken.int().argmax())
            raise RuntimeError(
                f"internal error: the chain of the bound does not hold for {int(broken.sum())} of {len(broken)} images "
                f"({what}); the first is image {int(images.ids[n])}, margin {images.margin[n]:.17g}, spread "
                f"{images.spread[n]:.17g}, distance {images.distance[n]:.17g}. Please report it"
            )


class BoundMeter:
    """Takes the figures while `evaluate` runs: evaluate(meter.predict, ..., note=meter.note), then `take`.

    The student runs once for both; the teacher, which `evaluate` alone does not need, runs once more.

    distiller  with a connector and a teacher that is no cache
    """

    def __init__(self, distiller: Distiller) -> None:
        teacher = distiller.teacher
        assert teacher is not None
        assert teacher.classifier is not None
        self.geometry = geometry(teacher.classifier)
        self._compare = distiller.compare
        self._seen: Compared | None = None
        self._parts: list[Images] = []

    def predict(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S] -> logits [B, K], those of Distiller.predict."""
        self._seen = self._compare(images)
        return self._seen.logits

    def note(self, labels: Tensor, ids: Tensor) -> None:
        """labels, ids [B] of the images that `predict` saw last; the host waits for nothing."""
        assert self._seen is not None
        self._parts.append(measure(self.geometry, self._seen, labels, ids))

    def take(self, processes: Processes = Processes()) -> Images:  # noqa: B008 - frozen
        """Everything noted by all processes, on the CPU, the same in each; starts again from nothing.

        raises UserError where features are not finite, or there is no image
        """
        mine = []
        if self._parts:
            mine = [Images._make(None if column is None else column.cpu() for column in merge(self._parts))]
        self._parts = []
        images = merge([part for theirs in processes.gather(mine) for part in theirs])
        bad = ~(images.distance.isfinite() & images.spread.isfinite())
        if bad.any():
            raise UserError(
                f"student's or teacher's features of {int(bad.sum())} of {len(bad)} images are NaN or infinite, "
                "expected finite ones: the training has diverged, or half precision overflows (--amp-dtype float32)"
            )
        check_chain(images)
        return images


# ----------------------------------------------------------------------------------------------------------------------
# Figures of all images, and of each class


def overall(images: Images) -> dict[str, Any]:
    """The figures of all images, units in the key names (docs/bound.md says what each is)."""
    return _figures(images, torch.zeros_like(images.labels), 1)[0]


def per_class(images: Images, num_classes: int) -> list[dict[str, Any]]:
    """The same of the images of each label 0 ... K - 1; None for what no image tells of."""
    return _figures(images, images.labels, num_classes)


def _figures(images: Images, group: Tensor, groups: int) -> list[dict[str, Any]]:
    """group [n] int64: which of the rows an image counts in."""
    labels, answer, answer_t = images.labels, images.answer, images.answer_t
    right, right_t = answer == labels, answer_t == labels

    def sums(column: Tensor) -> list[float]:
        return torch.bincount(group, column.double(), groups).tolist()

    count = sums(torch.ones_like(group))
    shares = {  # of images, percent
        "teacher_error": sums(~right_t),
        "student_error": sums(~right),
        "own_head_error": None if images.own_answer is None else sums(images.own_answer != labels),
        "disagreement": sums(answer != answer_t),
        "student_only_right": sums(right & ~right_t),
        "margin_form": sums(images.spread_reaches),
        "norm_form": sums(images.distance_reaches),
        "agreement_at_1": sums(images.rank < 1),
        "agreement_at_5": sums(images.rank < 5),
        "student_confidence": sums(images.confidence),
        "teacher_confidence": sums(images.confidence_t),
    }
    ece = {
        "student_ece": calibration_error(images.confidence, right, group, groups),
        "teacher_ece": calibration_error(images.confidence_t, right_t, group, groups),
    }
    squared, null = sums(images.pooled_mse), sums(images.null_mse)
    means = {  # in the units of logits and features
        "teacher_margin": sums(images.margin),
        "logit_spread": sums(images.spread),
        "feature_distance": sums(images.distance),
        "pooled_mse": squared,
        "map_mse": None if images.map_mse is None else sums(images.map_mse),
        "logit_mse": sums(images.logit_mse),
    }

    rows = []
    for g, n in enumerate(count):
        row: dict[str, Any] = {"images": int(n)}
        row |= {f"{name}_percent": 100 * c[g] / n if n and c is not None else None for name, c in shares.items()}
        row |= {f"{name}_percent": 100 * error[g] if n else None for name, error in ece.items()}
        row |= {name: column[g] / n if n and column is not None else None for name, column in means.items()}
        row["null_share_percent"] = 100 * null[g] / squared[g] if squared[g] else None
        for form in ("disagreement", "margin_form", "norm_form"):
            bound = row["teacher_error_percent"] + row[f"{form}_percent"] if n else None
            row[f"bound_{form}_percent"] = bound
        rows.append(row)
    return rows


def reliability(confidence: Tensor, right: Tensor, group: Tensor, groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """What a reliability diagram shows: BINS equal widths of confidence, bin b is (b / BINS, (b + 1) / BINS].

    confidence  [n] float64 in (0, 1]; right [n] bool; group [n] int64 in [0, groups)
    returns     per group and bin, [groups, BINS] float64: number of images, sum of their confidences, number of them
                that are right
    """
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1  # [n]
    place = group * BINS + bins

    def sums(column: Tensor) -> Tensor:
        return torch.bincount(place, column.double(), groups * BINS).view(groups, BINS)

    return sums(torch.ones_like(place)), sums(confidence), sums(right)


def calibration_error(confidence: Tensor, right: Tensor, group: Tensor, groups: int = 1) -> list[float]:
    """Expected calibration error of each group, in [0, 1].

    It is the mean over images of |accuracy - mean confidence| of the image's bin.
    Arguments as for `reliability`; 0 for a group without images.
    """
    count, confident, hits = reliability(confidence, right, group, groups)
    return ((confident - hits).abs().sum(1) / count.sum(1).clamp(min=1)).tolist()


def chain_line(row: Mapping[str, Any]) -> str:
    """The chain in figures, percent of images."""
    error_t = row["teacher_error_percent"]
    terms = [f"{error_t:.2f} + {row[f'{name}_percent']:.2f}" for name in ("disagreement", "margin_form", "norm_form")]
    return " <= ".join([f"{row['student_error_percent']:.2f}", *terms])
