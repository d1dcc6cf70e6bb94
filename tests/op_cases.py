"""The tables by which the ops are tested on the CPU, on emulated kernels and on a GPU: inputs, calls, comparisons."""

import re

import pytest
import torch
from torch import Tensor

F64 = torch.float64
PARTS = ("ce", "sr", "fm", "kl", "hard", "ttm", "wttm", "nkd")
SHAPES = [(5, 6, 3, 4), (2, 3, 1, 1), (1, 5, 7, 7), (3, 1, 8, 8), (4, 6)]


def assert_no_worse_than_eager(
    fused: Tensor, eager: Tensor, oracle: Tensor, slack: float = 2.0, floor: float = 1e-6
) -> None:
    """flash-attention's rule: at most twice the error that eager PyTorch makes at the same dtype."""
    error = (fused.double() - oracle).abs().max().item()
    # of the result itself, where eager hits it by luck
    rounding = torch.finfo(torch.float32).eps * oracle.abs().max().item()
    allowed = slack * (eager.double() - oracle).abs().max().item() + floor + rounding
    assert error <= allowed, f"error {error:.2e} > {allowed:.2e}"


def assert_equal_to(fused, oracle, tolerance: float = 1e-11, **more) -> None:
    for a, b in zip(fused, oracle, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, **more)


BAD = [float("nan"), float("inf"), -float("inf")]


def assert_as_bad_as_eager(fused, eager, *, everywhere: bool) -> None:
    """Not every result finite where eager's are not; `everywhere`: each number for itself."""
    if everywhere:
        for f, e in zip(fused, eager, strict=True):
            assert not (f.isfinite() & ~e.isfinite()).any(), f"{f}, eager has {e}"
    else:  # infinities: eager's own formula may make NaN of what is infinite, or of a mere 0 behind a ReLU
        bad_fused, bad_eager = (not all(x.isfinite().all() for x in results) for results in (fused, eager))
        assert bad_fused or not bad_eager, f"all finite: {fused}, eager has {eager}"


def refused(text, call):
    """Holds where call() raises a RuntimeError whose text has `text` in it."""
    with pytest.raises(RuntimeError, match=re.escape(text)):
        call()


def connector_inputs(
    shape=(5, 6, 3, 4), Ct=7, *, norm="train", match="map", relu=True, dtype=F64, channels_last=False, seed=0
):
    """(tensors that get a gradient, keywords). norm: train | eval (BatchNorm), bias, none."""
    g = torch.Generator().manual_seed(seed)

    def randn(*s):
        return torch.randn(*s, generator=g, dtype=F64).to(dtype)

    u, weight = randn(*shape), randn(Ct, shape[1]) * 0.5
    if channels_last:
        u = u.contiguous(memory_format=torch.channels_last)
    leaves = {"u": u, "weight": weight}
    stats_dtype = F64 if dtype == F64 else torch.float32
    keywords = {"relu": relu}
    if norm in ("train", "eval"):
        leaves["bn_weight"] = randn(Ct).to(stats_dtype)
        leaves["bn_bias"] = randn(Ct).to(stats_dtype) * 0.3
        keywords |= {"training": norm == "train", "running_mean": randn(Ct).to(stats_dtype)}
        keywords["running_var"] = torch.rand(Ct, generator=g, dtype=F64).to(stats_dtype) + 0.5
    elif norm == "bias":
        leaves["bias"] = randn(Ct).to(stats_dtype)
    if match == "map":
        keywords["map_t"] = randn(shape[0], Ct, *shape[2:]).relu()
    elif match == "pooled":
        keywords["pooled_t"] = randn(shape[0], Ct).to(stats_dtype)
    for leaf in leaves.values():
        leaf.requires_grad_()
    return leaves, keywords


