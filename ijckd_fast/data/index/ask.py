"""Asks DALI whether it makes of an image what Pillow does."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import PIL

from ijckd_fast.errors import out_of_memory

if TYPE_CHECKING:
    from ijckd_fast.data.index.dali import DaliDecoder

_ROUNDING = 0.1  # grey levels in the mean: what is rounded in another way here and there, and nowhere by more than one


class AskDali:
    """DALI's decoder, loaded when it is first needed; from any number of threads at once."""

    def __init__(self) -> None:
        self._decoder: DaliDecoder | None = None
        self._missing = False
        self._lock = threading.Lock()

    def can_be_asked(self) -> bool:
        """Whether DALI is installed. Loads it, which takes most of a second."""
        with self._lock:
            if self._decoder is None and not self._missing:
                try:
                    from ijckd_fast.data.index.dali import DaliDecoder
                except ImportError:
                    self._missing = True
                else:
                    self._decoder = DaliDecoder()
        return self._decoder is not None

    @property
    def loaded(self) -> bool:
        """Whether it was needed."""
        return self._decoder is not None

    @property
    def versions(self) -> str:
        """Of what is compared; '' without DALI."""
        if not self.can_be_asked():
            return ""
        from ijckd_fast.data.index.dali import VERSION

        return f"DALI {VERSION}, Pillow {PIL.__version__}"

    def same(self, encoded: bytes, rgb: np.ndarray) -> bool | None:
        """Whether DALI's pixels are `rgb` [h, w, 3] uint8, Pillow's, rounding apart; None where it cannot decode it."""
        assert self._decoder is not None
        try:
            theirs = self._decoder.decode(encoded, *rgb.shape[:2])
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            return None
        if theirs.shape != rgb.shape:
            return False
        apart = np.maximum(theirs, rgb) - np.minimum(theirs, rgb)
        return bool(apart.max() <= 1 and apart.mean() <= _ROUNDING)
