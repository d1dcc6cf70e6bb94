"""projected_classifier_loss against reference.py, another program, in float64; half precision against eager;
refusals.
"""

import pytest
import torch
from op_cases import (
    LOSS_CASES,
    assert_equal_to,
    assert_no_worse_than_eager,
    loss_keywords,
    projected_inputs,
    refused,
    run_projected,
)

from ijckd_fast import head
from ijckd_fast.head import reference


@pytest.mark.parametrize("case", LOSS_CASES)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("B", [5, 0])
def test_projected_classifier_loss_equals_reference(case, biased, B):
    leaves, args = projected_inputs(B)
    changed = dict(LOSS_CASES[case])
    args[3], args[4] = changed.pop("labels_b", args[3]), changed.pop("mix", args[4])
    leaves[2] = leaves[2] if biased else None
    fused, oracle = (run_projected(m, leaves, *args, **changed) for m in (head, reference))
    assert_equal_to(fused, oracle, equal_nan=True)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_projected_classifier_loss_makes_the_gradients_that_are_asked_for(wanted):
    leaves, (weight, bias, labels, *rest) = projected_inputs()
    gradients = []
    for module in (head, reference):
        mine = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(leaves)]
        loss, *_ = module.projected_classifier_loss(*mine, weight, bias, labels, **loss_keywords(*rest))
        gradients.append(torch.autograd.grad(loss, [mine[i] for i in wanted]))
    assert_equal_to(*gradients)
    with torch.no_grad():
        again, *_ = head.projected_classifier_loss(*mine, weight, bias, labels, **loss_keywords(*rest))
    assert_equal_to([again], [loss.detach()])


def test_projected_classifier_loss_gradcheck():
    leaves, (weight, bias, labels, *rest) = projected_inputs()

    def op(*leaves):
        return head.projected_classifier_loss(*leaves, weight, bias, labels, **loss_keywords(*rest))[0]

    assert torch.autograd.gradcheck(op, tuple(x.requires_grad_() for x in leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projected_classifier_loss_no_worse_than_eager(dtype):
    leaves, (weight, bias, *rest) = projected_inputs(64, 48, 96, 203, dtype)
    wide = [x.double() if x.is_floating_point() else x for x in (weight, bias, *rest)]
    oracle = run_projected(reference, [x.double() for x in leaves], *wide)
    fused = run_projected(head, leaves, weight, bias, *rest)
    eager = run_projected(reference, leaves, weight, bias.to(dtype), *rest)
    for i in (0, 1, 3, 4, 5):
        assert fused[i].dtype == eager[i].dtype
        assert_no_worse_than_eager(fused[i], eager[i], oracle[i])


def test_projected_classifier_loss_under_autocast():
    leaves, (weight, *rest) = projected_inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run_projected(head, leaves, weight, *rest)
    half = [leaves[0].bfloat16(), leaves[1].bfloat16(), leaves[2]]
    wanted = run_projected(head, half, weight.bfloat16(), *rest)
    assert_equal_to(got, [*wanted[:3], *(x.float() for x in wanted[3:])], 0)


def test_projected_classifier_loss_refuses():
    leaves, (weight, bias, labels, *_) = projected_inputs()
    u, projection, c = leaves
    call = head.projected_classifier_loss
    op = "projected_classifier_loss: "
    refused(op + "u must be [B, Cs], got [5, 4, 1]", lambda: call(u[..., None], projection, c, weight, bias, labels))
    refused(
        op + "projection must be [Ct, Cs] with Cs = 4 like u, got [6, 3]",
        lambda: call(u, projection[:, :3], c, weight, bias, labels),
    )
    refused(
        op + "projection must have u's dtype float64, got float32",
        lambda: call(u, projection.float(), c, weight, bias, labels),
    )
    refused(
        op + "projection_bias must be [Ct] = [6], got [5]",
        lambda: call(u, projection, c[:5], weight, bias, labels),
    )
    refused(
        op + "weight must be [K, Ct] with Ct = 6 like projection, got [9, 5]",
        lambda: call(u, projection, c, weight[:, :5], bias, labels),
    )
    refused(
        op + "u and weight must both be float64 or neither, got float64 and float32",
        lambda: call(u, projection, c, weight.float(), bias, labels),
    )
    refused(op + "labels must be [B] = [5], got [4]", lambda: call(u, projection, c, weight, bias, labels[:4]))
    refused(
        op + "labels must lie in [0, K) = [0, 9), got 9 at position 0",
        lambda: call(u, projection, c, weight, bias, torch.full((5,), 9)),
    )
    refused(
        op
        + "weight must not require grad: the classifier and the teacher are frozen and only u and its projection are",
        lambda: call(u, projection, c, weight.clone().requires_grad_(), bias, labels),
    )
    rows = u[:, None].expand(5, 2, 4)
    loss = ([weight, bias, labels, *[None] * 5], [1.0, 0.0, 0.0, 0.0, 4.0, 0.0], False, None)
    refused(
        op + "u must be vectors [B, 1, Cs], got [5, 2, 4]",
        lambda: torch.ops.ijckd.projected_classifier_loss(rows, projection, c, *loss),
    )
