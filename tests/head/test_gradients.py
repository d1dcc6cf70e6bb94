"""Loss and gradients in one call: what autograd makes of the ops, to the bit, with nothing recorded."""

import pytest
import torch
from op_cases import (
    F64,
    LOSS_CASES,
    connector_inputs,
    loss_inputs,
    loss_keywords,
    projected_inputs,
    refused,
)

from ijckd_fast import head

DTYPES = [F64, torch.float32, torch.bfloat16]


def assert_same(results, expected):
    for got, wanted in zip(results, expected, strict=True):
        assert (got.dtype, got.shape, got.requires_grad) == (wanted.dtype, wanted.shape, False)
        assert torch.equal(got, wanted)


def trained(*tensors):
    return [None if x is None else x.detach().clone().requires_grad_() for x in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LOSS_CASES)
def test_classifier_loss_and_grad_equals_autograd(case, dtype):
    z, weight, bias, labels, *rest = loss_inputs(dtype=dtype)
    keywords = loss_keywords(*rest) | LOSS_CASES[case]
    (mine,) = trained(z)
    loss, parts, top1 = head.classifier_loss(mine, weight, bias, labels, **keywords)
    loss.backward()
    assert_same(
        head.classifier_loss_and_grad(mine, weight, bias, labels, **keywords), [loss.detach(), parts, top1, mine.grad]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_projected_classifier_loss_and_grads_equals_autograd(biased, dtype):
    leaves, (weight, bias, labels, *rest) = projected_inputs(dtype=dtype)
    mine, keywords = trained(*leaves[:2], leaves[2] if biased else None), loss_keywords(*rest)
    loss, parts, top1 = head.projected_classifier_loss(*mine, weight, bias, labels, **keywords)
    loss.backward()
    results = head.projected_classifier_loss_and_grads(*mine, weight, bias, labels, **keywords)
    expected = [loss.detach(), parts, top1, *[x.grad for x in mine if x is not None]]
    assert_same([x for x in results if x is not None], expected)
    without = head.projected_classifier_loss_and_grads(*mine, weight, bias, labels, need_grad_u=False, **keywords)
    assert without.grad_u is None
    assert torch.equal(without.grad_projection, results.grad_projection)


@pytest.mark.parametrize("op", ["classifier_loss_and_grad", "projected_classifier_loss_and_grads"])
def test_scale_equals_autograd_of_the_scaled_loss(op):
    (u, projection, c), (weight, bias, labels, *rest) = projected_inputs(dtype=torch.float32)
    keywords, scale = loss_keywords(*rest), torch.tensor(4096.0)
    inputs = trained(u, projection, c) if op.startswith("projected") else trained(torch.randn(5, 6))
    loss, *_ = getattr(head, op.partition("_and")[0])(*inputs, weight, bias, labels, **keywords)
    (loss * scale).backward()
    results = getattr(head, op)(*inputs, weight, bias, labels, scale=scale, **keywords)
    assert_same([results.loss, *results[3:]], [loss.detach(), *[x.grad for x in inputs]])


def test_one_call_under_autocast_equals_autograd():
    leaves, (weight, bias, labels, *rest) = projected_inputs(dtype=torch.float32)
    mine, keywords = trained(*leaves), loss_keywords(*rest)
    with torch.autocast("cpu", torch.bfloat16):
        loss, *_ = head.projected_classifier_loss(*mine, weight, bias, labels, **keywords)
        results = head.projected_classifier_loss_and_grads(*mine, weight, bias, labels, **keywords)
    loss.backward()
    assert_same([results.loss, *results[3:]], [loss.detach(), *[x.grad for x in mine]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(
    ("shape", "norm", "match", "relu"),
    [
        ((5, 6, 3, 4), "train", "map", True),
        ((5, 6, 3, 4), "eval", "pooled", True),
        ((5, 6, 3, 4), "bias", None, True),
        ((4, 6), "bias", "pooled", False),
        ((4, 6), "none", None, False),
    ],
)
def test_connector_loss_and_grads_equals_autograd(shape, norm, match, relu, channels_last, dtype):
    if channels_last and len(shape) == 2:
        pytest.skip("vectors have one layout")
    leaves, keywords = connector_inputs(
        shape, norm=norm, match=match, relu=relu, dtype=dtype, channels_last=channels_last
    )
    batches = [torch.tensor(3), torch.tensor(3)]
    running = [{k: v.clone() for k, v in keywords.items() if k.startswith("running")} for _ in batches]
    weight, bias, labels = torch.randn(9, 7, dtype=dtype), torch.randn(9).to(dtype), torch.arange(shape[0])
    given = {k: v for k, v in leaves.items() if k not in ("u", "weight")} | keywords
    u, projection = leaves["u"], leaves["weight"]
    z, fm = head.connector_match(u, projection, **given | running[0], num_batches_tracked=batches[0])
    loss, parts, top1 = head.classifier_loss(z, weight, bias, labels)
    total = loss + 0.7 * fm if match else loss
    gradients = torch.autograd.grad(total, list(leaves.values()))
    connector = given | running[1] | {"num_batches_tracked": batches[1]}
    results = head.connector_loss_and_grads(u, projection, connector, weight, bias, labels, match=0.7)
    assert_same(results[:5], [total.detach(), parts, top1, z.detach(), fm.detach()])
    assert list(results.grads) == list(leaves)
    assert_same(results.grads.values(), gradients)
    assert_same([*running[1].values(), batches[1]], [*running[0].values(), batches[0]])
    frozen = head.connector_loss_and_grads(
        u, projection, given | running[1], weight, bias, labels, match=0.7, need_grad_u=False
    )
    assert list(frozen.grads) == [name for name in leaves if name != "u"]


def test_one_call_refuses_what_the_ops_refuse():
    z, weight, bias, labels, *_ = loss_inputs()
    refused(
        "classifier_loss: weight must not require grad",
        lambda: head.classifier_loss_and_grad(z, weight.clone().requires_grad_(), bias, labels),
    )
    refused("labels must lie in [0, K)", lambda: head.classifier_loss_and_grad(z, weight, bias, labels + 9))
    refused(
        "classifier_loss: torch.func's transforms",
        lambda: torch.func.vmap(lambda x: head.classifier_loss_and_grad(x, weight, bias, labels))(z[None]),
    )
    (u, projection, c), _ = projected_inputs()
    refused(
        "projected_classifier_loss: u must be [B, Cs]",
        lambda: head.projected_classifier_loss_and_grads(u[0], projection, c, weight, bias, labels),
    )
    refused(
        "connector_match: pooled_t must not require grad",
        lambda: head.connector_loss_and_grads(
            u, projection, {"pooled_t": z.clone().requires_grad_()}, weight, bias, labels
        ),
    )
    with pytest.raises(TypeError, match="process_group"):
        head.connector_loss_and_grads(u, projection, {"process_group": None}, weight, bias, labels)
