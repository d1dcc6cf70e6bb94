"""What a run is made of, from its resolved settings: indexes, plans, loaders, nets, optimizer."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ijckd_fast import streams
from ijckd_fast.data import (
    EvalPlan,
    Index,
    Loader,
    Plan,
    TrainPlan,
    ViewPlan,
    backend_of,
    deliver,
    make_loader,
    refuse_backend,
)
from ijckd_fast.data.index import Scan
from ijckd_fast.distill import Distiller
from ijckd_fast.errors import UserError
from ijckd_fast.nets import CachedTeacher, Tapped, create_model, fold_batch_norm
from ijckd_fast.parallel import Processes
from ijckd_fast.teacher_cache import TeacherCache
from ijckd_fast.train.config import TrainConfig
from ijckd_fast.train.meters import Meter
from ijckd_fast.train.optimizer import build_optimizer
from ijckd_fast.train.resolving import (
    amp_dtype_of,
    augment_of,
    data_folder_of,
    normalisations_of,
    objective_of,
    teacher_view_of,
)
from ijckd_fast.train.state import RunState, seed_all
from ijckd_fast.train.step import TrainStep
from ijckd_fast.train.teacher_checks import refuse_restless_teacher, teacher_fingerprint

_BY_IMAGES = ("dali", "blocks")  # backends that leave no choice: what the one reads the other does not


@dataclass(frozen=True)
class RunData:
    """What a run reads, and how much of it.

    train, val   indexes; val has the classes of train
    cache        where the teacher's features come from; None where the teacher itself gives them
    plan         of this process's training batches
    total_steps  of the whole run; steps_per_epoch likewise
    """

    train: Index
    val: Index
    cache: TeacherCache | None
    plan: TrainPlan
    total_steps: int

    @property
    def steps_per_epoch(self) -> int:
        return self.plan.steps_per_epoch


def open_data(config: TrainConfig, processes: Processes) -> RunData:
    """Indexes, teacher cache and plan of a run; config is resolved.

    raises  UserError for settings that make no sense, unreadable data, other images on another machine, an unfit cache
    """
    augment = augment_of(config)  # what makes no sense is refused before a first scan, which may take minutes
    with processes.main_first():  # a first scan is made once, and kept
        train, val = build_indexes(config)
    refuse_other_images(config, processes.gather((train.hash, val.hash)))
    cache = open_cache(config, train)
    views = None if cache is None else cache.views
    plan = TrainPlan(train, augment, config.batch_size, config.seed, processes.rank, processes.world, views=views)
    for i, why in {} if cache is None else cache.unreadable.items():
        plan.stand_ins.add(i, why)
    total_steps = config.epochs * plan.steps_per_epoch
    if config.max_steps is not None:
        total_steps = min(total_steps, config.max_steps)
    return RunData(train, val, cache, plan, total_steps)


def build_indexes(config: TrainConfig) -> tuple[Index, Index]:
    """(train, val): val has the classes of train; train is cut down and mislabelled as the settings say."""
    scans = _scans(config, ("train", "val"))
    whole = next(scans).index
    refuse_backend(config.data_backend, whole.folder, whole.blocks is not None)
    val = next(scans).index
    return trained_on(config, whole), val


def trained_on(config: TrainConfig, whole: Index) -> Index:
    """Of all training images those that a run sees, mislabelled as its settings say."""
    return whole.subset(config.train_per_class, config.label_noise, config.seed, config.train_only)


def index_of(config: TrainConfig, split: Literal["train", "val"], classes: Sequence[str] | None = None) -> Index:
    """All images of a split, as the settings say; classes: those it must have, in the order of their labels."""
    return next(_scans(config, (split,), classes)).index


def _scans(config: TrainConfig, splits: Sequence[str], classes: Sequence[str] | None = None) -> Iterator[Scan]:
    return data_folder_of(config).scans(
        splits,
        classes,
        verify=config.index_verify,
        trust_folders=not config.check_files,
        progress=streams.shows_bars(),
        least_classes=2,
        ask_dali=config.data_backend in _BY_IMAGES,
    )


def refuse_other_images(config: TrainConfig, hashes: Sequence[tuple[str, str]]) -> None:
    """UserError unless all processes have the hashes (train, val) of the first; each machine may have a copy of the
    data.
    """
    for rank, theirs in enumerate(hashes):
        for split, mine, other in zip(("train", "val"), hashes[0], theirs, strict=True):
            if mine != other:
                raise UserError(
                    f"processes 0 and {rank} see different images in {config.data_dir}/{split}, wanted the same files "
                    f"on every machine: {data_folder_of(config).scanning} lists them; or give one shared folder"
                )


def build_val_loader(
    config: TrainConfig,
    index: Index,
    device: torch.device,
    processes: Processes = Processes(),  # noqa: B008 - frozen
    *,
    ids: np.ndarray | None = None,
    **more: Any,
) -> Loader:
    """This process's share of the images of `index`, or of those of `ids` [n] int64, each once over all processes, in
    order; may be iterated again and again.
    """
    plan = EvalPlan(index, augment_of(config), config.batch_size, processes.rank, processes.world, ids=ids)
    return _loader(config, plan, device, **more)


def build_view_loader(
    config: TrainConfig, index: Index, batches: Sequence[tuple[int, Sequence[int]]], device: torch.device, **more: Any
) -> Loader:
    """Given views of given training images, see ViewPlan; once."""
    plan = ViewPlan(index, augment_of(config), batches, config.batch_size, config.seed)
    return _loader(config, plan, device, **more)


def build_train_loader(config: TrainConfig, data: RunData, device: torch.device, *, start: int, **more: Any) -> Loader:
    """This process's training batches from step `start` to the last."""
    return _loader(config, data.plan, device, start=start, stop=data.total_steps, **more)


