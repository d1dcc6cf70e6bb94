"""`benchmark.py step`: images a second of the whole training step, loader included, against the same written by hand in
PyTorch, and where the time of a step goes.

Contenders take turns of a few steps each, so a slow minute of the machine hits all alike. In a turn the first steps, in
which the loader's queue fills up, are not timed, and a loader works only in its contender's turns. Nothing is timed
before it is checked: from the same weights every contender must find the same loss and gradient norm on the same batch.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import itertools
import json
import math
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import loader_benchmark
import records
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijckd_fast.errors import UserError

if TYPE_CHECKING:
    from ijckd_fast.data import Batch, TrainPlan

# What needs more packages than torch is imported where it is used: the other half of benchmark.py must run without.


class Pair(NamedTuple):
    """Names of the nets as --teacher and --student take them, classes K (more if the data has more), side of the images
    in pixels.
    """

    teacher: str
    student: str
    classes: int
    image_size: int


PAIRS = {
    "r34-r18": Pair("torchvision/resnet34", "torchvision/resnet18", 1000, 224),
    "r50-mv1": Pair("torchvision/resnet50", "mobilenet_v1", 1000, 224),
    "tiny": Pair("resnet8x0.5", "resnet8x0.25", 10, 32),
}
OURS = {
    "ours": "the trainer's own parts, as ijckd-fast train runs them",
    "ours-graph": "the same with --cuda-graph (GPU)",
    "ours-compile": "the same with --compile",
    "ours-cache": "the same with a teacher cache of one view (--objective ijckd-pooled; K is then the data's)",
}
BASELINES = {
    "eager-fp32": "IJCKD as one writes it by hand: torchvision's nets, transforms and ImageFolder, float32, NCHW",
    "eager-channels-last": "the same with channels_last, a fused optimizer and pinned memory, in float32",
    "eager-autocast": "the same under autocast to bfloat16",
    "eager-compile": "eager-autocast (eager-channels-last if ours computes in float32), forward and losses "
    "through torch.compile",
}
DTYPES = {"float32": None, "bfloat16": torch.bfloat16}

# steps of a turn, and one for each thread: a DataLoader's workers hand over a batch each, all at about the same time
UNTIMED = 4
LR = 0.01  # random labels and a random teacher are no reason to diverge
LOG_INTERVAL = 50  # steps between two waits for the loss

JSON_KEYS = (
    "what", "workload", "device", "dtype", "mode", "baseline", "ours_ms", "baseline_ms", "ratio", "ours_peak_mb",
    "baseline_peak_mb", "repeats",
)  # fmt: skip
COLUMNS = (
    *JSON_KEYS, "ours_images_per_s", "ours_images_per_s_p20", "ours_images_per_s_p80", "baseline_images_per_s",
    "baseline_images_per_s_p20", "baseline_images_per_s_p80", "baseline_dtype", "loader_wait_percent",
    "share_percent", "gflop",
    "gflop_per_s", "objective", "batch", "image_size", "threads", "data_backend", "baseline_loader", "images", "steps",
    "baseline_steps", "machine", "cpu", "torch", "cuda", "torchvision", "dali", "pillow", "python", "commit", "date",
)  # fmt: skip


class WrongStep(Exception):
    """A contender's loss or gradient is not that of the step that all of them are to compute."""


class Setting(NamedTuple):
    """What all contenders of a pair share.

    root     folder with train/<class>/*
    weights  folder with teacher.pt and student.pt, in the nets' own names
    classes  K
    """

    pair: Pair
    objective: str
    batch: int
    image_size: int
    threads: int
    device: str
    amp_dtype: str
    data_backend: str
    root: pathlib.Path
    weights: pathlib.Path
    plan: TrainPlan
    classes: int


class Figures(NamedTuple):
    """Of one step: loss, L2 norm of the whole gradient."""

    loss: float
    grad_norm: float


# Relative. In float32 sums are taken in another order and the teacher's BatchNorm is folded, which moves the loss by
# 1e-6, and a ReLU near 0 that switches moves the gradient by up to 1e-4; a missing or wrongly weighted term moves
# either by more than 1e-3. bfloat16 keeps 8 bits, and every layer of two nets rounds to them.
TOLERANCE = {"float32": Figures(1e-3, 1e-3), "bfloat16": Figures(0.02, 0.05)}


class Turn(NamedTuple):
    """Timed steps, milliseconds a step by the wall clock, share of them spent waiting for the loader, most megabytes of
    the GPU above what the contenders hold between steps (None: not measured).
    """

    steps: int
    ms: float
    wait_percent: float
    peak_mb: float | None


# --------------------------------------------------------------------------------------------------------------------
# contenders: batches() is their loader, step(batch) their update


