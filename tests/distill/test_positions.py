"""Terms at the pooled positions of the last maps (SDD, CAT-KD): values, gradients, limits, and what is refused."""

from __future__ import annotations

import dataclasses

import logit_losses
import pytest
import torch
import torch.nn.functional as F
from test_distiller import K, Strided, batch, connect, pair
from torch import nn

from ijckd_fast.distill import PRESETS, Distiller, Seen, get_objective
from ijckd_fast.distill.terms.catkd import Catkd
from ijckd_fast.distill.terms.dkd import Dkd
from ijckd_fast.distill.terms.kl import Kl
from ijckd_fast.distill.terms.sdd import Sdd
from ijckd_fast.errors import UserError
from ijckd_fast.nets import CachedTeacher, Tapped, create_model

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
CLASSIFIERS = ("student", "teacher")
HEADS = ("fused", "reference")

# Images, classes, channels of student and teacher, sides of their maps: sides that 2 and 4 divide; that they do not, of
# unequal maps; smaller than 4 x 4 and than 2 x 2.
SHAPES = {
    "even": (3, 5, (6, 6), (4, 8), (4, 4)),
    "odd": (2, 4, (3, 7), (7, 5), (6, 9)),
    "small": (4, 3, (5, 2), (3, 2), (1, 3)),
}


def made(shape: str, classifier: str, head: str = "fused", **mixing) -> Seen:
    """What a step that needs maps and classifiers and no more shows its terms, and labels."""
    B, classes, channels, size, size_t = SHAPES[shape]
    draw = torch.Generator().manual_seed(0)

    def drawn(*sizes):
        return torch.randn(sizes, dtype=torch.float64, generator=draw)

    def linear(channels):
        layer = nn.Linear(channels, classes, dtype=torch.float64)
        for parameter in layer.parameters():
            parameter.data = 2 * drawn(*parameter.shape)
        return layer

    own, of_teacher = (linear(c) for c in channels)
    width = channels[0] if classifier == "student" else channels[1]
    map_ = drawn(B, width, *size).requires_grad_()
    return Seen(
        **{
            **dict.fromkeys(Seen.__dataclass_fields__),
            "map_s" if classifier == "student" else "map_z": map_,
            "map_t": drawn(B, channels[1], *size_t),
            "classifier": of_teacher.requires_grad_(False),
            "classifier_s": own if classifier == "student" else None,
            "labels": torch.randint(classes, (B,), generator=draw),
            "head": head,
            "progress": 0.0,
            **mixing,
        }
    )


def map_of(seen: Seen) -> torch.Tensor:
    return seen.map_z if seen.map_s is None else seen.map_s


def mixing_of(shape: str) -> dict:
    B, classes = SHAPES[shape][:2]
    return {"labels_b": torch.arange(B) % classes, "mix": torch.linspace(0, 1, B, dtype=torch.float64)}


def by_formula(seen: Seen, scales, per_image, *, with_bias: bool = True) -> torch.Tensor:
    """Mean over images of per_image(answers [P, K], the teacher's, label)."""
    own = seen.classifier if seen.classifier_s is None else seen.classifier_s

    def answers(maps, classifier):
        return [logit_losses.cells(m, scales) @ classifier.weight.T + with_bias * classifier.bias for m in maps]

    pairs = zip(answers(map_of(seen), own), answers(seen.map_t, seen.classifier), strict=True)
    total = torch.zeros((), dtype=torch.float64)
    for i, (a, b) in enumerate(pairs):
        loss = per_image(a, b, int(seen.labels[i]))
        if seen.mix is not None:
            loss = seen.mix[i] * loss + (1 - seen.mix[i]) * per_image(a, b, int(seen.labels_b[i]))
        total = total + loss / len(map_of(seen))
    return total


def grads_of(loss: torch.Tensor, seen: Seen) -> list[torch.Tensor]:
    """In the student's map and in its own classifier, where that is trained; zeros where the loss does not see it."""
    leaves = [map_of(seen)] + ([] if seen.classifier_s is None else list(seen.classifier_s.parameters()))
    return list(torch.autograd.grad(loss, leaves, retain_graph=True, materialize_grads=True))


