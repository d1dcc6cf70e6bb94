"""What the search tries: configurations of the head's ops, the inputs they stand for, and the named hard ones.

A configuration and a seed give the same inputs everywhere; its repr is the call that makes it, defaults left out.
"""

import dataclasses
import random
from typing import Any

import torch
from torch import Tensor

from ijckd_fast.head import classifier_gram

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
# What is stored: (z or u and what belongs to it, the frozen classifier); autocast is bfloat16 around float32.
STORED = {
    "float64": (F64, F64),
    "float32": (F32, F32),
    "bfloat16": (F32, BF16),  # as connectors leave z
    "bfloat16 z": (BF16, BF16),
    "float16": (F32, torch.float16),
    "autocast": (F32, F32),
}


class Named:
    def __repr__(self) -> str:
        fields = ((f, getattr(self, f.name)) for f in dataclasses.fields(self))  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{f.name}={v!r}' for f, v in fields if v != f.default)})"


@dataclasses.dataclass(frozen=True, repr=False)
class Loss(Named):
    """A call of classifier_loss, or of projected_classifier_loss where Cs is not 0."""

    dtype: str = "float32"
    B: int = 24
    K: int = 40
    Ct: int = 16
    Cs: int = 0
    ce: float = 0.0
    sr: float = 0.0
    fm: float = 0.0
    kl: float = 0.0
    temperature: float = 4.0
    label_smoothing: float = 0.0
    labels: str = "random"  # best, worst: by z's own logits
    share: float | None = None  # of `labels` in the target; -1: each row its own
    labels_b: str = "random"
    logits: float = 5.0  # z's largest, without the bias
    features: str = "normal"  # class: along one class's row, as trained ones
    apart: float = 0.3  # |z - pooled_t| / |pooled_t|; 0: equal
    direction: str = "any"  # avoiding: of z - pooled_t, without W's largest singular vector
    weight: str = "normal"  # large row: 1e4 times the others; common: all rows share a vector of 300 times their size
    bias: float | None = 0.0  # shared by all classes, beside a random one; None: no bias
    first_bias: float = 0.0  # of class 0 alone
    teacher: str = "pooled"  # logits, both: logits_t that pooled_t would not give
    logits_t: str = "float32"  # its dtype
    gram: bool = False  # given, as a GPU takes it
    layout: str = "plain"  # strided, transposed, expanded


@dataclasses.dataclass(frozen=True, repr=False)
class Connector(Named):
    """A call of connector_match."""

    dtype: str = "float32"
    shape: tuple[int, ...] = (6, 8, 5, 5)  # of u
    Ct: int = 12
    norm: str = "train"  # eval (BatchNorm), bias, none
    match: str | None = "map"  # pooled
    relu: bool = True
    mean: float = 0.0  # of every channel before BatchNorm, whose values deviate by about 1
    layout: str = "NCHW"  # channels-last, strided, transposed, expanded


def laid_out(x: Tensor, layout: str) -> Tensor:
    """x in another layout; expanded: its first entry for all."""
    if layout == "strided":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan") if x.is_floating_point() else -1)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded":
        return x[:1].expand_as(x)
    if layout == "channels-last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 1.0


def classifier_of(c: Loss, randn) -> Tensor:
    """[K, Ct] float64, whose values every dtype of the configuration has"""
    weight = randn(c.K, c.Ct) / c.Ct**0.5
    if c.weight == "large row":
        weight[0] *= 1e4
    elif c.weight == "common":
        weight += 300 * unit(randn(1, c.Ct))
    return weight.to(BF16 if c.dtype == "autocast" else STORED[c.dtype][1]).double()


