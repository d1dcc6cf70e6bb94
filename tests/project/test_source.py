"""Rules of the layout that no compiler checks: who may include and import what, and that README names real things."""

import ast
import importlib
import pathlib
import re

import pytest

import ijckd_fast
from ijckd_fast.distill import PRESETS, TERMS, Term
from ijckd_fast.setting import settings_of

ROOT = pathlib.Path(__file__).parents[2]
MODULES = sorted((ROOT / "ijckd_fast").rglob("*.py"))


def imports(path: pathlib.Path) -> set[str]:
    """Dotted names of everything that the file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_kernels_know_no_torch():
    headers = [
        ROOT / "csrc" / f
        for f in (
            "host_device.h", "dtype.h", "row_math.h", "rows.h", "connector_match.h", "classifier_loss.h", "counts.h",
            "blocks.h",
        )
    ]  # fmt: skip
    for path in [*headers, *(ROOT / "csrc/cuda").iterdir()]:
        assert "torch/" not in path.read_text(), path


def test_host_code_launches_nothing():
    for path in (ROOT / "csrc").rglob("*.cpp"):
        assert "<<<" not in path.read_text(), path


def test_reference_imports_nothing_of_ours():
    assert not {name for name in imports(ROOT / "ijckd_fast/head/reference.py") if name.startswith("ijckd_fast")}


# The rooms and the modules beside them, from the ground up: each may import what stands before it, and itself.
ORDER = (
    "extras", "lazy", "errors", "home", "signals", "streams", "setting", "normalisation", "files", "console", "plots",
    "parallel", "head", "nets", "distill", "data", "theory", "evaluate", "teacher_cache", "train", "caching", "compare",
    "export", "commands", "cli",
)  # fmt: skip
# What stands on less than all that is below it.
STANDS_ON = {
    "head": {"lazy", "errors"},
    "data": {"extras", "lazy", "errors", "signals", "normalisation", "files", "console", "head"},
    "theory": {"lazy", "errors", "files", "console", "plots"},
    "nets": {"lazy", "errors", "normalisation", "files"},
}


def rooms_imported(path: pathlib.Path) -> set[str]:
    names = [name.split(".") for name in imports(path)]
    return {parts[1] for parts in names if parts[0] == "ijckd_fast" and len(parts) > 1}


def test_every_room_is_in_the_order():
    entries = {p.stem for p in (ROOT / "ijckd_fast").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert entries - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("room", ORDER)
def test_no_room_imports_a_higher_one(room):
    allowed = STANDS_ON.get(room, set(ORDER[: ORDER.index(room)])) | {room}
    paths = [p for p in MODULES if p.relative_to(ROOT / "ijckd_fast").parts[0].removesuffix(".py") == room]
    assert paths
    for path in paths:
        assert rooms_imported(path) <= allowed, path


def test_only_one_file_knows_dali():
    users = {p.name for p in MODULES if any(name.startswith("nvidia") for name in imports(p))}
    assert users <= {"dali.py", "doctor.py"}  # doctor asks whether it is installed


def test_public_functions_have_docstrings():
    missing = []
    for path in MODULES:
        body = ast.parse(path.read_text()).body
        classes = [node for node in body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
        # of a class's methods, __init__ and forward are described by the class, properties by their names, a term's by
        # Term
        methods = [
            m
            for c in classes
            for m in c.body
            if isinstance(m, ast.FunctionDef)
            and not m.decorator_list
            and not ("Term" in (ast.unparse(base) for base in c.bases) and hasattr(Term, m.name))
        ]
        told = ("forward", "extra_repr")
        for node in [*body, *methods]:
            public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
            if public and node.name not in told and ast.get_docstring(node) is None:
                missing.append(f"{path.name}: {node.name}")
    assert missing == []


_NOT_ON_THE_PAGE = {"dkd_warmup", "dkd_warmup_by", "infer_head"}  # recipes.md has DKD's warm-up


def test_readme_names_real_files_and_every_objective():
    text = (ROOT / "README.md").read_text()
    files = set(re.findall(r"\b(\w+\.(?:py|h|cpp|yaml))\b", text)) - {"config.yaml"}
    existing = {p.name for folder in ("ijckd_fast", "csrc", "scripts", "tests") for p in (ROOT / folder).rglob("*")}
    assert files - existing - {"setup.py"} == set()
    page = (ROOT / "docs/objectives.md").read_text()
    for name in PRESETS:
        assert f"`{name}`" in text
        assert f"\n| `{name}` | " in page
    for name in {name for term in TERMS for name in settings_of(term)} - _NOT_ON_THE_PAGE:
        assert f"`--{name.replace('_', '-')}" in page, name
    for name in ijckd_fast.__all__:
        assert name == name.upper() or name in text


def test_files_functions_and_lines_stay_readable():
    """No file over 500 lines, no function over 120, no line over 120 columns: what cannot be read in one go is several
    things.
    """
    long = []
    for path in MODULES:
        text = path.read_text()
        if text.count("\n") > 500:
            long.append(f"{path.name}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 120:
                long.append(f"{path.name}: {node.name} has {node.end_lineno - node.lineno + 1} lines")
    for path in written_by_hand():
        long += [f"{path.name}:{n}" for n, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 120]
    assert long == []


def written_by_hand() -> list[pathlib.Path]:
    """Code and build files; not tables of figures, nor Markdown, whose tables cannot be wrapped."""
    folders = ("ijckd_fast", "csrc", "scripts", "tests", "examples")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    return [p for p in [*paths, ROOT / "setup.py", ROOT / "CMakeLists.txt"] if p.suffix not in (".csv", ".so", ".pyc")]


@pytest.mark.parametrize("name", ["ijckd_fast", "ijckd_fast.distill", "ijckd_fast.head", "ijckd_fast.train"])
def test_names_imported_on_first_use_are_there(name):
    package = importlib.import_module(name)
    modules = {p.stem for p in pathlib.Path(package.__file__).parent.iterdir()}
    assert set(package.__all__) & modules == set()  # a module of that name would hide it once it is imported
    for public in package.__all__:
        getattr(package, public)


def test_what_a_room_exports_is_imported_from_the_room():
    """By other rooms, tests, examples and scripts: a file of a room can then be split without a change elsewhere."""
    deep = []
    users = [p for folder in ("tests", "examples", "scripts") for p in (ROOT / folder).rglob("*.py")]
    for path in [*MODULES, *users]:
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != "ijckd_fast" or len(parts) < 4 or parts[1] == room_of(path):
                continue
            if parts[-1] in importlib.import_module(f"ijckd_fast.{parts[1]}").__all__:
                deep.append(f"{path.name}: {name}")
    assert deep == []


def room_of(path: pathlib.Path) -> str | None:
    """The room that a file is in; None for one that is in none."""
    inside = path.is_relative_to(ROOT / "ijckd_fast")
    return path.relative_to(ROOT / "ijckd_fast").parts[0] if inside else None
