"""Each net sees images normalised as its weights expect, also where student and teacher expect different ones."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
import yaml
from tiny_run import config, distilled

from ijckd_fast.caching import make_cache
from ijckd_fast.data import Augment
from ijckd_fast.errors import UserError
from ijckd_fast.export import write_export
from ijckd_fast.nets import create_model, published_normalisation
from ijckd_fast.normalisation import IMAGENET, Normalisation
from ijckd_fast.teacher_cache import TeacherCache
from ijckd_fast.train import load_run, resolve, train

HALF = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
GREY = Normalisation((0.3, 0.3, 0.3), (0.37, 0.37, 0.37))


def normalised(pixels: torch.Tensor, by: Normalisation) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (by.mean, by.std))
    return (pixels - mean) / std


# --- one net


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_net_sees_what_its_weights_expect(layout):
    pixels = torch.rand(2, 3, 32, 32).to(memory_format=layout)
    net = create_model("resnet8x0.5", 3, image_size=32).eval()
    expected = net(normalised(pixels, HALF))
    names = list(net.state_dict())
    net.renormalise(IMAGENET, HALF)
    for answering in (net, copy.deepcopy(net)):
        torch.testing.assert_close(answering(normalised(pixels, IMAGENET)), expected, rtol=1e-4, atol=1e-5)
    assert list(net.state_dict()) == names
    # computed in float32, so that halves are rounded once more and no worse
    halves = normalised(pixels, IMAGENET).bfloat16()
    seen: list[torch.Tensor] = []
    net.net.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16):
        net(halves)
    assert seen[0].dtype == torch.bfloat16
    assert seen[0].is_contiguous(memory_format=layout)
    torch.testing.assert_close(seen[0].float(), normalised(pixels, HALF), rtol=2**-7, atol=2**-7)
    net.renormalise(HALF, HALF)  # nothing comes before the net any more
    assert torch.equal(net(normalised(pixels, HALF)), expected)


def test_the_step_follows_a_net_to_another_dtype():
    net = create_model("resnet8x0.5", 3, image_size=32).eval()
    net.renormalise(IMAGENET, HALF)
    net.double()
    assert net(torch.rand(2, 3, 32, 32, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("torchvision/resnet18", IMAGENET),
        ("torchvision/vit_b_16", IMAGENET),
        ("timm/resnet18", IMAGENET),
        ("tf_efficientnet_lite0", HALF),
        ("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", HALF),
        ("timm/mobilenetv3_large_100.miil_in21k_ft_in1k", Normalisation((0, 0, 0), (1, 1, 1))),
        (
            "timm/vit_base_patch32_clip_224.openai_ft_in1k",
            Normalisation((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ),
        ("resnet8x4", None),
        ("no_such_net", None),
    ],
)
def test_libraries_say_what_their_weights_expect(name, expected):
    assert published_normalisation(name) == expected


def test_torchvisions_nets_that_convert_images_themselves_take_others_from_a_file():
    """Where the library loads the weights, the net is built with transform_input; from a file it is not."""
    for name in ("googlenet", "inception_v3"):
        assert published_normalisation(f"torchvision/{name}") == IMAGENET
        assert published_normalisation(f"torchvision/{name}", in_file=True) == HALF
    assert published_normalisation("torchvision/resnet18", in_file=True) == IMAGENET
    net, pixels = create_model("torchvision/googlenet", 10, image_size=64).eval(), torch.rand(2, 3, 64, 64)
    seen: list[torch.Tensor] = []  # by the first layer: such an untrained net answers the same to everything
    net.net.conv1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net(normalised(pixels, HALF))
    net.net.transform_input = True
    net(normalised(pixels, IMAGENET))
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-5, atol=1e-5)


# --- units


@pytest.mark.parametrize(
    ("mean", "std", "text"),
    [
        ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), r"in units of \[0, 1\].*123\.675.*: divide them by 255$"),
        ((0.485, 0.456, 0.406), (58.395, 57.12, 57.375), "58.395.*divide them by 255"),
        ((127.5, 127.5, 127.5), (1, 1, 1), "127.5.*divide them by 255"),
        ((-0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "-0.5.*ImageNet's are"),
        ((0.5, 0.5, 0.5), (0, 0.5, 0.5), "std above 0.*found.*0, 0.5.*ImageNet's are"),
        ((float("nan"), 0.5, 0.5), (0.5, 0.5, 0.5), "nan.*ImageNet's are"),
        ((0.5, 0.5, 0.5), (float("inf"), 0.5, 0.5), "inf.*ImageNet's are"),
    ],
)
def test_other_units_are_refused(mean, std, text, tmp_path):
    with pytest.raises(UserError, match=text):
        Augment(mean=mean, std=std)
    for names in (("mean", "std"), ("teacher_mean", "teacher_std")):
        with pytest.raises(UserError, match=text):
            resolve(
                config(tmp_path, tmp_path, **distilled(tmp_path / "t.pt"), **dict(zip(names, (mean, std), strict=True)))
            )


def test_the_ends_of_the_range_are_taken():
    Augment(mean=(0, 0, 0), std=(1, 1, 1))
    Augment(mean=(1, 0.5, 0), std=(1 / 255, 0.5, 1))


# --- which one a net gets


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A run whose images are normalised by GREY, and its answers."""
    folder = tmp_path_factory.mktemp("run") / "grey"
    train(config(data, folder, student="resnet8x0.5", max_steps=4, mean=GREY.mean, std=GREY.std))
    return folder


