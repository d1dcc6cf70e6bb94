"""What a net is does not depend on whether it is trained: layers that begin as the identity are told from none."""

import copy

import pytest
import torch
from torch import nn

from ijckd_fast.nets import Tapped, create_model


class Scale(nn.Module):
    def __init__(self, value, shape=(6,)):
        super().__init__()
        self.value = nn.Parameter(torch.full(shape, value))


class Residual(Scale):
    """ReZero, LayerScale: x + value * f(x)."""

    def forward(self, x):
        return x + self.value * torch.tanh(x)


class Gain(Scale):
    def forward(self, x):
        return x * self.value


class Shift(Scale):
    def forward(self, x):
        return x + self.value


class Response(nn.Module):
    """GRN, on vectors."""

    def __init__(self):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.zeros(1, 6)), nn.Parameter(torch.zeros(1, 6))

    def forward(self, x):
        return x + self.gamma * (x * x.norm(dim=1, keepdim=True)) + self.beta


class Whitening(nn.Module):
    """Statistics of its own kind, in buffers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(6))
        self.register_buffer("rotation", torch.eye(6))

    def forward(self, x):
        return (x - self.centre) @ self.rotation


class Branch(nn.Module):
    """A residual branch whose last layer begins with zeros."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x):
        return x + self.layer(x)


def _unit():
    layer = nn.Linear(6, 6)
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


NECKS = {
    "BatchNorm": lambda: nn.BatchNorm1d(6),
    "BatchNorm without gain": lambda: nn.BatchNorm1d(6, affine=False),
    "ReZero": lambda: Residual(0.0, ()),
    "LayerScale": lambda: Residual(1e-5),
    "tiny LayerScale": lambda: Residual(1e-6, (1, 6)),
    "gain": lambda: Gain(1.0),
    "shift": lambda: Shift(0.0),
    "GRN": Response,
    "whitening": Whitening,
    "zero branch": Branch,
    "unit matrix": _unit,
}


class Net(nn.Module):
    def __init__(self, neck):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6)
        self.neck, self.fc = neck, nn.Linear(6, 10)

    def forward(self, images):
        return self.fc(self.neck(torch.relu(self.norm(self.conv(images))).mean((2, 3))))


def train(net):
    """Gives every weight, and BatchNorm's statistics, other values."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(0.2 + torch.rand(tensor.shape, generator=draw))


@pytest.mark.parametrize("neck", NECKS)
def test_a_layer_between_pooling_and_classifier_belongs_to_the_map(neck):
    torch.manual_seed(0)
    model = Tapped(Net(NECKS[neck]()), "net", 10, 16).eval()
    assert model.has_map
    train(model)
    map_, pooled = model.features(torch.randn(2, 3, 16, 16), need_map=True)
    torch.testing.assert_close(map_.mean((2, 3)), pooled)
    before = model.net.norm(model.net.conv(torch.ones(1, 3, 16, 16))).relu().mean((2, 3))
    assert not torch.allclose(model.net.neck(before), before)  # else the equality would say nothing


@pytest.mark.parametrize("neck", [nn.Identity(), nn.Dropout(0.5)])
def test_what_stays_the_identity_is_none(neck):
    model = Tapped(Net(neck), "net", 10, 16)
    made = []
    model.net.norm.register_forward_hook(lambda layer, args, output: made.append(torch.relu(output)))
    assert torch.equal(model.features(torch.randn(2, 3, 16, 16), need_map=True)[0], made[0])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("neck", NECKS)
def test_looking_changes_no_bit(neck, training):
    torch.manual_seed(0)
    net = Net(NECKS[neck]()).train(training)
    net.norm.train(not training)
    before, memory = copy.deepcopy(net.state_dict()), {k: v.data_ptr() for k, v in net.state_dict().items()}
    state = torch.get_rng_state()
    model = Tapped(net, "net", 10, 16)
    after = model.native_state_dict()
    assert {k: v.data_ptr() for k, v in after.items()} == memory
    torch.testing.assert_close(after, dict(before), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training == model.classifier.training == net.conv.training == training
    assert net.norm.training != training
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["efficientvit_m0", "shvit_s1"])
def test_a_norm_before_a_librarys_classifier_belongs_to_the_map_before_and_after_training(name, tmp_path):
    torch.manual_seed(0)
    model = create_model(f"timm/{name}", 3, image_size=96).train()
    assert model.has_map
    with torch.no_grad():
        for _ in range(5):  # moves the running statistics alone
            model(torch.randn(8, 3, 96, 96))
    torch.save(model.native_state_dict(), tmp_path / "w.pt")
    trained = create_model(f"timm/{name}", 3, checkpoint=tmp_path / "w.pt", image_size=96)
    for each in (model.eval(), trained.eval()):
        with torch.no_grad():
            map_, pooled = each.features(torch.randn(2, 3, 96, 96), need_map=True)
        torch.testing.assert_close(map_.mean((2, 3)), pooled, rtol=1e-4, atol=1e-5)


def test_weights_of_a_file_are_there_when_a_net_is_looked_at(tmp_path, monkeypatch):
    from ijckd_fast.nets import tapped

    torch.manual_seed(0)
    donor = create_model("resnet8x0.25", 10, image_size=16)
    torch.save(donor.native_state_dict(), tmp_path / "w.pt")
    seen = []

    class Looked(tapped.Probe):
        def __init__(self, net, *args):
            seen.append(net.conv1.weight.detach().clone())
            super().__init__(net, *args)

    monkeypatch.setattr(tapped, "Probe", Looked)
    model = create_model("resnet8x0.25", 10, checkpoint=tmp_path / "w.pt", image_size=16)
    assert torch.equal(seen[-1], donor.net.conv1.weight)
    map_, pooled = model.features(torch.randn(2, 3, 16, 16), need_map=True)
    torch.testing.assert_close(map_.mean((2, 3)), pooled)
    assert len(model.net.get_submodule(model.map_path)._forward_hooks) == 1
