"""One forward of a net on random pixels, which shows where its classifier is, its last map and its stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijckd_fast.errors import UserError, out_of_memory, ran_out, reason_of
from ijckd_fast.nets.equality import same
from ijckd_fast.nets.find_classifier import Head, classifier_width, find_classifier, may_classify, no_classifier
from ijckd_fast.nets.grids import Grids
from ijckd_fast.nets.last_map import LastMap, look_for_map
from ijckd_fast.nets.pointwise import PointwiseCalls
from ijckd_fast.nets.stages import Call, Found, Stage, Tap, find_stages, first_map, named_stages, tensor_at, tensors_in


class Probe:
    """One forward of an uncut net with every layer's output in view; holds what it found.

    stages                  names of the layers whose outputs are to be the stages; (): find them
    classifier              the net's last linear layer, or the layers that are one together
    answer                  the classifier's output, by its number among the tensors that the net returns
    map                     the map; None: no map
    stages                  as `Tapped` describes them, and where their maps are
    pointwise               modules that compute a convolution which `guard_pointwise` is for
    images, pooled, logits  [2, 3, S, S], and the classifier's input [2, C] and output [2, K] for them
    raises                  UserError if the net does not take such images or has no such classifier; for `stages` as
                            `named_stages`

    The net is expected to be `lively`, which is eval mode too: before training layers may be the identity that later
    are not.
    """

    def __init__(
        self, net: nn.Module, num_classes: int, image_size: int, name: str, stages: Sequence[str] = ()
    ) -> None:
        self.name, self._named = name, tuple(stages)
        self.map: LastMap | None = None
        try:
            self._run(net, num_classes, image_size)
        except UserError:
            raise
        except Exception as error:  # any layer may refuse the size in its own way
            raise unfit_size(name, image_size, error) from error
        if not self._has_map and image_size < 128:
            # The map of a stride-32 net is 1x1 on tiny images, not to be told from its mean: look at larger ones.
            try:
                self._run(net, num_classes, 128)
            except Exception as error:  # a net of fixed input size: the first verdict stands
                if out_of_memory(error):
                    raise unfit_size(name, 128, error) from error
                self._run(net, num_classes, image_size)

    @torch.no_grad()
    def _run(self, net: nn.Module, num_classes: int, size: int) -> None:
        heads: dict[str, Head] = {}  # ordered by the last call of each layer
        maps: dict[str, tuple[Tensor, int]] = {}  # likewise
        calls: list[Call] = []
        grids = Grids()
        named: dict[str, tuple[Tensor, int]] = {}  # the named stages' maps, and how often they had been written into
        widths = {width for m in net.modules() if (width := classifier_width(m, num_classes)) is not None}
        self.images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))

        def watch(path: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if args and may_classify(module, output, num_classes):
                    heads.pop(path, None)
                    heads[path] = Head(module, args[0], output)
                made = first_map(output, len(self.images))
                if made is not None:
                    item, map_ = made
                    given = first_map(args, len(self.images))
                    grids.saw(map_)
                    calls.append(Call(path, module, None if given is None else given[1].shape, map_.shape, item))
                    if path in self._named:
                        named[path] = map_, map_._version
                    if not widths.isdisjoint((map_.shape[1], map_.shape[3])):
                        maps.pop(path, None)
                        maps[path] = map_, item
                elif (tokens := grids.call_of(path, module, args, output, len(self.images))) is not None:
                    calls.append(tokens)
                    if path in self._named:
                        made_of = tensor_at(output, tokens.item)
                        named[path] = made_of, made_of._version

            return hook

        handles = [module.register_forward_hook(watch(path)) for path, module in net.named_modules()]
        pointwise = PointwiseCalls()
        try:
            with pointwise.watching(net):
                output = net(self.images)
        finally:
            for handle in handles:
                handle.remove()
        self.pointwise = pointwise.modules
        found = find_classifier(heads, tensors_in(output), num_classes, self.name)
        self.classifier, self.answer, self.pooled, self.logits = found
        self._find_map(net, maps)
        if self._named:
            overwritten = [path for path, (map_, version) in named.items() if map_._version != version]
            self.stages = named_stages(self._named, calls, overwritten, net, self.name)
        elif self.map is None or not self.map.is_pooled:
            self.stages = ()
        else:
            of_maps = [call for call in calls if call.prefix is None]
            self.stages = find_stages(of_maps if self.map.found.tap.prefix is None else calls, self.map.found)

    def _find_map(self, net: nn.Module, maps: dict[str, tuple[Tensor, int]]) -> None:
        """maps: by layer, in the order of their calls: the first map that it puts out, and its number in the output."""
        for path, (output, item) in reversed(maps.items()):
            for nhwc in (False, True):
                map_ = output.permute(0, 3, 1, 2) if nhwc else output
                if map_.shape[1] != self.pooled.shape[1] or map_.shape[2] * map_.shape[3] == 1:
                    continue
                for relu in (False, True):
                    if same((F.relu(map_) if relu else map_).mean((2, 3)), self.pooled):
                        found = Found(Stage(path, map_.shape[1], map_.shape[2]), Tap(path, item, nhwc, relu))
                        self.map = LastMap(found)
                        return
        self.map = look_for_map(net, self.classifier.paths, self.images.shape[-1])

    @property
    def _has_map(self) -> bool:
        return self.map is not None and self.map.is_pooled

    @torch.no_grad()
    def check_cut(self, net: nn.Module) -> None:
        """Refuses a net that, with its classifier replaced by the identity, does not return the classifier's input."""
        try:
            pooled = tensor_at(net(self.images), self.answer)
        except Exception as error:  # e.g. the forward reads the layer's weight
            if out_of_memory(error):
                raise unfit_size(self.name, self.images.shape[-1], error) from error
            raise no_classifier(self.name) from error
        if pooled.shape == self.pooled.shape:
            if same(pooled, self.pooled):
                return
            if not same(tensor_at(net(self.images), self.answer), pooled):
                raise UserError(
                    f"model {self.name!r} gives other features for the same images a second time though in eval mode"
                    " (dropout that is always on?), expected one fixed function: let its dropout follow self.training,"
                    " or choose another model"
                )
        raise no_classifier(self.name)


def unfit_size(name: str, image_size: int, error: Exception) -> UserError:
    """What to raise for a net that cannot be built for images of this size, or refuses them with `error`."""
    if out_of_memory(error):
        return ran_out(
            f"building {name!r} and asking it about 2 images of {image_size}x{image_size} pixels",
            "choose a smaller net or image size, free memory, or take a machine with more",
            error,
        )
    return UserError(
        f"model {name!r} does not take {image_size}x{image_size} RGB images ({reason_of(error)}): choose another image"
        " size or net"
    )
