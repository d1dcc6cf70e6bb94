"""The compiled ops against reference.py, another program, in float64; gradcheck, opcheck, compile; half precision against eager."""

import itertools
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ijckd_fast
from ijckd_fast.head import ops, reference

F64 = torch.float64
PARTS = ("ce", "sr", "fm", "kl")


def assert_no_worse_than_eager(
    fused: Tensor, eager: Tensor, oracle: Tensor, slack: float = 2.0, floor: float = 1e-6
) -> None:
    """flash-attention's rule: at most twice the error that eager PyTorch makes at the same dtype."""
    error = (fused.double() - oracle).abs().max().item()
    rounding = (
        torch.finfo(torch.float32).eps * oracle.abs().max().item()
    )  # of the result itself, where eager hits it by luck
    allowed = slack * (eager.double() - oracle).abs().max().item() + floor + rounding
    assert error <= allowed, f"error {error:.2e} > {allowed:.2e}"


def assert_equal_to(fused, oracle, tolerance: float = 1e-11, **more) -> None:
    for a, b in zip(fused, oracle, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, **more)


BAD = [float("nan"), float("inf"), -float("inf")]


def assert_as_bad_as_eager(fused, eager, *, everywhere: bool) -> None:
    """Not every result finite where eager's are not; `everywhere`: each number for itself."""
    if everywhere:
        for f, e in zip(fused, eager, strict=True):
            assert not (f.isfinite() & ~e.isfinite()).any(), f"{f}, eager has {e}"
    else:  # infinities: eager's own formula may make NaN of what is infinite, or of a mere 0 behind a ReLU
        bad_fused, bad_eager = (not all(x.isfinite().all() for x in results) for results in (fused, eager))
        assert bad_fused or not bad_eager, f"all finite: {fused}, eager has {eager}"


# --------------------------------------------------------------------------------------------------------------------
# connector_match


def connector_inputs(
    shape=(5, 6, 3, 4), Ct=7, *, norm="train", match="map", relu=True, dtype=F64, channels_last=False, seed=0
):
    """(tensors that get a gradient, keywords). norm: train | eval (BatchNorm), bias, none."""
    g = torch.Generator().manual_seed(seed)

    def randn(*s):
        return torch.randn(*s, generator=g, dtype=F64).to(dtype)

    u, weight = randn(*shape), randn(Ct, shape[1]) * 0.5
    if channels_last:
        u = u.contiguous(memory_format=torch.channels_last)
    leaves = {"u": u, "weight": weight}
    stats_dtype = F64 if dtype == F64 else torch.float32
    keywords = {"relu": relu}
    if norm in ("train", "eval"):
        leaves["bn_weight"] = randn(Ct).to(stats_dtype)
        leaves["bn_bias"] = randn(Ct).to(stats_dtype) * 0.3
        keywords |= {"training": norm == "train", "running_mean": randn(Ct).to(stats_dtype)}
        keywords["running_var"] = torch.rand(Ct, generator=g, dtype=F64).to(stats_dtype) + 0.5
    elif norm == "bias":
        leaves["bias"] = randn(Ct).to(stats_dtype)
    if match == "map":
        keywords["map_t"] = randn(shape[0], Ct, *shape[2:]).relu()
    elif match == "pooled":
        keywords["pooled_t"] = randn(shape[0], Ct).to(stats_dtype)
    for leaf in leaves.values():
        leaf.requires_grad_()
    return leaves, keywords


def run_connector(op, leaves, keywords):
    """[z, fm, running statistics, gradient of every leaf] for a loss that reaches z and fm."""
    leaves = {k: v.detach().clone(memory_format=torch.preserve_format).requires_grad_() for k, v in leaves.items()}
    keywords = {k: v.clone() if k.startswith("running") else v for k, v in keywords.items()}
    u, weight, bias = leaves["u"], leaves["weight"], leaves.get("bias")
    bn = {k: leaves[k] for k in ("bn_weight", "bn_bias") if k in leaves}
    z, fm = op(u, weight, bias, **bn, **keywords)
    head = torch.linspace(-1, 1, z.numel(), dtype=z.dtype).reshape(z.shape).roll(1, 0)
    (z * head).sum().add(0.7 * fm).backward()
    running = [keywords[k] for k in ("running_mean", "running_var") if k in keywords]
    return [z.detach(), fm.detach(), *running, *[leaf.grad for leaf in leaves.values()]]


SHAPES = [(5, 6, 3, 4), (2, 3, 1, 1), (1, 5, 7, 7), (3, 1, 8, 8), (4, 6)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("norm", "match", "relu"),
    list(itertools.product(("train", "eval", "bias", "none"), ("map", "pooled", None), (True, False))),
)
def test_connector_match_equals_reference(shape, norm, match, relu):
    leaves, keywords = connector_inputs(shape, norm=norm, match=match, relu=relu)
    assert_equal_to(
        run_connector(ops.connector_match, leaves, keywords), run_connector(reference.connector_match, leaves, keywords)
    )


@pytest.mark.parametrize("Ct", [1, 63, 64, 65, 130])
def test_connector_match_across_channel_tiles(Ct):
    leaves, keywords = connector_inputs((3, 4, 9, 9), Ct)  # 243 positions: a ragged last block of the statistics too
    assert_equal_to(
        run_connector(ops.connector_match, leaves, keywords), run_connector(reference.connector_match, leaves, keywords)
    )


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 70),
    st.integers(1, 5),
    st.integers(1, 5),
    st.booleans(),
    st.integers(0, 99),
)
def test_connector_match_any_shape(B, Cs, Ct, H, W, channels_last, seed):
    norm = "train" if B * H * W > 1 else "eval"
    leaves, keywords = connector_inputs((B, Cs, H, W), Ct, norm=norm, channels_last=channels_last, seed=seed)
    # 1e-9: with two positions per channel BatchNorm's backward divides by a variance that can be tiny
    assert_equal_to(
        run_connector(ops.connector_match, leaves, keywords),
        run_connector(reference.connector_match, leaves, keywords),
        1e-8,
    )