class Ours:
    """What `ijckd-fast train` is made of, put together as its loop does."""

    def __init__(
        self,
        setting: Setting,
        amp_dtype: str,
        *,
        cuda_graph: bool = False,
        compiled: bool = False,
        cache: pathlib.Path | None = None,
    ) -> None:
        from ijckd_fast.nets import Tapped, macs
        from ijckd_fast.parallel import Processes
        from ijckd_fast.teacher_cache import TeacherCache
        from ijckd_fast.train import Meter, TrainConfig, TrainStep, amp_dtype_of, build_distiller, optimizer_of, resolve
        from ijckd_fast.train.build import prepare

        self.setting, self.plan = setting, setting.plan
        checkpoint = str(setting.weights / "teacher.pt")
        self.config = config = resolve(
            TrainConfig(
                data_dir=str(setting.root),
                teacher=setting.pair.teacher if cache is None else f"cache:{cache}",
                teacher_checkpoint=checkpoint if cache is None else None,
                student=setting.pair.student,
                student_checkpoint=str(setting.weights / "student.pt"),
                objective=setting.objective,
                image_size=setting.image_size,
                batch_size=setting.batch,
                lr=LR,
                device=setting.device,
                amp_dtype=amp_dtype,
                workers=setting.threads,
                data_backend=setting.data_backend,
                cuda_graph=cuda_graph,
                compile=compiled,
                log_interval=LOG_INTERVAL,
            )
        )
        self.device, self.amp_dtype = torch.device(setting.device), amp_dtype_of(config)
        self.distiller = build_distiller(config, setting.classes, self.device)
        self._cache, self._loader = None if cache is None else TeacherCache(cache), None
        # before prepare: a compiled net would be compiled once more for the counting
        self.macs = {"student forward, backward": 3 * macs(self.distiller.student.net, setting.image_size)}
        if isinstance(self.distiller.teacher, Tapped):
            self.macs["teacher forward"] = macs(self.distiller.teacher.net, setting.image_size)
        prepare(config, self.distiller, Processes())
        optimizer = optimizer_of(config, self.distiller)
        self.train_step = TrainStep(
            self.distiller, optimizer, self.device, amp_dtype=self.amp_dtype, cuda_graph=cuda_graph
        )
        self.distiller.train()
        self._meter = Meter(self.device)
        self._steps = self.skipped = 0
        self._figures: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def batches(self) -> Iterator[Iterator[Batch]]:
        """The loader from the present step on."""
        from ijckd_fast.data import make_loader

        settings: dict[str, Any] = {"threads": self.config.workers, "prefetch": self.config.prefetch}
        if self.config.data_backend == "dali":
            settings |= {"decode": self.config.decode, "hw_decoder_load": self.config.hw_decoder_load}
        elif self.config.data_backend == "blocks":
            settings["blocks_on"] = self.config.blocks_on
        with make_loader(
            self.config.data_backend, self.plan, device=self.device, start=self._steps, **settings
        ) as loader:
            self._loader = loader
            yield iter(loader)
            self._loader = None

    def step(self, batch: Batch, pooled_t: Tensor | None = None) -> None:
        """One turn of the loop, its log included. pooled_t [B, Ct] where the batch is not the loader's: what a cache
        would hold.
        """
        from ijckd_fast.train import learning_rate
        from ijckd_fast.train.build import cached_features

        config = self.config
        if self._cache is not None and self._loader is not None:
            pooled_t = cached_features(self._cache, self._loader, self.device)
        lr = learning_rate(
            self._steps,
            steps_per_epoch=self.plan.steps_per_epoch,
            epochs=config.epochs,
            lr=config.lr,
            schedule=config.schedule,
            milestones=config.milestones,
            gamma=config.gamma,
            warmup_epochs=config.warmup_epochs,
        )
        progress = self._steps / self.plan.steps_per_epoch
        self._figures = self.train_step(batch, pooled_t, step=self._steps, lr=lr, progress=progress)
        self._steps += 1
        self._meter.add(self._figures)
        if self._steps % LOG_INTERVAL == 0:
            self.count_skipped()

    def count_skipped(self) -> int:
        """Steps so far that changed nothing, because loss or gradient was not finite."""
        self.skipped += self._meter.take()[1]
        return self.skipped

    def figures(self) -> Figures:
        """Of the last step."""
        return Figures(self._figures["loss"].item(), self._figures["grad_norm"].item())


def eager_loss(
    Z: Tensor, map_t: Tensor, classifier: nn.Linear, labels: Tensor, match: str
) -> Tensor:  # Z, map_t [B, Ct, H, W], labels [B] -> []
    """IJCKD's loss by hand: cross-entropy, logit match and feature match ('map' or 'pooled') of weight 1 each."""
    z, pooled_t = Z.mean((2, 3)), map_t.mean((2, 3))  # [B, Ct]
    logits, logits_t = classifier(z), classifier(pooled_t)  # [B, K]
    fm = F.mse_loss(Z, map_t) if match == "map" else F.mse_loss(z, pooled_t)
    return F.cross_entropy(logits, labels) + F.mse_loss(logits, logits_t) + fm


