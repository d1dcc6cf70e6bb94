"""Which tensors of a file are a net's: found by the net's names, behind any prefix and in dicts at any depth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

# What wrappers put between a net's names: DataParallel, torch.compile, FSDP, activation checkpoints.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# What tools count, or make again from the net's sizes, by the last part of the name: no answer depends on it.
_COUNTERS = {
    "num_batches_tracked", "n_averaged", "total_ops", "total_params", "__flops__", "__params__", "__macs__",
    "relative_position_index", "relative_coords_table", "attn_mask", "position_ids", "_extra_state",
}  # fmt: skip
# Of torch's layers: tensors of equal shapes that lie beside each other and must not be mixed up.
_ROLES = {"weight", "bias", "running_mean", "running_var"}


class Leaf(NamedTuple):
    """A tensor of a file and the keys of the dicts that it lies in."""

    tensor: Tensor
    container: tuple[str, ...]


class WeightSet(NamedTuple):
    """Tensors of a file that may be the net's.

    prefix    of their names in the file, with dicts joined by dots: "state_dict.module."
    names     the net's name -> name in the file
    missing   the net's names that are not there
    foreign   names behind the prefix that the net does not have, without counters
    beside    all other names in the same dicts
    """

    prefix: str
    names: dict[str, str]
    missing: list[str]
    foreign: list[str]
    beside: list[str]

    @property
    def title(self) -> str:
        return self.prefix.rstrip(".") or "names without a prefix"


def leaves_of(content: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[str, Leaf]]:
    """Every tensor in nested dicts and lists, with its name: the keys that lead to it, joined by dots."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(content, Mapping):
        items = content.items()
    elif isinstance(content, list | tuple):
        items = enumerate(content)
    for key, value in items:
        if isinstance(value, Tensor):
            yield ".".join((*keys, str(key))), Leaf(value, keys)
        else:
            yield from leaves_of(value, (*keys, str(key)))


def is_counter(name: str) -> bool:
    """Whether a name is that of something that no answer of a net depends on."""
    return name.rpartition(".")[2] in _COUNTERS


