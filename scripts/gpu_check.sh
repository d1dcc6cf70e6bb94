#!/usr/bin/env bash
# Checks the compiled ops on this machine's GPU, then times them and the whole training step:
#
#   scripts/gpu_check.sh [--out DIR] [--wheels DIR]
#
#   --out DIR      where the log, the table of steps and the benchmark's rows go (default runs/gpu_check)
#   --wheels DIR   a folder of wheels for what is missing here (Liger-Kernel, jsonargparse, ...), installed into a
#                  temporary folder, no network
#
# Needs the checkout with the two built libraries (ijckd_fast/head/_C.so, _C_cuda.so) and a Python with torch, pytest
# and hypothesis; PYTHON chooses it (default: .venv's, else python3). Every step has its own time limit and its own
# process, so that one that hangs or corrupts the GPU's memory spoils no other; the whole takes under 9 minutes. The
# exit status is 1 if any step failed. Without a GPU it says so and runs the CPU half. Rows are added to DIR/op.csv,
# DIR/step.csv, DIR/loader.csv and DIR/views.csv, never to results/: copy the good ones there.
set -uo pipefail

fail() {
    echo "gpu_check: $1" >&2
    exit 2
}

out=runs/gpu_check wheels=
while [ $# -gt 0 ]; do
    case $1 in
        --out | --wheels)
            [ $# -ge 2 ] || fail "$1 needs a folder"
            if [ "$1" = --out ]; then out=$2; else wheels=$2; fi
            shift 2
            ;;
        -h | --help)
            sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"
            exit
            ;;
        *) fail "unknown argument $1; known are --out DIR and --wheels DIR" ;;
    esac
done
[ -z "$wheels" ] || wheels=$(realpath -e "$wheels") || fail "--wheels: there is no such folder"
mkdir -p "$out" && out=$(realpath "$out") || fail "cannot make the folder $out"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
command -v "$python" >/dev/null || fail "there is no $python: set PYTHON to a Python with torch and pytest"
[ -e ijckd_fast/head/_C.so ] || fail "ijckd_fast/head/_C.so is missing: build it with scripts/test or carry it here"
export OMP_WAIT_POLICY=PASSIVE PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

log=$out/gpu_check.log steps=$out/steps.csv
: >"$log"
echo "step,result,seconds,what" >"$steps"
readonly whole_seconds=530
reserve=200 # seconds that the checks must leave to the benchmarks
failures=0

step() { # NAME LIMIT_SECONDS COMMAND...; the limit is cut to what is left of the whole
    local name=$1 limit=$2 left=$((whole_seconds - reserve - SECONDS)) began=$EPOCHREALTIME result code what mine
    shift 2
    if [ "$left" -lt 10 ]; then
        record "$name" "no time" 0 "the steps before took too long"
        return
    fi
    [ "$limit" -le "$left" ] || limit=$left
    mine=$(mktemp)
    printf '\n==== %s (at most %s s): %s\n' "$name" "$limit" "$*" | tee -a "$log"
    timeout --kill-after=5 "$limit" "$@" >"$mine" 2>&1
    code=$?
    cat "$mine" >>"$log"
    case $code in
        0) result=ok ;;
        124 | 137) result="time limit" ;;
        *) result="failed ($code)" ;;
    esac
    [ "$code" -eq 0 ] || tail -n 40 "$mine"
    # pytest's count, the benchmark's, the sanitizer's: the last line, but for the benchmark's JSON
    what=$(grep -v '^{' "$mine" | grep -v '^[[:space:]]*$' | tail -n 1 | tr -d '=,"' | cut -c1-100)
    rm -f "$mine"
    record "$name" "$result" "$(awk -v a="$began" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.1f", b - a }')" "$what"
}

record() { # NAME RESULT SECONDS WHAT
    echo "$1,$2,$3,$4" >>"$steps"
    echo "$1: $2 ($3 s) $4"
    case $2 in ok | skipped*) ;; *) failures=$((failures + 1)) ;; esac
}