def _loader(config: TrainConfig, plan: Plan, device: torch.device, **more: Any) -> Loader:
    settings: dict[str, Any] = {
        "threads": config.workers,
        "prefetch": config.prefetch,
        "bad_limit": config.unreadable_limit,
        "channels_last": config.channels_last,
    }
    backend = backend_for(config, plan.index)
    if backend == "dali":
        settings |= {"decode": config.decode, "hw_decoder_load": config.hw_decoder_load}
    elif backend == "blocks":
        settings["blocks_on"] = config.blocks_on
    return make_loader(backend, plan, device=device, **settings, **more)


def backend_for(config: TrainConfig, index: Index) -> str:
    """What decodes the images of a split.

    The training images choose between dali and blocks, see open_data; a validation split that is no block pack where
    they are one, or the other way round, is read by the other, and so are other images that a run is evaluated on.
    """
    if config.data_backend in _BY_IMAGES:
        return backend_of(index.blocks is not None)
    return config.data_backend


def build_teacher(config: TrainConfig, num_classes: int) -> Tapped | CachedTeacher | None:
    """The teacher on the CPU: of a cache the classifier alone; None for none."""
    if config.teacher is None:
        return None
    if config.teacher_cache is not None:
        return TeacherCache(config.teacher_cache).teacher()
    teacher = create_model(
        config.teacher,
        num_classes,
        checkpoint=config.teacher_checkpoint,
        weights=config.teacher_weights,
        rename_by_order=config.rename_by_order,
        pretrained=config.teacher_pretrained,
        image_size=config.image_size,
        stages=config.teacher_stages,
    )
    teacher.renormalise(*normalisations_of(config))
    return teacher


def build_distiller(config: TrainConfig, num_classes: int, device: torch.device) -> Distiller:
    """Teacher and student on `device`. The student's first weights depend on the seed alone, not on teacher or
    objective.
    """
    teacher = build_teacher(config, num_classes)
    random.seed(config.seed)
    np.random.seed(config.seed)  # noqa: NPY002 - for third-party nets that draw from it
    torch.manual_seed(config.seed)
    student = create_model(
        config.student,
        num_classes,
        checkpoint=config.student_checkpoint,
        weights=config.student_weights,
        rename_by_order=config.rename_by_order,
        pretrained=config.student_pretrained,
        image_size=config.image_size,
        stages=config.student_stages,
        drop_path=config.drop_path,
    )
    distiller = Distiller(
        student, teacher, objective_of(config), label_smoothing=config.label_smoothing, head=config.head
    )
    if config.channels_last:
        distiller.to(memory_format=torch.channels_last)
    return distiller.to(device)


