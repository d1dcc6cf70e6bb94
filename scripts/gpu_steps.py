"""The steps of gpu_check.sh: what each runs on a GPU, how long that may take there, and what shows without a GPU that
its command line and its tests are in order.

In commands {python} is the interpreter, {out} the folder of results, {pack} what gpu_pack made, {stage} the highest
stage of kernels whose smoke step was good. `expected` is an estimate, of a machine with an H200 and 16 cores where a
Python with torch starts in 8 to 10 seconds; nothing has been measured yet.
"""

from __future__ import annotations

from typing import NamedTuple

# parts, and the seconds each may take as a whole; None: as long as its steps need
PARTS: dict[str, float | None] = {"first": 500, "then": 180, "rest": None}


class Step(NamedTuple):
    """One process. It may take `limit` seconds, unless later steps of its part then had less than they are expected to
    need.

    command   of the GPU, or None: `on_cpu` is all there is
    on_cpu    of a machine without a GPU, or None: the step is skipped there
    env       variables that are set for it
    packages  what must be importable, else the step is skipped
    tool      a program that must be installed, likewise
    """

    name: str
    part: str
    expected: float
    command: str
    on_cpu: str | None = None
    env: dict[str, str] = {}  # noqa: RUF012 - never written to
    packages: tuple[str, ...] = ()
    tool: str | None = None

    @property
    def limit(self) -> float:
        """Seconds: a hang must not cost the steps behind it, nor a slow start the step."""
        return 10 + 2 * self.expected


PYTEST = "{python} -m pytest -v --tb=short --maxfail=5 -p no:cacheprovider --timeout=%d --timeout-method=thread"
BENCHMARK = "{python} scripts/benchmark.py"
OPS = "tests/gpu/test_ops_cuda.py"
BLOCKING = {"CUDA_LAUNCH_BLOCKING": "1"}  # an error is raised by the call that made it
TESTING, TRAINING = ("pytest", "pytest_timeout"), ("jsonargparse", "rich", "torchvision", "timm", "pyarrow", "yaml")
NCU = (
    "{tool} --clock-control none --profile-from-start off --kernel-name-base demangled --kernel-name regex:ijckd "
    "--launch-count 10 --section SpeedOfLight --section LaunchStats --section Occupancy --section WarpStateStats "
    "--section MemoryWorkloadAnalysis --csv --page details --log-file {out}/ncu.csv "
)
SANITIZER = "{tool} --error-exitcode 9 --print-limit 30 --tool "


def smoke(stage: int) -> Step:
    """Every kernel of the stage once."""
    shapes = "{python} tests/gpu/small_shapes.py"
    return Step(
        f"smoke stage {stage}", "first", 12, f"{shapes} cuda --stage {stage}", f"{shapes} cpu --stage {stage}", BLOCKING
    )


def op_tests(stage: int, expected: float, which: str) -> Step:
    """Each stage in a process of its own: a fault of one spoils no other's results."""
    tests = f"{PYTEST % 20} {OPS} -k '{which}'"
    env = BLOCKING | {"IJCKD_GPU_TESTS_STAGE": str(stage)}
    return Step(f"ops stage {stage}", "first", expected, tests, tests, env, TESTING)


def benchmark(name: str, part: str, expected: float, arguments: str, on_cpu: str | None) -> Step:
    """Of the ops, in the dtype that training has on a GPU."""
    command = f"{BENCHMARK} op --device cuda --dtype bfloat16 --stage {{stage}} --save {{out}}/op.csv {arguments}"
    return Step(name, part, expected, command, on_cpu)


# the tests of a GPU are run on tensors of the CPU where there is none
INSTRUCTIONS = f"{PYTEST % 60} tests/gpu/test_instructions.py"
PROMISES = (
    f"{PYTEST % 60} {OPS} -k 'repeats or waits or sync_test or graph or opcheck or gradcheck or out_of_range or "
    "elsewhere or compiled'"
)
TRAINER = (
    f"{PYTEST % 60} tests/gpu/test_block_views_cuda.py tests/gpu/test_block_loader_cuda.py tests/gpu/test_step_cuda.py "
    "tests/train/test_train.py::test_steps_never_wait_for_a_gpu"
)
STEP = f"{BENCHMARK} step --device cuda --batch 256 --save {{out}}/step.csv --repeats 2"
STEP_CPU = f"{BENCHMARK} step --device cpu --pair tiny --batch 8 --images 40 --steps 2 --repeats 1 --turn-seconds 1"
LOADER = f"{BENCHMARK} loader --device cuda --images 1000 --batch 128 --steps 24 --save {{out}}/loader.csv"

