"""The training step on a GPU: as one CUDA graph it does what it does step by step. Skipped where there is no GPU."""

from __future__ import annotations

import warnings

import pytest
import torch

from ijckd_fast.data import Batch
from ijckd_fast.distill import Distiller, get_objective
from ijckd_fast.nets import create_model
from ijckd_fast.train import TrainStep, build_optimizer
from ijckd_fast.train.checkpoint import copied

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
STEPS = 10


@pytest.fixture(autouse=True)
def same_kernels():
    """The same algorithms with and without a graph, in float32 that is not rounded to TF32; as they were afterwards."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = False, False
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before


def _step(cuda_graph, name="sgd", objective="ijckd", **options):
    torch.manual_seed(0)
    student = create_model("resnet8x0.5", 10, image_size=32)
    teacher = create_model("resnet8", 10, image_size=32)
    distiller = Distiller(student, teacher, get_objective(objective)).to(memory_format=torch.channels_last).to("cuda")
    optimizer = build_optimizer(
        distiller, name=name, lr=0.05, momentum=0.9, nesterov=False, betas=(0.9, 0.99), weight_decay=1e-2,
        decay_norms=False,
    )  # fmt: skip
    device = torch.device("cuda", torch.cuda.current_device())
    return distiller, TrainStep(distiller.train(), optimizer, device, cuda_graph=cuda_graph, **options)


def _batch(seed, *, size=16, side=32, mixup=False):
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, side, side, generator=draw).to(memory_format=torch.channels_last)
    labels, other = torch.randint(0, 10, (2, size), generator=draw)
    given = (images, labels, torch.arange(size), *((other, torch.rand(size, generator=draw)) if mixup else ()))
    return Batch(*(x.cuda() for x in given))


def _run(step, batches, start=0, lr=0.05):
    """Figures of every step, copied: a graph writes the next ones to the same place."""
    figures = []
    for i, batch in enumerate(batches, start):
        out = step(batch, step=i, lr=lr / (1 + i), progress=i / 4)
        figures.append({name: figure.clone() for name, figure in out.items()})
    return [{name: float(figure) for name, figure in each.items()} for each in figures]


def _weights(distiller):
    return copied(distiller.state_dict())


def _close(ours, wanted):
    for name in wanted:
        torch.testing.assert_close(ours[name], wanted[name], rtol=1e-3, atol=1e-4)


def _assert_graph_is_eager(batches, objective="ijckd", **options):
    (eager, by_hand), (graphed, graph) = (_step(each, objective=objective, **options) for each in (False, True))
    wanted, got = _run(by_hand, batches), _run(graph, batches)
    for a, b in zip(got, wanted, strict=True):
        assert a.keys() == b.keys()
        assert (a["ok"], a["overflow"]) == (b["ok"], b["overflow"])
        if b["ok"]:
            assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
    _close(_weights(graphed), _weights(eager))
    if by_hand.ema is not None:
        _close(copied(graph.ema.state_dict()), copied(by_hand.ema.state_dict()))
    return graph, wanted


@pytest.mark.parametrize("mixup", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_graph_steps_as_the_step_does(name, mixup):
    """Ten batches, each with a learning rate of its own, with the moving average and clipping; no warning of
    AdamW's.
    """
    batches = [_batch(seed, mixup=mixup) for seed in range(STEPS)]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*capturable")
        graph, _ = _assert_graph_is_eager(batches, name=name, ema_decay=0.9, clip=1.0)
    assert len(graph._graphs) == 1


def test_the_progress_of_dkds_warm_up_is_read_by_every_replay():
    """Four steps an epoch: its weight rises by a twentieth with each of them, from a twentieth."""
    _, wanted = _assert_graph_is_eager([_batch(seed) for seed in range(STEPS)], objective="dkd")
    for i, row in enumerate(wanted):
        assert row["loss"] == pytest.approx(row["ce"] + (i // 4 + 1) / 20 * row["dkd"], rel=1e-4)


@pytest.mark.parametrize("objective", ["fitnet", "at"])
def test_a_graph_compares_stages(objective):
    """Their maps are handed from hooks to the losses within the capture."""
    _assert_graph_is_eager([_batch(seed) for seed in range(STEPS)], objective=objective)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_every_shape_has_a_graph_of_its_own(name):
    """Growing images, there and back: the second capture changes no weight, no moment and no count of batches."""
    batches = [_batch(seed, side=32 if seed % 4 < 2 else 24) for seed in range(STEPS)]
    graph, _ = _assert_graph_is_eager(batches, name=name, ema_decay=0.9)
    assert {shape[-1] for shape in graph._graphs} == {24, 32}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("bad", [0, 4])
def test_a_graph_skips_a_nan_batch(name, bad):
    batches = [_batch(seed) for seed in range(STEPS)]
    batches[bad].images[3].fill_(float("nan"))
    _, wanted = _assert_graph_is_eager(batches, name=name, accumulate=2)
    assert [each["ok"] for each in wanted] == [float(i != bad) for i in range(STEPS)]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_capture_changes_nothing(name):
    """What a step that is replayed leaves is one update, though it was warmed up before."""
    distiller, step = _step(True, name)
    before = _weights(distiller)
    bad = _batch(0)
    bad.images.fill_(float("nan"))
    (figures,) = _run(step, [bad])
    assert not figures["ok"]
    after = _weights(distiller)
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    moments = [value for state in step._optimizer.state.values() for value in state.values()]
    assert not any(bool(value.any()) for value in moments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_graph_in_half_precision(name, dtype):
    """float16: a scale that is far too large is halved by replays until the steps are good."""
    _, step = _step(True, name, amp_dtype=dtype)
    _, by_hand = _step(False, name, amp_dtype=dtype)
    batches = [_batch(seed) for seed in range(STEPS)]
    got, wanted = _run(step, batches), _run(by_hand, batches)
    if dtype == torch.float16:
        assert step.scaler.get_scale() == by_hand.scaler.get_scale()
    assert [each["ok"] for each in got] == [each["ok"] for each in wanted]
    assert got[-1]["loss"] == pytest.approx(wanted[-1]["loss"], rel=0.05)
    if dtype == torch.float16:
        step.scaler.update(2.0**40)
        (figures,) = _run(step, [_batch(STEPS)], STEPS)
        assert (figures["ok"], figures["overflow"]) == (False, True)
        assert step.scaler.get_scale() == 2.0**39


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_goes_on_from_a_saved_state(name):
    """A new step with the weights, moments, average and scale of the fifth ends where one that never stopped ends."""
    batches = [_batch(seed) for seed in range(STEPS)]
    whole, unbroken = _step(True, name, ema_decay=0.9)
    _run(unbroken, batches)
    first, begun = _step(True, name, ema_decay=0.9)
    _run(begun, batches[:5])
    optimizer, ema = copied(begun._optimizer.state_dict()), copied(begun.ema.state_dict())
    rest, resumed = _step(True, name, ema_decay=0.9)
    rest.load_state_dict(_weights(first))
    resumed._optimizer.load_state_dict(optimizer)
    resumed.ema.load_state_dict(ema)
    _run(resumed, batches[5:], 5)
    _close(_weights(rest), _weights(whole))
    _close(copied(resumed.ema.state_dict()), copied(unbroken.ema.state_dict()))


@pytest.mark.parametrize(
    "options", [{}, {"accumulate": 2}, {"clip": 1.0}, {"amp_dtype": torch.float16}, {"ema_decay": 0.9}]
)
@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_no_step_waits_for_the_gpu(name, options, cuda_graph):
    """torch raises at the first operation that would wait."""
    _, step = _step(cuda_graph, name, **options)
    batch = _batch(0, mixup=True)
    _run(step, [batch])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(1, 4):
            step(batch, step=i, lr=0.05, progress=0.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_out_of_memory_on_the_gpu(monkeypatch):
    """A real refusal of the allocator: what fits is found, and the step goes on with it."""
    distiller, step = _step(False)
    _run(step, [_batch(0)])
    before = _weights(distiller)
    original = Distiller.forward

    def greedy(self, images, labels, **named):
        if len(labels) > 4:
            torch.empty(2**46, dtype=torch.uint8, device="cuda")
        return original(self, images, labels, **named)

    monkeypatch.setattr(Distiller, "forward", greedy)
    with pytest.raises(torch.OutOfMemoryError):
        step(_batch(1), step=1, lr=0.05, progress=0.0)
    assert step.largest_part_that_fits(_batch(1), None, 0.0) == 4
    after = _weights(distiller)
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    (figures,) = _run(step, [_batch(1, size=4)], 1)
    assert figures["ok"]
