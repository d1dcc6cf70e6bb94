"""Settings as a run takes them: everything that was left to be chosen is filled in, what cannot be is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import Literal

import torch

from ijckd_fast import extras, files
from ijckd_fast.data import AFFINE_OFF, AUTO, Augment, DataFolder, backend_of, holds_blocks
from ijckd_fast.distill import PRESETS, Objective, get_objective
from ijckd_fast.errors import UserError, one_of
from ijckd_fast.head import REBUILD, load_libraries
from ijckd_fast.nets import published_normalisation
from ijckd_fast.normalisation import IMAGENET, Normalisation
from ijckd_fast.parallel import Processes, processes as distributed
from ijckd_fast.teacher_cache import TeacherCache
from ijckd_fast.train import run_folder
from ijckd_fast.train.config import (
    OBJECTIVE_FIELDS,
    TrainConfig,
    absolute_paths,
    default_eval_resize,
)
from ijckd_fast.train.layered import CACHE, weights_at
from ijckd_fast.train.mistakes import no_data_dir
from ijckd_fast.train.state import Saved


def resolve(config: TrainConfig) -> TrainConfig:
    """Fills in what was left to be chosen, so that config.yaml says all. UserError for impossible settings."""
    if not config.data_dir:
        raise no_data_dir()
    config = _named_by_path(_named_by_path(_named_by_cache(config), "teacher"), "student")
    if config.teacher is None and (config.teacher_mean or config.teacher_std):
        raise UserError("--teacher-mean and --teacher-std are a teacher's, got no --teacher: leave them out")
    has_weights = config.teacher_checkpoint is not None or config.teacher_pretrained or config.allow_weak_teacher
    if config.teacher is not None and not has_weights and config.teacher_cache is None:
        raise UserError(
            f"teacher {config.teacher} has no weights: give --teacher-checkpoint FILE, or --teacher-pretrained for the "
            "library's published ones"
        )
    for role in ("teacher", "student"):
        if getattr(config, f"{role}_weights") != "auto" and getattr(config, f"{role}_checkpoint") is None:
            raise UserError(
                f"--{role}-weights {getattr(config, f'{role}_weights')} says which weights of a file to take, and no"
                f" --{role}-checkpoint is given: give one, or leave it out"
            )
    objective = objective_of(config)
    if config.teacher_cache is not None:
        objective.refuse_cache(config.teacher_cache)
    objective.refuse_parts(config.accumulate)
    if config.log_bound and (objective.connector is None or config.teacher_cache is not None):
        found = (
            f"objective {objective.name!r}, which has no connector"
            if objective.connector is None
            else f"the cache {config.teacher_cache}, which has no features of the val images"
        )
        raise UserError(
            f"--log-bound compares the student's connected features with the teacher's on val, found {found}: leave it"
            f" out, or train by {one_of(name for name, o in PRESETS.items() if o.connector is not None)} with the "
            "teacher itself (--teacher NAME or RUN)"
        )
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda wanted, but torch finds no GPU here: see ijckd-fast doctor, or use --device cpu")
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and config.head == "fused" and not load_libraries():
        raise UserError(
            "the fused head needs the CUDA library on a GPU, but _C_cuda.so was not built: install nvcc and run "
            f"{REBUILD}, or use --device cpu, or --head reference"
        )
    amp_dtype = config.amp_dtype or ("bfloat16" if device == "cuda" else "float32")
    if amp_dtype == "float16" and device == "cpu":
        raise UserError("--amp-dtype float16 needs a GPU, got --device cpu: use bfloat16 or float32")
    world = distributed.world_size()
    if config.cuda_graph and (device != "cuda" or world > 1 or config.optimizer == "lamb"):
        raise UserError(
            f"--cuda-graph is for one GPU and sgd or adamw, got --device {device}, {world} processes and --optimizer "
            f"{config.optimizer}: leave it out"
        )
    global_batch = config.global_batch or config.batch_size * world
    if global_batch % world or (global_batch // world) % config.accumulate:
        raise UserError(
            f"the global batch of {global_batch} images cannot be shared out to {world} processes with --accumulate "
            f"{config.accumulate} in equal parts: wanted a multiple of {world * config.accumulate}"
        )
    if config.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise UserError(f"--wandb {config.wandb} needs the package: {extras.install('wandb')}, or leave it out")
    config = _normalised(config)
    cores = len(os.sched_getaffinity(0))
    return dataclasses.replace(
        absolute_paths(config),
        output_dir=config.output_dir or f"runs/{objective.name}-{config.student.replace('/', '-')}-seed{config.seed}",
        **{name: getattr(objective, name) for name in OBJECTIVE_FIELDS if name != "connector"},
        connector=objective.connector or "none",
        val_seed=data_folder_of(config).val_seed,
        eval_resize=config.eval_resize or default_eval_resize(config.image_size, config.crop_padding),
        workers=config.workers or (max(1, cores // distributed.local_world_size() - 1) if device == "cuda" else 2),
        device=device,
        amp_dtype=amp_dtype,
        global_batch=global_batch,
        batch_size=global_batch // world,
        data_backend=_backend_of_images(config) if config.data_backend == AUTO else config.data_backend,
    )


def _backend_of_images(config: TrainConfig) -> Literal["dali", "blocks"]:
    """What decodes the training images; where there are none, those of val."""
    root = Path(config.data_dir or "")
    return backend_of(holds_blocks(root, "train" if (root / "train").is_dir() else "val"))


def _named_by_cache(config: TrainConfig) -> TrainConfig:
    """Where the teacher is given as cache:FOLDER, or the folder alone is: the model that the cache is of, and the
    folder.
    """
    given, folder = config.teacher or "", config.teacher_cache
    if given.startswith(CACHE):
        if folder is not None:
            raise UserError(f"--teacher {given} is a cache and --teacher-cache {folder} is given too: leave out one")
        folder = os.path.expanduser(given.removeprefix(CACHE))
    elif given or folder is None:
        return config
    return dataclasses.replace(config, teacher=TeacherCache(folder).name, teacher_cache=folder)


def _named_by_path(config: TrainConfig, role: str) -> TrainConfig:
    """Where `role` (teacher or student) is a run's folder or checkpoint: the model that the run trained, and its
    weights.
    """
    given = getattr(config, role)
    if given is None:
        return config
    path = weights_at(given)
    if path is None:
        return config
    if getattr(config, f"{role}_checkpoint") is not None or getattr(config, f"{role}_pretrained"):
        raise UserError(
            f"--{role} {given} is a file with weights, and other weights for the {role} are given too: leave out one"
        )
    try:
        name = Saved.read(path).config["student"]
    except (files.Damaged, files.Unreadable):
        raise
    except UserError as error:
        raise UserError(f"{error}; weights from elsewhere need --{role} NAME --{role}-checkpoint {path}") from error
    return dataclasses.replace(config, **{role: name, f"{role}_checkpoint": str(path)})


def _normalised(config: TrainConfig) -> TrainConfig:
    """With mean and std of both nets' images filled in: what is not given is what the weights were made with."""
    mean, std = config.mean, config.std
    given = mean is not None or std is not None
    if mean is None or std is None:
        own = _own_normalisation(config.student, config.student_checkpoint, config.student_pretrained) or IMAGENET
        mean, std = mean or own.mean, std or own.std
    images = Normalisation(mean, std)
    if config.teacher is None:
        return dataclasses.replace(config, mean=mean, std=std)
    mean_t, std_t = config.teacher_mean, config.teacher_std
    if mean_t is None or std_t is None:
        if config.teacher_cache is not None:
            own_t: Normalisation | None = TeacherCache(config.teacher_cache).normalisation
        else:
            own_t = _own_normalisation(
                config.teacher, config.teacher_checkpoint, config.teacher_pretrained, images if given else None
            )
        mean_t, std_t = mean_t or (own_t or images).mean, std_t or (own_t or images).std
    try:
        Normalisation(mean_t, std_t)
    except UserError as error:
        raise UserError(f"--teacher-mean and --teacher-std: {error}") from error
    return dataclasses.replace(config, mean=mean, std=std, teacher_mean=mean_t, teacher_std=std_t)


