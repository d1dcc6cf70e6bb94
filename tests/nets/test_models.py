"""Nets by name, their taps found automatically, weights from files, sizes. Random weights only, no network."""

import argparse
import copy
import urllib.error
import weakref

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from ijckd_fast.errors import UserError
from ijckd_fast.nets import Tapped, count_parameters, create_model, intact, macs


def uncut(name: str, image_size: int) -> nn.Module:
    """The net as its library (or our class) makes it, 10 classes."""
    library, _, short = name.partition("/")
    if library == "own":
        model = create_model(short, 10, image_size=image_size)
        setattr(model.net, model.classifier_path, model.classifier)  # put the classifier back where it came from
        return model.net
    if library == "torchvision":
        options = {"image_size": image_size} if short.startswith("vit") else {}
        if short == "googlenet":
            options = {"init_weights": False}  # else it warns that its default may change
        return torchvision.models.get_model(short, weights=None, num_classes=10, **options)
    options = {"img_size": image_size} if "swin" in short else {}
    return timm.create_model(short, pretrained=False, num_classes=10, **options)


def settle(net: nn.Module, image_size: int) -> None:
    """Gives BatchNorm the statistics of a batch: at initialisation some nets' eval-mode activations vanish."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
    with torch.no_grad():
        net.train()(torch.randn(4, 3, image_size, image_size))


@pytest.mark.parametrize(
    ("name", "image_size", "map_shape", "nonnegative"),
    [
        ("own/resnet8x4", 32, (256, 8, 8), True),
        ("own/resnet20", 32, (64, 8, 8), True),
        ("own/mobilenet_v1", 64, (1024, 2, 2), True),
        ("torchvision/resnet18", 64, (512, 2, 2), True),
        ("torchvision/resnet18", 32, (512, 1, 1), True),  # a map of one position: found on larger images
        ("torchvision/mobilenet_v2", 64, (1280, 2, 2), True),
        ("torchvision/densenet121", 64, (1024, 2, 2), True),
        ("torchvision/efficientnet_b0", 64, (1280, 2, 2), False),  # SiLU
        ("torchvision/regnet_y_400mf", 64, (440, 2, 2), True),
        ("torchvision/googlenet", 64, (1024, 2, 2), True),
        ("torchvision/shufflenet_v2_x0_5", 64, (1024, 2, 2), True),
        ("torchvision/convnext_tiny", 64, (768, 2, 2), False),  # LayerNorm between pooling and classifier
        ("torchvision/mobilenet_v3_small", 64, (1024, 2, 2), False),  # a hidden layer between pooling and classifier
        ("torchvision/vgg16", 32, None, False),
        ("torchvision/vit_b_16", 32, None, False),
        ("timm/resnet18", 64, (512, 2, 2), True),
        ("timm/resnet50d", 64, (2048, 2, 2), True),
        ("timm/mobilenetv3_small_100", 64, (1024, 2, 2), False),  # its last convolution comes after pooling
        ("timm/swin_tiny_patch4_window7_224", 56, (768, 2, 2), False),  # NHWC
    ],
)
def test_taps_are_found(name, image_size, map_shape, nonnegative):
    torch.manual_seed(0)
    net = uncut(name, image_size)
    settle(net, image_size)
    images = torch.randn(2, 3, image_size, image_size)
    with torch.no_grad():
        logits = net.eval()(images)
        model = Tapped(net, name, 10, image_size)
        map_, pooled = model.features(images, need_map=model.has_map)
        assert pooled.abs().max() > 1e-3  # else the equalities below would say nothing
        assert torch.equal(model.classifier(pooled), logits)
        assert torch.equal(model(images), logits)
    assert pooled.shape == (2, model.channels)
    assert model.features(images)[0] is None
    if map_shape is None:
        assert map_ is None
        assert model.map_channels is None
        with pytest.raises(UserError, match=f"{name}.*no map.*choose another model"):
            model.features(images, need_map=True)
    else:
        assert map_.shape == (2, *map_shape)
        assert model.map_channels == map_shape[0]
        torch.testing.assert_close(map_.mean((2, 3)), pooled, rtol=1e-5, atol=1e-6)
        assert (map_ >= 0).all() or not nonnegative


class Toy(nn.Module):
    """A net with what others hide in their forward; `after` comes between the last layer and the mean."""

    def __init__(self, after, shared: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2)
        self.last = nn.BatchNorm2d(6)
        self.after = after
        self.act = nn.ReLU()
        self.shared = shared
        self.fc = nn.Linear(6, 10)

    def forward(self, images):
        x = self.conv(images)
        x = self.last(self.act(x) if self.shared else x)
        return self.fc((self.act(x) if self.shared else self.after(x)).mean((2, 3)))


def test_a_functional_relu_before_pooling_belongs_to_the_map():
    model = Tapped(Toy(F.relu), "toy", 10, 16).eval()
    map_, pooled = model.features(torch.randn(2, 3, 16, 16), need_map=True)
    assert map_.min() == 0
    torch.testing.assert_close(map_.mean((2, 3)), pooled)


def test_a_layer_used_twice_is_tapped_at_its_last_use():
    model = Tapped(Toy(F.relu, shared=True), "toy", 10, 16).eval()
    assert model.map_path == "act"
    made = []
    model.net.act.register_forward_hook(lambda module, args, output: made.append(output))
    map_, pooled = model.features(torch.randn(2, 3, 16, 16), need_map=True)
    assert map_ is made[-1]  # a second ReLU would be work for nothing
    torch.testing.assert_close(map_.mean((2, 3)), pooled)


class Cosine(nn.Linear):
    """A linear layer by type only."""

    def forward(self, x):
        return F.linear(F.normalize(x), F.normalize(self.weight), self.bias)


def test_a_classifier_that_is_linear_by_type_only_is_refused():
    net = Toy(F.relu)
    net.fc = Cosine(6, 10)
    with pytest.raises(UserError, match="does not end in one linear layer"):
        Tapped(net, "toy", 10, 16)


class Peeking(Toy):
    """Uses its classifier beyond calling it, so that the two cannot be parted."""

    def forward(self, images):
        return super().forward(images * self.fc.weight.abs().mean())


class Reused(Toy):
    """Calls its classifier twice."""

    def forward(self, images):
        return self.fc(super().forward(images)[:, :6])


@pytest.mark.parametrize("make", [Peeking, Reused])
def test_a_classifier_that_cannot_be_parted_from_its_net_is_refused(make):
    with pytest.raises(UserError, match="does not end in one linear layer"):
        Tapped(make(F.relu), "toy", 10, 16)


def test_dropout_that_is_always_on_is_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 10)

        def forward(self, images):
            return self.fc(F.dropout(images.mean((2, 3)), 0.5, training=True))

    with pytest.raises(UserError, match="model 'restless' gives other features for the same images a second time"):
        Tapped(Net(), "restless", 10, 32)


def test_an_unknown_function_before_pooling_leaves_no_map():
    assert not Tapped(Toy(torch.sigmoid), "toy", 10, 16).has_map


def test_probing_leaves_mode_statistics_and_the_global_generator_alone():
    net = torchvision.models.resnet18(num_classes=10)
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    model = Tapped(net, "resnet18", 10, 32)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules())
    torch.testing.assert_close(model.native_state_dict(), dict(before), rtol=0, atol=0)


def test_a_deep_copy_taps_its_own_map():
    model = create_model("resnet8x0.5", 10, image_size=16)
    model.keep_stages([0])
    model.features(torch.randn(2, 3, 16, 16))  # keeps no tensor of the graph, which deepcopy would refuse
    twin = copy.deepcopy(model.eval())
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(0.5)
    images = torch.randn(2, 3, 16, 16)
    for net in (model, twin):
        map_, pooled, (first,) = net.staged_features(images, need_map=True)
        torch.testing.assert_close(map_.mean((2, 3)), pooled)
        torch.testing.assert_close(net.net.layer3(net.net.layer2(first)), map_)


# --- stages


@pytest.mark.parametrize(
    ("name", "image_size", "stages"),
    [
        ("resnet8x4", 32, ["layer1 64 32", "layer2 128 16", "layer3 256 8"]),
        ("cifar/resnet50", 32, ["layer1 256 32", "layer2 512 16", "layer3 1024 8", "layer4 2048 4"]),
        ("wrn_16_2", 32, ["block1 32 32", "block2 64 16", "relu 128 8"]),
        ("vgg8", 32, ["block1 128 16", "block2 256 8", "block4 512 4"]),  # block0 is one convolution
        ("cifar/vgg13", 32, ["block0 64 32", "block1 128 16", "block2 256 8", "block4 512 4"]),
        ("mobilenetv2x0.5", 32, ["blocks.1 12 16", "blocks.2 16 8", "blocks.4 48 4", "conv2 1280 2"]),
        ("shufflenetv1", 32, ["layer1 240 16", "layer2 480 8", "layer3 960 4"]),
        ("resnet18", 64, ["layer1 64 16", "layer2 128 8", "layer3 256 4", "layer4 512 2"]),
        # a map of one position: found on larger images
        ("resnet18", 32, ["layer1 64 32", "layer2 128 16", "layer3 256 8", "layer4 512 4"]),
        # whose second stages begin with a convolution at the first's size
        ("resnet50", 64, ["layer1 256 16", "layer2 512 8", "layer3 1024 4", "layer4 2048 2"]),
        (
            "mobilenet_v2", 64,
            ["features.1 16 32", "features.3 24 16", "features.6 32 8", "features.13 96 4", "features 1280 2"],
        ),
        (
            "densenet121", 64,
            [
                "features.denseblock1 256 16", "features.denseblock2 512 8", "features.denseblock3 1024 4",
                "features 1024 2",
            ],
        ),
        # NHWC
        ("timm/swin_tiny_patch4_window7_224", 56, ["layers.0 96 14", "layers.1 192 7", "layers.2 384 4", "norm 768 2"]),
        # of other layers than the last NHWC, of which are also scores of attention and a bias by position
        (
            "torchvision/swin_v2_t", 64,
            ["features.1 96 16", "features.3 192 8", "features.5 384 4", "permute 768 2"],
        ),
        (
            "timm/swinv2_tiny_window8_256", 64,
            ["layers.0 96 16", "layers.1 192 8", "layers.2 384 4", "norm 768 2"],
        ),
        # pooled aside to 7x7 for its attention, which is larger than the map
        ("timm/pvt_v2_b2_li", 128, ["stages.0 64 32", "stages.1 128 16", "stages.2 320 8", "stages 512 4"]),
        ("timm/vit_tiny_patch16_224", 32, []),
    ],
)  # fmt: skip
def test_stages_are_found(name, image_size, stages):
    model = create_model(name, 10, image_size=image_size).eval()
    assert [f"{stage.path} {stage.channels} {stage.side}" for stage in model.stages] == stages
    if not stages:
        with pytest.raises(UserError, match=f"'{name}' has no stage maps.*choose another model, or objective 'kd'"):
            model.keep_stages([])
        return
    model.keep_stages([-1, 0])
    size = 128 if (name, image_size) == ("resnet18", 32) else image_size
    with torch.no_grad():
        map_, _, kept = model.staged_features(torch.randn(2, 3, size, size), need_map=True)
    assert [(map_.shape[1], map_.shape[2]) for map_ in kept] == [model.stages[-1][1:], model.stages[0][1:]]
    assert torch.equal(kept[0], map_)


@torch.no_grad()
def test_only_the_stages_that_were_asked_for_are_kept():
    model = create_model("resnet8x0.5", 10, image_size=16)
    maps = {}  # the latest of each layer, as long as anything else holds it
    for name in ("layer1", "layer2"):
        layer = model.net.get_submodule(name)
        layer.register_forward_hook(lambda _, args, output, name=name: maps.update({name: weakref.ref(output)}))

    def alive():
        return [name for name, map_ in maps.items() if map_() is not None]

    seen = []
    model.net.fc.register_forward_hook(lambda *_: seen.append(alive()))
    images = torch.randn(2, 3, 16, 16)
    assert model.staged_features(images)[2] == ()
    model.keep_stages([1])
    model.keep_stages([1])  # has no second effect
    assert len(model.net.layer2._forward_hooks) == 2  # ours above, and one of the net's own
    map_, _, (second,) = model.staged_features(images)
    assert map_ is None
    assert second.shape == (2, 16, 8, 8)
    assert maps["layer2"]() is second
    model.features(images)
    assert seen == [[], ["layer2"], ["layer2"]]
    assert alive() == []


class Cross(nn.Module):
    """A convolution, a stage pooled by a function, and a last one with scores [B, heads, N, N], gate [B, C, 1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 1, 1), nn.Conv2d(6, 6, 3, 1, 1)
        self.pool, self.scores, self.gate = nn.MaxPool2d(2), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1)
        self.last, self.fc = nn.Conv2d(6, 6, 1), nn.Linear(6, 10)

    def forward(self, images):
        x = self.one(self.pool(self.stem(images)))  # 16 -> 8
        x = F.relu(F.max_pool2d(self.two(x), 2))  # 4
        self.scores(torch.ones(len(x), 1, 9, 9))
        x = self.last(x * self.gate(x))
        return self.fc(x.mean((2, 3)))


