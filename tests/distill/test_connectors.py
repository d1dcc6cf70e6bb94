"""Connectors: sizes as published, initialisation as torch's layers, arithmetic as torch's layers, refusals."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ijckd_fast.distill import PRESETS, Distiller, build_connector, get_objective, parse_spec
from ijckd_fast.errors import UserError
from ijckd_fast.nets import count_macs, count_parameters, create_model

HEADS = ("fused", "reference")


# The connectors' published sizes, BatchNorm's affine parameters included
@pytest.mark.parametrize(
    ("channels", "counts"),
    [
        ((512, 512), {"conv1x1": 263_168, "bottleneck": 854_016, "bottleneck:4": 280_064, "bottleneck:8": 103_680}),
        (
            (1024, 2048),
            {"conv1x1": 2_101_248, "bottleneck:2": 12_591_104, "bottleneck:4": 3_938_304, "bottleneck:8": 1_381_376},
        ),
        ((256, 256), {"conv1x1": 66_048, "bottleneck:2": 214_016, "bottleneck:4": 70_400, "bottleneck:8": 26_240}),
        ((512, 256), {"conv1x1": 131_584, "bottleneck:2": 246_784, "bottleneck:4": 86_784, "bottleneck:8": 34_432}),
    ],
)
def test_parameter_counts_are_the_published_ones(channels, counts):
    assert {spec: count_parameters(build_connector(spec, *channels)) for spec in counts} == counts


def test_parameter_counts_on_vectors():
    assert count_parameters(build_connector("linear", 5, 7)) == 5 * 7 + 7
    assert count_parameters(build_connector("mlp", 5, 7)) == 5 * 7 + 2 * 7 + 7 * 7 + 7


def test_initialisation_is_that_of_torch_layers():
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 9, 1, bias=False)
    torch.manual_seed(0)
    assert torch.equal(build_connector("conv1x1", 6, 9).weight, conv.weight[:, :, 0, 0])
    torch.manual_seed(0)
    linear = nn.Linear(6, 9)
    torch.manual_seed(0)
    connector = build_connector("linear", 6, 9)
    assert torch.equal(connector.weight, linear.weight)
    assert torch.equal(connector.bias, linear.bias)


@pytest.mark.parametrize("channels", [(512, 512), (1024, 2048), (96, 256)])  # the published ImageNet pairs, another
@pytest.mark.parametrize("spec", ["conv1x1", "bottleneck:4", "linear", "mlp"])
def test_he_weights_are_normal_with_srrl_s_deviation(spec, channels):
    """N(0, sqrt(2 / (k k Cout))) for every layer: deviation within 1 %, the tails of a normal and not of a uniform."""
    torch.manual_seed(0)
    connector = build_connector(spec, *channels, init="he")
    trunk = [layer.weight for layer in connector.trunk.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert len(trunk) == {"conv1x1": 0, "bottleneck:4": 2, "linear": 0, "mlp": 1}[spec]
    for weight in (*trunk, connector.weight):
        kernel = math.prod(weight.shape[2:])
        sizes = weight.detach() / math.sqrt(2 / (kernel * weight.shape[0]))
        assert abs(sizes.std() - 1) < 4 / math.sqrt(2 * weight.numel())  # 4 standard errors
        assert abs(sizes.mean()) < 4 / math.sqrt(weight.numel())
        assert abs((sizes.abs() > 2).float().mean() - 0.0455) < 4 * math.sqrt(0.0455 / weight.numel())
    if spec == "linear":  # the bias stays as torch's Linear has it
        assert connector.bias.abs().max() <= 1 / math.sqrt(channels[0])


@pytest.mark.parametrize("name", [name for name, objective in PRESETS.items() if objective.connector or objective.hint])
def test_only_srrl_s_connector_leaves_torch_s_first_weights(name):
    """IJCKD's and SimKD's connectors and the hint's regressor are PyTorch's: within 1 / sqrt(fan in)."""
    torch.manual_seed(0)
    student, teacher = (create_model(net, 7, image_size=16) for net in ("resnet8x0.25", "resnet8x0.5"))
    distiller = Distiller(student, teacher, PRESETS[name])
    connector = distiller.regressor if PRESETS[name].hint else distiller.connector
    trunk = [layer.weight for layer in connector.trunk.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    within = [bool(w.abs().max() <= 1 / math.sqrt(w[0].numel())) for w in (*trunk, connector.weight)]
    assert within == [name != "srrl"] * len(within)
    again = Distiller(student, teacher, get_objective(name, connector_init="he"))
    connector = again.regressor if PRESETS[name].hint else again.connector
    assert bool(connector.weight.abs().max() <= 1 / math.sqrt(connector.weight.shape[1])) == (name == "fitnet")


def torch_layers(spec: str, connector: nn.Module) -> nn.Sequential:
    """The same connector from torch's layers alone, with its parameters."""
    Ct, Cin = connector.weight.shape
    if connector.takes_map:
        conv = nn.Conv2d(Cin, Ct, 1, bias=False)
        bn = nn.BatchNorm2d(Ct)
        with torch.no_grad():
            conv.weight.copy_(connector.weight[:, :, None, None])
            bn.weight.copy_(connector.bn_weight)
            bn.bias.copy_(connector.bn_bias)
        tail = [conv, bn, nn.ReLU()]
    else:
        linear = nn.Linear(Cin, Ct)
        linear.load_state_dict({"weight": connector.weight, "bias": connector.bias})
        tail = [linear]
    if spec == "bottleneck:2":
        head = [
            nn.Conv2d(5, Ct // 2, 1, bias=False), nn.BatchNorm2d(Ct // 2), nn.ReLU(),
            nn.Conv2d(Ct // 2, Ct // 2, 3, padding=1, bias=False), nn.BatchNorm2d(Ct // 2), nn.ReLU(),
        ]  # fmt: skip
    elif spec == "mlp":
        head = [nn.Linear(5, Ct, bias=False), nn.BatchNorm1d(Ct), nn.ReLU()]
    else:
        head = []
    if head:
        nn.Sequential(*head).load_state_dict(connector.trunk.state_dict())
    return nn.Sequential(*head, *tail).double()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("spec", "match"),
    [(spec, match) for spec in ("bottleneck:2", "conv1x1") for match in ("map", "pooled", "none")]
    + [(spec, match) for spec in ("linear", "mlp") for match in ("pooled", "none")],
)
def test_forward_and_gradients_are_those_of_torch_layers(spec, match, head):
    torch.manual_seed(1)
    connector = build_connector(spec, 5, 8)
    if connector.takes_map:
        with torch.no_grad():
            connector.bn_weight.uniform_(0.5, 1.5)
            connector.bn_bias.normal_()
    connector = connector.double()
    layers = torch_layers(spec, connector)
    shape = (4, 5, 3, 2) if connector.takes_map else (4, 5)
    map_t = torch.randn(4, 8, 3, 2, dtype=torch.float64) if match == "map" else None
    pooled_t = torch.randn(4, 8, dtype=torch.float64) if match == "pooled" else None

    for training in (True, True, False):  # two updates of the running statistics, then their use
        connector.train(training)
        layers.train(training)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        x_ref = x.detach().clone().requires_grad_()
        weight_z = torch.randn(4, 8, dtype=torch.float64)

        z, fm = connector(x, map_t=map_t, pooled_t=pooled_t, head=head)
        Z = layers(x_ref)
        z_ref = Z.mean((2, 3)) if connector.takes_map else Z
        fm_ref = torch.zeros((), dtype=torch.float64)
        if match == "map":
            fm_ref = F.mse_loss(Z, map_t)
        elif match == "pooled":
            fm_ref = F.mse_loss(z_ref, pooled_t)
        close = {"rtol": 1e-10, "atol": 1e-10}
        torch.testing.assert_close(z, z_ref, **close)
        torch.testing.assert_close(fm, fm_ref, **close)

        connector.zero_grad()
        layers.zero_grad()
        ((z * weight_z).sum() + 3 * fm).backward()
        ((z_ref * weight_z).sum() + 3 * fm_ref).backward()
        torch.testing.assert_close(x.grad, x_ref.grad, **close)
        own = [p.grad.flatten() for p in connector.trunk.parameters()] + [connector.weight.grad.flatten()]
        own += (
            [connector.bn_weight.grad, connector.bn_bias.grad]
            if connector.takes_map
            else [connector.bias.grad.flatten()]
        )
        torch.testing.assert_close(own, [p.grad.flatten() for p in layers.parameters()], **close)

    if connector.takes_map:
        torch.testing.assert_close(connector.running_mean, layers[-2].running_mean, **close)
        torch.testing.assert_close(connector.running_var, layers[-2].running_var, **close)
        assert connector.num_batches_tracked == layers[-2].num_batches_tracked == 2


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("spec", ["conv1x1", "bottleneck:2"])
def test_the_connected_map_is_what_the_op_averages(spec, momentum):
    """In training and afterwards, with the same running statistics, for which batches are counted."""
    torch.manual_seed(0)
    by_op = build_connector(spec, 6, 8).double()
    by_op.momentum = momentum
    by_map = copy.deepcopy(by_op)
    for batch in torch.randn(3, 5, 6, 4, 4, dtype=torch.float64):
        torch.testing.assert_close(by_map.connected_map(batch).mean((2, 3)), by_op(batch)[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dict(by_map.named_buffers()), dict(by_op.named_buffers()), rtol=1e-12, atol=1e-12)
    assert by_map.num_batches_tracked == 3
    torch.testing.assert_close(
        by_map.eval().connected_map(batch).mean((2, 3)), by_op.eval()(batch)[0], rtol=1e-12, atol=1e-12
    )


def test_projection_macs_are_those_of_the_convolution():
    conv = nn.Conv2d(5, 8, 1, bias=False)
    assert build_connector("conv1x1", 5, 8).projection_macs(6) == count_macs(conv, torch.zeros(1, 5, 3, 2)) == 240


@pytest.mark.parametrize("head", HEADS)
def test_a_map_of_other_channels_is_refused(head):
    with pytest.raises(RuntimeError):
        build_connector("conv1x1", 5, 8)(torch.zeros(2, 6, 3, 3), head=head)
    with pytest.raises(RuntimeError):
        build_connector("bottleneck", 5, 8)(torch.zeros(2, 6, 3, 3), head=head)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("botleneck:2", "did you mean 'bottleneck'"),
        ("conv", "wanted bottleneck:FACTOR, conv1x1, linear or mlp"),
        ("conv1x1:2", "only bottleneck takes a factor"),
        ("bottleneck:0", "whole number >= 1"),
        ("bottleneck:", "whole number >= 1"),
        ("bottleneck:1.5", "whole number >= 1"),
        ("bottleneck:16", "factor of at most 8"),
    ],
)
def test_unfit_specs_are_refused(spec, text):
    with pytest.raises(UserError, match=text):
        build_connector(spec, 5, 8)


def test_the_factor_is_two_when_left_out():
    assert parse_spec("bottleneck") == parse_spec("bottleneck:2") == ("bottleneck", 2)
