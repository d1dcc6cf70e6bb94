"""One training step: what it computes with every option, a bad one changes nothing, and none waits for the device."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from host_waits import HostWaits
from tiny_run import differing
from torch import nn

from ijckd_fast.data import Batch
from ijckd_fast.distill import Distiller, get_objective
from ijckd_fast.errors import UserError, out_of_memory
from ijckd_fast.nets import Tapped, create_model
from ijckd_fast.train import Ema, FiniteGuard, Meter, TrainStep, build_optimizer

CPU = torch.device("cpu")
OPTIMIZERS = ["sgd", "adamw", "lamb"]


class _Plain(nn.Module):
    """No BatchNorm, so that a batch and its parts compute the same."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 3)

    def forward(self, images):
        return self.fc(F.relu(self.conv(images)).mean((2, 3)))


def _distiller(objective="ce", *, norm=True, head="fused", **changes):
    torch.manual_seed(0)
    student = create_model("resnet8x0.25", 3, image_size=16) if norm else Tapped(_Plain(), "plain", 3, 16)
    goal = get_objective(objective, **changes)
    teacher = create_model("resnet8x0.5", 3, image_size=16) if goal.needs_teacher else None
    return Distiller(student, teacher, goal, head=head).train()


def _optimizer(distiller, name="sgd", **changes):
    settings = {
        "lr": 0.05, "momentum": 0.9, "nesterov": False, "betas": (0.9, 0.99), "weight_decay": 1e-2, "decay_norms": True,
    }  # fmt: skip
    return build_optimizer(distiller, name=name, **{**settings, **changes})


def _step_of(distiller, name="sgd", *, settings=None, **options):
    return TrainStep(distiller, _optimizer(distiller, name, **(settings or {})), CPU, **options)


def _batch(seed=0, size=8, mixup=False):
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 16, 16, generator=draw)
    labels, other = torch.randint(0, 3, (2, size), generator=draw)
    mix = torch.rand(size, generator=draw)
    return Batch(images, labels, torch.arange(size), *((other, mix) if mixup else ()))


def _run(step, batches, pooled_t=None, lr=0.05):
    return [
        {name: figure.clone() for name, figure in step(batch, pooled_t, step=i, lr=lr, progress=i + 1).items()}
        for i, batch in enumerate(batches)
    ]


def _weights(distiller):
    return {name: tensor.clone() for name, tensor in distiller.state_dict().items()}


def _same(ours, wanted, **tolerance):
    for name in wanted:
        torch.testing.assert_close(ours[name], wanted[name], **tolerance)


# --- an ordinary step


