"""How far the loader's pixels, and the answers of a net, are from Pillow's on a folder of images."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from ijckd_fast.data import parity
from ijckd_fast.data.prepare import PackLoss, pack_loss
from ijckd_fast.distill import Distiller
from ijckd_fast.errors import UserError
from ijckd_fast.nets import is_model_name
from ijckd_fast.train.build import build_distiller, index_of
from ijckd_fast.train.config import TrainConfig, default_eval_resize, make_config
from ijckd_fast.train.loaded_run import LoadedRun, load_run
from ijckd_fast.train.resolving import augment_of, resolve


class FolderParity(NamedTuple):
    """The folder that was compared, and of each split:

    compared  how far apart the pixels are
    losses    what packing has lost besides; None where the folder is no pack
    rows      the fields of both (PackLoss's as pack_..., None without a pack), drift, image_size, index (its hash),
              versions
    """

    data_dir: str
    compared: list[parity.Parity]
    losses: list[PackLoss | None]
    rows: list[dict[str, Any]]


def folder_parity(
    model: str | None = None,
    *,
    splits: Iterable[Literal["train", "val"]] = ("train", "val"),
    images: int = 256,
    **changes: Any,
) -> FolderParity:
    """Makes the same crops of the same images by the executor of such images and by Pillow, and compares them.

    model    a net to ask on both: folder or checkpoint of a run, or a model with published weights; None: pixels only
    images   crops of each split, at least 1
    changes  settings instead of the run's or the defaults, such as data_dir, device, image_size or decode; None changes
             nothing
    raises   UserError without DALI where it is needed, for a model that is neither, and where no image can be read
    """
    if images < 1:
        raise UserError(f"--images must be at least 1, got {images}")
    run = None if model is None or is_model_name(model) else _run(model, changes)
    config = _named(model, changes) if run is None else run.config
    classes: Sequence[str] | None = None if run is None else run.saved.classes
    distiller: Distiller | None = None
    found = FolderParity(config.data_dir, [], [], [])
    for split in splits:
        index = index_of(config, split, classes)
        classes = index.classes
        if run is not None:
            distiller = run.distiller
        elif model is not None and distiller is None:
            distiller = build_distiller(config, index.num_classes, torch.device(config.device)).eval()
        compared = parity.compare(
            index,
            augment_of(config),
            images=images,
            threads=config.workers,
            logits_of=None if distiller is None else distiller.predict,
            device=config.device,
            decode=config.decode,
            on_bad=lambda path, why: warnings.warn(f"{path} cannot be read any more ({why})", stacklevel=2),
        )
        about = {"drift": parity.drift(compared), "image_size": config.image_size, "index": index.hash}
        loss = pack_loss(index.root, split)
        figures = ("mean_levels", "psnr_db", "jpeg_mean_levels", "jpeg_psnr_db")
        about |= {f"pack_{name}": None if loss is None else getattr(loss, name) for name in figures}
        found.compared.append(compared)
        found.losses.append(loss)
        found.rows.append({**compared._asdict(), **about, **parity.versions(compared.backend)})
    return found


def _run(path: str, changes: dict[str, Any]) -> LoadedRun:
    if not Path(path).exists():
        raise UserError(
            "--model must be the folder or checkpoint of a run, or the name of a model with published weights, got "
            f"{path!r}"
        )
    run = load_run(path, **changes)
    if changes.get("image_size") is None:
        return run
    shorter = default_eval_resize(run.config.image_size, run.config.crop_padding)
    return dataclasses.replace(run, config=dataclasses.replace(run.config, eval_resize=shorter))


def _named(model: str | None, changes: dict[str, Any]) -> TrainConfig:
    net = {} if model is None else {"student": model, "student_pretrained": True}
    given = {name: value for name, value in changes.items() if value is not None}
    return resolve(make_config({"objective": "ce", **net, **given}))
