"""The CPU's fast paths: chunks of classes, blocks of rows, the matched logits through W^T W; and what they promise.

Sizes are chosen for csrc/cpu/class_chunks.cpp: whole rows up to 2^20 logits, 2^19 logits in a chunk, 2^22 in a block of
rows, and W^T W from 2^18 weights.
"""

import pytest
import torch
from op_cases import assert_equal_to, assert_no_worse_than_eager, loss_inputs, run_loss
from thread_counts import assert_same_for_any_thread_count
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ijckd_fast import head
from ijckd_fast.head import reference

F64 = torch.float64
CHUNKED = {"kl": 0.0}  # the temperature KL needs whole rows
NO_MATCH = CHUNKED | {"sr": 0.0}
HARD = {"labels_b": None, "mix": None, "label_smoothing": 0.0}


def both(args, **changed) -> tuple[list[Tensor], list[Tensor]]:
    args = list(args)
    for i, name in ((4, "labels_b"), (5, "mix")):
        args[i] = changed.pop(name, args[i])
    return run_loss(head.classifier_loss, *args, **changed), run_loss(reference.classifier_loss, *args, **changed)


@pytest.mark.parametrize("K", [2048, 2049, 2111, 3071, 3072, 3073, 4097])
def test_chunk_boundaries(K):
    """512 rows: chunks of at most 1024 classes; 2048 classes are the most that are held whole."""
    assert_equal_to(*both(loss_inputs(512, 3, K), **NO_MATCH))


