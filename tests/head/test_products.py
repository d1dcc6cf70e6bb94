"""csrc/cpu/products.h: each library's product at sizes on both sides of its bounds, and at those of small data sets.

Right to twice eager's error against float64, with the same bits for any number of threads.
"""

import pytest
import torch
from op_cases import (
    assert_no_worse_than_eager,
    connector_inputs,
    loss_inputs,
    projected_inputs,
    run_connector,
    run_loss,
    run_projected,
)

from ijckd_fast import head
from ijckd_fast.head import reference

F32, F64 = torch.float32, torch.float64
LOSSES = {"sr": {"kl": 0.0}, "kl": {"sr": 0.0, "fm": 0.0}}


def in_double(x):
    """x with every floating-point tensor of it in float64."""
    if isinstance(x, (list, tuple)):
        return [in_double(y) for y in x]
    if isinstance(x, dict):
        return {k: in_double(y) for k, y in x.items()}
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def hold(run, *inputs):
    """No result of `run(module, *inputs)` farther from float64 than twice eager's."""
    fused, eager, oracle = run(head, *inputs), run(reference, *inputs), run(reference, *in_double(inputs))
    for f, e, o in zip(fused, eager, oracle, strict=True):
        assert_no_worse_than_eager(f, e, o, floor=1e-5 * o.double().abs().max().item())


# B, Ct, K: 63 and 64 rows (twice as many with a match); 2^22 multiplications in the gradient of z and one K fewer;
# sums of 4096 and 4097 classes
SIZES = [(512, 64, 10), (128, 640, 100), (64, 512, 100), (63, 512, 100), (31, 40, 7), (32, 33, 7)]
BOUNDS = [(64, 64, 1024), (64, 64, 1023), (128, 16, 4096), (128, 16, 4097)]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("B", "Ct", "K"), [*SIZES, *BOUNDS])
def test_classifiers(B, Ct, K, loss):
    z, weight, *rest = loss_inputs(B, Ct, K, F32)

    def run(module, *inputs):
        return run_loss(module.classifier_loss, *inputs, **LOSSES[loss])

    hold(run, z, weight * Ct**-0.5, *rest)


# B, Cs, Ct, K; the last two: 2^25 multiplications in the projection's gradient, and a row fewer
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("B", "Cs", "Ct", "K"),
    [(512, 32, 64, 10), (128, 256, 640, 100), (65, 3, 5, 10), (256, 256, 512, 5), (255, 256, 512, 5)],
)
def test_linear_connectors(B, Cs, Ct, K, loss):
    (u, projection, bias), rest = projected_inputs(B, Cs, Ct, K, F32)

    def run(module, leaves, *inputs):
        return run_projected(module, leaves, *inputs, **LOSSES[loss])

    hold(run, [u, projection * Cs**-0.5, bias], *rest)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("shape", "Ct"), [((16, 64, 4, 4), 96), ((8, 128, 7, 7), 256), ((2, 256, 14, 14), 512)])
def test_connectors_of_maps(shape, Ct, channels_last):
    leaves, keywords = connector_inputs(shape, Ct, dtype=F32, relu=False, channels_last=channels_last)
    leaves["weight"] = leaves["weight"] * shape[1] ** -0.5
    hold(lambda module, *inputs: run_connector(module.connector_match, *inputs), leaves, keywords)


def test_same_bits_for_any_thread_count():
    """Sizes that keep every sum within one thread of each library."""
    leaves, keywords = connector_inputs((16, 64, 4, 4), 96, dtype=F32)
    (u, *projection), rest = projected_inputs(256, 64, 128, 96, F32)
    bits, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 4):
            torch.set_num_threads(n)
            bits.append(
                [
                    *run_connector(head.connector_match, leaves, keywords),
                    *run_loss(head.classifier_loss, *loss_inputs(256, 128, 96, F32)),
                    *run_projected(head, [u, *projection], *rest),
                ]
            )
    finally:
        torch.set_num_threads(threads)
    for others in bits[1:]:
        assert all(torch.equal(a, b) for a, b in zip(bits[0], others, strict=True))


def test_a_map_that_is_not_channels_last_is_copied_once():
    """What backward reads of it are the rows that the forward pass made."""
    leaves, keywords = connector_inputs((2, 3, 4, 4), 5, dtype=F32)
    u = leaves["u"].requires_grad_()
    z, _ = head.connector_match(
        u, leaves["weight"], bn_weight=leaves["bn_weight"], bn_bias=leaves["bn_bias"], **keywords
    )
    saved = [x for x in z.grad_fn.saved_tensors if x is not None and x.shape in ((2, 16, 3), (2, 16, 5))]
    assert len(saved) == 3  # u, y and map_t
    assert all(x.is_contiguous() for x in saved)
