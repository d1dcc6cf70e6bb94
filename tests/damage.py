"""Files as a bad disk leaves them: one bit flipped, cut, empty."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

FLIPS = int(os.environ.get("IJCKD_FLIPS", "40"))  # bits of each file; more of them take longer


def flipped(data: bytes, seed: int, count: int = FLIPS) -> Iterator[bytes]:
    """`data` with one bit flipped, `count` times, always the same bits."""
    draw = random.Random(seed)
    for _ in range(count):
        bit = draw.randrange(8 * len(data))
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)


def damaged(path: Path, seed: int, count: int = FLIPS) -> Iterator[str]:
    """Leaves `path` with one bit flipped, `count` times, then cut at five places, then empty; says how each time. What
    was there comes back at the end.
    """
    whole = path.read_bytes()
    cuts = [random.Random(seed).randrange(1, len(whole)) for _ in range(5)] if len(whole) > 1 else []
    try:
        for number, content in enumerate(flipped(whole, seed, count)):
            path.write_bytes(content)
            yield f"flip {number}"
        for length in cuts:
            path.write_bytes(whole[:length])
            yield f"cut at {length}"
        path.write_bytes(b"")
        yield "empty"
    finally:
        path.write_bytes(whole)