tests() { # NAME LIMIT_SECONDS PYTEST_ARGUMENTS...
    local name=$1 limit=$2
    shift 2
    step "$name" "$limit" "$python" -m pytest -q -p no:cacheprovider "$@"
}

can_import() { "$python" -c "import $1" >/dev/null 2>&1; }

if [ -n "$wheels" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    step wheels 60 "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$site" "$wheels"/*.whl
    PYTHONPATH=$PYTHONPATH:$site
fi

step environment 90 "$python" - <<'PYTHON'
import os, platform, subprocess
import torch
from ijckd_fast.head import kernels_for, load_libraries

print("Python", platform.python_version(), "torch", torch.__version__, "cores", len(os.sched_getaffinity(0)))
for package in ("triton", "torchvision", "timm", "liger_kernel", "cut_cross_entropy", "jsonargparse", "rich"):
    try:
        print(package, getattr(__import__(package), "__version__", "of unknown version"))
    except Exception as error:  # a broken installation may raise anything
        print(package, "absent:", error)
cuda = load_libraries()
if torch.cuda.is_available():
    query = "name,driver_version,memory.total,clocks.sm,temperature.gpu"
    subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv"])
    major, minor = torch.cuda.get_device_capability()
    x = torch.ones(3, device="cuda")
    assert cuda, "ijckd_fast/head/_C_cuda.so is missing: build it where nvcc is, or carry it here"
    print(kernels_for((major, minor)))
    print(f"{torch.cuda.get_device_name()}, sm_{major}{minor}, CUDA {torch.version.cuda}; "
          f"the sum of three ones is {x.sum().item():g}")
else:
    print("no GPU; CUDA library", "loads" if cuda else "not built")
PYTHON
if can_import rich && can_import jsonargparse; then
    # a report, not a check: training needs more than the ops do
    step doctor 60 env COLUMNS=140 "$python" -m ijckd_fast.cli doctor
fi

if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    device=cuda
    unset IJCKD_GPU_TESTS_ON
    tests instructions 60 tests/gpu/test_instructions.py
    cases=tests/gpu/test_ops_cuda.py
    tests "ops float64" 60 $cases -k "float64 and not repeats"
    tests "ops float32" 60 $cases -k "no_worse and float32"
    tests "ops bfloat16" 90 $cases -k "no_worse and bfloat16"
    tests "ops float16" 90 $cases -k "no_worse and torch.float16"
    tests "bad labels" 30 $cases -k "out_of_range"
    tests gradcheck 45 $cases -k "gradcheck"
    tests opcheck 45 $cases -k "opcheck"
    tests "bitwise x10" 30 $cases -k "bitwise"
    tests "no host sync" 30 $cases -k "waits or sync_test"
    tests "CUDA graph" 45 $cases -k "graph"
    tests "torch.compile" 60 $cases -k "compiled"
    if can_import "jsonargparse, rich, timm, torchvision, pyarrow, safetensors, yaml"; then
        tests "trainer no sync" 60 tests/train/test_train.py -k "never_wait_for_a_gpu"
        tests "training step" 60 tests/gpu/test_step_cuda.py
        tests "views of blocks" 60 tests/gpu/test_block_views_cuda.py tests/gpu/test_block_loader_cuda.py
        step "views alone" 60 "$python" scripts/benchmark.py views --device cuda --save "$out/views.csv"
    else
        record "trainer no sync" "skipped" 0 "its packages are not all here; --wheels can bring them"
        record "training step" "skipped" 0 "its packages are not all here; --wheels can bring them"
        record "views of blocks" "skipped" 0 "its packages are not all here; --wheels can bring them"
        record "views alone" "skipped" 0 "its packages are not all here; --wheels can bring them"
    fi
    if can_import "nvidia.dali, torchvision, pyarrow, rich"; then
        tests "DALI on the GPU" 60 tests/data/test_loaders.py -k "a_gpu_gets"
        loader=("$python" scripts/benchmark.py loader --device cuda --images 1000 --batch 128 --steps 24
            --save "$out/loader.csv")
        step loader 100 "${loader[@]}" --repeats 3 --threads 8 15 --contenders dali dali-hybrid dali-gpu
        step "loader blocks" 80 "${loader[@]}" --repeats 2 --threads 8 \
            --contenders blocks blocks-bf16 blocks-gpu blocks-copies
    else
        record loader "skipped" 0 "DALI or torchvision is not here; --wheels can bring them"
    fi
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
    if [ -n "$sanitizer" ]; then
        for tool in memcheck racecheck; do
            step "$tool" 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool $tool --error-exitcode 9 \
                "$python" tests/gpu/small_shapes.py
        done
    else
        record "compute-sanitizer" "skipped" 0 "compute-sanitizer is not installed"
    fi
    # for the ops, which also get what the steps leave; torch.compile, a minute for two nets, is for one pair only
    reserve=120
    if can_import "torchvision, pyarrow, rich, yaml, PIL"; then
        backend=synthetic
        if can_import nvidia.dali; then backend=dali; fi
        training=("$python" scripts/benchmark.py step --device cuda --batch 256 --images 400 --data-backend $backend
            --repeats 2 --turn-seconds 1.5 --save "$out/step.csv")
        step "step r34-r18" 130 "${training[@]}" --pair r34-r18 \
            --contenders ours ours-graph eager-autocast eager-compile
        step "step r50-mv1" 80 "${training[@]}" --pair r50-mv1 --contenders ours ours-graph eager-autocast
    else
        record step "skipped" 0 "torchvision or another package of the trainer is not here; --wheels can bring them"
    fi
    reserve=0
    step benchmark "$whole_seconds" "$python" scripts/benchmark.py op --device cuda --dtype bfloat16 --repeats 50 \
        --workloads W1 W2 I1 I2 W3 W3b W2-ce W3-ce W1-kl W2-kl W3-kl --save "$out/op.csv" --plot "$out/op.png"
else
    device=cpu
    echo "gpu_check: torch finds no GPU here: running the CPU half"
    export OMP_NUM_THREADS=1 # two spinning threads make small tests ten times slower
    tests "ops on the CPU" 180 tests/head/test_{connector_match,classifier_loss,projected_classifier_loss,ops}.py
    # the GPU's tests on CPU tensors: proves the tests, not the kernels
    IJCKD_GPU_TESTS_ON=cpu tests "GPU tests on CPU" 120 tests/gpu
    unset OMP_NUM_THREADS
    reserve=0
    step benchmark 120 "$python" scripts/benchmark.py op --device cpu --workloads C512x1000 M1 --baselines eager \
        --repeats 5 --save "$out/op.csv" --plot "$out/op.png"
fi

echo
for rows in "$out/op.csv" "$out/step.csv"; do
    [ -s "$rows" ] || continue
    "$python" - "$rows" <<'PYTHON'
import csv, sys

with open(sys.argv[1]) as file:
    for row in csv.DictReader(file):
        peaks = " / ".join(f"{float(row[k]):.0f}" if row[k] else "-" for k in ("ours_peak_mb", "baseline_peak_mb"))
        print(f"{row['workload']:10} {row['dtype']:9} {row['mode']:26} {row['baseline']:20} "
              f"ours {float(row['ours_ms']):9.4f} ms baseline {float(row['baseline_ms']):9.4f} ms "
              f"ratio {float(row['ratio']):6.2f} MB {peaks}")
PYTHON
    echo
done
awk -F, '{ printf "%-22s %-14s %8s  %s\n", $1, $2, $3, $4 }' "$steps"
verdict="all steps ok"
[ "$failures" -eq 0 ] || verdict="$failures step$([ "$failures" -eq 1 ] || echo s) FAILED"
echo "gpu_check on $device: $verdict, $SECONDS s; log and rows in $out"
[ "$failures" -eq 0 ]
