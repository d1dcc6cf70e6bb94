#!/usr/bin/env python
"""One warm step of each workload of `benchmark.py op` between cudaProfilerStart and Stop, for Nsight Compute:
`ncu --profile-from-start off python scripts/profiled_steps.py --workloads W2`.
"""

from __future__ import annotations

import argparse

import benchmark
import torch


def main() -> None:
    """Runs each workload's step three times, the last one profiled."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--workloads", nargs="+", choices=tuple(benchmark.WORKLOADS), default=["W2"], metavar="NAME")
    parser.add_argument("--stage", type=int, choices=(0, 1, 2), default=2)
    args = parser.parse_args()
    if benchmark.ops.load_libraries() and args.device == "cuda":
        torch.ops.ijckd.limit_stage(args.stage)
    for name in args.workloads:
        w, dtype = benchmark.WORKLOADS[name], torch.bfloat16
        step = benchmark.make_contender("ours", w, benchmark.make_tensors(w, dtype, args.device), "both", dtype)
        for _ in range(2):
            step()
        if args.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        step()
        if args.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
        print(f"{name}: one step profiled", flush=True)


if __name__ == "__main__":
    main()