def run_connector(op, leaves, keywords):
    """[z, fm, running statistics, gradient of every leaf] for a loss that reaches z and fm."""
    leaves = {k: v.detach().clone(memory_format=torch.preserve_format).requires_grad_() for k, v in leaves.items()}
    keywords = {k: v.clone() if k.startswith("running") else v for k, v in keywords.items()}
    u, weight, bias = leaves["u"], leaves["weight"], leaves.get("bias")
    bn = {k: leaves[k] for k in ("bn_weight", "bn_bias") if k in leaves}
    z, fm = op(u, weight, bias, **bn, **keywords)
    head = torch.linspace(-1, 1, z.numel(), dtype=z.dtype).reshape(z.shape).roll(1, 0)
    (z * head).sum().add(0.7 * fm).backward()
    running = [keywords[k] for k in ("running_mean", "running_var") if k in keywords]
    return [z.detach(), fm.detach(), *running, *[leaf.grad for leaf in leaves.values()]]


def loss_inputs(B=5, Ct=6, K=9, dtype=F64, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)

    def randn(*s):
        return torch.randn(*s, generator=g, dtype=F64)

    z, weight, bias = randn(B, Ct) * scale, randn(K, Ct) * 0.5, randn(K)
    labels, labels_b = torch.randint(0, K, (B,), generator=g), torch.randint(0, K, (B,), generator=g)
    mix = torch.rand(B, generator=g, dtype=F64)
    pooled_t = z + 0.1 * randn(B, Ct)
    acc = F64 if dtype == F64 else torch.float32
    return z.to(acc), weight.to(dtype), bias.to(acc), labels, labels_b, mix.to(acc), pooled_t.to(acc)


def loss_keywords(labels_b, mix, pooled_t, **changed):
    defaults = {"label_smoothing": 0.1, "ce": 0.7, "sr": 0.5, "fm": 0.3, "kl": 0.9, "temperature": 3.0}
    return {"labels_b": labels_b, "mix": mix, "pooled_t": pooled_t} | defaults | changed


def run_loss(op, z, weight, bias, labels, labels_b, mix, pooled_t, **changed):
    z = z.detach().clone().requires_grad_()
    loss, parts, top1 = op(z, weight, bias, labels, **loss_keywords(labels_b, mix, pooled_t, **changed))
    (2.5 * loss).backward()
    assert not parts.requires_grad
    return [loss.detach(), parts, top1, z.grad]


ALONE = {p: dict.fromkeys(PARTS, 0.0) | {p: 0.8} for p in PARTS}


PLAIN = {"labels_b": None, "mix": None, "label_smoothing": 0.0}


SOFT = {"hard": 0.4, "ttm": 0.6, "wttm": 0.8, "nkd": 0.7}


LOSS_CASES = {
    "all": {},
    **ALONE,
    "hard labels": PLAIN,
    "smoothing": {"labels_b": None, "mix": None, "label_smoothing": 0.3},
    "mixup": {"label_smoothing": 0.0},
    "ijckd": PLAIN | {"ce": 1.0, "sr": 1.0, "fm": 0.0, "kl": 0.0},
    "cold": {"temperature": 0.5},
    "two rows of logits": SOFT,
    "standardised": SOFT | {"standardize": True},
    "standardised hard labels": PLAIN | SOFT | {"standardize": True, "temperature": 1.0, "nkd_gamma": 0.5},
}


def projected_inputs(B=5, Cs=4, Ct=6, K=9, dtype=F64, seed=0):
    """(what gets a gradient, what loss_inputs gives besides z)"""
    _, *rest = loss_inputs(B, Ct, K, dtype, seed)
    g = torch.Generator().manual_seed(seed + 1)
    u, projection = (torch.randn(*s, generator=g, dtype=F64).to(dtype) for s in ((B, Cs), (Ct, Cs)))
    bias = torch.randn(Ct, generator=g, dtype=F64).to(F64 if dtype == F64 else torch.float32)
    return [u, projection, bias], rest


def run_projected(module, leaves, weight, bias, labels, labels_b, mix, pooled_t, **changed):
    """[loss, parts, top1, gradient of every leaf]"""
    leaves = [x if x is None else x.detach().clone().requires_grad_() for x in leaves]
    keywords = loss_keywords(labels_b, mix, pooled_t, **changed)
    loss, parts, top1 = module.projected_classifier_loss(*leaves, weight, bias, labels, **keywords)
    (2.5 * loss).backward()
    assert not parts.requires_grad
    return [loss.detach(), parts, top1, *[x.grad for x in leaves if x is not None]]