def test_connector_match_reads_any_layout():
    leaves, keywords = connector_inputs((4, 6, 5, 3))
    wanted = run_connector(ops.connector_match, leaves, keywords)
    wide = torch.full(
        (4, 6, 10, 6), float("nan"), dtype=F64
    )  # NaN around the slice: read outside it and the result is NaN
    wide[:, :, ::2, ::2] = leaves["u"].detach()
    sliced = dict(leaves, u=wide[:, :, ::2, ::2])
    last = dict(leaves, u=leaves["u"].detach().contiguous(memory_format=torch.channels_last))
    square = dict(leaves, weight=leaves["weight"].detach()[:, :, None, None])
    for variant in (sliced, last, square):
        got = run_connector(ops.connector_match, variant, keywords)
        got[5] = got[5].reshape(wanted[5].shape)
        assert_equal_to(got, wanted)


@pytest.mark.parametrize("norm", ["train", "eval", "bias", "none"])
@pytest.mark.parametrize("match", ["map", "pooled", None])
@pytest.mark.parametrize("shape", [(0, 6, 3, 4), (0, 6)], ids=str)
def test_connector_match_empty_batch(shape, norm, match):
    """As torch: nothing is learned from nothing, and the running statistics stay."""
    leaves, keywords = connector_inputs(shape, norm=norm, match=match)
    got = run_connector(ops.connector_match, leaves, keywords)
    assert_equal_to(got, run_connector(reference.connector_match, leaves, keywords), equal_nan=True)
    assert got[1].isnan() == (match is not None)
    assert not any(g.any() for g in got[-len(leaves) :])


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize(
    ("norm", "where"),
    [
        *itertools.product(("train", "eval", "bias"), ("u", "weight", "map_t", "pooled_t")),
        *itertools.product(("train", "eval"), ("bn_weight", "bn_bias")),
        ("bias", "bias"),
        ("eval", "running_mean"),
        ("eval", "running_var"),
    ],
)
@pytest.mark.parametrize("relu", [True, False])
def test_connector_match_bad_values_are_not_hidden(norm, where, bad, relu):
    """Nor by the ReLU, which lets NaN through."""
    leaves, keywords = connector_inputs(norm=norm, match="pooled" if where == "pooled_t" else "map", relu=relu)
    inputs = leaves if where in leaves else keywords
    inputs[where] = inputs[where].detach().clone()
    inputs[where].view(-1)[2] = bad
    results = [run_connector(m.connector_match, leaves, keywords) for m in (ops, reference)]
    assert_as_bad_as_eager(*results, everywhere=bad != bad)


def test_connector_match_gradient_of_channels_last_is_channels_last():
    leaves, keywords = connector_inputs((4, 6, 5, 3), channels_last=True)
    du = run_connector(ops.connector_match, leaves, keywords)[4]
    assert du.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("match", ["pooled", None])
@pytest.mark.parametrize("wanted", [("u",), ("weight",), ("bias",), ("u", "bias"), ("weight", "bias")], ids=str)
def test_linear_connector_match_makes_the_gradients_that_are_asked_for(wanted, match):
    leaves, keywords = connector_inputs((4, 6), norm="bias", match=match, relu=False)
    gradients = []
    for op in (ops.connector_match, reference.connector_match):
        mine = {k: v.detach().clone().requires_grad_(k in wanted) for k, v in leaves.items()}
        z, fm = op(*mine.values(), **keywords)
        loss = z.square().sum() + (fm if match else 0)
        gradients.append(torch.autograd.grad(loss, [mine[k] for k in wanted]))
    assert_equal_to(*gradients)


@pytest.mark.parametrize("reached", ["z", "fm"])
def test_linear_connector_match_of_which_only_one_result_is_used(reached):
    leaves, keywords = connector_inputs((4, 6), norm="bias", match="pooled", relu=False)
    gradients = []
    for op in (ops.connector_match, reference.connector_match):
        z, fm = op(*leaves.values(), **keywords)
        gradients.append(torch.autograd.grad(z.square().sum() if reached == "z" else fm, list(leaves.values())))
    assert_equal_to(*gradients)