# Term (its head is filled in), the part of the log, and its formula of the answers at positions of an image.
TERMS = {
    "kl": (
        lambda **head: Sdd(sdd=0.7, temperature=2.5, **head),
        ("sdd", 1 / 0.7),
        ((1, 2, 4), lambda a, b, y: logit_losses.sdd(a, b, y, lambda c, d: 0.7 * logit_losses.kl(c, d, 2.5))),
    ),
    "dkd": (
        lambda **head: Sdd(sdd_dkd_alpha=0.7, sdd_dkd_beta=0.3, sdd_warmup=0.0, sdd_scales=(1, 3), **head),
        ("sdd_dkd", 1),
        ((1, 3), lambda a, b, y: logit_losses.sdd(a, b, y, lambda c, d: logit_losses.dkd(c, d, y, 0.7, 0.3, 4.0))),
    ),
    "class maps": (
        lambda **head: Catkd(cat=0.7, cat_resolution=3, **head),
        ("cat", 1 / 0.7),
        ((3,), lambda a, b, y: 0.7 * logit_losses.cat(a, b, True)),
    ),
    "class maps as they are": (
        lambda **head: Catkd(cat=0.7, cat_normalize=False, **head),
        ("cat", 1 / 0.7),
        ((2,), lambda a, b, y: 0.7 * logit_losses.cat(a, b, False)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mixed", [False, True], ids=["plain", "mixed"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("classifier", CLASSIFIERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", TERMS)
def test_value_and_gradient_are_the_formula_s(name, shape, classifier, head, mixed):
    make, (part, unweighted), (scales, per_image) = TERMS[name]
    term = make(**{"cat_head" if part == "cat" else "sdd_head": classifier})
    seen = made(shape, classifier, head, **(mixing_of(shape) if mixed else {}))
    value = term.value(seen)
    expected = by_formula(seen, scales, per_image, with_bias=part != "cat")
    torch.testing.assert_close(value.loss, expected, **CLOSE)
    assert list(value.parts) == [part]
    torch.testing.assert_close(value.parts[part], expected.detach() * unweighted, **CLOSE)
    torch.testing.assert_close(grads_of(value.loss, seen), grads_of(expected, seen), **CLOSE)


@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_a_batch_in_parts_is_the_whole(classifier):
    """Means over images, as --accumulate and DistributedDataParallel take them."""
    seen = made("small", classifier)
    for term in (
        Sdd(sdd=1, sdd_dkd_beta=2, sdd_warmup=0.0, sdd_head=classifier),
        Catkd(cat=1, cat_head=classifier),
        Catkd(cat=1, cat_head=classifier, cat_normalize=False),
    ):
        halves = []
        for rows in (slice(0, 2), slice(2, 4)):
            own = {name: getattr(seen, name) for name in ("labels", "map_t", "map_s", "map_z")}
            cut = {name: x[rows] for name, x in own.items() if x is not None}
            halves.append(term.value(dataclasses.replace(seen, **cut)).loss)
        torch.testing.assert_close(sum(halves) / 2, term.value(seen).loss, **CLOSE)


# --- limits


@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_equal_maps_are_a_minimum(classifier):
    """With the teacher's classifier on both sides: loss 0, gradient 0; of normalised class maps at any scale."""
    seen = made("even", classifier)
    if classifier == "student":
        seen.classifier_s.load_state_dict(seen.classifier.state_dict())
    for term, scale in (
        (Sdd(sdd=1, sdd_dkd_alpha=1, sdd_dkd_beta=8, sdd_warmup=0.0, sdd_head=classifier), 1),
        (Catkd(cat=400, cat_head=classifier), 7),
        (Catkd(cat=1, cat_head=classifier, cat_normalize=False), 1),
    ):
        map_t = seen.map_t.clone()
        equal = dataclasses.replace(seen, **{"map_s" if classifier == "student" else "map_z": scale * map_t})
        map_of(equal).requires_grad_()
        loss = term.value(equal).loss
        torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-12)
        for grad in grads_of(loss, equal):
            torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-12)


