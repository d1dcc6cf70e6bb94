"""connector_match against reference.py, another program, in float64; gradcheck; half precision against eager;
refusals.
"""

import itertools

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings, strategies as st
from op_cases import (
    BAD,
    F64,
    SHAPES,
    assert_as_bad_as_eager,
    assert_equal_to,
    assert_no_worse_than_eager,
    connector_inputs,
    refused,
    run_connector,
)
from thread_counts import assert_same_for_any_thread_count
from torch import Tensor

from ijckd_fast import head
from ijckd_fast.head import reference
from ijckd_fast.head.dispatch import ops


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("norm", "match", "relu"),
    list(itertools.product(("train", "eval", "bias", "none"), ("map", "pooled", None), (True, False))),
)
def test_connector_match_equals_reference(shape, norm, match, relu):
    leaves, keywords = connector_inputs(shape, norm=norm, match=match, relu=relu)
    assert_equal_to(
        run_connector(head.connector_match, leaves, keywords),
        run_connector(reference.connector_match, leaves, keywords),
    )


@pytest.mark.parametrize("Ct", [1, 63, 64, 65, 130])
def test_connector_match_across_channel_tiles(Ct):
    leaves, keywords = connector_inputs((3, 4, 9, 9), Ct)  # 243 positions: a ragged last block of the statistics too
    assert_equal_to(
        run_connector(head.connector_match, leaves, keywords),
        run_connector(reference.connector_match, leaves, keywords),
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
        run_connector(head.connector_match, leaves, keywords),
        run_connector(reference.connector_match, leaves, keywords),
        1e-8,
    )


def test_connector_match_reads_any_layout():
    leaves, keywords = connector_inputs((4, 6, 5, 3))
    wanted = run_connector(head.connector_match, leaves, keywords)
    wide = torch.full(
        (4, 6, 10, 6), float("nan"), dtype=F64
    )  # NaN around the slice: read outside it and the result is NaN
    wide[:, :, ::2, ::2] = leaves["u"].detach()
    sliced = dict(leaves, u=wide[:, :, ::2, ::2])
    last = dict(leaves, u=leaves["u"].detach().contiguous(memory_format=torch.channels_last))
    square = dict(leaves, weight=leaves["weight"].detach()[:, :, None, None])
    for variant in (sliced, last, square):
        got = run_connector(head.connector_match, variant, keywords)
        got[5] = got[5].reshape(wanted[5].shape)
        assert_equal_to(got, wanted)


@pytest.mark.parametrize("norm", ["train", "eval", "bias", "none"])
@pytest.mark.parametrize("match", ["map", "pooled", None])
@pytest.mark.parametrize("shape", [(0, 6, 3, 4), (0, 6)], ids=str)
def test_connector_match_empty_batch(shape, norm, match):
    """As torch: nothing is learned from nothing, and the running statistics stay."""
    leaves, keywords = connector_inputs(shape, norm=norm, match=match)
    got = run_connector(head.connector_match, leaves, keywords)
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
    results = [run_connector(m.connector_match, leaves, keywords) for m in (head, reference)]
    assert_as_bad_as_eager(*results, everywhere=bad != bad)


def test_connector_match_gradient_of_channels_last_is_channels_last():
    leaves, keywords = connector_inputs((4, 6, 5, 3), channels_last=True)
    du = run_connector(head.connector_match, leaves, keywords)[4]
    assert du.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("match", ["pooled", None])
@pytest.mark.parametrize("wanted", [("u",), ("weight",), ("bias",), ("u", "bias"), ("weight", "bias")], ids=str)
def test_linear_connector_match_makes_the_gradients_that_are_asked_for(wanted, match):
    leaves, keywords = connector_inputs((4, 6), norm="bias", match=match, relu=False)
    gradients = []
    for op in (head.connector_match, reference.connector_match):
        mine = {k: v.detach().clone().requires_grad_(k in wanted) for k, v in leaves.items()}
        z, fm = op(*mine.values(), **keywords)
        loss = z.square().sum() + (fm if match else 0)
        gradients.append(torch.autograd.grad(loss, [mine[k] for k in wanted]))
    assert_equal_to(*gradients)