def test_what_is_no_stage():
    """A stem, a size that comes after a smaller one, a size below the map's."""
    model = Tapped(Cross(), "cross", 10, 32)
    assert model.stages == (("two", 6, 8), ("last", 6, 4))


def test_stages_within_one_sequence():
    """A plain sequence is no block: what its layers put out before the map shrinks is a stage."""

    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 6, 3, 2, 1)
            self.rest = nn.Sequential(nn.Conv2d(6, 6, 3, 1, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, 2, 1))
            self.fc = nn.Linear(6, 10)

        def forward(self, images):
            return self.fc(self.rest(self.first(images)).mean((2, 3)))

    assert Tapped(Line(), "line", 10, 32).stages == (("rest.1", 6, 16), ("rest", 6, 8))


class Pair(nn.Module):
    """A toolbox's block, which returns what it makes and what that was before the activation."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.conv, self.shortcut = nn.Conv2d(channels_in, channels, 3, 2, 1), nn.Conv2d(channels_in, channels, 1, 2)

    def forward(self, x):
        x = self.conv(x) + self.shortcut(x)
        return F.relu(x), x


class Pairs(nn.Module):
    """A net of such blocks; `returned` makes what it returns of its maps and its logits."""

    def __init__(self, returned=lambda maps, logits: logits) -> None:
        super().__init__()
        self.stem, self.layer1, self.layer2 = nn.Conv2d(3, 4, 3, 1, 1), Pair(4, 6), Pair(6, 8)
        self.spare, self.fc = nn.Linear(8, 10), nn.Linear(8, 10)
        self.returned = returned

    def forward(self, images):
        x, before = self.layer1(self.stem(images))
        y, _ = self.layer2(x)
        pooled = y.mean((2, 3))
        self.aside = self.spare(pooled)
        return self.returned((x, before, y, pooled), self.fc(pooled))


def test_a_stage_and_a_map_in_a_tuple_are_its_first_map():
    torch.manual_seed(0)
    model = Tapped(Pairs(), "pairs", 10, 16)
    assert model.map_path == "layer2"
    assert model.stages == (("layer1", 6, 8), ("layer2", 8, 4))
    model.keep_stages([0, 1])
    images = torch.randn(3, 3, 16, 16)
    map_, pooled, (first, second) = model.staged_features(images, need_map=True)
    x, _ = model.net.layer1(model.net.stem(images))
    torch.testing.assert_close(first, x)
    assert second is map_
    torch.testing.assert_close(map_.mean((2, 3)), pooled)


@pytest.mark.parametrize(
    "returned",
    [
        lambda maps, logits: (maps, logits),
        lambda maps, logits: (logits, {"feats": list(maps[:3]), "pooled": maps[3]}),
        lambda maps, logits: {"features": maps, "logits": logits},
        lambda maps, logits: [logits],
    ],
)
def test_a_net_that_returns_more_than_logits_is_taken(returned):
    torch.manual_seed(0)
    net, images = Pairs(returned), torch.randn(3, 3, 16, 16)
    pooled = net.layer2(net.layer1(net.stem(images))[0])[0].mean((2, 3))
    expected = net.fc(pooled)
    model = Tapped(net, "pairs", 10, 16)
    torch.testing.assert_close(model(images), expected)
    torch.testing.assert_close(model.features(images)[1], pooled)
    assert model.has_map


def test_a_net_that_returns_the_answers_of_two_classifiers_is_refused():
    net = Pairs(lambda maps, logits: logits)
    net.returned = lambda maps, logits: (logits, net.aside)
    with pytest.raises(UserError, match=r"returns what 2 classifiers say.*'spare', 'fc'.*expected one"):
        Tapped(net, "pairs", 10, 16)


def test_logits_in_another_place_in_training_are_refused():
    net = Pairs()
    net.returned = lambda maps, logits: (maps[0], logits) if net.training else (logits, maps[0])
    model = Tapped(net, "pairs", 10, 16)
    images = torch.randn(2, 3, 16, 16)
    assert model.eval()(images).shape == (2, 10)
    with pytest.raises(UserError, match="returns 2 tensors in training mode, of which number 0 is not its classifier"):
        model.train()(images)


def test_a_net_of_other_classes_is_refused():
    with pytest.raises(UserError, match="classifies 10 classes, expected 7 as in the data"):
        Tapped(Toy(F.relu), "toy", 7, 16)


def test_stages_by_name():
    model = create_model("resnet18", 10, image_size=64, stages=["bn1", "layer1", "layer3.0", "layer4"]).eval()
    assert model.stages == (("bn1", 64, 32), ("layer1", 64, 16), ("layer3.0", 256, 4), ("layer4", 512, 2))
    model.keep_stages([0, 1, 2, 3])
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        _, _, (bn1, layer1, _, last) = model.staged_features(images)
        net = model.net
        before = net.bn1(net.conv1(images))
        assert torch.equal(bn1, before)  # not what the ReLU in place makes of it
        assert torch.equal(layer1, net.layer1(net.maxpool(F.relu(before))))
    assert last.shape == (2, 512, 2, 2)


def test_stages_by_name_need_no_map():
    model = create_model("timm/vit_tiny_patch16_224", 10, image_size=32, stages=["patch_embed.proj"])
    assert not model.has_map
    model.keep_stages([0])
    assert model.staged_features(torch.randn(2, 3, 32, 32))[2][0].shape == (2, 192, 2, 2)


@pytest.mark.parametrize(
    ("stages", "text"),
    [
        (["layr2"], "no layer 'layr2'.*did you mean 'layer2'"),
        (
            ["layer1", "fc"],
            r"'fc' of model .* puts out no map \[B, C, H, H\].*another layer, such as 'conv1'",
        ),
        (["layer2", "layer1"], "another order than the net computes them, expected layer1,layer2"),
        (["layer1", "layer1"], "named twice"),
    ],
)
def test_names_of_stages_that_are_none_are_refused(stages, text):
    with pytest.raises(UserError, match=text):
        create_model("resnet8x0.25", 10, image_size=16, stages=stages)


@pytest.mark.parametrize("name", ["squeezenet1_0", "timm/deit_tiny_distilled_patch16_224"])
def test_a_net_without_one_final_linear_layer_is_refused(name):
    with pytest.raises(UserError, match="does not end in one linear layer"):
        create_model(name, 10, image_size=64)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("resnet81", "unknown model.*did you mean.*'resnet8'"),
        ("mobilenet_v4", "did you mean.*'mobilenet_v1'"),
        ("timm/resnet18_", "did you mean.*'resnet18'"),
        (
            "timm/resnet18.a1_in2k",
            "timm has no weights 'a1_in2k' of 'resnet18'.*one of a1_in1k,.*did you mean",
        ),
        ("torchvision/resnet50d", "unknown model 'torchvision/resnet50d'"),
        ("hub/resnet18", "unknown model 'hub/resnet18'"),
        ("resnet8x0", "greater than 0"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name, text):
    with pytest.raises(UserError, match=text):
        create_model(name, 10, image_size=32)


def test_a_file_given_as_a_name_is_explained(tmp_path):
    path = tmp_path / "teacher.pth"
    path.write_bytes(b"x")
    with pytest.raises(UserError, match="is a file, expected a model's name"):
        create_model(str(path), 10)


@pytest.mark.parametrize("name", ["vit_b_16", "maxvit_t"])
def test_an_image_size_that_a_net_does_not_take_is_refused(name):
    with pytest.raises(UserError, match=f"'{name}' does not take 33x33 RGB images"):
        create_model(name, 10, image_size=33)


def test_weights_for_images_of_another_size_are_named_as_such(tmp_path):
    for name, made_for, asked in (("timm/vit_tiny_patch16_384", 384, 224), ("timm/deit_tiny_patch16_224", 224, 32)):
        net = timm.create_model(name.rpartition("/")[2], img_size=made_for, num_classes=10)
        torch.save(net.state_dict(), tmp_path / "w.pt")
        with pytest.raises(UserError, match=f"for images of {made_for}x{made_for} pixels.*--image-size {made_for}"):
            create_model(name, 10, checkpoint=tmp_path / "w.pt", image_size=asked)


def test_an_error_without_a_text_is_called_by_its_type():
    class Silent(nn.Module):
        def forward(self, images):
            raise AssertionError

    with pytest.raises(UserError, match=r"RGB images \(AssertionError\)"):
        Tapped(Silent(), "silent", 10, 32)


def test_the_library_can_be_forced():
    assert type(create_model("timm/resnet18", 10, image_size=32).net).__module__.startswith("timm")
    assert type(create_model("resnet18", 10, image_size=32).net).__module__.startswith("torchvision")
    assert type(create_model("resnet50.a1_in1k", 10, image_size=32).net).__module__.startswith("timm")


# ---------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("name", "num_classes", "count"),
    [
        ("mobilenet_v1", 1000, 4_231_976),
        ("mobilenetv1", 1000, 4_231_976),
        ("resnet8x4", 100, 1_233_540),
        ("resnet32x4", 100, 7_433_860),
        ("resnet20", 100, 278_324),
        ("resnet56", 100, 861_620),
        ("resnet110", 100, 1_736_564),
        ("resnet18", 1000, 11_689_512),
    ],
)
def test_parameter_counts_are_the_published_ones(name, num_classes, count):
    assert count_parameters(create_model(name, num_classes, image_size=32)) == count


@pytest.mark.parametrize(
    ("name", "expected"), [("resnet18", 1_814_073_344), ("mobilenet_v1", 568_740_352)]
)  # 1.81 G and 569 M as published
def test_macs_at_224(name, expected):
    model = create_model(name, 1000, image_size=64)
    for mode in (True, False):
        model.train(mode)
        assert macs(model, 224) == expected
        assert all(m.training == mode for m in model.modules())  # put back


def test_widths_of_our_own_resnets():
    # The published resnet8x4: 32 channels in the stem, then 64, 128, 256; a quarter of resnet20 in proportion.
    for name, widths in (
        ("resnet8x4", [32, 64, 128, 256]),
        ("resnet20", [16] * 2 + [32, 64]),
        ("resnet8x0.25", [8, 4, 8, 16]),
    ):
        net = create_model(name, 10, image_size=16).net
        found = [net.conv1.out_channels] + [
            stage[0].conv2.out_channels for stage in (net.layer1, net.layer2, net.layer3)
        ]
        assert found == widths


# --- weights from files ---


@pytest.mark.parametrize("stride", [1, 2])
def test_a_shortcut_is_its_strided_convolution_and_has_no_stride(stride):
    """oneDNN's gradient of a strided 1x1 convolution of few channels writes past its memory."""
    net = create_model("resnet8x0.25", 10, image_size=16).net
    assert [
        m for m in net.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.stride != (1, 1)
    ] == []
    block = (net.layer1 if stride == 1 else net.layer2)[0].eval()
    x = torch.randn(3, block.conv1.in_channels, 9, 8)
    conv, norm = block.downsample
    shortcut = norm(F.conv2d(x, conv.weight, stride=stride))
    main = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
    torch.testing.assert_close(block(x), (main + shortcut).relu())


