"""SRRL, DKD and AT as their authors' code computes them, written here in plain torch: no helper of the other tests."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ijckd_fast.distill import Distiller, get_objective
from ijckd_fast.nets import create_model
from ijckd_fast.train.config import OBJECTIVE_FIELDS, load_preset

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
K = 7
# Temperature, alpha, beta and warm-up of mdistiller's configurations (where one names none, its default), by our preset
DKD = {
    "imagenet_r34_r18": (1, 1, 0.5, 1),
    "imagenet_r50_mobilenetv1": (1, 1, 2, 1),
    "cifar100_r56_r20": (4, 1, 2, 20),
    "cifar100_r110_r32": (4, 1, 2, 20),
    "cifar100_wrn40_2_wrn16_2": (4, 1, 6, 20),
    "cifar100_wrn40_2_wrn40_1": (4, 1, 6, 20),
    "cifar100_vgg13_vgg8": (4, 1, 6, 20),
    "cifar100_vgg13_mobilenetv2": (4, 1, 6, 20),
    "cifar100_r32x4_r8x4": (4, 1, 8, 20),
    "cifar100_r32x4_shufflenetv1": (4, 1, 8, 20),
    "cifar100_r32x4_shufflenetv2": (4, 1, 8, 20),
    "cifar100_r50_mobilenetv2": (4, 1, 8, 20),
    "cifar100_wrn40_2_shufflenetv1": (4, 1, 8, 20),
}


def nets() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    student, teacher = (create_model(name, K, image_size=16).double() for name in ("resnet8x0.25", "resnet8x0.5"))
    with torch.no_grad():
        teacher.classifier.weight.mul_(20)  # answers that differ from one another
    return student, teacher


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 16, 16, dtype=torch.float64, generator=draw), torch.randint(K, (8,), generator=draw)


def pooled(net: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The last map of our small ResNets, and its mean."""
    x = net.layer3(net.layer2(net.layer1(F.relu(net.bn1(net.conv1(images))))))
    return x, x.mean((2, 3))


def dkd_with_masks(logits, logits_t, labels, alpha, beta, T):
    """TCKD on (target, the rest) from probabilities, NCKD with the target's logit taken down by 1000."""
    target = F.one_hot(labels, K).bool()

    def two(x):
        p = (x / T).softmax(1)
        return torch.stack([p[target], (p * ~target).sum(1)], 1)

    tckd = F.kl_div(two(logits).log(), two(logits_t), reduction="sum")
    rest, rest_t = (x / T - 1000.0 * target for x in (logits, logits_t))
    nckd = F.kl_div(rest.log_softmax(1), rest_t.softmax(1), reduction="sum")
    return T**2 * (alpha * tckd + beta * nckd) / len(labels)


@pytest.mark.parametrize("preset", DKD)
def test_dkd_of_a_packaged_pair(preset):
    """Cross-entropy and min(epoch / warm-up, 1) times DKD, at the first and last step of epochs on both sides of it."""
    T, alpha, beta, warmup = DKD[preset]
    settings = load_preset(preset, "dkd")
    objective = get_objective("dkd", **{name: settings[name] for name in OBJECTIVE_FIELDS if name in settings})
    student, teacher = nets()
    images, labels = batch()
    distiller = Distiller(student, teacher, objective).train()
    for steps_done in (0, 1, 2, 3, 27, 56, 57, 58, 59, 60, 200):  # three an epoch
        epoch = steps_done // 3 + 1
        loss = distiller(images, labels, progress=steps_done / 3).loss
        logits = F.linear(pooled(student.net, images)[1], student.classifier.weight, student.classifier.bias)
        logits_t = F.linear(pooled(teacher.net, images)[1], teacher.classifier.weight, teacher.classifier.bias)
        dkd = dkd_with_masks(logits, logits_t, labels, alpha, beta, T)
        expected = F.cross_entropy(logits, labels) + min(epoch / warmup, 1) * dkd
        torch.testing.assert_close(loss, expected, **CLOSE)