class Search:
    """Looks for the weights of one net.

    own          the net's state, in its own order
    classifier   path of its last layer, which may lie beside the others under another name
    left_out     prefixes of layers that the net was built without, whose weights are no hindrance
    """

    def __init__(self, own: Mapping[str, Tensor], classifier: str, left_out: Sequence[str] = ()) -> None:
        self.own = own
        self.classifier = classifier
        self.left_out = tuple(left_out)
        self.head = [name for name in own if name.startswith(f"{classifier}.")]

    def sets(self, leaves: Mapping[str, Leaf]) -> list[WeightSet]:
        """Every prefix behind which there are names of the net, those with the most first."""
        found: dict[str, dict[str, str]] = defaultdict(dict)
        for full in leaves:
            start = 0
            while start >= 0:
                if full[start:] in self.own:
                    found[full[:start]][full[start:]] = full
                start = full.find(".", start) + 1 or -1
        sets = [self._set(prefix, names, leaves) for prefix, names in found.items()]
        return sorted(sets, key=lambda each: len(each.missing) + len(each.foreign))

    def _set(self, prefix: str, names: dict[str, str], leaves: Mapping[str, Leaf]) -> WeightSet:
        missing = [name for name in self.own if name not in names and not is_counter(name)]
        if missing and set(missing) == set(self.head):
            stem = self._head_beside(prefix, set(names.values()), leaves)
            if stem is not None:
                names |= {name: stem + name[len(self.classifier) :] for name in self.head}
                missing = []
        containers, taken = {leaves[full].container for full in names.values()}, set(names.values())
        others = [full for full, leaf in leaves.items() if leaf.container in containers and full not in taken]
        foreign = [full for full in others if full.startswith(prefix) and not self._no_hindrance(full, prefix)]
        return WeightSet(prefix, names, missing, foreign, [full for full in others if full not in set(foreign)])

    def _no_hindrance(self, full: str, prefix: str) -> bool:
        return is_counter(full) or full[len(prefix) :].startswith(self.left_out)

    def _head_beside(self, prefix: str, taken: set[str], leaves: Mapping[str, Leaf]) -> str | None:
        """The name of the classifier outside of `prefix`: the nearest, of several the one with as many classes."""
        expected = {name[len(self.classifier) :]: self.own[name].shape for name in self.head}  # ".weight", ".bias"
        if prefix.endswith("student.net."):  # our own
            stem = f"{prefix.removesuffix('net.')}classifier"
            return stem if all(stem + part in leaves for part in expected) else None
        near: dict[tuple[int, bool], list[str]] = defaultdict(list)
        for full in leaves:
            stem = full.removesuffix(".weight")
            if stem == full or full in taken:
                continue
            parts = {part: leaves.get(stem + part) for part in (".weight", ".bias")}
            found = {part: leaf.tensor.shape for part, leaf in parts.items() if leaf is not None}
            if found.keys() == expected.keys() and all(found[part][1:] == expected[part][1:] for part in expected):
                common = [a == b for a, b in zip(stem.split("."), prefix.split("."), strict=False)]
                near[(*common, False).index(False), found == expected].append(stem)
        nearest = near[max(near)] if near else []
        return nearest[0] if len(nearest) == 1 else None

    def fits(self, found: WeightSet) -> bool:
        """Whether it has all names of the net and no others."""
        return not found.missing and not found.foreign

    def shapes_fit(self, found: WeightSet, leaves: Mapping[str, Leaf]) -> bool:
        """Whether its tensors have the net's shapes."""
        return all(leaves[full].tensor.shape == self.own[name].shape for name, full in found.names.items())

    def in_order(self, leaves: Mapping[str, Leaf]) -> list[WeightSet]:
        """The dicts whose tensors have the net's shapes one after the other, counters aside."""
        own = self._ordered
        sets = []
        for container, names in _by_container(leaves).items():
            if len(names) == len(own) and _first_difference(own, self.own, names, leaves) is None:
                prefix = "".join(f"{key}." for key in container)
                beside = [n for n, leaf in leaves.items() if leaf.container == container and n not in set(names)]
                sets.append(WeightSet(prefix, dict(zip(own, names, strict=True)), [], [], beside))
        return sets

    def why_not_in_order(self, leaves: Mapping[str, Leaf]) -> str:
        """The first tensor of the file's largest dict that is not the net's in that place."""
        own, names = self._ordered, max(_by_container(leaves).values(), key=len, default=[])
        place = _first_difference(own, self.own, names, leaves)
        if place is None:
            return f"it has {len(names)} tensors, expected {len(own)}, counters aside"
        theirs, ours = names[place], own[place]
        return (
            f"the first tensor that differs is number {place + 1}, {theirs!r} {list(leaves[theirs].tensor.shape)},"
            f" expected {ours!r} {list(self.own[ours].shape)}"
        )

    @property
    def _ordered(self) -> list[str]:
        return [name for name in self.own if not is_counter(name)]


def _by_container(leaves: Mapping[str, Leaf]) -> dict[tuple[str, ...], list[str]]:
    grouped: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for full, leaf in leaves.items():
        if not is_counter(full):
            grouped[leaf.container].append(full)
    return grouped


def _first_difference(
    ours: Sequence[str], own: Mapping[str, Tensor], theirs: Sequence[str], leaves: Mapping[str, Leaf]
) -> int | None:
    """The first place at which shapes, or what tensors are to their layers, differ."""
    for place, (our, their) in enumerate(zip(ours, theirs, strict=False)):
        roles = {our.rpartition(".")[2], their.rpartition(".")[2]}
        if own[our].shape != leaves[their].tensor.shape or (len(roles) == 2 and roles <= _ROLES):
            return place
    return None


def without_wrappers(leaves: Mapping[str, Leaf], own: Iterable[str]) -> dict[str, Leaf] | None:
    """The same tensors without the parts of names that wrappers of inner layers add; None where there are none."""
    dropped = _WRAPPERS - {part for name in own for part in name.split(".")}
    plain = {".".join(part for part in full.split(".") if part not in dropped): leaf for full, leaf in leaves.items()}
    return plain if len(plain) == len(leaves) and plain.keys() != leaves.keys() else None
