"""Any map-style torch dataset by the same plans: an index of its items, and the executor that reads them."""

from __future__ import annotations

import hashlib
import json
import operator
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image

from ijckd_fast.data.index.index import Index, Paths
from ijckd_fast.data.index.rgb import to_rgb
from ijckd_fast.data.load.pillow import PillowLoader, arrange
from ijckd_fast.data.plan import BatchPlan, Plan
from ijckd_fast.data.unreadable import Unreadable, blames_file
from ijckd_fast.errors import UserError

_EXPECTED = (
    "(image, label), the image a PIL image, a uint8 array [H, W, 3] or a uint8 tensor [3, H, W], the label an int"
)


class MapDataset(Protocol):
    """What is asked of a dataset, whose items are (image, label), see index_dataset; from several threads at once."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int, /) -> Any: ...


def index_dataset(
    dataset: MapDataset, split: Literal["train", "val"], classes: Sequence[str] | None = None, workers: int = 0
) -> Index:
    """The index of a dataset, by opening every item once, at every call: sizes are known only then.

    dataset  items are (PIL image or uint8 array [H, W, 3] or uint8 tensor [3, H, W], all as stored: augmentation is the
             plan's; int label from 0). Where it has `targets`, the labels are those
    classes  names in the order of the labels, e.g. the training index's; default: dataset.classes, else the labels'
             digits
    workers  threads that open items; 0 = one per core this process may use
    returns  Index with items in the dataset's order. Those that raise are left out, in `quarantined`, so that an id is
             not an item's number, which the last part of its path is. `hash` is of split, classes, item numbers, labels
             and sizes, not of pixels
    raises   UserError: no items; items of another kind, float tensors above all; labels that are none of the classes,
             or unlike `targets`; a class without a readable item
    """
    try:
        count = len(dataset)
    except TypeError as error:
        raise UserError(
            f"expected a map-style dataset, found {_name(dataset)}, which has no length; give one that has"
        ) from error
    if count == 0:
        raise UserError(
            f"expected a dataset of (image, label) items, but {_name(dataset)} is empty; give one that has items"
        )
    if workers < 0:
        raise UserError(f"workers must be at least 0 (0: one per core), found {workers}")
    targets = _targets(dataset, count)

    def look(i: int) -> tuple[int, int, int] | str:
        """(width, height, label), or why it is left out."""
        try:
            image, label = open_item(dataset, i)
        except Unreadable as error:
            return error.why
        if targets is not None and targets[i] != label:
            raise UserError(
                f"item {i} of {_name(dataset)} has label {label}, but its targets say {targets[i]}; remove its "
                "target_transform"
            )
        return *image.size, label

    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        try:
            seen = list(pool.map(look, range(count)))
        finally:  # refused or interrupted: do not wait for what has not begun
            pool.shutdown(cancel_futures=True)
    good = [i for i, facts in enumerate(seen) if not isinstance(facts, str)]
    facts = np.array([seen[i] for i in good], np.int64).reshape(-1, 3)
    sizes, labels = facts[:, :2].astype(np.int32), facts[:, 2].copy()
    quarantined = [(f"{split}/{i}", why) for i, why in enumerate(seen) if isinstance(why, str)]
    names = _classes(dataset, classes, labels)
    _require_items_of_every_class(dataset, names, labels, quarantined)
    digest = hashlib.sha256(json.dumps([split, names, count]).encode())
    for array in (np.array(good, np.int64), labels, sizes):
        digest.update(array.tobytes())
    paths = Paths.of(f"{split}/{i}" for i in good)
    return Index(_name(dataset), split, names, paths, labels, sizes, quarantined, digest.hexdigest())


def _name(dataset: object) -> str:
    return type(dataset).__name__


def _targets(dataset: MapDataset, count: int) -> list[int] | None:
    targets = getattr(dataset, "targets", None)
    if targets is None:
        return None
    try:
        labels = [operator.index(label) for label in targets]
    except TypeError as error:
        raise UserError(
            f"the targets of {_name(dataset)} must be integer labels, found {error}; give them as ints"
        ) from error
    if len(labels) != count:
        raise UserError(f"{_name(dataset)} has {count} items and {len(labels)} targets; make them as many")
    return labels


def _classes(dataset: MapDataset, classes: Sequence[str] | None, labels: np.ndarray) -> tuple[str, ...]:
    given = getattr(dataset, "classes", None) if classes is None else classes
    if given is None:
        return tuple(str(label) for label in range(int(labels.max(initial=-1)) + 1))
    # torchvision's ImageNet names each class by several words
    return tuple(name if isinstance(name, str) else ", ".join(name) for name in given)


def _require_items_of_every_class(
    dataset: MapDataset, names: tuple[str, ...], labels: np.ndarray, quarantined: list[tuple[str, str]]
) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if len(wrong):
        raise UserError(
            f"labels of {_name(dataset)} must be from 0 to {len(names) - 1}, one of its {len(names)} classes, found "
            f"{labels[wrong[0]]}; renumber them, or name all classes"
        )
    counts = Counter(labels.tolist())
    empty = [label for label in range(len(names)) if not counts[label]]
    if empty or not names:
        which = f"label {empty[0]} ({names[empty[0]]!r}) has none" if empty else "none can be read"
        unreadable = f"; {len(quarantined)} items are unreadable ({quarantined[0][1]})" if quarantined else ""
        raise UserError(
            f"every class of {_name(dataset)} needs at least one readable item, but {which}{unreadable}; add items, or "
            "renumber the labels without gaps"
        )


def open_item(dataset: MapDataset, i: int) -> tuple[Image.Image, int]:
    """Item i as (RGB image, label).

    raises  Unreadable where the dataset raises; UserError for an item of another kind
    """
    where = f"item {i} of {_name(dataset)}"
    try:
        item = dataset[i]
        if isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[0], Image.Image):
            item = item[0].copy(), item[1]  # opened lazily, it is read here
    except Exception as error:
        if not blames_file(error):
            raise
        raise Unreadable(where, f"{type(error).__name__}: {error}") from error
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        what = f"{len(item)} things" if isinstance(item, (tuple, list)) else _name(item)
        raise UserError(f"{where}: expected {_EXPECTED}, found {what}; wrap the dataset in one that returns such pairs")
    image, label = item
    try:
        label = operator.index(label)
    except TypeError as error:
        raise UserError(
            f"{where}: expected {_EXPECTED}, found a label of type {_name(label)}; make it an int"
        ) from error
    return _rgb(image, where), label


def _rgb(image: Any, where: str) -> Image.Image:
    if isinstance(image, Image.Image):
        if image.mode in ("I", "F"):  # whose range only their maker knows
            raise UserError(
                f"{where}: expected 8 or 16 bits per channel, found Pillow mode {image.mode}; convert it to L or RGB"
            )
        return to_rgb(image)
    if isinstance(image, torch.Tensor) and image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3:
        return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return Image.fromarray(np.ascontiguousarray(image))
    if isinstance(image, (torch.Tensor, np.ndarray)):
        found = f"{_name(image)} {list(image.shape)} of {str(image.dtype).removeprefix('torch.')}"
    else:
        found = _name(image)
    floats = isinstance(image, torch.Tensor) and image.is_floating_point()
    advice = "remove its transform: the plan crops, flips and normalises" if floats else "convert it"
    raise UserError(f"{where}: expected {_EXPECTED}, found an image that is {found}; {advice}")


class DatasetLoader(PillowLoader):
    """A plan's batches from the items of a dataset, with PillowLoader's pixels. See Loader for `settings`.

    plan     of the dataset's index, see index_dataset, or of a subset of it
    dataset  the same, called from `threads` threads; an item that raises counts as a file that cannot be read any more
    raises   UserError where the index is of a dataset with more items; while iterating, for an item of another kind
    """

    def __init__(self, plan: Plan, dataset: MapDataset, **settings: Any) -> None:
        super().__init__(plan, **settings)
        self._dataset = dataset
        last = _number(plan.index.paths[len(plan.index) - 1])  # an index keeps the items' order, and so do its subsets
        if last >= len(dataset):
            raise UserError(
                f"the plan is of {plan.index.root} with {last + 1} items or more, found {_name(dataset)} with "
                f"{len(dataset)}; give the dataset that was indexed"
            )

    def _made(self, plan: BatchPlan, i: int) -> np.ndarray:
        return arrange(open_item(self._dataset, _number(plan.paths[i]))[0], plan, i)


def _number(path: str) -> int:
    """Of the item, from its path in the index."""
    return int(path.rpartition("/")[2])
