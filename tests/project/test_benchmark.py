"""scripts/benchmark.py: the JSON line, the CSV, the refusal of wrong results. Nothing here judges speed."""

import csv
import importlib.util
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from ijckd_fast import head as ops
from ijckd_fast.data.load import pillow
from ijckd_fast.distill import Distiller

ROOT = pathlib.Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("benchmark", ROOT / "scripts" / "benchmark.py")
benchmark = importlib.util.module_from_spec(spec)
sys.modules["benchmark"] = benchmark  # NamedTuple looks its module up
spec.loader.exec_module(benchmark)

QUICK = ["op", "--device", "cpu", "--repeats", "3", "--dtype", "float32", "--baselines", "eager"]
CONTRACT = {
    "what": str,
    "workload": str,
    "device": str,
    "dtype": str,
    "mode": str,
    "baseline": str,
    "ours_ms": float,
    "baseline_ms": float,
    "ratio": float,
    "ours_peak_mb": float,
    "baseline_peak_mb": float,
    "repeats": int,
}


def rows_of(capsys):
    """(rows of the last line of stdout, stderr)."""
    out, err = capsys.readouterr()
    return json.loads(out.splitlines()[-1])["rows"], err


@pytest.mark.parametrize("mode", ["forward", "both"])
def test_last_line_is_the_json_contract(capsys, mode):
    workloads = ["tiny", "tiny-ce", "tiny-kl"]
    assert benchmark.main([*QUICK, "--workloads", *workloads, "--mode", mode]) == 0
    rows, _ = rows_of(capsys)
    assert [(r["workload"], r["mode"], r["baseline"]) for r in rows] == [(n, mode, "eager") for n in workloads]
    for row in rows:
        assert list(row) == list(CONTRACT)
        for key, kind in CONTRACT.items():
            assert isinstance(row[key], kind) or (key.endswith("_peak_mb") and row[key] is None), key
        assert (row["what"], row["device"], row["dtype"], row["repeats"]) == ("op", "cpu", "float32", 3)
        assert row["ratio"] == pytest.approx(row["baseline_ms"] / row["ours_ms"], rel=1e-2)


def test_rows_are_appended_with_where_they_were_measured(capsys, tmp_path):
    path = tmp_path / "op.csv"
    for dtype in ("float32", "bfloat16"):
        assert benchmark.main([*QUICK, "--dtype", dtype, "--workloads", "tiny", "--save", str(path)]) == 0
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [r["dtype"] for r in rows] == ["float32", "bfloat16"]
    printed = rows_of(capsys)[0][0]
    assert {k: rows[1][k] for k in ("ours_ms", "baseline_ms")} == {
        k: str(printed[k]) for k in ("ours_ms", "baseline_ms")
    }
    for row in rows:
        assert [row[k] for k in ("B", "Cs", "Ct", "K", "side", "losses")] == ["8", "6", "5", "11", "3", "ce+sr+map"]
        assert float(row["ours_p20_ms"]) <= float(row["ours_ms"]) <= float(row["ours_p80_ms"])
        assert row["torch"] == torch.__version__
        assert all(row[k] for k in ("machine", "threads", "python", "commit", "date"))


def test_threads_come_one_after_the_other(capsys, tmp_path):
    before, path = torch.get_num_threads(), tmp_path / "op.csv"
    argv = ["--workloads", "tiny", "tiny-nchw", "--threads", "1", "2", "--save", str(path)]
    assert benchmark.main([*QUICK, *argv]) == 0
    assert torch.get_num_threads() == before
    with path.open() as file:
        rows = [(row["threads"], row["workload"]) for row in csv.DictReader(file)]
    assert rows == [("1", "tiny"), ("1", "tiny-nchw"), ("2", "tiny"), ("2", "tiny-nchw")]