NAME = "resnet8x0.5"


@pytest.fixture
def donor() -> Tapped:
    torch.manual_seed(3)
    return create_model(NAME, 10, image_size=16)


def load(path, name: str = NAME, num_classes: int = 10) -> Tapped:
    return create_model(name, num_classes, checkpoint=path, image_size=16)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model": s, "epoch": 3},
        lambda s: {"state_dict": s},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {f"module._orig_mod.{k}": v for k, v in s.items()}},
        lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")},
        lambda s: {"model": s, "args": argparse.Namespace(lr=0.1)},  # torchvision's and timm's own scripts
    ],
    ids=["plain", "model", "state_dict", "module.", "compiled", "without counters", "with args"],
)
def test_checkpoints_load(donor, tmp_path, wrap):
    torch.save(wrap(donor.native_state_dict()), tmp_path / "w.pth")
    own = load(tmp_path / "w.pth").native_state_dict()
    torch.testing.assert_close(own, donor.native_state_dict(), rtol=0, atol=0)


def test_safetensors_load(donor, tmp_path):
    safetensors.torch.save_file(donor.native_state_dict(), tmp_path / "w.safetensors")
    own = load(tmp_path / "w.safetensors").native_state_dict()
    torch.testing.assert_close(own, donor.native_state_dict(), rtol=0, atol=0)


