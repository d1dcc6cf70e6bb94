"""class_map_loss against reference.py in float64, at its edges, and in half precision against eager. Runs on the CPU's
ops; test_emulated_ops.py runs it again on the CUDA kernels (IJCKD_KERNELS=cuda).
"""

import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from op_cases import (
    CLASS_MAP_TERMS as TERMS,
    F64,
    assert_equal_to,
    class_map_inputs,
    decided_class_map_inputs,
    refused,
    run_class_maps as run,
)

from ijckd_fast import head
from ijckd_fast.head import reference

CUDA = os.environ.get("IJCKD_KERNELS", "cpu") == "cuda"
HALF = [torch.bfloat16, torch.float16] if CUDA else [torch.bfloat16]
SEEDS = 1 if CUDA else 8  # emulated kernels are slow
SHAPES = {  # B, Ct, (H, W), K, scales
    "7x7": (3, 5, (7, 7), 9, (1, 2, 4)),
    "divisible": (2, 6, (8, 8), 70, (1, 2, 4)),
    "smaller than the scales": (2, 4, (3, 2), 33, (1, 2, 4)),
    "one position": (3, 3, (1, 1), 4, (1,)),
    "thirds": (1, 4, (5, 6), 2, (1, 3)),
    "one class": (2, 4, (4, 4), 1, (1, 2)),
}


def both(*args, **keywords):
    return [run(op, *args, **keywords) for op in (head, reference)]


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("more", [False, True], ids=["", "bias and shares"])
def test_equals_reference(shape, term, more):
    *sizes, scales = SHAPES[shape]
    maps, weight, bias, maps_t, labels, share = class_map_inputs(*sizes)
    given = {"share": share} if more else {}
    got, want = both(maps, weight, bias if more else None, maps_t, labels, scales=scales, **TERMS[term], **given)
    assert_equal_to(got, want)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 7), st.integers(1, 9), st.integers(1, 9), st.integers(1, 80),
       st.sampled_from([(1,), (1, 2), (1, 3), (1, 2, 4), (1, 2, 6)]), st.integers(0, 99))  # fmt: skip
def test_any_shape(B, Ct, H, W, K, scales, seed):
    maps, weight, bias, maps_t, labels, share = class_map_inputs(B, Ct, (H, W), K, seed=seed)
    got, want = both(maps, weight, bias, maps_t, labels, scales=scales, share=share, **TERMS["all"])
    assert_equal_to(got, want, 1e-10)


def test_class_maps_alone_need_neither_labels_nor_scale_1():
    maps, weight, bias, maps_t, *_ = class_map_inputs()
    for scales in ((2,), (4,), (2, 4)):
        got, want = both(maps, weight, bias, maps_t, None, scales=scales, cam=1.0)
        assert_equal_to(got, want)
        assert got[0] > 0


def test_one_scale_is_the_classifier_on_the_mean():
    """At scale 1 alone: classifier_loss's KL of the pooled features."""
    maps, weight, bias, maps_t, labels, _ = class_map_inputs()
    got = run(head, maps, weight, bias, maps_t, labels, scales=(1,), kl=0.9, temperature=3.0)
    z = maps.mean((2, 3)).requires_grad_()
    loss, parts, _ = head.classifier_loss(
        z, weight, bias, labels, pooled_t=maps_t.mean((2, 3)), ce=0.0, kl=0.9, temperature=3.0
    )
    (dz,) = torch.autograd.grad(2.5 * loss, z)
    H, W = maps.shape[2:]
    want = [loss.detach(), parts[3], (dz / (H * W))[:, :, None, None].expand_as(maps)]
    assert_equal_to([got[0], got[1][0], got[2]], want)


