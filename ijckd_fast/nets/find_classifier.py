"""Which layers of a net give its answer, from one run of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijckd_fast.errors import UserError
from ijckd_fast.nets.classifiers import Classifier, has_bias, is_linear
from ijckd_fast.nets.equality import same


class Head(NamedTuple):
    """A layer that may be a classifier, and what it was given and made in its last call."""

    layer: nn.Module
    given: Tensor
    made: Tensor


class Answer(NamedTuple):
    """The classifier; its answer, by the number of the tensor that the net returns; its input [B, C] and its output
    [B, K].
    """

    classifier: Classifier
    number: int
    pooled: Tensor
    logits: Tensor


def classifier_width(layer: nn.Module, num_classes: int) -> int | None:
    """C, of a layer that may be a classifier from C channels to so many classes."""
    if isinstance(layer, nn.Linear):
        return layer.in_features if layer.out_features == num_classes else None
    if isinstance(layer, nn.Conv2d) and is_linear(layer):
        return layer.in_channels if layer.out_channels == num_classes else None
    return None


def may_classify(layer: nn.Module, made: Any, num_classes: int) -> bool:
    """Whether what a layer made may be the answer of a net, or part of it."""
    if not isinstance(made, Tensor):
        return False
    if isinstance(layer, nn.Linear):
        return True
    is_map = made.dim() == 4
    is_answer = made.dim() == 2 or (is_map and (made.shape[1] == num_classes or made.shape[2:].numel() == 1))
    return is_answer and is_linear(layer)


def find_classifier(heads: Mapping[str, Head], returned: Sequence[Tensor], num_classes: int, name: str) -> Answer:
    """The classifier of a net.

    heads     by name, in the order of their calls
    returned  what the net returns
    name      of the net, for errors
    raises    UserError where its answer is not that of one linear layer on a vector
    """
    found: dict[str, int] = {}  # linear layers, and the number of the tensor that is its output
    for path, (layer, pooled, made) in reversed(list(heads.items())):
        answers = [i for i, logits in enumerate(returned) if torch.equal(made, logits)]
        if not answers or not isinstance(layer, nn.Linear) or pooled.dim() != 2:
            continue
        if torch.equal(F.linear(pooled, layer.weight, layer.bias), made):
            found[path] = answers[0]
    classifiers = [path for path in found if heads[path].made.shape[1] == num_classes]
    if len({found[path] for path in classifiers}) > 1:
        raise UserError(
            f"model {name!r} returns what {len(classifiers)} classifiers say"
            f" ({', '.join(map(repr, reversed(classifiers)))}), expected one: let its forward return the answer of"
            " one of them only"
        )
    if len(classifiers) == 1:  # of several with one answer the mean is that too
        path = classifiers[0]
        head = heads[path]
        return Answer(Classifier((path,), (head.layer,)), found[path], head.given, head.made)
    for answer in itertools.chain(_convolutions(heads, returned), _averages(heads, returned)):
        if answer.logits.shape[1] == num_classes:
            return answer
        found[answer.classifier.paths[0]] = answer.number
    if found:
        classes = returned[next(iter(found.values()))].shape[1]
        raise UserError(
            f"model {name!r} classifies {classes} classes, expected {num_classes} as in the data: build it for"
            f" {num_classes}"
        )
    raise no_classifier(name, _several(heads, returned, num_classes))


def _convolutions(heads: Mapping[str, Head], returned: Sequence[Tensor]) -> Iterator[Answer]:
    """1x1 convolutions, on the pooled vector or on the map: the mean over the positions commutes with them."""
    for path, (layer, given, made) in reversed(list(heads.items())):
        if isinstance(layer, nn.Conv2d) and given.dim() == made.dim() == 4:
            yield from _checked(Classifier((path,), (layer,)), given.mean((2, 3)), made.mean((2, 3)), returned)


def _averages(heads: Mapping[str, Head], returned: Sequence[Tensor]) -> Iterator[Answer]:
    """Layers that see the same vector, and whose answers are averaged."""
    last = {path: head for path, head in heads.items() if head.given.dim() == head.made.dim() == 2}
    for path, head in reversed(list(last.items())):
        others = [
            other
            for other, (_, given, made) in last.items()
            if given.shape == head.given.shape and made.shape == head.made.shape and torch.equal(given, head.given)
        ]
        alike = len({has_bias(last[other].layer) for other in others}) == 1
        if len(others) > 1 and alike and path == others[-1]:
            made = torch.stack([last[other].made for other in others]).mean(0)
            classifier = Classifier(tuple(others), tuple(last[other].layer for other in others))
            yield from _checked(classifier, head.given, made, returned)


def _checked(classifier: Classifier, pooled: Tensor, made: Tensor, returned: Sequence[Tensor]) -> Iterator[Answer]:
    """The answer, if the net returns it and it is that of the one linear layer on the pooled vector."""
    linear = classifier.linear().state_dict()
    for i, logits in enumerate(returned):
        if same(made.flatten(1), logits.flatten(1)) and same(F.linear(pooled, **linear), made):
            yield Answer(classifier, i, pooled, made)
            return


def _several(heads: Mapping[str, Head], returned: Sequence[Tensor], num_classes: int) -> str:
    """Why several classifiers are not one, if there are several."""
    last = {path: h for path, h in heads.items() if isinstance(h.layer, nn.Linear) and h.made.shape[-1] == num_classes}
    if len(last) < 2:
        return ""
    names = " and ".join(map(repr, last)) if len(last) < 3 else f"{len(last)} classifiers"
    made = [head.made for head in last.values()]
    if all(x.shape == made[0].shape for x in made) and any(same(torch.stack(made).mean(0), x) for x in returned):
        return f" (its answer is the mean of those of {names}, which see different vectors, such as two tokens)"
    return f" (its answer is made of those of {names})"


def no_classifier(name: str, why: str = "") -> UserError:
    """What to raise for a net without a linear layer on a vector as its last."""
    plain = name.replace("_distilled", "")
    if plain != name:
        choice = f"take {plain!r}, the same net with one token and one classifier"
    elif "crossvit" in name:
        choice = "take a net with one class token, such as 'timm/deit_small_patch16_224'"
    else:
        choice = "choose another model"
    return UserError(
        f"model {name!r} does not end in one linear layer on a pooled vector{why}, expected as the classifier: {choice}"
    )