@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_of_the_whole_map_alone_sdd_is_kd_and_dkd(classifier):
    seen = made("even", classifier)
    own = seen.classifier if classifier == "teacher" else seen.classifier_s
    logits, logits_t = (
        layer(map_.mean((2, 3))) for layer, map_ in ((own, map_of(seen)), (seen.classifier, seen.map_t))
    )
    shown = dataclasses.replace(seen, logits=logits, logits_t=logits_t)
    for ours, theirs in (
        ({"sdd": 1}, Kl(kl=1)),
        ({"sdd_dkd_alpha": 1, "sdd_dkd_beta": 8}, Dkd(dkd_alpha=1, dkd_beta=8, dkd_warmup=0.0)),
    ):
        loss = Sdd(**ours, sdd_warmup=0.0, sdd_scales=(1,), sdd_head=classifier).value(seen).loss
        expected = theirs.value(shown).loss
        torch.testing.assert_close(loss, expected, **CLOSE)
        torch.testing.assert_close(grads_of(loss, seen), grads_of(expected, seen), **CLOSE)


@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_at_a_high_temperature_sdd_matches_centred_logits(classifier):
    """T^2 KL -> sum_k (l - l_t - mean)^2 / (2 K) at every position, as for KL."""
    seen = made("odd", classifier)

    def centred(a, b):
        difference = a - b
        return (difference - difference.mean()).square().sum() / (2 * len(a))

    loss = Sdd(sdd=1, temperature=1e5, sdd_head=classifier).value(seen).loss
    expected = by_formula(seen, (1, 2, 4), lambda a, b, y: logit_losses.sdd(a, b, y, centred))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("classifier", CLASSIFIERS)
@pytest.mark.parametrize("label", [0, 1])
def test_positions_at_which_the_teacher_says_otherwise_count_twice(classifier, label):
    """Two classes, four positions and the whole: the teacher says 0 of the whole, and 1 at one position alone."""
    seen = made("even", classifier)
    eye = torch.eye(2, dtype=torch.float64)
    layer = nn.Linear(2, 2, bias=False, dtype=torch.float64).requires_grad_(False)
    layer.weight.copy_(eye)
    map_t = torch.tensor([[3.0, 3.0], [0.0, 3.0]]), torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    map_t = torch.stack(map_t)[None].double()  # [1, 2, 2, 2]
    zeros = torch.zeros_like(map_t)
    maps = {"map_s": zeros, "classifier_s": layer} if classifier == "student" else {"map_z": zeros}
    seen = dataclasses.replace(seen, classifier=layer, map_t=map_t, labels=torch.tensor([label]), **maps)
    flat = torch.zeros(2, dtype=torch.float64)
    here, whole = (
        logit_losses.kl(flat, torch.tensor(row, dtype=torch.float64), 4.0) for row in ((3.0, 0.0), (2.25, 0.75))
    )
    loss = Sdd(sdd=1, sdd_scales=(1, 2), sdd_head=classifier).value(seen).loss
    torch.testing.assert_close(loss, (whole + 3 * here + 2 * here) / 5, **CLOSE)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_a_map_that_is_zero_has_a_finite_gradient(classifier, head):
    """Dead features, of either net: the class maps have no length."""
    seen = made("even", classifier, head)
    dead = {"map_s" if classifier == "student" else "map_z": torch.zeros_like(map_of(seen)).requires_grad_()}
    for changes in (dead, {"map_t": torch.zeros_like(seen.map_t)}):
        shown = dataclasses.replace(seen, **changes)
        loss = Catkd(cat=1, cat_head=classifier).value(shown).loss
        assert loss.isfinite()
        assert all(grad.isfinite().all() for grad in grads_of(loss, shown))