@pytest.mark.parametrize("dtype", [F64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("term", TERMS)
def test_equal_maps_give_nothing(term, dtype):
    """Exactly: value and gradient."""
    acc = F64 if dtype == F64 else torch.float32
    for K in (2, 3, 300):
        maps, weight, bias, _, labels, share = class_map_inputs(K=K, dtype=dtype)
        maps = maps.to(acc)
        loss, parts, grad = run(head, maps, weight, bias, maps, labels, share=share, **TERMS[term])
        assert loss == 0
        assert not parts.any()
        assert not grad.any()


def test_what_complements_the_whole_map_counts_twice():
    """A teacher whose answer at one of four quarters is another than at scale 1, at which it is right, or wrong."""
    weight = torch.eye(3, dtype=F64)
    maps_t = torch.zeros(1, 3, 2, 2, dtype=F64)
    maps_t[0, 0], maps_t[0, 1, 1, 1] = 1.0, 2.0  # class 0 but in the last quarter
    maps = torch.randn(1, 3, 2, 2, dtype=F64)
    x, x_t = (reference.pooled_positions(each, (1, 2))[0] for each in (maps, maps_t))
    rows = F.kl_div(x.log_softmax(1), x_t.log_softmax(1), reduction="none", log_target=True).sum(1)  # [5]
    once, twice = torch.ones(5, dtype=F64), torch.tensor([1, 1, 1, 1, 2], dtype=F64)
    for label, counts in ((0, twice), (1, twice), (2, once)):
        loss = head.class_map_loss(
            maps, weight, None, maps_t, torch.tensor([label]), scales=(1, 2), kl=1.0, temperature=1.0
        )[0]
        torch.testing.assert_close(loss, (counts * rows).mean(), rtol=1e-12, atol=0)


def test_many_images_are_each_for_themselves():
    """More logits than exist at a time: what a batch gives is the mean of what its images do."""
    maps, weight, bias, maps_t, labels, share = class_map_inputs(B=16, Ct=8, K=1500)
    loss, parts, grad = run(head, maps, weight, bias, maps_t, labels, share=share, **TERMS["all"])
    each = [[x[b : b + 1] for x in (maps, maps_t, labels, share)] for b in range(16)]
    ones = [run(head, x, weight, bias, x_t, y, share=s, **TERMS["all"]) for x, x_t, y, s in each]
    assert_equal_to([loss, parts], [torch.stack([one[i] for one in ones]).mean(0) for i in (0, 1)])
    assert_equal_to([grad], [torch.cat([one[2] for one in ones]) / 16])


@pytest.mark.parametrize("scales", [(1,), (1, 2, 4), (3,), (1, 5)])
@pytest.mark.parametrize("size", [(7, 7), (1, 1), (2, 9), (8, 8), (4, 5)])
def test_pooled_positions_are_adaptive_pools(size, scales):
    maps = torch.randn(2, 3, *size, dtype=F64)
    finest = F.adaptive_avg_pool2d(maps, scales[-1])
    want = torch.cat([F.adaptive_avg_pool2d(finest, s).flatten(2) for s in scales], 2).transpose(1, 2)
    for layout in (torch.contiguous_format, torch.channels_last):
        got = head.pooled_positions(maps.contiguous(memory_format=layout), scales)
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


def test_what_was_pooled_for_inference_first_can_be_trained():
    """The constant of a size is kept: one made within inference mode could not be saved for backward."""
    maps = torch.randn(2, 3, 6, 11, dtype=F64)  # a size of this test's own
    with torch.inference_mode():
        want = head.pooled_positions(maps, (1, 3))
    leaf = maps.requires_grad_()
    got = head.pooled_positions(leaf, (1, 3))
    got.sum().backward()
    assert_equal_to([got.detach(), leaf.grad.sum()], [want.clone(), torch.tensor(60.0, dtype=F64)])


def test_gradcheck():
    maps, weight, bias, maps_t, labels, share = class_map_inputs(2, 3, (3, 3), 5)
    assert torch.autograd.gradcheck(
        lambda x: head.class_map_loss(x, weight, bias, maps_t, labels, scales=(1, 2), share=share, **TERMS["all"])[0],
        maps.requires_grad_(),
    )


def errors_over_seeds(make, dtype, term):
    """([loss' error, gradient's], eager's), root mean squares over the seeds; make(seed) -> arguments.

    Relative, but to 1e-12 where the oracle's own formula has no digits left.
    """
    errors = torch.zeros(2, 2, dtype=F64)
    for seed in range(SEEDS):
        maps, weight, bias, maps_t, labels = make(seed)
        oracle = run(reference, *(x.double() for x in (maps, weight, bias, maps_t)), labels, **term)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            eager = run(reference, maps, weight, bias.to(dtype), maps_t, labels, **term)
        for i, got in enumerate((run(head, maps, weight, bias, maps_t, labels, **term), eager)):
            for j, result in enumerate((0, 2)):
                difference = (got[result].double() - oracle[result]).norm()
                errors[i, j] += (difference / (oracle[result].norm() + 1e-12)) ** 2
    return (errors / SEEDS).sqrt()


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_no_worse_than_eager(term, dtype):
    def make(seed):
        return decided_class_map_inputs(6, 40, (7, 7), 100, dtype, seed)

    ours, eagers = errors_over_seeds(make, dtype, TERMS[term])
    assert (ours <= 2 * eagers + 2**-20).all(), f"{ours.tolist()}, eager's {eagers.tolist()}"


@pytest.mark.parametrize("size", [3.0, 10.0, 30.0])
@pytest.mark.parametrize("term", ["all"] if CUDA else TERMS)
def test_confident_and_far_rows_are_no_worse_than_eager(term, size):
    """A student far from its teacher, both sure of the label: where differences of large logits keep no digit."""

    def make(seed):
        maps, weight, bias, maps_t, labels, _ = class_map_inputs(8, 24, (4, 4), 60, dtype=torch.float32, seed=seed)
        toward = size * weight[labels][:, :, None, None]
        return maps + toward, weight, bias, maps_t.roll(1, 0) + toward, labels

    ours, eagers = errors_over_seeds(make, torch.float32, TERMS[term])
    assert (ours <= 2 * eagers + 2**-20).all(), f"{ours.tolist()}, eager's {eagers.tolist()}"


def test_autocast_takes_the_products_in_its_dtype():
    maps, weight, bias, maps_t, labels, share = class_map_inputs(dtype=torch.float32)
    want = run(head, maps, weight.bfloat16(), bias, maps_t, labels, share=share, **TERMS["all"])
    leaf = maps.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = head.class_map_loss(leaf, weight, bias, maps_t, labels, share=share, **TERMS["all"])
    (2.5 * loss).backward()
    assert_equal_to([loss.detach(), parts, leaf.grad], want, 0)
    assert loss.dtype == leaf.grad.dtype == torch.float32


def test_half_maps_get_a_half_gradient():
    maps, weight, bias, maps_t, labels, _ = class_map_inputs(dtype=torch.bfloat16)
    want = run(head, maps.float(), weight, bias, maps_t, labels, kl=1.0)
    got = run(head, maps.bfloat16(), weight, bias, maps_t, labels, kl=1.0)
    assert got[2].dtype == torch.bfloat16
    assert_equal_to([got[0], got[2].float()], [want[0], want[2].bfloat16().float()], 0)


def test_compiles_whole():
    maps, weight, bias, maps_t, labels, share = class_map_inputs(dtype=torch.float32)

    def step(maps, kl):
        return head.class_map_loss(maps, weight, bias, maps_t, labels, share=share, kl=kl, cam=1.0)[0]

    results = []
    for f in (step, torch.compile(step, fullgraph=True)):
        leaf = maps.clone().requires_grad_()
        loss = f(leaf, 0.9)
        loss.backward()
        results.append([loss.detach(), leaf.grad])
    assert_equal_to(*results, 1e-5)


def test_empty_batch_is_the_mean_of_nothing():
    maps, weight, bias, maps_t, labels, _ = class_map_inputs(B=0)
    loss, parts, grad = run(head, maps, weight, bias, maps_t, labels, **TERMS["all"])
    assert loss.isnan()
    assert parts.isnan().all()
    assert grad.shape == maps.shape
    loss, parts, _ = run(head, maps, weight, bias, maps_t, labels, cam=1.0)
    assert loss.isnan()
    assert parts.isnan().tolist() == [False, False, True]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("term", TERMS)
def test_a_broken_feature_never_makes_a_finite_loss(term, value):
    for of_teacher in (False, True):
        maps, weight, bias, maps_t, labels, _ = class_map_inputs()
        (maps_t if of_teacher else maps)[1, 2, 3, 3] = value
        assert not run(head, maps, weight, bias, maps_t, labels, **TERMS[term])[0].isfinite()


def test_pooled_maps_are_taken_as_they_are():
    maps, weight, bias, maps_t, labels, _ = class_map_inputs()
    want = run(head, maps, weight, bias, maps_t, labels, kl=1.0)
    x = head.pooled_positions(maps).detach()
    got = run(head, x, weight, bias, head.pooled_positions(maps_t), labels, kl=1.0)
    assert_equal_to(got[:2], want[:2], 0)
    leaf = maps.clone().requires_grad_()
    head.pooled_positions(leaf).backward(got[2])
    assert_equal_to([leaf.grad], [want[2]])


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
def test_any_memory_format(dtype):
    """Slices, strides, transposes, expansions: values as of the same numbers in a contiguous map, and a gradient in the
    map's own memory format where it is one of the two.
    """
    acc = F64 if dtype == F64 else torch.float32
    weight, labels, maps_t = torch.randn(9, 5, dtype=acc), torch.tensor([0, 3, 8]), torch.randn(3, 5, 7, 6, dtype=dtype)
    made = {
        "contiguous": torch.randn(3, 5, 7, 6, dtype=dtype),
        "channels-last": torch.randn(3, 5, 7, 6, dtype=dtype).contiguous(memory_format=torch.channels_last),
        "cropped": torch.randn(3, 5, 9, 8, dtype=dtype)[:, :, 1:-1, 1:-1],
        "every second": torch.randn(6, 10, 14, 12, dtype=dtype)[::2, ::2, ::2, ::2],
        "transposed": torch.randn(3, 5, 6, 7, dtype=dtype).mT,
        "some channels": torch.randn(3, 7, 6, 10, dtype=dtype).permute(0, 3, 1, 2)[:, 2:7],
        "expanded": torch.randn(3, 5, 1, 1, dtype=dtype).expand(3, 5, 7, 6),
        "one image expanded": torch.randn(1, 5, 7, 6, dtype=dtype).expand(3, 5, 7, 6),
    }
    for name, maps in made.items():
        found = []
        for x in (maps, maps.contiguous()):
            leaf = x.detach().requires_grad_()
            for teachers in (maps_t, maps_t.contiguous(memory_format=torch.channels_last)):
                loss, _ = head.class_map_loss(leaf, weight, None, teachers, labels, kl=1.0, cam=1.0)
                found.append([loss.detach(), *torch.autograd.grad(loss, leaf)])
        for other in found[1:]:
            tolerance = {F64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
            torch.testing.assert_close(found[0], other, rtol=tolerance, atol=tolerance / 100, msg=name)
        if name in ("contiguous", "channels-last"):
            assert found[0][1].stride() == maps.stride()


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_a_gradient_is_scaled_once(dtype):
    """By what flows into the loss: twice with the graph kept, and through pooled maps as through maps."""
    maps, weight, bias, maps_t, labels, _ = class_map_inputs(dtype=dtype)
    for x in (maps, head.pooled_positions(maps)):
        leaf = x.detach().requires_grad_()
        loss, _ = head.class_map_loss(leaf, weight, bias, maps_t, labels, kl=1.0)
        (one,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        for factor in (-3.0, 2.0**16, 0.0):
            (more,) = torch.autograd.grad(loss, leaf, torch.tensor(factor, dtype=loss.dtype), retain_graph=True)
            assert_equal_to([more], [factor * one], 1e-5 if dtype == torch.float32 else 1e-12)


def test_a_teacher_of_another_precision_is_pooled_in_the_students():
    maps, weight, bias, maps_t, labels, _ = class_map_inputs(3, 5, (7, 7), 9)
    for other in (torch.float32, torch.bfloat16):
        got = run(head, maps, weight, bias, maps_t.to(other), labels, **TERMS["all"])
        want = run(head, maps, weight, bias, maps_t.to(other).double(), labels, **TERMS["all"])
        assert_equal_to(got, want, 0)


def test_the_teachers_maps_may_have_another_size():
    maps, weight, bias, _, labels, _ = class_map_inputs()
    maps_t = torch.randn(*maps.shape[:2], 5, 9, dtype=F64)
    got, want = both(maps, weight, bias, maps_t, labels, **TERMS["all"])
    assert_equal_to(got, want)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"scales": ()}, "class_map_loss: scales must rise"),
        ({"scales": (2, 4)}, "class_map_loss: scales must begin with 1 where kl or DKD are on, got 2"),
        ({"scales": (1, 2, 3)}, "class_map_loss: scales must rise, from 1 or more, and each divide the last, got"),
        ({"scales": (1, 4, 2)}, "class_map_loss: scales must rise"),
        ({"scales": (0, 1)}, "class_map_loss: scales must rise"),
        ({"labels": None}, "class_map_loss: kl and DKD need labels"),
        *(
            (
                {"maps_t": torch.zeros(*wrong, dtype=F64)},
                "class_map_loss: maps_t must be [B, Ct, H, W], or pooled [B, P, Ct] with P = 21 positions of the "
                f"scales, B = 3 and Ct = 5 like maps, got {list(wrong)}",
            )
            for wrong in ((3, 9, 2, 2), (2, 5, 2, 2), (3, 20, 5), (3, 21, 6), (2, 21, 5), (3, 5), (3, 5, 2, 2, 2))
        ),
        *(
            (
                {"maps": torch.zeros(*wrong, dtype=F64)},
                "class_map_loss: maps must be [B, Ct, H, W], or pooled [B, P, Ct] with P = 21 positions of the scales, "
                f"got {list(wrong)}",
            )
            for wrong in ((3, 5), (3, 20, 5), (3, 5, 2, 2, 2))
        ),
        ({"maps": torch.zeros(3, 5, 2, 2, dtype=torch.int64)}, "maps must be a floating-point tensor"),
        ({"maps_t": torch.zeros(3, 5, 2, 2, dtype=torch.int64)}, "maps_t must be a floating-point tensor"),
        ({"maps_t": torch.zeros(3, 5, 2, 0, dtype=F64)}, "maps_t must have positions, got [3, 5, 2, 0]"),
        ({"maps": torch.zeros(3, 5, 0, 2, dtype=F64)}, "class_map_loss: maps must have positions, got [3, 5, 0, 2]"),
        ({"share": torch.ones(2, dtype=F64)}, "class_map_loss: share must be [B] = [3], got [2]"),
        (
            {"labels": torch.tensor([0, 9, 1])},
            "class_map_loss: labels must lie in [0, K) = [0, 9), got 9 at position 1",
        ),
        *(
            ({name: bad}, f"class_map_loss: the weight {name} must be a finite number")
            for name in ("kl", "dkd_alpha", "dkd_beta", "cam")
            for bad in (float("nan"), float("inf"))
        ),
        ({"temperature": 0.0}, "class_map_loss: temperature must be > 0, got 0"),
        ({"temperature": float("inf")}, "class_map_loss: temperature must be finite, got inf"),
    ],
)
def test_what_cannot_be_is_refused(changed, text):
    if CUDA and "labels must lie" in text:
        pytest.skip("a GPU's label is counted, not refused")
    maps, weight, bias, maps_t, labels, _ = class_map_inputs()
    call = {"maps": maps, "weight": weight, "bias": bias, "maps_t": maps_t, "labels": labels, "kl": 1.0}
    refused(text, lambda: head.class_map_loss(**(call | changed)))
