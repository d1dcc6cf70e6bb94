"""Comparisons at tiny size: what is trained, used again and refused, and what the figures say."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import re
import signal
import statistics
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from tiny_run import SETTINGS, write_teacher

from ijckd_fast import cli
from ijckd_fast.compare import (
    Comparison,
    Outcome,
    cells,
    comparison_rows,
    difference,
    launch,
    load_comparison,
    markdown_table,
    method_row,
    paired_interval,
    plan,
    reuse,
    train_all,
)
from ijckd_fast.compare.report import _schedule
from ijckd_fast.data import Augment
from ijckd_fast.data.prepare.typefaces import read_list
from ijckd_fast.distill import PRESETS, Needs
from ijckd_fast.errors import UserError
from ijckd_fast.train import Stopped, TrainStep, objective_of, report, run_folder
from ijckd_fast.train.config import COMPARISONS, OBJECTIVE_FIELDS, PLAN_FIELDS, preset_names

QUIET = Console(quiet=True)
DOCS = Path(__file__).parents[2] / "docs" / "compare.md"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pt")


def _base(weights: Path | None, **changes) -> dict:
    settings = {key: value for key, value in SETTINGS.items() if key != "objective"}
    given = {} if weights is None else {"teacher": "resnet8x0.5", "teacher_checkpoint": str(weights)}
    return {**settings, "epochs": 1, "eval_every": 1, "log_interval": 1, "allow_weak_teacher": True, **given, **changes}


def _write(path: Path, **values) -> str:
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return str(path)


def _lines(output: Path) -> list[dict[str, str]]:
    with open(output / "runs.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def trained(monkeypatch):
    """The folders of the runs trained in this process, as they begin; without their plots, which take the time."""
    folders = []
    train = launch.train

    def noting(config, **how):
        folders.append(Path(config.output_dir).name)
        return train(config, **how)

    monkeypatch.setattr(launch, "train", noting)
    monkeypatch.setattr(report, "write_report", lambda *_: None)
    return folders


# --- figures


def test_interval_of_a_hand_computed_example():
    """Differences 1, 2, 3, 6: mean 3, s^2 = 14 / 3, s / sqrt(4) = 1.080123; with 3 degrees t = 3.182446."""
    ours, theirs = {0: 11.0, 1: 22.0, 2: 33.0, 3: 46.0, 7: 0.0}, {3: 40.0, 2: 30.0, 1: 20.0, 0: 10.0, 8: 99.0}
    assert paired_interval(ours, theirs) == pytest.approx((3.0, -0.437434, 6.437434), abs=1e-5)
    assert paired_interval({0: 1.0, 1: 2.0}, {1: 0.0}) is None
    # shifting a seed of both methods changes nothing: that is what pairing is for
    assert paired_interval({**ours, 1: 52.0}, {**theirs, 1: 50.0}) == pytest.approx(
        (3.0, -0.437434, 6.437434), abs=1e-5
    )


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 10, 29])
def test_intervals_hold_95_percent_of_students_distribution(degrees):
    """The t of an interval, in standard errors, against the density, summed by Simpson's rule."""
    n, steps = degrees + 1, 4000
    values = {seed: float(seed**2) for seed in range(n)}
    mean, _, high = paired_interval(values, dict.fromkeys(values, 0.0))
    t = (high - mean) / (statistics.stdev(values.values()) / math.sqrt(n))
    scale = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)
    density = [scale * (1 + (t * i / steps) ** 2 / degrees) ** (-(degrees + 1) / 2) for i in range(steps + 1)]
    integral = t / steps / 3 * (density[0] + 4 * sum(density[1::2]) + 2 * sum(density[2:-1:2]) + density[-1])
    assert 2 * integral == pytest.approx(0.95, abs=1e-9)


