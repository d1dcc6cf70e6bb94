"""Where in a data folder a split lies: in a folder of its own, or in files whose names, or an info file, say which.

train/ and val/, which may also be called validation/; or train and val files beside each other, as Hugging Face's hub
has them: imagenet1k-train-0000.tar, train-00000-of-00294.parquet.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ijckd_fast.data.sources.info_file import Info, read_info
from ijckd_fast.data.sources.levels import meant_by_missing_split
from ijckd_fast.data.sources.listing import IMAGE_EXTENSIONS, is_folder, is_hidden, some
from ijckd_fast.data.sources.source import SPLITS, Content
from ijckd_fast.errors import UserError

_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_WORD = re.compile(rf"(?<![a-z])(?:{'|'.join(_WORDS)})(?![a-z])")
_FLAT = ("", "data")  # folders that hold the files of all splits, below the data folder
_FEW = 32  # folders that are looked into where no split is found
_OF_IMAGENET = "ilsvrc2012_img_"  # archives of image-net.org, which hold no images, or images without labels


def split_of(name: str) -> str | None:
    """'train', 'val' or 'test', by the last word of a file's name that says one; None where none does."""
    words = _WORD.findall(name.lower())
    return _WORDS[words[-1]] if words else None


def require_folder(root: Path, split: str = "train") -> None:
    """UserError where a data folder is no folder."""
    if not root.is_dir():
        raise UserError(
            f"expected class folders of images, {root / split}/<class>/*.jpg, but {root} is not a folder; give the "
            "folder that holds train/ and val/"
        )


def look_into(root: Path, split: str, suffixes: Sequence[str], itself: bool = False) -> Content:
    """What root holds of a split.

    suffixes  of files that hold many images, lower case: those that may lie in one folder for all splits
    itself    where root has no such split, root is it
    raises    UserError where there is none, or two
    """
    if itself and not root.is_dir():
        raise UserError(
            f"--val-dir must be a data folder with a validation split, or a folder of nothing but validation images, "
            f"but {root} is not a folder; give one"
        )
    require_folder(root, split)
    flat = {folder: _files(root / folder, tuple(suffixes)) for folder in _FLAT}
    folder = _folder_of(root, split)
    info = read_info(root, required=folder is None and any(flat.values()))
    if info is not None and split in info.splits:
        return _by_info(root, split, info, folder, flat[""])
    if info is not None and folder is None and flat[""]:
        mine = [name for name in flat[""] if split_of(name) == split]
        if mine:
            raise UserError(
                f"{info.path} must name every archive, and names none of {split}, but {root} has {some(mine)}; remove "
                "them, or remove the info file to go by the archives' names"
            )
    if folder is not None:
        own = _content(root, split, folder)
        _require_not_beside(own, flat, tuple(suffixes))
        return own
    for place, names in flat.items():
        if content := _by_names(root, split, place, names):
            return content
    of_train = any(split_of(name) == "train" for names in flat.values() for name in names)
    if itself and not of_train and not (root / "train").is_dir():
        return _content(root, split, "")
    deeper = [name for name in _folders_in(root) if any(split_of(f) for f in _files(root / name, tuple(suffixes)))]
    raise UserError(_none(root, split, [name for names in flat.values() for name in names], info, deeper))


def _folder_of(root: Path, split: str) -> str | None:
    """The name of the folder of a split; None where it has none. UserError where it has two."""
    there = [name for name in SPLITS[split] if (root / name).is_dir()]
    if len(there) > 1 and not os.path.samefile(root / there[0], root / there[1]):  # one may be a link to the other
        raise UserError(
            f"the validation images must lie in one folder, found {root / there[0]} and {root / there[1]}, which mean "
            "the same; rename or remove one of them, or name one by --val-dir"
        )
    return there[0] if there else None


def _require_not_beside(content: Content, flat: Mapping[str, Sequence[str]], suffixes: tuple[str, ...]) -> None:
    """UserError where a split lies in a folder of its own, as files of many images, and beside it once more."""
    if content.folders or content.images or not any(name.lower().endswith(suffixes) for name in content.others):
        return
    beside = [f"{where}/{name}".lstrip("/") for where, names in flat.items() for name in names]
    twice = [name for name in beside if split_of(os.path.basename(name)) == content.split]
    if twice:
        raise UserError(
            f"the {content.split} images must lie in one place, found files of them in {content.folder} and beside it "
            f"({some(twice)} in {content.root}); remove or move one of the two"
        )


