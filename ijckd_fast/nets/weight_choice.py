"""A net's weights out of a file: the set that fits, which of several, and what is said about it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ijckd_fast.errors import UserError, one_of
from ijckd_fast.nets.weight_files import SHARDED, listing
from ijckd_fast.nets.weight_sets import Leaf, Search, WeightSet, is_counter, leaves_of, without_wrappers

AUTO, EMA, RAW = "auto", "ema", "raw"
_OPTIONS = "--teacher-weights or --student-weights"
_BY_ORDER = "--rename-by-order"
_AVERAGED = re.compile(r"(?<![a-z])(ema|swa|avg|averaged?|averages|shadow)(?![a-z])")


class Found(NamedTuple):
    """Weights under a net's own names.

    weights  where no set of the file fits, the nearest one, for an error that says what differs
    notes    sentences on how they were found; none where nothing needs to be said
    hint     for that error: what else the file holds, what may help
    """

    weights: dict[str, Tensor]
    notes: tuple[str, ...] = ()
    hint: str = ""


def find_weights(
    content: Any,
    own: Mapping[str, Tensor],
    classifier: str,
    origin: str,
    *,
    choice: str = AUTO,
    by_order: bool = False,
    left_out: Sequence[str] = (),
) -> Found:
    """Finds a net's weights in what `read_file` gave.

    The net's names may stand behind any prefix and in dicts at any depth. A set of tensors is the net's if it has all
    of its names and no others, counters of other tools aside; the classifier alone may lie elsewhere.

    content     nested dicts of tensors
    own         the net's state, in its own order
    classifier  path of its last layer
    origin      what to call the file in errors
    choice      which of several sets: 'ema' (averaged weights), 'raw' (those in training), or the name that it stands
                under; 'auto': averaged weights where the file says that its tool evaluates them, else the raw ones
    by_order    where no names fit, take tensors of equal shapes in their order
    left_out    prefixes of layers that the net was built without
    raises      UserError where there are no weights, or several sets and none is chosen
    """
    content, choice, is_ours = _of_our_checkpoint(content, origin, choice)
    leaves = dict(leaves_of(content))
    if not leaves:
        raise UserError(
            f"checkpoint {origin!r} holds no model weights, expected a state_dict (names to tensors), alone or under"
            f" any name: save one with torch.save(model.state_dict(), path). It holds {listing(content)}"
        )
    _refuse_pieces(leaves, origin)
    search = Search(own, classifier, left_out)
    sets = search.sets(leaves)
    if not any(search.fits(each) for each in sets) and (plain := without_wrappers(leaves, own)) is not None:
        leaves, sets = plain, search.sets(plain)
    fitting = [each for each in sets if search.fits(each)]
    notes: list[str] = []
    # Of sets with the right names and other shapes one is enough: it is for the error.
    candidates = [each for each in fitting if search.shapes_fit(each, leaves)] or fitting[:1]
    if not candidates:
        ordered = search.in_order(leaves)
        if by_order and not ordered:
            raise UserError(
                f"{origin} does not fit by its names, and not by its order, which {_BY_ORDER} asks for:"
                f" {search.why_not_in_order(leaves)}. Name the model that these weights belong to"
            )
        if not by_order:
            return _nearest(sets, leaves, own, origin, content, bool(ordered))
        candidates = ordered
        pairs = [f"{full!r} as {name!r}" for name, full in ordered[0].names.items()][:3]
        notes.append(
            f"its names are others, its tensors are taken in their order ({', '.join(pairs)}, ...): right only if the"
            " layers stand in the same order in both nets, which shows in what the net then gets right"
        )
    chosen = _chosen(candidates, leaves, content, choice, origin, notes)
    notes += _notes(chosen, leaves, own, by_order=bool(notes and not fitting))
    _refuse_no_numbers(chosen, leaves, own, origin)
    weights = {name: leaves[full].tensor for name, full in chosen.names.items()}
    # What a net makes of its sizes it has already; BatchNorm does without its counter.
    weights |= {name: own[name] for name in own if name not in weights and not name.endswith("num_batches_tracked")}
    return Found(weights, () if is_ours else tuple(f"{origin}: {note}" for note in notes))


def is_run_checkpoint(content: Any) -> bool:
    """Whether what `read_file` gave is a checkpoint of a run of ours."""
    return isinstance(content, Mapping) and isinstance(content.get("learner"), Mapping)


def _of_our_checkpoint(content: Any, origin: str, choice: str) -> tuple[Any, str, bool]:
    """(the part of a run's checkpoint that is asked for, the choice that is left, whether it is one)"""
    if not is_run_checkpoint(content):
        return content, choice, False
    live = content.get("live")  # the weights in training where `learner` holds averages
    if choice == EMA and live is None:
        raise UserError(f"{origin} holds no averaged weights, which {_OPTIONS} ema asks for: leave that out")
    key = "live" if choice == RAW and live is not None else "learner"
    return {key: content[key]}, AUTO if choice in (EMA, RAW) else choice, True


def _chosen(
    candidates: Sequence[WeightSet],
    leaves: Mapping[str, Leaf],
    content: Any,
    choice: str,
    origin: str,
    notes: list[str],
) -> WeightSet:
    """One of the candidates; adds to `notes` where there are several."""
    kinds = {each.prefix: _kind(each, leaves, content) for each in candidates}
    titles = [f"{each.title!r}" + (" (EMA)" if kinds[each.prefix] == EMA else "") for each in candidates]
    if choice in (EMA, RAW):
        chosen = [each for each in candidates if kinds[each.prefix] == choice]
    elif choice != AUTO:
        chosen = [each for each in candidates if each.title == choice] or [
            each for each in candidates if f".{choice}." in f".{each.prefix}"
        ]
    elif _all_equal(candidates, leaves):
        return candidates[0]
    else:
        of_tool = EMA if _evaluates_averages(content) else RAW
        chosen = [each for each in candidates if kinds[each.prefix] == of_tool] or list(candidates)
    if len(chosen) == 1:
        if len(candidates) > 1:
            why = ", which its tool evaluates" if choice == AUTO and kinds[chosen[0].prefix] == EMA else ""
            notes.append(
                f"it holds {len(candidates)} sets of weights, {_and(titles)}: taken is {chosen[0].title!r}{why};"
                f" {_OPTIONS} ema, raw or a name takes another"
            )
        return chosen[0]
    if not chosen:
        raise UserError(
            f"{origin} has no set of this net's weights that is {choice!r}, which {_OPTIONS} asks for: found"
            f" {_and(titles)}; give one of these names, or auto"
        )
    of_chosen = [each.title for each in chosen]
    raise UserError(
        f"{origin} holds {len(chosen)} sets of weights that fit, {_and(map(repr, of_chosen))}: say with {_OPTIONS}"
        f" which is meant, {one_of(of_chosen)}"
    )


def _kind(found: WeightSet, leaves: Mapping[str, Leaf], content: Any) -> str:
    """EMA for averaged weights, by their name or by the counter that torch's AveragedModel has; else RAW."""
    if _swapped(content):
        return EMA if found.prefix.startswith("state_dict.") else RAW
    counted = any(full.rpartition(".")[2] == "n_averaged" for full in found.beside)
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", found.prefix).lower()  # modelEMA
    return EMA if counted or _AVERAGED.search(words) else RAW


def _swapped(content: Any) -> bool:
    """MMEngine and Lightning's WeightAveraging save the averages as state_dict, those in training beside it."""
    if not isinstance(content, Mapping) or "state_dict" not in content:
        return False
    return "current_model_state" in content or ("ema_state_dict" in content and "meta" in content)


def _evaluates_averages(content: Any) -> bool:
    """Whether a file is of a tool that evaluates and publishes the averages: besides those of `_swapped` timm, BasicSR
    and torchvision's scripts (DeiT's has the same keys, and evaluates the others).
    """
    if not isinstance(content, Mapping):
        return False
    args = content.get("args")
    of_torchvision = "model_ema_steps" in (args if isinstance(args, Mapping) else getattr(args, "__dict__", {}))
    by_keys = {"state_dict", "state_dict_ema"} <= content.keys() or {"params", "params_ema"} <= content.keys()
    return _swapped(content) or by_keys or ("model_ema" in content and of_torchvision)


def _all_equal(candidates: Sequence[WeightSet], leaves: Mapping[str, Leaf]) -> bool:
    first, *others = candidates
    return all(
        torch.equal(leaves[full].tensor, leaves[each.names[name]].tensor)
        for each in others
        for name, full in first.names.items()
    )


def _notes(found: WeightSet, leaves: Mapping[str, Leaf], own: Mapping[str, Tensor], by_order: bool) -> list[str]:
    """What was done to the names, and what of the same dicts is not taken."""
    notes = []
    some = next(iter(found.names.values()))
    dicts = "".join(f"{key}." for key in leaves[some].container)
    inside = "" if dicts.startswith(found.prefix) else found.prefix.removeprefix(dicts)
    if inside and not by_order:
        notes.append(f"its names are read without their prefix {inside!r}")
    head = [full for name, full in found.names.items() if full != found.prefix + name]
    if head and not by_order and not found.prefix.endswith("student.net."):
        notes.append(f"its classifier is {head[0].rpartition('.')[0]!r}")
    of_net = {name.rpartition(".")[2] for name in own}  # its own counters, under other names
    counters = [full for full in found.beside if is_counter(full) and full.rpartition(".")[2] not in of_net]
    around = [c for c in counters if c.startswith(found.prefix) or found.prefix.startswith(c.rpartition(".")[0])]
    for what, names in (
        ("ignored, nothing depends on them", around),
        ("not taken", [n for n in found.beside if not is_counter(n)]),
    ):
        if names:
            few = ", ".join(map(repr, names[:3]))
            notes.append(f"{what}: {few}{f' and {len(names) - 3} more' if len(names) > 3 else ''}")
    kinds = {leaves[full].tensor.dtype for name, full in found.names.items() if own[name].is_floating_point()}
    others = sorted(str(kind).removeprefix("torch.") for kind in kinds - {torch.float32})
    if others:
        notes.append(f"its {' and '.join(others)} weights are taken as float32")
    return notes


def _nearest(
    sets: Sequence[WeightSet],
    leaves: Mapping[str, Leaf],
    own: Mapping[str, Tensor],
    origin: str,
    content: Any,
    in_order: bool,
) -> Found:
    """The set with the fewest differences, with what is foreign in it."""
    if sets and sets[0].prefix.endswith("student.net.") and len(sets[0].names) > 1:
        raise UserError(
            f"checkpoint {origin!r} is of a student without a classifier of its own (it answers through its"
            " teacher's), expected a whole model: give a checkpoint of an objective that trains the student's"
            " classifier (ce, kd, dkd, fitnet, at, srrl)"
        )
    hint = f"; the file holds {listing(content)}"
    if in_order:
        hint = (
            f"; or, since its tensors have this net's shapes one after the other and only the names differ, load them"
            f" with {_BY_ORDER}{hint}"
        )
    if not sets:
        return Found({full: leaf.tensor for full, leaf in leaves.items() if not is_counter(full)}, hint=hint)
    nearest = sets[0]
    weights = {name: leaves[full].tensor for name, full in nearest.names.items()}
    weights |= {full.removeprefix(nearest.prefix): leaves[full].tensor for full in nearest.foreign}
    return Found(weights, hint=hint)


def _refuse_pieces(leaves: Mapping[str, Leaf], origin: str) -> None:
    kinds = {type(leaf.tensor).__name__ for leaf in leaves.values()}
    if kinds & {"DTensor", "ShardedTensor"} or any(full.endswith("_flat_param") for full in leaves):
        raise UserError(f"checkpoint {origin!r} {SHARDED}")


def _refuse_no_numbers(found: WeightSet, leaves: Mapping[str, Leaf], own: Mapping[str, Tensor], origin: str) -> None:
    for name, full in found.names.items():
        tensor = leaves[full].tensor
        if own[name].is_floating_point() and not tensor.is_floating_point():
            raise UserError(
                f"{origin}: tensor {full!r} is {str(tensor.dtype).removeprefix('torch.')} (of a quantised net?),"
                " expected floating-point weights: take the weights from before they were quantised"
            )
        if tensor.is_meta or tensor.layout != torch.strided:
            what = "has a shape and no values (device meta)" if tensor.is_meta else "is sparse"
            raise UserError(f"{origin}: tensor {full!r} {what}, expected dense weights: save the net itself again")


def _and(names: Any) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
