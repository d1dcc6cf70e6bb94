"""scripts/gpu_check.sh without a GPU and without its own steps: what is left of a call in which a step fails, hangs or
dies, and what the next call does; scripts/gpu_pack's checks.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "scripts"))
import built_from  # noqa: E402
import gpu_check  # noqa: E402
import gpu_packing  # noqa: E402
from gpu_steps import ENVIRONMENT, PARTS, STEPS, Step  # noqa: E402

SAYS = "{{python}} -c \"print('{}')\""
ON_GPU = """{python} -c "
import json, pathlib
boot = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
found = dict(gpu='a GPU', boot=boot, packages=dict(rich='1'), tools=dict())
pathlib.Path('{out}/environment.json').write_text(json.dumps(found))
print('seen')"
"""


def step(name: str, command: str, part: str = "first", **more) -> Step:
    """A step of 3 seconds that runs the same with and without a GPU."""
    return Step(name, part, more.pop("expected", 3), command, more.pop("on_cpu", command), **more)


def says(name: str, part: str = "first", **more) -> Step:
    return step(name, SAYS.format(f"{name} was here"), part, **more)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Patience with a process that is told to end; the libraries of a checkout whose csrc/ has just been changed."""
    monkeypatch.setattr(gpu_check, "ON_CPU_SLOWER", 1)
    monkeypatch.setattr(gpu_check, "check_libraries", lambda: None)
    monkeypatch.setenv("PYTHON", sys.executable)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def call(out: Path, steps: list[Step], *arguments: str, environment: Step | None = None) -> int:
    environment = environment or ENVIRONMENT._replace(command=ON_GPU, on_cpu=ON_GPU)
    return gpu_check.main(["--out", str(out), *arguments], steps, environment)


def results(out: Path) -> dict[str, str]:
    with (out / "steps.csv").open() as file:
        return {row["step"]: row["result"] for row in csv.DictReader(file)}


# --------------------------------------------------------------------------------------------------------------------
# one step goes wrong

CRASH = '{python} -c "import os, signal; print(1, flush=True); os.kill(os.getpid(), signal.SIGSEGV)"'
HANG = "{python} -c \"import os, time; print('begun', os.getpid(), flush=True); time.sleep(600)\""
WRONG = {
    "fails": (step("bad", "{python} -c \"print('3 failed'); raise SystemExit(7)\""), "failed (7)", "3 failed"),
    "hangs": (step("bad", HANG, expected=-3.5), "time limit", ""),
    "dies": (step("bad", CRASH), "died of SIGSEGV", ""),
    "is not there": (step("bad", "/nowhere/python"), "failed (No such file or directory)", "/nowhere/python"),
}


@pytest.mark.parametrize("way", WRONG)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_other_steps_run(tmp_path, capfd, way, place):
    bad, result, what = WRONG[way]
    steps = [says("one"), says("two", "then")]
    steps.insert(place, bad._replace(part="first" if place < 2 else "then"))
    assert call(tmp_path, steps) == 1
    assert results(tmp_path) == {"environment": "ok", "one": "ok", "two": "ok", "bad": result}
    said = capfd.readouterr().out.splitlines()
    assert "gpu_check on a GPU: 1 step FAILED: bad, " in said[-1]
    assert any(line.startswith("bad ") and result in line and what in line for line in said[-5:])
    log = (tmp_path / "gpu_check.log").read_text()
    assert "one was here" in log
    assert "two was here" in log
    if way == "hangs":  # the log says where it was, though it could not be asked
        assert re.search(r"^begun \d+$", log, re.M)
        assert "Fatal Python error: Aborted" in log


def test_a_child_that_outlives_its_step_is_ended(tmp_path):
    """Such as a process that a test started and that holds the GPU."""
    script = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid)"
    assert call(tmp_path, [step("parent", f'{{python}} -c "{script}"')]) == 0
    child = int(re.search(r"^\d+$", (tmp_path / "gpu_check.log").read_text(), re.M)[0])
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("sleep still runs")


