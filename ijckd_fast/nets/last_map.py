"""The map of a net that hands no plain map to global average pooling: a grid of tokens, or one with layers behind
pooling. One more run of the net shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ijckd_fast.nets.equality import same
from ijckd_fast.nets.grids import Grids, first_tokens, possible_before
from ijckd_fast.nets.stages import Found, Stage, Tap, first_map
from ijckd_fast.nets.tail import Tail, TailLayer

# Where in the image, down and across, pixels are changed to see which position of a map answers; no two places are
# mirror images of each other, so that a grid in another order than row by row is told from one.
_PLACES = ((0.1, 0.9), (0.4, 0.1), (0.9, 0.6))
_CLEAR = 4  # times the median of all positions: a change that shows which position answers
_LATE = 0.5  # of the calls of layers, after which a map is one of the last


class LastMap(NamedTuple):
    """A net's map.

    found      where it is taken
    tail       what the net makes of its mean before the classifier; None: nothing
    is_pooled  whether what the classifier sees follows from its mean; else the map can be matched, no more
    """

    found: Found
    tail: Tail | None = None
    is_pooled: bool = True


class _Map(NamedTuple):
    """A map that a layer put out: where it is taken, its mean [B, C], whether its positions are those of the images
    (None: nothing shows it, as all answer to every pixel alike), and how many calls of layers had ended before.
    """

    found: Found
    mean: Tensor
    in_place: bool | None
    calls_before: int


class _VectorCall(NamedTuple):
    """A layer that made one vector per image of one: the shape that it took it in, and both [B, C]."""

    path: str
    shape: tuple[int, ...]
    given: Tensor
    made: Tensor


@torch.no_grad()
def look_for_map(net: nn.Module, classifier: Sequence[str], image_size: int) -> LastMap | None:
    """The map of a `lively` net whose classifier is at these paths; None for none.

    Exact, in this order: the last map whose mean the classifier sees, be it a grid of tokens; the last one of whose
    mean a chain of layers makes that. Else the last map of any kind, to match.
    """
    seen = _Look(net, classifier, image_size)
    starts = seen.chains()
    for tails in (starts[:1], starts[1:]):
        for each in reversed(seen.maps):
            for given, layers in tails:
                if same(each.mean, given) and (each.in_place is not False or each.found.tap.prefix is None):
                    tail = Tail(layers) if layers else None
                    if _is_right(net, classifier, seen.images, each.found.tap, tail):
                        return LastMap(each.found, tail)
    last = next((each for each in reversed(seen.maps) if seen.can_be_matched(each)), None)
    return None if last is None else LastMap(last.found, is_pooled=False)


class _Look:
    """One run with maps and vectors in view.

    images  [4, 3, S, S], all but the first with other pixels in one place
    pooled  [4, C], what the classifier sees
    maps    in the order of their calls
    """

    def __init__(self, net: nn.Module, classifier: Sequence[str], image_size: int) -> None:
        self.maps: list[_Map] = []
        self.images = _changed_in_places(image_size)
        self._calls: list[_VectorCall] = []
        self._given: dict[str, list[Tensor | None]] = {}  # vectors, of the calls that have not ended
        self._grids = Grids()
        self._ended = 0
        handles = []
        for path, module in net.named_modules():
            handles.append(module.register_forward_pre_hook(self._before(path)))
            handles.append(module.register_forward_hook(self._after(path)))
        last = net.get_submodule(classifier[0]).register_forward_pre_hook(self._keep_pooled)
        try:
            net(self.images)
        finally:
            for handle in (*handles, last):
                handle.remove()
        self._calls = [c for c in self._calls if not any(f"{head}.".startswith(f"{c.path}.") for head in classifier)]

    def _keep_pooled(self, layer: nn.Module, args: Any) -> None:
        self.pooled = args[0].mean((2, 3)) if args[0].dim() == 4 else args[0].clone()

    def _before(self, path: str) -> Callable[[nn.Module, Any], None]:
        def hook(layer: nn.Module, args: Any) -> None:
            given = args[0] if len(args) == 1 and _is_vector(args[0], len(self.images)) else None
            self._given.setdefault(path, []).append(None if given is None else given.clone())

        return hook

    def _after(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(layer: nn.Module, args: Any, output: Any) -> None:
            given = self._given[path].pop()
            self._ended += 1
            batch = len(self.images)
            if given is not None and _is_vector(output, batch):
                made = output.clone().flatten(1)
                self._calls.append(_VectorCall(path, tuple(given.shape[1:]), given.flatten(1), made))
            map_, tokens = first_map(output, batch), first_tokens(output, batch)
            if map_ is not None:
                self._grids.saw(map_[1])
                for nhwc, relu in ((True, True), (True, False), (False, True), (False, False)):  # the likeliest last
                    self._add(Tap(path, map_[0], nhwc, relu), map_[1])
            elif tokens is not None:
                for before in possible_before(tokens[1].shape[1]):
                    self._add(Tap(path, tokens[0], nhwc=True, prefix=before), tokens[1])

        return hook

    def _add(self, tap: Tap, made: Tensor) -> None:
        map_ = tap.map_of(made)  # [4, C, H, W]
        height, width = map_.shape[2:]
        if height == width > 1:
            moved = (map_[1:] - map_[:1]).abs().sum(1).flatten(1)  # [3, H W]
            slack = 1 if width >= 7 else 0
            misplaced = [
                change
                for change, at, (down, across) in zip(moved, moved.argmax(1).tolist(), _PLACES, strict=True)
                if max(abs(at // width - int(down * height)), abs(at % width - int(across * width))) > slack
            ]
            clear = any(bool(change.max() > _CLEAR * change.median()) for change in misplaced)
            in_place = None if misplaced and not clear else not misplaced
            found = Found(Stage(tap.path, map_.shape[1], height), tap)
            self.maps.append(_Map(found, map_.mean((2, 3)), in_place, self._ended))

    def can_be_matched(self, map_: _Map) -> bool:
        """Whether a map is that of its layer, and of one of the last: what a stem makes is nothing to match."""
        tap = map_.found.tap
        is_it = tap.prefix is None or tap.prefix == self._grids.before(tap.prefix + map_.found.stage.side**2)
        return is_it and map_.in_place is True and not tap.relu and map_.calls_before >= _LATE * self._ended

    def chains(self) -> list[tuple[Tensor, tuple[TailLayer, ...]]]:
        """Vectors [4, C] and the layers by which the net makes `pooled` of them; first `pooled` and none.

        Of a layer and those within it, which do the same, the outer one is taken.
        """
        chains: list[tuple[Tensor, tuple[TailLayer, ...]]] = [(self.pooled, ())]
        for path, shape, given, made in reversed(self._calls):
            if not same(given, made) and not any(same(given, x) for x, _ in chains):
                layers = next((layers for x, layers in chains if same(made, x)), None)
                if layers is not None:
                    chains.append((given, (TailLayer(path, shape), *layers)))
        return chains


def _is_vector(x: Any, batch: int) -> bool:
    """Whether it is one vector per image, with dimensions of size 1 or without."""
    return isinstance(x, Tensor) and x.dim() >= 2 and len(x) == batch and max(x.shape[1:]) * batch == x.numel()


def _changed_in_places(size: int) -> Tensor:
    """[4, 3, S, S]: random pixels, and the same with others in one of `_PLACES` each."""
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(3, size, size, generator=draw).repeat(1 + len(_PLACES), 1, 1, 1)
    reach = max(1, size // 32)
    for image, (down, across) in zip(images[1:], _PLACES, strict=True):
        rows, columns = (slice(max(0, int(at * size) - reach), int(at * size) + reach) for at in (down, across))
        image[:, rows, columns] = 4 * torch.randn(image[:, rows, columns].shape, generator=draw)
    return images


def _is_right(net: nn.Module, classifier: Sequence[str], images: Tensor, tap: Tap, tail: Tail | None) -> bool:
    """Whether the map, taken as `Tapped` does, has as its mean what the classifier sees; other layers may write into
    it, and the tail may mix images.
    """
    kept: dict[str, Tensor] = {}

    def keep_map(layer: nn.Module, args: Any, output: Any) -> None:
        kept["map"] = tap.tensor_of(output)

    def keep_pooled(layer: nn.Module, args: Any) -> None:
        kept["pooled"] = args[0]

    handles = [
        net.get_submodule(tap.path).register_forward_hook(keep_map),
        net.get_submodule(classifier[0]).register_forward_pre_hook(keep_pooled),
    ]
    try:
        net(images)
    finally:
        for handle in handles:
            handle.remove()
    map_, pooled = tap.map_of(kept["map"]), kept["pooled"].flatten(1)
    if tail is not None:
        one = tail.of_map(net, map_[:1])
        map_ = tail.of_map(net, map_)
        if not same(one, map_[:1]):
            return False
    return same(map_.mean((2, 3)), pooled)
