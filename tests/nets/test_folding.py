"""Folding BatchNorm: the same answers and maps, the expected number folded, and every case in which it must not be."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijckd_fast.nets import create_model, fold_batch_norm


def _norms(net: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in net.modules())


def _with_statistics(net: nn.Module) -> nn.Module:
    """Every BatchNorm with statistics and affine parameters as training leaves them, far from the first 0 and 1."""
    generator = torch.Generator().manual_seed(3)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None:
            shape = module.running_mean.shape
            module.running_mean.copy_(torch.randn(shape, generator=generator) / 4)
            module.running_var.copy_(torch.rand(shape, generator=generator) + 0.5)
            if module.affine:
                module.weight.data.copy_(torch.rand(shape, generator=generator) + 0.5)
                module.bias.data.copy_(torch.randn(shape, generator=generator) / 4)
    return net


def _images(size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(
    ("name", "size", "folded", "left"),
    [
        ("resnet8x0.25", 16, 10, 0),
        ("mobilenet_v1", 32, 27, 0),
        ("resnet18", 32, 20, 0),
        ("mobilenet_v2", 32, 52, 0),
        ("timm/resnet10t", 64, 14, 0),
        ("timm/efficientnet_b0", 32, 49, 0),
        # the first of every dense layer, of every transition and the last come before an activation
        ("densenet121", 32, 59, 62),
        ("googlenet", 64, 57, 0),
        ("timm/convnext_atto", 32, 0, 0),
        ("timm/vit_tiny_patch16_224", 32, 0, 0),
    ],
)  # fmt: skip
def test_nets_answer_as_before(name, size, folded, left):
    torch.manual_seed(0)
    model = _with_statistics(create_model(name, 5, image_size=size)).train()
    images = _images(size, batch=3)
    model.eval()
    with torch.no_grad():
        map_, pooled = model.features(images, need_map=model.has_map)
        logits = model(images)
    model.train()
    parameters = {id(p) for p in model.parameters()}
    assert _norms(model) == folded + left

    assert fold_batch_norm(model.net, _images(size)) == folded

    assert _norms(model) == left
    assert model.net.training
    assert sum(key.endswith("running_mean") for key in model.state_dict()) == left
    # what a layer had stays the parameter it was; its bias is new where there was none
    assert {id(p) for n, p in model.named_parameters() if n.endswith("weight")} <= parameters
    model.eval()
    with torch.no_grad():
        map_folded, pooled_folded = model.features(images, need_map=model.has_map)
        torch.testing.assert_close(model(images), logits, rtol=0, atol=1e-4 * float(logits.abs().max()))
    torch.testing.assert_close(pooled_folded, pooled, rtol=0, atol=1e-4 * float(pooled.abs().max()))
    if map_ is not None:
        torch.testing.assert_close(map_folded, map_, rtol=0, atol=1e-4 * float(map_.abs().max()))
    assert fold_batch_norm(model.net, _images(size)) == 0


class _Ends(nn.Module):
    """The map is tapped on the last BatchNorm: as it is, or with the functional ReLU that follows."""

    def __init__(self, relu: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return self.fc((F.relu(x, inplace=True) if self.relu else x).mean((2, 3)))


@pytest.mark.parametrize("relu", [False, True])
def test_a_map_tapped_on_a_folded_norm(relu):
    from ijckd_fast.nets import Tapped

    torch.manual_seed(0)
    model = Tapped(_with_statistics(_Ends(relu)), "ends", 5, 16).eval()
    assert model.map_path == "bn"
    images = _images(16)
    with torch.no_grad():
        map_, pooled = model.features(images, need_map=True)
        copied = copy.deepcopy(model)
        for net in (model, copied):
            assert fold_batch_norm(net.net, images) == 1
            map_folded, pooled_folded = net.features(images, need_map=True)
            torch.testing.assert_close(map_folded, map_)
            torch.testing.assert_close(pooled_folded, pooled)
            torch.testing.assert_close(map_folded.mean((2, 3)), pooled_folded)


def test_frozen_stays_frozen_and_hooks_can_be_removed():
    net = _with_statistics(nn.Sequential(nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU())).eval()
    net.requires_grad_(False)
    seen = []
    handle = net[1].register_forward_hook(lambda module, args, output: seen.append(output))
    x = torch.randn(5, 6)
    before = net(x)
    assert fold_batch_norm(net, x) == 1
    assert not any(p.requires_grad for p in net.parameters())
    assert list(net.state_dict()) == ["0.weight", "0.bias"]
    seen.clear()
    torch.testing.assert_close(net(x), before)
    assert len(seen) == 1
    handle.remove()
    net(x)
    assert len(seen) == 1


def test_arithmetic_is_in_float64():
    """Rounded once: no worse than float32's own BatchNorm, though mean and scale are far apart."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)).eval()
    net[1].running_mean.uniform_(50, 60)
    net[1].running_var.uniform_(1e-4, 1e-3)
    wanted = copy.deepcopy(net).double()
    assert fold_batch_norm(net, _images(8)) == 1
    scale = wanted[1].weight / (wanted[1].running_var + wanted[1].eps).sqrt()
    weight = wanted[0].weight * scale[:, None, None, None]
    bias = (wanted[0].bias - wanted[1].running_mean) * scale + wanted[1].bias
    assert torch.equal(net[0].weight, weight.float())
    assert torch.equal(net[0].bias, bias.float())