STEPS = (
    Step("instructions", "first", 15, INSTRUCTIONS, INSTRUCTIONS, packages=TESTING),
    smoke(0),
    smoke(1),
    smoke(2),
    benchmark(
        "benchmark",
        "first",
        110,
        "--workloads W1 W2 I1 I2 W3 W2-kl --baselines eager eager-graph stage0 stage1 --repeats 50 "
        "--kernels {out}/kernels.csv",
        f"{BENCHMARK} op --device cpu --workloads K1000 L100 --baselines eager --repeats 3 --save {{out}}/op.csv",
    ),
    op_tests(0, 45, "float64 or no_worse"),
    op_tests(1, 25, "no_worse and not float32"),
    op_tests(2, 25, "no_worse and not float32"),
    Step("promises", "first", 60, PROMISES, PROMISES, packages=TESTING),
    benchmark(
        "compile",
        "first",
        60,
        "--workloads W1 W2 W3 --baselines compile compile-graph --repeats 30",
        f"{BENCHMARK} op --device cpu --workloads tiny --baselines compile --repeats 3 --save {{out}}/op.csv",
    ),
    Step("views alone", "first", 20, f"{BENCHMARK} views --device cuda --save {{out}}/views.csv",
         f"{BENCHMARK} views --device cpu --images 64 --batch 16 --batches 2 --repeats 2 --save {{out}}/views.csv",
         packages=("pyarrow",)),
    Step("trainer and blocks", "first", 40, TRAINER, TRAINER, packages=(*TESTING, *TRAINING)),
    Step("ncu", "then", 40, NCU + "{python} scripts/profiled_steps.py --stage {stage} --workloads W2 I1 W2-kl",
         "{python} scripts/profiled_steps.py --device cpu --workloads tiny", tool="ncu"),
    Step("memcheck", "then", 50, SANITIZER + "memcheck {python} tests/gpu/small_shapes.py cuda --stage {stage}",
         "{python} tests/gpu/small_shapes.py cpu", {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, tool="compute-sanitizer"),
    Step("training step", "then", 35,
         f"{STEP} --pair r34-r18 --images 300 --data-backend synthetic --turn-seconds 1.5 "
         "--contenders ours ours-graph eager-autocast",
         f"{STEP_CPU} --data-backend synthetic --contenders ours eager-channels-last --save {{out}}/step.csv",
         packages=TRAINING),
    Step("training on blocks", "then", 30,
         f"{STEP} --pair r34-r18 --images 300 --data-backend blocks --turn-seconds 2 --contenders ours eager-autocast",
         f"{STEP_CPU} --data-backend blocks --contenders ours eager-channels-last --save {{out}}/step.csv",
         packages=TRAINING),
    Step("doctor", "rest", 40, "{python} -m ijckd_fast.cli doctor", "{python} -m ijckd_fast.cli doctor",
         packages=("jsonargparse", "rich")),
    Step("racecheck", "rest", 90, SANITIZER + "racecheck {python} tests/gpu/small_shapes.py cuda --stage {stage}",
         "{python} tests/gpu/small_shapes.py cpu", {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, tool="compute-sanitizer"),
    benchmark(
        "benchmark of more",
        "rest",
        150,
        "--workloads W3b W2-ce W3-ce W1-kl W3-kl --repeats 50 --kernels {out}/kernels.csv",
        f"{BENCHMARK} op --device cpu --workloads tiny-ce tiny-kl --repeats 3 --save {{out}}/op.csv",
    ),
    Step("step r34-r18 compiled", "rest", 120,
         f"{STEP} --pair r34-r18 --images 400 --data-backend dali --turn-seconds 1.5 --contenders ours eager-compile",
         packages=(*TRAINING, "nvidia.dali")),
    Step("step r50-mv1", "rest", 80,
         f"{STEP} --pair r50-mv1 --images 400 --data-backend synthetic --turn-seconds 1.5 "
         "--contenders ours ours-graph eager-autocast",
         packages=TRAINING),
    Step("DALI on the GPU", "rest", 40, f"{PYTEST % 60} tests/data/test_loaders.py -k a_gpu_gets",
         packages=(*TESTING, *TRAINING, "nvidia.dali")),
    Step("loader", "rest", 100, f"{LOADER} --repeats 3 --threads 8 15 --contenders dali dali-hybrid dali-gpu",
         packages=(*TRAINING, "nvidia.dali")),
    Step("loader blocks", "rest", 80,
         f"{LOADER} --repeats 2 --threads 8 --contenders blocks blocks-bf16 blocks-gpu blocks-copies",
         packages=TRAINING),
)  # fmt: skip
# first in every call: later steps ask what it found
ENVIRONMENT = Step(
    "environment", "first", 20, "{python} scripts/gpu_environment.py {out}",
    "{python} scripts/gpu_environment.py {out}",
)  # fmt: skip
