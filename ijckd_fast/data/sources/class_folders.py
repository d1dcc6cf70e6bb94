"""Class folders, train/<class>/**/*.jpg: the folder that an image lies in is its class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ijckd_fast.data.sources.levels import meant_by_other_classes, meant_by_wrong_level
from ijckd_fast.data.sources.listing import some
from ijckd_fast.data.sources.names import composed, counterparts, did_you_mean, require_distinct
from ijckd_fast.data.sources.source import Content, Listed, Source
from ijckd_fast.errors import UserError


class ClassFolders(Source):
    """See the module. Images lie at any depth below their class folder."""

    title = "class folders"
    class_is_group = True
    labels_from = "folders"

    @classmethod
    def recognised_by(cls, content: Content) -> Sequence[str]:
        """The folders, whatever lies beside them: archives are what they were unpacked from, as often with ImageNet."""
        return content.folders

    def groups(self, classes: Sequence[str] | None, where: str) -> list[str]:
        """One for each class."""
        folder, folders = self.content.folder, self.content.folders
        require_distinct(folders, f"the class folders of {folder}")
        if classes is None:
            meant = meant_by_wrong_level(folder, folders)
            if meant:
                raise UserError(
                    f"{folder} must hold one folder of images per class, found {len(folders)} ({some(folders)}) that "
                    f"{'does' if len(folders) == 1 else 'do'} not look like {'one' if len(folders) == 1 else 'these'}: "
                    f"{meant}"
                )
            return [self.content.below(name) for name in folders]
        there = counterparts(classes, folders, f"class folders of {folder}")
        if not len(there) == len(set(there.values())) == len(classes) == len(folders):
            raise UserError(_other_classes(folder, classes, folders, where))
        return [self.content.below(there[name]) for name in classes]

    def unused(self) -> Sequence[str]:
        """Whatever lies beside the class folders."""
        return (*self.content.images, *self.content.others)

    def labels(self, listed: Listed, classes: Sequence[str] | None) -> tuple[tuple[str, ...], np.ndarray]:
        """A group's number is the label of what is in it."""
        names = self.content.folders if classes is None else tuple(classes)
        return names, np.repeat(np.arange(len(names)), listed.rows)


def _other_classes(folder: Path, expected: Sequence[str], found: Sequence[str], where: str) -> str:
    forms = set(map(composed, expected)), set(map(composed, found))
    missing = sorted(name for name in expected if composed(name) not in forms[1])
    extra = sorted(name for name in found if composed(name) not in forms[0])
    parts = [f"{len(missing)} missing ({some(missing)})"] if missing else []
    parts += [f"{len(extra)} unexpected ({some(extra)})"] if extra else []
    meant = did_you_mean(extra, missing) or _meant_by_numbers(expected, found)
    meant = meant or meant_by_other_classes(folder, expected, found)
    return (
        f"{folder} must have the {len(expected)} class folders that {where}, found {len(found)}: {', '.join(parts)}; "
        f"make the names equal{meant}"
    )


def _meant_by_numbers(expected: Sequence[str], found: Sequence[str]) -> str:
    """What to do where classes that are only numbered, as in archives, meet as many folders with names; else ''."""
    if len(expected) != len(found) or not all(name.isdecimal() for name in expected):
        return ""
    return (
        f"; where the folders in their order are the classes {expected[0]} to {expected[-1]}, name them, one in a "
        "line, by --class-list FILE"
    )