class _Net(nn.Module):
    """A pair to fold, and then a convolution and a BatchNorm that for one reason or another are none."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case
        self.stem = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3, track_running_stats=case != "batch statistics")
        self.other = nn.BatchNorm2d(3)
        if case == "shared weight":
            self.twin = nn.Conv2d(3, 3, 3, padding=1)
            self.twin.weight = self.conv.weight
        elif case == "standardised":
            self.conv = _Standardised(3, 3, 3, padding=1)
        elif case == "weight norm":
            self.conv = nn.utils.parametrizations.weight_norm(self.conv)
        elif case == "watched":
            self.seen: list[Tensor] = []
            self.conv.register_forward_hook(lambda module, args, output: self.seen.append(output))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv(x)
        if self.case == "read twice":
            return self.bn(y) + y
        if self.case == "read by a concatenation":
            return torch.cat([self.bn(y), y])
        if self.case == "two norms":
            return self.bn(y) + self.other(y)
        if self.case == "called twice":
            return self.bn(y) + self.conv(2 * x)
        if self.case == "norm called twice":
            return self.bn(y) + self.bn(2 * x)
        if self.case == "in place":
            return self.bn(y.relu_())
        if self.case == "reshaped":
            return self.bn(y[None][0])
        if self.case == "shared weight":
            return self.bn(y) + self.twin(x)
        if self.case == "weight read":
            return self.bn(y) + self.conv.weight.sum()
        return self.bn(y)


class _Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w / w.std((1, 2, 3), keepdim=True), self.bias, padding=1)


CASES = [
    "read twice", "read by a concatenation", "two norms", "called twice", "norm called twice", "in place", "reshaped",
    "shared weight",
    "weight read", "standardised", "weight norm", "watched", "batch statistics",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_no_pair_to_fold(case):
    torch.manual_seed(0)
    net = _with_statistics(_Net(case)).eval()
    x = _images(8)
    before, state = net(x), copy.deepcopy(net.state_dict())
    # a formula that reads a folded weight itself shows in the net's output only: then nothing is folded
    assert fold_batch_norm(net, x) == (0 if case == "weight read" else 1)
    torch.testing.assert_close(net(x), before)
    assert isinstance(net.stem[1], nn.BatchNorm2d) == (case == "weight read")
    assert isinstance(net.bn, nn.BatchNorm2d)
    for key, value in net.state_dict().items():
        assert key.startswith("stem.") or torch.equal(value, state[key])


def test_the_case_without_a_fault_is_folded():
    """What the cases above have in common is no reason to refuse."""
    net = _with_statistics(_Net("none")).eval()
    assert fold_batch_norm(net, _images(8)) == 2


def test_a_net_that_fails_is_left_as_it_was():
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) * self.bn.eps

    net = Reads()
    with pytest.raises(AttributeError):
        fold_batch_norm(net, _images(4))
    assert isinstance(net.bn, nn.BatchNorm2d)
    assert net.training
    net(_images(4))