def test_small_shapes_are_a_set_of_their_own():
    small = benchmark.chosen_workloads(None, None, "cpu", "small")
    assert not set(small) & set(benchmark.chosen_workloads(None, None, "cpu"))
    assert {w.losses for w in small.values()} == {"ce+sr+fm", "ce+kl", "map", "ce+sr+map"}
    assert min(w.K for w in small.values() if w.K) == 10
    assert {w.side for w in small.values() if w.nchw} >= {7, 14}


def test_maps_lie_as_the_workload_says():
    for name, channels_last in (("tiny", True), ("tiny-nchw", False)):
        t = benchmark.make_tensors(benchmark.WORKLOADS[name], torch.float32, "cpu")
        for x in (t["u"], t["map_t"]):
            assert x.is_contiguous(memory_format=torch.channels_last) is channels_last
            assert x.is_contiguous() is not channels_last


@pytest.mark.parametrize("name", ["tiny", "tiny-nchw", "tiny-ce", "tiny-kl", "tiny-only-kl"])
def test_both_programs_compute_what_the_row_says(name):
    w = benchmark.WORKLOADS[name]
    t = benchmark.make_tensors(w, torch.float32, "cpu")
    ours, eager = (f(w, t)[0] for f in (benchmark.fused_loss, benchmark.eager_loss))
    torch.testing.assert_close(ours, eager)
    terms = set(w.losses.split("+"))
    assert terms <= {"ce", "sr", "kl", "fm", "map"}
    projects = w.projects_in_loss
    z = torch.nn.functional.linear(t["u"], t["projection"], t["projection_bias"]) if projects else t.get("z")
    if z is None:  # a map's own connector
        return
    named = {term: float(term in terms) for term in ("ce", "sr", "kl", "fm")}
    exact, *_ = benchmark.reference.classifier_loss(
        z, t["weight"], t.get("bias"), t["labels"], pooled_t=t["pooled_t"], **named
    )
    torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("match", benchmark.MATCHES)
def test_every_match_of_the_logits_is_what_eager_writes(match):
    w = benchmark.WORKLOADS["tiny-only-kl"]._replace(match=match)
    assert w.losses == f"ce+{match}"
    t = benchmark.make_tensors(w, torch.float32, "cpu")
    losses = [f(w, t)[0] for f in (benchmark.fused_loss, benchmark.eager_loss)]
    losses.append(benchmark.fused_loss(w, t, benchmark.reference)[0])
    torch.testing.assert_close(losses, [losses[0]] * 3)
    gradients = [torch.autograd.grad(loss, t["u"])[0] for loss in losses]
    torch.testing.assert_close(gradients, [gradients[0]] * 3)
    assert losses[0] != benchmark.fused_loss(w._replace(ce_only=True), t)[0]


