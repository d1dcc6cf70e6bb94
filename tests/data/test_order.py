"""Which part of the data room may import which."""

import ast
from pathlib import Path

import pytest

DATA = Path(__file__).parents[2] / "ijckd_fast" / "data"
# From the ground up: each stands on those before it.
ORDER = ("counter_rng", "imagenet_names", "unreadable", "blocks", "sources", "index", "plan", "load", "prepare")


def test_every_part_is_in_the_order():
    parts = {p.stem for p in DATA.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert parts - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("part", ORDER)
def test_no_part_imports_a_later_one(part):
    paths = [DATA / f"{part}.py"] if (DATA / f"{part}.py").exists() else sorted((DATA / part).rglob("*.py"))
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ijckd_fast.data"):
                parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                assert parts[2] in ORDER[: ORDER.index(part) + 1], f"{path}: {node.module}"