class Eager:
    """IJCKD by hand, without a line of ijckd_fast but for the nets that torchvision lacks.

    amp_dtype  of autocast; None: float32
    tuned      channels_last, fused optimizer, pinned memory; else none of them
    compiled   forward pass and loss through torch.compile
    connector  as many layers as ours, with the first weights of ours
    """

    def __init__(
        self,
        setting: Setting,
        amp_dtype: torch.dtype | None,
        connector: nn.Sequential,
        *,
        tuned: bool = True,
        compiled: bool = False,
    ) -> None:
        self.setting, self.amp_dtype = setting, amp_dtype
        self.device = torch.device(setting.device)
        self.match = "map" if setting.objective == "ijckd" else "pooled"
        teacher, student = (
            _by_hand(name, setting.classes, setting.weights / f"{role}.pt")
            for role, name in (("teacher", setting.pair.teacher), ("student", setting.pair.student))
        )
        self.classifier = teacher.fc.requires_grad_(False).to(self.device)
        layout = torch.channels_last if tuned else torch.contiguous_format
        self.layout = layout
        self.teacher = _to_map(teacher).eval().requires_grad_(False).to(self.device, memory_format=layout)
        self.student = _to_map(student).train().to(self.device, memory_format=layout)
        self.connector = connector.train().to(self.device, memory_format=layout)
        self.parameters = [*self.student.parameters(), *self.connector.parameters()]
        self.optimizer = torch.optim.SGD(
            self.parameters, LR, momentum=0.9, weight_decay=1e-4, fused=True if tuned else None
        )
        self.pinned = tuned and setting.device == "cuda"
        self.loss_of = torch.compile(self._loss_of, dynamic=False) if compiled else self._loss_of
        self._steps = 0
        self._loss = torch.zeros(())

    def _loss_of(self, images: Tensor, labels: Tensor) -> Tensor:  # [B, 3, S, S], [B] -> []
        with torch.no_grad():  # not inference_mode: the match's backward keeps the teacher's map
            map_t = self.teacher(images)  # [B, Ct, H, W]
        return eager_loss(self.connector(self.student(images)), map_t, self.classifier, labels, self.match)

    @contextlib.contextmanager
    def batches(self) -> Iterator[Iterator[Any]]:
        """The loader, shuffled; its workers end once the iterator is let go."""
        from torchvision import datasets, transforms

        s = self.setting
        if s.data_backend == "synthetic":
            yield itertools.repeat(fixed_batch(s.batch, s.image_size, s.classes, s.device, self.layout))
            return
        augment = s.plan.augment
        transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(augment.image_size, augment.scale, augment.ratio),
                transforms.RandomHorizontalFlip(augment.hflip),
                transforms.ToTensor(),
                transforms.Normalize(augment.mean, augment.std),
            ]
        )
        data = datasets.ImageFolder(str(s.root / "train"), transform)
        # epoch behind epoch: with shuffle=True the workers would stop, and leave their cores to the nets, before a turn
        # is over
        sampler = torch.utils.data.RandomSampler(data, num_samples=s.batch * 10**6)
        yield iter(
            torch.utils.data.DataLoader(
                data, s.batch, sampler=sampler, num_workers=s.threads, pin_memory=self.pinned, drop_last=True
            )
        )

    def step(self, batch: tuple[Tensor, Tensor]) -> None:
        """One update."""
        images, labels = batch
        images = images.to(self.device, non_blocking=self.pinned, memory_format=self.layout)
        labels = labels.to(self.device, non_blocking=self.pinned)
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, self.amp_dtype or torch.bfloat16, enabled=self.amp_dtype is not None):
            loss = self.loss_of(images, labels)
        loss.backward()
        self.optimizer.step()
        self._steps += 1
        self._loss = loss.detach()
        if self._steps % LOG_INTERVAL == 0:
            self._loss.item()

    def figures(self) -> Figures:
        """Of the last step, whose gradients are still there."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        return Figures(self._loss.item(), norm.item())


def _by_hand(name: str, classes: int, weights: pathlib.Path) -> Any:
    """The net, uncut, in plain PyTorch."""
    from torchvision.models import get_model

    from ijckd_fast.nets.cifar import SmallResNet
    from ijckd_fast.nets.mobilenet import MobileNetV1

    if name.startswith("torchvision/"):
        net = get_model(name.removeprefix("torchvision/"), weights=None, num_classes=classes)
    elif name == "mobilenet_v1":
        net = MobileNetV1(classes)
    else:
        depth, width = name.removeprefix("resnet").split("x")
        net = SmallResNet(int(depth), float(width), classes)
    net.load_state_dict(torch.load(weights, weights_only=True))
    return net


def _to_map(net: Any) -> nn.Sequential:
    """Its layers up to the map before the pooling: [B, 3, S, S] -> [B, C, H, W]."""
    if hasattr(net, "features"):
        return net.features
    stem = [net.conv1, net.bn1, nn.ReLU(inplace=True)]
    stages = [getattr(net, f"layer{i}") for i in range(1, 5) if hasattr(net, f"layer{i}")]
    return nn.Sequential(*stem, *([net.maxpool] if hasattr(net, "maxpool") else []), *stages)


def eager_connector(ours: Any) -> nn.Sequential:
    """The connector of ours in PyTorch's layers, with its present weights."""
    channels, channels_in = ours.weight.shape
    norm = nn.BatchNorm2d(channels)
    projection = nn.Conv2d(channels_in, channels, 1, bias=False)
    with torch.no_grad():
        projection.weight.copy_(ours.weight[:, :, None, None])
        norm.weight.copy_(ours.bn_weight)
        norm.bias.copy_(ours.bn_bias)
    trunk = [copy.deepcopy(layer).cpu() for layer in ours.trunk] if isinstance(ours.trunk, nn.Sequential) else []
    return nn.Sequential(*trunk, projection, norm, nn.ReLU(inplace=True))


