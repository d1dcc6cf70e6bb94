"""What a user says of a data folder comes back in the commands that messages print."""

from __future__ import annotations

import importlib
import shlex

import pytest
from image_tree import write_split
from loading import AUGMENT, batches

from ijckd_fast import cli
from ijckd_fast.commands import Outcome
from ijckd_fast.data import DataFolder, EvalPlan, Fields, TooManyUnreadable
from ijckd_fast.train.config import FOLDER_FIELDS

WORDS = {
    "index": ("DIR",),
    "pack": ("DIR", "OUT"),
    "bench": ("loader", "--parity", "--data-dir", "DIR"),
    "cache": ("OUT", "--views", "1", "--data-dir", "DIR"),
    "train": ("--data-dir", "DIR"),
    "evaluate": ("RUN", "--data-dir", "DIR"),
}
FOLDERS = [
    DataFolder("DIR"),
    DataFolder("DIR", class_list="my classes", val_labels="it's.csv", fields=Fields("a b.c", "-odd", "json:x y")),
    DataFolder("DIR", fields=Fields(label_key="json:$HOME"), val_dir="-"),
    DataFolder("DIR", val_fraction=0.015625, val_seed=0),
]


@pytest.mark.parametrize("command", WORDS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_every_command_reads_what_was_said(folder, command, monkeypatch, capsys):
    seen = {}
    module = importlib.import_module(f"ijckd_fast.commands.{command}")
    monkeypatch.setattr(module, "run", lambda args: seen.update(args.given) or Outcome(None))
    words = shlex.split(folder.command(command, *WORDS[command], of_run=command == "evaluate"))
    assert words[0] == "ijckd-fast"
    assert cli.main(words[1:]) == 0, capsys.readouterr().err
    assert {name: seen.get(name) for name in folder.given} == {
        name: None if command == "evaluate" and name == "class_list" else value for name, value in folder.given.items()
    }


def test_nothing_that_can_be_said_is_left_out():
    assert set().union(*(folder.given for folder in FOLDERS)) == {"class_list", *FOLDER_FIELDS}
    assert FOLDERS[3].command("pack", "a b", last=("--short", "0")) == (
        "ijckd-fast pack 'a b' --val-fraction 0.015625 --val-seed 0 --short 0"
    )


def test_images_that_changed_are_told_with_the_whole_command(tmp_path):
    write_split(tmp_path, "train", {"cat": 12, "dog": 12})
    said = DataFolder(tmp_path, val_fraction=0.3, val_seed=5)
    train, val = (found.index for found in said.scans())
    command = f"ijckd-fast index {tmp_path} --val-fraction 0.3 --val-seed 5"
    assert train.said.scanning == val.said.scanning == train.subset(2).said.scanning == command
    for i in (0, 1):
        (tmp_path / val.paths[i]).write_text("no image")
    with pytest.raises(TooManyUnreadable) as caught:
        batches("pillow", EvalPlan(val, AUGMENT, 4), bad_limit=1, on_bad=lambda *_: None)
    assert str(caught.value).endswith(f"build the index again ({command})")
