"""Set before torch is imported: two spinning OpenMP threads on shared cores make small tests ten times slower."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_collection_finish() -> None:
    """What the imports have made stays: walking through it at each collection takes a fifth of small tests' time."""
    gc.collect()
    gc.freeze()
