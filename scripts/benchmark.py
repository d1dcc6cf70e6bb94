#!/usr/bin/env python
"""Times the fused ops against whatever else computes the same, the whole training step against PyTorch by hand, the
data loaders against torchvision's, views of block packs, by stage too, a step by each objective, and the index of a
data folder; models the kernels of a GPU that is not there: `scripts/benchmark.py op --help`, and likewise step, loader,
views, stages, objectives, index and model.

Nothing is timed before it is checked: the fused result may be at most twice as far from float64 as eager PyTorch's,
else the workload is refused and the exit status is 1. Repeats are interleaved, so a slow minute of the machine hits
every contender alike. Needs torch and the compiled libraries only; the machine it runs on need not have the package's
other dependencies.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.util
import itertools
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # a bare checkout is enough: the package need not be installed

import index_benchmark  # noqa: E402
import kernel_model  # noqa: E402
import kernel_record  # noqa: E402
import loader_benchmark  # noqa: E402
import objective_benchmark  # noqa: E402
import records  # noqa: E402
import stage_benchmark  # noqa: E402
import step_benchmark  # noqa: E402
import views_benchmark  # noqa: E402

from ijckd_fast import head as ops  # noqa: E402
from ijckd_fast.errors import UserError  # noqa: E402
from ijckd_fast.head import reference  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# float16 gradients vanish without a loss scale, which is why every float16 trainer has one
LOSS_SCALE = {torch.float32: 1.0, torch.bfloat16: 1.0, torch.float16: 4096.0}

# of a result's largest value, in units of the type's rounding: eager can be lucky in a mean over a thousand rows, down
# to no error
ERROR_FLOOR = {torch.float32: 16.0, torch.bfloat16: 1 / 64, torch.float16: 1 / 64}

Step = Callable[[], list[Tensor]]


# The matches of logits, as keywords of our ops, whose temperature is 4 where none is given.
MATCHES: dict[str, dict[str, Any]] = {
    "sr": {"sr": 1.0},
    "kl": {"kl": 1.0},
    "hard": {"hard": 1.0},
    "wttm": {"wttm": 1.0},
    "nkd": {"nkd": 1.0},
    "standardised-kl": {"kl": 1.0, "standardize": True},
}

# The losses at positions of maps, as keywords of class_map_loss.
MAP_LOSSES: dict[str, dict[str, Any]] = {
    "sdd": {"kl": 1.0},
    "sdd-dkd": {"dkd_alpha": 1.0, "dkd_beta": 2.0, "temperature": 1.0},
    "cam": {"cam": 1.0, "scales": (2,)},
}


class Workload(NamedTuple):
    """Sizes of one head. Cs None: the classifier alone, fed with z; K None: the connector alone; side: H = W of the
    maps, 0 for vectors.

    Vectors go through a linear connector with bias and match pooled features, maps through conv1x1 + BatchNorm + ReLU
    and match the map. match: how the logits are matched, a key of MATCHES. cpu_B: the batch on a
    CPU, where B itself would take minutes or not fit; its rows are called NAME-B<cpu_B>. nchw: the maps are contiguous,
    not channels-last. fm: whether vectors match pooled features. maps: a key of MAP_LOSSES, of which maps [B, Ct, side,
    side] and the teacher's are all the head sees.
    """

    B: int
    Cs: int | None
    Ct: int
    K: int | None
    side: int = 0
    ce_only: bool = False
    cpu_B: int | None = None
    match: str = "sr"
    nchw: bool = False
    fm: bool = True
    maps: str | None = None

    @property
    def losses(self) -> str:
        """The terms of the loss, + between them; fm matches pooled features, map the map."""
        if self.ce_only or self.maps:
            return self.maps or "ce"
        match = ["map"] if self.side else ["fm"] if self.fm else []
        return "+".join(match if self.K is None else ["ce", self.match, *match])

    @property
    def projects_in_loss(self) -> bool:
        """Whether the head is one op, of which z is no result."""
        return self.Cs is not None and self.K is not None and self.side == 0

    @property
    def sizes(self) -> str:
        """One word, for the table."""
        named = [("B", self.B), ("Cs", self.Cs), ("Ct", self.Ct), ("K", self.K)]
        where = [f"{self.side}x{self.side}{' NCHW' if self.nchw else ''}"] if self.side else []
        return " ".join([f"{name}{size}" for name, size in named if size is not None] + where)


WORKLOADS = {
    "W1": Workload(256, 512, 512, 1000),
    "W2": Workload(256, 1024, 2048, 1000),
    "I1": Workload(256, 256, 512, 1000, side=7, cpu_B=64),
    "I2": Workload(256, 1024, 2048, 1000, side=7, cpu_B=32),
    "W3": Workload(1024, 1024, 2048, 21841, cpu_B=128),
    "W3b": Workload(1024, 1024, 2048, 100_000, cpu_B=32),
    "W2-ce": Workload(256, None, 2048, 1000, ce_only=True),
    "W3-ce": Workload(1024, None, 2048, 21841, ce_only=True, cpu_B=128),
    "W3b-ce": Workload(1024, None, 2048, 100_000, ce_only=True, cpu_B=32),
    "W1-kl": Workload(256, 512, 512, 1000, match="kl"),
    "W2-kl": Workload(256, 1024, 2048, 1000, match="kl"),
    "W3-kl": Workload(1024, 1024, 2048, 21841, match="kl", cpu_B=128),
    **{
        f"W1-{match}": Workload(256, 512, 512, 1000, match=match)
        for match in ("hard", "wttm", "nkd", "standardised-kl")
    },
    "C512x1000": Workload(256, None, 512, 1000),
    "C2048x1000": Workload(256, None, 2048, 1000),
    "C512x21841": Workload(256, None, 512, 21841),
    "C2048x21841": Workload(256, None, 2048, 21841),
    "M1": Workload(64, 256, 512, None, side=7),
    **{
        f"P{Ct}-{maps}": Workload(64, None, Ct, 1000, side=7, maps=maps)
        for Ct, maps in ((512, "sdd"), (512, "sdd-dkd"), (512, "cam"), (2048, "sdd"))
    },
    # sizes of a small data set, of fine-tuning, of a small batch; named after the classifier's K or the maps' side
    "K10": Workload(512, None, 64, 10),
    "K10-kl": Workload(512, None, 64, 10, match="kl", fm=False),
    "K100": Workload(64, None, 512, 100),
    "K100-kl": Workload(64, None, 512, 100, match="kl", fm=False),
    "K100-wide": Workload(128, None, 640, 100),
    "K365": Workload(256, None, 512, 365),
    "K365-kl": Workload(256, None, 512, 365, match="kl", fm=False),
    "K1000": Workload(32, None, 512, 1000),
    "K1000-kl": Workload(32, None, 512, 1000, match="kl", fm=False),
    "L10": Workload(512, 32, 64, 10),
    "L100": Workload(128, 256, 640, 100),
    "L100-kl": Workload(128, 256, 640, 100, match="kl", fm=False),
    "map4": Workload(64, 256, 512, None, side=4),
    "map7": Workload(32, 512, 512, None, side=7),
    "map7-nchw": Workload(32, 512, 512, None, side=7, nchw=True),
    "map7-B8": Workload(8, 512, 2048, None, side=7),
    "map8": Workload(64, 64, 256, None, side=8),
    "map8-nchw": Workload(64, 64, 256, None, side=8, nchw=True),
    "map8-K100": Workload(64, 256, 256, 100, side=8),
    "map14": Workload(32, 256, 512, None, side=14),
    "map14-nchw": Workload(32, 256, 512, None, side=14, nchw=True),
    "map14-B8": Workload(8, 512, 2048, None, side=14),
    "tiny": Workload(8, 6, 5, 11, side=3),
    "tiny-nchw": Workload(8, 6, 5, 11, side=3, nchw=True),
    "tiny-ce": Workload(8, None, 24, 50, ce_only=True),
    "tiny-kl": Workload(8, 6, 24, 50, match="kl"),
    "tiny-only-kl": Workload(8, 6, 24, 50, match="kl", fm=False),
    "tiny-linear": Workload(8, 6, 24, 50),
    "tiny-sr": Workload(8, None, 24, 50),
    **{f"tiny-{maps}": Workload(4, None, 24, 50, side=5, maps=maps) for maps in MAP_LOSSES},
}
DEFAULT_WORKLOADS = {
    "cuda": ["W1", "W2", "I1", "I2", "W3", "W3b", "W2-ce", "W3-ce", "W1-kl", "W2-kl", "W3-kl", "P512-sdd", "P2048-sdd"],
    "cpu": ["C512x1000", "C2048x1000", "C512x21841", "C2048x21841", "M1"],
}
SMALL_WORKLOADS = [name for name in WORKLOADS if name.startswith(("K", "L", "map"))]
# of the shapes that people use, so small that the host's part is all there is
HOST_WORKLOADS = ("tiny-sr", "tiny-linear", "tiny-kl", "tiny-ce", "tiny")
HOST_STEPS = 10  # timed as one
SWEEP_K = (100, 300, 1000, 3000, 10_000, 21_841, 50_000, 100_000, 200_000)
SWEEP_B = {"cuda": (16, 64, 256, 512, 1024, 2048, 4096), "cpu": (1, 4, 16, 64, 256)}

BASELINES = {
    "eager": "PyTorch as one writes it, under autocast for half types",
    "compile": "the same through torch.compile",
    "eager-graph": "eager in a CUDA graph, against ours in one (GPU)",
    "compile-graph": "torch.compile in a CUDA graph, against ours in one (GPU)",
    "stage0": "ours without the tensor-core kernels: library GEMMs and plain kernels (GPU, half types)",
    "stage1": "ours with the tensor-core kernels of every GPU from sm_80, not Hopper's own (sm_90, half types)",
    "linear_cross_entropy": "torch.nn.functional's, chunked, where torch has it (rows named -ce)",
    "liger": "Liger-Kernel's fused linear cross-entropy, where installed (GPU, rows named -ce)",
    "cce": "cut-cross-entropy without gradient filter, where installed (GPU, rows named -ce, half types)",
}
STAGES = {"stage0": 0, "stage1": 1}  # the highest that may run
GPU_ONLY = ("eager-graph", "compile-graph", *STAGES, "liger", "cce")
CE_ONLY = ("linear_cross_entropy", "liger", "cce")

JSON_KEYS = (
    "what",
    "workload",
    "device",
    "dtype",
    "mode",
    "baseline",
    "ours_ms",
    "baseline_ms",
    "ratio",
    "ours_peak_mb",
)
JSON_KEYS += ("baseline_peak_mb", "repeats")
CSV_ONLY_KEYS = (
    "losses",
    "B",
    "Cs",
    "Ct",
    "K",
    "side",
    "ours_p20_ms",
    "ours_p80_ms",
    "baseline_p20_ms",
    "baseline_p80_ms",
)
CSV_ONLY_KEYS += (
    "ours_launches",
    "baseline_launches",
    "machine",
    "threads",
    "torch",
    "cuda",
    "python",
    "commit",
    "date",
)
KERNEL_COLUMNS = (
    "workload", "dtype", "mode", "kernel", "us", "count", "contender", "machine", "torch", "commit", "date",
)  # fmt: skip


class WrongResult(Exception):
    """A contender's result is farther from float64 than allowed."""


