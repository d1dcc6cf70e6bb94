"""What scripts/zoo asks of one net: its taps, its steps as teacher and as student, its folding, its export."""

from __future__ import annotations

import contextlib
import copy
import itertools
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from zoo_nets import Net

from ijckd_fast.data import Batch
from ijckd_fast.distill import PRESETS, Distiller, Objective, get_objective
from ijckd_fast.errors import UserError
from ijckd_fast.export import compare_logits, deployed_module
from ijckd_fast.export.answers import FOLDING_TOLERANCE, ONNX_TOLERANCE
from ijckd_fast.nets import Tapped, create_model, fold_batch_norm, same
from ijckd_fast.nets.lively import lively
from ijckd_fast.setting import settings_of
from ijckd_fast.train import TrainStep, build_optimizer

CLASSES = 10
IMAGES = 2  # in a step
PARTNER = "timm/test_resnet"  # small, with a map, stages and BatchNorm
OTHER_SIDES = (224, 256, 299, 192, 384, 512)  # to try where a net wants images of another size and does not say which
LATE = 1000.0  # epochs done: behind every warm-up, so that each term has its own weight

Say = Callable[..., None]  # say(doing="...") before a check, say(column=value) after it


class Wrong(Exception):
    """A step whose result is not what it should be; the text says what."""


def check(net: Net, say: Say, *, image_size: int, step_size: int, objectives: Iterable[str], export: bool) -> None:
    """Every check of a net; what is found is said at once, so that a crash leaves what came before."""
    torch.manual_seed(0)
    say(doing="build")
    built = _built(net, image_size, say)
    if built is None:
        return
    model, side = built
    say(image_size=side, map=model.map_path or "", channels=model.channels, stages=len(model.stages))
    with lively(model):
        say(doing="taps")
        say(**_taps(model, side))  # whose forward also settles what copies of it then have
        say(doing="folding")
        say(**_folding(model, side))
    model, side = _for_steps(net, model, side, step_size)
    say(step_size=side)
    partner = create_model(PARTNER, CLASSES, image_size=side)
    frozen = copy.deepcopy(partner)
    for role, pair in (("student", (model, frozen)), ("teacher", (partner, model))):
        ended: dict[str, list[str]] = {"ok": [], "refused": [], "wrong": []}
        followed: set[str] = set()  # advice, with the objective that it is for
        for name in objectives:
            if role == "teacher" and not PRESETS[name].needs_teacher:
                continue
            say(doing=f"{name} as {role}")
            outcome, why = _outcome(*pair, side, name, {})
            ended[outcome].append(f"{name}: {why}" if outcome == "wrong" else name)
            if outcome == "refused":
                say(refusals=[why])
                for way in advised(why):
                    each = _options({"objective": name, **way})
                    if each in followed:
                        continue
                    followed.add(each)
                    say(doing=f"{_options(way)}, advised for {name} as {role}")
                    result, fault = _outcome(*pair, side, name, way)
                    say(advice=[f"{_options(way)}: {result}{f' ({fault})' if fault else ''}"])
        say(**{f"{role}_{outcome}": ("; " if outcome == "wrong" else " ").join(ended[outcome]) for outcome in ended})
    if export:
        say(doing="export")
        say(**_export(model, partner, side))


def _built(net: Net, image_size: int, say: Say) -> tuple[Tapped, int] | None:
    """The net and the size of its images: this one or, as its refusal advises, another one."""
    try:
        return create_model(net.full, CLASSES, image_size=image_size), image_size
    except UserError as error:
        refusal = str(error)
    say(refusals=[refusal])
    if not _IS_ABOUT_SIZE.search(refusal):
        return None
    own, named = _own_side(net), map(int, re.findall(r"--image-size (\d+)", refusal))
    for side in dict.fromkeys([*named, *([own] if own else []), *OTHER_SIDES]):
        try:
            model = create_model(net.full, CLASSES, image_size=side)
        except UserError as error:
            if not _IS_ABOUT_SIZE.search(str(error)):  # it takes this size, and is refused for what it is
                say(refusals=[str(error)])
                return None
            continue
        say(advice=[f"--image-size {side}: ok"])
        return model, side
    say(advice=["another image size: refused, whatever the size"])
    return None


