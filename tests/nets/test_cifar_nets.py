"""Nets for small images are what the published toolboxes' nets are: names and shapes of weights, counts, answers."""

import argparse
import hashlib
import re

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from ijckd_fast.errors import UserError
from ijckd_fast.nets import Tapped, cifar, cifar_names, count_parameters, create_model, fold_batch_norm, library_of
from ijckd_fast.nets.mobilenet import MobileNetV1

# What the toolboxes' own code makes for 100 classes, measured by running it: RepDistiller (CRD) at commit b84f547, and
# the last block SimKD at 2b389c3; where both have a net they agree. Our name, theirs, parameters, tensors of the
# state_dict without BatchNorm's counters, the first 12 digits of the SHA-256 of its sorted lines 'name [shape]', and,
# of each form, the first three logits of the image and weights below, in units of the standard deviation of all 100.
PUBLISHED = [
    ("resnet8", "resnet8", 83_892, 47, "2a466f497fee", None),
    ("resnet14", "resnet14", 181_108, 77, "5b67a5bc944f", None),
    ("resnet20", "resnet20", 278_324, 107, "5d3873656a7a", (0.0544, -0.6380, 0.3369)),
    ("resnet32", "resnet32", 472_756, 167, "348bdca1acfc", None),
    ("resnet44", "resnet44", 667_188, 227, "37ee87671332", None),
    ("resnet56", "resnet56", 861_620, 287, "1211e679aa1a", None),
    ("resnet110", "resnet110", 1_736_564, 557, "ea847b81caf1", None),
    ("resnet8x4", "resnet8x4", 1_233_540, 52, "c50952c00d3d", (1.1899, 1.4742, -0.5740)),
    ("resnet32x4", "resnet32x4", 7_433_860, 172, "5774d4ca9c0a", None),
    ("resnet50", "ResNet50", 23_705_252, 267, "9ca8db687d3e", (1.0858, -1.3151, -1.8393)),
    ("wrn_16_1", "wrn_16_1", 180_916, 69, "44c1570b81b2", (0.3148, -0.6984, -1.2620)),
    ("wrn_16_2", "wrn_16_2", 703_284, 70, "98d6fd2ef98c", (-2.0628, 0.3691, 0.3231)),
    ("wrn_40_1", "wrn_40_1", 569_780, 189, "d9f6ad3d081c", None),
    ("wrn_40_2", "wrn_40_2", 2_255_156, 190, "b1d22ca16009", None),
    ("vgg8", "vgg8", 3_965_028, 32, "fb3c1d9f5ce2", (-0.1678, 0.2594, 0.8549)),
    ("vgg11", "vgg11", 9_277_284, 50, "1e54d8513946", None),
    ("vgg13", "vgg13", 9_462_180, 62, "a8eb389b008b", (-1.0239, 0.6227, 0.0878)),
    ("vgg16", "vgg16", 14_774_436, 80, "baf197476173", None),
    ("vgg19", "vgg19", 20_086_692, 98, "6029039c3614", None),
    ("mobilenetv2x0.5", "MobileNetV2", 812_836, 267, "f67276f6f370", (0.9816, 1.7808, -0.6824)),
    ("shufflenetv1", "ShuffleV1", 949_258, 247, "1f19d909647e", (-0.2383, -1.2811, -0.8447)),
    ("shufflenetv2x1", "ShuffleV2", 1_355_528, 282, "39837effdfdf", (-2.0859, 0.0226, -0.6257)),
    ("resnet38", "resnet38", 569_972, 197, "59d924c8f4f4", (1.3883, -2.5962, 1.3277)),
    ("resnet14x2", "resnet14x2", 703_732, 82, "703726df2059", (0.7845, 0.1659, 0.7946)),
    ("resnet38x2", "resnet38x2", 2_255_604, 202, "a1fcc5c48a2d", None),
    ("mobilenetv2x1", "MobileNetV2_1_0", 2_353_060, 267, "6735dfc3dfd5", None),
    ("shufflenetv2x1.5", "ShuffleV2_1_5", 2_580_548, 282, "e23085cc9e20", (0.4535, -1.0510, 0.9514)),
]

