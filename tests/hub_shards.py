"""Webdataset archives as Hugging Face's hub has them, and as img2dataset leaves them: flat folders of shards."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ijckd_fast.data import Index


def write_shard(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def sample(key: str, image: bytes, label: Any, about: Mapping[str, Any] | None = None) -> list[tuple[str, bytes]]:
    """KEY.jpg, KEY.cls and KEY.json, as timm's archives have them. about: more of the .json."""
    said = {"label": label, "width": 64, "height": 48, "filename": f"{key}.JPEG", **(about or {})}
    return [(f"{key}.jpg", image), (f"{key}.cls", str(label).encode()), (f"{key}.json", json.dumps(said).encode())]


def write_hub(root: Path, indexes: Sequence[Index], name: str = "imagenet1k-{}-{:04d}.tar", per_shard: int = 7) -> Path:
    """The images of indexes of class folders in root, each split in shards with their names, and _info.json."""
    splits: dict[str, Any] = {}
    for index in indexes:
        split = {"train": "train", "val": "validation"}[index.split]
        files: dict[str, int] = {}
        for first in range(0, len(index), per_shard):
            ids = range(first, min(first + per_shard, len(index)))
            file = name.format(split, first // per_shard)
            members = [sample(f"{i:05d}", index.place(i).read(), int(index.labels[i])) for i in ids]
            write_shard(root / file, [member for one in members for member in one])
            files[file] = len(ids)
        lengths = list(files.values())
        splits[split] = {
            "name": split, "num_samples": sum(lengths), "filenames": list(files), "shard_lengths": lengths,
        }  # fmt: skip
    write_info(root, splits)
    return root


def write_info(root: Path, splits: Mapping[str, Any], name: str = "_info.json") -> None:
    (root / name).write_text(json.dumps({"splits": splits}))


def read_info(root: Path) -> dict[str, Any]:
    return json.loads((root / "_info.json").read_text())["splits"]
