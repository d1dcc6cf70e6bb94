"""Connectors: student features to the teacher's feature space.

A connector is a trunk of ordinary layers followed by one projection, BatchNorm, ReLU, match and pooling, which are the
fused op `connector_match`. The projection's and its BatchNorm's parameters are therefore held here as plain tensors.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ijckd_fast.distill.connector_spec import ConnectorInit, parse_spec, takes_map
from ijckd_fast.distill.heads import ops_of
from ijckd_fast.errors import UserError
from ijckd_fast.parallel import batch_norm


def build_connector(
    spec: str, student_channels: int, teacher_channels: int, init: ConnectorInit = "torch"
) -> Connector:
    """Builds a connector from Cs to Ct channels.

    spec     'bottleneck:F'  on the map: conv1x1 Cs->Ct//F, BN, ReLU, conv3x3, BN, ReLU, conv1x1 ->Ct, BN, ReLU; no
                             biases (F = 2 when left out; IJCKD's and SimKD's)
             'conv1x1'       on the map: conv1x1 Cs->Ct, BN, ReLU; no bias (SRRL's)
             'linear'        on the pooled vector: linear Cs->Ct with bias
             'mlp'           on the pooled vector: linear Cs->Ct, BN, ReLU, linear Ct->Ct with bias
    init     'torch'  first weights as PyTorch's layers draw them (IJCKD's and SimKD's)
             'he'     weights N(0, 2 / (k k Cout)) of every k x k convolution and linear layer (SRRL's); biases as above
    raises   UserError for an unknown spec, or a factor greater than Ct
    """
    connector = _build(spec, student_channels, teacher_channels)
    if init == "he":
        layers = (layer for layer in connector.trunk.modules() if isinstance(layer, nn.Conv2d | nn.Linear))
        for weight in (*(layer.weight for layer in layers), connector.weight):
            nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
    return connector


def _build(spec: str, student_channels: int, teacher_channels: int) -> Connector:
    kind, factor = parse_spec(spec)
    if kind == "bottleneck":
        width = teacher_channels // factor
        if width < 1:
            raise UserError(
                f"connector {spec!r} leaves no channel of the teacher's {teacher_channels}: choose a factor of at most"
                f" {teacher_channels}"
            )
        trunk = nn.Sequential(
            nn.Conv2d(student_channels, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        return Connector(spec, trunk, width, teacher_channels)
    if kind == "conv1x1":
        return Connector(spec, nn.Identity(), student_channels, teacher_channels)
    if kind == "linear":
        return Connector(spec, nn.Identity(), student_channels, teacher_channels)
    trunk = nn.Sequential(
        nn.Linear(student_channels, teacher_channels, bias=False),
        nn.BatchNorm1d(teacher_channels),
        nn.ReLU(inplace=True),
    )
    return Connector(spec, trunk, teacher_channels, teacher_channels)


class Connector(nn.Module):
    """Trunk, then projection Cin -> Ct; on maps with BatchNorm and ReLU, on vectors with a bias instead.

    takes_map               input is the student's map [B, Cs, H, W]; else its pooled vector [B, Cs]
    trunk                   layers before the projection (Identity for conv1x1 and linear)
    weight                  [Ct, Cin]; bias [Ct] on vectors, else None
    bn_weight, bn_bias      [Ct] on maps, else None; running_mean, running_var [Ct], num_batches_tracked likewise
    relu                    whether the projection ends in a ReLU (the teacher's map does)
    process_group           over whose processes its BatchNorm takes the statistics of a training batch; None: this
                            process's own
    """

    momentum: float | None = 0.1  # None: running statistics are the mean over all batches, as torch's BatchNorm has it
    eps = 1e-5

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(self, spec: str, trunk: nn.Module, channels_in: int, teacher_channels: int) -> None:
        super().__init__()
        self.spec = spec
        self.process_group: dist.ProcessGroup | None = None
        self.takes_map = takes_map(spec)
        self.relu = self.takes_map
        self.trunk = trunk
        self.weight = nn.Parameter(torch.empty(teacher_channels, channels_in))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # what Conv2d and Linear do
        if self.takes_map:
            self.register_parameter("bias", None)
            self.bn_weight = nn.Parameter(torch.ones(teacher_channels))
            self.bn_bias = nn.Parameter(torch.zeros(teacher_channels))
            self.register_buffer("running_mean", torch.zeros(teacher_channels))
            self.register_buffer("running_var", torch.ones(teacher_channels))
            self.register_buffer("num_batches_tracked", torch.tensor(0))
        else:
            bound = 1 / math.sqrt(channels_in)
            self.bias = nn.Parameter(torch.empty(teacher_channels).uniform_(-bound, bound))
            for name in ("bn_weight", "bn_bias"):
                self.register_parameter(name, None)
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                self.register_buffer(name, None)

    def forward(
        self, x: Tensor, *, map_t: Tensor | None = None, pooled_t: Tensor | None = None, head: str = "fused"
    ) -> tuple[Tensor, Tensor]:
        """z = GAP(g(x)) and its distance to the teacher's features; gradients go to x and to the parameters.

        x         the student's map [B, Cs, H, W] or, for linear and mlp, its pooled vector [B, Cs]
        map_t     [B, Ct, H, W], or
        pooled_t  [B, Ct]: what to match; neither: fm is 0
        head      'fused': ops.connector_match; 'reference': reference.connector_match
        returns   (z [B, Ct], fm []), float32 or, for float64 input, float64
        """
        u = self.trunk(x)  # [B, Cin, H, W] or [B, Cin]
        return ops_of(head).connector_match(
            u,
            self.weight,
            self.bias,
            bn_weight=self.bn_weight,
            bn_bias=self.bn_bias,
            running_mean=self.running_mean,
            running_var=self.running_var,
            num_batches_tracked=self.num_batches_tracked,
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
            relu=self.relu,
            map_t=map_t,
            pooled_t=pooled_t,
            process_group=self.process_group,
        )

    def connected_map(self, x: Tensor) -> Tensor:
        """Z = g(x), the map whose mean over the positions is z, in plain PyTorch: the fused op never has it whole.

        In training mode with the batch's statistics, and running ones that follow, as `forward` has them.

        x        the student's map [B, Cs, H, W]; a connector on vectors has no such map
        returns  [B, Ct, H, W], float32 or, for float64 input, float64
        """
        if not self.takes_map:
            raise RuntimeError(f"Connector.connected_map: expected a connector on maps, got {self.spec!r}")
        y = F.conv2d(self.trunk(x), self.weight[:, :, None, None])  # [B, Ct, H, W]
        y = y if y.dtype == torch.float64 else y.float()
        affine, running = (self.bn_weight, self.bn_bias), (self.running_mean, self.running_var)
        if self.training:
            counted = (*running, self.num_batches_tracked)
            y = batch_norm(y, *affine, counted, momentum=self.momentum, eps=self.eps, group=self.process_group)
        else:
            y = F.batch_norm(y, *running, *affine, eps=self.eps)
        return F.relu(y) if self.relu else y

    def projection_macs(self, positions: int) -> int:
        """Multiply-accumulates of the projection for one image whose map has `positions` = H*W (1 for a vector)."""
        return self.weight.numel() * positions
