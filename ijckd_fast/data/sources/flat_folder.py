"""A flat folder, root/split/*.jpg, with the classes in a text file: ImageNet's validation images from Kaggle."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ijckd_fast.data.sources.label_files import labels_of, read_labels
from ijckd_fast.data.sources.source import Content, Fields, Listed, Source
from ijckd_fast.errors import UserError


class FlatFolder(Source):
    """See the module."""

    title = "images without class folders"
    takes_label_file = True
    labels_from = "label file"

    def __init__(self, content: Content, label_file: str | Path | None, fields: Fields) -> None:
        """Reads the label file. Raises UserError where there is none."""
        super().__init__(content, label_file, fields)
        if label_file is None:
            folder = content.folder
            raise UserError(
                f"expected class folders of images, {folder}/<class>/*.jpg, but {folder} holds {len(content.images)} "
                "image files and no class folder; sort them into one folder per class, or give a file that names the "
                "class of each as --val-labels (for ImageNet's validation set, Kaggle's LOC_val_solution.csv)"
            )
        self._label_file, self._named = label_file, read_labels(label_file)

    @classmethod
    def recognised_by(cls, content: Content) -> Sequence[str]:
        """The image files; folders beside them make them another source."""
        return content.images

    def groups(self, classes: Sequence[str] | None, where: str) -> list[str]:
        """The folder itself."""
        return [self.content.where or "."]

    def labels(self, listed: Listed, classes: Sequence[str] | None) -> tuple[tuple[str, ...], np.ndarray]:
        """What the label file says of each. Its own classes are sorted."""
        own = sorted({label.name for label in self._named.values()})
        names = tuple(own if classes is None else classes)
        files = (os.path.basename(path) for path in listed.paths)
        return names, labels_of(files, self._named, names, self._label_file, self.content.folder)