def write_weights(folder: pathlib.Path, pair: Pair, classes: int, image_size: int) -> None:
    """folder/{teacher,student}.pt, random. The teacher's running statistics are those of a batch of noise: with none of
    its own a deep net without training answers with numbers in the thousands.
    """
    from ijckd_fast.nets import create_model

    torch.manual_seed(0)
    teacher, student = (create_model(name, classes, image_size=image_size) for name in (pair.teacher, pair.student))
    norms = [m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        teacher.train()(torch.randn(8, 3, image_size, image_size))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    torch.save(teacher.native_state_dict(), folder / "teacher.pt")
    torch.save(student.native_state_dict(), folder / "student.pt")


def make_contender(name: str, setting: Setting, connector: nn.Sequential) -> Ours | Eager:
    """The contender called `name`, with the first weights."""
    if name == "ours-cache":
        return Ours(with_views(setting), setting.amp_dtype, cache=written_cache(setting))
    if name in OURS:
        graph, compiled = name == "ours-graph", name == "ours-compile"
        return Ours(setting, setting.amp_dtype, cuda_graph=graph, compiled=compiled)
    amp = {"eager-autocast": torch.bfloat16, "eager-compile": DTYPES[setting.amp_dtype]}.get(name)
    tuned, compiled = name != "eager-fp32", name == "eager-compile"
    return Eager(setting, amp, copy.deepcopy(connector), tuned=tuned, compiled=compiled)


def with_views(setting: Setting) -> Setting:
    """The same with the plan of a cache of one view: the epochs show the same crops."""
    from ijckd_fast.data import TrainPlan

    plan = setting.plan
    return setting._replace(plan=TrainPlan(plan.index, plan.augment, plan.batch_size, plan.seed, views=1))


def written_cache(setting: Setting) -> pathlib.Path:
    """A cache of one view of the setting's teacher, made when it is first asked for."""
    from rich.console import Console

    from ijckd_fast.caching import make_cache
    from ijckd_fast.train import TrainConfig

    folder = setting.weights / "cache"
    if not folder.exists():
        config = TrainConfig(
            data_dir=str(setting.root),
            teacher=setting.pair.teacher,
            teacher_checkpoint=str(setting.weights / "teacher.pt"),
            allow_weak_teacher=True,
            image_size=setting.image_size,
            batch_size=setting.batch,
            device=setting.device,
            amp_dtype=setting.amp_dtype,
            workers=setting.threads,
            data_backend=setting.data_backend,
        )
        make_cache(config, folder, 1, verify=0, console=Console(quiet=True))
    return folder


def cached_pooled(setting: Setting, images: Tensor) -> Tensor:
    """[B, Ct] float32: what a cache would hold of images [B, 3, S, S]."""
    from ijckd_fast.nets import create_model

    checkpoint = setting.weights / "teacher.pt"
    teacher = create_model(setting.pair.teacher, setting.classes, checkpoint=checkpoint, image_size=setting.image_size)
    with torch.no_grad():
        return teacher.to(images.device).eval().features(images)[1].bfloat16().float()


def fixed_batch(
    batch: int, image_size: int, classes: int, device: str, layout: torch.memory_format
) -> tuple[Tensor, Tensor]:
    """images [B, 3, S, S] of noise, labels [B], the same at every call."""
    g = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, image_size, image_size, generator=g)
    labels = torch.randint(0, classes, (batch,), generator=g)
    return images.to(device, memory_format=layout), labels.to(device)


def step_on(images: Tensor, labels: Tensor, contender: Ours | Eager) -> Figures:
    """A step on images [B, 3, S, S] and labels [B]; waits for its figures."""
    from ijckd_fast.data import Batch

    if isinstance(contender, Ours):
        pooled_t = None if contender.config.teacher_cache is None else cached_pooled(contender.setting, images)
        contender.step(Batch(images, labels, torch.zeros_like(labels)), pooled_t)
    else:
        contender.step((images, labels))
    return contender.figures()


def check(name: str, found: Figures, wanted: Figures, tolerances: Figures) -> None:
    """WrongStep unless both figures are as near as a row of TOLERANCE says; NaN never is."""
    for what, mine, exact, tolerance in zip(("loss", "gradient norm"), found, wanted, tolerances, strict=True):
        if not abs(mine - exact) <= tolerance * abs(exact):
            raise WrongStep(
                f"{name}: {what} {mine:.6g} on the fixed batch, but eager-fp32 finds {exact:.6g}, and from the same "
                f"weights they may differ by {tolerance:g} of it"
            )


# --------------------------------------------------------------------------------------------------------------------
# measuring


