"""Maps of nets that hand no plain map to global average pooling: grids of tokens, layers behind pooling."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ijckd_fast.distill import Distiller, get_objective
from ijckd_fast.errors import UserError
from ijckd_fast.nets import Tapped, create_model, macs

WIDTH, CLASSES, SIZE = 8, 10, 32


class Tokens(nn.Module):
    """Patches of 8x8 pixels as tokens, `before` others before them, a block; pooled as `pooling` says."""

    def __init__(
        self,
        pooling: str = "mean",
        before: int = 0,
        order: str = "rows",
        tail: nn.Module | None = None,
        linear: bool = False,
    ):
        super().__init__()
        self.patches = nn.Linear(3 * 8 * 8, WIDTH) if linear else nn.Conv2d(3, WIDTH, 8, 8)
        self.before = nn.Parameter(torch.randn(1, before, WIDTH))
        self.block = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU())
        self.norm = nn.LayerNorm(WIDTH)
        self.tail = tail or nn.Identity()
        self.fc = nn.Linear(getattr(self.tail, "out_features", WIDTH), CLASSES)
        self.pooling, self.order = pooling, order

    def forward(self, images):  # [B, 3, S, S] -> [B, K]
        if isinstance(self.patches, nn.Linear):
            x = self.patches(F.unfold(images, 8, stride=8).transpose(1, 2))  # [B, N, C]
        else:
            x = self.patches(images)  # [B, C, S/8, S/8]
            x = (x if self.order == "rows" else x.transpose(2, 3)).flatten(2).transpose(1, 2)
        x = torch.cat((self.before.expand(len(x), -1, -1), x), 1)
        x = self.norm(x + self.block(x) + 0.1 * x.mean(1, keepdim=True))  # [B, P + N, C]
        grid = x[:, self.before.shape[1] :]
        pooled = {"mean": lambda: grid.mean(1), "class": lambda: x[:, 0], "max": lambda: grid.amax(1)}[self.pooling]()
        return self.fc(self.tail(pooled))


def tapped(*args, **options) -> Tapped:
    torch.manual_seed(0)
    return Tapped(Tokens(*args, **options), "tokens", CLASSES, SIZE).eval()


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("before", [0, 1, 5])
@torch.no_grad()
def test_tokens_whose_mean_is_pooled_are_the_map(before, linear):
    """linear: the net has no map whose size would say which tokens are the grid (NaFlexViT)."""
    model = tapped(before=before, linear=linear)
    assert model.has_map
    assert not model.matches_only
    assert model.stages == (("norm", WIDTH, 4),)
    map_, pooled = model.features(images(), need_map=True)
    assert map_.shape == (2, WIDTH, 4, 4)
    torch.testing.assert_close(map_.mean((2, 3)), pooled)
    changed = images()
    changed[:, :, 8:16, 24:] = 3  # the patch in row 1, column 3
    moved = (model.features(changed, need_map=True)[0] - map_).abs().sum(1)  # [B, H, W]
    assert moved.flatten(1).argmax(1).tolist() == [7, 7]


def test_tokens_in_another_order_than_the_image_are_no_map():
    model = tapped(order="columns")
    assert not model.has_map
    assert not model.matches_only


@pytest.mark.parametrize("pooling", ["class", "max"])
@torch.no_grad()
def test_tokens_of_which_the_classifier_sees_no_mean_can_be_matched_only(pooling):
    model = tapped(pooling, before=1)
    assert not model.has_map
    assert model.matches_only
    assert model.map_channels is None
    assert model.match_channels == WIDTH
    with pytest.raises(UserError, match=r"'tokens' has no map that its classifier sees the mean of.*matched, no more"):
        model.features(images(), need_map=True)
    model.keep_map_to_match()
    map_, _ = model.features(images(), need_map=True)
    made = []
    model.net.norm.register_forward_hook(lambda layer, args, output: made.append(output))
    model(images())
    assert torch.equal(map_.flatten(2).transpose(1, 2), made[0][:, 1:])


@torch.no_grad()
def test_layers_of_tokens_can_be_named_as_stages():
    torch.manual_seed(0)
    model = Tapped(Tokens("class", before=1), "tokens", CLASSES, SIZE, ["patches", "block", "norm"]).eval()
    assert model.stages == (("patches", WIDTH, 16), ("block", WIDTH, 16), ("norm", WIDTH, 16))  # of larger images
    model.keep_stages([1])
    _, _, (block,) = model.staged_features(images())
    assert block.shape == (2, WIDTH, 4, 4)


def a_tail() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(inplace=True), nn.Dropout(0.5))


@pytest.mark.parametrize("tail", [a_tail(), nn.ReLU(inplace=True)])
def test_layers_behind_pooling_run_at_every_position(tail):
    """t(map) - mean(t(map)) + t(mean(map))"""
    model = tapped(tail=tail)
    made = []
    model.net.norm.register_forward_hook(lambda layer, args, output: made.append(output.clone()))
    with torch.no_grad():
        map_, pooled = model.features(images(), need_map=True)
        tokens = made[0]  # [B, N, C]
        at_each = torch.stack([model.net.tail(token.clone()) for token in tokens])  # of each image's positions
        expected = at_each - at_each.mean(1, keepdim=True) + model.net.tail(tokens.mean(1)).unsqueeze(1)
    torch.testing.assert_close(map_.flatten(2).transpose(1, 2), expected)
    torch.testing.assert_close(map_.mean((2, 3)), pooled)


def test_positions_are_no_samples_for_a_norm_behind_pooling():
    model = tapped(tail=a_tail()).train()
    norm = model.net.tail[1]
    model.features(images(4))
    once = norm.running_mean.clone()
    norm.running_mean.zero_()
    map_, _ = model.features(images(4), need_map=True)
    assert torch.equal(norm.running_mean, once)
    assert norm.training
    assert model.net.tail.training
    map_.square().sum().backward()
    assert all(
        p.grad is not None for name, p in model.named_parameters() if not name.startswith(("classifier", "net.b"))
    )


def test_what_a_map_costs_behind_pooling_is_counted():
    torch.manual_seed(0)
    student = Tapped(Tokens(tail=a_tail()), "tokens", CLASSES, SIZE)
    teacher = create_model("resnet8x0.5", CLASSES, image_size=SIZE)
    backbone = macs(student.net, SIZE)
    distiller = Distiller(student, teacher, get_objective("ijckd", connector="conv1x1"))
    positions, channels = 16, teacher.channels
    connector, classifier = positions * WIDTH * channels, channels * CLASSES
    at_each_and_at_the_mean = (positions + 1) * WIDTH * WIDTH
    expected = backbone + at_each_and_at_the_mean + connector + classifier
    assert distiller.deployed_cost(SIZE)[1] == expected


# --- what is refused, and what then works

PLAIN = "resnet8x0.5"


def net(kind: str) -> Tapped:
    if kind == "plain":
        return create_model(PLAIN, CLASSES, image_size=SIZE)
    return tapped("class", before=1, tail=nn.Linear(WIDTH, 12) if kind == "wide" else None)


def options_in(text: str) -> list[tuple[str | None, dict]]:
    """(objective, its other settings) of every remedy on a command line that an error names."""
    remedies = []
    for remedy in text.split(", or ")[1:]:
        words = remedy[remedy.index("--") :].split(" (")[0].split()
        given = dict(zip((w[2:] for w in words[::2]), words[1::2], strict=True))
        remedies.append((given.pop("objective", None), given))
    return remedies


@pytest.mark.parametrize("objective", ["ijckd", "simkd", "srrl", "ijckd-pooled"])
@pytest.mark.parametrize(
    ("student", "teacher", "at_fault"),
    [("plain", "class", "teacher"), ("class", "plain", "student"), ("class", "class", None)],
)
def test_a_refusal_names_the_net_at_fault_and_its_remedies_work(objective, student, teacher, at_fault):
    def distiller(name, **settings):
        return Distiller(net(student), net(teacher), get_objective(name, **settings)).train()

    if student == "plain" and objective in ("srrl", "ijckd-pooled"):
        assert torch.isfinite(distiller(objective)(images(), torch.tensor([1, 2])).loss)
        return
    with pytest.raises(UserError) as refused:
        distiller(objective)
    if at_fault is not None:
        name = PLAIN if {"student": student, "teacher": teacher}[at_fault] == "plain" else "tokens"
        assert str(refused.value).startswith(f"{at_fault} {name!r} has no map")
    remedies = options_in(str(refused.value))
    assert remedies
    for other, settings in remedies:
        loss = distiller(other or objective, **settings)(images(), torch.tensor([1, 2])).loss
        assert torch.isfinite(loss)
        loss.backward()


def test_a_map_that_is_only_matched_is_not_compared_with_what_the_classifier_sees():
    objective = get_objective("kd", fm=1.0, match="map", connector="bottleneck:2")
    distiller = Distiller(net("plain"), net("class"), objective).eval()
    with pytest.raises(UserError, match="matches a map of teacher 'tokens' whose mean is not what its classifier sees"):
        distiller.compare(images())


@pytest.mark.parametrize(("student", "teacher"), [("plain", "wide"), ("wide", "plain"), ("class", "class")])
def test_a_map_is_matched_while_the_classifier_sees_the_class_token(student, teacher):
    objective = get_objective("kd", fm=1.0, match="map", connector="conv1x1")
    distiller = Distiller(net(student), net(teacher), objective).train()
    out = distiller(images(), torch.tensor([1, 2]))
    assert set(out.parts) == {"ce", "kl", "fm"}
    out.loss.backward()
    assert all(p.grad is not None for p in distiller.parameters())
    assert distiller.eval().predict(images()).shape == (2, CLASSES)
