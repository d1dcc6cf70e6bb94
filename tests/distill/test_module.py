"""The distiller as a module in somebody else's hands: what is its own, and a teacher that stays as it is."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from test_distiller import K, batch, pair
from torch import nn

from ijckd_fast.distill import PRESETS, Distiller, get_objective
from ijckd_fast.errors import UserError


class Holder(nn.Module):
    """A user's module that has the teacher among its parts, and trains all of them."""

    def __init__(self, distiller: Distiller) -> None:
        super().__init__()
        self.distiller, self.teacher, self.backbone = distiller, distiller.teacher, distiller.teacher.net


def in_training(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if part.training]


@pytest.mark.parametrize("name", PRESETS)
def test_the_teacher_is_none_of_its_parts(name):
    distiller = Distiller(*pair(torch.float32), get_objective(name))
    theirs = {id(x) for x in [*distiller.teacher.parameters(), *distiller.teacher.buffers()]}
    state = distiller.state_dict(keep_vars=True).values()
    for mine in (distiller.parameters(), distiller.buffers(), state):
        assert not theirs & {id(x) for x in mine}
    assert not set(distiller.teacher.modules()) & set(distiller.modules())


def test_the_names_of_its_weights_are_those_of_older_checkpoints():
    distiller = Distiller(*pair(torch.float32), get_objective("srrl", hint=1.0))
    others = [name for name in distiller.state_dict() if not name.startswith("student.net.")]
    of_connector = ["weight", "bn_weight", "bn_bias", "running_mean", "running_var", "num_batches_tracked"]
    assert others == [
        *("student.classifier.weight", "student.classifier.bias"),
        *(f"connector.{name}" for name in of_connector),
        *(f"regressor.{name}" for name in of_connector),
    ]


@pytest.mark.parametrize("unfreeze", [False, True], ids=["train", "train and requires_grad_"])
@pytest.mark.parametrize("name", ["ijckd", "simkd", "kd", "at"])
def test_a_holder_s_train_does_not_reach_the_teacher(name, unfreeze):
    """Statistics of a teacher in training mode would move, and its features with them."""
    torch.manual_seed(0)
    distiller = Distiller(*pair(torch.float32), get_objective(name))
    twin = copy.deepcopy(distiller).train()
    holder = Holder(distiller).train()
    if unfreeze:
        holder.requires_grad_()
    before = copy.deepcopy(distiller.teacher.state_dict())
    images, labels = batch(torch.float32)
    assert in_training(distiller.teacher)
    loss, expected = (each(images, labels, progress=0).loss for each in (distiller, twin))
    loss.backward()
    assert torch.equal(loss, expected)
    assert in_training(distiller.teacher) == []
    assert all(torch.equal(x, before[key]) for key, x in distiller.teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in distiller.teacher.parameters())


def test_parts_of_the_teacher_set_to_training_are_noticed():
    distiller = Distiller(*pair(torch.float32), get_objective("ijckd")).train()
    images, labels = batch(torch.float32)
    distiller.teacher.net.layer2.train()
    distiller(images, labels)
    assert in_training(distiller.teacher) == []
    distiller.eval().teacher.net.layer1.train()
    distiller.teacher_logits(images)
    assert in_training(distiller.teacher) == []
    distiller.teacher.net.layer1.train()
    distiller.compare(images)
    assert in_training(distiller.teacher) == []


def test_conversions_reach_the_teacher():
    distiller = Distiller(*pair(torch.float32), get_objective("ijckd"))
    assert nn.ModuleList([distiller]).double()[0].teacher.classifier.weight.dtype == torch.float64
    assert distiller.half().teacher.classifier.weight.dtype == torch.float16
    assert distiller.to("meta").teacher.classifier.weight.device.type == "meta"


def test_a_copy_has_a_teacher_of_its_own():
    distiller = Distiller(*pair(torch.float32), get_objective("ijckd"))
    twin = copy.deepcopy(distiller)
    assert twin.teacher is not distiller.teacher
    twin.double()
    assert distiller.teacher.classifier.weight.dtype == torch.float32


def test_it_can_be_saved_whole():
    distiller = Distiller(*pair(torch.float32), get_objective("ijckd")).train()
    file = io.BytesIO()
    torch.save(distiller, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    images, labels = batch(torch.float32)
    assert torch.equal(again(images, labels).loss, distiller(images, labels).loss)


def test_logits_only_where_they_are_asked_for():
    distiller = Distiller(*pair(torch.float32), get_objective("ijckd-pooled", connector="linear")).train()
    images, labels = batch(torch.float32)
    assert distiller(images, labels).logits is None
    out = distiller(images, labels, with_logits=True)
    assert out.logits.shape == (6, K)
    assert (out.logits.argmax(1) == labels).sum() == out.correct
    step = distiller.step(images, labels)
    assert torch.equal(step.logits, out.logits)
    assert torch.equal(step.loss, out.loss)


def test_progress_is_asked_for_where_there_is_a_warm_up():
    images, labels = batch(torch.float32)
    for name in PRESETS:
        distiller = Distiller(*pair(torch.float32), get_objective(name)).train()
        if name in ("dkd", "sdd-dkd"):
            warm_up = "dkd_warmup" if name == "dkd" else "sdd_warmup"
            with pytest.raises(
                UserError, match=f"'{name}' has a warm-up and needs progress, .* got none: .* set {warm_up} to 0"
            ):
                distiller(images, labels)
        else:
            distiller(images, labels)
    at_once = Distiller(*pair(torch.float32), get_objective("dkd", dkd_warmup=0.0)).train()
    distiller = Distiller(*pair(torch.float32), get_objective("dkd")).train()
    assert torch.equal(at_once(images, labels).loss, distiller(images, labels, progress=20.0).loss)