LITE = "timm/tf_efficientnet_lite0"  # whose published weights expect HALF
CASES = [
    # settings -> the student's, the teacher's
    ({}, IMAGENET, IMAGENET),
    ({"mean": GREY.mean}, Normalisation(GREY.mean, IMAGENET.std), Normalisation(GREY.mean, IMAGENET.std)),
    ({"mean": GREY.mean, "std": GREY.std}, GREY, GREY),
    ({"teacher": LITE, "teacher_pretrained": True}, IMAGENET, HALF),
    ({"teacher": LITE, "teacher_pretrained": True, "mean": GREY.mean, "std": GREY.std}, GREY, HALF),
    (
        {"teacher": LITE, "teacher_pretrained": True, "teacher_std": GREY.std},
        IMAGENET,
        Normalisation(HALF.mean, GREY.std),
    ),
    ({"teacher": LITE, "teacher_checkpoint": "FILE"}, IMAGENET, HALF),
    ({"teacher": LITE, "teacher_checkpoint": "FILE", "mean": GREY.mean, "std": GREY.std}, GREY, GREY),
    ({"teacher": "torchvision/inception_v3", "teacher_checkpoint": "FILE"}, IMAGENET, HALF),
    ({"teacher": LITE}, IMAGENET, IMAGENET),  # random weights expect nothing
    ({"teacher": "RUN"}, IMAGENET, GREY),
    ({"teacher": "resnet8x0.5", "teacher_checkpoint": "RUN/last.pt"}, IMAGENET, GREY),
    ({"student": LITE}, IMAGENET, IMAGENET),
    ({"student": LITE, "student_pretrained": True}, HALF, HALF),
    ({"student": LITE, "student_pretrained": True, "mean": GREY.mean, "std": GREY.std}, GREY, GREY),
    ({"student": "RUN"}, GREY, GREY),
    ({"student": "RUN", "teacher": LITE, "teacher_pretrained": True}, GREY, HALF),
]


@pytest.mark.parametrize(("changes", "student", "teacher"), CASES)
def test_what_each_net_sees(changes, student, teacher, run, data, tmp_path):
    file = tmp_path / "file.pt"
    torch.save({}, file)
    places = {"RUN": str(run), "RUN/last.pt": str(run / "last.pt"), "FILE": str(file)}
    changes = {name: places.get(value, value) if isinstance(value, str) else value for name, value in changes.items()}
    given = {"objective": "ijckd-pooled", "teacher": "resnet8x0.5", "allow_weak_teacher": True, **changes}
    settled = resolve(config(data, tmp_path / "new", **given))
    assert Normalisation(settled.mean, settled.std) == student
    assert Normalisation(settled.teacher_mean, settled.teacher_std) == teacher
    assert resolve(settled) == settled


def test_a_teacher_that_is_not_there_has_no_images(data, tmp_path):
    with pytest.raises(UserError, match="--teacher-mean and --teacher-std are a teacher's, got no --teacher"):
        resolve(config(data, tmp_path, teacher_mean=HALF.mean))


# --- whole runs


def logits(run, images_of):
    """[N, K] of the run's student, or of its teacher, on all val images."""
    with run.loader(run.index()) as loader, torch.no_grad():
        return torch.cat([images_of(batch.images) for batch in loader])


