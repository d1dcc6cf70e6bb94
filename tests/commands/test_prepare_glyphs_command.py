"""From typefaces to accuracies on unseen designs: prepare-glyphs, train, evaluate."""

from __future__ import annotations

import pytest
from command_line import complaint, rows_of
from made_typefaces import write_all
from tiny_run import options, settings

from ijckd_fast import cli
from ijckd_fast.data.prepare import glyphs
from ijckd_fast.data.prepare.typefaces import read_list


def test_from_typefaces_to_accuracies_on_unseen_designs(tmp_path, monkeypatch, capsys):
    faces = [face for face in read_list() if face.design in ("kiloji", "klee", "tw-kai")]
    monkeypatch.setattr(glyphs, "read_list", lambda: faces)
    monkeypatch.setenv("FONTCONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("XDG_DATA_DIRS", str(tmp_path / "none"))
    fonts = write_all(tmp_path / "fonts", [ord(char) for char in "一丁七万丈三上下"], faces)
    out, run = tmp_path / "glyphs", tmp_path / "run"
    assert cli.main(["prepare-glyphs", str(out), "--fonts", str(fonts), "--workers", "1"]) == 0
    assert f"to train on it: ijckd-fast train --config glyphs_teacher --data-dir {out}   #" in capsys.readouterr().out
    tiny = settings(out, run, epochs=1, eval_every=1, warmup_epochs=0.0)
    words = options({name: value for name, value in tiny.items() if "image_size" not in name and name != "eval_resize"})
    assert cli.main(["train", "--config", "glyphs_teacher", *words]) == 0
    capsys.readouterr()
    assert cli.main(["evaluate", str(run), "--group-by", "([^/_]+)_[^/]*$"]) == 0
    printed = capsys.readouterr().out
    whole, *designs = rows_of(printed)
    assert (whole["group"], whole["images"]) == (None, 16)
    assert [(row["group"], row["images"]) for row in designs] == [("klee", 8), ("tw-kai", 8)]
    mean = sum(row["top1_percent"] for row in designs) / 2
    assert mean == pytest.approx(whole["top1_percent"])
    assert "tw-kai" in printed.splitlines()[-3]
    assert "finds none in 'val/u4e00/klee_regular.png'" in complaint(capsys, "evaluate", str(run), "--group-by", "cat")