def _summary(top1: float, agreement: float | None = 50.0) -> dict:
    last = {"top1_percent": top1, "agreement_percent": agreement}
    return {"last": last, "params": 5, "macs": 6, "seconds": 1.5, "teacher_top1_percent": 99.0}


def test_rows_and_stars():
    methods = {"kd": {}, "a": {"objective": "ce"}, "b": {"objective": "ce"}}
    comparison = Comparison("c", methods=methods, base={}, against=("kd",), seeds=3)
    runs = {"": {
        "kd": {s: _summary(80 + s) for s in range(3)},
        "a": {s: _summary(82 + s + s / 10) for s in range(3)},
        "b": {0: _summary(70, None)},
    }}  # fmt: skip
    kd, a, b = comparison_rows(comparison, Outcome(None, runs, {}))
    assert (kd["top1_mean"], kd["top1_std"], kd["seeds"]) == (81, 1, 3)
    assert (kd["minus_kd"], kd["minus_kd_low"]) == (None, None)
    assert a["minus_kd"] == pytest.approx(2.1)
    assert a["minus_kd_high"] == pytest.approx(2.1 + 4.302653 * 0.1 / math.sqrt(3), abs=1e-6)
    assert difference(a, "kd") == "+2.10 [+1.85, +2.35] *"
    assert difference({**a, "minus_kd_low": -0.1}, "kd") == "+2.10 [-0.10, +2.35]"
    assert difference({**a, "minus_kd": -1e-15, "minus_kd_low": -0.1}, "kd") == "+0.00 [-0.10, +2.35]"
    assert (b["top1_std"], b["agreement_mean"], b["minus_kd"], b["seeds"]) == (None, None, None, 1)
    assert "| a | 83.10 ± 1.10 | 50.00 | 5 | 6 | 1.5 | +2.10 [+1.85, +2.35] * |" in markdown_table([kd, a, b], ["kd"])
    assert "±" not in markdown_table([b])
    assert method_row("b", {0: _summary(70, None)})["method"] == "b"


# --- a whole comparison


