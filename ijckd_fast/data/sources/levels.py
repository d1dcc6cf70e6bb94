"""Folders that lie one level too high or too deep, or are called otherwise: what was meant, for an error's text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ijckd_fast.data.sources.listing import IMAGE_EXTENSIONS, is_folder, is_hidden, some
from ijckd_fast.data.sources.names import composed

_OTHER_NAMES = {
    "train": ("train", "training", "trainset", "train_set", "trn", "train_images", "images_train"),
    "val": (
        *("val", "valid", "validation", "valset", "val_set", "val_images", "images_val"),
        *("test", "testing", "testset", "test_set", "dev", "eval"),
    ),
}
"""What others call the folder of a split, lower case; the better guess first."""

_SPLITS = frozenset(name for names in _OTHER_NAMES.values() for name in names)
_NO_CLASSES = frozenset(
    {
        *("images", "image", "imgs", "img", "pictures", "photos", "jpg", "jpeg", "jpegs", "jpegimages", "png"),
        *("data", "dataset", "datasets", "classes"),
    }
)
"""Names of folders that hold class folders, and seldom are one; lower case."""

_DEEP = 3  # levels below a split that are looked at
_FEW = 8  # folders of a split: with more it is no wrong level, and looking into each would take long


def meant_by_missing_split(root: Path, split: str) -> str:
    """'; did you mean ...?' where `root` has no folder `split`, or ''."""
    here = _folders(root)
    by_name = {name.lower(): name for name in here}
    other = next((by_name[name] for name in _OTHER_NAMES[split] if name in by_name), None)
    if other is not None:
        return f"; did you mean {root / other}? Rename it to {split!r}, or link to it: ln -s {other} {root / split}"
    for above in (root, *(root / name for name in here[:_FEW])):
        for name in _folders(above)[:_FEW]:
            if {"train", "training", split} & {inner.lower() for inner in _folders(above / name)}:
                return f"; did you mean {above / name}?"
    if (root.parent / split).is_dir() or (root.name.lower() in _SPLITS and here):
        return f"; did you mean {root.parent}?"
    classes = [name for name in here if name.lower() not in _SPLITS and _holds_images(root / name)]
    if len(classes) > 1:
        return (
            f"; if the {len(classes)} folders ({some(classes)}) are the classes, move them into {root / 'train'}, and "
            f"some of the images of each into {root / 'val'}"
        )
    return ""


def meant_by_wrong_level(folder: Path, folders: Sequence[str]) -> str:
    """What to say where the folders of a split do not look like classes, but like what holds them; else ''.

    folder, folders  of the split, and the names in it
    """
    if len(folders) == 1:
        deep = _classes_below(folder / folders[0])
        return "" if deep is None else _move_up(folder, deep)
    if all(name.lower() in _SPLITS for name in folders) and any(len(_folders(folder / name)) > 1 for name in folders):
        return f"did you mean {folder}, which holds {some(folders)}, instead of {folder.parent}?"
    for name in folders:
        if name.lower() in _NO_CLASSES and not _images(folder / name):
            deep = _classes_below(folder / name)
            if deep is not None:
                return f"{_move_up(folder, deep)} (or rename {name!r} if it is a class)"
    return ""


def meant_by_other_classes(folder: Path, expected: Sequence[str], folders: Sequence[str]) -> str:
    """'; did you mean ...?' where the classes `expected` lie deeper than in the folder of their split; else ''."""
    names = set(map(composed, expected))
    level = [folder / name for name in folders] if len(folders) <= _FEW else []
    for _ in range(_DEEP):
        for path in level:
            if 2 * len(names & set(map(composed, _folders(path)))) > len(names):
                return f"; {_move_up(folder, path)}"
        level = [path / name for path in level for name in _folders(path)[:_FEW]][: _FEW * _FEW]
    if len(folders) == 1 and len(expected) > 1 and _images(folder / folders[0]):
        return (
            f"; did you mean the images in {folder / folders[0]}? Move them into {folder}, and name the class of each "
            "by --val-labels"
        )
    return ""


def _classes_below(path: Path) -> Path | None:
    """The first folder from `path` downwards that branches into several with images; None if images come first."""
    for _ in range(_DEEP):
        inner = _folders(path)
        if sum(_holds_images(path / name) for name in inner[:_FEW]) > 1:
            return path
        if len(inner) != 1 or _images(path):
            return None
        path = path / inner[0]
    return None


def _move_up(folder: Path, deep: Path) -> str:
    names = _folders(deep)
    if {"train", "val"} & set(names):
        return f"did you mean {deep} as the data folder? It holds {some(names)}"
    return f"did you mean {deep}? It holds {len(names)} folders ({some(names)}): move them into {folder}"


def _folders(path: Path) -> list[str]:
    """The names of the folders in `path`, sorted; none where it cannot be looked into."""
    try:
        return sorted(entry.name for entry in os.scandir(path) if not is_hidden(entry.name) and is_folder(entry))
    except OSError:
        return []


def _images(path: Path) -> bool:
    """Whether an image file lies in `path` itself."""
    try:
        with os.scandir(path) as entries:
            return any(e.name.lower().endswith(IMAGE_EXTENSIONS) and not is_hidden(e.name) for e in entries)
    except OSError:
        return False


def _holds_images(path: Path, depth: int = _DEEP) -> bool:
    """Whether one lies in it, or not far below."""
    return _images(path) or (depth > 0 and any(_holds_images(path / n, depth - 1) for n in _folders(path)[:_FEW]))