def loss_inputs(c: Loss, seed: int) -> tuple[list[Tensor | None], list[Any], dict[str, Any]]:
    """(what is trained: z, or u, projection and its bias; weight, bias, labels; keywords), with their layouts"""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=F64)

    own, frozen = STORED[c.dtype]
    weight = classifier_of(c, randn)
    bias = None
    if c.bias is not None:
        bias = randn(c.K) + c.bias
        bias[0] += c.first_bias
        bias = bias.to(BF16 if c.dtype == "autocast" else frozen).double()
    if c.features == "class":
        z = unit(weight)[torch.randint(0, c.K, (c.B,), generator=g)] + 0.05 * unit(randn(c.B, c.Ct))
    else:
        z = randn(c.B, c.Ct)
    # not the same in every batch: eager might round that one well
    logits = c.logits * (0.7 + 0.3 * torch.rand(1, generator=g, dtype=F64).item())
    trained: list[Tensor | None] = []
    if c.Cs:
        u, projection = randn(c.B, c.Cs), randn(c.Ct, c.Cs) / c.Cs**0.5
        projection *= logits / largest(u @ projection.T @ weight.T)
        half = F32 if c.dtype == "autocast" else STORED[c.dtype][1]
        if c.dtype == "autocast":  # what autocast rounds would otherwise be the input's error, not the op's
            u, projection = u.to(BF16), projection.to(BF16)
        trained = [u.to(half), projection.to(half), (0.1 * randn(c.Ct)).to(own)]
        z = trained[0].double() @ trained[1].double().T + trained[2].double()
    else:
        z = (z * logits / largest(z @ weight.T)).to(own).double()
        trained = [z.to(own)]

    d = randn(c.B, c.Ct)
    if c.direction == "avoiding" and c.Ct > 1:
        v = torch.linalg.eigh(weight.T @ weight)[1][:, -1:]  # [Ct, 1]
        d -= d @ v @ v.T
    size = z.norm(dim=1, keepdim=True)
    if c.logits == 0:
        pooled_t = unit(d)
    elif c.apart == 0:
        pooled_t = z
    else:
        pooled_t = z + c.apart * size * unit(d) if c.apart <= 1 else size / c.apart * unit(d)
    pooled_t = pooled_t.to(own if c.dtype == "bfloat16 z" or c.dtype == "float64" else F32)

    logits = z @ weight.T + (0 if bias is None else bias)

    def labels_as(kind):
        drawn = torch.randint(0, c.K, (c.B,), generator=g)
        return {"random": drawn, "best": logits.argmax(1), "worst": logits.argmin(1)}[kind]

    keywords: dict[str, Any] = {p: getattr(c, p) for p in ("ce", "sr", "fm", "kl", "temperature", "label_smoothing")}
    labels = labels_as(c.labels)
    if c.share is not None:
        mix = torch.rand(c.B, generator=g, dtype=F64) if c.share < 0 else torch.full((c.B,), c.share, dtype=F64)
        keywords |= {"labels_b": labels_as(c.labels_b), "mix": mix.to(F64 if c.dtype == "float64" else F32)}
    if c.teacher != "logits" and (c.sr or c.fm or c.kl):
        keywords["pooled_t"] = pooled_t
    if c.teacher != "pooled":
        logits_t = pooled_t.double() @ weight.T + (0 if bias is None else bias)
        if c.teacher == "both":
            logits_t += 0.5 * randn(c.B, c.K)
        keywords["logits_t"] = logits_t.to(getattr(torch, c.logits_t))
    if c.gram:
        keywords["gram"] = classifier_gram(weight)
    # A layout of what is trained would change the inputs of the others, were it expanded: that is the teacher's alone.
    rest = [weight.to(frozen), None if bias is None else bias.to(frozen), labels]
    if c.layout != "plain":
        keywords = {
            k: laid_out(x, c.layout) if isinstance(x, Tensor) and k != "gram" else x for k, x in keywords.items()
        }
        if c.layout != "expanded":
            trained, rest = ([None if x is None else laid_out(x, c.layout) for x in xs] for xs in (trained, rest))
    return trained, rest, keywords


def connector_inputs(c: Connector, seed: int) -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
    """(what is trained, keywords, gradient of z)"""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=F64)

    acc = F64 if c.dtype == "float64" else F32
    stored = F32 if c.dtype == "autocast" else STORED[c.dtype][1]
    B, Cs, *side = c.shape
    weight = randn(c.Ct, Cs) / Cs**0.5
    weight += (1 - weight.sum(1, keepdim=True)) / Cs  # so that a mean of u is the mean of every channel
    if c.dtype == "autocast":
        weight = weight.to(BF16)
    if c.layout == "transposed":
        weight = weight.t().contiguous().t()
    elif side and c.layout != "channels-last":
        weight = weight[:, :, None, None]
    leaves = {"u": laid_out((randn(*c.shape) + c.mean).to(stored), c.layout), "weight": weight.to(stored)}
    keywords: dict[str, Any] = {"relu": c.relu}
    if c.norm in ("train", "eval"):
        leaves |= {"bn_weight": 1 + 0.3 * randn(c.Ct), "bn_bias": 0.3 * randn(c.Ct)}
        keywords |= {"training": c.norm == "train", "running_mean": c.mean + randn(c.Ct)}
        keywords["running_var"] = torch.rand(c.Ct, generator=g, dtype=F64) + 0.5
    elif c.norm == "bias":
        leaves["bias"] = randn(c.Ct)
    for some in (leaves, keywords):
        some |= {k: x.to(acc) for k, x in some.items() if isinstance(x, Tensor) and k not in ("u", "weight")}
    if c.match == "map":
        half = BF16 if c.dtype == "autocast" else stored  # which autocast makes of it, as a teacher under it does
        keywords["map_t"] = laid_out(randn(B, c.Ct, *side).relu().to(half).to(stored), c.layout)
    elif c.match == "pooled":
        keywords["pooled_t"] = laid_out(randn(B, c.Ct).abs().to(acc), "plain" if c.layout == "NCHW" else c.layout)
    return leaves, keywords, randn(B, c.Ct).to(acc)


