"""Run by test_emulated_ops.py on emulated CUDA kernels, with the tables of op_cases.py: what the CPU's ops refuse and
the GPU's take.
"""

import ctypes
import pathlib

import pytest
import torch
from op_cases import (
    CLASS_MAP_TERMS,
    SOFT,
    assert_no_worse_than_eager,
    class_map_inputs,
    connector_inputs,
    decided_class_map_inputs,
    loss_inputs,
    run_class_maps,
    run_connector,
    run_loss,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ijckd_fast
from ijckd_fast import head
from ijckd_fast.head import reference

head.load_libraries()  # for torch.ops.ijckd.limit_stage


def wide(x):
    return x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x


def connector_results(leaves, keywords):
    """(fused, eager, float64's) of every result and gradient of connector_match"""
    oracle = run_connector(
        reference.connector_match,
        {k: wide(v) for k, v in leaves.items()},
        {k: wide(v) for k, v in keywords.items()},
    )
    fused, eager = (run_connector(m.connector_match, leaves, keywords) for m in (head, reference))
    return zip(fused, eager, oracle, strict=True)


@pytest.mark.parametrize("match", ["map", "pooled"])
def test_connector_match_float16_no_worse_than_eager(match):
    leaves, keywords = connector_inputs((16, 48, 7, 7), 80, match=match, dtype=torch.float16, channels_last=True)
    for f, e, o in connector_results(leaves, keywords):
        assert_no_worse_than_eager(f, e, o)


def test_classifier_loss_float16_no_worse_than_eager():
    """Over eight seeds together: the error of one mean loss is a matter of luck."""
    errors = torch.zeros(2, 3, dtype=torch.float64)  # of fused, eager; in loss, parts, dz
    for seed in range(8):
        z, weight, bias, *rest = loss_inputs(64, 96, 203, torch.float16, seed=seed)
        oracle = run_loss(reference.classifier_loss, *map(wide, (z, weight, bias, *rest)))
        fused = run_loss(head.classifier_loss, z, weight, bias, *rest)
        eager = run_loss(reference.classifier_loss, z, weight, bias.half(), *rest)
        for i, got in enumerate((fused, eager)):
            errors[i] += torch.stack([(got[j].double() - oracle[j]).abs().max() ** 2 for j in (0, 1, 3)])
    assert (errors[0].sqrt() <= 2 * errors[1].sqrt()).all(), errors.sqrt()


@pytest.mark.parametrize(
    ("weights", "confidence"),
    [
        *(({}, confidence) for confidence in (0, 12, 20, 30)),
        *(({"label_smoothing": 0.1}, confidence) for confidence in (0, 30)),
        *(({"sr": 1.0, "ce": 0.0}, confidence) for confidence in (0, 30)),
        *(({"kl": 1.0, "ce": 0.0}, confidence) for confidence in (0, 30)),
        *(({"ce": 0.7, "sr": 0.5, "fm": 0.3, "kl": 0.9}, confidence) for confidence in (0, 12, 30)),
    ],
    ids=str,
)
def test_classifier_loss_float16_keeps_small_probabilities(confidence, weights):
    """A batch of 256 and losses down to 5e-5: eager needs a loss scale of 65536 here, ours none."""
    g = torch.Generator().manual_seed(1)
    B, K, Ct = 256, 1000, 64
    weight = (torch.randn(K, Ct, generator=g) / 8).half()
    labels = torch.randint(0, K, (B,), generator=g)
    z = torch.randn(B, Ct, generator=g).half() + confidence * weight[labels]
    matched = "sr" in weights or "kl" in weights
    teacher = {"pooled_t": z + 0.3 * torch.randn(B, Ct, generator=g)} if matched else {}
    gradients = []
    for op, scale, to in ((reference, 1, torch.double), (reference, 65536, torch.float), (head, 1, torch.float)):
        leaf = z.to(to, copy=True).requires_grad_()
        named = {k: v.to(to) for k, v in teacher.items()}
        w = weight.double() if to == torch.double else weight
        (scale * op.classifier_loss(leaf, w, None, labels, **named, **weights)[0]).backward()
        gradients.append(leaf.grad.double() / scale)
    oracle, eager, fused = gradients
    error, allowed = ((g - oracle).norm() / oracle.norm() for g in (fused, eager))
    assert error <= 2 * allowed, f"error {error:.2e}, eager's {allowed:.2e}"


@pytest.mark.parametrize("label", [9, -1])
def test_label_out_of_range_makes_its_row_nan(label):
    z, weight, bias, labels, *_ = loss_inputs(B=5, K=9)
    labels[2] = label
    z.requires_grad_()
    head.take_bad_rows("cpu")
    loss, _, top1 = head.classifier_loss(z, weight, bias, labels)
    loss.backward()
    assert loss.isnan()
    assert z.grad.isnan().all(1).tolist() == [False, False, True, False, False]
    assert z.grad[[0, 1, 3, 4]].isfinite().all()
    assert top1 == (torch.nn.functional.linear(z, weight, bias).argmax(1) == labels).sum()
    assert head.take_bad_rows("cpu") == (1, 0)
    assert head.take_bad_rows("cpu") == (0, 0)


def test_bad_labels_out_of_range_are_counted_once_a_row():
    """Whatever is wrong with the row, over all calls since the last look, and where only top-1 needs the label."""
    z, weight, bias, labels, labels_b, mix, pooled_t = loss_inputs(B=5, K=9)
    head.take_bad_rows("cpu")
    labels[1:3], labels_b[2:4] = 9, -1
    head.classifier_loss(z, weight, bias, labels, labels_b=labels_b, mix=mix)
    assert head.take_bad_rows("cpu") == (3, 0)
    for _ in range(2):
        head.classifier_loss(z, weight, bias, labels, pooled_t=pooled_t, ce=0.0, sr=1.0)
    assert head.take_bad_rows("cpu") == (4, 0)


# --------------------------------------------------------------------------------------------------------------------
# tensor-core tiles


@pytest.fixture
def library():
    """The emulated kernels: how many were launched, and which GPU is current where the op does not say."""
    loaded = ctypes.CDLL(str(next((pathlib.Path(ijckd_fast.__file__).parent / "head").glob("_C.so"))))
    for counter in (loaded.emulated_launches, loaded.emulated_questions, loaded.emulated_maps):
        counter.restype = ctypes.c_int64
    return loaded


@pytest.fixture(params=[0, 1, 2], ids="stage {}".format)
def stage(request):
    before = torch.ops.ijckd.limit_stage(request.param)
    yield request.param
    torch.ops.ijckd.limit_stage(before)


TILED = {
    "ce": {},
    "smoothing": {"label_smoothing": 0.1},
    "mixup": {"mixed": True},
    "mixup and smoothing": {"mixed": True, "label_smoothing": 0.2},
    "no bias": {"biased": False},
    "fm": {"fm": 0.7},
    "sr": {"ce": 0.0, "sr": 2.0},
    "all": {"ce": 0.6, "sr": 2.0, "fm": 0.7, "mixed": True, "label_smoothing": 0.1},
    "kl": {"kl": 0.9, "sr": 0.5, "label_smoothing": 0.1},
    "two rows": {"sr": 0.5, "kl": 0.3, **SOFT, "mixed": True, "temperature": 2.0, "ttm_power": 0.9},
    "standardised": {"kl": 0.3, **SOFT, "standardize": True, "temperature": 2.0},
}


def tiled_inputs(B, Ct, K, seed=0, mixed=False, biased=True, **weights):
    g = torch.Generator().manual_seed(seed)
    pooled_t = torch.randn(B, Ct, generator=g)
    z = pooled_t + 0.05 * torch.randn(B, Ct, generator=g)
    weight = (torch.randn(K, Ct, generator=g) * 2 / Ct**0.5).bfloat16()
    keywords = {"pooled_t": pooled_t, **weights}
    if mixed:
        keywords |= {"labels_b": torch.randint(K, (B,), generator=g), "mix": torch.rand(B, generator=g)}
    bias = torch.randn(K, generator=g) if biased else None
    return z, weight, bias, torch.randint(K, (B,), generator=g), keywords


def loss_and_grad(module, z, weight, bias, labels, **keywords):
    z = z.detach().requires_grad_()
    loss, parts, top1 = module.classifier_loss(z, weight, bias, labels, **keywords)
    loss.backward()
    return loss.detach(), parts, z.grad, top1


@pytest.mark.parametrize("case", TILED)
@pytest.mark.parametrize(("B", "Ct", "K"), [(1, 8, 1), (5, 24, 70), (7, 64, 650), (70, 136, 203)])
def test_tiles_no_worse_than_eager(case, B, Ct, K, stage):
    """Sizes of one chunk of classes and of many; eager rounds its logits to bfloat16, so its error is the larger."""
    z, weight, bias, labels, keywords = tiled_inputs(B, Ct, K, **TILED[case])
    oracle = loss_and_grad(
        reference, *map(wide, (z, weight, bias, labels)), **{k: wide(v) for k, v in keywords.items()}
    )
    gram = head.classifier_gram(weight) if stage else None
    fused = loss_and_grad(head, z, weight, bias, labels, gram=gram, **keywords)
    eager = loss_and_grad(reference, z, weight, None if bias is None else bias.bfloat16(), labels, **keywords)
    for name, f, e, o in zip(("loss", "parts", "dz"), fused, eager, oracle, strict=False):
        units = 2**-8 if name == "dz" else 2**-11
        floor = 1e-5 * (name != "dz") + 1e-7 + units * o.abs().max().item()
        assert_no_worse_than_eager(f, e, o, floor=floor)
    assert abs(int(fused[3]) - int(oracle[3])) <= 1  # bfloat16 may turn a near tie


def test_each_stage_has_kernels_of_its_own():
    z, weight, bias, labels, keywords = tiled_inputs(6, 64, 90, sr=1.0)
    gram = head.classifier_gram(weight)
    results = {}
    for most in (0, 1, 2):
        before = torch.ops.ijckd.limit_stage(most)
        results[most] = loss_and_grad(head, z, weight, bias, labels, gram=gram, **keywords)
        torch.ops.ijckd.limit_stage(before)
    assert not torch.equal(results[0][2], results[1][2])
    torch.testing.assert_close(results[0][2], results[1][2], rtol=0.02, atol=2e-4)
    torch.testing.assert_close(
        results[1][2], results[2][2], rtol=2e-5, atol=1e-7
    )  # the same products, perhaps the same bits
    with pytest.raises(RuntimeError, match="limit_stage: the stages are 0 to 2, got 3"):
        torch.ops.ijckd.limit_stage(3)


def test_tiles_without_gradient_give_the_same_loss():
    z, weight, bias, labels, keywords = tiled_inputs(6, 64, 1000, sr=1.0, fm=1.0, label_smoothing=0.1)
    gram = head.classifier_gram(weight)
    loss, parts, _, top1 = loss_and_grad(head, z, weight, bias, labels, gram=gram, **keywords)
    with torch.no_grad():
        again = head.classifier_loss(z, weight, bias, labels, gram=gram, **keywords)
    assert torch.equal(again[0], loss)
    assert torch.equal(again[1], parts)
    assert torch.equal(again[2], top1)


@pytest.mark.parametrize("label", [90, -1])
def test_tiles_make_the_row_of_a_label_out_of_range_nan(label):
    z, weight, bias, labels, keywords = tiled_inputs(5, 24, 90)
    labels[2] = label
    loss, _, dz, _ = loss_and_grad(head, z, weight, bias, labels, **keywords)
    assert loss.isnan()
    assert dz.isnan().all(1).tolist() == [False, False, True, False, False]
    assert dz[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("where", ["label", "other"])
def test_tiles_never_make_a_broken_logit_a_finite_loss(value, where):
    z, weight, bias, labels, keywords = tiled_inputs(5, 24, 90)
    bias[labels[1] if where == "label" else next(k for k in range(90) if k not in labels)] = value
    loss, *_ = loss_and_grad(head, z, weight, bias, labels, **keywords)
    assert loss.isfinite() == (value == -float("inf") and where == "other")


def test_tiles_of_a_row_far_from_its_label():
    """More than float's exponent between the label's logit and the largest: counted as saturated, the loss is their
    distance.
    """
    z, weight, bias, labels, keywords = tiled_inputs(5, 24, 90)
    bias[7] += 500
    labels[labels == 7] = 8
    loss, _, dz, top1 = loss_and_grad(head, z, weight, bias, labels, **keywords)
    oracle = loss_and_grad(
        reference, *map(wide, (z, weight, bias, labels)), **{k: wide(v) for k, v in keywords.items()}
    )
    torch.testing.assert_close(loss.double(), oracle[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(dz.double(), oracle[2], rtol=0.02, atol=1e-3)
    assert top1 == 0


def test_a_gram_of_another_kind_is_refused_on_a_gpu_too():
    z, weight, bias, labels, keywords = tiled_inputs(5, 24, 90, sr=1.0)
    gram = head.classifier_gram(weight)
    for wrong in (head.classifier_gram(weight[:, :16]), gram.float(), gram.half(), gram.transpose(1, 2)):
        with pytest.raises(
            RuntimeError,
            match=r"gram must be what .* makes of this weight, contiguous bfloat16 \[2, Ct, Ct\] = \[2, 24, 24\], got",
        ):
            head.classifier_loss(z, weight, bias, labels, gram=wrong, **keywords)


def test_the_runtime_is_asked_once(library):
    """Attributes of the kernels and the GPU, maps of arrays: a second call of equal sizes has them already."""
    z, weight, *rest, keywords = tiled_inputs(9, 24, 90)

    def asked():
        before = library.emulated_questions(), library.emulated_maps()
        loss_and_grad(head, z, weight, *rest, **keywords)
        return library.emulated_questions() - before[0], library.emulated_maps() - before[1]

    asked()
    questions, maps = asked()
    assert questions == 0
    assert maps <= 2  # two products read W; the op's own arrays may lie elsewhere than before


def test_maps_are_of_the_array_that_is_there_now():
    """The same memory as weights of two shapes, one after the other: each gives what a copy of its own gives."""
    memory = tiled_inputs(9, 24, 90)[1]
    for Ct, K in ((24, 90), (48, 45), (24, 90), (24, 50)):
        z, _, *rest, keywords = tiled_inputs(9, Ct, K)
        weight = memory.flatten()[: K * Ct].view(K, Ct)
        here, copied = (loss_and_grad(head, z, w, *rest, **keywords) for w in (weight, weight.clone()))
        assert all(map(torch.equal, here, copied))


# cudaLaunchAttributeIDs that a driver may refuse, and the bits by which the library says so
REFUSALS = {
    "nothing": (0, 0),
    "dependent launches": (1 << 6, 1 + 8),
    "clusters": (1 << 4, 2),
    "cooperative": (1 << 2, 4),
    "both together": (1 << 6 | 1 << 2, 8),
}


@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("case", ["ce", "kl"])
def test_a_refused_launch_has_a_path_without(refusal, case, library):
    attributes, bits = REFUSALS[refusal]
    z, weight, *rest, keywords = tiled_inputs(9, 24, 90, **TILED[case])
    want = loss_and_grad(head, z, weight, *rest, **keywords)

    def check():
        got = loss_and_grad(head, z, weight, *rest, **keywords)
        if refusal == "clusters":  # whose blocks share a sum: another order
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
        else:
            assert all(map(torch.equal, want, got))

    library.emulated_refusal(attributes, refusal == "both together")
    try:
        assert torch.ops.ijckd.refused_launches(z) == bits
        check()
        library.emulated_refusal(attributes, refusal == "both together")  # found by an op
        check()
    finally:
        library.emulated_refusal(0, False)


@pytest.mark.parametrize("current", [-1, 1], ids=["none", "one of sm_86"])
@pytest.mark.parametrize("op", ["linear", "map", "loss", "projected loss"])
def test_the_stage_is_that_of_the_tensors_gpu(op, current, library):
    """Another GPU is current while the op is called, as with tensors of a second GPU: the same launches and bits."""

    def run():
        if op == "linear":
            leaves, keywords = connector_inputs(
                (9, 24), 40, norm="bias", match="pooled", relu=False, dtype=torch.bfloat16
            )
            return run_connector(head.connector_match, leaves, keywords)
        if op == "map":
            leaves, keywords = connector_inputs((4, 24, 3, 3), 40, dtype=torch.bfloat16, channels_last=True)
            return run_connector(head.connector_match, leaves, keywords)
        if op == "loss":
            z, weight, *rest, keywords = tiled_inputs(9, 24, 90)
            return loss_and_grad(head, z, weight, *rest, **keywords)
        leaves, terms = projected_inputs(9, 24, 40, 90, "ce")
        return projected(head, leaves, *terms)

    launches, results = [], []
    for device in (0, current):
        before = library.emulated_launches()
        library.emulated_device(device)
        try:
            results.append(run())
        finally:
            library.emulated_device(0)
        launches.append(library.emulated_launches() - before)
    assert launches[0] == launches[1] > 0
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["train", "eval", "bias"])
@pytest.mark.parametrize("shape", [(1, 8, 7, 7), (5, 24, 3, 5), (67, 72)])
def test_connector_match_in_tiles_no_worse_than_eager(shape, norm, dtype, stage):
    leaves, keywords = connector_inputs(shape, 136, norm=norm, match="map", dtype=dtype, channels_last=len(shape) == 4)
    for f, e, o in connector_results(leaves, keywords):
        assert_no_worse_than_eager(f, e, o, floor=torch.finfo(dtype).eps / 2 * o.abs().max().item() + 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["bias", "none"])
@pytest.mark.parametrize("match", ["pooled", None])
@pytest.mark.parametrize(
    ("shape", "Ct"), [((1, 8), 8), ((67, 72), 136), ((5, 24, 1, 1), 72), ((9, 24), 33), ((9, 20), 32)]
)
def test_linear_connector_in_tiles_no_worse_than_eager(shape, Ct, match, norm, dtype, stage):
    """The last two are sizes that tiles do not take."""
    leaves, keywords = connector_inputs(shape, Ct, norm=norm, match=match, relu=False, dtype=dtype)
    for f, e, o in connector_results(leaves, keywords):
        assert f.dtype == e.dtype
        assert_no_worse_than_eager(f, e, o, floor=torch.finfo(dtype).eps / 2 * o.abs().max().item() + 1e-6)


def test_launches_of_a_map_in_tiles(library):
    """Projection, statistics, the pass over the map, its sums with the match; what the running statistics become; then
    two passes and both products.
    """
    leaves, keywords = connector_inputs((4, 24, 3, 3), 40, dtype=torch.bfloat16, channels_last=True)
    before = library.emulated_launches()
    run_connector(head.connector_match, leaves, keywords)
    assert library.emulated_launches() - before == 4 + 1 + 3


@pytest.mark.parametrize("match", ["pooled", None])
def test_a_linear_connector_in_tiles_does_not_round_its_result(match):
    leaves, keywords = connector_inputs((9, 24), 40, norm="bias", match=match, relu=False, dtype=torch.bfloat16)
    exact = wide(leaves["u"]) @ wide(leaves["weight"]).T + wide(leaves["bias"])
    z, *_ = run_connector(head.connector_match, leaves, keywords)
    torch.testing.assert_close(z.double(), exact, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("apart", ["u", "weight", "bias", "pooled_t", "grad_z"])
def test_a_linear_connector_of_tensors_at_odd_addresses(apart):
    """Tiles do not take them; what does gives nearly the same."""
    leaves, keywords = connector_inputs((9, 24), 40, norm="bias", match="pooled", relu=False, dtype=torch.bfloat16)
    grad_z = torch.randn(9, 40, generator=torch.Generator().manual_seed(0))

    def odd(x):
        return torch.cat([x.new_zeros(1), x.detach().flatten()])[1:].view(x.shape)

    results = []
    for name in (None, apart):
        mine = {k: (odd(v) if k == name else v.detach().clone()).requires_grad_() for k, v in leaves.items()}
        pooled_t = odd(keywords["pooled_t"]) if name == "pooled_t" else keywords["pooled_t"]
        z, fm = head.connector_match(*mine.values(), relu=False, pooled_t=pooled_t)
        outputs = torch.autograd.grad(
            (z, fm), list(mine.values()), (odd(grad_z) if name == "grad_z" else grad_z, fm.new_ones(()))
        )
        results.append([z.detach(), fm.detach(), *outputs])
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(other, plain, rtol=0.02, atol=0.02 * plain.abs().max().item())


def projected_inputs(B, Cs, Ct, K, case, dtype=torch.bfloat16):
    """(u, projection, its bias), and of the loss all but z."""
    _, *rest, keywords = tiled_inputs(B, Ct, K, **TILED[case])
    g = torch.Generator().manual_seed(1)
    u, projection = torch.randn(B, Cs, generator=g), torch.randn(Ct, Cs, generator=g) / Cs**0.5
    rest[0] = rest[0].to(dtype)
    return [u.to(dtype), projection.to(dtype), torch.randn(Ct, generator=g)], (*rest, keywords)


def projected(module, leaves, weight, bias, labels, keywords, **more):
    """[loss, parts, gradients of the leaves, top1]"""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    loss, parts, top1 = module.projected_classifier_loss(*leaves, weight, bias, labels, **keywords, **more)
    (1.7 * loss).backward()
    return [loss.detach(), parts, *[x.grad for x in leaves], top1]


def in_two(leaves, weight, bias, labels, keywords, **more):
    """projected() by the two ops."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    z, _ = head.connector_match(*leaves, relu=False)
    loss, parts, top1 = head.classifier_loss(z, weight, bias, labels, **keywords, **more)
    (1.7 * loss).backward()
    return [loss.detach(), parts, *[x.grad for x in leaves], top1]


@pytest.mark.parametrize("case", TILED)
@pytest.mark.parametrize(("B", "Cs", "Ct", "K"), [(1, 8, 8, 1), (5, 24, 72, 70), (7, 64, 200, 650), (70, 40, 136, 203)])
def test_projected_tiles_equal_those_of_the_two_ops(case, B, Cs, Ct, K, stage):
    """Nearly: the label's logit is summed in another order, and the gradients' products take dz rounded, not dz times
    the loss's gradient.
    """
    leaves, (weight, bias, labels, keywords) = projected_inputs(B, Cs, Ct, K, case)
    gram = head.classifier_gram(weight) if stage else None
    fused, apart = (f(leaves, weight, bias, labels, keywords, gram=gram) for f in (_fused, in_two))
    for f, a in zip(fused, apart, strict=True):
        assert f.dtype == a.dtype
        rtol, atol = (2**-7, 2**-8) if f.dtype == torch.bfloat16 else (2e-5, 2e-7)
        torch.testing.assert_close(f, a, rtol=rtol, atol=atol * a.abs().max().item() + 1e-9)


def _fused(*args, **more):
    return projected(head, *args, **more)


@pytest.mark.parametrize("case", ["ce", "all", "kl"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("B", "Cs", "Ct", "K"), [(70, 40, 136, 203), (9, 20, 32, 90), (9, 24, 36, 90)])
def test_projected_tiles_no_worse_than_eager(case, dtype, B, Cs, Ct, K, stage):
    """The last two are sizes that tiles do not take."""
    leaves, (weight, bias, labels, keywords) = projected_inputs(B, Cs, Ct, K, case, dtype)
    exact = {k: wide(v) for k, v in keywords.items()}
    oracle = projected(reference, list(map(wide, leaves)), *map(wide, (weight, bias, labels)), exact)
    fused = projected(head, leaves, weight, bias, labels, keywords)
    eager = projected(reference, leaves, weight, bias.to(dtype), labels, keywords)
    for f, e, o in zip(fused[:-1], eager, oracle, strict=False):
        assert_no_worse_than_eager(f, e, o, floor=torch.finfo(dtype).eps * o.abs().max().item() + 1e-6)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("way", ["anchored", "kl", "no gram", "float16"])
def test_launches_of_a_linear_connector_and_the_classifier_in_tiles(way, gradients, library):
    """Of ours 4, and of torch's none: what a GPU would be given beside them shows as other calls
    than of memory and views."""
    dtype = torch.float16 if way == "float16" else torch.bfloat16
    leaves, (weight, bias, labels, keywords) = projected_inputs(17, 40, 72, 203, "all", dtype)
    gram = head.classifier_gram(weight) if way == "anchored" else None
    if way == "kl":
        keywords["kl"] = 0.9
    leaves = [x.requires_grad_(gradients) for x in leaves]
    called = set()

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.add(func.name().partition("::")[2].partition(".")[0])
            return func(*args, **(kwargs or {}))

    before = library.emulated_launches()
    with Recorded():
        loss, *_ = head.projected_classifier_loss(*leaves, weight, bias, labels, gram=gram, **keywords)
        if gradients:
            torch.autograd.grad(loss, leaves, torch.full((), 2.0))
    assert library.emulated_launches() - before == 3 + gradients
    assert called <= {
        "projected_classifier_loss",
        "connector_linear_grads",
        "unsqueeze",
        "squeeze",
        "detach",
        "full",
        "transpose",
        "view",
    }


ALL_BUT_FM = {"kl": 0.9, "sr": 0.5, "mixed": True, "label_smoothing": 0.1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("teacher", ["pooled_t", "logits_t"])
@pytest.mark.parametrize("terms", [{"kl": 0.9}, {"sr": 2.0}, ALL_BUT_FM, ALL_BUT_FM | {"fm": 0.3}])
def test_whole_rows_of_logits_no_worse_than_eager(terms, teacher, dtype, stage):
    z, weight, bias, labels, keywords = tiled_inputs(66, 72, 203, **terms)
    weight = weight.to(dtype)
    if teacher == "logits_t":
        keywords["logits_t"] = torch.nn.functional.linear(keywords["pooled_t"], weight.float(), bias)
        if "fm" not in terms:  # where the features are given they serve
            del keywords["pooled_t"]
    oracle = loss_and_grad(
        reference, *map(wide, (z, weight, bias, labels)), **{k: wide(v) for k, v in keywords.items()}
    )
    fused = loss_and_grad(head, z, weight, bias, labels, **keywords)
    eager = loss_and_grad(reference, z, weight, bias.to(dtype), labels, **keywords)
    for name, f, e, o in zip(("loss", "parts", "dz"), fused, eager, oracle, strict=False):
        floor = 1e-5 * (name != "dz") + 1e-7 + torch.finfo(dtype).eps * o.abs().max().item()
        assert_no_worse_than_eager(f, e, o, floor=floor)


def test_a_float16_loss_and_a_kl_loss_are_in_tiles_too():
    for dtype, kl in ((torch.float16, 0.0), (torch.bfloat16, 1.0)):
        z, weight, bias, labels, keywords = tiled_inputs(6, 64, 90, kl=kl)
        results = []
        for most in (0, 1, 2):
            before = torch.ops.ijckd.limit_stage(most)
            results.append(loss_and_grad(head, z, weight.to(dtype), bias, labels, **keywords))
            torch.ops.ijckd.limit_stage(before)
        assert not torch.equal(results[0][2], results[1][2])
        torch.testing.assert_close(results[0][2], results[1][2], rtol=0.02, atol=2e-4)
        torch.testing.assert_close(results[1][2], results[2][2], rtol=2e-5, atol=1e-7)


# --------------------------------------------------------------------------------------------------------------------
# class maps


@pytest.mark.parametrize("case", ["kl", "dkd", "cam", "all"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("B", "Ct", "K", "scales"), [(1, 8, 1, (1,)), (5, 72, 70, (1, 2, 4)), (12, 72, 203, (1, 2)), (3, 20, 30, (1, 2))]
)
def test_class_maps_in_tiles_no_worse_than_eager(case, dtype, B, Ct, K, scales, stage):
    """Of one chunk of images and of several; the last are sizes that tiles do not take."""
    maps, weight, bias, maps_t, labels = decided_class_map_inputs(B, Ct, (4, 4), K, dtype)
    keywords = {**CLASS_MAP_TERMS[case], "scales": scales}
    oracle = run_class_maps(reference, *map(wide, (maps, weight, bias, maps_t)), labels, **keywords)
    fused = run_class_maps(head, maps, weight, bias, maps_t, labels, **keywords)
    eager = run_class_maps(reference, maps, weight, bias.to(dtype), maps_t, labels, **keywords)
    for name, f, e, o in zip(("loss", "parts", "dx"), fused, eager, oracle, strict=True):
        floor = 1e-5 * (name != "dx") + 1e-7 + torch.finfo(dtype).eps * o.abs().max().item()
        assert_no_worse_than_eager(f, e, o, floor=floor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_class_maps_have_tiles_of_each_stage(dtype):
    """And rows that are far from the teacher's, whose logits are another product's, beside near ones."""
    maps, weight, bias, maps_t, labels = decided_class_map_inputs(4, 72, (4, 4), 203, dtype)
    maps = torch.where(torch.arange(4)[:, None, None, None] % 2 == 0, maps, maps.roll(1, 0))
    results = []
    for most in (0, 1, 2):
        before = torch.ops.ijckd.limit_stage(most)
        results.append(run_class_maps(head, maps, weight, bias, maps_t, labels, **CLASS_MAP_TERMS["all"]))
        torch.ops.ijckd.limit_stage(before)
    assert not torch.equal(results[0][2], results[1][2])
    for plain, tiled in zip(*results[:2], strict=True):
        assert (plain - tiled).norm() <= 0.02 * plain.norm()
    torch.testing.assert_close(results[1], results[2], rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize(("case", "rows"), [("kl", 1), ("cam", 1), ("all", 2)])
@pytest.mark.parametrize("gradients", [True, False])
def test_launches_of_class_maps_in_tiles(case, rows, gradients, library):
    """Of each chunk of images rounding, logits, the passes over them and the gradient; then the sum."""
    maps, weight, bias, maps_t, labels, _ = class_map_inputs(12, 24, (4, 4), 203, torch.bfloat16)
    maps.requires_grad_(gradients)
    before = library.emulated_launches()
    head.class_map_loss(maps, weight, bias, maps_t, labels, scales=(1, 2), **CLASS_MAP_TERMS[case])
    chunks = 2  # of 2^13 logits, five positions of 203 classes each: 8 images
    assert library.emulated_launches() - before == chunks * (2 + rows + gradients) + 1


@pytest.mark.parametrize("apart", ["x", "x_t", "weight"])
def test_class_maps_of_tensors_at_odd_addresses(apart, library):
    """Tiles do not take them; what does gives nearly the same."""
    maps, weight, bias, maps_t, labels, _ = class_map_inputs(3, 24, (4, 4), 70, torch.bfloat16)
    given = {"x": head.pooled_positions(maps), "weight": weight, "bias": bias, "x_t": head.pooled_positions(maps_t)}

    def odd(x):
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

    results = []
    for name in (None, apart):
        x, *rest = (odd(v) if k == name else v.clone() for k, v in given.items())
        leaf = x.detach().requires_grad_()
        loss, parts = head.class_map_loss(leaf, *rest, labels, **CLASS_MAP_TERMS["all"])
        loss.backward()
        results.append([loss.detach(), parts, leaf.grad])
    torch.testing.assert_close(*results, rtol=0.03, atol=2e-3)
    assert not torch.equal(results[0][2], results[1][2])


@pytest.mark.parametrize("label", [64, -1])
@pytest.mark.parametrize("Ct", [24, 20])
def test_a_label_out_of_range_makes_its_image_nan(label, Ct):
    """Counted once, whatever number of positions; class maps have no label. (64 classes: of numbers that are not of 32
    a CPU's library takes a row's product with what lies behind it, times 0.)
    """
    maps, weight, bias, maps_t, labels, _ = class_map_inputs(5, Ct, (4, 4), 64, torch.bfloat16)
    labels[2] = label
    head.take_bad_rows("cpu")
    loss, parts, grad = run_class_maps(head, maps, weight, bias, maps_t, labels, **CLASS_MAP_TERMS["all"])
    assert loss.isnan()
    assert parts.isnan().tolist() == [True, True, False]
    assert grad.isnan().flatten(1).all(1).tolist() == [False, False, True, False, False]
    assert grad[[0, 1, 3, 4]].isfinite().all()
    assert head.take_bad_rows("cpu") == (1, 0)
    assert run_class_maps(head, maps, weight, bias, maps_t, labels, cam=1.0)[0].isfinite()
    assert head.take_bad_rows("cpu") == (0, 0)