class Usage(Exception):
    """What the user asked for cannot be done; the text says why."""


# --------------------------------------------------------------------------------------------------------------------
# the two programs


def make_tensors(w: Workload, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Everything a step reads, in float32 storage but for maps, whose dtype is the autocast one, as activations' is.

    Values are representable in `dtype`, so that rounding the inputs is no part of anybody's error.
    """
    g = torch.Generator(device).manual_seed(0)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g, device=device) * scale).to(dtype).float()

    t: dict[str, Tensor] = {}
    positions = (w.side, w.side) if w.side else ()
    layout = torch.contiguous_format if w.nchw else torch.channels_last
    if w.maps:
        return map_tensors(w, dtype, randn)
    if w.Cs is None:
        t["z"] = randn(w.B, w.Ct)
    else:
        t["u"] = randn(w.B, w.Cs, *positions).to(dtype)
        t["projection"] = randn(w.Ct, w.Cs, scale=w.Cs**-0.5)
        if w.side:
            t["u"] = t["u"].relu().contiguous(memory_format=layout)  # after the trunk's last ReLU
            t["bn_weight"], t["bn_bias"] = randn(w.Ct, scale=0.2) + 1, randn(w.Ct, scale=0.2)
        else:
            t["projection_bias"] = randn(w.Ct, scale=0.1)
    for leaf in t.values():
        leaf.requires_grad_()
    if w.side:
        t["running_mean"], t["running_var"] = torch.zeros(w.Ct, device=device), torch.ones(w.Ct, device=device)
        t["map_t"] = randn(w.B, w.Ct, *positions).relu().to(dtype).contiguous(memory_format=layout)
        t["pooled_t"] = t["map_t"].float().mean((2, 3))
    else:
        t["pooled_t"] = randn(w.B, w.Ct)
    if w.K is not None:
        t["weight"] = randn(w.K, w.Ct, scale=w.Ct**-0.5)  # frozen
        if not w.ce_only:
            t["bias"] = randn(w.K, scale=0.1)
        t["labels"] = torch.randint(0, w.K, (w.B,), generator=g, device=device)
    return t


def map_tensors(w: Workload, dtype: torch.dtype, randn: Callable[..., Tensor]) -> dict[str, Tensor]:
    """The same of MAP_LOSSES. The teacher is sure of a class everywhere, of the label in every second image: else an
    answer that rounding turns over would be a contender's error.
    """
    weight, labels = randn(w.K, w.Ct, scale=w.Ct**-0.5), torch.arange(w.B) * 7 % (w.K or 1)
    answers = weight.cpu()[torch.where(torch.arange(w.B) % 2 == 0, labels, 3)][:, :, None, None].to(weight.device)
    maps, maps_t = (
        (randn(w.B, w.Ct, w.side, w.side).relu() + 8 * answers).to(dtype).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    t = {"maps": maps.requires_grad_(), "maps_t": maps_t, "weight": weight, "bias": randn(w.K, scale=0.1)}
    return t | {"labels": labels.to(weight.device)}


def fused_loss(
    w: Workload, t: dict[str, Tensor], op: Any = ops, frozen: ops.FrozenClassifier | None = None
) -> tuple[Tensor, Tensor | None]:
    """(loss [], z [B, Ct] where it is a result) by our ops; with op=reference and float64 tensors, the oracle.

    On a GPU the frozen classifier is prepared once, outside the steps that are timed, as the trainer does.
    """
    if w.maps:
        maps = (t["maps"], t["weight"], t["bias"], t["maps_t"], t["labels"])
        return op.class_map_loss(*maps, **MAP_LOSSES[w.maps])[0], None
    z, match = t.get("z"), None
    if w.Cs is not None and not w.projects_in_loss:
        teacher = {"map_t": t["map_t"]} if w.side else {"pooled_t": t["pooled_t"]}
        bn = {k: t[k] for k in ("bn_weight", "bn_bias", "running_mean", "running_var") if k in t}
        z, match = op.connector_match(
            t["u"], t["projection"], t.get("projection_bias"), relu=bool(w.side), **bn, **teacher
        )
    if w.K is None:
        return match, z
    terms, weight = loss_terms(w, t), t["weight"]
    if frozen is not None and weight.is_cuda:
        weight, terms["gram"] = frozen.prepared(weight, match=not w.ce_only and w.match == "sr")
    classifier = (weight, t.get("bias"), t["labels"])
    if w.projects_in_loss:
        return op.projected_classifier_loss(t["u"], t["projection"], t["projection_bias"], *classifier, **terms)[
            0
        ], None
    loss, _, _ = op.classifier_loss(z, *classifier, **terms)
    return loss if match is None else loss + match, z


def loss_terms(w: Workload, t: dict[str, Tensor]) -> dict[str, Any]:
    """The classifier's losses as keywords of our ops."""
    terms: dict[str, Any] = {} if w.ce_only else {**MATCHES[w.match], "pooled_t": t["pooled_t"]}
    if not w.side and not w.ce_only and w.fm:
        terms["fm"] = 1.0
    return terms


def one_call(w: Workload, t: dict[str, Tensor]) -> list[Tensor]:
    """The results of a step by our ops that return loss and gradients in one call."""
    classifier, terms = (t["weight"], t.get("bias"), t["labels"]), loss_terms(w, t)
    if w.side:
        connector = {k: t[k] for k in ("bn_weight", "bn_bias", "running_mean", "running_var", "map_t")}
        matched = ops.connector_loss_and_grads(t["u"], t["projection"], connector, *classifier, **terms)
        return [matched.loss, matched.z, *matched.grads.values()]
    if w.projects_in_loss:
        projected = ops.projected_classifier_loss_and_grads(
            t["u"], t["projection"], t["projection_bias"], *classifier, **terms
        )
        return [projected.loss, projected.grad_u, projected.grad_projection, projected.grad_projection_bias]
    alone = ops.classifier_loss_and_grad(t["z"], *classifier, **terms)
    return [alone.loss, t["z"].detach(), alone.grad]


def temperature_kl(logits: Tensor, logits_t: Tensor, temperature: float = 4.0) -> Tensor:
    """T^2 KL(softmax(logits_t / T) || softmax(logits / T)), mean over B, as every distillation script has it."""
    log_p, p_t = F.log_softmax(logits / temperature, 1), F.softmax(logits_t / temperature, 1)
    return F.kl_div(log_p, p_t, reduction="batchmean") * temperature**2


def logit_match(match: str, logits: Tensor, logits_t: Tensor, labels: Tensor) -> Tensor:
    """MATCHES as one writes them in PyTorch: [B, K], [B, K], [B] -> []."""
    if match == "sr":
        return F.mse_loss(logits, logits_t)
    if match == "kl":
        return temperature_kl(logits, logits_t)
    if match == "hard":
        return F.cross_entropy(logits, logits_t.argmax(1))
    if match == "standardised-kl":
        return temperature_kl(
            *((x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-7) for x in (logits, logits_t))
        )
    if match == "wttm":
        powers = F.softmax(logits_t, 1) ** 0.2
        mass = powers.sum(1, keepdim=True)  # [B, 1]
        return (mass * F.kl_div(F.log_softmax(logits, 1), powers / mass, reduction="none")).sum(1).mean()
    label = labels[:, None]
    own = F.softmax(logits_t, 1).gather(1, label) * F.log_softmax(logits, 1).gather(1, label)  # [B, 1]
    log_q, log_q_t = (F.log_softmax((x / 4).scatter(1, label, -1e4), 1) for x in (logits, logits_t))  # of the others
    return -own.mean() - 1.5 * 4**2 * (log_q_t.exp() * log_q).sum(1).mean()


def eager_map_loss(w: Workload, t: dict[str, Tensor]) -> Tensor:
    """MAP_LOSSES as their authors write them in PyTorch."""
    bias, labels = t["bias"], t["labels"]
    if w.maps == "cam":

        def class_maps(maps: Tensor) -> Tensor:
            return F.normalize(F.conv2d(F.adaptive_avg_pool2d(maps, 2), t["weight"][:, :, None, None]), dim=(2, 3))

        return F.mse_loss(class_maps(t["maps"]), class_maps(t["maps_t"]))

    def logits_of(maps: Tensor) -> Tensor:  # [B, K] of every position, one position after the other
        finest = F.adaptive_avg_pool2d(maps, 4)
        pools = [F.adaptive_avg_pool2d(finest, s).flatten(2) for s in (1, 2)]
        x = torch.cat([*pools, finest.flatten(2)], 2).permute(2, 0, 1)  # [21, B, Ct]
        return F.linear(x.flatten(0, 1), t["weight"], bias)

    logits, logits_t, labels = logits_of(t["maps"]), logits_of(t["maps_t"]), labels.repeat(21)
    if w.maps == "sdd":
        log_p, p_t = F.log_softmax(logits / 4, 1), F.softmax(logits_t / 4, 1)
        rows = F.kl_div(log_p, p_t, reduction="none").sum(1) * 4**2
    else:
        label = labels[:, None]
        p, p_t = F.softmax(logits, 1), F.softmax(logits_t, 1)
        (own, own_t), (rest, rest_t) = ((x.gather(1, label) for x in (p, p_t)),
                                        (x.scatter(1, label, 0).sum(1, keepdim=True) for x in (p, p_t)))  # fmt: skip
        target = F.kl_div(torch.cat([own, rest], 1).log(), torch.cat([own_t, rest_t], 1), reduction="none").sum(1)
        log_q, q_t = F.log_softmax(logits.scatter(1, label, -1e4), 1), F.softmax(logits_t.scatter(1, label, -1e4), 1)
        rows = target + 2 * F.kl_div(log_q, q_t, reduction="none").sum(1)
    right = logits_t.argmax(1) == labels  # [21 B], those of the whole maps first
    counts = torch.where(right == right[: w.B].repeat(21), 1.0, 2.0)
    return (counts * rows).mean()


def eager_loss(w: Workload, t: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """The same as one writes it in PyTorch; no top-1 and no separate parts, which ours also returns."""
    if w.maps:
        return eager_map_loss(w, t), None
    z, match = t.get("z"), None
    if w.side:
        y = F.conv2d(t["u"], t["projection"][:, :, None, None])  # [B, Ct, H, W]
        Z = F.batch_norm(y, t["running_mean"], t["running_var"], t["bn_weight"], t["bn_bias"], training=True).relu()
        z, match = Z.mean((2, 3)), F.mse_loss(Z, t["map_t"])
    elif w.Cs is not None:
        z = F.linear(t["u"], t["projection"], t["projection_bias"])
    if not w.side and not w.ce_only and w.fm:
        match = F.mse_loss(z.float() if z.dtype != torch.float64 else z, t["pooled_t"])
    if w.K is None:
        return match, z
    logits = F.linear(z, t["weight"], t.get("bias"))  # [B, K]
    loss = F.cross_entropy(logits, t["labels"])
    if not w.ce_only:
        logits_t = F.linear(t["pooled_t"], t["weight"], t["bias"])  # [B, K]
        loss = loss + logit_match(w.match, logits, logits_t, t["labels"])
        loss = loss if match is None else loss + match
    return loss, None if w.projects_in_loss else z


def result_names(w: Workload, t: dict[str, Tensor], mode: str) -> list[str]:
    """What a step returns, in order."""
    gradients = [f"gradient of {k}" for k, v in t.items() if v.requires_grad] if mode == "both" else []
    return ["loss", *([] if w.projects_in_loss or w.maps else ["z"]), *gradients]


def make_step(loss_of: Callable[..., Any], t: dict[str, Tensor], mode: str, dtype: torch.dtype, scale: float) -> Step:
    """One training step of the head: forward under autocast (mode 'forward': without gradients) and, with 'both',
    backward.
    """
    device = t["labels" if "labels" in t else "pooled_t"].device.type
    leaves = [v for v in t.values() if v.requires_grad]

    def autocast() -> Any:
        half = dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(device, dtype) if half else contextlib.nullcontext()

    def step() -> list[Tensor]:
        if mode == "forward":
            with torch.no_grad(), autocast():
                return [x for x in loss_of(t) if x is not None]
        with autocast():
            loss, z = loss_of(t)
        gradients = torch.autograd.grad(loss * scale if scale != 1 else loss, leaves)
        return [loss.detach(), *([] if z is None else [z.detach()]), *gradients]

    return step


# --------------------------------------------------------------------------------------------------------------------
# contenders


def captured(step: Step) -> Step:
    """The step as one CUDA graph; its results are overwritten by every replay."""
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        for _ in range(3):  # compile, load modules, make library handles: none of it may happen while capturing
            step()
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay() -> list[Tensor]:
        graph.replay()
        return results

    return replay


def peer_step(name: str, t: dict[str, Tensor], mode: str, dtype: torch.dtype, scale: float) -> Step:
    """A CE-only library on tensors cast beforehand, as ours is once; eager under autocast casts it in every step."""
    weight, labels = t["weight"].to(dtype), t["labels"]
    half = dict(t, z=t["z"].detach().to(dtype).requires_grad_())
    if name == "linear_cross_entropy":
        options = torch.nn.LinearCrossEntropyOptions()

        def cross_entropy(z: Tensor) -> Tensor:
            return F.linear_cross_entropy(z, weight, labels, options=options)
    elif name == "liger":
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()

        def cross_entropy(z: Tensor) -> Tensor:
            return liger(weight, z, labels)
    else:
        from cut_cross_entropy import linear_cross_entropy

        def cross_entropy(z: Tensor) -> Tensor:
            return linear_cross_entropy(z, weight, labels, filter_eps=None)  # the filter would drop small gradients

    return make_step(lambda t: (cross_entropy(t["z"]), t["z"]), half, mode, torch.float32, scale)


def absent(baseline: str, w: Workload, dtype: torch.dtype, device: str, stage: int = 2) -> str | None:
    """Why this baseline has no row for this workload here, or None if it has one. stage: the highest of ours."""
    if baseline in GPU_ONLY and device == "cpu":
        return "needs a GPU"
    if baseline in CE_ONLY and not w.ce_only:
        return "knows cross-entropy only"
    if baseline == "linear_cross_entropy" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has none"
    package = {"liger": "liger_kernel", "cce": "cut_cross_entropy"}.get(baseline)
    if package and importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if baseline in ("cce", *STAGES) and dtype == torch.float32:
        return "takes half types only"
    if baseline == "stage1" and torch.cuda.get_device_capability() != (9, 0):
        return "is ours on this GPU"
    if baseline in STAGES and STAGES[baseline] >= stage:
        return f"is ours with --stage {stage}"
    return None


def make_contender(name: str, w: Workload, t: dict[str, Tensor], mode: str, dtype: torch.dtype) -> Step:
    """The step called `name`: 'ours', 'ours-graph' or a baseline."""
    scale = LOSS_SCALE[dtype]
    if name == "ours-one-call":
        return lambda: one_call(w, t)
    if name in CE_ONLY:
        return peer_step(name, t, mode, dtype, scale)
    program, _, graph = name.partition("-")
    if program == "compile":
        loss_of = torch.compile(lambda t: eager_loss(w, t), dynamic=False)
    elif program in ("ours", *STAGES):
        frozen = ops.FrozenClassifier()
        loss_of = lambda t: fused_loss(w, t, frozen=frozen)  # noqa: E731
    else:
        loss_of = lambda t: eager_loss(w, t)  # noqa: E731
    step = make_step(loss_of, t, mode, dtype, scale)
    if program in STAGES:
        step = limited(step, STAGES[program])
    return captured(step) if graph else step


def limited(step: Step, most: int) -> Step:
    """The step with our kernels up to a stage."""

    def run() -> list[Tensor]:
        before = torch.ops.ijckd.limit_stage(most)
        try:
            return step()
        finally:
            torch.ops.ijckd.limit_stage(before)

    return run


def check(
    w: Workload,
    results: list[Tensor],
    eager: list[Tensor],
    oracle: list[Tensor],
    names: list[str],
    dtype: torch.dtype,
    slack: float,
) -> None:
    """flash-attention's rule: an error of at most `slack` times eager's, both against float64; NaN never passes.

    Errors are the largest over a result's elements. But rounding can switch a ReLU on or off where its input is near 0,
    which moves one element of a gradient by as much as its value: gradients behind a ReLU are compared by their norms,
    and to 1e-3.
    """
    for name, ours, theirs, exact in zip(names, results, eager, oracle, strict=True):
        behind_relu = w.side > 0 and name.startswith("gradient")
        size = torch.linalg.vector_norm if behind_relu else lambda x: x.abs().max()
        floor = 1e-3 if behind_relu else ERROR_FLOOR[dtype] * torch.finfo(dtype).eps
        error = size(ours.double() - exact).item()
        allowed = slack * size(theirs.double() - exact).item() + floor * size(exact).item()
        if not error <= allowed:
            raise WrongResult(
                f"{name} is off by {error:.2e} from float64, allowed {allowed:.2e} ({slack:g} times eager's)"
            )


# --------------------------------------------------------------------------------------------------------------------
# measuring


class Timer:
    """Milliseconds of one step: CUDA events, with the L2 cache overwritten before it, or the wall clock on a CPU."""

    def __init__(self, device: str, steps: int = 1) -> None:
        self.cuda = device == "cuda"
        self.steps = steps  # on a CPU: so many are timed as one, since a clock's own time counts beside a small one
        if self.cuda:
            self.start, self.end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self.cache_filler = torch.empty(256 << 20, dtype=torch.int8, device=device)

    def __call__(self, step: Step) -> float:
        if not self.cuda:
            began = time.perf_counter()
            for _ in range(self.steps):
                results = step()
            elapsed = (time.perf_counter() - began) * 1e3
            del results
            return elapsed / self.steps
        self.cache_filler.zero_()
        self.start.record()
        step()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end)


def peak_mb(step: Step, device: str) -> float | None:
    """Megabytes (1e6) that one warm step needs on top of its inputs, its results included.

    On a GPU by torch's allocator. On a CPU the process' peak resident memory over its resident memory before, the least
    of three steps, with freed memory given back to the kernel first; None where Linux' /proc does not offer it.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    def resident_kb(field: str) -> int:
        status = pathlib.Path("/proc/self/status").read_text()
        return int(status.split(f"{field}:")[1].split()[0])

    peaks = []
    for _ in range(3):
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            pathlib.Path("/proc/self/clear_refs").write_text("5")  # peak := now
            before_kb = resident_kb("VmRSS")
            results = step()
            peaks.append((resident_kb("VmHWM") - before_kb) * 1024 / 1e6)
            del results
        except (OSError, IndexError):
            return None
    return max(min(peaks), 0.0)


class Kernel(NamedTuple):
    """A kernel that a step runs: its name without its parameters, mean microseconds of a launch, launches."""

    name: str
    us: float
    count: int


def kernels_of(step: Step, timer: Timer, runs: int = 1) -> list[Kernel] | None:
    """What one step runs on the GPU, by torch.profiler, in the order of the first launches, from so many runs, each
    with the L2 cache overwritten. None on a CPU and where the profiler sees no kernel.
    """
    if not timer.cuda:
        return None
    traces: list[list[dict[str, Any]]] = []
    for _ in range(runs):
        timer.cache_filler.zero_()
        torch.cuda.synchronize()  # or the filling would be in the profile
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            step()
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            trace = pathlib.Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(trace))
            traces.append(json.loads(trace.read_text())["traceEvents"])
    return kernels_in(traces) or None


def kernels_in(traces: list[list[dict[str, Any]]]) -> list[Kernel]:
    """The kernels in Chrome traces of the same step, whose times are in microseconds: of each the mean over a step's
    launches, and of those the median over the traces.
    """
    means: dict[str, list[float]] = {}
    counts: dict[str, int] = {}
    for events in traces:
        times: dict[str, list[float]] = {}
        for event in sorted((e for e in events if e.get("cat") == "kernel"), key=lambda e: e["ts"]):
            times.setdefault(kernel_record.short_name(event["name"]), []).append(event["dur"])
        for name, each in times.items():
            means.setdefault(name, []).append(statistics.fmean(each))
            counts[name] = len(each)
    return [Kernel(name, statistics.median(each), counts[name]) for name, each in means.items()]


class Measured(NamedTuple):
    """Of one contender: milliseconds of every repeat, peak megabytes, kernels (None: not known)."""

    times_ms: list[float]
    peak_mb: float | None
    kernels: list[Kernel] | None

    @property
    def launches(self) -> int | None:
        """Of all kernels."""
        return None if self.kernels is None else sum(kernel.count for kernel in self.kernels)

    @property
    def p20_50_80(self) -> tuple[float, float, float]:
        """Three percentiles of the milliseconds."""
        if len(self.times_ms) == 1:
            return (self.times_ms[0],) * 3
        fifths = statistics.quantiles(self.times_ms, n=5, method="inclusive")
        return fifths[0], statistics.median(self.times_ms), fifths[3]


def measure(
    name: str, w: Workload, dtype: torch.dtype, device: str, mode: str, baselines: list[str], repeats: int, timer: Timer
) -> dict[str, Measured]:
    """Checks, then times, every contender on one workload. WrongResult if ours is wrong; a baseline that fails is left
    out, and said so.
    """
    torch._dynamo.reset()  # one compilation per workload; without it torch would count the ninth as one too many
    t = make_tensors(w, dtype, device)
    names = result_names(w, t, mode)

    def as64(x: Tensor) -> Tensor:
        return x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x

    t64 = {k: as64(v) for k, v in t.items()}
    oracle = make_step(lambda t: fused_loss(w, t, reference), t64, mode, torch.float64, LOSS_SCALE[dtype])()
    del t64
    eager = make_contender("eager", w, t, mode, dtype)
    eager_results = eager()
    steps: dict[str, Step] = {}
    contenders = ["ours", *(["ours-graph"] if any(b.endswith("-graph") for b in baselines) else []), *baselines]
    for contender in contenders:
        of_ours = contender.startswith("ours")
        try:
            step = eager if contender == "eager" else make_contender(contender, w, t, mode, dtype)
            check(w, step(), eager_results, oracle, names, dtype, slack=2 if of_ours else 10)
            for _ in range(2):
                step()
            steps[contender] = step
        except WrongResult as wrong:
            if of_ours:
                raise WrongResult(f"{contender}: {wrong}") from None
            print(f"{name}: {contender} left out: {wrong}", file=sys.stderr)
        except Exception as failure:  # a baseline's own trouble (no compiler, out of memory) is not ours
            if of_ours:
                raise
            first_line = (str(failure).strip() or type(failure).__name__).splitlines()[0]
            print(f"{name}: {contender} left out: {type(failure).__name__}: {first_line}", file=sys.stderr)
    del oracle, eager_results
    peaks = {c: None if c.endswith("-graph") else peak_mb(step, device) for c, step in steps.items()}
    kernels = {c: kernels_of(step, timer, 3 if c in ("ours", *STAGES) else 1) for c, step in steps.items()}
    times: dict[str, list[float]] = {c: [] for c in steps}
    order = list(steps)
    for _ in range(repeats):
        for contender in order:
            times[contender].append(timer(steps[contender]))
        order.append(order.pop(0))  # nobody always runs behind the same neighbour
    return {c: Measured(times[c], peaks[c], kernels[c]) for c in steps}


# --------------------------------------------------------------------------------------------------------------------
# rows


def make_rows(
    name: str, w: Workload, dtype: str, mode: str, measured: dict[str, Measured], where: dict[str, Any]
) -> list[dict[str, Any]]:
    """One row per baseline, with every column of the CSV; in a row whose baseline runs in a CUDA graph, ours does
    too.
    """
    rows = []
    for baseline, theirs in measured.items():
        if baseline.startswith("ours"):
            continue
        ours = measured["ours-graph" if baseline.endswith("-graph") else "ours"]
        (o20, o50, o80), (b20, b50, b80) = ours.p20_50_80, theirs.p20_50_80
        row = {
            "what": "op",
            "workload": name,
            "device": where["device"],
            "dtype": dtype,
            "mode": mode,
            "baseline": baseline,
            "ours_ms": o50,
            "baseline_ms": b50,
            "ratio": b50 / o50,
            "ours_peak_mb": ours.peak_mb,
            "baseline_peak_mb": theirs.peak_mb,
            "repeats": len(ours.times_ms),
            "losses": w.losses,
            **{k: getattr(w, k) for k in ("B", "Cs", "Ct", "K", "side")},
            "ours_p20_ms": o20,
            "ours_p80_ms": o80,
            "baseline_p20_ms": b20,
            "baseline_p80_ms": b80,
            "ours_launches": ours.launches,
            "baseline_launches": theirs.launches,
            **where,
        }
        rows.append({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})
    return rows


def kernel_rows(
    name: str, dtype: str, mode: str, measured: dict[str, Measured], where: dict[str, Any]
) -> list[dict[str, Any]]:
    """One row per contender and kernel, in the order of the launches; none where the kernels are not known."""
    return [
        {"workload": name, "dtype": dtype, "mode": mode, "kernel": kernel.name, "us": round(kernel.us, 3)}
        | {"count": kernel.count, "contender": contender}
        | {key: where[key] for key in ("machine", "torch", "commit", "date")}
        for contender, its in measured.items()
        for kernel in its.kernels or ()
    ]


def print_table(rows: list[dict[str, Any]]) -> None:
    """Milliseconds are medians with [p20 p80]; MB and launches as ours / baseline."""

    def ms(row: dict[str, Any], who: str) -> str:
        return f"{row[f'{who}_ms']:.3f} [{row[f'{who}_p20_ms']:.3f} {row[f'{who}_p80_ms']:.3f}]"

    def pair(row: dict[str, Any], what: str, form: str) -> str:
        values = [row[f"ours_{what}"], row[f"baseline_{what}"]]
        return " / ".join("-" if v is None else format(v, form) for v in values)

    header = ("workload", "sizes", "losses", "dtype", "mode", "baseline", "ours ms", "baseline ms", "ratio", "peak MB")
    lines = [(*header, "launches")]
    for row in rows:
        w = Workload(*(row[k] for k in ("B", "Cs", "Ct", "K", "side")))
        lines.append(
            (
                *(row["workload"], w.sizes, row["losses"], row["dtype"], row["mode"], row["baseline"]),
                *(ms(row, "ours"), ms(row, "baseline"), f"{row['ratio']:.2f}"),
                *(pair(row, "peak_mb", ".1f"), pair(row, "launches", "d")),
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def plot(path: pathlib.Path, rows: list[dict[str, Any]], sweep: str | None, device: str) -> None:
    """A sweep: milliseconds over K or B, a line per contender. Else: the ratio to each baseline, a bar per row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5 if sweep else 1.5 + 0.3 * len(rows)), layout="constrained")
    if sweep:
        dtypes = sorted({row["dtype"] for row in rows})
        for dtype in dtypes:
            mine = [row for row in rows if row["dtype"] == dtype]
            for baseline in dict.fromkeys(row["baseline"] for row in mine):
                its = [row for row in mine if row["baseline"] == baseline]
                axes.plot(
                    [r[sweep.upper()] for r in its], [r["baseline_ms"] for r in its], "o-", label=f"{baseline}, {dtype}"
                )
            graph = {r[sweep.upper()]: r["ours_ms"] for r in mine if not r["baseline"].endswith("-graph")}
            axes.plot(list(graph), list(graph.values()), "s--", label=f"ours, {dtype}")
        axes.set(xscale="log", yscale="log", xlabel={"k": "classes K", "b": "batch B"}[sweep], ylabel="ms per step")
        axes.legend()
    else:
        labels = [f"{r['workload']} {r['dtype']} {r['mode']}: {r['baseline']}" for r in rows]
        axes.barh(labels, [r["ratio"] for r in rows])
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.set_xlabel("baseline's time / ours (greater is better)")
    axes.set_title(f"fused head, {rows[0]['machine'] if rows else device}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


# --------------------------------------------------------------------------------------------------------------------
# command line


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="what", required=True)
    op = commands.add_parser(
        "op",
        help="connector_match and classifier_loss",
        description=(
            "Times one step of the fused head (milliseconds, MB = 1e6 bytes) against each baseline and "
            'prints a table; the last line is one JSON object {"rows": [...]} with ratio = baseline_ms / ours_ms.'
        ),
        epilog="workloads:\n"
        + "\n".join(f"  {k:12} {w.sizes}: {w.losses}" + _cpu_note(w) for k, w in WORKLOADS.items())
        + "\nbaselines:\n"
        + "\n".join(f"  {k:20}  {text}" for k, text in BASELINES.items())
        + (
            "\nlosses: ce cross-entropy; of the logits, which both sides compute of the teacher, sr squares, kl KL at "
            "temperature 4, hard the teacher's class, wttm, nkd, standardised-kl; fm pooled match, map map match"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    op.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one, else cpu")
    op.add_argument("--workloads", nargs="+", metavar="NAME", help="default: those of --shapes")
    op.add_argument(
        "--shapes",
        choices=("default", "small"),
        default="default",
        help="default: W* and I* on cuda, C* and M1 on cpu; small: few classes, small batches and maps (K*, L*, map*)",
    )
    op.add_argument(
        "--dtype", nargs="+", choices=tuple(DTYPES), help="default: bfloat16 on cuda, float32 bfloat16 on cpu"
    )
    op.add_argument(
        "--mode",
        choices=("forward", "both"),
        default="both",
        help="forward: without gradients; both: forward and backward (default)",
    )
    op.add_argument(
        "--baselines", nargs="+", choices=tuple(BASELINES), help="default: every one that runs here, see below"
    )
    op.add_argument(
        "--repeats", type=int, help="steps timed per contender, interleaved; default: 100 on cuda, 15 on cpu"
    )
    op.add_argument("--threads", type=int, nargs="+", help="CPU threads, one after the other; default: torch's choice")
    op.add_argument(
        "--sweep", choices=("k", "b"), help="instead of workloads: over K from 100 to 200,000, or over B at K 21841"
    )
    op.add_argument(
        "--stage",
        type=int,
        choices=(0, 1, 2),
        default=2,
        help="ours takes kernels up to this stage (GPU; default: all); below 2 the rows' mode says so",
    )
    records.add_save(op, "op.csv")
    op.add_argument(
        "--kernels",
        type=pathlib.Path,
        metavar="CSV",
        help="append every contender's kernels to this file: name, microseconds of a launch, launches (GPU)",
    )
    op.add_argument(
        "--host",
        action="store_true",
        help=f"instead of workloads: the host's part of a step, by tiny tensors on one CPU thread ({HOST_WORKLOADS}), "
        "float32, against eager; rows of mode 'host', and of 'host-one-call' for loss and gradients in one call",
    )
    op.add_argument("--plot", type=pathlib.Path, metavar="FILE", help="draw the rows into this file (.png, .svg, .pdf)")
    loader_benchmark.add_parser(commands)
    step_benchmark.add_parser(commands)
    views_benchmark.add_parser(commands)
    objective_benchmark.add_parser(commands)
    index_benchmark.add_parser(commands)
    stage_benchmark.add_parser(commands)
    kernel_model.add_parser(commands)
    return top


def _cpu_note(w: Workload) -> str:
    return f" (on a CPU B{w.cpu_B})" if w.cpu_B else ""


def chosen_workloads(
    names: list[str] | None, sweep: str | None, device: str, shapes: str = "default"
) -> dict[str, Workload]:
    """The workloads by the names their rows will bear."""
    base = Workload(256, 1024, 2048, 21841) if device == "cuda" else Workload(64, None, 512, 21841)
    if sweep == "k":
        return {f"sweep-K{K}": base._replace(K=K) for K in SWEEP_K}
    if sweep == "b":
        return {f"sweep-B{B}": base._replace(B=B) for B in SWEEP_B[device]}
    chosen = {}
    for name in names or (SMALL_WORKLOADS if shapes == "small" else DEFAULT_WORKLOADS[device]):
        if name not in WORKLOADS:
            raise Usage(f"--workloads: there is no {name!r}; choose from {', '.join(WORKLOADS)}")
        w = WORKLOADS[name]
        if device == "cpu" and w.cpu_B:
            name, w = f"{name}-B{w.cpu_B}", w._replace(B=w.cpu_B)
        chosen[name] = w
    return chosen


def run_host(args: argparse.Namespace) -> int:
    """The exit status: 1 if ours was wrong on any workload."""
    if args.workloads or args.sweep or args.threads or args.dtype or args.baselines or args.device == "cuda":
        raise Usage("--host brings its own workloads, float32 on one CPU thread, and eager: leave those options out")
    repeats = args.repeats if args.repeats is not None else 300
    if repeats < 1:
        raise Usage(f"--repeats must be at least 1, got {repeats}")
    records.check(args.save, JSON_KEYS + CSV_ONLY_KEYS)
    torch.set_num_threads(1)
    timer, rows, failed = Timer("cpu", HOST_STEPS), [], False
    for name in HOST_WORKLOADS:
        w = WORKLOADS[name]
        try:
            measured = measure(name, w, torch.float32, "cpu", "both", ["ours-one-call", "eager"], repeats, timer)
        except WrongResult as wrong:
            print(f"benchmark: refused to time {name}: {wrong}", file=sys.stderr)
            failed = True
            continue
        where = records.environment("cpu")
        for mode, ours in (("host", "ours"), ("host-one-call", "ours-one-call")):
            pair = {"ours": measured[ours], "eager": measured["eager"]}
            new = make_rows(name, w, "float32", mode, pair, where)
            records.append(args.save, JSON_KEYS + CSV_ONLY_KEYS, new)
            rows += new
    print_table(rows)
    print(json.dumps({"rows": [{k: row[k] for k in JSON_KEYS} for row in rows]}), flush=True)
    return int(failed)


def run_op(args: argparse.Namespace) -> int:
    """The exit status: 1 if ours was wrong or failed on any workload."""
    if args.host:
        return run_host(args)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise Usage("--device cuda: torch finds no GPU here; use --device cpu")
    dtypes = args.dtype or (["bfloat16"] if device == "cuda" else ["float32", "bfloat16"])
    if device == "cpu" and "float16" in dtypes:
        raise Usage("--dtype float16: float16 is for the GPU; use bfloat16 on a CPU")
    repeats = args.repeats if args.repeats is not None else 100 if device == "cuda" else 15
    if device == "cpu" and args.stage != 2:
        raise Usage("--stage is of a GPU's kernels: leave it out on a CPU")
    if repeats < 1:
        raise Usage(f"--repeats must be at least 1, got {repeats}")
    if (least := min(args.threads or [1])) < 1:
        raise Usage(f"--threads must be at least 1, got {least}")
    if args.sweep and args.workloads:
        raise Usage("--sweep brings its own workloads: leave --workloads out")
    if args.shapes != "default" and (args.workloads or args.sweep):
        raise Usage(f"--shapes {args.shapes} brings its own workloads: leave --workloads and --sweep out")
    records.check(args.save, JSON_KEYS + CSV_ONLY_KEYS)
    records.check(args.kernels, KERNEL_COLUMNS, "--kernels")
    if "float32" in dtypes:  # TF32 would give eager's convolution another precision than its linear layers, and ours
        torch.backends.cudnn.allow_tf32 = False
    workloads = chosen_workloads(args.workloads, args.sweep, device, args.shapes)
    if device == "cuda" and ops.load_libraries():
        torch.ops.ijckd.limit_stage(args.stage)
    timer, rows, failed = Timer(device), [], False
    for threads, dtype, name in itertools.product(args.threads or [torch.get_num_threads()], dtypes, workloads):
        torch.set_num_threads(threads)
        w = workloads[name]
        wanted = []
        for baseline in args.baselines or BASELINES:
            reason = absent(baseline, w, DTYPES[dtype], device, args.stage)
            if reason is None:
                wanted.append(baseline)
            elif args.baselines:
                print(f"{name}: {baseline} left out: {reason}", file=sys.stderr)
        try:
            measured = measure(name, w, DTYPES[dtype], device, args.mode, wanted, repeats, timer)
        except WrongResult as wrong:
            print(f"benchmark: refused to time {name} in {dtype}: {wrong}", file=sys.stderr)
            failed = True
            continue
        except RuntimeError as failure:  # the other workloads' rows are still worth having
            print(f"benchmark: {name} in {dtype} failed: {failure}", file=sys.stderr)
            failed = True
            continue
        where = records.environment(device)
        mode = args.mode if args.stage == 2 else f"{args.mode}, stage {args.stage}"
        new = make_rows(name, w, dtype, mode, measured, where)
        records.append(args.save, JSON_KEYS + CSV_ONLY_KEYS, new)
        records.append(args.kernels, KERNEL_COLUMNS, kernel_rows(name, dtype, mode, measured, where))
        rows += new
        print(f"{name} {dtype} {threads} threads done", file=sys.stderr, flush=True)
    print_table(rows)
    if args.plot:
        plot(args.plot, rows, args.sweep, device)
    print(json.dumps({"rows": [{k: row[k] for k in JSON_KEYS} for row in rows]}), flush=True)
    print(f"benchmark: {len(rows)} rows{'; see above for what FAILED' if failed else ''}", file=sys.stderr)
    return int(failed)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = parser().parse_args(argv)
    threads = torch.get_num_threads()
    try:
        if args.what == "loader":
            return loader_benchmark.run(args, records.environment(args.device))
        if args.what == "step":
            return step_benchmark.run(args, records.environment(args.device) | {"cpu": records.cpu_name()})
        if args.what == "views":
            return views_benchmark.run(args, records.environment(args.device))
        if args.what == "objectives":
            return objective_benchmark.run(args, records.environment(args.device))
        if args.what == "index":
            return index_benchmark.run(args, records.environment("cpu"))
        if args.what == "stages":
            return stage_benchmark.run(args, records.environment("cpu"))
        if args.what == "model":
            return kernel_model.run(args, WORKLOADS, records.environment("cpu"))
        return run_op(args)
    except (Usage, UserError) as usage:
        print(f"benchmark: {usage}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    sys.exit(main())