def prepare(config: TrainConfig, distiller: Distiller, processes: Processes) -> None:
    """Makes the nets ready to train as the settings say, after what is asked of them as they were built: statistics of
    BatchNorm over all processes, the teacher's BatchNorm folded, compilation.
    """
    teacher = distiller.teacher
    if isinstance(teacher, Tapped):
        refuse_restless_teacher(teacher, config.image_size)
    if config.sync_bn and processes.group is not None:
        distiller.synchronise(processes.group)
    if isinstance(teacher, Tapped) and config.fold_teacher:
        images = torch.rand(2, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(0))
        with torch.backends.cudnn.flags(
            enabled=True, allow_tf32=False
        ):  # whose rounding would look like a wrong formula
            fold_batch_norm(teacher.net, images.to(next(teacher.parameters()).device))
    if config.compile:
        # what an earlier run of this process compiled is taken again without a look at the hooks of the layers
        torch.compiler.reset()
        distiller.student.net.compile()
        if distiller.connector is not None:
            distiller.connector.trunk.compile()
        if isinstance(teacher, Tapped):
            teacher.net.compile()


def optimizer_of(config: TrainConfig, learner: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer that a resolved config names, over every parameter of `learner`."""
    return build_optimizer(
        learner,
        name=config.optimizer,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        betas=config.betas,
        weight_decay=config.weight_decay,
        decay_norms=config.decay_norms,
    )


def open_cache(config: TrainConfig, index: Index) -> TeacherCache | None:
    """The cache the teacher's features come from; None where the teacher itself gives them. config is resolved.

    raises UserError: the cache is damaged, or is not of this teacher, these training images or these settings. Teachers
    are
           compared by name; by their weights where --teacher-checkpoint is given too
    """
    if config.teacher_cache is None:
        return None
    cache = TeacherCache(config.teacher_cache)
    if config.teacher != cache.name:
        raise UserError(
            f"{cache.path} is a cache of {cache.name}, wanted of {config.teacher}: leave out "
            f"--teacher, or make a cache "
            "of that one"
        )
    if config.teacher_pretrained and not cache.published:
        raise UserError(
            f"{cache.path} is not a cache of the published weights of {cache.name}, which --teacher-pretrained wants: "
            "leave that out (--no-teacher-pretrained), or make a cache of them"
        )
    if config.teacher_checkpoint is not None:
        itself = build_teacher(dataclasses.replace(config, teacher_cache=None), index.num_classes)
        assert itself is not None
        if teacher_fingerprint(itself) != cache.fingerprint:
            raise UserError(
                f"{cache.path} is a cache of other weights of {cache.name} than those in {config.teacher_checkpoint}: "
                "leave out --teacher-checkpoint, or make a cache of that one"
            )
    cache.check(index, teacher_view_of(config), config.seed, config.data_backend)
    return cache


def cached_features(cache: TeacherCache, loader: Loader, device: torch.device) -> Tensor:
    """[B, Ct] float32 on `device`: the teacher's pooled features of the batch that `loader` handed over last."""
    batch = loader.followed
    assert batch is not None
    assert batch.view is not None
    return deliver(cache.pooled(batch.ids, batch.view), device)


def set_up_torch(config: TrainConfig) -> None:
    """Deterministic algorithms or the fastest ones, for this process."""
    # the call imports the compiler, which takes seconds
    if config.deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.benchmark = not config.deterministic


def begin_state(
    config: TrainConfig,
    data: RunData,
    distiller: Distiller,
    inputs: Mapping[str, str | None],
    device: torch.device,
    processes: Processes,
) -> RunState:
    """The state before the first step; inputs as `teacher_checks.digests` gives them."""
    optimizer = optimizer_of(config, distiller)
    update = TrainStep(
        distiller,
        optimizer,
        device,
        amp_dtype=amp_dtype_of(config),
        accumulate=config.accumulate,
        clip=config.clip_grad,
        ema_decay=config.ema_decay,
        processes=processes,
        cuda_graph=config.cuda_graph,
    )
    if processes.rank:  # dropout and the like; rank 0 keeps the numbers that one process alone would have
        seed_all(config.seed, processes.rank)
    meter = Meter(device, processes)
    return RunState(config, data.train.classes, inputs, distiller, optimizer, update, meter, processes)
