"""A classification net, cut at its classifier, with the two taps that distillation needs.

Whatever the net, `Tapped` offers the same three things: the map after the last activation and before pooling
[B, C, H, W], the pooled vector that the classifier sees [B, C], and the classifier itself, a plain `nn.Linear`. A run
or two of the net on random pixels find them (`probe`), so no list of layer names is kept for each architecture.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ijckd_fast.errors import UserError
from ijckd_fast.nets.cifar_names import small_form_hint
from ijckd_fast.nets.lively import lively
from ijckd_fast.nets.pointwise import guard_pointwise
from ijckd_fast.nets.probe import Probe
from ijckd_fast.nets.stages import Stage, tensors_in
from ijckd_fast.nets.weights import misfit, require_fit
from ijckd_fast.normalisation import Normalisation

_MATCHING = "map matching and connectors on maps"
_POOLED = "pooled matching (match 'pooled') with a 'linear' or 'mlp' connector"


class Tapped(nn.Module):
    """A classification net cut at its classifier: `logits = classifier(pooled)`, and `pooled = mean(map)` if has_map.

    net              the backbone; images [B, 3, S, S] -> pooled [B, C], exactly what the classifier sees
    classifier       the net's final `nn.Linear` (C -> K), moved out of `net`; None after `drop_classifier()`. It stands
                     for a 1x1 convolution, or for several heads whose answers are averaged, too (`Classifier`)
    classifier_path  the classifier's name inside the original net, e.g. 'fc' (used to read and write foreign weights);
                     of several heads the first one's
    name, num_classes (K), channels (C), has_map
    matches_only     whether there is a map, but what the classifier sees does not follow from it (a class token beside
                     a grid of tokens): it can be matched, and not answer
    map_channels     C if has_map, else None; match_channels: of the map that can be matched, None without any
    notes            sentences on how a weights file was read, for people; set by `create_model`
    stages           the net's maps of every size, from the largest to the smallest, which is the map; () without a map.
                     Or the outputs of the layers that were named as stages

    Stages are told apart by the size of what the layers put out, maps [B, C, H, H] or [B, H, H, C] of the whole batch;
    of a tuple, list or dict the first such map. The way of the maps through the net is the longest run of layers, in
    the order of their calls, whose maps never grow; what is made of a map aside (scores of attention, a gate) is no
    part of it. Each size on it is a stage. Its map is the last layer output at that size, be it of a whole block or
    sequence; but not one within a block (any module other than a plain nn.Sequential) that takes this size and gives
    the next smaller one, which is where the next stage begins. The first size is no stage if just one layer works at
    it: a stem. Of ResNets stages are layer1 to layer4, on CIFAR layer1 to layer3. Unlike the last, the others' maps are
    as the layers leave them: where the activation is part of the next block (WRN), from before it.

    net          an `nn.Module` [B, 3, S, S] -> logits [B, num_classes]; or a tuple, list or dict of tensors, of which
                 one is the output of the one classifier. It is changed in place; as it is seen with lively weights and
                 statistics where it is not trained (`lively`), it may be given before or after it is trained
    image_size   S of the probe forward: eval mode, no gradient, two images of random pixels
    stages       names of layers of `net`, in the order in which it calls them: the stages; (): find them
    raises       UserError if the net does not take such images or does not end in a linear layer on a vector, and for
                 stages that are no maps, or in another order
    """

    classifier: nn.Linear | None
    _input_scale: Tensor | None
    _input_shift: Tensor | None

    def __init__(
        self, net: nn.Module, name: str, num_classes: int, image_size: int, stages: Sequence[str] = ()
    ) -> None:
        super().__init__()
        with lively(net):
            probe = Probe(net, num_classes, image_size, name, stages)
            probe.classifier.cut(net)
            probe.check_cut(net)
        guard_pointwise(net, probe.pointwise)
        self.name = name
        self.notes: tuple[str, ...] = ()
        self.num_classes = num_classes
        self.net = net
        self._classifier_form = probe.classifier
        self.classifier = probe.classifier.linear()
        self.channels = self.classifier.in_features
        self._answer = probe.answer

        self._handles: list[RemovableHandle] = []
        self._map: Tensor | None = None  # handed from the hook to features() within one forward
        self._last_map = probe.map
        self._map_to_match = False
        self._map_tap = None if probe.map is None else probe.map.found.tap
        if self._map_tap is not None:
            # A bound method, not a closure: deepcopy (as for an EMA copy) then binds the hook to the copy.
            layer = net.get_submodule(self._map_tap.path)
            self._handles.append(layer.register_forward_hook(self._keep_map))
        self.stages: tuple[Stage, ...] = tuple(stage for stage, _ in probe.stages)
        self._stage_taps = tuple(tap for _, tap in probe.stages)
        self._kept_stages: tuple[int, ...] = ()  # stages, by their place in `stages`
        self._hooked: set[int] = set()
        self._stage_maps: dict[int, Tensor] = {}
        for buffer in ("_input_scale", "_input_shift"):  # no weights: not in the state_dict
            self.register_buffer(buffer, None, persistent=False)

    @property
    def classifier_path(self) -> str:
        return self._classifier_form.paths[0]

    @property
    def has_plain_classifier(self) -> bool:
        return self._classifier_form.is_plain

    @property
    def map_path(self) -> str | None:
        return None if self._map_tap is None else self._map_tap.path

    @property
    def has_map(self) -> bool:
        return self._last_map is not None and self._last_map.is_pooled

    @property
    def matches_only(self) -> bool:
        return self._last_map is not None and not self._last_map.is_pooled

    @property
    def map_channels(self) -> int | None:
        return self.channels if self.has_map else None

    @property
    def match_channels(self) -> int | None:
        if self._last_map is None or self.has_map:
            return self.map_channels
        return self._last_map.found.stage.channels

    def require_map(
        self, *, to_match: bool = False, role: str = "model", use: str = _MATCHING, remedy: str = _POOLED
    ) -> None:
        """Raises UserError if this net has no map whose spatial mean is what its classifier sees.

        to_match  a map that `matches_only` will do
        role      what the net is called: 'model', 'teacher' or 'student'
        use       what needs the map, in the plural
        remedy    what works instead, beside another net of this role
        """
        if self.has_map or (to_match and self.matches_only):
            return
        if self.matches_only:
            lacks = (
                "map that its classifier sees the mean of (it sees something else, such as a class token; the map of"
                f" {self.map_path!r} can be matched, no more: docs/own_model.md)"
            )
        else:
            lacks = (
                "map before a global average pooling (its classifier sees something else than the mean of a map or of"
                " a grid of tokens)"
            )
        raise UserError(
            f"{role} {self.name!r} has no {lacks}, which {use} need: choose another"
            f" {role}, or {remedy}{small_form_hint(self.name)}"
        )

    def require_stages(self, *, role: str = "model") -> None:
        """Raises UserError if this net has no stages; role as for `require_map`."""
        if not self.stages:
            options = "--student-stages, --teacher-stages" if role == "model" else f"--{role}-stages"
            raise UserError(
                f"{role} {self.name!r} has no stage maps (its classifier sees something else than the mean of a map,"
                " the last of them), which attention transfer (at) and hints (hint) compare: name the layers that are"
                f" to be its stages ({options}), choose another {role}, or objective 'kd'"
                f"{small_form_hint(self.name)}"
            )

    def keep_map_to_match(self) -> None:
        """Makes `features` give a map that this net `matches_only`, [B, match_channels, H, W], if it has no other."""
        self._map_to_match = True

    def keep_stages(self, places: Sequence[int]) -> None:
        """Makes `staged_features` give the maps of these stages, by their places in `stages` (or negative ones)."""
        self.require_stages()
        self._kept_stages = tuple(range(len(self.stages))[place] for place in places)
        for place in self._kept_stages:
            if place not in self._hooked and self._stage_taps[place] != self._map_tap:
                hook = functools.partial(self._keep_stage, place)  # deepcopy binds it to the copy, as it does a method
                self._handles.append(self.net.get_submodule(self.stages[place].path).register_forward_hook(hook))
                self._hooked.add(place)

    def renormalise(self, given: Normalisation, own: Normalisation) -> None:
        """From now on images come normalised as `given`, and the net sees them as its weights expect: as `own`.

        Where the two differ, an affine step per channel on the images' device, in float32, comes before the net; where
        they are equal, nothing. Gradients, weights and state_dict are as before.
        """
        scale = shift = None
        if given != own:
            # ((x * std + mean) - mean_own) / std_own
            std, std_own, mean, mean_own = (
                torch.tensor(values, dtype=torch.float64).view(3, 1, 1)  # [3, 1, 1]
                for values in (given.std, own.std, given.mean, own.mean)
            )
            like = next(self.parameters())
            scale, shift = (x.to(like.device, torch.float32) for x in (std / std_own, (mean - mean_own) / std_own))
        self._input_scale, self._input_shift = scale, shift

    def uncut(self) -> nn.Module:
        """The net as it was given, its classifier in its place again; this Tapped is of no more use."""
        assert self.classifier is not None
        for handle in self._handles:
            handle.remove()
        self._classifier_form.put_back(self.net, self.classifier)
        return self.net

    def drop_classifier(self) -> None:
        """Removes the classifier and its parameters, for a student that will answer through the teacher's."""
        self.classifier = None

    def _keep_map(self, module: nn.Module, args: Any, output: Any) -> None:
        assert self._map_tap is not None
        self._map = self._map_tap.tensor_of(output)

    def _keep_stage(self, place: int, module: nn.Module, args: Any, output: Any) -> None:
        self._stage_maps[place] = self._stage_taps[place].tensor_of(output)

    def features(self, images: Tensor, need_map: bool = False) -> tuple[Tensor | None, Tensor]:
        """Backbone only. Gradients flow to the parameters through both outputs.

        images    [B, 3, S, S]
        need_map  False: the map is None
        returns   (map [B, C, H, W] after the last activation, or None; pooled [B, C]). In training mode pooled includes
                  the net's own dropout, the map does not. After `keep_map_to_match` the map may be another
        raises    UserError if need_map and the net has none
        """
        map_, pooled, _ = self.staged_features(images, need_map)
        return map_, pooled

    def staged_features(
        self, images: Tensor, need_map: bool = False
    ) -> tuple[Tensor | None, Tensor, tuple[Tensor, ...]]:
        """As `features`, and the maps [B, Ci, Hi, Wi] of the stages that `keep_stages` asked for, in its order."""
        if need_map:
            self.require_map(to_match=self._map_to_match)
        if self._input_scale is not None and self._input_shift is not None:
            images = (images * self._input_scale + self._input_shift).to(images.dtype)
        pooled = self._pooled_in(self.net(images))  # [B, C]
        kept, self._stage_maps = self._stage_maps, {}
        last, self._map = self._map, None
        taps = {i: self._stage_taps[i] for i in self._kept_stages}
        stages = {i: tap.map_of(kept[i]) for i, tap in taps.items() if tap != self._map_tap}
        map_: Tensor | None = None
        if need_map or len(stages) < len(taps):
            assert last is not None
            assert self._map_tap is not None
            assert self._last_map is not None
            map_ = self._map_tap.map_of(last)
            stages = {i: stages.get(i, map_) for i in taps}
            if need_map and self._last_map.tail is not None:
                map_ = self._last_map.tail.of_map(self.net, map_)
        return map_ if need_map else None, pooled, tuple(stages[i] for i in self._kept_stages)

    def _pooled_in(self, output: Any) -> Tensor:
        """[B, C], of what the net returns."""
        if isinstance(output, Tensor):
            return output
        tensors = tensors_in(output)
        if self._answer >= len(tensors) or tensors[self._answer].shape[1:] != (self.channels,):
            mode = "training" if self.training else "eval"
            raise UserError(
                f"model {self.name!r} returns {len(tensors)} tensors in {mode} mode, of which number {self._answer} is"
                " not its classifier's output, as it is in eval mode for random pixels: let its forward return the"
                " logits in the same place always"
            )
        return tensors[self._answer]

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S] -> logits [B, K]"""
        if self.classifier is None:
            raise RuntimeError(f"Tapped {self.name!r}: the classifier was dropped, only features() is left")
        return self.classifier(self.features(images)[1])

    def native_state_dict(self) -> dict[str, Tensor]:
        """The weights under the names of the original net, as torchvision, timm or published checkpoints have them."""
        state = dict(self.net.state_dict())
        return state if self.classifier is None else self._classifier_form.native(state, self.classifier.state_dict())

    def cut_state_dict(self) -> dict[str, Tensor]:
        """The weights as a run's checkpoint has them: the classifier as one linear layer by `classifier_path`."""
        assert self.classifier is not None
        own = {f"{self.classifier_path}.{k}": v for k, v in self.classifier.state_dict().items()}
        return dict(self.net.state_dict()) | own

    def native_of_cut(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights named as by `cut_state_dict`, as `load_native` takes them."""
        linear = {k.rpartition(".")[2]: v for k, v in weights.items() if self._is_classifier(k)}
        return self._classifier_form.native({k: v for k, v in weights.items() if not self._is_classifier(k)}, linear)

    def load_native(self, weights: Mapping[str, Tensor], origin: str, hint: str = "") -> None:
        """Copies weights in, named as by `native_state_dict`; nothing is changed if they do not fit.

        origin  what to call the weights in an error, e.g. the file's path
        hint    what to add to an error about other names or shapes
        raises  UserError for missing, unexpected or misshapen tensors (a few are named) and for NaN or infinite values
        """
        # Files written before BatchNorm counted its batches lack the counter; nothing here depends on it.
        own = {
            name: value
            for name, value in self.native_state_dict().items()
            if name in weights or not name.endswith("num_batches_tracked")
        }
        missing, unexpected, misshapen = misfit(weights, own)
        if misshapen and not missing and not unexpected and all(self._is_classifier(name) for name in misshapen):
            classes = weights[next(iter(misshapen))].shape[0]
            raise UserError(
                f"{origin} classifies {classes} classes, expected {self.num_classes} as in the data: give weights of"
                f" {self.name!r} trained on these classes"
            )
        require_fit(
            weights,
            own,
            origin,
            f"does not fit model {self.name!r} with {self.num_classes} classes",
            f"Name the model that these weights belong to{small_form_hint(self.name)}{hint}",
        )
        # Plain dicts carry no version, so BatchNorm accepts the absence of its counter.
        self.net.load_state_dict({k: v for k, v in weights.items() if not self._is_classifier(k)})
        if self.classifier is not None:
            self.classifier.load_state_dict(self._classifier_form.merged(weights))

    def _is_classifier(self, key: str) -> bool:
        return self._classifier_form.has(key)


class CachedTeacher(nn.Module):
    """What is left of a teacher whose pooled features come from a cache: its classifier. It takes no image.

    classifier   `nn.Linear` (C -> K), the teacher's own
    name         of the teacher's model
    fingerprint  `weights.fingerprint` of the whole teacher
    num_classes (K), channels (C), as a Tapped has them
    """

    def __init__(self, classifier: nn.Linear, name: str, fingerprint: str) -> None:
        super().__init__()
        self.classifier = classifier
        self.name = name
        self.fingerprint = fingerprint
        self.num_classes, self.channels = classifier.out_features, classifier.in_features

    def require_map(
        self, *, use: str = _MATCHING, remedy: str = "objective 'ijckd-pooled' (match 'pooled')", **how: Any
    ) -> None:
        """Raises UserError: a cache holds no maps. use, remedy: as for `Tapped.require_map`."""
        raise UserError(
            f"the teacher {self.name!r} is a cache of pooled features, and {use} need its maps: take {remedy}, or the"
            " teacher itself"
        )

    def require_stages(self, **how: Any) -> None:
        """Raises UserError: a cache holds no maps."""
        raise UserError(
            f"the teacher {self.name!r} is a cache of pooled features, and attention transfer (at) and hints (hint)"
            " need the maps of its stages: take objective 'kd', or the teacher itself"
        )

    def features(self, images: Tensor, need_map: bool = False) -> tuple[Tensor | None, Tensor]:
        """Raises RuntimeError: a training from a cache hands its features to the distiller."""
        raise RuntimeError(f"CachedTeacher {self.name!r}: there is no backbone to ask, give pooled_t")

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)[1]