def test_a_file_of_other_columns_is_left_alone(capsys, tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    assert benchmark.main([*QUICK, "--workloads", "tiny", "--save", str(path)]) == 2
    assert "has other columns" in capsys.readouterr().err
    assert path.read_text() == "a,b\n1,2\n"


def wrong_loss(monkeypatch):
    right = ops.classifier_loss

    def op(*args, **named):
        loss, parts, top1 = right(*args, **named)
        return loss * 1.01, parts, top1

    monkeypatch.setattr(ops, "classifier_loss", op)


def wrong_gradient(monkeypatch, factor=1.2):
    right = ops.connector_match

    def op(u, *args, **named):
        z, fm = right(u, *args, **named)
        z.register_hook(lambda gradient: gradient * factor)
        return z, fm

    monkeypatch.setattr(ops, "connector_match", op)


def nan_gradient(monkeypatch):
    wrong_gradient(monkeypatch, float("nan"))


@pytest.mark.parametrize(
    ("spoil", "what"), [(wrong_loss, "loss"), (wrong_gradient, "gradient of u"), (nan_gradient, "gradient of u")]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_op_is_not_timed(capsys, tmp_path, monkeypatch, spoil, what, dtype):
    spoil(monkeypatch)
    monkeypatch.setattr(benchmark.Timer, "__call__", lambda *_: pytest.fail("timed a wrong op"))
    path = tmp_path / "op.csv"
    assert benchmark.main([*QUICK, "--dtype", dtype, "--workloads", "tiny", "--save", str(path)]) == 1
    rows, err = rows_of(capsys)
    assert rows == []
    assert f"refused to time tiny in {dtype}: ours: {what} is off by" in err
    assert not path.exists()


def test_one_wrong_workload_leaves_the_others_their_rows(capsys, monkeypatch):
    nan_gradient(monkeypatch)  # tiny-ce has no connector
    assert benchmark.main([*QUICK, "--workloads", "tiny", "tiny-ce"]) == 1
    assert [row["workload"] for row in rows_of(capsys)[0]] == ["tiny-ce"]


def test_every_baseline_that_runs_here(capsys, tmp_path):
    argv = [a for a in QUICK if a not in ("--baselines", "eager")]
    plot = tmp_path / "op.png"
    assert benchmark.main([*argv, "--workloads", "tiny-ce", "--plot", str(plot)]) == 0
    rows, err = rows_of(capsys)
    wanted = ["eager", "compile", *(["linear_cross_entropy"] if hasattr(torch.nn, "LinearCrossEntropyOptions") else [])]
    assert [row["baseline"] for row in rows] == wanted, err
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="needs torch >= 2.13")
def test_a_wrong_baseline_is_left_out_and_said_so(capsys, monkeypatch):
    right = torch.nn.functional.linear_cross_entropy
    monkeypatch.setattr(torch.nn.functional, "linear_cross_entropy", lambda *a, **k: right(*a, **k) * 1.5)
    assert benchmark.main([*QUICK, "linear_cross_entropy", "--workloads", "tiny-ce"]) == 0
    rows, err = rows_of(capsys)
    assert [row["baseline"] for row in rows] == ["eager"]
    assert "tiny-ce: linear_cross_entropy left out: loss is off by" in err


def test_peak_memory_sees_what_a_step_holds():
    peak = benchmark.peak_mb(lambda: [torch.ones(40_000_000 // 4)], "cpu")
    if peak is None:
        pytest.skip("this kernel has no /proc/self/clear_refs")
    assert 38 < peak < 50


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--workloads", "W9"], "there is no 'W9'; choose from W1, W2"),
        (["--sweep", "k", "--workloads", "W1"], "leave --workloads out"),
        (["--shapes", "small", "--workloads", "W1"], "leave --workloads and --sweep out"),
        (["--threads", "1", "0"], "--threads must be at least 1, got 0"),
        (["--dtype", "float16"], "float16 is for the GPU"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--stage", "1"], "--stage is of a GPU's kernels"),
        (["--kernels", "/nowhere/kernels.csv"], "--kernels: there is no folder /nowhere"),
        (["--save", "/nowhere/op.csv"], "there is no folder /nowhere"),
    ],
)
def test_impossible_requests(capsys, argv, text):
    assert benchmark.main(["op", "--device", "cpu", *argv]) == 2
    assert text in capsys.readouterr().err


def test_kernels_are_read_from_traces():
    """Two runs of a step; the mean of a kernel's launches, then the median of the runs; in the order of the launches,
    not of the file.
    """
    tile, fill = (
        "void ijckd::(anonymous namespace)::exp_tile<ijckd::Tile<(int)64, 2> >(float const*, int)",
        "fill(char*)",
    )
    runs = [
        [
            {"cat": "kernel", "name": fill, "ts": 30, "dur": 7.0},
            {"cat": "kernel", "name": tile, "ts": 20, "dur": 5.0 + run},
            {"cat": "kernel", "name": tile, "ts": 10, "dur": 3.0 + run},
            {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 1, "dur": 99.0},
            {"name": "no category"},
        ]
        for run in (0, 1)
    ]
    assert benchmark.kernels_in(runs) == [("exp_tile<Tile<(int)64, 2> >", 4.5, 2), ("fill", 7.0, 1)]


def test_kernels_are_saved(capsys, tmp_path, monkeypatch):
    """Of every contender, as rows that kernel_model.py can put beside its own."""
    found = [benchmark.Kernel("exp_tile", 4.5, 2), benchmark.Kernel("grad_rows", 7.25, 1)]
    monkeypatch.setattr(benchmark, "kernels_of", lambda *_: found)
    path, saved = tmp_path / "kernels.csv", tmp_path / "op.csv"
    argv = [*QUICK, "--workloads", "tiny", "tiny-ce", "--kernels", str(path), "--save", str(saved)]
    assert benchmark.main(argv) == 0
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(benchmark.KERNEL_COLUMNS)
    assert [(r["workload"], r["contender"], r["kernel"], r["us"], r["count"]) for r in rows] == [
        (workload, contender, name, us, count)
        for workload in ("tiny", "tiny-ce")
        for contender in ("ours", "eager")
        for name, us, count in (("exp_tile", "4.5", "2"), ("grad_rows", "7.25", "1"))
    ]
    assert {(r["dtype"], r["mode"]) for r in rows} == {("float32", "both")}
    with saved.open() as file:
        assert {row["ours_launches"] for row in csv.DictReader(file)} == {"3"}


def test_cpu_forms_say_their_batch():
    chosen = benchmark.chosen_workloads(["W1", "W3"], None, "cpu")
    assert {name: w.B for name, w in chosen.items()} == {"W1": 256, "W3-B128": 128}
    assert benchmark.chosen_workloads(["W3"], None, "cuda")["W3"].B == 1024


def test_sweeps_cover_their_ranges():
    classes = [w.K for w in benchmark.chosen_workloads(None, "k", "cpu").values()]
    assert (classes[0], classes[-1]) == (100, 200_000)
    assert len({w.B for w in benchmark.chosen_workloads(None, "b", "cuda").values()}) >= 5


def test_help_names_units_workloads_and_baselines():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "benchmark.py", "op", "--help"], capture_output=True, text=True, check=True
    )
    for word in ("milliseconds", "MB = 1e6 bytes", *benchmark.WORKLOADS, *benchmark.BASELINES):
        assert word in done.stdout


LOADER = ["loader", "--images", "30", "--batch", "8", "--steps", "6", "--seconds", "0", "--repeats", "1"]
LOADER += ["--threads", "1", "--image-size", "32"]


def test_loader_rows(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ffcv", None)
    saved = tmp_path / "loader.csv"
    assert benchmark.main([*LOADER, "--save", str(saved)]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out.splitlines()[-1])["rows"]
    blocks = "blocks 256, 6 bits"
    names = ["dali", "dali-packed 256", blocks, "blocks-bf16 256, 6 bits", "pillow"]
    assert [row["contender"] for row in rows] == names
    assert "ffcv is left out: it is not installed" in err
    speeds = {row["contender"]: row["images_per_s"] for row in rows}
    for row in rows:
        assert (row["what"], row["baseline"], row["threads"], row["images"]) == ("loader", "torchvision", 1, 27)
        assert row["ratio"] == pytest.approx(row["images_per_s"] / row["baseline_images_per_s"], rel=1e-3)
        assert 0 < row["plan_percent"] < 100
        assert 0 < row["cpu_ms_per_image"] < 1000
    ratio = speeds[blocks] / speeds["dali-packed 256"]
    (told,) = [line for line in out.splitlines() if line.startswith(f"{blocks}, 1 threads: ")]
    assert f", {ratio:.1f} times dali-packed 256" in told
    assert "blocks pack: " in out
    with saved.open(newline="") as file:
        assert [row["contender"] for row in csv.DictReader(file)] == names
    with pytest.raises(SystemExit):
        benchmark.main([*LOADER, "--steps", "4"])
    assert "must be above 4, got 4" in capsys.readouterr().err


def test_a_loader_of_other_pixels_is_not_timed(capsys, monkeypatch):
    loader = benchmark.loader_benchmark
    monkeypatch.setattr(loader, "theirs", lambda *_: loader.Pass(1.0, 1.0))
    monkeypatch.setattr(loader, "ours", lambda *_: pytest.fail("timed a wrong loader"))
    make = pillow.arrange_planes
    monkeypatch.setattr(pillow, "arrange_planes", lambda planes, plan, i: make(planes, plan, i) ^ np.uint8(2))
    assert benchmark.main([*LOADER, "--contenders", "blocks", "--images", "20"]) == 1
    rows, err = rows_of(capsys)
    assert rows == []
    assert "refused to time blocks: it is 2.0" in err


STEP = ["step", "--pair", "tiny", "--device", "cpu", "--batch", "8", "--threads", "1", "--repeats", "1"]
PARTS = [
    "loader",
    "teacher forward",
    "student forward, backward",
    "connector trunk",
    "head",
    "optimizer, guard",
    "sum",
]


def test_step_rows(capsys, tmp_path):
    saved = tmp_path / "step.csv"
    quick = [*STEP, "--images", "40", "--steps", "2", "--amp-dtype", "float32", "--save", str(saved)]
    assert benchmark.main([*quick, "--contenders", "eager-fp32", "eager-autocast", "ours"]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert "skipped" not in err
    assert "left out" not in err
    assert [(r["what"], r["mode"], r["baseline"]) for r in rows] == [
        ("step", "ours", "eager-fp32"),
        ("step", "ours", "eager-autocast"),
        *(("step-part", part, "whole step") for part in PARTS),
    ]
    for row in rows:
        assert list(row) == list(CONTRACT)
        for key, kind in CONTRACT.items():
            assert isinstance(row[key], kind) or (key.endswith("_peak_mb") and row[key] is None), key
        assert (row["workload"], row["device"], row["dtype"], row["repeats"]) == ("tiny", "cpu", "float32", 1)
        assert row["ratio"] == pytest.approx(row["baseline_ms"] / row["ours_ms"], rel=1e-2)
    with saved.open(newline="") as file:
        full = list(csv.DictReader(file))
    whole, alone = full[:2], full[2:]
    assert [r["baseline_dtype"] for r in whole] == ["float32", "bfloat16"]
    for row in whole:
        assert float(row["ours_images_per_s"]) == pytest.approx(8e3 / float(row["ours_ms"]), rel=1e-3)
        assert 0 <= float(row["loader_wait_percent"]) <= 100
        assert (row["data_backend"], row["baseline_loader"], row["images"], row["steps"]) == (
            "dali",
            "torchvision",
            "36",
            "2",
        )
        assert all(row[k] for k in ("machine", "threads", "torch", "torchvision", "commit", "date"))
    assert float(alone[-1]["ours_ms"]) == pytest.approx(sum(float(r["ours_ms"]) for r in alone[:-1]), rel=1e-3)
    assert sum(float(r["share_percent"]) for r in alone[:-1]) == pytest.approx(100, abs=0.1)
    by_part = {row["mode"]: row for row in alone}
    # the convolutions of resnet8x0.5 on 32x32 images, by hand: 1, 2, 3 and 3 layers of stem and stages,
    # multiply-accumulates
    stem, one, two, three = (
        3 * 9 * 11,
        9 * (11 * 8 + 8 * 8) + 11 * 8,
        9 * (8 * 16 + 16 * 16) + 8 * 16,
        9 * 3 * 32 * 16 + 512,
    )
    macs = 1024 * (stem + one) + 256 * two + 64 * three
    assert float(by_part["teacher forward"]["gflop"]) == pytest.approx(2e-9 * 8 * macs, abs=1e-4)
    assert "to fix first: " in out


def test_a_step_that_computes_something_else_is_not_timed(capsys, monkeypatch):
    step = benchmark.step_benchmark
    right = step.eager_loss
    monkeypatch.setattr(step, "take_turn", lambda *_: pytest.fail("timed a wrong step"))
    quick = [*STEP, "--images", "10", "--data-backend", "synthetic", "--contenders", "ours", "eager-fp32"]
    monkeypatch.setattr(step, "eager_loss", lambda *args: 1.002 * right(*args))
    assert benchmark.main(quick) == 1
    rows, err = rows_of(capsys)
    assert rows == []
    assert "refused to time tiny: ours in float32: loss" in err

    def wrong_gradient(*args):
        loss = right(*args)
        return loss.detach() + 1.002 * (loss - loss.detach())

    monkeypatch.setattr(step, "eager_loss", wrong_gradient)
    assert benchmark.main(quick) == 1
    assert "refused to time tiny: ours in float32: gradient norm" in rows_of(capsys)[1]


def test_step_with_pooled_match_and_without_files(capsys):
    quick = [*STEP, "--images", "10", "--data-backend", "synthetic", "--steps", "1", "--objective", "ijckd-pooled"]
    assert benchmark.main([*quick, "--contenders", "ours", "eager-channels-last"]) == 0
    rows, _ = rows_of(capsys)
    assert [row["mode"] for row in rows] == ["ours", *PARTS]


def test_slow_contenders_take_few_steps():
    args = benchmark.parser().parse_args([*STEP, "--steps", "20", "--turn-seconds", "2", "--repeats", "3"])
    step = benchmark.step_benchmark
    assert step.pace_of(0.01, args) == (5, 20, 3)
    assert step.pace_of(0.6, args) == (3, 3, 3)
    assert step.pace_of(60.0, args) == (1, 1, 1)


@pytest.mark.parametrize(
    ("parts", "device", "wait", "ours_ms", "first"),
    [
        ({"loader": 9, "head": 1}, "cuda", 30, {"ours": 20}, "head (10 % of the sum): a larger --batch-size"),
        ({"loader": 9, "head": 1}, "cuda", 5, {"ours": 10}, "the loader (90 % of the sum, and 5 % of a step"),
        ({"loader": 1, "head": 9}, "cpu", 30, {"ours": 10}, "the loader (10 % of the sum, and 30 % of a step"),
        ({"loader": 9, "head": 1}, "cpu", 5, {"ours": 10}, "the loader (90 % of the sum"),
        (
            {"loader": 1, "teacher forward": 6, "student forward, backward": 5},
            "cpu",
            0,
            {"ours": 12},
            "teacher forward (50 % of the sum): a teacher cache",
        ),
        (
            {"loader": 1, "head": 2},
            "cuda",
            0,
            {"ours": 10, "ours-graph": 8},
            "--cuda-graph, with which a step takes 8.0 ms",
        ),
        ({"loader": 1, "head": 2}, "cuda", 0, {"ours": 10, "ours-graph": 9.5}, "head"),
    ],
)
def test_what_to_fix_first(parts, device, wait, ours_ms, first):
    said = benchmark.step_benchmark.fix_first(parts, device, wait, ours_ms)
    assert said.startswith(f"to fix first: {first}")


def test_rows_count_their_own_repeats():
    step = benchmark.step_benchmark
    turns = {"ours": [step.Turn(1, 50.0, 4.0, None)], "eager-fp32": [step.Turn(1, 100.0, 0.0, None)] * 3}
    parts = {"loader": [1.0, 2.0, 9.0], "head": [2.0, 2.0, 2.0]}
    whole, *alone = step.make_rows(turns, parts, {"head": 10**9}, {"batch": 8, "dtype": "float32"})
    assert (whole["ratio"], whole["ours_images_per_s"], whole["repeats"]) == (2.0, 160.0, 1)
    assert [(row["mode"], row["ours_ms"], row["share_percent"], row["repeats"]) for row in alone] == [
        ("loader", 2.0, 50.0, 3),
        ("head", 2.0, 50.0, 3),
        ("sum", 4.0, 100.0, 3),
    ]
    assert (alone[1]["gflop"], alone[1]["gflop_per_s"]) == (16.0, 8000.0)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--contenders", "eager-fp32"], "--contenders must name ours and one of eager-fp32, eager-channels-last"),
        (["--contenders", "ours", "ours-compile"], "got ours ours-compile"),
        (["--turn-seconds", "0"], "--turn-seconds must be above 0, got 0"),
        (["--save", "/nowhere/step.csv"], "there is no folder /nowhere"),
        (["--images", "9", "--batch", "16", "--data-dir", "/nowhere"], "/nowhere"),
    ],
)
def test_impossible_steps(capsys, argv, text):
    assert benchmark.main([*STEP, *argv]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--pair", "r18-r34"], ["--contenders", "liger"], ["--precision", "float32"]])
def test_unknown_step_options(capsys, argv):
    with pytest.raises(SystemExit) as ended:
        benchmark.main([*STEP, *argv])
    assert ended.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_views_rows(capsys, tmp_path, monkeypatch):
    saved = tmp_path / "views.csv"
    arguments = ["views", "--images", "5", "--batch", "4", "--image-size", "9", "--short", "24", "--batches", "2"]
    arguments += ["--repeats", "2", "--save", str(saved)]
    assert benchmark.main(arguments) == 0
    rows, _ = rows_of(capsys)
    assert [(row["blocks_in"], row["dtype"], row["written_bytes_per_image"]) for row in rows] == [
        ("host", "uint8", 243),
        ("host", "float32", 972),
        ("host", "bfloat16", 486),
    ]
    assert all(0 < row["images_per_s_p20"] <= row["images_per_s"] <= row["images_per_s_p80"] for row in rows)
    assert len(list(csv.DictReader(saved.open(newline="")))) == 3
    by_cpu = benchmark.views_benchmark.by_cpu

    def wrong(made, batch, out):
        run = by_cpu(made, batch, out)
        return lambda k: (run(k), out.add_(1))[0] if out.dtype == torch.float32 else run(k)

    monkeypatch.setattr(benchmark.views_benchmark, "by_cpu", wrong)
    assert benchmark.main(arguments) == 1
    rows, said = rows_of(capsys)
    assert [row["dtype"] for row in rows] == ["uint8", "bfloat16"]
    assert "refused to time float32, blocks in host: other bits" in said


def test_objective_rows(capsys, tmp_path, monkeypatch):
    saved = tmp_path / "objectives.csv"
    arguments = ["objectives", "--pair", "tiny", "--image-size", "16", "--batch", "4", "--repeats", "2"]
    chosen = [
        "--objectives",
        "dist",
        "ijckd:nkd=0.5:nkd_head=teacher",
        "kd:standardize_logits=true",
        "--save",
        str(saved),
    ]
    assert benchmark.main([*arguments, *chosen]) == 0
    rows, _ = rows_of(capsys)
    assert [(row["objective"], row["settings"]) for row in rows] == [
        ("kd", ""), ("dist", ""), ("ijckd", "nkd=0.5:nkd_head=teacher"), ("kd", "standardize_logits=true"),
    ]  # fmt: skip
    assert rows[0]["ratio_to_kd"] == 1
    assert all(0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"] for row in rows)
    assert len(list(csv.DictReader(saved.open(newline="")))) == 4
    assert benchmark.main([*arguments, "--objectives", "kd:ce"]) == 2
    assert "expected NAME:SETTING=VALUE:..., got 'ce'" in capsys.readouterr().err
    assert benchmark.main([*arguments, "--objectives", "kd:cee=1"]) == 2
    assert "objective 'kd:cee=1': " in capsys.readouterr().err
    for text in benchmark.objective_benchmark.VARIANTS:
        benchmark.objective_benchmark.objective_of(text)

    forward = Distiller.forward

    def wrong(self, *given, **named):
        out = forward(self, *given, **named)
        return out._replace(loss=out.loss * (1 + ("dist_inter" in out.parts)))

    monkeypatch.setattr(Distiller, "forward", wrong)
    assert benchmark.main([*arguments, "--objectives", "dist"]) == 1
    rows, said = rows_of(capsys)
    assert [row["objective"] for row in rows] == ["kd"]
    assert "refused to time dist: a loss of" in said


def test_index_rows(capsys, tmp_path, monkeypatch):
    names = ["imagenet", "imagenet-wds-val-fraction", "imagenet-parquet"]
    for name in names:
        tiny = benchmark.index_benchmark.STARTS[name]._replace(images=3007, files=7)
        monkeypatch.setitem(benchmark.index_benchmark.STARTS, name, tiny)
    monkeypatch.setattr(benchmark.index_benchmark, "PICTURES", 10)
    saved = tmp_path / "index.csv"
    arguments = ["index", "--files", "250", "--repeats", "1", "--threads", "1", "--save", str(saved)]
    args = benchmark.parser().parse_args([*arguments, "--starts", *names])
    assert benchmark.index_benchmark.run(args, benchmark.records.environment("cpu")) == 0
    rows, _ = rows_of(capsys)
    assert [(row["workload"], row["files"], row["folders"], row["repeats"]) for row in rows] == [
        ("first scan", 250, 3, 1),
        ("second start, every file", 250, 3, 1),
        ("second start, folders", 250, 3, 1),
        *((f"start, {name}", 3007, 7, 1) for name in names),
    ]
    first, *_, start = rows
    assert first["images_per_s"] == pytest.approx(250 / first["seconds"], rel=1e-2)
    assert start["peak_mb"] >= start["held_mb"]
    with saved.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 6


def test_stage_rows(capsys, tmp_path):
    saved = tmp_path / "stages.csv"
    arguments = ["--images", "5", "--batch", "3", "--image-size", "32", "--threads", "1", "2", "--repeats", "2"]
    assert benchmark.main(["stages", *arguments, "--dtypes", "uint8", "bfloat16", "--save", str(saved)]) == 0
    rows, _ = rows_of(capsys)
    assert {(row["dtype"], row["threads"]) for row in rows} == {(d, n) for d in ("uint8", "bfloat16") for n in (1, 2)}
    for row in rows:
        assert row["core_us"] > 0
        assert sum(row[name] for name in benchmark.stage_benchmark.SHARES) == pytest.approx(100, abs=1)
    with saved.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)


def test_wrong_views_are_not_timed(capsys, monkeypatch):
    right = benchmark.stage_benchmark.make

    def wrong(data, lanes, bits, out, clock=False):
        ticks = right(data, lanes, bits, out, clock)
        out[0, 0, 0, 0] += 9
        return ticks

    monkeypatch.setattr(benchmark.stage_benchmark, "make", wrong)
    assert benchmark.main(["stages", "--images", "2", "--image-size", "16", "--dtypes", "uint8"]) == 1
    assert "refused to time views: a view is" in capsys.readouterr().err


def test_photos_are_like_imagenet_s(tmp_path):
    benchmark.loader_benchmark.write_photos(tmp_path, 20, classes=2)
    files = sorted(tmp_path.rglob("*.jpg"))
    assert len(files) == 20
    assert {path.parts[-3] for path in files} == {"train", "val"}
    assert 80_000 < sum(path.stat().st_size for path in files) / 20 < 140_000


@pytest.mark.parametrize("what", ["loader", "index", "views", "objectives"])
def test_other_columns_are_refused_before_anything_is_measured(what, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    path.write_text("name,value\n")
    assert benchmark.main([what, "--save", str(path)]) == 2
    assert f"{path} has other columns (name,value...)" in capsys.readouterr().err
    assert path.read_text() == "name,value\n"