def class_map_inputs(B=3, Ct=5, size=(7, 7), K=9, dtype=F64, seed=0):
    """maps, weight, bias, maps_t, labels, share; dtype is the weight's, and the values fit it."""
    g = torch.Generator().manual_seed(seed)

    def randn(*s):
        return torch.randn(*s, generator=g, dtype=F64).to(dtype).to(acc)

    acc = F64 if dtype == F64 else torch.float32
    maps, weight, bias = randn(B, Ct, *size), (0.5 * randn(K, Ct)).to(dtype), randn(K)
    maps_t = (maps + 0.3 * randn(B, Ct, *size)).to(dtype).to(acc)
    return maps, weight, bias, maps_t, torch.randint(0, K, (B,), generator=g), randn(B).abs()


CLASS_MAP_TERMS = {
    "kl": {"kl": 0.8},
    "kl cold": {"kl": 0.8, "temperature": 0.5},
    "tckd": {"dkd_alpha": 0.7},
    "nckd": {"dkd_beta": 2.0, "temperature": 1.0},
    "dkd": {"dkd_alpha": 1.0, "dkd_beta": 0.5, "temperature": 2.0},
    "cam": {"cam": 3.0},
    "all": {"kl": 0.5, "dkd_alpha": 0.3, "dkd_beta": 0.2, "cam": 2.0},
}


def decided_class_map_inputs(B, Ct, size, K, dtype, seed=0):
    """The same with answers of the teacher that no rounding turns over: each half of a map its class, the second
    stronger; and without shares.
    """
    maps, weight, bias, maps_t, labels, _ = class_map_inputs(B, Ct, size, K, dtype, seed)
    g = torch.Generator().manual_seed(seed)
    halves = weight.float()[torch.stack([labels, torch.randint(0, K, (B,), generator=g)])]  # [2, B, Ct]
    more, left = torch.zeros(B, Ct, *size), size[1] // 2
    more[..., :left], more[..., left:] = 1.5 * halves[0, ..., None, None], 2.5 * halves[1, ..., None, None]
    return maps + more, weight, bias, maps_t + more, labels


def run_class_maps(op, maps, weight, bias, maps_t, labels, **keywords):
    """[loss, parts, gradient]"""
    maps = maps.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss, parts = op.class_map_loss(maps, weight, bias, maps_t, labels, **keywords)
    (2.5 * loss).backward()
    assert not parts.requires_grad
    return [loss.detach(), parts, maps.grad]


