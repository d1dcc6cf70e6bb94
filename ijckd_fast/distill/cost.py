"""What the trained student costs where it is deployed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ijckd_fast.nets import Backbone, count_macs, count_parameters, macs

if TYPE_CHECKING:
    from ijckd_fast.distill.distiller import Distiller


@torch.no_grad()
def deployed_cost(distiller: Distiller, image_size: int) -> tuple[int, int]:
    """Contract: `Distiller.deployed_cost`."""
    student, connector = distiller.student, distiller.connector
    if distiller.objective.infer_head == "student":
        return count_parameters(student), macs(student, image_size)
    assert connector is not None
    classifier = distiller.classifier_t
    parameters = count_parameters(student.net) + count_parameters(connector) + count_parameters(classifier)
    total = macs(Backbone(student, connector.takes_map), image_size) + classifier.weight.numel()
    image = next(student.parameters()).new_zeros(1, 3, image_size, image_size)
    if not connector.takes_map:
        x = image.new_zeros(1, student.channels)
    else:
        mode = student.training
        map_s, _ = student.eval().features(image, need_map=True)
        student.train(mode)
        assert map_s is not None
        size_t = distiller.map_size_t(image) or (map_s.shape[2], map_s.shape[3])
        x = map_s[:, :, : size_t[0], : size_t[1]]  # only its size matters from here on
    positions = x[0, 0].numel()
    return parameters, total + count_macs(connector.trunk, x) + connector.projection_macs(positions)
