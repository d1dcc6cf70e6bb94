"""Every argument of the ops that is not as the contract says: refused in a sentence that begins with the op's name, or
served as its plain form is; never other figures, never torch's words for backends.
"""

import math

import pytest
import torch
from op_cases import F64, class_map_inputs, connector_inputs, loss_inputs, projected_inputs, refused
from torch import Tensor

from ijckd_fast import head
from ijckd_fast.head import reference

NAN, INF = float("nan"), float("inf")


def classifier_call() -> dict:
    z, weight, bias, labels, labels_b, mix, pooled_t = loss_inputs()
    given = {"z": z.requires_grad_(), "weight": weight, "bias": bias, "labels": labels, "labels_b": labels_b}
    numbers = {"ce": 0.7, "sr": 0.5, "fm": 0.3, "kl": 0.9, "temperature": 3.0, "label_smoothing": 0.1}
    return given | {"mix": mix, "pooled_t": pooled_t} | numbers


def with_logits_call() -> dict:
    call = classifier_call()
    del call["pooled_t"]
    return call | {"logits_t": torch.linspace(-2, 2, 45, dtype=F64).reshape(9, 5).T, "fm": 0.0}


def projected_call() -> dict:
    (u, projection, projection_bias), (weight, bias, labels, labels_b, mix, pooled_t) = projected_inputs()
    call = classifier_call() | {"weight": weight, "bias": bias, "labels": labels, "labels_b": labels_b, "mix": mix}
    del call["z"]
    leaves = {"u": u, "projection": projection, "projection_bias": projection_bias}
    return {k: v.requires_grad_() for k, v in leaves.items()} | call | {"pooled_t": pooled_t}


def class_map_call() -> dict:
    maps, weight, bias, maps_t, labels, share = class_map_inputs()
    given = {"maps": maps.requires_grad_(), "weight": weight, "bias": bias, "maps_t": maps_t, "labels": labels}
    numbers = {"kl": 0.7, "dkd_alpha": 0.5, "dkd_beta": 0.3, "cam": 0.9, "temperature": 3.0}
    return given | {"share": share} | numbers


def pooled_maps_call() -> dict:
    call = class_map_call()
    pooled = {k: head.pooled_positions(call[k].detach()) for k in ("maps", "maps_t")}
    return call | pooled | {"maps": pooled["maps"].requires_grad_()}


def connector_call(**changed) -> dict:
    leaves, keywords = connector_inputs(**changed)
    return {**leaves, **keywords}


CALLS = {
    "classifier_loss": ("classifier_loss", classifier_call),
    "classifier_loss with logits_t": ("classifier_loss", with_logits_call),
    "projected_classifier_loss": ("projected_classifier_loss", projected_call),
    "class_map_loss": ("class_map_loss", class_map_call),
    "class_map_loss of pooled maps": ("class_map_loss", pooled_maps_call),
    "connector_match": ("connector_match", connector_call),
    "connector_match in evaluation": ("connector_match", lambda: connector_call(norm="eval", match="pooled")),
    "linear connector": (
        "connector_match", lambda: connector_call(shape=(4, 6), norm="bias", match="pooled", relu=False)
    ),
    "connector_match of vectors": ("connector_match", lambda: connector_call(shape=(4, 6), match="map")),
}  # fmt: skip


def kinds(x: Tensor) -> dict[str, Tensor]:
    """The same values, or as near as their kind can hold them, otherwise than as a plain dense tensor."""
    x = x.detach()
    floating = x if x.is_floating_point() else x.double()
    made = {
        "int32": x.int(),
        "int64": x.long(),
        "bool": x > 0,
        "complex": x.to(torch.complex128),
        "quantised": torch.quantize_per_tensor(floating.float(), 0.1, 0, torch.qint8),
        "meta": x.to("meta"),
        "sparse": x.to_sparse(),
        "mkldnn": floating.float().to_mkldnn(),
        "a number": 0.5,
        "one dimension more": x[..., None],
        "one less": x[..., 0] if x.dim() else x[None],
        "longer": torch.cat([x, x]) if x.dim() else x.repeat(2),
        "empty": x[:0] if x.dim() else x.new_empty(0),
    }
    if x.dim() == 2:
        made["csr"] = x.to_sparse_csr()
    return made


def same_values(x: Tensor) -> dict[str, Tensor]:
    """The same values in other layouts."""
    x = x.detach()
    wide = torch.full([2 * n for n in x.shape], -1, dtype=x.dtype)
    strided = wide[(slice(None, None, 2),) * x.dim()].copy_(x)
    made = {"strided": strided, "reversed": x.flip(0).flip(0), "permuted": x.T.contiguous().T if x.dim() == 2 else x}
    if x.is_floating_point():
        made["negative view"] = torch.complex(torch.zeros_like(x), -x).conj().imag
        made["a part of complex numbers"] = torch.complex(x, x).real
    return made


ARGUMENTS = [
    (name, argument) for name, (_, make) in CALLS.items() for argument, x in make().items() if isinstance(x, Tensor)
]