def op_samples():
    """(name, op, arguments) of every op at least once."""
    ops = torch.ops.ijckd
    for norm, match, relu, side in (
        ("train", "map", True, 2),
        ("eval", "pooled", True, 2),
        ("bias", None, False, 2),
        ("bias", "pooled", False, 1),  # a linear connector
    ):
        leaves, keywords = connector_inputs((3, 4, side, side), 5, norm=norm, match=match, relu=relu)
        u = leaves["u"].detach().flatten(2).transpose(1, 2).contiguous().requires_grad_()
        stats = (None, None) if norm != "eval" else (keywords["running_mean"], keywords["running_var"])
        map_t = keywords.get("map_t")
        args = (u, leaves["weight"], leaves.get("bias"), leaves.get("bn_weight"), leaves.get("bn_bias"), *stats)
        rest = (
            map_t.flatten(2).transpose(1, 2).contiguous() if map_t is not None else None,
            keywords.get("pooled_t"),
            relu,
            1e-5,
        )
        yield f"connector_match {norm} {match}", ops.connector_match.default, (*args, *rest)
    z, *rest = loss_inputs()
    loss = ([*rest, None, None], [0.7, 0.5, 0.3, 0.9, 3.0, 0.1], True, None)
    yield "classifier_loss", ops.classifier_loss.default, (z.requires_grad_(), *loss)
    every = [*loss[1], *SOFT.values(), 0.2, 1.5, 1.0]
    yield "classifier_loss with every number", ops.classifier_loss.default, (z, loss[0], every, *loss[2:])
    whole = (*loss[0][:-2], torch.randn(5, 9, dtype=F64), torch.randn(2, 6, 6).bfloat16())
    yield "classifier_loss with every tensor", ops.classifier_loss.default, (z, whole, *loss[1:])
    (u, *projection), rest = projected_inputs()
    trained = [x.requires_grad_() for x in (u[:, None].clone(), *projection)]
    yield "projected_classifier_loss", ops.projected_classifier_loss.default, (*trained, *loss)
    maps, weight, bias, maps_t, labels, share = class_map_inputs()
    x, x_t = (maps.flatten(2).transpose(1, 2)[:, :5].clone() for maps in (maps, maps_t))
    x.requires_grad_()
    numbers = [0.7, 0.5, 0.3, 0.9, 3.0]
    args = (x, weight, bias, x_t, labels, share, None, None, [1, 2], numbers, True, None)
    yield "class_map_loss of pooled maps", ops.class_map_loss.default, args
    args = (x, weight, None, x_t, None, None, None, None, [1, 2], [0.0, 0.0, 0.0, 0.9, 3.0], True, None)
    yield "class_map_loss, class maps alone", ops.class_map_loss.default, args
    means = torch.rand(5, maps[0, 0].numel(), dtype=F64)
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = maps.contiguous(memory_format=layout).requires_grad_()
        args = (leaf, weight, bias, x_t, labels, share, means, None, [1, 2], numbers, True, None)
        yield f"class_map_loss, {layout}", ops.class_map_loss.default, args
    running_mean, running_var, mean, var = (torch.rand(7) for _ in range(4))
    args = (running_mean, running_var, torch.tensor(3), mean, var, 1.1, 0.1)
    yield "follow_statistics", ops.follow_statistics.default, args
    yield "take_counts", ops.take_counts.default, (torch.empty(0),)
    u = torch.randn(3, 4, 6, dtype=F64)
    weight = torch.randn(5, 6, dtype=F64)
    yield "connector_project", ops.connector_project.default, (u, weight)
    y, mean, var = ops.connector_project(u, weight)
    ones, zeros = torch.ones(5, dtype=F64), torch.zeros(5, dtype=F64)
    apply_args = (y, None, ones, zeros, mean, var, torch.randn(3, 4, 5, dtype=F64), None, True, 1e-5)
    yield "connector_apply", ops.connector_apply.default, apply_args
    z, _, *pooled = ops.connector_apply(*apply_args)
    grads_args = (torch.randn(3, 5, dtype=F64), torch.ones((), dtype=F64), z, None, *pooled, 4, True)
    yield "connector_channel_grads", ops.connector_channel_grads.default, grads_args
    g, d_gamma, d_beta = ops.connector_channel_grads(*grads_args)
    yield (
        "connector_input_grads",
        ops.connector_input_grads.default,
        (
            g,
            torch.ones((), dtype=F64),
            d_gamma,
            d_beta,
            12.0,
            u,
            weight,
            y,
            None,
            ones,
            zeros,
            mean,
            var,
            apply_args[6],
            True,
            1e-5,
            True,
            True,
        ),
    )
    for batch_stats, needs in ((True, (True, True)), (False, (False, False))):
        args = (*grads_args[:-2], u, weight, y, *apply_args[1:7], batch_stats, True, 1e-5, *needs, False)
        yield f"connector_map_grads, {needs}", ops.connector_map_grads.default, args
    u, weight = torch.randn(3, 1, 6, dtype=F64), torch.randn(5, 6, dtype=F64)
    grad_z, z, pooled_t = torch.randn(3, 3, 5, dtype=F64).unbind()
    one = torch.ones((), dtype=F64)
    for name, match, needs in (
        ("pooled", (None, one, z, pooled_t), (True, True, True)),
        ("du", (one, None, None, None), (True, False, False)),
    ):
        yield (
            f"connector_linear_grads {name}",
            ops.connector_linear_grads.default,
            (grad_z, *match, u, weight, *needs),
        )