@pytest.mark.parametrize("reached", ["z", "fm"])
def test_linear_connector_match_of_which_only_one_result_is_used(reached):
    leaves, keywords = connector_inputs((4, 6), norm="bias", match="pooled", relu=False)
    gradients = []
    for op in (head.connector_match, reference.connector_match):
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
        return head.connector_match(named.pop("u"), named.pop("weight"), **named, **frozen)

    assert torch.autograd.gradcheck(op, tuple(leaves.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("match", ["map", "pooled"])
def test_connector_match_no_worse_than_eager(dtype, match):
    leaves, keywords = connector_inputs((16, 48, 7, 7), 80, match=match, dtype=dtype, channels_last=True)
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in keywords.items()}
    oracle = run_connector(reference.connector_match, {k: v.detach().double() for k, v in leaves.items()}, wide)
    fused, eager = (
        run_connector(head.connector_match, leaves, keywords),
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
        run_connector(head.connector_match, leaves, keywords),
        run_connector(reference.connector_match, leaves, keywords),
    )
    for f, e, o in zip(fused[:4], eager[:4], oracle[:4], strict=True):
        assert_no_worse_than_eager(f, e, o, floor=1e-3)


def test_connector_match_under_autocast():
    leaves, keywords = connector_inputs((6, 8, 4, 4), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, fm, *_, du, dw, dg, db = run_connector(head.connector_match, leaves, keywords)
    half = {k: v.detach().to(torch.bfloat16) if k in ("u", "weight") else v for k, v in leaves.items()}
    wanted = run_connector(head.connector_match, half, dict(keywords, map_t=keywords["map_t"].to(torch.bfloat16)))
    assert z.dtype == fm.dtype == du.dtype == dw.dtype == dg.dtype == db.dtype == torch.float32
    assert torch.equal(z, wanted[0])
    assert torch.equal(fm, wanted[1])
    assert torch.equal(du, wanted[4].float())


def test_connector_match_same_bits_for_any_thread_count():
    script = (
        "import torch, op_cases as t; from ijckd_fast import head\n"
        "leaves, kw = t.connector_inputs((16, 24, 7, 7), 72, dtype=torch.float32)\n"
        "out = t.run_connector(head.connector_match, leaves, kw)\n"
        "z, *rest = t.loss_inputs(B=33, Ct=24, K=101, dtype=torch.float32)\n"
        "out += t.run_loss(head.classifier_loss, z, *rest)\n"
        "print([x.double().sum().item().hex() for x in out])"
    )
    assert_same_for_any_thread_count(script)


@pytest.mark.parametrize("batch_stats", [True, False])
def test_map_gradients_of_one_op_are_those_of_the_two_between_which_ranks_sum(batch_stats):
    u, weight, map_t, grad_z = torch.randn(4, 9, 6), torch.randn(5, 6), torch.randn(4, 9, 5), torch.randn(4, 5)
    y, mean, var = ops.connector_project(u, weight)
    affine = (None, torch.randn(5), torch.randn(5), mean, var)
    z, fm, *kept = ops.connector_apply(y, *affine, map_t, None, True, 1e-5)
    match = (torch.full_like(fm, 3), z, None)
    g, *of_channels = ops.connector_channel_grads(grad_z, *match, *kept, 9, True)
    sums = of_channels if batch_stats else (None, None)
    rest = (u, weight, y, *affine, map_t)
    expected = ops.connector_input_grads(g, match[0], *sums, 36.0, *rest, True, 1e-5, True, True)
    got = ops.connector_map_grads(grad_z, *match, *kept, *rest, batch_stats, True, 1e-5, True, True, False)
    for ours, theirs in zip(got, (*expected, *of_channels), strict=True):
        assert torch.equal(ours, theirs)


def test_connector_match_inference_without_teacher():
    leaves, keywords = connector_inputs(norm="eval", match=None)
    with torch.no_grad():
        z, fm = head.connector_match(
            *list(leaves.values())[:2], bn_weight=leaves["bn_weight"], bn_bias=leaves["bn_bias"], **keywords
        )
    assert fm.item() == 0
    assert not z.requires_grad


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("module", [head, reference], ids=["fused", "reference"])
def test_connector_match_counts_batches_as_torch_does(momentum, module):
    """Training batches of unequal sizes, none counted in eval mode, an empty one counted; momentum None: the mean over
    all batches so far. A call that torch's layers refuse leaves the count that they leave.
    """
    leaves, _ = connector_inputs((6, 6, 3, 4))
    u, weight = leaves["u"].detach(), leaves["weight"].detach()
    norm = torch.nn.BatchNorm2d(7, momentum=momentum, dtype=F64).train()
    torch.nn.init.uniform_(norm.weight)
    ours = {k: v.clone() for k, v in norm.named_buffers()}
    affine = {"bn_weight": norm.weight.detach(), "bn_bias": norm.bias.detach()}

    def call(u, **how):
        return module.connector_match(u, weight, **affine, **ours, momentum=momentum, relu=False, **how)

    def expected(u):
        return norm(torch.nn.functional.conv2d(u, weight[:, :, None, None])).mean((2, 3))

    for i, (start, stop) in enumerate([(0, 3), (2, 6), (1, 2), (4, 4), (0, 6)], 1):
        z, _ = call(u[start:stop])
        assert_equal_to([z], [expected(u[start:stop]).detach()])
        assert ours["num_batches_tracked"] == norm.num_batches_tracked == i
        assert_equal_to([ours[k] for k in ("running_mean", "running_var")], [norm.running_mean, norm.running_var])
        norm.eval()
        assert_equal_to([call(u, training=False)[0]], [expected(u).detach()])
        norm.train()
    for wrong in (u[:, :5], u[:1, :, :1, :1]):
        for refusing in (call, expected):
            with pytest.raises((RuntimeError, ValueError)):
                refusing(wrong)
        assert ours["num_batches_tracked"] == norm.num_batches_tracked


def test_connector_match_counts_under_the_compiler():
    """The mean over all batches is taken on the device: no number is asked for, so nothing breaks the graph."""
    leaves, _ = connector_inputs((6, 6, 3, 4))
    u, weight = leaves["u"].detach(), leaves["weight"].detach()
    results = []
    for compiled in (False, True):
        buffers = torch.zeros(7, dtype=F64), torch.ones(7, dtype=F64), torch.tensor(0)

        def step(u, mean, var, count):
            return head.connector_match(
                u, weight, bn_weight=weight[:, 0], bn_bias=weight[:, 1], running_mean=mean, running_var=var,
                num_batches_tracked=count, momentum=None,
            )[0]  # fmt: skip

        run = torch.compile(step, fullgraph=True) if compiled else step
        results.append([run(u, *buffers), run(2 * u, *buffers), *buffers])
    assert_equal_to(results[1][:-1], results[0][:-1])
    assert results[0][-1] == results[1][-1] == 2


def _sync_worker(rank, world, folder, sizes):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    leaves, keywords = connector_inputs((sum(sizes), 6, 3, 3))
    first = sum(sizes[:rank])
    mine = slice(first, first + sizes[rank])
    share = {k: v.detach()[mine] if k == "u" else v.detach() for k, v in leaves.items()}
    keywords["map_t"] = keywords["map_t"][mine]

    def op(*args, **kwargs):
        return head.connector_match(*args, **kwargs, process_group=torch.distributed.group.WORLD)

    torch.save(run_connector(op, share, keywords), folder / f"rank{rank}.pt")
    counted = {"running_mean": torch.zeros(7, dtype=F64), "running_var": torch.ones(7, dtype=F64)}
    counted |= {"num_batches_tracked": torch.tensor(0), "momentum": None}
    for scale in (1, 2):
        op(scale * share["u"], *(share[k] for k in ("weight",)), bn_weight=share["bn_weight"], bn_bias=share["bn_bias"],
           **counted)  # fmt: skip
    torch.save(counted, folder / f"counted{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("sizes", [(3, 3), (4, 1), (5, 0)])
def test_connector_match_sync_batch_norm(tmp_path, sizes):
    """Two ranks with process_group see the statistics, and BatchNorm's backward, of one process with the whole
    batch.
    """
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
    norm = torch.nn.BatchNorm2d(7, momentum=None, dtype=F64).train()
    for scale in (1, 2):
        norm(torch.nn.functional.conv2d(scale * leaves["u"].detach(), leaves["weight"].detach()[:, :, None, None]))
    for rank in range(2):  # the mean over all batches, and each counted once on every rank
        counted = torch.load(tmp_path / f"counted{rank}.pt")
        assert counted["num_batches_tracked"] == norm.num_batches_tracked == 2
        assert_equal_to([counted[k] for k in ("running_mean", "running_var")], [norm.running_mean, norm.running_var])


def test_connector_match_refuses():
    leaves, keywords = connector_inputs()
    u, weight = leaves["u"].detach(), leaves["weight"].detach()
    bn = {"bn_weight": leaves["bn_weight"], "bn_bias": leaves["bn_bias"]}
    call = head.connector_match
    refused("u must be [B, Cs, H, W] or [B, Cs], got [5, 6, 3]", lambda: call(u[..., 0], weight))
    refused("weight must be [Ct, Cs] with Cs = 6 like u, got [7, 5]", lambda: call(u, weight[:, :5]))
    refused("weight must have u's dtype float64, got float32", lambda: call(u, weight.float()))
    refused("weight must have u's dtype bfloat16, got float32", lambda: call(u.bfloat16(), weight.float()))
    refused(
        "u must be a floating-point tensor (float64, float32, bfloat16, or float16 on a GPU), got int64",
        lambda: call(u.long(), weight.long()),
    )
    refused(
        "map_t must be [B, Ct, H, W] = [5, 7, 3, 4] like Z, got [5, 7, 4, 4]",
        lambda: call(u, weight, map_t=torch.zeros(5, 7, 4, 4, dtype=F64)),
    )
    refused(
        "pooled_t must be [B, Ct] = [5, 7], got [5, 6]", lambda: call(u, weight, pooled_t=torch.zeros(5, 6, dtype=F64))
    )
    refused(
        "give map_t or pooled_t, not both",
        lambda: call(u, weight, map_t=keywords["map_t"], pooled_t=torch.zeros(5, 7, dtype=F64)),
    )
    refused(
        "bn_weight must be [Ct] = [7], got [6]",
        lambda: call(u, weight, bn_weight=torch.ones(6, dtype=F64), bn_bias=torch.ones(7, dtype=F64)),
    )
    refused("bn_weight and bn_bias go together", lambda: call(u, weight, bn_weight=torch.ones(7, dtype=F64)))
    refused("bias must be None with BatchNorm", lambda: call(u, weight, torch.zeros(7, dtype=F64), **bn))
    refused("running_mean and running_var are needed", lambda: call(u, weight, **bn, training=False))
    refused("more than one position per channel", lambda: call(u[:1, :, :1, :1], weight, **bn))
    statistics = {"running_mean": torch.zeros(7, dtype=F64), "running_var": torch.ones(7, dtype=F64)}
    for each in (call, reference.connector_match):
        refused(
            "momentum None takes the mean over all batches and needs num_batches_tracked, got None: give it, or",
            lambda each=each: each(u, weight, **bn, **statistics, momentum=None),
        )
    refused("positions and channels must not be empty", lambda: call(u[:, :, :0], weight))
    refused("positions and channels must not be empty", lambda: call(u, weight[:0]))
    refused(
        "map_t must not require grad (the teacher is frozen)",
        lambda: call(u, weight, map_t=keywords["map_t"].clone().requires_grad_()),
    )
    refused("float16 is for the GPU", lambda: call(u.half(), weight.half()))
