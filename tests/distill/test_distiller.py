"""Objectives and the training step, held to a composition of torch's own functions written here."""

import copy
import dataclasses

import logit_losses
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ijckd_fast import head as ops
from ijckd_fast.distill import PARTS, PRESETS, Distiller, get_objective
from ijckd_fast.distill.terms.attention import attention_distance
from ijckd_fast.distill.terms.dkd import Dkd, dkd_rows
from ijckd_fast.errors import UserError
from ijckd_fast.head import reference
from ijckd_fast.nets import CachedTeacher, Tapped, create_model

HEADS = ("fused", "reference")
K = 7
T = 4.0
CLOSE = {"rtol": 1e-10, "atol": 1e-10}

# README's table of objectives, typed again: weights, the head of each term, connector, match, inference head.
TABLE = {
    "ijckd": {"ce_t": 1, "sr": 1, "fm": 1, "match": "map", "connector": "bottleneck:2", "infer": "teacher"},
    "ijckd-pooled": {"ce_t": 1, "sr": 1, "fm": 1, "match": "pooled", "connector": "conv1x1", "infer": "teacher"},
    "srrl": {"ce_s": 1, "sr": 1, "fm": 1, "match": "pooled", "connector": "conv1x1", "infer": "student"},
    "simkd": {"fm": 1, "match": "map", "connector": "bottleneck:2", "infer": "teacher"},
    "kd": {"ce_s": 1, "kl_s": 1, "infer": "student"},
    "dkd": {"ce_s": 1, "dkd_s": 1, "alpha": 1, "beta": 8, "infer": "student"},
    "hard": {"ce_s": 0.5, "hard_s": 0.5, "infer": "student"},
    "ttm": {"ce_s": 1, "ttm_s": 45, "power": 0.1, "infer": "student"},
    "wttm": {"ce_s": 1, "wttm_s": 4, "power": 0.2, "infer": "student"},
    "nkd": {"ce_s": 1, "nkd_s": 1, "T": 1, "infer": "student"},
    "dist": {"ce_s": 1, "inter_s": 2, "intra_s": 2, "T": 1, "infer": "student"},
    "sdd": {"ce_s": 0.1, "sdd_s": 0.9, "infer": "student"},
    "sdd-dkd": {"ce_s": 1, "sdd_dkd_s": 1, "alpha": 1, "beta": 8, "infer": "student"},
    "catkd": {"ce_s": 1, "cat_s": 400, "infer": "student"},
    "srd": {"ce_s": 1, "kl_s": 1, "srd": 1, "T": 1, "connector": "linear", "infer": "student"},
    "fitnet": {"ce_s": 1, "kl_s": 1, "hint": 100, "stage": 1, "infer": "student"},
    "at": {"ce_s": 1, "kl_s": 1, "at": 1000, "infer": "student"},
    "reviewkd": {"ce_s": 1, "review": 1, "infer": "student"},
    "ce": {"ce_s": 1, "infer": "student"},
}
# What a user may set on its own: preset, overrides, how the table's row changes.
VARIANTS = [
    ("ijckd", {"kl": 0.7, "ce": 0.4, "sr": 0.3, "fm": 2.0}, {"kl_t": 0.7, "ce_t": 0.4, "sr": 0.3, "fm": 2.0}),
    ("ijckd", {"match": "pooled"}, {"match": "pooled"}),
    ("ijckd", {"fm": 0.0}, {"fm": 0}),
    ("ijckd", {"sr": 0.0, "ce": 0.0}, {"sr": 0, "ce_t": 0}),
    ("ijckd-pooled", {"connector": "linear"}, {"connector": "linear"}),
    ("ijckd-pooled", {"connector": "mlp"}, {"connector": "mlp"}),
    ("ijckd-pooled", {"match": "map", "connector": "bottleneck:4"}, {"match": "map", "connector": "bottleneck:4"}),
    ("srrl", {"kl": 1.0}, {"kl_s": 1}),
    ("srrl", {"connector": "linear", "fm": 0.4}, {"connector": "linear", "fm": 0.4}),
    ("srrl", {"connector": "mlp", "sr": 0.0}, {"connector": "mlp", "sr": 0}),
    ("srrl", {"sr": 0.0, "match": "map"}, {"sr": 0, "match": "map"}),
    ("srrl", {"infer_head": "teacher"}, {"infer": "teacher"}),
    ("simkd", {"ce": 0.1}, {"ce_t": 0.1}),
    (
        "kd",
        {"connector": "conv1x1", "sr": 0.5, "infer_head": "teacher"},
        {"connector": "conv1x1", "sr": 0.5, "infer": "teacher"},
    ),
    ("fitnet", {"hint": 3.0, "hint_stage": 2, "kl": 0.0}, {"hint": 3, "stage": 2, "kl_s": 0}),
    ("fitnet", {"hint_stage": 3, "at": 30.0}, {"stage": 3, "at": 30}),
    ("ijckd", {"at": 40.0}, {"at": 40}),
    ("srrl", {"connector": "linear", "hint": 2.0}, {"connector": "linear", "hint": 2, "stage": 1}),
    ("ijckd", {"hard": 0.5, "hard_head": "teacher"}, {"hard_t": 0.5}),
    ("hard", {"kl": 0.5}, {"kl_s": 0.5}),
    ("ijckd", {"wttm": 2.0, "ttm_head": "teacher", "ttm_power": 0.7}, {"wttm_t": 2, "power": 0.7}),
    (
        "ijckd-pooled",
        {"connector": "linear", "ttm": 3.0, "wttm": 0.5, "ttm_head": "teacher", "ttm_power": 1.5},
        {"connector": "linear", "ttm_t": 3, "wttm_t": 0.5, "power": 1.5},
    ),
    ("ijckd", {"nkd": 2.0, "nkd_head": "teacher", "nkd_gamma": 0.5}, {"nkd_t": 2, "gamma": 0.5}),
    ("srrl", {"nkd": 2.0, "sr": 0.0, "temperature": 2.0}, {"nkd_s": 2, "sr": 0, "T": 2}),
    ("simkd", {"dist_inter": 2.0, "dist_intra": 3.0, "dist_head": "teacher"}, {"inter_t": 2, "intra_t": 3}),
    ("dist", {"dist_intra": 0.0}, {"intra_s": 0}),
    (
        "ijckd",
        {"dkd_alpha": 1.0, "dkd_beta": 2.0, "dkd_head": "teacher", "temperature": 3.0},
        {"dkd_t": 1, "alpha": 1, "beta": 2, "T": 3},
    ),
    (
        "ijckd",  # with the match in PyTorch, too: the map is there for it
        {"sdd": 0.5, "sdd_dkd_alpha": 1.0, "sdd_dkd_beta": 2.0, "sdd_head": "teacher", "temperature": 2.0},
        {"sdd_t": 0.5, "sdd_dkd_t": 1, "alpha": 1, "beta": 2, "T": 2},
    ),
    ("srrl", {"cat": 3.0, "cat_head": "teacher", "cat_resolution": 3}, {"cat_t": 3, "resolution": 3}),
    ("simkd", {"cat": 3.0, "cat_head": "teacher", "cat_normalize": False}, {"cat_t": 3, "raw": True}),
    (
        "kd",
        {"sdd": 1.0, "sdd_scales": (1, 3), "cat": 0.5, "cat_normalize": False},
        {"sdd_s": 1, "scales": (1, 3), "cat_s": 0.5, "raw": True},
    ),
    ("kd", {"standardize_logits": True}, {"z_scores": True}),
    ("ijckd", {"review": 0.5, "review_width": 3}, {"review": 0.5, "width": 3}),
    ("ijckd", {"srd": 0.5, "srd_power": 2.0}, {"srd": 0.5, "power_srd": 2}),
    ("ijckd-pooled", {"srd": 0.5, "connector": "mlp"}, {"srd": 0.5, "connector": "mlp"}),
    ("ijckd", {"match_distance": "cosine"}, {"distance": "cosine"}),
    ("simkd", {"match_distance": "smooth-l1", "connector": "conv1x1"}, {"distance": "huber", "connector": "conv1x1"}),
    ("srrl", {"match_distance": "cosine"}, {"distance": "cosine"}),
    (
        "ijckd-pooled",
        {"match_distance": "smooth-l1", "connector": "linear", "fm": 3.0},
        {"distance": "huber", "connector": "linear", "fm": 3},
    ),
    (
        "ijckd",
        {"standardize_logits": True, "kl": 0.5, "nkd": 1.0, "nkd_head": "teacher", "temperature": 2.0},
        {"z_scores": True, "kl_t": 0.5, "nkd_t": 1, "T": 2},
    ),
    ("dkd", {"standardize_logits": True, "wttm": 1.0}, {"z_scores": True, "wttm_s": 1, "power": 0.2}),
]
CASES = [(name, {}, row) for name, row in TABLE.items()] + [(n, o, {**TABLE[n], **row}) for n, o, row in VARIANTS]
CASE_IDS = [f"{n}{'' if not o else '+' + ','.join(f'{k}={v}' for k, v in o.items())}" for n, o, _ in CASES]


