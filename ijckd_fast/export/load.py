"""The exported module, rebuilt from its files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from ijckd_fast import files
from ijckd_fast.distill import build_connector
from ijckd_fast.errors import UserError
from ijckd_fast.export.deployed import Deployed, assemble
from ijckd_fast.export.folder import CONFIG, FORMAT, MODEL
from ijckd_fast.nets import create_model


def load_exported(folder: str | Path) -> Deployed:
    """Rebuilds the module that `ijckd-fast export` wrote, on the CPU in eval mode: [B, 3, S, S] -> logits [B, K].

    folder  holds config.json, which names image size, normalisation and classes, and model.safetensors
    raises  UserError: no export there, a file damaged or changed since, another architecture under the student's name
    """
    folder = Path(folder)
    config = _read_config(folder)
    path = folder / MODEL
    try:
        data = files.read_bytes(path)
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} holds no {MODEL}, expected beside its {CONFIG}: export the run again with --overwrite"
        ) from error
    digests = config.get("sha256")
    if not isinstance(digests, dict) or hashlib.sha256(data).hexdigest() != digests.get(MODEL):
        raise UserError(
            f"{path} ({len(data)} bytes) is not the file that {CONFIG} describes (another SHA-256): it is damaged "
            "or was changed; export the run again with --overwrite"
        )
    weights = safetensors.torch.load(data)
    try:
        student = create_model(config["student"], len(config["classes"]), image_size=config["image_size"])
        connector = None
        channels = student.channels
        if config["connector"] is not None:
            channels = config["teacher_channels"]
            connector = build_connector(config["connector"], student.channels, channels)
        map_size_t = None if config["teacher_map_size"] is None else tuple(config["teacher_map_size"])
        classifier = nn.Linear(channels, len(config["classes"]), bias="classifier.bias" in weights)
        module = assemble(student, connector, classifier, map_size_t, config["image_size"])
    except (KeyError, TypeError, ValueError) as error:  # ValueError: UserErrors as well
        raise UserError(
            f"the net that {folder / CONFIG} describes cannot be built ({type(error).__name__}: {error}): the "
            "file was changed, or timm or torchvision is another version than it names; export the run again with "
            "--overwrite"
        ) from error
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"{path} does not fit the net that {CONFIG} describes: either {CONFIG} was changed, or timm or "
            f"torchvision is another version than it names ({' '.join(str(error).split())[:200]}); export the "
            "run again with --overwrite"
        ) from error
    return module


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    config = files.read_json(path, "export the run again with --overwrite")
    if config is None:
        raise UserError(f"no export in {folder} (it has no {CONFIG}): give the folder that ijckd-fast export wrote")
    if config.get("format") != FORMAT:
        raise UserError(f"{path} is not of an export (expected format {FORMAT!r}): export the run again")
    return config