@pytest.fixture(scope="module")
def learner(run, data, tmp_path_factory):
    """A run that learns from it with ImageNet's normalisation."""
    folder = tmp_path_factory.mktemp("learner") / "run"
    train(config(data, folder, objective="ijckd", teacher=str(run), allow_weak_teacher=True, max_steps=4))
    return folder


def test_the_teacher_answers_a_student_as_it_answered_alone(run, learner):
    alone, beside = load_run(run), load_run(learner)
    assert (beside.config.mean, beside.config.teacher_mean) == (IMAGENET.mean, GREY.mean)
    expected = logits(alone, alone.distiller.predict)
    torch.testing.assert_close(logits(beside, beside.distiller.teacher_logits), expected, rtol=1e-4, atol=1e-4)
    kept = np.load(learner / "teacher_val.npz")["predictions"]
    assert np.array_equal(kept, expected.argmax(1).numpy())
    wrong = load_run(learner)  # what came of one normalisation for both
    wrong.distiller.teacher.renormalise(IMAGENET, IMAGENET)
    assert (logits(wrong, wrong.distiller.teacher_logits) - expected).abs().max() > 0.05


def test_a_run_is_told_which_images_it_sees(learner, data, run, tmp_path, capsys):
    train(config(data, tmp_path / "told", objective="kd", teacher=str(run), allow_weak_teacher=True, max_steps=1))
    told = capsys.readouterr().out
    assert f"images are normalised by {IMAGENET}; the teacher's by {GREY}, as its weights expect" in told


def test_an_export_is_described_with_the_students_own(learner, tmp_path):
    run = load_run(learner)
    with run.loader(run.index()) as loader:
        described = write_export(tmp_path / "export", run, loader, onnx=False, runs=1)
    assert described["preprocessing"]["mean"] == IMAGENET.mean
    assert described["compared"]["deployed with trained"]["images"] == 18


def test_a_cache_is_of_the_teachers_images_whatever_the_students(run, data, tmp_path):
    settings = {"objective": "kd", "teacher": str(run), "allow_weak_teacher": True}
    folders = tmp_path / "default", tmp_path / "grey"
    make_cache(config(data, tmp_path, **settings), folders[0], 1)
    make_cache(config(data, tmp_path, **settings, mean=GREY.mean, std=GREY.std), folders[1], 1)
    converted, plain = (TeacherCache(folder) for folder in folders)
    assert converted.normalisation == plain.normalisation == GREY
    ids = np.arange(converted.images)
    torch.testing.assert_close(converted.pooled(ids, 0), plain.pooled(ids, 0), rtol=2**-7, atol=1e-3)
    cached = {"objective": "kd", "teacher": f"cache:{folders[0]}", "allow_weak_teacher": True, "max_steps": 1}
    train(config(data, tmp_path / "half", **cached, mean=HALF.mean, std=HALF.std))
    row = load_run(tmp_path / "half")
    assert (row.config.mean, row.config.teacher_mean) == (HALF.mean, GREY.mean)
    with pytest.raises(UserError, match=r"teacher_mean \[0\.3, 0\.3, 0\.3\] where \[0\.5, 0\.5, 0\.5\] is expected"):
        train(config(data, tmp_path / "other", **cached, teacher_mean=HALF.mean))


def test_a_run_of_an_older_version_continues_as_it_began(run, data, tmp_path):
    """Its teacher saw the student's images, whatever it had learned from, and its settings do not name them."""
    folder = tmp_path / "older"
    same = {"teacher_mean": IMAGENET.mean, "teacher_std": IMAGENET.std}
    begun = config(data, folder, objective="kd", teacher=str(run), allow_weak_teacher=True, max_steps=2, **same)
    train(begun)
    saved = torch.load(folder / "last.pt", weights_only=False)
    file = yaml.safe_load((folder / "config.yaml").read_text())
    for values in (saved["config"], file):
        del values["teacher_mean"], values["teacher_std"]
    torch.save(saved, folder / "last.pt")
    (folder / "config.yaml").write_text(yaml.safe_dump(file))
    assert load_run(folder).config.teacher_mean == IMAGENET.mean
    (folder / "summary.json").unlink()
    train(begun, resume=True)
    with pytest.raises(UserError, match=r"begun with teacher_mean = \(0\.485, .* resumed with \(0\.3, 0\.3, 0\.3\)"):
        train(dataclasses.replace(begun, **dict.fromkeys(same)), resume=True)
