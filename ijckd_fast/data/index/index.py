"""The index of one split: its images in a fixed order, with their labels and sizes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ijckd_fast.data.blocks import Bits
from ijckd_fast.data.counter_rng import permutation, uniforms
from ijckd_fast.data.index.said import DataSettings
from ijckd_fast.data.sources import Place, WholeFile, extent
from ijckd_fast.errors import UserError

HASHED_AT_ONCE = 1 << 16  # files: what fits the processor's cache
_SUBSET_STREAM = 0x5B5E7
_NOISE_STREAM = 0x2015E
_HOLD_OUT_STREAM = 0x401D0


class Paths(Sequence[str]):
    """File names, relative to the data folder, in one run of bytes.

    A str for each would take twice the memory, and minutes to make.
    """

    def __init__(self, encoded: pa.ChunkedArray) -> None:
        """encoded: [N] large_binary, file names as the filesystem has them, which need not be UTF-8."""
        self._encoded = encoded

    @classmethod
    def of(cls, paths: Iterable[str]) -> Paths:
        """The same of strings."""
        return cls(pa.chunked_array([pa.array(map(os.fsencode, paths), pa.large_binary())]))

    def __len__(self) -> int:
        return len(self._encoded)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> Paths: ...
    def __getitem__(self, i: int | slice) -> str | Paths:
        if isinstance(i, slice):
            return Paths(self._encoded.take(pa.array(np.arange(*i.indices(len(self))))))
        return os.fsdecode(self._encoded[int(i)].as_py())

    def encoded(self) -> Iterator[bytes]:
        """The paths as the filesystem has them, which need not be UTF-8."""
        for chunk in self._encoded.chunks:
            for first in range(0, len(chunk), HASHED_AT_ONCE):
                yield from chunk.slice(first, HASHED_AT_ONCE).to_pylist()

    def only(self, rows: np.ndarray) -> Paths:
        """The paths where `rows` [N] bool is true."""
        return Paths(self._encoded.filter(pa.array(rows)))

    def joined(self) -> Iterator[pa.Buffer]:
        """The bytes of the paths with a NUL between each two, in pieces; a NUL belongs between the pieces too."""
        nul = pa.scalar(b"\0", pa.large_binary())
        for chunk in self._encoded.chunks:
            for first in range(0, len(chunk), HASHED_AT_ONCE):
                part = chunk.slice(first, HASHED_AT_ONCE)
                yield pc.binary_join(pa.LargeListArray.from_arrays([0, len(part)], part), nul)[0].as_buffer()

    @property
    def joined_length(self) -> int:
        """Bytes of all paths, with a NUL between each two."""
        return pc.sum(pc.binary_length(self._encoded)).as_py() + len(self) - 1


@dataclass(frozen=True, eq=False)
class Odd:
    """Which images of an index are of odd variants (variants.py), and who decodes them where DALI makes the batches.

    names      of the variants; names[0] is '', plain
    variant    [N] int32, positions in names
    by_pillow  [N] bool, True: Pillow, since DALI cannot, or makes other pixels, or was not asked
    """

    names: tuple[str, ...]
    variant: np.ndarray
    by_pillow: np.ndarray

    def only(self, rows: np.ndarray) -> Odd:
        """Of the images where `rows` [N] bool is true."""
        return Odd(self.names, self.variant[rows], self.by_pillow[rows])


@dataclass(frozen=True, eq=False)
class Index:
    """One split's images in a fixed order: group by group of their source, within a group as it lists them.

    So class folders stand in the order of their labels, with sorted names within; shards in the order of their names.
    An image's id is its position.

    root         absolute path of the data folder
    split        'train' or 'val'
    classes      class folder names, sorted unless another order was asked for; a label is a position in it
    paths        [N] relative to root, with forward slashes; in a shard, the shard's and the member's name
    labels       [N] int64
    sizes        [N, 2] int32, (width, height) as stored: an EXIF orientation is ignored, as torchvision does
    quarantined  (relative path, reason) of every file left out
    hash         hex digest of classes, paths, labels, sizes and file lengths; not of root or times, so that a copy of
                 the data on another machine has the same
    shards       relative paths of the files that hold many images each; () for images in files of their own
    members      [N, 4] int64 (position in shards, offset there, bytes, their checksum); with shards
    place_in_shard  see Source; with shards
    odd          None: all images are plain
    stamps       [N] uint32, see stamps_of, of the images' files when they were indexed; without shards
    folder       the folder that the images lie in, as messages name it; '': root/split
    skipped      images that are not here because their label, a negative number, says that they are of no class
    said         the data folder as the user gave it, for commands that messages advise; None: a data set that is none
    blocks       bits of luma and chroma where the images are blocks (data/blocks), whose checksums `members` has; None:
                 they are encoded files, of whose CRC-32 it is
    """

    root: str
    split: str
    classes: tuple[str, ...]
    paths: Paths
    labels: np.ndarray
    sizes: np.ndarray
    quarantined: list[tuple[str, str]]
    hash: str
    shards: tuple[str, ...] = ()
    members: np.ndarray | None = None
    place_in_shard: Callable[[str, int, int, int | None, tuple[int, int]], Place] = extent
    odd: Odd | None = None
    stamps: np.ndarray | None = None
    blocks: Bits | None = None
    folder: str = ""
    skipped: int = 0
    said: DataSettings | None = None

    def __post_init__(self) -> None:
        if not self.folder:
            object.__setattr__(self, "folder", os.path.join(self.root, self.split))

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def absolute(self, i: int) -> str:
        """What image i is called in errors: the path of its file, or of its shard and its name there."""
        return os.path.join(self.root, self.paths[i])

    def place(self, i: int) -> Place:
        """Where the bytes of image i lie."""
        if self.members is None:
            return WholeFile(self.absolute(i))
        shard, offset, length, checksum = self.members[i].tolist()
        width, height = self.sizes[i].tolist()
        path = os.path.join(self.root, self.shards[shard])
        return self.place_in_shard(path, offset, length, checksum, (width, height))

    def variant(self, i: int) -> str:
        """The odd variant that image i is of; '': it is plain."""
        return "" if self.odd is None else self.odd.names[self.odd.variant[i]]

    def by_pillow(self, decoders_of_gpu: bool = False) -> np.ndarray:
        """[N] bool: images that Pillow decodes where DALI makes the batches.

        decoders_of_gpu  they are others than those that were asked: then all odd images
        """
        if self.odd is None:
            return np.zeros(len(self), bool)
        return self.odd.variant > 0 if decoders_of_gpu else self.odd.by_pillow.copy()

    def subset(
        self, per_class: int | None = None, label_noise: float = 0.0, seed: int = 0, only: str | None = None
    ) -> Index:
        """A smaller or noisier index, a pure function of (this index, arguments).

        per_class    keep this many images of each class, the first in a seeded order; None keeps all
        only         first of all, keep those in whose path this regular expression finds a match; None keeps all
        label_noise  in [0, 1]: this fraction of all kept images (rounded to a whole number) gets another label, drawn
                     uniformly from the other classes
        raises       UserError for a value out of range, no regular expression, a class of which `only` leaves nothing
                     or that has fewer images than per_class
        The kept images stay in their order and are renumbered from 0. `hash` changes with the arguments.
        """
        if only is not None:
            return self._matching(only).subset(per_class, label_noise, seed)
        if per_class is None and label_noise == 0:
            return self
        if not 0 <= label_noise <= 1:
            raise UserError(
                f"label noise must be a fraction between 0 and 1, found {label_noise}; set it to 0 for clean labels"
            )
        keep = np.ones(len(self), bool)
        if per_class is not None:
            counts = np.bincount(self.labels, minlength=self.num_classes)
            smallest = int(counts.argmin())
            if not 1 <= per_class <= counts[smallest]:
                raise UserError(
                    f"{per_class} images per class asked for, but the {self.split} class {self.classes[smallest]!r} "
                    f"has {counts[smallest]}; choose a number from 1 to {counts[smallest]}"
                )
            order = permutation(seed, _SUBSET_STREAM, len(self))
            by_class = order[np.argsort(self.labels[order], kind="stable")]  # classes in turn, each in its seeded order
            first = np.concatenate([[0], np.cumsum(counts)[:-1]])
            keep[:] = False
            keep[by_class[first[:, None] + np.arange(per_class)]] = True
        labels = self.labels[keep]
        if label_noise > 0:
            if self.num_classes < 2:
                raise UserError("label noise needs at least two classes, found one; set label noise to 0")
            chosen = permutation(seed, _NOISE_STREAM, len(labels))[: round(label_noise * len(labels))]
            shift = 1 + np.floor(uniforms(seed, _NOISE_STREAM, chosen, 1)[:, 0] * (self.num_classes - 1)).astype(
                np.int64
            )
            labels[chosen] = (labels[chosen] + shift) % self.num_classes
        digest = hashlib.sha256(f"{self.hash} subset {per_class} {label_noise!r} {seed}".encode()).hexdigest()
        return dataclasses.replace(self._only(keep), labels=labels, hash=digest)

    def _matching(self, pattern: str) -> Index:
        """The images whose path has a match of a regular expression. UserError where a class has none."""
        try:
            search = re.compile(pattern).search
        except re.error as error:
            raise UserError(
                f"--train-only must be a regular expression, found {pattern!r} ({error}); '/(a|b)_' finds files whose "
                "names begin with a_ or b_"
            ) from error
        keep = np.fromiter((search(path) is not None for path in self.paths), bool, len(self))
        left = np.bincount(self.labels[keep], minlength=self.num_classes)
        if not left.all():
            raise UserError(
                f"--train-only {pattern!r} must leave an image of every class, but of {int((left == 0).sum())} of "
                f"{self.num_classes} classes (e.g. {self.classes[left.argmin()]!r}) in {self.folder} it finds none in "
                f"paths like {self.paths[int((self.labels == left.argmin()).argmax())]!r}; give another one"
            )
        digest = hashlib.sha256(f"{self.hash} only {pattern!r}".encode()).hexdigest()
        return dataclasses.replace(self._only(keep), hash=digest)

    def held_out(self, fraction: float, seed: int) -> tuple[Index, Index, np.ndarray]:
        """(training images, validation images, [N] bool: which these are): a part of all, see `drawn`, is held out.

        raises  UserError for a fraction that leaves nothing of the one, or of a class of the other. A class may have no
                validation image: which are held out depends on nothing but the images themselves
        """
        out = drawn(self.paths, fraction, seed)
        if not out.any():
            raise UserError(
                f"--val-fraction {fraction:g} holds out none of the {len(self)} images in {self.folder}; give a larger "
                "one, or a folder of validation images by --val-dir"
            )
        left = np.bincount(self.labels[~out], minlength=self.num_classes)
        if not left.all():
            raise UserError(
                f"--val-fraction {fraction:g} with --val-seed {seed} leaves no training image of "
                f"{int((left == 0).sum())} of {self.num_classes} classes (e.g. {self.classes[left.argmin()]!r}) in "
                f"{self.folder}; give a smaller one, or another seed"
            )
        parts = []
        for split, rows in (("train", ~out), ("val", out)):
            digest = hashlib.sha256(f"{self.hash} held out {fraction!r} {seed} {split}".encode()).hexdigest()
            parts.append(dataclasses.replace(self._only(rows), split=split, hash=digest))
        train, val = parts
        # what is left out is train's, wherever it would have gone
        val = dataclasses.replace(val, folder=f"{self.folder}, held out", quarantined=[], skipped=0)
        return train, val, out

    def _only(self, rows: np.ndarray) -> Index:
        """The images where `rows` [N] bool is true, renumbered; its hash is not theirs."""
        return dataclasses.replace(
            self,
            paths=self.paths.only(rows),
            labels=self.labels[rows],
            sizes=self.sizes[rows],
            members=None if self.members is None else self.members[rows],
            odd=None if self.odd is None else self.odd.only(rows),
            stamps=None if self.stamps is None else self.stamps[rows],
        )


def drawn(paths: Paths, fraction: float, seed: int) -> np.ndarray:
    """[N] bool: a part of the images, about `fraction` of them.

    Each by a hash of its path and the seed alone: whatever other images there are, in whatever order, in every process.
    """
    chosen, names = np.empty(len(paths), bool), map(zlib.crc32, paths.encoded())
    for first in range(0, len(paths), HASHED_AT_ONCE):
        part = chosen[first : first + HASHED_AT_ONCE]
        ids = np.fromiter(names, np.int64, len(part))
        part[:] = uniforms(seed, _HOLD_OUT_STREAM, ids, 1)[:, 0] < fraction
    return chosen


def stamps_of(lengths: np.ndarray, mtimes: np.ndarray) -> np.ndarray:
    """[n] uint32, a hash of length (bytes) and time (ns) of each file, both [n] int64: a quarter of their memory."""
    mixed = lengths.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mtimes.astype(np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F)
    return (mixed >> np.uint64(32)).astype(np.uint32)


def content_hash(
    split: str, classes: tuple[str, ...], paths: Paths, labels: np.ndarray, sizes: np.ndarray, lengths: np.ndarray
) -> str:
    """The hash of an index. lengths: [N] int64, bytes of the images' files.

    Of five parts, each after its length: the names as JSON, the paths with a NUL between each two, the arrays' bytes.
    """
    digest = hashlib.sha256()
    names = json.dumps([split, classes]).encode()
    digest.update(len(names).to_bytes(8, "little") + names)
    digest.update(paths.joined_length.to_bytes(8, "little"))
    for i, piece in enumerate(paths.joined()):
        digest.update(b"\0" if i else b"")
        digest.update(piece)
    for array in (labels, sizes, lengths):
        digest.update(array.nbytes.to_bytes(8, "little"))
        for first in range(0, len(array), HASHED_AT_ONCE):
            digest.update(np.ascontiguousarray(array[first : first + HASHED_AT_ONCE]).data)
    return digest.hexdigest()
