"""The fused head: connector projection, the teacher's classifier and every loss on them, as ops. Needs torch alone.

connector.py and classifier.py have the contract and the gradient of each op, dispatch.py what every call of one goes
through, frozen.py what a GPU keeps of the frozen classifier, libraries.py loads the compiled C++ of csrc/, reference.py
is the same ops in plain PyTorch: the oracle.

The names below are imported when they are asked for: the ops need the compiled libraries, of which `ijckd-fast doctor`
can say that they are missing.
"""

from __future__ import annotations

from typing import Any

from ijckd_fast.lazy import exports

__all__, _get = exports(__name__, __file__)


def __getattr__(name: str) -> Any:
    # Kept: every training step asks for the ops.
    return globals().setdefault(name, _get(name))
