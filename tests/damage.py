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


def damages(data: bytes, seed: int, count: int = FLIPS) -> Iterator[tuple[str, bytes]]:
    """What may become of `data`, each with a word: one bit flipped, `count` times, cut at five places, nothing."""
    for number, content in enumerate(flipped(data, seed, count)):
        yield f"flip {number}", content
    draw = random.Random(seed)
    for length in [draw.randrange(1, len(data)) for _ in range(5)] if len(data) > 1 else []:
        yield f"cut at {length}", data[:length]
    yield "empty", b""


def damaged(path: Path, seed: int, count: int = FLIPS) -> Iterator[str]:
    """Leaves `path` as each of `damages` has it, and says how. What was there comes back at the end."""
    whole = path.read_bytes()
    try:
        for how, content in damages(whole, seed, count):
            path.write_bytes(content)
            yield how
    finally:
        path.write_bytes(whole)
