"""Fixtures that several of the data tests use."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from image_tree import write_split

from ijckd_fast.data import Index, build_index
from ijckd_fast.data.index import build
from ijckd_fast.data.prepare import BlockPack, pack
from ijckd_fast.data.sources import ClassFolders, listing


@pytest.fixture(autouse=True)
def _no_user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))


@pytest.fixture
def root(tmp_path) -> Path:
    write_split(tmp_path / "data", "train", {"cat": 5, "dog": 4, "eel": 6})
    return tmp_path / "data"


@pytest.fixture(scope="module")
def whole(request, data, tmp_path_factory) -> Path:
    """A pack of the test module's own `data`, by its settings SMALL."""
    out = tmp_path_factory.mktemp("packs") / "whole"
    pack(data, out, request.module.SMALL, workers=1)
    return out


@pytest.fixture
def out(whole, tmp_path) -> Path:
    """A copy of the pack, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "pack"))


@pytest.fixture
def checked(monkeypatch) -> list[str]:
    """The names of the files that are opened from now on, in the order of their opening."""
    seen: list[str] = []
    check = build.check_image

    def spy(place, *more):
        seen.append(Path(place.path).name)
        return check(place, *more)

    monkeypatch.setattr(build, "check_image", spy)
    return seen


@pytest.fixture
def listed(monkeypatch) -> list[str]:
    """The folders that are listed from now on. Those changed just now may be trusted: no test waits two seconds."""
    seen: list[str] = []
    list_group = ClassFolders.list_group

    def spy(self, group):
        seen.append(group)
        return list_group(self, group)

    monkeypatch.setattr(ClassFolders, "list_group", spy)
    monkeypatch.setattr(listing, "SETTLED_NS", 0)
    return seen


@pytest.fixture(scope="module")
def indexed(tmp_path_factory) -> Index:
    """60 images of four shapes in three classes; not to be changed."""
    root = tmp_path_factory.mktemp("data")
    write_split(root, "train", {"cat": 20, "dog": 20, "eel": 20})
    return build_index(root, "train")


@pytest.fixture(scope="module")
def packed(indexed, tmp_path_factory) -> Index:
    """The same 60 images in blocks; not to be changed."""
    root = tmp_path_factory.mktemp("packed")
    write_split(Path(indexed.root), "val", {"cat": 1, "dog": 1, "eel": 1})
    pack(indexed.root, root / "pack", BlockPack(short=0), workers=1)
    return build_index(root / "pack", "train")


@pytest.fixture
def own(tmp_path) -> Index:
    """24 images in two classes, to be changed."""
    write_split(tmp_path, "train", {"cat": 12, "dog": 12}, size=(48, 64))
    return build_index(tmp_path, "train")
