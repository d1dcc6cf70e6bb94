"""Strided 1x1 convolutions of few channels are kept from oneDNN's gradient, which writes past its memory."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ijckd_fast.nets import Tapped
from ijckd_fast.nets.pointwise import guard_pointwise

_TWO_STEPS = """
import sys, torch
from ijckd_fast.distill import Distiller, get_objective
from ijckd_fast.nets import create_model
torch.set_num_threads(1)
for name in sys.argv[1:]:
    distiller = Distiller(create_model(name, 10, image_size=112), None, get_objective("ce"))
    distiller.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(distiller.parameters(), 0.01)
    for _ in range(2):
        images = torch.randn(2, 3, 112, 112).contiguous(memory_format=torch.channels_last)
        loss = distiller(images, torch.arange(2)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(name, bool(loss.isfinite()))
"""


@pytest.mark.slow
def test_nets_with_such_a_layer_train_two_steps():
    names = ["timm/repvgg_a0", "timm/mobileone_s0", "timm/fastvit_t8"]
    done = subprocess.run([sys.executable, "-c", _TWO_STEPS, *names], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "".join(f"{name} True\n" for name in names)), done.stderr[-2000:]


class _Strided(TorchDispatchMode):
    """Counts gradients of convolutions with a stride."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.count += max(args[4]) > 1
        return func(*args, **(kwargs or {}))


def _gradients(layer, x):
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    with _Strided() as strided:
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    found = [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]
    for p in layer.parameters():
        p.grad = None
    return found, strided.count


class Own(nn.Conv2d):
    """As timm's StdConv2d: its own forward, by a function."""

    def forward(self, x):
        return F.conv2d(x, self.weight * 2, self.bias, self.stride)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(3, 5, 1, 2), (2, 3, 7, 8)),
        (nn.Conv2d(4, 6, 1, (2, 1), groups=2, bias=False), (2, 4, 7, 8)),
        (nn.Conv2d(15, 5, 1, (1, 3), padding="valid"), (2, 15, 7, 7)),
        (nn.Conv2d(3, 5, 1, 2, dilation=3), (3, 7, 8)),
        (Own(3, 5, 1, 2), (2, 3, 7, 8)),
        (nn.Conv1d(3, 5, 1, 2), (2, 3, 7)),
        (nn.ConvTranspose1d(5, 3, 1, 2, bias=False), (2, 5, 4)),
        (nn.ConvTranspose2d(4, 6, 1, (2, 3), output_padding=1, groups=2), (2, 4, 4, 4)),
    ],
)
def test_such_a_layer_computes_the_same_without_a_stride(layer, shape):
    layer, x = copy.deepcopy(layer).double(), torch.randn(shape, dtype=torch.float64)
    expected, strided = _gradients(layer, x)
    assert strided == 1
    assert guard_pointwise(layer) == 1
    assert guard_pointwise(layer) == 0  # is already
    for twin in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        found, strided = _gradients(twin, x)
        assert strided == 0
        assert isinstance(twin, type(layer))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(16, 5, 1, 2),
        nn.Conv2d(3, 5, 3, 2),
        nn.Conv2d(3, 5, 1),
        nn.Conv2d(3, 5, 1, 2, 1),
        nn.Conv3d(3, 5, 1, 2),
    ],
)
def test_any_other_layer_stays_as_it_is(layer):
    assert guard_pointwise(layer) == 0


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, 1, 1))

    def forward(self, x):
        return F.conv2d(x, self.kernel, stride=2)


def test_a_function_of_a_net_is_found_when_it_is_looked_at():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.fc = Block(), nn.Linear(4, 10)

        def forward(self, images):
            return self.fc(self.block(images).mean((2, 3)))

    model = Tapped(Net(), "net", 10, 16)
    images = torch.randn(2, 3, 16, 16)
    expected = model.net.fc(F.conv2d(images, model.net.block.kernel, stride=2).mean((2, 3)))
    out = model.net(images)
    torch.testing.assert_close(out, expected)
    with _Strided() as strided:
        out.sum().backward()
    assert strided.count == 0
