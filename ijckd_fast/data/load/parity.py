"""How far the pixels of the executor that a data folder is read with are from Pillow's, on the user's own images.

Of image files that is DALI; of a block pack the block executor, whose views are held to Pillow's of the same planes.

`ijckd-fast bench loader --parity` shows it; the trainer measures it once per dataset and refuses more than --max-drift.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from torch import Tensor

from ijckd_fast.data.counter_rng import permutation
from ijckd_fast.data.index.index import Index
from ijckd_fast.data.index.kept import cache_homes
from ijckd_fast.data.load.backends import backend_of, make_loader
from ijckd_fast.data.load.loader import Batch, Loader
from ijckd_fast.data.plan import AFFINE_OFF, Augment, EvalPlan, Plan, TooManyUnreadable, TrainPlan, what_to_do
from ijckd_fast.errors import UserError
from ijckd_fast.files import CHECK, check_value, read_checked, replacing

_SEED = 0
_SAMPLE_STREAM = 0x9A217
_BATCH = 32
_TRAINER_IMAGES = 128  # per split: a second or two at 224 pixels on two cores
_OF_EACH_VARIANT = 4  # images of each odd variant that are compared besides
_ONE_LEVEL = 1.01  # undoing the normalisation in float32 costs up to 1e-4 of a level


EXECUTORS = {"dali": "DALI", "blocks": "the block executor"}
"""Those that are held to Pillow, and what a sentence calls them."""


class Parity(NamedTuple):
    """|executor - Pillow| of one split's crops, in grey levels of 0..255, the normalisation undone.

    split           'train': random crops and flips; 'val': the evaluation's central crops
    backend         the executor, of EXECUTORS
    images          crops compared, those of odd variants besides the sample; not those of a file that cannot be read
    mean_levels     over all images, pixels and channels
    worst_levels    largest mean of one image; worst_path is its file, relative to the data folder
    beyond_percent  pixels of which a channel differs by more than one level
    most_levels     the largest difference of a channel of a pixel
    executor_top1_percent, pillow_top1_percent  of a net on the two kinds of pixels; None without a net
    disagreements   images that the net answers differently; None without a net
    """

    split: str
    backend: str
    images: int
    mean_levels: float
    worst_levels: float
    worst_path: str
    beyond_percent: float
    most_levels: float
    executor_top1_percent: float | None = None
    pillow_top1_percent: float | None = None
    disagreements: int | None = None


ONE_IMAGE = 2  # a single image may be this many times as far as the mean of all


def drift(parity: Parity) -> float:
    """What --max-drift bounds, grey levels: the mean of all images or, where it is more, half of the farthest one's."""
    return max(parity.mean_levels, parity.worst_levels / ONE_IMAGE)


def within(parity: Parity, max_drift: float) -> bool:
    """Whether an executor may be trained with. The block executor computes one result on every machine, which is never
    more than a level from Pillow's: further off it is broken, whatever may be allowed.
    """
    return drift(parity) <= max_drift and (parity.backend != "blocks" or parity.most_levels <= _ONE_LEVEL)


def executor_of(index: Index) -> str:
    """Of EXECUTORS, the one that reads such images."""
    return backend_of(index.blocks is not None)