def shaken(model: Tapped) -> Tapped:
    """A net whose BatchNorm parameters and statistics are not those of the start."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model


def pair(dtype=torch.float64) -> tuple[Tapped, Tapped]:
    torch.manual_seed(0)
    student = shaken(create_model("resnet8x0.25", K, image_size=16))  # map [B, 16, 4, 4]
    teacher = shaken(create_model("resnet8x0.5", K, image_size=16))  # map [B, 32, 4, 4]
    return student.to(dtype), teacher.to(dtype)


def batch(dtype=torch.float64, size: int = 16):
    images = torch.randn(6, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 3, 6, 2, 2, 5])
    return images, labels


def map_of(net: nn.Module, images):
    """The last map of our ResNet, layer by layer: nothing of Tapped takes part."""
    return net.layer3(net.layer2(net.layer1(F.relu(net.bn1(net.conv1(images))))))


def stages_of(net: nn.Module, images):
    """The maps after each of our ResNet's stages, the largest first."""
    first = net.layer1(F.relu(net.bn1(net.conv1(images))))
    return first, net.layer2(first), net.layer3(net.layer2(first))


def attention(map_):
    """Image by image: the mean of squares over the channels, as a vector of length 1."""
    means = [sum(channel**2 for channel in image).flatten() / len(image) for image in map_]
    return torch.stack([mean / mean.dot(mean).sqrt() for mean in means])


def at_by_definition(maps_s, maps_t):
    terms = []
    for map_s, map_t in zip(maps_s, maps_t, strict=True):
        size = min(map_s.shape[2], map_t.shape[2])
        map_s, map_t = F.adaptive_avg_pool2d(map_s, size), F.adaptive_avg_pool2d(map_t, size)
        terms.append(F.mse_loss(attention(map_s), attention(map_t)))
    return sum(terms)


def parameters_of(module: nn.Module | None) -> dict:
    """Copies of its parameters, which take gradients of their own, and buffers, by name."""
    p = {} if module is None else {k: v.detach().clone() for k, v in module.state_dict().items()}
    for name, _ in [] if module is None else module.named_parameters():
        p[name].requires_grad_()
    return p


def regressor_of(distiller: Distiller) -> nn.Module | None:
    """The hint's, where there is a hint."""
    return getattr(distiller, "regressor", None)


def connect(p: dict, x, spec: str, training: bool):
    """A connector's output map or vector from its parameters and buffers by name."""

    def bn(x, prefix, affine):
        stats = p[prefix + "running_mean"], p[prefix + "running_var"]
        return F.relu(F.batch_norm(x, *stats, *affine, training, 0.1, 1e-5))

    if spec.startswith("bottleneck"):
        x = bn(F.conv2d(x, p["trunk.0.weight"]), "trunk.1.", (p["trunk.1.weight"], p["trunk.1.bias"]))
        x = bn(F.conv2d(x, p["trunk.3.weight"], padding=1), "trunk.4.", (p["trunk.4.weight"], p["trunk.4.bias"]))
    if spec == "mlp":
        x = bn(F.linear(x, p["trunk.0.weight"]), "trunk.1.", (p["trunk.1.weight"], p["trunk.1.bias"]))
    if spec in ("linear", "mlp"):
        return F.linear(x, p["weight"], p["bias"])
    return bn(F.conv2d(x, p["weight"][:, :, None, None]), "", (p["bn_weight"], p["bn_bias"]))


DISTANCES = {
    "mse": lambda a, b: ((a - b) ** 2).mean(),
    "cosine": lambda a, b: 1 - ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(1e-16)).mean(),
    "huber": lambda a, b: torch.where((a - b).abs() < 1, (a - b) ** 2 / 2, (a - b).abs() - 0.5).mean(),
}


def normalised(x):
    """Every channel over the batch, without parameters."""
    return (x - x.mean(0)) / (((x - x.mean(0)) ** 2).mean(0) + 1e-4).sqrt()


