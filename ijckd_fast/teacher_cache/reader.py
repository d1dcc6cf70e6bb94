"""A finished cache, to train from: the teacher's classifier and its pooled features."""

from __future__ import annotations

import functools
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from ijckd_fast.data import Augment, Index
from ijckd_fast.errors import UserError, out_of_memory
from ijckd_fast.evaluate import Evaluation, load_evaluation
from ijckd_fast.files import Damaged, cannot_read, read_bytes
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
_THREADS = 8


class TeacherCache:
    """A finished cache, to train from. Opening it reads what is small; features are read as they are asked for, and
    a chunk's checksum is compared before the first of them is used.

    path         absolute
    name         of the teacher's model
    fingerprint  `nets.fingerprint` of the teacher
    weights      the file that its weights came from, 'published' or 'random'
    published    whether its weights are the library's
    views (V), images (N), channels (Ct), num_classes (K)
    unreadable   id -> reason of images that could not be read: their rows are NaN
    normalisation  of the images that the teacher saw
    digest       equal for caches that train to the same bits, wherever they lie

    raises       UserError: `path` holds no cache, an unfinished one, or one whose small files do not fit together;
                 Damaged where one of them is not what was written
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
            raise Damaged(
                f"{self.path / PROGRESS} is damaged: it does not fit {ABOUT}; run {AGAIN} again, which makes again what"
                " cannot be trusted"
            )
        teacher, self._settings = about["teacher"], about["settings"]
        self.name, self.fingerprint = teacher["name"], teacher["fingerprint"]
        self._classifier_digest = teacher["classifier"]
        self.weights: str = teacher["weights"]
        self.published = self.weights == "published"
        self.views, self.images, self.channels = layout.views, layout.images, layout.channels
        self.num_classes: int = self._settings["num_classes"]
        self.unreadable = {i: why for i, (_, why) in unreadable_of(self._done).items()}
        self.normalisation = Normalisation.of(self._settings["mean"], self._settings["std"])
        self.digest: str = about["digest"]
        self._whole = np.zeros(layout.chunks, bool)  # those whose checksum was compared

    @functools.cached_property
    def classifier(self) -> nn.Linear:
        """The teacher's own (Ct -> K), float32 on the CPU. UserError where its file is damaged."""
        path = self.path / CLASSIFIER
        try:
            weights = safetensors.torch.load(read_bytes(path))
            if tensors_digest(weights) != self._classifier_digest:
                raise ValueError("its checksum is not the one written")
            if any(tensor.dtype != torch.float32 for tensor in weights.values()):  # of which the checksum says nothing
                raise ValueError("its numbers are not float32")
            classifier = nn.Linear(self.channels, self.num_classes, bias="bias" in weights)
            classifier.load_state_dict(weights)
        except UserError:
            raise
        except Exception as error:  # safetensors has errors of its own
            if out_of_memory(error):
                raise
            raise Damaged(
                f"{path} is not the classifier that was written ({error}): run {AGAIN} again, which rewrites it"
            ) from error
        return classifier

    def teacher(self) -> CachedTeacher:
        """The teacher as Distiller takes it, without its backbone."""
        return CachedTeacher(self.classifier, self.name, self.fingerprint)

    def check(self, index: Index, augment: Augment, seed: int, data_backend: str) -> None:
        """UserError unless training by these settings sees the views in the cache; Damaged where what is looked at of
        it is not what was written.

        Looked at are the size of features.bin and the checksums of a few chunks, others each time: what is copied badly
        shows before anything is built. The other chunks are compared when `pooled` first reads of them.
        """
        differs = differences(self._settings, plan_settings(index, augment, seed, data_backend))
        if differs:
            raise UserError(
                f"the teacher cache {self.path} has {'; '.join(differs)}: train with the cache's settings and images,"
                " or make another cache with these"
            )
        path = self.path / FEATURES
        size = os.fstat(self._file).st_size if path.exists() else 0
        if size != self._layout.bytes:
            raise Damaged(
                f"{path} has {size:,} bytes, expected {self._layout.bytes:,}: it was cut off or not copied whole. Copy"
                f" it again, or run {AGAIN} again, which makes what is missing"
            )
        self._compare(np.random.default_rng().permutation(self._layout.chunks)[:_CHUNKS_LOOKED_AT])

    @functools.cached_property
    def _file(self) -> int:
        """Descriptor of features.bin. Read, not mapped: what a failing disk or a file that is cut does is then an error
        that can be told, not the end of the process (SIGBUS).
        """
        path = self.path / FEATURES
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise cannot_read(path, error) from error
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def _compare(self, chunks: np.ndarray) -> None:
        """Damaged unless these chunks [n] have the checksums that were written; each is looked at once."""
        new = chunks[~self._whole[chunks]].tolist()
        if not new:
            return
        try:
            with ThreadPoolExecutor(min(_THREADS, len(new))) as pool:  # neither reads nor sums hold the interpreter
                sums = list(pool.map(lambda chunk: crc32(self._file, self._layout, chunk), new))
        except OSError as error:
            raise cannot_read(self.path / FEATURES, error) from error
        for chunk, found in zip(new, sums, strict=True):
            if found != self._done[chunk].crc32:
                view, ids = self._layout.part(chunk)
                raise Damaged(
                    f"{self.path / FEATURES} is damaged: images {ids.start} to {ids.stop - 1} of view {view} are not"
                    f" what was written. Run {AGAIN} again: it looks at every chunk and makes damaged ones again"
                )
        self._whole[new] = True

    def pooled(self, ids: np.ndarray, view: int) -> Tensor:
        """The teacher's pooled features of one view of images.

        ids      [B] int64, positions in the index
        view     in [0, V)
        returns  [B, Ct] float32 on the CPU, each a bfloat16 number; NaN for an image in `unreadable`
        raises   Damaged where a chunk of theirs is not what was written; UserError where it cannot be read
        """
        self._compare(np.unique(self._layout.chunk_of(view, ids)))
        rows = np.empty((len(ids), self.channels), np.uint16)  # [B, Ct]
        size = self.channels * 2
        try:
            for row, i in zip(rows, ids.tolist(), strict=True):
                if os.preadv(self._file, [row.data], (view * self.images + i) * size) != size:
                    raise Damaged(
                        f"{self.path / FEATURES} was cut off while it was read: run {AGAIN} again, which makes what is"
                        " missing"
                    )
        except OSError as error:
            raise cannot_read(self.path / FEATURES, error) from error
        return torch.from_numpy(rows).view(torch.bfloat16).float()

    def on_val(self, index: Index, augment: Augment, data_backend: str) -> Evaluation | None:
        """The teacher's own evaluation; None where none was kept, or of other validation images or settings.

        raises  Damaged where it is not what was written
        """
        kept = load_evaluation(
            self.path / VAL, f"run {AGAIN} again, which makes it again, or delete it to do without the agreement"
        )
        if kept is None or kept[0] != val_key(self.fingerprint, index, augment, data_backend):
            return None
        return kept[1]