# --- in a step


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("stride_s", "stride_t"), [(3, 4), (4, 3)], ids=["student larger", "teacher larger"])
@pytest.mark.parametrize("name", ["ijckd", "srrl"])
def test_of_maps_of_unequal_size_the_teacher_s_is_seen_whole(name, stride_s, stride_t, head):
    """Maps of 6 x 6 and 4 x 4. Where maps are matched too, Z has the smaller size, and the student's own its own."""
    torch.manual_seed(0)
    student, teacher = (
        Tapped(Strided(channels, stride), "net", K, 16).double() for channels, stride in ((5, stride_s), (8, stride_t))
    )
    objective = get_objective(name, sdd=1.0, sdd_head="teacher", cat=1.0, ce=0.5, ce_head="student")
    distiller = Distiller(student, teacher, objective, head=head).train()
    images, labels = batch()
    p = {k: v.detach().clone() for k, v in distiller.connector.state_dict().items()}
    fresh = {k: v.clone() for k, v in distiller.state_dict().items()}
    parts = distiller(images, labels).parts
    distiller.load_state_dict(fresh)
    with torch.no_grad():
        map_s = F.relu(student.net.bn(student.net.conv(images)))
        map_t = F.relu(teacher.net.bn(teacher.net.conv(images)))
        matched = F.adaptive_avg_pool2d(map_s, 4) if name == "ijckd" else map_s
        Z = connect(p, matched, distiller.connector.spec, True)
        at = [torch.stack([logit_losses.cells(m, (1, 2, 4)) for m in maps]) for maps in (Z, map_t)]
        answers = [teacher.classifier(x) for x in at]
        sdd = [
            logit_losses.sdd(a, b, y, lambda c, d: logit_losses.kl(c, d, 4.0))
            for a, b, y in zip(*answers, labels.tolist(), strict=True)
        ]
        own = [
            torch.stack([logit_losses.cells(m, (2,)) @ net.classifier.weight.T for m in maps])
            for net, maps in ((student, map_s), (teacher, map_t))
        ]
        cat = [logit_losses.cat(a, b, True) for a, b in zip(*own, strict=True)]
    torch.testing.assert_close(parts["sdd"], torch.stack(sdd).mean(), **CLOSE)
    torch.testing.assert_close(parts["cat"], torch.stack(cat).mean(), **CLOSE)
    if name == "ijckd":
        expected = F.mse_loss(Z, F.adaptive_avg_pool2d(map_t, 4))
    else:
        expected = F.mse_loss(Z.mean((2, 3)), map_t.mean((2, 3)))
    torch.testing.assert_close(parts["fm"], expected, **CLOSE)


