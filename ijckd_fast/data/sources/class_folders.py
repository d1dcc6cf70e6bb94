"""Class folders, root/split/<class>/**/*.jpg: the folder that an image lies in is its class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ijckd_fast.data.sources.listing import some
from ijckd_fast.data.sources.source import Content, Listed, Source
from ijckd_fast.errors import UserError


class ClassFolders(Source):
    """See the module. Images lie at any depth below their class folder."""

    title = "class folders"

    @classmethod
    def recognised_by(cls, content: Content) -> Sequence[str]:
        """The folders, whatever lies beside them: archives are what they were unpacked from, as often with ImageNet."""
        return content.folders

    def groups(self, classes: Sequence[str] | None, where: str) -> list[str]:
        """One for each class."""
        folders = self.content.folders
        if classes is not None and set(classes) != set(folders):
            raise UserError(_other_classes(self.content.folder, tuple(classes), folders, where))
        return [f"{self.content.split}/{name}" for name in (folders if classes is None else classes)]

    def labels(self, listed: Listed, classes: Sequence[str] | None) -> tuple[tuple[str, ...], np.ndarray]:
        """A group's number is the label of what is in it."""
        names = self.content.folders if classes is None else tuple(classes)
        return names, np.repeat(np.arange(len(names)), listed.rows)


def _other_classes(folder: Path, expected: tuple[str, ...], found: tuple[str, ...], where: str) -> str:
    missing = sorted(set(expected) - set(found))
    extra = sorted(set(found) - set(expected))
    parts = [f"{len(missing)} missing ({some(missing)})"] if missing else []
    parts += [f"{len(extra)} unexpected ({some(extra)})"] if extra else []
    return (
        f"{folder} must have the {len(expected)} class folders that {where}, found {len(found)}: {', '.join(parts)}; "
        "make the names equal"
    )