def compare(
    index: Index,
    augment: Augment,
    *,
    images: int,
    threads: int = 2,
    logits_of: Callable[[Tensor], Tensor] | None = None,
    device: torch.device | str = "cpu",
    decode: str = "cpu",
    on_bad: Callable[[str, str], None] = lambda path, why: None,
) -> Parity:
    """`executor_of(index)` and Pillow on the same crops of a seeded sample of the images, as the index's split uses
    them.

    And on the central crops of some images of each odd variant there is.

    augment    its warps, mixup, cutmix, repeats and sizes are not used: they are the same code behind either executor
    images     how many, at least 1: train takes whole batches, and further crops of its images if it has fewer; val
               takes no more than it has
    logits_of  images [B, 3, S, S] on `device` -> logits [B, K]: a net to be asked on both kinds of pixels
    decode     DALI's, see DaliLoader; 'hybrid' and 'gpu' need `device` to be a GPU. The block executor works where
               `device` is
    on_bad     called with path and reason of a file that cannot be read; it is left out
    raises     UserError without DALI where it is needed; TooManyUnreadable when nothing of a class of train, or of the
               sample of val, can be read
    """
    plan = sample_plan(index, augment, images)
    plans: list[tuple[Plan, int]] = [(plan, -(-images // plan.batch_size))]
    odd = odd_sample(index)
    if len(odd):
        plans.append((EvalPlan(index, _alone(augment), min(_BATCH, len(odd)), ids=odd), -(-len(odd) // _BATCH)))
    backend = executor_of(index)
    where: dict[str, Any] = {} if backend == "dali" and decode == "cpu" else {"device": device}
    # where a run keeps the whole pack is no matter for pixels, and takes long to set up
    where |= {"decode": decode} if backend == "dali" else {"blocks_on": "copies"}
    with contextlib.ExitStack() as stack:
        loaders: list[tuple[Loader, Loader]] = []
        for plan, stop in plans:
            common: dict[str, Any] = {"threads": threads, "stop": stop, "bad_limit": len(index), "on_bad": on_bad}
            executor = stack.enter_context(make_loader(backend, plan, **common, **where))
            loaders.append((executor, stack.enter_context(make_loader("pillow", plan, **common))))
        return _compare(index, loaders, torch.tensor(augment.std), logits_of, torch.device(device))


def sample_plan(index: Index, augment: Augment, images: int) -> Plan:
    """The plan that both executors follow: as the split is used, without what is the same code behind either."""
    augment = _alone(augment)
    batch_size = min(_BATCH, images, len(index))
    if index.split == "train":
        return TrainPlan(index, augment, batch_size, _SEED)
    return EvalPlan(index, augment, batch_size, ids=np.sort(permutation(_SEED, _SAMPLE_STREAM, len(index))[:images]))


def odd_sample(index: Index) -> np.ndarray:
    """[n] int64, sorted: the first few images of each odd variant, of those that DALI decodes and of the others."""
    if index.odd is None:
        return np.empty(0, np.int64)
    kinds = 2 * index.odd.variant.astype(np.int64) + index.odd.by_pillow
    found = [np.flatnonzero(kinds == kind)[:_OF_EACH_VARIANT] for kind in np.unique(kinds[index.odd.variant > 0])]
    return np.sort(np.concatenate(found)) if found else np.empty(0, np.int64)


def _alone(augment: Augment) -> Augment:
    return dataclasses.replace(augment, **AFFINE_OFF, mixup=0.0, cutmix=0.0, repeats=1, sizes=())


@torch.no_grad()
def _compare(
    index: Index,
    loaders: Sequence[tuple[Loader, Loader]],
    std: Tensor,
    logits_of: Callable[[Tensor], Tensor] | None,
    device: torch.device,
) -> Parity:
    means: list[Tensor] = []
    beyond: list[Tensor] = []
    ids: list[Tensor] = []
    most = 0.0
    right = torch.zeros(2, dtype=torch.int64)  # executor, Pillow
    disagreements = 0
    for a, b, of_train in _batches(loaders):
        rows_a, rows_b = _same_images(a, b, of_train)
        x, y = a.images[rows_a], b.images[rows_b]
        difference = (x - y).abs().permute(0, 2, 3, 1) * (255 * std)  # [b, S, S, 3] grey levels
        means.append(difference.mean((1, 2, 3)))
        beyond.append((difference.amax(3) > _ONE_LEVEL).float().mean((1, 2)))
        most = max(most, float(difference.max())) if len(x) else most
        ids.append(a.ids[rows_a])
        if logits_of is not None and len(x):
            answers = [logits_of(part.to(device)).argmax(1).cpu() for part in (x, y)]
            right += torch.stack([(answer == a.labels[rows_a]).sum() for answer in answers])
            disagreements += int((answers[0] != answers[1]).sum())
    n = sum(map(len, means))
    if n == 0:
        raise TooManyUnreadable(
            f"images were expected to compare {EXECUTORS[executor_of(index)]} with Pillow on, but both could read none "
            f"of the sample of "
            f"{index.folder}; {what_to_do(index, (why for pair in loaders for _, why in pair[0].bad_files))}"
        )
    of_image = torch.cat(means)
    worst = int(of_image.argmax())
    parity = Parity(
        index.split,
        executor_of(index),
        n,
        float(of_image.mean()),
        float(of_image[worst]),
        index.paths[int(torch.cat(ids)[worst])],
        100 * float(torch.cat(beyond).mean()),
        most,
    )
    if logits_of is None:
        return parity
    answers_right = [100 * count / n for count in right.tolist()]
    return parity._replace(
        executor_top1_percent=answers_right[0], pillow_top1_percent=answers_right[1], disagreements=disagreements
    )


def _batches(loaders: Sequence[tuple[Loader, Loader]]) -> Iterator[tuple[Batch, Batch, bool]]:
    """What both executors make of a batch, on the CPU, and whether it is training's."""
    for executor, pillow in loaders:
        # both follow one plan object, so that a file that the one finds unreadable is so for the other from there on
        for a, b in zip(executor, pillow, strict=False):
            a = a._replace(images=a.images.cpu(), labels=a.labels.cpu(), ids=a.ids.cpu())
            yield a, b, isinstance(executor.plan, TrainPlan)


def _same_images(a: Batch, b: Batch, of_train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a and of b that hold the same image. Training replaces what it cannot read, evaluation leaves it out."""
    if of_train:
        rows = np.flatnonzero((a.ids == b.ids).numpy())
        return rows, rows
    _, rows_a, rows_b = np.intersect1d(a.ids.numpy(), b.ids.numpy(), return_indices=True)
    return rows_a, rows_b


def of_dataset(
    train: Index, val: Index, augment: Augment, *, threads: int, device: torch.device | str = "cpu", decode: str = "cpu"
) -> tuple[list[Parity], bool]:
    """The comparison of both splits, and whether it had been made before: it is kept beside the index.

    It is made again for other images, another augmentation or decode, and with another version of DALI, Pillow or our
    executors. raises UserError as compare does
    """
    backends = [executor_of(index) for index in (train, val)]
    made_with = {
        **versions(*backends), "backends": backends, "train": train.hash, "val": val.hash, "augment": repr(augment),
        "decode": decode,
        "odd": [[index.paths[i] for i in odd_sample(index)] for index in (train, val)],
    }  # fmt: skip
    name = f"parity-{hashlib.sha256(json.dumps(made_with).encode()).hexdigest()[:16]}.json"
    folders = cache_homes(Path(train.root), None)
    for folder in folders:
        try:
            kept = read_checked(folder / name, "it is measured again")
            if kept is not None and kept[1]:
                return [Parity(**row) for row in kept[0]["rows"]], True
        except (UserError, KeyError, TypeError):  # it cannot be read, or is damaged: measured again
            continue
    rows = [
        compare(index, augment, images=_TRAINER_IMAGES, threads=threads, device=device, decode=decode)
        for index in (train, val)
    ]
    about = {**made_with, "rows": [row._asdict() for row in rows]}
    text = json.dumps({**about, CHECK: check_value(about)}, indent=1) + "\n"
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / name, shared=True) as path:
                path.write_text(text)
            break
        except OSError:  # a data folder that cannot be written: the next one, or measured again at the next start
            continue
    return rows, False


_CODE = {
    "dali": ("load/dali.py", "index/dali.py", "index/rgb.py"),
    "blocks": ("load/*block*.py", "load/planes.py", "blocks/*.py", "../head/_C*.so"),
}


def versions(*backends: str) -> dict[str, str]:
    """Of what makes the pixels: the libraries, and a digest of the code of these executors and Pillow's.

    raises  ImportError for 'dali' where DALI is not installed
    """
    code = hashlib.sha256()
    here = Path(__file__).parents[1]
    for pattern in ("load/pillow.py", *(pattern for name in sorted(set(backends)) for pattern in _CODE[name])):
        for path in sorted(here.glob(pattern)):
            code.update(path.read_bytes())
    libraries = {"pillow": PIL.__version__}
    if "dali" in backends:
        from ijckd_fast.data.index.dali import VERSION

        libraries["dali"] = VERSION
    return {**libraries, "executors": code.hexdigest()[:16]}