def _for_steps(net: Net, model: Tapped, side: int, step_size: int) -> tuple[Tapped, int]:
    """The net for smaller images, on which steps take less time, and their size; as it is if it takes none."""
    if step_size >= side:
        return model, side
    with contextlib.suppress(UserError):
        smaller = create_model(net.full, CLASSES, image_size=step_size)
        if (smaller.map_path, smaller.channels) == (model.map_path, model.channels):
            return smaller, step_size
    return model, side


_IS_ABOUT_SIZE = re.compile(r"image size|--image-size")


def _own_side(net: Net) -> int | None:
    """Side of the images that timm's record of a net names."""
    import timm

    config = timm.get_pretrained_cfg(net.name) if net.library == "timm" else None
    return None if config is None else config.input_size[-1]


def _images(count: int, side: int, seed: int) -> Tensor:
    """[count, 3, side, side], of noise, as a trainer has them."""
    images = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))
    return images.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def _taps(model: Tapped, side: int) -> dict[str, Any]:
    """Whether the map's mean is what the classifier sees, on other images than those that it was found with."""
    images = _images(3, side, seed=1)
    model.keep_map_to_match()
    if model.match_channels is None:
        return {"map_use": "", "map_check": "", "side": ""}
    map_, pooled = model.features(images, need_map=True)
    assert map_ is not None
    assert model.classifier is not None
    means, found = map_.mean((2, 3)), {"side": map_.shape[-1]}  # [3, C]
    shapes = map_.dim() == 4 and means.shape == (3, model.match_channels) and pooled.shape == (3, model.channels)
    if not (shapes and bool(map_.isfinite().all()) and same(model.classifier(pooled), model(images))):
        return found | {"map_check": f"WRONG: map {list(map_.shape)}, pooled {list(pooled.shape)}"}
    if model.matches_only:
        return found | {"map_use": "match only", "map_check": "ok"}
    worst = float((means - pooled).abs().max() / pooled.abs().max())
    return found | {"map_use": "pooled", "map_check": "ok" if same(means, pooled) else f"WRONG: by {worst:.1e}"}


@torch.no_grad()
def _folding(model: Tapped, side: int) -> dict[str, Any]:
    """How many BatchNorms are folded, and by how much map and pooled vector then differ."""
    model = copy.deepcopy(model).eval()
    images = _images(2, side, seed=2)
    need_map = model.match_channels is not None
    before = model.features(images, need_map)
    norms = sum(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in model.net.modules())
    folded = fold_batch_norm(model.net, images)
    after = model.features(images, need_map)
    found = [(b, a) for b, a in zip(before, after, strict=True) if b is not None and a is not None]
    worst = max(float((a - b).abs().max() / b.abs().max()) for b, a in found)
    right = worst <= FOLDING_TOLERANCE  # in a deep net with lively weights rounding alone makes 1e-4
    return {"norms": norms, "folded": folded, "fold_difference": f"{worst:.1e}" if right else f"WRONG: {worst:.1e}"}


def _outcome(student: Tapped, teacher: Tapped, side: int, name: str, changes: dict[str, str]) -> tuple[str, str]:
    """('ok', ''), ('refused', the sentence) or ('wrong', what is). The teacher is frozen in place."""
    try:
        _step(copy.deepcopy(student), teacher, side, name, changes)
    except UserError as error:
        return "refused", str(error)
    except Wrong as error:
        return "wrong", str(error)
    except Exception as error:  # which no net should raise
        return "wrong", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return "ok", ""


