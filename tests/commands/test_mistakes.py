"""What a mistake waits for: nothing is imported before it is needed, and a mistyped argument needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SLOW = {
    "torch",
    "torchvision",
    "timm",
    "nvidia",
    "matplotlib",
    "scipy",
    "sklearn",
    "onnx",
    "onnxruntime",
    "tensorboard",
}

# Of each command a mistyped option, value, name and path; what each is refused with.
MISTAKES = [
    ("train --stundent resnet18", "unknown option --stundent"),
    ("train --lr fast", "Expected a float"),
    ("train --lr -1", "--lr must be above 0"),
    ("train --config r34_r81", "no preset 'r34_r81'"),
    ("train --config imagenet_r34_r18", "no --data-dir given"),
    ("train --data-dir . --objective ijkcd", "unknown objective 'ijkcd'"),
    ("train --data-dir . --objective kd --temperature 0", "temperature"),
    ("train --data-dir nowhere --objective ce", "nowhere is not a folder"),
    ("train --data-dir . --objective ce --student resnte18", "unknown model 'resnte18'"),
    ("train --data-dir . --objective ce --student resnet8xx4", "did you mean 'resnet8x4'"),
    ("train --data-dir . --objective ce --student shufflenetv2x3", "ShuffleNetV2 has widths 0.5, 1, 1.5 here"),
    ("train --data-dir . --objective ce --student timm/vit_tiny_patch16_223", "did you mean 'vit_tiny_patch16_224'"),
    ("train --data-dir . --teacher runs/teacer", "unknown model 'runs/teacer': there is no such folder of a run"),
    ("train --data-dir . --teacher resnet34 --teacher-checkpoint no.pt", "checkpoint 'no.pt' does not exist"),
    ("train --resume nowhere", "no run in nowhere"),
    ("evaluate nowhere", "no checkpoint at nowhere"),
    ("evaluate nowhere --batch-size many", "--batch-size"),
    ("bound nowhere --split test", "--split"),
    ("bound nowhere", "no checkpoint at nowhere"),
    ("export nowhere", "no checkpoint at nowhere"),
    ("export nowhere --images 0", "--images must be at least 1"),
    ("index nowhere", "nowhere is not a folder"),
    ("index . --verify quick", "--verify"),
    ("pack nowhere out", "nowhere is not a folder"),
    ("pack . out --codec blocks --quality 3", "--quality goes with --codec jpeg"),
    ("pack . out --quality 300", "quality"),
    ("pack . out --codec blocks --bits 5", "--bits (bits that a pixel takes) must be one of 6, 7, 7.5"),
    ("cache out --views 2 --data-dir nowhere --teacher resnet34", "nowhere is not a folder"),
    ("cache out --views 2 --data-dir . --teacher resnte34", "unknown model 'resnte34'"),
    ("bench loader", "expected --parity"),
    ("bench loader --parity --data-dir nowhere", "nowhere is not a folder"),
    ("bench loader --parity --data-dir . --model resnte18", "unknown model 'resnte18'"),
    ("compare --config compare_digts", "did you mean 'compare_digits'"),
    ("compare --config compare_digits --data-dir nowhere", "nowhere is not a folder"),
    ("compare --config compare_digits --jobs 0", "--jobs must be at least 1"),
    ("compare --config compare_digits --seeds 1", "seeds must be at least 2"),
    ("demo --methods ce,srll", "unknown method 'srll'"),
    ("demo --seeds 0", "--seeds must be at least 1"),
    ("prepare-cifar out --archive nowhere", "there is no file nowhere"),
    ("prepare-imagenet out --train-tar nowhere", "there is no file nowhere"),
    ("prepare-glyphs out --fonts nowhere", "--fonts must be a folder of typefaces, but nowhere is none"),
    ("prepare-glyphs out --classes jis3", "--classes"),
    ("recipes r34_r81", "no preset 'r34_r81'"),
    ("recipes digits_teacher", "is no packaged pair"),
    ("study linear --laws triangular", "unknown law of inputs 'triangular'"),
    ("study finite --repeats 2", "--repeats must be at least 10"),
    ("doctor --verbose", "unknown option --verbose"),
]

_IN_ONE_PROCESS = """
import contextlib, io, json, os, sys
from ijckd_fast import cli
found = []
for words in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = cli.main(words)
    found.append([code, said.getvalue(), sorted({name.partition(".")[0] for name in sys.modules}), os.listdir(".")])
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """(exit code, what is said, the packages that are imported then, what is in the folder), of each mistake."""
    given = json.dumps([text.split() for text, _ in MISTAKES])
    folder = tmp_path_factory.mktemp("empty")
    done = subprocess.run(
        [sys.executable, "-c", _IN_ONE_PROCESS], input=given, cwd=folder, text=True, capture_output=True, check=True
    )
    return dict(zip((text for text, _ in MISTAKES), json.loads(done.stdout), strict=True))


@pytest.mark.parametrize(("words", "said"), MISTAKES, ids=[text for text, _ in MISTAKES])
def test_a_mistake_is_answered_without_torch_and_leaves_nothing(answers, words, said):
    code, error, packages, left = answers[words]
    assert code == 2
    assert said in error
    assert error.startswith("ijckd-fast: ")
    assert error.count("\n") == 1
    assert SLOW & set(packages) == set()
    assert left == []


def test_every_command_has_its_mistakes():
    from ijckd_fast import commands
    from ijckd_fast.commands.parser import commands_in

    assert {text.split()[0] for text, _ in MISTAKES} == set(commands_in(commands))
