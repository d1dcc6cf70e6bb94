"""What of weights does not fit a module, and the digest that they are known by."""

import pytest
import torch
from torch import nn

from ijckd_fast.errors import UserError
from ijckd_fast.nets import fingerprint, require_fit


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))


def test_what_fits_is_let_through():
    require_fit(net().state_dict(), net().state_dict(), "net.pt", "is of another net", "Take another")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda w: w.pop("1.bias"), r"net\.pt is of another net: missing '1\.bias'\. Take another$"),
        (lambda w: w.update(x=torch.ones(1)), r"is of another net: unexpected 'x'\. Take"),
        (
            lambda w: w.update({"0.bias": torch.ones(3)}),
            r": of another shape '0\.bias' is \[3\], expected \[2\]\. Take",
        ),
        (
            lambda w: (w.clear(), w.update(x=torch.ones(1))),
            r": missing '0\.weight', '0\.bias', '1\.weight' and 4 more; unexpected 'x'\. Take",
        ),
        (
            lambda w: w["0.bias"].fill_(float("nan")),
            r"net\.pt: tensor '0\.bias' holds NaN or infinite values, expected finite weights: the run that wrote it",
        ),
        (lambda w: w["1.running_var"].fill_(float("inf")), r"tensor '1\.running_var' holds NaN or infinite"),
    ],
)
def test_what_does_not_fit_is_named(change, text):
    weights = {name: value.clone() for name, value in net().state_dict().items()}
    change(weights)
    with pytest.raises(UserError, match=text):
        require_fit(weights, net().state_dict(), "net.pt", "is of another net", "Take another")


def test_fingerprint_sees_every_weight():
    model = net()
    digest = fingerprint(model)
    assert fingerprint(model) == digest
    with torch.no_grad():
        model[1].running_var[1] += 1e-7
    assert fingerprint(model) != digest
