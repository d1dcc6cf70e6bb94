"""The tables of op_cases.py on a GPU, in every dtype, and what only a GPU can show; skipped where there is none.

IJCKD_GPU_TESTS_ON=cpu runs what can run on a CPU there, which keeps these tests themselves in order
(scripts/gpu_check.sh does so on a machine without a GPU). IJCKD_GPU_TESTS_STAGE=1 keeps the process to kernels up to
that stage, so that a fault of stage 2's spoils no other's results. Oracle: reference.py in float64 on the CPU. Only
torch, pytest, hypothesis and the libraries are needed.
"""

import itertools
import os
import subprocess
import sys

import op_cases as tables
import pytest
import torch
from torch import Tensor

from ijckd_fast import head
from ijckd_fast.head import reference

head.load_libraries()  # for torch.ops.ijckd.limit_stage

DEVICE = os.environ.get("IJCKD_GPU_TESTS_ON", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU")
gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
F64 = torch.float64
DTYPES = [torch.float32, torch.bfloat16] + ([torch.float16] if DEVICE == "cuda" else [])
STAGES = [0, 1, 2] if DEVICE == "cuda" else [2]
if ONLY_STAGE := os.environ.get("IJCKD_GPU_TESTS_STAGE"):
    STAGES = [int(ONLY_STAGE)]
    if DEVICE == "cuda":
        torch.ops.ijckd.limit_stage(STAGES[0])
# float32 has the plain kernels only
STAGED = [(t, s) for t in DTYPES for s in (STAGES if t != torch.float32 else STAGES[-1:])]
CONNECTORS = list(itertools.product(("train", "eval", "bias", "none"), ("map", "pooled", None), (True, False)))
LOSSES = [
    (c, teacher)
    for c in tables.LOSS_CASES
    for teacher in ("pooled_t", "logits_t")
    if (c, teacher) != ("fm", "logits_t")
]


@pytest.fixture(autouse=True)
def plain_float32():
    """Eager's convolution in float32, not TF32: the rule compares errors."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def stage(request):
    """Kernels up to this stage for one test; the parameter is given indirectly."""
    if DEVICE != "cuda":
        yield request.param
        return
    before = torch.ops.ijckd.limit_stage(request.param)
    yield request.param
    torch.ops.ijckd.limit_stage(before)


def moved(x, device=DEVICE):
    """x, or every tensor in it, on the device; strides stay."""
    if isinstance(x, Tensor):
        return x.detach().to(device).requires_grad_(x.requires_grad)
    if isinstance(x, dict):
        return {k: moved(v, device) for k, v in x.items()}
    return tuple(moved(v, device) for v in x) if isinstance(x, (tuple, list)) else x


def doubled(x):
    """Every floating tensor in x in float64."""
    if isinstance(x, Tensor):
        return x.detach().double() if x.is_floating_point() else x
    if isinstance(x, dict):
        return {k: doubled(v) for k, v in x.items()}
    return tuple(doubled(v) for v in x) if isinstance(x, (tuple, list)) else x


def run_connector(op, leaves, keywords):
    with torch.device(DEVICE):  # the helper makes the incoming gradient itself
        return [x.cpu() for x in tables.run_connector(op, moved(leaves), moved(keywords))]


def run_loss(op, args, changed):
    return [x.cpu() for x in tables.run_loss(op, *moved(args), **moved(changed))]


def assert_rule(fused, eager, oracle, dtype, least=0.0, half_units=0.25):
    """At most twice eager's error, with a floor in units of the type's rounding, since eager can be lucky in results of
    few elements.

    The floor is relative to the result's largest value or `least`, the size of what was summed to make it.
    """
    units = 16 if dtype == torch.float32 else half_units
    for f, e, o in zip(fused, eager, oracle, strict=True):
        if o.is_floating_point():
            size = max(o.abs().max().item(), least)
            tables.assert_no_worse_than_eager(f, e, o, floor=units * torch.finfo(dtype).eps * size + 1e-6)


# --------------------------------------------------------------------------------------------------------------------
# against the reference


@pytest.mark.parametrize("shape", [*tables.SHAPES, (3, 4, 9, 9)], ids=str)
@pytest.mark.parametrize(("norm", "match", "relu"), CONNECTORS)
def test_connector_match_float64(shape, norm, match, relu):
    leaves, keywords = tables.connector_inputs(shape, 65, norm=norm, match=match, relu=relu)
    tables.assert_equal_to(
        run_connector(head.connector_match, leaves, keywords),
        tables.run_connector(reference.connector_match, leaves, keywords),
        1e-10,
    )


@pytest.mark.parametrize(("dtype", "stage"), STAGED, indirect=["stage"], ids=str)
@pytest.mark.parametrize(
    ("shape", "Ct"), [((16, 48, 7, 7), 80), ((9, 33, 5, 3), 65), ((64, 96), 130), ((70, 96), 200)], ids=str
)
@pytest.mark.parametrize(("norm", "match", "relu"), CONNECTORS)
def test_connector_match_no_worse_than_eager(dtype, shape, Ct, norm, match, relu, stage):
    channels_last = len(shape) == 4 and shape[1] % 2 == 0  # both layouts
    leaves, keywords = tables.connector_inputs(
        shape, Ct, norm=norm, match=match, relu=relu, dtype=dtype, channels_last=channels_last
    )
    oracle = tables.run_connector(reference.connector_match, doubled(leaves), doubled(keywords))
    fused = run_connector(head.connector_match, leaves, keywords)
    eager = run_connector(reference.connector_match, leaves, keywords)
    # least: sums of terms of that size, which cancel; half_units: rounding flips a ReLU near 0, here another one than
    # in eager
    assert_rule(fused, eager, oracle, dtype, least=2.0, half_units=1.0 if relu else 0.25)


@pytest.mark.parametrize("case", tables.CLASS_MAP_TERMS)
@pytest.mark.parametrize("sizes", [(3, 5, (7, 7), 9), (2, 6, (3, 2), 300), (2, 4, (4, 4), 1)], ids=str)
def test_class_map_loss_float64(case, sizes):
    *args, share = tables.class_map_inputs(*sizes)
    keywords = {**tables.CLASS_MAP_TERMS[case], "share": share}
    found = tables.run_class_maps(head, *moved(args), **moved(keywords))
    wanted = tables.run_class_maps(reference, *args, **keywords)
    tables.assert_equal_to([x.cpu() for x in found], wanted, 1e-10)


@pytest.mark.parametrize(("dtype", "stage"), STAGED, indirect=["stage"], ids=str)
@pytest.mark.parametrize("case", tables.CLASS_MAP_TERMS)
@pytest.mark.parametrize("sizes", [(6, 40, (7, 7), 100), (70, 136, (4, 4), 203)], ids=str)
def test_class_map_loss_no_worse_than_eager(dtype, case, sizes, stage):
    maps, weight, bias, maps_t, labels = tables.decided_class_map_inputs(*sizes, dtype)
    keywords = tables.CLASS_MAP_TERMS[case]
    oracle = tables.run_class_maps(reference, *doubled((maps, weight, bias, maps_t)), labels, **keywords)
    fused, eager = (
        [x.cpu() for x in tables.run_class_maps(module, *moved((maps, weight, of_bias, maps_t, labels)), **keywords)]
        for module, of_bias in ((head, bias), (reference, bias.to(dtype)))
    )
    assert_rule(fused, eager, oracle, dtype, half_units=1.0)


def loss_case(case, teacher, sizes, dtype=F64):
    """(arguments, changed keywords) of run_loss."""
    z, weight, bias, labels, labels_b, mix, pooled_t = tables.loss_inputs(*sizes, dtype)
    changed = dict(tables.LOSS_CASES[case])
    labels_b, mix = changed.pop("labels_b", labels_b), changed.pop("mix", mix)
    if teacher == "logits_t":
        pooled_t = None
        logits_t = torch.randn(sizes[0], sizes[2], generator=torch.Generator().manual_seed(1), dtype=F64)
        changed |= {"logits_t": logits_t.to(z.dtype), "fm": 0.0}
    return (z, weight, bias, labels, labels_b, mix, pooled_t), changed


@pytest.mark.parametrize(("case", "teacher"), LOSSES)
@pytest.mark.parametrize("sizes", [(5, 6, 9), (1, 3, 1), (33, 130, 1030)], ids=str)
def test_classifier_loss_float64(case, teacher, sizes):
    args, changed = loss_case(case, teacher, sizes)
    wanted = tables.run_loss(reference.classifier_loss, *args, **changed)
    tables.assert_equal_to(run_loss(head.classifier_loss, args, changed), wanted, 1e-10)


@pytest.mark.parametrize(("dtype", "stage"), STAGED, indirect=["stage"], ids=str)
@pytest.mark.parametrize(("case", "teacher"), LOSSES)
@pytest.mark.parametrize("sizes", [(64, 96, 203), (16, 64, 4099)], ids=str)
def test_classifier_loss_no_worse_than_eager(dtype, case, teacher, sizes, stage):
    args, changed = loss_case(case, teacher, sizes, dtype)
    oracle = tables.run_loss(reference.classifier_loss, *doubled(args), **doubled(changed))
    fused = run_loss(head.classifier_loss, args, changed)
    z, weight, bias, *rest = args
    # F.linear wants one dtype; under autocast it rounds the bias too
    eager = run_loss(reference.classifier_loss, (z, weight, bias.to(dtype), *rest), changed)
    assert_rule(fused[:2], eager[:2], oracle[:2], dtype, least=8.0)  # means of log-probabilities
    assert_rule(fused[3:], eager[3:], oracle[3:], dtype)


ANCHORED = {
    "ce": {"ce": 1.0},
    "soft labels": {"ce": 1.0, "label_smoothing": 0.1, "mixed": True},
    "logit match": {"ce": 0.0, "sr": 1.0},
    "all": {"ce": 0.7, "sr": 0.5, "fm": 0.3, "label_smoothing": 0.1, "mixed": True},
}


@pytest.mark.parametrize("case", ANCHORED)
@pytest.mark.parametrize("sizes", [(5, 24, 203), (130, 200, 3001), (256, 512, 1000), (1024, 256, 21841)], ids=str)
def test_classifier_loss_bfloat16_with_gram_no_worse_than_eager(case, sizes):
    """Small and large tiles, one chunk of classes and several; the oracle is float64 on the device."""
    B, Ct, K = sizes if DEVICE == "cuda" else (5, 24, 203)
    g = torch.Generator().manual_seed(0)
    pooled_t = torch.randn(B, Ct, generator=g)
    z = pooled_t + 0.1 * torch.randn(B, Ct, generator=g)
    weight = (torch.randn(K, Ct, generator=g) * 2 / Ct**0.5).bfloat16()
    bias, labels, labels_b = torch.randn(K, generator=g), *torch.randint(K, (2, B), generator=g)
    terms = dict(ANCHORED[case])
    if terms.pop("mixed", False):
        terms |= {"labels_b": labels_b, "mix": torch.rand(B, generator=g)}
    terms["pooled_t"] = pooled_t
    z, weight, bias, labels, terms = moved((z, weight, bias, labels, terms))

    def run(op, z, *args, **keywords):
        z = z.detach().requires_grad_()
        loss, parts, top1 = op(z, *args, **keywords)
        loss.backward()
        return [x.cpu() for x in (loss.detach(), parts, z.grad)], top1.item()

    oracle, hits = run(reference.classifier_loss, *doubled((z, weight, bias, labels)), **doubled(terms))
    fused, fused_hits = run(head.classifier_loss, z, weight, bias, labels, gram=head.classifier_gram(weight), **terms)
    eager, _ = run(reference.classifier_loss, z, weight, bias.bfloat16(), labels, **terms)
    assert_rule(fused[:2], eager[:2], oracle[:2], torch.bfloat16)
    assert_rule(fused[2:], eager[2:], oracle[2:], torch.bfloat16)
    assert abs(fused_hits - hits) <= 1 + B // 100  # rounding may turn near ties


@pytest.mark.parametrize(("dtype", "stage"), STAGED, indirect=["stage"], ids=str)
@pytest.mark.parametrize("kl", [0.0, 0.9])
@pytest.mark.parametrize(
    "sizes", [(5, 24, 72, 203), (130, 40, 200, 3001), (256, 40, 136, 21841), (1024, 512, 2048, 1000)], ids=str
)
def test_projected_classifier_loss_no_worse_than_eager(sizes, kl, dtype, stage):
    """Small and large tiles, and more than the GPU holds at a time, on both of the classifier's ways."""
    B, Cs, Ct, K = sizes if DEVICE == "cuda" else (5, 24, 72, 203)
    (u, projection, bias), args = tables.projected_inputs(B, Cs, Ct, K, dtype)
    leaves, (weight, *args) = moved(([u, projection / Cs**0.5, bias], args))
    weight = weight / Ct**0.5
    # where the logit match comes from G; else from W itself
    gram = head.classifier_gram(weight) if dtype == torch.bfloat16 and 3 * Ct < K and kl == 0 else None
    oracle = tables.run_projected(reference, doubled(leaves), *doubled((weight, *args)), kl=kl)
    fused = tables.run_projected(head, leaves, weight, *args, kl=kl, gram=gram)
    classifier_bias, *rest = args
    eager = tables.run_projected(reference, leaves, weight, classifier_bias.to(dtype), *rest, kl=kl)
    fused, eager, oracle = ([x.cpu() for x in results] for results in (fused, eager, oracle))
    assert_rule(fused[:2], eager[:2], oracle[:2], dtype, least=8.0)  # means of log-probabilities
    assert_rule(fused[3:], eager[3:], oracle[3:], dtype, half_units=0.5)


def test_label_out_of_range_is_nan_on_a_gpu():
    """Refusing it would make the host wait: the row's loss is NaN, and with it the batch's."""
    if DEVICE == "cpu":
        pytest.skip("the CPU refuses it")
    z, weight, bias, labels, *_ = moved(tables.loss_inputs())
    labels[2] = 9
    head.take_bad_rows(DEVICE)
    assert head.classifier_loss(z, weight, bias, labels)[0].isnan()
    assert head.take_bad_rows(DEVICE) == (1, 0)
    assert head.take_bad_rows(DEVICE) == (0, 0)


@gpu_only
def test_tensors_elsewhere_are_refused():
    z, weight, bias, labels, *_, pooled_t = tables.loss_inputs()
    inputs = {"weight": weight, "bias": bias, "labels": labels, "pooled_t": pooled_t}
    for name in inputs:
        there = {k: v if k == name else moved(v) for k, v in inputs.items()}
        with pytest.raises(RuntimeError, match=f"{name} must be on cuda"):
            head.classifier_loss(moved(z), **there)
    u, weight = torch.randn(3, 6, 2, 2), torch.randn(5, 6)
    with pytest.raises(RuntimeError, match="weight must be on cuda"):
        head.connector_match(moved(u), weight)
    with pytest.raises(RuntimeError, match="map_t must be on cuda"):
        head.connector_match(moved(u), moved(weight), map_t=torch.zeros(3, 5, 2, 2))


@gpu_only
def test_label_out_of_range_is_counted_in_a_graph():
    """Also where the first call of all is the captured one; every replay counts again."""
    script = (
        "import torch; from ijckd_fast import head\n"
        "z, weight = torch.randn(5, 8, device='cuda'), torch.randn(9, 8, device='cuda')\n"
        "labels = torch.tensor([0, 9, 2, -1, 8], device='cuda')\n"
        "torch.mm(z, weight.T)  # the library's own preparations\n"
        "graph = torch.cuda.CUDAGraph()\n"
        "with torch.cuda.graph(graph):\n"
        "    head.classifier_loss(z, weight, None, labels)\n"
        "assert head.take_bad_rows('cuda') == (0, 0)\n"
        "for _ in range(3):\n"
        "    graph.replay()\n"
        "assert head.take_bad_rows('cuda') == (6, 0)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# --------------------------------------------------------------------------------------------------------------------
# torch's own checks


@pytest.mark.parametrize(
    ("norm", "match", "relu"),
    [("train", "map", True), ("train", "pooled", False), ("eval", "map", True), ("bias", "map", False)],
)
def test_gradcheck_connector_match(norm, match, relu):
    leaves, keywords = moved(tables.connector_inputs((3, 4, 2, 2), 5, norm=norm, match=match, relu=relu))

    def op(*tensors):
        named = dict(zip(leaves, tensors, strict=True))
        frozen = {k: v.clone() if k.startswith("running") else v for k, v in keywords.items()}
        return head.connector_match(named.pop("u"), named.pop("weight"), **named, **frozen)

    assert torch.autograd.gradcheck(op, tuple(leaves.values()))


@pytest.mark.parametrize("teacher", ["pooled_t", "logits_t"])
def test_gradcheck_classifier_loss(teacher):
    args, changed = moved(loss_case("all", teacher, (5, 6, 9)))
    z, weight, bias, labels, *rest = args

    def op(z):
        return head.classifier_loss(z, weight, bias, labels, **tables.loss_keywords(*rest, **changed))[0]

    assert torch.autograd.gradcheck(op, z.requires_grad_())


@pytest.mark.parametrize(("op", "args"), [pytest.param(op, args, id=name) for name, op, args in tables.op_samples()])
def test_opcheck(op, args):
    torch.library.opcheck(op, moved(args))


# --------------------------------------------------------------------------------------------------------------------
# promises


def head_inputs(dtype, kl=0.9, on="maps"):
    """The whole head, connector with map match (on vectors: a linear one) and classifier with every loss, at sizes of
    several blocks.

    In bfloat16 with kl 0 the classifier's kernels are the anchored ones, with it those that keep whole rows of logits.
    """
    dtype = torch.float32 if DEVICE == "cpu" and dtype == torch.float16 else dtype
    if on == "maps":
        leaves, keywords = tables.connector_inputs((32, 96, 7, 7), 200, dtype=dtype, channels_last=True)
    else:
        leaves, keywords = tables.connector_inputs((32, 96), 200, norm="bias", match=None, dtype=dtype)[0], {}
    _, weight, bias, labels, labels_b, mix, pooled_t = tables.loss_inputs(32, 200, 1003, dtype)
    terms = tables.loss_keywords(labels_b, mix, pooled_t, kl=kl)
    leaves, keywords, classifier, terms = moved((leaves, keywords, (weight, bias, labels), terms))
    if dtype == torch.bfloat16:
        terms["gram"] = head.classifier_gram(classifier[0])
    return leaves, keywords, classifier, terms


HEADS = [
    (F64, 0.9, "maps"),
    *((t, 0.9, "maps") for t in DTYPES),
    (torch.bfloat16, 0.0, "maps"),
    (torch.bfloat16, 0.0, "vectors"),
]


def run_head(leaves, keywords, classifier, terms):
    """Loss, its parts, top-1, the gradient of every leaf, and, of maps, z and the map match."""
    named = dict(leaves)
    if leaves["u"].dim() == 2:
        loss, parts, top1 = head.projected_classifier_loss(*named.values(), *classifier, **terms)
        return [loss.detach(), parts, top1, *torch.autograd.grad(loss, list(leaves.values()))]
    z, fm = head.connector_match(named.pop("u"), named.pop("weight"), **named, **keywords)
    loss, parts, top1 = head.classifier_loss(z, *classifier, **terms)
    gradients = torch.autograd.grad(loss + fm, list(leaves.values()))
    return [loss.detach(), parts, top1, *gradients, z.detach(), fm.detach()]


@pytest.mark.parametrize(("dtype", "kl", "on"), HEADS, ids=str)
def test_repeats_are_bitwise_equal(dtype, kl, on):
    inputs = head_inputs(dtype, kl, on)
    first = [x.clone() for x in run_head(*inputs)]
    for _ in range(9):
        assert all(torch.equal(a, b) for a, b in zip(run_head(*inputs), first, strict=True))


@gpu_only
@pytest.mark.parametrize(("dtype", "kl", "on"), HEADS[1:], ids=str)
def test_host_never_waits(dtype, kl, on):
    inputs = head_inputs(dtype, kl, on)
    run_head(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_head(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu_only
def test_the_sync_test_can_fail():
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu_only
@pytest.mark.parametrize(("dtype", "kl", "on"), HEADS[1:], ids=str)
def test_cuda_graph_capture(dtype, kl, on):
    """Forward and backward of the head in one graph; replayed on new inputs it gives the bits of a plain run."""
    leaves, keywords, classifier, terms = head_inputs(dtype, kl, on)
    keywords = {k: v for k, v in keywords.items() if not k.startswith("running")}  # every call would move them
    inputs = (leaves, keywords, classifier, terms)
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        for _ in range(2):
            run_head(*inputs)
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_head(*inputs)
    for scale in (1.5, -0.5):
        with torch.no_grad():
            leaves["u"].mul_(scale)
            classifier[2].copy_(classifier[2].roll(1))  # other labels
        graph.replay()
        replayed = [x.clone() for x in captured]
        assert all(torch.equal(a, b) for a, b in zip(replayed, run_head(*inputs), strict=True))


@pytest.mark.parametrize(("dtype", "kl", "on"), HEADS[1:], ids=str)
def test_compiled_whole(dtype, kl, on):
    """torch.compile takes forward and backward without a graph break and gives the results of a plain run. On a CPU
    nothing is compiled, only traced.
    """
    leaves, keywords, classifier, terms = head_inputs(dtype, kl, on)
    keywords = {k: v for k, v in keywords.items() if not k.startswith("running")}

    def whole(*tensors):
        named = dict(zip(leaves, tensors, strict=True))
        if on == "vectors":
            return head.projected_classifier_loss(*tensors, *classifier, **terms)[0]
        z, fm = head.connector_match(named.pop("u"), named.pop("weight"), **named, **keywords)
        return head.classifier_loss(z, *classifier, **terms)[0] + fm

    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    plain = whole(*leaves.values())
    compiled = torch.compile(whole, fullgraph=True, backend=backend)(*leaves.values())
    torch.testing.assert_close(compiled, plain, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(loss, list(leaves.values())) for loss in (plain, compiled)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-6)
