"""Run by test_emulator.py beside test_ops.py, on emulated CUDA kernels: what the CPU's ops refuse and the GPU's take."""

import pytest
import torch
from test_ops import assert_no_worse_than_eager, connector_inputs, loss_inputs, run_connector, run_loss
from torch import Tensor

from ijckd_fast import ops, reference


def wide(x):
    return x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x


@pytest.mark.parametrize("match", ["map", "pooled"])
def test_connector_match_float16_no_worse_than_eager(match):
    leaves, keywords = connector_inputs((16, 48, 7, 7), 80, match=match, dtype=torch.float16, channels_last=True)
    oracle = run_connector(
        reference.connector_match,
        {k: wide(v) for k, v in leaves.items()},
        {k: wide(v) for k, v in keywords.items()},
    )
    fused, eager = (run_connector(m.connector_match, leaves, keywords) for m in (ops, reference))
    for f, e, o in zip(fused, eager, oracle, strict=True):
        assert_no_worse_than_eager(f, e, o)


def test_classifier_loss_float16_no_worse_than_eager():
    """Over eight seeds together: the error of one mean loss is a matter of luck."""
    errors = torch.zeros(2, 3, dtype=torch.float64)  # of fused, eager; in loss, parts, dz
    for seed in range(8):
        z, weight, bias, *rest = loss_inputs(64, 96, 203, torch.float16, seed=seed)
        oracle = run_loss(reference.classifier_loss, *map(wide, (z, weight, bias, *rest)))
        fused = run_loss(ops.classifier_loss, z, weight, bias, *rest)
        eager = run_loss(reference.classifier_loss, z, weight, bias.half(), *rest)
        for i, got in enumerate((fused, eager)):
            errors[i] += torch.stack([(got[j].double() - oracle[j]).abs().max() ** 2 for j in (0, 1, 3)])
    assert (errors[0].sqrt() <= 2 * errors[1].sqrt()).all(), errors.sqrt()


@pytest.mark.parametrize("confidence", [0, 12, 20, 30])
@pytest.mark.parametrize(
    "weights",
    [
        {},
        {"label_smoothing": 0.1},
        {"sr": 1.0, "ce": 0.0},
        {"kl": 1.0, "ce": 0.0},
        {"ce": 0.7, "sr": 0.5, "fm": 0.3, "kl": 0.9},
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
    for op, scale, to in ((reference, 1, torch.double), (reference, 65536, torch.float), (ops, 1, torch.float)):
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
    ops.take_bad_rows("cpu")
    loss, _, top1 = ops.classifier_loss(z, weight, bias, labels)
    loss.backward()
    assert loss.isnan()
    assert z.grad.isnan().all(1).tolist() == [False, False, True, False, False]
    assert z.grad[[0, 1, 3, 4]].isfinite().all()
    assert top1 == (torch.nn.functional.linear(z, weight, bias).argmax(1) == labels).sum()
    assert ops.take_bad_rows("cpu") == (1, 0)
    assert ops.take_bad_rows("cpu") == (0, 0)


def test_bad_labels_out_of_range_are_counted_once_a_row():
    """Whatever is wrong with the row, over all calls since the last look, and where only top-1 needs the label."""
    z, weight, bias, labels, labels_b, mix, pooled_t = loss_inputs(B=5, K=9)
    ops.take_bad_rows("cpu")
    labels[1:3], labels_b[2:4] = 9, -1
    ops.classifier_loss(z, weight, bias, labels, labels_b=labels_b, mix=mix)
    assert ops.take_bad_rows("cpu") == (3, 0)
    for _ in range(2):
        ops.classifier_loss(z, weight, bias, labels, pooled_t=pooled_t, ce=0.0, sr=1.0)
    assert ops.take_bad_rows("cpu") == (4, 0)