def test_a_library_checkpoint_has_the_librarys_names(tmp_path):
    net = torchvision.models.mobilenet_v2(num_classes=10)
    torch.save(net.state_dict(), tmp_path / "w.pth")
    model = create_model("mobilenet_v2", 10, checkpoint=tmp_path / "w.pth", image_size=32).eval()
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(images), net.eval()(images))


def test_a_run_checkpoint_loads_as_a_model(donor, tmp_path):
    learner = {f"student.{k}": v for k, v in donor.state_dict().items()} | {"connector.weight": torch.zeros(2, 2)}
    torch.save({"learner": learner, "step": 7}, tmp_path / "last.pt")
    own = load(tmp_path / "last.pt").native_state_dict()
    torch.testing.assert_close(own, donor.native_state_dict(), rtol=0, atol=0)

    headless = {k: v for k, v in learner.items() if ".classifier." not in k}
    torch.save({"learner": headless}, tmp_path / "last.pt")
    with pytest.raises(UserError, match="without a classifier of its own"):
        load(tmp_path / "last.pt")


def test_weights_of_another_model_are_refused(donor, tmp_path):
    torch.save(donor.native_state_dict(), tmp_path / "w.pth")
    with pytest.raises(
        UserError, match=r"w\.pth does not fit model 'resnet14' .* missing 'layer1.1.conv1.weight'.*and \d+ more"
    ):
        load(tmp_path / "w.pth", "resnet14")
    with pytest.raises(UserError, match=r"'conv1.weight' is \[11, 3, 3, 3\], expected \[16, 3, 3, 3\]"):
        load(tmp_path / "w.pth", "resnet8")
    extra = {**donor.native_state_dict(), "layer4.weight": torch.zeros(1)}
    torch.save(extra, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"unexpected 'layer4\.weight'"):
        load(tmp_path / "w.pth")


