"""A data folder with all that a user says of it: where its training and its validation images are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from ijckd_fast.data.index.build import Scan, scan
from ijckd_fast.data.index.index import Index
from ijckd_fast.data.sources import Fields
from ijckd_fast.errors import UserError

Split = Literal["train", "val"]


@dataclass(frozen=True)
class DataFolder:
    """A data folder, and the settings of the same names.

    data_dir      with both splits, unless one of the next two says where validation images come from
    val_dir       another data folder whose validation images are taken, or a folder of nothing but these
    val_fraction  of the training images, about which part is held out; in (0, 1)
    val_seed      of that draw; None: 0
    class_list, val_labels, fields  see build_index
    raises        UserError for both val_dir and val_fraction, a fraction out of range, and a seed of no draw
    """

    data_dir: str | Path
    class_list: str | Path | None = None
    val_labels: str | Path | None = None
    fields: Fields = Fields()  # noqa: RUF009 - frozen
    val_dir: str | Path | None = None
    val_fraction: float | None = None
    val_seed: int | None = None

    @classmethod
    def of(cls, settings: Any) -> DataFolder:
        """As the attributes of these names say; those of `Fields` are image_column, label_column and label_key."""
        own = (field.name for field in dataclasses.fields(cls) if field.name != "fields")
        fields = Fields(settings.image_column, settings.label_column, settings.label_key)
        return cls(**{name: getattr(settings, name) for name in own}, fields=fields)

    def __post_init__(self) -> None:
        if self.val_fraction is None:
            if self.val_seed is not None:
                raise UserError(
                    f"--val-seed {self.val_seed} is what --val-fraction draws by, found none; give one, e.g. "
                    "--val-fraction 0.02, or leave it out"
                )
            return
        if self.val_dir is not None:
            raise UserError(
                f"validation images come from --val-dir or from --val-fraction, found both, {self.val_dir} and "
                f"{self.val_fraction:g}; leave one out"
            )
        if not 0 < self.val_fraction < 1:
            raise UserError(f"--val-fraction must lie between 0 and 1, found {self.val_fraction:g}; 0.02 is usual")

    def about_val(self) -> str | None:
        """Where the validation images come from, for people; None where they are the data folder's own."""
        if self.val_dir is not None:
            return f"validation images are those of {self.val_dir}"
        if self.val_fraction is not None:
            return (
                f"validation images are {100 * self.val_fraction:g} % of the training images, held out by "
                f"--val-seed {self.val_seed or 0}"
            )
        return None

    def index(self, split: Split, classes: Sequence[str] | None = None, **how: Any) -> Index:
        """The index of one split. classes: see build_index; how: its other arguments."""
        return next(self.scans((split,), classes, **how)).index

    def scans(
        self, splits: Sequence[str] = ("train", "val"), classes: Sequence[str] | None = None, **how: Any
    ) -> Iterator[Scan]:
        """What build_index sees, of each split in turn, train first: val has its classes. Nothing is scanned twice."""
        whole: tuple[Scan, Scan] | None = None
        for split in [name for name in ("train", "val") if name in splits]:
            if self.val_fraction is not None:
                whole = whole or _parted(self._scan("train", classes, how), self.val_fraction, self.val_seed or 0)
                found = whole[split == "val"]
            else:
                found = self._scan(split, classes, how)
            yield found
            classes = found.index.classes

    def _scan(self, split: str, classes: Sequence[str] | None, how: dict[str, Any]) -> Scan:
        is_val = split == "val"
        apart = self.val_dir if is_val else None
        return scan(
            self.data_dir if apart is None else apart,
            split,  # type: ignore[arg-type]
            classes=classes,
            class_list=self.class_list,
            labels=self.val_labels if is_val else None,
            fields=self.fields,
            itself=apart is not None,
            **how,
        )


def _parted(found: Scan, fraction: float, seed: int) -> tuple[Scan, Scan]:
    """What is left for training, with the files that are left out, and what is held out."""
    train, val, held_out = found.index.held_out(fraction, seed)
    out = found.files.facts["reason"] == 0
    out[out] = held_out
    parts = []
    for index, rows in ((train, ~out), (val, out)):
        files = dataclasses.replace(
            found.files,
            paths=found.files.paths.filter(pa.array(rows)),
            facts=found.files.facts[rows],
            members=None if found.files.members is None else found.files.members[rows],
        )
        parts.append(dataclasses.replace(found, index=index, files=files))
    return parts[0], dataclasses.replace(parts[1], opened=0, passed_over=[])
