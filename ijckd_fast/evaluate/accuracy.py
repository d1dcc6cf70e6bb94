"""Accuracy of a net on a split: top-1, top-5, and how often it agrees with the teacher."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ijckd_fast.data import Batch
from ijckd_fast.errors import UserError, memory_told
from ijckd_fast.files import Damaged, disk_full_told, read_bytes, replacing
from ijckd_fast.parallel import Processes


class Evaluation(NamedTuple):
    """Shares of the split's images in percent.

    top1, top5   where the label is the highest, or among the five highest logits (all of them if K < 5)
    agreement    where the highest logit is the teacher's highest, of the images that both saw; None without a teacher
                 to compare with
    images       how many there were, each counted once: all of the split's that could be read
    seconds      wall clock, reading the images included
    predictions  [images] int64 on the CPU, in the order of the loader
    ids          [images] int64 on the CPU, which images they are of
    """

    top1: float
    top5: float
    agreement: float | None
    images: int
    seconds: float
    predictions: Tensor
    ids: Tensor

    def row(self) -> dict[str, float | int | None]:
        """As written to log.jsonl, units in the key names."""
        return {
            "top1_percent": self.top1,
            "top5_percent": self.top5,
            "agreement_percent": self.agreement,
            "images": self.images,
            "images_per_s": self.images / self.seconds,
            "seconds": self.seconds,
        }


@torch.no_grad()
def evaluate(
    logits_of: Callable[[Tensor], Tensor],
    loader: Iterable[Batch],
    *,
    device: torch.device,
    amp_dtype: torch.dtype | None = None,
    teacher: Evaluation | None = None,
    note: Callable[[Tensor, Tensor], None] | None = None,
    processes: Processes = Processes(),  # noqa: B008 - frozen
) -> Evaluation:
    """One pass over `loader` (each image once); the host waits for the device once, at the end.

    logits_of  images [B, 3, S, S] -> logits [B, K], e.g. Distiller.predict or Distiller.teacher_logits
    amp_dtype  autocast to it; None: float32
    teacher    the teacher's own evaluation on the same split
    note       called after logits_of with the batch's labels and ids, each [B] int64: for what else is measured in the
               same pass
    processes  of which each has its own part of the split in its loader; all get the result for the whole
    raises     UserError when no loader gives an image
    """
    start = time.perf_counter()
    hits = torch.zeros(2, dtype=torch.int64, device=device)  # top-1, top-5
    predictions, seen = [], []
    for images, labels, ids, *_ in processes.each(loader):
        size = f"{len(images)} images of {images.shape[-1]} pixels at once on {device}"
        with memory_told(f"evaluating, with {size}", "give a smaller --batch-size, or free memory"):
            with torch.autocast(device.type, amp_dtype or torch.bfloat16, enabled=amp_dtype is not None):
                logits = logits_of(images)  # [B, K]
            highest = logits.topk(min(5, logits.shape[1]), 1).indices  # [B, 5]
            hit = highest == labels[:, None]
            hits += torch.stack([hit[:, 0].sum(), hit.any(1).sum()])
            predictions.append(highest[:, 0])
            seen.append(ids)
            if note is not None:
                note(labels, ids)
    none = torch.zeros(0, dtype=torch.int64)
    mine = torch.cat(predictions).cpu() if predictions else none, torch.cat(seen).cpu() if seen else none, hits.cpu()
    everyone = processes.gather(mine)
    predicted, of = (torch.cat([each[i] for each in everyone]) for i in (0, 1))
    images_seen = len(predicted)
    if images_seen == 0:
        raise UserError("there is no image to evaluate on: the validation split is empty")
    if processes.world > 1:  # ids as one process would have seen them
        order = of.argsort()
        predicted, of = predicted[order], of[order]
    top1, top5 = (100 * count / images_seen for count in sum(each[2] for each in everyone).tolist())
    agreement = None if teacher is None else _agreement(predicted, of, teacher)
    return Evaluation(top1, top5, agreement, images_seen, time.perf_counter() - start, predicted, of)


def _agreement(predicted: Tensor, ids: Tensor, teacher: Evaluation) -> float | None:
    """Percent of equal predictions; a file that could be read in one of the two passes only counts in neither."""
    of_teacher = dict(zip(teacher.ids.tolist(), teacher.predictions.tolist(), strict=True))
    both = [(p, of_teacher[i]) for p, i in zip(predicted.tolist(), ids.tolist(), strict=True) if i in of_teacher]
    return 100 * sum(p == t for p, t in both) / len(both) if both else None


_KEPT = frozenset({"key", "predictions", "ids", "top1_top5_seconds"})


def save_evaluation(path: Path, key: str, evaluation: Evaluation) -> None:
    """Replaces `path` (.npz) by an evaluation without its agreement; `key` says what it is of. UserError: disk full."""
    arrays: dict[str, Any] = {
        "key": np.array(key),
        "predictions": evaluation.predictions.numpy(),
        "ids": evaluation.ids.numpy(),
        "top1_top5_seconds": np.array([evaluation.top1, evaluation.top5, evaluation.seconds]),
    }
    with (
        disk_full_told(f"for {path}", "free some and run the same command again"),
        replacing(path) as tmp,
        open(tmp, "wb") as file,
    ):
        np.savez(file, **arrays, digest=np.array(_digest(arrays)))


def load_evaluation(path: Path, remedy: str) -> tuple[str, Evaluation] | None:
    """Key and evaluation that `save_evaluation` wrote, agreement 100 %; None where there is none of this version.

    raises  Damaged, "PATH is damaged (WHAT): REMEDY"; UserError where the file cannot be read
    """
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        return None
    try:
        with np.load(io.BytesIO(data)) as kept:
            arrays = {name: kept[name] for name in kept.files}
        if arrays.keys() == _KEPT - {"ids"}:
            return None
        digest = arrays.pop("digest", None)  # earlier versions had none
        if arrays.keys() != _KEPT or (digest is not None and digest.item() != _digest(arrays)):
            raise ValueError("its content is not what was written")
        key, (top1, top5, seconds) = arrays["key"].item(), arrays["top1_top5_seconds"].tolist()
    except Exception as error:  # zipfile and numpy raise nearly anything on damaged input
        what = " ".join(str(error).split()) or type(error).__name__
        raise Damaged(f"{path} is damaged ({what}): {remedy}") from error
    predictions, ids = torch.from_numpy(arrays["predictions"]), torch.from_numpy(arrays["ids"])
    return key, Evaluation(top1, top5, 100.0, len(predictions), seconds, predictions, ids)


def known_evaluation(path: Path, key: str, say: Callable[[str], None]) -> Evaluation | None:
    """The teacher's evaluation in `path` where it is whole and of `key`; None where it is to be made (again), with a
    sentence where a file is there.
    """
    again = "the teacher is evaluated again"
    try:
        kept = load_evaluation(path, again)
    except UserError as error:
        damaged = isinstance(error, Damaged)
        say(f"warning: {error}" if damaged else f"warning: {error}; {again}")
        return None
    if kept is not None and kept[0] != key:
        say(f"{path} is of another teacher, other images or other settings: {again}")
        return None
    return None if kept is None else kept[1]


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Of the arrays of `_KEPT`: names, types, shapes and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(_KEPT):
        digest.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape} ".encode() + arrays[name].tobytes())
    return digest.hexdigest()