def test_another_class_count_is_named_as_such(donor, tmp_path):
    torch.save(donor.native_state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match="classifies 10 classes, expected 7 as in the data"):
        load(tmp_path / "w.pth", num_classes=7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_and_change_nothing(donor, tmp_path, bad):
    weights = {k: v.clone() for k, v in donor.native_state_dict().items()}
    weights["layer2.0.bn1.running_var"][0] = bad
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"'layer2.0.bn1.running_var' holds NaN or infinite values"):
        load(tmp_path / "w.pth")
    model = create_model(NAME, 10, image_size=16)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError):
        model.load_native(weights, "w.pth")
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


class Unpickled:
    """Stands for any class that a checkpoint may drag along."""


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_refused(donor, tmp_path, suffix, share):
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save(donor.native_state_dict(), path)
    else:
        safetensors.torch.save_file(donor.native_state_dict(), path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match=r"w\..*(is truncated or of another format|is damaged or truncated|is empty)"):
        load(path)


def test_files_that_are_no_checkpoint_are_refused(tmp_path):
    path = tmp_path / "w.pth"
    with pytest.raises(UserError, match="does not exist"):
        load(path)
    with pytest.raises(UserError, match="is a folder, expected a file"):
        load(tmp_path)
    path.write_text("epoch,top1\n1,0.5\n")
    with pytest.raises(UserError, match="not a readable weights file"):
        load(path)
    for content in ({"epoch": 3}, {}, [1, 2], {"model": {"a": 1}}):
        torch.save(content, path)
        with pytest.raises(UserError, match="holds no model weights"):
            load(path)
    torch.save({"model": Unpickled()}, path)
    with pytest.raises(UserError, match="holds Python objects"):
        load(path)