def test_compare(data, tmp_path, capsys, trained):
    """By the command line: a teacher that is trained, two regimes; then what is used again and what is not."""
    values = {
        "about": "A tiny one.",
        "data_dir": str(data),
        "teacher": {**_base(None), "student": "resnet8x0.5", "objective": "ce"},
        "base": _base(None),
        "regimes": {"few": {"train_per_class": 4}, "noisy": {"label_noise": 0.5}},
        "methods": {"kd": None, "pooled": {"objective": "ijckd-pooled"}},
        "against": ["kd"],
        "seeds": 2,
    }
    output = tmp_path / "out"
    config = _write(tmp_path / "tiny.yaml", **values)
    words = ["compare", "--config", config, "--output", str(output)]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    rows = json.loads(out.strip().splitlines()[-1])["rows"]
    for each in rows:  # in one line and uncut, however narrow the terminal
        assert "│ " + " │ ".join([*cells(each), difference(each, "kd")]).strip(" │") in re.sub(" +", " ", out)
    keys = ["method", "top1_mean", "top1_std", "seeds", "agreement_mean", "params", "macs", "seconds", "regime"]
    assert [list(each) for each in rows] == [[*keys, "minus_kd", "minus_kd_low", "minus_kd_high"]] * 4
    assert [(each["regime"], each["method"]) for each in rows] == [
        ("few", "kd"), ("few", "pooled"), ("noisy", "kd"), ("noisy", "pooled"),
    ]  # fmt: skip
    names = [f"{method}-seed{seed}" for seed in (0, 1) for _ in values["regimes"] for method in ("kd", "pooled")]
    assert trained == ["teacher", *names]

    lines = _lines(output)
    order = [(r, m, str(s)) for r in values["regimes"] for m in values["methods"] for s in range(2)]
    assert [(line["regime"], line["method"], line["seed"]) for line in lines] == order
    for line in lines:
        folder = output / line["regime"] / f"{line['method']}-seed{line['seed']}"
        last = json.loads((folder / "summary.json").read_text())["last"]
        assert float(line["top1"]) == pytest.approx(last["top1_percent"], abs=1e-3)
        assert float(line["agreement"]) == pytest.approx(last["agreement_percent"], abs=1e-3)
        assert line["torch"] == torch.__version__
        assert json.loads((folder / "env.json").read_text())["torch_threads"] == 1
    noisy = [float(line["top1"]) for line in lines[4:6]]
    assert rows[2]["top1_mean"] == pytest.approx(statistics.mean(noisy), abs=1e-3)
    difference_by_seed = [float(b["top1"]) - float(a["top1"]) for a, b in zip(lines[4:6], lines[6:8], strict=True)]
    assert rows[3]["minus_kd"] == pytest.approx(statistics.mean(difference_by_seed), abs=2e-3)
    # of a seed, all methods see the same images
    seen = [
        json.loads((output / "noisy" / name / "summary.json").read_text())["inputs"]
        for name in ("kd-seed1", "pooled-seed1", "kd-seed0")
    ]
    assert seen[0] == seen[1]
    assert seen[0]["training images"] != seen[2]["training images"]
    page = (output / "report.md").read_text()
    assert "A tiny one." in page
    assert "50 % of their labels wrong" in page
    assert f"The teacher's top-1: {float(lines[0]['teacher_top1']):.2f} %" in page
    assert "not corrected" in page
    for plot in ("accuracy.png", "differences.png"):
        assert (output / plot).read_bytes().startswith(b"\x89PNG")
        assert plot in page

    # Moved, and with other settings that no weight depends on: everything is used again, and the file is the same.
    before = (output / "runs.csv").read_text()
    output = output.rename(tmp_path / "moved")
    words[words.index("--output") + 1] = str(output)
    values["base"]["workers"] = 1
    trained.clear()
    _write(tmp_path / "tiny.yaml", **values)
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert out.count("finished earlier, used again") == 9
    assert trained == []
    assert (output / "runs.csv").read_text() == before
    again = json.loads(out.strip().splitlines()[-1])["rows"]
    assert again == rows

    # One method's setting, and a method more: only these are trained.
    values["methods"]["pooled"]["fm"] = 2
    values["methods"]["ce"] = None
    values["regimes"].pop("few")
    _write(tmp_path / "tiny.yaml", **values)
    train_all(load_comparison(config), output, console=QUIET)
    assert trained == ["pooled-seed0", "ce-seed0", "pooled-seed1", "ce-seed1"]
    assert len(_lines(output)) == 6

    # Another teacher: every student again.
    trained.clear()
    values["teacher"]["seed"] = 5
    del values["methods"]["pooled"], values["methods"]["ce"]
    _write(tmp_path / "tiny.yaml", **values)
    train_all(load_comparison(config), output, console=QUIET)
    assert trained == ["teacher", "kd-seed0", "kd-seed1"]


def _comparison(data, weights, **changes) -> Comparison:
    given = {
        "methods": {"ce": {"objective": "ce"}, "kd": {"objective": "kd"}},
        "base": _base(weights),
        "against": ("kd",),
        "seeds": 2,
        "data_dir": str(data),
    }
    return Comparison("tiny", **{**given, **changes})