def each(base: Any, **values: list[Any]) -> list[Any]:
    """`base` with every value of each field, one field after the other changing."""
    found = [base]
    for field, some in values.items():
        found = [dataclasses.replace(c, **{field: v}) for c in found for v in some]
    return found


HALF = ["float32", "bfloat16", "autocast"]
ALL = {"ce": 0.7, "sr": 0.5, "fm": 0.3, "kl": 0.9}
ONLY = {part: Loss(**{part: 0.8}) for part in ("ce", "sr", "fm", "kl")}
GRAM = Loss(B=32, K=1300, Ct=208, sr=1.0)  # what the CPU takes by W^T W in each dtype

HARD: dict[str, list[Any]] = {
    "terms alone": [c for one in ONLY.values() for c in each(one, dtype=[*HALF, "bfloat16 z"])],
    "all terms": each(Loss(**ALL), dtype=[*HALF, "bfloat16 z", "float64"], Cs=[0, 12]),
    "common bias": each(ONLY["kl"], bias=[1e3, 1e5, 1e7, 1e8], K=[2, 40], dtype=["float32"])
    + each(ONLY["kl"], bias=[1e3, 1e6], dtype=["bfloat16", "autocast"]),
    "one row, two classes, common bias": each(ONLY["kl"], B=[1], K=[2], bias=[1e3, 1e5, 1e7]),
    "common bias, every term": each(Loss(**ALL), bias=[1e4], dtype=HALF),
    "first class far ahead": each(ONLY["kl"], first_bias=[1e3, 1e8], K=[2, 40], dtype=["float32", "autocast"]),
    "one class": each(Loss(**ALL), K=[1], dtype=HALF),
    "two classes": each(Loss(**ALL), K=[2], dtype=HALF),
    "logits of 1e4, KL": each(ONLY["kl"], logits=[1e4], K=[1000], apart=[0.01, 0.3], dtype=HALF),
    "logits of 1e4, cross-entropy": each(ONLY["ce"], logits=[1e4], labels=["random", "best", "worst"], dtype=HALF),
    "trained-like logits": each(
        Loss(kl=1.0, features="class", logits=25.0, Ct=64, K=100), apart=[0.01, 0.1], temperature=[1.0, 4.0], dtype=HALF
    ),
    "confident": each(Loss(ce=1.0, features="class", logits=25.0, Ct=64, labels="best"), dtype=HALF),
    "temperatures": each(ONLY["kl"], temperature=[0.5, 1.0, 2.0, 20.0], dtype=["float32", "bfloat16"]),
    "z is pooled_t": each(Loss(sr=0.5, kl=0.9), apart=[0.0], dtype=HALF),
    "z near pooled_t": each(Loss(sr=0.5, kl=0.9), apart=[1e-4], dtype=HALF, Cs=[0, 12]),
    "z far from pooled_t": each(Loss(sr=0.5, kl=0.9), apart=[100.0], logits=[20.0, 300.0], dtype=HALF),
    "z far from pooled_t, many classes": each(
        Loss(kl=1.0, K=1000, Ct=64, temperature=1.0), apart=[100.0], logits=[300.0], dtype=HALF
    ),
    "logits_t": each(Loss(ce=0.7, sr=0.5, kl=0.9, teacher="logits"), dtype=HALF, logits_t=["float32", "bfloat16"]),
    "logits_t, z is 0": each(Loss(sr=0.5, kl=0.9, teacher="logits", logits=0.0), dtype=HALF),
    "logits_t beside bfloat16": each(Loss(sr=0.5, teacher="logits"), dtype=["bfloat16 z"], apart=[0.001], Cs=[0, 12]),
    "logits_t and pooled_t": each(Loss(**ALL, teacher="both"), dtype=HALF, Cs=[0, 12]),
    "logits_t and pooled_t, by W^T W": each(dataclasses.replace(GRAM, teacher="both"), dtype=["float32", "autocast"]),
    "feature match of 12,000 rows": each(Loss(B=12000, K=4, Ct=8, fm=1.0), dtype=["float32", "autocast"]),
    "sums of 12,000 rows": each(Loss(B=12000, K=6, Ct=8, Cs=4, ce=1.0, sr=1.0), dtype=["float32", "bfloat16"]),
    "many classes": each(Loss(B=96, K=12000, Ct=16, ce=1.0, label_smoothing=0.1), dtype=["float32", "bfloat16"]),
    "mixup with a small share": each(
        Loss(ce=1.0, features="class", logits=25.0, Ct=64, labels_b="best"), share=[1e-6, 1e-3], dtype=HALF
    ),
    "mixup with a small share, many classes": [
        Loss(B=96, K=12000, Ct=16, ce=1.0, features="class", logits=25.0, labels_b="best", share=1e-6)
    ],
    "mixup": each(ONLY["ce"], share=[1e-6, 0.3, 1.0, -1.0], label_smoothing=[0.0, 0.1]),
    "label smoothing": each(
        Loss(ce=0.8, logits=20.0), label_smoothing=[0.1, 1.0], labels=["best", "worst"], dtype=HALF
    ),
    "label smoothing, common bias": each(ONLY["ce"], label_smoothing=[0.1, 0.9], bias=[1e3, 1e5, 1e8]),
    "label smoothing, common bias, many classes": [Loss(B=96, K=12000, ce=1.0, label_smoothing=0.1, bias=1e4)],
    "by W^T W": each(GRAM, apart=[1e-4, 0.3], dtype=HALF),
    "by W^T W, one row far larger": each(
        dataclasses.replace(GRAM, weight="large row"), direction=["any", "avoiding"], dtype=HALF
    ),
    "by W^T W, rows share a vector": each(
        dataclasses.replace(GRAM, weight="common"), direction=["any", "avoiding"], dtype=HALF
    ),
    "rows share a vector": each(Loss(sr=0.5, kl=0.9, weight="common"), direction=["any", "avoiding"], dtype=HALF),
    "one row far larger": each(Loss(sr=0.5, kl=0.9, weight="large row", direction="avoiding"), dtype=HALF),
    "layouts": each(Loss(**ALL, share=-1.0), layout=["strided", "transposed", "expanded"], Cs=[0, 12], dtype=HALF),
    "odd sizes": [
        Loss(**ALL, B=b, K=k, Ct=ct, dtype=t, Cs=cs)
        for (b, k, ct, cs), t in zip(
            [(1, 1, 1, 0), (1, 3, 1, 1), (7, 37, 13, 0), (3, 65, 9, 5), (65, 129, 33, 0), (1, 257, 8, 3)],
            ["float32", "bfloat16", "autocast", "float32", "bfloat16", "autocast"],
            strict=True,
        )
    ],
    "connector": each(Connector(), norm=["train", "eval", "bias", "none"], match=["map", "pooled", None], dtype=HALF),
    "connector without ReLU": each(Connector(relu=False), norm=["train", "bias"], dtype=HALF),
    "connector, layouts": each(Connector(), layout=["channels-last", "strided", "transposed", "expanded"], dtype=HALF),
    "connector on vectors": each(
        Connector(shape=(37, 9), match="pooled"), norm=["train", "none"], relu=[True, False], dtype=HALF
    ),
    "linear connector of 12,000 vectors": each(
        Connector(shape=(12000, 6), Ct=8, norm="bias", relu=False),
        match=["pooled", "map"],
        dtype=["float32", "autocast"],
    ),
    "connector of 12,000 vectors": each(Connector(shape=(12000, 6), Ct=8), norm=["train", "bias"], match=["pooled"]),
    "maps of 112 x 112": each(
        Connector(shape=(2, 4, 112, 112), Ct=6), norm=["train", "bias"], match=["map", "pooled"], dtype=["float32"]
    ),
    "maps of 112 x 112, autocast": [Connector(shape=(2, 4, 112, 112), Ct=6, dtype="autocast")],
    "BatchNorm of a channel mean": each(Connector(shape=(8, 4, 28, 28)), mean=[10.0, 1e3, 1e5])
    + each(Connector(shape=(8, 4, 28, 28)), mean=[10.0, 1e3], dtype=["bfloat16", "autocast"]),
    "BatchNorm of a channel mean, running statistics": each(Connector(norm="eval"), mean=[10.0, 1e3, 1e5]),
    "odd maps": [
        Connector(shape=s, Ct=ct, dtype=t, norm=n)
        for s, ct, t, n in [
            ((1, 1, 1, 1), 1, "float32", "bias"),
            ((2, 3, 1, 1), 5, "bfloat16", "train"),
            ((1, 5, 7, 7), 3, "autocast", "train"),
            ((3, 1, 5, 9), 17, "float32", "train"),
        ]
    ],
}  # fmt: skip


