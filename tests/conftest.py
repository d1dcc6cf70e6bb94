"""Set before torch is imported: two spinning OpenMP threads on shared cores make small tests ten times slower."""

import gc
import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--search-for", type=float, default=0.0, help="seconds for which test_search.py tries more random mixes"
    )


def pytest_collection_finish() -> None:
    """What the imports have made stays: walking through it at each collection takes a fifth of small tests' time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """tiny_run's images; not to be changed."""
    from tiny_run import write_tree

    return write_tree(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """Weights for tiny_run's teacher; not to be changed."""
    from tiny_run import write_teacher

    return write_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pt")
