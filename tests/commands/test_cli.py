"""The command line: commands and options by name, help, errors in one sentence, exit codes."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import time

import pytest
from command_line import complaint
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import ijckd_fast
from ijckd_fast import cli, commands
from ijckd_fast.commands import Outcome
from ijckd_fast.commands.parser import commands_in, parse
from ijckd_fast.train.config import FIELDS, help_of

COMMANDS = commands_in(commands)


def _help(capsys, *words: str) -> str:
    """What is printed, on one line."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(words))
    assert stop.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_a_module_with_a_summary_is_a_command():
    assert list(COMMANDS) == ["train", *sorted(COMMANDS.keys() - {"train"})]
    assert COMMANDS.keys() > {"prepare-imagenet", "evaluate", "study"}
    assert COMMANDS.keys().isdisjoint({"options", "parser", "prepare_imagenet", "linear"})
    assert list(commands_in(COMMANDS["study"])) == ["finite", "linear"]


def test_help(capsys):
    text = _help(capsys)
    assert _help(capsys, "--help") == text
    for name, command in COMMANDS.items():
        assert f" {name} {command.SUMMARY}" in text
        of_command = _help(capsys, name, "--help")
        assert f"usage: ijckd-fast {name}" in of_command
        assert command.DESCRIPTION.replace(" ", "") in of_command.replace(" ", "")
    assert " finite What one label" in _help(capsys, "study", "--help")
    assert "usage: ijckd-fast study linear" in _help(capsys, "study", "linear", "--help")
    text = _help(capsys, "train", "--help")
    for name in FIELDS:
        assert f"--{name.replace('_', '-')}" in text
        assert help_of(name) in text
    assert "images per step and per process" in text
    assert (
        "--lr LR peak learning rate for the global batch; never rescaled behind your back (type: float, default: 0.1)"
        in text
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["trian"], f"unknown command 'trian' of ijckd-fast: expected one of {', '.join(COMMANDS)}; did you mean 'tra"),
        (["--verbose", "train"], "unknown command '--verbose' of ijckd-fast: expected one of train, "),
        (["study", "lniear"], "unknown command 'lniear' of ijckd-fast study: expected one of finite, linear; did"),
        (["study"], "ijckd-fast study needs the name of a command, one of finite, linear; ijckd-fast study --help"),
        (["study", "linear", "--size", "3"], "unknown option --size of ijckd-fast study linear; did you mean '--size"),
        (["study", "--repeats", "20"], "unknown command '--repeats' of ijckd-fast study"),
        (["train", "--epoch", "3"], "unknown option --epoch of ijckd-fast train; did you mean '--epochs'"),
        (["train", "--learning_rat=1"], "unknown option --learning-rat"),
        (["train", "--lr", "fast"], "--lr: Expected a float. Got value: fast"),
        (["train", "--milestones", "1,x"], "--milestones: "),
        (["train", "spare"], "unrecognized arguments: spare; ijckd-fast train --help describes every option"),
        (["train", "-x"], "unknown option -x of ijckd-fast train"),
        (["train", "--lr"], "argument --lr: expected one argument; ijckd-fast train --help"),
        (["train", "--schedule", "poly"], "--schedule: Expected a Literal['step', 'cosine']. Got value: poly"),
        (["train", "--config", "r34_r81"], "no preset 'r34_r81': give a YAML file, or one of cifar100_r110_r32"),
        (["train", "--config", "r34_r81"], "did you mean 'r34_r18'"),
        (["train", "--config", "nowhere.yaml"], "no configuration file nowhere.yaml"),
        (["train", "--config", "digits_studnet"], "did you mean 'digits_student'"),
        (["train", "--objective", "ce"], "no --data-dir given"),
        (["train", "--objective", "ce", "--data-dir", "/nowhere"], "/nowhere is not a folder"),
        (["evaluate", "/nowhere"], "no checkpoint at /nowhere: give the folder of a run"),
        (["index", "/nowhere"], "/nowhere is not a folder"),
        (["demo", "--methods", "ce,srll"], "unknown method 'srll': wanted some of ijckd"),
        (["demo", "--seeds", "0"], "--seeds must be at least 1"),
        (["evaluate"], "the following arguments are required: run; ijckd-fast evaluate --help describes every option"),
        (["cache", "out"], "the following arguments are required: views; ijckd-fast cache --help describes"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(capsys, monkeypatch, tmp_path, arguments, text):
    monkeypatch.chdir(tmp_path)
    assert text in complaint(capsys, *arguments)
    assert not any(path.name != "runs" for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["evaluate", "RUN", "--device", "tpu"], "--device"),
        (["train", "--data-dir", "DATA", "--objective", "ce", "--output-dir", "FILE"], "--output-dir must be a folder"),
        (["demo", "--methods", ""], "--methods names no method"),
        (["index", "DATA", "--verify", "quick"], "--verify"),
    ],
)
def test_more_mistakes_are_one_sentence(capsys, data, run, tmp_path, arguments, text):
    file = tmp_path / "file"
    file.write_text("")
    places = {"RUN": str(run), "DATA": str(data), "FILE": str(file)}
    assert text in complaint(capsys, *[places.get(a, a) for a in arguments])


