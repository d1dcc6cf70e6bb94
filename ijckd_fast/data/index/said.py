"""What a user says of a data folder, and how a command line that says it again is written."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ijckd_fast.data.sources import Fields
from ijckd_fast.errors import UserError


@dataclass(frozen=True)
class DataSettings:
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

    @property
    def given(self) -> dict[str, Any]:
        """What is said of the folder, by the names of the settings; what is not said is not there."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del own["data_dir"], own["fields"]
        said = {**own, **dataclasses.asdict(self.fields)}
        return {name: value for name, value in said.items() if value is not None}

    def command(self, *words: str | Path, last: tuple[str, ...] = (), of_run: bool = False) -> str:
        """`ijckd-fast WORDS` with the options that say what is said of the folder, as a shell takes it.

        last    words behind the options
        of_run  the command looks at a finished run, which has its classes: without --class-list
        """
        options: list[str] = []
        for name, value in self.given.items():
            if not (of_run and name == "class_list"):
                option, word = f"--{name.replace('_', '-')}", str(value)
                options += [f"{option}={word}"] if word.startswith("-") else [option, word]
        return shlex.join(["ijckd-fast", *map(str, words), *options, *last])

    @property
    def scanning(self) -> str:
        """The command that looks at the folder again."""
        return self.command("index", self.data_dir)
