"""What answers after training as one module in plain PyTorch, with every BatchNorm folded."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijckd_fast.distill import Connector, Distiller
from ijckd_fast.nets import Tapped, fold_batch_norm


class Deployed(nn.Module):
    """images [B, 3, S, S] normalised RGB -> logits [B, K], float32; plain PyTorch only, so that it can be traced.

    backbone    a `Tapped` without its classifier
    connector   layers from the student's map [B, Cs, Hs, Ws] or pooled vector [B, Cs] to z, or Identity
    classifier  Linear to the K logits; where a connector on vectors ends in a layer without ReLU, it may be that layer
                and the teacher's classifier in one
    takes_map   whether the connector works on the map; its output's mean over the positions is z
    joined      whether the classifier is also the connector's last layer
    map_size    (H, W) to which the map is average-pooled before the connector, where the teacher's was smaller;
                None: as it is
    """

    def __init__(
        self,
        backbone: Tapped,
        connector: nn.Module,
        classifier: nn.Linear,
        *,
        takes_map: bool,
        joined: bool,
        map_size: tuple[int, int] | None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.connector = connector
        self.classifier = classifier
        self.takes_map = takes_map
        self.joined = joined
        self.map_size = map_size

    def features(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S] -> what the connector takes: map [B, Cs, H, W] or pooled vector [B, Cs]"""
        map_, pooled = self.backbone.features(images, need_map=self.takes_map)
        if map_ is None:
            return pooled
        return map_ if self.map_size is None else F.adaptive_avg_pool2d(map_, self.map_size)

    def connect(self, x: Tensor) -> Tensor:
        """What `features` returns -> z [B, C], which the classifier takes"""
        x = self.connector(x)
        return x.mean((2, 3)) if self.takes_map else x

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.connect(self.features(images)))


def deployed_module(distiller: Distiller, image_size: int) -> Deployed:
    """What answers after training, as one module on the CPU in eval mode; the distiller stays as it is.

    Backbone and own classifier, or backbone, connector and the teacher's classifier, as the objective's `infer_head`
    says.
    """
    student = copy.deepcopy(distiller.student)
    if distiller.objective.infer_head == "student":
        assert student.classifier is not None
        return assemble(student, None, copy.deepcopy(student.classifier), None, image_size)
    assert distiller.teacher is not None
    assert distiller.teacher.classifier is not None
    image = next(student.parameters()).new_zeros(1, 3, image_size, image_size)
    map_size_t = distiller.map_size_t(image)
    connector = copy.deepcopy(distiller.connector)
    return assemble(student, connector, copy.deepcopy(distiller.teacher.classifier), map_size_t, image_size)


@torch.no_grad()
def assemble(
    student: Tapped,
    connector: Connector | None,
    classifier: nn.Linear,
    map_size_t: tuple[int, int] | None,
    image_size: int,
) -> Deployed:
    """Folds and joins the parts, which it takes over.

    student     its own classifier is dropped
    connector   None: `classifier` takes the student's pooled vector
    classifier  the one that answers
    map_size_t  (H, W) of the teacher's map, where the objective matches maps
    The structure that comes out follows from architecture and shapes, not from the weights.
    """
    student.drop_classifier()
    parts = nn.ModuleList([student, *([connector] if connector is not None else []), classifier])
    parts.float().cpu().to(memory_format=torch.contiguous_format).eval().requires_grad_(False)
    images = random_images(image_size)
    fold_batch_norm(student.net, images)
    map_, pooled = student.features(images, need_map=connector is not None and connector.takes_map)
    x = pooled if map_ is None else map_  # [2, Cs, Hs, Ws] or [2, Cs]
    map_size = None
    if map_ is not None and map_size_t is not None:
        smaller = (min(map_.shape[2], map_size_t[0]), min(map_.shape[3], map_size_t[1]))
        map_size = smaller if smaller != tuple(map_.shape[2:]) else None
        x = F.adaptive_avg_pool2d(map_, smaller)
    joined = False
    layers: nn.Module = nn.Identity()
    if connector is not None and connector.takes_map:
        layers = _map_layers(connector, x)
    elif connector is not None:
        layers, classifier, joined = _vector_layers(connector, classifier, x)
    deployed = Deployed(student, layers, classifier, takes_map=map_ is not None, joined=joined, map_size=map_size)
    return deployed.eval().requires_grad_(False)


def _map_layers(connector: Connector, x: Tensor) -> nn.Module:
    """Trunk, projection as a 1x1 convolution, its BatchNorm folded into it, ReLU: [B, Cs, H, W] -> [B, Ct, H, W]."""
    channels, channels_in = connector.weight.shape
    projection = nn.Conv2d(channels_in, channels, 1, bias=False)
    projection.weight.copy_(connector.weight[:, :, None, None])
    norm = nn.BatchNorm2d(channels, eps=connector.eps)
    norm.load_state_dict(
        {
            "weight": connector.bn_weight,
            "bias": connector.bn_bias,
            "running_mean": connector.running_mean,
            "running_var": connector.running_var,
            "num_batches_tracked": connector.num_batches_tracked,
        }
    )
    trunk = list(connector.trunk) if isinstance(connector.trunk, nn.Sequential) else []
    layers = nn.Sequential(*trunk, projection, norm, nn.ReLU()).eval()
    fold_batch_norm(layers, x)
    return _without_identities(layers)


def _vector_layers(connector: Connector, classifier: nn.Linear, x: Tensor) -> tuple[nn.Module, nn.Linear, bool]:
    """(trunk and projection, classifier, whether the projection is part of the latter: where that is cheaper)"""
    assert connector.bias is not None
    channels, channels_in = connector.weight.shape
    projection = nn.Linear(channels_in, channels)
    projection.weight.copy_(connector.weight)
    projection.bias.copy_(connector.bias)
    trunk = list(connector.trunk) if isinstance(connector.trunk, nn.Sequential) else []
    classes = classifier.out_features
    joined = classes * channels_in < channels * channels_in + classes * channels
    if joined:
        # W (V x + c) + b = (W V) x + (W c + b)
        weight = classifier.weight.double()  # [K, Ct]
        both = nn.Linear(channels_in, classes)
        both.weight.copy_(weight @ projection.weight.double())
        bias = weight @ projection.bias.double()
        both.bias.copy_(bias if classifier.bias is None else bias + classifier.bias.double())
        classifier = both
    layers = nn.Sequential(*trunk, *([] if joined else [projection])).eval()
    fold_batch_norm(layers, x)
    return _without_identities(layers), classifier, joined


def _without_identities(layers: nn.Sequential) -> nn.Module:
    kept = [layer for layer in layers if not isinstance(layer, nn.Identity)]
    return nn.Sequential(*kept) if kept else nn.Identity()


def random_images(image_size: int) -> Tensor:
    """Two images [2, 3, S, S] to trace and time nets with, always the same."""
    return torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
