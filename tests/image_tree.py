"""Folders of small images for the data tests, whole and damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from ijckd_fast.data import Index


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Waves with a little noise: as smooth as a photograph, and different for every seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / rng.uniform(4, 30) + y / rng.uniform(4, 30) + rng.uniform(0, 6)) for _ in range(3)]
    noise = rng.normal(0, 6, (height, width, 3))
    return Image.fromarray((127 + 100 * np.stack(waves, -1) + noise).clip(0, 255).astype(np.uint8))


def write_split(root: Path, split: str, classes: dict[str, int], size: tuple[int, int] | None = None) -> None:
    """root/split/<class>/<n>.jpg; `classes` maps names to numbers of images. size (h, w); None: several shapes."""
    shapes = [(48, 64), (64, 48), (40, 40), (37, 91)]
    for label, (name, count) in enumerate(classes.items()):
        folder = root / split / name
        folder.mkdir(parents=True)
        for n in range(count):
            height, width = size or shapes[n % len(shapes)]
            photo(height, width, seed=1000 * label + n).save(folder / f"{n:03d}.jpg", quality=92)


def write_odd_tree(root: Path, of_class: int) -> Path:
    """root/train with two classes of so many images and two odd ones each; root/val with 4."""
    write_split(root, "train", {"cat": of_class, "dog": of_class})
    write_split(root, "val", {"cat": 2, "dog": 2})
    photo(1, 5000, 1).save(root / "train" / "cat" / "high-1.png")
    photo(3, 2, 2).save(root / "train" / "cat" / "tiny.png")
    photo(50, 61, 3).convert("L").save(root / "train" / "dog" / "gray.jpg")
    photo(5, 300, 4).rotate(90, expand=True).convert("RGBA").save(root / "train" / "dog" / "wide-5.png")
    return root


def jpeg_bytes(path: Path) -> bytes:
    photo(48, 64).save(path, format="JPEG", quality=92)
    return path.read_bytes()


def _write_bytes(cut: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: (path.write_bytes(cut(jpeg_bytes(path))), None)[1]


DAMAGE: dict[str, Callable[[Path], None]] = {
    "truncated body": _write_bytes(lambda jpeg: jpeg[: len(jpeg) // 2]),
    "missing last bytes": _write_bytes(lambda jpeg: jpeg[:-2]),
    "truncated header": _write_bytes(lambda jpeg: jpeg[:200]),
    "zero bytes": _write_bytes(lambda jpeg: b""),
    "text": lambda path: (path.write_text("<html>404 not found</html>" * 40), None)[1],
}
"""Ways to make a file at a path unusable, by name. Each overwrites what is there."""


def same_index(a: Index, b: Index) -> bool:
    return (a.hash, list(a.paths), a.classes, a.quarantined) == (b.hash, list(b.paths), b.classes, b.quarantined)
