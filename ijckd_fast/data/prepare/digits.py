"""The embedded data set: scikit-learn's 1,797 handwritten digits as an ImageNet-layout tree of JPEG files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from ijckd_fast import extras
from ijckd_fast.data.counter_rng import permutation
from ijckd_fast.errors import UserError
from ijckd_fast.files import claimed, remove_leftovers

NUM_DIGITS = 1797
_MARKER = ".ijckd-digits.json"
_LAYOUT = 1  # change with anything that changes the written files
_QUALITY = 95


def write_digits(root: str | Path, *, train: int = 1000, size: int = 32, seed: int = 0) -> Path:
    """Writes root/{train,val}/<0..9>/<number>.jpg, gray JPEGs of size x size pixels, unless they are already there.

    train    training images, shared among the classes as evenly as their sizes allow (stratified); the rest is val
    size     side in pixels; the originals are 8 x 8 and are enlarged bicubically
    seed     of the split; equal arguments give equal files
    returns  root
    raises   UserError: scikit-learn missing, train or size out of range, root holds something else (left untouched)
    The tree is made beside root and renamed into place, so that an interrupted call leaves none.
    """
    root = Path(root)
    if not 10 <= train <= NUM_DIGITS - 10:
        raise UserError(f"the digits need from 10 to {NUM_DIGITS - 10} training images, found {train}")
    if size < 8:
        raise UserError(f"the digits need a size of at least 8 pixels, found {size}")
    made_with = {"layout": _LAYOUT, "train": train, "size": size, "seed": seed}
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        _require_complete(root, made_with)
        return root
    images, labels = load_originals()
    root.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(root.parent, root.name)
    with claimed(root, folder=True) as partial:
        try:
            _write_tree(partial, images, labels, train, size, seed)
            (partial / _MARKER).write_text(json.dumps(made_with) + "\n")
            try:
                os.rename(partial, root)  # replaces an empty folder, never a full one
            except OSError:
                _require_complete(root, made_with)  # another process was first
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return root


def load_originals() -> tuple[np.ndarray, np.ndarray]:
    """images [1797, 8, 8] float64 in 0..16, labels [1797] int."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            f"the digits come with scikit-learn, which could not be loaded ({error}): {extras.install('sklearn')}"
        ) from error
    digits = load_digits()
    return digits.images, digits.target


def _require_complete(root: Path, made_with: dict[str, int]) -> None:
    try:
        found = json.loads((root / _MARKER).read_text())
    except (OSError, ValueError):
        found = None
    if found != made_with:
        holds = f"digits written with {found}" if isinstance(found, dict) else "something else"
        raise UserError(
            f"{root} should hold the digits with {made_with}, but holds {holds}; give another folder or delete this one"
        )
    count = sum(1 for _ in root.glob("*/*/*.jpg"))
    if count != NUM_DIGITS:
        raise UserError(
            f"{root} should hold {NUM_DIGITS} digits, found {count}; delete the folder, it will be written again"
        )


def _write_tree(root: Path, images: np.ndarray, labels: np.ndarray, train: int, size: int, seed: int) -> None:
    order = permutation(seed, 0, len(labels))
    counts = np.bincount(labels, minlength=10)
    share = train * counts / counts.sum()
    quota = np.floor(share).astype(int)
    quota[np.argsort(quota - share, kind="stable")[: train - quota.sum()]] += 1  # largest remainders first
    for digit in range(10):
        members = order[labels[order] == digit]
        for split, numbers in (("train", members[: quota[digit]]), ("val", members[quota[digit] :])):
            folder = root / split / str(digit)
            folder.mkdir(parents=True)
            for number in numbers:
                gray = Image.fromarray(np.rint(images[number] * (255 / 16)).astype(np.uint8))
                gray.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{number:04d}.jpg", quality=_QUALITY)
