"""The packaged teacher-student pairs: their nets, and what each of them deploys."""

from __future__ import annotations

from typing import Any

import torch

from ijckd_fast.distill import Distiller
from ijckd_fast.nets import count_parameters, macs
from ijckd_fast.train import TrainConfig, build_distiller, make_config, resolve
from ijckd_fast.train.config import load_preset, preset_of_pair
from ijckd_fast.train.layered import layered

CLASSES = {"imagenet": 1000, "cifar100": 100, "digits": 10, "glyphs": 2965}
"""K of the data that a preset's name begins with."""


def build_pair(name: str, **changes: Any) -> tuple[TrainConfig, Distiller]:
    """The nets of a preset with random weights, on the CPU: nothing is downloaded, no data is needed.

    name     of `pair_names`, as `preset_of_pair` takes it
    changes  settings instead of the preset's, as in `make_config`
    returns  (the settings, resolved; the distiller, in training mode)
    raises   UserError for another name (nearest given) or settings that do not fit
    """
    name = preset_of_pair(name)
    here = {"data_dir": ".", "device": "cpu", "teacher_pretrained": False, "allow_weak_teacher": True}
    config = resolve(make_config(layered(load_preset(name, changes.get("objective")), here, changes)))
    return config, build_distiller(config, CLASSES[name.partition("_")[0]], torch.device("cpu"))


def cost_row(config: TrainConfig, distiller: Distiller) -> dict[str, Any]:
    """What a pair deploys, beside its student with a classifier of its own and its teacher.

    returns  teacher, student, objective, connector: names; teacher_params, student_params, connector_params (0 where
             none is deployed), deployed_params: numbers of parameters, BatchNorm's included, before folding;
             student_macs, deployed_macs: multiply-accumulates per image of image_size in convolutions and linear layers
    """
    student, teacher, connector = distiller.student, distiller.teacher, distiller.connector
    assert teacher is not None
    if config.infer_head == "student":
        connector = None
    weights = student.channels * student.num_classes
    params, total = distiller.deployed_cost(config.image_size)
    return {
        "teacher": config.teacher,
        "student": config.student,
        "objective": config.objective,
        "connector": "none" if connector is None else connector.spec,
        "teacher_params": count_parameters(teacher),
        "student_params": count_parameters(student.net) + weights + student.num_classes,
        "student_macs": macs(student.net, config.image_size) + weights,
        "connector_params": 0 if connector is None else count_parameters(connector),
        "deployed_params": params,
        "deployed_macs": total,
    }