def test_published_weights_need_the_published_classes(donor, tmp_path):
    for name in ("resnet18", "timm/resnet18"):
        with pytest.raises(UserError, match="classify 1000 classes, expected 10 as in the data"):
            create_model(name, 10, pretrained=True)
    with pytest.raises(UserError, match="no published weights"):
        create_model("resnet20", 10, pretrained=True)
    with pytest.raises(UserError, match="got both"):
        create_model("resnet18", 1000, pretrained=True, checkpoint=tmp_path / "w.pth")


def test_published_weights_are_torchvisions_first_and_an_unreachable_server_is_explained(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"could not be loaded .*no route to host.*give it as the checkpoint"):
        create_model("mobilenet_v2", 1000, pretrained=True, image_size=32)

    published = torchvision.models.mobilenet_v2()
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True, exist_ok=True)
    torch.save(published.state_dict(), cache / "mobilenet_v2-b0353104.pth")  # IMAGENET1K_V1's file
    with pytest.raises(UserError, match=r"b0353104\.pth, downloaded before, is damaged .*expected b0353104.*delete it"):
        create_model("mobilenet_v2", 1000, pretrained=True, image_size=32)
    monkeypatch.setattr(intact, "_of_torchvision", lambda name: None)  # weights at random are not those of the name
    own = create_model("mobilenet_v2", 1000, pretrained=True, image_size=32).native_state_dict()
    torch.testing.assert_close(own, dict(published.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("pretrained", [False, True])
def test_side_classifiers_are_left_out(pretrained, tmp_path, monkeypatch):
    if pretrained:
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        cache = tmp_path / "hub" / "checkpoints"
        cache.mkdir(parents=True)
        published = torchvision.models.googlenet(init_weights=False)
        torch.save(published.state_dict(), cache / "googlenet-1378be20.pth")
        monkeypatch.setattr(intact, "_of_torchvision", lambda name: None)  # weights at random are not those of the name
    model = create_model("googlenet", 1000, pretrained=pretrained, image_size=64).train()
    assert not any("aux" in key for key in model.state_dict())
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 1000)


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("timm/test_resnet", [0.1, 0.2, 0.3]),
        ("timm/test_vit", [0.06, 0.12, 0.18, 0.24, 0.3]),
        ("torchvision/efficientnet_b0", [0.3 * n / 16 for n in range(16)]),
    ],
)
def test_stochastic_depth(name, rates):
    def rates_of(model):
        layers = [m for m in model.modules() if type(m).__name__ in ("DropPath", "StochasticDepth")]
        return [getattr(layer, "drop_prob", getattr(layer, "p", None)) for layer in layers]

    found = rates_of(create_model(name, 3, image_size=32, drop_path=0.3))
    assert sorted(set(found)) == pytest.approx(rates)
    assert rates_of(create_model(name, 3, image_size=32)) == rates_of(
        timm.create_model("test_resnet") if "timm" in name else torchvision.models.efficientnet_b0()
    )


@pytest.mark.parametrize("name", ["resnet18", "resnet20", "mobilenet_v1", "timm/vgg11"])
def test_a_net_without_stochastic_depth_says_so(name):
    with pytest.raises(UserError, match="has no stochastic depth, which --drop-path sets: leave --drop-path out"):
        create_model(name, 3, image_size=32, drop_path=0.1)