def wait_for(device: str) -> None:
    """Returns when the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def take_turn(contender: Ours | Eager, untimed: int, steps: int) -> Turn:
    """`steps` steps, after `untimed` ones, with a loader of their own."""
    device = contender.setting.device
    cuda = device == "cuda"
    with contender.batches() as batches:
        for _ in range(untimed):
            contender.step(next(batches))
        wait_for(device)
        before = 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        waited, began = 0.0, time.perf_counter()
        for _ in range(steps):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            contender.step(batch)
        wait_for(device)
        seconds = time.perf_counter() - began
    graph = isinstance(contender, Ours) and contender.config.cuda_graph  # whose memory is its own, outside the count
    peak = (torch.cuda.max_memory_allocated() - before) / 1e6 if cuda and not graph else None
    return Turn(steps, 1e3 * seconds / steps, 100 * waited / seconds, peak)


class Pace(NamedTuple):
    """Untimed and timed steps of a turn, and the most turns a contender takes."""

    untimed: int
    steps: int
    turns: int


def pace_of(step_seconds: float, args: argparse.Namespace) -> Pace:
    """A turn has --steps steps, or what fits into --turn-seconds, and as much untimed before. One that does not get
    through a step in that time takes a single turn of one step.
    """
    fits = int(args.turn_seconds / step_seconds)
    if fits == 0:
        return Pace(1, 1, 1)
    return Pace(min(UNTIMED + args.threads, fits), min(args.steps, fits), args.repeats)


def measure(setting: Setting, names: list[str], args: argparse.Namespace) -> tuple[dict[str, list[Turn]], Ours]:
    """Checks every contender, then times them in turns: (turns by name, the contender 'ours'). WrongStep if one is
    wrong; a baseline that fails is left out, and said so.
    """
    s = setting
    fixed = fixed_batch(s.batch, s.image_size, s.classes, s.device, torch.channels_last)
    plain = Ours(setting, "float32")
    connector = eager_connector(plain.distiller.connector)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # whose rounding would look like a mistake
        exact = step_on(*fixed, Eager(setting, None, copy.deepcopy(connector), tuned=False))
        check("ours in float32", step_on(*fixed, plain), exact, TOLERANCE["float32"])
    del plain
    contenders: dict[str, Ours | Eager] = {}
    paces: dict[str, Pace] = {}
    for name in names:
        try:
            contender = make_contender(name, setting, connector)
            began = time.perf_counter()
            full = contender.amp_dtype is None and setting.device == "cpu"  # a GPU's float32 may be TF32
            full &= name != "ours-cache"  # which keeps the teacher's features in bfloat16
            check(name, step_on(*fixed, contender), exact, TOLERANCE["float32" if full else "bfloat16"])
            seconds = time.perf_counter() - began
            # the first step also compiles, chooses algorithms and makes workspaces, and so tells little, but for one
            # that is hopeless
            if seconds < 3 * args.turn_seconds or name.endswith(("-compile", "-graph")):
                step_on(*fixed, contender)
                began = time.perf_counter()
                step_on(*fixed, contender)
                seconds = time.perf_counter() - began
        except WrongStep:
            raise
        except Exception as failure:  # a baseline's own trouble (no compiler, out of memory) is not ours
            if name == "ours":
                raise
            first_line = (str(failure).strip() or type(failure).__name__).splitlines()[0]
            print(f"{name} left out: {type(failure).__name__}: {first_line}", file=sys.stderr)
            continue
        contenders[name], paces[name] = contender, pace_of(seconds, args)
        print(
            f"{name}: about {1e3 * seconds:.0f} ms a step, {paces[name].steps} steps a turn",
            file=sys.stderr,
            flush=True,
        )
    turns: dict[str, list[Turn]] = {name: [] for name in contenders}
    order = list(contenders)
    for repeat in range(args.repeats):
        for name in order:
            if repeat < paces[name].turns:
                turns[name].append(take_turn(contenders[name], paces[name].untimed, paces[name].steps))
        order.append(order.pop(0))  # nobody always runs behind the same neighbour
    for name, contender in contenders.items():
        if isinstance(contender, Ours) and (skipped := contender.count_skipped()):
            print(f"{name}: {skipped} steps were skipped, loss or gradient was not finite", file=sys.stderr)
    ours = contenders["ours"]
    assert isinstance(ours, Ours)
    return turns, ours


# --------------------------------------------------------------------------------------------------------------------
# the parts of a step


def parts_of(ours: Ours) -> dict[str, Callable[[], object]]:
    """What a step of ours consists of, each alone on tensors that lie ready; not the loader."""
    from ijckd_fast.distill import Needs, StudentSide, TeacherSide

    distiller = ours.distiller
    connector, student, teacher = distiller.connector, distiller.student, distiller.teacher
    assert connector is not None
    assert teacher is not None
    s, amp = ours.setting, ours.amp_dtype
    images, labels = fixed_batch(s.batch, s.image_size, s.classes, s.device, torch.channels_last)
    student_parameters, trunk_parameters = list(student.parameters()), list(connector.trunk.parameters())

    def autocast() -> torch.autocast:
        return torch.autocast(s.device, amp or torch.bfloat16, enabled=amp is not None)

    def teacher_forward() -> tuple[Tensor | None, Tensor]:
        with torch.no_grad(), autocast():
            return teacher.features(images, Needs.MAP_T in distiller.objective.needs)

    map_t, pooled_t = teacher_forward()  # [B, Ct, H, W] (None for ijckd-pooled), [B, Ct]
    with torch.no_grad(), autocast():
        map_s, _ = student.features(images, need_map=True)  # [B, Cs, H, W]
        assert map_s is not None
        u = connector.trunk(map_s.clone())  # [B, Cin, H, W]; the trunk may work in place
    gradient_map_s, gradient_u = torch.randn_like(map_s), torch.randn_like(u)
    leaf_s, leaf_u = map_s.requires_grad_(), u.requires_grad_()

    def student_both() -> object:
        with autocast():
            out, _ = student.features(images, need_map=True)
        return torch.autograd.grad(out, student_parameters, gradient_map_s)

    def trunk_both() -> object:
        with autocast():
            out = connector.trunk(leaf_s)
        return torch.autograd.grad(out, [leaf_s, *trunk_parameters], gradient_u)

    bare = copy.deepcopy(connector)
    bare.trunk = nn.Identity()
    head = copy.copy(distiller)  # the same step between nets that answer at once
    head.teacher_side = lambda *_: TeacherSide(map_t, pooled_t)

    def connected(
        _: Tensor, *, map_t: Tensor | None, pooled_t: Tensor | None, project: bool, with_map: bool
    ) -> StudentSide:
        """The student's side, from the trunk's output on: no logits of its own, no stages."""
        assert project
        assert not with_map
        z, fm = bare(leaf_u, map_t=map_t, pooled_t=pooled_t, head=distiller.head)
        return StudentSide(z, None, fm, None, ())

    head.student_side = connected
    head_leaves = [leaf_u, *bare.parameters()]

    def head_both() -> object:
        with autocast():
            loss = head(images, labels).loss
        return torch.autograd.grad(loss, head_leaves)

    guard = ours.train_step.guard
    for parameter in distiller.parameters():
        parameter.grad = torch.zeros_like(parameter)
    loss = torch.zeros((), device=s.device)

    def update() -> None:
        guard.before_forward()
        guard.update(guard.judge(loss)[0])
        if ours.train_step.ema is not None:
            ours.train_step.ema.update(1)

    return {
        "teacher forward": teacher_forward,
        "student forward, backward": student_both,
        "connector trunk": trunk_both,
        "head": head_both,
        "optimizer, guard": update,
    }


def measure_parts(ours: Ours, args: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds a step of every part alone, one figure for each repeat, the parts taking turns."""
    device = ours.setting.device

    def loader(n: int) -> float:
        with ours.batches() as batches:
            for _ in range(UNTIMED + ours.config.prefetch):
                next(batches)
            wait_for(device)
            began = time.perf_counter()
            for _ in range(n):
                next(batches)
            wait_for(device)
            return time.perf_counter() - began

    def calls_of(part: Callable[[], object]) -> Callable[[int], float]:
        def calls(n: int) -> float:
            wait_for(device)
            began = time.perf_counter()
            for _ in range(n):
                part()
            wait_for(device)
            return time.perf_counter() - began

        return calls

    runs = {"loader": loader, **{name: calls_of(part) for name, part in parts_of(ours).items()}}
    counts = {}
    for name, run in runs.items():
        run(1)
        counts[name] = max(1, min(args.steps, int(args.turn_seconds / max(run(1), 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, run in runs.items():
            times[name].append(1e3 * run(counts[name]) / counts[name])
    return times


REMEDIES = {
    "loader": "more decoding threads (--workers) where cores are idle, a pack of smaller images (ijckd-fast pack), "
    "on a GPU --decode "
    "hybrid or gpu",
    "teacher forward": "a teacher cache, which needs an objective on pooled features (ijckd-pooled), --amp-dtype "
    "bfloat16 where the "
    "hardware has it, --compile",
    "student forward, backward": "--amp-dtype bfloat16 where the hardware has it, --compile, more processes "
    "(torchrun), "
    "a smaller "
    "student",
    "connector trunk": "a narrower connector (--connector bottleneck:8) or none but the projection (conv1x1)",
    "head": "a larger --batch-size, which its fixed costs do not grow with; see that --head is fused",
    "optimizer, guard": "a larger --batch-size: an update costs the same for any",
}


def fix_first(parts: dict[str, float], device: str, wait_percent: float, ours_ms: dict[str, float]) -> str:
    """The sentence behind the report.

    parts         milliseconds of each alone
    wait_percent  of the whole step: how long the loop waited for the loader
    ours_ms       milliseconds of the whole step by 'ours' and its variants
    """
    from ijckd_fast.train.progress import DATA_BOUND_PERCENT

    largest = max(parts, key=lambda name: parts[name])
    # A GPU's host runs ahead and may wait for the loader while the device has work; on a CPU decoding takes the nets'
    # cores without a wait.
    bound = wait_percent > DATA_BOUND_PERCENT or largest == "loader"
    if device == "cuda":
        bound = parts["loader"] > 0.8 * ours_ms["ours"]
    if bound:
        share = 100 * parts["loader"] / sum(parts.values())
        why = f"{share:.0f} % of the sum, and {wait_percent:.0f} % of a step is waiting for it"
        return f"to fix first: the loader ({why}): {REMEDIES['loader']}"
    variant = min(ours_ms, key=lambda name: ours_ms[name])
    if ours_ms[variant] < 0.9 * ours_ms["ours"]:
        option = {"ours-graph": "--cuda-graph", "ours-compile": "--compile", "ours-cache": "--teacher cache:FOLDER"}[
            variant
        ]
        return (
            f"to fix first: {option}, with which a step takes {ours_ms[variant]:.1f} ms instead of "
            f"{ours_ms['ours']:.1f} ms"
        )
    nets = {name: ms for name, ms in parts.items() if name != "loader"}
    largest = max(nets, key=lambda name: nets[name])
    share = 100 * nets[largest] / sum(parts.values())
    return f"to fix first: {largest} ({share:.0f} % of the sum): {REMEDIES[largest]}"


# --------------------------------------------------------------------------------------------------------------------
# rows


def _p20_50_80(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return (values[0],) * 3
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


def _speeds(who: str, turns: list[Turn], batch: int) -> dict[str, float]:
    p20, p50, p80 = _p20_50_80([1e3 * batch / turn.ms for turn in turns])
    key = f"{who}_images_per_s"
    return {key: p50, f"{key}_p20": p20, f"{key}_p80": p80}


def _peak(turns: list[Turn]) -> float | None:
    return max((turn.peak_mb for turn in turns if turn.peak_mb is not None), default=None)


def _ms(turns: list[Turn]) -> float:
    return statistics.median(turn.ms for turn in turns)


def make_rows(
    turns: dict[str, list[Turn]],
    parts: dict[str, list[float]],
    macs: dict[str, int],
    common: dict[str, Any],
) -> list[dict[str, Any]]:
    """A row of every contender of ours against every baseline (what: step), and one of every part (what: step-part,
    against the whole).
    """
    batch = common["batch"]
    rows: list[dict[str, Any]] = []
    for mine, theirs in itertools.product((n for n in turns if n in OURS), (n for n in turns if n in BASELINES)):
        ours, baseline = turns[mine], turns[theirs]
        rows.append(
            common
            | {"what": "step", "mode": mine, "baseline": theirs, "ours_ms": _ms(ours), "baseline_ms": _ms(baseline)}
            | {"ratio": _ms(baseline) / _ms(ours), "ours_peak_mb": _peak(ours), "baseline_peak_mb": _peak(baseline)}
            | {"repeats": min(len(ours), len(baseline)), "steps": ours[0].steps, "baseline_steps": baseline[0].steps}
            | {"loader_wait_percent": statistics.median(turn.wait_percent for turn in ours)}
            | {"baseline_dtype": _dtype_of(theirs, common["dtype"])}
            | _speeds("ours", ours, batch)
            | _speeds("baseline", baseline, batch)
        )
    whole, alone = _ms(turns["ours"]), {name: statistics.median(times) for name, times in parts.items()}
    for name, ms in {**alone, "sum": sum(alone.values())}.items():
        gflop = 2e-9 * batch * macs[name] if name in macs else None
        rows.append(
            common
            | {"what": "step-part", "mode": name, "baseline": "whole step", "ours_ms": ms, "baseline_ms": whole}
            | {
                "ratio": whole / ms,
                "share_percent": 100 * ms / sum(alone.values()),
                "repeats": len(next(iter(parts.values()))),
            }
            | {"gflop": gflop, "gflop_per_s": None if gflop is None else 1e3 * gflop / ms, "baseline_loader": ""}
        )
    rounded = []
    for row in rows:
        whole_row = {key: row.get(key) for key in COLUMNS}
        rounded.append({k: round(v, 4) if isinstance(v, float) else v for k, v in whole_row.items()})
    return rounded


def _dtype_of(baseline: str, ours: str) -> str:
    return {"eager-autocast": "bfloat16", "eager-compile": ours}.get(baseline, "float32")


def print_report(rows: list[dict[str, Any]], wait_percent: float, last: str) -> None:
    """The contenders of one pair, then the parts of a step of ours."""
    first = rows[0]
    print(
        f"{first['workload']} {first['objective']}, batch {first['batch']} at {first['image_size']}, "
        f"{first['device']}, "
        f"{first['threads']} threads, ours in {first['dtype']} with {first['data_backend']}"
    )
    print(f"{'ours':13} {'baseline':20} {'its dtype':9} {'ours images/s [p20 p80]':26} {'baseline':26}  ratio  repeats")
    for r in (r for r in rows if r["what"] == "step"):
        ours, theirs = (
            f"{r[f'{who}_images_per_s']:8.1f} [{r[f'{who}_images_per_s_p20']:.1f} {r[f'{who}_images_per_s_p80']:.1f}]"
            for who in ("ours", "baseline")
        )
        print(
            f"{r['mode']:13} {r['baseline']:20} {r['baseline_dtype']:9} {ours:26} {theirs:26}  {r['ratio']:5.2f}  "
            f"{r['repeats']:7}"
        )
    print(f"\n{'part of a step, alone':26} {'ms':>9}  % of sum  {'GFLOP':>9}  GFLOP/s")
    parts = [r for r in rows if r["what"] == "step-part"]
    for r in parts:
        work = "" if r["gflop"] is None else f"{r['gflop']:9.2f}  {r['gflop_per_s']:7.0f}"
        print(f"{r['mode']:26} {r['ours_ms']:9.3f}  {r['share_percent']:8.1f}  {work}".rstrip())
    whole, together = parts[-1]["baseline_ms"], parts[-1]["ours_ms"]
    print(f"{'whole step':26} {whole:9.3f}  {wait_percent:.1f} % of it waiting for the loader")
    print(f"overlap: the parts take {together / whole:.2f} times as long one after the other as the whole step")
    print(last, flush=True)


# --------------------------------------------------------------------------------------------------------------------
# command line


def add_parser(commands: Any) -> None:
    """`benchmark.py step`."""
    parser = commands.add_parser(
        "step",
        help="the whole training step",
        description=(
            "Times training steps, loader included, against IJCKD written by hand in PyTorch, the "
            "contenders taking turns, then each part of a step alone. Prints both; the last line is one JSON object "
            '{"rows": [...]} with ratio = baseline_ms / ours_ms (milliseconds a step).'
        ),
        epilog="contenders:\n" + "\n".join(f"  {name:20} {text}" for name, text in {**OURS, **BASELINES}.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--pair", nargs="+", choices=tuple(PAIRS), default=["r34-r18"], help="teacher and student (default: r34-r18)"
    )
    parser.add_argument(
        "--objective",
        choices=("ijckd", "ijckd-pooled"),
        default="ijckd",
        help="map match, or pooled match (default: ijckd)",
    )
    parser.add_argument(
        "--contenders", nargs="+", choices=(*OURS, *BASELINES), help="default: every one that runs here"
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda if there is one",
    )
    parser.add_argument(
        "--amp-dtype", choices=tuple(DTYPES),
        help="of ours; default: bfloat16 on a GPU and on a CPU with instructions for it, else float32",
    )  # fmt: skip
    number = loader_benchmark.above
    parser.add_argument("--batch", type=number(1), help="images a step; default: 256 on a GPU, else 32")
    parser.add_argument("--image-size", type=number(7), help="default: the pair's own, 224 or 32 pixels")
    parser.add_argument(
        "--threads", type=number(0), default=len(os.sched_getaffinity(0)),
        help=(
            "decoding threads of ours, DataLoader workers of the baselines, and threads that the nets compute "
            "with; default: all cores"
        ),
    )  # fmt: skip
    parser.add_argument("--steps", type=number(0), default=50, help="timed steps of a turn, at most (default: 50)")
    parser.add_argument(
        "--turn-seconds",
        type=float,
        default=15.0,
        help="a turn has fewer steps where they would take longer (default: 15)",
    )
    parser.add_argument("--repeats", type=number(0), default=5, help="turns of each contender (default: 5)")
    parser.add_argument(
        "--data-dir",
        type=pathlib.Path,
        help="folder with train/<class>/* (default: ImageNet-like pictures are written for it)",
    )
    parser.add_argument("--images", type=number(0), default=2000, help="pictures to write where there is no --data-dir")
    parser.add_argument(
        "--data-backend", choices=("dali", "blocks", "pillow", "synthetic"), default="dali",
        help="loader of ours (default: dali); blocks: from a pack that is made of the pictures where there is no "
        "--data-dir; synthetic: one batch of noise for everybody, no file is opened",
    )  # fmt: skip
    records.add_save(parser, "step.csv")


def has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products; without them PyTorch makes do with slow ones."""
    with contextlib.suppress(OSError):
        flags = pathlib.Path("/proc/cpuinfo").read_text()
        return "avx512_bf16" in flags or "amx_bf16" in flags
    return False


def absent(name: str, device: str, objective: str) -> str | None:
    """Why a contender cannot run here, or None."""
    if name == "ours-cache" and objective != "ijckd-pooled":
        return "a cache has no maps: --objective ijckd-pooled"
    return "needs a GPU" if name == "ours-graph" and device == "cpu" else None


def run(args: argparse.Namespace, environment: dict[str, Any]) -> int:
    """Prints and saves the rows; the exit status: 1 if a contender computed something else."""
    names = _chosen(args)
    records.check(args.save, COLUMNS)
    from ijckd_fast.data import Augment, TrainPlan, build_index

    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True  # the trainer's setting, and everybody's who cares
    amp_dtype = args.amp_dtype or ("bfloat16" if args.device == "cuda" or has_bfloat16() else "float32")
    batch = args.batch or (256 if args.device == "cuda" else 32)
    rows: list[dict[str, Any]] = []
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        root = args.data_dir
        if root is None:
            root = pathlib.Path(folder, "photos")
            loader_benchmark.write_photos(root, max(args.images, math.ceil(batch / 0.9)))
        ours_from = root
        if args.data_backend == "blocks" and args.data_dir is None:
            from ijckd_fast.data.prepare import BlockPack, pack

            ours_from = pathlib.Path(folder, "blocks")
            pack(root, ours_from, BlockPack(), splits=("train",))
        index = build_index(ours_from, "train", verify="fast", cache_dir=pathlib.Path(folder, "index"))
        for pair_name in args.pair:
            pair = PAIRS[pair_name]
            size = args.image_size or pair.image_size
            # a cache is made from the data, whose classes its teacher must have
            classes = index.num_classes if "ours-cache" in names else max(pair.classes, index.num_classes)
            weights = pathlib.Path(folder, pair_name)
            weights.mkdir()
            write_weights(weights, pair, classes, size)
            plan = TrainPlan(index, Augment(image_size=size, eval_resize=size * 8 // 7), batch, seed=0)
            setting = Setting(
                pair, args.objective, batch, size, args.threads, args.device, amp_dtype, args.data_backend, root,
                weights, plan, classes
            )  # fmt: skip
            try:
                turns, ours = measure(setting, names, args)
            except WrongStep as wrong:
                print(f"benchmark: refused to time {pair_name}: {wrong}", file=sys.stderr)
                failed = True
                continue
            parts = measure_parts(ours, args)
            common = {
                **environment,
                **_versions(),
                "workload": pair_name,
                "device": args.device,
                "dtype": amp_dtype,
                "objective": args.objective,
                "batch": batch,
                "image_size": size,
                "threads": args.threads,
                "data_backend": args.data_backend,
                "baseline_loader": "synthetic" if args.data_backend == "synthetic" else "torchvision",
                "images": len(index),
            }
            mine = make_rows(turns, parts, ours.macs, common)
            rows += mine
            wait = statistics.median(turn.wait_percent for turn in turns["ours"])
            alone = {name: statistics.median(times) for name, times in parts.items()}
            whole = {name: _ms(its) for name, its in turns.items() if name in OURS}
            print_report(mine, wait, fix_first(alone, args.device, wait, whole))
            if args.device == "cpu" and not has_bfloat16() and "eager-autocast" in turns:
                print(
                    "this CPU has no instructions for bfloat16: the ratio to eager-autocast says what autocast costs "
                    "on "
                    "such a CPU, not what ijckd-fast gains; eager-channels-last is the baseline to compare with"
                )
            records.append(args.save, COLUMNS, mine)
            del ours
    print(json.dumps({"rows": [{key: row[key] for key in JSON_KEYS} for row in rows]}), flush=True)
    print(f"benchmark: {len(rows)} rows{'; see above for what FAILED' if failed else ''}", file=sys.stderr)
    return int(failed)


def _chosen(args: argparse.Namespace) -> list[str]:
    """The contenders to run, 'ours' first."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; use --device cpu")
    if args.turn_seconds <= 0:
        raise UserError(f"--turn-seconds must be above 0, got {args.turn_seconds:g}")
    for package in ("torchvision", "pyarrow", "rich", "yaml", "jsonargparse"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"benchmark.py step needs {package}, which is not installed: pip install {package}")
    names = []
    for name in args.contenders or (*OURS, *BASELINES):
        reason = absent(name, args.device, args.objective)
        if reason is None:
            names.append(name)
        elif args.contenders:
            print(f"{name} left out: {reason}", file=sys.stderr)
    if "ours" not in names or not BASELINES.keys() & set(names):
        raise UserError(
            f"--contenders must name ours and one of {', '.join(BASELINES)} at least, got {' '.join(args.contenders)}"
        )
    return sorted(dict.fromkeys(names), key=lambda name: name != "ours")


def _versions() -> dict[str, str]:
    import PIL
    import torchvision

    return {"torchvision": torchvision.__version__, "pillow": PIL.__version__, "dali": loader_benchmark.dali_version()}


if __name__ == "__main__":
    sys.exit("a part of benchmark.py: run scripts/benchmark.py step")
