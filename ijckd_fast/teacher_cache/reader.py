"""A finished cache, to train from: the teacher's classifier and its pooled features."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from ijckd_fast.data import Augment, Index
from ijckd_fast.errors import UserError
from ijckd_fast.evaluate import Evaluation, load_evaluation
from ijckd_fast.nets import CachedTeacher
from ijckd_fast.normalisation import Normalisation
from ijckd_fast.teacher_cache.format import (
    ABOUT,
    AGAIN,
    CLASSIFIER,
    FEATURES,
    PROGRESS,
    VAL,
    crc32,
    differences,
    identity,
    layout_of,
    plan_settings,
    read_about,
    read_progress,
    tensors_digest,
    unreadable_of,
    val_key,
)

_CHUNKS_LOOKED_AT = 4


class TeacherCache:
    """A finished cache, to train from. Opening it reads what is small; features are read as they are asked for.

    path         absolute
    name         of the teacher's model
    fingerprint  `nets.fingerprint` of the teacher
    published    whether its weights are the library's
    views (V), images (N), channels (Ct), num_classes (K)
    unreadable   id -> reason of images that could not be read: their rows are NaN
    normalisation  of the images that the teacher saw
    digest       equal for caches that train to the same bits, wherever they lie

    raises       UserError: `path` holds no cache, an unfinished one, or one whose small files do not fit together
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        about = read_about(self.path)
        if about is None:
            raise UserError(
                f"no teacher cache in {self.path} (it has no {ABOUT}): give the folder that ijckd-fast cache wrote"
            )
        self._layout = layout = layout_of(about)
        self._done, _ = read_progress(self.path / PROGRESS)
        finished = sum(chunk in self._done for chunk in range(layout.chunks))
        if not about["complete"]:
            state = f"finished ({finished} of {layout.chunks} chunks)" if finished < layout.chunks else "verified"
            raise UserError(
                f"the teacher cache {self.path} is not {state}: run {AGAIN} again, which continues where it stopped"
            )
        if finished < layout.chunks or about["digest"] != identity(about, self._done, layout.chunks):
            raise UserError(
                f"{self.path / PROGRESS} is damaged: it does not fit {ABOUT}; run {AGAIN} again, which makes again what"
                " cannot be trusted"
            )
        teacher, self._settings = about["teacher"], about["settings"]
        self.name, self.fingerprint = teacher["name"], teacher["fingerprint"]
        self._classifier_digest = teacher["classifier"]
        self.published: bool = teacher["weights"] == "published"
        self.views, self.images, self.channels = layout.views, layout.images, layout.channels
        self.num_classes: int = self._settings["num_classes"]
        self.unreadable = {i: why for i, (_, why) in unreadable_of(self._done).items()}
        self.normalisation = Normalisation.of(self._settings["mean"], self._settings["std"])
        self.digest: str = about["digest"]

    @functools.cached_property
    def classifier(self) -> nn.Linear:
        """The teacher's own (Ct -> K), float32 on the CPU. UserError where its file is damaged."""
        path = self.path / CLASSIFIER
        try:
            weights = safetensors.torch.load_file(path)
            if tensors_digest(weights) != self._classifier_digest:
                raise ValueError("its checksum is not the one written")
            classifier = nn.Linear(self.channels, self.num_classes, bias="bias" in weights)
            classifier.load_state_dict(weights)
        except Exception as error:  # safetensors has errors of its own
            raise UserError(
                f"{path} is not the classifier that was written ({error}): run {AGAIN} again, which rewrites it"
            ) from error
        return classifier

    def teacher(self) -> CachedTeacher:
        """The teacher as Distiller takes it, without its backbone."""
        return CachedTeacher(self.classifier, self.name, self.fingerprint)

    def check(self, index: Index, augment: Augment, seed: int, data_backend: str) -> None:
        """UserError unless training by these settings sees the views in the cache, and what is looked at of it is
        whole.

        Looked at are the size of features.bin and the checksums of a few chunks, others each time. `ijckd-fast cache`
        looks at all of them.
        """
        differs = differences(self._settings, plan_settings(index, augment, seed, data_backend))
        if differs:
            raise UserError(
                f"the teacher cache {self.path} has {'; '.join(differs)}: train with the cache's settings and images,"
                " or make another cache with these"
            )
        path = self.path / FEATURES
        size = path.stat().st_size if path.is_file() else 0
        if size != self._layout.bytes:
            raise UserError(
                f"{path} has {size:,} bytes, expected {self._layout.bytes:,}: it was cut off or not copied whole. Copy"
                f" it again, or run {AGAIN} again, which makes what is missing"
            )
        few = np.random.default_rng().permutation(self._layout.chunks)[:_CHUNKS_LOOKED_AT].tolist()
        file = os.open(path, os.O_RDONLY)
        try:
            bad = [chunk for chunk in few if crc32(file, self._layout, chunk) != self._done[chunk].crc32]
        finally:
            os.close(file)
        if bad:
            view, ids = self._layout.part(bad[0])
            raise UserError(
                f"{path} is damaged: images {ids.start} to {ids.stop - 1} of view {view} are not what was written. Run"
                f" {AGAIN} again: it looks at every chunk and makes damaged ones again"
            )

    @functools.cached_property
    def _features(self) -> np.ndarray:
        shape = (self.views, self.images, self.channels)
        return np.asarray(np.memmap(self.path / FEATURES, np.uint16, "r", shape=shape))

    def pooled(self, ids: np.ndarray, view: int) -> Tensor:
        """The teacher's pooled features of one view of images.

        ids      [B] int64, positions in the index
        view     in [0, V)
        returns  [B, Ct] float32 on the CPU, each a bfloat16 number; NaN for an image in `unreadable`
        """
        rows = self._features[view].take(ids, axis=0)  # [B, Ct]
        return torch.from_numpy(rows).view(torch.bfloat16).float()

    def on_val(self, index: Index, augment: Augment, data_backend: str) -> Evaluation | None:
        """The teacher's own evaluation; None where what was kept is of other validation images or settings."""
        kept = load_evaluation(self.path / VAL)
        if kept is None or kept[0] != val_key(self.fingerprint, index, augment, data_backend):
            return None
        return kept[1]
