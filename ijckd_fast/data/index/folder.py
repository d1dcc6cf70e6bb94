"""A data folder with all that a user says of it: where its training and its validation images are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ijckd_fast.data.index.build import Scan, scan
from ijckd_fast.data.index.index import Index
from ijckd_fast.data.index.said import DataSettings
from ijckd_fast.data.sources import Fields

Split = Literal["train", "val"]


@dataclass(frozen=True)
class DataFolder(DataSettings):
    """A data folder with all that is said of it, and its indexes."""

    @classmethod
    def of(cls, settings: Any) -> DataFolder:
        """As the attributes of these names say; those of `Fields` are image_column, label_column and label_key."""
        own = (field.name for field in dataclasses.fields(cls) if field.name != "fields")
        fields = Fields(settings.image_column, settings.label_column, settings.label_key)
        return cls(**{name: getattr(settings, name) for name in own}, fields=fields)

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
            said=self,
            **how,
        )


def _parted(found: Scan, fraction: float, seed: int) -> tuple[Scan, Scan]:
    """What is left for training, with the files that are left out, and what is held out."""
    train, val, held_out = found.index.held_out(fraction, seed)
    out = found.facts["reason"] == 0
    out[out] = held_out
    of_train = dataclasses.replace(found, index=train, rows=~out)
    return of_train, dataclasses.replace(found, index=val, rows=out, opened=0, passed_over=[])