def test_other_ends(monkeypatch, capsys):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/runs/log.jsonl")

    monkeypatch.setattr("ijckd_fast.commands.train.run", full)
    assert "no space left on the device for /runs/log.jsonl: free some space" in complaint(capsys, "train")

    def absent(_):
        raise ImportError("ijckd_fast: the compiled library _C.so is not there")

    monkeypatch.setattr("ijckd_fast.commands.train.run", absent)
    assert "`ijckd-fast doctor` says what is missing" in complaint(capsys, "train")

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("ijckd_fast.commands.train.run", interrupted)
    assert cli.main(["train"]) == 130


def test_as_a_process():
    """The exit code and the streams of a real process."""
    command = [sys.executable, "-m", "ijckd_fast.cli"]
    done = subprocess.run([*command, "train", "--epoch", "3"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("ijckd-fast: unknown option --epoch")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--output-dir", "10,20"],
        ["train", "--wandb", "1,2"],
        ["train", "--data-dir", "1e3,2"],
        ["train", "--data_dir=1,2"],
        ["train", "--teacher", "[1,2]"],
        ["train", "--connector", "1,2"],
        ["evaluate", "1,2"],
        ["pack", "1e3,2", "1.5,2"],
        ["recipes", "1,2", "3,4"],
        ["demo", "--methods", "1,2"],
    ],
    ids=" ".join,
)
def test_what_only_looks_like_a_list_stays_what_it_is(words):
    _, args = parse(words)
    values = [each for value in args.given.values() for each in (value if isinstance(value, list) else [value])]
    typed = [word.partition("=")[2] or word for word in words[1:]]
    assert values == [word for word in typed if not word.startswith("--")]


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["train", "--milestones", "30,60,90"], "milestones", (30, 60, 90)),
        (["train", "--milestones=30,60"], "milestones", (30, 60)),
        (["train", "--milestones", "30"], "milestones", (30,)),
        (["train", "--milestones", "[30,60]"], "milestones", (30, 60)),
        (["train", "--sizes", "128@0,192@30"], "sizes", ("128@0", "192@30")),
        (["train", "--mean", "-1,0.5,2e-1"], "mean", (-1.0, 0.5, 0.2)),
        (["study", "linear", "--sizes", "10,50"], "sizes", [10, 50]),
        (["study", "linear", "--sizes", "null"], "sizes", None),
        (["study", "finite", "--instances", "1"], "instances", [1]),
    ],
    ids=str,
)
def test_a_list_is_written_with_commas_where_an_option_takes_one(words, name, value):
    assert parse(words)[1].given == {name: value}


def test_arguments_are_those_given_over_the_defaults():
    command, args = parse(["index", "data", "--class_list", "names.txt", "--fast"])
    assert command is COMMANDS["index"]
    assert args.given == {"data_dir": "data", "class_list": "names.txt", "fast": True}
    assert (args.data_dir, args.fast, args.verify, args.refresh, args.val_labels) == ("data", True, "full", False, None)


def test_version(capsys):
    assert _help(capsys, "--version") == f"ijckd-fast {ijckd_fast.__version__}"
    assert "unknown option --version of ijckd-fast train" in complaint(capsys, "train", "--version")


@pytest.mark.parametrize("name", COMMANDS)
def test_no_option_says_two_defaults(capsys, name):
    """Nor that it is required and has one."""
    for words in [(name, each) for each in commands_in(COMMANDS[name])] if name == "study" else [(name,)]:
        options = re.split(r" (?=--[a-z])", _help(capsys, *words, "--help"))
        for text in options:
            assert text.count("default: ") <= 1, text
            assert not ("required" in text and "default: " in text), text
            assert "default: null" not in text
            assert "default: )" not in text


def test_a_terminal_is_not_flooded_with_json(monkeypatch, capsys):
    """People read the tables; a pipe and a file have the line."""
    monkeypatch.setattr("ijckd_fast.commands.demo.run", lambda args: Outcome([{"a": 1}]))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert cli.main(["demo"]) == 0
    assert capsys.readouterr().out == ""


def test_torchrun_repeats_the_sentence(monkeypatch, capsys, tmp_path):
    """Below its own traceback, which names no cause by itself."""
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    said = complaint(capsys, "train", "--epoch", "3").strip()
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(path))
    assert said in ChildFailedError("ijckd-fast", {0: failure}).format_msg()
    assert 0 <= time.time() - failure.timestamp < 600
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "nowhere" / "error.json"))
    assert complaint(capsys, "train", "--epoch", "3").strip() == said


def test_figures_are_the_last_line(monkeypatch, capsys):
    for outcome, code, out in (
        (Outcome([{"a": 1}, {"a": 2}], 1), 1, '{"rows": [{"a": 1}, {"a": 2}]}\n'),
        (Outcome([]), 0, '{"rows": []}\n'),
        (Outcome(code=1), 1, ""),
        (Outcome(), 0, ""),
    ):
        monkeypatch.setattr("ijckd_fast.commands.demo.run", lambda args, outcome=outcome: outcome)
        assert cli.main(["demo"]) == code
        assert capsys.readouterr().out == out


def test_help_does_not_wait_for_torch():
    code = (
        "import sys; from ijckd_fast import cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "except SystemExit: print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    for words in (["--help"], ["doctor", "--help"], ["prepare-cifar", "--help"], ["demo", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
        slow = {"torch", "numpy", "rich", "matplotlib", "pyarrow", "PIL", "timm", "nvidia"}
        assert slow & set(done.stdout.splitlines()[-1].split()) == set()
