"""Classifiers that are one linear layer in another form: 1x1 convolutions, several heads whose answers are averaged."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from ijckd_fast.errors import UserError
from ijckd_fast.nets import Tapped, create_model

WIDTH, CLASSES = 6, 10


class NormLinear(nn.Sequential):
    def __init__(self):
        super().__init__(nn.BatchNorm1d(WIDTH), nn.Dropout(0.2), nn.Linear(WIDTH, CLASSES))


class Net(nn.Module):
    """`answer` is made of the map [B, C, H, W] by the heads."""

    def __init__(self, answer, *heads):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, WIDTH, 3, 2, 1), nn.BatchNorm2d(WIDTH)
        self.heads = nn.ModuleList(heads)
        self.answer = answer

    def forward(self, images):
        return self.answer(torch.relu(self.norm(self.conv(images))), *self.heads)


def conv():
    return nn.Conv2d(WIDTH, CLASSES, 1)


def mean_of_two(map_, one, two):
    x = map_.mean((2, 3))
    return (one(x) + two(x)) / 2


FORMS = {
    "after pooling": lambda: Net(lambda m, fc: fc(m.mean((2, 3), keepdim=True)).flatten(1), conv()),
    "before pooling": lambda: Net(lambda m, fc: fc(m).mean((2, 3)), conv()),
    "without a bias": lambda: Net(lambda m, fc: fc(m).mean((2, 3)), nn.Conv2d(WIDTH, CLASSES, 1, bias=False)),
    "two heads": lambda: Net(mean_of_two, nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, CLASSES)),
    "two heads with norms": lambda: Net(mean_of_two, NormLinear(), NormLinear()),
    "three heads": lambda: Net(
        lambda m, *heads: torch.stack([head(m.mean((2, 3))) for head in heads]).mean(0),
        *(nn.Linear(WIDTH, CLASSES) for _ in range(3)),
    ),
}


def trained(form: str) -> Net:
    torch.manual_seed(1)
    net = FORMS[form]()
    with torch.no_grad():
        for value in net.state_dict().values():
            if value.is_floating_point():
                value.copy_(0.1 + torch.rand_like(value))
    return net.eval()


def images():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_classifier_in_another_form_is_one_linear_layer(form):
    net = trained(form)
    expected = net(images())
    model = Tapped(net, form, CLASSES, 16)
    assert type(model.classifier) is nn.Linear
    torch.testing.assert_close(model(images()), expected)
    map_, pooled = model.features(images(), need_map=True)
    torch.testing.assert_close(map_.mean((2, 3)), pooled)
    assert (model.classifier.bias is None) == (form == "without a bias")


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_its_weights_are_written_and_read_by_the_nets_own_names(form):
    net = trained(form)
    names = {name: value.shape for name, value in net.state_dict().items()}
    model = Tapped(net, form, CLASSES, 16)
    model.classifier.weight.mul_(-2)  # as training changes it
    answers, state = model(images()), model.native_state_dict()
    assert {name: value.shape for name, value in state.items()} == names
    other = FORMS[form]().eval()
    other.load_state_dict(state)
    torch.testing.assert_close(other(images()), answers)
    again = Tapped(trained(form), form, CLASSES, 16)
    again.load_native(state, "file")
    torch.testing.assert_close(again(images()), answers)
    torch.testing.assert_close(model.uncut()(images()), answers)


@pytest.mark.parametrize("name", ["timm/resnetv2_18", "timm/swiftformer_xs"])
@torch.no_grad()
def test_a_run_of_such_a_net_and_its_librarys_file_are_read(name, tmp_path):
    torch.manual_seed(0)
    options = {"img_size": 64} if "swift" in name else {}
    published = timm.create_model(name.removeprefix("timm/"), num_classes=4, **options).eval()
    torch.save(published.state_dict(), tmp_path / "library.pt")
    pixels = torch.randn(2, 3, 64, 64)
    model = create_model(name, 4, checkpoint=tmp_path / "library.pt", image_size=64).eval()
    torch.testing.assert_close(model(pixels), published(pixels), rtol=1e-4, atol=1e-5)
    learner = {f"student.{name}": value for name, value in model.state_dict().items()}
    torch.save({"learner": learner}, tmp_path / "last.pt")
    again = create_model(name, 4, checkpoint=tmp_path / "last.pt", image_size=64).eval()
    assert torch.equal(again(pixels), model(pixels))
    with pytest.raises(UserError, match="classifies 4 classes, expected 5 as in the data"):
        create_model(name, 5, checkpoint=tmp_path / "library.pt", image_size=64)
    with pytest.raises(UserError, match="classifies 4 classes, expected 5 as in the data"):
        create_model(name, 5, checkpoint=tmp_path / "last.pt", image_size=64)


def two_views(map_, one, two):
    return (one(map_.mean((2, 3))) + two(map_.amax((2, 3)))) / 2


@pytest.mark.parametrize(
    ("net", "why"),
    [
        (Net(lambda m, fc: F.relu(fc(m)).mean((2, 3)), conv()), "pooled vector, expected"),  # SqueezeNet's
        (Net(lambda m, fc: fc(m).amax((2, 3)), conv()), "pooled vector, expected"),
        (Net(lambda m, fc: fc(m).mean((2, 3)), nn.Conv2d(WIDTH, CLASSES, 3)), "pooled vector, expected"),
        (
            Net(two_views, nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, CLASSES)),
            r"the mean of those of 'heads.0' and 'heads.1', which see different vectors",
        ),
        (
            Net(lambda m, a, b: a(m.mean((2, 3))) + b(m.mean((2, 3))), *(nn.Linear(WIDTH, CLASSES) for _ in "ab")),
            r"made of those of 'heads.0' and 'heads.1'",
        ),
    ],
)
def test_what_is_no_linear_layer_is_refused_with_the_reason(net, why):
    with pytest.raises(UserError, match=f"does not end in one linear layer on a .*{why}"):
        Tapped(net, "net", CLASSES, 16)


def test_a_convolution_for_other_classes_is_named_as_such():
    with pytest.raises(UserError, match="classifies 10 classes, expected 7 as in the data"):
        Tapped(FORMS["after pooling"](), "net", 7, 16)


def test_of_a_net_with_two_tokens_the_plain_one_is_named():
    with pytest.raises(UserError, match=r"see different vectors, such as two tokens\).*take 'timm/pit_ti_224'"):
        create_model("timm/pit_ti_distilled_224", CLASSES)
    for name in timm.list_models("*_distilled_*"):
        assert timm.is_model(name.replace("_distilled", "")), name
