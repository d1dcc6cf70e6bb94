"""What a connector is called in settings: its kind, and a factor; and how its first weights are drawn."""

from __future__ import annotations

from typing import Literal

from ijckd_fast.errors import UserError, did_you_mean

KINDS = ("bottleneck", "conv1x1", "linear", "mlp")
ConnectorInit = Literal["torch", "he"]


def parse_spec(spec: str) -> tuple[str, int]:
    """'bottleneck:4' -> ('bottleneck', 4); the factor is 2 when left out, and 1 for the kinds that have none.

    raises UserError for an unknown kind (nearest given) or a factor that is not a whole number >= 1
    """
    kind, colon, factor = spec.partition(":")
    if kind not in KINDS:
        raise UserError(
            f"unknown connector {spec!r}: wanted bottleneck:FACTOR, conv1x1, linear or mlp{did_you_mean(kind, KINDS)}"
        )
    if kind != "bottleneck":
        if colon:
            raise UserError(f"connector {spec!r}: only bottleneck takes a factor, write {kind!r}")
        return kind, 1
    if not colon:
        return kind, 2
    if not factor.isdecimal() or int(factor) < 1:
        raise UserError(f"connector {spec!r}: the factor must be a whole number >= 1, e.g. 'bottleneck:2'")
    return kind, int(factor)


def takes_map(spec: str) -> bool:
    """Whether the connector works on the student's map [B, Cs, H, W] (bottleneck, conv1x1) or on its pooled vector."""
    return parse_spec(spec)[0] in ("bottleneck", "conv1x1")