def _own_normalisation(
    name: str, checkpoint: str | None, pretrained: bool, of_other_files: Normalisation | None = None
) -> Normalisation | None:
    """What the images were like that a net's weights were made with; None where there are no weights, or no record.

    of_other_files  what files that are no run's checkpoint are taken to be made with; None: what the library says of
                    the net
    """
    if checkpoint is None:
        return published_normalisation(name) if pretrained else None
    try:
        run = Saved.read(checkpoint).config
    except UserError:  # weights from elsewhere; a file that cannot be read at all is refused where the net is built
        return of_other_files or published_normalisation(name, in_file=True)
    return Normalisation.of(run["mean"], run["std"])


def objective_of(config: TrainConfig) -> Objective:
    """The preset with the weights and heads that the settings change."""
    return get_objective(config.objective, **{name: getattr(config, name) for name in OBJECTIVE_FIELDS})


def device_of(config: TrainConfig, processes: Processes) -> torch.device:
    """This process's device; config is resolved."""
    return torch.device("cuda", processes.local_rank) if config.device == "cuda" else torch.device(config.device)


def amp_dtype_of(config: TrainConfig) -> torch.dtype | None:
    """What to autocast to; None for float32. config is resolved."""
    return {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[config.amp_dtype or "float32"]


def data_folder_of(config: TrainConfig) -> DataFolder:
    """The data folder with what the settings say of it. UserError for settings that do not go together."""
    folder = DataFolder.of(config)
    if folder.val_fraction is None or folder.val_seed is not None:
        return folder
    return dataclasses.replace(folder, val_seed=config.seed)


def augment_of(config: TrainConfig) -> Augment:
    """How images become input; config is resolved."""
    assert config.eval_resize is not None
    assert config.mean is not None
    assert config.std is not None
    return Augment(
        image_size=config.image_size,
        scale=config.scale,
        ratio=config.ratio,
        crop_padding=config.crop_padding,
        hflip=config.hflip,
        **{name: getattr(config, name) for name in AFFINE_OFF},
        eval_resize=config.eval_resize,
        mean=config.mean,
        std=config.std,
        mixup=config.mixup,
        cutmix=config.cutmix,
        repeats=config.repeats,
        sizes=_progressive(config.sizes),
    )


def normalisations_of(config: TrainConfig) -> tuple[Normalisation, Normalisation]:
    """(of the student's images, of the teacher's), equal without a teacher; config is resolved."""
    assert config.mean is not None
    assert config.std is not None
    given = Normalisation(config.mean, config.std)
    if config.teacher_mean is None or config.teacher_std is None:
        return given, given
    return given, Normalisation(config.teacher_mean, config.teacher_std)


def teacher_view_of(config: TrainConfig) -> Augment:
    """`augment_of`, as the teacher sees the images: normalised as its weights expect. config is resolved."""
    own = normalisations_of(config)[1]
    return dataclasses.replace(augment_of(config), mean=own.mean, std=own.std)


def _progressive(sizes: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """('128@0', '192@30') -> ((0, 128), (30, 192))"""
    pairs = [text.split("@") for text in sizes]
    if not all(len(pair) == 2 and pair[0].isdecimal() and pair[1].isdecimal() for pair in pairs):
        raise UserError(f"--sizes must be PIXELS@EPOCH for every change, e.g. 128@0,192@30, got {','.join(sizes)}")
    return tuple((int(epoch), int(side)) for side, epoch in pairs)


def refuse_to_lose(folder: Path, config: TrainConfig, overwrite: bool) -> None:
    """UserError where a new run in `folder` would delete a run, or with `overwrite` the weights that it starts from."""
    if not overwrite:
        run_folder.refuse_occupied(folder)
        return
    for role, path in (("teacher", config.teacher_checkpoint), ("student", config.student_checkpoint)):
        if path is not None and folder.resolve() in Path(path).resolve().parents:
            raise UserError(
                f"--overwrite would delete the {role}'s weights {path}, which are in the --output-dir: choose another"
            )