# A few of the lines behind each digest, to read.
LINES = {
    "resnet20": ["conv1.weight [16, 3, 3, 3]", "layer2.0.downsample.0.weight [32, 16, 1, 1]", "fc.weight [100, 64]"],
    "resnet50": ["layer1.0.shortcut.0.weight [256, 64, 1, 1]", "linear.weight [100, 2048]"],
    "wrn_16_2": ["block1.layer.0.convShortcut.weight [32, 16, 1, 1]", "bn1.weight [128]", "fc.bias [100]"],
    "vgg13": ["block0.3.bias [64]", "block4.4.running_var [512]", "classifier.weight [100, 512]"],
    "mobilenetv2x0.5": ["blocks.1.0.conv.3.weight [48, 1, 3, 3]", "classifier.0.weight [100, 1280]"],
    "shufflenetv1": ["layer1.0.conv1.weight [54, 24, 1, 1]", "layer2.0.conv3.weight [240, 20, 1, 1]"],
    "shufflenetv2x1": ["layer3.0.conv5.weight [232, 232, 1, 1]", "conv2.weight [1024, 464, 1, 1]"],
}


def weightless(name: str) -> nn.Module:
    with torch.device("meta"):
        return cifar_names.builder(name)(100)


def shapes(net: nn.Module) -> list[str]:
    state = net.state_dict().items()
    return sorted(f"{name} {list(value.shape)}" for name, value in state if not name.endswith("num_batches_tracked"))


@torch.no_grad()
def fill(net: nn.Module) -> nn.Module:
    """The same weights in every net of the same names and shapes; numpy promises this generator's numbers for ever."""
    numbers = np.random.RandomState(0)
    for name, value in sorted(net.to_empty(device="cpu").state_dict().items()):
        if name.endswith("num_batches_tracked"):
            value.zero_()
            continue
        uniform = torch.from_numpy(numbers.random_sample(tuple(value.shape)).astype(np.float32))
        if value.dim() > 1:
            value.copy_((2 * uniform - 1) * (6 / value[0].numel()) ** 0.5)
        else:
            value.copy_(uniform + 0.5 if name.endswith(("running_var", "weight")) else 0.4 * uniform - 0.2)
    return net


def image() -> Tensor:
    numbers = np.random.RandomState(1).random_sample((1, 3, 32, 32))
    return torch.from_numpy(numbers.astype(np.float32)) * 4 - 2


def test_weights_have_the_published_names_and_shapes():
    for name, theirs, parameters, tensors, digest, _ in PUBLISHED:
        net = weightless(name)
        lines = shapes(net)
        assert set(LINES.get(name, ())) <= set(lines), name
        assert count_parameters(net) == parameters, name
        found = (len(lines), hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12])
        assert found == (tensors, digest), f"{name} ({theirs}) differs from the published net: {lines}"


def test_parameter_counts_of_the_imagenet_pairs():
    """torchvision states its own; MobileNetV1's 4.23 M is the sum over its paper's Table 1, with BatchNorm and bias."""
    for name, published in (("resnet18", 11_689_512), ("resnet34", 21_797_672), ("resnet50", 25_557_032)):
        stated = next(iter(torchvision.models.get_model_weights(name))).meta["num_params"]
        with torch.device("meta"):
            assert count_parameters(torchvision.models.get_model(name)) == published == stated
    with torch.device("meta"):
        assert count_parameters(MobileNetV1(1000)) == 4_231_976


def plain_mobilenet() -> nn.Sequential:
    """MobileNetV1 of torch's layers alone, none of them initialised by hand: as SRRL, DKD and IJCKD train it."""

    def conv(channels_in: int, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
        layer = nn.Conv2d(channels_in, channels, kernel, stride, kernel // 2, groups=groups, bias=False)
        return [layer, nn.BatchNorm2d(channels), nn.ReLU()]

    layers = conv(3, 32, 3, 2)
    strides = {64: [1], 128: [2, 1], 256: [2, 1], 512: [2, 1, 1, 1, 1, 1], 1024: [2, 1]}
    channels_in = 32
    for channels, stride in ((channels, stride) for channels, each in strides.items() for stride in each):
        layers += conv(channels_in, channels_in, 3, stride, channels_in) + conv(channels_in, channels, 1)
        channels_in = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, 10))


