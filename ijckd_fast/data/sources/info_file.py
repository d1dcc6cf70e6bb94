"""_info.json or info.json, which timm's webdataset archives come with: the files and the numbers of images of a split.

{"splits": {"train": {"name": ..., "num_samples": N, "filenames": [...], "shard_lengths": [...], "alt_label": FIELD}}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ijckd_fast.data.sources.listing import some
from ijckd_fast.errors import UserError
from ijckd_fast.files import read_bytes

NAMES = ("_info.json", "info.json")
"""The first that is there counts, as timm has it."""

_KEYS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}


@dataclass(frozen=True)
class SplitInfo:
    """What an info file says of one split.

    path     the info file
    key      the split's name there
    files    relative to the data folder, in its order
    lengths  images of each; None where the file does not say
    samples  images of all; None likewise
    alt_label  field of each image's .json that holds its label; None: its .cls does
    """

    path: Path
    key: str
    files: tuple[str, ...]
    lengths: tuple[int, ...] | None
    samples: int | None
    alt_label: str | None


@dataclass(frozen=True)
class Info:
    """An info file: what it says of 'train' and 'val', where it names them."""

    path: Path
    splits: Mapping[str, SplitInfo]


def read_info(root: Path, required: bool) -> Info | None:
    """The info file of a data folder; None where there is none, or only a file of that name with another content.

    required  there are files whose split nothing else says for sure: one that cannot be read is refused
    raises    UserError: a split that is named twice, or whose numbers are not those of its files
    """
    path = next((path for name in NAMES if (path := root / name).is_file()), None)
    if path is None:
        return None
    try:
        content = json.loads(read_bytes(path))
    except ValueError as error:
        if not required:
            return None
        raise UserError(
            f"{path} must be JSON that names the files of each split, found: {error}; fetch it again, or remove it to "
            "go by the files' names"
        ) from error
    splits = content.get("splits") if isinstance(content, dict) else None
    if not isinstance(splits, dict):
        return None
    found: dict[str, SplitInfo] = {}
    for key, about in splits.items():
        split = _KEYS.get(key.lower())
        if split is None or not isinstance(about, dict) or not about.get("filenames"):
            continue
        if split in found:
            raise UserError(
                f"{path} must name each split once, found {found[split].key!r} and {key!r}, which mean the same; "
                "remove one of them"
            )
        found[split] = _split(path, key, about)
    _require_distinct_files(path, found)
    return Info(path, found) if found else None


def _split(path: Path, key: str, about: Mapping[str, Any]) -> SplitInfo:
    files, lengths, samples = about["filenames"], about.get("shard_lengths") or None, about.get("num_samples")
    where = f"{path}, split {key!r}:"
    if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
        raise UserError(f"{where} expected filenames to be a list of file names, found {files!r:.80}; fetch it again")
    if lengths is not None and not (isinstance(lengths, list) and all(type(n) is int for n in lengths)):
        raise UserError(
            f"{where} expected shard_lengths to be a list of numbers, found {lengths!r:.80}; fetch it again"
        )
    if samples is not None and type(samples) is not int:
        raise UserError(f"{where} expected num_samples to be a number, found {samples!r:.80}; fetch it again")
    if lengths is not None and len(lengths) != len(files):
        raise UserError(
            f"{where} expected a length for each file, found {len(files)} filenames and {len(lengths)} shard_lengths; "
            "fetch it again, or remove it to go by the files' names"
        )
    if lengths is not None and samples is not None and sum(lengths) != samples:
        raise UserError(
            f"{where} expected num_samples to be the sum of shard_lengths, found {samples} and {sum(lengths)}; fetch "
            "it again, or remove it to go by the files' names"
        )
    alt_label = about.get("alt_label") or None
    return SplitInfo(path, key, tuple(files), None if lengths is None else tuple(lengths), samples, alt_label)


def _require_distinct_files(path: Path, splits: Mapping[str, SplitInfo]) -> None:
    seen: dict[str, str] = {}
    for about in splits.values():
        twice = [name for i, name in enumerate(about.files) if name in seen or name in about.files[:i]]
        if twice:
            raise UserError(
                f"{path} must name each file once, found {some(twice)} again in the split {about.key!r}; fetch it "
                "again, or remove it to go by the files' names"
            )
        seen.update(dict.fromkeys(about.files, about.key))