def test_killed_between_runs_and_within_one(data, weights, tmp_path, trained, monkeypatch):
    """A killed run continues from its checkpoint, finished ones stay; figures and lines are those of no kill."""
    comparison = _comparison(data, weights, base=_base(weights, epochs=2, checkpoint_steps=3))
    whole = train_all(comparison, tmp_path / "whole", console=QUIET)
    assert trained == ["ce-seed0", "kd-seed0", "ce-seed1", "kd-seed1"]  # a seed of every method first

    output, steps = tmp_path / "killed", []
    step = TrainStep.__call__

    def killed(self, *arguments, **named):  # 8 steps a run: in the third one after its checkpoint at 3
        steps.append(named["step"])
        if len(steps) == 2 * 8 + 6:
            raise KeyboardInterrupt
        return step(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            train_all(comparison, output, console=QUIET)
    assert len(_lines(output)) == 2
    trained.clear()
    steps.clear()
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", killed)
        found = train_all(comparison, output, console=QUIET)
    assert trained == ["ce-seed1", "kd-seed1"]
    assert steps == [3, 4, 5, 6, 7, *range(8)]

    # the line of a run that was written and one that was cut short do not stay
    text = (output / "runs.csv").read_text()
    (output / "runs.csv").write_text(text + text.splitlines()[1] + "\ntiny,,k")
    train_all(comparison, output, console=QUIET)
    assert (output / "runs.csv").read_text() == text
    figures = ("regime", "method", "seed", "top1", "agreement", "teacher_top1", "params", "macs")
    kept = [
        [{name: line[name] for name in figures} for line in _lines(tmp_path / each)] for each in ("whole", "killed")
    ]
    assert kept[0] == kept[1]
    assert len(kept[0]) == 4
    assert found.runs[""]["kd"][0]["last"]["top1_percent"] == whole.runs[""]["kd"][0]["last"]["top1_percent"]

    # other code: everything again, but where it is asked for
    monkeypatch.setattr(reuse, "code_hash", lambda: "other")
    trained.clear()
    begun = list(output.glob("*/config.yaml"))
    assert len(begun) == 4
    for path in begun:  # and older than one of the settings
        path.write_text(re.sub(r"(?m)^hint_stage: .*\n", "", path.read_text()))
    train_all(comparison, output, any_code=True, console=QUIET)
    assert trained == []
    small = _comparison(data, weights, methods={"kd": {"objective": "kd"}}, base=comparison.base)
    train_all(small, output, console=QUIET)
    assert trained == ["kd-seed0", "kd-seed1"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failed_run_is_named_and_loses_no_other(data, weights, tmp_path, capsys, trained, jobs):
    values = {
        "data_dir": str(data),
        "base": _base(weights),
        "methods": {"ce": None, "wrong": {"objective": "ce", "student": "resnet9"}, "kd": None},
        "seeds": 1,
    }
    words = ["compare", "--config", _write(tmp_path / "c.yaml", **values), "--output", str(tmp_path / "out")]
    assert cli.main([*words, "--jobs", str(jobs)]) == 1
    out = capsys.readouterr().out
    assert "wrong seed 0 failed: unknown model 'resnet9'" in " ".join(out.split())
    assert "1 runs failed" in out
    assert [each["method"] for each in json.loads(out.strip().splitlines()[-1])["rows"]] == ["ce", "kd"]
    assert [line["method"] for line in _lines(tmp_path / "out")] == ["ce", "kd"]
    assert "- wrong seed 0: unknown model 'resnet9'" in (tmp_path / "out" / "report.md").read_text()


def test_sigterm_saves_the_runs_of_all_processes(data, weights, tmp_path):
    """The first one ends normally; its line is the signal's cue."""
    base = _base(weights, log_interval=1000, eval_every=5000)
    comparison = _comparison(
        data,
        weights,
        base=base,
        regimes={"short": {}, "long": {"epochs": 5000}},
        methods={"ce": {"objective": "ce"}},
        against=(),
        seeds=1,
    )

    class Cue(Console):
        def print(self, *_, **__):
            long = tmp_path / "long" / "ce-seed0"
            while not (long / run_folder.LOG).exists():
                signal.sigtimedwait([], 0.02)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match="the same command continues"):
        train_all(comparison, tmp_path, jobs=2, console=Cue())
    assert [line["regime"] for line in _lines(tmp_path)] == ["short"]
    assert (tmp_path / "long" / "ce-seed0" / run_folder.LAST).exists()
    assert not (tmp_path / "long" / "ce-seed0" / run_folder.SUMMARY).exists()


# --- refusals, before anything is written


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"method": {}}, "unknown key 'method'.*did you mean 'methods'"),
        ({"methods": {"kdd": None}}, "method 'kdd'.*names none.*did you mean 'kd'"),
        (
            {"methods": {"kd": {"temprature": 2}}},
            "unknown setting 'temprature' in method kd.*did you mean 'temperature'",
        ),
        ({"methods": {"kd": {"temperature": "hot"}}}, "temperature in method kd.*wanted float.*got 'hot'"),
        ({"methods": {"kd": 4}}, "method kd.*expected settings.*got 4"),
        ({"methods": {}}, "names no method"),
        ({"methods": {"a b": {"objective": "kd"}}}, "method 'a b'.*rename"),
        ({"regimes": {"teacher": {}}}, "called 'teacher'.*rename"),
        ({"regimes": {"few": {"train_per_clas": 4}}}, "unknown setting.*regime few.*did you mean 'train_per_class'"),
        ({"methods": {"kd": {"batch_size": 4}}}, "method kd of c sets batch_size.*regime"),
        ({"base": {"seed": 4}}, "base of c sets seed.*seeds beside methods"),
        ({"seeds": 1}, "seeds must be at least 2, got 1; an interval needs two"),
        ({"seeds": 0, "against": []}, "seeds must be at least 1, got 0"),
        ({"seeds": "many"}, "seeds of .*expected a whole number, got 'many'"),
        ({"against": ["srrl"]}, "against 'srrl', which is none of its methods.*add it"),
        ({"teacher": "digits_teacher"}, "trains a teacher and base sets teacher_checkpoint"),
        ({"data_dir": None}, "data_dir of .*expected a folder"),
        ({"methods": {"ijckd": {"connector": "linear"}}, "against": []}, "method ijckd of c: .*cannot match maps"),
    ],
)  # fmt: skip
def test_refused(data, weights, tmp_path, capsys, changes, complaint):
    values = {
        "data_dir": str(data),
        "base": _base(weights),
        "methods": {"kd": None, "ce": None},
        "against": ["kd"],
        "seeds": 2,
    }
    config = _write(tmp_path / "c.yaml", **{**values, **changes})
    assert cli.main(["compare", "--config", config, "--output", str(tmp_path / "out")]) == 2
    assert re.search(complaint, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_refused_without_teacher_data_or_jobs(data, tmp_path):
    comparison = _comparison(data, None)
    with pytest.raises(UserError, match="method kd of tiny: its objective needs a teacher, and there is none"):
        train_all(comparison, tmp_path / "out", console=QUIET)
    with pytest.raises(UserError, match=r"method ce in regime few of tiny: .*--nesterov needs a --momentum"):
        plan(_comparison(data, None, regimes={"few": {"nesterov": True, "momentum": 0.0}}), tmp_path)
    with pytest.raises(UserError, match="--jobs must be at least 1, got 0"):
        train_all(comparison, tmp_path / "out", jobs=0, console=QUIET)
    with pytest.raises(UserError, match="tiny has no data_dir"):
        plan(_comparison(None, None, data_dir=None), tmp_path)
    with pytest.raises(UserError, match=r"no preset 'compare_digit'.*did you mean 'compare_digits'"):
        load_comparison("compare_digit")
    assert not (tmp_path / "out").exists()


def test_the_file_of_the_docs(data, weights, tmp_path):
    """Planned as it stands, but for images and teacher."""
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", DOCS.read_text(), re.DOTALL | re.MULTILINE)
    values = yaml.safe_load(text)
    values["teacher"] = "resnet8x0.5"
    values["base"]["teacher_checkpoint"] = str(weights)
    assert {*values, "name"} == {field.name for field in dataclasses.fields(Comparison)}
    _, runs = plan(load_comparison(_write(tmp_path / "mine.yaml", **values), data_dir=str(data)), tmp_path)
    assert len(runs) == 2 * 5 * 5
    last = runs[-1].config
    assert (last.connector, last.epochs, last.train_per_class, last.global_batch) == ("bottleneck:8", 40, 50, 256)


def test_methods_have_what_the_base_s_preset_sets_for_their_objective(weights, data, tmp_path):
    """Under their own settings; and not where base or a regime says it for all methods."""
    methods = {"kd": None, "dkd": None, "dkd-8": {"objective": "dkd", "dkd_beta": 8.0}}

    def settings(base: dict, **more) -> dict[str, tuple]:
        base = {**base, "student": "resnet8x0.25", "image_size": 16, "teacher": "resnet8x0.5"}
        base |= {"teacher_pretrained": False, "teacher_checkpoint": str(weights)}
        file = _write(tmp_path / "mine.yaml", methods=methods, base=base, seeds=1, **more)
        _, runs = plan(load_comparison(file, data_dir=str(data)), tmp_path / "out")
        return {run.method: (run.config.temperature, run.config.dkd_beta, run.config.dkd_warmup) for run in runs}

    own = {"config": "imagenet_r34_r18"}
    assert settings(own) == {"kd": (4, 0, 20), "dkd": (1, 0.5, 1), "dkd-8": (1, 8, 1)}
    assert settings({**own, "temperature": 2.0})["dkd"] == (2, 0.5, 1)
    assert settings(own, regimes={"hot": {"temperature": 8.0}})["dkd"] == (8, 0.5, 1)
    assert settings({})["dkd"] == (4, 8, 20)
    (tmp_path / "preset.yaml").write_text("objective: dkd\nobjectives: {dkd: {temperature: 1}}\n")
    named = settings({"config": str(tmp_path / "preset.yaml")})  # its own objective is no method's
    assert named == {"kd": (4, 0, 20), "dkd": (1, 8, 20), "dkd-8": (1, 8, 20)}


def test_a_teacher_given_with_the_comparison_stands_instead_of_its_own(tmp_path):
    """Whether that is a run or a preset to train first; one in base is not passed over."""
    base = {"config": "digits_student", "student": "resnet8x0.25"}
    file = _write(tmp_path / "mine.yaml", methods={"kd": None}, base=base, teacher="digits_teacher", seeds=1)
    assert load_comparison(file).trains_teacher
    given = load_comparison(file, teacher="runs/mine")
    assert (given.teacher, given.trains_teacher) == ("runs/mine", False)
    given = load_comparison(file, teacher="glyphs_teacher")
    assert isinstance(given.teacher, dict)
    assert given.teacher["student"] == "resnet8x2"
    own = _write(tmp_path / "own.yaml", methods={"kd": None}, base={**base, "teacher": "resnet8x0.5"}, seeds=1)
    with pytest.raises(UserError, match=r"base of .*own\.yaml names a teacher of its own: leave out --teacher runs/mi"):
        load_comparison(own, teacher="runs/mine")


def test_no_method_may_change_the_augmentation():
    """Whatever settings the plan gets: two methods would not see the same images."""
    assert {field.name for field in dataclasses.fields(Augment)} <= set(PLAN_FIELDS)


def test_packaged_comparisons(tmp_path):
    assert preset_names(COMPARISONS) == ["ablate_digits", "compare_digits", "compare_glyphs", "logit_terms_digits"]
    for name, methods, seeds in (("compare_digits", 9, 5), ("logit_terms_digits", 28, 2)):
        assert load_comparison(name).seeds == 5
        teacher, runs = plan(load_comparison(name, seeds=seeds), tmp_path)
        assert teacher is not None
        assert len(runs) == methods * 5 * seeds
        check_one_schedule(runs)
    glyphs = load_comparison("compare_glyphs", data_dir=str(tmp_path))
    teacher, runs = plan(glyphs, tmp_path)
    assert teacher is not None
    assert len(runs) == 10 * 2 * 3
    designs = "|".join(list(dict.fromkeys(face.design for face in read_list() if face.split == "train"))[:10])
    assert glyphs.regimes["10-designs"]["train_only"] == f"/({designs})_"
    _, runs = plan(load_comparison("ablate_digits"), tmp_path)
    assert len({tuple(getattr(run.config, name) for name in OBJECTIVE_FIELDS) for run in runs}) == 16


def check_one_schedule(runs):
    """Whatever the method."""
    steps = {run.config.epochs * (run.config.train_per_class or 100) * 10 // run.config.batch_size for run in runs}
    assert steps == {240}
    for regime in {run.regime for run in runs}:  # one schedule, whatever the method
        for name in ("lr", "weight_decay", "warmup_epochs", "eval_every", "student"):
            assert len({getattr(run.config, name) for run in runs if run.regime == regime}) == 1


def test_logit_terms_digits_has_one_logit_term_at_a_time(tmp_path):
    """Beside the map match, through the teacher's classifier; alone with the settings of the presets."""
    comparison = load_comparison("logit_terms_digits")
    _, runs = plan(dataclasses.replace(comparison, seeds=2, regimes={"": comparison.regimes["20-per-class"]}), tmp_path)
    objectives = {run.method: objective_of(run.config) for run in runs}
    assert len({dataclasses.replace(each, name="") for each in objectives.values()}) == len(comparison.methods)
    for name, objective in objectives.items():
        of_logits = {part for term in objective.terms for part in term.parts if getattr(objective, part, 0)}
        of_logits |= {name for name in ("dkd", "sdd_dkd") if getattr(objective, f"{name}_alpha") > 0}
        if name.startswith("map-") or name == "ijckd":
            assert (objective.match, objective.fm, objective.infer_head) == ("map", 1, "teacher")
            assert Needs.OWN_LOGITS not in objective.needs
            assert len(of_logits - {"ce", "fm", "dist_inter"}) == (name != "map-none")
        elif name != "kd-z":
            assert objective == PRESETS[name]
    assert {each.removeprefix("map-") for each in objectives if each.startswith("map-")} >= {
        "kl", "kl-z", "dkd", "hard", "ttm", "wttm", "nkd", "dist", "sdd", "sdd-dkd", "cat",
    }  # fmt: skip


def test_all_runs_hold_out_the_same_images(data, tmp_path):
    """Their teacher too: it must not have been trained on what a run of another seed is evaluated on."""
    held_out = {"val_fraction": 0.2}
    teacher = {**SETTINGS, **held_out, "seed": 3}
    compared = Comparison(
        "c", {"kd": {"objective": "kd"}}, base=_base(None, **held_out), teacher=teacher, seeds=2, data_dir=str(data),
        against=(),
    )  # fmt: skip
    trained, runs = plan(compared, tmp_path)
    assert trained is not None
    assert [run.seed for run in runs] == [0, 1]
    assert [config.val_seed for config in (trained, *(run.config for run in runs))] == [0, 0, 0]
    compared = dataclasses.replace(compared, base={**compared.base, "val_seed": 5})
    assert [run.config.val_seed for run in plan(compared, tmp_path)[1]] == [5, 5]


def test_the_report_says_which_images_a_regime_trains_on():
    config = {"student": "s", "epochs": 2, "global_batch": 8, "label_noise": 0.0, "train_per_class": 5}

    def said(**changes) -> str:
        return _schedule({"ce": {0: {"config": {**config, **changes}}}})

    assert "s, 5 training images per class, 2 epochs" in said()
    only = said(train_per_class=None, train_only="/(a|b)_")
    assert "s, all training images whose paths match `/(a|b)_`, 2 epochs" in only
    assert "5 training images per class, 2 epochs" in said(train_only=None)