def _folders_in(root: Path) -> list[str]:
    """The first few folders below a data folder."""
    names = sorted(entry.name for entry in os.scandir(root) if is_folder(entry) and not is_hidden(entry.name))
    return names[:_FEW]


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    """The names of the files in a folder that have one of `suffixes`, sorted; none where there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.name.lower().endswith(suffixes) and not is_hidden(entry.name) and not is_folder(entry)
        if not entry.name.lower().startswith(_OF_IMAGENET)
    )


def _content(root: Path, split: str, where: str) -> Content:
    """Of a folder that holds one split, `where` below the root."""
    folders, images, others = [], [], []
    for entry in os.scandir(root / where):
        if is_hidden(entry.name):
            continue
        if is_folder(entry):
            folders.append(entry.name)
        elif entry.name.lower().endswith(IMAGE_EXTENSIONS):
            images.append(entry.name)
        else:
            others.append(entry.name)
    return Content(root, split, where, tuple(sorted(folders)), tuple(sorted(images)), tuple(sorted(others)))


def _by_info(root: Path, split: str, info: Info, folder: str | None, flat: Sequence[str]) -> Content:
    """The files that an info file names for a split. UserError where they are not those that are there."""
    about = info.splits[split]
    if folder is not None:
        outside = [name for name in about.files if not name.startswith(f"{folder}/")]
        if outside:
            raise UserError(
                f"the {split} images must lie in one place, but there is a folder {root / folder}, and {info.path} "
                f"names other files for the split {about.key!r} ({some(outside)}); remove or rename one of the two"
            )
    missing = [name for name in about.files if not (root / name).is_file()]
    if missing:
        raise UserError(
            f"{info.path} names {len(about.files)} files for the split {about.key!r}, but {len(missing)} of them are "
            f"not in {root} ({some(missing)}); fetch them, or remove the info file to do with what is there"
        )
    named = {name for one in info.splits.values() for name in one.files}
    kinds = tuple({os.path.splitext(name)[1] for name in about.files})
    extra = [name for name in flat if name not in named and split_of(name) == split and name.endswith(kinds)]
    if extra:
        raise UserError(
            f"{info.path} names {len(about.files)} files for the split {about.key!r}, but {root} has {len(extra)} more "
            f"of it ({some(extra)}); remove them, or remove the info file to go by the archives' names"
        )
    return Content(root, split, "", (), (), about.files, _beside(root, "", {*named, info.path.name}, split), about)


def _by_names(root: Path, split: str, where: str, names: Sequence[str]) -> Content | None:
    """The files of a split by their names. Where none of them says any split, all are of train, as img2dataset's."""
    splits = {name: split_of(name) for name in names}
    mine = [name for name, of in splits.items() if of == split]
    if not any(splits.values()) and split == "train" and _WORDS.get(root.name.lower()) is None:
        mine = list(names)
    if not mine:
        return None
    if split == "val":
        _require_one_name(root / where, mine)
    used = {*mine, *(name for name, of in splits.items() if of in SPLITS)}
    return Content(root, split, where, (), (), tuple(mine), _beside(root, where, used, split))


def _require_one_name(folder: Path, names: Sequence[str]) -> None:
    """UserError where validation files go by two words, as those of two data sets, or of one that came twice."""
    by_word: dict[str, list[str]] = {}
    for name in names:
        by_word.setdefault(_WORD.findall(name.lower())[-1], []).append(name)
    if len(by_word) > 1:
        (one, first), (other, second), *_ = by_word.items()
        raise UserError(
            f"the validation files in {folder} must go by one word, found {first[0]!r} and {second[0]!r}, which mean "
            f"the same split twice ({len(first)} by {one}, {len(second)} by {other}); remove those of one of them"
        )


def _beside(root: Path, where: str, of_splits: set[str], split: str) -> tuple[str, ...]:
    """What lies beside the files of all splits and is not read; counted with train's."""
    if split != "train":
        return ()
    names = (entry.name for entry in os.scandir(root / where) if not is_hidden(entry.name) and not is_folder(entry))
    return tuple(sorted(set(names) - of_splits))


def _none(root: Path, split: str, flat: Sequence[str], info: Info | None, deeper: Sequence[str]) -> str:
    """What to say where there is no such split. flat: files of many images; deeper: folders that hold such files."""
    inside = sorted(entry.name for entry in os.scandir(root) if not entry.name.startswith("."))
    meant = meant_by_missing_split(root, split)
    if deeper and not meant:
        meant = f"; did you mean {' or '.join(str(root / name) for name in deeper)}?"
    if split == "val" and any(split_of(name) == "test" for name in flat):
        meant += "; if the test files have labels, move them into a folder of their own and name it by --val-dir"
    if archives := [name for name in inside if name.lower().startswith(_OF_IMAGENET)]:
        meant += (
            f"; {some(archives)} of image-net.org {'are' if len(archives) > 1 else 'is'} unpacked by ijckd-fast "
            "prepare-imagenet"
        )
    if split == "val" and (flat or info or (root / "train").is_dir()):
        said = f"{info.path} names none" if info else some(inside)
        return (
            f"expected validation images in {root / 'val'} or validation, or in files like *-validation-*, but {root} "
            f"has no folder 'val' ({said}); name a folder of them by --val-dir DIR, hold a part of the training images "
            f"out by --val-fraction 0.02, or give the folder that holds train/ and val/{meant}"
        )
    return (
        f"expected class folders of images, {root / split}/<class>/*.jpg, but {root} has no folder {split!r} "
        f"({some(inside) or 'it is empty'}); give the folder that holds train/ and val/{meant}"
    )