def _step(student: Tapped, teacher: Tapped, side: int, name: str, changes: dict[str, str]) -> None:
    """One step of training as the trainer does it. Wrong, if it is not as it should be."""
    settings = {"objective": name, **_typed(changes)}
    objective = get_objective(settings.pop("objective"), **settings)
    torch.manual_seed(0)
    distiller = Distiller(student, teacher if objective.needs_teacher else None, objective)
    distiller.to(memory_format=torch.channels_last).train()
    optimizer = build_optimizer(
        distiller, name="sgd", lr=0.01, momentum=0.0, nesterov=False, betas=(0.9, 0.999), weight_decay=0.0,
        decay_norms=True,
    )  # fmt: skip
    labels = torch.arange(IMAGES) % CLASSES
    batch = Batch(_images(IMAGES, side, seed=3), labels, labels)
    weights = [p.detach().clone() for p in distiller.parameters()]
    figures = TrainStep(distiller, optimizer, torch.device("cpu"))(batch, step=0, lr=0.01, progress=LATE)
    loss = float(figures["loss"])
    if not bool(figures["ok"]):
        raise Wrong(f"loss {loss}, gradient {float(figures['grad_norm'])}")
    parts = {part: float(value) for part, value in figures.items() if part not in _NO_PARTS}
    composed = sum(getattr(objective, part, 1.0) * value for part, value in parts.items())
    if abs(loss - composed) > 1e-4 * max(1.0, abs(composed)):
        raise Wrong(f"the loss is {loss}, its weighted parts make {composed}")
    idle = [key for key, p in distiller.named_parameters() if p.requires_grad and p.grad is None]
    if idle:
        raise Wrong(f"{len(idle)} parameters without gradient ({', '.join(idle[:3])})")
    if all(map(torch.equal, weights, distiller.parameters())):
        raise Wrong("no weight has changed")
    if distiller.teacher is not None:
        moved = [key for key, p in distiller.teacher.named_parameters() if p.requires_grad or p.grad is not None]
        if moved or any(part.training for part in distiller.teacher.modules()):
            raise Wrong(f"the teacher is not frozen ({', '.join(moved[:3])})")


_NO_PARTS = ("ok", "overflow", "loss", "grad_norm", "correct")

_SETTINGS = {"objective", *settings_of(Objective)}
# A setting with its value, as sentences name it: --match pooled, match 'pooled', objective 'kd', a 'linear' connector.
_NAMED = re.compile(
    r"--(?P<option>[a-z-]+) '?(?P<value>[\w.-]+(?::\d+)?)'?"
    r"|\b(?P<word>objective|match|connector) '(?P<quoted>[\w-]+(?::\d+)?)'"
    r"|'(?P<kind>linear|mlp|conv1x1)'"
)


def advised(refusal: str) -> list[dict[str, str]]:
    """The settings of an objective that a refusal advises, each way for itself; [] where it names none."""
    ways: list[dict[str, str]] = []
    for clause in re.split(r"; |, or |, |: ", refusal):
        values: dict[str, list[str]] = {}
        for found in _NAMED.finditer(clause):
            name = (found["option"] or found["word"] or "connector").replace("-", "_")
            if name in _SETTINGS:
                values.setdefault(name, []).append(found["value"] or found["quoted"] or found["kind"])
        for chosen in itertools.product(*values.values()):
            way = dict(zip(values, chosen, strict=True))
            if way and way not in ways:
                ways.append(way)
    return ways


def _options(way: Mapping[str, str]) -> str:
    return " ".join(f"--{option.replace('_', '-')} {value}" for option, value in way.items())


def _typed(way: Mapping[str, str]) -> dict[str, Any]:
    """With numbers as numbers."""
    return {name: float(value) if re.fullmatch(r"[\d.]+", value) else value for name, value in way.items()}


def _export(model: Tapped, partner: Tapped, side: int) -> dict[str, str]:
    """Whether the deployed net is written as ONNX and answers as PyTorch does."""
    from ijckd_fast.export.onnx_file import onnx_answer, onnx_bytes

    objective = get_objective("ijckd" if model.has_map else "kd")
    student = copy.deepcopy(model)
    distiller = Distiller(student, partner, objective)
    images = _images(2, side, seed=4).contiguous()
    with lively(student), tempfile.TemporaryDirectory() as folder, torch.no_grad():
        distiller.eval().predict(images)
        deployed = deployed_module(distiller, side)
        path = Path(folder, "model.onnx")
        try:
            path.write_bytes(onnx_bytes(deployed, side, {}))
            answer = onnx_answer(path)(images)
        except UserError as error:
            return {"export": f"refused: {error}"}
        compared = compare_logits(answer, deployed(images))
        rounding = compare_logits(deployed(images), deployed.double()(images.double()))
    difference = f"{compared.difference / compared.scale:.1e}"
    # Lively weights magnify rounding in a deep net: PyTorch's own error says by how much.
    allowed = max(ONNX_TOLERANCE, 4 * rounding.difference / rounding.scale)
    return {"export": difference if compared.within(allowed) else f"WRONG: {difference}"}


def objective_named(name: str) -> str:
    """The name; UserError for none of an objective."""
    return get_objective(name).name