# What the CUDA kernels have besides.
ON_A_GPU: dict[str, list[Any]] = {
    "float16": each(Loss(**ALL), dtype=["float16"], Cs=[0, 12], share=[None, -1.0], logits=[5.0, 100.0])
    + each(Connector(dtype="float16"), norm=["train", "bias"], match=["map", "pooled"]),
    "float16 terms alone": [c for one in ONLY.values() for c in each(one, dtype=["float16"], apart=[0.001, 0.3])],
    "gram given": each(
        Loss(B=16, K=130, Ct=16, sr=1.0, gram=True), apart=[1e-4, 0.3], dtype=["bfloat16", "autocast"], ce=[0.0, 0.5]
    ),
    "in tiles": each(
        Loss(**(ALL | {"kl": 0.0}), B=40, K=137, Ct=24), Cs=[0, 16], dtype=["bfloat16", "autocast"], gram=[False, True]
    )
    + each(Loss(**ALL, B=40, K=137, Ct=24), Cs=[0, 16], dtype=["bfloat16", "float16"], share=[None, -1.0]),
}


def drawn(number: int, *, on_a_gpu: bool = False) -> Loss | Connector:
    """The search's configuration of this number: hard values of every field, mixed at random."""
    r = random.Random(number)

    def often(usual, *others, share=0.6):
        return usual if r.random() < share else r.choice(others)

    dtype = r.choice([*HALF, "float16"] if on_a_gpu else HALF)
    if r.random() < 0.3:
        side = r.choice([1, 2, 3, 5, 7, 8, 14])
        norm = r.choice(["train", "train", "eval", "bias", "none"])
        batch_norm = norm in ("train", "eval")
        B, Cs = r.choice([2, 3, 6, 17]), r.choice([3, 8, 17])
        means = [10.0, 30.0] if dtype != "float32" else [10.0, 1e3, 1e5]
        return Connector(
            dtype=dtype,
            shape=(B * 40, Cs) if r.random() < 0.2 else (B, Cs, side, r.choice([side, side + 2])),
            Ct=r.choice([1, 5, 16, 33]),
            norm=norm,
            match=r.choice(["map", "pooled", None]),
            relu=r.random() < 0.7,
            mean=often(0.0, *means, share=0.5) if batch_norm else 0.0,
            layout=often("NCHW", "channels-last", "strided", "transposed", share=0.3),
        )
    # What all classes share, eager's half types round alike for every class, with it and without: right by luck.
    single = dtype == "float32"
    teacher = often("pooled", "logits", "both", share=0.5)
    terms = {part: r.choice([0.0, 0.3, 1.0]) for part in ("ce", "sr", "kl")}
    terms["fm"] = r.choice([0.0, 0.5]) if teacher != "logits" else 0.0
    if not any(terms.values()):
        terms["kl"] = 1.0
    K = r.choice([1, 2, 3, 10, 37, 100, 257, 1000])
    share = often(None, -1.0, 1e-6, 1e-3, 1.0)
    return Loss(
        dtype=dtype,
        B=r.choice([1, 2, 7, 24, 64]),
        K=K,
        Ct=r.choice([1, 3, 8, 16, 33, 64]),
        Cs=often(0, 3, 8, 17, share=0.7),
        **terms,
        temperature=r.choice([0.5, 1.0, 2.0, 4.0, 20.0]),
        label_smoothing=often(0.0, 0.1, 0.9) if K > 1 else 0.0,  # which is 1 with its rest to a rounding only
        labels=r.choice(["random", "best", "worst"]),
        share=share,
        labels_b=r.choice(["random", "best"]),
        logits=often(5.0, 0.1, 25.0, 300.0, 1e4, share=0.4),
        features=r.choice(["normal", "class"]),
        apart=often(0.3, 0.0, 1e-4, 1e-2, 3.0, 100.0, share=0.4),
        direction=r.choice(["any", "avoiding"]),
        weight=often("normal", "large row", *(["common"] if single else [])),
        bias=often(0.0, None, 30.0, *([1e3, 1e5, 1e8] if single else []), share=0.5),
        first_bias=often(0.0, 30.0, *([1e3, 1e8] if single else []), share=0.8),
        teacher=teacher,
        logits_t=often("float32", "bfloat16", "float64"),
        layout=often("plain", "strided", "transposed", "expanded"),
    )
