"""One forward of a net on random pixels, which shows where its classifier is, its last map and its stages."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijckd_fast.errors import UserError


class Stage(NamedTuple):
    """Where a net's map of one size is taken: the output of layer `path`.

    channels, side  of the map [B, channels, side, side], for the images of the probe
    """

    path: str
    channels: int
    side: int


class Probe:
    """One forward of an uncut net with every layer's output in view; holds what it found.

    classifier, classifier_path      the net's last linear layer, and its name
    map_path, map_nhwc, map_relu     the layer whose output is the map (None: no map), whether that is [B, H, W, C], and
                                     whether a ReLU by a function follows
    stages                           as `Tapped` describes them
    images, pooled, logits           [2, 3, S, S], and the classifier's input [2, C] and output [2, K] for them
    raises                           UserError if the net does not take such images or has no such classifier
    """

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
            raise unfit_size(name, image_size, error) from error
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
            f"model {self.name!r} does not end in one linear layer on a pooled vector, expected as the classifier:"
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
                    f"model {self.name!r} gives other features for the same images a second time though in eval mode"
                    " (dropout that is always on?), expected one fixed function: let its dropout follow self.training,"
                    " or choose another model"
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


def unfit_size(name: str, image_size: int, error: Exception) -> UserError:
    """What to raise for a net that cannot be built for images of this size, or refuses them with `error`."""
    return UserError(
        f"model {name!r} does not take {image_size}x{image_size} RGB images ({error}): choose another image size or net"
    )