def test_mobilenet_begins_and_answers_as_the_published_one():
    """The same seed draws the same weights and answers; depthwise deviations are PyTorch's 1 / sqrt(27) within 5 %."""
    torch.manual_seed(0)
    ours = MobileNetV1(10)
    torch.manual_seed(0)
    plain = plain_mobilenet()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    depthwise = [m.weight for m in ours.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert len(depthwise) == 13
    for weight in depthwise:
        assert weight.abs().max() <= 1 / 3
        assert abs(weight.std() * 27**0.5 - 1) < max(0.05, 4 / (2 * weight.numel()) ** 0.5)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), plain.eval()(images))


@torch.no_grad()
def test_nets_answer_as_the_published_ones():
    for name, wanted in ((row[0], row[5]) for row in PUBLISHED if row[5] is not None):
        logits = fill(weightless(name)).eval()(image())[0]
        torch.testing.assert_close(logits[:3] / logits.std(), torch.tensor(wanted), rtol=1e-3, atol=2e-3, msg=name)


@pytest.mark.parametrize(
    ("name", "map_path", "map_shape", "stride"),
    [
        ("resnet20", "layer3", (64, 8, 8), 4),
        ("wrn_16_1", "relu", (64, 8, 8), 4),
        ("wrn_16_2", "relu", (128, 8, 8), 4),
        ("vgg8", "block4", (512, 4, 4), 8),
        ("cifar/vgg13", "block4", (512, 4, 4), 8),
        ("mobilenetv2x0.5", "conv2", (1280, 2, 2), 16),
        ("shufflenetv1", "layer3", (960, 4, 4), 8),
        ("shufflenetv2x1.5", "relu", (1024, 4, 4), 8),
    ],
)
@torch.no_grad()
def test_the_tapped_map_is_the_one_that_the_classifier_sees(name, map_path, map_shape, stride):
    net = fill(weightless(name.removeprefix("cifar/"))).eval()
    images = image().repeat(2, 1, 1, 1)
    images[1] *= -1
    wanted = net(images)
    model = Tapped(net, name, 100, 32)
    assert model.map_path == map_path
    made = []
    model.net.get_submodule(map_path).register_forward_hook(lambda module, args, output: made.append(output))
    map_, pooled = model.features(images, need_map=True)
    assert map_ is made[-1]  # the layer's output is activated already
    assert (map_.shape[1:], model.channels) == (map_shape, map_shape[0])
    assert map_.min() == 0
    torch.testing.assert_close(map_.mean((2, 3)), pooled)
    torch.testing.assert_close(model.classifier(pooled), wanted)
    map_, _ = model.features(torch.zeros(1, 3, 64, 64), need_map=True)
    assert map_.shape[2:] == (64 // stride, 64 // stride)
    assert fold_batch_norm(model.net, images) > 0
    torch.testing.assert_close(model(images), wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


def test_a_gradient_reaches_every_weight_through_the_map():
    for name in ("wrn_16_2", "shufflenetv1", "shufflenetv2x0.5", "mobilenetv2x0.5", "vgg8"):
        torch.manual_seed(0)
        model = create_model(name, 10, image_size=32)
        map_, _ = model.features(torch.randn(2, 3, 32, 32), need_map=True)
        map_.square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.net.parameters()), name


def test_names_shared_with_a_library_are_the_librarys():
    taken = {*torchvision.models.list_models(module=torchvision.models), *timm.list_models()}
    assert {name for name in cifar_names.NAMES if name in taken} == set(cifar_names.SHARED_NAMES)
    for name in cifar_names.SHARED_NAMES:
        assert (library_of(name), library_of(f"cifar/{name}")) == ("torchvision", "own")
    assert isinstance(create_model("cifar/vgg11", 10, image_size=32).net, cifar.SmallVGG)
    assert isinstance(create_model("cifar/resnet8", 10, image_size=32).net, cifar.SmallResNet)
    for name in cifar_names.NAMES:
        assert cifar_names.builder(name) is not None, name


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("wrn-40-2", "unknown model 'wrn-40-2'.*did you mean.*'wrn_40_2'"),
        ("wrn_41_2", "did you mean 'wrn_40_2'"),
        ("wrn_40_0", "unknown model"),
        ("vgg9", "did you mean.*'vgg8'"),
        ("shufflenetv1x2", "did you mean.*'shufflenetv1'"),
        ("shufflenetv2x3", "has widths 0.5, 1, 1.5 here, got 3"),
        ("mobilenetv2x0", "greater than 0, e.g. 'mobilenetv2x0.5'"),
        ("ResNet50", "the published CIFAR net of this name is 'cifar/resnet50' here"),
        ("MobileNetV2", "the published CIFAR net of this name is 'mobilenetv2x0.5' here"),
        ("ShuffleV2_1_5", "is 'shufflenetv2x1.5' here"),
        (
            "cifar/vgg12",
            "expected 'cifar/' and a net for small images.*did you mean 'vgg",
        ),
        ("cifar/mobilenet_v1", "expected 'cifar/' and a net for small images"),
    ],
)
def test_near_miss_names_are_refused_with_the_nearest(name, text):
    with pytest.raises(UserError, match=text):
        create_model(name, 10, image_size=32)


