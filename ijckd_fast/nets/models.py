"""Backbones by name (our own, torchvision, timm), their weights from files, and the two taps distillation needs.

Whatever the net, `Tapped` offers the same three things: the map after the last activation and before pooling
[B, C, H, W], the pooled vector that the classifier sees [B, C], and the classifier itself, a plain `nn.Linear`. They
are found by running the net once on random pixels, so no list of layer names has to be kept for each architecture.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijckd_fast.errors import UserError, did_you_mean
from ijckd_fast.nets import cifar as cifar_nets
from ijckd_fast.nets.cifar import init_convs

# ----------------------------------------------------------------------------------------------------------------------
# Our own net for images of ImageNet's size; those for small images are in cifar_nets.py


class MobileNetV1(nn.Module):
    """MobileNetV1 (Howard et al. 2017) at width 1: the student of the published ResNet-50 pair, not in torchvision."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers = self._conv(3, 32, 3, 2)
        channels_in = 32
        steps = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
        for channels, stride in steps:
            layers += self._conv(channels_in, channels_in, 3, stride, groups=channels_in)
            layers += self._conv(channels_in, channels, 1, 1)
            channels_in = channels
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(1024, num_classes)
        init_convs(self)

    @staticmethod
    def _conv(channels_in: int, channels: int, kernel: int, stride: int, groups: int = 1) -> list[nn.Module]:
        conv = nn.Conv2d(channels_in, channels, kernel, stride, kernel // 2, groups=groups, bias=False)
        return [conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, S, S] -> [B, K]
        return self.fc(self.features(images).mean((2, 3)))


# ----------------------------------------------------------------------------------------------------------------------
# Taps


class Stage(NamedTuple):
    """Where a net's map of one size is taken: the output of layer `path`, [B, channels, side, side] for the images of the probe."""

    path: str
    channels: int
    side: int


class Tapped(nn.Module):
    """A classification net cut at its classifier: `logits = classifier(pooled)`, and `pooled = mean(map)` if has_map.

    net              the backbone; images [B, 3, S, S] -> pooled [B, C], exactly what the classifier sees
    classifier       the net's final `nn.Linear` (C -> K), moved out of `net`; None after `drop_classifier()`
    classifier_path  the classifier's name inside the original net, e.g. 'fc' (used to read and write foreign weights)
    name, num_classes (K), channels (C), has_map; map_channels is C, or None without a map
    stages           the net's maps of every size, from the largest to the smallest, which is the map; () without a map

    Stages are told apart by the size of what the layers put out, [B, C, H, H] in the map's own layout. A size is a stage if it is
    larger than the map's and is smaller than all sizes before it. Its map is the last layer output at that size, be it of a whole
    block or sequence; but not one within a block (any module other than a plain nn.Sequential) that takes this size and gives the
    next smaller one, which is where the next stage begins. The first size is no stage if just one convolution works at it: a stem.
    Of ResNets stages are layer1 to layer4, on CIFAR layer1 to layer3. Unlike the last, the others' maps are as the layers leave them:
    where the activation is part of the next block (WRN), from before it.

    net          an `nn.Module` [B, 3, S, S] -> logits [B, num_classes]; it is changed in place
    image_size   S of the probe forward: eval mode, no gradient, two images of random pixels
    raises       UserError if the net does not take such images or does not end in a linear layer on a vector
    """

    classifier: nn.Linear | None

    def __init__(self, net: nn.Module, name: str, num_classes: int, image_size: int) -> None:
        super().__init__()
        probe = _Probe(net, num_classes, image_size, name)
        self.name = name
        self.num_classes = num_classes
        self.channels = probe.classifier.in_features
        self.classifier_path = probe.classifier_path
        parent, _, leaf = probe.classifier_path.rpartition(".")
        setattr(net.get_submodule(parent), leaf, nn.Identity())
        self.net = net
        self.classifier = probe.classifier
        probe.check_cut(net)

        self._map: Tensor | None = None  # handed from the hook to features() within one forward
        self._map_nhwc = probe.map_nhwc
        self._map_relu = probe.map_relu
        self.map_path = probe.map_path
        if self.map_path is not None:
            # A bound method, not a closure: deepcopy (as for an EMA copy) then binds the hook to the copy.
            net.get_submodule(self.map_path).register_forward_hook(self._keep_map)
        self.stages: tuple[Stage, ...] = probe.stages
        self._wanted: tuple[int, ...] = ()  # stages, by their place in `stages`
        self._hooked: set[int] = set()
        self._stage_maps: dict[int, Tensor] = {}

    @property
    def has_map(self) -> bool:
        return self.map_path is not None

    @property
    def map_channels(self) -> int | None:
        return self.channels if self.has_map else None

    def require_map(self) -> None:
        """Raises UserError if this net has no map whose spatial mean is what its classifier sees."""
        if not self.has_map:
            raise UserError(
                f"model {self.name!r} has no map before a global average pooling (its classifier sees something else"
                " than the spatial mean of a 4-D layer output), which map matching and map connectors need: choose"
                " another model, or pooled matching (match 'pooled') with a 'linear' or 'mlp' connector"
                f"{_in_small_form(self.name)}"
            )

    def require_stages(self) -> None:
        """Raises UserError if this net has no stages."""
        if not self.has_map:
            raise UserError(
                f"model {self.name!r} has no stage maps (its classifier sees something else than the spatial mean of a 4-D layer"
                " output, the last of them), which attention transfer (at) and hints (hint) compare: choose another model, or"
                f" objective 'kd'{_in_small_form(self.name)}"
            )

    def keep_stages(self, places: Sequence[int]) -> None:
        """From here on `staged_features` gives the maps of these stages, by their places in `stages` (negative: from the end)."""
        self.require_stages()
        self._wanted = tuple(range(len(self.stages))[place] for place in places)
        for place in self._wanted:
            if place not in self._hooked and place != len(self.stages) - 1:  # the last is the map
                hook = functools.partial(self._keep_stage, place)  # deepcopy binds it to the copy, as it does a method
                self.net.get_submodule(self.stages[place].path).register_forward_hook(hook)
                self._hooked.add(place)

    def drop_classifier(self) -> None:
        """Removes the classifier and its parameters, for a student that will answer through the teacher's."""
        self.classifier = None

    def _keep_map(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._map = output

    def _keep_stage(self, place: int, module: nn.Module, args: Any, output: Tensor) -> None:
        self._stage_maps[place] = output

    def features(self, images: Tensor, need_map: bool = False) -> tuple[Tensor | None, Tensor]:
        """Backbone only. Gradients flow to the parameters through both outputs.

        images    [B, 3, S, S]
        need_map  False: the map is None
        returns   (map [B, C, H, W] after the last activation, or None; pooled [B, C]). In training mode pooled includes
                  the net's own dropout, the map does not.
        raises    UserError if need_map and the net has none
        """
        map_, pooled, _ = self.staged_features(images, need_map)
        return map_, pooled

    def staged_features(
        self, images: Tensor, need_map: bool = False
    ) -> tuple[Tensor | None, Tensor, tuple[Tensor, ...]]:
        """As `features`, and the maps [B, Ci, Hi, Wi] of the stages that `keep_stages` asked for, in its order; () without it."""
        if need_map:
            self.require_map()
        pooled = self.net(images)  # [B, C]
        kept, self._stage_maps = self._stage_maps, {}
        last, self._map = self._map, None
        map_: Tensor | None = None
        if need_map or len(self.stages) - 1 in self._wanted:
            assert last is not None
            map_ = self._as_nchw(last)
            if self._map_relu:
                map_ = F.relu(map_)
            kept[len(self.stages) - 1] = map_
        stages = tuple(kept[i] if kept[i] is map_ else self._as_nchw(kept[i]) for i in self._wanted)
        return map_ if need_map else None, pooled, stages

    def _as_nchw(self, map_: Tensor) -> Tensor:
        return map_.permute(0, 3, 1, 2) if self._map_nhwc else map_

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S] -> logits [B, K]"""
        if self.classifier is None:
            raise RuntimeError(f"Tapped {self.name!r}: the classifier was dropped, only features() is left")
        return self.classifier(self.features(images)[1])

    def native_state_dict(self) -> dict[str, Tensor]:
        """The weights under the names of the original net, as torchvision, timm or published checkpoints have them."""
        state = dict(self.net.state_dict())
        if self.classifier is not None:
            state |= {f"{self.classifier_path}.{k}": v for k, v in self.classifier.state_dict().items()}
        return state

    def load_native(self, weights: Mapping[str, Tensor], origin: str) -> None:
        """Copies weights in, named as by `native_state_dict`; nothing is changed if they do not fit.

        origin  what to call the weights in an error, e.g. the file's path
        raises  UserError for missing, unexpected or misshapen tensors (a few are named) and for NaN or infinite values
        """
        own = self.native_state_dict()
        misshapen = [k for k in own if k in weights and own[k].shape != weights[k].shape]
        # Files written before BatchNorm counted its batches lack the counter; nothing here depends on it.
        missing = [k for k in own if k not in weights and not k.endswith("num_batches_tracked")]
        unexpected = [k for k in weights if k not in own]
        if misshapen and not missing and not unexpected and all(self._is_classifier(k) for k in misshapen):
            raise UserError(
                f"{origin} classifies {weights[misshapen[0]].shape[0]} classes, wanted {self.num_classes} as in the"
                f" data: give weights of {self.name!r} trained on these classes"
            )
        if misshapen or missing or unexpected:
            shapes = (f"{k!r} is {list(weights[k].shape)}, wanted {list(own[k].shape)}" for k in misshapen)
            faults = [_a_few("missing", map(repr, missing)), _a_few("unexpected", map(repr, unexpected))]
            faults.append(_a_few("of another shape", shapes))
            raise UserError(
                f"{origin} does not fit model {self.name!r} with {self.num_classes} classes:"
                f" {'; '.join(f for f in faults if f)}. Name the model that these weights belong to"
                f"{_in_small_form(self.name)}"
            )
        for key, value in weights.items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise UserError(
                    f"{origin}: tensor {key!r} holds NaN or infinite values, wanted finite weights:"
                    " the run that wrote it diverged, take an earlier checkpoint"
                )
        # Plain dicts carry no version, so BatchNorm accepts the absence of its counter.
        self.net.load_state_dict({k: v for k, v in weights.items() if not self._is_classifier(k)})
        if self.classifier is not None:
            strip = len(self.classifier_path) + 1
            self.classifier.load_state_dict({k[strip:]: v for k, v in weights.items() if self._is_classifier(k)})

    def _is_classifier(self, key: str) -> bool:
        return key.startswith(self.classifier_path + ".")


class CachedTeacher(nn.Module):
    """What is left of a teacher whose pooled features come from a cache: its classifier. There is no backbone, and no image is taken.

    classifier   `nn.Linear` (C -> K), the teacher's own
    name         of the teacher's model
    fingerprint  checkpoint.fingerprint of the whole teacher
    num_classes (K), channels (C), as a Tapped has them
    """

    def __init__(self, classifier: nn.Linear, name: str, fingerprint: str) -> None:
        super().__init__()
        self.classifier = classifier
        self.name = name
        self.fingerprint = fingerprint
        self.num_classes, self.channels = classifier.out_features, classifier.in_features

    def require_map(self) -> None:
        """Raises UserError: a cache holds no maps."""
        raise UserError(
            f"the teacher {self.name!r} is a cache of pooled features, and matching maps needs its maps: take objective 'ijckd-pooled' "
            "(match 'pooled'), or the teacher itself"
        )

    def require_stages(self) -> None:
        """Raises UserError: a cache holds no maps."""
        raise UserError(
            f"the teacher {self.name!r} is a cache of pooled features, and attention transfer (at) and hints (hint) need the maps of its "
            "stages: take objective 'kd', or the teacher itself"
        )

    def features(self, images: Tensor, need_map: bool = False) -> tuple[Tensor | None, Tensor]:
        """Raises RuntimeError: whoever trains from a cache hands its features to Distiller.step."""
        raise RuntimeError(f"CachedTeacher {self.name!r}: there is no backbone to ask, give pooled_t")

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)[1]


def _a_few(what: str, items: Any) -> str:
    items = list(items)
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return f"{what} {', '.join(items[:3])}{more}" if items else ""


class _Probe:
    """One forward of an uncut net with every layer's output in view; holds what it found."""

    def __init__(self, net: nn.Module, num_classes: int, image_size: int, name: str) -> None:
        self.name = name
        self.map_path: str | None = None
        self.map_nhwc = self.map_relu = False
        self.stages: tuple[Stage, ...] = ()
        try:
            self._run(net, num_classes, image_size)
        except UserError:
            raise
        except Exception as error:  # any layer may refuse the size in its own way
            raise _unfit_size(name, image_size, error) from error
        if self.map_path is None and image_size < 128:
            # The map of a stride-32 net is 1x1 on tiny images, not to be told from its mean: look at larger ones.
            try:
                self._run(net, num_classes, 128)
            except Exception:  # a net of fixed input size: the first verdict stands
                self._run(net, num_classes, image_size)

    @torch.no_grad()
    def _run(self, net: nn.Module, num_classes: int, size: int) -> None:
        linears: dict[str, tuple[nn.Linear, Tensor, Tensor]] = {}
        maps: dict[str, Tensor] = {}  # ordered by the last call of each layer
        calls: list[_Call] = []
        widths = {m.in_features for m in net.modules() if isinstance(m, nn.Linear) and m.out_features == num_classes}

        def watch(path: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if not isinstance(output, Tensor):
                    return
                if output.dim() == 4:
                    given = args[0].shape if args and isinstance(args[0], Tensor) else None
                    calls.append(_Call(path, module, given, output.shape))
                if isinstance(module, nn.Linear):
                    linears.pop(path, None)
                    linears[path] = module, args[0], output
                elif output.dim() == 4 and not widths.isdisjoint((output.shape[1], output.shape[3])):
                    maps.pop(path, None)
                    maps[path] = output

            return hook

        was_training = net.training
        handles = [module.register_forward_hook(watch(path)) for path, module in net.named_modules()]
        net.eval()
        self.images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        try:
            logits = net(self.images)
        finally:
            net.train(was_training)
            for handle in handles:
                handle.remove()

        for path, (module, pooled, output) in reversed(linears.items()):
            if (
                isinstance(logits, Tensor)
                and pooled.dim() == 2
                and torch.equal(output, logits)
                and torch.equal(F.linear(pooled, module.weight, module.bias), logits)
            ):
                self.classifier_path, self.classifier, self.pooled, self.logits = path, module, pooled, logits
                break
        else:
            raise self._no_classifier()

        for path, output in reversed(maps.items()):
            for nhwc in (False, True):
                map_ = output.permute(0, 3, 1, 2) if nhwc else output
                if map_.shape[1] != self.pooled.shape[1] or map_.shape[2] * map_.shape[3] == 1:
                    continue
                for relu in (False, True):
                    if same((F.relu(map_) if relu else map_).mean((2, 3)), self.pooled):
                        self.map_path, self.map_nhwc, self.map_relu = path, nhwc, relu
                        self.stages = _stages(calls, nhwc, Stage(path, map_.shape[1], map_.shape[2]))
                        return

    def _no_classifier(self) -> UserError:
        return UserError(
            f"model {self.name!r} does not end in one linear layer on a pooled vector, wanted as the classifier:"
            " choose another model"
        )

    @torch.no_grad()
    def check_cut(self, net: nn.Module) -> None:
        """Refuses a net that, with its classifier replaced by the identity, does not return the classifier's input."""
        was_training = net.training
        try:
            pooled = net.eval()(self.images)
        except Exception as error:  # e.g. the forward reads the layer's weight
            raise self._no_classifier() from error
        if isinstance(pooled, Tensor) and pooled.shape == self.pooled.shape:
            if same(pooled, self.pooled):
                net.train(was_training)
                return
            if not same(net(self.images), pooled):
                raise UserError(
                    f"model {self.name!r} gives other features for the same images a second time though in eval mode (dropout that is"
                    " always on?), wanted one fixed function: let its dropout follow self.training, or choose another model"
                )
        raise self._no_classifier()


class _Call(NamedTuple):
    """A layer with a 4-D output, and the shapes of its first argument and of its output."""

    path: str
    module: nn.Module
    given: torch.Size | None
    made: torch.Size


def _stages(calls: Sequence[_Call], nhwc: bool, map_: Stage) -> tuple[Stage, ...]:
    """The stages of a net, as `Tapped` describes them, from its layers' calls in the order in which they ended."""

    def side(shape: torch.Size | None) -> int | None:
        """Of a map in the layout of the net's last; None for any other tensor, such as queries [B, heads, N, C]."""
        if shape is None or len(shape) != 4:
            return None
        height, width = (shape[1], shape[2]) if nhwc else (shape[2], shape[3])
        return height if height == width else None

    last = {call.path: call for call in calls}
    sides: list[int] = []
    for call in calls:
        made = side(call.made)
        if made is not None and made > map_.side and (not sides or made < sides[-1]):
            sides.append(made)
    stages = []
    for size, smaller in itertools.pairwise([*sides, map_.side]):
        passages = tuple(
            f"{call.path}."
            for call in last.values()
            if type(call.module) is not nn.Sequential and (side(call.given), side(call.made)) == (size, smaller)
        )
        own = [c for c in calls if last[c.path] is c and side(c.made) == size and not c.path.startswith(passages)]
        is_stem = size == sides[0] and sum(isinstance(call.module, nn.Conv2d) for call in own) == 1
        if own and not is_stem:
            stages.append(Stage(own[-1].path, own[-1].made[3 if nhwc else 1], size))
    return (*stages, map_)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal up to the order of a float32 sum."""
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())


# ----------------------------------------------------------------------------------------------------------------------
# By name

# Nets for small images whose names are torchvision's too: alone they mean torchvision's, ours is 'cifar/NAME'.
SHARED_NAMES = ("resnet50", "vgg11", "vgg13", "vgg16", "vgg19")


def create_model(
    name: str,
    num_classes: int,
    *,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    image_size: int = 224,
) -> Tapped:
    """Builds a classification net by name and finds its taps. On the CPU, float32, in training mode.

    name         one for small images as `cifar_nets.builder` takes it (resnet8x4, wrn_40_2, shufflenetv1, ...), but for
                 `SHARED_NAMES`; mobilenet_v1; any torchvision classifier; any timm model. In that order; 'cifar/NAME',
                 'torchvision/NAME' and 'timm/NAME' force the library.
    num_classes  K, as in the data
    checkpoint   weights: a state_dict, one under 'model' or 'state_dict', a run checkpoint of ours ('learner'), or
                 .safetensors; 'module.' prefixes are dropped. Read with weights_only=True.
    pretrained   the library's published weights (torchvision: IMAGENET1K_V1, which the published pairs use)
    image_size   side in pixels of the images to come; nets of fixed input size are built for it
    raises       UserError: unknown name (nearest ones given), unfit or unreadable weights, a class count other than K,
                 no final linear layer
    """
    if checkpoint is not None and pretrained:
        raise UserError(f"model {name!r}: wanted a checkpoint or published weights, got both: leave out one")
    net = _build(name, num_classes, pretrained, image_size)
    model = Tapped(net, name, num_classes, image_size)
    if checkpoint is not None:
        model.load_native(_native_names(_read_weights(Path(checkpoint)), model, checkpoint), str(checkpoint))
    return model


def is_model_name(name: str) -> bool:
    """Whether `create_model` knows a model of this name."""
    return _library_of(name) is not None


def _library_of(name: str) -> str | None:
    """'own', 'torchvision' or 'timm', in that order of preference; None for no model's name."""
    if _own_builder(name) is not None:
        return "own"
    # Imported only here: our own nets need neither library, which together take seconds to import.
    import timm
    import torchvision

    library, _, short = name.rpartition("/")
    if library in ("", "torchvision") and short in torchvision.models.list_models(module=torchvision.models):
        return "torchvision"
    return "timm" if library in ("", "timm") and timm.is_model(short) else None


def _build(name: str, num_classes: int, pretrained: bool, image_size: int) -> nn.Module:
    library, short = _library_of(name), name.rpartition("/")[2]
    if library is None:
        raise _unknown(name)
    if library == "torchvision":
        return _build_torchvision(short, num_classes, pretrained, image_size)
    if library == "timm":
        return _build_timm(short, num_classes, pretrained, image_size)
    if pretrained:
        raise UserError(f"model {name!r} is our own and has no published weights: give a checkpoint instead")
    build = _own_builder(name)
    assert build is not None
    return build(num_classes)


def _own_builder(name: str) -> Callable[[int], nn.Module] | None:
    library, _, short = name.rpartition("/")
    if name in ("mobilenet_v1", "mobilenetv1"):
        return MobileNetV1
    if library == "cifar" or (library == "" and short not in SHARED_NAMES):
        return cifar_nets.builder(short)
    return None


def _in_small_form(name: str) -> str:
    """ "" or a hint, for a library's net that we have in another form as well."""
    short = name.rpartition("/")[2]
    if short not in SHARED_NAMES or name.startswith("cifar/"):
        return ""
    return f"; for small images there is 'cifar/{short}'"


def _unknown(name: str) -> UserError:
    import timm
    import torchvision

    if Path(name).is_file():
        return UserError(f"{name!r} is a file, wanted a model's name: give the file as the model's checkpoint")
    library, _, short = name.rpartition("/")
    ours = [f"cifar/{known}" if known in SHARED_NAMES else known for known in cifar_nets.NAMES]
    if library == "" and short.lower() in cifar_nets.TOOLBOX_NAMES:
        meant = cifar_nets.TOOLBOX_NAMES[short.lower()]
        return UserError(
            f"unknown model {name!r}: the published CIFAR net of this name is"
            f" {f'cifar/{meant}' if meant in SHARED_NAMES else meant!r} here"
        )
    if library == "cifar":
        return UserError(
            f"unknown model {name!r}: wanted 'cifar/' and a net for small images, such as resnet8x4, wrn_40_2 or vgg13"
            f"{did_you_mean(short, cifar_nets.NAMES)}"
        )
    known = {*ours, "mobilenet_v1", *torchvision.models.list_models(module=torchvision.models), *timm.list_models()}
    return UserError(
        f"unknown model {name!r}: wanted one of ours (resnet20, resnet8x4, mobilenet_v1, ...), of torchvision's or of"
        f" timm's{did_you_mean(short, known)}"
    )


def _build_torchvision(name: str, num_classes: int, pretrained: bool, image_size: int) -> nn.Module:
    import torchvision

    options: dict[str, Any] = {}
    if name.startswith("vit_"):
        options["image_size"] = image_size
    elif name == "maxvit_t":
        options["input_size"] = (image_size, image_size)
    elif name in ("googlenet", "inception_v3") and not pretrained:
        options["init_weights"] = True  # the default, but for a warning that it may change
    if not pretrained:
        build = functools.partial(torchvision.models.get_model, name, weights=None, num_classes=num_classes, **options)
        return _without_side_classifiers(_construct(name, image_size, build))
    weights = torchvision.models.get_model_weights(name)
    # The first, IMAGENET1K_V1 where there is one: the published pairs start from it, not from the later, stronger V2.
    chosen = next(iter(weights))
    _check_published(name, len(chosen.meta["categories"]), num_classes)
    build = functools.partial(torchvision.models.get_model, name, weights=chosen, **options)
    return _without_side_classifiers(_download(name, build))


def _without_side_classifiers(net: nn.Module) -> nn.Module:
    """GoogLeNet and Inception without the classifiers they have half-way for their own training."""
    for name in ("aux1", "aux2", "AuxLogits"):
        if hasattr(net, name):
            setattr(net, name, None)
            net.aux_logits = False  # type: ignore[assignment]
    return net


def _build_timm(name: str, num_classes: int, pretrained: bool, image_size: int) -> nn.Module:
    import timm

    config = timm.get_pretrained_cfg(name)
    options: dict[str, Any] = {}
    if config is not None and config.fixed_input_size:
        options["img_size"] = image_size
    if not pretrained:
        build = functools.partial(timm.create_model, name, pretrained=False, num_classes=num_classes, **options)
        return _construct(name, image_size, build)
    if config is None or not config.has_weights:
        raise UserError(f"model {name!r} has no published weights in timm: give a checkpoint instead")
    _check_published(name, config.num_classes, num_classes)
    return _download(name, functools.partial(timm.create_model, name, pretrained=True, **options))


def _check_published(name: str, published: int, num_classes: int) -> None:
    # The libraries would refuse in their own words (torchvision) or silently start a random classifier (timm).
    if published != num_classes:
        raise UserError(
            f"the published weights of {name!r} classify {published} classes, wanted {num_classes} as in the data:"
            " train this model on the data first (objective 'ce') and give the checkpoint"
        )


def _construct(name: str, image_size: int, build: Callable[[], nn.Module]) -> nn.Module:
    try:
        return build()
    except Exception as error:  # each architecture refuses a size in its own way
        raise _unfit_size(name, image_size, error) from error


def _unfit_size(name: str, image_size: int, error: Exception) -> UserError:
    return UserError(
        f"model {name!r} does not take {image_size}x{image_size} RGB images ({error}): choose another image size or net"
    )


def _download(name: str, build: Callable[[], nn.Module]) -> nn.Module:
    try:
        return build()
    except Exception as error:  # each library and transport has its own family of errors
        raise UserError(
            f"the published weights of {name!r} could not be loaded ({error}): check the network, or download the file"
            " elsewhere and give it as the checkpoint"
        ) from error


# ----------------------------------------------------------------------------------------------------------------------
# Weights from files


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name, on the CPU, with wrappers' prefixes dropped."""
    if not path.is_file():
        raise UserError(f"checkpoint {str(path)!r} does not exist: give the path of a weights file")
    if path.suffix == ".safetensors":
        import safetensors.torch

        try:
            content: Any = safetensors.torch.load_file(path)
        except Exception as error:
            raise _unreadable(path, error) from error
    else:
        try:
            # torchvision's and timm's training scripts keep their command line beside the weights.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise _unreadable(path, error) from error
    for key in ("learner", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(
            f"checkpoint {str(path)!r} holds no model weights, wanted a state_dict (names to tensors), alone or under"
            " 'model' or 'state_dict': save one with torch.save(model.state_dict(), path)"
        )
    weights = {str(k): v for k, v in content.items()}
    for prefix in ("module.", "_orig_mod."):  # DistributedDataParallel's and torch.compile's
        if all(k.startswith(prefix) for k in weights):
            weights = {k.removeprefix(prefix): v for k, v in weights.items()}
    return weights


def _unreadable(path: Path, error: Exception) -> UserError:
    if "Unsupported global" in str(error) or "Unsupported class" in str(error):
        return UserError(
            f"checkpoint {str(path)!r} holds Python objects that loading would execute, wanted tensors only: save its"
            " state_dict alone with torch.save(model.state_dict(), path)"
        )
    return UserError(
        f"checkpoint {str(path)!r} ({path.stat().st_size} bytes) is not a readable weights file; it is truncated or of"
        f" another format: copy or download it again ({type(error).__name__})"
    )


def _native_names(weights: dict[str, Tensor], model: Tapped, origin: str | Path) -> dict[str, Tensor]:
    """A learner's names (student.net.*, student.classifier.*, connector.*) as the original net's; others unchanged."""
    if not any(k.startswith("student.net.") for k in weights):
        return weights
    if not any(k.startswith("student.classifier.") for k in weights):
        raise UserError(
            f"checkpoint {str(origin)!r} is of a student without a classifier of its own (it answers through its"
            " teacher's), wanted a whole model: give a checkpoint of an objective that trains the student's classifier"
            " (ce, kd, dkd, fitnet, at, srrl)"
        )
    native = {}
    for key, value in weights.items():
        if key.startswith("student.net."):
            native[key.removeprefix("student.net.")] = value
        elif key.startswith("student.classifier."):
            native[f"{model.classifier_path}.{key.removeprefix('student.classifier.')}"] = value
    return native


# ----------------------------------------------------------------------------------------------------------------------
# Cost


def count_parameters(module: nn.Module) -> int:
    """Number of parameters (BatchNorm's affine ones included, running statistics not)."""
    return sum(p.numel() for p in module.parameters())


def macs(module: nn.Module, image_size: int) -> int:
    """Multiply-accumulates of one image [1, 3, image_size, image_size] in convolutions and linear layers."""
    parameter = next(module.parameters())
    return count_macs(module, parameter.new_zeros(1, 3, image_size, image_size))


@torch.no_grad()
def count_macs(module: nn.Module, x: Tensor) -> int:
    """Multiply-accumulates of `module(x)` in convolutions and linear layers, by one eval-mode forward.

    Products that are no layer of their own (attention scores, element-wise scaling) are not counted.
    """
    total = 0

    def count(layer: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            total += output.numel() * layer.weight[0].numel()
        elif isinstance(layer, nn.Linear):
            total += output.numel() * layer.in_features

    modes = {m: m.training for m in module.modules()}
    layers = [m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    handles = [m.register_forward_hook(count) for m in layers]
    try:
        module.eval()(x)
    finally:
        for m, mode in modes.items():
            m.training = mode
        for handle in handles:
            handle.remove()
    return total