@pytest.mark.parametrize("changed", [{}, HARD, {"labels_b": None, "mix": None}, {"ce": 0.0}, {"fm": 0.0}], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_many_classes(changed, with_bias):
    args = list(loss_inputs(48, 13, 21841))
    args[2] = args[2] if with_bias else None
    assert_equal_to(*both(args, **CHUNKED, **changed))


BLOCKS = (71, 65537)  # B, K: blocks of 36 and 35 rows


def test_many_classes_in_blocks_of_rows():
    B, K = BLOCKS
    assert_equal_to(*both(loss_inputs(B, 5, K)))  # KL
    args = list(loss_inputs(B, 5, K))
    args[6] = None
    logits_t = torch.randn(B, K, dtype=F64)
    assert_equal_to(*both(args, logits_t=logits_t, fm=0.0))
    assert_equal_to(*both(args, logits_t=logits_t, fm=0.0, kl=0.0))


def test_without_gradient():
    z, weight, bias, labels, *_, pooled_t = loss_inputs(48, 13, 21841)
    keywords = {"pooled_t": pooled_t, "sr": 1.0, "fm": 0.5}
    got = head.classifier_loss(z, weight, bias, labels, **keywords)
    assert_equal_to(got, reference.classifier_loss(z, weight, bias, labels, **keywords))


def assert_fused_no_worse_than_eager(args, **changed):
    wide = [t.double() if t.is_floating_point() else t for t in args]
    eager_args = (*args[:2], args[2].to(args[1].dtype), *args[3:])  # F.linear wants one dtype, as under autocast
    fused = run_loss(head.classifier_loss, *args, **changed)
    eager, oracle = (run_loss(reference.classifier_loss, *a, **changed) for a in (eager_args, wide))
    for i in (0, 1, 3):
        assert fused[i].isfinite().all()
        # a mean's rounding errors may happen to cancel in eager: half a unit of bfloat16 is 2e-3
        floor = 1e-4 * oracle[i].abs().max().item() if args[1].dtype == torch.bfloat16 and i < 2 else 1e-6
        assert_no_worse_than_eager(fused[i], eager[i], oracle[i], floor=floor)


WAYS = {  # (B, K), what is other than: every loss
    "chunks": ((64, 21841), NO_MATCH),
    "chunks with match": ((64, 21841), CHUNKED),
    "whole rows": ((64, 21841), {}),
    "blocks of rows": (BLOCKS, {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_many_classes_no_worse_than_eager(dtype, way):
    (B, K), changed = WAYS[way]
    assert_fused_no_worse_than_eager(loss_inputs(B, 16, K, dtype), **changed)


@pytest.mark.parametrize("K", [9, 21841])
@pytest.mark.parametrize("goal", [1e-8, 1e-7, 1e-6])
def test_confident_samples_keep_their_digits(K, goal):
    """In float32 lse - logit of the label would be 0 or a multiple of its last place, about 2e-6."""
    B, Ct = 64, 4
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(K, Ct, generator=g) * 0.01
    weight[0] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    z = torch.randn(B, Ct, generator=g) * 0.1
    z[:, 0] = float(torch.tensor((K - 1) / goal).log())
    z = (z + torch.rand(B, 1, generator=g)).requires_grad_()
    labels = torch.zeros(B, dtype=torch.int64)
    loss, *_ = head.classifier_loss(z, weight, None, labels)
    loss.backward()
    logits = z.detach().double() @ weight.double().T
    others = (logits[:, 1:] - logits[:, :1]).exp()
    s = others.sum(1, keepdim=True)
    wanted = s.log1p().mean().item()
    grad = (others @ weight[1:].double() - s * weight[0].double()) / (1 + s) / B
    assert 0.05 * goal < wanted < 5 * goal
    assert abs(loss.item() / wanted - 1) < 2e-5
    assert ((z.grad.double() - grad).norm() / grad.norm()).item() < 2e-5


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_logits_of_a_thousand(way, dtype):
    """Labels far below the best class: the anchor must be raised, in the first chunk or in a later one, and again."""
    (B, K), changed = WAYS[way]
    z, weight, bias, labels, *rest = loss_inputs(B, 13, K, dtype)
    z = z / z.norm(dim=1, keepdim=True)
    weight = weight / weight.norm(dim=1, keepdim=True) * torch.linspace(1, 1000, K, dtype=dtype)[:, None]
    args = (z, weight, bias, labels, *rest)
    if dtype == F64:
        assert_equal_to(*both(args, **changed), 1e-10)
    else:
        assert_fused_no_worse_than_eager(args, **changed)


def test_rising_logits_raise_the_anchor_again_and_again():
    K = 21841
    z, weight = torch.ones(64, 1, dtype=torch.float32, requires_grad=True), torch.linspace(-1000, 1000, K)[:, None]
    labels = torch.arange(64) * 300
    loss, *_ = head.classifier_loss(z, weight, None, labels)
    loss.backward()
    z64 = z.detach().double().requires_grad_()
    wanted, *_ = reference.classifier_loss(z64, weight.double(), None, labels)
    wanted.backward()
    assert abs(loss.item() / wanted.item() - 1) < 1e-6
    torch.testing.assert_close(z.grad.double(), z64.grad, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("where", ["z", "weight", "weight of the labels", "pooled_t"])
@pytest.mark.parametrize(
    ("B", "K", "changed"), [(6, 9, {}), (6, 9, NO_MATCH), (64, 21841, CHUNKED), (64, 21841, NO_MATCH), (*BLOCKS, {})]
)
def test_bad_input_gives_nan(bad, where, B, K, changed):
    z, weight, bias, labels, *_, pooled_t = loss_inputs(B, 13, K, torch.float32)
    if where == "z":
        z[3, 2] = bad
    elif where == "weight":
        weight[:, 2] = bad
    elif where == "weight of the labels":
        weight[labels[3]] = bad
    else:
        pooled_t[3, 2] = bad
        changed = changed | {"fm": 1.0}
    z.requires_grad_()
    keywords = {"sr": 1.0, "kl": 1.0} | changed
    loss, *_ = head.classifier_loss(z, weight, bias, labels, pooled_t=pooled_t, **keywords)
    loss.backward()
    assert not loss.isfinite()
    if where != "pooled_t" or bad != bad:
        assert loss.isnan() or where == "weight of the labels"
        assert z.grad[3].isnan().any()


def test_exponential_is_accurate_to_two_units_in_the_last_place():
    """K = 2, weights 0 and 1, label 0: dz is e^x / (1 + e^x), by class chunks (more than 2^20 logits)."""
    B = 2**19 + 16
    x = torch.linspace(-87, 88, B)[:, None].requires_grad_()
    weight = torch.tensor([[0.0], [1.0]])
    head.classifier_loss(x, weight, None, torch.zeros(B, dtype=torch.int64), ce=float(B))[0].backward()
    error = (x.grad.double() / x.detach().double().sigmoid() - 1).abs()
    assert error.max().item() < 4 * 2**-24 + 2**-24  # e^x, the sum and the quotient


def test_matched_logits_follow_the_weight():
    """W^T W is kept between calls: a change of one element, anywhere, must be seen, as must an exchange of rows."""
    args = list(loss_inputs(4, 13, 21841))
    changed = CHUNKED | {"ce": 0.0, "sr": 1.0, "fm": 0.0}
    weight = args[1]
    assert_equal_to(*both(args, **changed))
    for i in (0, 12, 4096 * 13 + 5, 21840 * 13, 21841 * 13 - 1):
        weight.view(-1)[i] *= -50
        assert_equal_to(*both(args, **changed))
    weight[[3, 20000]] = weight[[20000, 3]] * torch.tensor([[1.0], [-1.0]])
    assert_equal_to(*both(args, **changed))
    args[1] = weight.float().double()
    assert_equal_to(*both(args, **changed))


def test_matched_logits_of_many_classifiers_in_turn():
    several = [loss_inputs(4, 13, 21841, seed=seed) for seed in range(6)]
    for _ in range(2):
        for args in several:
            assert_equal_to(*both(args, **CHUNKED))


def run_rounded(args, **changed) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        return run_loss(head.classifier_loss, *args, **changed)


def forget_matched_logits():
    """Other classifiers take the places of those whose W^T W is kept."""
    for seed in range(10, 14):
        z, weight, bias, labels, *_, pooled_t = loss_inputs(1, 13, 21841, torch.float32, seed)
        head.classifier_loss(z, weight, bias, labels, pooled_t=pooled_t, sr=1.0)


@pytest.mark.parametrize("layout", ["rows", "columns", "wider"])
@pytest.mark.parametrize("changed", [{}, HARD], ids=["soft", "hard"])
@pytest.mark.parametrize("way", WAYS)
def test_classifier_is_rounded_as_if_beforehand(way, changed, layout):
    """Under autocast a float32 classifier is rounded by the chunk: the same bits as from one in bfloat16."""
    (B, K), others = WAYS[way]
    args = list(loss_inputs(B, 24, K, torch.float32))
    args[1] = {"rows": args[1], "columns": args[1].T.contiguous().T, "wider": args[1].double()}[layout]
    for i, name in ((4, "labels_b"), (5, "mix")):
        args[i] = changed.get(name, args[i])
    keywords = others | {k: v for k, v in changed.items() if k == "label_smoothing"}
    rounded = [*args]
    rounded[1] = args[1].bfloat16()
    got = run_rounded(args, **keywords)
    forget_matched_logits()
    assert_equal_to(got, run_loss(head.classifier_loss, *rounded, **keywords), 0)


def test_matched_logits_follow_a_classifier_that_is_rounded():
    args = loss_inputs(64, 24, 21841, torch.float32)
    weight, changed = args[1], CHUNKED | {"ce": 0.0, "sr": 1.0, "fm": 0.0}
    first = run_rounded(args, **changed)
    for i in (0, 64 * 24 - 1, 64 * 24, 4096 * 24 + 5, 21840 * 24, 21841 * 24 - 1):
        weight.view(-1)[i] = -50
        second = run_rounded(args, **changed)
        assert first[0] != second[0]
        forget_matched_logits()
        first = run_rounded(args, **changed)
        assert_equal_to(second, first, 0)


def test_matched_logits_are_kept_for_any_batch():
    def products(B: int) -> int:
        z, _, _, labels, *_, pooled_t = loss_inputs(B, 24, 21841, torch.float32)
        with profile(activities=[ProfilerActivity.CPU]) as profiled, torch.autocast("cpu", torch.bfloat16):
            head.classifier_loss(z, weight, bias, labels, pooled_t=pooled_t, sr=1.0)
        return sum(e.name() == "aten::mm" for e in profiled.profiler.kineto_results.events())

    _, weight, bias, *_ = loss_inputs(1, 24, 21841, torch.float32)
    forget_matched_logits()
    made, kept = products(64), products(64)
    assert made > kept
    forget_matched_logits()
    products(256)
    assert products(64) == kept


def peak_bytes(op, z, weight, bias, labels, pooled_t, **keywords) -> int:
    """Most bytes that torch held at once beyond those before, forward and backward."""
    z = z.detach().clone().requires_grad_()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        op(z, weight, bias, labels, pooled_t=pooled_t, **keywords)[0].backward()
    held = most = 0
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("terms", [{"sr": 1.0, "fm": 1.0}, {}], ids=["match", "cross-entropy"])
@pytest.mark.parametrize("autocast", [False, True])
def test_memory_does_not_grow_with_the_classes(terms, autocast):
    z, weight, bias, labels, *_, pooled_t = loss_inputs(256, 32, 21841, torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert_memory_does_not_grow((z, weight, bias, labels, pooled_t), terms)


def assert_memory_does_not_grow(args, terms):
    z, weight, bias, labels, pooled_t = args
    head.classifier_loss(*args[:4], pooled_t=pooled_t, **terms)  # W^T W is made once
    ours, eager = (
        peak_bytes(head.classifier_loss, *args, **terms),
        peak_bytes(reference.classifier_loss, *args, **terms),
    )
    assert 0 < ours < eager / 8
    half = (z, weight[:10000], bias[:10000], labels % 10000, pooled_t)
    head.classifier_loss(*half[:4], pooled_t=pooled_t, **terms)
    assert ours < 1.1 * peak_bytes(head.classifier_loss, *half, **terms)


def test_memory_of_whole_rows_does_not_grow_with_the_batch():
    """2^22 logits and as many of W d, in float32, and four rows for each thread."""
    z, weight, bias, labels, *_, pooled_t = loss_inputs(768, 16, 21841, torch.float32)
    args, fewer = (z, weight, bias, labels, pooled_t), (z[:384], weight, bias, labels[:384], pooled_t[:384])
    ours, half = (peak_bytes(head.classifier_loss, *a, kl=1.0) for a in (args, fewer))
    assert 2**24 < ours < 2**25 + 2**22
    assert ours < 1.05 * half
    assert ours < peak_bytes(reference.classifier_loss, *fewer, kl=1.0) / 2


def test_same_bits_for_any_thread_count_and_every_time():
    script = (
        "import torch, op_cases as t; from ijckd_fast import head\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "  for B, Ct, K, kl in ((96, 24, 21841, 0.0), (71, 24, 65537, 0.9), (33, 520, 1000, 0.0)):\n"
        "    args = t.loss_inputs(B, Ct, K, dtype)\n"
        "    for _ in range(3):\n"
        "      out = t.run_loss(head.classifier_loss, *args, kl=kl)\n"
        "      print([x.double().sum().item().hex() for x in out])\n"
        "args = t.loss_inputs(96, 24, 21841, torch.float32)\n"
        "z, weight, d = args[0], args[1], args[0].clone()\n"
        "d[:, 1:20:2] = -d[:, :20:2]\n"
        "weight[:10, :20] = 1e4 * torch.eye(10).repeat_interleave(2, 1)\n"  # of more rows than are kept beside W^T W
        "for _ in range(3):\n"
        "  out = t.run_loss(head.classifier_loss, *args[:6], z - d, kl=0.0)\n"
        "  print([x.double().sum().item().hex() for x in out])\n"
        "with torch.autocast('cpu', torch.bfloat16):\n"
        "  for _ in range(3):\n"
        "    out = t.run_loss(head.classifier_loss, *args, kl=0.0)\n"
        "    print([x.double().sum().item().hex() for x in out])\n"
    )
    for lines in assert_same_for_any_thread_count(script):
        assert all(len(set(lines[i : i + 3])) == 1 for i in range(0, 24, 3))