@pytest.mark.parametrize("name", ["ijckd", "srrl"])
def test_a_map_for_another_term_changes_no_other_loss_and_no_answer(name):
    """The connector in PyTorch instead of its op: the same losses, running statistics and answers."""
    images, labels = batch()
    plain, more = (
        Distiller(*pair(), get_objective(name, **changes)) for changes in ({}, {"sdd": 1.0, "sdd_head": "teacher"})
    )
    more.load_state_dict(plain.state_dict())
    expected, found = (each.train()(images, labels).parts for each in (plain, more))
    torch.testing.assert_close({k: v for k, v in found.items() if k != "sdd"}, expected, **CLOSE)
    torch.testing.assert_close(more.state_dict(), plain.state_dict(), **CLOSE)
    torch.testing.assert_close(more.eval().predict(images), plain.eval().predict(images), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dkd_form_warms_up_by_dkd_s_clock(dtype):
    """Also on the device, whose clock is float64 and leaves the loss's dtype."""
    images, labels = batch(dtype)
    distiller = Distiller(*pair(dtype), get_objective("sdd-dkd", ce=0.0, sdd_warmup=4.0)).train()
    for progress, factor in ((0.0, 0.25), (2.5, 0.75), (9.0, 1.0)):
        for clock in (progress, torch.tensor(progress, dtype=torch.float64)):
            out = distiller(images, labels, progress=clock)
            assert out.loss.dtype == dtype
            torch.testing.assert_close(out.loss, factor * out.parts["sdd_dkd"])
    both = Distiller(*pair(dtype), get_objective("dkd", sdd_dkd_alpha=1.0)).train()
    with pytest.raises(UserError, match=r"'dkd' has a warm-up .*, or set dkd_warmup and sdd_warmup to 0"):
        both(images, labels)
    Distiller(*pair(dtype), get_objective("sdd-dkd", sdd_warmup=0.0)).train()(images, labels)
    by_step = get_objective("sdd-dkd", ce=0.0, sdd_warmup=4.0, sdd_warmup_by="step")
    out = Distiller(*pair(dtype), by_step).train()(images, labels, progress=2.5)
    torch.testing.assert_close(out.loss, 0.625 * out.parts["sdd_dkd"])


# --- refusals


@pytest.mark.parametrize(
    ("name", "overrides", "text"),
    [
        *(
            (name, {"sdd_scales": scales}, rf"sdd_scales must begin with 1 and .* got {text}: write e.g. 1,2,4")
            for name, scales, text in (
                ("sdd", (2, 4), "2,4"), ("sdd", (1, 4, 2), "1,4,2"), ("sdd", (1, 2, 2), "1,2,2"),
                ("sdd", (1, 3, 4), "1,3,4"), ("sdd", (), "none"), ("kd", (1, 2, 3), "1,2,3"),
            )
        ),
        ("sdd", {"sdd_scales": (0, 1)}, "sdd_scales must be at least 1"),
        ("sdd", {"sdd": -1.0}, "sdd must be a finite number >= 0, got -1"),
        ("sdd", {"sdd_head": "both"}, "sdd_head must be one of teacher, student, got 'both'"),
        ("sdd", {"sdd_head": "teacher"}, "need a connector from the student's features"),
        ("catkd", {"cat_resolution": 0}, "cat_resolution must be a whole number >= 1, got 0"),
        ("catkd", {"cat_head": "teacher"}, "need a connector from the student's features"),
        ("catkd", {"ce": 0.0}, "cat alone does not train that of the student's own classifier: set ce or"),
        (
            "ijckd-pooled",
            {"connector": "linear", "sdd": 1.0, "sdd_head": "teacher"},
            r"'linear' works on pooled vectors and makes no map .* \(sdd, sdd_dkd\): set a connector on maps",
        ),
        (
            "srrl",
            {"connector": "mlp", "cat": 1.0, "cat_head": "teacher"},
            r"'mlp' works on pooled vectors .* \(cat\): set a connector on maps .*, or the head 'student'",
        ),
        ("kd", {"connector": "conv1x1", "sdd": 1.0}, "would not be trained"),
    ],
)  # fmt: skip
def test_unfit_settings_are_refused(name, overrides, text):
    with pytest.raises(UserError, match=text):
        get_objective(name, **overrides)


def test_scales_may_be_a_list():
    """As a YAML file gives them."""
    assert get_objective("sdd", sdd_scales=[1, 2]) == get_objective("sdd", sdd_scales=(1, 2))


@pytest.mark.parametrize("name", ["sdd", "catkd"])
def test_nets_without_a_map_are_refused(name):
    parts = "cat" if name == "catkd" else "sdd, sdd_dkd"
    remedy = rf"which the losses at its positions \({parts}\) need: choose another ROLE, or --objective kd \(logits"
    student, teacher = pair(torch.float32)
    without = Tapped(nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, K)), "flat", K, 16)
    for role, models in (("student", (without, teacher)), ("teacher", (student, without))):
        with pytest.raises(UserError, match=f"{role} 'flat' has no map .*{remedy.replace('ROLE', role)}"):
            Distiller(*models, PRESETS[name])
    with pytest.raises(UserError, match=f"objective '{name}' needs a teacher"):
        Distiller(student, None, PRESETS[name])
    cached = CachedTeacher(teacher.classifier, "resnet8x0.5", "")
    text = rf"'resnet8x0.5' is a cache of pooled features, and the losses at its positions \({parts}\) need its maps"
    with pytest.raises(UserError, match=f"{text}: take --objective kd"):
        Distiller(student, cached, PRESETS[name])


def test_a_map_that_can_only_be_matched_is_not_enough():
    """A ViT with a class token has a grid of tokens that its classifier does not see the mean of."""
    student, _ = pair(torch.float32)
    teacher = create_model("timm/test_vit", K, image_size=32)
    with pytest.raises(UserError, match=r"teacher 'timm/test_vit' has no map that its classifier sees the mean of"):
        Distiller(student, teacher, get_objective("sdd"))
    with pytest.raises(UserError, match=r"teacher 'timm/test_vit' has no map .* losses at its positions"):
        Distiller(student, teacher, get_objective("simkd", cat=1.0, cat_head="teacher"))
    through_teacher = get_objective("kd", connector="conv1x1", sdd=1.0, sdd_head="teacher")
    with pytest.raises(UserError, match=r"student 'timm/test_vit' has no map .* connectors on maps need"):
        Distiller(teacher, student, through_teacher)