def review_by_definition(p: dict, levels):
    """ReviewKD's fusions and hierarchical context loss, of (student's, teacher's) maps, the deepest first."""

    def conv_bn(x, prefix, padding):
        stats, affine = (
            [p[f"{prefix}.1.{name}"] for name in names]
            for names in (("running_mean", "running_var"), ("weight", "bias"))
        )
        return F.batch_norm(F.conv2d(x, p[f"{prefix}.0.weight"], padding=padding), *stats, *affine, True, 0.1, 1e-5)

    total, deeper = 0.0, None
    for i, (x, target) in enumerate(levels):
        x = conv_bn(x, f"{i}.squeeze", 0)
        if i:
            deeper = deeper.repeat_interleave(x.shape[2] // deeper.shape[2], 2)
            deeper = deeper.repeat_interleave(x.shape[3] // deeper.shape[3], 3)
            a = F.conv2d(torch.cat([x, deeper], 1), p[f"{i}.shares.weight"], p[f"{i}.shares.bias"]).sigmoid()
            x = x * a[:, 0, None] + deeper * a[:, 1, None]
        made, deeper = conv_bn(x, f"{i}.expand", 1), x
        sides = [made.shape[2]] + [side for side in (4, 2, 1) if side < made.shape[2]]
        shares = [0.5**n for n in range(len(sides))]
        pooled = [(F.adaptive_avg_pool2d(made, side), F.adaptive_avg_pool2d(target, side)) for side in sides]
        total = total + sum(s * ((m - t) ** 2).mean() for s, (m, t) in zip(shares, pooled, strict=True)) / sum(shares)
    return total


def logit_terms(row: dict, which: str, logits, logits_t, mixed, progress):
    """The weighted sum of the terms that go through the classifier `which`, 's' or 't', but for cross-entropies.

    mixed: the mean over the batch of a loss of logits, the teacher's and a label.
    """
    T_, power, scale = row.get("T", T), row.get("power"), logit_losses.z_score if row.get("z_scores") else lambda x: x
    scaled, scaled_t = (torch.stack([scale(each) for each in x]) for x in (logits, logits_t))
    hard = [logit_losses.hard(a, b) for a, b in zip(logits, logits_t, strict=True)]
    pairs = list(zip(scaled, scaled_t, strict=True))
    terms = {
        "kl": lambda: torch.stack([logit_losses.kl(a, b, T_) for a, b in pairs]).mean(),
        "hard": lambda: torch.stack(hard).mean(),
        "ttm": lambda: torch.stack([logit_losses.ttm(a, b, power) for a, b in pairs]).mean(),
        "wttm": lambda: torch.stack([logit_losses.wttm(a, b, power) for a, b in pairs]).mean(),
        "inter": lambda: logit_losses.dist_inter(logits, logits_t, T_),
        "intra": lambda: logit_losses.dist_intra(logits, logits_t, T_),
        "nkd": lambda: mixed(pairs, lambda a, b, y: logit_losses.nkd(a, b, y, row.get("gamma", 1.5), T_)),
        "dkd": lambda: (
            min((progress // 1 + 1) / 20, 1)
            * mixed(pairs, lambda a, b, y: logit_losses.dkd(a, b, y, row["alpha"], row["beta"], T_))
        ),
    }
    on = [row[f"{name}_{which}"] * term() for name, term in terms.items() if row.get(f"{name}_{which}")]
    return sum(on, torch.zeros((), dtype=logits.dtype))


def position_terms(row: dict, which: str, of_student, of_teacher, mixed, progress):
    """The weighted sum of the terms at positions; of a net: (map, weight, bias of the classifier)."""
    T_ = row.get("T", T)

    def at_positions(of_net, scales, with_bias):
        maps, weight, bias = of_net
        return torch.stack([logit_losses.cells(each, scales) for each in maps]) @ weight.T + with_bias * bias

    def pairs(scales, with_bias):
        return list(zip(*(at_positions(each, scales, with_bias) for each in (of_student, of_teacher)), strict=True))

    def sdd(loss):
        found = pairs(row.get("scales", (1, 2, 4)), True)
        return mixed(found, lambda a, b, y: logit_losses.sdd(a, b, y, lambda c, d: loss(c, d, y)))

    def dkd(a, b, y):
        return logit_losses.dkd(a, b, y, row["alpha"], row["beta"], T_)

    def cat():
        found = pairs((row.get("resolution", 2),), False)
        return torch.stack([logit_losses.cat(a, b, not row.get("raw")) for a, b in found]).mean()

    terms = {
        "sdd": lambda: sdd(lambda a, b, y: logit_losses.kl(a, b, T_)),
        "sdd_dkd": lambda: min((progress // 1 + 1) / 20, 1) * sdd(dkd),
        "cat": cat,
    }
    on = [row[f"{name}_{which}"] * term() for name, term in terms.items() if row.get(f"{name}_{which}")]
    return sum(on, torch.zeros((), dtype=of_student[0].dtype))


def compose(row: dict, distiller: nn.Module, teacher: Tapped, images, labels, *, labels_b, mix, smoothing, progress):
    """Loss of a training step on copies of the distiller's parameters: (loss, logits of the inference head, copies)."""
    student = copy.deepcopy(distiller.student)
    p, r = parameters_of(distiller.connector), parameters_of(regressor_of(distiller))
    f = parameters_of(getattr(distiller, "fusions", None))
    W, b = teacher.classifier.weight.detach(), teacher.classifier.bias.detach()
    with torch.no_grad():
        stages_t = stages_of(teacher.net, images)
        map_t = stages_t[-1]
        pooled_t = map_t.mean((2, 3))
        logits_t = F.linear(pooled_t, W, b)

    def mixed(per_image):
        rows = per_image(labels)
        return rows.mean() if mix is None else (mix * rows + (1 - mix) * per_image(labels_b)).mean()

    def cross_entropy(logits):
        return mixed(lambda y: F.cross_entropy(logits, y, reduction="none", label_smoothing=smoothing))

    def mixed_pairs(pairs, loss):
        def rows(labels):
            return torch.stack([loss(*pair, y) for pair, y in zip(pairs, labels.tolist(), strict=True)])

        return mixed(rows)

    stages_s = stages_of(student.net, images)
    map_s = stages_s[-1]
    pooled_s = map_s.mean((2, 3))
    loss = torch.zeros((), dtype=images.dtype)
    if "at" in row:
        loss = loss + row["at"] * at_by_definition(stages_s, stages_t)
    if "hint" in row:
        place = row["stage"] - 1
        loss = loss + row["hint"] * F.mse_loss(connect(r, stages_s[place], "conv1x1", True), stages_t[place])
    if "review" in row:
        deepest_first = list(zip(stages_s, stages_t, strict=True))[::-1]
        levels = [tuple(x.mean((2, 3), keepdim=True) for x in deepest_first[0]), *deepest_first]
        loss = loss + row["review"] * review_by_definition(f, levels)
        assert len(f["0.squeeze.0.weight"]) == row.get("width", pooled_s.shape[1])
    logits = logits_s = None
    if row.get("connector"):
        on_map = row["connector"] not in ("linear", "mlp")
        Z = connect(p, map_s if on_map else pooled_s, row["connector"], True)
        z = Z.mean((2, 3)) if on_map else Z
        logits = F.linear(z, W, b)
        loss = loss + row.get("sr", 0) * F.mse_loss(logits, logits_t)
        matched = (Z, map_t) if row.get("match") == "map" else (z, pooled_t)
        loss = loss + row.get("fm", 0) * DISTANCES[row.get("distance", "mse")](*matched)
        if "srd" in row:
            difference = normalised(z) - normalised(pooled_t)
            loss = loss + row["srd"] * 2 * (difference.abs() ** row.get("power_srd", 4)).sum().log()
        loss = loss + row.get("ce_t", 0) * cross_entropy(logits)
        loss = loss + logit_terms(row, "t", logits, logits_t, mixed_pairs, progress)
        loss = loss + position_terms(row, "t", (Z, W, b), (map_t, W, b), mixed_pairs, progress)
    if student.classifier is not None:
        logits_s = F.linear(pooled_s, student.classifier.weight, student.classifier.bias)
        loss = loss + row.get("ce_s", 0) * cross_entropy(logits_s)
        loss = loss + logit_terms(row, "s", logits_s, logits_t, mixed_pairs, progress)
        own = map_s, student.classifier.weight, student.classifier.bias
        loss = loss + position_terms(row, "s", own, (map_t, W, b), mixed_pairs, progress)
    return (
        loss,
        logits if row["infer"] == "teacher" else logits_s,
        student,
        {"connector": p, "regressor": r, "fusions": f},
    )


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("mixed", [False, True], ids=["plain", "mixed"])
@pytest.mark.parametrize(("name", "overrides", "row"), CASES, ids=CASE_IDS)
def test_loss_and_gradients_are_those_of_torch_functions(name, overrides, row, mixed, head):
    student, teacher = pair()
    images, labels = batch()
    extra = {"labels_b": None, "mix": None}
    if mixed:
        extra = {"labels_b": labels.flip(0), "mix": torch.tensor([0.9, 0.1, 1.0, 0.0, 0.5, 0.7], dtype=torch.float64)}
    smoothing = 0.1 if mixed else 0.0
    distiller = Distiller(
        student, teacher, get_objective(name, **overrides), label_smoothing=smoothing, head=head
    ).train()
    for connector in (distiller.connector, regressor_of(distiller)):
        if connector is not None and connector.takes_map:
            with torch.no_grad():
                connector.bn_weight.uniform_(0.5, 1.5)
                connector.bn_bias.normal_(0, 0.3)

    expected, logits, student_copy, copies = compose(
        row, distiller, teacher, images, labels, smoothing=smoothing, progress=5.5, **extra
    )
    expected.backward()
    out = distiller(images, labels, progress=5.5, with_logits=True, **extra)
    out.loss.backward()

    torch.testing.assert_close(out.loss, expected, **CLOSE)
    torch.testing.assert_close(out.logits, logits.detach(), **CLOSE)
    assert not out.logits.requires_grad
    assert out.correct.dtype == torch.int64
    assert out.correct == (logits.argmax(1) == labels).sum()
    for key, parameter in distiller.student.named_parameters():
        torch.testing.assert_close(
            parameter.grad, student_copy.get_parameter(key).grad, **CLOSE, msg=lambda m, k=key: f"{k}: {m}"
        )
    for module, p in copies.items():
        connector = getattr(distiller, module, None)
        for key, parameter in () if connector is None else connector.named_parameters():
            torch.testing.assert_close(parameter.grad, p[key].grad, **CLOSE, msg=lambda m, k=key: f"{k}: {m}")
        for key, buffer in () if connector is None else connector.named_buffers():
            if "running" in key:
                torch.testing.assert_close(buffer, p[key], **CLOSE)
    assert not out.loss.isnan()
    assert all(not part.requires_grad for part in out.parts.values())


@pytest.mark.parametrize("connector", [None, "linear"])
@pytest.mark.parametrize("name", PRESETS)
def test_parts_are_the_unweighted_terms(name, connector):
    if connector and PRESETS[name].match != "pooled":
        pytest.skip("matches maps, or nothing")
    student, teacher = pair()
    images, labels = batch()
    weights = {part: 0.5 for part in PARTS if getattr(PRESETS[name], part, 0) > 0}  # but for DKD's, which are two
    objective = get_objective(name, **weights, connector=connector)
    out = Distiller(student, teacher, objective).train()(images, labels, progress=9.5)
    rising = {name.replace("-", "_")} if name in ("dkd", "sdd-dkd") else set()
    total = sum(out.parts[k] * weight for k, weight in weights.items()) + sum(out.parts[k] * 0.5 for k in rising)
    assert set(out.parts) == set(weights) | rising
    torch.testing.assert_close(out.loss, total, **CLOSE)


def test_presets_are_the_table():
    assert list(PRESETS) == list(TABLE)
    for name, row in TABLE.items():
        o = PRESETS[name]
        assert o.name == name
        assert o.infer_head == row["infer"]
        assert (o.connector, o.match) == (row.get("connector"), row.get("match", "none"))
        assert o.connector_init == ("he" if name == "srrl" else "torch")
        assert (o.temperature, o.dkd_warmup, o.dkd_warmup_by) == (row.get("T", 4.0), 20.0, "epoch")
        assert (o.at, o.hint, o.hint_stage) == (row.get("at", 0), row.get("hint", 0), row.get("stage", 1))


def record_calls(monkeypatch):
    """The ops of both heads that are called from here on, as (module, op)."""
    calls = []
    for module in (ops, reference):
        for op in ("connector_match", "classifier_loss", "projected_classifier_loss"):
            original, key = getattr(module, op), (module.__name__.split(".")[-1], op)
            monkeypatch.setattr(module, op, lambda *a, f=original, k=key, **kw: (calls.append(k), f(*a, **kw))[1])
    return calls


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", PRESETS)
def test_a_step_calls_each_op_of_its_head_once(name, head, monkeypatch):
    calls = record_calls(monkeypatch)
    distiller = Distiller(*pair(torch.float32), get_objective(name), head=head).train()
    distiller(*batch(torch.float32), progress=0)
    module = "head" if head == "fused" else "reference"
    row = TABLE[name]
    expected = [(module, "connector_match")] if "connector" in row else []
    expected += [(module, "classifier_loss")] if "sr" in row or row["infer"] == "teacher" else []
    assert calls == expected + ([(module, "connector_match")] if "hint" in TABLE[name] else [])


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("connector", ["linear", "mlp"])
@pytest.mark.parametrize(("name", "sr"), [("ijckd-pooled", 1.0), ("srrl", 1.0), ("srrl", 0.0)])
def test_a_connector_on_vectors_and_the_loss_are_one_op(name, sr, connector, head, monkeypatch):
    """Where a loss goes through the teacher's classifier; and in prediction there is no loss."""
    calls = record_calls(monkeypatch)
    distiller = Distiller(*pair(torch.float32), get_objective(name, sr=sr, connector=connector), head=head).train()
    distiller(*batch(torch.float32), progress=0)
    if head == "reference":  # of which one may call the other
        assert {module for module, _ in calls} == {"reference"}
        assert ("reference", "projected_classifier_loss") not in calls
    elif sr or name == "ijckd-pooled":
        assert calls == [("head", "projected_classifier_loss")]
    else:
        assert calls == [("head", "connector_match")]
    calls.clear()
    distiller.eval().student_side(batch(torch.float32)[0])
    assert calls == [("head" if head == "fused" else "reference", "connector_match")]


# ------------------------------------------------------------------------------------------------ the teacher is frozen


@pytest.mark.parametrize(("name", "overrides", "row"), CASES, ids=CASE_IDS)
def test_the_teacher_is_never_touched_and_every_parameter_of_the_learner_is_trained(name, overrides, row):
    student, teacher = pair(torch.float32)
    before = copy.deepcopy(teacher.state_dict())
    distiller = Distiller(student, teacher, get_objective(name, **overrides))
    assert not any(m.training for m in teacher.modules())
    teacher.train()  # as a loop might do by mistake
    distiller.train()
    assert distiller.training
    assert not any(m.training for m in teacher.modules())

    own = {id(p) for p in teacher.parameters()}
    assert not any(id(p) in own for p in distiller.parameters())
    assert {k.split(".")[0] for k in distiller.state_dict()} <= {"student", "connector", "regressor", "fusions"}
    assert (regressor_of(distiller) is None) == ("hint" not in row)
    assert hasattr(distiller, "fusions") == ("review" in row)
    through_own = any(key.endswith("_s") and weight for key, weight in row.items())
    assert ("student.classifier.weight" in distiller.state_dict()) == through_own

    start = {k: p.detach().clone() for k, p in distiller.named_parameters()}
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    images, labels = batch(torch.float32)
    for progress in (1.0, 2.0):
        optimizer.zero_grad()
        distiller(images, labels, progress=progress).loss.backward()
        assert [k for k, p in distiller.named_parameters() if p.grad is None] == []
        optimizer.step()
    unchanged = [k for k, p in distiller.named_parameters() if torch.equal(p, start[k])]
    assert unchanged == []

    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    torch.testing.assert_close(dict(teacher.state_dict()), dict(before), rtol=0, atol=0)
    assert not any(m.training for m in teacher.modules())
    distiller.eval()
    assert not distiller.training
    assert not any(m.training for m in teacher.modules())


def test_to_moves_both():
    distiller = Distiller(*pair(torch.float32), get_objective("ijckd")).to(torch.float64)
    assert distiller.teacher.classifier.weight.dtype == torch.float64
    assert distiller.connector.weight.dtype == torch.float64


# ------------------------------------------------------------------------------------------------------ unequal maps


class Strided(nn.Module):
    """conv -> BN -> ReLU -> mean -> linear, its map as large as stride makes it."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, stride, 1)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(channels, K)

    def forward(self, images):
        return self.fc(self.relu(self.bn(self.conv(images))).mean((2, 3)))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("stride_s", "stride_t"), [(3, 4), (4, 3), (2, 2)], ids=["student larger", "teacher larger", "equal"]
)
@pytest.mark.parametrize("match", ["map", "pooled"])
def test_the_larger_map_is_pooled_to_the_smaller(match, stride_s, stride_t, head):
    # 16 / 3 -> 6 and 16 / 4 -> 4: sizes that do not divide, where pooling changes the mean
    torch.manual_seed(0)
    student = Tapped(Strided(5, stride_s), "s", K, 16).double()
    teacher = Tapped(Strided(8, stride_t), "t", K, 16).double()
    distiller = Distiller(student, teacher, get_objective("ijckd", match=match), head=head)
    images, labels = batch()
    p = {k: v.detach().clone() for k, v in distiller.connector.state_dict().items()}
    fresh = copy.deepcopy(distiller)  # one that has not seen a teacher map yet

    def relu_map(model, images):
        return F.relu(model.net.bn(model.net.conv(images)))

    W, b = teacher.classifier.weight, teacher.classifier.bias
    for training in (False, True):
        distiller.train() if training else distiller.eval()
        with torch.no_grad():
            map_s, map_t = relu_map(copy.deepcopy(student), images), relu_map(teacher, images)
            pooled_t = map_t.mean((2, 3))
            if match == "map":
                size = min(map_s.shape[2], map_t.shape[2])
                map_s, map_t = F.adaptive_avg_pool2d(map_s, size), F.adaptive_avg_pool2d(map_t, size)
            Z = connect(p, map_s, "bottleneck:2", training)
            z = Z.mean((2, 3))
            logits = F.linear(z, W, b)
            expected = F.mse_loss(Z, map_t) if match == "map" else F.mse_loss(z, pooled_t)
            expected = expected + F.mse_loss(logits, F.linear(pooled_t, W, b)) + F.cross_entropy(logits, labels)
        if training:
            torch.testing.assert_close(distiller(images, labels, progress=0).loss, expected, **CLOSE)
        else:
            torch.testing.assert_close(fresh.eval().predict(images), logits, **CLOSE)
            torch.testing.assert_close(distiller(images, labels, progress=0).loss, expected, **CLOSE)
            torch.testing.assert_close(distiller.predict(images), logits, **CLOSE)


class Staged(nn.Module):
    """Two convolutions, BatchNorm and ReLU for each stride: a stage's map is what the ReLU leaves."""

    def __init__(self, channels: int, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        before = 3
        for stride in strides:
            first, second = nn.Conv2d(before, channels, 3, stride, 1), nn.Conv2d(channels, channels, 3, 1, 1)
            self.stages.append(nn.Sequential(first, second, nn.BatchNorm2d(channels), nn.ReLU()))
            before = channels
        self.fc = nn.Linear(channels, K)

    def maps(self, images):
        made = [images]
        for stage in self.stages:
            made.append(stage(made[-1]))
        return made[1:]

    def forward(self, images):
        return self.fc(self.maps(images)[-1].mean((2, 3)))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("strides_s", "strides_t"),
    [((1, 2, 2), (3, 2)), ((3, 2), (1, 2, 2)), ((2, 2), (2, 2))],
    ids=["student larger, a stage more", "teacher larger, a stage more", "equal"],
)
def test_stages_are_matched_from_the_last_and_the_larger_map_is_pooled(strides_s, strides_t, head):
    """Maps of 16 8 4 against 6 3: sizes that do not divide."""
    torch.manual_seed(0)
    net_s, net_t = Staged(5, strides_s).double(), Staged(8, strides_t).double()
    student, teacher = Tapped(net_s.float(), "s", K, 16), Tapped(net_t.float(), "t", K, 16)
    objective = get_objective("at", ce=0.3, kl=0.0, at=1.0, hint=1.0, hint_stage=1)
    distiller = Distiller(student, teacher, objective, head=head).to(torch.float64).train()
    assert len(distiller.stage_pairs) == 2
    images, labels = batch()
    maps_s, maps_t = copy.deepcopy(net_s).train().maps(images)[-2:], net_t.eval().maps(images)[-2:]
    size = min(maps_s[0].shape[2], maps_t[0].shape[2])
    pooled_s, pooled_t = F.adaptive_avg_pool2d(maps_s[0], size), F.adaptive_avg_pool2d(maps_t[0], size)
    r = parameters_of(regressor_of(distiller))
    out = distiller(images, labels, progress=0)
    torch.testing.assert_close(out.parts["at"], at_by_definition(maps_s, maps_t), **CLOSE)
    torch.testing.assert_close(out.parts["hint"], F.mse_loss(connect(r, pooled_s, "conv1x1", True), pooled_t), **CLOSE)


def test_attention_of_a_map_that_is_zero():
    """All features dead, as early in training: no NaN, also in the gradient."""
    dead = torch.zeros(2, 3, 4, 4, requires_grad=True)
    distance = attention_distance(dead, torch.rand(2, 5, 4, 4))
    distance.backward()
    torch.testing.assert_close(distance, torch.tensor(1 / 16))
    assert dead.grad.isfinite().all()


def test_attention_does_not_depend_on_the_scale_of_a_map():
    map_s, map_t = torch.rand(2, 3, 4, 4, dtype=torch.float64), torch.rand(2, 5, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(attention_distance(1e-3 * map_s, 50 * map_t), attention_distance(map_s, map_t), **CLOSE)


# ------------------------------------------------------------------------------------------------------------ inference


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("name", "overrides", "row"), CASES, ids=CASE_IDS)
def test_predict_answers_through_the_inference_head(name, overrides, row, head):
    student, teacher = pair()
    distiller = Distiller(student, teacher, get_objective(name, **overrides), head=head).to(torch.float64)
    images, labels = batch()
    distiller.train()(images, labels, progress=0)  # moves the running statistics away from 0 and 1
    with pytest.raises(RuntimeError, match=r"call eval\(\) first"):
        distiller.predict(images)
    logits = distiller.eval().predict(images)
    with torch.no_grad():
        map_s = map_of(student.net, images)
        if row["infer"] == "student":
            expected = student.classifier(map_s.mean((2, 3)))
        else:
            x = map_s.mean((2, 3)) if row["connector"] in ("linear", "mlp") else map_s
            z = connect(dict(distiller.connector.state_dict()), x, row["connector"], False)
            expected = teacher.classifier(z if z.dim() == 2 else z.mean((2, 3)))
    torch.testing.assert_close(logits, expected, **CLOSE)
    torch.testing.assert_close(
        distiller.teacher_logits(images), teacher.classifier(map_of(teacher.net, images).mean((2, 3))), **CLOSE
    )


def test_plain_training_needs_no_teacher():
    student, _ = pair()
    distiller = Distiller(student, None, get_objective("ce")).train()
    images, labels = batch()
    distiller(images, labels, progress=0).loss.backward()
    assert distiller.eval().predict(images).shape == (6, K)
    with pytest.raises(UserError, match="no teacher"):
        distiller.teacher_logits(images)


@pytest.mark.parametrize(
    ("student", "teacher", "connector", "parameters", "macs"),
    [
        # backbone 11,176,512 + connector 854,016 + classifier 513,000; the connector adds 42 M multiply-accumulates
        ("resnet18", "resnet34", None, 12_543_528, 1_813_561_344 + 49 * (854_016 - 2048) + 512_000),
        # 3,206,976 + 12,591,104 + 2,049,000 = 17.85 M: more than four MobileNetV1
        ("mobilenet_v1", "resnet50", None, 17_847_080, 567_716_352 + 49 * (12_591_104 - 8192) + 2_048_000),
        ("mobilenet_v1", "resnet50", "linear", 3_206_976 + 2_099_200 + 2_049_000, 567_716_352 + 2_097_152 + 2_048_000),
    ],
)  # fmt: skip
def test_deployed_cost_counts_backbone_connector_and_classifier(student, teacher, connector, parameters, macs):
    objective = get_objective("ijckd", connector=connector, match="pooled" if connector else None)
    models = [create_model(name, 1000, image_size=64) for name in (student, teacher)]
    distiller = Distiller(*models, objective).train()
    assert distiller.deployed_cost(224) == (parameters, macs)
    assert all(m.training for m in distiller.modules())


@pytest.mark.parametrize("name", ["srrl", "fitnet", "at"])
def test_deployed_cost_of_a_student_that_answers_alone_leaves_the_connector_out(name):
    student, teacher = pair()
    cost = Distiller(student, teacher, get_objective(name)).deployed_cost(16)
    student, teacher = pair()
    assert cost == Distiller(student, None, get_objective("ce")).deployed_cost(16)


# ------------------------------------------------------------------------------------------- precision, layout,
# wrappers


def connectors_of(distiller: nn.Module) -> list[nn.Parameter]:
    """The parameters of connector and regressor, where there are any."""
    return [
        p
        for module in (distiller.connector, regressor_of(distiller))
        if module is not None
        for p in module.parameters()
    ]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", PRESETS)
def test_bfloat16_autocast_keeps_losses_in_float32(name, head):
    images, labels = batch(torch.float32)
    images = images.to(memory_format=torch.channels_last)
    losses = []
    for enabled in (False, True):
        distiller = Distiller(*pair(torch.float32), get_objective(name), head=head)
        distiller.to(memory_format=torch.channels_last).train()
        torch.manual_seed(0)
        with torch.no_grad():
            for p in connectors_of(distiller):
                p.copy_(torch.rand_like(p) * 0.3)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = distiller(images, labels, progress=20)
            out.loss.backward()
        assert out.loss.dtype == torch.float32
        assert all(part.dtype == torch.float32 for part in out.parts.values())
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in distiller.parameters())
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert distiller.eval().predict(images).dtype == torch.float32
        losses.append(out.loss.detach())
    assert losses[0] != losses[1]  # else autocast had no effect
    torch.testing.assert_close(losses[1], losses[0], rtol=0.03, atol=0)


@pytest.mark.parametrize("name", PRESETS)
def test_channels_last_changes_nothing(name):
    images, labels = batch()
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        distiller = Distiller(*pair(), get_objective(name))
        torch.manual_seed(0)
        with torch.no_grad():
            for p in connectors_of(distiller):
                p.copy_(torch.rand_like(p))
        distiller.to(torch.float64, memory_format=layout).train()
        loss = distiller(images.to(memory_format=layout), labels, progress=1).loss
        loss.backward()
        results.append([loss] + [p.grad for p in distiller.parameters()])
    torch.testing.assert_close(results[0], results[1], **CLOSE)


OF_LOGITS = {
    **dict.fromkeys(("dkd_alpha", "hard", "ttm", "wttm", "nkd", "dist_inter", "dist_intra", "srd"), 1.0),
    **{f"{name}_head": "teacher" for name in ("dkd", "hard", "ttm", "nkd", "dist")},
}
AT_POSITIONS = {"sdd": 1.0, "sdd_dkd_beta": 1.0, "cat": 1.0, "sdd_head": "student", "cat_head": "teacher"}


@pytest.mark.parametrize(
    "overrides",
    [
        {"at": 1.0, "hint": 1.0, "hint_stage": 2},
        {**OF_LOGITS, **AT_POSITIONS, "standardize_logits": True, "match_distance": "cosine", "review": 1.0},
    ],
    ids=["fused", "plain"],
)
def test_the_learner_compiles(overrides):
    images, labels = batch(torch.float32)
    distiller = Distiller(*pair(torch.float32), get_objective("ijckd", **overrides)).train()
    twin = copy.deepcopy(distiller)
    compiled = torch.compile(twin, backend="eager")
    out, out_twin = distiller(images, labels, progress=0), compiled(images, labels, progress=0)
    out.loss.backward()
    out_twin.loss.backward()
    torch.testing.assert_close(out_twin.loss, out.loss)
    grads = [p.grad for p in distiller.parameters()]
    torch.testing.assert_close([p.grad for p in twin.parameters()], grads)
    assert not twin.eval().training


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("name", "overrides", "row"), CASES, ids=CASE_IDS)
def test_steps_under_distributed_data_parallel(name, overrides, row, process_group):
    images, labels = batch(torch.float32)
    distiller = Distiller(*pair(torch.float32), get_objective(name, **overrides))
    twin = copy.deepcopy(distiller)
    wrapped = DistributedDataParallel(distiller)
    for _ in range(2):  # a parameter left without a gradient would be refused at the second step
        for module in (wrapped.train(), twin.train()):
            module.zero_grad()
            module(images, labels, progress=1).loss.backward()
    grads = [p.grad for p in twin.parameters()]
    torch.testing.assert_close([p.grad for p in distiller.parameters()], grads)
    assert distiller.eval().predict(images).shape == (6, K)


# --------------------------------------------------------------------------------------------------------------- DKD


def test_dkd_is_finite_for_confident_rows():
    logits = torch.tensor([[900.0, 0.0, -900.0], [-900.0, 0.0, 900.0]], requires_grad=True)
    rows = dkd_rows(logits, torch.tensor([[0.0, 900.0, 1.0], [1e4, -1e4, 0.0]]), torch.tensor([0, 0]), 1.0, 8.0, 4.0)
    rows.sum().backward()
    assert rows.isfinite().all()
    assert logits.grad.isfinite().all()
    assert (rows > 0).all()


def test_dkd_of_equal_logits_is_zero():
    logits = torch.randn(4, 5, dtype=torch.float64)
    rows = dkd_rows(logits, logits.clone(), torch.arange(4), 1.0, 8.0, 4.0)
    torch.testing.assert_close(rows, torch.zeros(4, dtype=torch.float64), **CLOSE)


# Where it is, in epochs done, with its factor by epoch and by step. 0.2: a fraction of an epoch is up at once
@pytest.mark.parametrize(
    ("warmup", "progress", "by_epoch", "by_step"),
    [
        (20, 0, 0.05, 0), (20, 5, 0.3, 0.25), (20, 18.999, 0.95, 0.94995), (20, 19, 1, 0.95), (20, 20, 1, 1),
        (20, 90.5, 1, 1), (1, 0, 1, 0), (1, 0.5, 1, 0.5), (0.2, 0.1, 1, 0.5), (2.5, 1.5, 0.8, 0.6), (0, 0, 1, 1),
    ],
)  # fmt: skip
def test_dkd_warms_up_by_epoch_or_by_step(warmup, progress, by_epoch, by_step):
    """min(epoch / warm-up, 1), the epoch counted from 1 and the factor constant within it, as in DKD's code; by step
    from 0.
    """
    for by, factor in (("epoch", by_epoch), ("step", by_step)):
        dkd = dataclasses.replace(Dkd.of(PRESETS["dkd"]), dkd_warmup=float(warmup), dkd_warmup_by=by)
        assert dkd.factor(progress) == pytest.approx(factor)
        assert float(dkd.factor(torch.tensor(float(progress)))) == pytest.approx(factor)


@pytest.mark.parametrize("steps_per_epoch", [1, 3, 781, 5004, 80_073, 1_281_167])
def test_dkd_s_epoch_is_that_of_the_step(steps_per_epoch):
    """The clock is step / steps per epoch, as the trainer has it, also on the device: the last step of an epoch belongs
    to it, the next one to the next.
    """
    dkd = Dkd.of(PRESETS["dkd"])
    for epoch in range(1, 21):
        for step, expected in (((epoch - 1) * steps_per_epoch, epoch), (epoch * steps_per_epoch - 1, epoch)):
            progress = step / steps_per_epoch
            assert dkd.factor(progress) == expected / 20
            assert float(dkd.factor(torch.tensor(progress, dtype=torch.float64))) == expected / 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dkd_s_clock_on_the_device_leaves_the_loss_s_dtype(dtype):
    distiller = Distiller(*pair(dtype), get_objective("dkd")).train()
    by_number, by_tensor = (
        distiller(*batch(dtype), progress=clock).loss for clock in (7.3, torch.tensor(7.3, dtype=torch.float64))
    )
    assert by_tensor.dtype == by_number.dtype == dtype
    torch.testing.assert_close(by_tensor, by_number)


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "overrides", "text"),
    [
        ("ijkcd", {}, "unknown objective 'ijkcd'.*did you mean 'ijckd'"),
        ("nothing like it", {}, "wanted one of ijckd, ijckd-pooled, srrl"),
        ("ijckd", {"ce": -1.0}, "ce must be a finite number >= 0, got -1"),
        ("ijckd", {"fm": float("nan")}, "fm must be a finite number"),
        ("kd", {"temperature": 0.0}, "temperature must be a finite number > 0"),
        ("ijckd", {"match": "maps"}, "match must be one of map, pooled, none, got 'maps'"),
        ("ijckd", {"infer_head": "both"}, "infer_head must be one of"),
        ("ijckd", {"match": "none"}, "feature matching.*needs match"),
        ("ijckd", {"connector": "botleneck"}, "did you mean 'bottleneck'"),
        ("ijckd", {"connector": "none"}, "need a connector"),
        ("ijckd", {"connector": "linear"}, "works on pooled vectors and cannot match maps"),
        ("ijckd", {"infer_head": "student"}, "student's own classifier gets no loss term"),
        ("simkd", {"infer_head": "student"}, "student's own classifier gets no loss term"),
        ("simkd", {"fm": 0.0}, "nothing to learn"),
        ("ce", {"ce": 0.0}, "nothing to learn"),
        ("kd", {"sr": 1.0}, "need a connector"),
        ("kd", {"infer_head": "teacher"}, "need a connector"),
        ("kd", {"connector": "conv1x1"}, "would not be trained"),
        ("srd", {"connector": "none"}, "need a connector"),
        ("srd", {"srd_power": 0.5}, "srd_power must be a finite number >= 1, got 0.5"),
        ("ijckd", {"match_distance": "l1"}, "match_distance must be one of mse, cosine, smooth-l1, got 'l1'"),
        ("kd", {"match_distance": "cosine"}, "expected fm above 0, got 0: set fm, or leave match_distance out"),
        ("ijckd", {"match_distance": "cosine", "fm": 0.0}, "'cosine' is of the feature matching, expected fm above 0"),
        ("srrl", {"sr": 0.0, "fm": 0.0}, "would not be trained"),
        ("at", {"at": -1.0}, "at must be a finite number >= 0, got -1"),
        ("fitnet", {"hint": float("inf")}, "hint must be a finite number"),
        ("fitnet", {"hint_stage": 0}, "hint_stage must be a whole number >= 1"),
        ("at", {"ce": 0.0, "kl": 0.0}, "nothing to learn"),
    ],
)
def test_unfit_objectives_are_refused(name, overrides, text):
    with pytest.raises(UserError, match=text):
        get_objective(name, **overrides)


def test_overrides_of_none_keep_the_preset():
    assert get_objective("ijckd", ce=None, connector=None, match=None) == PRESETS["ijckd"]
    assert get_objective("srrl", sr=0.0, fm=0.0, connector="none").connector is None


def test_unfit_pairs_are_refused():
    student, teacher = pair()
    with pytest.raises(
        UserError, match=r"teacher 'resnet8' classifies 10 classes and student 'resnet8x0.25' 7, wanted equal"
    ):
        Distiller(student, create_model("resnet8", 10, image_size=16), get_objective("ijckd"))
    with pytest.raises(UserError, match="objective 'ijckd' needs a teacher"):
        Distiller(student, None, get_objective("ijckd"))
    with pytest.raises(UserError, match=r"unknown head 'fusd'.*did you mean 'fused'"):
        Distiller(student, teacher, get_objective("ijckd"), head="fusd")
    with pytest.raises(UserError, match="label_smoothing"):
        Distiller(student, teacher, get_objective("ijckd"), label_smoothing=1.0)
    for student_name, teacher_name in (("resnet8", "alexnet"), ("alexnet", "resnet8")):
        models = [create_model(name, K, image_size=64) for name in (student_name, teacher_name)]
        with pytest.raises(UserError, match="'alexnet' has no map"):
            Distiller(*models, get_objective("ijckd"))


@pytest.mark.parametrize("name", ["fitnet", "at", "reviewkd"])
def test_nets_without_stages_are_refused(name):
    student, teacher = pair()
    with pytest.raises(UserError, match=f"objective '{name}' needs a teacher"):
        Distiller(student, None, get_objective(name))
    cached = CachedTeacher(teacher.classifier, "resnet8x0.5", "")
    with pytest.raises(UserError, match=r"'resnet8x0.5' is a cache of pooled features.*need the maps of its stages"):
        Distiller(student, cached, get_objective(name))
    vit = create_model("timm/vit_tiny_patch16_224", K, image_size=32)
    for models in ((vit, teacher), (student, vit)):
        with pytest.raises(UserError, match="'timm/vit_tiny_patch16_224' has no stage maps"):
            Distiller(*models, get_objective(name))
    with pytest.raises(
        UserError,
        match=r"hint_stage 4 expected, but student 'resnet8x0.25' \(layer1, layer2, layer3\).*only 3 stages in common",
    ):
        Distiller(student, teacher, get_objective(name, hint=1.0, hint_stage=4))


def test_a_teacher_without_a_map_can_be_matched_on_pooled_features():
    student, teacher = (create_model(name, K, image_size=64) for name in ("resnet8", "mobilenet_v3_small"))
    distiller = Distiller(student, teacher, get_objective("ijckd-pooled")).train()
    images, labels = batch(torch.float32, 64)
    distiller(images, labels, progress=0).loss.backward()
    assert distiller.eval().predict(images).shape == (6, K)


@pytest.mark.parametrize("head", HEADS)
def test_teacher_maps_of_other_channels_are_refused(head):
    distiller = Distiller(*pair(torch.float32), get_objective("ijckd"), head=head).train()
    images, _ = batch(torch.float32)
    with pytest.raises(RuntimeError):
        distiller.student_side(images, map_t=torch.zeros(6, 31, 4, 4))