def test_a_killed_call_leaves_its_log_and_table(tmp_path):
    """The machine is taken away: what was printed until then is in the folder, and the next call goes on behind it."""
    script = f"""
        import sys; sys.path[:0] = [{str(ROOT / "scripts")!r}, {str(ROOT / "tests/project")!r}]
        import test_gpu_check as t, gpu_check, pathlib
        gpu_check.check_libraries = lambda: None
        t.call(pathlib.Path({str(tmp_path)!r}), [t.says("one"), t.step("two", t.HANG), t.says("three")])
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.DEVNULL)
    log = tmp_path / "gpu_check.log"
    deadline = time.monotonic() + 60
    while not (begun := re.search(r"^begun (\d+)$", log.read_text() if log.exists() else "", re.M)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert results(tmp_path) == {"environment": "ok", "one": "ok", "two": "running"}
    os.kill(int(begun[1]), signal.SIGKILL)  # nobody else ended it


def test_what_a_terminated_call_says(tmp_path, capfd):
    """SIGTERM, as `timeout` sends it, ends the step and prints the summary."""
    kill_parent = '{python} -c "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(600)"'
    with pytest.raises(SystemExit) as ended:
        call(tmp_path, [says("one"), step("two", kill_parent), says("three")])
    assert ended.value.code == 143
    assert results(tmp_path) == {"environment": "ok", "one": "ok", "two": "running"}
    assert "1 step FAILED: two" in capfd.readouterr().out.splitlines()[-1]


# --------------------------------------------------------------------------------------------------------------------
# the next call


def test_only_what_is_not_ok_is_done_again(tmp_path, capfd):
    flag = tmp_path / "flag"
    second = step("two", f"{{python}} -c \"import os; raise SystemExit(not os.path.exists('{flag}'))\"")
    steps = [says("one"), second]
    out = tmp_path / "out"
    assert call(out, steps) == 1
    assert results(out) == {"environment": "ok", "one": "ok", "two": "failed (1)"}
    flag.touch()
    assert call(out, steps) == 0
    assert results(out) == {"environment": "ok", "one": "ok", "two": "ok"}
    assert (out / "gpu_check.log").read_text().count("==== one") == 1
    assert call(out, steps, "--again", "one") == 0
    assert (out / "gpu_check.log").read_text().count("==== one") == 2
    assert (out / "gpu_check.log").read_text().count("==== two") == 2
    assert (out / "gpu_check.log").read_text().count("==== environment") == 1
    assert "two: ok before" in capfd.readouterr().out


def test_results_of_other_sources_or_of_another_device_do_not_count(tmp_path, monkeypatch):
    steps = [says("one")]
    call(tmp_path, steps)
    monkeypatch.setattr(gpu_check, "tree_hash", lambda: "another")
    call(tmp_path, steps)
    log = (tmp_path / "gpu_check.log").read_text()
    assert (log.count("==== one"), log.count("==== environment")) == (2, 2)
    found = json.loads((tmp_path / "environment.json").read_text())
    (tmp_path / "environment.json").write_text(json.dumps(found | {"gpu": "another GPU"}))
    call(tmp_path, steps)
    assert (tmp_path / "gpu_check.log").read_text().count("==== one") == 3


def test_parts(tmp_path):
    steps = [says("one"), says("two", "then"), says("three", "rest")]
    assert call(tmp_path, steps, "--then") == 0
    assert results(tmp_path) == {"environment": "ok", "two": "ok"}
    assert call(tmp_path, steps) == 0
    assert results(tmp_path) == {"environment": "ok", "two": "ok", "one": "ok"}
    assert call(tmp_path, steps, "--rest") == 0
    assert results(tmp_path)["three"] == "ok"


# --------------------------------------------------------------------------------------------------------------------
# what a step needs, and its seconds


def test_steps_without_what_they_need_are_skipped(tmp_path, capfd):
    steps = [
        says("here", packages=("rich",)),
        says("absent", packages=("rich", "jsonargparse")),
        says("tool", tool="no-such-tool"),
    ]
    assert call(tmp_path, steps) == 0
    assert results(tmp_path) == {"environment": "ok", "here": "ok", "absent": "skipped", "tool": "skipped"}
    said = capfd.readouterr().out
    assert "jsonargparse is not installed here: scripts/gpu_pack can bring it" in said
    assert "all steps ok (skipped: absent; tool), " in said.splitlines()[-1]


def test_a_machine_without_a_gpu_runs_the_cpus_commands(tmp_path, capfd):
    on_cpu = ON_GPU.replace("gpu='a GPU'", "gpu=None")
    steps = [
        says("one", on_cpu="{python} -c \"import os; print(os.environ['IJCKD_GPU_TESTS_ON'])\""),
        says("two", on_cpu=None),
    ]
    assert call(tmp_path, steps, environment=ENVIRONMENT._replace(command=on_cpu, on_cpu=on_cpu)) == 0
    assert results(tmp_path) == {"environment": "ok", "one": "ok", "two": "skipped"}
    said = capfd.readouterr().out.splitlines()
    assert "gpu_check on cpu: all steps ok (skipped: two)" in said[-1]
    assert "one: ok" in "\n".join(said)
    assert any(line.endswith(" cpu") for line in said)


def test_a_failed_environment_stops_nothing(tmp_path):
    bad = ENVIRONMENT._replace(command=CRASH, on_cpu=CRASH)
    assert call(tmp_path, [says("one")], environment=bad) == 1
    assert results(tmp_path) == {"environment": "died of SIGSEGV", "one": "ok"}


def test_benchmarks_take_the_stages_that_work(tmp_path, capfd):
    """A higher stage that failed its first look is left out of what follows."""
    asked = step("benchmark", SAYS.format("stage {{stage}}").replace("{{", "{").replace("}}", "}"))
    smoke = [step(f"smoke stage {i}", f'{{python}} -c "raise SystemExit({int(i == 2)})"') for i in range(3)]
    assert call(tmp_path, [*smoke, asked]) == 1
    assert "stage 1" in (tmp_path / "gpu_check.log").read_text()
    assert call(tmp_path / "good", [says("other"), asked]) == 0
    assert "stage 2" in (tmp_path / "good/gpu_check.log").read_text()


def test_a_hang_leaves_the_later_steps_their_time(tmp_path, monkeypatch):
    """Of 14 seconds the first may have at most those that the steps behind it do not need."""
    monkeypatch.setitem(gpu_check.PARTS, "first", 14.0)
    steps = [step("hangs", HANG, expected=1), says("two", expected=6), says("three", expected=5)]
    began = time.monotonic()
    assert call(tmp_path, steps) == 1
    assert time.monotonic() - began < 10
    assert results(tmp_path) == {"environment": "ok", "hangs": "time limit", "two": "ok", "three": "ok"}


def test_no_part_takes_longer_than_it_may(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu_check.PARTS, "first", 8.0)
    steps = [step("hangs", HANG, expected=4), step("hangs too", HANG, expected=4), says("three")]
    began = time.monotonic()
    assert call(tmp_path, steps) == 1
    assert time.monotonic() - began < 14
    found = results(tmp_path)
    assert found["hangs"] == "time limit"
    assert found["three"] == "no time"


def test_the_steps_fit_their_parts():
    for part, whole in PARTS.items():
        expected = ENVIRONMENT.expected + sum(each.expected for each in STEPS if each.part == part)
        assert whole is None or expected < whole, part
    assert (PARTS["first"], PARTS["then"]) == (500, 180)
    assert len({each.name for each in STEPS}) == len(STEPS)
    assert {each.part for each in STEPS} == set(PARTS)


def test_what_both_parts_leave_is_little_enough():
    """Eight files come back from a rented machine."""
    written = {"gpu_check.log", "steps.csv", "environment.json"}
    for each in STEPS:
        if each.part != "rest":
            written |= set(re.findall(r"{out}/([\w.]+)", each.command))
    assert len(written) <= 8, written
    assert all(re.fullmatch(r"[\w.-]+", name) for name in written)


def test_commands_name_what_exists():
    """Files, options of the benchmarks, tests that -k selects: all but what only a GPU can show."""
    for each in STEPS:
        for command in filter(None, (each.command, each.on_cpu)):
            for name in re.findall(r"(?:scripts|tests)/[\w/]+\.py", command):
                assert (ROOT / name).exists(), (each.name, name)
    import benchmark

    for each in STEPS:
        for command in filter(None, (each.command, each.on_cpu)):
            if "benchmark.py" in command:
                words = command.format(python="python", out="out", tool="", stage=2).split()
                args = benchmark.parser().parse_args(words[words.index("scripts/benchmark.py") + 1 :])
                if args.what == "op":
                    assert set(args.workloads) <= set(benchmark.WORKLOADS)


def test_much_output_is_cut_in_its_middle(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "MOST_LOG", 10_000)
    lots = "{python} -c \"print('first'); [print('x' * 99) for _ in range(1000)]; print('last')\""
    assert call(tmp_path, [says("one"), step("lots", lots), says("two")]) == 0
    log = (tmp_path / "gpu_check.log").read_text()
    assert len(log) < 14_000
    for word in ("one was here", "\nfirst\n", " bytes left out ", "\nlast\n", "two was here"):
        assert word in log


def test_plan_says_what_it_would_do(capsys):
    assert gpu_check.main(["--plan"]) == 0
    said = capsys.readouterr().out
    for each in STEPS:
        assert f"{each.name:22} {each.expected:4g} s expected, at most {each.limit:4g} s" in said
    assert re.search(r"^first: \d+ s expected of at most 500 s$", said, re.M)


# --------------------------------------------------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--second"], "unrecognized arguments: --second"),
        (["--first", "--then"], "not allowed with argument --first"),
        (["--out"], "expected one argument"),
        (["--again", "two"], "there is no step 'two' in this part; known are one"),
        (["--pack", "/nowhere"], "/nowhere is no pack (it has no pack.json)"),
        (["--out", "/proc/nowhere"], "No such file or directory"),
    ],
)
def test_impossible_requests(tmp_path, capsys, arguments, text):
    known = [says("one")] if "--again" in arguments else [says("one"), says("two", "then")]
    try:
        code = gpu_check.main(["--out", str(tmp_path), *arguments], known)
    except SystemExit as usage:
        code = usage.code
    assert code == 2
    assert text in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def fake_library(path: Path, sources: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x7fELF ijckd sources " + sources.encode() + b"\0")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A small checkout, with a pack of its sources."""
    (tmp_path / "csrc").mkdir()
    for name in ("CMakeLists.txt", "csrc/a.cpp"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(built_from, "ROOT", tmp_path)
    monkeypatch.setattr(built_from.fault, "__defaults__", (tmp_path,))
    for name in built_from.LIBRARIES:
        fake_library(tmp_path / "gpu_pack" / name, built_from.sources_hash(tmp_path))
    (tmp_path / "gpu_pack/pack.json").write_text("{}")
    (tmp_path / "ijckd_fast/head").mkdir(parents=True)
    return tmp_path


def test_a_packs_libraries_are_put_where_ours_belong(checkout):
    fake_library(checkout / "ijckd_fast/head/_C.so", "0" * 16)  # of other sources
    assert gpu_check.take_pack(None) == checkout / "gpu_pack"
    for name in built_from.LIBRARIES:
        assert built_from.fault(checkout / "ijckd_fast/head" / name, checkout) is None


def test_libraries_of_another_commit_are_refused(checkout, tmp_path, capsys):
    (checkout / "csrc/a.cpp").write_text("another commit")
    assert gpu_check.main(["--out", str(tmp_path / "out")], [says("one")]) == 2
    said = capsys.readouterr().err
    assert "gpu_pack/_C.so was built from other sources (" in said
    assert "make the pack again, with scripts/gpu_pack" in said
    assert not (tmp_path / "out").exists()
    (checkout / "gpu_pack/_C.so").unlink()
    assert gpu_check.main(["--out", str(tmp_path / "out")], [says("one")]) == 2
    assert "_C.so is missing: make the pack again" in capsys.readouterr().err


def test_libraries_in_the_checkout_are_asked_too(checkout, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(gpu_check, "ROOT", checkout)
    monkeypatch.setattr(built_from.fault, "__defaults__", (checkout,))
    with pytest.raises(gpu_check.Refused, match=r"_C.so is missing: build with scripts/test"):
        gpu_check.check_libraries()
    fake_library(checkout / "ijckd_fast/head/_C.so", built_from.sources_hash(checkout))
    gpu_check.check_libraries()  # a machine without a GPU needs no more
    fake_library(checkout / "ijckd_fast/head/_C_cuda.so", "0" * 16)
    with pytest.raises(gpu_check.Refused, match=r"_C_cuda.so was built from other sources \(0{16}; csrc/ here is"):
        gpu_check.check_libraries()


# --------------------------------------------------------------------------------------------------------------------
# gpu_pack


def wheel(folder: Path, name: str, *lines: str, tag: str = "py3-none-any", files: tuple[str, ...] = ()) -> Path:
    path = folder / f"{name}-1.5-{tag}.whl"
    text = "\n".join(["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.5", *lines])
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}-1.5.dist-info/METADATA", text + "\n\nText.\n")
        for each in files:
            file.writestr(each, "")
    return path


THERE = {"torch": "2.11.0", "pyyaml": None}


@pytest.mark.parametrize(
    ("lines", "more", "text"),
    [
        ((), {}, None),
        (("Requires-Python: >=3.10", "Requires-Dist: torch>=2.1", "Requires-Dist: PyYAML>=3.13"), {}, None),
        (("Requires-Dist: other>=1.4", "Requires-Dist: absent ; extra == 'all'"), {}, None),
        (("Requires-Dist: absent ; python_version < '3.12'",), {}, None),
        (("Requires-Dist: absent",), {}, "needs absent, which is neither in the pack nor on the machine"),
        (("Requires-Dist: torch>=2.12",), {}, "needs torch>=2.12, and there is 2.11.0"),
        (("Requires-Dist: other>=2",), {}, "needs other>=2, and there is 1.5"),
        (("Requires-Python: >=3.13",), {}, "is not for Python 3.12: it wants >=3.13"),
        ((), {"tag": "cp312-cp312-linux_x86_64"}, "is not pure Python"),
        ((), {"files": ("one-1.5.data/scripts/one",)}, "has files that want to be installed"),
    ],
)
def test_wheels_must_serve_there(tmp_path, lines, more, text):
    wheel(tmp_path, "other")
    wheel(tmp_path, "one", *lines, **more)
    fault = gpu_packing.wheels_fault(tmp_path, THERE)
    assert fault is None if text is None else text in fault


@pytest.fixture
def packing(tmp_path, monkeypatch):
    """gpu_pack without compiler and network."""
    monkeypatch.setattr(gpu_packing, "library_fault", lambda library: None)
    monkeypatch.setattr(
        gpu_packing, "compile_instructions", lambda into: (into / "instructions.so").write_bytes(b"x" * 99)
    )
    monkeypatch.setattr(gpu_packing, "download", lambda wanted, into: wheel(into, "one"))
    if not all((ROOT / "ijckd_fast/head" / name).exists() for name in built_from.LIBRARIES):
        pytest.skip("no CUDA library on this machine")
    return ["--no-build", "--out", str(tmp_path / "pack")]


def test_a_pack(tmp_path, packing, capsys):
    assert gpu_packing.main(packing) == 0
    said = capsys.readouterr().out
    for name in (*built_from.LIBRARIES, "instructions.so", "wheels/one-1.5-py3-none-any.whl"):
        assert (tmp_path / "pack" / name).exists()
        assert f"{name}: " in said
    assert json.loads((tmp_path / "pack/pack.json").read_text())["sources"] == built_from.sources_hash()
    assert re.search(r"[\d.]+ MiB and the checkout's [\d.]+, of 64: .*/pack is ready", said)


def test_a_pack_that_would_not_serve_leaves_the_one_before(tmp_path, packing, capsys, monkeypatch):
    assert gpu_packing.main(packing) == 0
    before = (tmp_path / "pack/pack.json").read_text()
    assert gpu_packing.main([*packing, "--limit", "1"]) == 1
    assert "more than --limit 1" in capsys.readouterr().err
    monkeypatch.setattr(gpu_packing, "library_fault", lambda library: f"{library.name} was built from other sources")
    assert gpu_packing.main(packing) == 1
    assert "_C.so was built from other sources" in capsys.readouterr().err
    assert (tmp_path / "pack/pack.json").read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["pack"]


def test_a_folder_that_is_no_pack_is_left_alone(tmp_path, packing, capsys):
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack/thesis.tex").touch()
    assert gpu_packing.main(packing) == 1
    assert "is there and is no pack: name another folder" in capsys.readouterr().err
    assert (tmp_path / "pack/thesis.tex").exists()


def test_another_python_is_told(packing, capsys):
    if sys.version_info[:2] == (3, 12):
        pytest.skip("this may be the machine's")
    stub = Path(packing[-1]).parent / "python"
    stub.write_text("#!/bin/sh\necho 3.11 2.11.0+cu130\n")
    stub.chmod(0o755)
    assert gpu_packing.main([*packing, "--python", str(stub)]) == 1
    assert "is Python 3.11 with torch 2.11.0+cu130, not 3.12 with 2.11.0" in capsys.readouterr().err


def test_the_libraries_need_the_stable_abi_alone(monkeypatch):
    """Whatever sources they are of, which test_build.py asks."""
    monkeypatch.setattr(built_from, "fault", lambda library: None)
    found = [ROOT / "ijckd_fast/head" / name for name in built_from.LIBRARIES]
    assert {gpu_packing.library_fault(library) for library in found if library.exists()} == {None}


def test_the_launchers_pass_arguments_on():
    for script, word in (("gpu_check.sh", "--plan"), ("gpu_pack", "--limit")):
        done = subprocess.run(
            [ROOT / "scripts" / script, "--help"], capture_output=True, text=True,
            env=dict(os.environ, PYTHON=sys.executable),
        )  # fmt: skip
        assert (done.returncode, word in done.stdout) == (0, True), done.stderr


def test_the_first_look_sees_wrong_results():
    """Of a result's norm: one element that a ReLU's rounding moved is none, NaN and a wrong factor are."""
    spec = importlib.util.spec_from_file_location("small_shapes", ROOT / "tests/gpu/small_shapes.py")
    small_shapes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(small_shapes)
    exact = [torch.ones((), dtype=torch.float64), torch.linspace(-3, 3, 1000, dtype=torch.float64)]
    moved = exact[1].clone()
    moved[500] += 1
    assert small_shapes.compare("maps", [exact[0].bfloat16(), moved.bfloat16()], exact, 0.1) is None
    for wrong in (exact[1] * 1.2, exact[1].roll(100), exact[1] * float("nan")):
        assert "maps: result 1 is off by" in small_shapes.compare("maps", [exact[0], wrong], exact, 0.1)