@pytest.mark.parametrize(
    ("norm", "match", "relu"),
    [("train", "map", True), ("train", "pooled", False), ("eval", "map", True), ("bias", "map", False)],
)
def test_connector_match_gradcheck(norm, match, relu):
    leaves, keywords = connector_inputs((3, 4, 2, 2), 5, norm=norm, match=match, relu=relu)

    def op(*tensors):
        named = dict(zip(leaves, tensors, strict=True))
        frozen = {k: v.clone() if k.startswith("running") else v for k, v in keywords.items()}
        return ops.connector_match(named.pop("u"), named.pop("weight"), **named, **frozen)

    assert torch.autograd.gradcheck(op, tuple(leaves.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("match", ["map", "pooled"])
def test_connector_match_no_worse_than_eager(dtype, match):
    leaves, keywords = connector_inputs((16, 48, 7, 7), 80, match=match, dtype=dtype, channels_last=True)
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in keywords.items()}
    oracle = run_connector(reference.connector_match, {k: v.detach().double() for k, v in leaves.items()}, wide)
    fused, eager = (
        run_connector(ops.connector_match, leaves, keywords),
        run_connector(reference.connector_match, leaves, keywords),
    )
    for f, e, o in zip(fused, eager, oracle, strict=True):
        assert f.dtype == e.dtype
        assert_no_worse_than_eager(f, e, o)


def test_connector_match_precise_when_mean_dwarfs_deviation():
    """A sum of squares minus the square of a sum would lose every digit here."""
    leaves, keywords = connector_inputs((8, 4, 6, 6), 5, norm="train", match=None, dtype=torch.float32)
    leaves = {k: v.detach() for k, v in leaves.items()}
    leaves["u"][:, 0] += 3000
    leaves["weight"][:, 0] = 1
    oracle = run_connector(
        reference.connector_match,
        {k: v.double() for k, v in leaves.items()},
        {k: v.double() if isinstance(v, Tensor) else v for k, v in keywords.items()},
    )
    fused, eager = (
        run_connector(ops.connector_match, leaves, keywords),
        run_connector(reference.connector_match, leaves, keywords),
    )
    for f, e, o in zip(fused[:4], eager[:4], oracle[:4], strict=True):
        assert_no_worse_than_eager(f, e, o, floor=1e-3)


def test_connector_match_under_autocast():
    leaves, keywords = connector_inputs((6, 8, 4, 4), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, fm, *_, du, dw, dg, db = run_connector(ops.connector_match, leaves, keywords)
    half = {k: v.detach().to(torch.bfloat16) if k in ("u", "weight") else v for k, v in leaves.items()}
    wanted = run_connector(ops.connector_match, half, dict(keywords, map_t=keywords["map_t"].to(torch.bfloat16)))
    assert z.dtype == fm.dtype == du.dtype == dw.dtype == dg.dtype == db.dtype == torch.float32
    assert torch.equal(z, wanted[0])
    assert torch.equal(fm, wanted[1])
    assert torch.equal(du, wanted[4].float())


def test_connector_match_same_bits_for_any_thread_count():
    script = (
        "import torch, tests.test_ops as t; from ijckd_fast import ops\n"
        "leaves, kw = t.connector_inputs((16, 24, 7, 7), 72, dtype=torch.float32)\n"
        "out = t.run_connector(ops.connector_match, leaves, kw)\n"
        "z, *rest = t.loss_inputs(B=33, Ct=24, K=101, dtype=torch.float32)\n"
        "out += t.run_loss(ops.classifier_loss, z, *rest)\n"
        "print(torch.get_num_threads(), [x.double().sum().item().hex() for x in out])"
    )
    printed = []
    for threads in ("1", "2"):
        env = dict(os.environ, OMP_NUM_THREADS=threads, PYTHONPATH=str(pathlib.Path(__file__).parents[2]))
        done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
        count, bits = done.stdout.split(" ", 1)
        assert count == threads
        printed.append(bits)
    assert printed[0] == printed[1]


def test_connector_match_inference_without_teacher():
    leaves, keywords = connector_inputs(norm="eval", match=None)
    with torch.no_grad():
        z, fm = ops.connector_match(
            *list(leaves.values())[:2], bn_weight=leaves["bn_weight"], bn_bias=leaves["bn_bias"], **keywords
        )
    assert fm.item() == 0
    assert not z.requires_grad


def _sync_worker(rank, world, folder, sizes):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    leaves, keywords = connector_inputs((sum(sizes), 6, 3, 3))
    first = sum(sizes[:rank])
    mine = slice(first, first + sizes[rank])
    share = {k: v.detach()[mine] if k == "u" else v.detach() for k, v in leaves.items()}
    keywords["map_t"] = keywords["map_t"][mine]

    def op(*args, **kwargs):
        return ops.connector_match(*args, **kwargs, process_group=torch.distributed.group.WORLD)

    torch.save(run_connector(op, share, keywords), folder / f"rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("sizes", [(3, 3), (4, 1), (5, 0)])
def test_connector_match_sync_batch_norm(tmp_path, sizes):
    """Two ranks with process_group see the statistics, and BatchNorm's backward, of one process with the whole batch."""
    mp.spawn(_sync_worker, (2, tmp_path, sizes), nprocs=2)
    parts = [torch.load(tmp_path / f"rank{r}.pt") for r in range(2)]

    leaves, keywords = connector_inputs((sum(sizes), 6, 3, 3))
    leaves = {k: v.detach().requires_grad_() for k, v in leaves.items()}
    running = {k: keywords[k].clone() for k in ("running_mean", "running_var")}
    y = torch.nn.functional.conv2d(leaves["u"], leaves["weight"][:, :, None, None])
    Z = torch.nn.functional.batch_norm(y, *running.values(), leaves["bn_weight"], leaves["bn_bias"], True).relu()
    z = Z.mean((2, 3))
    loss = z.new_zeros(())
    for r in range(2):  # each rank's own loss: its slice of z, its own mean of the match
        if sizes[r] == 0:
            continue
        mine = slice(sum(sizes[:r]), sum(sizes[:r]) + sizes[r])
        head = torch.linspace(-1, 1, z[mine].numel(), dtype=F64).reshape(z[mine].shape).roll(1, 0)
        loss = loss + (z[mine] * head).sum() + 0.7 * (Z[mine] - keywords["map_t"][mine]).square().mean()
    loss.backward()
    assert_equal_to([torch.cat([p[0] for p in parts])], [z.detach()])
    for p in parts:
        assert_equal_to(p[2:4], list(running.values()))
    assert_equal_to([torch.cat([p[4] for p in parts])], [leaves["u"].grad])
    for i, name in ((5, "weight"), (6, "bn_weight"), (7, "bn_bias")):  # DDP sums what each rank found
        assert_equal_to([parts[0][i] + parts[1][i]], [leaves[name].grad])


# --------------------------------------------------------------------------------------------------------------------
# classifier_loss


def loss_inputs(B=5, Ct=6, K=9, dtype=F64, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)

    def randn(*s):
        return torch.randn(*s, generator=g, dtype=F64)

    z, weight, bias = randn(B, Ct) * scale, randn(K, Ct) * 0.5, randn(K)
    labels, labels_b = torch.randint(0, K, (B,), generator=g), torch.randint(0, K, (B,), generator=g)
    mix = torch.rand(B, generator=g, dtype=F64)
    pooled_t = z + 0.1 * randn(B, Ct)
    acc = F64 if dtype == F64 else torch.float32
    return z.to(acc), weight.to(dtype), bias.to(acc), labels, labels_b, mix.to(acc), pooled_t.to(acc)


def loss_keywords(labels_b, mix, pooled_t, **changed):
    defaults = {"label_smoothing": 0.1, "ce": 0.7, "sr": 0.5, "fm": 0.3, "kl": 0.9, "temperature": 3.0}
    return {"labels_b": labels_b, "mix": mix, "pooled_t": pooled_t} | defaults | changed


def run_loss(op, z, weight, bias, labels, labels_b, mix, pooled_t, **changed):
    z = z.detach().clone().requires_grad_()
    loss, parts, top1 = op(z, weight, bias, labels, **loss_keywords(labels_b, mix, pooled_t, **changed))
    (2.5 * loss).backward()
    assert not parts.requires_grad
    return [loss.detach(), parts, top1, z.grad]


ALONE = {p: dict.fromkeys(PARTS, 0.0) | {p: 0.8} for p in PARTS}
PLAIN = {"labels_b": None, "mix": None, "label_smoothing": 0.0}
LOSS_CASES = {
    "all": {},
    **ALONE,
    "hard labels": PLAIN,
    "smoothing": {"labels_b": None, "mix": None, "label_smoothing": 0.3},
    "mixup": {"label_smoothing": 0.0},
    "ijckd": PLAIN | {"ce": 1.0, "sr": 1.0, "fm": 0.0, "kl": 0.0},
    "cold": {"temperature": 0.5},
}


@pytest.mark.parametrize(
    ("case", "teacher"), [(c, t) for c in LOSS_CASES for t in ("pooled_t", "logits_t") if (c, t) != ("fm", "logits_t")]
)
@pytest.mark.parametrize("with_bias", [True, False])
def test_classifier_loss_equals_reference(case, teacher, with_bias):
    z, weight, bias, labels, labels_b, mix, pooled_t = loss_inputs()
    changed = dict(LOSS_CASES[case])
    labels_b, mix = changed.pop("labels_b", labels_b), changed.pop("mix", mix)
    if teacher == "logits_t":
        pooled_t = None
        changed |= {"logits_t": torch.randn(5, 9, dtype=F64), "fm": 0.0}
    args = (z, weight, bias if with_bias else None, labels, labels_b, mix, pooled_t)
    assert_equal_to(
        run_loss(ops.classifier_loss, *args, **changed), run_loss(reference.classifier_loss, *args, **changed)
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 80), st.integers(0, 99))
def test_classifier_loss_any_shape(B, Ct, K, seed):
    args = loss_inputs(B, Ct, K, seed=seed)
    assert_equal_to(run_loss(ops.classifier_loss, *args), run_loss(reference.classifier_loss, *args))


@pytest.mark.parametrize("B", [1, 5])
@pytest.mark.parametrize("case", LOSS_CASES)
def test_classifier_loss_one_class(case, B):
    args, changed = list(loss_inputs(B, 4, 1)), dict(LOSS_CASES[case])
    args[4], args[5] = changed.pop("labels_b", args[4]), changed.pop("mix", args[5])
    got = run_loss(ops.classifier_loss, *args, **changed)
    assert_equal_to(got, run_loss(reference.classifier_loss, *args, **changed))
    assert got[2] == B  # the only class is the best one


@pytest.mark.parametrize("case", LOSS_CASES)
@pytest.mark.parametrize("K", [1, 9])
def test_classifier_loss_empty_batch(case, K):
    args, changed = list(loss_inputs(0, 6, K)), dict(LOSS_CASES[case])
    args[4], args[5] = changed.pop("labels_b", args[4]), changed.pop("mix", args[5])
    got = run_loss(ops.classifier_loss, *args, **changed)
    assert_equal_to(got, run_loss(reference.classifier_loss, *args, **changed), equal_nan=True)
    assert got[0].isnan()
    assert got[3].shape == (0, 6)


def test_classifier_loss_reads_any_layout():
    def spread(x):
        """x with NaN (integers: -1) between its elements and its dimensions stored in the reverse order."""
        wide = torch.full([2 * n for n in x.shape[::-1]], float("nan") if x.is_floating_point() else -1, dtype=x.dtype)
        sliced = wide[(slice(None, None, 2),) * x.dim()].permute(*reversed(range(x.dim())))
        return sliced.copy_(x)

    args, logits_t = loss_inputs(), torch.randn(5, 9, dtype=F64)
    for changed in ({}, {"logits_t": logits_t, "fm": 0.0}):
        inputs = [*args[:6], None if changed else args[6]]
        variant = [None if x is None else spread(x) for x in inputs]
        other = changed | ({"logits_t": spread(logits_t)} if changed else {})
        assert not variant[0].is_contiguous()
        assert not variant[1].is_contiguous()
        z = variant[0].requires_grad_()  # run_loss would make it contiguous
        loss, parts, top1 = ops.classifier_loss(z, *variant[1:4], **loss_keywords(*variant[4:], **other))
        (2.5 * loss).backward()
        assert_equal_to([loss.detach(), parts, top1, z.grad], run_loss(ops.classifier_loss, *inputs, **changed), 0)


# What each case reads. A bias cancels in the difference of the logits.
READ = {
    "all": ("z", "weight", "bias", "pooled_t", "logits_t", "mix"),
    "ce": ("z", "weight", "bias", "mix"),
    "sr": ("z", "weight", "pooled_t", "logits_t"),
    "fm": ("z", "pooled_t"),
    "kl": ("z", "weight", "pooled_t", "logits_t"),
    "smoothing": ("z", "weight", "bias"),
}


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize(("case", "where"), [(case, where) for case in READ for where in READ[case]])
def test_classifier_loss_bad_values_are_not_hidden(case, where, bad):
    z, weight, bias, labels, labels_b, mix, pooled_t = loss_inputs()
    changed, logits_t = dict(LOSS_CASES[case]), torch.randn(5, 9, dtype=F64)
    labels_b, mix = changed.pop("labels_b", labels_b), changed.pop("mix", mix)
    inputs = {"z": z, "weight": weight, "bias": bias, "mix": mix, "pooled_t": pooled_t, "logits_t": logits_t}
    inputs[where][..., 2] = bad
    if where == "logits_t":
        pooled_t = None
        changed |= {"logits_t": logits_t, "fm": 0.0}
    args = (z, weight, bias, labels, labels_b, mix, pooled_t)
    results = [run_loss(m.classifier_loss, *args, **changed) for m in (ops, reference)]
    assert_as_bad_as_eager(*results, everywhere=bad != bad and where != "bias")


def test_classifier_loss_large_logits():
    args = loss_inputs(scale=1e3)
    got = run_loss(ops.classifier_loss, *args)
    assert all(x.isfinite().all() for x in got)
    assert_equal_to(got, run_loss(reference.classifier_loss, *args))


def test_classifier_loss_first_of_tied_logits_counts():
    z, weight = torch.ones(2, 3, dtype=F64), torch.ones(4, 3, dtype=F64)
    _, _, top1 = ops.classifier_loss(z, weight, None, torch.tensor([0, 3]))
    assert top1.item() == 1


def test_classifier_loss_gradcheck():
    z, weight, bias, labels, *rest = loss_inputs()

    def op(z):
        return ops.classifier_loss(z, weight, bias, labels, **loss_keywords(*rest))[0]

    assert torch.autograd.gradcheck(op, z.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("teacher", ["pooled_t", "logits_t"])
def test_classifier_loss_no_worse_than_eager(dtype, teacher):
    z, weight, bias, labels, labels_b, mix, pooled_t = loss_inputs(64, 96, 203, dtype)
    oracle_in = [t.double() if t.is_floating_point() else t for t in (z, weight, bias, labels, labels_b, mix, pooled_t)]
    changed, changed64 = {}, {}
    if teacher == "logits_t":
        logits_t = torch.randn(64, 203, generator=torch.Generator().manual_seed(2))
        changed, changed64 = {"logits_t": logits_t, "fm": 0.0}, {"logits_t": logits_t.double(), "fm": 0.0}
        pooled_t = oracle_in[-1] = None
    oracle = run_loss(reference.classifier_loss, *oracle_in, **changed64)
    args = (z, weight, bias, labels, labels_b, mix, pooled_t)
    eager_args = (z, weight, bias.to(dtype), *args[3:])  # F.linear wants one dtype, as under autocast
    fused, eager = (
        run_loss(ops.classifier_loss, *args, **changed),
        run_loss(reference.classifier_loss, *eager_args, **changed),
    )
    for i in (0, 1, 3):
        assert_no_worse_than_eager(fused[i], eager[i], oracle[i])


def test_logit_match_keeps_small_differences_in_bfloat16():
    """Late in training z is close to pooled_t; the difference of two bf16 logits would be rounding noise."""
    z, weight, bias, labels, *_ = loss_inputs(32, 64, 101, torch.bfloat16)
    pooled_t = z * (1 + 0.002 * torch.randn(z.shape, generator=torch.Generator().manual_seed(1)))
    wanted = reference.classifier_loss(
        z.double(), weight.double(), bias.double(), labels, pooled_t=pooled_t.double(), ce=0, sr=1
    )[0]
    got = ops.classifier_loss(z, weight, bias, labels, pooled_t=pooled_t, ce=0.0, sr=1.0)[0]
    assert abs(got.item() / wanted.item() - 1) < 0.01


def test_classifier_loss_under_autocast():
    z, weight, bias, *rest = loss_inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run_loss(ops.classifier_loss, z, weight, bias, *rest)
    assert_equal_to(got, run_loss(ops.classifier_loss, z, weight.to(torch.bfloat16), bias, *rest), 0)
    assert got[0].dtype == got[3].dtype == torch.float32


def test_no_bad_rows_on_a_cpu():
    """There labels are checked at once, and no softmax saturates."""
    z, weight, bias, labels, *_ = loss_inputs(scale=1e3)
    ops.classifier_loss(z, weight, bias, labels)
    bad = ijckd_fast.take_bad_rows("cpu")
    assert (bad.labels, bad.saturated) == (0, 0)
    assert all(type(count) is int for count in bad)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_classifier_gram_is_weight_times_weight_in_two_parts(dtype):
    weight = torch.randn(5000, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    gram = ops.classifier_gram(weight)
    wanted = weight.double().T @ weight.double()
    assert gram.shape == (2, 12, 12)
    assert gram.dtype == torch.bfloat16
    assert torch.equal(gram[0], wanted.bfloat16())
    torch.testing.assert_close(gram.double().sum(0), wanted, rtol=0, atol=2**-16 * wanted.abs().max().item())


def test_a_frozen_classifier_is_prepared_once_and_again_when_it_changes():
    weight = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    frozen = ops.FrozenClassifier()
    plain, gram = frozen.prepared(weight, match=True)
    assert torch.equal(plain, weight)
    assert gram is None  # float32 goes another way
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, gram = frozen.prepared(weight, match=True)
        assert torch.equal(rounded, weight.bfloat16())
        wanted = rounded.double().T @ rounded.double()
        torch.testing.assert_close(gram.double().sum(0), wanted, rtol=0, atol=2**-15 * wanted.abs().max().item())
        assert frozen.prepared(weight, match=True)[1] is gram
        assert frozen.prepared(weight, match=False)[1] is None
        weight.mul_(2)
        again, doubled = frozen.prepared(weight, match=True)
        assert torch.equal(again, 2 * rounded)
        torch.testing.assert_close(doubled, 4 * gram)
        assert frozen.prepared(torch.randn(24, 8), match=True)[1] is not None  # K = 3 Ct, but few channels
        assert frozen.prepared(torch.randn(24, 1032), match=True)[1] is None  # W d is cheaper
    assert frozen.prepared(weight.double(), match=True)[0].dtype == torch.float64


# --------------------------------------------------------------------------------------------------------------------
# projected_classifier_loss


def projected_inputs(B=5, Cs=4, Ct=6, K=9, dtype=F64, seed=0):
    """(what gets a gradient, what loss_inputs gives besides z)"""
    _, *rest = loss_inputs(B, Ct, K, dtype, seed)
    g = torch.Generator().manual_seed(seed + 1)
    u, projection = (torch.randn(*s, generator=g, dtype=F64).to(dtype) for s in ((B, Cs), (Ct, Cs)))
    bias = torch.randn(Ct, generator=g, dtype=F64).to(F64 if dtype == F64 else torch.float32)
    return [u, projection, bias], rest


def run_projected(module, leaves, weight, bias, labels, labels_b, mix, pooled_t, **changed):
    """[loss, parts, top1, gradient of every leaf]"""
    leaves = [x if x is None else x.detach().clone().requires_grad_() for x in leaves]
    keywords = loss_keywords(labels_b, mix, pooled_t, **changed)
    loss, parts, top1 = module.projected_classifier_loss(*leaves, weight, bias, labels, **keywords)
    (2.5 * loss).backward()
    assert not parts.requires_grad
    return [loss.detach(), parts, top1, *[x.grad for x in leaves if x is not None]]


@pytest.mark.parametrize("case", LOSS_CASES)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("B", [5, 0])
def test_projected_classifier_loss_equals_reference(case, biased, B):
    leaves, args = projected_inputs(B)
    changed = dict(LOSS_CASES[case])
    args[3], args[4] = changed.pop("labels_b", args[3]), changed.pop("mix", args[4])
    leaves[2] = leaves[2] if biased else None
    fused, oracle = (run_projected(m, leaves, *args, **changed) for m in (ops, reference))
    assert_equal_to(fused, oracle, equal_nan=True)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_projected_classifier_loss_makes_the_gradients_that_are_asked_for(wanted):
    leaves, (weight, bias, labels, *rest) = projected_inputs()
    gradients = []
    for module in (ops, reference):
        mine = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(leaves)]
        loss, *_ = module.projected_classifier_loss(*mine, weight, bias, labels, **loss_keywords(*rest))
        gradients.append(torch.autograd.grad(loss, [mine[i] for i in wanted]))
    assert_equal_to(*gradients)
    with torch.no_grad():
        again, *_ = ops.projected_classifier_loss(*mine, weight, bias, labels, **loss_keywords(*rest))
    assert_equal_to([again], [loss.detach()])


def test_projected_classifier_loss_gradcheck():
    leaves, (weight, bias, labels, *rest) = projected_inputs()

    def op(*leaves):
        return ops.projected_classifier_loss(*leaves, weight, bias, labels, **loss_keywords(*rest))[0]

    assert torch.autograd.gradcheck(op, tuple(x.requires_grad_() for x in leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projected_classifier_loss_no_worse_than_eager(dtype):
    leaves, (weight, bias, *rest) = projected_inputs(64, 48, 96, 203, dtype)
    wide = [x.double() if x.is_floating_point() else x for x in (weight, bias, *rest)]
    oracle = run_projected(reference, [x.double() for x in leaves], *wide)
    fused = run_projected(ops, leaves, weight, bias, *rest)
    eager = run_projected(reference, leaves, weight, bias.to(dtype), *rest)
    for i in (0, 1, 3, 4, 5):
        assert fused[i].dtype == eager[i].dtype
        assert_no_worse_than_eager(fused[i], eager[i], oracle[i])


def test_projected_classifier_loss_under_autocast():
    leaves, (weight, *rest) = projected_inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run_projected(ops, leaves, weight, *rest)
    half = [leaves[0].bfloat16(), leaves[1].bfloat16(), leaves[2]]
    wanted = run_projected(ops, half, weight.bfloat16(), *rest)
    assert_equal_to(got, [*wanted[:3], *(x.float() for x in wanted[3:])], 0)


def test_projected_classifier_loss_refuses():
    leaves, (weight, bias, labels, *_) = projected_inputs()
    u, projection, c = leaves
    call = ops.projected_classifier_loss
    op = "projected_classifier_loss: "
    _refused(op + "u must be [B, Cs], got [5, 4, 1]", lambda: call(u[..., None], projection, c, weight, bias, labels))
    _refused(
        op + "projection must be [Ct, Cs] with Cs = 4 like u, got [6, 3]",
        lambda: call(u, projection[:, :3], c, weight, bias, labels),
    )
    _refused(
        op + "projection must have u's dtype float64, got float32",
        lambda: call(u, projection.float(), c, weight, bias, labels),
    )
    _refused(
        op + "projection_bias must be [Ct] = [6], got [5]",
        lambda: call(u, projection, c[:5], weight, bias, labels),
    )
    _refused(
        op + "weight must be [K, Ct] with Ct = 6 like projection, got [9, 5]",
        lambda: call(u, projection, c, weight[:, :5], bias, labels),
    )
    _refused(
        op + "u and weight must both be float64 or neither, got float64 and float32",
        lambda: call(u, projection, c, weight.float(), bias, labels),
    )
    _refused(op + "labels must be [B] = [5], got [4]", lambda: call(u, projection, c, weight, bias, labels[:4]))
    _refused(
        op + "labels must lie in [0, K) = [0, 9), got 9 at position 0",
        lambda: call(u, projection, c, weight, bias, torch.full((5,), 9)),
    )
    _refused(
        op
        + "weight must not require grad: the classifier and the teacher are frozen and only u and its projection are",
        lambda: call(u, projection, c, weight.clone().requires_grad_(), bias, labels),
    )
    rows = u[:, None].expand(5, 2, 4)
    terms = (None,) * 4 + (0.0, 1.0, 0.0, 0.0, 0.0, 4.0, False, None, None)
    _refused(
        op + "u must be vectors [B, 1, Cs], got [5, 2, 4]",
        lambda: torch.ops.ijckd.projected_classifier_loss(rows, projection, c, weight, bias, labels, *terms),
    )


# --------------------------------------------------------------------------------------------------------------------
# both: torch's own checks, compilation, refusals


def op_samples():
    for norm, match, relu, side in (
        ("train", "map", True, 2),
        ("eval", "pooled", True, 2),
        ("bias", None, False, 2),
        ("bias", "pooled", False, 1),  # a linear connector
    ):
        leaves, keywords = connector_inputs((3, 4, side, side), 5, norm=norm, match=match, relu=relu)
        u = leaves["u"].detach().flatten(2).transpose(1, 2).contiguous().requires_grad_()
        stats = (None, None) if norm != "eval" else (keywords["running_mean"], keywords["running_var"])
        map_t = keywords.get("map_t")
        args = (u, leaves["weight"], leaves.get("bias"), leaves.get("bn_weight"), leaves.get("bn_bias"), *stats)
        rest = (
            map_t.flatten(2).transpose(1, 2).contiguous() if map_t is not None else None,
            keywords.get("pooled_t"),
            relu,
            1e-5,
        )
        yield f"connector_match {norm} {match}", torch.ops.ijckd.connector_match.default, (*args, *rest)
    z, *rest = loss_inputs()
    terms = (None, 0.1, 0.7, 0.5, 0.3, 0.9, 3.0, True, None, None)
    yield "classifier_loss", torch.ops.ijckd.classifier_loss.default, (z.requires_grad_(), *rest, *terms)
    (u, *projection), rest = projected_inputs()
    trained = [x.requires_grad_() for x in (u[:, None].clone(), *projection)]
    yield "projected_classifier_loss", torch.ops.ijckd.projected_classifier_loss.default, (*trained, *rest, *terms)
    yield "take_counts", torch.ops.ijckd.take_counts.default, (torch.empty(0),)
    u = torch.randn(3, 4, 6, dtype=F64)
    weight = torch.randn(5, 6, dtype=F64)
    yield "connector_project", torch.ops.ijckd.connector_project.default, (u, weight)
    y, mean, var = torch.ops.ijckd.connector_project(u, weight)
    ones, zeros = torch.ones(5, dtype=F64), torch.zeros(5, dtype=F64)
    apply_args = (y, None, ones, zeros, mean, var, torch.randn(3, 4, 5, dtype=F64), None, True, 1e-5)
    yield "connector_apply", torch.ops.ijckd.connector_apply.default, apply_args
    z, _, *pooled = torch.ops.ijckd.connector_apply(*apply_args)
    grads_args = (torch.randn(3, 5, dtype=F64), torch.ones((), dtype=F64), z, None, *pooled, 4, True)
    yield "connector_channel_grads", torch.ops.ijckd.connector_channel_grads.default, grads_args
    g, d_gamma, d_beta = torch.ops.ijckd.connector_channel_grads(*grads_args)
    yield (
        "connector_input_grads",
        torch.ops.ijckd.connector_input_grads.default,
        (
            g,
            torch.ones((), dtype=F64),
            d_gamma,
            d_beta,
            12.0,
            u,
            weight,
            y,
            None,
            ones,
            zeros,
            mean,
            var,
            apply_args[6],
            True,
            1e-5,
            True,
            True,
        ),
    )
    u, weight = torch.randn(3, 1, 6, dtype=F64), torch.randn(5, 6, dtype=F64)
    grad_z, z, pooled_t = torch.randn(3, 3, 5, dtype=F64).unbind()
    one = torch.ones((), dtype=F64)
    for name, match, needs in (
        ("pooled", (None, one, z, pooled_t), (True, True, True)),
        ("du", (one, None, None, None), (True, False, False)),
    ):
        yield (
            f"connector_linear_grads {name}",
            torch.ops.ijckd.connector_linear_grads.default,
            (grad_z, *match, u, weight, *needs),
        )


@pytest.mark.parametrize(("op", "args"), [pytest.param(op, args, id=name) for name, op, args in op_samples()])
def test_opcheck(op, args):
    torch.library.opcheck(op, args)


def test_every_op_is_sampled_and_registered_for_cuda():
    source = (pathlib.Path(__file__).parents[2] / "csrc" / "bindings.cpp").read_text()
    names = set(re.findall(r'^\s*"(\w+)\(|m\.def\("(\w+)\(', source, re.M))
    names = {a or b for a, b in names} - {"limit_stage"}  # which takes no tensor
    assert names == {op.name().split("::")[1].split(".")[0] for _, op, _ in op_samples()}
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ijckd::{name}", "CPU")
        if ijckd_fast.HAS_CUDA_LIBRARY:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ijckd::{name}", "CUDA")


def test_compile_fullgraph():
    leaves, keywords = connector_inputs((4, 6, 3, 3), dtype=torch.float32)
    weight_t, labels = torch.randn(9, 7), torch.tensor([0, 3, 8, 1])

    def head(u, weight, bn_weight, bn_bias, running_mean, running_var):
        z, fm = ops.connector_match(
            u,
            weight,
            bn_weight=bn_weight,
            bn_bias=bn_bias,
            running_mean=running_mean,
            running_var=running_var,
            map_t=keywords["map_t"],
        )
        loss, _, top1 = ops.classifier_loss(z, weight_t, None, labels, pooled_t=keywords["map_t"].mean((2, 3)), sr=1.0)
        return loss + fm, top1

    results = []
    for f in (head, torch.compile(head, fullgraph=True)):
        mine = [v.detach().clone().requires_grad_() for v in leaves.values()]
        running = [keywords["running_mean"].clone(), keywords["running_var"].clone()]
        loss, top1 = f(*mine, *running)
        loss.backward()
        results.append([loss.detach(), top1, *running, *[m.grad for m in mine]])
    assert_equal_to(results[1], results[0], 1e-5)


def _refused(text, call):
    with pytest.raises(RuntimeError, match=re.escape(text)):
        call()


def test_connector_match_refuses():
    leaves, keywords = connector_inputs()
    u, weight = leaves["u"].detach(), leaves["weight"].detach()
    bn = {"bn_weight": leaves["bn_weight"], "bn_bias": leaves["bn_bias"]}
    call = ops.connector_match
    _refused("u must be [B, Cs, H, W] or [B, Cs], got [5, 6, 3]", lambda: call(u[..., 0], weight))
    _refused("weight must be [Ct, Cs] with Cs = 6 like u, got [7, 5]", lambda: call(u, weight[:, :5]))
    _refused("weight must have u's dtype float64, got float32", lambda: call(u, weight.float()))
    _refused(
        "u must be a floating-point tensor (float64, float32, bfloat16, or float16 on a GPU), got int64",
        lambda: call(u.long(), weight.long()),
    )
    _refused(
        "map_t must be [B, Ct, H, W] = [5, 7, 3, 4] like Z, got [5, 7, 4, 4]",
        lambda: call(u, weight, map_t=torch.zeros(5, 7, 4, 4, dtype=F64)),
    )
    _refused(
        "pooled_t must be [B, Ct] = [5, 7], got [5, 6]", lambda: call(u, weight, pooled_t=torch.zeros(5, 6, dtype=F64))
    )
    _refused(
        "give map_t or pooled_t, not both",
        lambda: call(u, weight, map_t=keywords["map_t"], pooled_t=torch.zeros(5, 7, dtype=F64)),
    )
    _refused(
        "bn_weight must be [Ct] = [7], got [6]",
        lambda: call(u, weight, bn_weight=torch.ones(6, dtype=F64), bn_bias=torch.ones(7, dtype=F64)),
    )
    _refused("bn_weight and bn_bias go together", lambda: call(u, weight, bn_weight=torch.ones(7, dtype=F64)))
    _refused("bias must be None with BatchNorm", lambda: call(u, weight, torch.zeros(7, dtype=F64), **bn))
    _refused("running_mean and running_var are needed", lambda: call(u, weight, **bn, training=False))
    _refused("more than one position per channel", lambda: call(u[:1, :, :1, :1], weight, **bn))
    _refused("positions and channels must not be empty", lambda: call(u[:, :, :0], weight))
    _refused("positions and channels must not be empty", lambda: call(u, weight[:0]))
    _refused(
        "map_t must not require grad (the teacher is frozen)",
        lambda: call(u, weight, map_t=keywords["map_t"].clone().requires_grad_()),
    )
    _refused("float16 is for the GPU", lambda: call(u.half(), weight.half()))


def test_classifier_loss_refuses():
    z, weight, bias, labels, labels_b, mix, pooled_t = loss_inputs()
    call = ops.classifier_loss
    _refused("z must be [B, Ct], got [5]", lambda: call(z[:, 0], weight, bias, labels))
    _refused("weight must be [K, Ct] with Ct = 6 like z, got [9, 5]", lambda: call(z, weight[:, :5], bias, labels))
    _refused(
        "z and weight must both be float64 or neither, got float64 and float32",
        lambda: call(z, weight.float(), None, labels),
    )
    _refused("channels and classes must not be empty", lambda: call(z, weight[:0], None, labels))
    _refused("channels and classes must not be empty", lambda: call(z[:, :0], weight[:, :0], None, labels))
    _refused("bias must be [K] = [9], got [8]", lambda: call(z, weight, bias[:8], labels))
    _refused(
        "weight must be a floating-point tensor (float64, float32, bfloat16, or float16 on a GPU), got int64",
        lambda: call(z, weight.long(), None, labels),
    )
    _refused("z must be a floating-point tensor", lambda: call(z.long(), weight, None, labels))
    _refused("float16 is for the GPU", lambda: call(z.float(), weight.half(), None, labels))
    _refused("pooled_t must be [B, Ct] = [5, 6], got [5, 5]", lambda: call(z, weight, None, labels, pooled_t=z[:, :5]))
    _refused(
        "logits_t must be [B, K] = [5, 9], got [9, 5]", lambda: call(z, weight, None, labels, logits_t=z.new_ones(9, 5))
    )
    _refused(
        "mix must be [B] = [5], got [5, 1]", lambda: call(z, weight, None, labels, labels_b=labels_b, mix=mix[:, None])
    )
    _refused("labels must be [B] = [5], got [4]", lambda: call(z, weight, bias, labels[:4]))
    _refused("labels must be int64, got int32", lambda: call(z, weight, bias, labels.int()))
    _refused(
        "labels must lie in [0, K) = [0, 9), got 9 at position 2",
        lambda: call(z, weight, bias, torch.tensor([0, 1, 9, 2, 3])),
    )
    _refused(
        "labels_b must lie in [0, K) = [0, 9), got -1",
        lambda: call(z, weight, bias, labels, labels_b=-torch.ones(5, dtype=torch.int64), mix=mix),
    )
    _refused("labels_b and mix go together", lambda: call(z, weight, bias, labels, labels_b=labels_b))
    _refused("fm = 1 needs pooled_t", lambda: call(z, weight, bias, labels, fm=1.0))
    _refused("sr = 1 and kl = 0 need pooled_t or logits_t", lambda: call(z, weight, bias, labels, sr=1.0))
    _refused(
        "temperature must be > 0, got 0",
        lambda: call(z, weight, bias, labels, pooled_t=pooled_t, kl=1.0, temperature=0.0),
    )
    _refused("label_smoothing must lie in [0, 1], got 1.5", lambda: call(z, weight, bias, labels, label_smoothing=1.5))
    _refused("weight must not require grad", lambda: call(z, weight.clone().requires_grad_(), bias, labels))
    _refused(
        "pooled_t must not require grad",
        lambda: call(z, weight, bias, labels, pooled_t=pooled_t.clone().requires_grad_(), sr=1.0),
    )


@pytest.mark.parametrize("shape", [(4, 6, 3, 3), (4, 6)], ids=str)
@pytest.mark.parametrize("match", ["map", None])
def test_backward_makes_no_zeros_for_results_without_gradient(shape, match):
    """On a GPU each would be a launch, and one as large as the map."""
    leaves, keywords = connector_inputs(shape, norm="bias", match=match, relu=False)
    z, fm = ops.connector_match(*leaves.values(), **keywords)
    loss = ops.classifier_loss(z, torch.randn(9, 7, dtype=F64), None, torch.tensor([0, 3, 8, 1]))[0]
    results, called = [loss, fm] if match else [loss], []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.name())
            return func(*args, **(kwargs or {}))

    with Recorded():
        torch.autograd.grad(results, list(leaves.values()), [torch.full_like(x, 2) for x in results])
    assert "ijckd::connector" in "".join(called)
    assert [name for name in called if "zero" in name] == []


@pytest.mark.parametrize("op", ["connector_match", "classifier_loss", "projected_classifier_loss"])
def test_double_backward_is_refused(op):
    if op == "projected_classifier_loss":
        (x, *projection), (weight, bias, labels, *_) = projected_inputs()
        out = ops.projected_classifier_loss(x.requires_grad_(), *projection, weight, bias, labels)[0]
    elif op == "connector_match":
        leaves, keywords = connector_inputs()
        x = leaves["u"]
        out = ops.connector_match(x, leaves["weight"], map_t=keywords["map_t"])[1]
    else:
        x, weight, bias, labels, *_ = loss_inputs()
        out = ops.classifier_loss(x.requires_grad_(), weight, bias, labels)[0]
    _refused(f"{op}: double backward is not supported", lambda: torch.autograd.grad(out, x, create_graph=True))


# --------------------------------------------------------------------------------------------------------------------
# the libraries


def test_libraries_use_only_the_stable_abi():
    """What makes one wheel serve every torch >= 2.10: no undefined C++ symbol of torch, only the C shim's."""
    package = pathlib.Path(ijckd_fast.__file__).parent / "head"
    for library in package.glob("_C*.so"):
        listing = subprocess.run(
            ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
        ).stdout
        symbols = [line.split()[-1] for line in listing.splitlines()]
        assert any(s.startswith(("aoti_torch_", "torch_")) for s in symbols)
        assert [s for s in symbols if re.match(r"_ZN\w*(2at|3c10|5torch)", s)] == []


@pytest.mark.parametrize(
    ("content", "text"), [(None, "the compiled library _C.so is not in"), (b"not a library", "cannot load it")]
)
def test_missing_or_broken_library_says_what_to_do(tmp_path, content, text):
    package = tmp_path / "ijckd_fast"
    shutil.copytree(
        pathlib.Path(ijckd_fast.__file__).parent, package, ignore=shutil.ignore_patterns("_C*", "__pycache__")
    )
    if content is not None:
        (package / "head/_C.so").write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", "from ijckd_fast import connector_match"], cwd=tmp_path, capture_output=True, text=True
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert last.startswith("ImportError: ijckd_fast: ")
    assert text in last
    assert "pip install -e ." in last