@pytest.mark.parametrize("objective", ["ce", "ijckd", "fitnet", "at"])
def test_without_options_it_is_a_step_written_by_hand(objective):
    ours, theirs = _distiller(objective), _distiller(objective)
    step = _step_of(ours)
    optimizer = torch.optim.SGD(theirs.parameters(), 0.05, 0.9, weight_decay=1e-2, fused=False)
    for i in range(3):
        batch = _batch(i)
        (figures,) = _run(step, [batch])
        optimizer.zero_grad()
        out = theirs(batch.images, batch.labels, progress=0)
        out.loss.backward()
        norm = torch.cat([p.grad.flatten() for p in theirs.parameters()]).norm()
        optimizer.step()
        assert bool(figures["ok"])
        assert not bool(figures["overflow"])
        assert figures.keys() == {"ok", "overflow", "loss", "correct", "grad_norm", *out.parts}
        torch.testing.assert_close(figures["loss"], out.loss.detach())
        torch.testing.assert_close(figures["grad_norm"], norm)
        assert int(figures["correct"]) == int(out.correct)
        _same(_weights(ours), _weights(theirs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("source", ["teacher", "cache"])
@pytest.mark.parametrize("objective", ["ijckd-pooled", "dkd", "ce"])
def test_a_batch_in_parts_gives_the_update_of_the_whole(objective, source, parts):
    """Labels, mixing and cached features go with their images."""
    changes = {"connector": "linear", "match": "pooled"} if objective == "ijckd-pooled" else {}
    ends = []
    for accumulate in (1, parts):
        distiller = _distiller(objective, norm=False, **changes)
        pooled_t = torch.rand(8, distiller.teacher.channels if distiller.teacher else 1)
        pooled_t = pooled_t if source == "cache" and distiller.teacher else None
        (figures,) = _run(_step_of(distiller, accumulate=accumulate), [_batch(mixup=True)], pooled_t)
        ends.append((figures, _weights(distiller)))
    (whole, weights), (summed, of_parts) = ends
    assert summed.keys() == whole.keys()
    _same(summed, whole, rtol=1e-5, atol=1e-6)
    _same(of_parts, weights, rtol=1e-5, atol=1e-6)
    fresh = _distiller(objective, norm=False, **changes)
    assert differing(weights, _weights(fresh)) != []
    if source == "cache" and fresh.teacher:
        (by_teacher,) = _run(_step_of(fresh), [_batch(mixup=True)])
        assert abs(by_teacher["loss"] - whole["loss"]) > 1e-3


def test_statistics_in_parts_are_those_of_each_part():
    distiller, alone = _distiller(), _distiller()
    batch = _batch()
    _run(_step_of(distiller, accumulate=2), [batch])
    for rows in (slice(0, 4), slice(4, 8)):
        alone(batch.images[rows], batch.labels[rows], progress=0)
    buffers = dict(alone.named_buffers())
    _same(dict(distiller.named_buffers()), buffers)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_clipping_scales_the_gradient_and_reports_it_unscaled(optimizer):
    free = _distiller()
    before = _weights(free)
    (figures,) = _run(_step_of(free, settings={"weight_decay": 0.0}), [_batch()])
    norm = float(figures["grad_norm"])
    for most in (norm / 3, norm * 3):
        clipped = _distiller()
        step = _step_of(clipped, optimizer, settings={"weight_decay": 0.0}, clip=most)
        (seen,) = _run(step, [_batch()])
        assert float(seen["grad_norm"]) == pytest.approx(norm)
        applied = torch.cat([p.grad.flatten() for p in clipped.parameters()]).norm()
        assert float(applied) == pytest.approx(min(norm, most), rel=1e-4)
        if optimizer == "sgd":
            after, moved = _weights(free), _weights(clipped)
            for name, _ in free.named_parameters():
                wanted = (after[name] - before[name]) * min(1, most / norm)
                torch.testing.assert_close(moved[name] - before[name], wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("decay_norms", [True, False])
@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_adamw_and_lamb_are_the_libraries_own(name, decay_norms):
    ours, theirs = _distiller(), _distiller()
    step = _step_of(ours, name, settings={"decay_norms": decay_norms, "weight_decay": 0.1})
    parameters = list(theirs.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1]},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.1 if decay_norms else 0.0},
    ]
    if name == "adamw":
        reference = torch.optim.AdamW(groups, 0.02, (0.9, 0.99), weight_decay=0.1, foreach=False, fused=False)
    else:
        from timm.optim import Lamb

        reference = Lamb(groups, 0.02, betas=(0.9, 0.99), weight_decay=0.1, max_grad_norm=None, foreach=False)
    for i in range(4):
        batch = _batch(i)
        _run(step, [batch], lr=0.02)
        reference.zero_grad()
        theirs(batch.images, batch.labels, progress=0).loss.backward()
        reference.step()
    _same(_weights(ours), _weights(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_norms_and_biases_can_be_spared_weight_decay(name):
    """A gradient of zero leaves only the decay."""
    moved = {}
    for decay_norms in (True, False):
        distiller = _distiller()
        before = _weights(distiller)
        optimizer = _optimizer(distiller, name, decay_norms=decay_norms, weight_decay=0.5)
        for parameter in distiller.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        after = _weights(distiller)
        moved[decay_norms] = {n for n, p in distiller.named_parameters() if not torch.equal(after[n], before[n])}
    parameters = dict(distiller.named_parameters())
    assert moved[False] == {n for n, p in parameters.items() if p.dim() > 1}
    assert moved[True] - moved[False] == {n for n, p in parameters.items() if p.dim() == 1 and bool(p.any())}


def test_what_a_net_keeps_from_weight_decay_goes_with_the_norms():
    net = create_model("timm/test_vit", 3, image_size=32)
    options = {"name": "adamw", "lr": 0.1, "momentum": 0.0, "nesterov": False, "betas": (0.9, 0.99)}
    decayed, spared = build_optimizer(net, **options, weight_decay=0.5, decay_norms=False).param_groups
    names = {p: name for name, p in net.named_parameters()}
    assert {names[p] for p in spared["params"] if p.dim() > 1} == {"net.cls_token", "net.pos_embed"}
    assert {names[p] for p in decayed["params"]} | {names[p] for p in spared["params"]} == set(names.values())
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.5, 0.0)
    (all_of_them,) = build_optimizer(net, **options, weight_decay=0.5, decay_norms=True).param_groups
    assert len(all_of_them["params"]) == len(names)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_buffers_keep_their_dtype(dtype):
    """And move as those of a step without a guard: statistics in float32 would lose digits, or leave their net."""
    ours, theirs = (_distiller("ijckd-pooled").to(dtype) for _ in range(2))
    step = _step_of(ours)
    batch = _batch()
    batch = batch._replace(images=batch.images.to(dtype))
    _run(step, [batch])
    theirs(batch.images, batch.labels)
    buffers = dict(theirs.named_buffers())
    assert {b.dtype for b in buffers.values()} == {dtype, torch.int64}
    for name, buffer in ours.named_buffers():
        assert buffer.dtype == buffers[name].dtype
        assert torch.equal(buffer, buffers[name])


class _OfManyTypes(nn.Module):
    """A layer and a BatchNorm of each dtype, one after the other."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Sequential(nn.BatchNorm1d(4, dtype=dtype), nn.Linear(4, 4, dtype=dtype))
            for dtype in (torch.float32, torch.float64, torch.bfloat16)
        )

    def forward(self, x):
        for part in self.parts:
            x = part(x.to(part[1].weight.dtype))
        return x


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_net_of_several_dtypes_keeps_each(name):
    """Parameters, statistics and counts, momenta and averages; a step moves them as without a guard, a bad one not at
    all.
    """
    torch.manual_seed(0)
    ours = _OfManyTypes()
    theirs = copy.deepcopy(ours)
    optimizers = _optimizer(ours, name), _optimizer(theirs, name)
    guard, ema = FiniteGuard(ours, optimizers[0], CPU), Ema(ours, 0.9)
    expected = theirs.state_dict()
    assert {value.dtype for value in expected.values()} == {torch.float32, torch.float64, torch.bfloat16, torch.int64}
    for i, images in enumerate(torch.randn(3, 6, 4)):
        bad = i == 1 and name != "lamb"  # whose count of steps takes in a bad one
        for net, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            if net is ours:
                guard.before_forward()
            elif bad:
                continue
            loss = net(images).double().square().mean() * (math.nan if bad else 1)
            loss.backward()
            if net is ours:
                ok, _ = guard.judge(loss)
                assert bool(ok) != bad
                guard.update(ok)
            else:
                optimizer.step()
        ema.update(i + 1)
        for key, value in ours.state_dict().items():
            assert value.dtype == expected[key].dtype
            assert torch.equal(value, theirs.state_dict()[key]), key
    for parameter, state in optimizers[0].state.items():
        moments = [value for value in state.values() if isinstance(value, torch.Tensor) and value.dim()]
        assert {value.dtype for value in moments} == {parameter.dtype}
    with ema.swapped_in():
        averaged = ours.state_dict()
        assert [key for key, value in averaged.items() if value.dtype != expected[key].dtype] == []


# --- a bad step


def _state(step, distiller):
    states = step._optimizer.state_dict()["state"].values()
    return copy.deepcopy({"learner": distiller.state_dict(), "optimizer": [dict(state) for state in states]})


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_nan_batch_changes_nothing(name, accumulate):
    """As the first step and as a later one; of four parts one image in one part is enough."""
    distiller = _distiller("ijckd")
    step = _step_of(distiller, name, accumulate=accumulate, clip=1.0)
    bad = _batch()
    bad.images[5, 0, 0, 0] = float("nan")
    fresh = _state(step, distiller)["learner"]
    (figures,) = _run(step, [bad])
    assert not bool(figures["ok"])
    assert not bool(figures["overflow"])
    assert differing(fresh, _state(step, distiller)["learner"]) == []
    moments = [x for state in step._optimizer.state.values() for x in state.values()]
    assert not any(bool(x.any()) for x in moments)

    _run(step, [_batch(1), _batch(2)])
    later = _state(step, distiller)
    assert differing(fresh, later["learner"]) != []
    (figures,) = _run(step, [bad])
    assert not bool(figures["ok"])
    assert differing(later, _state(step, distiller)) == []
    (figures,) = _run(step, [_batch(3)])
    assert bool(figures["ok"])


def test_the_average_takes_in_a_skipped_steps_unchanged_weights():
    """The average is of weights over steps, and a skipped step has weights too: it draws a little nearer to them."""
    distiller = _distiller()
    step = _step_of(distiller, ema_decay=0.9)
    _run(step, [_batch(0)])
    average = {name: tensor.clone() for name, tensor in step.ema.state_dict().items()}
    bad = _batch()
    bad.images.fill_(float("nan"))
    step(bad, step=1, lr=0.05, progress=0)
    live, decay = distiller.state_dict(), 3 / 12
    for name, tensor in step.ema.state_dict().items():
        torch.testing.assert_close(tensor, average[name] * decay + live[name] * (1 - decay))


# --- float16's loss scale


def _scaled(accumulate=1, name="sgd", **options):
    distiller = _distiller(head="reference")
    step = _step_of(distiller, name, amp_dtype=torch.float16, accumulate=accumulate, **options)
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return distiller, step


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_overflow_halves_the_scale_and_the_next_step_is_fine(name, accumulate):
    distiller, step = _scaled(accumulate, name)
    meter = Meter(CPU)
    (figures,) = _run(step, [_batch()])
    assert bool(figures["ok"])
    meter.add(figures)
    step.scaler.update(2.0**40)
    before = _state(step, distiller)
    (figures,) = _run(step, [_batch(1)])
    assert (bool(figures["ok"]), bool(figures["overflow"])) == (False, True)
    assert math.isfinite(float(figures["loss"]))
    assert differing(before, _state(step, distiller)) == []
    assert step.scaler.get_scale() == 2.0**39
    meter.add(figures)
    bad = _batch(2)
    bad.images.fill_(float("nan"))
    step.scaler.update(2.0**10)
    (figures,) = _run(step, [bad])
    assert (bool(figures["ok"]), bool(figures["overflow"])) == (False, False)
    meter.add(figures)
    (figures,) = _run(step, [_batch(3)])
    assert bool(figures["ok"])
    meter.add(figures)
    means, skipped, overflows = meter.take()
    assert (skipped, overflows) == (1, 1)
    assert math.isfinite(means["loss"])


def test_the_scale_is_not_in_what_is_learnt():
    (plain, ordinary), (scaled, step) = [_scaled(clip=0.5) for _ in range(2)]
    ordinary.scaler = torch.amp.GradScaler("cpu", enabled=False)
    batches = [_batch(i) for i in range(3)]
    for ours, wanted in zip(_run(step, batches), _run(ordinary, batches), strict=True):
        _same(ours, wanted, rtol=1e-2, atol=2e-3)
    _same(_weights(scaled), _weights(plain), rtol=1e-2, atol=2e-3)


def test_only_float16_gets_a_scale():
    for dtype, enabled in ((None, False), (torch.bfloat16, False), (torch.float16, True)):
        assert _step_of(_distiller(), amp_dtype=dtype).scaler.is_enabled() is enabled


# --- no step waits


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("clip", "ema_decay"), [(None, 0.0), (1.0, 0.9)])
@pytest.mark.parametrize("scaler", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_no_step_waits_for_the_device(name, accumulate, clip, ema_decay, scaler, cached):
    """LAMB reads its own count of steps, which timm keeps in the host's memory: that is not a wait."""
    distiller = _distiller("ijckd-pooled", connector="linear")
    step = _step_of(distiller, name, accumulate=accumulate, clip=clip, ema_decay=ema_decay)
    if scaler:
        step.scaler = torch.amp.GradScaler("cpu", enabled=True)
    pooled_t = torch.rand(4, distiller.teacher.channels) if cached else None
    meter, batch = Meter(CPU), _batch(size=4, mixup=True)
    with HostWaits() as waits:
        for i in range(3):
            meter.add(step(batch, pooled_t, step=i, lr=0.05, progress=0.0))
    assert waits.count == (3 * len(step._optimizer.param_groups) if name == "lamb" else 0)


@pytest.mark.parametrize("head", ["fused", "reference"])
def test_no_comparison_of_stages_waits_for_the_device(head):
    """All of them, fused too, and one through the regressor."""
    distiller = _distiller("at", hint=1.0, review=1.0, head=head)
    step = _step_of(distiller, accumulate=2, ema_decay=0.9)
    batch = _batch(size=4, mixup=True)
    with HostWaits() as waits:
        for i in range(3):
            step(batch, step=i, lr=0.05, progress=0.0)
    assert waits.count == 0


def test_no_loss_of_logits_waits_for_the_device():
    through = {f"{name}_head": "teacher" for name in ("kl", "dkd", "hard", "ttm", "nkd", "dist")}
    weights = dict.fromkeys(
        ["kl", "dkd_alpha", "dkd_beta", "hard", "ttm", "wttm", "nkd", "dist_inter", "dist_intra"], 1.0
    )
    step = _step_of(_distiller("ijckd", standardize_logits=True, **weights, **through))
    batch = _batch(size=4, mixup=True)
    with HostWaits() as waits:
        for i in range(2):
            step(batch, step=i, lr=0.05, progress=0.0)
    assert waits.count == 0


@pytest.mark.parametrize("classifier", ["teacher", "student"])
def test_no_loss_at_positions_waits_for_the_device(classifier):
    weights = dict.fromkeys(["sdd", "sdd_dkd_alpha", "sdd_dkd_beta", "cat"], 1.0)
    heads = {"sdd_head": classifier, "cat_head": classifier}
    batch = _batch(size=4, mixup=True)
    for normalize in (True, False):
        step = _step_of(_distiller("ijckd", **weights, **heads, cat_normalize=normalize))
        with HostWaits() as waits:
            for i in range(2):
                step(batch, step=i, lr=0.05, progress=0.0)
        assert waits.count == 0


def test_a_batch_in_parts_is_refused_where_it_must_be_whole():
    with pytest.raises(UserError, match=r"'dist' has statistics over all images .* got --accumulate 2"):
        _step_of(_distiller("dist"), accumulate=2)


# --- out of memory


def _memory_for(monkeypatch, images, error=None):
    """A step of more images than these runs out of memory, with half of the nets done."""
    original, seen = Distiller.forward, []

    def step(self, batch, labels, **named):
        seen.append(len(labels))
        out = original(self, batch, labels, **named)
        if len(labels) > images:
            raise error or torch.OutOfMemoryError("CUDA out of memory")
        return out

    monkeypatch.setattr(Distiller, "forward", step)
    return seen


@pytest.mark.parametrize(
    ("accumulate", "room", "tried", "fits"),
    [
        (1, 9, [16, 8], 8),
        (1, 3, [16, 8, 4, 2], 2),
        (2, 4, [8, 4, 4], 4),
        (1, 1, [16, 8, 4, 2, 1], 1),
        (1, 0, [16, 8, 4, 2, 1], 0),
    ],
)
def test_the_largest_part_that_fits(monkeypatch, accumulate, room, tried, fits):
    distiller = _distiller("ijckd-pooled", norm=False, connector="linear")
    step = _step_of(distiller, accumulate=accumulate)
    batch, pooled_t = _batch(size=16, mixup=True), torch.rand(16, distiller.teacher.channels)
    before = _state(step, distiller)
    seen = _memory_for(monkeypatch, room)
    with pytest.raises(torch.OutOfMemoryError):
        step(batch, pooled_t, step=0, lr=0.05, progress=0.0)
    assert step.largest_part_that_fits(batch, pooled_t, 0.0) == fits
    assert seen == tried
    assert differing(before, _state(step, distiller)) == []
    assert all(p.grad is None for p in distiller.parameters())


def test_running_out_of_memory_leaves_the_statistics_alone(monkeypatch):
    distiller = _distiller("ijckd")
    step = _step_of(distiller)
    _run(step, [_batch()])
    before = _state(step, distiller)
    _memory_for(monkeypatch, 2, RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    with pytest.raises(RuntimeError, match="can't allocate"):
        step(_batch(1), step=1, lr=0.05, progress=0.0)
    assert step.largest_part_that_fits(_batch(1), None, 0.0) == 2
    assert differing(before, _state(step, distiller)) == []


def test_what_is_no_lack_of_memory_is_raised(monkeypatch):
    step = _step_of(_distiller())
    _memory_for(monkeypatch, 1, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    step.guard.before_forward()
    with pytest.raises(RuntimeError, match="mat1"):
        step.largest_part_that_fits(_batch(), None, 0.0)
    assert not out_of_memory(RuntimeError("mat1 and mat2"))
    assert out_of_memory(MemoryError())