def test_srrl():
    """CE of the student's own logits, pooled match and logit match through a 1x1 convolution, BatchNorm and ReLU whose
    weights begin as N(0, sqrt(2 / Ct)); two updates with its gradients.
    """
    student, teacher = nets()
    images, labels = batch()
    distiller = Distiller(student, teacher, get_objective("srrl")).train()
    student.train()
    connector = nn.Sequential(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()).double()
    with torch.no_grad():
        connector[0].weight.copy_(distiller.connector.weight[:, :, None, None])
    scaled = distiller.connector.weight.detach() / (2 / 32) ** 0.5
    assert abs(scaled.std() - 1) < 4 / 1024**0.5  # 512 weights: 4 standard errors; PyTorch's would be at 0.58
    assert scaled.abs().max() > 2  # a normal's tails; PyTorch's would end at 1

    W, b = teacher.classifier.weight, teacher.classifier.bias
    ours, theirs = [*distiller.parameters()], [*connector.parameters()]
    for _ in range(2):
        out = distiller(images, labels)
        map_s, pooled_s = pooled(student.net, images)
        with torch.no_grad():
            pooled_t = pooled(teacher.net, images)[1]
        z = connector(map_s).mean((2, 3))
        expected = F.cross_entropy(F.linear(pooled_s, student.classifier.weight, student.classifier.bias), labels)
        expected = expected + (z - pooled_t).pow(2).mean(1).mean()
        expected = expected + F.mse_loss(F.linear(z, W, b), F.linear(pooled_t, W, b))
        torch.testing.assert_close(out.loss, expected, **CLOSE)
        grads = torch.autograd.grad(out.loss, ours)
        of_connector = dict(zip((name for name, _ in distiller.named_parameters()), grads, strict=True))
        named = [of_connector[f"connector.{name}"] for name in ("weight", "bn_weight", "bn_bias")]
        expected_grads = torch.autograd.grad(expected, theirs, retain_graph=True)
        for a, e in zip(named, expected_grads, strict=True):
            torch.testing.assert_close(a.flatten(), e.flatten(), **CLOSE)
        with torch.no_grad():
            for p, g in zip(ours, grads, strict=True):
                p -= 0.1 * g
            for p, g in zip(theirs, expected_grads, strict=True):
                p -= 0.1 * g


def wrn_maps(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    maps = [net.conv1(x)]
    for block in (net.block1, net.block2, net.block3):  # the last one before its BatchNorm and ReLU
        maps.append(block(maps[-1]))
    return maps[1:]


def vgg_maps(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    one = net.block1(F.max_pool2d(net.block0(x), 2))
    two = net.block2(F.max_pool2d(one, 2))
    three = net.block3(F.max_pool2d(two, 2))
    return [one, two, three, net.block4(three)]  # the last two of 4x4 pixels


def mobile_maps(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    maps = []
    x = net.conv1(x)
    for i, block in enumerate(net.blocks):
        x = block(x)
        if i in (1, 2, 4, 6):  # the last one before the last convolution
            maps.append(x)
    return maps


@pytest.mark.parametrize(
    ("preset", "student", "maps_s", "teacher", "maps_t"),
    [
        ("cifar100_wrn40_2_wrn16_2", "wrn_16_1", wrn_maps, "wrn_16_1", wrn_maps),
        ("cifar100_vgg13_vgg8", "vgg8", vgg_maps, "vgg8", vgg_maps),
        ("cifar100_vgg13_mobilenetv2", "mobilenetv2x0.5", mobile_maps, "vgg8", vgg_maps),
    ],
)
def test_attention_of_the_toolboxes_maps(preset, student, maps_s, teacher, maps_t):
    """Paired from the first, the larger one pooled; the sum of squared differences of unit vectors, each a mean."""
    settings = load_preset(preset, "at")
    torch.manual_seed(0)
    nets = [
        create_model(name, K, image_size=32, stages=tuple(settings[f"{role}_stages"])).double()
        for name, role in ((student, "student"), (teacher, "teacher"))
    ]
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    out = Distiller(*nets, get_objective("at")).train()(images, torch.tensor([0, 1]))
    expected = torch.zeros((), dtype=torch.float64)
    nets[1].eval()
    for map_s, map_t in zip(maps_s(nets[0].net, images), maps_t(nets[1].net, images), strict=True):
        side = min(map_s.shape[-1], map_t.shape[-1])
        a, b = (F.normalize(F.adaptive_avg_pool2d(map_, side).pow(2).mean(1).flatten(1)) for map_ in (map_s, map_t))
        expected = expected + (a - b).pow(2).mean()
    torch.testing.assert_close(out.parts["at"], expected.detach(), **CLOSE)