def test_toolbox_names_lead_to_nets():
    for meant in cifar_names.TOOLBOX_NAMES.values():
        assert cifar_names.builder(meant) is not None
    renamed = {theirs.lower(): ours for ours, theirs, *_ in PUBLISHED if ours != theirs}
    assert renamed.items() <= cifar_names.TOOLBOX_NAMES.items()


def test_an_image_too_small_for_a_net_is_refused():
    with pytest.raises(UserError, match=r"'vgg8' does not take 4x4 RGB images .*choose another image size or net"):
        create_model("vgg8", 10, image_size=4)


def test_published_checkpoints_load(tmp_path):
    """The wrapping of the toolboxes' files, among them their command line, in the file format of torch 1.0."""
    donor = fill(weightless("wrn_16_1"))
    state = {key: value for key, value in donor.state_dict().items() if not key.endswith("num_batches_tracked")}
    path = tmp_path / "ckpt_epoch_240.pth"
    content = {"epoch": 240, "opt": argparse.Namespace(lr=0.05), "model": state, "accuracy": torch.tensor([64.0])}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    model = create_model("wrn_16_1", 100, checkpoint=path, image_size=32).eval()
    torch.testing.assert_close(model(image()), donor.eval()(image()))


def test_weights_of_another_width_and_of_the_other_form_are_refused_with_what_to_do(tmp_path):
    path = tmp_path / "teacher.pth"
    torch.save({"model": fill(weightless("wrn_16_1")).state_dict()}, path)
    with pytest.raises(UserError) as refused:
        create_model("wrn_16_2", 100, checkpoint=path, image_size=32)
    assert re.search(
        r"teacher\.pth does not fit model 'wrn_16_2' with 100 classes: missing"
        r" 'block1\.layer\.0\.convShortcut\.weight'; of another shape .*Name the model that these weights belong to;"
        r" the file holds 'model' \(82 tensors: 'conv1\.weight' \[16, 3, 3, 3\], .*$",
        str(refused.value),
    )


def test_a_librarys_net_that_has_a_form_for_small_images_names_it():
    class Mapless(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3 * 32 * 32, 10)

        def forward(self, images):
            return self.fc(images.flatten(1))

    model = Tapped(Mapless(), "vgg13", 10, 32)
    with pytest.raises(UserError, match=r"model 'vgg13' has no map .*; for small images there is 'cifar/vgg13'$"):
        model.require_map()
    with pytest.raises(UserError, match=r"belong to; for small images there is 'cifar/vgg13'$"):
        model.load_native(weightless("vgg13").state_dict(), "teacher.pth")
    with pytest.raises(UserError, match=r"connector$"):
        Tapped(Mapless(), "cifar/vgg13", 10, 32).require_map()