def outcome(op: str, call: dict) -> list[Tensor]:
    """Results and gradients."""
    call = {
        k: v.clone() if k.startswith(("running", "num_batches")) and isinstance(v, Tensor) else v
        for k, v in call.items()
    }
    out = getattr(head, op)(**call)
    leaves = [v for v in call.values() if isinstance(v, Tensor) and v.requires_grad]
    loss = out[0].sum() + (out[1].sum() if op == "connector_match" else 0)
    return [x.detach() for x in out] + list(torch.autograd.grad(loss, leaves))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_a_tensor_of_another_kind_is_refused(name, argument):
    op, make = CALLS[name]
    original = make()[argument]
    for kind, x in kinds(original).items():
        if (
            isinstance(x, Tensor)
            and x.dtype == original.dtype
            and x.shape == original.shape
            and x.layout == original.layout
            and x.device == original.device
        ):
            continue  # labels are int64
        with pytest.raises(RuntimeError) as raised:
            getattr(head, op)(**(make() | {argument: x}))
        assert str(raised.value).startswith(f"{op}: "), f"{kind}: {raised.value}"
        assert "backend" not in str(raised.value), f"{kind}: {raised.value}"


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_a_tensor_in_another_layout_is_served_as_it_is(name, argument):
    op, make = CALLS[name]
    expected = outcome(op, make())
    for kind, x in same_values(make()[argument]).items():
        x.requires_grad_(make()[argument].requires_grad)
        for got, want in zip(outcome(op, make() | {argument: x}), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, msg=lambda text, kind=kind: f"{kind}: {text}")


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_only_what_is_trained_may_require_grad(name, argument):
    op, make = CALLS[name]
    call = make()
    if call[argument].requires_grad or not call[argument].is_floating_point():
        return
    call[argument] = call[argument].clone().requires_grad_()
    refused(f"{op}: {argument} must not require grad", lambda: getattr(head, op)(**call))


NUMBERS = [
    *((op, x, bad) for op in CALLS if "classifier" in op for x in ("ce", "sr", "fm", "kl") for bad in (NAN, INF, -INF)),
    *(("class_map_loss", x, b) for x in ("kl", "dkd_alpha", "dkd_beta", "cam") for b in (NAN, INF, -INF)),
    *((op, "temperature", bad) for op in CALLS if "loss" in op for bad in (0.0, -1.0, NAN, INF, -INF)),
    *((op, "label_smoothing", bad) for op in CALLS if "classifier" in op for bad in (-0.1, 1.1, NAN, INF)),
    *((op, "eps", bad) for op in CALLS if "connector" in op for bad in (-1e-5, NAN, INF)),
    *(("connector_match", "momentum", bad) for bad in (-0.1, 1.5, NAN, INF)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "number", "bad"), NUMBERS)
def test_a_number_out_of_range_is_refused(name, number, bad):
    op, make = CALLS[name]
    for module in (head, reference) if op != "connector_match" else (head,):
        with pytest.raises(RuntimeError, match=number) as raised:
            getattr(module, op)(**(make() | {number: bad}))
        assert "classifier_loss: " in str(raised.value) or str(raised.value).startswith(f"{op}: ")
        assert f"got {bad:g}".replace("nan", "") in str(raised.value).replace("nan", "")


@pytest.mark.parametrize("make", [classifier_call, with_logits_call, projected_call])
@pytest.mark.parametrize("bad", [-0.01, 1.01, 1e30, -1e30])
def test_a_share_out_of_range_is_refused(make, bad):
    call = make()
    op = "projected_classifier_loss" if "u" in call else "classifier_loss"
    call["mix"][3] = bad
    for module in (head, reference):
        with pytest.raises(RuntimeError, match=r"classifier_loss: mix must lie in \[0, 1\], got .* at position 3"):
            getattr(module, op)(**call)
    call["mix"][3] = NAN  # as any other argument's
    assert getattr(head, op)(**call)[0].isnan()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("K", [9, 30000], ids=["whole rows", "by W^T W"])
@pytest.mark.parametrize("weights", [{"sr": 1.0}, {"kl": 1.0}, {"sr": 1.0, "fm": 1.0}], ids=str)
def test_a_bias_that_is_not_finite_is_not_hidden(bad, K, weights):
    """In the difference of the logits it cancels, for us; eager subtracts two that are not finite."""
    z, weight, bias, labels, *_, pooled_t = loss_inputs(4, 12, K)
    bias[K // 2] = bad
    results = []
    for module in (head, reference):
        leaf = z.clone().requires_grad_()
        loss, parts, _ = module.classifier_loss(leaf, weight, bias, labels, pooled_t=pooled_t, ce=0.0, **weights)
        loss.backward()
        assert loss.isnan()
        assert parts[2].isfinite()
        results.append(leaf.grad)
    assert not (results[0].isfinite() & ~results[1].isfinite()).any()


def test_running_statistics_go_together():
    call = connector_call()
    for name in ("running_mean", "running_var"):
        refused(
            "connector_match: running_mean and running_var go together",
            lambda name=name: head.connector_match(**(call | {name: None})),
        )
    head.connector_match(**(call | {"running_mean": None, "running_var": None}))
    refused(
        "momentum None takes the mean over all batches and needs num_batches_tracked",
        lambda: head.connector_match(**(call | {"momentum": None})),
    )
    for wrong, got in ((torch.zeros(()), "float32 []"), (torch.zeros(2, dtype=torch.int64), "int64 [2]")):
        refused(
            f"num_batches_tracked must be int64 [], got {got}",
            lambda wrong=wrong: head.connector_match(**(call | {"num_batches_tracked": wrong})),
        )


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("transform", ["grad", "vmap", "jacrev"])
def test_transforms_of_torch_func_are_refused(name, transform):
    op, make = CALLS[name]
    call = make()
    first = next(iter(call))
    x = call.pop(first).detach()

    def loss(x):
        return getattr(head, op)(x, **{k: v.detach() if isinstance(v, Tensor) else v for k, v in call.items()})[0].sum()

    transformed = getattr(torch.func, transform)(loss)
    refused(f"{op}: torch.func's transforms", lambda: transformed(x[None] if transform == "vmap" else x))


def test_numbers_of_the_table_are_numbers():
    assert all(not isinstance(bad, Tensor) and (math.isnan(bad) or bad == bad) for _, _, bad in NUMBERS)
